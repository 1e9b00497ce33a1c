"""The audio tower of CLAP (Wu et al. 2022, arXiv:2211.06687) with a linear head. Needs torch and transformers only.

This file and dendritic.py are copied into every saved model folder, where `trust_remote_code=True` runs them. They
import nothing else of the project that they come from.
"""

import torch
from torch import nn
from transformers import ClapAudioConfig, ClapAudioModel, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from .dendritic import DendriticMixin


class ClapClassifierConfig(ClapAudioConfig):
    """`ClapAudioConfig` of a classifier. Its layers are the stages of the Swin transformer.

    Args:
        dendrites: Module name to `{"count": dendrites, "activation": name}`.
    """

    model_type = "clap-audio-classifier"

    dendrites: dict | None = None


class ClapForAudioClassification(DendriticMixin, PreTrainedModel):
    """CLAP's audio encoder and a linear head on its pooled output.

    The names are those of `ClapModel`, so that `from_pretrained` takes the weights of any CLAP.
    """

    config_class = ClapClassifierConfig
    base_model_prefix = "audio_model"
    main_input_name = "input_features"
    _no_split_modules = ["ClapAudioStage"]
    _keys_to_ignore_on_load_unexpected = [r"^(text_model|text_projection|audio_projection|logit_scale)"]

    def __init__(self, config: ClapClassifierConfig):
        super().__init__(config)
        self.audio_model = ClapAudioModel(config)
        encoder = self.audio_model.audio_encoder
        if encoder.enable_fusion:
            encoder.enable_fusion = False  # The encoder would only look up the marked clips. Here all clips are.
            encoder.patch_embed.register_forward_pre_hook(_mark_all)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.add_dendrites()
        self.post_init()

    def forward(
        self,
        input_features: torch.Tensor,
        is_longer: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs,
    ) -> SequenceClassifierOutput:
        """Logits of log-mel spectrograms.

        Args:
            input_features: (batch, 1 or with fusion 4, frames, num_mel_bins), as `ClapFeatureExtractor` makes them.
            is_longer: Not used. If no clip of a batch is long, the extractor marks one at random. A clip on its own is
                always marked. This model treats all clips as marked, so a clip has the same logits in any batch.
            labels: Class numbers (batch,), for a loss.

        Returns:
            `logits` (batch, num_labels), and `loss` if there are labels.
        """
        logits = self.classifier(self.audio_model(input_features).pooler_output)
        loss = None if labels is None else self.loss_function(labels, logits, self.config, **kwargs)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def _mark_all(module: nn.Module, inputs: tuple) -> tuple[torch.Tensor, torch.Tensor]:
    """Give the patch embedding the rows of all clips."""
    return inputs[0], torch.arange(len(inputs[0]), device=inputs[0].device)


# So that `save_pretrained` copies this file into the folder and names it in config.json's auto_map, every time.
ClapClassifierConfig.register_for_auto_class()
ClapForAudioClassification.register_for_auto_class("AutoModelForAudioClassification")
