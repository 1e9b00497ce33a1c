"""Models that take waveforms and compute the log-mel spectrogram on their device.

This file and those of the networks are copied into every saved model folder, where `trust_remote_code=True` runs them.
They need torch and transformers only.
"""

import warnings
from typing import Literal

import torch
from torch import nn
from transformers import ASTConfig, ASTForAudioClassification, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.audio_utils import mel_filter_bank
from transformers.modeling_outputs import SequenceClassifierOutput

from .beats import BEATsConfig, BEATsForAudioClassification
from .cnn14 import CNN14Config, CNN14ForAudioClassification
from .dendritic import DendriticMixin
from .vit import MelViTConfig, MelViTForAudioClassification

BACKBONES = {
    ASTConfig.model_type: (ASTConfig, ASTForAudioClassification),
    MelViTConfig.model_type: (MelViTConfig, MelViTForAudioClassification),
    CNN14Config.model_type: (CNN14Config, CNN14ForAudioClassification),
    BEATsConfig.model_type: (BEATsConfig, BEATsForAudioClassification),
}
PREEMPHASIS = 0.97
EPSILON = torch.finfo(torch.float32).eps
FLOOR = {"kaldi": EPSILON, "povey": EPSILON * 2**-30, "librosa": 1e-10}  # of the energies


class WaveformConfig(PreTrainedConfig):
    """A network for spectrograms, and the spectrogram that it gets.

    Args:
        backbone: The network's configuration, of a type in `BACKBONES`.
        convention: How the log-mel is computed. kaldi is that of `ASTFeatureExtractor`: symmetric Hann windows within
            the clip, mean removed, pre-emphasis, natural logarithm. povey is that of BEATs: the same with the default
            window of Kaldi and a floor for 16-bit samples. librosa is that of PANNs: periodic Hann windows centred on
            every hop, the clip reflected at its ends, mel scale and norm of Slaney, decibels.
        sampling_rate: Sampling rate of the waveforms in Hz.
        window_length, hop_length: In samples.
        num_mel_bins, low_frequency, high_frequency: The mel filters and their range in Hz.
        mean, std: The log-mel is normalised by `(x - mean) / (2 * std)`.
        max_length: Number of frames that the network gets. Shorter clips are padded, longer ones are cut. With None a
            clip keeps its length.
        trainable_filters: Whether the mel filters learn.
        dendrites: Module name to `{"count": dendrites, "activation": name}`.
    """

    model_type = "waveform-classifier"

    backbone: dict | PreTrainedConfig | None = None
    convention: Literal["kaldi", "povey", "librosa"] = "kaldi"
    sampling_rate: int = 16000
    window_length: int = 400
    hop_length: int = 160
    num_mel_bins: int = 128
    low_frequency: float | int = 20.0
    high_frequency: float | int = 8000.0
    mean: float | int = -4.2677393
    std: float | int = 4.5689974
    max_length: int | None = 1024
    trainable_filters: bool = False
    dendrites: dict | None = None

    def __post_init__(self, **kwargs):
        if isinstance(self.backbone, dict):
            settings = dict(self.backbone)
            kind = settings.pop("model_type", None)
            if kind not in BACKBONES:
                raise ValueError(f"backbone: model_type must be one of {', '.join(BACKBONES)}, got {kind!r}")
            self.backbone = BACKBONES[kind][0](**settings)
        super().__post_init__(**kwargs)

    @property
    def num_hidden_layers(self) -> int:
        """Layers of the network behind the front end."""
        return self.backbone.num_hidden_layers

    @property
    def hidden_size(self) -> int:
        """Width of the network before its head."""
        return self.backbone.hidden_size


class LogMel(nn.Module):
    """Log-mel spectrograms, always in float32.

    `filters`, (frequencies, mel bands), is a parameter or a buffer. `window`, (window_length,), is a buffer that is not
    saved. It is a buffer because ONNX has no Hann window.
    """

    def __init__(self, config: WaveformConfig):
        super().__init__()
        self.config = config
        self.kaldi = kaldi = config.convention != "librosa"
        self.fft_length = 1 << (config.window_length - 1).bit_length() if kaldi else config.window_length
        with warnings.catch_warnings():
            # The lowest of AST's 128 filters lie between two frequencies and are zero, as in its feature extractor.
            warnings.filterwarnings("ignore", "At least one mel filter has all zero values")
            filters = mel_filter_bank(
                1 + self.fft_length // 2, config.num_mel_bins, config.low_frequency, config.high_frequency,
                config.sampling_rate, norm=None if kaldi else "slaney", mel_scale="kaldi" if kaldi else "slaney",
                triangularize_in_mel_space=kaldi,
            )  # fmt: skip
        filters = torch.from_numpy(filters).float()
        if config.trainable_filters:
            self.filters = nn.Parameter(filters)
        else:
            self.register_buffer("filters", filters)
        self.register_buffer("window", self.make_window(), persistent=False)

    def make_window(self) -> torch.Tensor:
        """The window, (window_length,), float32, on the CPU also inside `torch.device("meta")`."""
        hann = torch.hann_window(self.config.window_length, not self.kaldi, dtype=torch.float32, device="cpu")
        return hann**0.85 if self.config.convention == "povey" else hann

    def samples(self, frames: int) -> int:
        """The number of samples of a number of frames."""
        return (frames - 1) * self.config.hop_length + self.kaldi * self.config.window_length

    def frames_inside(self, inside: torch.Tensor) -> torch.Tensor:
        """Which frames do not reach into padding, (batch, frames), of `inside` (batch, samples).

        librosa's frames do so at both ends of a clip. Only their centres count.
        """
        if self.kaldi:
            return inside.unfold(1, self.config.window_length, self.config.hop_length)[..., [0, -1]].all(2)
        return nn.functional.pad(inside, (0, 1))[:, :: self.config.hop_length]

    def forward(self, waveforms: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
        """Normalised log-mel.

        Args:
            waveforms: (batch, samples), full scale at ±1.
            inside: (batch, samples), False where a clip is padded.

        Returns:
            (batch, frames, num_mel_bins), float32. With kaldi, frames that reach into padding hold the padding value of
            `ASTFeatureExtractor`. With librosa, they are frames of silence.
        """
        with torch.autocast(waveforms.device.type, enabled=False):
            power = (self._kaldi if self.kaldi else self._librosa)(waveforms.float())
            energies = (power @ self.filters.float().clamp(min=0)).clamp(min=FLOOR[self.config.convention])
            log_mel = energies.log() if self.kaldi else 10 * energies.log10()
            if self.kaldi:  # padded first and then normalised
                log_mel = log_mel.masked_fill(~self.frames_inside(inside)[..., None], 0.0)
            return (log_mel - self.config.mean) / (2 * self.config.std)

    def _kaldi(self, waveforms: torch.Tensor) -> torch.Tensor:
        """Power spectra (batch, frames, frequencies)."""
        frames = waveforms.unfold(1, self.config.window_length, self.config.hop_length)
        frames = frames - frames.mean(2, keepdim=True)
        before = torch.cat([frames[..., :1], frames[..., :-1]], dim=2)
        return _power(torch.fft.rfft((frames - PREEMPHASIS * before) * self.window.float(), self.fft_length))

    def _librosa(self, waveforms: torch.Tensor) -> torch.Tensor:
        """Power spectra (batch, frames, frequencies)."""
        spectra = torch.stft(
            waveforms, self.fft_length, self.config.hop_length, window=self.window.float(), pad_mode="reflect",
            return_complex=True,
        )  # fmt: skip
        return _power(spectra).transpose(1, 2)


class WaveformForAudioClassification(DendriticMixin, PreTrainedModel):
    """A front end that computes spectrograms, and a network."""

    config_class = WaveformConfig
    main_input_name = "input_values"
    supports_gradient_checkpointing = True
    _keep_in_fp32_modules_strict = ["front_end"]

    def __init__(self, config: WaveformConfig):
        super().__init__(config)
        self.front_end = LogMel(config)
        config.backbone.num_labels = config.num_labels
        self.backbone = BACKBONES[config.backbone.model_type][1](config.backbone)
        self.add_dendrites()
        self.post_init()

    def forward(
        self,
        input_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        masked_frames: torch.Tensor | None = None,
        masked_bands: torch.Tensor | None = None,
        mask_value: float = 0.0,
        labels: torch.Tensor | None = None,
        **kwargs,
    ) -> SequenceClassifierOutput:
        """Logits of waveforms.

        Args:
            input_values: (batch, samples) at `sampling_rate`, full scale at ±1.
            attention_mask: (batch, samples), 0 where a clip is padded. None means no padding.
            masked_frames: (batch, frames), True where the spectrogram is set to `mask_value`, for SpecAugment.
            masked_bands: (batch, num_mel_bins), the same.
            mask_value: 0 is the mean.
            labels: Class numbers (batch,), for a loss.

        Returns:
            `logits` (batch, num_labels), and `loss` if there are labels.
        """
        inside = torch.ones_like(input_values) if attention_mask is None else attention_mask
        inside = self._fit(inside.bool())
        log_mel = self.front_end(self._fit(input_values), inside)
        if masked_frames is not None:
            log_mel = log_mel.masked_fill(masked_frames[:, :, None] | masked_bands[:, None, :], mask_value)
        if isinstance(self.backbone, BEATsForAudioClassification):
            kwargs["attention_mask"] = self.front_end.frames_inside(inside)
        return self.backbone(log_mel.to(self.backbone.dtype), labels=labels, **kwargs)

    def _fit(self, values: torch.Tensor) -> torch.Tensor:
        """(batch, samples), cut or padded at the end to the frames that the network takes."""
        samples, frames = values.shape[1], self.config.max_length
        shortest = self.front_end.samples(getattr(self.config.backbone, "smallest_input", 2))
        fitted = max(samples, shortest) if frames is None else self.front_end.samples(frames)
        return nn.functional.pad(values, (0, fitted - samples))

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, LogMel):  # `from_pretrained` does not fill buffers that are not saved
            init.copy_(module.window, module.make_window())
        if isinstance(module, nn.Linear | nn.Conv2d | nn.LayerNorm):
            self.backbone._init_weights(module)


def _power(spectra: torch.Tensor) -> torch.Tensor:
    """|z|², whose gradient at 0 is 0."""
    return spectra.real.square() + spectra.imag.square()


# So that `save_pretrained` copies this file into the folder and names it in config.json's auto_map, every time.
WaveformConfig.register_for_auto_class()
WaveformForAudioClassification.register_for_auto_class("AutoModelForAudioClassification")
