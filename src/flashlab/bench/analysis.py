"""The numbers of a sweep: its rows as a table, and what its pictures, words and claims are computed from.

Wide tables below have a row for each cell (what was computed, at one length) and a column for each backend. What is
computed from a sweep is kept, since pictures, tables and sentences ask for it again; it is not to be changed.
"""

import json
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from flashlab.errors import UserError

SCHEMA = 1
PANEL = ["dtype", "head_dim", "num_heads", "num_kv_heads", "mask"]  # what is drawn against length in one panel
CELL = [*PANEL, "pass", "batch_size", "seqlen"]
NUMBERS = ["latency_ms", "latency_ms_p10", "latency_ms_p90", "tflops_per_s", "peak_memory_mib"]
STATUSES = ("ok", "unsupported", "oom", "failed", "wrong")
PASSES = {"forward": "forward", "backward": "backward", "forward_backward": "forward + backward"}

UNFUSED = ("standard", "sdpa_math")  # they write the scores to memory; every other backend keeps them on the chip
TIE = 1.02  # latencies closer than this factor are the same
ITEM_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
# Times that a pass moves one tensor like q, one like k, and the matrix of scores (unfused only) through memory.
# Source: FlashAttention (arXiv 2205.14135), algorithms 0 and 3 for the scores; q, k, v, out and gradients once each.
TRAVELS = {"forward": (2, 2, 4), "backward": (4, 4, 7), "forward_backward": (6, 6, 11)}


@dataclass(frozen=True, eq=False)
class Sweep:
    """A sweep's file.

    Attributes:
        record: the file as it is.
        rows: its rows, with `flops` and `bytes` of each.
        traffic: bytes that the algorithms counted beside theory; may be empty.
        ceilings: matmul TFLOP/s and copy GB/s measured in the run, or None.
    """

    record: dict[str, Any]
    rows: pd.DataFrame
    traffic: pd.DataFrame
    ceilings: tuple[float, float] | None

    @cached_property
    def ok(self) -> pd.DataFrame:
        """The rows that were measured, of the backends asked for by name."""
        return self.rows[(self.rows["status"] == "ok") & (self.rows["backend"] != "auto")]

    @property
    def passes(self) -> list[str]:
        return [name for name in PASSES if (self.ok["pass"] == name).any()]


def read(path: Path, kind: str, command: str) -> dict[str, Any]:
    """Read a result file.

    Args:
        path: the file.
        kind: what it must be the result of.
        command: what writes such a file.

    Raises:
        UserError: the file is missing, not JSON, of another kind or schema, or has no rows.
    """
    remedy = f"`{command}` writes it"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; {remedy}") from None
    except ValueError as error:  # of JSON and of UTF-8
        raise UserError(f"{path} is not JSON ({error}); {remedy}") from None
    found = record.get("kind") if isinstance(record, dict) else None
    if found != kind:
        raise UserError(f"{path} is of kind {found!r}, not {kind!r}; {remedy}")
    if record.get("schema") != SCHEMA:
        raise UserError(f"{path} has schema {record.get('schema')!r}, this flashlab reads {SCHEMA}; {remedy} anew")
    rows = record.get("rows")
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path} has no rows; {remedy} anew")
    return record


def load(path: Path) -> Sweep:
    """Read the result of `flashlab bench sweep`.

    Raises:
        UserError: the file is missing, damaged, or of something else.
    """
    record = read(path, "attention_sweep", "flashlab bench sweep")
    damaged = f"{path} is damaged: {{}}; `flashlab bench sweep` writes it anew"
    for number, row in enumerate(record["rows"], 1):
        if problem := _problem(row):
            raise UserError(damaged.format(f"row {number} has {problem}"))
    rows = pd.DataFrame(record["rows"]).reindex(columns=["backend", "resolved", *CELL, "status", "reason", *NUMBERS])
    rows[NUMBERS] = rows[NUMBERS].astype(float)
    rows = rows.drop_duplicates(["backend", *CELL], keep="last", ignore_index=True)
    rows["flops"] = 1e9 * rows["tflops_per_s"] * rows["latency_ms"]
    rows["bytes"] = _bytes_moved(rows)
    try:
        traffic = pd.DataFrame(
            record.get("traffic") or [],
            columns=["algorithm", "seqlen", "head_dim", "density", "bytes_read", "bytes_written", "theory_bytes"],
        ).astype({"density": float, "theory_bytes": float})
        roof = record.get("ceilings")
        ceilings = (float(roof["matmul_tflops_per_s"]), float(roof["copy_gb_per_s"])) if roof else None
        return Sweep(record, rows, traffic, ceilings)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(damaged.format(f"ceilings or traffic: {error}")) from None


def _problem(row: dict[str, Any]) -> str | None:
    """Say what is wrong with a row."""

    def is_positive(name: str) -> bool:
        return isinstance(row.get(name), int | float) and 0 < row[name] < np.inf

    needed = ["head_dim", "num_heads", "num_kv_heads", "batch_size", "seqlen"]
    needed += ["latency_ms", "tflops_per_s"] if row.get("status") == "ok" else []
    choices = {"status": STATUSES, "pass": PASSES, "dtype": ITEM_BYTES}
    wrong = [name for name in ("backend", "mask", *choices) if not isinstance(row.get(name), str)]
    wrong += [name for name, known in choices.items() if name not in wrong and row[name] not in known]
    optional = ("latency_ms_p10", "latency_ms_p90", "peak_memory_mib")  # no memory on a CPU
    needed += [name for name in optional if row.get(name)]
    wrong += [name for name in needed if not is_positive(name)]
    return f"{wrong[0]} {row.get(wrong[0])!r}" if wrong else None


def _bytes_moved(rows: pd.DataFrame) -> pd.Series:
    """Compute the fewest bytes that each backend's algorithm moves through the device's memory."""
    travels = pd.DataFrame([TRAVELS[name] for name in rows["pass"]], columns=["q", "k", "scores"], index=rows.index)
    elements = (
        rows["batch_size"]
        * rows["seqlen"]
        * (
            rows["head_dim"] * (travels["q"] * rows["num_heads"] + travels["k"] * rows["num_kv_heads"])
            + rows["backend"].isin(UNFUSED) * travels["scores"] * rows["num_heads"] * rows["seqlen"]
        )
    )
    return elements * rows["dtype"].map(ITEM_BYTES)


@lru_cache(maxsize=64)
def wide(sweep: Sweep, name: str, value: str = "latency_ms") -> pd.DataFrame:
    """Spread a value of one pass over columns, a backend each; the rows are the cells without their pass."""
    rows = sweep.ok[sweep.ok["pass"] == name]
    index = [column for column in CELL if column != "pass"]
    return rows.pivot(index=index, columns="backend", values=value).dropna(how="all", axis=1).dropna(how="all")


def panels(table: pd.DataFrame) -> dict[tuple[Any, ...], pd.DataFrame]:
    """Part a wide table into panels, each with the lengths as its index."""
    parts = {}
    panel: Any
    for panel, part in table.groupby(level=PANEL):
        part = part.droplevel([*PANEL, "batch_size"]).dropna(how="all", axis=1)
        parts[panel] = part[~part.index.duplicated()].sort_index()
    return dict(sorted(parts.items(), key=lambda item: (*item[0][:4], mask_order(item[0][4]))))


def mask_order(mask: str) -> tuple[int, str]:
    """Sort masks: full, causal, then the others by name."""
    return {"full": 0, "causal": 1}.get(mask, 2), mask


def panel_name(panel: tuple[Any, ...], sweep: Sweep) -> str:
    """Name a panel: "head dim 128, causal", and what else tells the sweep's panels apart."""
    dtype, head_dim, num_heads, num_kv_heads, mask = panel
    alike = sweep.rows[sweep.rows["head_dim"] == head_dim]
    said = [f"head dim {head_dim}", mask]
    if sweep.rows["dtype"].nunique() > 1:
        said.append(dtype)
    if alike["num_heads"].nunique() > 1:
        said.append(f"{num_heads} heads")
    if num_kv_heads != num_heads:
        said.append(f"{num_kv_heads} for k and v")
    return ", ".join(said)


def digits(value: float) -> str:
    """Print a number in full from a hundred on, below it three digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def is_blocks(mask: str) -> bool:
    return mask.startswith("blocks:")


def dense(table: pd.DataFrame) -> pd.DataFrame:
    """Leave out the block-sparse masks, which have pictures of their own, and backends that ran nothing else."""
    return table[[not is_blocks(mask) for mask in table.index.get_level_values("mask")]].dropna(axis=1, how="all")


def crossings(latency: pd.Series, against: pd.Series) -> tuple[str, list[float]]:
    """Find where one backend overtakes, or falls behind, another.

    Args:
        latency: by length.
        against: the other's.

    Returns:
        Which is ahead at the shortest length ("ahead", "behind", or "even" when they never differ), and the lengths at
        which the lead changes: between two measured lengths, where the straight line of log ratio over log length
        meets zero. A lead of less than a factor of `TIE` is none.
    """
    ratio = (against / latency).dropna().map(np.log)
    log_ratio, log_length = ratio.to_numpy(float), np.log(ratio.index.to_numpy(float))
    clear = np.flatnonzero(np.abs(log_ratio) >= np.log(TIE))
    if not len(clear):
        return "even", []
    turns = []
    for before, after in pairwise(clear):
        if log_ratio[before] * log_ratio[after] < 0:
            at = next(i for i in range(before, after) if log_ratio[i] * log_ratio[i + 1] <= 0)
            part = log_ratio[at] / (log_ratio[at] - log_ratio[at + 1])
            turns.append(float(np.exp(log_length[at] + part * (log_length[at + 1] - log_length[at]))))
    return "ahead" if log_ratio[clear[0]] > 0 else "behind", turns


@lru_cache(maxsize=64)
def exponents(sweep: Sweep) -> pd.DataFrame:
    """Fit how peak memory of one sequence grows with its length: memory ~ length ** exponent.

    Returns:
        A row for each series of three lengths or more: what was measured, `exponent` over all lengths, and `last` over
        the two longest, where what does not grow weighs least.
    """
    fits = []
    for name in sweep.passes:
        for panel, table in panels(memory_per_sequence(sweep, name)).items():
            for backend, series in table.items():
                memory = np.log2(series[series > 0])
                if len(memory) >= 3:
                    slopes = [np.polyfit(np.log2(part.index), part, 1)[0] for part in (memory, memory.iloc[-2:])]
                    fits.append((*panel, name, backend, *slopes))
    return pd.DataFrame(fits, columns=[*PANEL, "pass", "backend", "exponent", "last"])


def memory_per_sequence(sweep: Sweep, name: str) -> pd.DataFrame:
    """Divide peak memory by the batch size: many sweeps hold the number of tokens, and not the batch, constant."""
    table = wide(sweep, name, "peak_memory_mib")
    return table.div(table.index.get_level_values("batch_size"), axis=0)


@lru_cache(maxsize=64)
def bounds(sweep: Sweep) -> pd.DataFrame:
    """Compare each measured time with the two that the roof gives it.

    Returns:
        The measured rows with `intensity` (FLOP/byte), `compute_ms` (FLOPs / measured matmul rate), `memory_ms`
        (bytes / measured copy rate) and `memory_bound`; empty without ceilings.
    """
    if sweep.ceilings is None:
        return sweep.ok.iloc[:0]
    peak, bandwidth = sweep.ceilings
    rows = sweep.ok.assign(
        intensity=sweep.ok["flops"] / sweep.ok["bytes"],
        compute_ms=sweep.ok["flops"] / peak / 1e9,
        memory_ms=sweep.ok["bytes"] / bandwidth / 1e6,
    )
    return rows.assign(memory_bound=rows["memory_ms"] > rows["compute_ms"])


@lru_cache(maxsize=64)
def auto_choices(sweep: Sweep) -> pd.DataFrame:
    """Set what `auto` chose beside the best backend of the cell.

    Returns:
        A row for each cell where both were measured, with `chosen`, `best` and `ratio` (best latency / auto's).
    """
    index = sweep.ok.set_index(CELL).sort_index()
    best = index.loc[index.groupby(CELL)["latency_ms"].transform("min") == index["latency_ms"]]
    best = best[~best.index.duplicated()][["backend", "latency_ms"]].set_axis(["best", "best_ms"], axis=1)
    auto = sweep.rows[(sweep.rows["backend"] == "auto") & (sweep.rows["status"] == "ok")].set_index(CELL)
    joined = auto[["resolved", "latency_ms"]].rename(columns={"resolved": "chosen"}).join(best, how="inner")
    return joined.assign(ratio=joined["best_ms"] / joined["latency_ms"]).reset_index()


@lru_cache(maxsize=64)
def block_fits(sweep: Sweep) -> pd.DataFrame:
    """Fit the time of block-sparse attention to a straight line in the share of blocks.

    The full mask, where the same backend ran it, is the share 1; other shares follow from the FLOPs, since short
    sequences have too few blocks for some.

    Returns:
        A row for each series of three shares or more: `points` (share -> latency_ms), `dense_ms` (the line at 1),
        `fixed` (the line at 0 as a share of `dense_ms`) and `r2`.
    """
    from flashlab.bench.flops import flops  # here, since torch takes long to import and all else goes without it

    rows = sweep.ok.loc[[mask == "full" or is_blocks(mask) for mask in sweep.ok["mask"]]]
    of_full = [
        flops(
            row["pass"],
            batch_size=row["batch_size"],
            seqlen_q=row["seqlen"],
            seqlen_k=row["seqlen"],
            num_heads=row["num_heads"],
            head_dim=row["head_dim"],
        )
        for row in rows.to_dict("records")
    ]
    rows = rows.assign(density=(rows["flops"] / of_full).round(4))
    keys = ["backend", *(column for column in CELL if column != "mask")]
    fits = []
    for key, part in rows.groupby(keys):
        points = part.groupby("density")["latency_ms"].first()
        if len(points) >= 3:
            slope, start = np.polyfit(points.index, points, 1)
            residuals = points - (start + slope * points.index)
            r2 = 1 - (residuals**2).sum() / ((points - points.mean()) ** 2).sum()
            fits.append((*key, points, start + slope, start / (start + slope), r2))
    return pd.DataFrame(fits, columns=[*keys, "points", "dense_ms", "fixed", "r2"])


def lost_cells(sweep: Sweep) -> pd.DataFrame:
    """List the cells that were not measured, with the reason.

    Beside the rows of every status but "ok" these are gaps: a length that other backends have, and that a backend lacks
    though it has rows of the same mask and pass.
    """
    rows, series = sweep.rows, [*PANEL, "pass"]
    lengths = rows[[*series, "batch_size", "seqlen"]].drop_duplicates()
    expected = rows[["backend", *series]].drop_duplicates().merge(lengths, on=series)
    merged = expected.merge(rows[["backend", *CELL]], how="left", indicator=True)
    missing = merged[merged["_merge"] == "left_only"].assign(status="missing", reason="the file has no row of it")
    return pd.concat([rows[rows["status"] != "ok"], missing])[["backend", *CELL, "status", "reason"]]


def describe_machine(record: dict[str, Any]) -> str:
    """Name what a result was measured on, and with which versions."""
    machine = record.get("machine") or {}
    facts = machine.get("torch") or {}
    gpus = [gpu.get("name") for gpu in facts.get("gpus") or []]
    named = [gpus[0] if gpus else f"CPU ({(machine.get('cpu') or {}).get('model') or 'of unknown model'})"]
    named += [
        f"{name} {facts[key]}"
        for key, name in (("version", "torch"), ("cuda", "CUDA"), ("cudnn", "cuDNN"))
        if facts.get(key)
    ]
    named += [f"driver {version}" for version in [(machine.get("driver") or {}).get("version")] if version]
    for variant, package in (machine.get("flash_attn") or {}).items():
        if package.get("found"):
            named.append(f"flash-attn {variant} ({package.get('version')})")
    return ", ".join(named)
