"""Say what a file of minute bars or a prepared set holds."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from flashlab.btc.bars import FEATURES, Bars, read_bars
from flashlab.errors import UserError, replacing

PLOT_FORMATS = (".png", ".svg", ".pdf")
LARGEST_GAPS = 5
MOST_POINTS = 2000  # along the time axis
BUCKETS = {
    "minute": 1,
    "10 minutes": 10,
    "hour": 60,
    "6 hours": 360,
    "day": 1440,
    "week": 7 * 1440,
    "year": 525_600,
}  # minutes
FAULTS = {
    "non_finite": "empty, NaN or infinite cells",
    "price_not_positive": "a price of 0 or less",
    "high_below_low": "high below low",
    "outside_range": "open or close outside low to high",
    "negative_volume": "negative volume",
    "duplicates": "a later row of the same minute",
}


def describe(source: Path, *, plot: Path | None = None) -> None:
    """Say what minute bars hold: time range, gaps, faulty rows, prices and volumes; and draw them.

    Args:
        source: a CSV (plain, .gz or .zip) or the folder of a prepared set.
        plot: picture to write, .png, .svg or .pdf; by default named after the source, in the current folder.
    """
    plot = plot or Path(f"{source.resolve().name}.png")
    if plot.suffix not in PLOT_FORMATS:
        raise UserError(f"--plot {plot}: expected a name that ends in {', '.join(PLOT_FORMATS)}")
    bars, cleaning = _open(source)
    observed = Bars(bars.minute[bars.observed], bars.values[bars.observed])
    console = Console(highlight=False)
    console.print(f"[bold]{escape(str(source))}[/]", soft_wrap=True)
    _print_rows(console, observed, cleaning)
    _print_gaps(console, observed)
    _print_features(console, observed)
    _print_calendar(console, observed)
    _draw(observed, plot, title=source.name)
    console.print(f"plot: {escape(str(plot))}", soft_wrap=True)


def _open(source: Path) -> tuple[Bars, Mapping[str, Any]]:
    """Read the bars and what cleaning did to them."""
    if (source / "manifest.json").is_file():
        from flashlab.btc.prepare import open_set

        prepared = open_set(source)
        return prepared.bars(), prepared.manifest["cleaning"]
    if source.is_dir():
        raise UserError(
            f"{source} is a folder without manifest.json, so not a prepared set; name a CSV file, or make the set with "
            f"`flashlab data prepare`"
        )
    bars, cleaning = read_bars([source])
    return bars, asdict(cleaning)


def _span(bars: Bars) -> int:
    """Count the minutes from the first bar to the last, both included."""
    return int(bars.minute[-1]) - int(bars.minute[0]) + 1


def _print_rows(console: Console, bars: Bars, cleaning: Mapping[str, Any]) -> None:
    first, last = (str(time).replace("T", " ") for time in bars.time[[0, -1]])
    span = _span(bars)
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_row("bars", f"{len(bars):,} of {cleaning['rows']:,} rows")
    table.add_row("time", f"{first} to {last} UTC ({span / 1440:,.1f} days)")
    table.add_row("missing minutes", f"{span - len(bars):,} ({1 - len(bars) / span:.1%})")
    table.add_row("without trades", f"{np.mean(bars.values[:, -1] == 0):.1%} of the bars have a volume of 0")
    dropped = [f"{cleaning[name]:,} with {fault}" for name, fault in FAULTS.items() if cleaning[name]]
    table.add_row("rows dropped", "\n".join(dropped) or "none")
    if cleaning["out_of_order"]:
        table.add_row("rows moved", f"{cleaning['out_of_order']:,} that came after a later one")
    console.print(table)


def _print_gaps(console: Console, bars: Bars) -> None:
    missing = np.diff(bars.minute) - 1
    gaps = np.flatnonzero(missing)
    if not len(gaps):
        return
    largest = gaps[np.argsort(-missing[gaps], kind="stable")][:LARGEST_GAPS]
    table = _table(f"{len(gaps):,} gaps; the largest", "missing from", "until", "minutes")
    for gap in largest:
        first, after = bars.time[gap] + 1, bars.time[gap + 1]
        table.add_row(str(first).replace("T", " "), str(after).replace("T", " "), f"{missing[gap]:,}")
    console.print(table)


def _print_features(console: Console, bars: Bars) -> None:
    table = _table("features", "", "least", "median", "mean", "most")
    for name, values in zip(FEATURES, bars.values.T, strict=True):
        figures = (values.min(), np.median(values), values.mean(dtype=np.float64), values.max())
        table.add_row(name, *(f"{figure:,.6g}" if abs(figure) < 1e4 else f"{figure:,.0f}" for figure in figures))
    console.print(table)


def _print_calendar(console: Console, bars: Bars) -> None:
    """Count bars by year, month or day, whichever gives a table of some lines."""
    days = _span(bars) / 1440
    unit, name = ("Y", "year") if days > 730 else ("M", "month") if days > 31 else ("D", "day")
    periods, counts = np.unique(bars.time.astype(f"datetime64[{unit}]"), return_counts=True)
    lengths = ((periods + 1).astype("datetime64[m]") - periods.astype("datetime64[m]")).astype(int)
    table = _table(f"bars by {name}", name, "bars", "of the minutes", "")
    for period, count, share in zip(periods, counts, counts / lengths, strict=True):
        table.add_row(str(period), f"{count:,}", f"{share:.1%}", "█" * round(20 * share))
    console.print(table)


def _table(title: str, *columns: str) -> Table:
    table = Table(box=None, title=f"\n{title}", title_justify="left", title_style="bold", padding=(0, 2, 0, 0))
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 or not column else "right")
    return table


def _draw(bars: Bars, path: Path, title: str) -> None:
    """Draw price, volume and coverage over time, and the daily rhythm of volume and volatility."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot
    from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    from flashlab.report import STYLE

    first, span = int(bars.minute[0]), _span(bars)
    bucket_name, minutes = next((name, size) for name, size in BUCKETS.items() if span <= size * MOST_POINTS)
    bucket = (bars.minute - first) // minutes
    starts = np.flatnonzero(np.diff(bucket, prepend=-1))
    counts = np.bincount(bucket)
    time = (first + np.arange(len(counts)) * minutes).astype("datetime64[m]")
    _, high, low, close, volume = bars.values.T

    def by_bucket(values: np.ndarray) -> np.ndarray:
        spread = np.full(len(counts), np.nan)  # NaN breaks the line where there is nothing
        spread[counts > 0] = values
        return spread

    with matplotlib.rc_context(STYLE):
        figure, (prices, volumes, coverage, rhythm) = pyplot.subplots(
            4, 1, figsize=(7, 8.5), gridspec_kw={"height_ratios": [3, 2, 1.4, 2]}
        )
        figure.suptitle(title, fontsize=10)
        lows, highs = np.minimum.reduceat(low, starts), np.maximum.reduceat(high, starts)
        closes = np.append(close[starts[1:] - 1], close[-1])
        prices.fill_between(time, by_bucket(lows), by_bucket(highs), color="#56b4e9", alpha=0.5, linewidth=0)
        prices.plot(time, by_bucket(closes), color="#0072b2", linewidth=0.8)
        prices.set_title(f"price by {bucket_name}: last close, and range from low to high")
        margin = max(closes.max() / closes.min(), 1.01) ** 0.1
        prices.set_ylim(closes.min() / margin, closes.max() * margin)  # a single trade far off must not set the scale
        means = np.add.reduceat(volume, starts, dtype=np.float64) / counts[counts > 0]
        volumes.plot(time, by_bucket(means), color="#009e73", linewidth=0.8)
        volumes.set_title(f"mean volume of a bar, by {bucket_name}")
        for axes, values in ((prices, closes), (volumes, means)):
            if values.max() > 5 * values.min():
                axes.set_yscale("log")
                axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        coverage.fill_between(time, np.minimum(counts / minutes, 1), step="post", color="#e69f00", linewidth=0)
        coverage.set(title=f"share of the minutes that have a bar, by {bucket_name}", ylim=(0, 1.05))
        for axes in (prices, volumes, coverage):
            axes.sharex(prices)
            axes.xaxis.set_major_locator(locator := AutoDateLocator())
            axes.xaxis.set_major_formatter(ConciseDateFormatter(locator))
        hour = bars.minute // 60 % 24
        hours = np.unique(hour)
        for values, label, color in ((volume, "volume", "#009e73"), (np.log(high / low), "range", "#0072b2")):
            by_hour = np.array([values[hour == each].mean(dtype=np.float64) for each in hours])
            rhythm.plot(hours, by_hour / max(values.mean(), 1e-30), marker="o", markersize=3, label=label, color=color)
        rhythm.set(
            title="mean volume and range of a bar by hour of the day (UTC); all hours: 1", xticks=range(0, 24, 3)
        )
        rhythm.legend()

        try:
            with replacing(path) as partial:
                figure.savefig(partial, format=path.suffix[1:])
        finally:
            pyplot.close(figure)
