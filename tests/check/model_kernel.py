"""A model of a FlashAttention kernel, step by step, so that each step can be done wrongly.

It is made to be changed: one method a step, no speed. Scores and sums are in float32, weights in the precision of the
inputs, keys come in tiles. `test_faults.py` overrides steps.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from flashlab.attention.backends import Backend
from flashlab.attention.spec import BLOCK_SIZE, Cache, Options, Packing


class Kernel:
    """Attention as a kernel computes it; shapes as in `flashlab.attention`."""

    tile = 32  # keys

    def as_backend(self) -> Backend:
        return Backend(self.dense, lambda spec: None, self.packed, self.cached)

    # The three forms of a call.

    def dense(self, q: Tensor, k: Tensor, v: Tensor, options: Options) -> Tensor:
        return Function.apply(q, k, v, options, self)

    def packed(self, q: Tensor, k: Tensor, v: Tensor, packing: Packing, options: Options) -> Tensor:
        outs = []
        for n, (rows, keys) in enumerate(self.sequences(packing)):
            slopes = options.alibi_slopes
            slopes = slopes[n] if slopes is not None and slopes.dim() == 2 else slopes
            part = q[None, slice(*rows)], k[None, slice(*keys)], v[None, slice(*keys)]
            outs.append(self.dense(*part, options._replace(alibi_slopes=slopes))[0])
        return torch.cat(outs)

    def sequences(self, packing: Packing) -> list[tuple[tuple[int, int], tuple[int, int]]]:
        ends_q, ends_k = packing.cu_seqlens_q.tolist(), packing.cu_seqlens_k.tolist()
        return list(zip(pairwise(ends_q), pairwise(ends_k), strict=True))

    def cached(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, cache: Cache, options: Options) -> Tensor:
        outs = []
        for b, filled in enumerate(cache.seqlens.tolist()):
            if cache.k is not None:
                self.append(k_cache[b], v_cache[b], cache.k[b], cache.v[b], filled)
                filled += len(cache.k[b])
            keys = self.filled(filled, k_cache.shape[1])
            slopes = options.alibi_slopes
            slopes = slopes[b] if slopes is not None and slopes.dim() == 2 else slopes
            outs.append(
                self.dense(
                    q[b, None], k_cache[b, None, :keys], v_cache[b, None, :keys], options._replace(alibi_slopes=slopes)
                )
            )
        return torch.cat(outs)

    def append(self, k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, start: int) -> None:
        k_cache[start : start + len(k)], v_cache[start : start + len(v)] = k, v

    def filled(self, filled: int, places: int) -> int:
        return filled

    # The steps of the forward pass. Heads come before rows: q [B, H, Sq, D], k and v [B, H, Sk, D].

    def forward(self, q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor]:
        """Return out ``[B, H, Sq, D]`` and the log-sum-exp ``[B, H, Sq, 1]``."""
        scores = self.mask(self.scores(q, k, options), options)
        maximum = torch.full_like(scores[..., :1], -torch.inf)
        total, out = torch.zeros_like(maximum), torch.zeros_like(q, dtype=torch.float32)
        for start in self.tiles(k.shape[2]):
            tile = scores[..., start : start + self.tile]
            grown = self.grow(maximum, tile)
            weights = (tile - grown).exp()
            rescale = self.rescale(maximum, grown)
            total = total * rescale + weights.sum(dim=-1, keepdim=True)
            out = self.accumulate(
                out, rescale, weights.to(v.dtype).float() @ v[:, :, start : start + self.tile].float()
            )
            maximum = grown
        return self.normalise(out, total), maximum + total.log()

    def tiles(self, seqlen_k: int) -> range:
        return range(0, seqlen_k, self.tile)

    def scores(self, q: Tensor, k: Tensor, options: Options) -> Tensor:
        scores = q.float() @ k.float().transpose(-1, -2) * self.scale(options)
        scores = self.cap(scores, options)
        if options.alibi_slopes is not None:
            slopes = options.alibi_slopes.reshape(-1, q.shape[1], 1, 1)
            scores = scores + self.bias(slopes, self.distance(q.shape[2], k.shape[2]))
        return scores

    def scale(self, options: Options) -> float:
        return options.softmax_scale

    def cap(self, scores: Tensor, options: Options) -> Tensor:
        return options.softcap * torch.tanh(scores / options.softcap) if options.softcap else scores

    def bias(self, slopes: Tensor, distance: Tensor) -> Tensor:
        return -slopes * distance.abs()

    def distance(self, seqlen_q: int, seqlen_k: int) -> Tensor:
        return torch.arange(seqlen_q)[:, None] + (seqlen_k - seqlen_q) - torch.arange(seqlen_k)

    def mask(self, scores: Tensor, options: Options) -> Tensor:
        return scores.masked_fill(~self.visible(*scores.shape[-2:], options), -torch.inf)

    def visible(self, seqlen_q: int, seqlen_k: int, options: Options) -> Tensor:
        distance = self.distance(seqlen_q, seqlen_k)
        (left, right), visible = options.window_size, torch.ones_like(distance, dtype=torch.bool)
        if options.causal:
            visible &= distance >= 0
        if left >= 0:
            visible &= distance <= left
        if right >= 0:
            visible &= distance >= -right
        if options.block_mask is not None:
            blocks = self.blocks(options.block_mask)
            blocks = blocks.repeat_interleave(BLOCK_SIZE, 0)[:seqlen_q].repeat_interleave(BLOCK_SIZE, 1)[:, :seqlen_k]
            visible &= blocks
        return visible

    def blocks(self, block_mask: Tensor) -> Tensor:
        return block_mask

    def grow(self, maximum: Tensor, tile: Tensor) -> Tensor:
        """Return the new maximum; the lowest number for a row that has seen nothing, whose weights are then 0."""
        grown = torch.maximum(maximum, tile.amax(dim=-1, keepdim=True))
        return grown.clamp_min(torch.finfo(torch.float32).min)

    def rescale(self, maximum: Tensor, grown: Tensor) -> Tensor:
        return (maximum - grown).exp()

    def accumulate(self, out: Tensor, rescale: Tensor, new: Tensor) -> Tensor:
        return out * rescale + new

    def normalise(self, out: Tensor, total: Tensor) -> Tensor:
        return out / total.masked_fill(total == 0, 1.0)

    def spread(self, x: Tensor, groups: int) -> Tensor:
        """Give each query head its key/value head: ``[B, Hkv, Sk, D]`` to ``[B, H, Sk, D]``."""
        return x.repeat_interleave(groups, dim=1)

    def write(self, out: Tensor) -> Tensor:
        """Store the output ``[B, Sq, H, D]``."""
        return out

    # The backward pass.

    def backward(
        self, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, options: Options
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return dq, dk and dv, heads before rows, dk and dv for each query head."""
        scores = self.scores(q, k, options)
        weights = (self.mask(scores, options) - lse.masked_fill(lse == -torch.inf, torch.inf)).exp()
        grad_out = grad_out.float()
        dv = self.weights_of_dv(weights).to(v.dtype).float().transpose(-1, -2) @ grad_out
        grad_weights = grad_out @ v.float().transpose(-1, -2)
        delta = self.delta(grad_out, out.float())
        grad_scores = self.uncap(weights * (grad_weights - delta), q, k, options).to(q.dtype).float()
        dq, dk = grad_scores @ k.float(), grad_scores.transpose(-1, -2) @ q.float()
        return dq * options.softmax_scale, dk * options.softmax_scale, dv

    def weights_of_dv(self, weights: Tensor) -> Tensor:
        return weights

    def delta(self, grad_out: Tensor, out: Tensor) -> Tensor:
        return (grad_out * out).sum(dim=-1, keepdim=True)

    def uncap(self, grad_scores: Tensor, q: Tensor, k: Tensor, options: Options) -> Tensor:
        if not options.softcap:
            return grad_scores
        capped = self.cap(q.float() @ k.float().transpose(-1, -2) * options.softmax_scale, options)
        return grad_scores * (1 - (capped / options.softcap) ** 2)

    def collect(self, x: Tensor, groups: int) -> Tensor:
        """Sum over the query heads of each key/value head: ``[B, H, Sk, D]`` to ``[B, Hkv, Sk, D]``."""
        return x.unflatten(1, (-1, groups)).sum(dim=2)

    def gradients(self, dq: Tensor, dk: Tensor, dv: Tensor, options: Options) -> tuple[Tensor, Tensor, Tensor]:
        """Store the gradients ``[B, S, H, D]``."""
        return dq, dk, dv


class Function(torch.autograd.Function):
    """Put a kernel's forward and backward pass together."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, options: Options, kernel: Kernel) -> Tensor:
        q_, k_, v_ = (x.transpose(1, 2) for x in (q, k, v))
        groups = q.shape[2] // k.shape[2]
        k_, v_ = kernel.spread(k_, groups), kernel.spread(v_, groups)
        out, lse = kernel.forward(q_, k_, v_, options)
        out = kernel.write(out.transpose(1, 2).to(q.dtype))
        ctx.save_for_backward(q_, k_, v_, out, lse)
        ctx.options, ctx.kernel, ctx.groups = options, kernel, groups
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        kernel, groups = ctx.kernel, ctx.groups
        dq, dk, dv = kernel.backward(grad_out.transpose(1, 2), q, k, v, out.transpose(1, 2), lse, ctx.options)
        dk, dv = kernel.collect(dk, groups), kernel.collect(dv, groups)
        grads = (x.transpose(1, 2).to(q.dtype) for x in (dq, dk, dv))
        return *kernel.gradients(*grads, ctx.options), None, None
