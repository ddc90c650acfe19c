"""Measure whole runs of `flashlab gpt2 train`: on several GPUs, and with one attention backend after the other.

    python examples/gpt2/experiments.py scaling data/gpt2 --devices 2
    python examples/gpt2/experiments.py backends data/gpt2

Each run is a process of its own, as a user would start it. What was measured stays if a later one fails.
"""

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from jsonargparse.typing import PositiveFloat, PositiveInt

from flashlab.attention.backends import BACKENDS
from flashlab.btc.report import read_curves
from flashlab.cli import script
from flashlab.errors import UserError
from flashlab.gpt2 import report
from flashlab.gpt2.config import GPTConfig, num_parameters
from flashlab.gpt2.module import GATHERED
from flashlab.gpt2.tokens import open_set
from flashlab.machine import check_result, provenance, write_result
from flashlab.worker import running_flashlab

HERE = Path(__file__).parent
SPEED = ("tokens_per_s", "mfu", "ms_per_step")
MEMORY = ("peak_allocated_mib", "peak_memory_mib")
LEARNT = ("best_val_loss", "precision")
LOGGED_EVERY = 5
FEWEST = 4 * LOGGED_EVERY  # steps from which a run knows its speed
ERROR = "flashlab: error: "
UNAVAILABLE = "cannot run this call: "  # what a backend says, and behind it why
# Of a parameter, where the forward pass ends and most memory is in use: its weight and AdamW's two averages in float32,
# and no gradient yet; and autocast's copy in 16 bits, which waits for the backward pass.
SHARED_BYTES, COPIED_BYTES = 12, 2


def training(run: Path, *options: object, sharing: int = 1) -> AbstractContextManager[subprocess.Popen[str]]:
    """Start `flashlab gpt2 train`, whose end `outcome` waits for."""
    words = ["gpt2", "train", *options, "--run", run]
    return running_flashlab(*words, sharing=sharing, stdout=sys.stderr, stderr=subprocess.PIPE)


def outcome(run: Path, process: subprocess.Popen[str], kept: tuple[str, ...]) -> dict[str, Any]:
    """Wait for a training; return what it says of the run, and of how it went what is to be kept."""
    _, told = process.communicate()
    lines = told.strip().splitlines() or ["it said nothing"]
    # Of several processes the first one says the cause, and torchrun has the last word.
    causes = [line for start in (ERROR, r"[\w.]+(Error|Exception)\b") for line in lines if re.match(start, line)]
    cause = (causes or lines[-1:])[0]
    if UNAVAILABLE in cause:
        return {"status": "unavailable", "reason": cause.removeprefix(ERROR)}
    if process.returncode:
        return {"status": "failed", "reason": f"exit code {process.returncode}: {cause}"}
    record = json.loads((run / "run.json").read_text())
    facts = {name: record[name] for name in ("parameters", "attention_backend", "loss", "tokens_per_step")}
    return {"status": "ok", "reason": None, **facts, **{name: record["finished"].get(name) for name in kept}}


def scaling(
    data: str,
    devices: PositiveInt = 2,
    strategies: list[Literal["ddp", "fsdp"]] = ["ddp", "fsdp"],  # noqa: B006 - not changed
    batch_size: PositiveInt = 64,
    sharded: str = "gpt2-xl",
    sharded_batch_size: PositiveInt = 16,
    block_size: PositiveInt = 1024,
    steps: PositiveInt = 30,
    shared: bool = False,
    more: str = "",
    out: Path = Path("runs/gpt2_scaling.json"),
) -> int:
    """Compare several GPUs with one that does the same share of a step: tokens/s by DDP, memory per GPU by FSDP.

    Args:
        data: token set.
        devices: how many GPUs.
        strategies: what is measured: ddp trains gpt2, fsdp a model that is worth sharing out.
        batch_size: sequences that a GPU computes at once, of the preset gpt2.
        sharded: preset that FSDP trains.
        sharded_batch_size: the same, of that preset.
        block_size: tokens in a sequence.
        steps: of each run.
        shared: have one GPU do what several are to do: memory is as with several, and speeds are left out.
        more: options of `flashlab gpt2 train` for all runs, as one word.
        out: result file.
    """
    open_set(data)
    check_result(out)
    if steps < FEWEST and not shared:
        raise UserError(f"--steps {steps} are too few to measure a speed by; take {FEWEST} or more")
    record = start("gpt2_scaling")
    cases = [("gpt2", "ddp", batch_size, 1), ("gpt2", "ddp", batch_size, 8), (sharded, "fsdp", sharded_batch_size, 1)]
    with TemporaryDirectory(prefix="flashlab-") as folder:
        for preset, strategy, size, accumulated in (case for case in cases if case[1] in strategies):
            alone: dict[str, Any] = {}
            for count in (1, devices):
                sharing = count if shared else 1
                options = {
                    "data.path": data,
                    "data.batch_size": size,
                    "model.preset": preset,
                    "model.block_size": block_size,
                    "optimizer.warmup_steps": 10,
                    "trainer.max_steps": steps,
                    "trainer.log_every_n_steps": LOGGED_EVERY,
                    "trainer.val_batches": count,
                    "trainer.global_batch_tokens": size * block_size * accumulated * count,
                    "trainer.devices": count // sharing,
                    "trainer.strategy": strategy if count > 1 else "ddp",
                }
                words = [word for name, value in options.items() for word in (f"--{name}", value)]
                run = Path(folder) / str(len(record["rows"]))
                kept = MEMORY + LEARNT + (() if shared else SPEED)
                row: dict[str, Any] = {
                    "preset": preset,
                    "strategy": strategy if count > 1 else None,
                    "devices": count,
                    "shared": sharing > 1,
                    "batch_size": size,
                }
                with training(run, *words, *shlex.split(more), sharing=sharing) as process:
                    row |= outcome(run, process, kept)
                if row["status"] == alone.get("status") == "ok":
                    if not shared:
                        row["efficiency"] = round(row["tokens_per_s"] / alone["tokens_per_s"] / count, 4)
                    if strategy == "fsdp" and alone["peak_allocated_mib"]:
                        shape = GPTConfig(**json.loads((run / "run.json").read_text())["shape"][0])
                        predicted = alone["peak_allocated_mib"] - spared_bytes(shape, count) / 2**20
                        row["predicted_allocated_mib"] = round(predicted)
                shutil.rmtree(run / "checkpoints", ignore_errors=True)  # 19 GB of gpt2-xl
                alone = alone or row
                record["rows"].append(row)
                write_result(out, record)
    report.show(report.scaling(out))
    print(f"wrote {out}")
    return int(any(row["status"] != "ok" for row in record["rows"]))


def spared_bytes(shape: GPTConfig, devices: int) -> float:
    """Predict how many bytes less than one GPU alone each of several has in use by FSDP, in bfloat16.

    Each keeps a share of what is in float32. Copies in 16 bits it has of the tables, of the blocks that are gathered,
    and of as many that are being gathered meanwhile; all others are gathered again for the backward pass.
    """
    block = num_parameters(replace(shape, n_layer=2)) - num_parameters(replace(shape, n_layer=1))
    absent = max(shape.n_layer - 2 * GATHERED, 0) * block
    return SHARED_BYTES * (1 - 1 / devices) * num_parameters(shape) + COPIED_BYTES * absent


def backends(
    data: str,
    trained: Path = HERE / "embedded.yaml",
    names: list[str] = list(BACKENDS),  # noqa: B006 - not changed
    steps: PositiveInt = 500,
    at_once: PositiveInt = 1,
    within: PositiveFloat = 0.06,
    out: Path = Path("runs/gpt2_backends.json"),
) -> int:
    """Train one model with one attention backend after the other, from the same weights on the same blocks.

    Beside them stands standard attention without torch.compile, and with a residual stream in float32: what rounding at
    other places does by itself.

    Args:
        data: token set.
        trained: configuration of `flashlab gpt2 train`.
        names: backends; those that cannot run here are listed with the reason.
        steps: of each run.
        at_once: runs that share the GPU; their speeds are not asked for.
        within: largest difference of a logged loss from that of standard attention that passes.
        out: result file.
    """
    contestants = [
        ("standard", "standard", []),
        ("standard, uncompiled", "standard", ["--trainer.compile", "false"]),
        ("standard, residual stream in float32", "standard", ["--model.residual_in_fp32", "true"]),
        *((name, name, []) for name in names if name != "standard"),
    ]
    open_set(data)
    check_result(out)
    if not trained.is_file():
        raise UserError(f"--trained {trained}: there is no such file; name a configuration of `flashlab gpt2 train`")
    record = start("gpt2_backends")
    expected: list[float] = []
    for first in range(0, len(contestants), at_once):
        group = contestants[first : first + at_once]
        with TemporaryDirectory(prefix="flashlab-") as folder, ExitStack() as stack:
            runs = [Path(folder) / str(number) for number in range(len(group))]
            fixed = ["--config", trained, "--data.path", data, "--model.dropout", 0, "--trainer.max_steps", steps]
            processes = [
                stack.enter_context(training(run, *fixed, "--model.backend", name, *more))
                for run, (_, name, more) in zip(runs, group, strict=True)
            ]
            stack.enter_context(stopped_together(processes))
            for (label, *_), run, process in zip(group, runs, processes, strict=True):
                row: dict[str, Any] = {"backend": label, **outcome(run, process, LEARNT)}
                if row["status"] == "ok":
                    losses = [round(float(loss), 5) for loss in read_curves(run)["train/loss"][1]]
                    expected = losses if label == "standard" else expected
                    row |= compared(losses, expected)
                record["rows"].append(row)
                write_result(out, record)
    report.show(report.backends(out))
    print(f"wrote {out}")
    apart = [row["backend"] for row in record["rows"] if row.get("largest_difference", 0) > within]
    if apart:
        print(f"more than {within} from standard attention: {', '.join(apart)}", file=sys.stderr)
    broken = [row for row in record["rows"] if row["status"] not in ("ok", "unavailable")]
    return int(bool(apart or broken) or record["rows"][0]["status"] != "ok")


@contextmanager
def stopped_together(processes: list[subprocess.Popen[str]]) -> Iterator[None]:
    """Ask all to stop where one would be waited for before the next is asked."""
    try:
        yield
    except BaseException:
        for process in processes:
            process.terminate()
        raise


def compared(losses: list[float], expected: list[float]) -> dict[str, Any]:
    """Say how far logged losses are from those of standard attention."""
    if len(losses) != len(expected):
        reason = f"it logged {len(losses)} losses, and standard attention {len(expected)}"
        return {"status": "failed", "reason": reason}
    away = [abs(one - other) for one, other in zip(losses, expected, strict=True)]
    largest = {"largest_difference": round(max(away), 5), "of_first_10": round(max(away[:10]), 5)}
    return {"train_loss": losses, "first_loss": losses[0], **largest}


def start(kind: str) -> dict[str, Any]:
    """Begin a result file."""
    words = ["python", "examples/gpt2/experiments.py", *sys.argv[1:]]
    return provenance(kind) | {"command": shlex.join(words), "rows": []}


if __name__ == "__main__":
    script([scaling, backends], as_positional=True)
