import errno
import gzip
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from filelock import FileLock

from flashlab.attention.backends import BACKENDS
from flashlab.btc.module import ForecasterModule, load_forecaster
from flashlab.btc.prepare import open_set, prepare
from flashlab.btc.report import read_curves
from flashlab.cli import main
from trainings import contents, differences, load_all, only_line, send

# Small, and with all that a checkpoint has to carry: the rate is lowered and early stopping counts within 22 steps.
TINY = (
    "--data.context_length 32 --data.stride 16 --data.batch_size 4 --model.width 16 --model.num_layers 1 "
    "--optimizer.lr 0.05 --optimizer.warmup_steps 3 --optimizer.plateau_patience 0 --trainer.max_steps 22 "
    "--trainer.val_every_n_steps 4 --trainer.checkpoint_every_n_steps 3 --trainer.log_every_n_steps 1 "
    "--trainer.early_stopping_patience 20 --trainer.accelerator cpu"
)


@pytest.fixture
def train(prepared):
    """`flashlab train` with the tiny configuration."""
    return lambda run, *options: main(
        ["train", "--data.path", str(prepared), *TINY.split(), "--run", str(run), *options]
    )


@pytest.fixture(scope="module")
def reference(prepared, tmp_path_factory):
    """The checkpoints of a run that nothing interrupted."""
    run = tmp_path_factory.mktemp("reference") / "run"
    assert main(["train", "--data.path", str(prepared), *TINY.split(), "--run", str(run)]) == 0
    checkpoints = load_all(run)
    last = checkpoints["last.ckpt"]
    assert last["optimizer_states"][0]["param_groups"][0]["lr"] < 0.05, "choose an lr at which it is lowered"
    assert callback(last, "EarlyStopping")["wait_count"] > 0, (
        "choose an lr at which the last validation is not the best"
    )
    return checkpoints


def callback(checkpoint, name):
    return next(state for key, state in checkpoint["callbacks"].items() if key.startswith(name))


def assert_same(run, reference):
    """All that was trained is bit for bit the same: weights, averages, optimiser, schedules, loops, counters."""
    for name, checkpoint in load_all(run).items():
        expected = reference[name]
        for key in expected.keys() - {"callbacks", "hyper_parameters"}:
            assert list(differences(checkpoint[key], expected[key], key)) == []
        for key, value in (("EarlyStopping", "wait_count"), ("BestCheckpoint", "best_model_score")):
            assert callback(checkpoint, key)[value] == callback(expected, key)[value]


def test_training_learns_and_says_how(train, tmp_path, capsys):
    run = tmp_path / "run"
    assert train(run, "--optimizer.lr", "0.01", "--trainer.max_steps", "60") == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert f"score it with `flashlab evaluate {run}`" in out
    assert "\nstep 1 of 60\n" in out, "where no bar can move lines say how far it is"
    curves = {tag: values for tag, (_, values) in read_curves(run).items()}
    assert curves["train/loss"][-20:].mean() < curves["train/loss"][:5].mean() - 0.1
    assert curves["val/loss"][-1] < curves["val/loss"][0]
    assert curves["train/lr"].max() == pytest.approx(0.01)
    assert {"train/grad_norm", "train/bars_per_s"} <= set(curves)
    record = json.loads((run / "run.json").read_text())
    assert record["attention_backend"] in BACKENDS
    assert record["finished"]["steps"] == 60
    assert record["finished"]["best_val_loss"] == pytest.approx(curves["val/loss"].min())


def test_a_config_trains_the_same_once_more(train, reference, prepared, tmp_path):
    assert train(tmp_path / "first", "--trainer.max_steps", "1") == 0
    config = yaml.safe_load((tmp_path / "first" / "config.yaml").read_text())
    config["trainer"]["max_steps"] = 22
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(config))
    assert main(["train", "--config", str(tmp_path / "again.yaml"), "--run", str(tmp_path / "run")]) == 0
    assert_same(tmp_path / "run", reference)


def test_streamed_windows_train_the_same(train, reference, tmp_path):
    assert train(tmp_path / "run", "--data.stream", "true") == 0
    assert_same(tmp_path / "run", reference)


@pytest.mark.parametrize(
    ("number", "method", "steps"),
    [
        (signal.SIGTERM, "training_step", [1]),
        (signal.SIGINT, "training_step", [8]),  # a validation follows, and the rate is lowered
        (signal.SIGTERM, "validation_step", [8]),
        (signal.SIGINT, "training_step", [2, 9, 17, 21]),
    ],
)
def test_a_stopped_run_resumes_bit_for_bit(train, reference, number, method, steps, tmp_path, monkeypatch, capsys):
    run, handlers = tmp_path / "run", [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    for step in steps:
        with monkeypatch.context() as patch:
            send(ForecasterModule, patch, number, method=method, step=step)
            assert train(run, "--resume") == 128 + number
        stopped = step + (step % 4 == 0)  # never between a step and its validation
        assert only_line(capsys) == f"{run}: stopped by {number.name} at step {stopped}; continue with --resume"
        assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert train(run, "--resume") == 0
    out, err = capsys.readouterr()
    assert "resumed from" in out
    assert err == ""
    assert_same(run, reference)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_twice_it_ends_at_once(train, number, tmp_path):
    train(tmp_path / "warm", "--trainer.max_steps", "1")  # what is slow to import
    with (tmp_path / "said").open("wb") as said:
        if (child := os.fork()) == 0:  # the second signal kills, as it should
            for stream in (1, 2):
                os.dup2(said.fileno(), stream)
            with pytest.MonkeyPatch.context() as patch:
                send(ForecasterModule, patch, number, step=2)
                send(ForecasterModule, patch, number, step=2)
                train(tmp_path / "run")
            os._exit(0)
        _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == number
    assert "Traceback" not in (tmp_path / "said").read_text()


def test_a_kill_at_any_moment_of_writing_loses_nothing(train, reference, tmp_path, monkeypatch):
    """What a kill leaves is what lies in the folder at that moment: every such state is kept, then resumed from."""
    run, states = tmp_path / "run", {}

    def keep(function):
        def wrapped(*args):
            for act in (lambda: None, lambda: function(*args)):
                act()
                states[tuple(sorted(contents(run).items()))] = None
                if not (tmp_path / f"state-{len(states)}").exists():
                    shutil.copytree(run, tmp_path / f"state-{len(states)}")

        return wrapped

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", keep(os.fsync))
        patch.setattr(Path, "replace", keep(Path.replace))
        send(ForecasterModule, patch, signal.SIGTERM, step=10)
        assert train(run) == 143
    assert len(states) > 15
    for number in range(1, len(states)):
        shutil.rmtree(run)
        shutil.move(tmp_path / f"state-{number}", run)
        assert train(run, "--resume") == 0
        assert_same(run, reference)
        assert not list(run.rglob("*.partial"))


def test_early_stopping_is_final(train, tmp_path, capsys):
    run = tmp_path / "run"
    options = ["--trainer.early_stopping_patience", "1", "--trainer.max_steps", "200"]
    assert train(run, *options) == 0
    record = json.loads((run / "run.json").read_text())
    assert record["finished"]["steps"] < 100
    before = contents(run / "checkpoints")
    assert train(run, *options, "--resume") == 0
    assert f"{run} is trained already ({record['finished']['steps']} steps)" in capsys.readouterr().out
    (run / "run.json").write_text(json.dumps(record | {"finished": None}))  # killed just before it was written
    assert train(run, *options, "--resume") == 0
    assert json.loads((run / "run.json").read_text())["finished"]["steps"] == record["finished"]["steps"]
    assert contents(run / "checkpoints") == before


def test_a_run_that_was_moved_keeps_its_best(train, reference, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        send(ForecasterModule, patch, signal.SIGTERM, step=reference["best.ckpt"]["global_step"] + 1)
        assert train(tmp_path / "here") == 143
    (tmp_path / "here").rename(tmp_path / "there")
    capsys.readouterr()
    assert train(tmp_path / "there", "--resume") == 0
    assert capsys.readouterr().err == ""
    assert_same(tmp_path / "there", reference)


def test_two_do_not_train_one_run(train, stopped, capsys):
    with FileLock(stopped / ".lock"):
        assert train(stopped, "--resume") == 2
    assert capsys.readouterr().err == (
        f"flashlab: error: {stopped} is being trained by another process; wait for it, or choose another --run\n"
    )
    assert train(stopped, "--resume") == 0


def test_nothing_is_overwritten_unasked(train, tmp_path, capsys):
    run = tmp_path / "run"
    assert train(run) == 0
    before = contents(run)
    capsys.readouterr()
    assert train(run) == 2
    assert (
        only_line(capsys)
        == f"flashlab: error: {run} holds a run already; add --resume to continue it, or choose another --run"
    )
    assert contents(run) == before


class Evil:
    """What executes code when it is unpickled."""

    def __reduce__(self):
        return (os.mkdir, (os.environ["EVIL"],))


def spoil(path, how):
    data = path.read_bytes()
    if how == "malicious":
        path.write_bytes(pickle.dumps(Evil(), protocol=2))
    else:
        path.write_bytes({"empty": b"", "truncated": data[: len(data) // 2], "garbage": os.urandom(1000)}[how])


@pytest.fixture
def stopped(train, tmp_path, monkeypatch, capsys):
    """A run that was stopped at step 11."""
    monkeypatch.setenv("EVIL", str(tmp_path / "evil"))
    with monkeypatch.context() as patch:
        send(ForecasterModule, patch, signal.SIGTERM, step=11)
        assert train(tmp_path / "run") == 143
    capsys.readouterr()
    return tmp_path / "run"


@pytest.mark.parametrize("how", ["empty", "truncated", "garbage", "malicious"])
def test_a_damaged_checkpoint_falls_back_to_the_previous(train, reference, stopped, how, tmp_path, capsys):
    last = stopped / "checkpoints" / "last.ckpt"
    spoil(last, how)
    assert train(stopped, "--resume") == 0
    line = only_line(capsys)
    assert line.startswith(f"{last} is damaged (")
    assert line.endswith("going on from previous.ckpt")
    assert not (tmp_path / "evil").exists()
    assert_same(stopped, reference)


def test_without_a_good_checkpoint_nothing_is_lost(train, stopped, tmp_path, capsys):
    for name in ("last.ckpt", "previous.ckpt"):
        spoil(stopped / "checkpoints" / name, "malicious")
    before = contents(stopped)
    assert train(stopped, "--resume") == 2
    line = only_line(capsys)
    assert "last.ckpt is damaged" in line
    assert "no good one before it; choose another --run" in line
    assert contents(stopped) == before
    assert not (tmp_path / "evil").exists()


def test_a_good_previous_checkpoint_outlives_a_damaged_last_one(train, stopped, monkeypatch):
    """Until a new one is there: what is damaged never takes its place."""
    spoil(stopped / "checkpoints" / "last.ckpt", "garbage")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_disk)
        assert train(stopped, "--resume", "--trainer.checkpoint_every_n_steps", "1") == 2
    torch.load(stopped / "checkpoints" / "previous.ckpt", weights_only=True)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--model.width", "32"], "was trained with model.width 16, this asks for 32; resume with"),
        (
            ["--model.frame", "level", "--data.mirror", "false"],
            "was trained with model.frame relative, this asks for level",
        ),
        (["--optimizer.lr", "0.2"], "was trained with optimizer.lr 0.05, this asks for 0.2"),
    ],
)
def test_a_checkpoint_of_another_shape(train, stopped, options, complaint, capsys):
    before = contents(stopped)
    assert train(stopped, "--resume", *options) == 2
    assert complaint in only_line(capsys)
    assert contents(stopped) == before


def test_a_checkpoint_of_other_bars(train, stopped, bars_csv, tmp_path, capsys):
    prepare([bars_csv], out=tmp_path / "set", context_length=64)
    capsys.readouterr()
    before = contents(stopped)
    assert train(stopped, "--resume", "--data.path", str(tmp_path / "set")) == 2
    assert "was trained with other bars" in only_line(capsys)
    assert contents(stopped) == before


def test_a_checkpoint_of_another_program(train, stopped, capsys):
    for name in ("last.ckpt", "previous.ckpt"):
        torch.save({"state_dict": {}, "hyper_parameters": {"layers": 3}}, stopped / "checkpoints" / name)
    assert train(stopped, "--resume") == 2
    assert "last.ckpt is damaged" in only_line(capsys)


@pytest.mark.parametrize("step", [1, 6, 8])
def test_weights_that_are_not_finite_end_the_run_and_are_not_kept(train, step, tmp_path, monkeypatch, capsys):
    original, run = ForecasterModule.training_step, tmp_path / "run"

    def diverge(self, bars):
        return original(self, bars) * (torch.nan if self.trainer.global_step == step - 1 else 1)

    monkeypatch.setattr(ForecasterModule, "training_step", diverge)
    assert train(run, "--trainer.log_every_n_steps", "1000") == 2
    line = only_line(capsys)
    assert f"{run}: the weights are not finite at step" in line
    assert "lower --optimizer.lr" in line
    for path in (run / "checkpoints").glob("*.ckpt"):
        weights = torch.load(path, weights_only=True)["current_model_state"]
        assert all(weight.isfinite().all() for weight in weights.values())
    assert "finished" not in json.loads((run / "run.json").read_text())


def test_a_validation_loss_that_is_not_finite(train, tmp_path, monkeypatch, capsys):
    def log(self, bars):
        self.log("val/loss", torch.tensor(torch.nan if self.trainer.global_step > 4 else 1.0))

    monkeypatch.setattr(ForecasterModule, "validation_step", log)
    assert train(tmp_path / "run") == 2
    assert "the validation loss is not finite at step 8; start another --run with a lower" in only_line(capsys)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ("--data.batch_size 0", "batch_size"),
        ("--optimizer.lr -1", "lr"),
        ("--optimizer.weight_decay -0.1", "weight_decay"),
        ("--optimizer.betas [0.9,1.0]", "betas"),
        ("--optimizer.average_decay 1.5", "average_decay"),
        ("--optimizer.plateau_factor 1", "plateau_factor"),
        ("--optimizer.loss_weights [1,1,1,-1,1]", "loss_weights"),
        ("--trainer.val_every_n_steps 1", "val_every_n_steps"),
        ("--trainer.precision 64-true", "precision"),
        ("--seed -1", "seed"),
        ("--seed 4294967296", "seed"),
        ("--model.num_heads 3", "--model.num_heads 3 must divide --model.width 16"),
        ("--model.num_heads 16", "into even parts"),
        ("--model.layers 3", "layers"),
        ("--model.backend flash", "no attention backend 'flash'; did you mean"),
        ("--model.backend sdpa_cudnn", "attention backend 'sdpa_cudnn' cannot run this call"),
        ("--model.frame level", "--data.mirror true needs --model.frame relative"),
        ("--data.context_length 64", "prepare it with --context_length 64"),
        ("--data.context_length 16", "--data.context_length 16 is too short"),
        ("--data.path no/such/set", "no/such/set is not a prepared set"),
        ("--trainer.accelerator gpu", "--trainer.accelerator gpu: torch sees no GPU here"),
        ("--config no_such.yaml", "no_such.yaml"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    train, options, complaint, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert train(tmp_path / "run", *options.split()) == 2
    assert complaint in only_line(capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("config", "complaint"), [("model: {depth: 3}", "depth"), ("a: [", "a")])
def test_a_config_file_that_is_wrong(train, config, complaint, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text(config)
    assert train(tmp_path / "run", "--config", str(tmp_path / "config.yaml")) == 2
    assert complaint in only_line(capsys)
    assert not (tmp_path / "run").exists()


def test_a_damaged_set_leaves_no_run_behind(train, prepared, tmp_path, capsys):
    shutil.copytree(prepared, tmp_path / "set")
    chunk = next((tmp_path / "set").rglob("*.bin"))
    data = bytearray(chunk.read_bytes())
    data[len(data) // 2] ^= 1
    chunk.write_bytes(data)
    assert train(tmp_path / "run", "--data.path", str(tmp_path / "set")) == 2
    assert f"{open_set(tmp_path / 'set').chunks} is damaged" in only_line(capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("where", ["file/run", "file"])
def test_a_run_folder_that_cannot_be_written(train, where, tmp_path, capsys):
    (tmp_path / "file").write_text("here I am")
    assert train(tmp_path / where) == 2
    assert f"cannot write {tmp_path / where}" in only_line(capsys)
    assert contents(tmp_path) == {"file": b"here I am"}


def full_disk(*args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_under_the_config_leaves_the_one_before(train, stopped, capsys):
    before, limits = contents(stopped), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        assert train(stopped, "--resume") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"cannot write {stopped / 'config.yaml'}: File too large" in only_line(capsys)
    assert contents(stopped) == before


def test_a_full_disk_under_a_checkpoint_leaves_the_one_before(train, reference, tmp_path, monkeypatch, capsys):
    run, calls = tmp_path / "run", []

    def fill_up(file):
        calls.append(file)
        if len(calls) > 4:
            full_disk()

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fill_up)
        assert train(run) == 2
    line = only_line(capsys)
    assert f"cannot write {run / 'checkpoints'}" in line
    assert "No space left on device; free space" in line
    assert [path.name for path in run.rglob(".*")] == [".lock"]
    assert train(run, "--resume") == 0
    assert_same(run, reference)


def test_a_full_disk_under_the_log(train, reference, tmp_path, monkeypatch, capsys):
    from tensorboard.summary.writer.record_writer import RecordWriter

    run, write, count = tmp_path / "run", RecordWriter.write, []

    def fill_up(self, data):
        count.append(data)
        if len(count) > 50:
            full_disk()
        write(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(RecordWriter, "write", fill_up)
        assert train(run) == 2
    assert f"cannot write {run}: No space left on device; free space" in only_line(capsys)
    assert "hide" not in repr(threading.excepthook)
    assert train(run, "--resume") == 0
    assert_same(run, reference)


def flashlab(*arguments):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "flashlab", *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_two_processes_train_as_one_with_twice_the_batch(train, prepared, tmp_path):
    """Filled minutes count in neither half of the batch, and the halves have different numbers of them."""
    options = ["--optimizer.lr", "0.003", "--trainer.log_every_n_steps", "5"]
    assert train(tmp_path / "one", *options, "--data.batch_size", "8") == 0
    together = ["--data.path", prepared, *TINY.split(), *options, "--trainer.devices", "2", "--run", tmp_path / "two"]
    process = flashlab("train", *together)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out.count("22 steps") == 2  # one of them speaks
    one, two = load_all(tmp_path / "one"), load_all(tmp_path / "two")
    for name in one:
        torch.testing.assert_close(two[name]["state_dict"], one[name]["state_dict"], rtol=0, atol=2e-5)
    curves = [read_curves(tmp_path / run) for run in ("one", "two")]
    for tag in ("train/loss", "train/grad_norm", "val/loss"):
        np.testing.assert_allclose(*(of[tag][1] for of in curves), rtol=1e-4, err_msg=tag)


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(train, prepared, tmp_path, monkeypatch):
    """Every window comes once in an epoch all the same: as many steps of 8, by two processes of 4 or one of 8."""
    options = ["--optimizer.lr", "0.003", "--trainer.max_steps", "200", "--trainer.early_stopping_patience", "99"]
    assert train(tmp_path / "one", *options, "--data.batch_size", "8") == 0
    run = tmp_path / "run"
    together = ["--data.path", prepared, *TINY.split(), *options, "--trainer.devices", "2", "--run", run]
    process = flashlab("train", *together)
    next(line for line in process.stdout if line.startswith("step "))
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 143, err
    assert 0 < torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] < 200
    assert train(run, *options, "--data.batch_size", "8", "--resume") == 0
    for name, expected in load_all(tmp_path / "one").items():
        torch.testing.assert_close(load_all(run)[name]["state_dict"], expected["state_dict"], rtol=0, atol=1e-4)


@pytest.mark.slow
def test_two_processes_stop_together_and_resume(train, prepared, tmp_path):
    run = tmp_path / "run"
    options = [
        "train", "--data.path", prepared, *TINY.split(), "--optimizer.lr", "0.003", "--trainer.devices", "2",
        "--trainer.max_steps", "100000", "--trainer.early_stopping_patience", "100000", "--run", run, "--resume",
    ]  # fmt: skip
    steps = []
    for _ in range(2):
        process = flashlab(*options)
        for line in process.stdout:
            if line.startswith("step "):
                break
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 143, err
        assert "stopped by SIGTERM at step" in err
        steps.append(torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"])
    assert 0 < steps[0] < steps[1]


def test_a_checkpoint_loads_into_the_average(train, reference, tmp_path):
    """What is evaluated is the average that was validated, not the last step's weights."""
    assert train(tmp_path / "run") == 0
    weights = load_forecaster(tmp_path / "run" / "checkpoints" / "best.ckpt").state_dict()
    best = reference["best.ckpt"]
    assert all(torch.equal(weights[name], best["state_dict"][name]) for name in weights)
    for checkpoint in reference.values():
        average, current = checkpoint["state_dict"], checkpoint["current_model_state"]
        assert not any(torch.equal(average[name], current[name]) for name in weights)


def test_a_profile_says_what_a_step_takes(train, tmp_path):
    run = tmp_path / "run"
    assert train(run, "--trainer.max_steps", "75", "--trainer.profile", "true") == 0
    profile = json.loads((run / "profile.json").read_text())
    (optimizer,) = (kernel for kernel in profile["kernels"] if "Optimizer.step" in kernel["name"])
    assert optimizer["calls_per_step"] == 1
    assert 0 < optimizer["ms_per_step"] < profile["busy_ms_per_step"]
    assert profile["busy_ms_per_step"] == pytest.approx(sum(kernel["ms_per_step"] for kernel in profile["kernels"]))
    assert json.loads(gzip.decompress((run / "trace.json.gz").read_bytes()))["traceEvents"]
    finished = json.loads((run / "run.json").read_text())["finished"]
    assert finished["bars_per_s"] == pytest.approx(4 * 32 / finished["ms_per_step"] * 1e3, rel=1e-3)


def test_a_run_too_short_for_a_profile_says_so(train, tmp_path, capsys):
    assert train(tmp_path / "run", "--trainer.profile", "true") == 0
    assert "no profile is written, since it takes the 20 steps from step 50 on" in capsys.readouterr().out
    assert not (tmp_path / "run" / "profile.json").exists()


def test_a_series_too_large_for_the_memory_is_streamed(train, reference, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("flashlab.btc.train.memory", lambda: {"available_gib": 1e-6})
    assert train(tmp_path / "run") == 0
    assert "MB of bars streamed from" in capsys.readouterr().out
    assert_same(tmp_path / "run", reference)
    assert train(tmp_path / "told", "--data.stream", "false") == 0
    assert "MB of bars in memory" in capsys.readouterr().out


def test_a_run_that_was_captured_goes_on_with_plain_steps(train, reference, stopped):
    """Their optimiser is marked as one that CUDA graphs may hold."""
    last = stopped / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(last, weights_only=True)
    for group in checkpoint["optimizer_states"][0]["param_groups"]:
        group["capturable"] = True
    torch.save(checkpoint, last)
    assert train(stopped, "--resume") == 0
    weights = load_all(stopped)["last.ckpt"]["state_dict"]
    assert list(differences(weights, reference["last.ckpt"]["state_dict"], "weights")) == []
