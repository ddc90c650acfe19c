import json

import pytest
import torch

from flashlab.bench import bench as module
from flashlab.bench.measure import new_row
from flashlab.cli import main

SMALL = ["--batch_size", "2", "--seq_len", "64", "--num_heads", "4", "--emb_dim", "64", "--repeats", "2"]


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        return main(["bench", *SMALL, "--device", "cpu", *arguments])

    return run


@pytest.mark.parametrize(
    ("impl", "backend"), [("Pytorch", "standard"), ("sdpa_math", "sdpa_math"), ("auto", "sdpa_flash")]
)
def test_the_file_is_the_course_labs_with_one_key_more(impl, backend, run, tmp_path, capsys):
    assert run("--impl", impl, "--causal", "--output", "result.json") == 0
    result = json.loads((tmp_path / "result.json").read_text())
    details = result.pop("flashlab")
    assert list(result) == ["forward", "backward", "forward_backward", "peak_memory_usage(MB)"]
    work = 4 * 2 * 64 * 64 * 64 / 2
    for name, factor in {"forward": 1, "backward": 2.5, "forward_backward": 3.5}.items():
        assert list(result[name]) == ["time(s)", "FLOPS(TFLOPs/s)"]
        assert result[name]["time(s)"] * result[name]["FLOPS(TFLOPs/s)"] == pytest.approx(factor * work / 1e12)
    assert details["kind"] == "attention_bench"
    assert [(row["resolved"], row["mask"], row["repeats"]) for row in details["rows"]] == [(backend, "causal", 2)] * 3
    assert all(row["error_ratio"] < 1 for row in details["rows"])
    assert f"{backend}: 2 x 64, 4 heads of 16, float32, causal" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--num_heads", "3"], "--num_heads must divide --emb_dim; 3 does not divide 64"),
        (["--num_heads", "0"], "--num_heads must be 1 or more; got 0"),
        (["--batch_size", "0"], "--batch_size must be 1 or more; got 0"),
        (["--num_kv_heads", "3"], "--num_kv_heads must divide --num_heads; 3 does not divide 4"),
        (["--impl", "Flash2"], "'flash_attention_2' cannot run this call: it needs a CUDA device"),
        (["--impl", "flash_attention2"], "did you mean 'flash_attention_2'"),
        (["--output", "no/such/folder.json"], "there is no folder no/such;"),
        (["--output", "."], "--output . is a folder: name a file"),
    ],
)
def test_a_mistake_is_one_line(arguments, says, run, capsys, tmp_path):
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert says in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_gpu_that_is_not_there_is_one_line(capsys):
    assert main(["bench", *SMALL, "--device", "cuda"]) == 2
    assert "torch sees no CUDA device" in capsys.readouterr().err


def test_a_narrow_terminal_shows_every_number_whole(run, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "60")
    numbers = {"latency_ms": 0.01234, "latency_ms_p10": 0.01124, "latency_ms_p90": 12346.0, "tflops_per_s": 1.234e-5}
    monkeypatch.setattr(module, "measure", lambda case, backend, name, **_: new_row(case, backend, name) | numbers)
    assert run() == 0
    said = capsys.readouterr().out
    for number in ("0.01234", "0.01124", "1.235e+04", "1.234e-05"):
        assert said.count(number) == 3
    assert "…" not in said


@pytest.mark.parametrize(("status", "code"), [("oom", 0), ("wrong", 1), ("failed", 1)])
def test_what_could_not_be_measured_is_null_and_said(status, code, run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        module, "measure", lambda case, backend, name, **_: new_row(case, backend, name, status, "a reason")
    )
    assert run() == code
    result = json.loads((tmp_path / "benchmark_result.json").read_text())
    assert result["backward"] == {"time(s)": None, "FLOPS(TFLOPs/s)": None}
    assert "forward, backward, forward_backward:" in (said := capsys.readouterr().out)
    assert said.count("a reason") == 1
