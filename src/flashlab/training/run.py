"""A run: its folder, signals that end it, and checkpoints it goes on from."""

import json
import signal
import sys
import threading
import time
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO, TypeVar
from zipfile import is_zipfile

import torch
import yaml
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch.distributed import is_torchelastic_launched

from flashlab.errors import UserError, alone_in, enough_memory, print_now, write_text, writing
from flashlab.machine import git_commit, identify
from flashlab.training.batches import ResumedData
from flashlab.training.callbacks import BEST, LAST, PREVIOUS, Checkpoints, Speed, Stopped
from flashlab.training.world import lost_peers

Section = TypeVar("Section")


@dataclass(frozen=True)
class Run:
    """A run's folder, as one of the processes sees it that train together.

    Attributes:
        folder: where all that the run writes goes.
        exists: whether one was begun there.
        is_first: whether this is the process that writes and speaks.
    """

    folder: Path
    exists: bool
    is_first: bool

    @classmethod
    def open(cls, folder: Path, *, resume: bool) -> "Run":
        """Look into a folder, and write nothing.

        Raises:
            UserError: it holds a run that is not to be resumed, or cannot be read.
        """
        with writing(folder):
            exists = (folder / "run.json").exists() or (folder / "checkpoints").exists()
        is_first = rank_zero_only.rank == 0  # type: ignore[attr-defined]
        if is_first and exists and not resume:
            raise UserError(f"{folder} holds a run already; add --resume to continue it, or choose another --run")
        return cls(folder, exists, is_first)

    def say(self, text: str, *, file: TextIO | None = None) -> None:
        """Print a line, in one of the processes."""
        if self.is_first:
            with suppress(UserError):  # training does not end because nobody can be told
                print_now(text, file=file)

    def is_trained(self, trained_on: Any, shape: Any, max_steps: int, mistaken: str) -> bool:
        """Say whether the run has ended by itself.

        Args:
            trained_on: a fingerprint of the data.
            shape: the options that must be those of the run.
            max_steps: of the run, likewise.
            mistaken: what to say where the data are others.

        Raises:
            UserError: it has, and was trained on other data or with other options.
        """
        before = read_record(self.folder) if self.exists else {}
        if (finished := before.get("finished")) is None:
            return False
        if before.get("trained_on") != trained_on:
            raise UserError(f"{self.folder} was trained on {mistaken}; choose another --run")
        if before.get("shape") != shape:
            raise UserError(f"{self.folder} was trained with other options; choose another --run")
        if (planned := finished.get("max_steps", max_steps)) != max_steps:
            raise UserError(
                f"{self.folder} has ended, planned for {planned:,} steps, not {max_steps:,}; choose another --run"
            )
        self.say(f"{self.folder} is trained already ({finished['steps']:,} steps); choose another --run to train anew")
        return True

    def last_good_checkpoint(
        self, module: LightningModule, data: ResumedData, read: str, ignored: Collection[str] = ()
    ) -> Path | None:
        """Find the newest checkpoint that loads, and make sure that it is of this module, data and seed.

        Args:
            module: its hyper-parameters must be those of the checkpoint: sections of options, or facts of the data.
            data: what it is to be trained on.
            read: what these are called.
            ignored: options that change nothing in a checkpoint.

        Raises:
            UserError: there is one, and it is of another module, or of a later step than the run would end at; or all
                that there are, are damaged.
        """
        damaged = []
        for path in (self.folder / "checkpoints" / LAST, self.folder / "checkpoints" / PREVIOUS):
            try:
                checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
                trained_with = {name: checkpoint["hyper_parameters"][name] for name in module.hparams}
                checkpoint["state_dict"], checkpoint["loops"], checkpoint["optimizer_states"]
                step, seed = checkpoint["global_step"], checkpoint[type(data).__name__]["seed"]
            except FileNotFoundError:
                continue
            except Exception as error:  # a damaged file fails in as many ways as there are bytes
                damaged.append(f"{path} is damaged ({_why_not_loaded(path, error)})")
                continue
            differences = [
                _difference(section, before, module.hparams[section], read, ignored)
                for section, before in trained_with.items()
            ]
            if seed != data.order.seed:
                differences.append(f"seed {seed}, this asks for {data.order.seed}")
            if what := next(filter(None, differences), None):
                config = self.folder / "config.yaml"
                remedy = "prepare the set as it was" if what == f"other {read}" else f"resume with {config}"
                raise UserError(f"{path} was trained with {what}; {remedy}, or choose another --run")
            if step > data.num_steps:
                raise UserError(
                    f"{path} is at step {step:,}, and the run is to end at step {data.num_steps:,}; ask for more "
                    "steps, or choose another --run"
                )
            for line in damaged:
                print(f"{line}; going on from {path.name}", file=sys.stderr)
            return path
        if damaged:
            raise UserError(f"{damaged[0]}, and there is no good one before it; choose another --run to start anew")
        return None

    @contextmanager
    def begun(self, config: dict[str, Any], facts: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Keep others out of the folder, and write config.yaml and run.json; gives what run.json holds.

        Args:
            config: every option.
            facts: what is known before training.

        Raises:
            UserError: another process trains there, or the folder cannot be written.
        """
        command = [Path(sys.argv[0]).name, *sys.argv[1:]]
        record = {"schema_version": 1, "command": command, "git_commit": git_commit(), "machine": identify(), **facts}
        if not self.is_first:
            yield record
            return
        with alone_in(self.folder, "is being trained by another process; wait for it, or choose another --run"):
            write_text(self.folder / "config.yaml", yaml.safe_dump(config, sort_keys=False))
            write_text(self.folder / "run.json", json.dumps(record, indent=1))
            yield record

    def fit(
        self,
        trainer: Trainer,
        module: LightningModule,
        data: LightningDataModule,
        checkpoints: Checkpoints,
        checkpoint: Path | None,
    ) -> int:
        """Train; returns 0, or the exit code if a signal ended it.

        Raises:
            UserError: what `writing`, `lost_peers` and `enough_memory` say, or a callback.
        """
        # Under torchrun a process may wait for others that do not come: until training starts, a signal ends it at
        # once.
        handlers = {} if is_torchelastic_launched() else checkpoints.listen()
        # At every step Lightning would ask all processes for a SIGTERM and wait for the GPU to answer (its
        # issue 21487); `Checkpoints` asks whenever values are logged.
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
        hook = threading.excepthook
        threading.excepthook = _hide_os_errors
        try:
            in_memory = enough_memory("take a smaller --data.batch_size")
            with warnings.catch_warnings(), writing(self.folder), lost_peers(self.folder), in_memory:
                for idle in (
                    "dataloader .*(workers|resumable)",
                    "Checkpoint directory .* not empty",
                    "number of training batches",
                    "capturable=True",  # the first captured steps are not
                ):
                    warnings.filterwarnings("ignore", f".*{idle}")
                trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
        except Stopped:
            asked = signal.Signals(checkpoints.signal or signal.SIGTERM)
            self.say(
                f"{self.folder}: stopped by {asked.name} at step {trainer.global_step:,}; continue with --resume",
                file=sys.stderr,
            )
            # Lightning kills the first of several when another ends with a code; torchrun takes 0 for the run's end.
            return 128 + asked if self.is_first or is_torchelastic_launched() else 0
        finally:
            threading.excepthook = hook
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return 0

    def finish(self, record: dict[str, Any], trainer: Trainer, started: float, facts: dict[str, Any]) -> dict[str, Any]:
        """Write into run.json how training went, and return that.

        Args:
            record: what run.json holds.
            trainer: that trained.
            started: when, by time.perf_counter.
            facts: what else is known of it.

        Raises:
            UserError: the validation loss is not finite.
        """
        stopping = trainer.early_stopping_callback
        if isinstance(stopping, EarlyStopping) and stopping.stopping_reason is EarlyStoppingReason.NON_FINITE_METRIC:
            raise UserError(
                f"{self.folder}: the validation loss is not finite at step {trainer.global_step:,}; start another "
                "--run with a lower --optimizer.lr"
            )
        best: Any = trainer.checkpoint_callback
        speed = next((callback for callback in trainer.callbacks if isinstance(callback, Speed)), None)  # type: ignore[attr-defined]
        record["finished"] = {
            "steps": trainer.global_step,
            "max_steps": trainer.max_steps,
            "seconds": round(time.perf_counter() - started, 1),
            "best_val_loss": float(best.best_model_score) if best.best_model_score is not None else None,
            "precision": trainer.precision,
            **facts,
            **(speed.summary() if speed else {}),
        }
        if trainer.strategy.root_device.type == "cuda":
            # In use, as a model's size predicts it; and held, with what CUDA graphs and spare blocks take.
            record["finished"]["peak_allocated_mib"] = round(torch.cuda.max_memory_allocated() / 2**20)
            record["finished"]["peak_memory_mib"] = round(torch.cuda.max_memory_reserved() / 2**20)
        if self.is_first:
            write_text(self.folder / "run.json", json.dumps(record, indent=1))
        return record["finished"]


def read_record(folder: Path) -> dict[str, Any]:
    """Read a run's run.json."""
    try:
        return json.loads((folder / "run.json").read_text())
    except (FileNotFoundError, ValueError):  # killed before or while it was written
        return {}


def plain(section: Section) -> Section:
    """Turn jsonargparse's numbers and tuples into what YAML and a checkpoint without pickled code can hold."""
    return type(section)(**json.loads(json.dumps(asdict(section))))  # type: ignore[call-overload]


@contextmanager
def loading(path: Path, command: str) -> Iterator[None]:
    """Turn what a checkpoint that does not load raises into one line.

    Args:
        path: of the checkpoint.
        command: that would write one.

    Raises:
        UserError: there is no checkpoint, or it is damaged or of another shape.
    """
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        run, there = path.parent.parent, sorted(found.name for found in path.parent.glob("*.ckpt"))
        if not there and not (run / "run.json").exists():
            raise UserError(f"{run} is not a run of `{command}`: it has no checkpoints; name one") from None
        if path.name != BEST and there:
            raise UserError(f"{path} does not exist; the checkpoints there are {', '.join(there)}") from None
        raise UserError(
            f"{path} does not exist: no validation was reached there; go on with `{command} ... --resume`"
        ) from None
    except Exception as error:  # a damaged file fails in as many ways as there are bytes
        raise UserError(
            f"{path} cannot be loaded ({_why_not_loaded(path, error)}); take another checkpoint or train again"
        ) from error


def _why_not_loaded(path: Path, error: Exception) -> str:
    if path.is_file() and not is_zipfile(path):  # of which torch says other things
        return f"it was cut short or damaged, and has {path.stat().st_size:,} bytes"
    reason = " ".join(str(error).split()).rpartition("WeightsUnpickler error: ")[2]  # what torch says last, at length
    return reason.split(". ")[0][:200] or type(error).__name__


def _difference(section: str, before: Any, now: Any, read: str, ignored: Collection[str]) -> str | None:
    """Say in which option a checkpoint differs from what is asked for, if it does."""
    if not isinstance(now, dict):
        return None if before == now else f"other {read}"
    for key, value in now.items():
        if key not in ignored and before.get(key) != value:
            return f"{section}.{key} {before.get(key)}, this asks for {value}"
    return None


def _hide_os_errors(args: threading.ExceptHookArgs) -> None:
    """Let TensorBoard's writing thread fail in silence: what it met is raised again where the next value is logged."""
    if not isinstance(args.exc_value, OSError):
        threading.__excepthook__(args)
