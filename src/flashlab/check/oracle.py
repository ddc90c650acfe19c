"""What a case's results should be: standard attention in float64, and in the precision of the inputs as the yardstick.

Sequences are taken one at a time, so that the oracle shares no code with the packed and cached forms of backends.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from flashlab.attention import reference
from flashlab.attention.spec import Options
from flashlab.check.cases import Inputs

Results = dict[str, Tensor]


class Dense(NamedTuple):
    """Inputs of one plain call, ``[B, S, H, D]``."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad_out: Tensor
    options: Options


def standard_attention(inputs: Inputs, needs_grad: bool) -> Results:
    """Compute out, and dq, dk and dv, or the caches after the call, in the precision of the inputs."""
    leaves = [x.detach().clone().requires_grad_(needs_grad) for x in (inputs.q, inputs.k, inputs.v)]
    q, k, v = leaves
    calls = _sequences(inputs._replace(q=q, k=k, v=v))
    out = _join([reference.attention(dense.q, dense.k, dense.v, dense.options) for dense in calls], inputs)
    results = {"out": out.detach()}
    if needs_grad:
        results |= zip(("dq", "dk", "dv"), torch.autograd.grad(out, leaves, inputs.grad_out), strict=True)
    if inputs.layout in ("append", "read"):
        results |= {"k_cache": k, "v_cache": v}
    return results


def rounding(inputs: Inputs, needs_grad: bool) -> Results:
    """Bound what one rounding of each score, and of each entry of grad_out v^T, does to the entries of each result.

    Kernels keep both in float32. A sum of products is rounded relative to the sum of the products' absolute values, and
    a score's rounding changes its weight by as much, relatively. The bounds are for a rounding of relative size 1.

    Args:
        inputs: In float64.
        needs_grad: Bound gradients too.
    """
    own_caches = inputs._replace(k=inputs.k.clone(), v=inputs.v.clone())
    bounds = [_rounding(dense, needs_grad) for dense in _sequences(own_caches)]
    return {name: _join([each[name] for each in bounds], inputs) for name in bounds[0]}


def _rounding(dense: Dense, needs_grad: bool) -> Results:
    q, k, v, grad_out, options = dense
    seqlens, scale, groups = (q.shape[1], k.shape[1]), options.softmax_scale, q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(groups, dim=2), v.repeat_interleave(groups, dim=2)
    scores, score_sizes = scale * _products(q, k), scale * _products(q.abs(), k.abs())
    if options.softcap > 0:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    if (bias := reference.alibi_bias(*seqlens, options, q.device)) is not None:
        scores, score_sizes = scores + bias, score_sizes + bias.abs()
    if (mask := reference.visible(*seqlens, options, q.device)) is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(dim=-1)
    if mask is not None:
        weights = weights.masked_fill(~mask, 0.0)
    moved = weights * score_sizes
    bounds = {"out": _sum_keys(moved, v.abs())}
    if not needs_grad:
        return bounds
    grads, grad_sizes = _products(grad_out, v), _products(grad_out.abs(), v.abs())
    delta, delta_sizes = ((weights * x).sum(dim=-1, keepdim=True) for x in (grads, grad_sizes))
    moved_grads = moved * (grads - delta).abs() + weights * (grad_sizes + delta_sizes)
    dq, dk = scale * _sum_keys(moved_grads, k.abs()), scale * _sum_queries(moved_grads, q.abs())
    dv = _sum_queries(moved, grad_out.abs())
    return bounds | {"dq": dq} | {name: x.unflatten(2, (-1, groups)).sum(dim=3) for name, x in (("dk", dk), ("dv", dv))}


def _products(q: Tensor, k: Tensor) -> Tensor:
    return torch.einsum("bqhd,bkhd->bhqk", q, k)


def _sum_keys(weights: Tensor, k: Tensor) -> Tensor:
    return torch.einsum("bhqk,bkhd->bqhd", weights, k)


def _sum_queries(weights: Tensor, q: Tensor) -> Tensor:
    return torch.einsum("bhqk,bqhd->bkhd", weights, q)


def _sequences(inputs: Inputs) -> Iterator[Dense]:
    """Take the inputs apart; a cache is appended to, in place."""
    q, k, v, grad_out, options = inputs[:5]
    if inputs.layout == "dense":
        yield Dense(q, k, v, grad_out, options)
    elif inputs.layout == "packed":
        lens_q, lens_k = inputs.seqlens_q, inputs.seqlens_k
        parts = zip(q.split(lens_q), k.split(lens_k), v.split(lens_k), grad_out.split(lens_q), strict=True)
        for n, (q, k, v, grad_out) in enumerate(parts):
            yield Dense(q[None], k[None], v[None], grad_out[None], _options_of(options, n))
    else:
        for b, filled in enumerate(inputs.seqlens_k):
            if inputs.new is not None:
                start, filled = filled, filled + inputs.new[0].shape[1]
                k[b, start:filled], v[b, start:filled] = inputs.new[0][b], inputs.new[1][b]
            row = slice(b, b + 1)
            yield Dense(q[row], k[row, :filled], v[row, :filled], grad_out[row], _options_of(options, b))


def _options_of(options: Options, sequence: int) -> Options:
    slopes = options.alibi_slopes
    return options if slopes is None else options._replace(alibi_slopes=slopes[sequence])


def _join(parts: list[Tensor], inputs: Inputs) -> Tensor:
    return torch.cat([part[0] for part in parts] if inputs.layout == "packed" else parts)
