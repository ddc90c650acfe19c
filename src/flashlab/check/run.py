"""Cases times backends: in this process, or on a GPU in several at once.

Backends that compile take seconds for each kind of call, which workers share; and a kernel that reads where it must not
spoils its process for all that follow, which a worker contains.
"""

import tempfile
from collections.abc import Iterator, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple

import torch

from flashlab.check.cases import Case, chosen_cases
from flashlab.check.judge import Judge, Verdict
from flashlab.errors import is_out_of_memory, one_line
from flashlab.machine import usable_cores
from flashlab.worker import Worker, WorkerLost

COMPILED = ("flash_attention_4", "flex_attention", "auto")  # what auto chooses may be one of the others
TIMEOUT_S = 300.0  # for the cases of one kind; a kernel that hangs would hold up all others
MEMORY_GIB = 8  # of the GPU for each worker


class Task(NamedTuple):
    """A case, and the backends to judge by it."""

    case: Case
    backends: tuple[str, ...]


class Row(NamedTuple):
    """How one backend did in one case."""

    case: Case
    backend: str
    verdict: Verdict


class DeviceLost(Exception):  # noqa: N818 - reads as the statement it is
    """A backend left the GPU in a state in which this process can no longer use it."""


def plan(backends: Sequence[str], cases: Sequence[Case], device: torch.device, *, full: bool) -> list[Task]:
    """Say which backends are judged by which cases.

    Args:
        backends: Names from the table, or "auto".
        cases: What was asked for by name; none for a choice.
        device: CPUs multiply float16 matrices up to a hundred times slower than others, and are spared the long ones.
        full: Take all cases instead of the quick ones.
    """
    by_case: dict[Case, list[str]] = {}
    for backend in backends:
        for case in cases or chosen_cases(full=full, compiled=backend in COMPILED):
            if not cases and device.type == "cpu" and case.dtype == "float16" and case.is_long:
                continue
            by_case.setdefault(case, []).append(backend)
    return [Task(case, tuple(names)) for case, names in by_case.items()]


def run(tasks: Sequence[Task], device: torch.device) -> Iterator[Row]:
    """Judge; the rows of a case come one after the other on the CPU, in any order from workers."""
    if device.type == "cpu":
        for task in tasks:
            yield from judge(task, device)
    else:
        yield from _run_in_workers(tasks, device)


def judge(task: Task, device: torch.device) -> Iterator[Row]:
    """Judge the backends of a task by its case."""
    try:
        by_case = Judge(task.case, device)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        verdict = Verdict("oom", f"the reference: {one_line(error)}", {})
        yield from (Row(task.case, backend, verdict) for backend in task.backends)
        return
    for backend in task.backends:
        yield Row(task.case, backend, by_case.judge(backend))


def judge_all(tasks: Sequence[Task], device: str) -> list[Row]:
    """Judge in a worker.

    Raises:
        DeviceLost: the GPU cannot be used any more; whatever came last did it.
    """
    rows = []
    for task in tasks:
        for row in judge(task, torch.device(device)):
            rows.append(row)
            if row.verdict.status == "wrong":
                try:
                    torch.cuda.synchronize()
                except RuntimeError as error:
                    raise DeviceLost(str(row.verdict.reason)) from error
    return rows


def _run_in_workers(tasks: Sequence[Task], device: torch.device) -> Iterator[Row]:
    groups: dict[tuple[object, ...], list[Task]] = {}
    for task in tasks:
        case = task.case
        kind = case.dtype, case.head_dim, case.mask, case.heads, case.feature, case.layout
        groups.setdefault(kind, []).append(task)
    compiled = [group for group in groups.values() if any(set(COMPILED) & set(task.backends) for task in group)]
    waiting = [group for group in groups.values() if group not in compiled] + compiled[::-1]  # taken from its end
    idle: list[Worker] = []
    busy: dict[Any, tuple[Worker, list[Task], float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "workers.log"
        try:
            while waiting or busy:
                while waiting and len(busy) < _num_workers(device):
                    worker = idle.pop() if idle else Worker(log)
                    group = waiting.pop()
                    worker.send(judge_all, group, str(device))
                    busy[worker.connection] = worker, group, monotonic() + TIMEOUT_S
                late = [connection for connection, (*_, deadline) in busy.items() if monotonic() > deadline]
                for connection in {*wait(list(busy), timeout=1.0), *late}:
                    worker, group, _ = busy.pop(connection)
                    try:
                        rows = worker.receive(timeout_s=0.0)
                        idle.append(worker)
                    except Exception:  # the worker is lost, or the GPU is to it; one of the group did it
                        worker.stop()
                        rows = _run_alone(group, device, log)
                    yield from rows
        finally:
            for worker in (*idle, *(worker for worker, *_ in busy.values())):
                worker.stop()


def _run_alone(group: Sequence[Task], device: torch.device, log: Path) -> Iterator[Row]:
    """Judge one by one, so that whatever breaks its process breaks nothing else."""
    worker = None
    try:
        for case, backends in group:
            for backend in backends:
                worker = worker or Worker(log)
                try:
                    yield from worker.call(judge_all, [Task(case, (backend,))], str(device), timeout_s=TIMEOUT_S)
                except Exception as error:
                    is_lost = isinstance(error, DeviceLost | WorkerLost)
                    reason = str(error) if is_lost else f"raised {one_line(error)}"
                    yield Row(case, backend, Verdict("wrong", reason, {}))
                    worker.stop()
                    worker = None
    finally:
        if worker is not None:
            worker.stop()


def _num_workers(device: torch.device) -> int:
    memory_gib = torch.cuda.mem_get_info(device)[0] / 2**30
    return max(1, min(usable_cores(), int(memory_gib / MEMORY_GIB)))
