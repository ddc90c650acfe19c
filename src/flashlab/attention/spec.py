"""What one attention call asks of a backend: options that carry values, and a description without any."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

BLOCK_SIZE = 128  # rows and columns of scores that one entry of a block mask stands for


class Options(NamedTuple):
    """How scores become weights; the same for every backend.

    For query i and key j of one sequence, with distance d = i + Sk - Sq - j (bottom-right alignment):
    s = q_i . k_j * softmax_scale; s = softcap * tanh(s / softcap) if softcap > 0; s = s - alibi_slopes[h] * |d|;
    then j is visible to i where all of causal, window_size and block_mask let it. A query that sees no key gets zeros.

    Attributes:
        softmax_scale: Factor on the scores.
        causal: See only keys with d >= 0.
        window_size: (left, right): see only keys with d <= left and d >= -right; -1 is unlimited.
        softcap: Bound on the scores, 0 for none.
        alibi_slopes: float32 ``[H]`` or ``[B, H]``, or None for no bias.
        block_mask: bool ``[ceil(Sq / 128), ceil(Sk / 128)]``, or None: the blocks of scores that are computed, counted
            from the first query and the first key.
        deterministic: Ask for a backward pass that gives the same bits every time.
    """

    softmax_scale: float
    causal: bool = False
    window_size: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    alibi_slopes: Tensor | None = None
    block_mask: Tensor | None = None
    deterministic: bool = False


@dataclass(frozen=True)
class AttentionSpec:
    """Describe one attention call, without its values; each backend's ``why_not`` accepts or refuses it.

    Attributes:
        layout: "dense": ``[B, S, H, D]``; "packed": sequences of several lengths in a row ``[T, H, D]`` (seqlen_q and
            seqlen_k are then the longest); "cache": queries ``[B, Sq, H, D]`` against a key-value cache of Sk places.
        needs_grad: A backward pass may follow.
        infinities: An infinite entry of k has to count as what it is, a score of plus or minus infinity. No call asks
            for it; the check does.
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
    window_size: tuple[int, int] = (-1, -1)
    softcap: bool = False
    alibi: bool = False
    block_sparse: bool = False
    deterministic: bool = False
    layout: Literal["dense", "packed", "cache"] = "dense"
    infinities: bool = False


class Packing(NamedTuple):
    """Where the sequences of a packed batch begin and end.

    Attributes:
        cu_seqlens_q: int32 ``[N + 1]``: rows ``cu_seqlens_q[n]`` to ``cu_seqlens_q[n + 1]`` of q are sequence n.
        cu_seqlens_k: int32 ``[N + 1]``: the same for k and v.
        max_seqlen_q: The longest sequence of q.
        max_seqlen_k: The longest sequence of k.
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int


class Cache(NamedTuple):
    """What a call does to a key-value cache before it attends to it.

    Attributes:
        seqlens: int32 ``[B]``: the places of the cache that are filled.
        k: New keys ``[B, Sn, Hkv, D]`` to write from place ``seqlens[b]`` on, or None.
        v: New values ``[B, Sn, Hkv, D]``, or None.
    """

    seqlens: Tensor
    k: Tensor | None
    v: Tensor | None

    def append(self, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        """Write the new keys and values into the caches ``[B, Smax, Hkv, D]``, in place.

        Returns:
            int32 ``[B]``: the places that are filled now.
        """
        if self.k is None or self.v is None:
            return self.seqlens
        places = self.seqlens[:, None] + torch.arange(self.k.shape[1], device=self.k.device)
        places = places[:, :, None, None].expand_as(self.k)
        k_cache.scatter_(1, places, self.k)
        v_cache.scatter_(1, places, self.v)
        return self.seqlens + self.k.shape[1]

    def holds_own_keys(self, q: Tensor) -> bool:
        """Say whether each query ``[B, Sq, H, D]`` has its own key in the cache, so that none sees no key."""
        return self.k is not None and self.k.shape[1] >= q.shape[1]
