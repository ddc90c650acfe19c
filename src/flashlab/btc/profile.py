"""A profile of some steps of a run: which kernels they consist of, and when each ran."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from flashlab.errors import replacing, write_text

FIRST_STEP = 50  # by then everything is compiled and recorded
STEPS = 20


class Profile(Callback):
    """Write profile.json (what the kernels of a step take) and trace.json.gz (when each ran) into the run's folder."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self._profiler: profile | None = None
        self._started_at = 0

    def on_train_start(self, trainer: Trainer, *args: Any) -> None:
        self._first = trainer.global_step + FIRST_STEP
        if self._first + STEPS > trainer.max_steps and trainer.is_global_zero:
            print(f"{self.run}: no profile is written, since it takes the {STEPS} steps from step {self._first} on")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if trainer.global_step == self._first and trainer.is_global_zero:
            activity = ProfilerActivity.CUDA if pl_module.device.type == "cuda" else ProfilerActivity.CPU
            self._profiler = profile(activities=[activity])
            self._profiler.start()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if self._profiler is None or trainer.global_step < self._first + STEPS:
            return
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize()
        self._profiler.stop()
        write_text(self.run / "profile.json", json.dumps(summarise(self._profiler, STEPS), indent=1))
        with replacing(self.run / "trace.json.gz") as partial:
            named = partial.with_suffix(".json.gz")  # by its name torch knows to compress
            self._profiler.export_chrome_trace(str(named))
            named.replace(partial)
        self._profiler = None


def summarise(profiler: profile, steps: int) -> dict[str, Any]:
    """Add up what a profile's kernels took, or on a CPU its operators themselves.

    Returns:
        The steps; milliseconds a step in which something ran; and, the longest first, each kernel's name, calls a step
        and milliseconds a step.
    """
    on_gpu = [event for event in profiler.events() if event.device_type == DeviceType.CUDA]
    kernels: dict[str, list[float]] = defaultdict(list)
    if on_gpu:
        for event in on_gpu:
            kernels[event.name].append(event.time_range.end - event.time_range.start)
        busy = union((event.time_range.start, event.time_range.end) for event in on_gpu)
    else:
        for event in profiler.events():
            kernels[event.name].append(event.self_cpu_time_total)
        busy = sum(map(sum, kernels.values()))
    rows = [
        {"name": name, "calls_per_step": len(times) / steps, "ms_per_step": sum(times) / steps / 1e3}
        for name, times in sorted(kernels.items(), key=lambda item: -sum(item[1]))
    ]
    return {"steps": steps, "busy_ms_per_step": busy / steps / 1e3, "kernels": rows}


def union(spans: Any) -> float:
    """Return the length of what spans (begin, end) cover, where they overlap once."""
    covered, last = 0.0, float("-inf")
    for begin, end in sorted(spans):
        covered += max(0.0, end - max(begin, last))
        last = max(last, end)
    return covered
