"""Standard attention: softmax over the full matrix of scores.

In the input's precision it is the baseline; on float64 copies of the inputs it is the oracle that every backend is
judged against.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from flashlab.attention.spec import BLOCK_SIZE, AttentionSpec, Cache, Options, Packing


def attention(q: Tensor, k: Tensor, v: Tensor, options: Options) -> Tensor:
    """Compute softmax(q k^T * softmax_scale) v in the precision of the inputs.

    Args:
        q: ``[B, Sq, H, D]``.
        k: ``[B, Sk, Hkv, D]``.
        v: ``[B, Sk, Hkv, D]``.
        options: How scores become weights.
    """
    seqlen_q, seqlen_k = q.shape[1], k.shape[1]
    mask = visible(seqlen_q, seqlen_k, options, q.device)
    bias = alibi_bias(seqlen_q, seqlen_k, options, q.device)
    some_are_blind = options.block_mask is not None or blind_queries(seqlen_q, seqlen_k, options) > 0
    return _attend(q, k, v, mask, bias, some_are_blind, options)


def attention_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packing: Packing,
    options: Options,
    attend: Callable[[Tensor, Tensor, Tensor, Options], Tensor] = attention,
) -> Tensor:
    """Attend within each of several sequences that lie in a row, one sequence after the other.

    Args:
        q: ``[Tq, H, D]``.
        k: ``[Tk, Hkv, D]``.
        v: ``[Tk, Hkv, D]``.
        packing: Where the sequences begin and end.
        options: How scores become weights; alibi_slopes ``[N, H]`` differ by sequence.
        attend: What computes attention for each.
    """
    ends_q, ends_k = packing.cu_seqlens_q.tolist(), packing.cu_seqlens_k.tolist()
    sequences = zip(_split(q, ends_q), _split(k, ends_k), _split(v, ends_k), strict=True)
    return torch.cat(
        [
            attend(q_n[None], k_n[None], v_n[None], of_sequence(options, n))[0]
            for n, (q_n, k_n, v_n) in enumerate(sequences)
        ]
    )


def of_sequence(options: Options, n: int) -> Options:
    """Return the options of one sequence of a batch, whose ALiBi slopes may be its own."""
    slopes = options.alibi_slopes
    return options if slopes is None or slopes.dim() == 1 else options._replace(alibi_slopes=slopes[n])


def _split(x: Tensor, ends: list[int]) -> tuple[Tensor, ...]:
    return x.split([end - start for start, end in pairwise(ends)])


def attention_with_kvcache(q: Tensor, k_cache: Tensor, v_cache: Tensor, cache: Cache, options: Options) -> Tensor:
    """Append to a key-value cache and attend to its filled places.

    Args:
        q: ``[B, Sq, H, D]``.
        k_cache: ``[B, Smax, Hkv, D]``, changed in place.
        v_cache: ``[B, Smax, Hkv, D]``, changed in place.
        cache: What to append, and where.
        options: How scores become weights, with Sk the number of filled places.
    """
    filled = cache.append(k_cache, v_cache)
    mask = visible(q.shape[1], k_cache.shape[1], options, q.device, filled)
    assert mask is not None  # a cache always has one
    bias = alibi_bias(q.shape[1], k_cache.shape[1], options, q.device, filled)
    v = v_cache.where(seen(mask), 0.0)
    return _attend(q, k_cache, v, mask, bias, not cache.holds_own_keys(q), options)


def seen(mask: Tensor) -> Tensor:
    """Say which places of a cache some query sees by a mask ``[B, 1, Sq, places]``: bool ``[B, places, 1, 1]``.

    The others, which may never have been written, can hold anything, and a weight of 0 times NaN is NaN.
    """
    return mask.any(dim=2, keepdim=True).transpose(1, 3) if mask.shape[2] > 1 else mask.transpose(1, 3)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None, some_are_blind: bool, options: Options
) -> Tensor:
    groups = q.shape[2] // k.shape[2]
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=2), v.repeat_interleave(groups, dim=2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * options.softmax_scale
    if options.softcap > 0:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    if mask is None:
        weights = scores.softmax(dim=-1)
    else:
        # The lowest number instead of -inf: a query that sees no key then has weights to clear below, not NaN.
        weights = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(dim=-1)
        if some_are_blind:
            weights = weights.masked_fill(~mask, 0.0)
    return torch.einsum("bhqk,bkhd->bqhd", weights.to(v.dtype), v)


def visible(
    seqlen_q: int, seqlen_k: int, options: Options, device: torch.device, filled: Tensor | None = None
) -> Tensor | None:
    """Say which keys each query sees.

    Args:
        seqlen_q: The number of queries Sq.
        seqlen_k: The number of keys Sk.
        options: The causal, window and block masks.
        device: Where the mask is made.
        filled: ``[B]``: the places of a cache of Sk that are filled; the masks align with these.

    Returns:
        bool ``[Sq, Sk]``, with ``filled`` ``[B, 1, Sq, Sk]``, or None when every query sees every key.
    """
    left, right = window(options)
    if filled is None and options.block_mask is None and left < 0 and right < 0:
        return None
    if filled is not None and seqlen_q == 1 and left < 0 and right <= 0:  # the last query, which sees what is filled
        return torch.arange(seqlen_k, device=device) < filled[:, None, None, None]
    distance = _distance(seqlen_q, seqlen_k, device, filled)
    mask = torch.ones_like(distance, dtype=torch.bool)
    if left >= 0:
        mask = mask & (distance <= left)
    if right >= 0:
        mask = mask & (distance >= -right)
    if filled is not None:
        mask = mask & (torch.arange(seqlen_k, device=device) < filled[:, None, None, None])
    if options.block_mask is not None:
        rows = options.block_mask.repeat_interleave(BLOCK_SIZE, dim=0)[:seqlen_q]
        mask = mask & rows.repeat_interleave(BLOCK_SIZE, dim=1)[:, :seqlen_k]
    return mask


def alibi_bias(
    seqlen_q: int, seqlen_k: int, options: Options, device: torch.device, filled: Tensor | None = None
) -> Tensor | None:
    """Return ALiBi's bias, -slope * |distance|: float32 ``[1 or B, H, Sq, Sk]``, or None without slopes."""
    if options.alibi_slopes is None:
        return None
    slopes = options.alibi_slopes.to(torch.float32)
    return -slopes.reshape(-1, slopes.shape[-1], 1, 1) * _distance(seqlen_q, seqlen_k, device, filled).abs()


def window(options: Options) -> tuple[int, int]:
    """Return the window (left, right) with the causal mask in it."""
    left, right = options.window_size
    return left, 0 if options.causal else right


def blind_queries(seqlen_q: int, seqlen_k: int, options: Options) -> int:
    """Count the queries, always the first ones, that see no key because of the causal mask or the window."""
    _, right = window(options)
    return 0 if right < 0 else max(seqlen_q - seqlen_k - right, 0)


def _distance(seqlen_q: int, seqlen_k: int, device: torch.device, filled: Tensor | None) -> Tensor:
    """Return i + Sk - Sq - j for query i and key j: ``[Sq, Sk]``, for a cache ``[B, 1, Sq, Sk]``."""
    q, k = torch.arange(seqlen_q, device=device), torch.arange(seqlen_k, device=device)
    if filled is None:
        return q[:, None] + (seqlen_k - seqlen_q) - k
    return q[:, None] + (filled.long()[:, None, None, None] - seqlen_q) - k


def why_not(spec: AttentionSpec) -> str | None:
    """Never refuse: it needs only memory for B x H x Sq x Sk scores."""
    return None


def allowed_error(standard: Tensor, exact: Tensor, largest_product: float) -> float:
    """Return the largest absolute error that a correct backend may show in an output or a gradient.

    Twice the error of standard attention in the same precision, plus rounding: one step of the result's dtype at its
    largest value, and one of float32, in which kernels accumulate, at the largest product of rows. Without the second,
    gradients would be judged by their own size, though they are small differences of such products.

    Args:
        standard: The quantity as standard attention computes it in the precision of the backend.
        exact: The same quantity from float64 copies of the inputs.
        largest_product: A bound on the entries of q k^T * softmax_scale and of grad_out v^T.

    Source: the factor of two and the rounding step are the rule of flash-attn's tests (tests/test_flash_attn.py).
    """
    error = (standard.to(exact.dtype) - exact).abs().max()
    rounding = torch.finfo(standard.dtype).eps * exact.abs().max() + torch.finfo(torch.float32).eps * largest_product
    return float(2 * error + rounding)
