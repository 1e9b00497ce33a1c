"""BEATs (Chen et al. 2022, arXiv:2212.09058) on log-mel spectrograms. Needs torch and transformers only.

This file and dendritic.py are copied into every saved model folder, where `trust_remote_code=True` runs them. They
import nothing else of the project that they come from.
"""

import math

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import SequenceClassifierOutput

from .dendritic import DendriticMixin


class BEATsConfig(PreTrainedConfig):
    """The parts of a BEATs. The defaults are those of the published networks.

    Args:
        num_mel_bins: Mel bands of the input.
        patch_size: Frames and mel bands of a patch. Patches do not overlap.
        embedding_size: Width of a patch before its projection to `hidden_size`.
        hidden_size, num_hidden_layers, num_attention_heads, intermediate_size: Of the transformer.
        position_kernel, position_groups: Kernel and groups of the convolution that encodes positions.
        num_buckets: Buckets of the relative positions, half of them for each direction.
        max_distance: All relative positions from this one on share the last bucket.
        hidden_dropout_prob: Dropout before the layers and after each part of a layer.
        attention_probs_dropout_prob: Dropout of the attention weights.
        head_dropout: Dropout before the classifier.
        layer_norm_eps: Of all layer normalisations.
        dendrites: Module name to `{"count": dendrites, "activation": name}`.
    """

    model_type = "beats"

    num_mel_bins: int = 128
    patch_size: int = 16
    embedding_size: int = 512
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    position_kernel: int = 128
    position_groups: int = 16
    num_buckets: int = 320
    max_distance: int = 800
    hidden_dropout_prob: float | int = 0.1
    attention_probs_dropout_prob: float | int = 0.1
    head_dropout: float | int = 0.1
    layer_norm_eps: float = 1e-5
    dendrites: dict | None = None

    @property
    def smallest_input(self) -> int:
        """Frames, and mel bands, of one patch."""
        return self.patch_size

    @property
    def deep_norm_gain(self) -> float:
        """Gain of the random weights that DeepNorm makes smaller."""
        return (8 * self.num_hidden_layers) ** -0.25


class BEATsEmbeddings(nn.Module):
    """The patches of a spectrogram with their positions, and the bias that relative positions add to attention."""

    def __init__(self, config: BEATsConfig):
        super().__init__()
        self.config = config
        size = config.patch_size
        self.patches = nn.Conv2d(1, config.embedding_size, size, stride=size, bias=False)
        self.patch_norm = nn.LayerNorm(config.embedding_size, config.layer_norm_eps)
        self.projection = nn.Linear(config.embedding_size, config.hidden_size)
        kernel = config.position_kernel
        position = nn.Conv1d(
            config.hidden_size, config.hidden_size, kernel, padding=kernel // 2, groups=config.position_groups
        )
        self.position = weight_norm(position, dim=2)
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.distances = nn.Embedding(config.num_buckets, config.num_attention_heads)

    def forward(self, spectrograms: torch.Tensor, inside: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Patches from first to last time step, within a step from low to high bands.

        Args:
            spectrograms: (batch, frames, num_mel_bins).
            inside: (batch, patches), False where a patch is padded.

        Returns:
            (batch, patches, hidden_size), and the bias (num_attention_heads, patches, patches) of query and key.
        """
        patches = self.patches(spectrograms[:, None]).flatten(2).transpose(1, 2)
        hidden = self.projection(self.patch_norm(patches)) * inside[:, :, None]
        length = hidden.shape[1]
        positions = functional.gelu(self.position(hidden.transpose(1, 2))[..., :length]).transpose(1, 2)
        hidden = functional.dropout(self.norm(hidden + positions), self.config.hidden_dropout_prob, self.training)
        return hidden, self.distances(self._buckets(length, hidden.device)).permute(2, 0, 1)

    def _buckets(self, length: int, device: torch.device) -> torch.Tensor:
        """The bucket of each pair of query and key, (length, length).

        As in T5 (Raffel et al. 2020, arXiv:1910.10683): small distances have a bucket each, larger ones share buckets
        on a logarithmic scale.
        """
        half = self.config.num_buckets // 2
        exact = half // 2
        places = torch.arange(length, device=device)
        offsets = places[None, :] - places[:, None]
        distances = offsets.abs()
        scale = torch.log(distances.clamp(min=1).float() / exact) / math.log(self.config.max_distance / exact)
        far = (exact + (scale * (half - exact)).long()).clamp(max=half - 1)
        return torch.where(distances < exact, distances, far) + half * (offsets > 0)


class BEATsAttention(nn.Module):
    """Attention whose relative position bias is scaled by a gate of the query (Chi et al. 2022, arXiv:2106.16138)."""

    def __init__(self, config: BEATsConfig):
        super().__init__()
        self.heads, self.dropout = config.num_attention_heads, config.attention_probs_dropout_prob
        size, small = config.hidden_size, config.deep_norm_gain
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            _linear(size, size, gain) for gain in (1.0, 1.0, small, small)
        )
        self.gate = nn.Linear(config.hidden_size // self.heads, 8)
        self.gate_scale = nn.Parameter(torch.ones(1, self.heads, 1, 1))

    def forward(self, hidden: torch.Tensor, bias: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
        """(batch, patches, hidden_size) to the same; bias and mask as `BEATsEmbeddings` has them."""
        query, key, value = (
            project(hidden).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        update, reset = self.gate(query).unflatten(3, (2, 4)).sum(4).sigmoid().chunk(2, dim=3)
        bias = (update * (reset * self.gate_scale - 1) + 2) * bias
        bias = bias.masked_fill(~inside[:, None, None, :], -torch.inf).to(query.dtype)
        dropout = self.dropout if self.training else 0.0
        attended = functional.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout)
        return self.out_proj(attended.transpose(1, 2).flatten(2))


class BEATsLayer(GradientCheckpointingLayer):
    """A transformer layer with DeepNorm (Wang et al. 2022, arXiv:2203.00555)."""

    def __init__(self, config: BEATsConfig):
        super().__init__()
        self.dropout, self.residual = config.hidden_dropout_prob, (2 * config.num_hidden_layers) ** 0.25
        self.attention = BEATsAttention(config)
        self.attention_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.fc1 = _linear(config.hidden_size, config.intermediate_size, config.deep_norm_gain)
        self.fc2 = _linear(config.intermediate_size, config.hidden_size, config.deep_norm_gain)
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, hidden: torch.Tensor, bias: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
        """As `BEATsAttention`."""
        changed = functional.dropout(self.attention(hidden, bias, inside), self.dropout, self.training)
        hidden = self.attention_norm(hidden * self.residual + changed)
        changed = functional.dropout(self.fc2(functional.gelu(self.fc1(hidden))), self.dropout, self.training)
        return self.norm(hidden * self.residual + changed)


class BEATsForAudioClassification(DendriticMixin, PreTrainedModel):
    """BEATs with a linear head, whose logits are averaged over the patches."""

    config_class = BEATsConfig
    main_input_name = "input_values"
    supports_gradient_checkpointing = True
    _no_split_modules = ["BEATsLayer"]

    def __init__(self, config: BEATsConfig):
        super().__init__(config)
        self.embeddings = BEATsEmbeddings(config)
        self.layers = nn.ModuleList(BEATsLayer(config) for _ in range(config.num_hidden_layers))
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.add_dendrites()
        self.post_init()

    def forward(
        self,
        input_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs,
    ) -> SequenceClassifierOutput:
        """Logits of log-mel spectrograms.

        Frames behind the last whole patch are not used. A patch that reaches into padding is left out, so that the
        logits of a clip are the same alone and in a batch. The first patches are always used.

        Args:
            input_values: (batch, frames, num_mel_bins).
            attention_mask: (batch, frames), 0 or False where a clip is padded. Default: no clip is padded.
            labels: Class numbers (batch,); with them there is a loss.

        Returns:
            `logits` (batch, num_labels) and `loss`.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_values[..., 0])
        size = self.config.patch_size
        inside = attention_mask.bool().unfold(1, size, size).all(2)
        inside = torch.cat([torch.ones_like(inside[:, :1]), inside[:, 1:]], dim=1)
        inside = inside.repeat_interleave(input_values.shape[2] // size, dim=1)
        hidden, bias = self.embeddings(input_values, inside)
        for layer in self.layers:
            hidden = layer(hidden, bias, inside)
        scores = self.classifier(functional.dropout(hidden, self.config.head_dropout, self.training))
        logits = (scores * inside[:, :, None]).sum(1) / inside.sum(1, keepdim=True)
        loss = None if labels is None else self.loss_function(labels, logits, self.config, **kwargs)
        return SequenceClassifierOutput(loss=loss, logits=logits)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As published: DeepNorm's Xavier normal in the layers, and normal elsewhere.

        transformers calls this only for modules with parameters of their own.
        """
        super()._init_weights(module)
        if isinstance(module, nn.Conv1d):
            weight = module.parametrizations.weight
            init.normal_(weight.original1, std=2 / math.sqrt(self.config.position_kernel * self.config.hidden_size))
            init.copy_(weight.original0, torch.norm_except_dim(weight.original1, 2, 2))
        elif isinstance(module, BEATsAttention):
            init.ones_(module.gate_scale)
        elif isinstance(module, nn.Linear) and hasattr(module, "gain"):
            init.xavier_normal_(module.weight, gain=module.gain)


def _linear(inputs: int, outputs: int, gain: float) -> nn.Linear:
    """A linear layer whose random weights are Xavier normal with a gain."""
    layer = nn.Linear(inputs, outputs)
    layer.gain = gain
    return layer


# So that `save_pretrained` copies this file into the folder and names it in config.json's auto_map, every time.
BEATsConfig.register_for_auto_class()
BEATsForAudioClassification.register_for_auto_class("AutoModelForAudioClassification")
