"""Train a recipe on generated clips in AudioSet's columns, kill the training twice, and plot its memory over time.

    PYTHONPATH=. python benchmarks/audioset.py generate FOLDER [--clips 20000]
    PYTHONPATH=. python benchmarks/audioset.py watch RECIPE OUT --dataset FOLDER [--field value ...]

`generate` writes Parquet files with the columns of agkphysics/AudioSet: `video_id`, `audio` (10 s, 16 kHz, FLAC),
`labels` and `human_labels` (one to four of 527 classes). A fifth of the clips are in the split test. Each class is a
tone with a pitch and a rhythm of its own.

`watch` starts train.py and kills all of its processes at two moments: half a minute after the start, and as soon as a
checkpoint exists. It starts the same command again each time. Every second it reads the memory of the processes from
/proc (Linux): `anonymous` is what they hold, and `mapped` also counts the pages of files, which the system can drop. It
writes OUT/memory.csv and OUT/memory.png.
"""

import argparse
import csv
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing import Pool
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
from matplotlib.figure import Figure
from tqdm import tqdm

RATE, SECONDS, CLASSES, ROWS = 16_000, 10, 527, 500  # rows of a file
PITCHES, RHYTHMS = 62, np.geomspace(0.3, 9, 9)  # 62 × 9 ≥ 527; Hz


def make_clip(number: int) -> dict:
    """A row of the data set: its classes, drawn so that some are rare, and their tones in noise."""
    draws = np.random.default_rng(number)
    shares = 1 / np.arange(10, 10 + CLASSES)
    classes = draws.choice(CLASSES, draws.integers(1, 5), replace=False, p=shares / shares.sum())
    moments = np.arange(RATE * SECONDS) / RATE
    sound = 0.01 * draws.standard_normal(len(moments))
    for one in classes:
        pitch = 100 * 70 ** (one % PITCHES / PITCHES)
        beat = 0.5 + 0.5 * np.sin(2 * np.pi * (RHYTHMS[one // PITCHES] * moments + draws.random()))
        sound += draws.uniform(0.05, 0.2) * beat * np.sin(2 * np.pi * pitch * moments)
    file = io.BytesIO()
    soundfile.write(file, sound, RATE, format="FLAC")
    name = f"clip{number:07}"
    return {
        "video_id": name,
        "audio": {"bytes": file.getvalue(), "path": f"{name}.flac"},
        "labels": [f"/m/{one:03}" for one in classes],
        "human_labels": [f"Class {one:03}" for one in classes],
    }


def write_file(rows: range, path: Path) -> None:
    pq.write_table(pa.Table.from_pylist([make_clip(number) for number in rows]), path)


def generate(folder: Path, clips: int) -> None:
    folder.mkdir(parents=True)
    parts = [range(start, min(start + ROWS, clips)) for start in range(0, clips, ROWS)]
    test = max(1, len(parts) // 5)
    paths = [folder / f"{'test' if part < test else 'train'}-{part:05}.parquet" for part in range(len(parts))]
    with Pool() as pool:
        jobs = [pool.apply_async(write_file, one) for one in zip(parts, paths, strict=True)]
        for job in tqdm(jobs, desc="Files"):
            job.get()


def members(group: int) -> Iterator[Path]:
    """The /proc folders of the processes of a group."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if os.getpgid(int(folder.name)) == group:
                yield folder
        except ProcessLookupError:
            continue  # it has just ended


def memory(group: int) -> tuple[float, float]:
    """Memory in MB that the processes of a group hold, without and with mapped files. Shared pages count once."""
    kilobytes = {"Pss_Anon:": 0, "Pss:": 0}
    for folder in members(group):
        try:
            lines = [line.split() for line in (folder / "smaps_rollup").read_text().splitlines()[1:]]
        except OSError:
            continue  # it has just ended
        for name, value, _ in lines:
            if name in kilobytes:
                kilobytes[name] += int(value)
    return kilobytes["Pss_Anon:"] / 1024, kilobytes["Pss:"] / 1024


def run(command: list[str], ends: Callable[[], bool], begin: float, rows: list[tuple]) -> int | None:
    """Run a command and note its memory every second. Kill it as soon as `ends()`. Returns its exit code."""
    process = subprocess.Popen(command, start_new_session=True)
    while process.poll() is None:
        rows.append((round(time.monotonic() - begin, 1), *memory(process.pid)))
        if ends():
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            print(f"killed after {rows[-1][0]:.0f} s", flush=True)
            return None
        time.sleep(1)
    return process.returncode


def plot(rows: list[tuple], kills: list[float]) -> Figure:
    minutes, anonymous, mapped = np.array(rows).T
    figure, axes = plt.subplots(figsize=(9, 4), layout="constrained")
    axes.plot(minutes / 60, mapped, label="with mapped files", color="tab:gray")
    axes.plot(minutes / 60, anonymous, label="anonymous", color="tab:blue")
    for place, kill in enumerate(kills):
        axes.axvline(kill / 60, color="tab:red", linestyle=":", label="killed" if not place else None)
    axes.set(xlabel="minutes", ylabel="memory of all processes, MB", ylim=(0, None))
    axes.legend()
    return figure


def watch(recipe: str, out: Path, fields: list[str]) -> None:
    command = [sys.executable, "train.py", recipe, "--output_dir", str(out), *fields]
    begin, rows, kills = time.monotonic(), [], []
    moments = [lambda: time.monotonic() - begin > 30, lambda: any(out.glob("checkpoint-*/trainer_state.json"))]
    for ends in [*moments, lambda: False]:
        code = run(command, ends, begin, rows)
        if code is not None:
            break
        kills.append(rows[-1][0])
    with (out / "memory.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("seconds", "anonymous_mb", "mapped_mb"), *rows])
    plot(rows, kills).savefig(out / "memory.png", dpi=120)
    sys.exit(code)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = options.add_subparsers(required=True)
    one = commands.add_parser("generate")
    one.add_argument("folder", type=Path)
    one.add_argument("--clips", type=int, default=20_000)
    one.set_defaults(run=lambda found, _: generate(found.folder, found.clips))
    other = commands.add_parser("watch")
    other.add_argument("recipe")
    other.add_argument("out", type=Path)
    other.set_defaults(run=lambda found, rest: watch(found.recipe, found.out, rest))
    arguments, rest = options.parse_known_args()
    arguments.run(arguments, rest)


if __name__ == "__main__":
    main()
