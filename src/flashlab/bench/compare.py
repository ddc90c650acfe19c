"""Judge a backend's full-size output and gradients on some heads of some batch entries, before it is timed.

Heads do not touch each other, so one (batch entry, key/value head) with the query heads that read it is a problem of
its own. Standard attention, which judges it, needs the scores of these heads alone, in blocks of queries, and so fits
at any length.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from flashlab.attention import reference
from flashlab.attention.spec import BLOCK_SIZE, Options
from flashlab.bench.case import Case

BLOCK_BYTES = 2**29  # what the scores of a block of queries take; computing them takes several times that
MOST_SCORES = {"cuda": 2**29, "cpu": 2**25}  # in all slices together
FEWEST_SLICES, MOST_SLICES = 2, 8
TENSORS = ("out", "dq", "dk", "dv")


class Verdict(NamedTuple):
    """What the comparison found.

    Attributes:
        error_ratio: The largest error in units of the allowed one, over the compared tensors; None if it is no number.
        wrong: Which tensor is off, with its error and the allowed one, or None when all are right.
    """

    error_ratio: float | None
    wrong: str | None


class _Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    grad_out: Tensor


class _Judged(NamedTuple):
    """Some slice's exact tensors, and the error that each may have."""

    batch: int
    kv_head: int
    exact: tuple[Tensor, ...]
    allowed: tuple[float, ...]


def compare(case: Case, run: Callable[..., Tensor], *, needs_grad: bool) -> Verdict:
    """Run a backend once at full size and judge it, by the rule of `reference.allowed_error`.

    Args:
        case: The workload.
        run: ``run(q, k, v) -> out``.
        needs_grad: Judge dq, dk and dv too.
    """
    q, k, v, grad_out = case.inputs()
    with torch.set_grad_enabled(needs_grad):
        got = _out_and_gradients(run, q, k, v, grad_out) if needs_grad else (run(q, k, v),)
    worst = 0.0
    for name, x in zip(TENSORS, got, strict=False):
        if not bool(torch.isfinite(x).all()):
            return Verdict(None, f"{name} has entries that are NaN or infinite")
    for judged in _judge(case, needs_grad):
        groups = case.num_heads // case.num_kv_heads
        for index, (name, x) in enumerate(zip(TENSORS, got, strict=False)):
            heads = _heads(judged.kv_head, groups if name in ("out", "dq") else 1)
            exact, allowed = judged.exact[index], judged.allowed[index]
            error = float((x[judged.batch, :, heads] - exact).abs().max())
            if not error <= allowed:
                place = f"batch entry {judged.batch}, key/value head {judged.kv_head}"
                return Verdict(error / allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g} ({place})")
            worst = max(worst, error / allowed)
    return Verdict(worst, None)


@lru_cache(maxsize=2)  # a sweep takes the backends of one case in turn
def _judge(case: Case, needs_grad: bool) -> tuple[_Judged, ...]:
    """Compute the exact tensors of some slices, and what standard attention in the case's dtype makes of them."""
    whole = case.inputs()
    options, groups = case.options(), case.num_heads // case.num_kv_heads
    pairs = case.batch_size * case.num_kv_heads
    count = MOST_SCORES[case.device] // (groups * case.seqlen**2)
    count = min(max(count, FEWEST_SLICES), MOST_SLICES, pairs)
    judged = []
    for index in range(count):  # from the first to the last, evenly
        batch, kv_head = divmod(round(index * (pairs - 1) / max(count - 1, 1)), case.num_kv_heads)
        of_q, of_kv = _heads(kv_head, groups), _heads(kv_head, 1)
        part = _Inputs(*(x[batch, None, :, heads] for x, heads in zip(whole, (of_q, of_kv, of_kv, of_q), strict=True)))
        exact = _standard(_Inputs(*(x.double() for x in part)), options, needs_grad)
        standard = _standard(part, options, needs_grad)
        largest = _largest_product(part, options.softmax_scale)
        allowed = tuple(reference.allowed_error(low, ref, largest) for low, ref in zip(standard, exact, strict=True))
        judged.append(_Judged(batch, kv_head, tuple(x[0] for x in exact), allowed))
    return tuple(judged)


def _heads(kv_head: int, groups: int) -> slice:
    return slice(kv_head * groups, (kv_head + 1) * groups)


def _standard(inputs: _Inputs, options: Options, needs_grad: bool) -> tuple[Tensor, ...]:
    """Run standard attention in blocks of queries; what they give to dk and dv is summed in float32 or better."""
    q, k, v, grad_out = inputs
    seqlen, groups = q.shape[1], q.shape[2]
    rows = max(BLOCK_BYTES // (q.itemsize * seqlen * groups) // BLOCK_SIZE, 1) * BLOCK_SIZE
    outs, grads_q = [], []
    grads_k, grads_v = (torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) for x in (k, v))
    for start in range(0, seqlen, rows):
        end = min(start + rows, seqlen)
        # A case's mask by distance is causal: with these keys it aligns bottom-right in the block as in the whole.
        seen = end if options.causal else seqlen
        blocks = options.block_mask
        if blocks is not None:
            blocks = blocks[start // BLOCK_SIZE : -(-end // BLOCK_SIZE), : -(-seen // BLOCK_SIZE)]

        def run(q: Tensor, k: Tensor, v: Tensor, blocks: Tensor | None = blocks) -> Tensor:
            return reference.attention(q, k, v, options._replace(block_mask=blocks))

        part = q[:, start:end], k[:, :seen], v[:, :seen]
        if not needs_grad:
            with torch.no_grad():
                outs.append(run(*part))
            continue
        out, dq, dk, dv = _out_and_gradients(run, *part, grad_out[:, start:end])
        outs.append(out)
        grads_q.append(dq)
        grads_k[:, :seen] += dk
        grads_v[:, :seen] += dv
    if not needs_grad:
        return (torch.cat(outs, dim=1),)
    return torch.cat(outs, dim=1), torch.cat(grads_q, dim=1), grads_k.to(k.dtype), grads_v.to(v.dtype)


def _out_and_gradients(
    run: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor
) -> tuple[Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = run(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, grad_out)


def _largest_product(inputs: _Inputs, softmax_scale: float) -> float:
    """Bound the entries of q k^T * softmax_scale and of grad_out v^T."""
    q_length, k_length, v_length, grad_length = (
        math.sqrt(float(x.double().square().sum(dim=-1).max())) for x in inputs
    )
    return max(q_length * k_length * softmax_scale, v_length * grad_length)
