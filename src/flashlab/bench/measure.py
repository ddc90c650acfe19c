"""Measure one pass of one backend on one case: compare it with the reference first, then its memory, then time it."""

import gc
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import lru_cache, partial
from itertools import product
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._functorch import config as functorch_config

from flashlab.attention import attention, resolve
from flashlab.attention.interface import BackendUnavailable
from flashlab.bench.case import DTYPES, Case
from flashlab.bench.compare import Verdict, compare
from flashlab.errors import UserError, is_out_of_memory, one_line

Row = dict[str, Any]

WARMUP_CALLS = 3
CALLS_IN_A_ROW = 20  # queued ahead of the GPU at a time: a launch queue holds about 1000 kernels
LONGEST_HEAD_START_MS = 50.0
# Of the products and the copy that a device's ceilings are measured by: rows of the square matrices, and bytes.
CEILING_SIZES = {"cuda": ((4096, 8192, 16384), 2**30), "cpu": ((256, 512, 1024), 2**27)}
CEILING_MOMENTS = 3

# What a result file says about how its numbers came about.
METHOD = {
    "compare": "the full-size output, and the gradients where a backward pass is timed, of the same inputs, on 2 to 8 "
    "(batch entry, key/value head) slices, against float64 standard attention: the error may be twice that of standard "
    "attention in the same dtype plus rounding; all entries finite; wrong is not timed",
    "inputs": "standard normal, [batch, seqlen, heads, head_dim], contiguous",
    "passes": "forward: without gradients; backward: of a kept graph, dq, dk and dv; forward_backward: both",
    "timing_cuda": "device events around each call; calls are queued while the GPU is held busy, so launches do not "
    "count; before each call a buffer of twice the L2 cache is read, so that inputs come from memory",
    "timing_cpu": "perf_counter around each call, caches warm",
    "quantiles": "latency_ms is the median, p10 and p90 beside it",
    "flops": "4 * batch * seqlen^2 * heads * head_dim, half if causal, window and block masks by their visible share; "
    "backward 2.5 times, both 3.5 times",
    "ceilings": "of square matrix products in the sweep's dtypes, and of copies larger than the caches: the fastest "
    "call, of several sizes at several moments, at the start and at the end",
    "peak_memory_mib": "the most that torch had allocated during one call, less q, k, v and, where there is a backward "
    "pass, the output's gradient; the output counts, and for the backward pass what the forward pass keeps",
}


def measure(
    case: Case,
    backend: str,
    pass_name: str = "forward",
    *,
    budget_ms: float = 150.0,
    min_repeats: int = 5,
    max_repeats: int = 100,
    warmup: int = WARMUP_CALLS,
) -> Row:
    """Measure one pass of one backend on one case.

    Args:
        case: The workload.
        backend: A key of `flashlab.attention.backends.BACKENDS`, or "auto".
        pass_name: "forward", "backward" or "forward_backward".
        budget_ms: Time to spend on timing; as many calls as fit in it are timed ...
        min_repeats: ... but no fewer than this,
        max_repeats: and no more than this.
        warmup: Calls before the first that counts.

    Returns:
        A row of the result file. `status` is "ok", "unsupported" (the backend refuses), "wrong" (off by more than the
        reference allows; not timed), "oom" or "failed"; `reason` says more.

    Raises:
        UserError: no backend or no mask has this name.
    """
    row = new_row(case, backend, pass_name)
    needs_grad = pass_name != "forward"
    # torch.compile's kernels may free what they saved during a backward pass; here the graph is kept to run it again.
    with functorch_config.patch(donated_buffer=False):
        try:
            row["resolved"] = resolve(backend, case.spec(needs_grad=needs_grad))
            verdict = _verdict(case, backend, needs_grad)
            row["error_ratio"] = verdict.error_ratio
            if verdict.wrong is not None:
                return row | {"status": "wrong", "reason": verdict.wrong}
            prepare = partial(_prepare, case, backend, pass_name)
            row["peak_memory_mib"] = _peak_memory_mib(case, prepare, pass_name)
            latencies = _TIMERS[case.device](prepare(), budget_ms, min_repeats, max_repeats, warmup)
        except BackendUnavailable as error:
            row |= {"status": "unsupported", "reason": str(error).partition(": ")[2]}
        except UserError:
            raise
        except Exception as error:
            row |= {"status": "oom" if is_out_of_memory(error) else "failed", "reason": one_line(error)}
        else:
            p10, median, p90 = np.percentile(latencies, [10, 50, 90]).tolist()
            row |= {"latency_ms": median, "latency_ms_p10": p10, "latency_ms_p90": p90, "repeats": len(latencies)}
            row["tflops_per_s"] = case.flops(pass_name) / median / 1e9
    if row["status"] in ("oom", "failed"):
        release_memory()
    return row


def new_row(case: Case, backend: str, pass_name: str, status: str = "ok", reason: str | None = None) -> Row:
    """Return a row of the result file with nothing measured."""
    return {
        "backend": backend,
        "resolved": backend,
        "dtype": case.dtype,
        "head_dim": case.head_dim,
        "num_heads": case.num_heads,
        "num_kv_heads": case.num_kv_heads,
        "batch_size": case.batch_size,
        "seqlen": case.seqlen,
        "mask": case.mask,
        "pass": pass_name,
        "status": status,
        "reason": reason,
        "latency_ms": None,
        "latency_ms_p10": None,
        "latency_ms_p90": None,
        "repeats": None,
        "tflops_per_s": None,
        "peak_memory_mib": None,
        "error_ratio": None,
    }


def release_memory() -> None:
    """Give back what a failed call left behind."""
    _buffer.cache_clear()
    gc.collect()
    with suppress(Exception):  # after some errors a GPU answers every call with the same error
        torch.cuda.empty_cache()


@lru_cache(maxsize=4)  # backward and forward_backward of a case are judged once
def _verdict(case: Case, backend: str, needs_grad: bool) -> Verdict:
    return compare(case, partial(attention, backend=backend, **case.mask_arguments()), needs_grad=needs_grad)


def _prepare(case: Case, backend: str, pass_name: str) -> Callable[[], Any]:
    """Return the call that is timed; for the backward pass its graph is built here, once."""
    q, k, v, grad_out = case.inputs()
    run: Callable[..., Tensor] = partial(attention, backend=backend, **case.mask_arguments())
    if pass_name == "forward":

        def forward() -> Tensor:
            with torch.no_grad():
                return run(q, k, v)

        return forward
    leaves = [x.requires_grad_() for x in (q, k, v)]
    if pass_name == "backward":
        return partial(torch.autograd.grad, run(*leaves), leaves, grad_out, retain_graph=True)
    return lambda: torch.autograd.grad(run(*leaves), leaves, grad_out)


def _peak_memory_mib(case: Case, prepare: Callable[[], Callable[[], Any]], pass_name: str) -> float | None:
    """Return the largest memory allocated during one call, less what stood before it; a CPU keeps no such count."""
    if case.device != "cuda":
        return None
    before = torch.cuda.memory_allocated()
    call = prepare()
    if pass_name == "backward":
        torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    inputs = case.input_bytes(with_grad_out=pass_name != "forward")
    return (torch.cuda.max_memory_allocated() - before - inputs) / 2**20


def _time_cpu(
    call: Callable[[], Any], budget_ms: float, min_repeats: int, max_repeats: int, warmup: int
) -> list[float]:
    def timed() -> float:
        start = perf_counter()
        call()
        return 1e3 * (perf_counter() - start)

    for _ in range(warmup - 1):
        timed()
    repeats = _repeats(timed(), budget_ms, min_repeats, max_repeats)
    return [timed() for _ in range(repeats)]


def _time_cuda(
    call: Callable[[], Any], budget_ms: float, min_repeats: int, max_repeats: int, warmup: int
) -> list[float]:
    """Time calls that wait in the GPU's queue, so that it never waits for Python between two kernels of a call."""
    flush = _buffer(2 * torch.cuda.get_device_properties().L2_cache_size)

    def enqueue(count: int) -> tuple[list[tuple[torch.cuda.Event, torch.cuda.Event]], float]:
        events, start = [], perf_counter()
        for _ in range(count):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            flush.sum()  # reading leaves nothing that would have to be written back during the call
            begin.record()
            call()
            end.record()
            events.append((begin, end))
        return events, 1e3 * (perf_counter() - start)

    for _ in range(warmup):
        call()
    torch.cuda.synchronize()
    start = perf_counter()
    _, host_ms = enqueue(1)
    torch.cuda.synchronize()
    remaining = _repeats(1e3 * (perf_counter() - start), budget_ms, min_repeats, max_repeats)
    latencies: list[float] = []
    while remaining:
        count = min(remaining, CALLS_IN_A_ROW)
        _keep_busy(min(1.5 * count * host_ms + 0.5, LONGEST_HEAD_START_MS))
        events, _ = enqueue(count)
        torch.cuda.synchronize()
        latencies += [begin.elapsed_time(end) for begin, end in events]
        remaining -= count
    return latencies


_TIMERS = {"cpu": _time_cpu, "cuda": _time_cuda}


def _repeats(call_ms: float, budget_ms: float, min_repeats: int, max_repeats: int) -> int:
    return max(min(int(budget_ms / call_ms), max_repeats), min_repeats)


@lru_cache(maxsize=1)
def _buffer(size: int) -> Tensor:
    return torch.zeros(size // 4, dtype=torch.float32, device="cuda")


def _keep_busy(milliseconds: float) -> None:
    """Let the GPU spin while calls are queued behind it."""
    torch.cuda._sleep(int(milliseconds * _cycles_per_ms()))


@lru_cache(maxsize=1)
def _cycles_per_ms() -> float:
    cycles = 10_000_000
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(1000)
    begin.record()
    torch.cuda._sleep(cycles)
    end.record()
    torch.cuda.synchronize()
    return cycles / begin.elapsed_time(end)


def rehearse(cells: list[tuple[Case, str, str]]) -> None:
    """Run cells (case, backend, pass) once, so that what their kernels compile to lies in the caches on the disk."""
    with functorch_config.patch(donated_buffer=False):
        for case, backend, pass_name in cells:
            _prepare(case, backend, pass_name)()


def ceilings(device: str, dtypes: Sequence[str]) -> dict[str, float]:
    """Measure what this device gives at most: TFLOP/s of matrix products and GB/s of copies.

    The fastest call counts, over some sizes and dtypes, each at several moments: whatever else runs on the machine only
    ever makes calls slower. Random data; a copied byte counts twice, since it is read and written.

    Args:
        device: "cpu" or "cuda".
        dtypes: Of the products; those of a sweep.
    """
    sizes, copied = CEILING_SIZES[device]
    if device == "cpu":  # which multiplies float16 up to a hundred times slower: seconds for each product
        dtypes = sorted({"float32" if dtype == "float16" else dtype for dtype in dtypes})
    source = torch.randn(copied // 4, device=device)
    target = torch.empty_like(source)
    pairs = [
        [torch.randn(size, size, device=device).to(DTYPES[dtype]) for _ in range(2)]
        for size, dtype in product(sizes, dtypes)
    ]

    def fastest_ms(call: Callable[[], Any]) -> float:
        return min(_TIMERS[device](call, 60.0, 3, 100, 1))

    tflops_per_s, gb_per_s = 0.0, 0.0
    for _ in range(CEILING_MOMENTS):
        for a, b in pairs:
            tflops_per_s = max(tflops_per_s, 2 * len(a) ** 3 / fastest_ms(partial(torch.mm, a, b)) / 1e9)
        gb_per_s = max(gb_per_s, 2 * source.nbytes / fastest_ms(partial(target.copy_, source)) / 1e6)
    return {"matmul_tflops_per_s": tflops_per_s, "copy_gb_per_s": gb_per_s}
