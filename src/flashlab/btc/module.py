"""The forecaster as Lightning trains it: loss, optimiser and schedules, and the data it is fed."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jsonargparse.typing import (
    NonNegativeFloat,
    NonNegativeInt,
    OpenUnitInterval,
    PositiveFloat,
    restricted_number_type,
)
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.utils.data import DataLoader

from flashlab.btc.callbacks import AverageWeights
from flashlab.btc.captured import CapturedStep, mean_over_processes
from flashlab.btc.dataset import DataConfig, Windows
from flashlab.btc.model import Forecaster, ModelConfig
from flashlab.btc.prepare import PreparedSet
from flashlab.btc.windows import part_windows
from flashlab.training.batches import ResumedData, Shuffled, loader
from flashlab.training.run import loading
from flashlab.training.trainer import adamw

if TYPE_CHECKING:
    Decay = float
else:
    Decay = restricted_number_type("Decay", float, [(">=", 0), ("<", 1)])


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, a linear warm-up, and a lower rate whenever the validation loss stands still.

    Args:
        lr: learning rate after the warm-up.
        weight_decay: of matrices; vectors have none.
        betas: decay of AdamW's averages.
        warmup_steps: steps over which the rate rises to lr.
        plateau_factor: what the rate is multiplied with when the validation loss stands still (ReduceLROnPlateau).
        plateau_patience: validations without a better loss that are waited for before.
        loss_weights: of open, high, low, close and volume.
        average_decay: decay of the running average of the weights that is validated and kept; 0 keeps the last weights.
    """

    lr: PositiveFloat = 3e-3
    weight_decay: NonNegativeFloat = 0.1
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    warmup_steps: NonNegativeInt = 200
    plateau_factor: OpenUnitInterval = 0.5
    plateau_patience: NonNegativeInt = 1
    loss_weights: tuple[NonNegativeFloat, NonNegativeFloat, NonNegativeFloat, NonNegativeFloat, NonNegativeFloat] = (
        1.0,
        1.0,
        1.0,
        1.0,
        0.3,
    )
    average_decay: Decay = 0.999


class ForecasterModule(LightningModule):
    """The forecaster with its optimiser. All arguments are plain values and stand in every checkpoint."""

    loss_weights: Tensor

    def __init__(
        self, model: dict[str, Any], optimizer: dict[str, Any], mean: list[float], std: list[float], mask_filled: bool
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        self.forecaster = Forecaster(ModelConfig(**model), mean, std)
        self.config = OptimizerConfig(**optimizer)
        self.mask_filled = mask_filled
        self.register_buffer("loss_weights", torch.tensor(self.config.loss_weights), persistent=False)
        self.captured = False  # whether steps are recorded and replayed; of a machine, not of what is trained
        self._step: CapturedStep | None = None

    def loss(self, bars: Tensor) -> tuple[Tensor, Tensor]:
        """Add up the loss over the bars ``[B, S + 1, 5]`` that count, and count them."""
        return self.forecaster.loss(bars, self.loss_weights, self.mask_filled)

    def on_train_start(self) -> None:
        optimizer, data = self.trainer.optimizers[0], self.trainer.datamodule  # type: ignore[attr-defined]
        if self.captured:
            read = data.train_windows.resident(self.device) if data.resident else None
            average = next((x for x in self.trainer.callbacks if isinstance(x, AverageWeights)), None)  # type: ignore[attr-defined]
            self._step = CapturedStep(
                lambda batch: self.loss(read(batch) if read else batch),
                optimizer,
                self.trainer.gradient_clip_val or float("inf"),
                torch.bfloat16 if self.trainer.precision == "bf16-mixed" else None,
                (lambda: average.update(self)) if average else None,
            )

    def training_step(self, batch: Tensor) -> Tensor:
        logs = (self.trainer.global_step + 1) % self.trainer.log_every_n_steps == 0  # type: ignore[attr-defined]
        if self._step is not None:
            self._step(batch)
            loss = self._step.loss.detach()
            if logs:
                self.log("train/grad_norm", self._step.gradient_norm)
        else:
            total, count = self.loss(batch)
            loss = total / mean_over_processes(count)
        if logs:
            # Not for the bar: Lightning would read it at every step.
            self.log("train/loss", loss.detach(), sync_dist=True)
            self.log("train/lr", self.trainer.optimizers[0].param_groups[0]["lr"])
        return loss

    def validation_step(self, bars: Tensor) -> None:
        total, count = self.loss(bars)
        self.log("val/loss", total / count, prog_bar=True, batch_size=int(count), sync_dist=True)  # a mean over bars

    # The captured step has done all this when `training_step` returns.

    def backward(self, loss: Tensor) -> None:
        if self._step is None:
            loss.backward()

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        if self._step is None:
            optimizer.zero_grad()

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        if self._step is None:
            optimizer.step(optimizer_closure)
        else:
            optimizer_closure()

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        norm = torch.nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val or float("inf"))
        self.log("train/grad_norm", norm)

    def make_optimizer(self) -> torch.optim.Optimizer:
        """Return AdamW over the parameters."""
        return adamw(self, self.config.lr, self.config.weight_decay, self.config.betas)

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer()
        schedules: list[dict[str, Any]] = []
        if self.config.warmup_steps:
            warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 1e-2, total_iters=self.config.warmup_steps)
            schedules.append({"scheduler": warmup, "interval": "step"})
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, factor=self.config.plateau_factor, patience=self.config.plateau_patience
        )
        every = self.trainer.val_check_interval
        schedules.append({"scheduler": plateau, "interval": "step", "frequency": every, "monitor": "val/loss"})
        return [optimizer], schedules


class BarsDataModule(ResumedData):
    """Training and validation windows of a prepared set.

    Args:
        prepared: the set.
        config: how it is cut into batches; `stream` decided.
        max_steps: of the whole run.
        seed: of the order.
        resident: give the numbers of windows, to be read where the series lies on the GPU, instead of the windows.
    """

    def __init__(
        self, prepared: PreparedSet, config: DataConfig, max_steps: int, seed: int, *, resident: bool = False
    ) -> None:
        self.train_windows, self.val_windows = (
            Windows(
                prepared,
                part_windows(prepared.manifest, part, config.context_length, stride),
                config.context_length,
                mirror=mirror,
                stream=bool(config.stream),
            )
            for part, stride, mirror in (("train", config.stride, config.mirror), ("validation", None, False))
        )
        super().__init__(Shuffled(len(self.train_windows), seed), config.batch_size, max_steps)
        self.config, self.resident = config, resident

    def train_dataloader(self) -> DataLoader[Tensor]:
        return loader(
            range(len(self.train_windows)) if self.resident else self.train_windows,
            self.train_batches(),
            num_workers=0 if self.resident else self.config.num_workers,
            pin_memory=torch.cuda.is_available(),
        )

    def val_dataloader(self) -> DataLoader[Tensor]:
        return loader(self.val_windows, batch_size=self.config.batch_size)


def load_forecaster(path: Path) -> ForecasterModule:
    """Load a checkpoint without executing what it may hold.

    Raises:
        UserError: there is no checkpoint, or it is damaged or of another shape.
    """
    with loading(path, "flashlab train"):
        return ForecasterModule.load_from_checkpoint(path, map_location="cpu", weights_only=True)
