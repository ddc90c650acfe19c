"""The training loop as it was published, to be measured against and for nothing else.

Every window is an item of its own in litdata's chunks, four workers copy items into batches, flash-attn's own module
attends with 8 heads of 8, and Lightning's log gets the norm of the gradient at every step.
"""

from functools import partial
from pathlib import Path
from typing import Any

import litdata
import numpy as np
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import grad_norm
from torch import Tensor, nn

from flashlab.btc.bars import log_features
from flashlab.btc.prepare import PreparedSet
from flashlab.btc.windows import SEED_STRIDE, part_windows

WIDTH, NUM_HEADS, NUM_LAYERS, WORKERS = 64, 8, 4, 4


def write_windows(prepared: PreparedSet, context_length: int, out: Path) -> None:
    """Write the training windows ``[S + 1, 5]`` of z-scores, one litdata item each."""
    scaler = prepared.scaler
    series = ((log_features(prepared.bars().values) - scaler.mean) / scaler.std).astype(np.float32)
    starts = part_windows(prepared.manifest, "train", context_length, SEED_STRIDE).tolist()
    cut = partial(_cut, np.nan_to_num(series), context_length + 1)
    litdata.optimize(cut, inputs=starts, output_dir=str(out), chunk_bytes="64MB", num_workers=WORKERS, verbose=False)


def _cut(series: np.ndarray, length: int, start: int) -> Tensor:
    return torch.from_numpy(series[start : start + length].copy())


def loader(windows: Path, batch_size: int) -> litdata.StreamingDataLoader:
    """Load shuffled windows as the published loop does."""
    data = litdata.StreamingDataset(str(windows), shuffle=True, drop_last=True)
    return litdata.StreamingDataLoader(data, batch_size=batch_size, num_workers=WORKERS, pin_memory=True)


class PublishedModule(LightningModule):
    """A transformer over z-scores ``[B, S, 5]``, with flash-attn's own attention module."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, WIDTH)
        self.blocks = nn.ModuleList(_Block() for _ in range(NUM_LAYERS))
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    def training_step(self, window: Tensor) -> Tensor:
        loss = nn.functional.mse_loss(self(window[:, :-1]), window[:, 1:])
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.log("grad_norm", grad_norm(self, norm_type=2)["grad_2.0_norm_total"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=5e-5)


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        from flash_attn.modules.mha import MHA

        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention: Any = MHA(WIDTH, NUM_HEADS, causal=True, use_flash_attn=True)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))
