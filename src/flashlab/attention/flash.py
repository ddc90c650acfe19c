"""flash-attn 2: Tri Dao's CUDA kernels, from the package flash-attn."""

from functools import cache
from importlib import import_module

import torch
from torch import Tensor

from flashlab.attention.spec import AttentionSpec

# flash-attn 4 installs into the same package `flash_attn`; only this module proves flash-attn 2.
MODULE = "flash_attn.flash_attn_interface"


def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, softmax_scale: float) -> Tensor:
    """Run flash-attn 2; its causal mask aligns bottom-right.

    Args:
        q: ``[B, Sq, H, D]``.
        k: ``[B, Sk, Hkv, D]``.
        v: ``[B, Sk, Hkv, D]``.
        causal: Let query i see the keys up to i + Sk - Sq.
        softmax_scale: Factor on the scores.
    """
    from flash_attn.flash_attn_interface import flash_attn_func

    return flash_attn_func(q, k, v, softmax_scale=softmax_scale, causal=causal)


def why_not(spec: AttentionSpec) -> str | None:
    """Say why flash-attn 2 cannot run a call."""
    if spec.device.type != "cuda":
        return f"it needs a CUDA device; the inputs are on {spec.device}"
    if spec.dtype not in (torch.float16, torch.bfloat16):
        return f"it computes in float16 or bfloat16 only; the inputs are {spec.dtype}".replace("torch.", "")
    if spec.head_dim > 256:
        return f"it takes head_dim up to 256; got {spec.head_dim}"
    if spec.head_dim % 8:
        return f"it takes head_dim in multiples of 8; got {spec.head_dim}"
    if (problem := import_problem()) is not None:
        return problem
    if not torch.cuda.is_available():
        return "torch sees no CUDA device (`flashlab doctor` says why)"
    if (capability := torch.cuda.get_device_capability(spec.device)) < (8, 0):
        return "it needs an Ampere GPU or newer (compute capability 8.0); this one has {}.{}".format(*capability)
    return None


@cache
def import_problem() -> str | None:
    """Say why flash-attn 2 cannot be imported, or return None when it can."""
    try:
        import_module(MODULE)
    except ModuleNotFoundError as error:
        if error.name in ("flash_attn", MODULE):
            return "flash-attn 2 is not installed"
        return f"flash-attn 2 lacks its module {error.name} (`flashlab doctor` names the remedy)"
    except (ImportError, OSError) as error:
        message = " ".join(str(error).split())
        return (
            f"flash-attn 2 does not load with torch {torch.__version__}: {message} (`flashlab doctor` names the remedy)"
        )
    return None
