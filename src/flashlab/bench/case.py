"""One workload of the benchmark: shapes, precision, mask and device, and the inputs made from them."""

import difflib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashlab.attention.spec import BLOCK_SIZE, AttentionSpec, Options
from flashlab.bench.flops import flops, visible_share
from flashlab.errors import UserError

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
MASKS = ("full", "causal", "window:LEFT", "blocks:SHARE")


@dataclass(frozen=True)
class Case:
    """Describe one self-attention workload by plain values, which go into result files as they are.

    Attributes:
        mask: "full", "causal", "window:256" (causal; a query sees itself and the 256 keys before it) or "blocks:0.25"
            (a quarter of the 128 x 128 blocks of scores, chosen at random, the diagonal always among them).
    """

    batch_size: int
    seqlen: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    mask: str
    device: str

    def mask_arguments(self) -> dict[str, Any]:
        """Return the mask as keyword arguments of `flashlab.attention.attention`.

        Raises:
            UserError: no mask has this name, or its number is out of range.
        """
        kind, _, number = self.mask.partition(":")
        if self.mask == "full":
            return {}
        if self.mask == "causal":
            return {"causal": True}
        if kind == "window" and number.isdigit():
            return {"causal": True, "window_size": (int(number), 0)}
        if kind == "blocks" and 0 < _number(number) <= 1:
            return {"block_mask": block_mask(self.seqlen, _number(number)).to(self.device)}
        names = [mask.partition(":")[0] for mask in MASKS]
        nearest = MASKS[names.index(difflib.get_close_matches(kind, names, n=1, cutoff=0.0)[0])]
        raise UserError(
            f"mask {self.mask!r}: did you mean {nearest}? "
            f"(there are: {', '.join(MASKS)}; LEFT is a number of keys, SHARE above 0 and up to 1)"
        )

    def options(self) -> Options:
        """Return the mask and the default scale as the backends take them."""
        return Options(softmax_scale=self.head_dim**-0.5, **self.mask_arguments())

    def spec(self, *, needs_grad: bool) -> AttentionSpec:
        """Describe the call, for `why_not` and `resolve`."""
        mask = self.mask_arguments()
        return AttentionSpec(
            batch_size=self.batch_size,
            seqlen_q=self.seqlen,
            seqlen_k=self.seqlen,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            dtype=DTYPES[self.dtype],
            device=torch.empty(0, device=self.device).device,  # "cuda" becomes "cuda:0", as tensors say it
            causal=mask.get("causal", False),
            needs_grad=needs_grad,
            window_size=mask.get("window_size", (-1, -1)),
            block_sparse="block_mask" in mask,
        )

    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Draw q, k, v and the gradient of the output from a standard normal; always the same numbers."""
        generator = torch.Generator(self.device).manual_seed(0)
        heads = (self.num_heads, self.num_kv_heads, self.num_kv_heads, self.num_heads)
        q, k, v, grad_out = (
            torch.randn(
                (self.batch_size, self.seqlen, count, self.head_dim),
                generator=generator,
                device=self.device,
                dtype=DTYPES[self.dtype],
            )
            for count in heads
        )
        return q, k, v, grad_out

    def input_bytes(self, *, with_grad_out: bool) -> int:
        """Return what q, k and v take, and the gradient of the output, which a backward pass reads."""
        heads = (2 if with_grad_out else 1) * self.num_heads + 2 * self.num_kv_heads
        return self.batch_size * self.seqlen * heads * self.head_dim * DTYPES[self.dtype].itemsize

    def flops(self, pass_name: str) -> float:
        """Count the floating-point operations of one pass."""
        return flops(
            pass_name,
            batch_size=self.batch_size,
            seqlen_q=self.seqlen,
            seqlen_k=self.seqlen,
            num_heads=self.num_heads,
            head_dim=self.head_dim,
            share=visible_share(self.seqlen, self.seqlen, **self.mask_arguments()),
        )


def block_mask(seqlen: int, share: float) -> Tensor:
    """Choose the non-zero blocks of a block-sparse mask: the diagonal, and random others up to the share of all.

    Returns:
        bool ``[ceil(S / 128), ceil(S / 128)]`` on the CPU, always the same for the same arguments.
    """
    blocks = -(-seqlen // BLOCK_SIZE)
    order = torch.rand(blocks, blocks, generator=torch.Generator().manual_seed(0))
    order.fill_diagonal_(-1.0)  # first of all, so that every query sees a key
    count = max(round(share * blocks**2), blocks)
    chosen = torch.zeros(blocks**2, dtype=torch.bool)
    chosen[order.flatten().argsort()[:count]] = True
    return chosen.view(blocks, blocks)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0
