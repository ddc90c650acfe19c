import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import CPU_BACKENDS

from flashlab.attention import AttentionSpec
from flashlab.attention.backends import BACKENDS
from flashlab.cli import main
from flashlab.errors import UserError
from flashlab.gpt2 import huggingface
from flashlab.gpt2.config import GPTConfig
from flashlab.gpt2.data import Blocks
from flashlab.gpt2.hardware import peak_flops
from flashlab.gpt2.model import GPT
from flashlab.gpt2.module import GPTModule, load_gpt
from flashlab.gpt2.options import ModelConfig, OptimizerConfig, TrainerConfig
from flashlab.gpt2.prepare import prepare
from flashlab.gpt2.tokens import open_set
from flashlab.worker import run_flashlab
from trainings import contents, differences, load_all, only_line, send

SHAPE = "--model.n_layer 2 --model.n_head 2 --model.n_embd 32 --model.block_size 32"
TINY = (
    f"{SHAPE} --data.batch_size 4 --optimizer.warmup_steps 3 --optimizer.lr 0.003 --trainer.max_steps 22 "
    "--trainer.global_batch_tokens 256 --trainer.val_every_n_steps 4 --trainer.val_batches 3 "
    "--trainer.checkpoint_every_n_steps 3 --trainer.log_every_n_steps 1 --trainer.accelerator cpu"
)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Many threads make small matrices slow, and on a busy machine very slow."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def train(token_set):
    """`flashlab gpt2 train` with the tiny configuration."""
    return lambda run, *options: main(
        ["gpt2", "train", "--data.path", str(token_set), *TINY.split(), "--run", str(run), *map(str, options)]
    )


@pytest.fixture(scope="module")
def reference(token_set, tmp_path_factory):
    """A run that nothing interrupted."""
    run = tmp_path_factory.mktemp("reference") / "run"
    assert main(["gpt2", "train", "--data.path", str(token_set), *TINY.split(), "--run", str(run)]) == 0
    return run


def curves(run):
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [point.value for point in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def assert_same(run, reference):
    """All that was trained is bit for bit the same: weights, optimiser, loops, counters, place in the data."""
    for (name, checkpoint), expected in zip(load_all(run).items(), load_all(reference).values(), strict=True):
        for key in expected.keys() - {"callbacks", "hyper_parameters"}:
            assert list(differences(checkpoint[key], expected[key], f"{name}.{key}")) == []


# --- it learns


def test_it_begins_at_the_loss_of_guessing_and_learns(train, tmp_path, capsys):
    run = tmp_path / "run"
    assert train(run, "--trainer.max_steps", 60, "--optimizer.lr", 0.01) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert re.search(
        r"60 steps of 256 tokens on 1 cpu \(attention \w+, loss chunked; not compiled: there is no GPU\)", out
    )
    assert "\nstep 1 of 60\n" in out
    seen = curves(run)
    assert seen["train/loss"][0] == pytest.approx(math.log(257), abs=0.1)
    assert sum(seen["train/loss"][-5:]) / 5 < 3.5
    assert seen["val/loss"][-1] < seen["val/loss"][0] - 0.3
    assert seen["val/perplexity"] == pytest.approx([math.exp(loss) for loss in seen["val/loss"]], rel=1e-5)
    assert {"train/grad_norm", "train/tokens_per_s"} <= set(seen)
    assert "train/mfu" not in seen, "nobody knows what this CPU could do at most"
    record = json.loads((run / "run.json").read_text())
    assert record["finished"]["best_val_loss"] == pytest.approx(min(seen["val/loss"]))
    assert record["finished"]["tokens_per_s"] == pytest.approx(256e3 / record["finished"]["ms_per_step"], rel=0.01)


def test_the_validation_loss_is_that_of_all_validation_blocks(train, token_set, tmp_path):
    """The last batch is smaller than the others, and every block counts once."""
    run = tmp_path / "run"
    options = ["--data.batch_size", 3, "--trainer.global_batch_tokens", "null", "--trainer.max_steps", 4]
    assert train(run, *options, "--trainer.val_batches", "null") == 0
    model, _ = load_gpt(run)
    blocks = Blocks(open_set(token_set), "validation", 32)
    assert len(blocks) % 3, "choose a batch size that leaves a remainder"
    every = blocks.__getitems__(range(len(blocks)))
    with torch.no_grad():
        expected = model(every[:, :-1], every[:, 1:])
    assert curves(run)["val/loss"] == pytest.approx([float(expected)], abs=1e-5)


def test_one_batch_is_learnt_by_heart(train, tmp_path, monkeypatch):
    original, kept = GPTModule.training_step, []

    def same(self, blocks):
        kept.append(blocks)
        return original(self, kept[0])

    monkeypatch.setattr(GPTModule, "training_step", same)
    assert train(tmp_path / "run", "--trainer.max_steps", 250, "--trainer.val_every_n_steps", 250) == 0
    assert curves(tmp_path / "run")["train/loss"][-1] < 0.2


def test_accumulated_batches_train_like_one_large_batch(train, reference, tmp_path):
    assert train(tmp_path / "run", "--data.batch_size", 8) == 0
    assert json.loads((reference / "run.json").read_text())["accumulated"] == 2
    assert json.loads((tmp_path / "run" / "run.json").read_text())["accumulated"] == 1
    one, two = curves(reference), curves(tmp_path / "run")
    assert two["train/loss"] == pytest.approx(one["train/loss"], abs=1e-3)
    # One step is the same to rounding; AdamW then makes of the sign of a tiny gradient a whole step.
    assert two["train/loss"][0] == pytest.approx(one["train/loss"][0], abs=1e-6)
    assert two["train/grad_norm"][0] == pytest.approx(one["train/grad_norm"][0], rel=1e-5)


def test_backends_give_one_loss_curve(train, reference, tmp_path):
    """In float32 after 22 steps; the sums are in another order."""
    assert len(CPU_BACKENDS) >= 4
    expected = curves(reference)["train/loss"]
    for backend in CPU_BACKENDS:
        if backend == "flex_attention":  # its compilation takes a minute; tests/attention compare it
            continue
        assert train(tmp_path / backend, "--model.backend", backend) == 0
        assert json.loads((tmp_path / backend / "run.json").read_text())["attention_backend"] == backend
        assert curves(tmp_path / backend)["train/loss"] == pytest.approx(expected, abs=1e-3), backend


@pytest.mark.parametrize("in_fp32", ["true", "false"], ids=["residual in float32", ""])
def test_bfloat16_gives_the_loss_curve_within_its_rounding(in_fp32, train, reference, tmp_path):
    """Numbers of 8 bits, rounded by up to 0.4 %; 22 steps add up."""
    options = ["--trainer.precision", "bf16-mixed", "--model.residual_in_fp32", in_fp32]
    assert train(tmp_path / "run", *options) == 0
    assert json.loads((tmp_path / "run" / "run.json").read_text())["finished"]["precision"] == "bf16-mixed"
    one, two = curves(reference)["train/loss"], curves(tmp_path / "run")["train/loss"]
    assert two != one
    assert two == pytest.approx(one, abs=0.05)


def test_matrices_decay_and_vectors_do_not(reference):
    optimizer = load_all(reference)["last.ckpt"]["optimizer_states"][0]
    dimensions = [
        (group["weight_decay"], {optimizer["state"][number]["exp_avg"].ndim for number in group["params"]})
        for group in optimizer["param_groups"]
    ]
    assert dimensions == [(0.1, {2}), (0.0, {1})]
    assert len(optimizer["state"]) == len(list(load_gpt(reference)[0].parameters()))
    assert all(group["fused"] for group in optimizer["param_groups"])


def test_the_rate_rises_in_a_line_and_falls_in_a_cosine(reference):
    config = OptimizerConfig(lr=0.003, warmup_steps=3)
    rates = curves(reference)["train/lr"]
    assert rates == pytest.approx([config.rate(step, 22, 256) for step in range(22)], rel=1e-6)
    assert rates[:4] == pytest.approx([0.001, 0.002, 0.003, 0.003])
    half = OptimizerConfig(lr=1.0, min_lr=0.5, warmup_tokens=1000)
    assert half.warmup(100) == 10
    assert [half.rate(step, 30, 100) for step in (9, 10, 20, 30, 99)] == pytest.approx([1, 1, 0.75, 0.5, 0.5])


# --- it goes on where it was


@pytest.mark.parametrize(
    ("number", "method", "steps"),
    [
        (signal.SIGTERM, "training_step", [1]),
        (signal.SIGINT, "training_step", [8]),  # a validation follows
        (signal.SIGTERM, "validation_step", [8]),
        (signal.SIGINT, "training_step", [2, 9, 17, 21]),
    ],
)
def test_a_stopped_run_resumes_bit_for_bit(train, reference, number, method, steps, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    for step in steps:
        with monkeypatch.context() as patch:
            send(GPTModule, patch, number, method=method, step=step)
            assert train(run, "--resume") == 128 + number
        stopped = step + (step % 4 == 0)  # never between a step and its validation
        assert only_line(capsys) == f"{run}: stopped by {number.name} at step {stopped}; continue with --resume"
    assert train(run, "--resume") == 0
    out, err = capsys.readouterr()
    assert "resumed from" in out
    assert err == ""
    assert_same(run, reference)
    assert train(run, "--resume") == 0
    assert f"{run} is trained already (22 steps)" in capsys.readouterr().out
    for other in ("--seed 7", "--init weights", "--trainer.gradient_clip_val 0.5", "--model.dropout 0.1"):
        assert train(run, "--resume", *other.split()) == 2
        assert f"{run} was trained with other options; choose another" in only_line(capsys)
    assert train(run, "--resume", "--trainer.max_steps", 30) == 2
    assert f"{run} has ended, planned for 22 steps, not 30; choose another" in only_line(capsys)


def test_dropout_resumes_bit_for_bit(train, reference, tmp_path, monkeypatch):
    assert train(tmp_path / "whole", "--model.dropout", 0.1) == 0
    assert curves(tmp_path / "whole")["train/loss"] != curves(reference)["train/loss"]
    with monkeypatch.context() as patch:
        send(GPTModule, patch, signal.SIGTERM, step=5)
        assert train(tmp_path / "run", "--model.dropout", 0.1) == 143
    assert train(tmp_path / "run", "--model.dropout", 0.1, "--resume") == 0
    assert_same(tmp_path / "run", tmp_path / "whole")


def test_a_run_resumes_with_other_batches_of_the_same_step(train, reference, tmp_path, monkeypatch):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        send(GPTModule, patch, signal.SIGTERM, step=6)
        assert train(run) == 143
    assert train(run, "--resume", "--data.batch_size", 2) == 0
    one, two = load_all(reference)["last.ckpt"], load_all(run)["last.ckpt"]
    assert two["TokensDataModule"] == one["TokensDataModule"]
    assert curves(run)["train/loss"][-1] == pytest.approx(curves(reference)["train/loss"][-1], abs=2e-3)


@pytest.fixture
def stopped(train, tmp_path, monkeypatch, capsys):
    """A run that was stopped at step 6."""
    with monkeypatch.context() as patch:
        send(GPTModule, patch, signal.SIGTERM, step=6)
        assert train(tmp_path / "run") == 143
    capsys.readouterr()
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ("--model.n_embd 64", "was trained with model.n_embd 32, this asks for 64; resume with"),
        ("--model.block_size 16", "was trained with model.block_size 32, this asks for 16; resume with"),
        ("--model.position rotary", "was trained with model.position learned, this asks for rotary"),
        ("--optimizer.lr 0.02", "was trained with optimizer.lr 0.003, this asks for 0.02"),
        ("--trainer.devices 2 --trainer.strategy fsdp --data.batch_size 2", "trainer.strategy ddp, this asks for fsdp"),
        ("--trainer.global_batch_tokens 512", "trainer.tokens_per_step 256, this asks for 512"),
        ("--trainer.gradient_clip_val 0.5", "trainer.gradient_clip_val 1.0, this asks for 0.5"),
        ("--seed 7", "was trained with seed 0, this asks for 7; resume with"),
        ("--init weights", "was trained with trainer.init None, this asks for /"),
        ("--model.dropout 0.5", "was trained with model.dropout 0.0, this asks for 0.5; resume with"),
        ("--trainer.max_steps 5", "last.ckpt is at step 6, and the run is to end at step 5; ask for more"),
    ],
)
def test_a_checkpoint_of_another_shape(train, stopped, options, complaint, capsys):
    before = contents(stopped)
    assert train(stopped, "--resume", *options.split()) == 2
    assert complaint in only_line(capsys)
    assert contents(stopped) == before


def test_a_checkpoint_of_other_tokens(train, stopped, corpus, vocabulary, tmp_path, capsys):
    prepare([str(corpus)], out=tmp_path / "more", validation=0.3, processes=1)
    prepare([str(corpus)], out=tmp_path / "pairs", validation=0.2, processes=1, tokenizer="gpt2", vocabulary=vocabulary)
    capsys.readouterr()
    before = contents(stopped)
    for name, complaint in (
        ("more", "other tokens; prepare the set as it was, or"),
        ("pairs", "model.vocab_size 257, this asks for 407; resume with"),
    ):
        assert train(stopped, "--resume", "--data.path", tmp_path / name) == 2
        assert f"was trained with {complaint}" in only_line(capsys)
    assert contents(stopped) == before


def test_what_only_changes_the_computation_may_change_on_resuming(train, stopped, reference):
    assert train(stopped, "--resume", "--model.activation_checkpointing", "true") == 0
    assert_same(stopped, reference)


# --- what it begins with, what it leaves


def test_a_run_begins_with_weights_in_hugging_faces_format(train, tmp_path, capsys):
    torch.manual_seed(5)
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=32, vocab_size=257))
    huggingface.save(model, tmp_path / "weights")
    quiet = ["--optimizer.lr", "1e-12", "--optimizer.min_lr", 0, "--optimizer.weight_decay", 0]
    assert train(tmp_path / "run", "--init", tmp_path / "weights", "--trainer.max_steps", 4, *quiet) == 0
    trained = load_gpt(tmp_path / "run", "last.ckpt")[0].state_dict()
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(trained[name], weight, rtol=0, atol=1e-9)
    capsys.readouterr()
    assert train(tmp_path / "other", "--init", tmp_path / "weights", "--model.n_layer", 3) == 2
    assert "n_layer is 2, and 3 in the model" in only_line(capsys)
    assert not (tmp_path / "other").exists()


def test_a_trained_model_comes_with_its_tokenizer(train, corpus, vocabulary, tmp_path):
    out = tmp_path / "set"
    prepare([str(corpus)], out=out, validation=0.2, processes=1, tokenizer="gpt2", vocabulary=vocabulary)
    run = tmp_path / "run"
    assert train(run, "--data.path", out, "--trainer.max_steps", 4, "--model.backend", "standard") == 0
    expected = open_set(out).tokenizer
    shutil.rmtree(out)
    model, tokenizer = load_gpt(run)
    assert tokenizer.describe() == expected.describe()
    assert not model.training
    assert (model.config.vocab_size, model.config.backend) == (tokenizer.vocab_size, "auto")
    last = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(last[f"gpt.{name}"], weight) for name, weight in model.state_dict().items())


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda path: path.unlink(), r"best.ckpt does not exist: .* go on with `flashlab gpt2 train ... --resume`"),
        (
            lambda path: path.write_bytes(path.read_bytes()[:1000]),
            r"best.ckpt cannot be loaded \(it was cut short or damaged, and has 1,000 bytes\); take another",
        ),
    ],
)
def test_a_checkpoint_that_does_not_load_is_one_line(reference, spoil, complaint, tmp_path):
    run = shutil.copytree(reference, tmp_path / "run")
    spoil(run / "checkpoints" / "best.ckpt")
    with pytest.raises(UserError, match=complaint) as caught:
        load_gpt(run)
    assert "\n" not in str(caught.value)


def test_a_config_trains_the_same_once_more(train, reference, tmp_path):
    config = yaml.safe_load((reference / "config.yaml").read_text())
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(config))
    assert main(["gpt2", "train", "--config", str(tmp_path / "again.yaml"), "--run", str(tmp_path / "run")]) == 0
    assert_same(tmp_path / "run", reference)


@pytest.mark.parametrize("name", ["CSVLogger", "lightning.pytorch.loggers.CSVLogger"])
def test_curves_go_to_any_logger_of_lightnings(train, name, tmp_path):
    (tmp_path / "logger.yaml").write_text(f"logger: {{name: {name}, arguments: {{flush_logs_every_n_steps: 1}}}}")
    run = tmp_path / "run"
    assert train(run, "--config", tmp_path / "logger.yaml", "--trainer.max_steps", 4) == 0
    header, *rows = (run / "lightning_logs/version_0/metrics.csv").read_text().splitlines()
    assert {"train/loss", "val/perplexity"} <= set(header.split(","))
    assert len(rows) >= 4
    assert not list(run.glob("events*"))


@pytest.mark.skipif(find_spec("wandb") is not None, reason="wandb is installed")
def test_a_logger_whose_package_is_missing_is_one_line(train, tmp_path, capsys):
    assert train(tmp_path / "run", "--logger.name", "WandbLogger") == 2
    assert "--logger.name WandbLogger does not start: " in only_line(capsys)
    assert not (tmp_path / "run").exists()


def test_it_validates_after_the_last_step_too(reference):
    assert len(curves(reference)["val/loss"]) == len([4, 8, 12, 16, 20, 22])


def test_a_reader_that_goes_away_does_not_end_training(token_set, tmp_path):
    command = [sys.executable, "-m", "flashlab", "gpt2", "train", "--data.path", token_set, *TINY.split()]
    with subprocess.Popen(
        [*map(str, command), "--run", str(tmp_path / "run")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        assert process.stderr
        assert "22 steps" in process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0
    assert json.loads((tmp_path / "run/run.json").read_text())["finished"]["steps"] == 22


def test_memory_that_runs_out_is_one_line(train, tmp_path, monkeypatch, capsys):
    def step(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")

    monkeypatch.setattr(GPTModule, "training_step", step)
    assert train(tmp_path / "run") == 2
    assert re.search(r"memory does not suffice .*9 GiB.\); take a smaller --data.batch_size", only_line(capsys))


def test_a_compiler_that_is_missing_is_named(train, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert train(tmp_path / "run", "--trainer.compile", "true") == 2
    assert "--trainer.compile true cannot run here: torch.compile finds no C++ compiler" in only_line(capsys)


def test_early_stopping_is_asked_for(train, tmp_path):
    options = ["--trainer.max_steps", 400, "--optimizer.lr", 1e-12, "--optimizer.min_lr", 0]
    assert train(tmp_path / "run", *options, "--trainer.early_stopping_patience", 2) == 0
    assert json.loads((tmp_path / "run" / "run.json").read_text())["finished"]["steps"] < 40


# --- how long, how much


def test_options_of_the_model_are_those_of_its_shape():
    options = set(ModelConfig.__dataclass_fields__) - {"preset"}
    assert options == set(GPTConfig.__dataclass_fields__) - {"vocab_size"}
    assert ModelConfig(preset="gpt3-125m", norm="rmsnorm", bias=False).shape(257) == GPTConfig(
        block_size=2048, norm="rmsnorm", bias=False, vocab_size=257
    )


def test_a_run_is_as_long_as_it_was_told(train, tmp_path, capsys):
    trainer = TrainerConfig(global_batch_tokens=None)
    assert trainer.steps(100, 1050) == 10
    assert TrainerConfig(max_tokens=1001).steps(100, 5) == 11
    assert TrainerConfig(devices=2, num_nodes=2, global_batch_tokens=2**19).accumulated(16, 1024) == 8
    assert train(tmp_path / "run", "--trainer.max_steps", "null", "--trainer.max_tokens", 1000) == 0
    assert "4 steps of 256 tokens" in capsys.readouterr().out


def test_the_peak_is_known_by_name_or_not_at_all():
    assert peak_flops("NVIDIA H200", "bf16-mixed") == peak_flops("NVIDIA H100 80GB HBM3", "bf16-mixed") == 989.4e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", "bf16-mixed") == 312e12
    for unknown in ("NVIDIA H200 MIG 1g.18gb", "Tesla T4", "AMD Instinct MI250X"):
        assert peak_flops(unknown, "bf16-mixed") is None
    assert peak_flops("NVIDIA H200", "32-true") is None


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ("--trainer.global_batch_tokens 200", "200 is no multiple of the 128 tokens computed at once (4 sequences"),
        ("--trainer.global_batch_tokens 100", "take 128, or another --data.batch_size"),
        ("--trainer.max_tokens 1000", "--trainer.max_steps and --trainer.max_tokens say the same thing"),
        ("--trainer.max_steps 3", "the warm-up of 3 steps is not shorter than the run of 3; lower"),
        ("--optimizer.min_lr 1", "--optimizer.min_lr 1.0 is above --optimizer.lr 0.003"),
        ("--trainer.max_steps null --trainer.global_batch_tokens 12800000", "one pass over the"),
        ("--trainer.strategy fsdp", "give --trainer.devices"),
        ("--trainer.precision 16-mixed", "precision"),
        ("--trainer.accelerator gpu", "torch sees no GPU here"),
        ("--model.preset gpt4", "no preset 'gpt4'; did you mean 'gpt2'?"),
        ("--model.n_head 5", "n_head 5 must divide n_embd 32"),
        ("--model.block_size 1000000", "has no block of 1,000,000 + 1 tokens"),
        ("--model.backend flash", "no attention backend 'flash'; did you mean"),
        ("--model.backend sdpa_cudnn", "attention backend 'sdpa_cudnn' cannot run this call"),
        ("--model.loss quack", "loss 'quack' cannot run here: it needs a CUDA device"),
        ("--logger.name Nothing", "--logger.name Nothing: Lightning has no such logger; it has "),
        ("--logger.name pathlib.Path", "--logger.name pathlib.Path is no logger of Lightning's"),
        ("--logger.name CSVLogger --logger.arguments {\"a\":1}", "--logger.name CSVLogger does not start: "),
        ("--init no/such", "no/such/config.json: there is no such file"),
        ("--data.path no/such", "no/such is not a token set"),
        ("--model.layers 3", "layers"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_before_anything_is_written(
    train, options, complaint, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert train(tmp_path / "run", *options.split()) == 2
    assert complaint in only_line(capsys)
    assert not (tmp_path / "run").exists()


def test_bars_and_tokens_are_told_apart(prepared, token_set, tmp_path, capsys):
    options = ["--run", str(tmp_path / "run"), "--data.path"]
    assert main(["gpt2", "train", *options, str(prepared)]) == 2
    assert "holds bars, not tokens: they are for `flashlab train`; give a token set" in only_line(capsys)
    assert main(["train", *options, str(token_set)]) == 2
    assert "holds tokens, not bars: they are for `flashlab gpt2 train`; give a prepared set" in only_line(capsys)
    assert not (tmp_path / "run").exists()


# --- several processes


def flashlab(*arguments, sharing=1):
    options = {"env": os.environ | {"OMP_NUM_THREADS": "1"}, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return run_flashlab("gpt2", "train", *arguments, sharing=sharing, timeout_s=300, **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "more"),
    [("ddp", ""), ("fsdp", ""), ("fsdp", "--model.n_layer 6 --model.activation_checkpointing true")],
    ids=["ddp", "fsdp", "fsdp in groups"],
)
def test_two_processes_train_as_one(token_set, strategy, more, tmp_path):
    """Each computes half of every step, and fsdp keeps half of the model in each; compiled, as on GPUs."""
    options = ["--data.path", token_set, *TINY.split(), "--data.batch_size", 2, "--trainer.val_batches", 4]
    options += more.split()
    together = ["--trainer.devices", 2, "--trainer.strategy", strategy, "--trainer.compile", "true"]
    for name, chosen in (("one", []), ("two", together)):
        ran = flashlab(*options, *chosen, "--run", tmp_path / name)
        assert ran.returncode == 0, ran.stderr
        assert ran.stdout.count("trained 22 steps") == 1  # one of them speaks
    assert json.loads((tmp_path / "two" / "run.json").read_text())["accumulated"] == 2
    one, two = curves(tmp_path / "one"), curves(tmp_path / "two")
    for name, bound in (("train/loss", 1e-3), ("train/grad_norm", 1e-2)):
        assert two[name] == pytest.approx(one[name], abs=bound)
    assert two["val/loss"] == pytest.approx(one["val/loss"], abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_resume_bit_for_bit(token_set, strategy, tmp_path):
    options = ["--data.path", token_set, *TINY.split(), "--data.batch_size", 2]
    options += ["--trainer.devices", 2, "--trainer.strategy", strategy, "--run"]
    assert flashlab(*options, tmp_path / "whole").returncode == 0
    half = tmp_path / "half"
    ran = flashlab(*options, half)
    assert ran.returncode == 0, ran.stderr
    (half / "checkpoints" / "last.ckpt").unlink()  # as if it was killed behind the one before
    (half / "run.json").unlink()
    ran = flashlab(*options, half, "--resume")
    assert ran.returncode == 0, ran.stderr
    assert "resumed from" in ran.stdout
    assert_same(half, tmp_path / "whole")


# --- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("compile", ["true", "false"])
def test_a_gpu_trains_like_the_cpu(train, reference, compile, tmp_path):
    """In float32; TF32 rounds products to 10 bits."""
    options = ["--trainer.accelerator", "gpu", "--trainer.precision", "32-true", "--trainer.compile", compile]
    assert train(tmp_path / "run", *options) == 0
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["compiled"] == (compile == "true")
    assert record["finished"]["peak_memory_mib"] >= record["finished"]["peak_allocated_mib"] > 0
    assert curves(tmp_path / "run")["train/loss"] == pytest.approx(curves(reference)["train/loss"], abs=2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("options", ["", "--model.loss chunked", "--trainer.compile false", "--model.dropout 0.1"])
def test_a_gpu_trains_in_bfloat16(train, options, tmp_path, monkeypatch):
    """And steps between two logged ones do not wait for it."""
    original = GPTModule.training_step

    def watched(self, blocks):
        step = self.trainer.global_step
        quiet = step > 8 and (step + 1) % 10
        torch.cuda.set_sync_debug_mode("error" if quiet else "default")
        try:
            return original(self, blocks)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(GPTModule, "training_step", watched)
    run = tmp_path / "run"
    every = ["--trainer.log_every_n_steps", 10, "--trainer.val_every_n_steps", 60]
    assert train(run, "--trainer.accelerator", "gpu", "--trainer.max_steps", 60, *every, *options.split()) == 0
    record = json.loads((run / "run.json").read_text())
    assert record["finished"]["precision"] == "bf16-mixed"
    assert curves(run)["train/loss"][-1] < 3.8
    if peak_flops(torch.cuda.get_device_name(), "bf16-mixed"):
        assert 0 < record["finished"]["mfu"] < 1


@pytest.mark.gpu
def test_backends_give_one_loss_curve_on_a_gpu(train, tmp_path):
    """In bfloat16, whose rounding of 0.4 % each backend meets at other places; 22 steps add up."""
    spec = AttentionSpec(4, 32, 32, 2, 2, 16, torch.bfloat16, torch.device("cuda"), causal=True, needs_grad=True)
    options = ["--trainer.accelerator", "gpu", "--trainer.compile", "false", "--model.backend"]
    assert train(tmp_path / "standard", *options, "standard") == 0
    expected = curves(tmp_path / "standard")["train/loss"]
    for backend in [name for name, backend in BACKENDS.items() if name != "standard" and backend.why_not(spec) is None]:
        assert train(tmp_path / backend, *options, backend) == 0
        assert curves(tmp_path / backend)["train/loss"] == pytest.approx(expected, abs=0.05), backend


@pytest.mark.gpu
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("gpus", [1, 2])
def test_two_processes_on_gpus_train_as_one(token_set, gpus, strategy, tmp_path):
    """In bfloat16, on two GPUs, or sharing one; fsdp gathers six blocks in two groups."""
    if gpus > torch.cuda.device_count():
        pytest.skip("needs two GPUs")
    options = ["--data.path", token_set, *TINY.split(), "--data.batch_size", 2, "--trainer.accelerator", "gpu"]
    options += ["--model.n_layer", 6, "--model.activation_checkpointing", "true"]
    together = ["--trainer.devices", gpus, "--trainer.strategy", strategy]
    for name, chosen, sharing in (("one", [], 1), ("two", together, 2 // gpus)):
        ran = flashlab(*options, *chosen, "--run", tmp_path / name, sharing=sharing)
        assert ran.returncode == 0, ran.stderr
    one, two = curves(tmp_path / "one"), curves(tmp_path / "two")
    assert two["train/loss"] == pytest.approx(one["train/loss"], abs=5e-2)
    assert two["train/grad_norm"] == pytest.approx(one["train/grad_norm"], rel=0.1)
