"""Publishing a run: its model card, what of its folder may leave the machine, and the push to the Hub.

What is sent is named here file by file, paths of this machine are taken out of its text, and `check_outgoing` reads
every byte before the first one leaves.
"""

import logging
import os
import re
import shlex
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    get_token,
    snapshot_download,
)
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
    check_outgoing,
    code_files,
    json_bytes,
    outgoing,
    read_json,
)
from audio_dendrites.results.report import is_finished

logger = logging.getLogger(__name__)

CARD_COMMIT = "Model card"
LFS = {".parquet", ".pt", ".pth", ".safetensors", ".png"}
BUSY = {408, 429, 500, 502, 503, 504}
FULL = re.compile("quota|storage|limit|exceed|payment", re.IGNORECASE)


def publish(
    run: Path,
    repo_id: str,
    template: Path,
    other: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    command: str | None = None,
) -> str | None:
    """Push a finished run: weights, figures and code, then the card, which pins that commit where code is run.

    Args:
        run: The run folder; it is only read.
        repo_id: owner/name; without an owner the token's.
        template: Jinja template of the card.
        other: Hub id of the checkpoint that the run is compared with, if it is published too.
        private: Whether a repository that does not exist yet is private; none leaves it to the Hub.
        revision: Branch to push to, made if it is missing.
        token: Left out: that of `hf auth login` or HF_TOKEN.
        command: What a failure says to try again with; left out: publish.py with this run.

    Returns:
        The address of the repository, or None if the Hub had everything.

    Raises:
        PublishError: Nothing or not everything was sent; the folder is as it was, and the same call tries again.
    """
    files = outgoing(run)
    check_outgoing({"README.md": run_card(run, repo_id, template, files, other)} | files, token)
    with _explained(run, repo_id, private, revision, command):
        repo_id = create_repo(repo_id, private, revision, token)
        other = other and (other if "/" in other else f"{repo_id.split('/')[0]}/{other}")
        if not code_files(run):
            card = run_card(run, repo_id, template, files, other)
            commit = push({"README.md": card} | files, repo_id, "Model, figures and card", revision, token)
        else:
            sent = push(files, repo_id, "Model, code and figures", revision, token)
            commits = _patiently(HfApi(token=token).list_repo_commits, repo_id, revision=revision)
            pinned = next(commit.commit_id for commit in commits if commit.title != CARD_COMMIT)
            card = run_card(run, repo_id, template, files, other, pinned)
            commit = push({"README.md": card}, repo_id, CARD_COMMIT, revision, token) or sent
    return commit and f"{HfApi().endpoint}/{repo_id}"


def publish_finished(args: TrainingArguments, template: Path, other: str | None = None) -> None:
    """Push a run when its training has ended, if the recipe asks for it; a failure is said and raises nothing.

    Args:
        args: The training's.
        template: Jinja template of the card.
        other: Hub id of the checkpoint that the run is compared with.
    """
    if not args.push_to_hub or args.process_index > 0:
        return
    try:
        address = publish(
            Path(args.output_dir),
            args.hub_model_id,
            template,
            other,
            is_private(args),
            args.hub_revision,
            args.hub_token,
        )
    except PublishError as error:
        logger.warning("%s", error)
    else:
        logger.info("%s", f"Published: {address}" if address else f"{args.hub_model_id}: the Hub has everything.")


def ask(args: TrainingArguments) -> None:
    """Make the repository of a training that begins; a failure is said and raises nothing."""
    if args.hub_strategy == HubStrategy.CHECKPOINT:
        logger.info(
            "hub_strategy checkpoint also sends what resumes the training, and its optimizer.pt, scheduler.pt and "
            "rng_state.pth are pickles: a new repository is %s.",
            "private, unless hub_private_repo is false" if is_private(args) else "public, as hub_private_repo says",
        )
    try:
        with _explained(Path(args.output_dir), args.hub_model_id, is_private(args), args.hub_revision):
            create_repo(args.hub_model_id, is_private(args), args.hub_revision, args.hub_token)
    except PublishError as error:
        logger.warning("%s", error)


def push_checkpoint(args: TrainingArguments, files: Mapping[str, Path | bytes], message: str) -> None:
    """Push what a running training has; a failure is said and raises nothing."""
    repo_id, private, revision, token = args.hub_model_id, is_private(args), args.hub_revision, args.hub_token
    try:
        check_outgoing(files, token)
        with _explained(Path(args.output_dir), repo_id, private, revision):
            push(files, create_repo(repo_id, private, revision, token), message, revision, token)
    except PublishError as error:
        logger.warning("%s", error)


def is_private(args: TrainingArguments) -> bool | None:
    """As the recipe says; where it says nothing, a repository that gets pickles is private."""
    is_checkpoint = args.hub_strategy == HubStrategy.CHECKPOINT
    return True if args.hub_private_repo is None and is_checkpoint else args.hub_private_repo


def create_repo(
    repo_id: str, private: bool | None = None, revision: str | None = None, token: str | None = None
) -> str:
    """Make a repository for a model, and a branch, where they do not exist yet; gives the id with its owner."""
    if token is None and get_token() is None:
        raise LocalTokenNotFoundError
    validate_repo_id(repo_id)
    api = HfApi(token=token)
    if "/" not in repo_id:
        repo_id = f"{_patiently(api.whoami)['name']}/{repo_id}"
    _patiently(api.create_repo, repo_id, private=private, exist_ok=True)
    if revision is not None:
        _patiently(api.create_branch, repo_id, branch=revision, exist_ok=True)
    return repo_id


def push(
    files: Mapping[str, Path | bytes],
    repo_id: str,
    message: str,
    revision: str | None = None,
    token: str | None = None,
) -> str | None:
    """One commit with what the Hub lacks of the files, and without checkpoints that are not among them.

    Returns:
        The commit id, or None if there was nothing to send.
    """
    api = HfApi(token=token)
    before = _patiently(api.model_info, repo_id, revision=revision)
    additions = [CommitOperationAdd(path, content) for path, content in files.items()]
    there = [
        file.rfilename for file in before.siblings if file.rfilename.startswith((LAST_CHECKPOINT, BEST_CHECKPOINT))
    ]
    stale = [CommitOperationDelete(path) for path in there if path not in files and "config.json" in files]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="It seems that you are about to commit a data file")
        # Tries again by itself, but where the connection is lost its threads close each other's client: so one thread.
        api.preupload_lfs_files(repo_id, additions, revision=revision, free_memory=False, num_threads=1)
        commit = _patiently(api.create_commit, repo_id, [*additions, *stale], commit_message=message, revision=revision)
    return None if commit.oid == before.sha else commit.oid


def fetch_checkpoint(repo_id: str, output_dir: Path, token: str | None = None, is_first: bool = True) -> Path:
    """Fetch the last checkpoint of a training, and its best one, from the Hub into a run folder.

    Args:
        repo_id: owner/name.
        output_dir: The run folder.
        token: Defaults to that of `hf auth login` or HF_TOKEN.
        is_first: Whether this process writes the checkpoints. The others only get their path.

    Returns:
        The folder of the last checkpoint, output_dir/checkpoint-<step>.

    Raises:
        UserError: The repository does not exist, cannot be read, or has no checkpoint.
    """
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
    state = read_json(snapshot / LAST_CHECKPOINT / "trainer_state.json")
    last, best = (output_dir / f"checkpoint-{state[step] or 0}" for step in ("global_step", "best_global_step"))
    if is_first and (snapshot / BEST_CHECKPOINT).is_dir() and best != last:
        _copy_checkpoint(snapshot / BEST_CHECKPOINT, best, best)
    if is_first:
        _copy_checkpoint(snapshot / LAST_CHECKPOINT, last, best)
    return last


def _copy_checkpoint(source: Path, target: Path, best: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetched-") as beside:
        copied = shutil.copytree(source, Path(beside, target.name))
        state = read_json(copied / "trainer_state.json")
        if state["best_model_checkpoint"] is not None:
            state["best_model_checkpoint"] = str(best)
        (copied / "trainer_state.json").write_bytes(json_bytes(state))
        if target.exists():
            shutil.rmtree(target)
        os.replace(copied, target)


def reason(error: BaseException) -> str:
    """What went wrong with the Hub, in words of one line."""
    while isinstance(error, RuntimeError) and error.__cause__ is not None:  # the client's "Error while uploading"
        error = error.__cause__
    if isinstance(error, LocalTokenNotFoundError):
        return "there is no token: log in with `hf auth login`, or set HF_TOKEN"
    if isinstance(error, HFValidationError):
        return f"{error} Wanted owner/name"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so the Hub is not asked"
    if isinstance(error, HfHubHTTPError):
        status, said = error.response.status_code, " ".join((error.server_message or "").split())
        what = {
            400: "the Hub does not accept it",
            401: "the Hub does not know the token, or not this repository; log in again with `hf auth login`",
            402: "the storage of the account is full",
            403: "the storage of the account is full" if FULL.search(said) else "the token may not write there",
            404: "there is no such repository, or the token may not see it",
            409: "the name is taken",
            413: "the storage of the account is full",
            429: "the Hub answers no more requests for now",
            507: "the Hub has no room left",
        }.get(status, "the Hub is out of order" if status >= 500 else "the Hub refuses")
        return f"{what} ({status}{f': {said}' if said else ''})"
    if isinstance(error, httpx.HTTPError):
        return f"the connection to the Hub was lost, or there is none ({type(error).__name__}: {error})"
    if isinstance(error, OSError) and error.errno is not None:
        return f"{error.strerror}{f': {error.filename}' if error.filename else ''}"
    return str(error)


@contextmanager
def _explained(
    run: Path, repo_id: str, private: bool | None, revision: str | None, command: str | None = None
) -> Iterator[None]:
    """Turn whatever the client raises into what happened and the command that tries again."""
    try:
        yield
    except PublishError:
        raise
    except (HfHubHTTPError, httpx.HTTPError, OSError, ValueError, RuntimeError) as error:
        options = f" --revision {revision}" * (revision is not None) + " --private" * bool(private)
        command = command or f"python publish.py {shlex.quote(str(run))} --repo_id {repo_id}{options}"
        next_step = (
            f"The folder is as it was; this tries again and sends what is missing: {command}"
            if is_finished(run)
            else f"The training goes on and its next push tries again; when it has ended, so does: {command}"
        )
        raise PublishError(f"{run} was not published as {repo_id}: {reason(error)}. {next_step}") from error


def _patiently(call: Callable, *args, **options) -> Any:
    """A call of the client that it does not repeat by itself, again where the Hub was busy or the connection lost."""
    for seconds in (1, 2, 4, 8, None):
        try:
            return call(*args, **options)
        except HfHubHTTPError as error:
            if error.response.status_code not in BUSY or seconds is None:
                raise
            asked = error.response.headers.get("Retry-After", "")
            seconds, problem = int(asked) if asked.isdigit() else seconds, reason(error)
        except httpx.TransportError as error:
            if seconds is None:
                raise
            problem = reason(error)
        logger.warning("%s; trying again in %d s.", problem[0].upper() + problem[1:], seconds)
        time.sleep(seconds)
