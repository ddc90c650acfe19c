"""Standard attention: softmax over the full matrix of scores.

In the input's precision it is the baseline; on float64 copies of the inputs it is the oracle that every backend is
judged against.
"""

import torch
from torch import Tensor

from flashlab.attention.spec import AttentionSpec


def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, softmax_scale: float) -> Tensor:
    """Compute softmax(q k^T * softmax_scale) v in the precision of the inputs.

    Args:
        q: ``[B, Sq, H, D]``.
        k: ``[B, Sk, Hkv, D]``.
        v: ``[B, Sk, Hkv, D]``.
        causal: Let query i see the keys up to i + Sk - Sq (bottom-right alignment).
        softmax_scale: Factor on the scores.
    """
    groups = q.shape[2] // k.shape[2]
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=2), v.repeat_interleave(groups, dim=2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * softmax_scale
    if causal:
        seqlen_q, seqlen_k = scores.shape[-2:]
        visible = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool, device=q.device).tril(seqlen_k - seqlen_q)
        # The lowest number instead of -inf: a query that sees no key then has weights to clear below, not NaN.
        scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
        weights = scores.softmax(dim=-1)
        if seqlen_q > seqlen_k:
            weights = weights.masked_fill(~visible, 0.0)
    else:
        weights = scores.softmax(dim=-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights.to(v.dtype), v)


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
