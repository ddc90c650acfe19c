"""The scripts of examples/gpt2, with a tiny model on the CPU; and what its configurations come to."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from unittest.mock import Mock

import pytest

from flashlab import cli
from flashlab.gpt2.config import num_parameters

FOLDER = Path(__file__).parents[2] / "examples/gpt2"
SIZE = {"--tokens_per_step": 128, "--steps": 2, "--compiled": "false"}


def run_script(name, out, *words, **options):
    words = [*words, *(f"{key}={value}" for key, value in (options | {"--out": out}).items())]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "COLUMNS": "160"}
    command = [sys.executable, FOLDER / name, *map(str, words)]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr
    return json.loads(out.read_text()), ran.stdout


def test_bench_measures_models_beside_transformers_and_says_what_cannot_run(tmp_path):
    options = SIZE | {"--presets": "[tiny]", "--lengths": "[32]", "--backends": "[flash_attention_2,auto]"}
    result, printed = run_script("bench.py", tmp_path / "bench.json", **options, **{"--hugging_face": "[eager]"})
    assert result["kind"] == "gpt2_bench"
    absent, *measured = result["rows"]
    assert (absent["backend"], absent["status"]) == ("flash_attention_2", "failed")
    assert "CUDA" in absent["reason"]
    contestants = [(row["implementation"], row["backend"]) for row in measured]
    assert contestants == [("flashlab", "auto"), ("transformers", "eager")]
    for row in measured:
        assert (row["status"], row["batch_size"], row["tokens_per_step"]) == ("ok", 4, 128)
        assert row["tokens_per_s"] == pytest.approx(128 / row["ms_per_step"] * 1e3, rel=0.01)
    assert "FlashAttention" not in printed
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["bench.py", "--presets", "[nope]"], "no preset 'nope'"),
        (["bench.py", "--backends", "[nope]"], "no attention backend 'nope'; did you mean"),
        (["bench.py", "--tokens_per_step", "100"], "--tokens_per_step 100 is no multiple of the length 1,024"),
        (["ablation.py", "--length", "100"], "--tokens_per_step 65,536 is no multiple of the length 100"),
        (["ablation.py", "--backend", "nope"], "no attention backend 'nope'; did you mean"),
        (["experiments.py", "scaling", "nope"], "nope is not a token set (it has no manifest.json); make it with"),
        (["bench.py", "--presets", "[tiny]", "--lengths", "[32]", "--out", "x.png"], "JSON; name a file that ends in"),
        (["sampling.py", "--preset", "tiny", "--out", "/dev/null/x.json"], "a file stands where a folder should be"),
    ],
)
def test_a_mistake_is_one_line(words, complaint, tmp_path):
    name, *options = words
    command = [sys.executable, FOLDER / name, *options, *([] if "--out" in words else ["--out", tmp_path / "out.json"])]
    ran = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert ran.returncode == 2
    (line,) = ran.stderr.splitlines()
    assert complaint in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_leaves_no_process_and_no_folder_behind(number, tmp_path):
    """What was measured before stays, which is nothing here."""
    options = SIZE | {"--presets": "[tiny]", "--lengths": "[32]", "--steps": 1_000_000, "--hugging_face": "[]"}
    command = [sys.executable, FOLDER / "bench.py", *(f"{key}={value}" for key, value in options.items())]
    (tmp_path / "temporary").mkdir()
    environment = os.environ | {"TMPDIR": str(tmp_path / "temporary"), "CUDA_VISIBLE_DEVICES": ""}
    out = f"--out={tmp_path / 'out.json'}"
    process = subprocess.Popen([*map(str, command), out], stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stderr.readline().startswith("there is no GPU: ")
        assert process.stderr.read(4) == "tiny"
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        while len(started := children.read_text().split()) < 2:  # Python's own helper, and the one that measures
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(number)
        _, told = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 128 + number
    assert "Traceback" not in told
    assert list((tmp_path / "temporary").glob("flashlab-*")) == []
    ends = time.monotonic() + 20  # Python's own helper process ends after the one that it helped
    while left := [pid for pid in started if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < ends, left
        time.sleep(0.05)


@pytest.mark.slow  # eleven processes that each import torch
def test_ablation_compares_each_row_with_the_one_it_differs_from(tmp_path):
    options = SIZE | {"--preset": "tiny", "--length": 32}
    result, _ = run_script("ablation.py", tmp_path / "ablation.json", **options)
    rows = {row["row"]: row for row in result["rows"]}
    assert len(rows) == 10
    for row in rows.values():
        assert row["status"] == "ok"
        if row["against"] is not None:
            ratio = row["ms_per_step"] / rows[row["against"]]["ms_per_step"]
            assert row["slower"] == pytest.approx(ratio - 1, abs=1e-3)
    differing = {name: row for name, row in rows.items() if row["against"]}
    others = {"vocabulary: not padded": "fused cross-entropy: by torch.compile alone"}
    assert all(row["against"] == others.get(name, "everything on") for name, row in differing.items())


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    text, out = tmp_path_factory.mktemp("text") / "text.jsonl", tmp_path_factory.mktemp("tokens") / "set"
    text.write_text("".join(json.dumps({"text": f"{number} is a number. " * 20}) + "\n" for number in range(100)))
    assert cli.main(["gpt2", "prepare", str(text), "--out", str(out), "--validation", "0.2"]) == 0
    return out


def test_an_experiment_refuses_what_would_fail_after_hours(tokens, tmp_path):
    out = ["--out", tmp_path / "out.json"]
    for words, complaint in (
        (["scaling", tokens, "--steps", 10], "--steps 10 are too few to measure a speed by; take 20 or more"),
        (["backends", tokens, "--trained", "nope.yaml"], "--trained nope.yaml: there is no such file"),
    ):
        command = [sys.executable, FOLDER / "experiments.py", *words, *out]
        ran = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        assert ran.returncode == 2
        assert complaint in ran.stderr


@pytest.mark.slow  # four trainings
def test_scaling_compares_two_processes_with_one(tokens, tmp_path):
    sizes = {"--batch_size": 2, "--block_size": 32, "--steps": 20, "--strategies": "[ddp]"}
    small = {"--more": "--model.n_layer 1 --model.n_head 1 --model.n_embd 32"}
    result, printed = run_script("experiments.py", tmp_path / "scaling.json", "scaling", tokens, **sizes, **small)
    found = [(row["strategy"], row["devices"], row["tokens_per_step"], row["status"]) for row in result["rows"]]
    assert found == [(*row, "ok") for row in [(None, 1, 64), ("ddp", 2, 128), (None, 1, 512), ("ddp", 2, 1024)]]
    for alone, together in zip(result["rows"][::2], result["rows"][1::2], strict=True):
        assert together["efficiency"] == pytest.approx(together["tokens_per_s"] / alone["tokens_per_s"] / 2, abs=1e-4)
    assert "2 GPUs, ddp" in printed


@pytest.mark.slow  # two trainings
def test_what_several_gpus_would_do_two_processes_do_on_one(tokens, tmp_path):
    sizes = {"--sharded": "gpt2", "--sharded_batch_size": 2, "--block_size": 32, "--steps": 20, "--shared": "true"}
    options = {"--strategies": "[fsdp]", "--more": "--model.n_layer 1 --model.n_head 1 --model.n_embd 32"}
    result, printed = run_script("experiments.py", tmp_path / "scaling.json", "scaling", tokens, **sizes, **options)
    alone, together = result["rows"]
    assert (together["status"], together["shared"], together["tokens_per_step"]) == ("ok", True, 128)
    assert together["best_val_loss"] == pytest.approx(alone["best_val_loss"], abs=0.05)
    assert "tokens_per_s" not in alone.keys() | together.keys()
    assert "2 processes on one GPU, fsdp" in printed


@pytest.mark.slow  # four trainings
def test_backends_train_alike_and_those_that_cannot_say_why(tokens, tmp_path):
    base = tmp_path / "tiny.yaml"
    base.write_text(
        "{data: {batch_size: 2}, model: {n_layer: 1, n_head: 1, n_embd: 32, block_size: 32}, "
        "optimizer: {warmup_steps: 2}, trainer: {global_batch_tokens: 64, log_every_n_steps: 2}}"
    )
    options = {"--trained": base, "--steps": 20, "--names": "[sdpa_math,flash_attention_2]", "--at_once": 3}
    result, printed = run_script("experiments.py", tmp_path / "backends.json", "backends", tokens, **options)
    *ran, absent = result["rows"]
    assert [row["backend"] for row in ran] == [
        "standard",
        "standard, uncompiled",
        "standard, residual stream in float32",
        "sdpa_math",
    ]
    for row in ran:
        assert row["train_loss"] == pytest.approx(ran[0]["train_loss"], abs=1e-3)
        assert row["first_loss"] > row["train_loss"][-1]
    assert absent["reason"].startswith("attention backend 'flash_attention_2' cannot run")
    assert "Not measured: `flash_attention_2`" in printed


def test_a_backend_that_trains_otherwise_fails(tokens, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(FOLDER)
    experiments = import_module("experiments")
    losses = iter([[5.0, 4.0], [5.0, 4.01], [5.0, 4.0], [5.0, 4.07], [5.0]])
    monkeypatch.setattr(experiments, "training", lambda *_: nullcontext(Mock()))
    monkeypatch.setattr(experiments, "outcome", lambda *_: {"status": "ok", "best_val_loss": 4.0})
    monkeypatch.setattr(experiments, "read_curves", lambda _: {"train/loss": ([1, 2], next(losses))})
    out = tmp_path / "backends.json"
    assert experiments.backends(tokens, names=["tiled", "sdpa_math"], out=out) == 1
    *ran, short = json.loads(out.read_text())["rows"]
    assert [row["largest_difference"] for row in ran] == [0, 0.01, 0, 0.07]
    assert (short["status"], short["reason"]) == ("failed", "it logged 1 losses, and standard attention 2")
    assert capsys.readouterr().err == "more than 0.06 from standard attention: tiled\n"


def test_what_several_processes_say_has_one_cause(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    outcome = import_module("experiments").outcome
    both = "flashlab: error: out of memory\nflashlab: error: another process has ended\nChildFailedError: x\n=====\n"
    for told, cause in (
        (both, "flashlab: error: out of memory"),
        ("ValueError: no\n====", "ValueError: no"),
        ("a", "a"),
    ):
        process = Mock(communicate=lambda told=told: ("", told), returncode=1)
        assert outcome(tmp_path, process, ()) == {"status": "failed", "reason": f"exit code 1: {cause}"}


def test_sampling_measures_both_ways_and_compares_their_tokens(tmp_path):
    options = {"--preset": "tiny", "--new_tokens": 8, "--prompt": 4, "--batch_sizes": "[2]", "--repeats": 1}
    result, _ = run_script("sampling.py", tmp_path / "sampling.json", **options)
    exact, rough = result["rows"]
    assert (exact["dtype"], exact["same_tokens"], rough["dtype"]) == ("float32", 1, "bfloat16")
    assert exact["times"] == pytest.approx(exact["tokens_per_s"] / exact["tokens_per_s_without_cache"], rel=0.02)


def parsed(*words):
    parser = cli.build_parser("gpt2 train", cli.load("gpt2 train"))
    options = parser.instantiate(parser.parse_args(list(words)))
    return options.model, options.data, options.trainer, options.optimizer


@pytest.mark.parametrize(
    ("files", "vocab_size", "parameters", "tokens"),
    [
        (["owt-gpt2s.yaml"], 50257, 124e6, 210e9),
        (["owt-gpt2m.yaml"], 50257, 355e6, 210e9),
        (["owt-gpt2l.yaml"], 50257, 774e6, 210e9),
        (["owt-gpt2xl.yaml"], 50257, 1558e6, 210e9),
        (["pile-gpt3s.yaml"], 50257, 125e6, 419e9),
        (["pile-gpt3m.yaml"], 50257, 356e6, 419e9),
        (["pile-gpt3l.yaml"], 50257, 760e6, 419e9),
        (["pile-gpt3xl.yaml"], 50257, 1316e6, 419e9),
        (["pile-gpt3-2.7b.yaml"], 50257, 2651e6, 419e9),
        (["embedded.yaml"], 257, 10.7e6, 65.5e6),
        (["embedded.yaml", "cpu.yaml"], 257, 0.83e6, 3.7e6),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_a_configuration_is_what_the_readme_says(files, vocab_size, parameters, tokens):
    model, data, trainer, optimizer = parsed(*(f"--config={FOLDER / file}" for file in files))
    shape = model.shape(vocab_size)
    assert num_parameters(shape) == pytest.approx(parameters, rel=0.01)
    assert trainer.max_steps * trainer.global_batch_tokens == pytest.approx(tokens, rel=0.01)
    assert trainer.accumulated(data.batch_size, shape.block_size) >= 1
    if vocab_size == 50257:  # made for 8 GPUs, and for any number that divides them
        assert trainer.global_batch_tokens % (8 * data.batch_size * shape.block_size) == 0
        assert optimizer.warmup(trainer.global_batch_tokens) == trainer.max_steps // 100
    assert optimizer.min_lr == pytest.approx(optimizer.lr / 10)


@pytest.mark.parametrize("page", ["docs/gpt2.md", "examples/gpt2/README.md"])
def test_the_gpus_of_a_command_fill_a_step(page, monkeypatch):
    """Of all machines that torchrun starts it on."""
    monkeypatch.chdir(FOLDER.parents[1])
    blocks = re.findall(r"```sh\n(.*?)```", Path(page).read_text(), re.DOTALL)
    found = 0
    for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
        before, command, rest = line.partition("flashlab gpt2 train ")
        if not command:
            continue
        model, data, trainer, _ = parsed(*(word for word in shlex.split(rest) if word != "--resume"))
        nodes, each = (re.search(rf"--{name} (\d+)", before) for name in ("nnodes", "nproc-per-node"))
        if nodes and each:
            trainer = replace(trainer, num_nodes=int(nodes[1]), devices=int(each[1]))
        assert trainer.accumulated(data.batch_size, model.shape(50257).block_size) >= 1
        found += 1
    assert found >= 2
