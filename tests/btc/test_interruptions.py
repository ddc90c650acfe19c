"""Twenty runs killed with SIGKILL while they prepare, train or write a checkpoint, each resumed to its end."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from flashlab.btc.prepare import open_set
from flashlab.machine import identify

KILLED_IN = ["prepare"] * 2 + ["storing the set"] * 3 + ["training"] * 8 + ["writing a checkpoint"] * 7
STEPS = 80
# A checkpoint every second step: much of the time goes into writing them.
TRAIN = (
    "--data.context_length 32 --data.stride 16 --data.batch_size 4 --model.width 16 --model.num_layers 1 "
    f"--optimizer.lr 0.02 --optimizer.warmup_steps 3 --optimizer.plateau_patience 0 --trainer.max_steps {STEPS} "
    "--trainer.val_every_n_steps 5 --trainer.checkpoint_every_n_steps 2 --trainer.early_stopping_patience 1000 "
    "--trainer.accelerator cpu --resume"
)
COMPARED = ("state_dict", "current_model_state", "averaging_state", "optimizer_states", "lr_schedulers", "global_step")


class Run:
    """The two commands of a run, in a folder of its own."""

    def __init__(self, folder, bars, prepared=None):
        self.set, self.run = prepared or folder / "set", folder / "run"
        self.prepare = ["data", "prepare", bars, "--out", self.set, "--context_length", "32"]
        self.train = ["train", "--data.path", self.set, *TRAIN.split(), "--run", self.run]

    def complete(self):
        """Prepare unless there is a set, and train to the end."""
        for command in ([] if (self.set / "manifest.json").exists() else [self.prepare]) + [self.train]:
            process = start(command)
            assert process.wait(timeout=120) == 0, process.stderr.read()

    def checkpoints(self):
        loaded = {}
        for name in ("best.ckpt", "last.ckpt"):
            checkpoint = torch.load(self.run / "checkpoints" / name, weights_only=True)
            loaded[name] = {key: checkpoint[key] for key in COMPARED}
        return loaded

    def kill(self, where, delay):
        """Kill the command after a delay, and after that as soon as it does what it has to be killed in."""
        folder = self.run / "checkpoints"
        process = start(self.prepare if self.prepares(where) else self.train)
        if not self.prepares(where):
            wait_for(process, (folder / "last.ckpt").exists)
        time.sleep(delay)
        if where == "writing a checkpoint":
            wait_for(process, (folder / ".last.ckpt.partial").exists)
        if where == "storing the set":
            wait_for(process, lambda: list(self.set.glob("bars-*")))
        process.kill()
        return process.wait() == -signal.SIGKILL

    @staticmethod
    def prepares(where):
        return where in ("prepare", "storing the set")

    def what_is_left(self):
        """Say where the kill fell, from what lies in the folders."""
        folder = self.run / "checkpoints"
        if not self.run.exists():
            stored = (self.set / "manifest.json").exists()
            return "prepare: " + (
                "set complete" if stored else "set begun" if list(self.set.glob("bars-*")) else "before"
            )
        if (folder / ".last.ckpt.partial").exists() or (folder / ".best.ckpt.partial").exists():
            return "checkpoint: partly written"
        return "training" if (folder / "last.ckpt").exists() else "checkpoint: before it was written"


def start(command):
    """Start a command with one thread: the pairs that run side by side would stand in each other's way."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "flashlab", *map(str, command)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(process, happens):
    while not happens() and process.poll() is None:
        time.sleep(0.0005)


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.slow
def test_twenty_killed_runs_end_like_one_that_was_not(bars_csv, tmp_path):
    begun = time.perf_counter()
    uninterrupted = Run(tmp_path / "uninterrupted", bars_csv)
    times = []
    for command in (uninterrupted.prepare, uninterrupted.train):
        started = time.perf_counter()
        assert start(command).wait(timeout=120) == 0
        times.append(time.perf_counter() - started)
    training_s = json.loads((uninterrupted.run / "run.json").read_text())["finished"]["seconds"]
    expected, bars = uninterrupted.checkpoints(), open_set(uninterrupted.set).bars().values

    def interrupt(number, where):
        run = Run(tmp_path / f"run-{number}", bars_csv, None if Run.prepares(where) else uninterrupted.set)
        chance = random.Random(number)
        if run.prepares(where):
            delay = chance.uniform(0.1, 0.9) * times[0] if where == "prepare" else 0.0
        else:
            delay = chance.uniform(0, 0.8) * training_s
        while not run.kill(where, delay):  # it was done already
            shutil.rmtree(run.set if run.prepares(where) else run.run)
            delay /= 2
        fell = run.what_is_left()
        run.complete()
        prepared = (
            open_set(run.set).bars().values.tobytes() == bars.tobytes() and len(list(run.set.glob("bars-*"))) == 1
        )
        return {
            "aimed_at": where,
            "delay_s": round(delay, 3),
            "fell_in": fell,
            "status": "ok" if prepared and same(run.checkpoints(), expected) else "wrong",
        }

    with ThreadPoolExecutor(2) as pool:
        rows = list(pool.map(interrupt, range(len(KILLED_IN)), KILLED_IN))
    fell = Counter(row["fell_in"] for row in rows)
    equal = sum(row["status"] == "ok" for row in rows)
    seconds = time.perf_counter() - begun
    places = ", ".join(f"{count} in {place}" for place, count in fell.most_common())
    print(f"\n{fell.total()} kills ({places}): {equal} of {len(rows)} runs ended bit for bit alike, in {seconds:.0f} s")
    if folder := os.environ.get("FLASHLAB_RESULTS"):
        result = {
            "schema_version": 1,
            "what": __doc__,
            "steps": STEPS,
            "machine": identify(),
            "seconds": round(seconds),
        }
        (Path(folder) / "interruptions.json").write_text(json.dumps(result | {"rows": rows}, indent=1))
    assert equal == len(rows), rows
    assert {place.split(":")[0] for place in fell} == {"prepare", "training", "checkpoint"}
