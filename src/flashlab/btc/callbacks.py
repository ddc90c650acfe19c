"""What happens beside the training steps: checkpoints, signals to stop, averaged weights, the progress bar."""

import io
import os
import signal
from datetime import timedelta
from pathlib import Path
from statistics import fmean
from time import monotonic, perf_counter
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, TQDMProgressBar, WeightAveraging
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

from flashlab.errors import UserError, writing

BEST, LAST, PREVIOUS = "best.ckpt", "last.ckpt", "previous.ckpt"
LINE_EVERY_S = 10.0


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


class Progress(TQDMProgressBar):
    """One bar for the whole run, over all the times that it is resumed."""

    def on_train_start(self, trainer: Trainer, *args: Any) -> None:
        super().on_train_start(trainer, *args)
        self.train_progress_bar.total = trainer.max_steps
        self.train_progress_bar.initial = trainer.global_step
        self.train_progress_bar.set_description("train")

    def on_train_epoch_start(self, *args: Any) -> None:
        """Leave the bar as it is: the one epoch is the run."""

    def get_metrics(self, trainer: Trainer, *args: Any) -> dict[str, Any]:
        """Show the losses that were logged last: they are on the host already."""
        logged = trainer.logged_metrics
        return {name: float(logged[name]) for name in ("train/loss", "val/loss") if name in logged}

    def on_exception(self, *args: Any) -> None:
        """Give what is printed next a line of its own."""
        if self._train_progress_bar is not None:
            self._train_progress_bar.close()


class ProgressLines(Callback):
    """The first step and then a line every ten seconds, where no bar can move: in a log, or what Compose shows."""

    def on_train_start(self, trainer: Trainer, *args: Any) -> None:
        self._started = self._said = monotonic()
        self._first_step = trainer.global_step
        self._validated = ""

    def on_validation_end(self, trainer: Trainer, *args: Any) -> None:
        """Read the loss in all processes at once: they may have to exchange it."""
        self._validated = f", validation loss {float(trainer.callback_metrics['val/loss']):.4f}"

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        now, step = monotonic(), trainer.global_step
        done = step - self._first_step
        if (done == 1 or now - self._said >= LINE_EVERY_S) and trainer.is_global_zero:
            self._said = now
            left = timedelta(seconds=round((trainer.max_steps - step) / done * (now - self._started)))
            print(f"step {step:,} of {trainer.max_steps:,}{self._validated}, {left} left", flush=True)


class Speed(Callback):
    """Log how many bars a second are trained on.

    Measured from one logged step to the next, at which values are read and the GPU has caught up. Writing checkpoints
    and logs counts; validating does not, nor what comes before the second logged step, such as compiling.

    Args:
        bars_per_step: of all processes.
        skip: steps that are not measured, beside these.
    """

    def __init__(self, bars_per_step: int, skip: int = 0) -> None:
        self.bars_per_step, self.skip = bars_per_step, skip
        self.ms_per_step: list[float] = []
        self._since: tuple[int, float] | None = None

    def on_train_start(self, trainer: Trainer, *args: Any) -> None:
        self._first = trainer.global_step + self.skip

    def on_validation_start(self, *args: Any) -> None:
        self._since = None

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        step = trainer.global_step
        if step < self._first or step % trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = perf_counter()
        if self._since is not None:
            since, then = self._since
            ms = 1e3 * (now - then) / (step - since)
            self.ms_per_step.append(ms)
            pl_module.log("train/bars_per_s", 1e3 * self.bars_per_step / ms)
        self._since = step, now

    def summary(self) -> dict[str, float]:
        """Return milliseconds a step and bars a second, or nothing where too few steps were logged."""
        if len(self.ms_per_step) < 2:
            return {}
        ms = fmean(self.ms_per_step[1:])
        return {"ms_per_step": round(ms, 4), "bars_per_s": round(1e3 * self.bars_per_step / ms)}


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
        logs = step % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]
        stop = self.signal is not None
        if trainer.world_size > 1:  # they stop together; asking each other at every step would hold the GPUs up
            stop = (logs or validates) and trainer.strategy.reduce_boolean_decision(stop, all=False)
        save = (stop or step - self._saved_at >= self.every_n_steps) and not validates and step < trainer.max_steps
        if save or validates or logs:
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
