import json
from pathlib import Path

import pytest
import torch

from flashlab import cli
from flashlab.attention import backends, support


def refuse(refusals):
    """Stand in for why_not: refuse where a (backend, attribute of the call) is named."""

    def why_not(name, spec):
        return next((f"no {what}" for who, what in refusals if who == name and getattr(spec, what)), None)

    return why_not


def test_every_answer_is_why_nots(device):
    rows = {(row["feature"], row["backend"]): row for row in support.examine(device)}
    assert set(rows) == {(feature, name) for feature in support.FEATURES for name in backends.BACKENDS}
    for row in rows.values():
        assert (row["status"] == "ok") == (row["reason"] is None)
    assert all(rows[feature, "standard"]["status"] == "ok" for feature in support.FEATURES)
    assert rows["soft cap", "sdpa_math"]["reason"] == "scaled_dot_product_attention has no soft cap"
    assert rows["causal", "sdpa_math"]["status"] == "ok"


def test_forward_only_and_unsupported_are_told_apart(monkeypatch):
    monkeypatch.setattr(backends, "why_not", refuse([("tiled", "alibi"), ("sdpa_math", "needs_grad")]))
    rows = {(row["feature"], row["backend"]): row for row in support.examine(torch.device("cpu"))}
    assert (rows["ALiBi", "tiled"]["status"], rows["ALiBi", "tiled"]["reason"]) == ("unsupported", "no alibi")
    assert rows["full", "sdpa_math"]["status"] == "forward only"
    assert rows["key-value cache, one token", "sdpa_math"]["status"] == "ok"  # it has no gradients


def test_a_reason_is_written_once_and_a_backend_that_can_do_nothing_has_no_column(monkeypatch):
    refusals = [("tiled", "alibi"), ("standard", "alibi"), ("sdpa_math", "needs_grad"), ("sdpa_cudnn", "head_dim")]
    monkeypatch.setattr(backends, "why_not", refuse([*refusals, ("tiled", "softcap")]))
    summary = support.summarise(support.examine(torch.device("cpu")))
    assert summary.reasons == ["no needs_grad", "no alibi", "no softcap"]
    assert summary.absent == ["sdpa_cudnn: no head_dim"]
    assert "sdpa_cudnn" not in summary.header
    cells = {line[0]: dict(zip(summary.header, line[1:], strict=True)) for line in summary.lines}
    assert cells["ALiBi"]["tiled"] == cells["ALiBi"]["standard"] == "(2)"
    assert cells["ALiBi"]["sdpa_math"] == "forward (1)"
    assert cells["ALiBi"]["sdpa_flash"] == "ok"


def test_the_table_is_printed_and_kept(tmp_path, capsys):
    path = tmp_path / "new" / "support.json"
    assert cli.main(["backends", "--device", "cpu", "--json", str(path)]) == 0
    out = capsys.readouterr().out
    assert "scaled_dot_product_attention has no soft cap" in out
    assert "not here: sdpa_efficient, sdpa_cudnn: torch has this kernel for GPUs only" in out
    found = json.loads(path.read_text())
    assert (found["schema"], found["kind"], found["device"]) == (1, "attention_support", "CPU")
    assert found["rows"] == support.examine(torch.device("cpu"))
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_the_docs_are_written_from_the_facts(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("docs").mkdir()
    Path("README.md").touch()
    page = Path("docs/attention.md")
    page.write_text("nothing\n")
    assert cli.main(["backends", "--device", "cpu", "--docs"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "write <!-- results: support support_cpu.json --> and below it <!-- /results -->" in line
    page.write_text("before\n<!-- results: support support_cpu.json -->\nold\n<!-- /results -->\nafter\n")
    assert cli.main(["backends", "--device", "cpu", "--docs"]) == 0
    text = page.read_text()
    assert support.markdown(support.examine(torch.device("cpu"))) in text
    assert "old" not in text
    assert Path("assets/results/support_cpu.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--docs"], "--docs: there is no docs/attention.md here: run it in the project's root folder"),
        (["--json", "file/support.json"], "cannot write file/support.json: "),
        pytest.param(
            ["--device", "cuda"],
            "--device cuda: torch sees no CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees a CUDA device"),
        ),
    ],
    ids=str,
)
def test_a_mistake_is_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    assert cli.main(["backends", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
