"""One file a model family, each a PreTrainedModel that AutoModelForAudioClassification knows."""
