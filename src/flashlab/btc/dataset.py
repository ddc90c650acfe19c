"""Windows of a prepared set, from memory or streamed."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing.util import Finalize
from typing import Literal

import numpy as np
import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt
from torch import Tensor
from torch.utils.data import Dataset

from flashlab.btc.bars import FEATURES
from flashlab.btc.prepare import PreparedSet, stream_blocks

MIRROR_ORDER = [FEATURES.index(name) for name in ("open", "low", "high", "close")]
VOLUME = FEATURES.index("volume")

ReadWindows = Callable[[np.ndarray, int], Tensor]


@dataclass(frozen=True)
class DataConfig:
    """What is read, and how it is cut into batches.

    Args:
        path: prepared set, a folder or an object storage URL.
        context_length: bars the model sees; at most the one that the set was prepared with.
        stride: bars from one training window to the next (a set split by --split seed has its own).
        batch_size: windows per step and GPU.
        mirror: also train on every window quoted the other way round (bitcoin per dollar), where rises are falls.
        stream: fetch windows from the stored chunks as they are needed, rather than hold the whole series in memory;
            auto does where it would take more than half of the memory that is free.
        num_workers: processes that load windows; memory needs none.
    """

    path: str = "data/simulated"
    context_length: PositiveInt = 2048
    stride: PositiveInt = 128
    batch_size: PositiveInt = 32
    mirror: bool = True
    stream: bool | Literal["auto"] = "auto"
    num_workers: NonNegativeInt = 0


class Windows(Dataset[Tensor]):
    """Windows of context length S as float32 ``[S + 1, 5]``: prices and volume, NaN for a filled minute's volume.

    Args:
        prepared: the set they are views of.
        starts: their first rows ``[W]``.
        context_length: S.
        mirror: have every window twice, the second time as prices of a dollar in bitcoin (item W + i mirrors item i).
        stream: read from the stored chunks as needed, not from memory.
    """

    def __init__(
        self,
        prepared: PreparedSet,
        starts: np.ndarray,
        context_length: int,
        *,
        mirror: bool = False,
        stream: bool = False,
    ) -> None:
        self.starts, self.length, self.mirror = starts, context_length + 1, mirror
        self._prepared = prepared
        self._read: ReadWindows | None = None if stream else _from_memory(prepared)

    def __len__(self) -> int:
        return len(self.starts) * (1 + self.mirror)

    def __getitem__(self, index: int) -> Tensor:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> Tensor:
        """Read several windows at once: ``[B, S + 1, 5]``."""
        if self._read is None:  # opened in the worker process that reads, never carried into one
            self._read = _from_chunks(self._prepared)
        mirrored, number = np.divmod(np.asarray(indices), len(self.starts))
        windows = self._read(self.starts[number], self.length)
        return mirror_windows(windows, torch.from_numpy(mirrored)) if mirrored.any() else windows

    def resident(self, device: torch.device) -> Callable[[Tensor], Tensor]:
        """Copy the series to a device, and return what reads there: item numbers ``[B]`` to ``[B, S + 1, 5]``."""
        series = torch.from_numpy(self._prepared.bars().values).to(device)
        starts = torch.from_numpy(self.starts).to(device)
        position = torch.arange(self.length, device=device)

        def read(items: Tensor) -> Tensor:
            windows = series[starts[items % len(starts)][:, None] + position]
            return mirror_windows(windows, items // len(starts)) if self.mirror else windows

        return read


def mirror_windows(windows: Tensor, mirrored: Tensor) -> Tensor:
    """Quote some windows ``[B, S, 5]`` the other way round: those whose ``mirrored [B]`` is not 0."""
    other = torch.cat([1 / windows[..., MIRROR_ORDER], windows[..., VOLUME:]], dim=-1)
    return torch.where(mirrored[:, None, None] != 0, other, windows)


def _from_memory(prepared: PreparedSet) -> ReadWindows:
    values = torch.from_numpy(prepared.bars().values)

    def read(starts: np.ndarray, length: int) -> Tensor:
        return values[torch.from_numpy(starts)[:, None] + torch.arange(length)]

    return read


def _from_chunks(prepared: PreparedSet) -> ReadWindows:
    stack = ExitStack()
    block_bars = prepared.manifest["block_bars"]
    read_block = lru_cache(maxsize=256)(stack.enter_context(stream_blocks(prepared)))  # 100 MB of blocks

    def read(starts: np.ndarray, length: int) -> Tensor:
        windows = np.empty((len(starts), length, len(FEATURES)), np.float32)
        for window, start in zip(windows, starts.tolist(), strict=True):
            pieces = []
            for index in range(start // block_bars, (start + length - 1) // block_bars + 1):
                at = start - index * block_bars  # where the window starts in the block, below 0 if before it
                pieces.append(read_block(index).values[max(at, 0) : at + length])
            np.concatenate(pieces, out=window)
        return torch.from_numpy(windows)

    Finalize(read, stack.close, exitpriority=0)  # the chunk cache goes with its reader, or with the process
    return read
