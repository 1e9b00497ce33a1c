"""Push runs and checkpoints to the Hub, and fetch checkpoints from it.

A push has three steps. `content.py` copies what may leave the machine to a folder. `check_staged` searches every byte
of the folder. One commit uploads it.
"""

import logging
import os
import re
import shlex
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import httpx, validate_repo_id
from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy

from audio_dendrites.errors import UserError
from audio_dendrites.publishing.card import run_card
from audio_dendrites.publishing.content import (
    BEST_CHECKPOINT,
    LAST_CHECKPOINT,
    PublishError,
    check_staged,
    code_files,
    read_json,
    stage_run,
    staged_files,
    write_json,
)
from audio_dendrites.results.report import is_finished

logger = logging.getLogger(__name__)

CARD_COMMIT = "Model card"
FULL = re.compile("quota|storage|limit|exceed|payment", re.IGNORECASE)


class Target(NamedTuple):
    """Where to push."""

    repo_id: str  # owner/name; without an owner, the repository belongs to the owner of the token
    private: bool | None = None  # whether a new repository is private; defaults to the setting of the Hub
    revision: str | None = None  # branch to push to, created if it does not exist
    token: str | None = None  # defaults to the token of `hf auth login` or HF_TOKEN


def target_of(args: TrainingArguments) -> Target:
    """Where a training pushes. By default, a repository that gets pickles is private."""
    is_checkpoint = args.hub_strategy == HubStrategy.CHECKPOINT
    private = True if args.hub_private_repo is None and is_checkpoint else args.hub_private_repo
    return Target(args.hub_model_id, private, args.hub_revision, args.hub_token)


@contextmanager
def staged(run: Path, repo_id: str, template: Path, other: str | None = None) -> Iterator[Path]:
    """A temporary folder with everything of a finished run that may be published, its card included; see `publish`."""
    with tempfile.TemporaryDirectory(prefix="publish-") as folder:
        stage_run(run, Path(folder))
        Path(folder, "README.md").write_text(run_card(run, repo_id, template, other=other), encoding="utf-8")
        yield Path(folder)


def publish(
    run: Path, target: Target, template: Path, other: str | None = None, command: str | None = None
) -> str | None:
    """Push a finished run. If the model has code, a second commit adds the card, which pins the first commit.

    Args:
        run: The run folder. It is only read.
        target: Where to push.
        template: Jinja template of the card.
        other: Repository of the run that this one is compared with, if it is published too.
        command: The command that error messages show to try again. Defaults to publish.py with this run.

    Returns:
        The address of the repository, or None if it had every file.

    Raises:
        PublishError: If not everything was sent. The run folder is unchanged, and the same call sends the rest.
    """
    with staged(run, target.repo_id, template, other) as folder:
        check_staged(folder, target.token)
        with explained(run, target, command):
            target = create_repo(target)
            other = other and (other if "/" in other else f"{target.repo_id.split('/')[0]}/{other}")
            card, pinned, sent = folder / "README.md", None, None
            if code_files(run):
                files = [path for path in staged_files(folder) if path != card]
                sent = push(folder, files, target, "Model, code and figures")
                commits = HfApi(token=target.token).list_repo_commits(target.repo_id, revision=target.revision)
                pinned = next(commit.commit_id for commit in commits if commit.title != CARD_COMMIT)
            card.write_text(run_card(run, target.repo_id, template, other, pinned), encoding="utf-8")
            files, message = ([card], CARD_COMMIT) if pinned else (staged_files(folder), "Model, figures and card")
            commit = push(folder, files, target, message) or sent
    return commit and f"{HfApi().endpoint}/{target.repo_id}"


def publish_finished(args: TrainingArguments, template: Path, other: str | None = None) -> None:
    """Push a run after its training, if the recipe asks for it. A failure is logged and raises nothing."""
    if args.push_to_hub and args.process_index == 0:
        with _logged():
            address = publish(Path(args.output_dir), target_of(args), template, other)
            logger.info("%s", f"Published: {address}" if address else f"{args.hub_model_id} has every file already.")


def ask(args: TrainingArguments) -> None:
    """Create the repository before the training. A failure is logged and raises nothing."""
    target = target_of(args)
    if args.hub_strategy == HubStrategy.CHECKPOINT:
        logger.info(
            "hub_strategy checkpoint also pushes what resumes the training. Its optimizer.pt, scheduler.pt and "
            "rng_state.pth are pickles, so a new repository is %s.",
            "private unless hub_private_repo is false" if target.private else "public, as hub_private_repo says",
        )
    with _logged(), explained(Path(args.output_dir), target):
        create_repo(target)


def push_checkpoint(args: TrainingArguments, folder: Path, message: str) -> None:
    """Push the staged folder of a running training. A failure is logged and raises nothing."""
    target = target_of(args)
    with _logged():
        check_staged(folder, target.token)
        with explained(Path(args.output_dir), target):
            push(folder, staged_files(folder), create_repo(target), message)


def create_repo(target: Target) -> Target:
    """Create a repository and a branch if they do not exist. Returns the target with the owner in its id."""
    target, api = with_owner(target), HfApi(token=target.token)
    api.create_repo(target.repo_id, private=target.private, exist_ok=True)
    if target.revision is not None:
        api.create_branch(target.repo_id, branch=target.revision, exist_ok=True)
    return target


def with_owner(target: Target) -> Target:
    """The target with the owner in its id. Without one, it is the owner of the token."""
    if target.token is None and get_token() is None:
        raise LocalTokenNotFoundError
    validate_repo_id(target.repo_id)
    if "/" in target.repo_id:
        return target
    return target._replace(repo_id=f"{HfApi(token=target.token).whoami()['name']}/{target.repo_id}")


def push(folder: Path, files: list[Path], target: Target, message: str) -> str | None:
    """Upload files of a staged folder in one commit. A push of a model removes checkpoints that it does not hold.

    Returns:
        The commit id, or None if the repository had every file.
    """
    api = HfApi(token=target.token)
    before = api.model_info(target.repo_id, revision=target.revision)
    names = {path.relative_to(folder).as_posix(): path for path in files}
    operations: list = [CommitOperationAdd(name, path) for name, path in names.items()]
    if "config.json" in names:
        old = sorted({file.rfilename for file in before.siblings} - names.keys())
        checkpoints = LAST_CHECKPOINT, BEST_CHECKPOINT
        operations += [CommitOperationDelete(name) for name in old if name.startswith(checkpoints)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="It seems that you are about to commit a data file")
        # One thread: if the connection is lost, several threads close each other's client.
        commit = api.create_commit(
            target.repo_id, operations, commit_message=message, revision=target.revision, num_threads=1
        )
    return None if commit.oid == before.sha else commit.oid


def fetch_checkpoint(repo_id: str, output_dir: Path, token: str | None = None, is_first: bool = True) -> Path:
    """Copy the last checkpoint of a training, and its best one, from the Hub to a run folder.

    Args:
        repo_id: owner/name.
        output_dir: The run folder.
        token: See `Target`.
        is_first: Whether this process writes the checkpoints. The others only get their path.

    Returns:
        The folder of the last checkpoint, output_dir/checkpoint-<step>.

    Raises:
        UserError: If the repository does not exist, cannot be read, or has no checkpoint.
    """
    snapshot = download_checkpoint(repo_id, token)
    state = read_json(snapshot / LAST_CHECKPOINT / "trainer_state.json")
    steps = [state.get(name) or 0 for name in ("global_step", "best_global_step")]
    if wrong := [step for step in steps if not isinstance(step, int)]:  # a text could lead out of the run folder
        raise UserError(
            f"resume_from_checkpoint: trainer_state.json of {repo_id} has the step {wrong[0]!r}, not a number"
        )
    last, best = (output_dir / f"checkpoint-{step}" for step in steps)
    if is_first:
        if (snapshot / BEST_CHECKPOINT).is_dir() and best != last:
            _copy_checkpoint(snapshot / BEST_CHECKPOINT, best, best)
        _copy_checkpoint(snapshot / LAST_CHECKPOINT, last, best)
    return last


def download_checkpoint(repo_id: str, token: str | None = None) -> Path:
    """Download the checkpoints that `fetch_checkpoint` copies, and return their folder in the cache."""
    try:
        patterns = [f"{LAST_CHECKPOINT}/*", f"{BEST_CHECKPOINT}/*"]
        snapshot = Path(snapshot_download(repo_id, allow_patterns=patterns, token=token, max_workers=1))  # as in `push`
    except (HfHubHTTPError, httpx.HTTPError, HFValidationError, OSError) as error:
        raise UserError(
            f"resume_from_checkpoint: {repo_id} is not a folder, and the Hub did not give it: {reason(error)}"
        ) from error
    if not (snapshot / LAST_CHECKPOINT / "trainer_state.json").is_file():
        raise UserError(
            f"resume_from_checkpoint: {repo_id} has no {LAST_CHECKPOINT}/ on the Hub. Only a training with "
            f"hub_strategy: checkpoint has one, and only until it ends"
        )
    return snapshot


def _copy_checkpoint(source: Path, target: Path, best: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetched-") as beside:
        copied = shutil.copytree(source, Path(beside, target.name))
        state = read_json(copied / "trainer_state.json")
        if state["best_model_checkpoint"] is not None:
            state["best_model_checkpoint"] = str(best)
        write_json(state, copied / "trainer_state.json")
        if target.exists():
            shutil.rmtree(target)
        os.replace(copied, target)


def reason(error: BaseException) -> str:
    """Say in one line what went wrong with the Hub."""
    while isinstance(error, RuntimeError) and error.__cause__ is not None:  # the client's "Error while uploading"
        error = error.__cause__
    if isinstance(error, LocalTokenNotFoundError):
        return "there is no token: log in with `hf auth login`, or set HF_TOKEN"
    if isinstance(error, HFValidationError):
        return f"{error} Expected owner/name"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so the Hub is not asked"
    if isinstance(error, HfHubHTTPError):
        status, said = error.response.status_code, " ".join((error.server_message or "").split())
        full, no_write = "the storage of the account is full", "the token has no permission to write there"
        what = {
            400: "the Hub does not accept it",
            401: "the Hub does not know the token or the repository; log in again with `hf auth login`",
            402: full,
            403: full if FULL.search(said) else no_write,
            404: "the repository does not exist, or the token has no permission to read it",
            413: full,
            429: "the Hub accepts no more requests for now",
            507: full,
        }.get(status, "the Hub is out of order" if status >= 500 else "the Hub refuses")
        return f"{what} ({status}{f': {said}' if said else ''})"
    if isinstance(error, httpx.HTTPError):
        return f"there is no connection to the Hub ({type(error).__name__}: {error})"
    if isinstance(error, OSError) and error.errno is not None:
        return f"{error.strerror}{f': {error.filename}' if error.filename else ''}"
    return str(error)


@contextmanager
def _logged() -> Iterator[None]:
    """Log a PublishError as a warning."""
    try:
        yield
    except PublishError as error:
        logger.warning("%s", error)


@contextmanager
def explained(run: Path, target: Target, command: str | None = None) -> Iterator[None]:
    """Turn any error of the client into a PublishError with the cause and the command that tries again."""
    try:
        yield
    except (HfHubHTTPError, httpx.HTTPError, OSError, ValueError, RuntimeError) as error:
        options = f" --revision {target.revision}" * (target.revision is not None) + " --private" * bool(target.private)
        command = command or f"python publish.py {shlex.quote(str(run))} --repo_id {target.repo_id}{options}"
        next_step = (
            f"The run folder is unchanged. This command tries again and sends only the missing files: {command}"
            if is_finished(run)
            else f"The training continues, and its next push tries again. After the training, use: {command}"
        )
        raise PublishError(f"{run} was not published as {target.repo_id}: {reason(error)}. {next_step}") from error
