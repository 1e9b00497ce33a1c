"""Where an AST or a ViT looks in a spectrogram: attention rollout (Abnar and Zuidema 2020, arXiv:2005.00928)."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.functional import fold
from transformers import ASTModel, PreTrainedModel, ViTModel


def body_of(model: nn.Module) -> ASTModel | ViTModel | None:
    """The transformer over the patches of a spectrogram in a model. None if the model has none."""
    return next((module for module in model.modules() if isinstance(module, ASTModel | ViTModel)), None)


@torch.inference_mode()
def attention_rollout(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """How much of each place of a spectrogram flows into the tokens that the head reads.

    A layer passes on the mean of its input and of what its heads attend to: A = (I + mean of the heads' attention) / 2.
    The rollout is the product A_n · … · A_1 of the layers. An AST reads the class and the distillation token, and a ViT
    reads the class token. The rows of these tokens are averaged. The columns of the patches are the result.

    Only here the attention is eager, because the fused kernels do not return their weights. The logits of eager
    attention can differ in the last digits, so they are not used.

    Args:
        model: With a `body_of`, in evaluation mode.
        inputs: Those of the model.

    Returns:
        (batch, mel bands, frames), float32, or (batch, height, width) of the image that a ViT sees. Low bands come
        first. Where patches overlap, it is their mean. Where no patch reaches, it is NaN.
    """
    body = body_of(model)
    patches, product, sizes = body.embeddings.patch_embeddings.projection, [], []

    def multiply(module: nn.Module, inputs: tuple, output: tuple[torch.Tensor, torch.Tensor]) -> None:
        layer = (output[1].float().mean(1) + torch.eye(output[1].shape[-1], device=output[1].device)) / 2
        product[:] = [layer @ product[0] if product else layer]  # one matrix: those of all layers may not fit in memory

    def measure(module: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        sizes[:] = inputs[0].shape[2:], output.shape[2:]

    hooks = [layer.attention.register_forward_hook(multiply) for layer in body.layers]
    hooks.append(patches.register_forward_hook(measure))
    try:
        with _eager(body):
            model(**{name: values.to(model.device) for name, values in inputs.items()})
    finally:
        for hook in hooks:
            hook.remove()
    special = product[0].shape[-1] - sizes[1].numel()  # tokens before the patches
    flow = product[0][:, :special, special:].mean(1)
    return spread(flow, sizes[0], patches.kernel_size, patches.stride).cpu()


@contextmanager
def _eager(body: PreTrainedModel) -> Iterator[None]:
    """Attention that returns its weights."""
    before = body.config._attn_implementation
    body.set_attn_implementation("eager")
    try:
        yield
    finally:
        body.set_attn_implementation(before)


def spread(
    patches: torch.Tensor, size: tuple[int, int], kernel: tuple[int, int], stride: tuple[int, int]
) -> torch.Tensor:
    """Put a value for each patch, (batch, patches), at the place of the patch in an image, (batch, height, width)."""
    columns = patches[:, None].expand(-1, kernel[0] * kernel[1], -1)
    total, count = (fold(part, size, kernel, stride=stride)[:, 0] for part in (columns, torch.ones_like(columns)))
    return total / count
