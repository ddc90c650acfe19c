"""What one attention call asks of a backend."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class AttentionSpec:
    """Describe one attention call, without its values.

    A later feature (window, ALiBi, soft cap, packed lengths, key-value cache) is one more field with a default, which
    each backend's ``why_not`` accepts or refuses.
    """

    batch_size: int
    seqlen_q: int
    seqlen_k: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    causal: bool = False
    needs_grad: bool = False
