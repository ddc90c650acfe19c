"""What the FlashAttention papers claim, beside what a sweep measured: the tables of docs/claims.md.

A claim is judged by a rule, cell by cell: it holds where all cells meet it, holds partly where some do, and does not
hold where none does. "Up to" claims are judged by the best cell.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from flashlab.bench.analysis import (
    CELL,
    ITEM_BYTES,
    PASSES,
    Sweep,
    block_fits,
    dense,
    describe_machine,
    exponents,
    load,
    wide,
)
from flashlab.bench.report import LINEAR, STRAIGHT_R2, fastest_table, short, summary
from flashlab.report import Table

SAME_RATE = 0.95  # machines differ: this share of a published TFLOP/s still meets it; ratios get no such room
BLOCK_SPARSE_LENGTH = 4096  # of the figure that the claim is from
README_SHAPE = {"batch_size": 8, "num_heads": 12, "head_dim": 64}
# Who stands for whom: the first that was measured. torch ships flash-attn 2's kernels; flash-attn 4 follows 3.
FLASH = ("flash_attention_2", "sdpa_flash")
FLASH_3 = ("flash_attention_3", "flash_attention_4")
FLASH_1_README = "[FlashAttention README, 2022](https://github.com/Dao-AILab/flash-attention/blob/v1.0.9/README.md)"
FLASH_1 = "[FlashAttention, 2022](https://arxiv.org/abs/2205.14135)"
FLASH_2 = "[FlashAttention-2, 2023](https://arxiv.org/abs/2307.08691)"
FLASH_3_PAPER = "[FlashAttention-3, 2024](https://arxiv.org/abs/2407.08608)"


class Finding(NamedTuple):
    """What this machine gave, in words, and which cells meet the claim."""

    here: str
    met: list[bool]


@dataclass(frozen=True)
class Claim:
    """One headline of a paper.

    Attributes:
        words: what is claimed, in short.
        source: where, as a Markdown link, with the machine.
        judge: finds what the sweep has to say; None where it has nothing.
    """

    words: str
    source: str
    judge: Callable[[Sweep], Finding | None]


def claims(*paths: Path) -> str:
    """Set each claim beside what some sweeps of one machine measured."""
    sweep = join([load(path) for path in paths])
    rows = []
    for claim in CLAIMS:
        finding = claim.judge(sweep)
        here = finding.here if finding else "-"
        rows.append((claim.words, claim.source, here, verdict(finding.met if finding else [])))
    return f"\nMeasured on {describe_machine(sweep.record)}.\n\n" + markdown(
        Table("", ("Claim", "Source", "Here", "Verdict"), rows, "llll")
    )


def published(*paths: Path) -> str:
    """Set the TFLOP/s that the FlashAttention-3 paper prints beside what some sweeps of one machine measured."""
    sweep = join([load(path) for path in paths])
    rows = []
    for (kernel, name, head_dim, mask), figures in PUBLISHED.items():
        backend = _measured(sweep, {"FA2": FLASH[:1], "FA3": FLASH_3}[kernel])
        cells = sweep.ok[
            (sweep.ok["backend"] == backend)
            & (sweep.ok["pass"] == name)
            & (sweep.ok["head_dim"] == head_dim)
            & (sweep.ok["mask"] == mask)
            & (sweep.ok["num_heads"] * head_dim == 2048)
            & (sweep.ok["batch_size"] * sweep.ok["seqlen"] == 16384)
            & (sweep.ok["dtype"].map(ITEM_BYTES) == 2)
        ]
        here = cells.groupby("seqlen")["tflops_per_s"].first()
        pairs = [(here.get(seqlen), figure) for seqlen, figure in zip(LENGTHS, figures, strict=True)]
        met = [value >= SAME_RATE * figure for value, figure in pairs if value is not None]
        told = f"{kernel} ({'-' if backend is None else short(backend)}) {PASSES[name]}, head dim {head_dim}, {mask}"
        rows.append(
            (told, *(f"{figure} / {'-' if value is None else f'{value:.0f}'}" for value, figure in pairs), verdict(met))
        )
    header = ("Kernel (here), pass", *(f"{seqlen:,}" for seqlen in LENGTHS), f"At least {100 * SAME_RATE:.0f} %")
    return f"\nOn {describe_machine(sweep.record)}; published / here, in TFLOP/s.\n\n" + markdown(
        Table("", header, rows, "l" + "r" * len(LENGTHS) + "l")
    )


def sweep_tables(*paths: Path) -> str:
    """Say what a sweep found: the sentences of its report, and the fastest backend of every cell."""
    sweep = join([load(path) for path in paths])
    lines = [f"- **{line}**" if lost else f"- {line}" for lost, line in summary(sweep)]
    tables = [fastest_table(sweep, name) for name in sweep.passes if not dense(wide(sweep, name)).empty]
    said = [f"Measured on {describe_machine(sweep.record)}.\n", *lines, "", *(markdown(table) for table in tables)]
    return "\n" + "\n".join(said)


def join(sweeps: list[Sweep]) -> Sweep:
    """Put the rows of several sweeps together; of a cell that two have measured, the first's counts."""
    if len(sweeps) == 1:
        return sweeps[0]
    rows = pd.concat([sweep.rows for sweep in sweeps]).drop_duplicates(["backend", *CELL], ignore_index=True)
    traffic = pd.concat([sweep.traffic for sweep in sweeps], ignore_index=True)
    roof = next((sweep.ceilings for sweep in sweeps if sweep.ceilings), None)
    return Sweep(sweeps[0].record, rows, traffic, roof)


def verdict(met: list[bool]) -> str:
    """Judge a claim by the cells that meet it."""
    if not met:
        return "not measured"
    return "holds" if all(met) else "holds partly" if any(met) else "**does not hold**"


def markdown(table: Table) -> str:
    """Write a table in Markdown."""
    marks = ["---:" if letter == "r" else "---" for letter in table.align]
    lines = [" | ".join(cell.replace("|", "\\|") for cell in row) for row in (table.header, marks, *table.rows)]
    return "".join(f"| {line} |\n" for line in lines) + "\n"


def _linear_memory(sweep: Sweep) -> Finding | None:
    fits = exponents(sweep)
    backend = _measured(sweep, FLASH)
    mine, standard = (fits.loc[fits["backend"] == name, "exponent"] for name in (backend, "standard"))
    if mine.empty:
        return None
    beside = f"; standard {_span(standard, '.2f')}" if len(standard) else ""
    return Finding(f"memory ~ length^{_span(mine, '.2f')} ({backend}){beside}", [*((mine - 1).abs() <= LINEAR)])


def _memory_ratio(seqlen: int, times: float, sweep: Sweep) -> Finding | None:
    """Compare the peak memory of training steps, with the inputs, as the README's benchmark counts it."""
    table = dense(wide(sweep, "forward_backward", "peak_memory_mib"))
    table = _prefer(_at(table, seqlen, seqlen), README_SHAPE)
    cells = table.index.to_frame()
    rows = cells["batch_size"] * cells["seqlen"] * 2 * (cells["num_heads"] + cells["num_kv_heads"])
    item_bytes = cells["dtype"].map(ITEM_BYTES).astype(float)  # of no cells, pandas with pyarrow keeps text
    inputs_mib = rows * cells["head_dim"] * item_bytes / 2**20
    return _compare(sweep, table.add(inputs_mib, axis=0), "standard", FLASH, times, "less")


def _speedup(
    name: str,
    base: str,
    backends: tuple[str, ...],
    lengths: tuple[int, int],
    times: float,
    sweep: Sweep,
    *,
    best: bool = False,
    shape: dict[str, int] | None = None,
) -> Finding | None:
    table = _prefer(_at(dense(wide(sweep, name)), *lengths), shape or {})
    return _compare(sweep, table, base, backends, times, "as fast", best=best)


def _rate(name: str, backends: tuple[str, ...], rate: float, sweep: Sweep) -> Finding | None:
    backend = _measured(sweep, backends)
    table = wide(sweep, name, "tflops_per_s")
    if backend not in table:
        return None
    fastest: float = table[backend].max()
    return Finding(f"up to {fastest:.0f} TFLOP/s ({backend})", [fastest >= SAME_RATE * rate])


def _block_sparse(sweep: Sweep) -> Finding | None:
    fits = block_fits(sweep)
    fits = fits[fits["backend"] == "flex_attention"]
    if (fits["seqlen"] == BLOCK_SPARSE_LENGTH).any():
        fits = fits[fits["seqlen"] == BLOCK_SPARSE_LENGTH]
    if fits.empty:
        return None
    met = (fits["r2"] >= STRAIGHT_R2) & (fits["fixed"].abs() <= LINEAR)
    here = (
        f"R2 of a straight line {_span(fits['r2'], '.3f')}; at no blocks it meets "
        f"{_span(100 * fits['fixed'], '.0f')} % of the dense time (flex_attention, {len(fits)} series, "
        f"length {_span(fits['seqlen'], ',')})"
    )
    return Finding(here, [*met])


def _compare(
    sweep: Sweep,
    table: pd.DataFrame,
    base: str,
    backends: tuple[str, ...],
    times: float,
    words: str,
    *,
    best: bool = False,
) -> Finding | None:
    """Divide one column of a wide table by another, and ask for a ratio."""
    backend = _measured(sweep, backends)
    if base not in table or backend not in table:
        return None
    ratio = (table[base] / table[backend]).dropna()
    if ratio.empty:
        return None
    lengths = ratio.index.get_level_values("seqlen")
    where = f"{len(ratio)} cell{'s' * (len(ratio) > 1)}, length {_span(pd.Series(lengths), ',')}"
    here = f"{_span(ratio, '.2f')} times {words} ({backend} against {base}, {where})"
    met = ratio >= times
    return Finding(here, [bool(met.any())] if best else [*met])


def _measured(sweep: Sweep, backends: tuple[str, ...]) -> str | None:
    """Return the first of some backends that was measured."""
    return next((name for name in backends if (sweep.ok["backend"] == name).any()), None)


def _at(table: pd.DataFrame, shortest: int, longest: int) -> pd.DataFrame:
    lengths = table.index.get_level_values("seqlen")
    return table[(lengths >= shortest) & (lengths <= longest)]


def _prefer(table: pd.DataFrame, shape: dict[str, int]) -> pd.DataFrame:
    """Keep the cells of the shape that a claim was made for; without any, those of its head dimension, or all."""
    cells = table.index.to_frame()
    for names in (list(shape), ["head_dim"] if shape else []):
        same = (cells[names] == [shape[name] for name in names]).all(axis=1)
        if same.any():
            return table[same]
    return table


def _span(values: pd.Series, form: str) -> str:
    low, high = format(values.min(), form), format(values.max(), form)
    return low if low == high else f"{low} to {high}"


BOTH = "forward_backward"
CLAIMS = [
    Claim("Memory grows linearly with length", f"{FLASH_1}, section 4.3", _linear_memory),
    Claim("10 times less memory at length 2K", f"{FLASH_1_README}, A100", partial(_memory_ratio, 2048, 10.0)),
    Claim("20 times less memory at length 4K", f"{FLASH_1_README}, A100", partial(_memory_ratio, 4096, 20.0)),
    Claim(
        "Up to 3 times as fast as standard attention, lengths 128 to 2K",
        f"{FLASH_1}, section 1, A100",
        partial(_speedup, BOTH, "standard", FLASH, (128, 2048), 3.0, best=True, shape=README_SHAPE),
    ),
    Claim(
        "2 to 4 times as fast as standard attention, lengths 128 to 4K (judged: 2 times in each cell)",
        f"{FLASH_1_README}, A100",
        partial(_speedup, BOTH, "standard", FLASH, (128, 4096), 2.0, shape=README_SHAPE),
    ),
    Claim("Block-sparse time is proportional to the non-zero blocks", f"{FLASH_1}, figure 2, A100", _block_sparse),
    Claim(
        "FlashAttention-2: 3 to 10 times as fast as standard attention (judged: 3 times in each cell)",
        f"{FLASH_2}, section 4, A100",
        partial(_speedup, BOTH, "standard", FLASH, (512, 16384), 3.0),
    ),
    Claim(
        "FlashAttention-2: up to 335 TFLOP/s forward + backward",
        f"{FLASH_2}, section 4.1, H100",
        partial(_rate, BOTH, FLASH, 335.0),
    ),
    Claim(
        "FlashAttention-3: 1.5 to 2.0 times as fast as FlashAttention-2, forward (judged: 1.5 times in each cell)",
        f"{FLASH_3_PAPER}, section 4.1, H100",
        partial(_speedup, "forward", "flash_attention_2", FLASH_3, (512, 16384), 1.5),
    ),
    Claim(
        "FlashAttention-3: 1.5 to 1.75 times as fast as FlashAttention-2, backward (judged: 1.5 times in each cell)",
        f"{FLASH_3_PAPER}, section 4.1, H100",
        partial(_speedup, "backward", "flash_attention_2", FLASH_3, (512, 16384), 1.5),
    ),
    Claim(
        "FlashAttention-3: up to 740 TFLOP/s forward",
        f"{FLASH_3_PAPER}, abstract, H100, float16",
        partial(_rate, "forward", FLASH_3, 740.0),
    ),
    Claim(
        "FlashAttention-3 surpasses cuDNN from length 1K on, forward",
        f"{FLASH_3_PAPER}, section 4.1, H100",
        partial(_speedup, "forward", "sdpa_cudnn", FLASH_3, (1024, 16384), 1.0),
    ),
]

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
# (kernel, pass, head dim, mask) -> TFLOP/s at LENGTHS, hidden size 2048, 16k tokens, float16, H100 80GB SXM5.
# Source: the labels of figures 5 and 6 of FlashAttention-3 (arXiv 2407.08608).
PUBLISHED = {
    ("FA2", "forward", 64, "full"): (282, 306, 318, 321, 322, 324),
    ("FA2", "forward", 64, "causal"): (180, 229, 262, 284, 295, 299),
    ("FA2", "forward", 128, "full"): (309, 350, 362, 368, 370, 370),
    ("FA2", "forward", 128, "causal"): (191, 260, 298, 319, 333, 335),
    ("FA2", "backward", 64, "full"): (198, 238, 264, 279, 287, 291),
    ("FA2", "backward", 128, "full"): (214, 260, 291, 310, 318, 322),
    ("FA3", "forward", 64, "full"): (333, 392, 460, 476, 496, 497),
    ("FA3", "forward", 64, "causal"): (197, 288, 371, 420, 460, 473),
    ("FA3", "forward", 128, "full"): (467, 565, 625, 638, 646, 648),
    ("FA3", "forward", 128, "causal"): (292, 423, 521, 579, 602, 616),
    ("FA3", "backward", 64, "full"): (272, 363, 422, 453, 472, 474),
    ("FA3", "backward", 128, "full"): (316, 424, 501, 542, 559, 561),
}
