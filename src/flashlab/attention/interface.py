"""The one way to call attention: check the call, choose the backend, run it.

Shapes: B batch, Sq and Sk query and key lengths, H query heads, Hkv key/value heads (Hkv divides H), D head dimension.
Query head h reads key/value head h // (H / Hkv). A causal mask aligns bottom-right: the last query sees every key, and
a query that sees no key at all (Sq > Sk) gets zeros.
"""

import difflib
import logging
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from flashlab.attention.backends import AUTO_ORDER, BACKENDS
from flashlab.attention.spec import AttentionSpec
from flashlab.errors import UserError

logger = logging.getLogger(__name__)
_AUTOCAST_FROM = (torch.float32, torch.float16, torch.bfloat16)


class BackendUnavailable(UserError):  # noqa: N818 - reads as the statement it is
    """A backend was asked for by name and cannot run the call; the message says why."""


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    backend: str = "auto",
    causal: bool = False,
    softmax_scale: float | None = None,
) -> Tensor:
    """Compute exact attention, softmax(q k^T * softmax_scale) v, with the named backend.

    Under autocast the inputs are cast to its dtype, as torch's own attention does.

    Args:
        q: ``[B, Sq, H, D]``.
        k: ``[B, Sk, Hkv, D]``.
        v: ``[B, Sk, Hkv, D]``.
        backend: A name from `backends.BACKENDS`, or "auto" for the preferred one that can run this call.
        causal: Let query i see the keys up to i + Sk - Sq (bottom-right alignment).
        softmax_scale: Factor on the scores; 1 / sqrt(D) when None.

    Returns:
        ``[B, Sq, H, D]``.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together; the message says what was expected and got.
        BackendUnavailable: the named backend cannot run this call; the message says why.
        UserError: no backend has this name; the message names the nearest.
    """
    q, k, v = _prepare(q), _prepare(k), _prepare(v)
    shapes: tuple[tuple[int, ...], ...] = (q.shape, k.shape, v.shape)
    if torch.compiler.is_compiling():  # which kernel runs depends on the lengths: range makes them static
        shapes = tuple(tuple(len(range(n)) for n in shape) for shape in shapes)
    needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    name = _plan(backend, shapes, (q.dtype, k.dtype, v.dtype), (q.device, k.device, v.device), causal, needs_grad)
    if softmax_scale is None:
        softmax_scale = q.shape[-1] ** -0.5
    return BACKENDS[name].run(q, k, v, causal=causal, softmax_scale=softmax_scale)


def resolve(backend: str, spec: AttentionSpec) -> str:
    """Return the name of the backend that runs a call.

    Raises:
        BackendUnavailable: the named backend cannot run it; the message says why.
        UserError: no backend has this name; the message names the nearest.
    """
    if backend == "auto":
        return _choose(spec)
    if backend not in BACKENDS:
        nearest = difflib.get_close_matches(backend, ["auto", *BACKENDS], n=1, cutoff=0.0)[0]
        raise UserError(
            f"no attention backend {backend!r}; did you mean {nearest!r}? (there are: auto, {', '.join(BACKENDS)})"
        )
    if (reason := BACKENDS[backend].why_not(spec)) is not None:
        raise BackendUnavailable(f"attention backend {backend!r} cannot run this call: {reason}")
    return backend


def _choose(spec: AttentionSpec) -> str:
    refused = []
    for name in AUTO_ORDER.get(spec.device.type, ("sdpa_math",)):
        if (reason := BACKENDS[name].why_not(spec)) is None:
            break
        refused.append(f"; not {name}: {reason}")
    _announce(f"attention backend: auto chose {name} on {spec.device.type}{''.join(refused)}")
    return name


@lru_cache
def _announce(message: str) -> None:
    """Log each distinct choice once."""
    logger.info(message)


def _prepare(x: Tensor) -> Tensor:
    """Apply autocast, and give the kernels the layout that all of them take: the head dimension contiguous."""
    kind = x.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind) and x.dtype in _AUTOCAST_FROM:
        x = x.to(torch.get_autocast_dtype(kind))
    return x if x.stride(-1) == 1 else x.contiguous()


@torch.compiler.assume_constant_result
def _plan(*call: Any) -> str:
    """Look the call up; a graph under torch.compile holds the answer as a constant."""
    return _check_and_resolve(*call)


@lru_cache(maxsize=4096)
def _check_and_resolve(
    backend: str,
    shapes: tuple[tuple[int, ...], ...],
    dtypes: tuple[torch.dtype, ...],
    devices: tuple[torch.device, ...],
    causal: bool,
    needs_grad: bool,
) -> str:
    return resolve(backend, _describe(shapes, dtypes, devices, causal, needs_grad))


def _describe(
    shapes: tuple[tuple[int, ...], ...],
    dtypes: tuple[torch.dtype, ...],
    devices: tuple[torch.device, ...],
    causal: bool,
    needs_grad: bool,
) -> AttentionSpec:
    """Check that q, k and v fit together, and describe the call."""
    q_shape, k_shape, v_shape = map(tuple, shapes)
    if any(len(shape) != 4 for shape in shapes):
        raise ValueError(
            f"q, k and v must be [batch, seqlen, heads, head_dim]; got q {q_shape}, k {k_shape}, v {v_shape}"
        )
    batch_size, seqlen_q, num_heads, head_dim = q_shape
    _, seqlen_k, num_kv_heads, _ = k_shape
    if k_shape != v_shape:
        raise ValueError(f"k and v must have the same shape; got k {k_shape}, v {v_shape}")
    if (k_shape[0], k_shape[3]) != (batch_size, head_dim):
        raise ValueError(f"q and k must agree in batch and head_dim; got q {q_shape}, k {k_shape}")
    if 0 in q_shape or 0 in k_shape:
        raise ValueError(f"no dimension may be 0; got q {q_shape}, k {k_shape}")
    if num_heads % num_kv_heads:
        raise ValueError(
            f"key/value heads must divide the query heads; got {num_heads} query heads, {num_kv_heads} key/value heads"
        )
    if len(set(dtypes)) > 1 or not dtypes[0].is_floating_point:
        raise ValueError("q, k and v must share one floating-point dtype; got {}, {}, {}".format(*dtypes))
    if len(set(devices)) > 1:
        raise ValueError("q, k and v must be on one device; got {}, {}, {}".format(*devices))
    return AttentionSpec(
        batch_size, seqlen_q, seqlen_k, num_heads, num_kv_heads, head_dim, dtypes[0], devices[0], causal, needs_grad
    )
