"""CNN14 of PANNs (Kong et al. 2020, arXiv:1912.10211) on log-mel spectrograms; needs torch and transformers only.

This file and dendritic.py are copied into every saved model folder, where `trust_remote_code=True` runs them: they
import nothing else of the project they come from.
"""

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import SequenceClassifierOutput

from .dendritic import DendriticMixin


class CNN14Config(PreTrainedConfig):
    """What a CNN14 is made of; the defaults are the published network's.

    Args:
        num_mel_bins: Mel bands of the input.
        num_hidden_layers: Convolution blocks, two convolutions each; every one has twice the channels of the one before
            and, but for the last, halves time and frequency.
        first_channels: Channels of the first block at width 1.
        width: Multiplies the channels of all blocks; 9/64 = 0.140625 gives 1.6 M parameters in place of 80 M.
        block_dropout: Dropout after each block.
        head_dropout: Dropout before the last hidden layer.
        dendrites: Module name to `{"count": dendrites, "activation": name}`.
    """

    model_type = "cnn14"

    num_mel_bins: int = 64
    num_hidden_layers: int = 6
    first_channels: int = 64
    width: float | int = 1.0
    block_dropout: float | int = 0.2
    head_dropout: float | int = 0.5
    dendrites: dict | None = None

    @property
    def channels(self) -> list[int]:
        """Channels of each block."""
        return [max(1, round(self.first_channels * self.width * 2**block)) for block in range(self.num_hidden_layers)]

    @property
    def hidden_size(self) -> int:
        """Width of the last hidden layer."""
        return self.channels[-1]

    @property
    def smallest_input(self) -> int:
        """Frames, and mel bands, that the halvings leave at least one of."""
        return 2 ** (self.num_hidden_layers - 1)


class ConvBlock(nn.Module):
    """Two 3 × 3 convolutions with batch normalisation and ReLU, then the mean over squares of `pool` × `pool`."""

    def __init__(self, inputs: int, outputs: int, pool: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.pool = pool

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(batch, inputs, frames, bands) to (batch, outputs, frames / pool, bands / pool)."""
        # A step is faster where the channels of a point lie together, as in all that follows.
        images = self.conv1(images).contiguous(memory_format=torch.channels_last)
        images = functional.relu(self.bn1(images))
        images = functional.relu(self.bn2(self.conv2(images)))
        return functional.avg_pool2d(images, self.pool) if self.pool > 1 else images


class CNN14ForAudioClassification(DendriticMixin, PreTrainedModel):
    """CNN14 with a linear head.

    A batch normalisation whose weights are frozen keeps its statistics too.
    """

    config_class = CNN14Config
    main_input_name = "input_values"
    _no_split_modules = ["ConvBlock"]

    def __init__(self, config: CNN14Config):
        super().__init__(config)
        channels = config.channels
        last = len(channels) - 1
        self.bn0 = nn.BatchNorm2d(config.num_mel_bins)
        self.layers = nn.ModuleList(
            ConvBlock(inputs, outputs, pool=1 if block == last else 2)
            for block, (inputs, outputs) in enumerate(zip([1, *channels[:-1]], channels, strict=True))
        )
        self.fc1 = nn.Linear(config.hidden_size, config.hidden_size)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.add_dendrites()
        self.post_init()

    def forward(
        self,
        input_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        drop_frames: torch.Tensor | None = None,
        drop_bands: torch.Tensor | None = None,
        mixup_weights: torch.Tensor | None = None,
        **kwargs,
    ) -> SequenceClassifierOutput:
        """Logits of log-mel spectrograms.

        The authors mask and mix after the first batch normalisation, so that it sees the clips as they are.

        Args:
            input_values: (batch, frames, num_mel_bins).
            labels: Class numbers (batch,); with them there is a loss.
            drop_frames: (batch, frames), True where the normalised spectrogram is set to 0, for SpecAugment.
            drop_bands: (batch, num_mel_bins), the same.
            mixup_weights: (batch / 2,), for mixup: the clips 0 and 1 become one, with this weight and 1 minus it, the
                clips 2 and 3 another, and so on. Logits and labels have half as many rows as the batch.

        Returns:
            `logits` (batch, num_labels) and `loss`.
        """
        images = self.bn0(input_values[:, None].transpose(1, 3)).transpose(1, 3)
        if drop_frames is not None:
            images = images.masked_fill((drop_frames[:, :, None] | drop_bands[:, None, :])[:, None], 0.0)
        if mixup_weights is not None:
            weights = mixup_weights[:, None, None, None].to(images.dtype)
            images = weights * images[0::2] + (1 - weights) * images[1::2]
        for layer in self.layers:
            images = functional.dropout(layer(images), self.config.block_dropout, self.training)
        frames = images.mean(3)
        pooled = frames.amax(2) + frames.mean(2)
        pooled = functional.dropout(pooled, self.config.head_dropout, self.training)
        logits = self.classifier(functional.relu(self.fc1(pooled)))
        loss = None if labels is None else self.loss_function(labels, logits, self.config, **kwargs)
        return SequenceClassifierOutput(loss=loss, logits=logits)

    def train(self, mode: bool = True) -> "CNN14ForAudioClassification":
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d) and not module.weight.requires_grad:
                module.eval()
        return self

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As published: Xavier uniform, biases 0; batch normalisation begins as the identity."""
        super()._init_weights(module)
        if isinstance(module, nn.Conv2d | nn.Linear):
            init.xavier_uniform_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)


# So that `save_pretrained` copies this file into the folder and names it in config.json's auto_map, every time.
CNN14Config.register_for_auto_class()
CNN14ForAudioClassification.register_for_auto_class("AutoModelForAudioClassification")
