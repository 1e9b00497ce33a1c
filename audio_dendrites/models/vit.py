"""A Vision Transformer (Dosovitskiy et al. 2021, arXiv:2010.11929) on mel images; needs torch and transformers only.

This file and dendritic.py are copied into every saved model folder, where `trust_remote_code=True` runs them: they
import nothing else of the project they come from.
"""

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel, ViTConfig, ViTModel
from transformers.modeling_outputs import SequenceClassifierOutput

from .dendritic import DendriticMixin


class MelViTConfig(ViTConfig):
    """`ViTConfig` of a ViT for log-mel spectrograms. Spectrograms of any size are resized to `image_size`.

    Args:
        dendrites: Module name to `{"count": dendrites, "activation": name}`.
    """

    model_type = "mel-vit"

    dendrites: dict | None = None


class MelViTForAudioClassification(DendriticMixin, PreTrainedModel):
    """A ViT with a linear head on the class token. It sees a spectrogram in each colour, with the low bands on top.

    Tensors have the names of `ViTForImageClassification`, so that `from_pretrained` takes the weights of any ViT.
    """

    config_class = MelViTConfig
    base_model_prefix = "vit"
    main_input_name = "input_values"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _no_split_modules = ["ViTEmbeddings", "ViTLayer"]
    _keys_to_ignore_on_load_unexpected = [r"pooler\."]

    def __init__(self, config: MelViTConfig):
        super().__init__(config)
        self.vit = ViTModel(config, add_pooling_layer=False)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.add_dendrites()
        self.post_init()

    def forward(
        self, input_values: torch.Tensor, labels: torch.Tensor | None = None, **kwargs
    ) -> SequenceClassifierOutput:
        """Logits of log-mel spectrograms.

        Args:
            input_values: (batch, frames, mel bands), any number of both.
            labels: Class numbers (batch,); with them there is a loss.

        Returns:
            `logits` (batch, num_labels) and `loss`.
        """
        size = self.vit.embeddings.image_size
        images = functional.interpolate(input_values.transpose(1, 2)[:, None], size=size, mode="bilinear")
        hidden = self.vit(images.expand(-1, self.config.num_channels, -1, -1)).last_hidden_state
        logits = self.classifier(hidden[:, 0])
        loss = None if labels is None else self.loss_function(labels, logits, self.config, **kwargs)
        return SequenceClassifierOutput(loss=loss, logits=logits)


# So that `save_pretrained` copies this file into the folder and names it in config.json's auto_map, every time.
MelViTConfig.register_for_auto_class()
MelViTForAudioClassification.register_for_auto_class("AutoModelForAudioClassification")
