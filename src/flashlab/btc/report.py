"""The report of a run: what its forecasts are worth, in words, tables and pictures.

The words come from report_content.py and the pictures from figures.py.
"""

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table as ConsoleTable

from flashlab.btc.bars import FEATURES
from flashlab.btc.metrics import COMPARISONS, comparisons, load_metrics, other_data, time_range, verdicts
from flashlab.btc.report_content import sections
from flashlab.errors import UserError
from flashlab.report import VERDICT_STYLES, write_report

Forecasts = dict[str, NDArray[np.floating]]
Curves = dict[str, tuple[NDArray[np.int64], NDArray[np.floating]]]


def report(run: Path) -> None:
    """Draw and write the report of an evaluated run: report.html, report.md and images/ in its folder.

    Args:
        run: folder of the run.
    """
    for name in ("metrics.json", "forecasts.npz"):
        if not (run / name).is_file():
            raise UserError(f"{run} has no {name}: run `flashlab evaluate {run}` first")
    from flashlab.btc import figures  # `evaluate` prints a summary from here, and needs no matplotlib

    metrics = load_metrics(run / "metrics.json")
    minute, forecasts = load_forecasts(run / "forecasts.npz", metrics)
    drawn = figures.draw(metrics, minute, forecasts, read_curves(run))
    write_report(run, f"Bitcoin minute bars: {run.resolve().name}", sections(metrics, set(drawn)), drawn)


def load_forecasts(path: Path, metrics: dict[str, Any]) -> tuple[NDArray[np.int64], Forecasts]:
    """Read what `flashlab evaluate` kept: minutes ``[M]``, then the truth and every forecast ``[M, F]`` in log units.

    Raises:
        UserError: the file is damaged, or is of another evaluation than the metrics.
    """
    remedy = f"run `flashlab evaluate {path.parent}` again"
    try:
        with np.load(path, allow_pickle=False) as arrays:
            minute, forecasts = arrays["minute"], {name: arrays[name] for name in ("truth", *metrics["scores"])}
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path} is damaged ({error}): {remedy}") from None
    if any(values.shape != (metrics["rows"], len(FEATURES)) for values in forecasts.values()):
        raise UserError(f"{path} and metrics.json are of different evaluations: {remedy}")
    return minute, forecasts


def read_curves(run: Path) -> Curves:
    """Read what training logged to TensorBoard, over all the times it was resumed.

    Returns:
        Steps (the first is 1, where Lightning logs 0) and finite values of each tag; empty without a log.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    curves: dict[str, dict[int, float]] = {}
    for folder in sorted({path.parent for path in run.rglob("events.out.tfevents.*")}):
        log = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
        for tag in log.Tags()["scalars"]:
            points = {event.step + 1: event.value for event in log.Scalars(tag) if np.isfinite(event.value)}
            if points:
                curves.setdefault(tag, {}).update(points)
    return {
        tag: (np.array(sorted(points)), np.array([points[step] for step in sorted(points)]))
        for tag, points in curves.items()
    }


def print_summary(metrics: dict[str, Any]) -> None:
    """Print errors, skills and what the model loses to the terminal."""
    table = ConsoleTable(*COMPARISONS, box=SIMPLE, pad_edge=False)
    for *cells, skill in comparisons(metrics):
        table.add_row(*cells, f"[{VERDICT_STYLES[skill.split()[-1]]}]{skill}[/]")
    for index in (1, 3, 4):
        table.columns[index].justify, table.columns[index].no_wrap = "right", True
    console = Console(highlight=False)
    for line in (f"{metrics['rows']:,} bars, {time_range(metrics)}", *other_data(metrics)):
        console.print(line, soft_wrap=True)
    console.print(table)
    for verdict, line in verdicts(metrics):
        if verdict == "loses":
            console.print(line, style=VERDICT_STYLES[verdict])
