"""Averaged weights, beside the training steps."""

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor


class AverageWeights(WeightAveraging):
    """Keep an exponential moving average of the weights, which is validated, checkpointed and evaluated."""

    def __init__(self, decay: float) -> None:
        super().__init__(use_buffers=False)
        self.decay = decay

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Follow the module to its device: when the copy was made it may not have been there yet."""
        assert self._average_model is not None
        self._average_model.to(pl_module.device)

    @torch.no_grad()
    def update(self, pl_module: LightningModule) -> None:
        """Take the weights of one more step into the average, without the host's looking at a number."""
        assert self._average_model is not None
        n = self._average_model.n_averaged
        # Early on the average is over fewer steps: the first weights are soon forgotten.
        weight = torch.where(n == 0, 1.0, 1 - ((1 + n) / (10 + n)).clamp(max=self.decay))
        averaged: list[Tensor] = list(self._average_model.module.parameters())
        current: list[Tensor] = list(pl_module.parameters())
        change = list(torch._foreach_sub(current, averaged))
        torch._foreach_mul_(change, weight)
        torch._foreach_add_(averaged, change)
        n += 1

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if not pl_module.captured:  # else the captured step has done it
            self.update(pl_module)
        self._latest_update_step = trainer.global_step

    def on_train_epoch_end(self, *args: Any) -> None:
        """Leave the average as it is: the one epoch is the run."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the model as it is: checkpoints hold the average."""
