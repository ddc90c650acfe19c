"""The tables of docs/gpt2.md, from result files as the examples write them."""

import json

import pytest

from flashlab.errors import UserError
from flashlab.gpt2 import report

SPEED = {
    "status": "ok",
    "reason": None,
    "ms_per_step": 50.0,
    "tokens_per_s": 1200,
    "mfu": 0.25,
    "peak_memory_mib": 4000,
}
SHAPE = {"preset": "gpt2", "block_size": 1024, "tokens_per_step": 65536}


@pytest.fixture
def written(tmp_path):
    def write(kind, rows, **facts):
        path = tmp_path / f"{kind}.json"
        path.write_text(json.dumps({"schema": 1, "kind": kind, "rows": rows, **facts}))
        return path

    return write


def row(**changes):
    return SPEED | SHAPE | {"implementation": "flashlab", "backend": "standard"} | changes


def cells(text):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]


def test_models_stand_beside_transformers_of_the_same_length(written):
    theirs = {"implementation": "transformers", "backend": "eager", "tokens_per_s": 400}
    rows = [
        row(),
        row(backend="auto", ran={"backend": "flash_attention_4"}, tokens_per_s=2400),
        row(**theirs),
        row(block_size=2048),
        row(block_size=2048, **theirs, **{"status": "failed", "reason": "out of memory"}),
    ]
    found = cells(report.bench(written("gpt2_bench", rows)))
    assert found[0] == ["Length", "Attention", "tokens/s", "MFU", "ms a step", "MiB at most", "times eager"]
    assert found[2] == ["1,024", "`standard`", "1,200", "25.0%", "50.0", "4,000", "3.00"]
    assert found[3][1:3] + found[3][-1:] == ["`auto`: `flash_attention_4`", "2,400", "6.00"]
    assert found[5][-1] == ""
    assert found[6][:3] == ["2,048", "Hugging Face, eager", "failed"]
    axes = report.draw([*rows, row(preset="gpt2-medium")]).axes
    assert [panel.get_title(loc="left") for panel in axes] == ["gpt2", "gpt2-medium"]
    assert [len(line.get_xdata()) for line in axes[0].lines] == [2, 1, 1]


def test_components_stand_beside_what_they_are_compared_with(written):
    rows = [row(row="everything on"), row(row="AdamW: not fused", slower=0.1, more_memory_mib=-5)]
    found = cells(report.ablation(written("gpt2_ablation", rows, preset="gpt2")))
    assert found[2] == ["everything on", "50.0", "1,200", "", "4,000", ""]
    assert found[3] == ["AdamW: not fused", "50.0", "1,200", "+10.0%", "4,000", "-5"]


def test_several_gpus_stand_beside_one(written):
    rows = [
        row(devices=1, strategy=None),
        row(devices=2, strategy="fsdp", efficiency=0.95, peak_allocated_mib=3800, predicted_allocated_mib=3900),
        row(devices=2, strategy="fsdp", status="failed", reason="out of memory"),
        row(devices=2, strategy="fsdp", shared=True, tokens_per_s=None, mfu=None, ms_per_step=None),
    ]
    found = cells(report.scaling(written("gpt2_scaling", rows)))
    assert found[2] == ["gpt2, 1 GPU", "65,536", "50.0", "1,200", "", "25.0%", "4,000", "", ""]
    assert found[3][4:] == ["95.0%", "25.0%", "4,000", "3,800", "3,900"]
    assert found[4][:3] == ["gpt2, 2 GPUs, fsdp", "", ""]
    assert found[5][:4] == ["gpt2, 2 processes on one GPU, fsdp", "65,536", "", ""]


def test_backends_that_were_not_measured_say_why(written):
    losses = {"first_loss": 5.5, "of_first_10": 0.001, "largest_difference": 0.01, "best_val_loss": 1.25}
    rows = [
        row(backend="standard, uncompiled", **losses),
        row(backend="flash_attention_3", status="unavailable", reason="not installed"),
    ]
    text = report.backends(written("gpt2_backends", rows))
    assert cells(text)[2] == ["`standard`, uncompiled", "5.5000", "0.0010", "0.0100", "1.2500"]
    assert "Not measured: `flash_attention_3` (not installed)." in text


def test_a_training_is_told_by_its_configurations(tmp_path):
    finished = {"steps": 2000, "seconds": 73.8, "tokens_per_s": 1234567, "best_val_loss": 0.77}
    command = ["flashlab", "train", "--config", "examples/embedded.yaml", "--config", "cpu.yaml", "--run", "runs/gpt2"]
    record = {"command": command, "parameters": 1000, "tokens_per_step": 2048, "finished": finished, "machine": {}}
    (path := tmp_path / "run.json").write_text(json.dumps(record))
    found = cells(report.runs(path))[2]
    assert found[:3] == ["embedded.yaml, cpu.yaml", "1,000", "2,000"]
    assert found[4:7] == ["74", "1,234,567", "0.7700"]


def test_the_cache_stands_beside_all_positions_anew(written):
    rows = [
        {
            **{"preset": "gpt2", "dtype": "float32", "batch_size": 1, "new_tokens": 512, "tokens_per_s": 1000.0},
            **{"tokens_per_s_without_cache": 100.0, "times": 10.0, "same_tokens": 1.0},
        }
    ]
    found = cells(report.sampling(written("gpt2_sampling", rows)))
    assert found[2] == ["float32", "1", "1,000", "100", "10.0", "100%"]


def test_a_file_of_another_kind_is_refused(written):
    with pytest.raises(UserError, match=r"is of kind 'gpt2_bench', not 'gpt2_sampling'; `python examples/gpt2/sampl"):
        report.sampling(written("gpt2_bench", [row()]))
