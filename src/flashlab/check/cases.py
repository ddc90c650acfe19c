"""The cases of the check: which calls are made, and with which inputs.

A case is its name, and its name is a case: nine words from which the same inputs are made on every machine.
"""

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import combinations, product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashlab.attention.spec import BLOCK_SIZE, Options
from flashlab.errors import UserError

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
HEAD_DIMS = (32, 64, 96, 128, 192, 256)
LENGTHS = ("1x1", "1x129", "37x37", "127x127", "128x128", "129x129", "33x300", "300x33", "129x257", "2048x2048")
MASKS = ("full", "causal", "window:40:0", "window:25:17", "blocks:0.5", "causal+blocks:0.5")
HEADS = ("h4kv4", "h6kv2", "h4kv1")
FEATURES = ("plain", "scale", "softcap", "alibi", "deterministic")
LAYOUTS = ("dense", "packed", "append", "read")
# What the inputs hold:
# normal     scores with a standard deviation of 0.5 to 4 by head, so that some heads are flat and some peaked
# huge       scores in the hundreds: exp() overflows unless the row's maximum is taken off first
# overflow   products q k^T beyond float16's range
# nan, inf   NaN in one query and one key; infinity in one key
# nan_value  NaN in one value
# stale      NaN in the places of a cache that were never written
VALUES = ("normal", "huge", "overflow", "nan", "inf", "nan_value", "stale")
_WORDS = "dtype/head_dim/lengths/mask/heads/feature/layout/values"


@dataclass(frozen=True)
class Case:
    """One call of attention, with what its inputs hold.

    Attributes:
        lengths: Sq x Sk. Packed: the longest sequences. Cache: the new tokens and the places.
        mask: "full", "causal", "window:LEFT:RIGHT", "blocks:SHARE" of the blocks of scores, or "causal+blocks:SHARE".
        heads: Query and key/value heads.
        feature: One of `FEATURES`.
        layout: "dense", "packed", or a cache: "append" the new tokens and attend, "read" attend only.
        values: One of `VALUES`.
    """

    dtype: str = "bfloat16"
    head_dim: int = 64
    lengths: str = "129x129"
    mask: str = "full"
    heads: str = "h4kv4"
    feature: str = "plain"
    layout: str = "dense"
    values: str = "normal"

    @property
    def name(self) -> str:
        words = (self.dtype, f"d{self.head_dim}", self.lengths, self.mask, self.heads, self.feature, self.layout)
        return "/".join((*words, self.values))

    @property
    def seqlens(self) -> tuple[int, int]:
        seqlen_q, seqlen_k = map(int, self.lengths.split("x"))
        return seqlen_q, seqlen_k

    @property
    def num_heads(self) -> tuple[int, int]:
        num_heads, num_kv_heads = map(int, self.heads[1:].split("kv"))
        return num_heads, num_kv_heads

    @property
    def needs_grad(self) -> bool:
        """A cache has no gradients, and what is not a number in a score is not one in any of them."""
        return self.layout in ("dense", "packed") and self.values in ("normal", "huge")

    @property
    def is_cache(self) -> bool:
        return self.layout in ("append", "read")


class Inputs(NamedTuple):
    """What a backend is given.

    Attributes:
        q: ``[B, Sq, H, D]``, packed ``[Tq, H, D]``.
        k: ``[B, Sk, Hkv, D]``, packed ``[Tk, Hkv, D]``; the cache of keys ``[B, Smax, Hkv, D]``.
        v: Like k.
        grad_out: Like q.
        options: How scores become weights.
        seqlens: Lengths of the packed sequences (q, k); for a cache the filled places, twice; else empty.
        new: Keys and values ``[B, Sn, Hkv, D]`` to append to the cache, or None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    grad_out: Tensor
    options: Options
    seqlens: tuple[list[int], list[int]] = ([], [])
    new: tuple[Tensor, Tensor] | None = None

    def to(self, dtype: torch.dtype) -> "Inputs":
        q, k, v, grad_out = (x.to(dtype) for x in self[:4])
        new = self.new and (self.new[0].to(dtype), self.new[1].to(dtype))
        return self._replace(q=q, k=k, v=v, grad_out=grad_out, new=new)


def parse(name: str) -> Case:
    """Read a case from its name.

    Raises:
        UserError: the name does not describe a case; the message says which word and what it may be.
    """
    words = name.split("/")
    if len(words) != len(_WORDS.split("/")):
        raise UserError(f"--case: {name!r} must read {_WORDS}, such as {Case().name}")
    dtype, head_dim, lengths, mask, heads, feature, layout, values = words
    for kind, word, known in (
        ("dtype", dtype, tuple(DTYPES)),
        ("feature", feature, FEATURES),
        ("layout", layout, LAYOUTS),
        ("values", values, VALUES),
    ):
        if word not in known:
            raise UserError(f"--case: no {kind} {word!r} in {name!r}; there are {', '.join(known)}")
    try:
        case = Case(dtype, int(head_dim[1:]), lengths, mask, heads, feature, layout, values)
        sizes = (*case.seqlens, *case.num_heads, case.head_dim)
        _mask(mask, case.seqlens, torch.Generator())
    except ValueError:
        sizes = (0,)
    if min(sizes) < 1 or case.name != name or case.num_heads[0] % case.num_heads[1]:
        raise UserError(f"--case: {name!r} must read {_WORDS}, such as {Case().name}")
    if not _is_possible(case):
        raise UserError(f"--case: {name!r} asks for what no call offers, such as a block mask on a cache")
    return case


def make_inputs(case: Case, device: torch.device) -> Inputs:
    """Make the inputs of a case, the same ones on every machine."""
    generator = torch.Generator().manual_seed(zlib.crc32(case.name.encode()))
    (seqlen_q, seqlen_k), (num_heads, num_kv_heads) = case.seqlens, case.num_heads
    seqlens: tuple[list[int], list[int]] = ([], [])
    rows_q: tuple[int, ...] = (2, seqlen_q)
    rows_k: tuple[int, ...] = (2, seqlen_k)
    if case.layout == "packed":
        seqlens = _shorter(seqlen_q), _shorter(seqlen_k)
        rows_q, rows_k = (sum(seqlens[0]),), (sum(seqlens[1]),)
    elif case.is_cache:
        num_new = seqlen_q if case.layout == "append" else 0
        filled = [seqlen_k - num_new, (seqlen_k - num_new) // 2, 0 if num_new else 1]
        seqlens = filled, filled
        rows_q, rows_k = (3, seqlen_q), (3, seqlen_k)

    def normal(rows: tuple[int, ...], heads: int) -> Tensor:
        return torch.randn(*rows, heads, case.head_dim, generator=generator)

    q, k, v, grad_out = (normal(*shape) for shape in ((rows_q, num_heads), *[(rows_k, num_kv_heads)] * 2, (rows_q, num_heads)))
    new = (normal(rows_q, num_kv_heads), normal(rows_q, num_kv_heads)) if case.layout == "append" else None
    q = q * 2.0 ** (torch.arange(num_heads) % 4 - 1)[:, None]
    if case.values == "huge":
        q, k = q * 8, k * 8
    elif case.values == "overflow":
        q, k = q * 128, k * 128
    elif case.values == "nan":
        q.view(-1, num_heads, case.head_dim)[-1, 0] = torch.nan  # the last query of the last sequence
        k[_bad_key(case)] = torch.nan
    elif case.values == "nan_value":
        v[_bad_key(case)] = torch.nan
    elif case.values == "inf":
        k[_bad_key(case)][0] = torch.inf
    if case.is_cache:
        for x in (k, v):  # what stands in places that are not filled must not matter
            for row, filled_places in zip(x, seqlens[0], strict=True):
                row[filled_places:] = torch.nan if case.values == "stale" else 100.0

    dtype = DTYPES[case.dtype]
    q, k, v, grad_out = (x.to(device, dtype) for x in (q, k, v, grad_out))
    if new is not None:
        new = new[0].to(device, dtype), new[1].to(device, dtype)
    return Inputs(q, k, v, grad_out, _options(case, generator, device), seqlens, new)


def _shorter(seqlen: int) -> list[int]:
    """Pack three sequences: one row, a short one, and the longest last, where it is dropped first."""
    return [1, max(seqlen // 3, 1), seqlen]


def _bad_key(case: Case) -> tuple[int, int, int]:
    """Place what is not a number in one key of one head of the first sequence."""
    return 0, case.seqlens[1] // 3, 0


def bad_outputs(case: Case, inputs: Inputs, sees: Tensor) -> tuple[Tensor, Tensor]:
    """Say which outputs a NaN or an infinity among the inputs must spoil, and which it may.

    Args:
        case: A dense case.
        inputs: Its inputs.
        sees: bool ``[Sq, Sk]``: the keys that each query sees.

    Returns:
        Two bool tensors of the output's shape ``[B, Sq, H, D]``: must not be a number, and may be anything.
    """
    must, may = (torch.zeros(inputs.q.shape, dtype=torch.bool, device=inputs.q.device) for _ in range(2))
    num_heads, num_kv_heads = case.num_heads
    batch, key, _ = _bad_key(case)
    readers = slice(0, num_heads // num_kv_heads)  # the heads that read key/value head 0
    if case.values in ("nan", "nan_value"):
        must[batch, sees[:, key], readers] = True
    if case.values == "nan":
        must[-1, -1, 0] = True
    if case.values == "nan_value":  # a kernel multiplies masked values by 0, and 0 * NaN is NaN
        may[batch, :, readers] = True
    if case.values == "inf":  # a score of -inf is a weight of 0, a score of inf is no number
        plus = (inputs.q[batch, :, readers, 0] > 0) & sees[:, key, None]
        must[batch, :, readers] = plus[:, :, None]
    return must, may & ~must


def _options(case: Case, generator: torch.Generator, device: torch.device) -> Options:
    num_heads, _ = case.num_heads
    slopes = None
    if case.feature == "alibi":  # powers of two, as in ALiBi's paper; each sequence has its own order
        slopes = 2.0 ** -(torch.arange(num_heads) + 1.0)
        slopes = torch.stack([slopes.roll(n) for n in range(2)]) if case.layout == "dense" else slopes
        slopes = slopes.to(device)
    causal, window_size, block_mask = _mask(case.mask, case.seqlens, generator)
    return Options(
        softmax_scale=case.head_dim**-0.5 * (0.6 if case.feature == "scale" else 1.0),
        causal=causal,
        window_size=window_size,
        softcap=3.0 if case.feature == "softcap" else 0.0,
        alibi_slopes=slopes,
        block_mask=None if block_mask is None else block_mask.to(device),
        deterministic=case.feature == "deterministic",
    )


def _mask(
    mask: str, seqlens: tuple[int, int], generator: torch.Generator
) -> tuple[bool, tuple[int, int], Tensor | None]:
    """Return causal, window_size and block_mask.

    Raises:
        ValueError: there is no such mask.
    """
    causal, window_size, block_mask = False, (-1, -1), None
    for word in mask.split("+"):
        kind, *numbers = word.split(":")
        if word == "causal":
            causal = True
        elif kind == "window" and len(numbers) == 2:
            window_size = (int(numbers[0]), int(numbers[1]))
        elif kind == "blocks" and len(numbers) == 1:
            shape = [-(-seqlen // BLOCK_SIZE) for seqlen in seqlens]
            block_mask = torch.rand(shape, generator=generator) < float(numbers[0])
        elif word != "full":
            raise ValueError(mask)
    return causal, window_size, block_mask
