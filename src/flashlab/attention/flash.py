"""flash-attn 2, 3 and 4: Tri Dao's kernels, whose packages share one set of names."""

from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from flashlab.attention import flash4
from flashlab.attention.spec import AttentionSpec, Cache, Options, Packing

# flash-attn 4 installs into the same package `flash_attn` as flash-attn 2: only these modules prove a version.
MODULES = {2: "flash_attn.flash_attn_interface", 3: "flash_attn_interface", 4: "flash_attn.cute.interface"}
LOWEST_CAPABILITY = {2: (8, 0), 3: (9, 0), 4: (9, 0)}

_LOADED: dict[int, ModuleType] = {}  # by import_problem, which every call passes first; `import` takes a microsecond


def attention(version: int, q: Tensor, k: Tensor, v: Tensor, options: Options) -> Tensor:
    """Run flash-attn on sequences of one length.

    Args:
        version: 2, 3 or 4.
        q: ``[B, Sq, H, D]``.
        k: ``[B, Sk, Hkv, D]``.
        v: ``[B, Sk, Hkv, D]``.
        options: How scores become weights.
    """
    if version == 4 and torch.compiler.is_compiling():
        return flash4.attention(q, k, v, options)
    return _out(_LOADED[version].flash_attn_func(q, k, v, **_keywords(version, options)))


def attention_qkvpacked(version: int, qkv: Tensor, options: Options) -> Tensor:
    """Run flash-attn on queries, keys and values in one tensor, whose gradient is one as well.

    Args:
        version: 2 or 4.
        qkv: ``[B, S, 3, H, D]``.
        options: How scores become weights.
    """
    if version == 4:
        return flash4.attention_qkvpacked(qkv, options)
    return _out(_LOADED[version].flash_attn_qkvpacked_func(qkv, **_keywords(version, options)))


def attention_packed(version: int, q: Tensor, k: Tensor, v: Tensor, packing: Packing, options: Options) -> Tensor:
    """Run flash-attn on sequences of several lengths in a row.

    Args:
        version: 2, 3 or 4.
        q: ``[Tq, H, D]``.
        k: ``[Tk, Hkv, D]``.
        v: ``[Tk, Hkv, D]``.
        packing: Where the sequences begin and end.
        options: How scores become weights.
    """
    return _out(_LOADED[version].flash_attn_varlen_func(q, k, v, **packing._asdict(), **_keywords(version, options)))


def attention_with_kvcache(
    version: int, q: Tensor, k_cache: Tensor, v_cache: Tensor, cache: Cache, options: Options
) -> Tensor:
    """Append to a key-value cache and attend to its filled places.

    Args:
        version: 2 or 3.
        q: ``[B, Sq, H, D]``.
        k_cache: ``[B, Smax, Hkv, D]``, changed in place.
        v_cache: ``[B, Smax, Hkv, D]``, changed in place.
        cache: What to append, and where.
        options: How scores become weights, with Sk the number of filled places.
    """
    keywords = _keywords(version, options)
    del keywords["deterministic"]  # there is no backward pass
    # flash-attn appends to no cache of fewer places than queries, and of one query it counts the heads of a group.
    if max(q.shape[1], q.shape[2] // k_cache.shape[2]) > k_cache.shape[1]:
        cache = Cache(cache.append(k_cache, v_cache), None, None)
    run = _LOADED[version].flash_attn_with_kvcache
    return _out(run(q, k_cache, v_cache, k=cache.k, v=cache.v, cache_seqlens=cache.seqlens, **keywords))


def _keywords(version: int, options: Options) -> dict[str, Any]:
    keywords = {
        "softmax_scale": options.softmax_scale,
        "causal": options.causal,
        "window_size": options.window_size,
        "softcap": options.softcap,
        "deterministic": options.deterministic,
    }
    if version == 2:
        keywords["alibi_slopes"] = options.alibi_slopes
    elif version == 4:
        keywords["window_size"] = tuple(None if size < 0 else size for size in options.window_size)
    return keywords


def _out(returned: Any) -> Tensor:
    """Drop the log-sum-exp that some versions return beside the output."""
    return returned[0] if isinstance(returned, tuple) else returned


def why_not(version: int, spec: AttentionSpec) -> str | None:
    """Say why one version of flash-attn cannot run a call."""
    if spec.device.type != "cuda":
        return f"it needs a CUDA device; the inputs are on {spec.device}"
    if spec.dtype not in (torch.float16, torch.bfloat16):
        return f"it computes in float16 or bfloat16 only; the inputs are {spec.dtype}".replace("torch.", "")
    if spec.head_dim > 256:
        return f"it takes head_dim up to 256; got {spec.head_dim}"
    if spec.head_dim % 8:
        return f"it takes head_dim in multiples of 8; got {spec.head_dim}"
    if spec.block_sparse:
        return f"flash-attn {version} takes no block mask here; flex_attention does"
    if spec.alibi and version > 2:
        return f"flash-attn {version} has no ALiBi"
    if spec.layout == "cache" and version == 4:
        return "flash-attn 4 reads places of a cache that were never written, and has no call that appends"
    if (problem := import_problem(version)) is not None:
        return problem
    if not torch.cuda.is_available():
        return "torch sees no CUDA device (`flashlab doctor` says why)"
    capability = torch.cuda.get_device_capability(spec.device)
    if capability < LOWEST_CAPABILITY[version]:
        name = "an Ampere" if version == 2 else "a Hopper"
        lowest = "{}.{}".format(*LOWEST_CAPABILITY[version])
        return "it needs {} GPU or newer (compute capability {}); this one has {}.{}".format(name, lowest, *capability)
    if version == 3 and capability[0] > 9:
        return "it is made for Hopper alone (compute capability 9.0); this one has {}.{}".format(*capability)
    return None


@cache
def import_problem(version: int) -> str | None:
    """Say why a version of flash-attn cannot be imported, or return None when it can."""
    module = MODULES[version]
    try:
        _LOADED[version] = import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if module == missing or module.startswith(f"{missing}."):
            return f"flash-attn {version} is not installed"
        return f"flash-attn {version} lacks its module {missing} (`flashlab doctor` names the remedy)"
    except Exception as error:  # a package compiled for another torch or CUDA fails in its own ways
        message = " ".join(str(error).split())
        return (
            f"flash-attn {version} does not load with torch {torch.__version__}: {message} "
            "(`flashlab doctor` names the remedy)"
        )
    return None
