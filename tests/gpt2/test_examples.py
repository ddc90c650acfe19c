"""The scripts of examples/gpt2, with a tiny model on the CPU; and what its configurations come to."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flashlab import cli
from flashlab.gpt2.config import num_parameters

FOLDER = Path(__file__).parents[2] / "examples/gpt2"
SIZE = {"--tokens_per_step": 128, "--steps": 2, "--compiled": "false"}


def run_script(name, out, **options):
    words = [f"{key}={value}" for key, value in (SIZE | options | {"--out": out}).items()]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run([sys.executable, FOLDER / name, *words], capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr
    return json.loads(out.read_text()), ran.stdout


def test_bench_measures_models_beside_transformers_and_says_what_cannot_run(tmp_path):
    options = {"--presets": "[tiny]", "--lengths": "[32]", "--backends": "[flash_attention_2,auto]"}
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
    assert absent["reason"] in printed


@pytest.mark.slow  # seven processes that each import torch
def test_ablation_compares_each_row_with_the_one_it_differs_from(tmp_path):
    options = {"--preset": "tiny", "--length": 32}
    result, _ = run_script("ablation.py", tmp_path / "ablation.json", **options)
    rows = {row["row"]: row for row in result["rows"]}
    assert len(rows) == 6
    for row in rows.values():
        assert row["status"] == "ok"
        if row["against"] is not None:
            ratio = row["ms_per_step"] / rows[row["against"]]["ms_per_step"]
            assert row["slower"] == pytest.approx(ratio - 1, abs=1e-3)
    differing = {name: row for name, row in rows.items() if row["against"]}
    assert {row["against"] for row in differing.values()} == {"everything on"}


def parsed(*files):
    command = cli.load("gpt2 train")
    parser = cli.build_parser("gpt2 train", command)
    options = parser.instantiate(
        parser.parse_args([word for file in files for word in ("--config", str(FOLDER / file))])
    )
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
    model, data, trainer, optimizer = parsed(*files)
    shape = model.shape(vocab_size)
    assert num_parameters(shape) == pytest.approx(parameters, rel=0.01)
    assert trainer.max_steps * trainer.global_batch_tokens == pytest.approx(tokens, rel=0.01)
    assert trainer.accumulated(data.batch_size, shape.block_size) >= 1
    if vocab_size == 50257:  # made for 8 GPUs, and for any number that divides them
        assert trainer.global_batch_tokens % (8 * data.batch_size * shape.block_size) == 0
        assert optimizer.warmup(trainer.global_batch_tokens) == trainer.max_steps // 100
    assert optimizer.min_lr == pytest.approx(optimizer.lr / 10)
