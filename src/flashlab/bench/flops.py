"""The work of an attention call, counted in one place, the way the FlashAttention papers count it."""

import torch
from torch import Tensor

from flashlab.attention.spec import BLOCK_SIZE

PASSES = {"forward": 1.0, "backward": 2.5, "forward_backward": 3.5}  # pass -> its FLOPs in units of the forward pass


def flops(
    pass_name: str,
    *,
    batch_size: int,
    seqlen_q: int,
    seqlen_k: int,
    num_heads: int,
    head_dim: int,
    share: float = 1.0,
) -> float:
    """Count the floating-point operations of one pass: 4 * B * Sq * Sk * H * D * share for the forward pass.

    The softmax is not counted. The backward pass recomputes the scores, so it has five matrix products to the forward's
    two: 2.5 times the work.

    Args:
        pass_name: A key of `PASSES`.
        batch_size: B.
        seqlen_q: Sq.
        seqlen_k: Sk.
        num_heads: H, the query heads.
        head_dim: D.
        share: The part of the scores that the mask leaves, from `visible_share`.

    Source: section 4.1 of FlashAttention-2 (arXiv 2307.08691).
    """
    return PASSES[pass_name] * 4 * batch_size * seqlen_q * seqlen_k * num_heads * head_dim * share


def visible_share(
    seqlen_q: int,
    seqlen_k: int,
    *,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    block_mask: Tensor | None = None,
) -> float:
    """Return the part of the Sq * Sk scores that counts as work under a mask.

    Full attention counts 1 and causal attention 1/2, the papers' convention, whatever the lengths. A window counts the
    (query, key) pairs that see each other. A block mask counts the pairs in its non-zero blocks, and with a causal mask
    half of them.

    Args:
        seqlen_q: Sq.
        seqlen_k: Sk.
        causal: As in `flashlab.attention.attention`, like the rest.
        window_size: (left, right).
        block_mask: bool ``[ceil(Sq / 128), ceil(Sk / 128)]``.
    """
    if block_mask is not None:
        rows, columns = (
            torch.tensor([min(BLOCK_SIZE, seqlen - start) for start in range(0, seqlen, BLOCK_SIZE)])
            for seqlen in (seqlen_q, seqlen_k)
        )
        pairs = int((block_mask.cpu() * rows[:, None] * columns).sum())
        return pairs / (seqlen_q * seqlen_k) / (2 if causal else 1)
    left, right = window_size
    if causal and left < 0:
        return 0.5
    return _pairs(seqlen_q, seqlen_k, left, 0 if causal else right) / (seqlen_q * seqlen_k)


def _pairs(seqlen_q: int, seqlen_k: int, left: int, right: int) -> int:
    """Count the pairs of a query and a key that it sees through a window, aligned bottom-right."""
    position = torch.arange(seqlen_q) + (seqlen_k - seqlen_q)
    first = (position - left).clamp(min=0) if left >= 0 else torch.zeros_like(position)
    last = (position + right).clamp(max=seqlen_k - 1) if right >= 0 else torch.full_like(position, seqlen_k - 1)
    return int((last - first + 1).clamp(min=0).sum())
