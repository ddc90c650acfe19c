"""The pictures of a sweep's report.

A backend has one colour and one marker in all of them. The colours are Okabe and Ito's, which colour-blind readers tell
apart, and greys for the implementations in plain PyTorch.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator, PercentFormatter

from flashlab.bench.analysis import (
    PANEL,
    PASSES,
    UNFUSED,
    Sweep,
    block_fits,
    bounds,
    dense,
    digits,
    is_blocks,
    memory_per_sequence,
    panel_name,
    panels,
    wide,
)
from flashlab.report import NEUTRAL, STYLE, WIDTH

LOOKS = {  # backend -> colour, marker
    "standard": ("#333333", "o"),
    "tiled": ("#b0b0b0", "s"),
    "sdpa_math": ("#808080", "X"),
    "sdpa_efficient": ("#56b4e9", "v"),
    "sdpa_flash": ("#0072b2", "^"),
    "sdpa_cudnn": ("#009e73", "D"),
    "flash_attention_2": ("#e69f00", "o"),
    "flash_attention_3": ("#a6761d", ">"),
    "flash_attention_4": ("#d55e00", "<"),
    "flex_attention": ("#cc79a7", "h"),
}
UNKNOWN = ("#000000", ".")
ALGORITHMS = {"standard": "standard", "tiled": "tiled", "block_sparse": "flex_attention"}  # -> whose looks it borrows

Panels = dict[str, pd.DataFrame]  # title -> lengths x backends
Drawn = Figure | str  # a picture, or why there is none


def draw(sweep: Sweep) -> dict[str, Drawn]:
    """Draw every picture that the sweep has the numbers for.

    Returns:
        The figures by name; for each that cannot be drawn, a sentence that says why.
    """
    pictures: dict[str, Callable[[Sweep], Drawn]] = {}
    for name in ("forward", "forward_backward"):
        pictures[f"tflops_{name}"] = partial(tflops, name)
    for base in ("standard", "flash_attention_2"):
        for name in ("forward", "forward_backward"):
            pictures[f"speedup_over_{base}_{name}"] = partial(speedup, base, name)
    pictures |= {"memory": memory, "split": split, "roofline": roofline, "traffic": traffic, "blocks": blocks}
    with matplotlib.rc_context(STYLE):
        return {name: picture(sweep) for name, picture in pictures.items()}


def tflops(name: str, sweep: Sweep) -> Drawn:
    """Draw TFLOP/s of one pass against length, and crosses where memory ran out."""
    table = dense(wide(sweep, name, "tflops_per_s"))
    if table.empty:
        return f"no {PASSES[name]} pass was measured, but for block-sparse masks."
    figure, axes_of = _grid({panel_name(panel, sweep): part for panel, part in panels(table).items()})
    lost = sweep.rows[(sweep.rows["status"] == "oom") & (sweep.rows["pass"] == name)]
    for panel, part in lost.groupby(PANEL):
        if axes := axes_of.get(panel_name(panel, sweep)):
            for index, (backend, rows) in enumerate(part.groupby("backend")):
                color = LOOKS.get(str(backend), UNKNOWN)[0]
                height = 0.03 + 0.05 * index
                axes.plot(
                    rows["seqlen"], [height] * len(rows), "x", color=color, transform=axes.get_xaxis_transform(), ms=4
                )
    for axes in axes_of.values():
        axes.set_ylim(bottom=0)
    figure.supylabel("TFLOP/s", fontsize=9)
    _legend(figure, table.columns)
    return figure


def speedup(base: str, name: str, sweep: Sweep) -> Drawn:
    """Draw how many times as fast as one backend the others are, against length."""
    table = dense(wide(sweep, name))
    if base not in table:
        return f"no {PASSES[name]} pass of {base} was measured."
    if len(table.columns) == 1:
        return f"no backend but {base} was measured."
    slow = [*UNFUSED, "tiled"] if base not in UNFUSED else ["tiled"]
    ratio = table.rdiv(table[base], axis=0).dropna(subset=[base])
    ratio = ratio[[name for name in ratio if name == base or name not in slow] if len(ratio.columns) > 2 else [*ratio]]
    figure, axes_of = _grid({panel_name(panel, sweep): part for panel, part in panels(ratio).items()})
    for axes in axes_of.values():
        axes.axhline(1, color="#333333", lw=1, zorder=1)
        if base in UNFUSED:
            axes.set_yscale("log", base=2)
            axes.yaxis.set_major_locator(LogLocator(base=2, subs=(1.0,), numticks=12))
            axes.yaxis.set_minor_locator(NullLocator())
        else:
            axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    figure.supylabel(f"times as fast as {base}", fontsize=9)
    _legend(figure, ratio.columns)
    return figure


def memory(sweep: Sweep) -> Drawn:
    """Draw peak memory of one sequence against its length, beside a linear and a quadratic guide."""
    tables = {name: dense(memory_per_sequence(sweep, name)) for name in ("forward", "forward_backward")}
    tables = {name: table for name, table in tables.items() if not table.empty}
    if not tables:
        return "the sweep holds no peak memory, as on a CPU."
    panel = main_panel(*tables.values())
    parts = {PASSES[name]: panels(table)[panel] for name, table in tables.items() if panel in panels(table)}
    figure, axes_of = _grid(parts)
    for title, axes in axes_of.items():
        _log_axis(axes)
        lengths = np.array(parts[title].index[[0, -1]], dtype=float)
        shortest = parts[title].iloc[0]
        for power, start, label in ((1, 0.7 * shortest.min(), "linear"), (2, 1.4 * shortest.max(), "quadratic")):
            guide = start * (lengths / lengths[0]) ** power
            axes.plot(lengths, guide, ":", color=NEUTRAL, lw=1, zorder=1)
            middle = np.sqrt(lengths.prod()), np.sqrt(guide.prod())
            offset, side = ((4, -9), "left") if power == 1 else ((-4, 3), "right")
            axes.annotate(label, middle, offset, textcoords="offset points", ha=side, color="#555555", fontsize=8)
    figure.supxlabel(f"sequence length; {panel_name(panel, sweep)}", fontsize=9)
    figure.supylabel("peak memory of one sequence (MiB)", fontsize=9)
    _legend(figure, {str(backend) for part in parts.values() for backend in part})
    return figure


def split(sweep: Sweep) -> Drawn:
    """Draw the share of a training step's attention time that the forward pass takes, with the step's time."""
    if not {"forward", "forward_backward"} <= set(sweep.passes):
        return "the forward pass and both passes together have not both been measured."
    times = {name: panels(dense(wide(sweep, name))) for name in ("forward", "forward_backward")}
    parts = {}
    for panel, both in times["forward_backward"].items():
        if panel in times["forward"] and not both.empty:
            seqlen: Any = both.notna().sum(axis=1).iloc[::-1].idxmax()  # the longest of those that most backends ran
            if seqlen in times["forward"][panel].index:
                part = pd.DataFrame({"forward": times["forward"][panel].loc[seqlen], "both": both.loc[seqlen]}).dropna()
                if len(part):
                    parts[f"{panel_name(panel, sweep)}, at {_short(seqlen)}"] = part.loc[_order(part.index)]
    if not parts:
        return "no backend ran the forward pass and both passes at one length."
    columns = min(2, len(parts))
    rows = -(-len(parts) // columns)
    figure = Figure(figsize=(WIDTH, 0.7 + rows * (0.5 + 0.19 * max(map(len, parts.values())))))
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, (title, part) in zip(grid.flat, parts.items(), strict=False):
        heights = range(len(part))
        share = part["forward"] / part["both"]
        colors = [LOOKS.get(backend, UNKNOWN)[0] for backend in part.index]
        axes.barh(heights, share, color=colors, height=0.72)
        axes.barh(heights, 1 - share, left=share, color=colors, height=0.72, alpha=0.35)
        axes.axvline(1 / 3.5, color="#000000", lw=1, ls=":")
        for height, total in zip(heights, part["both"], strict=True):
            axes.text(1.02, height, f"{total:.3g} ms", va="center", fontsize=8)
        axes.set_yticks(heights, part.index, fontsize=8)
        axes.invert_yaxis()
        axes.set_xlim(0, 1)
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        axes.grid(visible=False)
        axes.set_title(title)
    for axes in grid.flat[len(parts) :]:
        axes.set_visible(False)
    figure.supxlabel(
        "share of the time: forward (full colour), backward (pale); dotted: the forward pass's share of FLOPs",
        fontsize=9,
    )
    return figure


def roofline(sweep: Sweep) -> Drawn:
    """Draw the rate of every forward pass over its arithmetic intensity, under the measured ceilings."""
    if sweep.ceilings is None:
        return "the sweep holds no measured ceilings."
    points = bounds(sweep).query("`pass` == 'forward'")
    points = points.loc[[not is_blocks(mask) for mask in points["mask"]]]
    if points.empty:
        return "no forward pass was measured."
    peak, bandwidth = sweep.ceilings
    ridge = 1e3 * peak / bandwidth
    edges = np.array([min(points["intensity"].min() / 1.6, ridge / 6), max(points["intensity"].max(), ridge) * 1.6])
    figure = Figure(figsize=(WIDTH, 4.6))
    axes = figure.subplots()
    for backend, part in points.groupby("backend"):
        color, marker = LOOKS.get(str(backend), UNKNOWN)
        axes.scatter(part["intensity"], part["tflops_per_s"], s=22, color=color, marker=marker, lw=0, alpha=0.8)
    roof = np.array([edges[0], ridge, edges[1]])
    axes.plot(roof, np.minimum(peak, roof * bandwidth / 1e3), color="#333333", lw=1.5, zorder=1)
    axes.set_xscale("log", base=2)
    _log_axis(axes)
    axes.set_xlim(*edges)
    axes.set_ylim(min(points["tflops_per_s"].min(), edges[0] * bandwidth / 1e3) / 1.5, 2.2 * peak)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.text(edges[1], 1.07 * peak, f"matrix products: {digits(peak)} TFLOP/s ", ha="right", va="bottom", fontsize=8)
    label_at = edges[0] ** 0.35 * ridge**0.65
    axes.annotate(
        f"copies: {digits(bandwidth)} GB/s",
        (label_at, label_at * bandwidth / 1e3),
        (-4, 4),
        textcoords="offset points",
        ha="right",
        fontsize=8,
    )
    axes.axvline(ridge, color=NEUTRAL, lw=1, ls=":")
    axes.text(ridge, axes.get_ylim()[0] * 1.1, f" {digits(ridge)} FLOP/byte", color="#555555", fontsize=8)
    axes.set_xlabel("arithmetic intensity of the algorithm (FLOP per byte through memory)")
    axes.set_ylabel("TFLOP/s, forward")
    _legend(figure, points["backend"].unique(), lines=False)
    return figure


def traffic(sweep: Sweep) -> Drawn:
    """Draw the bytes that each algorithm counted against length, over what theory says."""
    if sweep.traffic.empty:
        return "the sweep holds no counts of bytes."
    rows = sweep.traffic.assign(moved=sweep.traffic["bytes_read"] + sweep.traffic["bytes_written"])
    parts = {f"head dim {head_dim}": rows[rows["head_dim"] == head_dim] for head_dim in sorted(set(rows["head_dim"]))}
    figure = Figure(figsize=(WIDTH, 3.4))
    grid = figure.subplots(1, len(parts), squeeze=False, sharey=True)
    handles = {}
    for axes, (title, part) in zip(grid.flat, parts.items(), strict=True):
        key: Any
        tiled = part[part["algorithm"] == "tiled"].groupby("seqlen")["moved"].first()
        for key, line in part.sort_values("seqlen").groupby(["algorithm", "density"]):
            algorithm, density = key
            sparse = algorithm == "block_sparse"
            if sparse and (line["moved"] == line["seqlen"].map(tiled)).all():
                continue  # hidden under the points of tiled
            color = LOOKS.get(ALGORITHMS.get(algorithm, ""), UNKNOWN)[0]
            shade: Any = color if not sparse else _pale(color, 0.75 * (1 - density))
            label = f"block-sparse, {100 * density:.3g} % of blocks" if sparse else algorithm
            axes.plot(line["seqlen"], line["theory_bytes"] / 2**20, "-", color=shade, lw=1)
            (handles[label],) = axes.plot(line["seqlen"], line["moved"] / 2**20, "o", color=shade, ms=4)
        _log_axis(axes)
        _length_axis(axes, rows["seqlen"], every=1 if len(parts) < 3 else 2)
        axes.set_title(title)
    handles = {label: handles[label] for label in sorted(handles, key=lambda label: label.startswith("block"))}
    handles["theory"] = Line2D([], [], color=NEUTRAL, lw=1)
    grid[0, 0].set_ylabel("MiB read and written")
    figure.supxlabel("sequence length", fontsize=9)
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=3, fontsize=8)
    return figure


def blocks(sweep: Sweep) -> Drawn:
    """Draw the time of block-sparse attention over the share of blocks, as a share of the dense time."""
    fits = block_fits(sweep)
    if fits.empty:
        return "no backend ran three block-sparse masks or more at one length."
    longest = fits[fits["seqlen"] == fits.groupby(["backend", "pass", "head_dim"])["seqlen"].transform("max")]
    parts = {name: longest[longest["pass"] == name] for name in PASSES if (longest["pass"] == name).any()}
    figure = Figure(figsize=(WIDTH, 3.4))
    grid = figure.subplots(1, len(parts), squeeze=False, sharey=True)
    styles = dict(zip(sorted(longest["head_dim"].unique()), ["-", "--", ":", "-."] * 9, strict=False))
    handles: dict[str, Any] = {}
    for axes, (name, part) in zip(grid.flat, parts.items(), strict=True):
        axes.plot([0, 1], [0, 1], color="#333333", lw=0.8, zorder=1)
        for fit in part.to_dict("records"):
            color, marker = LOOKS.get(fit["backend"], UNKNOWN)
            points = fit["points"] / fit["dense_ms"]
            label = f"{fit['backend']}, head dim {fit['head_dim']}, length {_short(fit['seqlen'])}"
            (handles[label],) = axes.plot(
                points.index, points, color=color, marker=marker, ms=4, ls=styles[fit["head_dim"]]
            )
        axes.set_xlim(0, 1.03)
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        axes.set_title(PASSES[name])
    handles["proportional"] = Line2D([], [], color="#333333", lw=0.8)
    grid[0, 0].set_ylabel("time, in units of the dense time")
    figure.supxlabel("share of blocks that are computed", fontsize=9)
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=2, fontsize=8)
    return figure


def main_panel(*tables: pd.DataFrame) -> tuple[Any, ...]:
    """Choose the panel with the most measurements; of several, the first."""
    counts: dict[tuple[Any, ...], int] = {}
    for table in tables:
        for panel, part in panels(table).items():
            counts[panel] = counts.get(panel, 0) + int(part.notna().to_numpy().sum())
    return max(counts, key=counts.__getitem__)


def _grid(parts: Panels) -> tuple[Figure, dict[str, Axes]]:
    """Draw a panel for each table: its columns, backends, against its index, lengths."""
    columns = min(2, len(parts))
    lengths = {seqlen for part in parts.values() for seqlen in part.index}
    rows = -(-len(parts) // columns)
    figure = Figure(figsize=(WIDTH, 0.8 + (2.1 if rows > 1 else 2.8) * rows))
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axes, (title, part) in zip(grid.flat, parts.items(), strict=False):
        for backend in _order(part.columns):
            color, marker = LOOKS.get(backend, UNKNOWN)
            values = part[backend].dropna()
            axes.plot(values.index, values, color=color, marker=marker, ms=4.5, mew=0)
        _length_axis(axes, lengths)
        axes.set_title(title)
    for axes in grid.flat[len(parts) :]:
        axes.set_visible(False)
    figure.supxlabel("sequence length", fontsize=9)
    return figure, dict(zip(parts, grid.flat, strict=False))


def _length_axis(axes: Axes, lengths: Iterable[int], every: int = 1) -> None:
    axes.set_xscale("log", base=2)
    ticks = sorted(set(lengths))
    axes.set_xlim(ticks[0] / 1.15, ticks[-1] * 1.15)
    axes.xaxis.set_major_locator(FixedLocator(ticks[::every]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    axes.xaxis.set_minor_locator(NullLocator())


def _log_axis(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))


def _short(seqlen: float) -> str:
    """Print a length: 512, 2k, 16k."""
    return f"{seqlen / 1024:g}k" if seqlen >= 1024 and seqlen % 1024 == 0 else f"{seqlen:g}"


def _order(backends: Iterable[str]) -> list[str]:
    """Sort backends as the table of looks has them."""
    known = list(LOOKS)
    return sorted(backends, key=lambda backend: (known.index(backend) if backend in known else len(known), backend))


def _legend(figure: Figure, backends: Iterable[str], *, lines: bool = True) -> None:
    names = _order(set(backends))
    handles = []
    for name in names:
        color, marker = LOOKS.get(name, UNKNOWN)
        handles.append(Line2D([], [], color=color, marker=marker, ms=5, mew=0, ls="-" if lines else ""))
    figure.legend(handles, names, loc="outside upper center", ncols=-(-len(names) // -(-len(names) // 5)), fontsize=8)


def _pale(color: str, share: float) -> tuple[float, ...]:
    """Mix a colour with white."""
    return tuple(np.array(matplotlib.colors.to_rgb(color)) * (1 - share) + share)
