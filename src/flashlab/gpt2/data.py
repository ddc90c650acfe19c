"""Blocks of a token set, in an order that is arithmetic: a function of seed, epoch and step alone."""

import bisect
import os
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import lru_cache
from itertools import accumulate
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from flashlab.errors import UserError, writing
from flashlab.gpt2.tokens import INDEX, Part, TokenSet
from flashlab.object_storage import open_storage
from flashlab.training.batches import Order

SHARDS_TOGETHER = 32  # whose blocks are shuffled among each other: 128 M tokens of GPT-2, 256 MB
KEPT = 2 * SHARDS_TOGETHER  # of what is streamed
FETCHED_AT_ONCE = 8


class Blocks(Dataset[Tensor]):
    """Blocks of a part as int64 ``[block_size + 1]``: inputs are all but the last token, targets all but the first.

    They do not overlap and lie within a shard; what is left of a shard behind its last block is not read.

    Args:
        tokens: the set.
        part: train or validation.
        block_size: tokens the model sees.

    Raises:
        UserError: the part is shorter than one block.
    """

    def __init__(self, tokens: TokenSet, part: Part, block_size: int) -> None:
        self.length = block_size + 1
        self.per_shard = [shard["tokens"] // self.length for shard in tokens.shards(part)]
        self._tokens, self._part = tokens, part
        self._ends = list(accumulate(self.per_shard))
        self._dataset: Any = None
        self._cache: _Cache | None = None
        self._opened_in: int | None = None
        if not sum(self.per_shard):
            longest = max((shard["tokens"] for shard in tokens.shards(part)), default=0)
            raise UserError(
                f"{tokens.path}: the {part} part has no block of {block_size:,} + 1 tokens (its longest shard has "
                f"{longest:,}); take a smaller block_size, or prepare more text"
            )

    def __len__(self) -> int:
        return sum(self.per_shard)

    def __getitem__(self, index: int) -> Tensor:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> Tensor:
        """Read several blocks at once: ``[B, block_size + 1]``.

        Raises:
            UserError: a shard is missing, damaged or out of reach.
        """
        if self._opened_in != os.getpid():  # opened in the process that reads, never carried into one
            self._dataset, self._opened_in = self._open(), os.getpid()
        if self._cache is not None:
            self._cache.fetch({self._shard_of(index) for index in indices})
        blocks = np.empty((len(indices), self.length), np.int64)
        for block, index in zip(blocks, indices, strict=True):
            try:
                block[:] = self._dataset[index]
            except Exception as error:  # litdata lets whatever its readers meet through
                reason = " ".join(str(error).split()).split(". ")[0][:200]
                raise UserError(
                    f"{self._name_of(index)} is damaged or gone ({reason}); prepare the set again: what is whole is "
                    "kept"
                ) from error
        lowest, highest = blocks.min(axis=1), blocks.max(axis=1)
        if (wrong := (lowest < 0) | (highest >= self._tokens.vocab_size)).any():
            at = int(wrong.argmax())
            raise UserError(
                f"{self._name_of(indices[at])} is damaged: it holds the token "
                f"{lowest[at] if lowest[at] < 0 else highest[at]:,} of a vocabulary of {self._tokens.vocab_size:,}; "
                "prepare the set again: what is whole is kept"
            )
        return torch.from_numpy(blocks)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_dataset": None, "_cache": None, "_opened_in": None}

    def _shard_of(self, index: int) -> int:
        return bisect.bisect_right(self._ends, index)

    def _name_of(self, index: int) -> str:
        return f"{self._tokens.folder(self._part)}/{self._tokens.shards(self._part)[self._shard_of(index)]['name']}"

    def _open(self) -> Any:
        from litdata import StreamingDataset, TokensLoader  # slow to import, and not every process here needs it

        folder = self._tokens.folder(self._part)
        if not self._tokens.is_local:
            self._cache = _Cache(self._tokens, self._part)
            folder = str(self._cache.folder)
        return StreamingDataset(folder, item_loader=TokensLoader(block_size=self.length), shuffle=False)


class _Cache:
    """Shards of a set in object storage, fetched as they are needed into a folder that goes with this process.

    litdata would fetch them too, but only in the order in which they are stored.
    """

    def __init__(self, tokens: TokenSet, part: Part) -> None:
        stack = ExitStack()
        Finalize(self, stack.close, exitpriority=0)  # the folder goes with its reader, or with the process
        self.folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="flashlab-")))
        self._threads = stack.enter_context(ThreadPoolExecutor(FETCHED_AT_ONCE))
        self._place, self._shards = tokens.folder(part), tokens.shards(part)
        self._read = open_storage(self._place)  # one client for all threads
        self._kept: dict[int, Path] = {}  # the one that was asked for longest ago first
        (self.folder / INDEX).write_bytes(self._read(INDEX))

    def fetch(self, shards: set[int]) -> None:
        """Have these shards in the folder, and not many others.

        Raises:
            UserError: one cannot be fetched, or is damaged, or there is no space.
        """
        missing = [shard for shard in sorted(shards) if shard not in self._kept]
        fetched = dict(zip(missing, self._threads.map(self._fetch, missing), strict=True))
        self._kept |= fetched
        for shard in shards:
            self._kept[shard] = self._kept.pop(shard)
        while len(self._kept) > max(KEPT, len(shards)):
            self._kept.pop(next(iter(self._kept))).unlink()

    def _fetch(self, number: int) -> Path:
        shard = self._shards[number]
        content = self._read(shard["name"])
        if len(content) != shard["bytes"] or zlib.crc32(content) != shard["crc32"]:
            raise UserError(f"{self._place}/{shard['name']} is damaged: its checksum differs; upload the set again")
        path = self.folder / shard["name"]
        with writing(path):
            path.write_bytes(content)
        return path


class ShuffledShards(Order):
    """Blocks shuffled within groups of shards.

    Epoch e puts the shards into an order drawn from (seed, e), and shuffles the blocks of every 32 of them that follow
    each other: as good as a shuffle of all for text, it needs no list of all blocks, and a set that is streamed is
    fetched shard by shard.

    Args:
        per_shard: how many blocks each shard has.
        seed: of the order.
    """

    def __init__(self, per_shard: Sequence[int], seed: int) -> None:
        self.per_shard, self.seed = np.asarray(per_shard), seed
        self.firsts = np.cumsum(self.per_shard) - self.per_shard
        self.num_items = int(self.per_shard.sum())
        self._groups_of = lru_cache(maxsize=2)(self._groups)
        self._order_of = lru_cache(maxsize=2)(self._order)

    def items(self, epoch: int, places: np.ndarray) -> list[int]:
        """Return the blocks at some places of an epoch."""
        shards, ends = self._groups_of(epoch)
        blocks = []
        for place in places.tolist():
            group = bisect.bisect_right(ends, place)
            before = ends[group - 1] if group else 0
            blocks.append(int(self._order_of(epoch, group, tuple(shards[group]))[place - before]))
        return blocks

    def _groups(self, epoch: int) -> tuple[list[list[int]], list[int]]:
        """Return the shards of an epoch that are read together, and where in the epoch each such group ends."""
        shards = np.random.default_rng((self.seed, epoch)).permutation(len(self.per_shard)).tolist()
        groups = [shards[start : start + SHARDS_TOGETHER] for start in range(0, len(shards), SHARDS_TOGETHER)]
        return groups, list(accumulate(int(self.per_shard[group].sum()) for group in groups))

    def _order(self, epoch: int, group: int, shards: tuple[int, ...]) -> np.ndarray:
        blocks = np.concatenate([np.arange(self.per_shard[shard]) + self.firsts[shard] for shard in shards])
        return np.random.default_rng((self.seed, epoch, 1 + group)).permutation(blocks)


class OrderedBatches(Sampler[list[int]]):
    """Batches of the first blocks, each once and in their order: rank r of W has blocks r, r + W, r + 2 W and so on.

    Every rank has as many batches of the same sizes as the others, as sharded models need it: the blocks behind the
    last multiple of W are left out.

    Args:
        num_blocks: how many.
        batch_size: per rank; the last batch may be smaller.
        rank: of this process.
        world_size: how many read together.
    """

    def __init__(self, num_blocks: int, batch_size: int, *, rank: int = 0, world_size: int = 1) -> None:
        self.blocks = list(range(num_blocks - num_blocks % world_size))[rank::world_size]
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.blocks) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        for start in range(0, len(self.blocks), self.batch_size):
            yield self.blocks[start : start + self.batch_size]
