"""Train the forecaster with Lightning."""

import io
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
import yaml
from jsonargparse.typing import (
    NonNegativeFloat,
    NonNegativeInt,
    OpenUnitInterval,
    PositiveFloat,
    PositiveInt,
    restricted_number_type,
)
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint, TQDMProgressBar, WeightAveraging
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor
from torch.utils.data import DataLoader

from flashlab.attention import AttentionSpec, resolve
from flashlab.btc.dataset import DataConfig, EndlessBatches, Windows, loader
from flashlab.btc.model import WARM_UP, Forecaster, ModelConfig
from flashlab.btc.prepare import PreparedSet, open_set
from flashlab.btc.windows import part_windows
from flashlab.errors import UserError, writing
from flashlab.machine import identify

BEST, LAST, PREVIOUS = "best.ckpt", "last.ckpt", "previous.ckpt"

Section = TypeVar("Section", DataConfig, ModelConfig, "OptimizerConfig", "TrainerConfig")
if TYPE_CHECKING:
    Decay = float
    TwoOrMore = int
    Seed = int
else:
    Decay = restricted_number_type("Decay", float, [(">=", 0), ("<", 1)])
    TwoOrMore = restricted_number_type("TwoOrMore", int, (">=", 2))
    Seed = restricted_number_type("Seed", int, [(">=", 0), ("<", 2**32)])


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


@dataclass(frozen=True)
class TrainerConfig:
    """How long, on what, and how often things are looked at.

    Args:
        max_steps: optimiser steps.
        val_every_n_steps: steps from one validation to the next, two or more: checkpoints are written between them.
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
    val_every_n_steps: TwoOrMore = 250
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
    """One bar for the whole run, over all the times that it is resumed."""

    def on_train_start(self, trainer: Trainer, *args: Any) -> None:
        super().on_train_start(trainer, *args)
        self.train_progress_bar.total = trainer.max_steps
        self.train_progress_bar.initial = trainer.global_step
        self.train_progress_bar.set_description("train")

    def on_train_epoch_start(self, *args: Any) -> None:
        """Leave the bar as it is: the one epoch is the run."""

    def on_exception(self, *args: Any) -> None:
        """Give what is printed next a line of its own."""
        if self._train_progress_bar is not None:
            self._train_progress_bar.close()


class Stopped(Exception):  # noqa: N818 - not an error
    """A signal asked training to stop, and the checkpoint is written."""


class Checkpoints(Callback):
    """Write last.ckpt every N steps, at the end, and when SIGTERM or SIGINT asks to stop.

    Never at a step that is followed by a validation: a run resumed there would leave the validation out, and with it
    what depends on its loss. Never with weights that are not finite.
    """

    def __init__(self, run: Path, every_n_steps: int, resumed_from: Path | None) -> None:
        self.run, self.every_n_steps = run, every_n_steps
        self.signal: int | None = None
        self._saved_at = 0
        self._last_is_good = resumed_from is None or resumed_from.name == LAST

    def listen(self) -> dict[int, Any]:
        """Wait for a signal to stop; returns the handlers so far."""
        return {number: signal.signal(number, self._request_stop) for number in (signal.SIGTERM, signal.SIGINT)}

    def _request_stop(self, signum: int, frame: FrameType | None) -> None:
        self.signal = signum
        signal.signal(signum, signal.SIG_DFL)  # asked twice: do not wait for the step to end

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._saved_at = trainer.global_step
        self.listen()  # once more: Lightning's own handler would end the run without a checkpoint

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        step = trainer.global_step
        validates = step % trainer.val_check_interval == 0
        stop = trainer.strategy.reduce_boolean_decision(self.signal is not None, all=False)  # the ranks stop together
        save = (stop or step - self._saved_at >= self.every_n_steps) and not validates and step < trainer.max_steps
        if save or validates or step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self._require_finite(trainer, pl_module)
        if save:
            self._save(trainer)
            if stop:
                raise Stopped

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._require_finite(trainer, pl_module)
        self._save(trainer)

    def _require_finite(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not torch.nn.utils.get_total_norm([parameter.detach() for parameter in pl_module.parameters()]).isfinite():
            raise UserError(
                f"{self.run}: the weights are not finite at step {trainer.global_step:,}; start another --run with a "
                "lower --optimizer.lr"
            )

    def _save(self, trainer: Trainer) -> None:
        last = self.run / "checkpoints" / LAST
        if last.exists() and self._last_is_good and trainer.is_global_zero:
            last.replace(last.with_name(PREVIOUS))  # should the disk lose the new one
        trainer.save_checkpoint(last)
        self._last_is_good = True
        self._saved_at = trainer.global_step


class BestCheckpoint(ModelCheckpoint):
    """Write best.ckpt whenever the validation loss is the lowest so far, wherever the run's folder is by now."""

    def __init__(self, run: Path) -> None:
        super().__init__(run / "checkpoints", Path(BEST).stem, monitor="val/loss", enable_version_counter=False)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the best loss over; Lightning forgets it when the folder has another path than it had."""
        if state_dict["best_model_path"]:
            here = self.format_checkpoint_name({})
            state_dict = state_dict | {
                "best_model_path": here,
                "kth_best_model_path": here,
                "best_k_models": {here: state_dict["best_model_score"]},
            }
        super().load_state_dict(state_dict | {"dirpath": self.dirpath})


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
                partial.replace(path)
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
    seed: Seed = 0,
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
    data, model, optimizer, trainer, seed = _plain(data), _plain(model), _plain(optimizer), _plain(trainer), int(seed)
    config: dict[str, Any] = {
        "data": asdict(data),
        "model": asdict(model),
        "optimizer": asdict(optimizer),
        "trainer": asdict(trainer),
        "seed": seed,
    }
    record_path = run / "run.json"
    # Of the processes that train together, each of which runs this function, one writes and speaks.
    is_first = rank_zero_only.rank == 0  # type: ignore[attr-defined]
    with writing(run):
        exists = record_path.exists() or (run / "checkpoints").exists()
    if is_first and exists:
        if not resume:
            raise UserError(f"{run} holds a run already; add --resume to continue it, or choose another --run")
        if (finished := read_record(run).get("finished")) is not None:
            print(f"{run} is trained already ({finished['steps']:,} steps); choose another --run to train anew")
            return 0
    accelerator = _choose_accelerator(trainer)
    precision = _choose_precision(trainer, accelerator)
    prepared = open_set(data.path)
    check_context(prepared, data.context_length)
    _check(prepared, data, model)
    backend = _resolve_backend(model, data, accelerator, precision)
    datamodule = BarsDataModule(prepared, data, trainer.max_steps, seed)

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
    for block in module.forecaster.blocks:
        block.backend = backend  # type: ignore[assignment]
    checkpoint = _last_good_checkpoint(run, module) if resume else None
    record: dict[str, Any] = {
        "schema_version": 1,
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "git_commit": _git_commit(),
        "machine": identify(),
        "parameters": sum(parameter.numel() for parameter in module.parameters()),
        "attention_backend": backend,
    }
    if is_first:
        with writing(run):
            run.mkdir(parents=True, exist_ok=True)
        _write(run / "config.yaml", yaml.safe_dump(config, sort_keys=False))
        _write(record_path, json.dumps(record, indent=1))

    checkpoints = Checkpoints(run, trainer.checkpoint_every_n_steps, checkpoint)
    best, early_stopping = BestCheckpoint(run), EarlyStopping("val/loss", patience=trainer.early_stopping_patience)
    callbacks: list[Callback] = [best, Progress(refresh_rate=trainer.log_every_n_steps)]
    if optimizer.average_decay:
        callbacks.append(AverageWeights(optimizer.average_decay))
    callbacks += [early_stopping, checkpoints]
    lightning = Trainer(
        accelerator=accelerator,
        devices=trainer.devices,
        num_nodes=trainer.num_nodes,
        precision=precision,
        max_epochs=1,  # of EndlessBatches, whose one pass is the whole run: steps count, not epochs
        max_steps=trainer.max_steps,
        val_check_interval=min(trainer.val_every_n_steps, trainer.max_steps),
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
    say = print if is_first else lambda *args, **kwargs: None
    say(
        f"{run}: {record['parameters']:,} parameters, {lightning.max_steps:,} steps on {accelerator}"
        + (f", resumed from {checkpoint}" if checkpoint else "")
    )
    started = time.perf_counter()
    handlers, hook = checkpoints.listen(), threading.excepthook
    threading.excepthook = _hide_os_errors
    try:
        with warnings.catch_warnings(), writing(run):
            for idle in (
                "dataloader .*(workers|resumable)",
                "Checkpoint directory .* not empty",
                "number of training batches",
            ):
                warnings.filterwarnings("ignore", f".*{idle}")
            lightning.fit(module, datamodule=datamodule, ckpt_path=checkpoint, weights_only=True)
    except Stopped:
        asked = signal.Signals(checkpoints.signal or signal.SIGTERM)
        say(
            f"{run}: stopped by {asked.name} at step {lightning.global_step:,}; continue with --resume",
            file=sys.stderr,
        )
        return 128 + asked if is_first else 0  # Lightning kills the first of several when another ends with a code
    finally:
        threading.excepthook = hook
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if early_stopping.stopping_reason is EarlyStoppingReason.NON_FINITE_METRIC:
        raise UserError(
            f"{run}: the validation loss is not finite at step {lightning.global_step:,}; start another --run with a "
            "lower --optimizer.lr"
        )
    record["finished"] = {
        "steps": lightning.global_step,
        "seconds": round(time.perf_counter() - started, 1),
        "best_val_loss": float(best.best_model_score) if best.best_model_score is not None else None,
        "precision": lightning.precision,
    }
    if is_first:
        _write(record_path, json.dumps(record, indent=1))
    say(
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
    damaged = []
    for path in (run / "checkpoints" / LAST, run / "checkpoints" / PREVIOUS):
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
            trained_with = {name: checkpoint["hyper_parameters"][name] for name in module.hparams}
            checkpoint["state_dict"], checkpoint["loops"], checkpoint["optimizer_states"]
        except FileNotFoundError:
            continue
        except Exception as error:  # as above
            damaged.append(f"{path} is damaged ({_one_line(error)})")
            continue
        for section, before in trained_with.items():
            now = module.hparams[section]
            if before != now:
                what = "other bars"
                if isinstance(now, dict):
                    key = next(key for key in now if before.get(key) != now[key])
                    what = f"{section}.{key} {before.get(key)}, this asks for {now[key]}"
                raise UserError(
                    f"{path} was trained with {what}; resume with {run / 'config.yaml'}, or choose another --run"
                )
        for line in damaged:
            print(f"{line}; going on from {path.name}", file=sys.stderr)
        return path
    if damaged:
        raise UserError(f"{damaged[0]}, and there is no good one before it; choose another --run to start anew")
    return None


def check_context(prepared: PreparedSet, context_length: int) -> None:
    """Refuse a context length that the set was not split for.

    Raises:
        UserError: it is longer than the gap between the parts, or not that of the windows dealt out at random.
    """
    split = prepared.manifest["split"]
    longest = split["context_length"]
    if context_length > longest or (split["kind"] == "seed" and context_length != longest):
        raise UserError(
            f"--data.context_length {context_length} does not fit {prepared.path}, which was split for windows of "
            f"{longest}; prepare it with --context_length {context_length}"
        )


def _check(prepared: PreparedSet, data: DataConfig, model: ModelConfig) -> None:
    """Refuse what cannot work before anything is written."""
    if model.width % model.num_heads or (model.width // model.num_heads) % 2:
        raise UserError(f"--model.num_heads {model.num_heads} must divide --model.width {model.width} into even parts")
    if data.context_length <= WARM_UP:
        raise UserError(
            f"--data.context_length {data.context_length} is too short: the first {WARM_UP} bars only warm up"
        )
    if data.mirror and model.frame == "level":
        raise UserError("--data.mirror true needs --model.frame relative: a mirrored price has another level")
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


def _resolve_backend(model: ModelConfig, data: DataConfig, accelerator: str, precision: str) -> str:
    """Choose the attention backend once for the whole run."""
    device = torch.device("cuda" if accelerator == "gpu" else "cpu")
    dtype = {"32-true": torch.float32, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}[precision]
    length, heads = data.context_length, model.num_heads
    shape = (data.batch_size, length, length, heads, heads, model.width // heads)
    return resolve(model.backend, AttentionSpec(*shape, dtype, device, causal=True, needs_grad=True))


def _choose_precision(config: TrainerConfig, accelerator: str) -> Any:
    if config.precision != "auto":
        return config.precision
    return "bf16-mixed" if accelerator == "gpu" and torch.cuda.is_bf16_supported() else "32-true"


def _hide_os_errors(args: threading.ExceptHookArgs) -> None:
    """Let TensorBoard's writing thread fail in silence: what it met is raised again where the next value is logged."""
    if not isinstance(args.exc_value, OSError):
        threading.__excepthook__(args)


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}")
    with writing(path):
        try:
            partial.write_text(text)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def read_record(run: Path) -> dict[str, Any]:
    """Read a run's run.json."""
    try:
        return json.loads((run / "run.json").read_text())
    except (FileNotFoundError, ValueError):  # killed before or while it was written
        return {}


def _git_commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _plain(section: Section) -> Section:
    """Turn jsonargparse's numbers and tuples into what YAML and a checkpoint without pickled code can hold."""
    return type(section)(**json.loads(json.dumps(asdict(section))))


def _one_line(error: Exception) -> str:
    reason = " ".join(str(error).split()).rpartition("WeightsUnpickler error: ")[2]  # what torch says last, at length
    return reason.split(". ")[0][:200] or type(error).__name__
