"""Measure what `flashlab.attention.attention` adds, in microseconds, to calling a backend's own function."""

import shlex
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jsonargparse.typing import PositiveInt
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flashlab.attention import attention
from flashlab.attention.backends import BACKENDS, why_not
from flashlab.attention.spec import AttentionSpec, Options
from flashlab.cli import script
from flashlab.errors import UserError, check_writable, one_line
from flashlab.machine import choose_device, provenance, write_result

SHAPE = {"batch_size": 1, "seqlen_q": 1, "seqlen_k": 128, "num_heads": 8, "head_dim": 64}  # one token of decoding
KERNELS = {
    "sdpa_math": SDPBackend.MATH,
    "sdpa_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa_flash": SDPBackend.FLASH_ATTENTION,
    "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
}
METHOD = {
    "direct": "flash_attn_func of flash-attn 2, 3 and 4; torch's scaled_dot_product_attention with transposed inputs "
    "and the kernel chosen by sdpa_kernel; for other backends their row of the table of backends",
    "times": "on a GPU the time until the calls are queued, on a CPU until they are done; the median over rounds that "
    "take direct and interface in turn; the overhead is the median of the differences within a round",
    "compiled": "torch.compile with fullgraph, which a graph break or an operation that torch cannot trace would fail",
    "synchronises": "whether torch.cuda's sync debug mode sees the call wait for the GPU",
}


def overhead(
    *,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    backends: list[str] | None = None,
    rounds: PositiveInt = 30,
    calls: PositiveInt = 100,
    compiled: bool = True,
    json: Path | None = None,
) -> None:
    """Print what the interface adds to each backend that runs here, directly and under torch.compile.

    It takes about three minutes on two CPU cores, most of them for flex_attention; fewer backends take less.

    Args:
        device: auto is the GPU if there is one.
        backends: those to measure; by default all that run here.
        rounds: how often both are timed; the medians count.
        calls: calls in a round.
        compiled: measure under torch.compile too, which compiles for seconds.
        json: file to write the figures to.
    """
    for name in backends or []:
        if name not in BACKENDS:
            raise UserError(f"--backends: there is no {name!r}; there are {', '.join(BACKENDS)}")
    if json:
        check_writable("--json", json)
    place = torch.device(choose_device(device))
    dtype = torch.bfloat16 if place.type == "cuda" else torch.float32
    spec = AttentionSpec(
        **SHAPE, num_kv_heads=SHAPE["num_heads"], dtype=dtype, device=torch.empty(0, device=place).device
    )
    names = [name for name in backends or BACKENDS if why_not(name, spec) is None]
    rows = []
    with torch.no_grad():
        for name in names:
            print(f"{name} ...", file=sys.stderr)
            rows.append(measure(name, inputs(spec), rounds, calls, compiled))
    show(rows, place)
    if json:
        command = shlex.join(["python", "examples/attention_bench/overhead.py", *sys.argv[1:]])
        config = {"shape": SHAPE, "dtype": str(dtype).removeprefix("torch."), "rounds": rounds, "calls": calls}
        result = provenance("attention_overhead") | {"command": command, "method": METHOD, "config": config}
        write_result(json, result | {"rows": rows})


def inputs(spec: AttentionSpec) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.randn(spec.batch_size, spec.seqlen_q, spec.num_heads, spec.head_dim, device=spec.device, dtype=spec.dtype)
    k, v = (torch.randn(1, spec.seqlen_k, *q.shape[2:], device=spec.device, dtype=spec.dtype) for _ in range(2))
    return q, k, v


def direct_function(name: str, head_dim: int) -> Callable[..., Tensor]:
    """Return what somebody would call without this package."""
    if name in KERNELS:

        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(KERNELS[name]):
                out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
            return out.transpose(1, 2)

        return call
    if name == "flash_attention_2":
        from flash_attn import flash_attn_func
    elif name == "flash_attention_3":
        from flash_attn_interface import flash_attn_func
    elif name == "flash_attention_4":
        from flash_attn.cute import flash_attn_func
    else:
        return partial(BACKENDS[name].run, options=Options(softmax_scale=head_dim**-0.5))
    return flash_attn_func


def measure(name: str, tensors: tuple[Tensor, ...], rounds: int, calls: int, compiled: bool) -> dict[str, Any]:
    """Time one backend both ways; what fails is said in `reason`."""
    direct, interface = direct_function(name, tensors[0].shape[-1]), partial(attention, backend=name)
    row: dict[str, Any] = {"backend": name, "status": "ok", "reason": None}
    row |= times("", direct, interface, tensors, rounds, calls)
    row["synchronises"] = synchronises(interface, tensors)
    if not compiled:
        return row
    try:
        whole = torch.compile(lambda q, k, v: interface(q, k, v), fullgraph=True)
        whole(*tensors)
        row["synchronises_compiled"] = synchronises(whole, tensors)
    except Exception as error:
        return row | {"status": "failed", "reason": one_line(error)}
    try:
        compiled_direct = torch.compile(lambda q, k, v: direct(q, k, v), fullgraph=True)
        row |= times("compiled_", compiled_direct, whole, tensors, rounds, calls)
    except Exception as error:  # a package's own function may not be one that torch can trace
        row |= {"compiled_interface_us": median(seconds(whole, tensors, calls) for _ in range(rounds)) * 1e6}
        row["reason"] = f"its own function does not compile: {one_line(error)}"
    return row


def times(
    prefix: str, direct: Callable, interface: Callable, tensors: tuple[Tensor, ...], rounds: int, calls: int
) -> dict[str, float]:
    for call in (direct, interface, direct, interface):
        seconds(call, tensors, 5)
    pairs = [(seconds(direct, tensors, calls), seconds(interface, tensors, calls)) for _ in range(rounds)]
    return {
        f"{prefix}direct_us": median(first for first, _ in pairs) * 1e6,
        f"{prefix}interface_us": median(second for _, second in pairs) * 1e6,
        f"{prefix}overhead_us": median(second - first for first, second in pairs) * 1e6,
    }


def seconds(call: Callable, tensors: tuple[Tensor, ...], calls: int) -> float:
    """Return the time of one of several calls; what they left in a GPU's queue is waited for untimed."""
    start = perf_counter()
    for _ in range(calls):
        call(*tensors)
    taken = perf_counter() - start
    if tensors[0].is_cuda:
        torch.cuda.synchronize()
    return taken / calls


def synchronises(call: Callable, tensors: tuple[Tensor, ...]) -> bool | None:
    if not tensors[0].is_cuda:
        return None
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(*tensors)
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def show(rows: list[dict[str, Any]], device: torch.device) -> None:
    table = Table(title=f"microseconds a call, {device}", title_justify="left", box=None)
    table.add_column("backend", no_wrap=True)
    columns = ("direct_us", "interface_us", "overhead_us")
    for column in (*columns, *(f"compiled_{name}" for name in columns)):
        table.add_column(column.removesuffix("_us").replace("_", "\n"), justify="right", overflow="fold")
    for row in rows:
        values = (row.get(f"{prefix}{name}") for prefix in ("", "compiled_") for name in columns)
        table.add_row(row["backend"], *("-" if value is None else f"{value:.1f}" for value in values))
    console = Console(highlight=False)
    console.print(table)
    for row in rows:
        if row["reason"]:
            console.print(f"{row['backend']}: {row['reason']}", markup=False, soft_wrap=True)


if __name__ == "__main__":
    script(overhead)
