import json

import pytest
import torch

from flashlab import cli
from flashlab.attention import AttentionSpec, auto
from flashlab.bench import tune as tuning
from flashlab.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FLASHLAB_CACHE", str(tmp_path / "cache"))
    auto.forget()
    yield tmp_path / "cache"
    auto.forget()


def row(backend, latency_ms, pass_name="forward", *, status="ok", **changes):
    found = {"backend": backend, "resolved": backend, "dtype": "bfloat16", "head_dim": 64, "mask": "causal"}
    found |= {"seqlen": 512, "num_heads": 8, "num_kv_heads": 8, "pass": pass_name, "status": status}
    return found | {"latency_ms": latency_ms if status == "ok" else None, **changes}


def swept(rows, device="cuda", gpus=({"name": "NVIDIA H200", "capability": "9.0"},)):
    facts = {"schema": 1, "kind": "attention_sweep", "command": "flashlab bench sweep", "git_commit": "abc"}
    facts |= {"image": None, "method": {}}
    return {**facts, "machine": {"torch": {"gpus": list(gpus)}}, "config": {"device": device}, "rows": rows}


def write(path, facts):
    path.write_text(json.dumps(facts))
    return str(path)


def test_backends_are_ranked_by_time_and_only_what_was_right_is():
    rows = [
        *(row("sdpa_flash", 2.0), row("flash_attention_4", 1.0), row("sdpa_cudnn", 4.0)),
        *(row("flash_attention_2", None, status=status) for status in ("wrong", "oom", "failed", "unsupported")),
        *(row("auto", 0.5, resolved="sdpa_flash"), row("tiled", 0.1)),
        *(row("sdpa_flash", 0.1, mask="window:256"), row("sdpa_flash", 0.1, num_kv_heads=1)),
    ]
    (ranked,) = tuning.rank(rows)
    assert ranked == {
        "dtype": "bfloat16",
        "head_dim": 64,
        "mask": "causal",
        "needs_grad": False,
        "seqlen": 512,
        "backends": {"flash_attention_4": 1.0, "sdpa_flash": 2.0, "sdpa_cudnn": 4.0},
    }
    assert list(ranked["backends"]) == ["flash_attention_4", "sdpa_flash", "sdpa_cudnn"]


def test_training_is_ranked_by_forward_and_backward_together():
    apart = [
        *(row("sdpa_flash", 1.0), row("sdpa_flash", 2.0, "backward")),
        *(row("sdpa_cudnn", 0.5), row("sdpa_cudnn", 4.0, "backward")),
        row("flash_attention_2", 0.1),
    ]
    forward, both = tuning.rank(apart)
    assert list(forward["backends"]) == ["flash_attention_2", "sdpa_cudnn", "sdpa_flash"]
    assert (both["needs_grad"], both["backends"]) == (True, {"sdpa_flash": 1.0, "sdpa_cudnn": 1.5})
    together = [row("sdpa_cudnn", 1.0, "forward_backward"), row("sdpa_flash", 3.0, "forward_backward")]
    _, both = tuning.rank(apart + together)
    assert both["backends"] == {"sdpa_cudnn": 1.0, "sdpa_flash": 3.0}


class WorkerHere:
    """Run what a worker process would run."""

    def __init__(self, log):
        pass

    def call(self, function, *arguments, timeout_s, **options):
        return function(*arguments, **options)

    def stop(self):
        pass


def test_the_machine_is_measured_and_auto_knows(cache_folder, monkeypatch, capfd):
    grid = {"backends": ["sdpa_flash", "sdpa_math"], "dtypes": ["float32"], "head_dims": [16], "tokens": 64}
    monkeypatch.setitem(tuning.GRIDS, "cpu", grid | {"hidden": 32})
    monkeypatch.setitem(tuning.LENGTHS, "cpu", [64])
    monkeypatch.setattr(tuning.sweeps, "Worker", WorkerHere)
    monkeypatch.setattr(tuning.sweeps, "ceilings", lambda *_: {})
    path = auto.tuned_path(CPU)
    path.parent.mkdir()
    path.write_text("damaged")

    assert cli.main(["tune", "--device", "cpu"]) == 0
    assert str(path) in capfd.readouterr().out
    assert [file.name for file in cache_folder.iterdir()] == [path.name]
    found = json.loads(path.read_text())
    assert {(each["mask"], each["needs_grad"]) for each in found["rows"]} == {
        (mask, needs_grad) for mask in ("full", "causal") for needs_grad in (False, True)
    }
    assert found["config"]["device"] == "cpu"
    assert found["wrong"] == []
    choice = auto.choose(AttentionSpec(1, 64, 64, 2, 2, 16, torch.float32, CPU, causal=True))
    assert choice.source == "measured on this machine: head_dim 16, length 64"


def test_stopped_it_leaves_the_old_table(cache_folder, monkeypatch):
    path = auto.tuned_path(CPU)
    path.parent.mkdir()
    path.write_text("old")
    monkeypatch.setattr(tuning.sweeps, "sweep", lambda **_: 130)
    assert cli.main(["tune", "--device", "cpu"]) == 130
    assert path.read_text() == "old"


def test_what_another_command_left_is_measured_anew(monkeypatch):
    def sweep(*, out, resume=True, **_):
        if resume:
            raise UserError("it is of another sweep")
        out.mkdir(parents=True)  # as the real one
        write(out / "sweep.json", swept([row("sdpa_math", 1.0, dtype="float32")], "cpu", ()))
        return 0

    monkeypatch.setattr(tuning.sweeps, "sweep", sweep)
    assert cli.main(["tune", "--device", "cpu"]) == 0
    assert auto.parse(auto.tuned_path(CPU).read_text()).cells


@pytest.mark.parametrize("folder", ["nvidia_h200-sweep", ".nvidia_h200.json.tune"])
def test_a_table_to_ship_is_made_of_a_sweep_and_a_check(folder, tmp_path, capsys):
    wrong = row("flash_attention_4", None, status="wrong")
    (tmp_path / folder).mkdir()
    sweep = write(tmp_path / folder / "sweep.json", swept([row("sdpa_flash", 2.0), row("sdpa_cudnn", 1.0), wrong]))
    checked = [{"backend": "sdpa_cudnn", "dtype": "float16", "head_dim": 96, "status": "wrong"}]
    check = write(tmp_path / "check.json", {"schema": 1, "kind": "attention_check", "rows": checked})
    out = tmp_path / "nvidia_h200.json"
    assert cli.main(["tune", "--sweep", sweep, "--check", check, "--out", str(out)]) == 0
    found = auto.parse(out.read_text())
    assert found.key == {"device": "NVIDIA H200"}
    assert found.capability == "9.0"
    assert found.cells[0].ranking == ("sdpa_cudnn", "sdpa_flash")
    assert found.wrong == {("flash_attention_4", "bfloat16", 64), ("sdpa_cudnn", "float16", 96)}
    assert json.loads(out.read_text())["git_commit"] == "abc"
    assert "never flash_attention_4 with bfloat16 at head_dim 64: it was wrong" in capsys.readouterr().out
    assert (tmp_path / folder / "sweep.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sweep", "{sweep}"], "--sweep: name the table to write with --out"),
        (
            ["--sweep", "{nothing}", "--out", "{out}"],
            "{nothing}: No such file or directory; `flashlab bench sweep` writes it",
        ),
        (["--sweep", "{cut}", "--out", "{out}"], "{cut} is not JSON"),
        (["--sweep", "{check}", "--out", "{out}"], "{check} is of kind 'attention_check', not 'attention_sweep'"),
        (["--check", "{sweep}"], "{sweep} is of kind 'attention_sweep', not 'attention_check'"),
        (["--sweep", "{on_cpu}", "--out", "{out}"], "--sweep: it was measured on a CPU"),
        (["--device", "cpu", "--out", "{sweep}/table.json"], "cannot write {sweep}/table.json: "),
        (["--device", "cpu", "--out", "{folder}"], "--out {folder} is a folder: name a file"),
        (["--device", "tpu"], "device"),
    ],
    ids=str,
)
def test_a_mistake_is_one_line(arguments, message, tmp_path, capsys):
    out = tmp_path / "table.json"
    places = {"out": out, "nothing": tmp_path / "nothing.json", "folder": tmp_path}
    for name, text in {
        "sweep": json.dumps(swept([row("sdpa_flash", 1.0)])),
        "cut": json.dumps(swept([row("sdpa_flash", 1.0)]))[:-5],
        "check": json.dumps({"schema": 1, "kind": "attention_check", "rows": [{}]}),
        "on_cpu": json.dumps(swept([row("sdpa_flash", 1.0)], "cpu")),
    }.items():
        places[name] = tmp_path / f"{name}.json"
        places[name].write_text(text)
    assert cli.main(["tune", *(argument.format(**places) for argument in arguments)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message.format(**places) in line
    assert not out.exists()


def test_without_a_gpu_the_gpu_is_not_measured(capsys):
    if torch.cuda.is_available():
        pytest.skip("torch sees a CUDA device")
    assert cli.main(["tune", "--device", "cuda"]) == 2
    assert "torch sees no CUDA device" in capsys.readouterr().err


def test_a_cache_folder_that_cannot_be_written_is_named_before_anything_is_measured(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FLASHLAB_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(tuning.sweeps, "sweep", lambda **_: pytest.fail("it measured"))
    assert cli.main(["tune", "--device", "cpu"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"cannot write {tmp_path / 'file'}" in line
