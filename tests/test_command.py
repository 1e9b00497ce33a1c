"""The command `audio-dendrites` as pip installs it, --help of each program, and what a training shows."""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
from conftest import ROOT
from transformers import TrainerState

from audio_dendrites.__main__ import PROGRAMS
from audio_dendrites.recipes import find_recipe
from audio_dendrites.training.progress import EvaluationLines


def test_the_installed_command_trains_a_recipe_by_its_name(tmp_path):
    clone, site, work = (tmp_path / name for name in ("clone", "site", "work"))
    others = shutil.ignore_patterns(".*", "build", "runs", "tests", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, clone, ignore=others)  # setuptools writes into the folder that it builds
    work.mkdir()
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*install, "--target", site, clone], check=True, capture_output=True)
    assert {path.name.split("-")[0] for path in site.iterdir()} == {"audio_dendrites", "bin"}  # no module `train`
    command = [site / "bin" / "audio-dendrites", "train", "quickstart/plain", "--synthetic_clips", "100"]
    command += ["--max_steps", "2", "--eval_steps", "1", "--save_steps", "2", "--report_to", "none"]
    environment = os.environ | {"PYTHONPATH": str(site)}
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((work / "runs" / "quickstart" / "plain" / "metrics.json").read_text())
    assert metrics["command"][:2] == ["train.py", "quickstart/plain"] and "commit" not in metrics["environment"]
    header, first, second, *_ = done.stdout.splitlines()
    assert re.split("  +", header.strip()) == [
        "step", "epoch", "train loss", "loss", "accuracy", "best", "time left",
    ]  # fmt: skip
    assert len(header) == len(first) == len(second) and second.split()[0] == "2/2"
    assert "{" not in done.stdout and done.stderr == ""  # no terminal, no bars


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_does_not_wait_for_imports_that_it_does_not_use(program):
    command = [sys.executable, "-X", "importtime", "-m", "audio_dendrites", program, "--help"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 3  # seconds of the processor
    assert done.returncode == 0 and done.stdout.startswith(f"usage: {'accelerate' if program == 'train' else program}")
    imported = set(re.findall(r"\| +([\w.]+)$", done.stderr, re.M))
    assert not imported & {"datasets", "evaluate", "matplotlib", "peft", "perforatedai", "audio_dendrites.models"}
    assert program == "train" or "torch" not in imported


def test_a_file_of_the_user_takes_precedence_over_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_recipe("esc50/ast") == ROOT / "configs/esc50/ast.yaml" and find_recipe("mine.yaml") == Path("mine.yaml")
    (tmp_path / "esc50").mkdir()
    (tmp_path / "esc50" / "ast").write_text("seed: 1")
    assert find_recipe("esc50/ast") == Path("esc50/ast")


@pytest.mark.parametrize(
    ("level", "shown"), [("passive", ""), ("info", "{'loss': '0.5'}\n"), ("debug", "{'loss': '0.5'}\n")]
)
def test_log_level_brings_the_dictionaries_back(level, shown, capsys):
    lines, state = EvaluationLines(), TrainerState(is_world_process_zero=True, max_steps=2)
    lines.on_train_begin(Namespace(disable_tqdm=True), state, None)
    lines.on_log(Namespace(log_level=level), state, None, logs={"loss": 0.5})
    assert capsys.readouterr().out == shown
