import resource
from types import SimpleNamespace

import pytest
import torch

from flashlab.errors import UserError
from flashlab.training import callbacks
from flashlab.training.callbacks import AtomicCheckpointIO, Checkpoints, Speed, Stopped


@pytest.fixture
def run(monkeypatch):
    """Steps of 0.1 s, of which every fifth is logged; a validation behind the 20th takes a minute."""

    def steps(speed, count=40):
        now, logged = [0.0], []
        monkeypatch.setattr(callbacks, "perf_counter", lambda: now[0])
        logger = SimpleNamespace(log_metrics=lambda rates, step: logged.append(rates))
        strategy = SimpleNamespace(root_device=torch.device("cpu"))
        trainer = SimpleNamespace(global_step=0, log_every_n_steps=5, loggers=[logger], strategy=strategy)
        speed.on_train_start(trainer)
        now[0] += 90.0  # compiling
        for step in range(1, count + 1):
            now[0] += 0.1
            trainer.global_step = step
            speed.on_train_batch_end(trainer)
            if step == 20:
                speed.on_validation_start()
                now[0] += 60.0
        return logged

    return steps


def test_speed_counts_neither_compiling_nor_validating(run):
    speed = Speed("tokens", 512)
    logged = run(speed)
    assert [row["train/tokens_per_s"] for row in logged] == pytest.approx([5120.0] * 6)
    assert speed.summary() == {"ms_per_step": pytest.approx(100.0), "tokens_per_s": 5120}
    assert speed.latest() == {"tokens/s": "5,120"}


def test_speed_is_a_share_of_the_peak_where_that_is_known(run):
    speed = Speed("tokens", 512, peak_per_s=10_240)
    assert run(speed)[0] == {"train/tokens_per_s": pytest.approx(5120.0), "train/mfu": 0.5}
    assert speed.summary()["mfu"] == 0.5
    assert speed.latest() == {"tokens/s": "5,120", "MFU": "50.0%"}


def test_a_run_of_few_steps_has_no_speed(run):
    assert run(speed := Speed("tokens", 512), count=10)
    assert speed.summary() == {}
    assert Speed("tokens", 512).latest() == {}


def test_processes_that_agree_to_stop_before_a_validation_stop_after_it(monkeypatch, tmp_path):
    """At a step that validates none is saved, and at others they may not ask each other."""
    monkeypatch.setattr(Checkpoints, "_require_finite", lambda *_: None)
    monkeypatch.setattr(Checkpoints, "_save", lambda *_: None)
    checkpoints = Checkpoints(tmp_path, 1000, None)
    strategy = SimpleNamespace(reduce_boolean_decision=lambda stop, all: stop)
    trainer = SimpleNamespace(
        max_steps=30, val_check_interval=10, log_every_n_steps=10, world_size=2, strategy=strategy, should_stop=False
    )
    checkpoints.signal = 15
    for trainer.global_step in range(1, 11):
        checkpoints.on_train_batch_end(trainer, None)
    trainer.global_step = 11
    with pytest.raises(Stopped):
        checkpoints.on_train_batch_end(trainer, None)


@pytest.mark.parametrize("room", [0, 100_000, 1_000_000, 1_600_500])  # the last write of all is refused, too
def test_a_checkpoint_that_does_not_fit_says_so_and_leaves_the_one_before(room, tmp_path):
    path, writer = tmp_path / "checkpoints" / "last.ckpt", AtomicCheckpointIO()
    writer.save_checkpoint({"step": 1}, path)
    weights = {f"w{index}": torch.randn(100_000) for index in range(4)}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        with pytest.raises(UserError, match=r"cannot write .*last.ckpt: File too large"):
            writer.save_checkpoint(weights, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]
    assert torch.load(path, weights_only=True) == {"step": 1}
    writer.save_checkpoint(weights, path)
    assert torch.load(path, weights_only=True, mmap=True).keys() == weights.keys()
