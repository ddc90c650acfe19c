"""The command: what it prints and writes, when it exits with 1, and what a mistake gets."""

import json

import pytest
import torch
from model_kernel import Kernel

from flashlab.attention.backends import BACKENDS
from flashlab.check.cases import quick_cases
from flashlab.cli import main

CASE = "float32/d64/129x129/causal/h6kv2/plain/dense/normal"


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def plant(monkeypatch):
    """Put a backend into the table, with some of the model kernel's steps replaced."""

    def put(**steps):
        kernel = Kernel()
        for name, step in steps.items():
            setattr(kernel, name, step)
        monkeypatch.setitem(BACKENDS, "planted", kernel.as_backend())

    return put


def check(*arguments):
    return main(["check", "--device", "cpu", *arguments])


def test_a_right_backend_passes_and_every_row_is_written(plant, tmp_path, capsys):
    plant()
    path = tmp_path / "new" / "check.json"
    assert check("--backend", "[planted,flash_attention_2]", "--dtype", "[float32]", "--json", str(path)) == 0
    said = capsys.readouterr().out
    assert said.startswith("Max difference: 0.00")
    assert "batch 2, length 128, 8 heads of 64, float16" in said.splitlines()[0]
    assert said.splitlines()[-1] == "nothing is wrong"
    result = json.loads(path.read_text())
    cases = {case.name for case in quick_cases() if case.dtype == "float32"}
    assert (result["schema"], result["kind"]) == (1, "attention_check")
    assert {row["case"] for row in result["rows"]} == cases
    for row in result["rows"]:
        if row["backend"] == "planted":
            assert row["status"] == "ok"
            assert all(0 <= each["error"] <= each["allowed"] for each in row["errors"].values())
        else:
            assert (row["status"], row["errors"]) == ("unsupported", {})
            assert "needs a CUDA device" in row["reason"]
    assert not list(path.parent.glob(".*"))


def test_a_wrong_backend_exits_with_1_and_says_where_and_how_to_see_it_again(plant, tmp_path, capsys):
    plant(gradients=lambda dq, dk, dv, options: (dq, dk.index_fill(1, torch.tensor([7]), 0.0), dv))
    again = ["--backend", "[planted]", "--case", f"[{CASE}]"]
    assert check(*again, "--json", str(tmp_path / "check.json")) == 1
    said = capsys.readouterr().out
    assert f"WRONG planted in {CASE}: dk[" in said
    assert ", 7, " in said
    assert f"  again: flashlab check --device cpu --backend '[planted]' --case '[{CASE}]'\n" in said
    (row,) = json.loads((tmp_path / "check.json").read_text())["rows"]
    assert row["status"] == "wrong"
    assert row["errors"]["dk"]["error"] > row["errors"]["dk"]["allowed"]
    assert row["errors"]["dq"]["error"] <= row["errors"]["dq"]["allowed"]


def raise_(error):
    raise error


def test_a_backend_that_raises_is_wrong_without_a_traceback(plant, capsys):
    plant(scores=lambda *_: raise_(RuntimeError("illegal\nmemory")))
    assert check("--backend", "[planted]", "--case", f"[{CASE}]") == 1
    captured = capsys.readouterr()
    assert f"WRONG planted in {CASE}: raised RuntimeError: illegal memory\n" in captured.out
    assert "Traceback" not in captured.out + captured.err


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), RuntimeError("CUBLAS_STATUS_ALLOC_FAILED")])
def test_out_of_memory_is_a_row_of_its_own_and_not_wrong(error, plant, tmp_path, capsys):
    plant(scores=lambda *_: raise_(error))
    path = tmp_path / "check.json"
    assert check("--backend", "[planted,standard]", "--case", f"[{CASE}]", "--json", str(path)) == 0
    assert [row["status"] for row in json.loads(path.read_text())["rows"]] == ["oom", "ok"]
    assert capsys.readouterr().out.splitlines()[-1] == "nothing is wrong"


def test_where_nothing_could_be_judged_nothing_passes(plant, capsys):
    plant(scores=lambda *_: raise_(torch.OutOfMemoryError("CUDA out of memory")))
    assert check("--backend", "[planted,flash_attention_2]", "--case", f"[{CASE}]") == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "nothing was judged: every case was unsupported or out of memory"


def test_a_folder_is_no_result_file(tmp_path, capsys):
    assert check("--json", str(tmp_path)) == 2
    captured = capsys.readouterr()
    assert captured.err == f"flashlab: error: --json {tmp_path} is a folder: name a file\n"
    assert captured.out == ""


def test_auto_is_checked_and_its_choice_recorded(tmp_path):
    path = tmp_path / "check.json"
    assert check("--backend", "[auto]", "--case", f"[{CASE}]", "--json", str(path)) == 0
    (row,) = json.loads(path.read_text())["rows"]
    assert (row["backend"], row["resolved"]) == ("auto", "sdpa_flash")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--backend", "[flash_atention_2]"],
            "--backend: there is no 'flash_atention_2'; did you mean 'flash_attention_2'?",
        ),
        (["--dtype", "[float61]"], "--dtype: there is no 'float61'; did you mean 'float16'?"),
        (
            ["--head_dim", "7"],
            "none of the cases has head_dim 7: there are dtype bfloat16, float16, float32 and head_dim 32, 64, 96,",
        ),
        (["--quick", "--full"], "--quick and --full exclude each other"),
        (
            ["--case", "[float32]"],
            "must read dtype/head_dim/lengths/mask/heads/feature/layout/values, such as bfloat16/d64",
        ),
        (["--case", f"[{CASE.replace('plain', 'plane')}]"], "no feature 'plane'"),
        (["--case", f"[{CASE.replace('d64', 'd064')}]"], "no head_dim 'd064'"),
        (["--case", f"[{CASE.replace('129x129', '129x0')}]"], "no lengths '129x0'"),
        (["--case", f"[{CASE.replace('h6kv2', 'h6kv4')}]"], "no heads 'h6kv4'"),
        (["--case", f"[{CASE.replace('causal', 'window')}]"], "no mask 'window'"),
        (["--case", f"[{CASE.replace('normal', 'stale')}]"], "asks for what no call offers"),
        (
            ["--case", f"[{CASE}]", "--dtype", "[float16]"],
            "none of the cases has dtype float16: there are dtype float32",
        ),
        (["--json", "/proc/no/check.json"], "cannot write /proc/no/check.json"),
        pytest.param(
            ["--device", "cuda"],
            "torch sees no CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_a_mistake_is_one_line(arguments, message, capsys):
    assert check(*arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
