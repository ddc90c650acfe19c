"""torch's scaled_dot_product_attention, one kernel at a time: the kernel asked for runs, or torch raises."""

import warnings
from contextlib import suppress

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flashlab.attention.spec import AttentionSpec

_CAN_USE = {
    SDPBackend.EFFICIENT_ATTENTION: torch.backends.cuda.can_use_efficient_attention,
    SDPBackend.FLASH_ATTENTION: torch.backends.cuda.can_use_flash_attention,
    SDPBackend.CUDNN_ATTENTION: torch.backends.cuda.can_use_cudnn_attention,
}


def attention(kernel: SDPBackend, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, softmax_scale: float) -> Tensor:
    """Run one kernel of torch's scaled_dot_product_attention, and never another.

    torch's ``is_causal`` aligns top-left; the mask here aligns bottom-right, as in flash-attn.

    Args:
        kernel: The kernel to run.
        q: ``[B, Sq, H, D]``.
        k: ``[B, Sk, Hkv, D]``.
        v: ``[B, Sk, Hkv, D]``.
        causal: Let query i see the keys up to i + Sk - Sq.
        softmax_scale: Factor on the scores.
    """
    seqlen_q, seqlen_k, groups = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    if groups > 1 and kernel is SDPBackend.EFFICIENT_ATTENTION:  # the one kernel without grouped heads
        k, v, groups = k.repeat_interleave(groups, dim=2), v.repeat_interleave(groups, dim=2), 1
    blind, masked = _causal_layout(seqlen_q, seqlen_k) if causal else (0, False)
    mask = (
        torch.ones(seqlen_q, seqlen_k, dtype=torch.bool, device=q.device).tril(seqlen_k - seqlen_q) if masked else None
    )
    with sdpa_kernel(kernel):
        out = F.scaled_dot_product_attention(
            q[:, blind:].transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=mask,
            is_causal=causal and not masked and seqlen_q > 1,
            scale=softmax_scale,
            enable_gqa=groups > 1,
        ).transpose(1, 2)
    return F.pad(out, (0, 0, 0, 0, blind, 0)) if blind else out


def _causal_layout(seqlen_q: int, seqlen_k: int) -> tuple[int, bool]:
    """Fit a bottom-right causal mask to torch's top-left ``is_causal``.

    Returns:
        The number of leading queries that see no key and are left out, and whether the rest needs an explicit mask. One
        query alone sees every key and needs none.
    """
    return max(seqlen_q - seqlen_k, 0), 1 < seqlen_q < seqlen_k


def why_not(kernel: SDPBackend, spec: AttentionSpec) -> str | None:
    """Say why a kernel cannot run a call, in torch's own words where it has them."""
    if kernel is SDPBackend.MATH:
        return None
    if spec.device.type == "cpu":
        return None if kernel is SDPBackend.FLASH_ATTENTION else "torch has this kernel for GPUs only"
    if spec.device.type != "cuda":
        return f"it needs a CUDA device; the inputs are on {spec.device}"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device (`flashlab doctor` says why)"
    return _torchs_reason(kernel, spec)


def _torchs_reason(kernel: SDPBackend, spec: AttentionSpec) -> str | None:
    """Ask torch about stand-ins of the call's shapes that take no memory."""
    kv_heads = spec.num_heads if kernel is SDPBackend.EFFICIENT_ATTENTION else spec.num_kv_heads
    blind, masked = _causal_layout(spec.seqlen_q, spec.seqlen_k) if spec.causal else (0, False)

    def stand_in(heads: int, seqlen: int) -> Tensor:
        row = torch.empty(spec.head_dim, dtype=spec.dtype, device=spec.device, requires_grad=spec.needs_grad)
        return row.expand(spec.batch_size, heads, seqlen, spec.head_dim)

    q, k = stand_in(spec.num_heads, spec.seqlen_q - blind), stand_in(kv_heads, spec.seqlen_k)
    row = torch.ones(spec.seqlen_k, dtype=torch.bool, device=spec.device)
    mask = row.expand(spec.seqlen_q, spec.seqlen_k) if masked else None
    is_causal, grouped = spec.causal and not masked and spec.seqlen_q > 1, spec.num_heads != kv_heads
    with sdpa_kernel(kernel), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if _CAN_USE[kernel](torch.backends.cuda.SDPAParams(q, k, k, mask, 0.0, is_causal, grouped)):
            return None
        with suppress(RuntimeError):  # refuses before it computes anything, and warns why
            F.scaled_dot_product_attention(q, k, k, attn_mask=mask, is_causal=is_causal, enable_gqa=grouped)
    said = (str(warning.message).split(" (Triggered internally")[0].strip() for warning in caught)
    reasons = [text for text in said if not text.endswith("because:") and "runtime disabled" not in text]
    return "; ".join(reasons) or "torch refuses it and does not say why"  # some it says once a process
