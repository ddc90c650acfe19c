"""`flashlab check`: which attention backends are right on this machine."""

import json as json_format
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from time import monotonic
from typing import Any, Literal

import torch
from rich.console import Console
from rich.live import Live
from rich.table import Table

from flashlab.attention import AttentionSpec, attention, resolve
from flashlab.attention.backends import BACKENDS, why_not
from flashlab.check.cases import DTYPES, HEAD_DIMS, Case, parse
from flashlab.check.run import Row, Task, plan, run
from flashlab.errors import UserError, writing
from flashlab.machine import provenance

METHOD = (
    "Every result is compared with standard attention in float64. Rule 1: its largest error is at most `allowed`, twice "
    "that of standard attention in the same precision plus rounding. Rule 2: the same with root mean squares, in blocks of "
    "128 or more rows of one head; `mean_ratio` is the worst block's error over what is allowed. Also judged: shape, dtype, "
    "NaN and infinity, values never written, inputs overwritten, caches bit by bit, and the same bits when repeated."
)
STATUSES = ("ok", "unsupported", "wrong", "oom")
PLAIN_EVERY_S = 10.0


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
    """Compare every attention backend with the reference, and exit with 1 if one is wrong.

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
    on, backends = _device(device), _known("--backend", backend, ["auto", *BACKENDS]) or [*BACKENDS, "auto"]
    cases = [parse(name) for name in case or []]
    dtypes, head_dims = _known("--dtype", dtype, DTYPES), _known("--head_dim", head_dim, HEAD_DIMS)
    tasks = [
        task
        for task in plan(backends, cases, on, full=full)
        if task.case.dtype in (dtypes or DTYPES) and task.case.head_dim in (head_dims or [task.case.head_dim])
    ]
    if not tasks:
        raise UserError(f"none of the cases has dtype {dtype} and head_dim {head_dim}: leave one out, or take --full")
    if json is not None:
        _write(json, None)  # not after minutes of work
    console = Console()
    example = seed_example(on)
    console.print(example, markup=False, highlight=False, soft_wrap=True)
    config = {"full": full, "backends": backends, "device": str(on), "dtype": dtype, "head_dim": head_dim, "case": case}
    board = Board(console, tasks, on)
    rows = board.watch(run(tasks, on))
    board.summarise()
    if json is not None:
        facts = {**provenance("attention_check"), "method": METHOD, "config": config, "seed_example": example}
        _write(json, {**facts, "rows": [_as_json(row, on) for row in rows]})
    return int(any(row.verdict.status == "wrong" for row in rows))


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
        self.total = sum(len(task.backends) for task in tasks)
        self.rows: dict[str, list[Row]] = {name: [] for task in tasks for name in task.backends}
        self.counts = {name: Counter[str]() for name in self.rows}
        self.worst: dict[str, tuple[float, str, Row]] = {}

    def watch(self, rows: Iterable[Row]) -> list[Row]:
        """Show the rows as they come, and return them."""
        seen: list[Row] = []
        said_s = monotonic()
        with Live(self._table(), console=self.console, transient=True) if self.console.is_terminal else nullcontext() as live:
            for row in rows:
                seen.append(row)
                self._add(row)
                if live is not None:
                    live.update(self._table())
                elif monotonic() - said_s > PLAIN_EVERY_S:
                    said_s = monotonic()
                    self._say(f"{len(seen)} of {self.total}: {row.backend} {row.verdict.status} in {row.case.name}")
        return seen

    def summarise(self) -> None:
        self.console.print(self._table(final=True))
        ...
