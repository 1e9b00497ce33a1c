"""Load a finished model from a folder or the Hub without running the code that comes with it."""

import logging
import pickle
from pathlib import Path
from textwrap import shorten

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoFeatureExtractor,
    AutoModelForAudioClassification,
    FeatureExtractionMixin,
    PreTrainedConfig,
    PreTrainedModel,
)

import audio_dendrites.models  # noqa: F401  so that transformers loads this project's types as its own classes
from audio_dendrites.errors import UserError
from audio_dendrites.files import damaged_file
from audio_dendrites.models import dendritic

logger = logging.getLogger(__name__)

AUTO_CLASSES = ("AutoConfig", "AutoModelForAudioClassification", "AutoFeatureExtractor")
NEEDS_OWN_CODE = "trust_remote_code=True"  # in the errors of transformers for models that do not load without it
# What `from_pretrained` raises for folders that are incomplete, broken or hostile.
LOADING_ERRORS = (
    ImportError, OSError, RuntimeError, ValueError, SafetensorError, StrictDataclassError, pickle.UnpicklingError,
)  # fmt: skip


def load_finished(name: str | Path, trust_remote_code: bool = False) -> tuple[PreTrainedModel, FeatureExtractionMixin]:
    """Load a finished model and its feature extractor.

    The model types of transformers and of this project need no code from the folder or the repository. A model of
    another type brings its own code, which can do everything that the user can do.

    Args:
        name: Folder, Hub id, or Hub id@revision.
        trust_remote_code: Whether code from the folder or the repository may run.

    Returns:
        The model, in float32, on the CPU, in evaluation mode and without gradients, and its feature extractor.

    Raises:
        UserError: There is no such model, its weights do not fit its configuration, or it needs its own code and
            `trust_remote_code` is False.
    """
    name, revision = split_revision(name)
    _register_dendritic(name, revision)
    if trust_remote_code and (code := own_code(name, revision)):
        logger.warning("%s may run its own code: %s.", name, ", ".join(code))
    settings = {"trust_remote_code": trust_remote_code, "revision": revision}
    try:
        model, loading = AutoModelForAudioClassification.from_pretrained(
            name, dtype=torch.float32, output_loading_info=True, **settings
        )
        extractor = AutoFeatureExtractor.from_pretrained(name, **settings)
    except LOADING_ERRORS as error:
        raise loading_error(name, error, revision) from error
    if wrong := sorted({*loading["missing_keys"], *loading["unexpected_keys"]}):
        raise UserError(
            f"{name}: the weights do not fit config.json: {len(wrong)} tensors are missing or left over, among them "
            f"{', '.join(wrong[:3])}. Give a finished model. A checkpoint of a model that grows dendrites is not one"
        )
    return model.requires_grad_(False).eval(), extractor


def split_revision(name: str | Path) -> tuple[str, str]:
    """The name and the revision of name@revision. The default is main, the branch. A folder has no revision."""
    found, _, revision = (str(name), "", "") if Path(name).is_dir() else str(name).partition("@")
    return found, revision or "main"


def revision_of(name: str | Path) -> str | None:
    """The commit of a model that `load_finished` loaded from the Hub. None for a folder."""
    name, revision = split_revision(name)
    path = None if Path(name).is_dir() else try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(path).parent.name if isinstance(path, str) else None


def _register_dendritic(name: str, revision: str) -> None:
    """Let transformers load the dendritic form of one of its own models by this project's code, not by the folder's."""
    try:
        config = PreTrainedConfig.get_config_dict(name, revision=revision)[0]
    except (OSError, ValueError):
        return  # `from_pretrained` says what is wrong
    stock = str(config.get("model_type")).removeprefix("dendritic-")
    kinds = {kind.model_type: (kind, model) for kind, model in MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING.items()}
    if f"dendritic-{stock}" == config.get("model_type") and stock in kinds:
        own_config, own_model = (getattr(dendritic, f"Dendritic{kind.__name__}") for kind in kinds[stock])
        AutoConfig.register(own_config.model_type, own_config, exist_ok=True)
        AutoModelForAudioClassification.register(own_config, own_model, exist_ok=True)


def loading_error(name: str, error: Exception, revision: str = "main") -> UserError:
    """The reason why a model, or its configuration, did not load."""
    if NEEDS_OWN_CODE in str(error):
        return UserError(
            f"{name} needs code of its own, {', '.join(own_code(name, revision))}. It was not run, because it can do "
            f"everything that you can do. If you have read it and trust it, predict.py runs it with --trust_remote_code"
        )
    if isinstance(error, pickle.UnpicklingError):
        return UserError(f"{name} could not be loaded: its weights hold objects other than tensors, which can run code")
    fault = None
    if (folder := Path(name)).is_dir():
        fault = damaged_file(folder) if (folder / "config.json").exists() else "it has no config.json"
    return UserError(f"{name} could not be loaded: {fault or shorten(str(error), 400, placeholder=' …')}")


def own_code(name: str, revision: str = "main") -> list[str]:
    """The Python files, with their folder or repository, that `trust_remote_code=True` runs for a model."""
    references = []
    for read in (PreTrainedConfig.get_config_dict, FeatureExtractionMixin.get_feature_extractor_dict):
        try:
            auto_map = read(name, revision=revision)[0].get("auto_map", {})
        except (OSError, ValueError):
            continue  # a file that is missing or broken names no code
        references += [auto_map[key] for key in AUTO_CLASSES if key in auto_map]
    found = set()
    for reference in references:
        repository, _, attribute = reference.rpartition("--")
        found.add(f"{repository or name}/{attribute.rpartition('.')[0]}.py")
    return sorted(found)
