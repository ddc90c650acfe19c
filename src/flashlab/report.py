"""`flashlab report`: finds out what a path holds, and hands it to the part of the package that reports on it.

Both parts say what they have to say in the blocks below, and `write_report` renders them: report.html, which holds its
pictures, and report.md, which links to them, are the same words, tables and pictures.
"""

import base64
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, ClassVar

import jinja2

from flashlab.errors import UserError, writing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The file that says what a folder holds: what reports on it, and the command that writes the file.
REPORTS = {
    "metrics.json": ("flashlab.btc.report:report", "flashlab evaluate {path}"),
    "sweep.json": ("flashlab.bench.report:report", "flashlab bench sweep"),
}

VERDICT_STYLES = {"wins": "green", "loses": "bold red", "ties": "dim", "undecided": "dim"}  # of rich

WIDTH = 7.0  # inches of a figure; not more, so that letters stay readable when a phone scales the picture down
NEUTRAL = "#888888"
STYLE: Any = {  # of matplotlib
    "figure.dpi": 144,
    "figure.constrained_layout.use": True,
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": NEUTRAL,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "legend.frameon": False,
    "lines.linewidth": 1.2,
}


@dataclass(frozen=True)
class Text:
    kind: ClassVar = "text"
    text: str


@dataclass(frozen=True)
class Verdicts:
    kind: ClassVar = "verdicts"
    lines: list[tuple[str, str]]  # verdict, or "" for none, and sentence


@dataclass(frozen=True)
class Table:
    kind: ClassVar = "table"
    caption: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    align: str  # a letter a column: l or r


@dataclass(frozen=True)
class Picture:
    kind: ClassVar = "picture"
    name: str
    caption: str


@dataclass(frozen=True)
class Section:
    title: str
    blocks: list[Text | Verdicts | Table | Picture]


def report(path: Path) -> None:
    """Draw and write a report: report.html, report.md and images/ beside what it reports on.

    Args:
        path: folder of an evaluated run (metrics.json), or folder or file of an attention sweep (sweep.json).

    Raises:
        UserError: the path holds neither, or what it holds is damaged.
    """
    if not path.exists():
        raise UserError(f"{path}: there is no such file or folder; check the path")
    folder = path.parent if path.name in REPORTS and path.is_file() else path
    name = "sweep.json" if folder.is_file() else next((name for name in REPORTS if (folder / name).is_file()), None)
    if name is None:
        if (folder / "run.json").is_file() and "tokens_per_step" in (folder / "run.json").read_text(errors="replace"):
            raise UserError(
                f"{path} is a run of `flashlab gpt2 train`, which has no report: `make tensorboard` shows its curves, "
                f"`flashlab gpt2 sample {path}` what it learned"
            )
        lacks = (f"no {name}: run `{command.format(path=path)}` first" for name, (_, command) in REPORTS.items())
        raise UserError(f"{path} has {', and '.join(lacks)}")
    module, function = REPORTS[name][0].split(":")
    getattr(import_module(module), function)(folder)


def write_report(folder: Path, title: str, content: list[Section], figures: "dict[str, Figure]") -> None:
    """Write report.html, report.md and images/ into a folder: all of them, or nothing.

    Args:
        folder: where the report goes; it exists.
        title: heading of the page.
        content: what the page says; its pictures are named in `figures`.
        figures: the pictures by name.
    """
    with writing(folder / "report.html"), TemporaryDirectory(prefix=".report-", dir=folder) as partial:
        images = _write_images(Path(partial) / "images", figures)
        _render(Path(partial), title, content, images)
        (folder / "images").mkdir(exist_ok=True)
        for path in sorted(path for path in Path(partial).rglob("*") if path.is_file()):  # a full disk stops no rename
            path.replace(folder / path.relative_to(partial))
    print(f"wrote {folder / 'report.html'}, {folder / 'report.md'} and {folder / 'images'}")


def flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Turn nested settings into the rows of a table."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", f"{value:.4g}" if isinstance(value, float) else str(value)


def _write_images(folder: Path, figures: "dict[str, Figure]") -> dict[str, bytes]:
    """Draw the pictures into a folder and return them by name."""
    from PIL import Image  # matplotlib's own dependency

    folder.mkdir()
    images = {}
    for name, figure in figures.items():
        figure.savefig(drawn := io.BytesIO())
        # 128 colours are a third of the bytes, and the eye sees no difference.
        Image.open(drawn).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(
            folder / f"{name}.png", optimize=True
        )
        images[name] = (folder / f"{name}.png").read_bytes()
    return images


def _render(folder: Path, title: str, content: list[Section], images: dict[str, bytes]) -> None:
    """Write report.html, which holds its pictures, and report.md, which links to them."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("flashlab", ""),
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
