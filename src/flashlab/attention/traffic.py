"""The bytes that attention algorithms move between slow and on-chip memory: counted, and by the papers' formulas."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from flashlab.attention.spec import BLOCK_SIZE, Options
from flashlab.attention.tiled import ON_CHIP_BYTES, Traffic, attention, block_sizes, counting


def bytes_moved(
    algorithm: Literal["standard", "tiled", "block_sparse"],
    seqlen: int,
    head_dim: int,
    density: float = 1.0,
    *,
    backward: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    on_chip_bytes: int = ON_CHIP_BYTES,
) -> dict[str, int]:
    """Count the bytes that one head moves in one pass, beside what theory says.

    Args:
        algorithm: "standard" writes the scores to slow memory, "tiled" does not, "block_sparse" is tiled with a mask.
        seqlen: Queries and keys.
        head_dim: Length of a row of q, k or v.
        density: Share of the blocks of scores that are computed, for "block_sparse"; rounded to whole blocks.
        backward: Count the backward pass instead of the forward pass.
        dtype: Of q, k and v.
        on_chip_bytes: Memory for the tiles of one head.

    Returns:
        bytes_read, bytes_written, and theory_bytes, which is to be the sum of the two.
    """
    if algorithm == "standard":
        counted = _standard_traffic(seqlen, head_dim, dtype, backward)
    else:
        blocks = _block_mask(seqlen, density) if algorithm == "block_sparse" else None
        density = 1.0 if blocks is None else int(blocks.sum()) / blocks.numel()
        options = Options(head_dim**-0.5, block_mask=blocks)
        q, k, v = (torch.zeros(1, seqlen, 1, head_dim, dtype=dtype, requires_grad=True) for _ in range(3))
        with counting() as counted:
            out = attention(q, k, v, options, on_chip_bytes)
        if backward:
            with counting() as counted:
                out.backward(torch.zeros_like(out))
    theory = theory_bytes(
        algorithm, seqlen, head_dim, density, backward=backward, dtype=dtype, on_chip_bytes=on_chip_bytes
    )
    return {"bytes_read": counted.bytes_read, "bytes_written": counted.bytes_written, "theory_bytes": theory}


def theory_bytes(
    algorithm: Literal["standard", "tiled", "block_sparse"],
    seqlen: int,
    head_dim: int,
    density: float = 1.0,
    *,
    backward: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    on_chip_bytes: int = ON_CHIP_BYTES,
) -> int:
    """Return the bytes that one head moves in one pass, from the papers' counts with the constants of these tiles.

    With N the length, d the head dimension, s the density and M the items that fit on chip: Theta(Nd + N^2) for
    standard attention, Theta(Nd + s N^2 d^2 / M) for the tiled kinds, where the large tiles hold M / 4d rows. Exact for
    a block mask if 128 divides the length.

    Source: FlashAttention, Theorem 2 and Theorem 5 (forward and backward), Proposition 4 (block-sparse).
    """
    itemsize = dtype.itemsize
    rows, square = seqlen * head_dim * itemsize, seqlen**2 * itemsize  # of one matrix
    if algorithm == "standard":  # forward: Q K^T, softmax, P V; backward: P^T dO, dO V^T, softmax, dS K, dS^T Q
        return 8 * rows + 7 * square if backward else 4 * rows + 4 * square
    passes = density * -(-seqlen // block_sizes(head_dim, on_chip_bytes, itemsize)[0])  # over the streamed tiles
    sum_size = max(itemsize, 4)
    sums, statistic = seqlen * head_dim * sum_size, seqlen * sum_size
    if not backward:  # once Q, O, m and l; each pass K and V
        return round(2 * rows + 2 * statistic + passes * 2 * rows)
    prologue = 2 * rows + statistic + sums  # dO and O; D and a dQ of zeros
    each_pass = 2 * rows + 3 * statistic + 2 * sums  # Q and dO; m, l and D; dQ there and back
    epilogue = sums + rows if itemsize < sum_size else 0  # dQ rounded to the inputs' precision
    return round(prologue + 4 * rows + passes * each_pass + epilogue)  # 4: once K, V, dK and dV


def _standard_traffic(seqlen: int, head_dim: int, dtype: torch.dtype, backward: bool) -> Traffic:
    """Count the inputs and the output of each step of standard attention, on tensors without values.

    Source: FlashAttention, Algorithms 0 and 3.
    """
    counted = Traffic()

    def step(operation: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        output = operation(*inputs)
        counted.bytes_read += sum(x.nbytes for x in inputs)
        counted.bytes_written += output.nbytes
        return output

    q, k, v, dout = (torch.empty(seqlen, head_dim, dtype=dtype, device="meta") for _ in range(4))
    p = torch.empty(seqlen, seqlen, dtype=dtype, device="meta")
    if not backward:
        s = step(torch.matmul, q, k.mT)
        p = step(lambda s: s.softmax(dim=-1), s)
        step(torch.matmul, p, v)
    else:
        step(torch.matmul, p.mT, dout)
        dp = step(torch.matmul, dout, v.mT)
        ds = step(lambda p, dp: p * (dp - (p * dp).sum(dim=-1, keepdim=True)), p, dp)
        step(torch.matmul, ds, k)
        step(torch.matmul, ds.mT, q)
    return counted


def _block_mask(seqlen: int, density: float) -> Tensor:
    """Scatter the asked share of non-zero blocks, the same for the same arguments."""
    n = -(-seqlen // BLOCK_SIZE)
    order = torch.randperm(n * n, generator=torch.Generator().manual_seed(0))
    return (order < round(density * n * n)).view(n, n)
