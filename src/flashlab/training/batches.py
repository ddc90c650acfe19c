"""Batches in an order that is a function of seed, epoch and step alone, and the loader that reads them."""

import os
import signal
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import lru_cache
from types import TracebackType
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Sampler, default_convert

from flashlab.errors import UserError


class Order(ABC):
    """In which order the items of a data set come, epoch for epoch."""

    num_items: int
    seed: int

    @abstractmethod
    def items(self, epoch: int, places: np.ndarray) -> list[int]:
        """Return the items at some places of an epoch."""


class Shuffled(Order):
    """Epoch e is a permutation of all items, drawn from (seed, e)."""

    def __init__(self, num_items: int, seed: int) -> None:
        self.num_items, self.seed = num_items, seed
        self._order = lru_cache(maxsize=2)(self._permute)

    def items(self, epoch: int, places: np.ndarray) -> list[int]:
        return self._order(epoch)[places].tolist()

    def _permute(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self.seed, epoch)).permutation(self.num_items)


class EndlessBatches(Sampler[list[int]]):
    """Batches of item numbers, epoch after epoch, as if from one long list.

    Step t takes the next ``batch_size * world_size`` items, of which every rank has its own slice: together the ranks
    see what one rank with the whole batch would see, whatever the loader's workers. Training is resumed by starting at
    a later step and item, on as many ranks as there are then.

    Args:
        order: of the items.
        batch_size: per rank.
        num_steps: of the whole run.
        rank: of this process among the world_size that train together.
        world_size: how many train together.
        start_step: steps that were done before.
        start_item: items that they took; by default, as many as steps of this size take.
    """

    def __init__(
        self,
        order: Order,
        batch_size: int,
        num_steps: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        start_step: int = 0,
        start_item: int | None = None,
    ) -> None:
        self.order, self.batch_size, self.num_steps = order, batch_size, num_steps
        self.rank, self.world_size, self.start_step = rank, world_size, start_step
        self.start_item = start_step * batch_size * world_size if start_item is None else start_item

    def __len__(self) -> int:
        """Return the steps of the whole run: what came before a resumed start counts."""
        return self.num_steps

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.start_step, self.num_steps):
            first = self.start_item + ((step - self.start_step) * self.world_size + self.rank) * self.batch_size
            epochs, places = np.divmod(np.arange(first, first + self.batch_size), self.order.num_items)
            yield [
                item
                for epoch in range(int(epochs[0]), int(epochs[-1]) + 1)
                for item in self.order.items(epoch, places[epochs == epoch])
            ]


class ResumedData(LightningDataModule):
    """Data of which training reads endless batches, resumed at the step and item that it has reached.

    Args:
        order: of the training items.
        batch_size: per process.
        num_steps: of the whole run.
    """

    def __init__(self, order: Order, batch_size: int, num_steps: int) -> None:
        super().__init__()
        self.order, self.num_steps, self._batch_size = order, num_steps, batch_size
        self._began = {"step": 0, "item": 0}

    def train_batches(self) -> EndlessBatches:
        """Return what is left of the run, for this process."""
        return EndlessBatches(
            self.order,
            self._batch_size,
            self.num_steps,
            rank=self._trainer.global_rank,
            world_size=self._trainer.world_size,
            start_step=self._began["step"],
            start_item=self._began["item"],
        )

    def state_dict(self) -> dict[str, int]:
        """Say how far the items were dealt out: by how many processes may be another thing each time."""
        step = self._trainer.global_step
        dealt = (step - self._began["step"]) * self._batch_size * self._trainer.world_size
        return {"step": step, "item": self._began["item"] + dealt, "seed": self.order.seed}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self._began = state_dict

    @property
    def _trainer(self) -> Trainer:
        assert self.trainer is not None
        return self.trainer


def _end_well(worker: int) -> None:
    """Let a worker that is terminated, as by a process that ends early, take away what it fetched."""
    sys.excepthook = _hide_lost_readers
    os.setpgid(0, 0)  # torchrun, Docker and Ctrl-C stop whole groups, and training needs its workers for what is left
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())


def _hide_lost_readers(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Say nothing of a batch that nobody takes any longer, since the process that trained was killed."""
    if not issubclass(kind, EOFError | ConnectionError):
        sys.__excepthook__(kind, error, traceback)


class Loader(DataLoader[Tensor]):
    """A DataLoader that passes on the `UserError` of a worker as it was, without the traceback that torch adds."""

    def __iter__(self) -> Iterator[Tensor]:  # type: ignore[override]
        try:
            yield from super().__iter__()
        except UserError as error:
            error.__traceback__ = None  # it is in a cycle, in which the workers would outlive their queues
            raise UserError(str(error).rpartition("UserError: ")[2].strip()) from None


def loader(
    items: Any,
    batches: Sampler[list[int]] | None = None,
    *,
    batch_size: int = 32,
    num_workers: int = 0,
    prefetch: int | None = None,
    pin_memory: bool = False,
) -> Loader:
    """Load items, or a range of their numbers, as one tensor a batch.

    Args:
        items: a data set that reads several items at once.
        batches: which, in which order; by default all of them once, in their order.
        batch_size: of the default.
        num_workers: processes that load; what lies in memory or on a local disk needs none.
        prefetch: batches that each of them reads ahead; by default, torch's 2.
        pin_memory: load into memory that copies to a GPU fast.
    """
    sampling = {"batch_sampler": batches} if batches is not None else {"batch_size": batch_size}
    return Loader(
        items,
        num_workers=num_workers,
        collate_fn=torch.tensor if isinstance(items, range) else default_convert,
        pin_memory=pin_memory,
        worker_init_fn=_end_well,
        prefetch_factor=prefetch if num_workers else None,
        **sampling,
    )
