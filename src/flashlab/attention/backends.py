"""The table of attention backends: one row each. Tests, the check and the benchmark take their backends from it."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from torch import Tensor
from torch.nn.attention import SDPBackend

from flashlab.attention import flash, flex, reference, sdpa, tiled
from flashlab.attention.spec import AttentionSpec


class Backend(NamedTuple):
    """One implementation of attention; the interface has checked what reaches it.

    Attributes:
        run: ``run(q, k, v, options)`` with q ``[B, Sq, H, D]`` and k, v ``[B, Sk, Hkv, D]``; returns ``[B, Sq, H, D]``.
        why_not: The reason why this backend cannot run a call here, or None when it can.
        run_packed: ``run_packed(q, k, v, packing, options)`` with q ``[Tq, H, D]`` and k, v ``[Tk, Hkv, D]``; returns
            ``[Tq, H, D]``. None when it has no such form.
        run_cached: ``run_cached(q, k_cache, v_cache, cache, options)`` with q ``[B, Sq, H, D]`` and caches
            ``[B, Smax, Hkv, D]``; returns ``[B, Sq, H, D]``. None when it has no such form.
        run_qkvpacked: ``run_qkvpacked(qkv, options)`` with qkv ``[B, S, 3, H, D]``; returns ``[B, S, H, D]``. None when
            it gains nothing by that.
    """

    run: Callable[..., Tensor]
    why_not: Callable[[AttentionSpec], str | None]
    run_packed: Callable[..., Tensor] | None = None
    run_cached: Callable[..., Tensor] | None = None
    run_qkvpacked: Callable[..., Tensor] | None = None


def _sdpa(kernel: SDPBackend) -> Backend:
    cached = partial(sdpa.attention_with_kvcache, kernel)
    return Backend(partial(sdpa.attention, kernel), partial(sdpa.why_not, kernel), run_cached=cached)


def _flash(version: int) -> Backend:
    return Backend(
        partial(flash.attention, version),
        partial(flash.why_not, version),
        partial(flash.attention_packed, version),
        partial(flash.attention_with_kvcache, version),
        partial(flash.attention_qkvpacked, version) if version in (2, 4) else None,
    )


BACKENDS: dict[str, Backend] = {
    "standard": Backend(
        reference.attention, reference.why_not, reference.attention_packed, reference.attention_with_kvcache
    ),
    "tiled": Backend(tiled.attention, tiled.why_not, tiled.attention_packed, tiled.attention_with_kvcache),
    "sdpa_math": _sdpa(SDPBackend.MATH),
    "sdpa_efficient": _sdpa(SDPBackend.EFFICIENT_ATTENTION),
    "sdpa_flash": _sdpa(SDPBackend.FLASH_ATTENTION),
    "sdpa_cudnn": _sdpa(SDPBackend.CUDNN_ATTENTION),
    "flash_attention_2": _flash(2),
    "flash_attention_3": _flash(3),
    "flash_attention_4": _flash(4),
    "flex_attention": Backend(flex.attention, flex.why_not, flex.attention_packed, flex.attention_with_kvcache),
}


def why_not(name: str, spec: AttentionSpec) -> str | None:
    """Say why a backend cannot run a call here, or return None when it can: the one source of every refusal."""
    backend = BACKENDS[name]
    if spec.layout == "packed" and backend.run_packed is None:
        return "it has no form for packed sequences"
    if spec.layout == "cache" and backend.run_cached is None:
        return "it has no form for a key-value cache"
    return backend.why_not(spec)
