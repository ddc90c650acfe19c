"""torch's flex_attention: a kernel that torch.compile writes for the masks and biases it is asked for.

On a GPU every kind of call is compiled once, which takes seconds: a kind is the options, the shapes and strides, the
dtype and the device; of a packed batch not the number of rows. On the CPU torch runs it uncompiled, on the full matrix
of scores, without a backward pass: that serves to compare results, not to compute.
"""

import shutil
import sysconfig
from collections.abc import Callable
from functools import cache, lru_cache
from importlib.util import find_spec
from itertools import count
from os import environ
from pathlib import Path
from types import FunctionType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from flashlab.attention.reference import window
from flashlab.attention.spec import BLOCK_SIZE, AttentionSpec, Cache, Options, Packing
from flashlab.errors import UserError

_UNLIMITED = 2**29  # a window that reaches past every key, and still adds to an index in int32
_ADDRESSABLE = 2**31  # elements of one sequence that the kernels can count: their row offsets are int32
_COPIES = count()


class _Kind(NamedTuple):
    """The options that are compiled into a kernel."""

    softmax_scale: float
    softcap: float
    left: int
    right: int
    kernel_options: tuple[tuple[str, Any], ...]


class _Tables(NamedTuple):
    """The blocks of scores that the kernels visit, as torch's BlockMask holds them: by queries, and by keys."""

    kv_num_blocks: Tensor
    kv_indices: Tensor
    full_kv_num_blocks: Tensor | None
    full_kv_indices: Tensor | None
    q_num_blocks: Tensor
    q_indices: Tensor
    full_q_num_blocks: Tensor | None
    full_q_indices: Tensor | None


def attention(q: Tensor, k: Tensor, v: Tensor, options: Options) -> Tensor:
    """Run flex_attention on sequences of one length.

    Args:
        q: ``[B, Sq, H, D]``.
        k: ``[B, Sk, Hkv, D]``.
        v: ``[B, Sk, Hkv, D]``.
        options: How scores become weights.
    """
    # Only without gradients: those of short sequences were seen to be NaN, https://github.com/SHI-Labs/NATTEN/pull/203
    kind = _kind(q, options, decoding=not torch.is_grad_enabled() and _has_few_queries(q, k))
    seqlen_q, seqlen_k = q.shape[1], k.shape[1]
    tables = None
    if options.block_mask is None and (kind.left < seqlen_k - 1 or kind.right < seqlen_q - 1):
        build = _band_tables if torch.compiler.is_compiling() else _remembered_tables
        tables = build(seqlen_q, seqlen_k, kind.left, kind.right, q.device)
    return _run(_dense, kind, q, k, v, options.alibi_slopes, options.block_mask, tables)


def attention_packed(q: Tensor, k: Tensor, v: Tensor, packing: Packing, options: Options) -> Tensor:
    """Run flex_attention on sequences of several lengths in a row, as one sequence with a mask.

    Args:
        q: ``[Tq, H, D]``.
        k: ``[Tk, Hkv, D]``.
        v: ``[Tk, Hkv, D]``.
        packing: Where the sequences begin and end.
        options: How scores become weights.

    Raises:
        UserError: the rows are more than the kernel can count.
    """
    if max(q.numel(), k.numel()) >= _ADDRESSABLE:
        raise UserError(
            f"flex_attention takes fewer than 2**31 elements in packed q, k or v; got {q.numel():,} and {k.numel():,}: "
            "split the batch"
        )
    ends = packing.cu_seqlens_q, packing.cu_seqlens_k
    kind = _kind(q, options, decoding=False)
    return _run(_packed, kind, q[None], k[None], v[None], options.alibi_slopes, *ends)[0]


def attention_with_kvcache(q: Tensor, k_cache: Tensor, v_cache: Tensor, cache: Cache, options: Options) -> Tensor:
    """Append to a key-value cache and attend to its filled places.

    Args:
        q: ``[B, Sq, H, D]``.
        k_cache: ``[B, Smax, Hkv, D]``, changed in place.
        v_cache: ``[B, Smax, Hkv, D]``, changed in place.
        cache: What to append, and where.
        options: How scores become weights, with Sk the number of filled places.
    """
    filled = cache.append(k_cache, v_cache)
    # Places that were never written may hold anything, and a weight of 0 times NaN is NaN. Those of them that are read,
    # in the last block, hold zeros while the kernel runs. On the CPU torch reads them all.
    batch, place = (torch.arange(n, device=q.device) for n in v_cache.shape[:2])
    if q.device.type != "cpu":
        last_block = (filled.long() - 1).clamp(min=0) // BLOCK_SIZE * BLOCK_SIZE
        place = (last_block[:, None] + torch.arange(BLOCK_SIZE, device=q.device)).clamp(max=v_cache.shape[1] - 1)
    held = v_cache[batch[:, None], place]
    v_cache[batch[:, None], place] = held.where((place < filled[:, None])[:, :, None, None], 0.0)
    try:
        kind = _kind(q, options, decoding=_has_few_queries(q, k_cache))
        return _run(_cached, kind, q, k_cache, v_cache, options.alibi_slopes, filled)
    finally:
        v_cache[batch[:, None], place] = held


def _kind(q: Tensor, options: Options, decoding: bool) -> _Kind:
    left, right = (_UNLIMITED if size < 0 else min(size, _UNLIMITED) for size in window(options))
    kernel_options: dict[str, Any] = {} if decoding else {"FORCE_USE_FLEX_ATTENTION": True}
    if q.dtype == torch.float32:
        kernel_options["FLOAT32_PRECISION"] = "'ieee'"  # torch's default is tf32, which keeps 10 bits
        if q.shape[-1] > 64:  # torch's tiles are made for 128 and 256 on a few GPUs; others have no room for them
            kernel_options |= {"fwd_BLOCK_N": 32, "fwd_num_stages": 1} | ({} if decoding else {"fwd_BLOCK_M": 32})
    return _Kind(options.softmax_scale, options.softcap, left, right, tuple(kernel_options.items()))


def _has_few_queries(q: Tensor, k: Tensor) -> bool:
    """Say whether torch's kernel for few queries, flex_decoding, can run: it splits the keys among more programs.

    It packs the queries of a group of heads into one tile. torch 2.10 to 2.13 fail where that is more than a block, and
    2.10 where head_dim is no power of two.

    Source: https://github.com/pytorch/pytorch/pull/185349 and https://github.com/pytorch/pytorch/pull/164931
    """
    groups, head_dim = q.shape[2] // k.shape[2], q.shape[3]
    return q.shape[1] * groups <= BLOCK_SIZE // 2 and groups & (groups - 1) == 0 and head_dim & (head_dim - 1) == 0


def _run(
    layout: Callable[..., Tensor], kind: _Kind, q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None, *others: Any
) -> Tensor:
    if not torch.is_grad_enabled():  # on the CPU torch refuses what could have gradients, even if none are asked for
        q, k, v = q.detach(), k.detach(), v.detach()
    slopes = None if slopes is None else slopes.detach()
    inputs = (_within_reach(q), _within_reach(k), _within_reach(v), slopes, *others)
    if torch.compiler.is_compiling():  # the kernel becomes a part of the caller's graph
        return layout(kind, *inputs)
    varies = layout is _packed
    key = (*(_describe(x, varies) for x in inputs), q.shape[1] == k.shape[1], torch.is_grad_enabled())
    return _compiled(layout, kind, key, q.device.type, varies)(kind, *inputs)


def _describe(x: Tensor | _Tables | None, varies: bool) -> Any:
    """Tell apart what torch.compile would tell apart, but not the numbers of rows and sequences that vary."""
    if not isinstance(x, Tensor):
        return x is None
    shape: tuple[Any, ...] = x.shape
    axis = max(x.dim() - 3, 0)
    if varies:
        shape = (*shape[:axis], shape[axis] <= BLOCK_SIZE, *shape[axis + 1 :])
    return shape, x.stride()[axis:], x.dtype, x.device, x.requires_grad


def _within_reach(x: Tensor) -> Tensor:
    """Copy a view whose rows lie so far apart that the kernels' offsets of 32 bits would overflow.

    Source: https://github.com/pytorch/pytorch/issues/190857
    """
    if x.shape[1] * x.stride(1) < _ADDRESSABLE:
        return x
    return x.transpose(1, 2).contiguous().transpose(1, 2)


@lru_cache(maxsize=256)
def _compiled(layout: Callable[..., Tensor], kind: _Kind, key: Any, device: str, varies: bool) -> Callable[..., Tensor]:
    """Prepare one kind of call.

    torch.compile keeps what it compiled with the code object: at most eight versions, the ninth is an error. A copy of
    the code object for each kind of call keeps the kinds apart. Lengths are constants in a kernel, which is faster;
    only the number of rows of a packed batch becomes a variable, once it has changed.
    """
    code = layout.__code__.replace(co_name=f"flex_attention{layout.__name__}_{next(_COPIES)}")
    backend, dynamic = "eager" if device == "cpu" else "inductor", None if varies else False
    return torch.compile(FunctionType(code, globals()), fullgraph=True, dynamic=dynamic, backend=backend)


def _dense(
    kind: _Kind,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor | None,
    block_mask: Tensor | None,
    tables: _Tables | None,
) -> Tensor:
    shift = k.shape[1] - q.shape[1]
    if block_mask is not None:
        tables = _band_tables(q.shape[1], k.shape[1], kind.left, kind.right, q.device, block_mask)

    def distance(b: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return i + shift - j

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = (distance(b, i, j) <= kind.left) & (distance(b, i, j) >= -kind.right)
        if block_mask is not None:  # the kernels visit only these blocks; torch's dense form knows only this function
            seen = seen & block_mask[i // BLOCK_SIZE, j // BLOCK_SIZE]
        return seen

    return _attend(kind, q, k, v, slopes, tables, visible, distance, lambda b, i: b)


def _packed(
    kind: _Kind, q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None, ends_q: Tensor, ends_k: Tensor
) -> Tensor:
    sequence, diagonal = _packed_rows(ends_q, ends_k, q.shape[1])
    first = torch.maximum(ends_k[sequence], diagonal - kind.left)
    end = torch.minimum(ends_k[sequence + 1], diagonal + (kind.right + 1))
    first, end = _in_memory([first, end])
    if slopes is not None and slopes.dim() == 2:
        (slopes,) = _in_memory([slopes[sequence]])
    tables = _tables(first[None], end[None], k.shape[1])

    def distance(b: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return diagonal[i] - j

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j >= first[i]) & (j < end[i])

    return _attend(kind, q, k, v, slopes, tables, visible, distance, lambda b, i: i)


def _cached(kind: _Kind, q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None, filled: Tensor) -> Tensor:
    diagonal = torch.arange(q.shape[1], dtype=torch.int32, device=q.device) + (filled[:, None] - q.shape[1])
    first = (diagonal - kind.left).clamp(min=0)
    end = torch.minimum(filled[:, None], diagonal + (kind.right + 1))
    diagonal, first, end = _in_memory([diagonal, first, end])
    # flex_decoding shares the blocks of one list out evenly; with two it shares out all places, filled or not.
    tables = _tables(first, end, k.shape[1], one_list=_has_few_queries(q, k))

    def distance(b: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return diagonal[b, i] - j

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j >= first[b, i]) & (j < end[b, i])

    return _attend(kind, q, k, v, slopes, tables, visible, distance, lambda b, i: b)


# torch.compile must not look into what is a custom_op here. It would compute again what a mask reads, for each pair of
# query and key; and on an H200 (torch 2.11) what it made of rows and tables was wrong: rows of a packed batch went to
# other sequences, and blocks of a cache were visited that hold nothing.


@torch.library.custom_op("flashlab::in_memory", mutates_args=())
def _in_memory(values: list[Tensor]) -> list[Tensor]:
    return [x.clone() for x in values]


@_in_memory.register_fake
def _(values: list[Tensor]) -> list[Tensor]:
    return [torch.empty_like(x) for x in values]


@torch.library.custom_op("flashlab::packed_rows", mutates_args=())
def _packed_rows(ends_q: Tensor, ends_k: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Return the sequence of each row of queries, and the key at distance 0 from it: ``[Tq]`` each."""
    row = torch.arange(rows, dtype=torch.int32, device=ends_q.device)
    sequence = torch.searchsorted(ends_q[1:].contiguous(), row, right=True).clamp(max=ends_q.shape[0] - 2)
    return sequence, row + (ends_k - ends_q)[sequence + 1]


@_packed_rows.register_fake
def _(ends_q: Tensor, ends_k: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    return ends_q.new_empty(rows, dtype=torch.int64), ends_q.new_empty(rows)


def _attend(
    kind: _Kind,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor | None,
    tables: _Tables | None,
    visible: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    distance: Callable[[Tensor, Tensor, Tensor], Tensor],
    slope_row: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """Call flex_attention.

    Args:
        kind: The options.
        q: ``[B, Sq, H, D]``.
        k: ``[B, Sk, Hkv, D]``.
        v: ``[B, Sk, Hkv, D]``.
        slopes: ``[H]`` or ``[R, H]``, of ALiBi.
        tables: The blocks to visit, or None for all.
        visible: Whether, in batch b and head h, query i sees key j.
        distance: The distance, in batch b, of query i and key j.
        slope_row: The row r of slopes that is meant, in batch b, for query i.
    """
    if not torch.compiler.is_compiling():  # uncompiled it would need memory for all scores, and say nothing
        raise UserError("flex_attention needs torch.compile, which is switched off (TORCH_COMPILE_DISABLE or a stance)")

    def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if kind.softcap > 0:
            score = kind.softcap * torch.tanh(score / kind.softcap)
        if slopes is not None:
            slope = slopes[h] if slopes.dim() == 1 else slopes[slope_row(b, i), h]
            score = score - slope * distance(b, i, j).abs()
        return score

    blocks = None
    if tables is not None:
        blocks = BlockMask((q.shape[1], k.shape[1]), *tables, (BLOCK_SIZE, BLOCK_SIZE), visible)
    kernel_options: Any = dict(kind.kernel_options)
    out: Any = flex_attention(  # a tensor, and in torch 2.11's words perhaps a tuple
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        score_mod=score_mod if kind.softcap > 0 or slopes is not None else None,
        block_mask=blocks,
        scale=kind.softmax_scale,
        enable_gqa=q.shape[2] != k.shape[2],
        kernel_options=kernel_options,
    )
    return out.transpose(1, 2)


@lru_cache(maxsize=32)
def _remembered_tables(seqlen_q: int, seqlen_k: int, left: int, right: int, device: torch.device) -> _Tables:
    with torch.inference_mode(False):  # what is made in inference mode could not be used for training later
        return _band_tables(seqlen_q, seqlen_k, left, right, device)


def _band_tables(
    seqlen_q: int, seqlen_k: int, left: int, right: int, device: torch.device, block_mask: Tensor | None = None
) -> _Tables:
    diagonal = torch.arange(seqlen_q, dtype=torch.int32, device=device)[None] + (seqlen_k - seqlen_q)
    first, end = (diagonal - left).clamp(min=0), (diagonal + (right + 1)).clamp(max=seqlen_k)
    return _tables(first, end, seqlen_k, block_mask)


def _tables(
    first: Tensor, end: Tensor, seqlen_k: int, block_mask: Tensor | None = None, one_list: bool = False
) -> _Tables:
    listed = _visited_blocks(first, end, seqlen_k, block_mask, one_list)
    return _Tables(*([*listed[:2], None, None, *listed[2:], None, None] if one_list else listed))


@torch.library.custom_op("flashlab::visited_blocks", mutates_args=())
def _visited_blocks(
    first: Tensor, end: Tensor, seqlen_k: int, block_mask: Tensor | None, one_list: bool
) -> list[Tensor]:
    """List the blocks of scores that the kernels visit, from the first visible key of each query and the end.

    A block is full when each of its queries sees each of its keys: there the kernels apply no mask. The work is
    Sq + Sq / 128 * Sk / 128, where torch's create_block_mask tries every pair of query and key.

    Args:
        first: ``[B, Sq]``.
        end: ``[B, Sq]``.
        seqlen_k: The number of keys.
        block_mask: bool ``[ceil(Sq / 128), ceil(Sk / 128)]``: the blocks that may be listed.
        one_list: List full blocks with the others.

    Returns:
        By row, then by column: numbers and columns of the blocks that need the mask, then of the full ones.
    """
    batch_size, seqlen_q = first.shape
    missing = -seqlen_q % BLOCK_SIZE  # queries: they see nothing, so that no block with one of them is full
    first = F.pad(first, (0, missing), value=2 * _UNLIMITED).view(batch_size, 1, -1, 1, BLOCK_SIZE)
    end = F.pad(end, (0, missing)).view(batch_size, 1, -1, 1, BLOCK_SIZE)
    key = torch.arange(0, seqlen_k, BLOCK_SIZE, dtype=torch.int32, device=first.device)
    some = (first.amin(-1) < key + BLOCK_SIZE) & (end.amax(-1) > key)
    full = (first.amax(-1) <= key) & (end.amin(-1) >= key + BLOCK_SIZE)
    if block_mask is not None:
        some, full = some & block_mask, full & block_mask
    if one_list:
        return [*_list(some), *_list(some.mT)]
    partly = some & ~full
    return [*_list(partly), *_list(full), *_list(partly.mT), *_list(full.mT)]


@_visited_blocks.register_fake
def _(first: Tensor, end: Tensor, seqlen_k: int, block_mask: Tensor | None, one_list: bool) -> list[Tensor]:
    rows, columns = -(-first.shape[1] // BLOCK_SIZE), -(-seqlen_k // BLOCK_SIZE)
    listed = []
    for shape in ((rows, columns), (columns, rows)):
        for _ in range(1 if one_list else 2):
            listed += [first.new_empty((first.shape[0], 1, *shape[:1])), first.new_empty((first.shape[0], 1, *shape))]
    return listed


def _list(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Count the true entries of each row ``[..., R, C]``, and give their columns before those of the others."""
    column = torch.arange(blocks.shape[-1], dtype=torch.int32, device=blocks.device).expand(blocks.shape)
    rank = blocks.cumsum(-1)
    number = rank[..., -1:]
    place = torch.where(blocks, rank - 1, number + column - rank)
    indices = torch.empty_like(column, memory_format=torch.contiguous_format).scatter_(-1, place, column)
    return number[..., 0].to(torch.int32, memory_format=torch.contiguous_format), indices


def why_not(spec: AttentionSpec) -> str | None:
    """Say why flex_attention cannot run a call."""
    if spec.device.type not in ("cuda", "cpu"):
        return f"it needs a CUDA device or the CPU; the inputs are on {spec.device}"
    if spec.device.type == "cpu":
        return "torch has no backward pass of it on the CPU" if spec.needs_grad else None
    if spec.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"it computes in float16, bfloat16 or float32; the inputs are {spec.dtype}".replace("torch.", "")
    if not 16 <= spec.head_dim <= 256:
        return f"it takes head_dim from 16 to 256; got {spec.head_dim}"
    if spec.head_dim % 8:
        return f"it takes head_dim in multiples of 8; got {spec.head_dim}"
    if max(spec.seqlen_q * spec.num_heads, spec.seqlen_k * spec.num_kv_heads) * spec.head_dim >= _ADDRESSABLE:
        return "its kernels count the elements of a sequence in 32 bits; these are 2**31 or more"
    if (problem := _compiler_problem()) is not None:
        return problem
    if not torch.cuda.is_available():
        return "torch sees no CUDA device (`flashlab doctor` says why)"
    if (capability := torch.cuda.get_device_capability(spec.device)) < (8, 0):
        return "it needs an Ampere GPU or newer (compute capability 8.0); this one has {}.{}".format(*capability)
    return None


@cache
def _compiler_problem() -> str | None:
    """Say what torch.compile lacks to make kernels for a GPU, or return None."""
    if find_spec("triton") is None:
        return "torch.compile needs the package triton, which is not installed"
    if not (environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "torch.compile needs a C compiler, and there is no gcc or clang on the PATH"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "torch.compile needs Python's headers, and there is no Python.h (the package python3-dev has it)"
    return None
