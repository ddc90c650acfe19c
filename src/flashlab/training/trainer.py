"""Lightning's trainer and the optimiser as every run has them, and what there is to train on."""

import logging
import os
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from torch import nn

from flashlab.errors import UserError
from flashlab.training.callbacks import (
    AtomicCheckpointIO,
    BestCheckpoint,
    Checkpoints,
    Progress,
    ProgressLines,
    Speed,
)
from flashlab.training.world import SameStart


def make_trainer(
    run: Path,
    options: Any,
    max_steps: int,
    speed: Speed,
    checkpoints: Checkpoints,
    callbacks: list[Callback],
    **settings: Any,
) -> Trainer:
    """Return Lightning's trainer, set up as for every run.

    Args:
        run: its folder.
        options: the run's TrainerConfig.
        max_steps: of the whole run.
        speed: is shown and logged.
        checkpoints: are written, and the best one.
        callbacks: what else is to happen.
        settings: of the trainer, beside those.
    """
    has_bar = sys.stdout.isatty()
    bar = Progress(options.log_every_n_steps, speed) if has_bar else ProgressLines(speed)
    return Trainer(
        devices=options.devices,
        num_nodes=options.num_nodes,
        max_epochs=1,  # of EndlessBatches, whose one pass is the whole run: steps count, not epochs
        max_steps=max_steps,
        val_check_interval=min(options.val_every_n_steps, max_steps),
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=options.log_every_n_steps,
        use_distributed_sampler=False,
        callbacks=[BestCheckpoint(run), bar, speed, *callbacks, checkpoints, SameStart(run)],
        plugins=[AtomicCheckpointIO()],
        enable_model_summary=False,
        enable_progress_bar=has_bar,
        **settings,
    )


def adamw(module: nn.Module, lr: float, weight_decay: float, betas: tuple[float, float]) -> torch.optim.Optimizer:
    """Return AdamW as one kernel over a module's parameters; weights of vectors (norms, biases) do not decay."""
    matrices = [parameter for parameter in module.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in module.parameters() if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)


def choose_accelerator(accelerator: str, devices: int) -> str:
    """Return gpu or cpu.

    Raises:
        UserError: there is no GPU, or fewer than asked for.
    """
    if accelerator == "gpu" and not torch.cuda.is_available():
        raise UserError("--trainer.accelerator gpu: torch sees no GPU here; `flashlab doctor` says why")
    if accelerator != "cpu" and torch.cuda.is_available():
        if devices > torch.cuda.device_count():
            raise UserError(f"--trainer.devices {devices}: this machine has {torch.cuda.device_count()} GPU(s)")
        return "gpu"
    return "cpu"


def choose_precision(precision: str, accelerator: str) -> Any:
    """Return Lightning's name for the precision: of auto, bfloat16 where the GPU has it, and float32 elsewhere."""
    if precision != "auto":
        return precision
    has_bfloat16 = accelerator == "gpu" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16-mixed" if has_bfloat16 else "32-true"


def why_not_compiled(accelerator: str) -> str | None:
    """Say why torch.compile is of no use here, or return None when it is."""
    return why_no_compiler(accelerator) if accelerator == "gpu" else "there is no GPU"


def why_no_compiler(accelerator: str) -> str | None:
    """Say why torch.compile cannot run here, or return None when it can: it needs C for a GPU, C++ for a CPU."""
    on_gpu = accelerator == "gpu"
    language, variable, names = ("C", "CC", ("gcc", "cc", "clang")) if on_gpu else ("C++", "CXX", ("g++",))
    if os.environ.get(variable) or any(map(shutil.which, names)):
        return None
    return f"torch.compile finds no {language} compiler (install {names[0]})"


def quieten() -> None:
    """Have libraries say only what a user can act on."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*isinstance.treespec, LeafSpec.*")  # between Lightning and torch
