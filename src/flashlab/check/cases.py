"""The cases of the check: which calls are made, and with which inputs.

A case is its name, and its name is a case: nine words from which the same inputs are made on every machine.
"""

import re
import zlib
from collections.abc import Callable, Collection, Container
from dataclasses import dataclass, replace
from itertools import combinations, product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashlab.attention.reference import visible
from flashlab.attention.spec import BLOCK_SIZE, AttentionSpec, Options
from flashlab.errors import UserError

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
HEAD_DIMS = (32, 64, 96, 128, 192, 256)
LENGTHS = (
    "1x1",
    "1x129",
    "37x37",
    "127x127",
    "128x128",
    "129x129",
    "33x300",
    "300x33",
    "129x257",
    "1x2048",
    "2048x2048",
)
MASKS = ("full", "causal", "window:40:0", "window:25:17", "blocks:0.5", "causal+blocks:0.5")
HEADS = ("h4kv4", "h6kv2", "h4kv1")
FEATURES = ("plain", "scale", "softcap", "alibi", "deterministic")
LAYOUTS = ("dense", "packed", "append", "read")
# What the inputs hold:
# normal     scores with a standard deviation of 0.5 to 4 by head, so that some heads are flat and some peaked
# huge       scores up to hundreds: exp() overflows unless the row's maximum is taken off first
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
    def batch_size(self) -> int:
        if self.layout != "dense":
            return 3
        return 1 if self.is_long else 2

    @property
    def is_long(self) -> bool:
        seqlen_q, seqlen_k = self.seqlens
        return seqlen_q * seqlen_k > 2**20

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
        layout: As the case's.
        seqlens_q: The lengths of packed sequences.
        seqlens_k: The lengths of packed sequences, or the filled places of a cache.
        new: Keys and values ``[B, Sn, Hkv, D]`` to append to the cache, or None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    grad_out: Tensor
    options: Options
    layout: str
    seqlens_q: list[int]
    seqlens_k: list[int]
    new: tuple[Tensor, Tensor] | None

    def to(self, dtype: torch.dtype) -> "Inputs":
        q, k, v, grad_out = (x.to(dtype) for x in self[:4])
        new = self.new and (self.new[0].to(dtype), self.new[1].to(dtype))
        return self._replace(q=q, k=k, v=v, grad_out=grad_out, new=new)


def parse(name: str) -> Case:
    """Read a case from its name.

    Raises:
        UserError: the name does not describe a case; the message says which word and what it may be.
    """
    words, kinds = name.split("/"), _WORDS.split("/")
    if len(words) != len(kinds):
        raise UserError(f"--case: {name!r} must read {_WORDS}, such as {Case().name}")
    for kind, word in zip(kinds, words, strict=True):
        is_one, forms = _FORMS[kind]
        if not is_one(word):
            raise UserError(f"--case: no {kind} {word!r} in {name!r}; there are {forms}")
    dtype, head_dim, lengths, mask, heads, feature, layout, values = words
    case = Case(dtype, int(head_dim[1:]), lengths, mask, heads, feature, layout, values)
    if not _is_possible(case):
        raise UserError(f"--case: {name!r} asks for what no call offers, such as a block mask on a cache")
    return case


def make_inputs(case: Case, device: torch.device) -> Inputs:
    """Make the inputs of a case, the same ones on every machine."""
    generator = torch.Generator().manual_seed(zlib.crc32(case.name.encode()))
    (seqlen_q, seqlen_k), (num_heads, num_kv_heads) = case.seqlens, case.num_heads
    rows_q, rows_k = (case.batch_size, seqlen_q), (case.batch_size, seqlen_k)
    seqlens_q, seqlens_k = [seqlen_q] * case.batch_size, [seqlen_k] * case.batch_size
    if case.layout == "packed":
        seqlens_q, seqlens_k = _shorter(seqlen_q), _shorter(seqlen_k)
        rows_q, rows_k = (1, sum(seqlens_q)), (1, sum(seqlens_k))
    elif case.is_cache:
        room = seqlen_k - seqlen_q if case.layout == "append" else seqlen_k
        seqlens_k = [room, room // 2, 0 if case.layout == "append" else 1]

    def normal(rows: tuple[int, int], heads: int) -> Tensor:
        return torch.randn(*rows, heads, case.head_dim, generator=generator)

    q, grad_out = normal(rows_q, num_heads), normal(rows_q, num_heads)
    k, v = normal(rows_k, num_kv_heads), normal(rows_k, num_kv_heads)
    new_k, new_v = normal(rows_q, num_kv_heads), normal(rows_q, num_kv_heads)
    q = q * 2.0 ** (torch.arange(num_heads) % 4 - 1)[:, None]
    if case.values in ("huge", "overflow"):
        factor = 4 if case.values == "huge" else 128
        q, k, new_k = q * factor, k * factor, new_k * factor
    elif case.values == "nan":
        q[-1, -1, 0] = k[_spoiled_key(case)] = torch.nan
    elif case.values == "nan_value":
        v[_spoiled_key(case)] = torch.nan
    elif case.values == "inf":
        k[_spoiled_key(case)][0] = torch.inf
    if case.is_cache:
        for b, filled in enumerate(seqlens_k):  # what was never written, or is to be overwritten, must not matter
            k[b, filled:] = v[b, filled:] = torch.nan if case.values == "stale" else 100.0

    packed = case.layout == "packed"
    q, grad_out, k, v, new_k, new_v = (
        (x[0] if packed else x).to(device, DTYPES[case.dtype]) for x in (q, grad_out, k, v, new_k, new_v)
    )
    new = (new_k, new_v) if case.layout == "append" else None
    options = _options(case, generator, device)
    return Inputs(q, k, v, grad_out, options, case.layout, seqlens_q, seqlens_k, new)


def describe(case: Case, device: torch.device) -> AttentionSpec:
    """Describe the call of a case."""
    (seqlen_q, seqlen_k), (num_heads, num_kv_heads) = case.seqlens, case.num_heads
    causal, window_size, block_mask = _mask(case.mask, case.seqlens, torch.Generator())
    return AttentionSpec(
        batch_size=case.batch_size,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=case.head_dim,
        dtype=DTYPES[case.dtype],
        device=device,
        causal=causal,
        needs_grad=not case.is_cache,
        window_size=window_size,
        softcap=case.feature == "softcap",
        alibi=case.feature == "alibi",
        block_sparse=block_mask is not None,
        deterministic=case.feature == "deterministic",
        layout="cache" if case.is_cache else case.layout,  # type: ignore[arg-type]
        infinities=case.values == "inf",
    )


def _shorter(seqlen: int) -> list[int]:
    """Pack three sequences: one row, a short one, and the longest."""
    return [1, max(seqlen // 3, 1), seqlen]


def _spoiled_key(case: Case) -> tuple[int, int, int]:
    """Choose the key [b, j, h] that is NaN or holds infinity."""
    return 0, case.seqlens[1] // 3, 0


def spoiled_outputs(case: Case, options: Options, device: torch.device) -> tuple[Tensor, Tensor]:
    """Say which outputs are no numbers where one of the inputs is none.

    Args:
        case: A dense case.
        options: Its options, on the device.
        device: Where the outputs are.

    Returns:
        Two bool tensors ``[B, Sq, H, 1]``: the outputs that must be NaN, and those that may be NaN as well: of
        queries that read the head but do not see the key. Kernels mask by adding -inf to a score or by giving a weight
        of 0, and NaN - inf and 0 * NaN are NaN.
    """
    num_heads, num_kv_heads = case.num_heads
    batch, key, _ = _spoiled_key(case)
    must, may = (torch.zeros(case.batch_size, case.seqlens[0], num_heads, 1, dtype=torch.bool) for _ in range(2))
    readers = slice(0, num_heads // num_kv_heads)  # the query heads that read key/value head 0
    sees = visible(*case.seqlens, options, device)
    sees = torch.ones(case.seqlens, dtype=torch.bool) if sees is None else sees.cpu()
    may[batch, :, readers, 0] = ~sees[:, key, None]
    if case.values != "inf":  # what infinity spoils depends on the query
        must[batch, :, readers, 0] = sees[:, key, None]
    if case.values == "nan":
        must[-1, -1, 0] = sees[-1].any()
    return must.to(device), may.to(device)


def _options(case: Case, generator: torch.Generator, device: torch.device) -> Options:
    num_heads, _ = case.num_heads
    slopes = None
    if case.feature == "alibi":  # powers of two, as in ALiBi's paper; each sequence has its own order
        slopes = 2.0 ** -(torch.arange(num_heads) + 1.0)
        slopes = torch.stack([slopes.roll(n) for n in range(case.batch_size)]).to(device)
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
            block_mask[-1, 0], block_mask[0, -1] = False, True  # never equal to its transpose
        elif word != "full":
            raise ValueError(mask)
    return causal, window_size, block_mask


def _is_mask(word: str) -> bool:
    try:
        _mask(word, (1, 1), torch.Generator())
    except ValueError:
        return False
    return True


def _are_heads(word: str) -> bool:
    numbers = re.fullmatch(rf"h({_NUMBER})kv({_NUMBER})", word)
    return numbers is not None and int(numbers[1]) % int(numbers[2]) == 0


def _choice(known: Collection[str]) -> tuple[Callable[[str], bool], str]:
    return known.__contains__, ", ".join(known)


_NUMBER = "[1-9][0-9]*"
# word of a case's name -> whether something is one, and what there is
_FORMS: dict[str, tuple[Callable[[str], bool], str]] = {
    "dtype": _choice(DTYPES),
    "head_dim": (lambda word: bool(re.fullmatch(f"d{_NUMBER}", word)), "d64 and any other number"),
    "lengths": (lambda word: bool(re.fullmatch(f"{_NUMBER}x{_NUMBER}", word)), "129x257 and any other Sq x Sk"),
    "mask": (_is_mask, "full, causal, window:LEFT:RIGHT, blocks:SHARE, causal+blocks:SHARE"),
    "heads": (_are_heads, "h6kv2 and any others of which the second number divides the first"),
    "feature": _choice(FEATURES),
    "layout": _choice(LAYOUTS),
    "values": _choice(VALUES),
}


def _is_possible(case: Case) -> bool:
    """Leave out the combinations for which the interface has no words."""
    seqlen_q, seqlen_k = case.seqlens
    if case.values == "overflow" and case.dtype != "float16":
        return False
    if case.values == "stale" and not case.is_cache:
        return False
    if case.values in ("nan", "nan_value", "inf", "overflow") and case.layout != "dense":
        return False
    if "blocks" in case.mask and case.layout != "dense":
        return False
    if case.is_cache:
        return case.feature != "deterministic" and case.values in ("normal", "huge", "stale") and seqlen_q <= seqlen_k
    return True


def quick_cases() -> list[Case]:
    """Choose cases that show every fault that tests/check/test_faults.py plants."""
    main = Case(mask="causal", heads="h6kv2")  # h3kv1 where it is long: the same group size
    full = Case("float16", 128)
    return [
        *few_kinds(),
        *(replace(main, lengths=lengths) for lengths in ("1x1", "1x129", "127x127")),
        replace(main, lengths="2048x2048", heads="h3kv1"),
        *(replace(full, lengths=lengths) for lengths in ("37x37", "128x128", "1x2048")),
        replace(full, values="overflow"),
        replace(full, values="overflow", mask="causal", lengths="129x257"),
        *(replace(main, feature=feature) for feature in ("scale", "deterministic")),
        *(replace(main, mask=mask) for mask in ("window:40:0", "causal+blocks:0.5")),
        replace(main, heads="h4kv1"),
        replace(main, layout="append", lengths="1x2048"),
        *(replace(main, dtype=dtype, head_dim=head_dim) for head_dim in HEAD_DIMS for dtype in DTYPES),
        *(Case("float32", lengths="129x257", feature=feature) for feature in FEATURES),
        *(replace(main, dtype="float32", mask=mask, lengths="129x257") for mask in MASKS),
        *(replace(main, dtype="float32", layout=layout) for layout in LAYOUTS),
    ]


def few_kinds() -> list[Case]:
    """Choose cases of few kinds for backends that compile every kind of call, which takes seconds."""
    main = Case(mask="causal", heads="h6kv2")
    return [
        *(replace(main, values=values) for values in ("normal", "huge", "nan", "nan_value", "inf")),
        *(replace(main, lengths=lengths) for lengths in ("33x300", "300x33")),
        Case("float16", 128, lengths="129x257"),
        replace(main, mask="window:25:17"),
        replace(main, mask="blocks:0.5"),
        replace(main, feature="softcap"),
        replace(main, feature="alibi", lengths="129x257"),  # causal and square, a wrong shift would cancel
        replace(main, layout="packed"),
        replace(main, layout="append", lengths="37x300"),
        *(replace(main, layout="read", lengths="1x129", values=values) for values in ("normal", "stale")),
    ]


def full_cases() -> list[Case]:
    """Cross the factors where that is cheap, and cover every pair of their levels."""
    cases = [
        *quick_cases(),
        *covering_cases(),
        *(Case(*words) for words in product(DTYPES, HEAD_DIMS, ["129x257"], MASKS, ["h6kv2"])),
        *(Case(*words) for words in product(["bfloat16", "float32"], [64], LENGTHS, MASKS, ["h4kv4"])),
        *(Case(*words) for words in product(["float16"], [64], ["129x129"], MASKS, HEADS, FEATURES)),
        *(
            Case(dtype, head_dim, "129x257", mask, "h6kv2", values=values)
            for dtype, head_dim, mask, values in product(DTYPES, [64, 128], MASKS, VALUES)
        ),
    ]
    return [case for case in dict.fromkeys(cases) if _is_possible(case)]


def chosen_cases(*, full: bool, compiled: bool) -> list[Case]:
    """Choose the cases of a backend; one that compiles every kind of call is spared the crosses.

    Args:
        full: All of them instead of the quick ones.
        compiled: The backend compiles.
    """
    if not compiled:
        return full_cases() if full else list(dict.fromkeys(quick_cases()))
    return list(dict.fromkeys([*few_kinds(), *covering_cases()])) if full else few_kinds()


def covering_cases() -> list[Case]:
    """Cover every possible pair of levels of two factors, with few cases."""
    factors: dict[str, tuple[Any, ...]] = {
        "dtype": tuple(DTYPES),
        "head_dim": HEAD_DIMS,
        "lengths": LENGTHS,
        "mask": MASKS,
        "heads": HEADS,
        "feature": FEATURES,
        "layout": LAYOUTS,
    }
    levels = [(factor, level) for factor, known in factors.items() for level in known]
    missing = dict.fromkeys(  # a set that keeps its order
        pair for pair in combinations(levels, 2) if pair[0][0] != pair[1][0] and _is_possible(Case(**dict(pair)))
    )
    cases = []
    while missing:
        chosen: dict[str, Any] = dict(next(iter(missing)))
        for factor, known in factors.items():
            if factor not in chosen:
                possible = [level for level in known if _is_possible(Case(**chosen, **{factor: level}))]
                chosen[factor] = max(possible, key=lambda level: _count(missing, chosen, (factor, level)))
        case = Case(**chosen)
        cases.append(case)
        for pair in combinations([(factor, chosen[factor]) for factor in factors], 2):
            missing.pop(pair, None)
    return cases


def _count(missing: Container[Any], chosen: dict[str, Any], level: tuple[str, Any]) -> int:
    pairs = ((level, other) for other in chosen.items())
    return sum((a, b) in missing or (b, a) in missing for a, b in pairs)
