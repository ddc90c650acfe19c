"""torch's scaled_dot_product_attention, one kernel at a time: the kernel asked for runs, or torch raises."""

import warnings
from contextlib import suppress

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flashlab.attention.reference import alibi_bias, blind_queries, seen, visible
from flashlab.attention.spec import AttentionSpec, Cache, Options

_CAN_USE = {
    SDPBackend.EFFICIENT_ATTENTION: torch.backends.cuda.can_use_efficient_attention,
    SDPBackend.FLASH_ATTENTION: torch.backends.cuda.can_use_flash_attention,
    SDPBackend.CUDNN_ATTENTION: torch.backends.cuda.can_use_cudnn_attention,
}

# At 8192 queries in bfloat16 dk and dv err 4.2 times as much as standard attention, at 4096 within what is allowed.
LONGEST_SUM = 4096


def attention(kernel: SDPBackend, q: Tensor, k: Tensor, v: Tensor, options: Options) -> Tensor:
    """Run one kernel of torch's scaled_dot_product_attention, and never another.

    torch's ``is_causal`` aligns top-left; the mask here aligns bottom-right, as in flash-attn. Where torch has no word
    for a mask it is given as a tensor of Sq x Sk.

    Args:
        kernel: The kernel to run.
        q: ``[B, Sq, H, D]``.
        k: ``[B, Sk, Hkv, D]``.
        v: ``[B, Sk, Hkv, D]``.
        options: How scores become weights.
    """
    seqlen_q, seqlen_k = q.shape[1], k.shape[1]
    aligned = seqlen_q == seqlen_k or not options.causal
    if aligned and options.window_size == (-1, -1) and options.alibi_slopes is None:  # nearly always
        return _call(kernel, q, k, v, None, options.causal, options.softmax_scale)
    blind = blind_queries(seqlen_q, seqlen_k, options)  # torch's kernels disagree about such rows: they are left out
    q, seqlen_q = q[:, blind:], seqlen_q - blind
    mask, is_causal = None, False
    if options.alibi_slopes is not None or _needs_mask(seqlen_q, seqlen_k, options.causal, options.window_size):
        sees = visible(seqlen_q, seqlen_k, options, q.device)
        mask = _as_mask(kernel, q, sees, alibi_bias(seqlen_q, seqlen_k, options, q.device))
    else:
        is_causal = options.causal and seqlen_q > 1
    out = _call(kernel, q, k, v, mask, is_causal, options.softmax_scale)
    return F.pad(out, (0, 0, 0, 0, blind, 0)) if blind else out


def attention_with_kvcache(
    kernel: SDPBackend, q: Tensor, k_cache: Tensor, v_cache: Tensor, cache: Cache, options: Options
) -> Tensor:
    """Append to a key-value cache and attend to its filled places, by a mask over all its places.

    Args:
        kernel: The kernel to run.
        q: ``[B, Sq, H, D]``.
        k_cache: ``[B, Smax, Hkv, D]``, changed in place.
        v_cache: ``[B, Smax, Hkv, D]``, changed in place.
        cache: What to append, and where.
        options: How scores become weights, with Sk the number of filled places.
    """
    filled = cache.append(k_cache, v_cache)
    seqlen_q, places = q.shape[1], k_cache.shape[1]
    sees = visible(seqlen_q, places, options, q.device, filled)
    assert sees is not None  # a cache always has a mask
    kept = seen(sees)
    k, v = k_cache.where(kept, 0.0), v_cache.where(kept, 0.0)
    bias = alibi_bias(seqlen_q, places, options, q.device, filled)
    if cache.holds_own_keys(q):
        return _call(kernel, q, k, v, _as_mask(kernel, q, sees, bias), False, options.softmax_scale)
    some_key = sees.any(dim=-1, keepdim=True)  # a query of a row whose cache is still empty sees none
    mask = _as_mask(kernel, q, sees | ~some_key, bias)
    return _call(kernel, q, k, v, mask, False, options.softmax_scale) * some_key.transpose(1, 2)


def _call(
    kernel: SDPBackend, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, softmax_scale: float
) -> Tensor:
    groups = q.shape[2] // k.shape[2]
    if groups > 1 and kernel is SDPBackend.EFFICIENT_ATTENTION:  # the one kernel without grouped heads
        k, v, groups = k.repeat_interleave(groups, dim=2), v.repeat_interleave(groups, dim=2), 1
    with sdpa_kernel(kernel):
        return F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=mask,
            is_causal=is_causal,
            scale=softmax_scale,
            enable_gqa=groups > 1,
        ).transpose(1, 2)


def _as_mask(kernel: SDPBackend, q: Tensor, sees: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """Put mask and bias into the one tensor that torch takes."""
    if bias is None:
        # Up to torch 2.11 cuDNN is told -65504 for a False, which scores of that size outdo:
        # https://github.com/pytorch/pytorch/issues/177842
        if kernel is not SDPBackend.CUDNN_ATTENTION or sees is None:
            return sees
        bias = torch.zeros((), device=q.device)
    if sees is not None:
        bias = bias.masked_fill(~sees, float("-inf"))
    return bias.to(q.dtype)


def _needs_mask(seqlen_q: int, seqlen_k: int, causal: bool, window_size: tuple[int, int]) -> bool:
    """Say whether the mask is one for which torch has no word: a window, or a causal one not aligned top-left."""
    left, right = window_size
    return left >= 0 or (right >= 0 and not causal) or (causal and 1 < seqlen_q < seqlen_k)


def why_not(kernel: SDPBackend, spec: AttentionSpec) -> str | None:
    """Say why a kernel cannot run a call, in torch's own words where it has them."""
    if spec.softcap:
        return "scaled_dot_product_attention has no soft cap"
    if spec.block_sparse:
        return "scaled_dot_product_attention has no block mask"
    if kernel is SDPBackend.MATH:
        return None
    if spec.device.type == "cpu":
        if kernel is not SDPBackend.FLASH_ATTENTION:
            return "torch has this kernel for GPUs only"
        if spec.needs_grad and spec.dtype.itemsize < 4 and spec.seqlen_q > LONGEST_SUM:
            return f"on the CPU it sums dk and dv in the inputs' precision, too inexact beyond {LONGEST_SUM} queries"
        return None
    if spec.device.type != "cuda":
        return f"it needs a CUDA device; the inputs are on {spec.device}"
    if spec.infinities and kernel is SDPBackend.EFFICIENT_ATTENTION and spec.dtype == torch.float32:
        return "in float32 it takes numbers apart into two, and makes NaN of infinity"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device (`flashlab doctor` says why)"
    if spec.deterministic and spec.needs_grad and kernel is SDPBackend.CUDNN_ATTENTION:
        return "its backward pass is not deterministic"
    if spec.deterministic and spec.needs_grad and not torch.are_deterministic_algorithms_enabled():
        return "torch makes its backward pass deterministic for a whole process only (use_deterministic_algorithms)"
    return _torchs_reason(kernel, spec)


def _torchs_reason(kernel: SDPBackend, spec: AttentionSpec) -> str | None:
    """Ask torch about stand-ins of the call's shapes that take no memory."""
    options = Options(1.0, spec.causal, spec.window_size)
    seqlen_q = spec.seqlen_q - blind_queries(spec.seqlen_q, spec.seqlen_k, options)
    in_words = not spec.alibi and spec.layout == "dense"
    masked = not in_words or _needs_mask(seqlen_q, spec.seqlen_k, spec.causal, spec.window_size)

    def stand_in(heads: int, seqlen: int) -> Tensor:
        row = torch.empty(spec.head_dim, dtype=spec.dtype, device=spec.device, requires_grad=spec.needs_grad)
        return row.expand(spec.batch_size, heads, seqlen, spec.head_dim)

    kv_heads = spec.num_heads if kernel is SDPBackend.EFFICIENT_ATTENTION else spec.num_kv_heads
    q, k = stand_in(spec.num_heads, seqlen_q), stand_in(kv_heads, spec.seqlen_k)
    row = torch.ones(spec.seqlen_k, dtype=spec.dtype if spec.alibi else torch.bool, device=spec.device)
    mask = row.expand(seqlen_q, spec.seqlen_k) if masked else None
    is_causal, grouped = spec.causal and not masked and seqlen_q > 1, spec.num_heads != kv_heads
    with sdpa_kernel(kernel), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if _CAN_USE[kernel](torch.backends.cuda.SDPAParams(q, k, k, mask, 0.0, is_causal, grouped)):
            return None
        with suppress(RuntimeError):  # refuses before it computes anything, and warns why
            F.scaled_dot_product_attention(q, k, k, attn_mask=mask, is_causal=is_causal, enable_gqa=grouped)
    said = (str(warning.message).split(" (Triggered internally")[0].strip() for warning in caught)
    reasons = [text for text in said if not text.endswith("because:") and "runtime disabled" not in text]
    return "; ".join(reasons) or "torch refuses it and does not say why"  # some it says once a process
