"""Push finished runs to the Hub: weights, code, card, scores and figures.

    python publish.py RUN --repo_id me/ast-urbansound8k [--private] [--revision BRANCH]
    python publish.py RUN [RUN ...] [--web] [--dry_run]

If a run with dendrites was compared with a baseline whose run folder stands beside it, both are pushed. The baseline
goes to <repo_id>-baseline, and each card links to the other. The token comes from `hf auth login` or HF_TOKEN. The same
command again sends only the missing files. --dry_run lists every file, needs no token and sends nothing.

--web pushes the models for transformers.js, which runs them in browsers: to <repo_id>-web and <repo_id>-baseline-web.
Their files stay in RUN/export/web. The page in web/ shows both models side by side.

--space me/demo pushes the models and a Space: the page of app.py with the models of this command, side by side.
"""

import argparse
import shlex
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

PARSER = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
PARSER.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="Folder of a finished run.")
PARSER.add_argument("--repo_id", help="owner/name, for one RUN. Default: name of the folder, owner of the token.")
PARSER.add_argument("--private", action="store_true", help="Make a new repository private.")
PARSER.add_argument("--revision", metavar="BRANCH", help="Branch to push to, created if missing. Default: main.")
PARSER.add_argument("--without_baseline", action="store_true", help="Push a run with dendrites alone.")
KIND = PARSER.add_mutually_exclusive_group()
KIND.add_argument("--space", metavar="ID", help="Also push a Space that runs app.py with these models. Needs gradio.")
KIND.add_argument("--web", action="store_true", help="Push ONNX files for transformers.js. Needs onnxruntime.")
PARSER.add_argument("--dry_run", action="store_true", help="List every file and its size, and send nothing.")
if __name__ == "__main__":
    PARSER.parse_args()  # here, so that --help does not wait for the imports below

from huggingface_hub.utils import HFValidationError, validate_repo_id

from audio_dendrites.errors import run_program
from audio_dendrites.publishing.content import read_comparison, staged_files
from audio_dendrites.publishing.hub import Target, publish, staged
from audio_dendrites.publishing.space import publish_space, stage_space
from audio_dendrites.publishing.web import publish_web, write_web
from audio_dendrites.recipes import default_hub_model_id
from audio_dendrites.results.tables import markdown_table

CARD = Path(__file__).parent / "model_cards" / "model.md.jinja"
WEB_CARD = CARD.with_name("web.md.jinja")


def publications(options: argparse.Namespace) -> list[tuple[Path, str, str | None]]:
    """For each push: the run folder, its repository, and the repository of the run that it is compared with."""
    found = []
    for run in options.runs:
        repo_id = options.repo_id or default_hub_model_id(str(run))
        baseline = baseline_of(run)
        if baseline is None or baseline in options.runs or options.without_baseline:
            found.append((run, repo_id, None))
        else:
            found += [(baseline, f"{repo_id}-baseline", repo_id), (run, repo_id, f"{repo_id}-baseline")]
    return found


def baseline_of(run: Path) -> Path | None:
    """The run folder that comparison.json names as the baseline of a run with dendrites, if it exists."""
    comparison = read_comparison(run)
    if comparison is None:
        return None
    baseline, dendritic = (side["runs"] for side in comparison["sides"])
    beside = run.resolve().parent / baseline[0]
    return beside if dendritic == [run.resolve().name] and (beside / "metrics.json").is_file() else None


def show(run: Path, repo_id: str, other: str | None, web: bool) -> None:
    """List the files that a push would send."""
    with ExitStack() as opened:
        if web:
            folder = write_web(run, f"{repo_id}-web", WEB_CARD, repo_id)
        else:
            folder = opened.enter_context(staged(run, repo_id, CARD, other))
        list_files(f"{folder if web else run} → {repo_id}{'-web' * web}", folder)


def show_space(repo_id: str, models: Sequence[str]) -> None:
    """List the files that a push of a Space would send."""
    with TemporaryDirectory(prefix="space-") as folder:
        stage_space(Path(folder), repo_id, dict.fromkeys(models, "main"))
        list_files(f"Space {repo_id}", Path(folder))


def list_files(title: str, folder: Path) -> None:
    """Print the names and sizes of the files of a folder."""
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in staged_files(folder)}
    rows = [["file", "bytes"], *([name, f"{size:,}"] for name, size in sizes.items())]
    print(f"\n{title}\n\n{markdown_table(rows)}\n\n{sum(sizes.values()):,} bytes. Nothing was sent.")


def main(arguments: Sequence[str]) -> None:
    """Read the command line, and push or show one run after the other, and then the Space."""
    options = PARSER.parse_args(arguments)
    if options.repo_id and len(options.runs) > 1:
        PARSER.error(f"--repo_id must be left out with more than one run, got {len(options.runs)} runs")
    if options.space:
        try:
            validate_repo_id(options.space)
        except HFValidationError:
            PARSER.error(f"--space must be a Hub id such as me/demo, got {options.space!r}")
    command, targets = shlex.join(["python", "publish.py", *arguments]), []
    for run, repo_id, other in publications(options):
        target = Target(f"{repo_id}{'-web' * options.web}", options.private or None, options.revision)
        targets.append(target)
        if options.dry_run:
            show(run, repo_id, other, options.web)
        elif options.web:
            say(run, target, publish_web(run, target, WEB_CARD, repo_id, command))
        else:
            say(run, target, publish(run, target, CARD, other, command))
    if options.space and options.dry_run:
        show_space(options.space, [target.repo_id for target in targets])
    elif options.space:
        space = Target(options.space, options.private or None)
        say("Space", space, publish_space(space, targets, options.runs[0], command))


def say(what: str | Path, target: Target, address: str | None) -> None:
    """Print the result of a push."""
    found = f"published at {address}" if address else f"{target.repo_id} has every file already"
    print(f"{what}: {found}", flush=True)


if __name__ == "__main__":
    run_program(main)
