"""One file a model family, each a PreTrainedModel that AutoModelForAudioClassification knows."""

from transformers import AutoConfig, AutoModelForAudioClassification

from audio_dendrites.models.dendritic import DendriticASTConfig, DendriticASTForAudioClassification

# Here and not in dendritic.py, whose copy in a model folder transformers registers by itself.
AutoConfig.register(DendriticASTConfig.model_type, DendriticASTConfig, exist_ok=True)
AutoModelForAudioClassification.register(DendriticASTConfig, DendriticASTForAudioClassification, exist_ok=True)
