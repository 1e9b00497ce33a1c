"""Runs pushed to a loopback Hub over real HTTP: by publish.py, by a training, and loaded again by strangers."""

import errno
import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from concurrent.futures import wait
from io import BytesIO
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
import yaml
from conftest import PAI, tone_of
from hub.server import OTHER_TOKEN, READ_TOKEN, WRITE_TOKEN, Fault
from safetensors.torch import load_file
from transformers import AutoModelForAudioClassification, TrainerCallback

import publish
import train
from audio_dendrites.errors import UserError
from audio_dendrites.publishing.content import PublishError
from audio_dendrites.recipes import parse_recipe
from audio_dendrites.training.trainer import AudioTrainer

pytest.importorskip("perforatedai", reason="perforatedai has no wheel for this Python; 3.11 and 3.12 have one")

SECRET = "correct-horse-battery"
MODEL = {"README.md", "config.json", "model.safetensors", "preprocessor_config.json"}
REPORTS = {"config.yaml", "confusion_matrix.png", "learning_curves.png", "metrics.json", "predictions.parquet"}
PLAIN = MODEL | REPORTS | {"comparison.json"}
DENDRITIC = PLAIN | {"comparison.md", "comparison.csv", "comparison.png", "dendrites.png", "dendritic.py"}


@pytest.fixture
def runs(finished_pair, tmp_path) -> Path:
    """A copy of the run folders `run` and `run_baseline`, with secrets in files that nobody publishes."""
    folder = shutil.copytree(finished_pair, tmp_path / "runs")
    for run in (folder / "run", folder / "run_baseline"):
        for name in ("notes.md", "training_args.bin", "optimizer.pt", "clip.wav", "secrets.py", "x.png", "report.html"):
            (run / name).write_text(f"{SECRET} {run}")
        for path in (next(run.glob("checkpoint-*")) / "trainer_state.json", run / "tensorboard" / "events"):
            path.write_text(SECRET)
    return folder


@pytest.fixture
def slept(monkeypatch) -> list[float]:
    """The seconds that the process would have slept. It does not sleep."""
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    return waits


def digest(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def requests(hub, match: str) -> list:
    return [entry for entry in hub.log if re.search(match, f"{entry.method} {entry.path}")]


def push(runs: Path, *options: str) -> None:
    publish.main([str(runs / "run"), "--repo_id", "me/tones", *options])


def test_one_command_publishes_both_checkpoints_and_strangers_load_them(runs, online, tmp_path):
    before = digest(runs)
    push(runs)
    assert digest(runs) == before
    assert online.files("me/tones").keys() == DENDRITIC and online.files("me/tones-baseline").keys() == PLAIN
    cards = {repo_id: online.files(repo_id)["README.md"].decode() for repo_id in ("me/tones", "me/tones-baseline")}
    assert "(https://huggingface.co/me/tones-baseline)" in cards["me/tones"]
    assert "(https://huggingface.co/me/tones)" in cards["me/tones-baseline"]
    pinned = re.search(r'trust_remote_code=True,\s+revision="([0-9a-f]{40})"', cards["me/tones"])[1]
    assert online.commits("me/tones")[1] == pinned and "revision=" not in cards["me/tones-baseline"]

    rows = list(range(16, 24))
    np.save(
        tmp_path / "waveforms.npy", np.array([np.round(tone_of(row) * 32767) / 32768 for row in rows], dtype=object)
    )
    program = f"""
import sys
sys.modules |= dict.fromkeys(["audio_dendrites", "perforatedai", "pai_callback", "datasets", "torchaudio"])
import numpy, torch
from transformers import pipeline
for arguments in ({{"model": "me/tones-baseline"}},
                  {{"model": "me/tones", "trust_remote_code": True, "revision": "{pinned}"}}):
    classify = pipeline("audio-classification", **arguments)
    waveforms = [waveform.astype("float32") for waveform in numpy.load("waveforms.npy", allow_pickle=True)]
    inputs = classify.feature_extractor(waveforms, sampling_rate=16000, return_tensors="pt")
    with torch.no_grad():
        print(classify.model(**inputs).logits.tolist())
    assert {{one["label"] for one in classify(waveforms[0])}} == {{"high", "low"}}
"""
    environment = online.environment(tmp_path / "empty", PYTHONPATH="")
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for line, run in zip(done.stdout.splitlines(), ("run_baseline", "run"), strict=True):
        found = np.array(json.loads(line))
        expected = np.stack(pandas.read_parquet(runs / run / "predictions.parquet")["logits"])
        assert np.abs(found - expected).max() < 1e-4  # without torchaudio the stock features are NumPy's


def test_nothing_secret_is_in_anything_the_hub_received(runs, online, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    push(runs)
    commits = [commit for repo in online.repos.values() for commit in repo.commits.values()]
    received = [*online.large.values(), *(file.content for commit in commits for file in commit.tree.values())]
    tables = [BytesIO(content) for content in received if content[:4] == b"PAR1"]
    received += [pandas.read_parquet(table).to_string().encode() for table in tables]
    assert len(set(received)) > 15 and tables
    for secret in (SECRET, "home-of-jo", str(runs), "PlantedOnTheCommandLine", WRITE_TOKEN, socket.gethostname() + "."):
        assert not [content for content in received if secret.encode() in content], secret
    metrics = json.loads(online.files("me/tones")["metrics.json"])
    assert (
        metrics["command"] == ["train.py", "recipe.yaml", "--hub_token", "…"] and metrics["dataset"] == "tones.parquet"
    )
    recipe = yaml.safe_load(online.files("me/tones")["config.yaml"])
    assert recipe["dataset"] == "tones.parquet" and recipe["output_dir"] == "run"
    assert "datasets" not in (card := online.files("me/tones")["README.md"].decode()).split("---")[1]
    assert "the local data set `tones.parquet`" in card and "--hub_token … " not in card.split("```bash")[0]


def test_a_planted_secret_in_what_is_sent_stops_everything(runs, online, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    recipe = runs / "run_baseline" / "config.yaml"
    recipe.write_text(recipe.read_text() + f"run_name: {SECRET}\n")
    with pytest.raises(PublishError, match="config.yaml holds the value of the environment variable WANDB_API_KEY"):
        push(runs)
    assert online.log == []


def test_a_second_push_sends_only_what_is_missing(runs, online, capsys):
    push(runs)
    commits = online.commits("me/tones")
    online.log.clear()
    push(runs)
    assert "me/tones has every file already" in capsys.readouterr().out
    assert online.commits("me/tones") == commits and not requests(online, "PUT|/commit/")
    metrics = json.loads((runs / "run" / "metrics.json").read_text())
    (runs / "run" / "metrics.json").write_text(json.dumps(metrics | {"epochs": 99.0}))
    push(runs)
    assert not requests(online, "PUT") and online.commits("me/tones")[2:] == commits
    assert json.loads(online.files("me/tones")["metrics.json"])["epochs"] == 99.0


def test_options_branch_private_alone_and_folder_names(runs, online, capsys, monkeypatch):
    push(runs, "--private", "--revision", "first", "--without_baseline")
    assert online.repos.keys() == {"models/me/tones"}
    assert online.repos["models/me/tones"].private and online.repos["models/me/tones"].branches.keys() == {
        "main",
        "first",
    }
    assert online.files("me/tones").keys() == set() and online.files("me/tones", revision="first").keys() == DENDRITIC
    monkeypatch.chdir(runs.parent)
    publish.main(["runs/run_baseline", "runs/run"])
    assert online.files("me/run").keys() == DENDRITIC and online.files("me/run_baseline").keys() == PLAIN


def test_a_dry_run_lists_every_byte_without_token_or_request(runs, online, capsys, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    push(runs, "--dry_run")
    listed = capsys.readouterr().out
    assert online.log == [] and "me/tones-baseline" in listed
    assert set(re.findall(r"^\| ([\w.]+) +\| +[\d,]+ ", listed, re.M)) == DENDRITIC
    assert f"{(runs / 'run' / 'model.safetensors').stat().st_size:,}" in listed
    totals = [int(total.replace(",", "")) for total in re.findall(r"^([\d,]+) bytes. Nothing was sent", listed, re.M)]
    monkeypatch.setenv("HF_TOKEN", WRITE_TOKEN)
    push(runs, "--without_baseline")
    sent = sum(map(len, online.files("me/tones").values()))
    assert abs(sent - totals[1]) < 300  # the pinned revision, and no link to the baseline


@pytest.mark.parametrize(
    ("token", "fault", "repo_id", "said"),
    [
        (None, None, "me/tones", "there is no token: log in with `hf auth login`, or set HF_TOKEN"),
        ("hf_unknown", None, "me/tones", "the Hub does not know the token.*401"),
        (READ_TOKEN, None, "me/tones", "the token has no permission to write there .403: You must use a write token"),
        (OTHER_TOKEN, None, "me/tones", "the token has no permission to write there .403: You don't have the rights"),
        (WRITE_TOKEN, None, "me/to--nes", "Cannot have -- or .. in repo_id"),
        (WRITE_TOKEN, None, "me/my/tones", "Repo id must be in the form"),
        (WRITE_TOKEN, Fault("batch", 403, "Storage limit reached"), "me/tones", "the storage of the account is full"),
        (WRITE_TOKEN, Fault("PUT", 507, "Insufficient storage"), "me/tones", "the storage of the account is full"),
        (WRITE_TOKEN, Fault("/commit/", 413, "Too large"), "me/tones", "the storage of the account is full .413"),
        (WRITE_TOKEN, Fault("create", 500, times=99), "me/tones", "the Hub is out of order .500: Failed on demand"),
        (WRITE_TOKEN, Fault("/commit/", 429, times=99), "me/tones", "the Hub accepts no more requests for now"),
        (WRITE_TOKEN, Fault("PUT", 503, times=99), "me/tones", "the Hub is out of order .503"),
    ],
)  # fmt: skip
def test_a_hub_that_fails_leaves_the_run_intact_and_is_explained(
    runs, online, slept, monkeypatch, token, fault, repo_id, said
):
    monkeypatch.setenv("HF_TOKEN", token) if token else monkeypatch.delenv("HF_TOKEN")
    online.faults += [fault] if fault else []
    before = digest(runs)
    command = [str(runs / "run_baseline"), "--repo_id", repo_id]
    with pytest.raises(PublishError, match=said) as error:
        publish.main(command)
    assert str(error.value).endswith(f"sends only the missing files: python publish.py {' '.join(command)}")
    assert "\n" not in str(error.value) and "hf_" not in str(error.value)
    assert digest(runs) == before
    if token == WRITE_TOKEN and "--" not in repo_id and repo_id.count("/") == 1:
        online.faults.clear()
        publish.main(command)
        assert online.files(repo_id).keys() == PLAIN


def test_a_hub_that_dies_in_the_middle_of_the_weights(runs, online, slept):
    before = digest(runs)
    online.faults.append(Fault(f"PUT /_lfs/{before['run_baseline/model.safetensors']}", cut_after=50_000, down=True))
    with pytest.raises(PublishError, match="there is no connection to the Hub"):
        push(runs)
    assert digest(runs) == before and "model.safetensors" not in online.files("me/tones-baseline")
    there = set(online.large)
    online.log.clear()
    online.start()
    push(runs)
    assert online.files("me/tones").keys() == DENDRITIC and online.files("me/tones-baseline").keys() == PLAIN
    assert (runs / "run" / "model.safetensors").read_bytes() == online.files("me/tones")["model.safetensors"]
    sent = {entry.path.split("/")[2] for entry in requests(online, "PUT /_lfs")}
    assert sent and not sent & there  # what had arrived is not sent again


def test_a_lost_connection_is_taken_up_by_itself(runs, online, slept):
    online.faults.append(Fault(f"PUT /_lfs/{digest(runs)['run/model.safetensors']}", cut_after=50_000))
    push(runs, "--without_baseline")
    assert online.files("me/tones")["model.safetensors"] == (runs / "run" / "model.safetensors").read_bytes()


# Trainings that publish


@pytest.fixture
def fit(recipe, tmp_path):
    """A function that trains a recipe as train.py does, pushes to me/live by default, and returns the run folder."""

    def fit(folder="run", **changes) -> Path:
        changes = {"push_to_hub": True, "hub_model_id": "me/live", "output_dir": str(tmp_path / folder)} | changes
        train.main(parse_recipe([str(recipe(**changes))]))
        return tmp_path / folder

    return fit


def titles(hub, repo_id: str) -> list[str]:
    return [commit.title for commit in reversed(hub.repos[f"models/{repo_id}"].history("main"))]


def test_a_training_publishes_itself_at_its_end(fit, online):
    run = fit(hub_strategy="end", num_train_epochs=1)
    assert titles(online, "me/live") == ["initial commit", "Model, figures and card"]
    files = online.files("me/live")
    assert files.keys() == MODEL | REPORTS and "library_name: transformers" in files["README.md"].decode()
    assert files["model.safetensors"] == (run / "model.safetensors").read_bytes()
    assert "has been trained" not in files["README.md"].decode()  # the Trainer's own card
    assert not list(run.glob(".push-*")) and not (run / "training_args.bin").exists()


def test_every_save_publishes_a_model_that_loads(fit, online, tmp_path):
    fit(hub_strategy="every_save", hub_always_push=True, pai=PAI, num_train_epochs=2)
    history = {commit.title: commit.oid for commit in online.repos["models/me/live"].history("main")}
    steps = [int(re.search(r"step (\d+)", title)[1]) for title in history if "in progress" in title]
    assert steps == [8, 4]
    files = online.files("me/live", next(oid for title, oid in history.items() if title.endswith("step 8")))
    assert files.keys() == MODEL | {"dendritic.py"}
    card = files["README.md"].decode()
    assert "The training is still running: these are the weights of step 8 of 8" in card and "model-index" not in card
    (tmp_path / "loaded").mkdir()
    for name, content in files.items():
        (tmp_path / "loaded" / name).write_bytes(content)
    model = AutoModelForAudioClassification.from_pretrained(tmp_path / "loaded", trust_remote_code=True)
    assert model.config.dendrites["classifier.dense"]["count"] == 2
    assert f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters" in card


class Killed(BaseException):
    """Stands for a machine that fails. Nothing catches it."""


class KillAtStep9(TrainerCallback):
    """Ends the training in its last epoch, after the pushes of the checkpoints 4 and 8."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 9:
            wait(self.trainer.push_in_progress.jobs)
            raise Killed


@pytest.mark.parametrize("pai", [None, PAI])
def test_a_training_continues_from_the_last_checkpoint_on_the_hub(
    fit, online, finished_pair, tmp_path, monkeypatch, pai
):
    """No file of the run folders or of the Hub holds the token, which is an argument here."""
    monkeypatch.delenv("HF_TOKEN")
    fields = {"pai": pai, "hub_strategy": "checkpoint", "hub_always_push": True, "hub_token": WRITE_TOKEN}
    train_as_before = AudioTrainer.train

    def train_and_die(self, *args, **kwargs):
        callback = KillAtStep9()
        callback.trainer = self
        self.add_callback(callback)
        return train_as_before(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(AudioTrainer, "train", train_and_die)
        with pytest.raises(Killed):
            fit("first", **fields)
    shutil.rmtree(tmp_path / "first")
    files = online.files("me/live")
    assert online.repos["models/me/live"].private and files.keys() >= MODEL
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "model.safetensors"} <= {
        name.split("/")[1] for name in files if name.startswith("last-checkpoint/")
    }
    assert not [name for name in files if name.endswith("training_args.bin")]
    assert not [name for name, content in files.items() if str(tmp_path).encode() in content]

    second, whole = fit("second", resume_from_checkpoint="me/live", **fields), finished_pair / "run"
    whole = whole if pai else finished_pair / "run_baseline"
    tensors, expected = (load_file(run / "model.safetensors") for run in (second, whole))
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in tensors)
    steps = [json.loads((run / "metrics.json").read_text())["best_step"] for run in (second, whole)]
    assert steps[0] == steps[1]
    left = online.files("me/live").keys()
    assert not [name for name in left if "checkpoint" in name or name.endswith((".pt", ".pth"))]  # it has ended
    (tmp_path / "recipe.yaml").unlink()  # this test wrote the token into it
    paths = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in paths if WRITE_TOKEN.encode() in path.read_bytes()]
    with pytest.raises(UserError, match="me/live has no last-checkpoint/ on the Hub"):
        fit("third", resume_from_checkpoint="me/live", **fields)
    with pytest.raises(UserError, match="me/nothing is not a folder, and the Hub did not give it"):
        fit("third", resume_from_checkpoint="me/nothing", **fields)


def test_a_training_ends_whatever_the_hub_does(fit, finished, online, slept, caplog):
    expected = load_file(finished / "run" / "model.safetensors")
    online.faults.append(Fault(".", 500, "Down for the day.", times=float("inf")))
    run = fit(hub_strategy="every_save")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load_file(run / "model.safetensors").items())
    warnings = [record.getMessage() for record in caplog.records if "was not published" in record.getMessage()]
    assert len(warnings) >= 3 and all("the Hub is out of order (500: Down for the day.)" in line for line in warnings)
    assert f"its next push tries again. After the training, use: python publish.py {run}" in warnings[0]
    assert f"sends only the missing files: python publish.py {run} --repo_id me/live" in warnings[-1]
    online.faults.clear()
    publish.main([str(run), "--repo_id", "me/live"])
    assert online.files("me/live").keys() == MODEL | REPORTS


def test_a_full_disk_costs_a_push_and_no_training(fit, online, caplog, monkeypatch):
    def full_disk(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("audio_dendrites.training.trainer.model_card", full_disk)
    run = fit(hub_strategy="every_save", num_train_epochs=1)
    assert "Step 4 was not pushed. The training continues. [Errno 28] No space left on device" in caplog.text
    assert not list(run.glob(".push-*")) and "Training in progress" not in " ".join(titles(online, "me/live"))


def test_a_baseline_and_its_dendritic_model_end_in_two_repositories(fit, finished_pair, online, tmp_path):
    for name in ("run", "run_baseline"):  # both are finished, and still to be published
        shutil.copytree(finished_pair / name, tmp_path / "runs" / name.replace("run", "quick"))
    fit("runs/quick", baseline=True, pai=PAI, hub_model_id=None)
    cards = [online.files(repo_id)["README.md"].decode() for repo_id in ("me/quick", "me/quick-baseline")]
    assert "huggingface.co/me/quick-baseline)" in cards[0] and "huggingface.co/me/quick)" in cards[1]
    assert all("| against baseline |" in card for card in cards)
