"""`flashlab report`: what a run's forecasts are worth, in words, tables and pictures.

The words come from report_content.py and the pictures from figures.py; report.html.jinja and report.md.jinja render the
same of both.
"""

import base64
import io
import re
import zipfile
import zlib
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jinja2
import numpy as np
from numpy.typing import NDArray
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table as ConsoleTable

from flashlab.btc.bars import FEATURES
from flashlab.btc.metrics import COMPARISONS, comparisons, load_metrics, time_range, verdicts
from flashlab.btc.report_content import Section, sections
from flashlab.errors import UserError, writing

VERDICT_STYLES = {"wins": "green", "loses": "bold red", "ties": "dim", "undecided": "dim"}

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
    metrics = load_metrics(run / "metrics.json")
    minute, forecasts = load_forecasts(run / "forecasts.npz", metrics)
    curves = read_curves(run)
    with writing(run / "report.html"), TemporaryDirectory(prefix=".report-", dir=run) as folder:
        images = write_images(Path(folder) / "images", metrics, minute, forecasts, curves)
        render(Path(folder), f"Bitcoin minute bars: {run.resolve().name}", sections(metrics, set(images)), images)
        (run / "images").mkdir(exist_ok=True)
        for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):  # a full disk stops no rename
            path.replace(run / path.relative_to(folder))
    print(f"wrote {run / 'report.html'}, {run / 'report.md'} and {run / 'images'}")


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
        Steps and finite values of each tag; empty without a log.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    curves: dict[str, dict[int, float]] = {}
    for folder in sorted({path.parent for path in run.rglob("events.out.tfevents.*")}):
        log = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
        for tag in log.Tags()["scalars"]:
            points = {event.step: event.value for event in log.Scalars(tag) if np.isfinite(event.value)}
            if points:
                curves.setdefault(tag, {}).update(points)
    return {
        tag: (np.array(sorted(points)), np.array([points[step] for step in sorted(points)]))
        for tag, points in curves.items()
    }


def write_images(
    folder: Path, metrics: dict[str, Any], minute: NDArray[np.int64], forecasts: Forecasts, curves: Curves
) -> dict[str, bytes]:
    """Draw the pictures into a folder and return them by name."""
    from PIL import Image  # matplotlib's own dependency

    from flashlab.btc import figures

    folder.mkdir()
    images = {}
    for name, figure in figures.draw(metrics, minute, forecasts, curves).items():
        figure.savefig(drawn := io.BytesIO())
        # 128 colours are a third of the bytes, and the eye sees no difference.
        Image.open(drawn).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(
            folder / f"{name}.png", optimize=True
        )
        images[name] = (folder / f"{name}.png").read_bytes()
    return images


def render(folder: Path, title: str, content: list[Section], images: dict[str, bytes]) -> None:
    """Write report.html, which holds its pictures, and report.md, which links to them."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("flashlab.btc", ""),
        autoescape=lambda template: template is not None and template.startswith("report.html"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["md"] = lambda text: re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", text)
    environment.filters["verdict"] = lambda cell: next((word for word in VERDICT_STYLES if cell.endswith(word)), "")
    inlined = {name: base64.b64encode(image).decode() for name, image in images.items()}
    for name in ("report.html", "report.md"):
        text = environment.get_template(f"{name}.jinja").render(title=title, sections=content, images=inlined)
        (folder / name).write_text(text, encoding="utf-8")


def print_summary(metrics: dict[str, Any]) -> None:
    """Print errors, skills and what the model loses to the terminal."""
    table = ConsoleTable(*COMPARISONS, box=SIMPLE, pad_edge=False)
    for *cells, skill in comparisons(metrics):
        table.add_row(*cells, f"[{VERDICT_STYLES[skill.split()[-1]]}]{skill}[/]")
    for index in (1, 3, 4):
        table.columns[index].justify, table.columns[index].no_wrap = "right", True
    console = Console(highlight=False)
    console.print(f"{metrics['rows']:,} bars, {time_range(metrics)}")
    console.print(table)
    for verdict, line in verdicts(metrics):
        if verdict == "loses":
            console.print(line, style=VERDICT_STYLES[verdict])
