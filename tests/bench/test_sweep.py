"""What a sweep does around its measurements; most of it on a worker that only makes them up."""

import json
import os
import signal
from pathlib import Path

import pytest
import yaml
from filelock import FileLock

from flashlab import machine
from flashlab.bench import sweep as module
from flashlab.bench.case import Case
from flashlab.bench.flops import PASSES
from flashlab.bench.measure import ceilings, measure, new_row
from flashlab.bench.sweep import Grid, expand
from flashlab.cli import main
from flashlab.worker import WorkerLost

ROOT = Path(__file__).parents[2]
GRID = {
    "backends": ["standard", "auto"],
    "seqlens": [64, 128],
    "head_dims": [16],
    "dtypes": ["float32"],
    "passes": ["forward", "backward"],
    "hidden": 32,
    "tokens": 128,
}
MACHINE = {"torch": {"version": "2"}, "flash_attn": {}, "cpu": {"model": "A CPU"}}
COMMIT = {"git_commit": "1"}


class MadeUp:
    """A worker without a process: `happens` maps the number of a measurement to what comes of it."""

    started, measured, roofs, happens = 0, 0, 0, {}

    def __init__(self, log):
        type(self).started += 1

    def call(self, function, *arguments, timeout_s, **options):
        if function is ceilings:
            MadeUp.roofs += 1
            return {"matmul_tflops_per_s": float(MadeUp.roofs % 3), "copy_gb_per_s": 1.0}
        assert function is measure
        MadeUp.measured += 1
        what = MadeUp.happens.get(MadeUp.measured)
        if isinstance(what, Exception):
            raise what
        if isinstance(what, signal.Signals):
            os.kill(os.getpid(), what)
        return new_row(*arguments) | {"latency_ms": float(MadeUp.measured)} | (what if isinstance(what, dict) else {})

    def stop(self):
        pass


@pytest.fixture
def made_up(monkeypatch):
    monkeypatch.setattr(module, "Worker", MadeUp)
    monkeypatch.setattr(module, "provenance", lambda kind: {"kind": kind, "image": None, "machine": MACHINE} | COMMIT)
    for name, value in {"started": 0, "measured": 0, "roofs": 0, "happens": {}}.items():
        monkeypatch.setattr(MadeUp, name, value)
    return MadeUp


@pytest.fixture
def run(tmp_path):
    """Sweep a grid, changed as asked, and return the exit code."""

    def run(*arguments, **changes):
        (config := tmp_path / "config.yaml").write_text(yaml.safe_dump({"grids": [GRID | changes], "device": "cpu"}))
        return main(["bench", "sweep", "--config", str(config), "--out", str(tmp_path / "out"), *arguments])

    run.result = lambda: json.loads((tmp_path / "out/sweep.json").read_text())
    run.path = tmp_path / "out/sweep.json"
    return run


def test_a_sweep_measures_in_another_process_and_writes_one_file(run, tmp_path):
    assert run("--budget_ms", "1", backends=["sdpa_flash", "sdpa_cudnn"], masks=["causal", "blocks:0.5"]) == 0
    result = run.result()
    assert (result["schema"], result["kind"]) == (1, "attention_sweep")
    assert set(result["ceilings"]) == {"matmul_tflops_per_s", "copy_gb_per_s"}
    assert {row["algorithm"] for row in result["traffic"]} == {"standard", "tiled", "block_sparse"}
    assert [(row["mask"], row["seqlen"], row["backend"], row["pass"]) for row in result["rows"]] == [
        (mask, seqlen, backend, name)
        for mask in ("causal", "blocks:0.5")
        for seqlen in (64, 128)
        for backend in ("sdpa_flash", "sdpa_cudnn")
        for name in ("forward", "backward")
    ]
    for row in result["rows"]:
        runs = (row["backend"], row["mask"]) == ("sdpa_flash", "causal")
        assert row["status"] == ("ok" if runs else "unsupported")
        assert (row["reason"] is None) == runs == (row["latency_ms"] is not None)
    assert {path.name for path in (tmp_path / "out").iterdir()} - {".lock"} == {"sweep.json", "workers.log"}


def test_a_worker_is_replaced_after_what_could_spoil_the_next_measurement_and_only_then(run, made_up, capsys):
    made_up.happens = {
        2: {"status": "unsupported", "reason": "no"},
        3: {"status": "oom", "reason": "full"},
        5: WorkerLost("its process was ended by SIGSEGV", signal.SIGSEGV),
        6: WorkerLost("its process was ended by SIGKILL", signal.SIGKILL),
        8: WorkerLost("took longer than 3 s"),
    }
    assert run() == 0
    rows = run.result()["rows"]
    assert [row["status"] for row in rows] == ["ok", "unsupported", "oom", "ok", "failed", "oom", "ok", "failed"]
    assert rows[4]["reason"] == "its process was ended by SIGSEGV"
    assert rows[5]["reason"] == "its process was ended by SIGKILL, most likely since memory ran out"
    assert made_up.started == 1 + 3  # the last is not replaced: nothing is left to measure
    assert "3 ok, 2 oom, 2 failed, 1 unsupported" in capsys.readouterr().out


def test_a_wrong_result_is_the_exit_code(run, made_up, capsys):
    made_up.happens = {4: {"status": "wrong", "reason": "dq: error 1, allowed 0.1"}}
    assert run() == 1
    assert "wrong: float32 causal head_dim 16 seqlen 64 auto backward: dq: error 1" in capsys.readouterr().out
    assert run() == 1  # nothing new is measured, and it is still wrong
    assert made_up.measured == 8


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_sweep_resumes_with_what_is_missing(number, run, made_up, capsys):
    made_up.happens = {4: number}
    assert run() == 128 + number
    assert "stopped after 3 of 8" in capsys.readouterr().out
    assert len(run.result()["rows"]) == 3
    assert run() == 0
    rows = run.result()["rows"]
    assert [row["latency_ms"] for row in rows] == [1, 2, 3, *range(5, 10)]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize(
    ("arguments", "changes", "says"),
    [
        (["--budget_ms", "7"], {}, "its config.budget_ms differs"),
        ([], {"seqlens": [64]}, "with measurements that are none of this"),
    ],
)
def test_another_sweep_is_not_added_to(arguments, changes, says, run, made_up, capsys):
    assert run() == 0
    before = run.path.read_bytes()
    assert run(*arguments, **changes) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"is of another sweep, {says}: choose another --out, or measure anew with --resume false" in error
    assert run.path.read_bytes() == before
    assert run("--resume", "false", *arguments, **changes) == 0


def test_a_sweep_may_grow(run, made_up):
    assert run() == 0
    kept = run.result()["rows"]
    assert run(backends=["standard", "sdpa_math", "auto"]) == 0
    rows = run.result()["rows"]
    assert len(rows) == len(kept) * 3 // 2
    assert [row for row in rows if row["backend"] != "sdpa_math"] == kept


def test_rows_of_other_code_or_of_another_machine_are_not_added_to(run, made_up, monkeypatch, capsys):
    assert run() == 0
    for facts, name in ((COMMIT, "git_commit"), (MACHINE, "torch")):
        with monkeypatch.context() as patch:
            patch.setitem(facts, name, "other")
            assert run() == 2
            assert f"{name} differs" in capsys.readouterr().err
    assert run() == 0


def test_the_best_ceilings_of_all_runs_count(run, made_up):
    made_up.happens = {4: signal.SIGINT}
    run()
    assert run.result()["ceilings"]["matmul_tflops_per_s"] == 1.0
    run()  # measured before and after: 2, then 0
    assert (made_up.roofs, run.result()["ceilings"]["matmul_tflops_per_s"]) == (3, 2.0)


def test_a_second_sweep_into_the_same_folder_is_refused(run, made_up, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out/.lock"):
        assert run() == 2
    assert capsys.readouterr().err == (
        f"flashlab: error: {tmp_path / 'out'} is being written by another sweep; wait for it, or choose another --out\n"
    )
    assert made_up.started == 0
    assert not run.path.exists()
    assert run() == 0


def test_a_container_s_share_of_the_cores_compiles_ahead(tmp_path, monkeypatch):
    (tmp_path / "cpu.max").write_text("600000 100000")
    monkeypatch.setattr(machine, "CONTROL_GROUPS", tmp_path)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(64)), raising=False)
    assert module._jobs(None, "cuda") == 3


@pytest.mark.parametrize(
    "option", ["--min_repeats=0", "--max_repeats=0", "--budget_ms=-1", "--timeout_s=0", "--compile_jobs=-1"]
)
def test_a_number_that_means_nothing_is_one_line(option, run, made_up, capsys):
    assert run(option) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert option.partition("=")[0].removeprefix("--") in error
    assert made_up.started == 0


@pytest.mark.parametrize("text", ["", "{", "[]", '{"rows": [{}]}', '{"rows": []}'])
def test_a_damaged_file_is_not_added_to(text, run, made_up, capsys):
    run.path.parent.mkdir()
    run.path.write_text(text)
    assert run() == 2
    assert "sweep.json is no result of a sweep" in capsys.readouterr().err
    assert run.path.read_text() == text


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"backends": ["standart"]}, "did you mean 'standard'"),
        ({"masks": ["casual"]}, "did you mean causal"),
        ({"dtypes": ["bf16"]}, "grid 1: dtypes 'bf16' is none of float16, bfloat16, float32"),
        ({"passes": ["both"]}, "grid 1: passes 'both' is none of forward, backward, forward_backward"),
        ({"num_heads": 2}, "grid 1: give either num_heads or hidden"),
        ({"tokens": None}, "grid 1: give either batch_size or tokens"),
        ({"head_dims": [24]}, "grid 1: hidden 32 is no multiple of 24, one of head_dims"),
        ({"seqlens": [0]}, "must be 1 or more"),
        ({"seqlens": [256]}, "grid 1: tokens 128 is no multiple of 256"),
        ({"num_kv_heads": 3}, "grid 1: num_kv_heads 3 must divide the 2 query heads"),
        ({"backends": []}, "nothing to measure"),
        ({"lengths": [1]}, "'lengths' is not accepted"),
    ],
)
def test_a_grid_that_means_nothing_is_one_line(changes, says, run, made_up, capsys):
    assert run(**changes) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert says in error
    assert made_up.started == 0
    assert not run.path.exists()


def test_a_sweep_of_nothing_names_the_examples(capsys):
    assert main(["bench", "sweep"]) == 2
    assert "examples/attention_bench" in capsys.readouterr().err


def test_what_stands_in_two_grids_is_measured_once():
    grid = Grid(backends=["standard"], seqlens=[64, 128], num_heads=2, batch_size=1)
    other = Grid(backends=["standard", "sdpa_flash"], seqlens=[128], num_heads=2, batch_size=1)
    cells = expand([grid, other], "cpu")
    assert len(cells) == len(set(cells)) == 3 * len(PASSES)


def test_kernels_are_compiled_ahead_by_several_workers(tmp_path, monkeypatch):
    """flash-attn 4's of all lengths by one, flex_attention's apart, gradients apart; a lost worker is no harm."""
    shares, workers = [], []

    class Compiling:
        def __init__(self, log):
            self.connection, self.alive = object(), True
            workers.append(self)

        def send(self, function, share):
            self.share = share

        def receive(self):
            shares.append(self.share)
            if len(shares) == 2:
                raise WorkerLost("gone")

        def stop(self):
            self.alive = False

    monkeypatch.setattr(module, "Worker", Compiling)
    monkeypatch.setattr(module, "wait", lambda connections, timeout: connections[:1])
    backends = ["standard", "flash_attention_4", "flex_attention"]
    cells = [
        module.Cell(Case(1, seqlen, 2, 2, 64, "bfloat16", "causal", "cuda"), backend, name)
        for seqlen in (512, 1024)
        for backend in backends
        for name in PASSES
    ]
    with module._progress(module.Console(quiet=True)) as progress:
        module._compile_ahead(cells, tmp_path, 2, progress)
    assert sorted(len(share) for share in shares) == [1, 1, 2, 2, 2, 4]
    assert {cell for share in shares for cell in share} == {cell for cell in cells if cell.backend != "standard"}
    assert len(workers) == 3
    assert not any(worker.alive for worker in workers)


@pytest.mark.parametrize("path", sorted(ROOT.glob("examples/attention_bench/*.yaml")), ids=lambda path: path.name)
def test_an_example_is_a_sweep(path):
    grids = [Grid(**grid) for grid in yaml.safe_load(path.read_text())["grids"]]
    cells = expand(grids, "cpu")
    assert any(cell.backend == "standard" for cell in cells)
