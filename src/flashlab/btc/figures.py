"""The pictures of a report.

Colours are Okabe and Ito's, which colour-blind readers tell apart. Letters in shapes: M rows forecast, F features.
"""

from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.dates import DateFormatter, MinuteLocator
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, PercentFormatter, StrMethodFormatter
from numpy.typing import NDArray

from flashlab.btc.bars import FEATURES
from flashlab.btc.baselines import CLOSE, VOLUME
from flashlab.btc.metrics import BASIS_POINT, ROWS, TITLES, distinct_baselines, skill_in_words
from flashlab.report import NEUTRAL, STYLE, WIDTH

HIGH, LOW = FEATURES.index("high"), FEATURES.index("low")
BLOCK_MINUTES = 120
TRUTH, MODEL, LOST = "#4d4d4d", "#0072b2", "#b3261e"
BASELINES = {"persistence": "#e69f00", "last_close": "#009e73", "ar120": "#cc79a7"}

Floats = NDArray[np.floating]
Curves = dict[str, tuple[NDArray[np.int64], Floats]]  # TensorBoard tag -> steps and values
Blocks = dict[str, tuple[NDArray[np.datetime64], dict[str, Floats]]]  # title -> times [M] and forecasts [M, F]


def draw(
    metrics: dict[str, Any], minute: NDArray[np.int64], forecasts: dict[str, Floats], curves: Curves
) -> dict[str, Figure]:
    """Draw every picture of a report.

    Args:
        metrics: the content of `metrics.json`.
        minute: minutes since 1970 ``[M]`` of the rows forecast, in any order.
        forecasts: "truth", "model" and the baselines, each ``[M, F]`` in log units.
        curves: what training logged; without its losses there is no picture of them.

    Returns:
        The figures by name.
    """
    blocks = {
        title: (minute[rows].astype("datetime64[m]"), {name: values[rows] for name, values in forecasts.items()})
        for title, rows in choose_blocks(minute, forecasts["truth"]).items()
    }
    with matplotlib.rc_context(STYLE):
        figures = {"skill": skill(metrics), "errors": errors(metrics, forecasts), "together": together(blocks)}
        figures |= {feature: price(feature, blocks) for feature in FEATURES if feature != "volume"}
        figures["volume"] = volume(blocks)
        if {"train/loss", "val/loss"} & curves.keys():
            figures["losses"] = losses(curves)
    return figures


def choose_blocks(minute: NDArray[np.int64], truth: Floats) -> dict[str, NDArray[np.intp]]:
    """Choose two hours of a median and two of the most volatile time: by a rule and not by eye.

    Time is cut into blocks of two hours; those are left out that hold less than nine tenths of the minutes of the
    fullest. Volatility is the sum of the squared log ranges from low to high.

    Returns:
        The rows of each block, in time order.
    """
    distinct, rows = np.unique(minute, return_index=True)
    _, block, sizes = np.unique(distinct // BLOCK_MINUTES, return_inverse=True, return_counts=True)
    volatility = np.bincount(block, weights=(truth[rows, HIGH] - truth[rows, LOW]) ** 2)
    full = np.flatnonzero(sizes >= 0.9 * sizes.max())
    ranked = full[np.argsort(volatility[full], kind="stable")]
    chosen = {"Median": ranked[(len(ranked) - 1) // 2], "Most volatile": ranked[-1]}
    return {title: rows[block == number] for title, number in chosen.items()}


def skill(metrics: dict[str, Any]) -> Figure:
    """Draw the skill against each baseline with two standard errors to each side."""
    lines = [(row, names[0]) for row in ROWS for names in distinct_baselines(metrics, row)]
    figure = Figure(figsize=(WIDTH, 0.9 + 0.27 * len(lines)))
    axes = figure.subplots()
    values = [metrics["skill"][name][row]["skill"] for row, name in lines]
    left = max(-1.0, min([-0.1, *(1.15 * value for value in values if value is not None)]))
    axes.axvspan(left, 0, color="#f3e3e0", lw=0, zorder=0)
    axes.axvline(0, color=TRUTH, lw=1)
    for height, ((row, name), value) in enumerate(zip(lines, values, strict=True)):
        result = metrics["skill"][name][row]
        color = BASELINES.get(name, TRUTH)
        if value is None or value < left:
            axes.plot(left, height, marker="<", color=color, clip_on=False)
        else:
            reach = 2 * (result["standard_error"] or 0)
            axes.errorbar(value, height, xerr=reach, fmt="o", ms=5, capsize=3, color=color)
        style: Any = {"color": LOST, "weight": "bold"} if result["verdict"] == "loses" else {}
        axes.text(1.03, height, skill_in_words(result), va="center", transform=axes.get_yaxis_transform(), **style)
        if height and lines[height - 1][0] != row:
            axes.axhline(height - 0.5, color="#e6e6e6", lw=0.6)
    axes.set_yticks(range(len(lines)), [f"{row.capitalize()} vs {TITLES.get(name, name)}" for row, name in lines])
    axes.set_ylim(len(lines) - 0.4, -0.6)
    axes.set_xlim(left, 1)
    axes.grid(visible=False, axis="y")
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlabel("RMSE saved against the baseline (bars: two standard errors; shaded: worse than the baseline)")
    return figure


def errors(metrics: dict[str, Any], forecasts: dict[str, Floats]) -> Figure:
    """Draw how the errors of the model and of the best baseline are spread, with a normal distribution for scale."""
    figure = Figure(figsize=(WIDTH, 4.4))
    *panels, key = figure.subplots(2, 3).flat
    legend = {}
    for index, (axes, feature) in enumerate(zip(panels, FEATURES, strict=True)):
        mse = {name: metrics["scores"][name][feature]["mse"] for name in metrics["skill"]}
        best = min(mse, key=mse.__getitem__)
        wrong = {name: forecasts[name][:, index] - forecasts["truth"][:, index] for name in (best, "model")}
        edge = max(1e-9, *(np.quantile(np.abs(values), 0.999) for values in wrong.values()))
        bins = np.linspace(-edge, edge, 82)
        for name, values in wrong.items():  # the baseline broad and below, for the two are often hard to tell apart
            color, width = (MODEL, 1.0) if name == "model" else (BASELINES.get(name, TRUTH), 2.6)
            share = np.histogram(values, bins)[0] / len(values)
            legend[TITLES.get(name, name)] = axes.stairs(share, bins, color=color, lw=width, baseline=None)
        spread, middle = wrong["model"].std() or edge, (bins[1:] + bins[:-1]) / 2
        normal = np.exp(-((middle / spread) ** 2) / 2) / (spread * np.sqrt(2 * np.pi)) * np.diff(bins)
        (line,) = axes.plot(middle, normal, color=NEUTRAL, lw=1, ls=":")
        axes.set_yscale("log")
        axes.set_ylim(0.5 / len(wrong["model"]), 1)
        axes.set_title(feature.capitalize())
        if index == VOLUME:
            factors = [factor for factor in (1 / 100, 1 / 10, 1 / 3, 1, 3, 10, 100) if abs(np.log(factor)) <= edge]
            axes.set_xticks(np.log(factors), [f"{x:.0f}" if x >= 1 else f"1/{1 / x:.0f}" for x in factors])
            axes.set_xlabel("(1 + forecast) / (1 + truth)")
        else:
            axes.xaxis.set_major_formatter(lambda x, _: f"{x / BASIS_POINT:g}")
            axes.set_xlabel("forecast - truth (bp)")
    for axes in figure.axes[::3]:
        axes.set_ylabel("share of bars in a bin")
    legend = {"model": legend.pop("model")} | legend | {"normal distribution with\nthe model's spread": line}
    key.axis("off")
    key.legend(legend.values(), legend.keys(), loc="center")
    return figure


def together(blocks: Blocks) -> Figure:
    """Draw all five features at once: each bar from low to high, the range forecast for it, and the volume below."""
    figure = Figure(figsize=(WIDTH, 4.6))
    grid = figure.subplots(2, 2, sharex="col", height_ratios=(5, 2))
    for (prices, volumes), (title, (time, forecasts)) in zip(grid.T, blocks.items(), strict=True):
        truth, model = np.exp(forecasts["truth"]), np.exp(forecasts["model"])
        prices.vlines(time, truth[:, LOW], truth[:, HIGH], color=TRUTH, lw=0.9, label="truth: low to high")
        prices.plot(time, truth[:, CLOSE], color=TRUTH, ls="", marker=".", ms=3, label="truth: close")
        low, high = model[:, LOW], model[:, HIGH]
        prices.fill_between(time, low, high, color=MODEL, alpha=0.25, lw=0, label="model: low to high")
        prices.plot(time, model[:, CLOSE], color=MODEL, lw=0.9, label="model: close")
        volumes.vlines(time, 0, forecasts["truth"][:, VOLUME], color=TRUTH, lw=0.9)
        volumes.plot(time, forecasts["model"][:, VOLUME], color=MODEL)
        prices.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        _volume_axis(volumes)
        _time_axis(prices, volumes, title, time)
    grid[0, 0].set_ylabel("price (USD)")
    grid[1, 0].set_ylabel("volume (BTC)")
    _legend(figure, grid[0, 0])
    return figure


def price(feature: str, blocks: Blocks) -> Figure:
    """Draw forecasts of a price against the truth: the level, and below it the move from the last close."""
    index = FEATURES.index(feature)
    figure = Figure(figsize=(WIDTH, 4.2))
    grid = figure.subplots(2, 2, sharex="col", height_ratios=(3, 2))
    for (level, move), (title, (time, forecasts)) in zip(grid.T, blocks.items(), strict=True):
        last_close = forecasts["persistence"][:, CLOSE]
        for axes, scaled in (
            (level, lambda values: np.exp(values)),
            (move, lambda values, last_close=last_close: (values - last_close) / BASIS_POINT),
        ):
            axes.plot(time, scaled(forecasts["truth"][:, index]), color=TRUTH, marker=".", ms=3, lw=0.5, label="truth")
            axes.plot(time, scaled(forecasts["model"][:, index]), color=MODEL, label="model")
        move.axhline(0, color=BASELINES["last_close"], ls="--", lw=1, label="last close")
        _time_axis(level, move, title, time)
        level.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    grid[0, 0].set_ylabel(f"{feature} (USD)")
    grid[1, 0].set_ylabel("move from the\nlast close (bp)")
    _legend(figure, grid[1, 0])
    return figure


def volume(blocks: Blocks) -> Figure:
    """Draw forecasts of the volume against the truth."""
    figure = Figure(figsize=(WIDTH, 2.8))
    panels = figure.subplots(1, 2)
    for axes, (title, (time, forecasts)) in zip(panels, blocks.items(), strict=True):
        axes.plot(time, forecasts["truth"][:, VOLUME], color=TRUTH, marker=".", ms=3, lw=0.5, label="truth")
        axes.plot(time, forecasts["model"][:, VOLUME], color=MODEL, label="model")
        if "ar120" in forecasts:
            axes.plot(time, forecasts["ar120"][:, VOLUME], color=BASELINES["ar120"], lw=1, ls="--", label="AR(120)")
        _volume_axis(axes)
        _time_axis(axes, axes, title, time)
    panels[0].set_ylabel("volume (BTC)")
    _legend(figure, panels[0])
    return figure


def losses(curves: Curves) -> Figure:
    """Draw the losses over the optimiser's steps, and the learning rate below."""
    figure = Figure(figsize=(WIDTH, 3.8))
    loss, rate = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    lowest, highest = np.inf, 0.0
    for tag, label, color in (("train/loss", "training", MODEL), ("val/loss", "validation", BASELINES["persistence"])):
        if tag not in curves:
            continue
        steps, values = curves[tag]
        if len(values) > 300:  # single batches scatter: a moving average of a hundredth of the run is what one reads
            loss.plot(steps, values, color=color, lw=0.5, alpha=0.3)
            span = len(values) // 100
            steps, values = steps[span - 1 :], np.convolve(values, np.full(span, 1 / span), mode="valid")
        loss.plot(steps, values, color=color, marker="." if len(values) < 100 else "", label=label)
        if tag == "val/loss":
            best = int(np.argmin(values))
            loss.plot(steps[best], values[best], "o", ms=8, mfc="none", color=TRUTH, label=f"best: {values[best]:.4g}")
        lowest, highest = min(lowest, values.min()), max(highest, values.max())
    if 0 < lowest < highest / 5:
        loss.set_yscale("log")
        loss.yaxis.set_major_locator(LogLocator(subs=[1, 2, 3, 5]))
        loss.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        loss.yaxis.set_minor_locator(NullLocator())
    loss.set_ylabel("loss")
    loss.legend(loc="upper right")
    if "train/lr" in curves:
        rate.plot(*curves["train/lr"], color=NEUTRAL)
    rate.set_ylim(bottom=0)
    rate.set_ylabel("learning rate")
    rate.set_xlabel("step")
    rate.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    return figure


def _time_axis(top: Axes, bottom: Axes, title: str, time: NDArray[np.datetime64]) -> None:
    top.set_title(f"{title} two hours: {time[0].item():%d %B %Y}")
    bottom.xaxis.set_major_locator(MinuteLocator([0, 30]))
    bottom.xaxis.set_major_formatter(DateFormatter("%H:%M"))
    bottom.set_xlabel("time (UTC)")


def _volume_axis(axes: Axes) -> None:
    """Label log1p of volume with the volumes themselves."""
    top = axes.get_ylim()[1]
    ticks = [0, 1, 10, 100, 1_000, 10_000] if top > np.log1p(10) else [0, 0.1, 0.3, 1, 3, 10]
    ticks = [tick for tick in ticks if np.log1p(tick) <= top]
    axes.set_yticks(np.log1p(ticks), [f"{tick:,g}" for tick in ticks])
    axes.set_ylim(0, top)


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
