"""`flashlab bench`: measures one attention call, with a course lab's flags and result file."""

import json
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from flashlab.attention import resolve
from flashlab.bench.case import Case
from flashlab.bench.flops import PASSES
from flashlab.bench.measure import METHOD, WARMUP_CALLS, Row, measure
from flashlab.errors import UserError, write_text
from flashlab.machine import choose_device, provenance

FIGURES = {  # what is printed -> its key in a row
    "ms": "latency_ms",
    "p10": "latency_ms_p10",
    "p90": "latency_ms_p90",
    "TFLOP/s": "tflops_per_s",
    "peak MiB": "peak_memory_mib",
    "error ratio": "error_ratio",
}
LAB_NAMES = {"Pytorch": "standard", "Flash2": "flash_attention_2"}


def bench(
    *,
    batch_size: int | None = None,
    seq_len: int = 1024,
    num_heads: int = 32,
    emb_dim: int = 2048,
    impl: str = "auto",
    causal: bool = False,
    repeats: int = 30,
    output: Path = Path("benchmark_result.json"),
    dtype: Literal["auto", "float16", "bfloat16", "float32"] = "auto",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    num_kv_heads: int | None = None,
    warmup: int = WARMUP_CALLS,
) -> int:
    """Measure one attention call, forward and backward: time, TFLOP/s and memory, once it was found right.

    Args:
        batch_size: sequences; by default 32, and 1 on a CPU.
        seq_len: length of queries and keys.
        num_heads: query heads; they divide emb_dim.
        emb_dim: num_heads times the head dimension.
        impl: Pytorch (standard attention), Flash2 (flash-attn 2), a key of `flashlab backends`, or auto.
        causal: let a query see no later key.
        repeats: timed calls of each pass; the median counts.
        output: result file, JSON.
        dtype: auto is bfloat16 on a GPU and float32 on a CPU.
        device: auto is the GPU if there is one.
        num_kv_heads: key/value heads; as many as query heads if not given.
        warmup: calls before the timed ones.
    """
    for name, value in {"seq_len": seq_len, "num_heads": num_heads, "emb_dim": emb_dim, "repeats": repeats}.items():
        if value < 1:
            raise UserError(f"--{name} must be 1 or more; got {value}")
    if emb_dim % num_heads:
        raise UserError(f"--num_heads must divide --emb_dim; {num_heads} does not divide {emb_dim}")
    if not output.parent.is_dir():
        raise UserError(f"--output {output}: there is no folder {output.parent}; make it, or choose another")
    if output.is_dir():
        raise UserError(f"--output {output} is a folder: name a file")
    place = choose_device(device)
    if batch_size is None:
        batch_size = 32 if place == "cuda" else 1
    if batch_size < 1:
        raise UserError(f"--batch_size must be 1 or more; got {batch_size}")
    kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    if kv_heads < 1 or num_heads % kv_heads:
        raise UserError(f"--num_kv_heads must divide --num_heads; {kv_heads} does not divide {num_heads}")
    if dtype == "auto":
        dtype = "bfloat16" if place == "cuda" else "float32"
    mask = "causal" if causal else "full"
    case = Case(batch_size, seq_len, num_heads, kv_heads, emb_dim // num_heads, dtype, mask, place)
    backend = LAB_NAMES.get(impl, impl)
    resolve(backend, case.spec(needs_grad=False))  # a backend that cannot run at all is the user's to change
    console = Console(highlight=False)
    rows = {}
    for name in PASSES:
        with console.status(f"{backend}: {name}"):
            rows[name] = measure(case, backend, name, min_repeats=repeats, max_repeats=repeats, warmup=warmup)
    write_text(output, json.dumps(result(case, rows), indent=2) + "\n")
    _print(console, case, rows)
    console.print(f"wrote {escape(str(output))}", soft_wrap=True)
    return int(any(row["status"] in ("wrong", "failed") for row in rows.values()))


def result(case: Case, rows: dict[str, Row]) -> dict[str, Any]:
    """Return the course lab's result, and all else under the key "flashlab"; what was not measured is null."""
    report: dict[str, Any] = {
        name: {"time(s)": _scaled(row["latency_ms"], 1e-3), "FLOPS(TFLOPs/s)": row["tflops_per_s"]}
        for name, row in rows.items()
    }
    peak = rows["forward_backward"]["peak_memory_mib"]
    report["peak_memory_usage(MB)"] = None if peak is None else peak + case.input_bytes(with_grad_out=True) / 2**20
    method = METHOD | {
        "peak_memory_usage(MB)": "of forward_backward, in MiB, with q, k, v and the output's gradient; none on a CPU"
    }
    report["flashlab"] = {**provenance("attention_bench"), "method": method, "rows": list(rows.values())}
    return report


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _print(console: Console, case: Case, rows: dict[str, Row]) -> None:
    resolved = " / ".join(dict.fromkeys(row["resolved"] for row in rows.values()))
    shape = f"{case.batch_size} x {case.seqlen}, {case.num_heads} heads of {case.head_dim}, {case.dtype}, {case.mask}"
    table = Table("pass", title=f"{resolved}: {shape}", title_justify="left")
    for name in rows:  # a column each, since they are few, and so fit a narrow terminal
        table.add_column(name, justify="right", overflow="fold")
    for what, key in FIGURES.items():
        values = (row[key] for row in rows.values())
        table.add_row(what, *("-" if value is None else f"{value:.4g}" for value in values))
    console.print(table)
    troubles: dict[str, list[str]] = {}
    for name, row in rows.items():
        if row["status"] != "ok":
            troubles.setdefault(f"{STATUSES[row['status']]}: {escape(row['reason'])}", []).append(name)
    for trouble, names in troubles.items():
        console.print(f"{', '.join(names)}: {trouble}", soft_wrap=True)


STATUSES = {"oom": "out of memory", "unsupported": "unsupported", "failed": "failed", "wrong": "WRONG, not timed"}
