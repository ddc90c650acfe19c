"""`flashlab tune`: ranks the backends on this machine, and keeps the ranking for `auto`."""

import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table

from flashlab.attention import auto
from flashlab.bench import sweep as sweeps
from flashlab.bench.analysis import read
from flashlab.bench.sweep import Grid
from flashlab.errors import UserError, check_writable
from flashlab.machine import choose_device, write_result

Facts = dict[str, Any]
Row = dict[str, Any]

PASSES = {False: "forward", True: "forward_backward"}  # needs_grad -> the pass that it is ranked by
# What is measured. On a GPU standard attention is never the fastest, and runs out of memory instead.
LENGTHS = {"cuda": [512, 1024, 2048, 4096, 8192, 16384], "cpu": [128, 512, 2048]}
QUICK_LENGTHS = {"cuda": [512, 2048, 8192], "cpu": [512]}
GRIDS: dict[str, dict[str, Any]] = {
    "cuda": {
        "backends": [name for name in auto.ORDER["cuda"] if name not in auto.LAST],
        "dtypes": ["bfloat16"],
        "head_dims": [64, 128, 256],
        "tokens": 16384,
        "hidden": 2048,
    },
    "cpu": {
        "backends": list(auto.ORDER["cpu"]),
        "dtypes": ["float32", "bfloat16"],
        "head_dims": [64, 128],
        "tokens": 2048,
        "hidden": 256,
    },
}


def tune(
    *,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    quick: bool = False,
    sweep: Path | None = None,
    check: Path | None = None,
    out: Path | None = None,
) -> int:
    """Measure once which attention backend is fastest on this machine, so that `auto` knows.

    The answer is kept in the user's cache folder, for this device and these versions of torch, CUDA and flash-attn.
    Stopped, the same command measures what is missing; until then nothing changes.

    Args:
        device: auto is the GPU if there is one.
        quick: measure fewer lengths.
        sweep: measure nothing; take the figures of this result of `flashlab bench sweep`.
        check: leave out what this result of `flashlab check` calls wrong.
        out: write the table to this file; with a sweep it has to be named.
    """
    if sweep is not None and out is None:
        raise UserError("--sweep: name the table to write with --out")
    place: Any = choose_device(device) if sweep is None else "cuda"
    path = out or auto.tuned_path(torch.device(place))
    checked = read(check, "attention_check", "flashlab check --json")["rows"] if check else []
    check_writable("--out", path)
    measured = path.with_name(f".{path.name}.tune")  # a name that nobody gives a sweep of their own
    if sweep is None and (code := _measure(place, quick, measured)) > 1:
        return code
    found = read(sweep or measured / sweeps.FILE, "attention_sweep", "flashlab bench sweep")
    facts = {"schema": auto.SCHEMA, "kind": auto.KIND, **_origin(found, None if sweep else torch.device(place))}
    facts |= {"rows": rank(found["rows"]), "wrong": wrong([*found["rows"], *checked])}
    write_result(path, facts)
    auto.forget()
    if sweep is None:
        shutil.rmtree(measured, ignore_errors=True)
    _print(facts)
    print(f"wrote {path}")
    return 0


def _measure(device: Any, quick: bool, out: Path) -> int:
    """Sweep over what auto may choose from; what an interrupted run of the same command left is kept."""
    grid = Grid(
        seqlens=(QUICK_LENGTHS if quick else LENGTHS)[device],
        masks=["full", "causal"],
        passes=list(PASSES.values()),
        **GRIDS[device],
    )
    try:
        return sweeps.sweep(grids=[grid], out=out, device=device)
    except UserError:  # of another command or commit, or damaged
        return sweeps.sweep(grids=[grid], out=out, device=device, resume=False)


def _origin(found: Facts, device: torch.device | None) -> Facts:
    """Say what was measured where: on this device, or on the GPU of a sweep."""
    gpus = found["machine"]["torch"]["gpus"]
    on_gpu = found["config"]["device"] == "cuda"
    if device is None and not on_gpu:
        raise UserError("--sweep: it was measured on a CPU, and only GPUs have tables that come with the package")
    origin = {name: found[name] for name in ("command", "git_commit", "image", "machine", "method", "config")}
    key = {"device": gpus[0]["name"]} if device is None else auto.device_key(device)
    return {**origin, "key": key, "capability": gpus[0]["capability"] if on_gpu else None}


def rank(rows: list[Row]) -> list[Row]:
    """Rank the backends of each plain call by their times, the fastest first.

    Without gradients the forward pass counts; with gradients forward and backward together, measured at once where the
    rows have that, else as a sum. Only what ran and was right is ranked, and of several batch sizes the first.

    Returns:
        Rows of dtype, head_dim, mask, needs_grad, seqlen and backends: each with its time in units of the fastest's.
    """
    times: dict[tuple[Any, ...], dict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        plain = row["mask"] in ("full", "causal") and row["num_heads"] == row["num_kv_heads"]
        if plain and row["status"] == "ok" and row["backend"] in auto.ORDER["cuda"]:
            cell = times[row["dtype"], row["head_dim"], row["mask"], row["seqlen"]]
            cell[row["pass"]].setdefault(row["backend"], row["latency_ms"])
    ranked = []
    for (dtype, head_dim, mask, seqlen), passes in times.items():
        for needs_grad, pass_name in PASSES.items():
            forward, backward = passes["forward"], passes["backward"]
            summed = {name: forward[name] + backward[name] for name in forward if name in backward}
            of_pass = passes[pass_name] or (summed if needs_grad else {})
            if of_pass:
                fastest = min(of_pass.values())
                order = sorted(of_pass, key=of_pass.__getitem__)
                ratios = {name: round(of_pass[name] / fastest, 4) for name in order}
                key = {"dtype": dtype, "head_dim": head_dim, "mask": mask, "needs_grad": needs_grad, "seqlen": seqlen}
                ranked.append({**key, "backends": ratios})
    return ranked


def wrong(rows: list[Row]) -> list[Row]:
    """List the backends that were wrong, with the dtype and head dimension where auto must never choose them."""
    found = {
        (row.get("resolved") or row["backend"], row["dtype"], row["head_dim"])
        for row in rows
        if row["status"] == "wrong"
    }
    return [{"backend": name, "dtype": dtype, "head_dim": head_dim} for name, dtype, head_dim in sorted(found)]


def _print(facts: Facts) -> None:
    columns = ("dtype", "head_dim", "mask", "gradients", "seqlen", "auto", "next")
    table = Table(*columns, title=facts["key"]["device"], box=None)
    for row in facts["rows"]:
        times = row["backends"]
        leading = [name for name in times if auto.may_lead(name, row["seqlen"], row["head_dim"])] or list(times)
        others = [f"{name} x{time / times[leading[0]]:.2f}" for name, time in times.items() if name != leading[0]]
        cell = row["dtype"], row["head_dim"], row["mask"], "yes" if row["needs_grad"] else "no", row["seqlen"]
        table.add_row(*map(str, cell), leading[0], *others[:1])
    console = Console()
    console.print(table, "x1.50: takes 1.5 times as long", highlight=False)
    for row in facts["wrong"]:
        console.print(
            "never {backend} with {dtype} at head_dim {head_dim}: it was wrong".format(**row), highlight=False
        )
