"""FlashAttention in plain PyTorch: tiles, an online softmax, recomputation in the backward pass, and a count of bytes.

The names are those of the papers' pseudo-code: i counts tiles of queries, j tiles of keys and values; ``load`` moves a
tile from slow to on-chip memory and ``store`` moves one back. All batches and heads take each step together. Sums are
kept in float32 (float64 for float64 inputs) and stay on chip, all but those of dq.

The forward pass is Algorithm 1 in FlashAttention-2's order: a tile of queries stays while keys and values stream past
it, so that its output, maximum and sum never leave the chip; the first paper's order reads and writes them once for each
tile of keys. The backward pass turns the loops around, as both papers do. A tile that no query of it may see is neither
loaded nor computed, so the cost of a block mask is linear in its non-zero blocks.

Source: Dao et al., FlashAttention (arXiv 2205.14135), Algorithms 1, 4 and 5; Dao, FlashAttention-2 (arXiv 2307.08691),
Algorithms 1 and 2.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flashlab.attention.spec import BLOCK_SIZE, AttentionSpec, Cache, Options, Packing

# What the tiles share. Source: FlashAttention, section 3.2: "M (around 100KB)"; an SM of an A100 or H100 has it.
ON_CHIP_BYTES = 100 * 1024
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def attention(q: Tensor, k: Tensor, v: Tensor, options: Options, on_chip_bytes: int = ON_CHIP_BYTES) -> Tensor:
    """Compute attention tile by tile; only the output and one log-sum-exp a query are kept for the backward pass.

    Args:
        q: ``[B, Sq, H, D]``.
        k: ``[B, Sk, Hkv, D]``.
        v: ``[B, Sk, Hkv, D]``.
        options: What the scores are and which of them count.
        on_chip_bytes: Memory for the tiles of one head; it gives the block sizes.
    """
    blocks = options.block_mask
    if blocks is not None and not torch.compiler.is_compiling():  # a graph cannot depend on it and skips no block
        blocks = blocks.tolist()
    sizes = block_sizes(q.shape[-1], on_chip_bytes, q.element_size())
    return _Attention.apply(q, k, v, options._replace(block_mask=blocks), sizes)


def attention_packed(q: Tensor, k: Tensor, v: Tensor, packing: Packing, options: Options) -> Tensor:
    """Attend within each of several sequences in a row, one after the other.

    Args:
        q: ``[Tq, H, D]``.
        k: ``[Tk, Hkv, D]``.
        v: ``[Tk, Hkv, D]``.
        packing: Where each sequence starts and ends.
        options: As of `attention`; a block mask counts from the start of each sequence.
    """
    ends_q, ends_k = packing.cu_seqlens_q.tolist(), packing.cu_seqlens_k.tolist()
    outs = []
    for b in range(len(ends_q) - 1):
        rows, columns = slice(ends_q[b], ends_q[b + 1]), slice(ends_k[b], ends_k[b + 1])
        outs.append(attention(q[None, rows], k[None, columns], v[None, columns], _of_sequence(options, b))[0])
    return torch.cat(outs)


def attention_with_kvcache(q: Tensor, k_cache: Tensor, v_cache: Tensor, cache: Cache, options: Options) -> Tensor:
    """Append new keys and values to a cache in place, and attend to what each sequence of it then holds.

    Args:
        q: ``[B, Sq, H, D]``.
        k_cache: ``[B, Sk, Hkv, D]``.
        v_cache: ``[B, Sk, Hkv, D]``.
        cache: The new rows, or None, and how many rows of each sequence were filled before them.
        options: As of `attention`; Sk is what a sequence holds.
    """
    outs = []
    for b, filled in enumerate(cache.append(k_cache, v_cache).tolist()):
        k_b, v_b = k_cache[None, b, :filled], v_cache[None, b, :filled]
        outs.append(attention(q[None, b], k_b, v_b, _of_sequence(options, b)))
    return torch.cat(outs)


def why_not(spec: AttentionSpec) -> str | None:
    """Refuse only what PyTorch cannot compute with."""
    if spec.dtype not in DTYPES:
        return f"it computes in float16, bfloat16, float32 or float64; the inputs are {spec.dtype}".replace("torch.", "")
    return None


def block_sizes(head_dim: int, on_chip_bytes: int, itemsize: int) -> tuple[int, int]:
    """Return the rows of the tiles that stay on chip, and of those that stream past them.

    The forward pass holds queries and streams keys, the backward pass holds keys and streams queries. As in the paper,
    each of four tiles (Q, K, V, O) takes a quarter of the memory and the tile of scores no more than one of them: the
    sizes are M / 4d and min(M / 4d, d), M in items. They are rounded down to a power of two and are at most 128, as in
    kernels, so that a tile lies in one block of a block mask.

    Source: FlashAttention, Algorithm 1, line 1.
    """
    quarter = on_chip_bytes // itemsize // 4
    held = min(_power_of_two(quarter // head_dim), BLOCK_SIZE)
    return held, min(_power_of_two(quarter // held), held)


def _power_of_two(n: int) -> int:
    """Round down to a power of two, not below 1."""
    return 1 << max(n.bit_length() - 1, 0)


def _of_sequence(options: Options, b: int) -> Options:
    slopes = options.alibi_slopes
    return options if slopes is None or slopes.ndim == 1 else options._replace(alibi_slopes=slopes[b])


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, options: Options, on_chip_bytes: int) -> Tensor:
        (_, seqlen_q, num_heads, head_dim), seqlen_k, groups = q.shape, k.shape[1], q.shape[2] // k.shape[2]
        size_i, size_j = block_sizes(head_dim, on_chip_bytes, q.element_size())
        scores = _Scores(options, seqlen_k - seqlen_q)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        lse = torch.empty((*q.shape[:-1], 1), dtype=_sum_dtype(q), device=q.device)
        for i in _tiles(seqlen_q, size_i):
            q_i = _load(q, i) * options.softmax_scale
            o_i = torch.zeros_like(q_i)
            l_i = torch.zeros_like(q_i[..., :1])
            m_i = torch.full_like(l_i, torch.finfo(l_i.dtype).min)  # not -inf, for m_i - m_i is to be 0, not NaN
            for j in _tiles(seqlen_k, size_j):
                if scores.visible(i, j) == "none":
                    continue
                k_j, v_j = _load(k, j, groups), _load(v, j, groups)
                s_ij = scores.mask(scores.cap(q_i @ k_j.mT), i, j)
                m_new = torch.maximum(m_i, s_ij.amax(dim=-1, keepdim=True))
                p_ij = torch.exp(s_ij - m_new)
                rescale = torch.exp(m_i - m_new)
                l_i = rescale * l_i + p_ij.sum(dim=-1, keepdim=True)
                o_i = rescale * o_i + p_ij @ v_j
                m_i = m_new
            blind = l_i == 0  # queries that see no key: zeros, and a log-sum-exp that makes each p_ij 0 again
            _store(out, i, o_i / l_i.masked_fill(blind, 1.0))
            _store(lse, i, (m_i + torch.log(l_i)).masked_fill(blind, inf))
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.options, ctx.on_chip_bytes = options, on_chip_bytes
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        options = ctx.options
        (_, seqlen_q, _, head_dim), seqlen_k, groups = q.shape, k.shape[1], q.shape[2] // k.shape[2]
        size_j, size_i = block_sizes(head_dim, ctx.on_chip_bytes, q.element_size())
        scores = _Scores(options, seqlen_k - seqlen_q)
        delta = torch.empty_like(lse)  # D in the papers: the rows' sums of dO * O
        for i in _tiles(seqlen_q, size_i):
            _store(delta, i, (_load(dout, i) * _load(out, i)).sum(dim=-1, keepdim=True))
        dq = torch.zeros(q.shape, dtype=_sum_dtype(q), device=q.device)  # summed over j in slow memory
        _count(0, dq)
        dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
        for j in _tiles(seqlen_k, size_j):
            k_j, v_j = _load(k, j, groups), _load(v, j, groups)
            dk_j, dv_j = torch.zeros_like(k_j), torch.zeros_like(v_j)
            for i in _tiles(seqlen_q, size_i):
                if scores.visible(i, j) == "none":
                    continue
                q_i, do_i = _load(q, i) * options.softmax_scale, _load(dout, i)
                capped = scores.cap(q_i @ k_j.mT)
                p_ij = torch.exp(scores.mask(capped, i, j) - _load(lse, i))
                dv_j += p_ij.mT @ do_i
                dp_ij = do_i @ v_j.mT
                ds_ij = p_ij * (dp_ij - _load(delta, i)) * scores.cap_slope(capped)
                dk_j += ds_ij.mT @ q_i
                _store(dq, i, _load(dq, i) + options.softmax_scale * (ds_ij @ k_j))
            _store(dk, j, dk_j, groups)
            _store(dv, j, dv_j, groups)
        return _cast(dq, q.dtype), dk, dv, None, None
