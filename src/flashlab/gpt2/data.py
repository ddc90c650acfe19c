"""Blocks of a token set, in an order that is arithmetic: a function of seed, epoch and step alone."""

import bisect
import os
import signal
import sys
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
from torch.utils.data import DataLoader, Dataset, Sampler, default_convert

from flashlab.errors import UserError, writing
from flashlab.gpt2.tokens import INDEX, Part, TokenSet
from flashlab.object_storage import open_storage

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
        if blocks.max() >= self._tokens.vocab_size:
            name = self._name_of(indices[int(blocks.max(axis=1).argmax())])
            raise UserError(
                f"{name} is damaged: it holds the token {blocks.max():,} of a vocabulary of "
                f"{self._tokens.vocab_size:,}; prepare the set again: what is whole is kept"
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


class EndlessBatches(Sampler[list[int]]):
    """Batches of block numbers, epoch after epoch, as if from one long list.

    Epoch e puts the shards into an order drawn from (seed, e), and shuffles the blocks of every 32 of them that follow
    each other: as good as a shuffle of all for text, it needs no list of all blocks, and a set that is streamed is
    fetched shard by shard. Step t takes the next ``batch_size * world_size`` blocks, of which every rank has its own
    slice: together the ranks see what one rank with the whole batch would see. With gradient accumulation every
    micro-batch is a step. Training is resumed by starting at a later step and block, on as many ranks as there are
    then.

    Args:
        per_shard: how many blocks each shard has.
        batch_size: blocks per step and rank.
        num_steps: of the whole run.
        seed: of the order.
        rank: of this process among the world_size that train together.
        world_size: how many train together.
        start_step: steps that were done before.
        start_block: blocks that they took; by default, as many as steps of this size take.
    """

    def __init__(
        self,
        per_shard: Sequence[int],
        batch_size: int,
        num_steps: int,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        start_step: int = 0,
        start_block: int | None = None,
    ) -> None:
        self.per_shard = np.asarray(per_shard)
        self.firsts = np.cumsum(self.per_shard) - self.per_shard
        self.num_blocks = int(self.per_shard.sum())
        self.batch_size, self.num_steps, self.seed = batch_size, num_steps, seed
        self.rank, self.world_size, self.start_step = rank, world_size, start_step
        self.start_block = start_step * batch_size * world_size if start_block is None else start_block

    def __len__(self) -> int:
        """Return the steps of the whole run: what came before a resumed start counts."""
        return self.num_steps

    def __iter__(self) -> Iterator[list[int]]:
        groups_of = lru_cache(maxsize=2)(self._groups)
        order_of = lru_cache(maxsize=2)(self._order)
        for step in range(self.start_step, self.num_steps):
            first = self.start_block + ((step - self.start_step) * self.world_size + self.rank) * self.batch_size
            batch = []
            for number in range(first, first + self.batch_size):
                epoch, place = divmod(number, self.num_blocks)
                shards, ends = groups_of(epoch)
                group = bisect.bisect_right(ends, place)
                before = ends[group - 1] if group else 0
                batch.append(int(order_of(epoch, group, tuple(shards[group]))[place - before]))
            yield batch

    def _groups(self, epoch: int) -> tuple[list[list[int]], list[int]]:
        """Return the shards of an epoch that are read together, and where in the epoch each such group ends."""
        shards = np.random.default_rng((self.seed, epoch)).permutation(len(self.per_shard)).tolist()
        groups = [shards[start : start + SHARDS_TOGETHER] for start in range(0, len(shards), SHARDS_TOGETHER)]
        return groups, list(accumulate(int(self.per_shard[group].sum()) for group in groups))

    def _order(self, epoch: int, group: int, shards: tuple[int, ...]) -> np.ndarray:
        blocks = np.concatenate([np.arange(self.per_shard[shard]) + self.firsts[shard] for shard in shards])
        return np.random.default_rng((self.seed, epoch, 1 + group)).permutation(blocks)


class OrderedBatches(Sampler[list[int]]):
    """Batches of all blocks once, in their order: rank r of W has blocks r, r + W, r + 2 W and so on.

    Every rank has as many batches of the same sizes as the others, as sharded models need it: the blocks behind the
    last multiple of W are left out.

    Args:
        num_blocks: of the part.
        batch_size: per rank; the last batch may be smaller.
        max_batches: read only the first so many batches; None reads all.
        rank: of this process.
        world_size: how many read together.
    """

    def __init__(
        self, num_blocks: int, batch_size: int, *, max_batches: int | None = None, rank: int = 0, world_size: int = 1
    ) -> None:
        self.blocks = list(range(num_blocks - num_blocks % world_size))[rank::world_size]
        if max_batches is not None:
            self.blocks = self.blocks[: max_batches * batch_size]
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.blocks) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        for start in range(0, len(self.blocks), self.batch_size):
            yield self.blocks[start : start + self.batch_size]


def _end_well(worker: int) -> None:
    """Let a worker that is terminated, as by a process that ends early, take what it fetched away."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())


class Loader(DataLoader[Tensor]):
    """A DataLoader that passes on the `UserError` of a worker as it was, without the traceback that torch adds."""

    def __iter__(self) -> Iterator[Tensor]:  # type: ignore[override]
        try:
            yield from super().__iter__()
        except UserError as error:
            error.__traceback__ = None  # it is in a cycle, in which the workers would outlive their queues
            raise UserError(str(error).rpartition("UserError: ")[2].strip()) from None


def loader(
    blocks: Blocks,
    batches: Sampler[list[int]],
    *,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> Loader:
    """Load blocks in the given batches, as int64 ``[B, block_size + 1]``.

    Args:
        blocks: the part.
        batches: which blocks, in which order.
        num_workers: processes that load; a set on a local disk needs none, one that is streamed does.
        pin_memory: load into memory that copies to a GPU fast.
    """
    return Loader(
        blocks,
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=default_convert,
        pin_memory=pin_memory,
        worker_init_fn=_end_well,
        prefetch_factor=8 if num_workers else None,
    )
