"""One file a model family, each a PreTrainedModel that AutoModelForAudioClassification knows."""

from transformers import (
    ASTFeatureExtractor,
    AutoConfig,
    AutoFeatureExtractor,
    AutoModelForAudioClassification,
    ClapFeatureExtractor,
    Wav2Vec2FeatureExtractor,
)

from audio_dendrites.models.beats import BEATsConfig, BEATsForAudioClassification
from audio_dendrites.models.clap import ClapClassifierConfig, ClapForAudioClassification
from audio_dendrites.models.cnn14 import CNN14Config, CNN14ForAudioClassification
from audio_dendrites.models.vit import MelViTConfig, MelViTForAudioClassification
from audio_dendrites.models.waveform import WaveformConfig, WaveformForAudioClassification

# Here and not in the models' files, whose copies in a model folder transformers registers by itself.
for config, model, extractor in (
    (CNN14Config, CNN14ForAudioClassification, ASTFeatureExtractor),
    (BEATsConfig, BEATsForAudioClassification, ASTFeatureExtractor),
    (ClapClassifierConfig, ClapForAudioClassification, ClapFeatureExtractor),
    (MelViTConfig, MelViTForAudioClassification, ASTFeatureExtractor),
    (WaveformConfig, WaveformForAudioClassification, Wav2Vec2FeatureExtractor),
):
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModelForAudioClassification.register(config, model, exist_ok=True)
    AutoFeatureExtractor.register(config, extractor, exist_ok=True)
