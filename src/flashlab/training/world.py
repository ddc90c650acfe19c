"""The processes that train together, on one machine or several, and what becomes of them when one is lost."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch.distributed import DistError, is_torchelastic_launched

from flashlab.errors import UserError

# A machine that lost power says no goodbye. Until the others have waited this long for it they do not know; reading the
# first chunks, compiling and validating at different speeds and writing a checkpoint must fit in.
TIMEOUT = timedelta(minutes=5)


def choose_size(devices: int, num_nodes: int) -> tuple[int, int]:
    """Say how many processes train on this machine, and on how many machines: what torchrun says, if it runs this one.

    An elastic job has now more machines, now fewer, so options can say nothing that stays right: 1, their default, is
    whatever torchrun says.

    Raises:
        UserError: the options contradict torchrun, it runs more processes on one machine than on another, or it is
            not set up to start a process again.
    """
    if not is_torchelastic_launched():
        return devices, num_nodes
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise UserError(
            "a process that torchrun starts again would find the addresses of the ended ones, and hang; set "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 where torchrun is started"
        )
    processes, here = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
    machines = int(os.environ.get("GROUP_WORLD_SIZE", processes // here))
    if machines * here != processes:
        raise UserError(
            f"torchrun runs {here} of {processes} processes here, on one of {machines} machines; give all machines "
            "the same --nproc-per-node"
        )
    for option, asked, given in (("devices", devices, here), ("num_nodes", num_nodes, machines)):
        if asked not in (1, given):
            raise UserError(f"--trainer.{option} {asked}: torchrun gives {given}; leave the option out under torchrun")
    return here, machines


@contextmanager
def lost_peers(run: Path) -> Iterator[None]:
    """Turn what a lost process does to those that wait for it into one line.

    Raises:
        UserError: another process has ended, or did not answer for `TIMEOUT`. The exit code is not 0, so that torchrun
            starts the processes of this machine again.
    """
    try:
        yield
    except RuntimeError as error:
        text = " ".join(str(error).split())
        if not isinstance(error, DistError) and "gloo" not in text:
            raise
        remedy = "torchrun starts all of them again" if is_torchelastic_launched() else "see what it said, start again"
        raise UserError(
            f"{run}: a process that trains with this one has ended or does not answer ({_reason(text)}); {remedy}, and "
            "--resume goes on from the last checkpoint"
        ) from error


def _reason(text: str) -> str:
    """Shorten what a library says: neither its own source file nor advice for its developers."""
    return re.sub(r"^\[[^\]]*\]\s*", "", text)[:120].split(". ")[0]


class SameStart(Callback):
    """Refuse to train from different checkpoints: a file system may show one machine a file later than another.

    Raises:
        UserError: this process loaded another checkpoint than the first one.
    """

    def __init__(self, run: Path) -> None:
        self.run = run

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        first = trainer.strategy.broadcast(trainer.global_step)
        if trainer.global_step != first:
            raise UserError(
                f"{self.run}: the last checkpoint is of step {trainer.global_step:,} here and of step {first:,} where "
                "the first process is; give all machines one folder"
            )
