"""The training loops that `flashlab bench train` measures, each run in a process of its own."""

import json
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.profiler import ProfilerActivity, profile

from flashlab.attention.flash import import_problem
from flashlab.btc.callbacks import AverageWeights
from flashlab.btc.captured import CapturedStep
from flashlab.btc.dataset import DataConfig, Windows
from flashlab.btc.evaluate import read_config
from flashlab.btc.prepare import open_set
from flashlab.btc.profile import FIRST_STEP, STEPS, summarise
from flashlab.btc.published import PublishedModule, loader, write_windows
from flashlab.btc.train import make_module
from flashlab.btc.windows import part_windows
from flashlab.errors import one_line
from flashlab.training.batches import EndlessBatches, Shuffled
from flashlab.training.run import read_record
from flashlab.worker import Worker, WorkerLost, run_flashlab

Contestant = Literal["published", "plain", "captured", "bare"]
CONTEXT_LENGTH = 2048  # of the published loop
LIMIT_S = 600.0

Row = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """What is measured.

    Args:
        contestant: which loop.
        config: of `flashlab train`; the published loop has a model of its own.
        batch_size: windows per step and GPU.
        devices: GPUs.
    """

    contestant: Contestant
    config: Path | None
    batch_size: int
    devices: int


def measure(cell: Cell, data: str, steps: int, folder: Path) -> Row:
    """Measure one loop.

    Args:
        cell: what.
        data: prepared set.
        steps: how many are timed.
        folder: for runs and logs; of the bare step, where the captured run of the same configuration is.

    Returns:
        A row with its status, and why where it is not ok.
    """
    row: Row = {**asdict(cell), "config": cell.config.stem if cell.config else None, "steps": steps}
    if cell.contestant in ("plain", "captured"):
        figures = _train(cell, data, steps, folder)
    elif not torch.cuda.is_available():
        figures = {"status": "unsupported", "reason": "torch sees no GPU here"}
    elif cell.contestant == "published" and (problem := import_problem(2)):
        figures = {"status": "unsupported", "reason": problem}
    else:
        function = published_loop if cell.contestant == "published" else bare_step
        worker = Worker(folder / "log", has_children=cell.contestant == "published")
        try:
            figures = worker.call(function, data, cell.batch_size, steps, run_of(cell, folder), timeout_s=LIMIT_S)
            figures |= {"status": "ok"}
        except WorkerLost as error:
            figures = {"status": "failed", "reason": str(error)}
        except Exception as error:  # whatever it is, the others are still measured
            figures = {"status": "failed", "reason": one_line(error)}
        finally:
            worker.stop()
    row |= figures
    if row["status"] == "ok":
        row["bars_per_s"] = round(cell.batch_size * cell.devices * row.pop("context_length") / row["ms_per_step"] * 1e3)
        is_gpu = row["peak_memory_mib"] is not None
        row["busy_share"] = round(row["busy_ms_per_step"] / row["ms_per_step"], 4) if is_gpu else None
    return row


def run_of(cell: Cell, folder: Path) -> Path:
    """Name the run folder of the captured run that goes with a cell."""
    return folder / f"{cell.config.stem if cell.config else ''}-{cell.batch_size}-captured-1"


def _train(cell: Cell, data: str, steps: int, folder: Path) -> Row:
    assert cell.config is not None
    run = folder / f"{cell.config.stem}-{cell.batch_size}-{cell.contestant}-{cell.devices}"
    options = {
        "config": cell.config,
        "data.path": data,
        "data.batch_size": cell.batch_size,
        "trainer.devices": cell.devices,
        "trainer.max_steps": FIRST_STEP + STEPS + 100 + steps,
        "trainer.step": cell.contestant,
        "trainer.profile": "true",
        "run": run,
    }
    words = [f"--{key}={value}" for key, value in options.items()]
    try:
        done = run_flashlab("train", *words, timeout_s=LIMIT_S, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    except subprocess.TimeoutExpired:
        return {"status": "failed", "reason": f"took longer than {LIMIT_S:g} s"}
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1]
        return {
            "status": "unsupported" if done.returncode == 2 else "failed",
            "reason": last.removeprefix("flashlab: error: "),
        }
    record, profiled = read_record(run), json.loads((run / "profile.json").read_text())
    finished = record["finished"]
    return {
        "status": "ok",
        "attention_backend": record["attention_backend"],
        "parameters": record["parameters"],
        "context_length": read_config(run)["data"]["context_length"],
        "ms_per_step": finished["ms_per_step"],
        "peak_memory_mib": finished.get("peak_memory_mib"),
        **_of_profile(profiled),
    }


def bare_step(data: str, batch_size: int, steps: int, run: Path) -> Row:
    """Time the captured step in a loop of its own, with the configuration of a run."""
    config, prepared = read_config(run), open_set(data)
    options = DataConfig(**config["data"])
    module = make_module(config, prepared).cuda()
    optimizer = module.make_optimizer()
    average = AverageWeights(module.config.average_decay) if module.config.average_decay else None
    if average:
        average.setup(None, module, "fit")  # type: ignore[arg-type]
    starts = part_windows(prepared.manifest, "train", options.context_length, options.stride)
    windows = Windows(prepared, starts, options.context_length, mirror=options.mirror)
    read = windows.resident(module.device)
    step = CapturedStep(
        lambda items: module.loss(read(items)),
        optimizer,
        config["trainer"]["gradient_clip_val"],
        torch.bfloat16,
        (lambda: average.update(module)) if average else None,
    )
    warm_up = FIRST_STEP
    batches = EndlessBatches(Shuffled(len(windows), config["seed"]), batch_size, warm_up + steps + STEPS)
    items = (torch.tensor(batch).pin_memory().to(module.device, non_blocking=True) for batch in batches)
    for _ in range(warm_up):
        step(next(items))
    ms = _time(lambda: step(next(items)), steps)
    profiled = _profile(lambda: step(next(items)))
    return {
        "context_length": options.context_length,
        "ms_per_step": ms,
        "peak_memory_mib": _peak_memory_mib(),
        "parameters": sum(parameter.numel() for parameter in module.parameters()),
        **profiled,
    }


def published_loop(data: str, batch_size: int, steps: int, run: Path) -> Row:
    """Time the training loop as it was published."""
    with TemporaryDirectory(prefix="flashlab-") as folder:
        write_windows(open_set(data), CONTEXT_LENGTH, Path(folder) / "windows")
        module, clock = PublishedModule(), _Clock(FIRST_STEP, steps)
        trainer = Trainer(
            accelerator="gpu",
            devices=1,
            precision="bf16-mixed",
            max_steps=FIRST_STEP + steps + STEPS,
            max_epochs=-1,
            callbacks=[clock],
            default_root_dir=folder,
            enable_model_summary=False,
        )
        trainer.fit(module, loader(Path(folder) / "windows", batch_size))
    return {
        "attention_backend": "flash_attention_2",
        "context_length": CONTEXT_LENGTH,
        "ms_per_step": clock.ms_per_step,
        "peak_memory_mib": _peak_memory_mib(),
        "parameters": sum(parameter.numel() for parameter in module.parameters()),
        **clock.profiled,
    }


class _Clock(Callback):
    """Time some steps of a loop, then profile some more."""

    def __init__(self, warm_up: int, steps: int) -> None:
        self.first, self.last = warm_up, warm_up + steps
        self.ms_per_step = 0.0
        self.profiled: Row = {}

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        step = trainer.global_step
        if step == self.first:
            torch.cuda.synchronize()
            self._started = perf_counter()
        elif step == self.last:
            torch.cuda.synchronize()
            self.ms_per_step = 1e3 * (perf_counter() - self._started) / (self.last - self.first)
            self._profiler = profile(activities=[ProfilerActivity.CUDA])
            self._profiler.start()
        elif step == self.last + STEPS:
            torch.cuda.synchronize()
            self._profiler.stop()
            self.profiled = _of_profile(summarise(self._profiler, STEPS))


def _time(call: Any, times: int) -> float:
    torch.cuda.synchronize()
    started = perf_counter()
    for _ in range(times):
        call()
    torch.cuda.synchronize()
    return 1e3 * (perf_counter() - started) / times


def _profile(call: Any) -> Row:
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(STEPS):
            call()
        torch.cuda.synchronize()
    return _of_profile(summarise(profiler, STEPS))


def _of_profile(profiled: dict[str, Any]) -> Row:
    return {
        "busy_ms_per_step": round(profiled["busy_ms_per_step"], 4),
        "kernels_per_step": round(sum(kernel["calls_per_step"] for kernel in profiled["kernels"])),
        "kernels": [{**kernel, "ms_per_step": round(kernel["ms_per_step"], 4)} for kernel in profiled["kernels"][:12]],
    }


def _peak_memory_mib() -> int:
    return round(torch.cuda.max_memory_reserved() / 2**20)
