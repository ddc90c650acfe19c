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
        raise UserError("--quick and --full exclude each other")
    where = _device(device)
    tasks = plan(_backends(backend), [parse(name) for name in case or []] or None, where, full=full)
    tasks = [task for task in tasks if dtype is None or task.case.dtype in dtype]
    tasks = [task for task in tasks if head_dim is None or task.case.head_dim in head_dim]
    if not tasks:
        raise UserError(
            f"no case has dtype {dtype} and head_dim {head_dim}; there are {', '.join(DTYPES)} and {HEAD_DIMS}"
        )
    if json is not None:
        _write(json, {})
    ...
