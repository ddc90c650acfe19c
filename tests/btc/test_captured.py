import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from flashlab.btc.callbacks import AverageWeights
from flashlab.btc.captured import CapturedStep
from flashlab.btc.dataset import Windows
from flashlab.btc.module import ForecasterModule
from flashlab.btc.prepare import open_set
from flashlab.btc.report import read_curves
from flashlab.btc.windows import part_windows
from flashlab.cli import main

SHAPE = (
    "--data.context_length 32 --data.stride 16 --data.batch_size 8 --model.width 32 --model.num_layers 2 "
    "--optimizer.lr 0.002 --optimizer.warmup_steps 20 --optimizer.plateau_patience 0 --trainer.max_steps 60 "
    "--trainer.val_every_n_steps 20 --trainer.checkpoint_every_n_steps 7 --trainer.log_every_n_steps 1 "
    "--trainer.accelerator gpu --trainer.precision 32-true --model.backend sdpa_math"
)


@pytest.fixture
def train(prepared):
    return lambda run, *options: main(
        ["train", "--data.path", str(prepared), *SHAPE.split(), "--run", str(run), *options]
    )


@pytest.fixture(scope="module")
def captured(prepared, tmp_path_factory):
    run = tmp_path_factory.mktemp("captured") / "run"
    assert main(["train", "--data.path", str(prepared), *SHAPE.split(), "--run", str(run)]) == 0
    assert json.loads((run / "run.json").read_text())["finished"]["step"] == "captured"
    return run


def assert_alike(run, other):
    """The same but for rounding, which the optimiser makes more of from step to step."""
    curves, others = (
        {tag: dict(zip(*values, strict=True)) for tag, values in read_curves(folder).items()} for folder in (run, other)
    )
    for tag in ("train/loss", "train/lr", "val/loss"):
        steps = sorted(curves[tag].keys() & others[tag].keys())  # the step at which a run was stopped is not logged
        assert len(steps) >= (3 if tag == "val/loss" else 57)
        difference = np.abs([curves[tag][step] - others[tag][step] for step in steps])
        print(f"{tag}: first 10 steps {difference[:10].max():.1e}, all {difference.max():.1e}")
        assert difference[:10].max() < 2e-3, tag
        assert difference.max() < 0.05, tag
    assert len(set(curves["train/lr"].values())) > 10, "the rate must change, or nothing shows that replays follow it"


@pytest.mark.gpu
def test_captured_steps_train_as_plain_ones(train, captured, tmp_path):
    assert train(tmp_path / "plain", "--trainer.step", "plain") == 0
    assert_alike(captured, tmp_path / "plain")


@pytest.mark.gpu
@pytest.mark.parametrize("options", [["--data.stream", "true"], ["--data.stream", "true", "--data.num_workers", "2"]])
def test_streamed_windows_train_as_resident_ones(train, captured, options, tmp_path):
    assert train(tmp_path / "streamed", *options) == 0
    assert_alike(captured, tmp_path / "streamed")


@pytest.mark.gpu
@pytest.mark.parametrize("steps", [["captured", "captured", "captured"], ["plain", "captured", "plain"]])
def test_a_stopped_run_goes_on_where_it_was(train, captured, steps, tmp_path, monkeypatch):
    original, run = ForecasterModule.training_step, tmp_path / "run"

    def stop(self, batch):
        if self.trainer.global_step in (1, 25):
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batch)

    monkeypatch.setattr(ForecasterModule, "training_step", stop)
    codes = [train(run, "--resume", "--trainer.step", step) for step in steps]
    assert codes == [128 + signal.SIGTERM, 128 + signal.SIGTERM, 0]
    assert_alike(run, captured)


@pytest.mark.gpu
def test_a_replay_does_not_wait_for_the_gpu(prepared):
    opened = open_set(str(prepared))
    windows = Windows(opened, part_windows(opened.manifest, "train", 32, 16), 32, mirror=True)
    model = {"width": 32, "num_layers": 2}
    module = ForecasterModule(model, {}, opened.scaler.mean, opened.scaler.std, mask_filled=True).cuda()
    read, optimizer = windows.resident(module.device), module.make_optimizer()
    average = AverageWeights(0.999)
    average.setup(None, module, "fit")
    step = CapturedStep(
        lambda items: module.loss(read(items)), optimizer, 0.5, torch.bfloat16, lambda: average.update(module)
    )
    items = torch.arange(8, device="cuda")
    for _ in range(5):
        step(items)
    losses = []
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(50):
            step(items)
            losses.append(step.loss.clone())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.stack(losses).diff().mean() < 0
    assert losses[-1] < 0.8 * losses[0]
    assert int(average._average_model.n_averaged) == 55


@pytest.mark.gpu
@pytest.mark.parametrize("step", ["plain", "captured"])
def test_two_gpus_train_as_one_with_twice_the_batch(captured, prepared, step, tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU here")
    options = [*SHAPE.split(), "--data.batch_size", "4", "--trainer.devices", "2", "--trainer.step", step]
    command = [sys.executable, "-m", "flashlab", "train", "--data.path", prepared, *options, "--run", tmp_path / "two"]
    done = subprocess.run(list(map(str, command)), timeout=180, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_alike(captured, tmp_path / "two")


def test_captured_steps_need_a_gpu(train, tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    options = ["--trainer.accelerator", "cpu", "--trainer.step", "captured"]
    assert train(tmp_path / "run", *options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("--trainer.step captured cannot run here: there is no GPU; leave it at auto")
    assert not (tmp_path / "run").exists()
