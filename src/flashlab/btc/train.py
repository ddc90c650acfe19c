"""Train the forecaster with Lightning."""

import io
import json
import logging
import os
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
import yaml
from jsonargparse.typing import NonNegativeInt, OpenUnitInterval, PositiveFloat, PositiveInt
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint, TQDMProgressBar, WeightAveraging
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor
from torch.utils.data import DataLoader

from flashlab.btc.dataset import DataConfig, EndlessBatches, Windows, loader
from flashlab.btc.model import Forecaster, ModelConfig
from flashlab.btc.prepare import PreparedSet, open_set
from flashlab.btc.windows import part_windows
from flashlab.errors import UserError, writing
from flashlab.machine import examine

BEST, LAST, PREVIOUS = "best.ckpt", "last.ckpt", "previous.ckpt"


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
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    warmup_steps: NonNegativeInt = 200
    plateau_factor: OpenUnitInterval = 0.5
    plateau_patience: NonNegativeInt = 1
    loss_weights: tuple[float, float, float, float, float] = (1.0, 1.0, 1.0, 1.0, 0.3)
    average_decay: float = 0.999


@dataclass(frozen=True)
class TrainerConfig:
    """How long, on what, and how often things are looked at.

    Args:
        max_steps: optimiser steps.
        val_every_n_steps: steps from one validation to the next.
        checkpoint_every_n_steps: steps from one periodic checkpoint to the next.
        log_every_n_steps: steps from one TensorBoard point to the next.
        early_stopping_patience: validations without a better loss after which training ends.
        gradient_clip_val: largest norm of the gradient.
        accelerator: cpu, gpu (an error if there is none), or auto.
        devices: how many GPUs, or processes on the CPU.
        num_nodes: how many machines.
        precision: of Lightning; auto is bf16-mixed on a GPU and 32-true on a CPU.
    """

    max_steps: PositiveInt = 3000
    val_every_n_steps: PositiveInt = 250
    checkpoint_every_n_steps: PositiveInt = 100
    log_every_n_steps: PositiveInt = 10
    early_stopping_patience: PositiveInt = 6
    gradient_clip_val: PositiveFloat = 0.5
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    devices: PositiveInt = 1
    num_nodes: PositiveInt = 1
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed"] = "auto"


class ForecasterModule(LightningModule):
    """The forecaster with its optimiser, as Lightning trains it. All arguments are plain values, kept in checkpoints."""

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
        self.prepared, self.config, self.max_steps, self.seed = prepared, config, max_steps, seed

    def _windows(self, part: str, stride: int | None, mirror: bool = False) -> Windows:
        starts = part_windows(self.prepared.manifest, part, self.config.context_length, stride)
        return Windows(self.prepared, starts, self.config.context_length, mirror=mirror, stream=self.config.stream)

    def train_dataloader(self) -> DataLoader[Tensor]:
        assert self.trainer is not None
        windows = self._windows("train", self.config.stride, self.config.mirror)
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
        return loader(self._windows("validation", None), batch_size=self.config.batch_size)


class AverageWeights(WeightAveraging):
    """Keep an exponential moving average of the weights, which is validated, checkpointed and evaluated."""

    def __init__(self, decay: float) -> None:
        def average(averaged: list[Tensor], current: list[Tensor], num_averaged: Tensor | int) -> None:
            n = int(num_averaged)  # early on the average is over fewer steps: the first weights are soon forgotten
            torch._foreach_lerp_(averaged, current, 1 - min(decay, (1 + n) / (10 + n)))

        super().__init__(use_buffers=False, multi_avg_fn=average)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the model as it is: checkpoints hold the average."""


class Progress(TQDMProgressBar):
    """One bar for the whole run."""

    def on_train_epoch_start(self, trainer: Trainer, *args: Any) -> None:
        super().on_train_epoch_start(trainer, *args)
        self.train_progress_bar.set_description("train")


class Stopped(Exception):  # noqa: N818 - not an error
    """A signal asked training to stop, and the checkpoint is written."""


class Checkpoints(Callback):
    """Write last.ckpt every N steps, at the end, and when SIGTERM or SIGINT asks to stop.

    Never at a step that is followed by a validation: a run resumed there would leave the validation out, and with it
    what depends on its loss.
    """

    def __init__(self, folder: Path, every_n_steps: int) -> None:
        self.folder, self.every_n_steps = folder, every_n_steps
        self.signal: int | None = None
        self._saved_at = 0

    def request_stop(self, signum: int, frame: FrameType | None) -> None:
        if self.signal is not None:  # asked twice: do not wait for the step to end
            raise KeyboardInterrupt
        self.signal = signum

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._saved_at = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        step = trainer.global_step
        due = self.signal is not None or step - self._saved_at >= self.every_n_steps
        if due and step % trainer.val_check_interval and step < trainer.max_steps:
            self.save(trainer)
            if self.signal is not None:
                raise Stopped

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        if (self.folder / LAST).exists() and trainer.is_global_zero:
            os.replace(self.folder / LAST, self.folder / PREVIOUS)  # should the disk lose the new one
        trainer.save_checkpoint(self.folder / LAST)
        self._saved_at = trainer.global_step


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write a checkpoint beside its place and move it there, so that a kill or a full disk leaves the previous one."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        path = Path(path)
        partial = path.with_name(f".{path.name}.partial")
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            serialised = io.BytesIO()  # torch.save on a full disk does not say that the disk is full
            torch.save(checkpoint, serialised)
            try:
                with partial.open("wb") as file:
                    file.write(serialised.getbuffer())
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(partial, path)
            finally:
                partial.unlink(missing_ok=True)


def train(
    *,
    data: DataConfig = DataConfig(),  # noqa: B008 - frozen
    model: ModelConfig = ModelConfig(),  # noqa: B008
    optimizer: OptimizerConfig = OptimizerConfig(),
    trainer: TrainerConfig = TrainerConfig(),
    run: Path = Path("runs/btc"),
    resume: bool = False,
    seed: int = 0,
) -> int:
    """Train the minute-bar forecaster on a prepared set.

    The run folder gets config.yaml, run.json, TensorBoard logs and checkpoints: best.ckpt (lowest validation loss) and
    last.ckpt. SIGTERM and Ctrl-C write last.ckpt and end the run; --resume goes on from there, batch for batch.

    Args:
        data: what is read.
        model: the forecaster's shape.
        optimizer: how it learns.
        trainer: how long, and on what.
        run: folder of the run.
        resume: continue the run in the folder from its last good checkpoint; start it if there is none.
        seed: of initial weights and order of windows.

    Raises:
        UserError: the prepared set or the run folder cannot be used, a value is impossible, or the GPU is not there.
    """
    sections = {"data": data, "model": model, "optimizer": optimizer, "trainer": trainer}
    config = _plain({name: asdict(section) for name, section in sections.items()})
    record_path = run / "run.json"
    if record_path.exists() or (run / "checkpoints").exists():
        if not resume:
            raise UserError(f"{run} holds a run already; add --resume to continue it, or choose another --run")
        if (finished := _read_record(record_path).get("finished")) is not None:
            print(f"{run} is trained already ({finished['steps']:,} steps); choose another --run to train anew")
            return 0
    accelerator = _choose_accelerator(trainer)
    prepared = open_set(data.path)
    datamodule = BarsDataModule(prepared, data, trainer.max_steps, seed)
    _check(prepared, data, model)

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*isinstance.treespec, LeafSpec.*")  # between Lightning and torch
    torch.set_float32_matmul_precision("high")
    seed_everything(seed, workers=True, verbose=False)
    module = ForecasterModule(
        config["model"],
        config["optimizer"],
        prepared.scaler.mean,
        prepared.scaler.std,
        prepared.manifest["missing"]["mask_filled"],
    )
    checkpoint = _last_good_checkpoint(run, module) if resume else None
    record = {
        "schema_version": 1,
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "git_commit": _git_commit(),
        "machine": examine(run.parent),
        "parameters": sum(parameter.numel() for parameter in module.parameters()),
    }
    with writing(run):
        run.mkdir(parents=True, exist_ok=True)
        (run / "config.yaml").write_text(yaml.safe_dump(config | {"seed": seed}, sort_keys=False))
        record_path.write_text(json.dumps(record, indent=1))

    checkpoints = Checkpoints(run / "checkpoints", trainer.checkpoint_every_n_steps)
    best = ModelCheckpoint(run / "checkpoints", "best", monitor="val/loss", enable_version_counter=False)
    callbacks: list[Callback] = [best, Progress(refresh_rate=trainer.log_every_n_steps)]
    if optimizer.average_decay:
        callbacks.append(AverageWeights(optimizer.average_decay))
    callbacks += [EarlyStopping("val/loss", patience=trainer.early_stopping_patience), checkpoints]
    lightning = Trainer(
        accelerator=accelerator,
        devices=trainer.devices,
        num_nodes=trainer.num_nodes,
        precision=_choose_precision(trainer, accelerator),
        max_epochs=1,  # of EndlessBatches, whose one pass is the whole run: steps count, not epochs
        max_steps=trainer.max_steps,
        val_check_interval=trainer.val_every_n_steps,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=trainer.log_every_n_steps,
        gradient_clip_val=trainer.gradient_clip_val,
        use_distributed_sampler=False,
        logger=TensorBoardLogger(run, name=None, version="", default_hp_metric=False),
        callbacks=callbacks,
        plugins=[AtomicCheckpointIO()],
        enable_model_summary=False,
    )
    print(
        f"{run}: {record['parameters']:,} parameters, {lightning.max_steps:,} steps on {accelerator}"
        + (f", resumed from {checkpoint}" if checkpoint else "")
    )
    started = time.perf_counter()
    handlers = {number: signal.signal(number, checkpoints.request_stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with warnings.catch_warnings(), writing(run):
            warnings.filterwarnings(
                "ignore", ".*dataloader.*(num_workers|workers|resumable).*"
            )  # memory is fast; ours resumes
            lightning.fit(module, datamodule=datamodule, ckpt_path=checkpoint, weights_only=True)
    except Stopped:
        name = signal.Signals(checkpoints.signal or signal.SIGTERM).name
        print(f"{run}: stopped by {name} at step {lightning.global_step:,}; continue with --resume", file=sys.stderr)
        return 128 + (checkpoints.signal or signal.SIGTERM)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if best.best_model_score is not None and not torch.isfinite(best.best_model_score):
        raise UserError(
            f"{run}: the loss is not finite at step {lightning.global_step:,}; lower --optimizer.lr, new --run"
        )
    record["finished"] = {
        "steps": lightning.global_step,
        "seconds": round(time.perf_counter() - started, 1),
        "best_val_loss": float(best.best_model_score) if best.best_model_score is not None else None,
        "precision": lightning.precision,
    }
    with writing(record_path):
        record_path.write_text(json.dumps(record, indent=1))
    print(
        f"{run}: trained {lightning.global_step:,} steps in {record['finished']['seconds']} s; "
        f"score it with `flashlab evaluate {run}`"
    )
    return 0


def load_forecaster(path: Path) -> ForecasterModule:
    """Load a checkpoint without executing what it may hold.

    Raises:
        UserError: there is no checkpoint, or it is damaged or of another shape.
    """
    try:
        return ForecasterModule.load_from_checkpoint(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; train first, with `flashlab train`") from None
    except Exception as error:  # a damaged file fails in as many ways as there are bytes
        raise UserError(
            f"{path} cannot be loaded ({_one_line(error)}); take another checkpoint or train again"
        ) from error


def _last_good_checkpoint(run: Path, module: ForecasterModule) -> Path | None:
    """Find the newest checkpoint that loads, and make sure that it is of this module."""
    for path in (run / "checkpoints" / LAST, run / "checkpoints" / PREVIOUS):
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
            trained_with = checkpoint["hyper_parameters"]
            checkpoint["state_dict"], checkpoint["loops"]
        except FileNotFoundError:
            continue
        except Exception as error:  # as above
            print(f"{path} is damaged ({_one_line(error)}); trying an earlier one", file=sys.stderr)
            continue
        for section in ("model", "optimizer", "mean", "std", "mask_filled"):
            before, now = trained_with[section], module.hparams[section]
            if before != now:
                keys = [key for key in now if before.get(key) != now[key]] if isinstance(now, dict) else []
                what = (
                    f"{section}.{keys[0]} {before.get(keys[0])}, this asks for {now[keys[0]]}"
                    if keys
                    else f"other {section}"
                )
                raise UserError(
                    f"{path} was trained with {what}; resume with {run / 'config.yaml'}, or choose another --run"
                )
        return path
    return None


def _check(prepared: PreparedSet, data: DataConfig, model: ModelConfig) -> None:
    """Refuse what cannot work before anything is written."""
    split = prepared.manifest["split"]
    if model.width % model.num_heads or (model.width // model.num_heads) % 2:
        raise UserError(f"--model.num_heads {model.num_heads} must divide --model.width {model.width} into even parts")
    if data.mirror and model.frame == "level":
        raise UserError("--data.mirror true needs --model.frame relative: a mirrored price has another level")
    if data.context_length > split["context_length"] or (
        split["kind"] == "seed" and data.context_length != split["context_length"]
    ):
        raise UserError(
            f"--data.context_length {data.context_length} does not fit {prepared.path}, which was split for windows of "
            f"{split['context_length']}; prepare it with --context_length {data.context_length}"
        )
    for part in ("train", "validation"):
        if not len(part_windows(prepared.manifest, part, data.context_length, data.stride)):
            raise UserError(
                f"{prepared.path}: the {part} part has no window of {data.context_length} bars; prepare more bars"
            )


def _choose_accelerator(config: TrainerConfig) -> str:
    if config.accelerator == "gpu" and not torch.cuda.is_available():
        raise UserError("--trainer.accelerator gpu: torch sees no GPU here; `flashlab doctor` says why")
    if config.accelerator != "cpu" and torch.cuda.is_available():
        if config.devices > torch.cuda.device_count():
            raise UserError(f"--trainer.devices {config.devices}: this machine has {torch.cuda.device_count()} GPU(s)")
        return "gpu"
    return "cpu"


def _choose_precision(config: TrainerConfig, accelerator: str) -> Any:
    if config.precision != "auto":
        return config.precision
    return "bf16-mixed" if accelerator == "gpu" and torch.cuda.is_bf16_supported() else "32-true"


def _read_record(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):  # killed before or while it was written
        return {}


def _git_commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _plain(value: Any) -> Any:
    """Turn jsonargparse's numbers and tuples into what YAML and a checkpoint without pickled code can hold."""
    return json.loads(json.dumps(value))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:150] or type(error).__name__
