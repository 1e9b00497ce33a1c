"""Download the data set and the models of a recipe, for a machine without a network."""

from collections.abc import Iterable
from pathlib import Path

from datasets import load_dataset_builder
from huggingface_hub import HfApi, constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.utils import filter_repo_objects

from audio_dendrites.data.clips import below, hub_errors, kind_of, no_folder
from audio_dendrites.errors import UserError
from audio_dendrites.recipes import DataArguments, ModelArguments, Recipe

# The files that `from_pretrained` reads of a model and of its feature extractor.
CONFIG_FILES = ("config.json", "preprocessor_config.json", "processor_config.json")
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors")
OLD_WEIGHT_FILES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*-of-*.bin")
DOWNLOAD_NEEDS_IT = "the download needs it"


def download(recipe: Recipe) -> None:
    """Download the data set, the base model and the teacher of a recipe, so that it trains with HF_HUB_OFFLINE=1.

    Prints the source, the number of bytes and the folder of each. Files that are in the cache are not downloaded again.
    Of a model, only the files that `from_pretrained` reads are downloaded.

    Raises:
        UserError: The Hub does not have them, or is not reachable.
    """
    _download_dataset(recipe.data)
    _download_model(recipe.model)
    if recipe.training.distill_from:
        _download_model(ModelArguments(model=recipe.training.distill_from))


def _download_dataset(arguments: DataArguments) -> None:
    name, revision = arguments.dataset, arguments.dataset_revision
    if (kind := kind_of(name)) != "hub":
        return print(f"dataset {name}: {kind}, nothing to download")
    with hub_errors("dataset", name, revision, DOWNLOAD_NEEDS_IT):
        info = HfApi().dataset_info(name, revision=revision)
        commit = info.sha
        if arguments.dataset_dir:
            files = list(
                filter_repo_objects([file.rfilename for file in info.siblings], allow_patterns=below(arguments))
            )
            if not files:
                raise no_folder(arguments)
            return _fetch("dataset", name, revision, files)
        builder = load_dataset_builder(name, arguments.dataset_config, revision=commit)
        prepared = Path(builder.cache_dir)
        if prepared.is_dir():
            print(f"dataset {name} (revision {commit}): nothing to download")
        else:
            urls = [url for urls in builder.config.data_files.values() for url in urls]
            _fetch("dataset", name, commit, [url.removeprefix(f"hf://datasets/{name}@{commit}/") for url in urls])
            builder.download_and_prepare()
    size = sum(file.stat().st_size for file in prepared.iterdir())
    print(f"dataset {name} (revision {commit}): prepared for training, {size:,} bytes in {prepared}")


def _download_model(arguments: ModelArguments) -> None:
    name, revision = arguments.model, arguments.model_revision
    if name is None:
        return print("model: random weights, nothing to download")
    if Path(name).expanduser().is_dir():
        return print(f"model {name}: local, nothing to download")
    with hub_errors("model", name, revision, DOWNLOAD_NEEDS_IT):
        present = [file.rfilename for file in HfApi().model_info(name, revision=revision).siblings]
        weights = list(filter_repo_objects(present, allow_patterns=WEIGHT_FILES))
        weights = weights or list(filter_repo_objects(present, allow_patterns=OLD_WEIGHT_FILES))
        if not weights:
            raise UserError(f"model: {name} must have one of the files {', '.join(WEIGHT_FILES)}, got none")
        _fetch("model", name, revision, [*filter_repo_objects(present, allow_patterns=CONFIG_FILES), *weights])


def _fetch(repo_type: str, name: str, revision: str | None, files: Iterable[str]) -> None:
    """Download files of a repository into the Hub's cache, and print how many bytes that takes."""
    files = list(files)
    info = HfApi().repo_info(name, repo_type=repo_type, revision=revision, files_metadata=True)
    sizes = {file.rfilename: file.size for file in info.siblings if file.rfilename in files}
    missing = {
        file: size
        for file, size in sizes.items()
        if not isinstance(try_to_load_from_cache(name, file, revision=info.sha, repo_type=repo_type), str)
    }
    source = f"{repo_type} {name} (revision {info.sha})"
    if missing:
        print(f"{source}: downloading {sum(missing.values()):,} bytes, {len(missing)} files, from {constants.ENDPOINT}")
    # The cache finds a branch or a tag by its name only, so this is the revision as the recipe names it.
    folder = Path(snapshot_download(name, repo_type=repo_type, revision=revision, allow_patterns=files))
    fetched = sum((folder / file).stat().st_size for file in missing)
    total = sum((folder / file).stat().st_size for file in sizes)
    print(f"{source}: {f'{fetched:,} bytes downloaded' if missing else 'nothing to download'}, {total:,} in {folder}")
