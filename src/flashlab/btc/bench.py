"""`flashlab bench train`: how fast the forecaster trains, and what the loop costs beside the bare step."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import matplotlib
import torch
from jsonargparse.typing import PositiveInt
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from flashlab.btc.contestants import Cell, Contestant, measure
from flashlab.btc.figures import MODEL
from flashlab.btc.prepare import open_set
from flashlab.btc.profile import STEPS
from flashlab.errors import UserError, replacing
from flashlab.machine import check_result, provenance, write_result
from flashlab.report import NEUTRAL, STYLE, WIDTH

CONFIGS = [Path("examples/btc_forecast/default.yaml"), Path("examples/btc_forecast/seed.yaml")]
CONTESTANTS: list[Contestant] = ["published", "plain", "captured", "bare"]
METHOD = {
    "published": "windows copied per item by four litdata workers, 8 heads of 8 through flash-attn's own module, "
    "bf16-mixed, the norm of the gradient logged at every step",
    "plain": "`flashlab train --trainer.step plain`: Lightning's automatic optimisation, kernels launched one by one",
    "captured": "`flashlab train`, as it is on a GPU",
    "bare": "the captured step in a loop of its own: no Lightning, no logging, no checkpoints",
    "ms_per_step": "wall time; logging and checkpoints count, validation and compiling do not",
    "busy_ms_per_step": f"time in which a kernel ran, of {STEPS} other steps under torch.profiler",
    "peak_memory_mib": "most that torch's allocator held on one GPU",
}


def bench_train(
    *,
    data: str,
    configs: list[Path] = CONFIGS,
    contestants: list[Contestant] = CONTESTANTS,
    batch_sizes: list[PositiveInt] = [32],  # noqa: B006 - not changed
    devices: list[PositiveInt] = [1],  # noqa: B006
    steps: PositiveInt = 1000,
    out: Path = Path("runs/bench_train.json"),
) -> int:
    """Measure how fast the forecaster trains: the published loop, plain steps, captured steps and the bare step.

    Each is measured in a process of its own, one after the other. Writes a JSON file and, beside it, a picture.

    Args:
        data: prepared set.
        configs: configurations of `flashlab train`.
        contestants: which loops; bare needs captured.
        batch_sizes: windows per step and GPU.
        devices: how many GPUs; on several only `flashlab train` is measured.
        steps: how many are timed; of the slower loops a quarter.
        out: result file, .json.

    Raises:
        UserError: a file or folder cannot be used, or there are fewer GPUs.
    """
    open_set(data)
    for config in configs:
        if not config.is_file():
            raise UserError(f"--configs {config}: there is no such file; name configurations of `flashlab train`")
    if torch.cuda.is_available() and max(devices) > torch.cuda.device_count():
        raise UserError(f"--devices {max(devices)}: this machine has {torch.cuda.device_count()} GPU(s)")
    if "bare" in contestants and "captured" not in contestants:
        raise UserError("--contestants: the bare step takes its configuration from the captured run; name both")
    check_result(out)
    cells = dict.fromkeys(
        Cell(name, None if name == "published" else config, batch_size, count)
        for config in configs
        for batch_size in batch_sizes
        for count in devices
        for name in sorted(contestants, key=CONTESTANTS.index)
        if count == 1 or name in ("plain", "captured")
    )
    record: dict[str, Any] = provenance("btc_train_bench") | {"method": METHOD, "rows": []}
    console = Console(highlight=False)
    with TemporaryDirectory(prefix="flashlab-") as folder:
        for number, cell in enumerate(cells, 1):
            with console.status(f"{number} of {len(cells)}: {cell.contestant}, {cell.devices} x {cell.batch_size}"):
                timed = steps if cell.contestant in ("captured", "bare") else -(-steps // 4)
                record["rows"].append(measure(cell, data, timed, Path(folder)))
                write_result(out, record)  # what was measured stays, whatever becomes of the next
    _print(console, record["rows"])
    console.print(f"wrote {out}", soft_wrap=True)
    if measured := [row for row in record["rows"] if row["status"] == "ok"]:
        with replacing(out.with_suffix(".png")) as partial:
            draw(measured).savefig(partial, format="png")
        console.print(f"wrote {out.with_suffix('.png')}", soft_wrap=True)
    return int(any(row["status"] == "failed" for row in record["rows"]))


def name_of(row: dict[str, Any]) -> str:
    """Name a row in a few words."""
    parts = [row["contestant"], row["config"], f"{row['devices']} x {row['batch_size']} windows"]
    return ", ".join(part for part in parts if part)


def efficiency(row: dict[str, Any], rows: list[dict[str, Any]]) -> float | None:
    """Return the speed on several GPUs over that of one, times as many, of the same loop with as many windows each."""
    same = ("contestant", "config", "batch_size")
    for alone in rows:
        if row["devices"] > 1 == alone["devices"] and all(row[name] == alone[name] for name in same):
            return row["bars_per_s"] / alone["bars_per_s"] / row["devices"]
    return None


def draw(rows: list[dict[str, Any]]) -> Figure:
    """Draw the time of a step of each loop, and the part of it in which the GPU worked."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.6 + 0.3 * len(rows)))
        axes = figure.subplots()
        places = range(len(rows))
        axes.barh(places, [row["ms_per_step"] for row in rows], color=NEUTRAL, label="the GPU waits")
        axes.barh(places, [row["busy_ms_per_step"] for row in rows], color=MODEL, label="the GPU works")
        for place, row in zip(places, rows, strict=True):
            speed = f" {row['ms_per_step']:.2f} ms, {row['bars_per_s'] / 1e6:.2f} M bars/s"
            axes.annotate(speed, (row["ms_per_step"], place), va="center")
        axes.set_yticks(places, [name_of(row) for row in rows])
        axes.invert_yaxis()
        axes.set_xlim(0, 1.6 * max(row["ms_per_step"] for row in rows))
        axes.set_xlabel("milliseconds a step")
        axes.grid(visible=False, axis="y")
        axes.legend(loc="lower right")
    return figure


def _print(console: Console, rows: list[dict[str, Any]]) -> None:
    table = Table("loop", "ms/step", "M bars/s", "efficiency", "GPU busy", "peak MiB", "kernels/step")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        if row["status"] != "ok":
            table.add_row(name_of(row), row["status"])
            continue
        on_gpu = row["peak_memory_mib"] is not None
        measured = [other for other in rows if other["status"] == "ok"]
        table.add_row(
            name_of(row),
            f"{row['ms_per_step']:.3f}",
            f"{row['bars_per_s'] / 1e6:.2f}",
            f"{share:.1%}" if (share := efficiency(row, measured)) else "",
            f"{row['busy_share']:.0%}" if on_gpu else "-",
            f"{row['peak_memory_mib']:,}" if on_gpu else "-",
            f"{row['kernels_per_step']}",
        )
    console.print(table)
    for row in rows:
        if row["status"] != "ok":
            console.print(f"{name_of(row)}: {row['reason']}", soft_wrap=True)
