"""What tests of training have in common: checkpoints are compared bit for bit, and runs are interrupted."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule


def load_all(run: Path) -> dict[str, Any]:
    return {name: torch.load(run / "checkpoints" / name, weights_only=True) for name in ("last.ckpt", "best.ckpt")}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def only_line(capsys: pytest.CaptureFixture[str]) -> str:
    """Return what was printed to stderr, which must be one line."""
    (line,) = capsys.readouterr().err.splitlines()
    return line


def send(
    module: type[LightningModule],
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    *,
    method: str = "training_step",
    step: int,
) -> None:
    """Send a signal to this process in a training step, or in the validation after it."""
    original, sent = getattr(module, method), []

    def wrapped(self: LightningModule, batch: Any) -> Any:
        if self.trainer.global_step == step - (method == "training_step") and not sent:
            sent.append(os.kill(os.getpid(), number))
        return original(self, batch)

    monkeypatch.setattr(module, method, wrapped)


def differences(a: Any, b: Any, place: str) -> Iterator[str]:
    """Name the places at which two nested values differ."""
    if isinstance(a, torch.Tensor):
        if not torch.equal(a, b):
            yield place
    elif isinstance(a, tuple):  # which torch makes a list of when it loads what fsdp has saved
        yield from differences(list(a), list(b), place)
    elif isinstance(a, dict | list) and len(a) == len(b):
        for key in a if isinstance(a, dict) else range(len(a)):
            yield from differences(a[key], b[key], f"{place}.{key}")
    elif a != b:
        yield f"{place}: {a} and {b}"
