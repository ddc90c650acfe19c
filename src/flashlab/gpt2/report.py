"""Tables and the picture of docs/gpt2.md, from the result files that the scripts of examples/gpt2 write."""

import json
import sys
from itertools import compress, pairwise
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator
from rich.console import Console
from rich.markdown import Markdown

from flashlab.bench.analysis import describe_machine, read
from flashlab.bench.claims import markdown
from flashlab.bench.figures import LOOKS
from flashlab.report import NEUTRAL, STYLE, WIDTH, Table

THEIRS = {"eager": ":", "sdpa": "--"}  # attention of transformers -> line
Row = dict[str, Any]


def bench(*paths: Path) -> str:
    """Show how fast GPT-2 trains, from the figures of examples/gpt2/bench.py."""
    parts = []
    for path in paths:
        record = read(path, "gpt2_bench", "python examples/gpt2/bench.py")
        if (machine := f"{describe_machine(record)}.\n\n") not in parts:
            parts.append(machine)
        for preset in dict.fromkeys(row["preset"] for row in record["rows"]):
            rows = [row for row in record["rows"] if row["preset"] == preset]
            header: tuple[str, ...] = ("Length", "Attention", "tokens/s", "MFU", "ms a step", "MiB at most")
            lines = [(f"{row['block_size']:,}", name_of(row), *_speed(row)) for row in rows]
            for theirs in THEIRS:
                if any(row["backend"] == theirs for row in rows):
                    header = (*header, f"times {theirs}")
                    lines = [(*line, times(row, theirs, rows)) for line, row in zip(lines, rows, strict=True)]
            table = Table("", header, lines, "rl" + "r" * (len(header) - 2))
            parts.append(f"{preset}, {rows[0]['tokens_per_step']:,} tokens a step:\n\n{markdown(table)}")
    return "\n" + "".join(parts)


def name_of(row: Row) -> str:
    """Name what computed a row: a backend, with what auto chose, or Hugging Face's model."""
    if row["implementation"] == "transformers":
        return f"Hugging Face, {row['backend']}"
    chosen = (row.get("ran") or {}).get("backend", row["backend"])
    return f"`{row['backend']}`" if chosen == row["backend"] else f"`{row['backend']}`: `{chosen}`"


def times(row: Row, theirs: str, rows: list[Row]) -> str:
    """Say how many times as fast a row is as Hugging Face's model at the same length, if both were measured."""
    for other in rows:
        same = other["backend"] == theirs and all(other[name] == row[name] for name in ("preset", "block_size"))
        if same and row["status"] == other["status"] == "ok":
            return f"{row['tokens_per_s'] / other['tokens_per_s']:.2f}"
    return ""


def show(text: str) -> None:
    """Print a table: drawn in a terminal, and as Markdown, which is never cut, where something else reads it."""
    if sys.stdout.isatty():
        Console().print(Markdown(text))
    else:
        print(text)


def _speed(row: Row) -> tuple[str, ...]:
    if row["status"] != "ok":
        return row["status"], "", "", ""
    forms = {"tokens_per_s": ",", "mfu": ".1%", "ms_per_step": ".1f", "peak_memory_mib": ","}
    figures = ((row.get(name), form) for name, form in forms.items())
    return tuple(format(figure, form) if figure is not None else "" for figure, form in figures)


def draw(rows: list[Row]) -> Figure:
    """Draw tokens per second against the length of the sequences, a panel for each model."""
    measured = [row for row in rows if row["status"] == "ok"]
    presets = list(dict.fromkeys(row["preset"] for row in measured))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.2))
        for axes, preset in zip(figure.subplots(1, len(presets), squeeze=False)[0], presets, strict=True):
            lines: dict[tuple[str, str], list[Row]] = {}
            for row in measured:
                if row["preset"] == preset:
                    lines.setdefault((row["implementation"], row["backend"]), []).append(row)
            for (implementation, backend), points in lines.items():
                chosen = (points[0].get("ran") or {}).get("backend", backend)
                color, marker = LOOKS.get(chosen, (NEUTRAL, "."))
                lengths, speeds = zip(*((row["block_size"], row["tokens_per_s"]) for row in points), strict=True)
                style = THEIRS[backend] if implementation == "transformers" else "-"
                axes.plot(lengths, speeds, style, color=color, marker=marker, ms=4.5, label=name_of(points[0]))
            axes.set_xscale("log", base=2)
            axes.set_xticks(sorted({row["block_size"] for row in measured}))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1e3:,.0f} k"))
            axes.set_ylim(bottom=0)
            axes.set_title(preset)
            axes.set_xlabel("tokens in a sequence")
        figure.axes[0].set_ylabel("tokens/s")
        handles, names = figure.axes[0].get_legend_handles_labels()
        names = [name.replace("`", "") for name in names]
        figure.legend(handles, names, loc="outside upper center", ncols=3, fontsize=8)
    return figure


def ablation(path: Path) -> str:
    """Show what each component gains, from the figures of examples/gpt2/ablation.py."""
    record = read(path, "gpt2_ablation", "python examples/gpt2/ablation.py")
    rows = []
    for row in record["rows"]:
        slower, more = row.get("slower"), row.get("more_memory_mib")
        found = [f"{slower:+.1%}" if slower is not None else "", f"{more:+,}" if more is not None else ""]
        tokens, _mfu, ms, memory = _speed(row)
        rows.append((row["row"], ms, tokens, found[0], memory, found[1]))
    header = ("", "ms a step", "tokens/s", "slower by", "MiB at most", "more MiB")
    first = record["rows"][0]
    told = (
        f"{describe_machine(record)}. {record['preset']} at length {first['block_size']:,}, "
        f"{first['tokens_per_step']:,} tokens a step."
    )
    return f"\n{told}\n\n{markdown(Table('', header, rows, 'lrrrrr'))}"


def scaling(path: Path) -> str:
    """Show several GPUs beside one, from the figures of `examples/gpt2/experiments.py scaling`."""
    record = read(path, "gpt2_scaling", "python examples/gpt2/experiments.py scaling")
    rows: list[tuple[str, ...]] = []
    for row in record["rows"]:
        efficiency = row.get("efficiency")
        tokens, mfu, ms, held = _speed(row)
        in_use = [row.get(name) for name in ("peak_allocated_mib", "predicted_allocated_mib")]
        where = "processes on one GPU" if row.get("shared") else "GPUs" if row["devices"] > 1 else "GPU"
        name = f"{row['preset']}, {row['devices']} {where}" + (f", {row['strategy']}" if row["strategy"] else "")
        rows.append(
            (
                name,
                f"{row['tokens_per_step']:,}" if row["status"] == "ok" else "",
                ms,
                tokens,
                f"{efficiency:.1%}" if efficiency is not None else "",
                mfu,
                held,
                *(f"{memory:,}" if memory else "" for memory in in_use),
            )
        )
    header = ("", "tokens a step", "ms a step", "tokens/s", "of single GPUs", "MFU", "MiB held", "in use", "predicted")
    known = [any(column) for column in zip(*rows, strict=True)]
    header, *rows = (tuple(compress(cells, known)) for cells in (header, *rows))  # type: ignore[assignment]
    return f"\n{describe_machine(record)}.\n\n{markdown(Table('', header, rows, 'l' + 'r' * (len(header) - 1)))}"


def backends(path: Path) -> str:
    """Show how alike backends train, from the figures of `examples/gpt2/experiments.py backends`."""
    record = read(path, "gpt2_backends", "python examples/gpt2/experiments.py backends")
    rows = [
        (
            f"`{name}`" + (f", {how}" if how else ""),
            *(f"{row[key]:.4f}" for key in ("first_loss", "of_first_10", "largest_difference", "best_val_loss")),
        )
        for row in record["rows"]
        if row["status"] == "ok"
        for name, _, how in [row["backend"].partition(", ")]
    ]
    header = ("Attention", "first logged loss", "differs at first by", "at most by", "validation loss")
    absent = [
        f"`{row['backend']}` ({row['reason'].rpartition('cannot run this call: ')[2]})"
        for row in record["rows"]
        if row["status"] != "ok"
    ]
    told = f"Not measured: {'; '.join(absent)}.\n\n" if absent else ""
    return f"\n{describe_machine(record)}.\n\n{markdown(Table('', header, rows, 'lrrrr'))}{told}"


def runs(*paths: Path) -> str:
    """Show whole trainings, from the run.json that `flashlab gpt2 train` leaves in a run's folder."""
    rows = []
    for path in paths:
        record = json.loads(path.read_text())
        words, finished = record["command"], record["finished"]
        configs = [Path(value).name for word, value in pairwise(words) if word == "--config"]
        rows.append(
            (
                ", ".join(configs),
                f"{record['parameters']:,}",
                f"{finished['steps']:,}",
                f"{record['tokens_per_step']:,}",
                f"{finished['seconds']:.0f}",
                f"{finished['tokens_per_s']:,}",
                f"{finished['best_val_loss']:.4f}",
                describe_machine(record).partition(", driver")[0],
            )
        )
    header = ("", "parameters", "steps", "tokens a step", "seconds", "tokens/s", "validation loss", "on")
    return f"\n{markdown(Table('', header, rows, 'lrrrrrrl'))}"


def sampling(path: Path) -> str:
    """Show what the key-value cache gains, from the figures of examples/gpt2/sampling.py."""
    record = read(path, "gpt2_sampling", "python examples/gpt2/sampling.py")
    rows = [
        (
            row["dtype"],
            str(row["batch_size"]),
            f"{row['tokens_per_s']:,.0f}",
            f"{row['tokens_per_s_without_cache']:,.0f}",
            f"{row['times']:.1f}",
            f"{row['same_tokens']:.0%}",
        )
        for row in record["rows"]
    ]
    header = ("", "sequences", "tokens/s", "all positions anew", "times as fast", "same tokens")
    first = record["rows"][0]
    told = f"{describe_machine(record)}. {first['preset']}, {first['new_tokens']} tokens of each sequence."
    return f"\n{told}\n\n{markdown(Table('', header, rows, 'lrrrrr'))}"
