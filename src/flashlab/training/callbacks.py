"""What happens beside the training steps: checkpoints, signals to stop, speed, the progress bar."""

import os
import signal
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from statistics import fmean
from time import monotonic, perf_counter
from types import FrameType
from typing import Any, BinaryIO

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.plugins.io import TorchCheckpointIO

from flashlab.errors import UserError, print_now, writing

BEST, LAST, PREVIOUS = "best.ckpt", "last.ckpt", "previous.ckpt"
LINE_EVERY_S = 10.0


class Progress(TQDMProgressBar):
    """One bar for the whole run, over all the times that it is resumed.

    Args:
        refresh_rate: steps from one look at the bar to the next.
        speed: shown too.
    """

    def __init__(self, refresh_rate: int, speed: "Speed | None" = None) -> None:
        super().__init__(refresh_rate=refresh_rate)
        self.speed = speed

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
        losses = {name: float(logged[name]) for name in ("train/loss", "val/loss") if name in logged}
        rates = self.speed.latest() if self.speed else {}
        return losses | {name: rate.rjust(5) for name, rate in rates.items()}  # what is shorter gets zeros behind it

    def on_exception(self, *args: Any) -> None:
        """Give what is printed next a line of its own."""
        if self._train_progress_bar is not None:
            self._train_progress_bar.close()


class ProgressLines(Callback):
    """The first step and then a line every ten seconds, where no bar can move: in a log, or what Compose shows.

    How long it takes is told from the second step on: the first may compile.

    Args:
        speed: told too.
    """

    def __init__(self, speed: "Speed | None" = None) -> None:
        self.speed = speed

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
        if done == 1:
            self._started = now
        if (done == 1 or now - self._said >= LINE_EVERY_S) and trainer.is_global_zero:
            self._said = now
            latest = self.speed.latest() if self.speed else {}
            told = [self._validated, *(f", {value} {name}" for name, value in latest.items())]
            if done > 1:
                seconds = (trainer.max_steps - step) / (done - 1) * (now - self._started)
                told.append(f", {timedelta(seconds=round(seconds))} left")
            with suppress(UserError):  # training does not end because nobody can be told
                print_now(f"step {step:,} of {trainer.max_steps:,}{''.join(told)}")


class Speed(Callback):
    """Log how much is trained on in a second, and what share of the hardware's peak that is.

    Measured from one logged step to the next, at which values are read and the GPU has caught up. Writing checkpoints
    and logs counts; validating does not, nor what comes before the second logged step, such as compiling.

    Args:
        name: of what is counted, as bars.
        per_step: how many of them all processes take together.
        skip: steps that are not measured, beside these.
        peak_per_s: how many of them the hardware could take at most, if that is known.
    """

    def __init__(self, name: str, per_step: int, *, skip: int = 0, peak_per_s: float | None = None) -> None:
        self.name, self.per_step, self.skip, self.peak_per_s = name, per_step, skip, peak_per_s
        self.ms_per_step: list[float] = []
        self._since: tuple[int, float] | None = None

    def on_train_start(self, trainer: Trainer, *args: Any) -> None:
        self._first = trainer.global_step + self.skip

    def on_validation_start(self, *args: Any) -> None:
        self._since = None

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        step = trainer.global_step
        if step < self._first or step % trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize()
        now = perf_counter()
        if self._since is not None:
            since, then = self._since
            ms = 1e3 * (now - then) / (step - since)
            self.ms_per_step.append(ms)
            rates = {f"train/{name}": value for name, value in self._rates(ms).items()}
            for logger in trainer.loggers:  # `log_dict` would repeat them where nothing was measured
                logger.log_metrics(rates, step - 1)  # as Lightning counts
        self._since = step, now

    def summary(self) -> dict[str, float]:
        """Return milliseconds a step and the rates, or nothing where too few steps were logged."""
        if len(self.ms_per_step) < 2:
            return {}
        ms = fmean(self.ms_per_step[1:])
        rates = self._rates(ms)
        rates[f"{self.name}_per_s"] = round(rates[f"{self.name}_per_s"])
        return {"ms_per_step": round(ms, 4)} | rates

    def latest(self) -> dict[str, str]:
        """Return the rates that were measured last, in words."""
        if not self.ms_per_step:
            return {}
        rates = self._rates(self.ms_per_step[-1])
        words = {f"{self.name}/s": f"{rates[f'{self.name}_per_s']:,.0f}"}
        return words | ({"MFU": f"{rates['mfu']:.1%}"} if "mfu" in rates else {})

    def _rates(self, ms: float) -> dict[str, float]:
        per_s = 1e3 * self.per_step / ms
        return {f"{self.name}_per_s": per_s} | ({"mfu": round(per_s / self.peak_per_s, 6)} if self.peak_per_s else {})


class Stopped(Exception):  # noqa: N818 - not an error
    """A signal asked training to stop, and the checkpoint is written."""


class Checkpoints(Callback):
    """Write last.ckpt every N steps, at the end, and when SIGTERM or SIGINT asks to stop; validate after the last step.

    Never at a step that is followed by a validation: a run resumed there would leave the validation out, and with it
    what depends on its loss. Never with weights that are not finite.
    """

    def __init__(self, run: Path, every_n_steps: int, resumed_from: Path | None) -> None:
        self.run, self.every_n_steps = run, every_n_steps
        self.signal: int | None = None
        self._stops = False  # which all processes know
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
        ends = step == trainer.max_steps
        validates = ends or step % trainer.val_check_interval == 0
        logs = step % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]
        if trainer.world_size == 1:
            self._stops = self.signal is not None
        elif logs or validates:  # they stop together; asking each other at every step would hold the GPUs up
            self._stops |= trainer.strategy.reduce_boolean_decision(self.signal is not None, all=False)
        trainer.should_stop |= ends  # Lightning validates before it stops
        save = (self._stops or step - self._saved_at >= self.every_n_steps) and not validates
        if save or validates or logs:
            self._require_finite(trainer, pl_module)
        if save:
            self._save(trainer)
            if self._stops:
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
            try:
                with partial.open("wb") as file:
                    reported = _Reported(file)
                    try:
                        torch.save(checkpoint, reported)  # type: ignore[arg-type]
                    except RuntimeError as error:
                        raise reported.error or error from None
                    file.flush()
                    os.fsync(file.fileno())
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)


class _Reported:
    """A file that keeps why it could not be written to: torch.save, asked on a full disk, tells of positions."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()
