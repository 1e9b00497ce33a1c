"""Push a Space to the Hub: the page of app.py for published models, which runs there without a clone."""

import shutil
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory

import yaml
from huggingface_hub import HfApi

from audio_dendrites.errors import UserError
from audio_dendrites.files import ROOT
from audio_dendrites.publishing.content import check_staged
from audio_dendrites.publishing.hub import Target, explained, with_owner

PACKAGE = Path(__file__).parent.parent
# What the page imports. The Space installs gradio itself.
REQUIREMENTS = (
    "datasets", "huggingface_hub", "joblib", "matplotlib", "numpy", "pandas", "pillow", "pyarrow", "pyyaml",
    "safetensors", "scipy", "soundfile", "soxr", "torch", "torchaudio", "tqdm", "transformers",
)  # fmt: skip
OPTIONAL = ("av",)  # if it is installed: sound of m4a, mp4 and webm
APP = '''"""The demo of {names}. `publish.py` of audio-dendrites wrote this file."""

from audio_dendrites.results.demo import serve

if __name__ == "__main__":
    serve({models}, port=None, server_name="0.0.0.0", trust_remote_code=False)
'''
README = """
# {name}

A page to try {links}. Record, upload or choose a sound, and see the scores.

`app.py` pins each model to a commit. `audio_dendrites/` is the code of the page. If a model is private, the Space needs
a token that may read it, as the secret `HF_TOKEN`.
"""


def publish_space(space: Target, models: Sequence[Target], run: Path, command: str) -> str | None:
    """Push the page for models that are on the Hub, each pinned to the newest commit of its branch.

    Args:
        space: Repository of the Space.
        models: Repositories of the models.
        run: A run folder of one of them, for error messages.
        command: The command that error messages show to try again.

    Returns:
        The address of the Space, or None if it had every file.

    Raises:
        PublishError: The Space was not pushed.
        UserError: A package that the Space needs is not installed.
    """
    with TemporaryDirectory(prefix="space-") as folder:
        with explained(run, space, command):
            space, *models = map(with_owner, (space, *models))
            api = HfApi(token=space.token)
            pinned = {one.repo_id: api.model_info(one.repo_id, revision=one.revision).sha for one in models}
        stage_space(Path(folder), space.repo_id, pinned)
        check_staged(Path(folder), space.token)
        with explained(run, space, command):
            kind = {"repo_id": space.repo_id, "repo_type": "space"}
            api.create_repo(**kind, space_sdk="gradio", private=space.private, exist_ok=True)
            before = api.repo_info(**kind).sha
            old = ["audio_dendrites/*"]  # modules that an older page had
            commit = api.upload_folder(**kind, folder_path=folder, commit_message="Demo", delete_patterns=old)
    return None if commit.oid == before else f"{api.endpoint}/spaces/{space.repo_id}"


def stage_space(folder: Path, repo_id: str, models: Mapping[str, str]) -> None:
    """Write the files of a Space into an empty folder.

    Args:
        folder: The folder.
        repo_id: owner/name of the Space.
        models: The commit of each model, by its owner/name.

    Raises:
        UserError: A package that the Space needs is not installed.
    """
    try:
        pins = {name: version(name) for name in ("gradio", *REQUIREMENTS)}
    except PackageNotFoundError as error:
        raise UserError(f"--space needs {error.name}. Install it with: pip install -e '.[demo]'") from error
    for name in OPTIONAL:
        try:
            pins[name] = version(name)
        except PackageNotFoundError:
            continue
    pins = {name: found.partition("+")[0] for name, found in pins.items()}  # PyPI has no 2.11.0+cpu
    shutil.copytree(PACKAGE, folder / PACKAGE.name, ignore=shutil.ignore_patterns("programs", "__pycache__", ".*"))
    if (ROOT / "LICENSE").is_file():
        shutil.copyfile(ROOT / "LICENSE", folder / "LICENSE")
    metadata = {
        "title": repo_id.split("/")[-1], "emoji": "👂", "colorFrom": "indigo", "colorTo": "green",
        "sdk": "gradio", "sdk_version": pins.pop("gradio"), "python_version": "{}.{}".format(*sys.version_info),
        "app_file": "app.py", "pinned": False, "models": list(models),
    }  # fmt: skip
    links = " and ".join(f"[{name}](https://huggingface.co/{name}/tree/{commit})" for name, commit in models.items())
    head = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)
    texts = {
        "README.md": f"---\n{head}---\n" + README.format(name=metadata["title"], links=links),
        "app.py": APP.format(names=" and ".join(models), models=[f"{name}@{sha}" for name, sha in models.items()]),
        "requirements.txt": "".join(f"{name}=={found}\n" for name, found in pins.items()),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
