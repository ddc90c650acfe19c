"""The report of a sweep: pictures and tables of what was measured, and words that follow from the numbers.

The pictures come from figures.py, the numbers from analysis.py. Every sentence below is put together from them.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from flashlab.bench.analysis import (
    PANEL,
    PASSES,
    UNFUSED,
    Sweep,
    auto_choices,
    block_fits,
    bounds,
    crossings,
    dense,
    describe_machine,
    digits,
    exponents,
    load,
    lost_cells,
    mask_order,
    panel_name,
    panels,
    wide,
)
from flashlab.report import Picture, Section, Table, Text, Verdicts, flatten, write_report

AUTO_REACHES = 0.97  # of the best backend's speed, in every cell
LINEAR = 0.1  # how far a memory exponent may lie from 1, and a block-sparse line's start from 0
STRAIGHT_R2 = 0.98
NOISY = 2.0  # p90 / p10 of the calls of one cell, where the machine did something else meanwhile ...
NOISY_SHARE = 0.05  # ... and the share of such cells that says so of the whole sweep

Block = Text | Verdicts | Table | Picture
Show = Callable[[str, str], Block]  # name and caption of a picture -> the picture, or why there is none


def report(path: Path) -> None:
    """Draw and write the report of a sweep beside its file: report.html, report.md and images/.

    Args:
        path: the sweep's folder, or its file.

    Raises:
        UserError: the file is missing, damaged or of something else.
    """
    file = path / "sweep.json" if path.is_dir() else path
    sweep = load(file)
    from flashlab.bench import figures  # here, since matplotlib takes long to import

    drawn = figures.draw(sweep)
    pictures = {name: figure for name, figure in drawn.items() if not isinstance(figure, str)}

    def show(name: str, caption: str) -> Block:
        reason = drawn[name]
        return Text(f"No picture here: {reason}") if isinstance(reason, str) else Picture(name, caption)

    machine = describe_machine(sweep.record).split(",")[0]
    write_report(file.parent, f"Attention on {machine}", sections(sweep, show), pictures)


def sections(sweep: Sweep, show: Show) -> list[Section]:
    """Say what the numbers mean."""
    if sweep.ok.empty:
        return [
            Section("In short", [Text(_measured(sweep)), Text("Nothing could be measured.")]),
            Section("What did not run", _lost(sweep)),
            _run(sweep),
        ]
    return [
        Section("In short", [Text(_measured(sweep)), Verdicts(summary(sweep))]),
        Section("Speed", _speed(sweep, show)),
        Section("Speed-up", _speedup(sweep, show)),
        Section("Where one overtakes another", _overtaking(sweep)),
        Section("Memory", _memory(sweep, show)),
        Section("Forward and backward", _split(sweep, show)),
        Section("What bounds the speed", _roofline(sweep, show)),
        Section("Bytes moved", _traffic(sweep, show)),
        Section("Block-sparse attention", _blocks(sweep, show)),
        Section("What auto chose", _auto(sweep)),
        Section("What did not run", _lost(sweep)),
        _run(sweep),
    ]


def summary(sweep: Sweep) -> list[tuple[str, str]]:
    """Put the sweep into a few sentences, each with a verdict: "loses" for what is not as it should be."""
    said = [_fastest(sweep, name) for name in sweep.passes]
    said += [
        _gain(sweep, "standard"),
        _gain(sweep, "flash_attention_2"),
        _bound(sweep),
        _growth(sweep),
        *_linear(sweep),
    ]
    lines = [("", line) for line in said if line]
    if warning := _noise(sweep):
        lines.insert(0, ("loses", warning))
    if line := _auto_line(sweep):
        lines.append(line)
    wrong = sweep.rows[sweep.rows["status"] == "wrong"]
    if len(wrong):
        counts = ", ".join(f"{backend} {count}" for backend, count in Counter(wrong["backend"]).most_common())
        lines.append(("loses", f"Cells with wrong results, which were not timed: {counts}."))
    return lines


def _noise(sweep: Sweep) -> str | None:
    """Warn where calls of one cell took times that differ too much for a quiet machine."""
    spread = sweep.ok["latency_ms_p90"] / sweep.ok["latency_ms_p10"]
    noisy = (spread >= NOISY).sum()
    if noisy <= NOISY_SHARE * len(spread):
        return None
    return (
        f"The machine was not quiet: in {noisy} of {len(spread)} cells the slowest tenth of the calls took {NOISY:g} "
        f"times as long as the fastest tenth, or more (at most {spread.max():.3g} times). Measure anew when it is idle."
    )


def fastest_table(sweep: Sweep, name: str) -> Table:
    """Set the fastest backend of each cell of one pass beside its TFLOP/s."""
    latency, rate = panels(dense(wide(sweep, name))), panels(dense(wide(sweep, name, "tflops_per_s")))
    lengths = sorted({seqlen for part in latency.values() for seqlen in part.index})
    rows = []
    for panel, part in latency.items():
        rates: Any = rate[panel]
        fastest: Any = part.idxmin(axis=1)
        cells = {at: f"{rates.at[at, backend]:.3g} {short(backend)}" for at, backend in fastest.items()}
        rows.append((panel_name(panel, sweep), *(cells.get(seqlen, "-") for seqlen in lengths)))
    header = (PASSES[name].capitalize(), *(f"{seqlen:,}" for seqlen in lengths))
    return Table("", header, rows, "l" + "r" * len(lengths))


def short(backend: str) -> str:
    """Print a backend where there is little room."""
    return backend.replace("flash_attention_", "FA").removeprefix("sdpa_").replace("flex_attention", "flex")


def _measured(sweep: Sweep) -> str:
    counts = Counter(sweep.rows["status"])
    listed = ", ".join(f"{count:,} {status}" for status, count in counts.most_common())
    return f"{len(sweep.rows):,} cells on {describe_machine(sweep.record)}: {listed}."


def _speed(sweep: Sweep, show: Show) -> list[Block]:
    crosses = " Crosses: out of memory." if (sweep.rows["status"] == "oom").any() else ""
    blocks: list[Block] = []
    for name in ("forward", "forward_backward"):
        blocks.append(show(f"tflops_{name}", f"TFLOP/s of the {PASSES[name]} pass, by length.{crosses}"))
    if tables := [fastest_table(sweep, name) for name in sweep.passes if not dense(wide(sweep, name)).empty]:
        blocks += [Text("TFLOP/s of the fastest backend, by length:"), *tables]
    blocks.append(Text(f"Short names: {', '.join(f'{short(name)} is {name}' for name in _named(sweep))}."))
    return blocks


def _named(sweep: Sweep) -> list[str]:
    return [name for name in sorted(sweep.ok["backend"].unique()) if short(name) != name]


def _fastest(sweep: Sweep, name: str) -> str | None:
    """Say in how many cells of one pass which backend is fastest, and at which lengths."""
    table = dense(wide(sweep, name))
    if table.empty:
        return None
    fastest = table.idxmin(axis=1)
    lengths = fastest.index.get_level_values("seqlen")
    said = [
        f"{backend} in {count} of {len(fastest)} cells, at {_lengths(lengths[fastest == backend])}"
        for backend, count in fastest.value_counts().items()
    ]
    return f"Fastest {PASSES[name]}: {'; '.join(said)}."


def _speedup(sweep: Sweep, show: Show) -> list[Block]:
    blocks: list[Block] = []
    for base in ("standard", "flash_attention_2"):
        if line := _gain(sweep, base):
            blocks.append(Text(line))
        for name in ("forward", "forward_backward"):
            caption = f"Times as fast as {base}, {PASSES[name]}, by length. Above 1: faster."
            picture = show(f"speedup_over_{base}_{name}", caption)
            if picture not in blocks:
                blocks.append(picture)
    return blocks


def _gain(sweep: Sweep, base: str) -> str | None:
    """Say how many times as fast as one backend the best of each cell is."""
    ranges = []
    for name in sweep.passes:
        table = dense(wide(sweep, name))
        if base in table and len(table.columns) > 1:
            gain = (table[base] / table.drop(columns=base).min(axis=1)).dropna()
            if len(gain):
                ranges.append(f"{PASSES[name]} {gain.min():.2f} to {gain.max():.2f} times (median {gain.median():.2f})")
    return f"The best of the others against {base}: {'; '.join(ranges)} as fast." if ranges else None


def _overtaking(sweep: Sweep) -> list[Block]:
    blocks: list[Block] = []
    for base in ("standard", "flash_attention_2"):
        names = [name for name in sorted(sweep.ok["backend"].unique()) if name != base]
        rows = []
        for name in sweep.passes:
            for panel, part in panels(dense(wide(sweep, name))).items():
                if base in part:
                    cells = [_crossing(part[other], part[base]) if other in part else "-" for other in names]
                    rows.append((f"{PASSES[name]}, {panel_name(panel, sweep)}", *cells))
        if rows and names:
            caption = f"From which length on a backend is faster than {base}."
            blocks.append(Table(caption, ("Pass", *map(short, names)), rows, "l" + "r" * len(names)))
    if not blocks:
        return [Text("Neither standard nor flash_attention_2 was measured beside another backend.")]
    note = (
        "A length in the table lies between two that were measured, where the straight line through both, of the log "
        "of the ratio over the log of the length, meets a ratio of one. Differences below 2 % are passed over."
    )
    return [Text(note), *blocks]


def _crossing(latency: pd.Series, against: pd.Series) -> str:
    """Print where a backend overtakes another: "always", "never", "from 900", "up to 900"."""
    start, turns = crossings(latency, against)
    if not turns:
        measured = len((latency / against).dropna())
        return {"ahead": "always", "behind": "never", "even": "even" if measured else "-"}[start]
    ahead, said = start == "ahead", []
    for turn in turns:
        said.append(f"{'up to' if ahead else 'from'} {float(f'{turn:.2g}'):,.0f}")
        ahead = not ahead
    return ", ".join(said)


def _memory(sweep: Sweep, show: Show) -> list[Block]:
    fits = exponents(sweep)
    caption = "Peak memory of one sequence, without the inputs, over its length; both axes are logarithmic."
    blocks: list[Block] = [show("memory", caption)]
    if len(fits):
        rows = []
        for backend, part in fits.groupby("backend"):
            by_pass = [part[part["pass"] == name] for name in sweep.passes]
            cells = [
                f"{_between(each['exponent'])} / {_between(each['last'])}" if len(each) else "-" for each in by_pass
            ]
            rows.append((str(backend), *cells))
        table_caption = (
            "Exponents of memory over length, from the smallest to the largest over the panels: fitted to all lengths "
            "/ between the two longest. 1 is linear, 2 quadratic."
        )
        header = ("Backend", *(PASSES[name].capitalize() for name in sweep.passes))
        blocks += [Text(line) for line in [_growth(sweep)] if line]
        blocks.append(Table(table_caption, header, rows, "l" + "r" * len(sweep.passes)))
    return blocks


def _growth(sweep: Sweep) -> str | None:
    """Say which backends' memory grows linearly with length."""
    fits = exponents(sweep)
    if fits.empty:
        return None
    last = fits.groupby("backend")["last"]
    kinds: dict[str, list[str]] = {}
    for backend, low, high in zip(last.min().index, last.min(), last.max(), strict=True):
        if max(abs(low - 1), abs(high - 1)) <= LINEAR:
            kind = "linearly"
        elif max(abs(low - 2), abs(high - 2)) <= 2 * LINEAR:
            kind = "quadratically"
        else:
            kind = f"with powers of {_between(pd.Series([low, high]))}"
        kinds.setdefault(kind, []).append(backend)
    said = "; ".join(f"{kind}: {_list(names)}" for kind, names in kinds.items())
    return f"Between the two longest lengths, the memory of a sequence grows {said}."


def _split(sweep: Sweep, show: Show) -> list[Block]:
    caption = (
        "How the time of forward and backward pass together parts, at the longest length that most backends ran. By "
        "FLOPs the forward pass is 1 part of 3.5."
    )
    blocks: list[Block] = [show("split", caption)]
    if {"forward", "forward_backward"} <= set(sweep.passes):
        share = wide(sweep, "forward") / wide(sweep, "forward_backward")
        medians = share.median().dropna().sort_values()
        if len(medians):
            listed = ", ".join(f"{backend} {100 * value:.0f} %" for backend, value in medians.items())
            blocks.append(Text(f"The forward pass's share of the time, median over all cells: {listed}."))
    return blocks


def _roofline(sweep: Sweep, show: Show) -> list[Block]:
    caption = (
        "Every forward pass but the block-sparse ones: TFLOP/s over the FLOPs that the algorithm does for each byte it "
        "must move, under this machine's measured ceilings. Left of the dotted line memory bounds it, right of it "
        "arithmetic."
    )
    blocks: list[Block] = [show("roofline", caption)]
    rows = bounds(sweep)
    if rows.empty:
        return blocks
    note = (
        "Bytes are the fewest that an algorithm can move: q, k, v, the output and the gradients once each, and for "
        f"{_list(list(UNFUSED))} also the matrix of scores, each time that its algorithm writes or reads it. FLOPs are "
        "those that the papers count; of a causal mask half."
    )
    blocks += [Text(note), *(Text(line) for line in [_bound(sweep)] if line)]
    table = []
    share = rows[["compute_ms", "memory_ms"]].max(axis=1) / rows["latency_ms"]  # of what the roof allows
    for (backend, name), part in rows.groupby(["backend", "pass"], sort=False):
        table.append(
            (
                f"{backend}, {PASSES[str(name)]}",
                _between(part["intensity"], ",.0f"),
                f"{int(part['memory_bound'].sum())} of {len(part)}",
                f"{(part['latency_ms'] / part['memory_ms']).median():.3g}",
                f"{(part['latency_ms'] / part['compute_ms']).median():.3g}",
                f"{100 * share[part.index].max():.0f} %",
            )
        )
    header = ("Backend, pass", "FLOP/byte", "Memory-bound", "Time / bytes' time", "Time / FLOPs' time", "Best share")
    caption = "Times are medians over the cells; the best share is that of what the roof allows."
    blocks.append(Table(caption, header, sorted(table), "lrrrrr"))
    if above := (share > 1).sum():
        blocks.append(
            Text(
                f"Above the roof, where no kernel can be: {above} of {len(share)} cells, at up to "
                f"{100 * share.max():.0f} %. The ceilings were measured too low, while the machine was slower than for "
                "these cells, or their data stayed in caches: such shares do not say how much is left to gain."
            )
        )
    return blocks


def _bound(sweep: Sweep) -> str | None:
    """Say which cells are memory-bound: where moving the bytes takes longer than the FLOPs."""
    rows = bounds(sweep)
    if rows.empty or sweep.ceilings is None:
        return None
    peak, bandwidth = sweep.ceilings
    said = []
    for kind, part in (
        ("with the scores in memory", rows[rows["backend"].isin(UNFUSED)]),
        ("with the scores on the chip", rows[~rows["backend"].isin(UNFUSED)]),
    ):
        if len(part):
            bound = part[part["memory_bound"]]
            lengths = "" if bound.empty else f", at {_lengths(bound['seqlen'])}"
            said.append(f"{kind}, {len(bound)} of {len(part)} cells{lengths}")
    ridge = 1e3 * peak / bandwidth
    return (
        f"Memory-bound ({digits(bandwidth)} GB/s of copies allow less than {digits(peak)} TFLOP/s below "
        f"{digits(ridge)} FLOP/byte): {'; '.join(said)}."
    )


def _traffic(sweep: Sweep, show: Show) -> list[Block]:
    caption = (
        "Bytes that one head's forward pass reads and writes: counted (points), and by the papers' formulas (lines)."
    )
    blocks: list[Block] = [show("traffic", caption)]
    if sweep.traffic.empty:
        return blocks
    rows = sweep.traffic.assign(moved=sweep.traffic["bytes_read"] + sweep.traffic["bytes_written"])
    off = rows["moved"] / rows["theory_bytes"]
    said = [
        f"{algorithm.replace('_', '-')} {_between(part, '.3g')}"
        for algorithm, part in off.groupby(rows["algorithm"], sort=False)
    ]
    blocks.append(Text(f"Counted / theory: {', '.join(said)}."))
    table = rows.pivot_table(index=["head_dim", "seqlen"], columns="algorithm", values="moved", aggfunc="max")
    if {"standard", "tiled"} <= set(table):
        ratio = (table["standard"] / table["tiled"]).dropna()
        most: Any = ratio.idxmax()
        blocks.append(
            Text(
                f"Standard attention moves {_between(ratio, '.3g')} times the bytes that tiling moves; the most at "
                f"head dim {most[0]}, length {most[1]:,}."
            )
        )
    return blocks


def _blocks(sweep: Sweep, show: Show) -> list[Block]:
    caption = "Time over the share of blocks, at the longest length, in units of the fitted time of all blocks."
    return [show("blocks", caption), *(Text(line) for line in _linear(sweep))]


def _linear(sweep: Sweep) -> list[str]:
    """Say for each backend whether its block-sparse time is a straight line, and through zero."""
    lines = []
    for backend, part in block_fits(sweep).groupby("backend"):
        straight = (part["r2"] >= STRAIGHT_R2).sum()
        near = ((part["r2"] >= STRAIGHT_R2) & (part["fixed"].abs() <= LINEAR)).sum()
        lines.append(
            f"Block-sparse time of {backend}: a straight line in the share of blocks (R2 of {STRAIGHT_R2} or more) in "
            f"{straight} of {len(part)} series, and proportional to it (within {100 * LINEAR:.0f} % of the dense time) "
            f"in {near}; at no blocks it would take {_between(100 * part['fixed'], '.2g')} % of the dense time."
        )
    return lines


def _auto(sweep: Sweep) -> list[Block]:
    choices = auto_choices(sweep)
    if choices.empty:
        return [Text("`auto` was not measured beside other backends.")]
    lengths = sorted(choices["seqlen"].unique())
    rows = []
    key: Any
    for key, part in sorted(choices.groupby(["pass", *PANEL]), key=lambda item: _order(item[0])):
        cells = {}
        for choice in part.to_dict("records"):
            lost = " loses" if choice["ratio"] < AUTO_REACHES else ""
            cells[choice["seqlen"]] = f"{short(choice['chosen'])} {choice['ratio']:.2f}{lost}"
        rows.append(
            (f"{PASSES[key[0]]}, {panel_name(key[1:], sweep)}", *(cells.get(seqlen, "-") for seqlen in lengths))
        )
    caption = "What `auto` chose, and its speed as a share of the fastest backend's, by length."
    header = ("Pass", *(f"{seqlen:,}" for seqlen in lengths))
    lines = [line for line in [_auto_line(sweep)] if line]
    return [Verdicts(lines), Table(caption, header, rows, "l" + "r" * len(lengths))]


def _order(series: Any) -> tuple[Any, ...]:
    """Sort series by pass, panel and mask."""
    name, *shape, mask = series
    return (list(PASSES).index(name), *shape, mask_order(mask))


def _auto_line(sweep: Sweep) -> tuple[str, str] | None:
    """Say how often `auto` was good enough, and where it was worst."""
    choices = auto_choices(sweep)
    if choices.empty:
        return None
    good = (choices["ratio"] >= AUTO_REACHES).sum()
    worst = choices.sort_values("ratio").iloc[0]
    line = (
        f"auto reaches {AUTO_REACHES} of the fastest backend's speed or more in {good} of {len(choices)} cells; worst: "
        f"{worst['ratio']:.3f} ({worst['chosen']} where {worst['best']} is fastest: {PASSES[worst['pass']]}, "
        f"{panel_name(tuple(worst[PANEL]), sweep)}, length {worst['seqlen']:,})."
    )
    short_of = choices[choices["ratio"] < AUTO_REACHES]
    if same := (short_of["chosen"] == short_of["best"]).sum():
        line += (
            f" In {same} of the {len(short_of)} cells below that, auto chose the fastest backend: there one kernel, "
            "measured at two moments of the run, gave two speeds."
        )
    return ("loses" if good < len(choices) else "", line)


def _lost(sweep: Sweep) -> list[Block]:
    lost = lost_cells(sweep)
    if lost.empty:
        return [Text("Every cell was measured.")]
    rows = []
    key: Any
    for key, part in lost.fillna({"reason": "no reason given"}).groupby(["status", "backend", "reason"]):
        status, backend, reason = map(str, key)
        rows.append((status, backend, f"{len(part):,}", _where(part, sweep), reason))
    return [Table("", ("Status", "Backend", "Cells", "Where", "Reason"), rows, "llrll")]


def _where(part: pd.DataFrame, sweep: Sweep) -> str:
    """Print what a group of cells has in common, as far as the sweep varies it."""
    said = []
    for column, name in (("pass", ""), ("head_dim", "head dim "), ("mask", ""), ("dtype", "")):
        values = part[column].unique()
        if len(values) < sweep.rows[column].nunique():
            said.append(name + ", ".join(PASSES.get(str(value), str(value)) for value in sorted(values)))
    if part["seqlen"].nunique() < sweep.rows["seqlen"].nunique():
        said.append(_lengths(part["seqlen"]))
    return "; ".join(said) or "everywhere"


def _lengths(lengths: Iterable[int]) -> str:
    distinct = sorted(set(lengths))
    return f"length {distinct[0]:,}" if len(distinct) == 1 else f"lengths {distinct[0]:,} to {distinct[-1]:,}"


def _run(sweep: Sweep) -> Section:
    kept = ("command", "git_commit", "image", "method", "config", "ceilings", "machine")
    facts = {name: sweep.record[name] for name in kept if sweep.record.get(name)}
    if grids := facts.get("config", {}).get("grids"):
        facts["config"] = facts["config"] | {"grids": {str(number): grid for number, grid in enumerate(grids, 1)}}
    if "machine" in facts:  # of the packages torch and flash-attn count, and they have rows of their own
        facts["machine"] = {name: value for name, value in facts["machine"].items() if name != "packages"}
    rows = [(what, value) for what, value in flatten(facts) if value not in ("None", "[]")]
    return Section("The run", [Table("", ("what", "value"), rows, "ll")])


def _between(values: pd.Series, form: str = ".2f") -> str:
    """Print the smallest and the largest of some values."""
    low, high = format(values.min(), form), format(values.max(), form)
    return low if low == high else f"{low} to {high}"


def _list(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
