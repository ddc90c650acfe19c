"""The table of attention backends: one row each. Tests, the check and the benchmark take their backends from it."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from torch import Tensor
from torch.nn.attention import SDPBackend

from flashlab.attention import flash, reference, sdpa
from flashlab.attention.spec import AttentionSpec


class Backend(NamedTuple):
    """One implementation of attention.

    Attributes:
        run: ``run(q, k, v, causal=..., softmax_scale=...)`` with q ``[B, Sq, H, D]`` and k, v ``[B, Sk, Hkv, D]``,
            checked by the interface; returns ``[B, Sq, H, D]``.
        why_not: The reason why this backend cannot run a call here, or None when it can.
    """

    run: Callable[..., Tensor]
    why_not: Callable[[AttentionSpec], str | None]


def _sdpa(kernel: SDPBackend) -> Backend:
    return Backend(partial(sdpa.attention, kernel), partial(sdpa.why_not, kernel))


BACKENDS: dict[str, Backend] = {
    "standard": Backend(reference.attention, reference.why_not),
    "sdpa_math": _sdpa(SDPBackend.MATH),
    "sdpa_efficient": _sdpa(SDPBackend.EFFICIENT_ATTENTION),
    "sdpa_flash": _sdpa(SDPBackend.FLASH_ATTENTION),
    "sdpa_cudnn": _sdpa(SDPBackend.CUDNN_ATTENTION),
    "flash_attention_2": Backend(flash.attention, flash.why_not),
}

# What `auto` tries, in order, on each type of device; "sdpa_math" runs everywhere.
AUTO_ORDER: dict[str, tuple[str, ...]] = {
    "cuda": ("flash_attention_2", "sdpa_flash", "sdpa_efficient", "sdpa_math"),
    "cpu": ("sdpa_flash", "sdpa_math"),
}
