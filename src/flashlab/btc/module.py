"""The forecaster as Lightning trains it: loss, optimiser and schedules, and the data it is fed."""

import time
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
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor
from torch.utils.data import DataLoader

from flashlab.btc.dataset import DataConfig, EndlessBatches, Windows, loader
from flashlab.btc.model import Forecaster, ModelConfig
from flashlab.btc.prepare import PreparedSet
from flashlab.btc.windows import part_windows
from flashlab.errors import UserError

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
        self._last_log = (0, 0.0)

    def _loss(self, bars: Tensor) -> Tensor:
        return self.forecaster.loss(bars, self.loss_weights, self.mask_filled)

    def training_step(self, bars: Tensor) -> Tensor:
        loss = self._loss(bars)
        self.log("train/loss", loss, prog_bar=True)
        self._log_speed(bars)
        return loss

    def validation_step(self, bars: Tensor) -> None:
        self.log("val/loss", self._loss(bars), prog_bar=True, batch_size=len(bars), sync_dist=True)

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        norm = torch.nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val or float("inf"))
        self.log("train/grad_norm", norm)

    def configure_optimizers(self) -> Any:
        matrices = [parameter for parameter in self.parameters() if parameter.ndim > 1]
        vectors = [parameter for parameter in self.parameters() if parameter.ndim < 2]
        groups = [
            {"params": matrices, "weight_decay": self.config.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.config.lr, betas=self.config.betas, fused=True)
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

    def _log_speed(self, bars: Tensor) -> None:
        step, now = self.trainer.global_step, time.perf_counter()
        if step % self.trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return
        last_step, last_time = self._last_log
        if step > last_step > 0:
            bars_per_s = (step - last_step) * bars.shape[0] * (bars.shape[1] - 1) / (now - last_time)
            self.log("train/bars_per_s", bars_per_s * self.trainer.world_size)
        self.log("train/lr", self.trainer.optimizers[0].param_groups[0]["lr"])
        self._last_log = (step, now)


class BarsDataModule(LightningDataModule):
    """Training and validation windows of a prepared set, resumed at the step that training has reached."""

    def __init__(self, prepared: PreparedSet, config: DataConfig, max_steps: int, seed: int) -> None:
        super().__init__()
        self.config, self.max_steps, self.seed = config, max_steps, seed
        self.train_windows, self.val_windows = (
            Windows(
                prepared,
                part_windows(prepared.manifest, part, config.context_length, stride),
                config.context_length,
                mirror=mirror,
                stream=config.stream,
            )
            for part, stride, mirror in (("train", config.stride, config.mirror), ("validation", None, False))
        )

    def train_dataloader(self) -> DataLoader[Tensor]:
        assert self.trainer is not None
        windows = self.train_windows
        batches = EndlessBatches(
            len(windows),
            self.config.batch_size,
            self.max_steps,
            seed=self.seed,
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
            start_step=self.trainer.global_step,
        )
        return loader(windows, batches, num_workers=self.config.num_workers, pin_memory=torch.cuda.is_available())

    def val_dataloader(self) -> DataLoader[Tensor]:
        return loader(self.val_windows, batch_size=self.config.batch_size)


def load_forecaster(path: Path) -> ForecasterModule:
    """Load a checkpoint without executing what it may hold.

    Raises:
        UserError: there is no checkpoint, or it is damaged or of another shape.
    """
    try:
        return ForecasterModule.load_from_checkpoint(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(
            f"{path} does not exist: no validation was reached there; go on with `flashlab train ... --resume`"
        ) from None
    except Exception as error:  # a damaged file fails in as many ways as there are bytes
        raise UserError(
            f"{path} cannot be loaded ({one_line(error)}); take another checkpoint or train again"
        ) from error


def one_line(error: Exception) -> str:
    """Say why a checkpoint did not load, in one line."""
    reason = " ".join(str(error).split()).rpartition("WeightsUnpickler error: ")[2]  # what torch says last, at length
    return reason.split(". ")[0][:200] or type(error).__name__
