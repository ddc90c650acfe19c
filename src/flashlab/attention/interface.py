"""The one way to call attention: check the call, choose the backend, run it.

Shapes: B batch, Sq and Sk query and key lengths, H query heads, Hkv key/value heads (Hkv divides H), D head dimension;
packed: T rows of N sequences. Query head h reads key/value head h // (H / Hkv). Causal masks, windows and ALiBi align
bottom-right: the last query stands at the last key. A query that sees no key at all gets zeros.
"""

import difflib
import logging
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from flashlab.attention import auto, backends
from flashlab.attention.backends import BACKENDS
from flashlab.attention.spec import BLOCK_SIZE, AttentionSpec, Cache, Options, Packing
from flashlab.errors import UserError

logger = logging.getLogger(__name__)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


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
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    block_mask: Tensor | None = None,
    deterministic: bool = False,
) -> Tensor:
    """Compute exact attention, softmax(q k^T * softmax_scale) v, with the named backend.

    Under autocast the inputs are cast to its dtype, as torch's own attention does.

    Args:
        q: ``[B, Sq, H, D]``.
        k: ``[B, Sk, Hkv, D]``.
        v: ``[B, Sk, Hkv, D]``.
        backend: A name from `backends.BACKENDS`, or "auto" for the one that was fastest where this was measured.
        causal: Let query i see the keys up to i + Sk - Sq (bottom-right alignment).
        softmax_scale: Factor on the scores; 1 / sqrt(D) when None.
        window_size: (left, right): let query i see the keys from i + Sk - Sq - left to i + Sk - Sq + right; -1 is
            unlimited.
        softcap: Bound the scores s by softcap * tanh(s / softcap); 0 does not.
        alibi_slopes: float32 ``[H]`` or ``[B, H]``: take slope * |i + Sk - Sq - j| from the score of key j.
        block_mask: bool ``[ceil(Sq / 128), ceil(Sk / 128)]``: the blocks of scores that are computed at all.
        deterministic: Ask for a backward pass that gives the same bits every time.

    Returns:
        ``[B, Sq, H, D]``.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together; the message says what was expected and got.
        BackendUnavailable: the named backend cannot run this call; the message says why.
        UserError: no backend has this name; the message names the nearest.
    """
    q, k, v = _prepare(q, k, v)
    options = _options(q, causal, softmax_scale, window_size, softcap, alibi_slopes, block_mask, deterministic)
    name = _choose(backend, "dense", (q.shape, k.shape, v.shape), q, k, v, options)
    return BACKENDS[name].run(q, k, v, options)


def attention_qkvpacked(
    qkv: Tensor,
    *,
    backend: str = "auto",
    causal: bool = False,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
) -> Tensor:
    """Compute `attention` of queries, keys and values that one linear layer made, as one tensor.

    Its gradient is one tensor as well, which flash-attn 2 and 4 write at once; put together from three it is copied.

    Args:
        qkv: ``[B, S, 3, H, D]``: the queries, the keys, the values.
        backend: As in `attention`, and so are all that follow.
        causal: As there.
        softmax_scale: As there.
        window_size: As there.
        softcap: As there.
        alibi_slopes: As there.
        deterministic: As there.

    Returns:
        ``[B, S, H, D]``.

    Raises:
        ValueError: as `attention`.
        BackendUnavailable: the named backend cannot run this call; the message says why.
        UserError: no backend has this name; the message names the nearest.
    """
    if not isinstance(qkv, Tensor):
        raise ValueError(f"qkv must be a tensor; got {_kind_of(qkv)}")
    qkv, _, _ = _prepare(qkv, qkv[:0], qkv[:0])
    if qkv.ndim != 5 or qkv.shape[2] != 3:
        raise ValueError(f"qkv must be of shape [B, S, 3, H, D]; got {_kind_of(qkv)}")
    q, k, v = qkv.unbind(2)
    options = _options(q, causal, softmax_scale, window_size, softcap, alibi_slopes, None, deterministic)
    chosen = BACKENDS[_choose(backend, "dense", (q.shape, k.shape, v.shape), q, k, v, options)]
    return chosen.run(q, k, v, options) if chosen.run_qkvpacked is None else chosen.run_qkvpacked(qkv, options)


def attention_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    backend: str = "auto",
    causal: bool = False,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
) -> Tensor:
    """Compute exact attention within each of N sequences of several lengths that lie in a row, without padding.

    Args:
        q: ``[Tq, H, D]``.
        k: ``[Tk, Hkv, D]``.
        v: ``[Tk, Hkv, D]``.
        cu_seqlens_q: int32 ``[N + 1]``, rising from 0 to Tq: rows ``cu_seqlens_q[n]`` to ``cu_seqlens_q[n + 1]`` of q
            are sequence n. On a GPU its values are not checked, which would stall it.
        cu_seqlens_k: int32 ``[N + 1]``, rising from 0 to Tk: the same for k and v.
        max_seqlen_q: The longest sequence of q.
        max_seqlen_k: The longest sequence of k.
        backend: As in `attention`.
        causal: As in `attention`, within each sequence.
        softmax_scale: As in `attention`.
        window_size: As in `attention`, within each sequence.
        softcap: As in `attention`.
        alibi_slopes: float32 ``[H]`` or ``[N, H]``, as in `attention`.
        deterministic: As in `attention`.

    Returns:
        ``[Tq, H, D]``.

    Raises:
        ValueError: as `attention`; also where the sequences do not fit q, k and v.
        BackendUnavailable: the named backend cannot run this call; the message says why.
        UserError: no backend has this name; the message names the nearest.
    """
    q, k, v = _prepare(q, k, v)
    options = _options(q, causal, softmax_scale, window_size, softcap, alibi_slopes, None, deterministic)
    _check_packing(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    (count,) = _static(cu_seqlens_q.shape)
    max_seqlen_q, max_seqlen_k = _static((max_seqlen_q, max_seqlen_k))
    lengths = max_seqlen_q, max_seqlen_k, max_seqlen_k
    shapes = tuple((count - 1, longest, *x.shape[1:]) for x, longest in zip((q, k, v), lengths, strict=True))
    name = _choose(backend, "packed", shapes, q, k, v, options)
    run = BACKENDS[name].run_packed
    assert run is not None  # else why_not refused it
    return run(q, k, v, Packing(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k), options)


def attention_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: int | Tensor,
    *,
    k: Tensor | None = None,
    v: Tensor | None = None,
    backend: str = "auto",
    causal: bool = True,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
) -> Tensor:
    """Append new keys and values to a cache, in place, and attend to the places that are filled then.

    This is decoding: there are no gradients. The masks align with the last filled place, so that with Sq = Sn query i
    sees the cache up to its own key.

    Args:
        q: ``[B, Sq, H, D]``.
        k_cache: ``[B, Smax, Hkv, D]``.
        v_cache: ``[B, Smax, Hkv, D]``.
        cache_seqlens: The places filled before this call: a number, or int32 ``[B]``. On a GPU the values of a tensor
            are not checked against Smax, which would stall it.
        k: New keys ``[B, Sn, Hkv, D]``, or None to append nothing.
        v: New values ``[B, Sn, Hkv, D]``, or None.
        backend: As in `attention`.
        causal: As in `attention`, with Sk the places that are filled.
        softmax_scale: As in `attention`.
        window_size: As in `attention`, with Sk the places that are filled.
        softcap: As in `attention`.
        alibi_slopes: As in `attention`, with Sk the places that are filled.

    Returns:
        ``[B, Sq, H, D]``.

    Raises:
        ValueError: as `attention`; also where the cache has no room for the new places, or gradients are asked for.
        BackendUnavailable: the named backend cannot run this call; the message says why.
        UserError: no backend has this name; the message names the nearest.
    """
    tensors = [x for x in (q, k_cache, v_cache, k, v) if x is not None]
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise ValueError("a key-value cache gives no gradients: call under torch.no_grad()")
    q, _, _ = _prepare(q, q, q)
    if k is not None and v is not None:
        k, v, _ = _prepare(k, v, v)
    if torch.is_autocast_enabled(q.device.type) and k_cache.dtype != q.dtype:
        raise ValueError(f"under autocast the cache must be of its dtype, {q.dtype}; got {k_cache.dtype}")
    options = _options(q, causal, softmax_scale, window_size, softcap, alibi_slopes, None, False)
    cache = _check_cache(q, k_cache, k, v, cache_seqlens)
    name = _choose(backend, "cache", (q.shape, k_cache.shape, v_cache.shape), q, k_cache, v_cache, options)
    run = BACKENDS[name].run_cached
    assert run is not None  # else why_not refused it
    return run(q, k_cache, v_cache, cache, options)


def resolve(backend: str, spec: AttentionSpec) -> str:
    """Return the name of the backend that runs a call.

    Raises:
        BackendUnavailable: the named backend cannot run it; the message says why.
        UserError: no backend has this name; the message names the nearest.
    """
    if backend == "auto":
        choice = auto.choose(spec)
        refused = "".join(f"; not {name}: {reason}" for name, reason in choice.refused)
        _announce(f"attention backend: auto chose {choice.backend} on {spec.device.type} ({choice.source}){refused}")
        return choice.backend
    require_name(backend)
    if (reason := backends.why_not(backend, spec)) is not None:
        raise BackendUnavailable(f"attention backend {backend!r} cannot run this call: {reason}")
    return backend


def require_name(backend: str) -> None:
    """Refuse what is neither auto nor the name of a backend.

    Raises:
        UserError: it is not; the message names the nearest.
    """
    if backend not in ("auto", *BACKENDS):
        nearest = difflib.get_close_matches(str(backend), ["auto", *BACKENDS], n=1, cutoff=0.0)[0]
        raise UserError(
            f"no attention backend {backend!r}; did you mean {nearest!r}? (there are: auto, {', '.join(BACKENDS)})"
        )


@lru_cache
def _announce(message: str) -> None:
    """Log each distinct choice once."""
    logger.info(message)


def _prepare(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Apply autocast, and give the kernels the layout that all of them take: the head dimension contiguous."""
    try:
        kind = "cuda" if q.is_cuda else q.device.type  # the same, in a third of the time
        if kind != "meta" and torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            q, k, v = (x.to(dtype) if x.dtype in DTYPES else x for x in (q, k, v))
        if q.stride()[-1] == k.stride()[-1] == v.stride()[-1] == 1:
            return q, k, v
        return tuple(x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))  # type: ignore[return-value]
    except (AttributeError, IndexError, TypeError) as error:
        raise ValueError(f"q, k and v must be tensors with dimensions; got {_kind_of(q, k, v)}") from error


def _kind_of(*values: Any) -> str:
    return ", ".join(f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else repr(x)[:40] for x in values)


def _options(
    q: Tensor,
    causal: bool,
    softmax_scale: float | None,
    window_size: tuple[int, int],
    softcap: float,
    alibi_slopes: Tensor | None,
    block_mask: Tensor | None,
    deterministic: bool,
) -> Options:
    if softmax_scale is None:
        softmax_scale = max(q.shape[-1], 1) ** -0.5
    if window_size != (-1, -1):
        window_size = _window(window_size)
    if softcap != 0 and not (isinstance(softcap, int | float) and 0 <= softcap < float("inf")):
        raise ValueError(f"softcap must be a number from 0 (none) on; got {softcap!r}")
    if alibi_slopes is not None:
        if not isinstance(alibi_slopes, Tensor):
            raise ValueError(f"alibi_slopes must be a tensor; got {_kind_of(alibi_slopes)}")
        alibi_slopes = alibi_slopes.detach()  # constants: the kernels have no gradients of them
    if block_mask is not None and not isinstance(block_mask, Tensor):
        raise ValueError(f"block_mask must be a tensor; got {_kind_of(block_mask)}")
    return Options(softmax_scale, causal, window_size, softcap, alibi_slopes, block_mask, deterministic)


def _window(window_size: Any) -> tuple[int, int]:
    try:
        left, right = window_size
        if type(left) is type(right) is int and left >= -1 and right >= -1:
            # Constants of a graph, as `_static` makes them.
            return len(range(left + 1)) - 1, len(range(right + 1)) - 1
    except (TypeError, ValueError):
        pass
    raise ValueError(f"window_size must be two whole numbers from -1 (unlimited) on; got {window_size!r}")


def _choose(
    backend: str,
    layout: str,
    shapes: tuple[Sequence[int], ...],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: Options,
) -> str:
    """Return the backend of a call; every kind of call is checked and resolved once, then looked up."""
    slopes, blocks = options.alibi_slopes, options.block_mask
    kinds = q.dtype, k.dtype, v.dtype, q.device, k.device, v.device
    features = (
        options.causal,
        options.window_size,
        not options.softcap,  # torch.compile makes a constant of `not`, and of no comparison
        None if slopes is None else (_static(slopes.shape), slopes.dtype, slopes.device),
        None if blocks is None else (_static(blocks.shape), blocks.dtype, blocks.device),
        options.deterministic,
        torch.are_deterministic_algorithms_enabled(),  # some of torch's kernels refuse then
    )
    needs_grad = (q.requires_grad or k.requires_grad or v.requires_grad) and torch.is_grad_enabled()
    if torch.compiler.is_compiling():
        return _choose_constant(backend, layout, tuple(map(_static, shapes)), kinds, features, needs_grad)
    return _check_and_resolve(backend, layout, shapes, kinds, features, needs_grad)


def _static(numbers: Sequence[int]) -> tuple[int, ...]:
    """Make numbers constants of a graph under torch.compile: which kernel runs depends on them."""
    return tuple(len(range(n)) for n in numbers) if torch.compiler.is_compiling() else tuple(numbers)


@torch.compiler.assume_constant_result
def _choose_constant(*call: Any) -> str:
    """Look the call up; a graph under torch.compile holds the answer as a constant."""
    return _check_and_resolve(*call)


@lru_cache(maxsize=4096)
def _check_and_resolve(
    backend: str,
    layout: str,
    shapes: tuple[Sequence[int], ...],
    kinds: tuple[Any, ...],
    features: tuple[Any, ...],
    needs_grad: bool,
) -> str:
    return resolve(backend, _describe(layout, shapes, kinds, features, needs_grad))


def _describe(
    layout: Any,
    shapes: tuple[Sequence[int], ...],
    kinds: tuple[Any, ...],
    features: tuple[Any, ...],
    needs_grad: bool,
) -> AttentionSpec:
    """Check that q, k, v and the options fit together, and describe the call."""
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
    dtypes, devices = kinds[:3], kinds[3:]
    if len(set(dtypes)) > 1 or dtypes[0] not in (*DTYPES, torch.float64):
        raise ValueError(
            "q, k and v must share one of float16, bfloat16, float32, float64; got {}, {}, {}".format(*dtypes)
        )
    if len(set(devices)) > 1:
        raise ValueError("q, k and v must be on one device; got {}, {}, {}".format(*devices))
    causal, window_size, no_softcap, slopes, blocks, deterministic, _ = features
    for name, flag in (("causal", causal), ("deterministic", deterministic)):
        if not isinstance(flag, bool):
            raise ValueError(f"{name} must be True or False; got {flag!r}")
    _check_option("alibi_slopes", slopes, torch.float32, [(num_heads,), (batch_size, num_heads)], devices[0])
    blocks_expected = (-(-seqlen_q // BLOCK_SIZE), -(-seqlen_k // BLOCK_SIZE))
    _check_option("block_mask", blocks, torch.bool, [blocks_expected], devices[0])
    return AttentionSpec(
        batch_size,
        seqlen_q,
        seqlen_k,
        num_heads,
        num_kv_heads,
        head_dim,
        dtypes[0],
        devices[0],
        causal,
        needs_grad,
        window_size,
        not no_softcap,
        slopes is not None,
        blocks is not None,
        deterministic,
        layout,
    )


def _check_option(
    name: str,
    got: tuple[tuple[int, ...], torch.dtype, torch.device] | None,
    dtype: torch.dtype,
    shapes: list[tuple[int, ...]],
    device: torch.device,
) -> None:
    if got is not None and (got[0] not in shapes or got[1:] != (dtype, device)):
        expected = " or ".join(map(str, shapes))
        raise ValueError(f"{name} must be {dtype} {expected} on {device}; got {got[1]} {got[0]} on {got[2]}")


def _check_packing(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int
) -> None:
    if not (isinstance(cu_seqlens_q, Tensor) and isinstance(cu_seqlens_k, Tensor)):
        raise ValueError(f"cu_seqlens_q and cu_seqlens_k must be tensors; got {_kind_of(cu_seqlens_q, cu_seqlens_k)}")
    if {q.dim(), k.dim(), v.dim()} != {3} or k.shape[0] != v.shape[0]:
        shapes = (tuple(x.shape) for x in (q, k, v))
        raise ValueError(
            "q, k and v must be [rows, heads, head_dim], k and v of as many rows; got q {}, k {}, v {}".format(*shapes)
        )
    if cu_seqlens_q.dim() != 1 or cu_seqlens_q.shape != cu_seqlens_k.shape or cu_seqlens_q.shape[0] < 2:
        both = tuple(cu_seqlens_q.shape), tuple(cu_seqlens_k.shape)
        raise ValueError("cu_seqlens_q and cu_seqlens_k must both be [sequences + 1]; got {} and {}".format(*both))
    for name, x, ends, longest in (("q", q, cu_seqlens_q, max_seqlen_q), ("k", k, cu_seqlens_k, max_seqlen_k)):
        if ends.dtype != torch.int32 or ends.device != x.device:
            raise ValueError(f"cu_seqlens_{name} must be torch.int32 on {x.device}; got {ends.dtype} on {ends.device}")
        if ends.device.type == "cpu" and not torch.compiler.is_compiling():  # elsewhere a look at the values is a stall
            lengths = ends.diff()
            if ends[0] != 0 or ends[-1] != x.shape[0] or bool((lengths < 0).any()) or bool((lengths > longest).any()):
                raise ValueError(
                    f"cu_seqlens_{name} must rise from 0 to the {x.shape[0]} rows of {name} in steps of at most "
                    f"max_seqlen_{name} = {longest}; got {ends.tolist()}"
                )


def _check_cache(q: Tensor, k_cache: Tensor, k: Tensor | None, v: Tensor | None, seqlens: int | Tensor) -> Cache:
    if (k is None) != (v is None):
        raise ValueError("k and v go into the cache together: give both or neither")
    if k_cache.dim() != 4:
        raise ValueError(f"k_cache must be [batch, places, heads, head_dim]; got {tuple(k_cache.shape)}")
    new = 0
    if k is not None and v is not None:
        new = k.shape[1]
        expected = (k_cache.shape[0], new, *k_cache.shape[2:])
        if k.shape != expected or v.shape != expected or {k.dtype, v.dtype} != {k_cache.dtype}:
            raise ValueError(
                f"k and v must be {k_cache.dtype} {tuple(expected)} like the cache; got {k.dtype} {tuple(k.shape)} and "
                f"{v.dtype} {tuple(v.shape)}"
            )
    shortest = longest = 0
    if type(seqlens) is int:
        shortest = longest = seqlens
        seqlens = torch.full((q.shape[0],), seqlens, dtype=torch.int32, device=q.device)
    elif (
        not isinstance(seqlens, Tensor)
        or seqlens.shape != q.shape[:1]
        or seqlens.dtype != torch.int32
        or seqlens.device != q.device
    ):
        wanted = f"a whole number or torch.int32 ({q.shape[0]},) on {q.device}"
        raise ValueError(f"cache_seqlens must be {wanted}; got {_kind_of(seqlens)}")
    elif seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        shortest, longest = int(seqlens.min()), int(seqlens.max())
    if shortest < 0:
        raise ValueError(f"cache_seqlens must be 0 or more; got {shortest}")
    if longest + new > k_cache.shape[1]:
        raise ValueError(f"the cache has {k_cache.shape[1]} places; {longest} filled and {new} new do not fit")
    return Cache(seqlens, k, v)
