"""`flashlab check`: which attention backends are right on this machine."""

import difflib
import shlex
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from time import monotonic
from typing import Any, Literal

import torch
from rich.console import Console
from rich.live import Live
from rich.table import Column, Table

from flashlab.attention import AttentionSpec, attention, resolve
from flashlab.attention.backends import BACKENDS, why_not
from flashlab.check.cases import DTYPES, describe, parse
from flashlab.check.judge import SMALLEST, Errors
from flashlab.check.run import Row, Task, plan, run
from flashlab.errors import UserError, check_writable
from flashlab.machine import choose_device, provenance, write_result

METHOD = (
    "Every result is compared with standard attention in float64. Rule 1: its largest error is at most `allowed`, "
    "twice that of standard attention in the same precision plus rounding. Rule 2: the same with root mean squares, in "
    "blocks of 128 or more rows of one head; `mean_ratio` is the worst block's error over what is allowed. Also: "
    "shape, dtype, NaN and infinity, values never written, inputs overwritten, caches bit by bit, the same bits when "
    "repeated."
)
STATUSES = ("ok", "unsupported", "wrong", "oom")
SAY_EVERY_S = 10.0  # where there is no terminal
SAY_WRONG = 10  # of each backend


def check(
    *,
    quick: bool = False,
    full: bool = False,
    backend: list[str] | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    dtype: list[str] | None = None,
    head_dim: list[int] | None = None,
    case: list[str] | None = None,
    json: Path | None = None,
) -> int:
    """Compare every attention backend with the reference, and exit with 1 if one is wrong or nothing could be judged.

    Args:
        quick: Judge by a choice of cases, in less than a minute; the default.
        full: Judge by all cases.
        backend: Only these; a list such as [standard,flash_attention_2].
        device: Where to run; auto is the GPU if there is one.
        dtype: Only cases in these, such as [bfloat16].
        head_dim: Only cases with these, such as [64,128].
        case: Judge by these cases instead, such as [bfloat16/d64/129x129/causal/h6kv2/plain/dense/normal].
        json: Write every row to this file.
    """
    if quick and full:
        raise UserError("--quick and --full exclude each other: choose one")
    on = torch.device(choose_device(device))
    backends = _known("--backend", backend, ["auto", *BACKENDS]) or [*BACKENDS, "auto"]
    cases = [parse(name) for name in case or []]
    dtypes = _known("--dtype", dtype, DTYPES) or DTYPES
    planned = plan(backends, cases, on, full=full)
    tasks = [task for task in planned if task.case.dtype in dtypes and (not head_dim or task.case.head_dim in head_dim)]
    if not tasks:
        raise UserError(_no_case({"dtype": dtype, "head_dim": head_dim}, planned))
    if json is not None:
        check_writable("--json", json)
    console = Console()
    example = seed_example(on)
    console.print(example, markup=False, highlight=False, soft_wrap=True)
    config = {"full": full, "backends": backends, "device": str(on), "dtype": dtype, "head_dim": head_dim, "case": case}
    board = Board(console, tasks, on)
    rows: list[Row] = []
    try:
        board.watch(run(tasks, on), rows)
    finally:  # also of a check that was interrupted
        board.summarise()
        if json is not None:
            facts = {**provenance("attention_check"), "method": METHOD, "config": config, "seed_example": example}
            complete = len(rows) == board.total
            write_result(json, {**facts, "complete": complete, "rows": [_as_json(row, on) for row in rows]})
    statuses = {row.verdict.status for row in rows}
    return int("wrong" in statuses or "ok" not in statuses)


def seed_example(device: torch.device) -> str:
    """Repeat the first test of the tutorials: flash attention against standard attention, on a plain call."""
    spec = AttentionSpec(2, 128, 128, 8, 8, 64, torch.float16, device)
    name = "flash_attention_2" if why_not("flash_attention_2", spec) is None else resolve("auto", spec)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 128, 8, 64, generator=generator).to(device, torch.float16) for _ in range(3))
    words = f"{name} against standard attention on {device.type}: batch 2, length 128, 8 heads of 64, float16"
    try:
        difference = attention(q, k, v, backend=name) - attention(q, k, v, backend="standard")
        return f"Max difference: {float(difference.abs().max()):.6g} ({words})"
    except Exception as error:  # the cases say more about it
        return f"Max difference: none, it raised {type(error).__name__} ({words})"


class Board:
    """Show what was judged: a table that follows the work on a terminal, a line now and then elsewhere."""

    def __init__(self, console: Console, tasks: Sequence[Task], device: torch.device) -> None:
        self.console, self.device = console, device
        self.rows: dict[str, list[Row]] = {name: [] for task in tasks for name in task.backends}
        self.counts: dict[str, Counter[str]] = {name: Counter() for name in self.rows}
        self.total = sum(len(task.backends) for task in tasks)

    def watch(self, rows: Iterable[Row], seen: list[Row]) -> None:
        """Show the rows as they come, and add each to those that were seen."""
        said_s = monotonic()
        live = Live(self._table(""), console=self.console, transient=True) if self.console.is_terminal else None
        with live or nullcontext():
            for row in rows:
                seen.append(row)
                self.rows[row.backend].append(row)
                self.counts[row.backend][row.verdict.status] += 1
                if row.verdict.status == "wrong":
                    self._say_wrong(row)
                latest = f"{len(seen)} of {self.total}: {row.backend} {row.verdict.status} in {row.case.name}"
                if live is not None:
                    live.update(self._table(latest))
                elif monotonic() - said_s > SAY_EVERY_S:
                    said_s = monotonic()
                    self._say(latest)

    def summarise(self) -> None:
        """Show the counts, where each backend came closest to what is allowed, and why cases were left out."""
        self.console.print(self._table())
        for name, rows in self.rows.items():
            if judged := [row for row in rows if row.verdict.errors]:
                row = max(judged, key=lambda row: _worst(row)[0])
                self._say(f"{name} came closest in {row.case.name}: {_errors(row)}")
        reasons: dict[tuple[str, str], Counter[str]] = {}
        for row in (row for rows in self.rows.values() for row in rows):
            if row.verdict.reason and row.verdict.status != "wrong":
                reasons.setdefault((row.verdict.status, row.verdict.reason), Counter())[row.backend] += 1
        for (status, reason), names in reasons.items():
            self._say(f"{status}: {', '.join(f'{name} ({count})' for name, count in names.items())}: {reason}")
        wrong = {name: counts["wrong"] for name, counts in self.counts.items() if counts["wrong"]}
        if wrong:
            self._say(f"WRONG: {', '.join(f'{name} in {count} cases' for name, count in wrong.items())}")
        elif (seen := sum(counts.total() for counts in self.counts.values())) < self.total:
            self._say(f"stopped after {seen} of {self.total}; nothing was wrong so far")
        elif not any(counts["ok"] for counts in self.counts.values()):
            self._say("nothing was judged: every case was unsupported or out of memory")
        else:
            self._say("nothing is wrong")

    def _say(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _say_wrong(self, row: Row) -> None:
        if (count := self.counts[row.backend]["wrong"]) <= SAY_WRONG:
            self._say(f"WRONG {row.backend} in {row.case.name}: {row.verdict.reason}")
            again = ["--device", self.device.type, "--backend", f"[{row.backend}]", "--case", f"[{row.case.name}]"]
            self._say(f"  again: {shlex.join(['flashlab', 'check', *again])}")
        elif count == SAY_WRONG + 1:
            self._say(f"WRONG {row.backend} in more cases, which are only counted here (--json lists them)")

    def _table(self, latest: str | None = None) -> Table:
        """Lay out a line for each backend: counts, and while it goes on the errors of its latest case."""
        table = Table("backend", *(Column(status, justify="right") for status in STATUSES), box=None, caption=latest)
        if latest is not None:
            table.add_column("latest errors", no_wrap=True)
        for name, rows in self.rows.items():
            counts = self.counts[name]
            errors = [_errors(rows[-1])] if latest is not None and rows else []
            cells = [str(counts[status] or "") for status in STATUSES]
            table.add_row(name, *cells, *errors, style="red" if counts["wrong"] else None)
        return table


def _errors(row: Row) -> str:
    """Write down the errors of the output or gradient that is nearest to what is allowed, or furthest beyond it."""
    if not row.verdict.errors:
        return row.verdict.status
    _, name, errors = _worst(row)
    return f"{name} {errors.error:.2g}, standard {errors.standard_error:.2g}, allowed {errors.allowed:.2g}"


def _worst(row: Row) -> tuple[float, str, Errors]:
    return max((each.error / max(each.allowed, SMALLEST), name, each) for name, each in row.verdict.errors.items())


def _known(option: str, asked: list[str] | None, known: Collection[str]) -> list[str] | None:
    """Refuse what does not exist, naming the nearest."""
    for each in asked or []:
        if each not in known:
            nearest = difflib.get_close_matches(each, known, n=1, cutoff=0.0)[0]
            raise UserError(f"{option}: there is no {each!r}; did you mean {nearest!r}? (there are {', '.join(known)})")
    return asked


def _no_case(asked: dict[str, Any], planned: Sequence[Task]) -> str:
    """Say what none of the cases has, and what they have."""
    wanted = (f"{name} {', '.join(map(str, values))}" for name, values in asked.items() if values)
    there = (f"{name} {', '.join(map(str, sorted({getattr(task.case, name) for task in planned})))}" for name in asked)
    return f"none of the cases has {' and '.join(wanted)}: there are {' and '.join(there)}; --case takes any"


def _as_json(row: Row, device: torch.device) -> dict[str, Any]:
    resolved = resolve("auto", describe(row.case, device)) if row.backend == "auto" else row.backend
    return {
        "backend": row.backend,
        "resolved": resolved,
        "case": row.case.name,
        "dtype": row.case.dtype,
        "head_dim": row.case.head_dim,
        "status": row.verdict.status,
        "reason": row.verdict.reason,
        "errors": {
            name: {rule: float(f"{value:.4g}") for rule, value in errors._asdict().items()}
            for name, errors in row.verdict.errors.items()
        },
    }
