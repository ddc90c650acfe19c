"""FlashAttention in plain PyTorch: tiles, an online softmax, recomputation in the backward pass, and a count of bytes.

The names are those of the papers' pseudo-code: i counts tiles of queries, j tiles of keys and values; ``load`` moves a
tile from slow to on-chip memory and ``store`` moves one back. All batches and heads take each step together. Sums are
kept in float32 (float64 for float64 inputs) and stay on chip, all but those of dq.

The forward pass is Algorithm 1 in FlashAttention-2's order: a tile of queries stays while keys and values stream past
it, so that its output, maximum and sum never leave the chip; the first paper's order moves them back and forth once for
each tile of keys. The backward pass turns the loops around, as both papers do. A tile of scores in which nothing is
visible is neither loaded nor computed, so the cost of a block mask is linear in its non-zero blocks.

Source: Dao et al., FlashAttention (arXiv 2205.14135), Algorithms 1, 4 and 5; Dao, FlashAttention-2 (arXiv 2307.08691),
Algorithms 1 and 2.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flashlab.attention import reference
from flashlab.attention.reference import of_sequence, window
from flashlab.attention.spec import BLOCK_SIZE, AttentionSpec, Cache, Options, Packing

# What the tiles of one head share. Source: FlashAttention, section 3.2: "M (around 100KB)"; an A100's SM has 192 KiB.
ON_CHIP_BYTES = 100 * 1024
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def attention(q: Tensor, k: Tensor, v: Tensor, options: Options, on_chip_bytes: int = ON_CHIP_BYTES) -> Tensor:
    """Compute attention tile by tile; the backward pass needs the output and two numbers a query, no scores.

    Args:
        q: ``[B, Sq, H, D]``.
        k: ``[B, Sk, Hkv, D]``.
        v: ``[B, Sk, Hkv, D]``.
        options: How scores become weights.
        on_chip_bytes: Memory for the tiles of one head; it gives the block sizes.
    """
    blocks: Any = options.block_mask
    if blocks is not None and not torch.compiler.is_compiling():  # a graph cannot depend on it and skips no block
        blocks = blocks.tolist()
    return _Attention.apply(q, k, v, options._replace(block_mask=blocks), on_chip_bytes)


def attention_packed(q: Tensor, k: Tensor, v: Tensor, packing: Packing, options: Options) -> Tensor:
    """Attend within each of several sequences that lie in a row, one sequence after the other.

    Args:
        q: ``[Tq, H, D]``.
        k: ``[Tk, Hkv, D]``.
        v: ``[Tk, Hkv, D]``.
        packing: Where the sequences begin and end.
        options: How scores become weights; alibi_slopes ``[N, H]`` differ by sequence.
    """
    return reference.attention_packed(q, k, v, packing, options, attend=attention)


def attention_with_kvcache(q: Tensor, k_cache: Tensor, v_cache: Tensor, cache: Cache, options: Options) -> Tensor:
    """Append to a key-value cache and attend to its filled places, one sequence after the other.

    Args:
        q: ``[B, Sq, H, D]``.
        k_cache: ``[B, Smax, Hkv, D]``, changed in place.
        v_cache: ``[B, Smax, Hkv, D]``, changed in place.
        cache: What to append, and where.
        options: How scores become weights, with Sk the number of filled places.
    """
    outs = []
    for b, filled in enumerate(cache.append(k_cache, v_cache).tolist()):
        k_b, v_b = k_cache[None, b, :filled], v_cache[None, b, :filled]
        outs.append(attention(q[None, b], k_b, v_b, of_sequence(options, b)))
    return torch.cat(outs)


def why_not(spec: AttentionSpec) -> str | None:
    """Refuse only what PyTorch cannot compute with."""
    if spec.dtype not in DTYPES:
        dtype = str(spec.dtype).removeprefix("torch.")
        return f"it computes in float16, bfloat16, float32 or float64; the inputs are {dtype}"
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


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, options: Options, on_chip_bytes: int) -> Tensor:
        with torch.autocast(q.device.type, enabled=False):  # it would round every product
            out, row_max, row_sum = _forward(q, k, v, options, on_chip_bytes)
        ctx.save_for_backward(q, k, v, out, row_max, row_sum)
        ctx.options, ctx.on_chip_bytes = options, on_chip_bytes
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, row_max, row_sum = ctx.saved_tensors
        with torch.autocast(q.device.type, enabled=False):
            dq, dk, dv = _backward(dout, q, k, v, out, row_max, row_sum, ctx.options, ctx.on_chip_bytes)
        return dq, dk, dv, None, None


def _forward(q: Tensor, k: Tensor, v: Tensor, options: Options, on_chip_bytes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output, and the maximum and the sum of each row of scores ``[B, Sq, H, 1]``."""
    size_i, size_j = block_sizes(q.shape[-1], on_chip_bytes, q.element_size())
    groups = q.shape[2] // k.shape[2]
    scores = _Scores(options, k.shape[1] - q.shape[1])
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    row_max, row_sum = (torch.empty((*q.shape[:-1], 1), dtype=_sum_dtype(q), device=q.device) for _ in range(2))
    for i in _tiles(q, size_i):
        q_i = _load(q, i)
        o_i = torch.zeros_like(q_i)
        l_i = torch.zeros_like(q_i[..., :1])
        m_i = torch.full_like(l_i, torch.finfo(l_i.dtype).min)  # not -inf, for m_i - m_i is to be 0, not NaN
        for j in _tiles(k, size_j):
            if scores.visible(i, j) == "none":
                continue
            k_j, v_j = _load(k, j, groups), _load(v, j, groups)
            s_ij = scores.mask(scores.scale(q_i @ k_j.mT), i, j)
            m_new = torch.maximum(m_i, s_ij.amax(dim=-1, keepdim=True))
            p_ij = torch.exp(s_ij - m_new)
            rescale = torch.exp(m_i - m_new)
            l_i = rescale * l_i + p_ij.sum(dim=-1, keepdim=True)
            o_i = rescale * o_i + p_ij @ v_j
            m_i = m_new
        l_i = l_i.masked_fill(l_i == 0, inf)  # a query that sees no key: its output is 0, and each p_ij below
        _store(out, i, o_i / l_i)
        _store(row_max, i, m_i)  # both, not their log-sum-exp: rounding that would show in gradients of large scores
        _store(row_sum, i, l_i)
    return out, row_max, row_sum


def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    row_max: Tensor,
    row_sum: Tensor,
    options: Options,
    on_chip_bytes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk and dv; p_ij is computed again."""
    size_j, size_i = block_sizes(q.shape[-1], on_chip_bytes, q.element_size())
    groups = q.shape[2] // k.shape[2]
    scores = _Scores(options, k.shape[1] - q.shape[1])
    delta = torch.empty_like(row_max)  # D in the papers: each row's sum of dO * O
    dq_sum = torch.empty(q.shape, dtype=_sum_dtype(q), device=q.device)  # over j
    dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
    for i in _tiles(q, size_i):
        do_i = _load(dout, i)
        _store(delta, i, (do_i * _load(out, i)).sum(dim=-1, keepdim=True))
        _store(dq_sum, i, torch.zeros_like(do_i))
    for j in _tiles(k, size_j):
        k_j, v_j = _load(k, j, groups), _load(v, j, groups)
        dk_j, dv_j = torch.zeros_like(k_j), torch.zeros_like(v_j)
        for i in _tiles(q, size_i):
            if scores.visible(i, j) == "none":
                continue
            q_i, do_i = _load(q, i), _load(dout, i)
            scaled = scores.scale(q_i @ k_j.mT)
            p_ij = torch.exp(scores.mask(scaled, i, j) - _load(row_max, i)) / _load(row_sum, i)
            dv_j += p_ij.mT @ do_i
            dp_ij = do_i @ v_j.mT
            ds_ij = scores.scale_gradient(p_ij * (dp_ij - _load(delta, i)), scaled)
            dk_j += ds_ij.mT @ q_i
            _store(dq_sum, i, _load(dq_sum, i) + ds_ij @ k_j)
        _store(dk, j, dk_j, groups)
        _store(dv, j, dv_j, groups)
    if dq_sum.dtype == q.dtype:
        return dq_sum, dk, dv
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    for i in _tiles(q, size_i):
        _store(dq, i, _load(dq_sum, i))
    return dq, dk, dv


class _Scores(NamedTuple):
    """What becomes of a tile of q k^T: the scale, the soft cap, the ALiBi bias and the masks."""

    options: Options
    offset: int  # Sk - Sq

    def visible(self, i: slice, j: slice) -> Literal["none", "some", "all"]:
        """Say how much of a tile counts."""
        left, right = window(self.options)
        nearest, farthest = i.start + self.offset - (j.stop - 1), i.stop - 1 + self.offset - j.start
        if (right >= 0 and farthest < -right) or (left >= 0 and nearest > left):
            return "none"
        blocks: Any = self.options.block_mask
        if isinstance(blocks, list) and not blocks[i.start // BLOCK_SIZE][j.start // BLOCK_SIZE]:
            return "none"
        cut = (right >= 0 and nearest < -right) or (left >= 0 and farthest > left) or isinstance(blocks, Tensor)
        return "some" if cut else "all"

    def scale(self, s_ij: Tensor) -> Tensor:
        """Scale a tile of q k^T, and cap it softly."""
        s_ij, softcap = s_ij * self.options.softmax_scale, self.options.softcap
        return softcap * torch.tanh(s_ij / softcap) if softcap > 0 else s_ij

    def scale_gradient(self, ds_ij: Tensor, scaled: Tensor) -> Tensor:
        """Turn the gradient of what `scale` returned into that of q k^T."""
        ds_ij, softcap = ds_ij * self.options.softmax_scale, self.options.softcap
        return ds_ij * (1 - (scaled / softcap) ** 2) if softcap > 0 else ds_ij

    def mask(self, s_ij: Tensor, i: slice, j: slice) -> Tensor:
        """Add the bias, and set scores that do not count to -inf."""
        slopes, blocks = self.options.alibi_slopes, self.options.block_mask
        cut = self.visible(i, j) == "some"
        if slopes is None and not cut:
            return s_ij
        rows = torch.arange(i.start + self.offset, i.stop + self.offset, device=s_ij.device)
        distance = rows[:, None] - torch.arange(j.start, j.stop, device=s_ij.device)
        if slopes is not None:
            s_ij = s_ij - slopes[..., None, None] * distance.abs()
        left, right = window(self.options)
        if cut and right >= 0:
            s_ij = s_ij.masked_fill(distance < -right, -inf)
        if cut and left >= 0:
            s_ij = s_ij.masked_fill(distance > left, -inf)
        if isinstance(blocks, Tensor):
            s_ij = s_ij.masked_fill(~blocks[i.start // BLOCK_SIZE, j.start // BLOCK_SIZE], -inf)
        return s_ij


def _tiles(x: Tensor, size: int) -> list[slice]:
    """Cut the rows of ``[B, S, H, D]``."""
    return [slice(start, min(start + size, x.shape[1])) for start in range(0, x.shape[1], size)]


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _load(x: Tensor, rows: slice, groups: int = 1) -> Tensor:
    """Read a tile of ``[B, S, H, D]`` as ``[B, H, rows, D]``; `groups` query heads each read a key head's."""
    tile = x[:, rows].transpose(1, 2)
    if groups > 1:
        tile = tile.repeat_interleave(groups, dim=1)
    if _traffic is not None:
        _traffic.bytes_read += tile.numel() * x.element_size()
    return tile.to(_sum_dtype(x))


def _store(x: Tensor, rows: slice, tile: Tensor, groups: int = 1) -> None:
    """Write a tile ``[B, H, rows, D]`` into ``[B, S, H, D]``; the query heads of a key head are summed."""
    if groups > 1:
        tile = tile.unflatten(1, (-1, groups)).sum(dim=2)
    x[:, rows] = tile.transpose(1, 2)
    if _traffic is not None:
        _traffic.bytes_written += tile.numel() * x.element_size()


@dataclass
class Traffic:
    """Bytes moved between slow memory and the chip."""

    bytes_read: int = 0
    bytes_written: int = 0


_traffic: Traffic | None = None


@contextmanager
def counting() -> Iterator[Traffic]:
    """Count what attention moves while this context is open.

    q, k, v, the output, the rows' statistics and all gradients count; the masks and slopes, which are small, do not.
    """
    global _traffic
    outer, _traffic = _traffic, Traffic()
    try:
        yield _traffic
    finally:
        _traffic = outer
