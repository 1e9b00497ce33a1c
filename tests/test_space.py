"""publish.py --space: the Space is downloaded from a loopback Hub and runs in a process of its own."""

import os
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import yaml
from conftest import tone, wav
from huggingface_hub import snapshot_download
from pandas import read_csv

pytest.importorskip("gradio", reason="the Space needs gradio: pip install -e '.[demo]'")

import predict  # noqa: E402
import publish  # noqa: E402


def test_a_space_runs_by_itself_with_pinned_models_and_the_scores_of_predict(finished_pair, online, tmp_path, capsys):
    from gradio_client import Client, handle_file

    runs = shutil.copytree(finished_pair, tmp_path / "runs")
    words = [str(runs / "run"), "--repo_id", "me/tones", "--space", "me/demo"]
    publish.main([*words, "--dry_run"])
    assert "| audio_dendrites/results/demo.py" in capsys.readouterr().out and not online.repos
    publish.main(words)
    assert "Space: published at" in capsys.readouterr().out
    publish.main(words)
    assert "me/demo has every file already" in capsys.readouterr().out

    space = snapshot_download("me/demo", repo_type="space", local_dir=tmp_path / "space", max_workers=1)
    files = {name: (tmp_path / "space" / name).read_text() for name in ("README.md", "app.py", "requirements.txt")}
    metadata = yaml.safe_load(files["README.md"].split("---\n")[1])
    assert (
        metadata["sdk"] == "gradio"
        and metadata["models"] == ["me/tones-baseline", "me/tones"]
        and metadata["app_file"] == "app.py"
    )
    pins = [f"{repo_id}@{online.commits(repo_id)[0]}" for repo_id in metadata["models"]]
    assert str(pins) in files["app.py"] and "hf_" not in "".join(files.values())
    assert str(tmp_path) not in "".join(files.values())
    assert all(re.fullmatch(r"[\w-]+==[\w.]+", line) for line in files["requirements.txt"].splitlines())

    # Packages that the Space does not ask for are not there.
    hidden = ["accelerate", "evaluate", "perforatedai", "sklearn", "tensorboard", "torchvision", "peft"]
    program = (
        f"import sys, runpy; sys.modules |= dict.fromkeys({hidden}); runpy.run_path('app.py', run_name='__main__')"
    )
    environment = online.environment(tmp_path / "empty", PYTHONPATH="", GRADIO_SERVER_PORT="7960")
    (tmp_path / "tone.wav").write_bytes(wav(tone(3000, 0.5)))
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=space, env=environment, stdout=subprocess.PIPE, text=True
    ) as served:
        try:
            address = re.search(r"http://\S+:(\d+)", served.stdout.readline())
            client = Client(f"http://127.0.0.1:{address[1]}", verbose=False, analytics_enabled=False)
            table, _ = client.predict(handle_file(str(tmp_path / "tone.wav")), api_name="/classify")
        finally:
            os.kill(served.pid, signal.SIGINT)
    assert table["headers"] == ["class", "tones-baseline", "tones"]
    for column, run in enumerate((runs / "run_baseline", runs / "run"), 1):
        predict.main([str(run), str(tmp_path / "tone.wav"), "--output", str(tmp_path / "scores.csv")])
        truth = read_csv(tmp_path / "scores.csv").iloc[0]
        assert all(np.float32(row[column]) == np.float32(truth[row[0]]) for row in table["data"])


def test_the_name_of_a_space_is_checked_before_a_model_is_pushed(tmp_path, capsys):
    with pytest.raises(SystemExit):
        publish.main([str(tmp_path), "--space", "a/b/c"])
    assert "--space must be a Hub id such as me/demo, got 'a/b/c'" in capsys.readouterr().err
