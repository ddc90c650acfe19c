"""`flashlab bench sweep`: measure every cell of some grids, each where it cannot spoil another, into one result file.

One worker process measures cell after cell, and is replaced whenever a cell was not simply measured: out of memory, an
error, a crash, too long. Before that, several workers run what compiles its kernels, which then lie on the disk.
"""

import json
import signal
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from itertools import product
from multiprocessing.connection import wait
from pathlib import Path
from time import monotonic
from typing import Any, Literal, NamedTuple

from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column

from flashlab.attention import resolve
from flashlab.attention.backends import BACKENDS
from flashlab.bench.case import DTYPES, Case
from flashlab.bench.flops import PASSES
from flashlab.bench.measure import METHOD, Row, ceilings, measure, new_row, rehearse
from flashlab.errors import Terminated, UserError, alone_in, one_line
from flashlab.machine import choose_device, provenance, usable_cores, write_result
from flashlab.worker import Worker, WorkerLost

FILE, LOG = "sweep.json", "workers.log"
COMPILED = ("flash_attention_4", "flex_attention")  # backends that compile kernels, for seconds each ...
COMPILED_BY_LENGTH = ("flex_attention",)  # ... and for every length anew
COMPILE_AT_MOST_S = 300.0
SAVE_EVERY_S = 2.0
SECONDS_BESIDE_TIMING = 0.25  # inputs, the comparison and warm-up of one measurement, about; for the first estimate
LONGEST_TRAFFIC = 8192  # counting the bytes of longer sequences takes many seconds on a CPU
SPOILT = ("oom", "failed")
# What a sweep must have in common with the rows that it adds to, beside its configuration.
SAME = ("git_commit", "image", "machine.torch", "machine.flash_attn", "machine.cpu.model")


@dataclass
class Grid:
    """Workloads, backends and passes: every combination of the lists is measured, in the order in which they stand.

    Args:
        backends: keys of `flashlab backends`, or auto.
        seqlens: lengths of queries and keys.
        head_dims: head dimensions.
        masks: full, causal, window:LEFT (causal), blocks:SHARE (share of the 128 x 128 blocks that are computed).
        dtypes: float16, bfloat16, float32.
        passes: forward, backward, forward_backward.
        num_heads: query heads; or give hidden.
        hidden: num_heads times head_dim, from which num_heads follows.
        num_kv_heads: key/value heads; as many as query heads if not given.
        batch_size: sequences; or give tokens.
        tokens: batch_size times the length, from which batch_size follows.
    """

    backends: list[str]
    seqlens: list[int]
    head_dims: list[int] = field(default_factory=lambda: [64])
    masks: list[str] = field(default_factory=lambda: ["causal"])
    dtypes: list[str] = field(default_factory=lambda: ["bfloat16"])
    passes: list[str] = field(default_factory=lambda: list(PASSES))
    num_heads: int | None = None
    hidden: int | None = None
    num_kv_heads: int | None = None
    batch_size: int | None = None
    tokens: int | None = None


class Cell(NamedTuple):
    """One measurement."""

    case: Case
    backend: str
    pass_name: str


def sweep(
    *,
    grids: list[Grid] | None = None,
    out: Path = Path("runs/attention_sweep"),
    device: Literal["auto", "cpu", "cuda"] = "auto",
    budget_ms: PositiveFloat = 150.0,
    min_repeats: PositiveInt = 5,
    max_repeats: PositiveInt = 100,
    timeout_s: PositiveFloat = 180.0,
    compile_jobs: NonNegativeInt | None = None,
    resume: bool = True,
) -> int:
    """Measure attention over lengths, head dimensions, precisions, masks, passes and backends, into OUT/sweep.json.

    Each backend is compared with the reference before it is timed. Stopped, the same command measures what is missing.

    Args:
        grids: what to measure; see examples/attention_bench.
        out: folder of the result.
        device: auto is the GPU if there is one.
        budget_ms: time for the timed calls of one measurement, in milliseconds; as many as fit in it are made ...
        min_repeats: ... but no fewer than this,
        max_repeats: and no more than this.
        timeout_s: longest time for one measurement, in seconds.
        compile_jobs: processes that compile kernels before anything is timed; by default half the cores, at most 8;
            0 leaves compiling to the measurements.
        resume: keep what the folder has of this sweep; false measures everything anew.
    """
    if not grids:
        raise UserError("nothing says what to measure: give --config a file as those in examples/attention_bench")
    place = choose_device(device)
    cells = expand(grids, place)
    options = {"budget_ms": budget_ms, "min_repeats": min_repeats, "max_repeats": max_repeats}
    config = {"grids": [asdict(grid) for grid in grids], "device": place, **options}
    with alone_in(out, "is being written by another sweep; wait for it, or choose another --out"):
        return _sweep(_Result(out / FILE, cells, config, resume=resume), _jobs(compile_jobs, place), timeout_s, options)


def _sweep(result: "_Result", jobs: int, timeout_s: float, options: dict[str, Any]) -> int:
    cells, todo = result.cells, result.missing()
    console = Console(highlight=False)
    minutes = max(len(todo) * (options["budget_ms"] / 1e3 + SECONDS_BESIDE_TIMING) / 60, 1)
    resumed = f", {len(cells) - len(todo)} of them made before" if len(todo) < len(cells) else ""
    compiling = ", and what compiling takes" if any(cell.backend in COMPILED for cell in todo) else ""
    estimate = f": about {minutes:.0f} min{compiling}" if todo else ""
    console.print(f"{len(cells)} measurements{resumed}{estimate}")
    try:
        if todo:
            with _progress(console) as progress:
                _run(result, todo, jobs, timeout_s, options, progress)
    except KeyboardInterrupt as error:
        console.print(f"stopped after {len(result.rows)} of {len(cells)}: the same command measures the others")
        return 128 + (signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT)
    finally:
        result.save()
    counts = Counter(row["status"] for row in result.rows.values())
    listed = ", ".join(f"{count} {status}" for status, count in counts.most_common())
    console.print(f"{result.path}: {listed}", soft_wrap=True)
    return int(counts["wrong"] > 0)


def expand(grids: list[Grid], device: str) -> list[Cell]:
    """List the cells of some grids, each once, by precision, mask, head dimension, length, backend and pass.

    So what a list names first is measured first, and the backends of one workload next to each other.

    Raises:
        UserError: a name or a number that means nothing; the message says which and what would.
    """
    cells: dict[Cell, None] = {}
    for number, grid in enumerate(grids, 1):
        place = f"grid {number}"
        _check_names(place, "dtypes", grid.dtypes, DTYPES)
        _check_names(place, "passes", grid.passes, PASSES)
        for dtype, mask, head_dim, seqlen in product(grid.dtypes, grid.masks, grid.head_dims, grid.seqlens):
            if min(head_dim, seqlen) < 1:
                raise UserError(f"{place}: head_dims and seqlens must be 1 or more; got {head_dim} and {seqlen}")
            num_heads = _either(place, "num_heads", grid.num_heads, "hidden", grid.hidden, "head_dims", head_dim)
            batch_size = _either(place, "batch_size", grid.batch_size, "tokens", grid.tokens, "seqlens", seqlen)
            num_kv_heads = grid.num_kv_heads or num_heads
            if num_heads % num_kv_heads:
                raise UserError(f"{place}: num_kv_heads {num_kv_heads} must divide the {num_heads} query heads")
            case = Case(batch_size, seqlen, num_heads, num_kv_heads, head_dim, dtype, mask, device)
            case.mask_arguments()  # refuses a mask that does not exist
            for backend in grid.backends:
                if backend not in ("auto", *BACKENDS):
                    resolve(backend, case.spec(needs_grad=False))  # refuses it
                cells |= dict.fromkeys(Cell(case, backend, pass_name) for pass_name in grid.passes)
    if not cells:
        raise UserError("the grids name nothing to measure: each needs a backend, a length and a pass at least")
    return list(cells)


def _check_names(place: str, key: str, names: list[str], known: Iterable[str]) -> None:
    for name in names:
        if name not in known:
            raise UserError(f"{place}: {key} {name!r} is none of {', '.join(known)}")


def _either(place: str, name: str, value: int | None, whole: str, total: int | None, part: str, size: int) -> int:
    """Return a number that is given, or that follows from a product with another."""
    if (value is None) == (total is None):
        raise UserError(f"{place}: give either {name} or {whole}")
    if value is None and total is not None:
        if total % size:
            raise UserError(f"{place}: {whole} {total} is no multiple of {size}, one of {part}")
        value = total // size
    if value is None or value < 1:
        raise UserError(f"{place}: {name} must be 1 or more; got {value}")
    return value


class _Result:
    """The result file, which at any time holds what was measured so far.

    Raises:
        UserError: the file there is no sweep's, or of another sweep.
    """

    def __init__(self, path: Path, cells: list[Cell], config: dict[str, Any], *, resume: bool) -> None:
        self.path, self.cells = path, cells
        self.record: dict[str, Any] = {**provenance("attention_sweep"), "method": METHOD, "config": config}
        self.rows: dict[tuple[Any, ...], Row] = {}
        if resume and path.exists():
            self._continue(config)
        self._saved_s = 0.0

    def _continue(self, config: dict[str, Any]) -> None:
        remedy = "choose another --out, or measure anew with --resume false"
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            rows = {_key(row): row for row in found["rows"]}
            if found["kind"] != self.record["kind"]:
                raise ValueError(found["kind"])
            for name in (*SAME, *(f"config.{key}" for key in config if key != "grids")):
                if _look_up(found, name) != _look_up(self.record, name):
                    raise UserError(f"{self.path} is of another sweep, its {name} differs: {remedy}")
            if not rows.keys() <= {_key(_row(cell)) for cell in self.cells}:  # a sweep may grow, and lose nothing
                raise UserError(f"{self.path} is of another sweep, with measurements that are none of this: {remedy}")
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.path} is no result of a sweep: {remedy}") from error
        kept = ("ceilings",) if found["config"] != config else ("ceilings", "traffic")
        self.record |= {name: found[name] for name in kept if name in found}
        self.rows = rows

    def missing(self) -> list[Cell]:
        return [cell for cell in self.cells if _key(_row(cell)) not in self.rows]

    def add(self, row: Row) -> None:
        self.rows[_key(row)] = row
        if monotonic() - self._saved_s > SAVE_EVERY_S:
            self.save()

    def save(self) -> None:
        """Replace the file by what is known now."""
        ordered = [self.rows[key] for key in (_key(_row(cell)) for cell in self.cells) if key in self.rows]
        write_result(self.path, self.record | {"rows": ordered})
        self._saved_s = monotonic()


def _look_up(record: dict[str, Any], dotted: str) -> Any:
    found: Any = record
    for name in dotted.split("."):
        found = found.get(name) if isinstance(found, dict) else None
    return found


def _row(cell: Cell, status: str = "ok", reason: str | None = None) -> Row:
    return new_row(cell.case, cell.backend, cell.pass_name, status, reason)


def _key(row: Row) -> tuple[Any, ...]:
    names = ("backend", "pass", "dtype", "mask", "batch_size", "seqlen", "num_heads", "num_kv_heads", "head_dim")
    return tuple(row[name] for name in names)


def _run(
    result: _Result,
    todo: list[Cell],
    jobs: int,
    timeout_s: float,
    options: dict[str, Any],
    progress: Progress,
) -> None:
    """Compile, count the traffic, measure the ceilings, then cell after cell."""
    log = result.path.with_name(LOG)
    _compile_ahead(todo, log, jobs, progress)
    if "traffic" not in result.record:
        counting = progress.add_task("counting bytes", total=1)
        result.record["traffic"] = _traffic(result.cells)
        progress.advance(counting)
    task = progress.add_task("measuring", total=len(todo))
    worker: Worker | None = None
    try:
        for cell in todo:
            progress.update(task, description=_title(cell))
            worker = worker or Worker(log)
            if cell is todo[0]:
                _raise_ceilings(result, worker, timeout_s)
            try:
                row = worker.call(measure, *cell, timeout_s=timeout_s, **options)
            except WorkerLost as error:
                killed = error.signal_number == signal.SIGKILL
                reason = f"{error}, most likely since memory ran out" if killed else str(error)
                row = _row(cell, "oom" if killed else "failed", reason)
            except Exception as error:
                row = _row(cell, "failed", one_line(error))
            result.add(row)
            if row["status"] in (*SPOILT, "wrong"):
                progress.console.print(f"{row['status']}: {_title(cell)}: {escape(row['reason'])}", soft_wrap=True)
            if row["status"] in SPOILT:
                worker.stop()
                worker = None
            progress.advance(task)
        if worker:
            _raise_ceilings(result, worker, timeout_s)
    finally:
        if worker:
            worker.stop()


def _raise_ceilings(result: _Result, worker: Worker, timeout_s: float) -> None:
    """Measure the ceilings; the best of all times counts, since a busy machine gives less."""
    device, dtypes = result.cells[0].case.device, sorted({cell.case.dtype for cell in result.cells})
    known = result.record.get("ceilings", {})
    try:
        found = worker.call(ceilings, device, dtypes, timeout_s=timeout_s)
        result.record["ceilings"] = {name: max(value, known.get(name, 0.0)) for name, value in found.items()}
    except Exception as error:
        raise UserError(
            f"device {device} does not even multiply matrices: {one_line(error)} (try `flashlab doctor`)"
        ) from error


def _compile_ahead(cells: list[Cell], log: Path, jobs: int, progress: Progress) -> None:
    """Let several workers run once what compiles its kernels; what goes wrong there is said when it is measured."""
    shares: dict[Any, list[Cell]] = {}
    for cell in cells:
        if cell.backend in COMPILED:
            case, length = cell.case, cell.case.seqlen if cell.backend in COMPILED_BY_LENGTH else None
            key = cell.backend, length, case.head_dim, case.dtype, case.mask, cell.pass_name == "forward"
            shares.setdefault(key, []).append(cell)
    if not shares or not jobs:
        return
    task = progress.add_task("compiling kernels", total=len(shares))
    waiting = list(shares.values())[::-1]
    idle: list[Worker] = []
    busy: dict[Any, Worker] = {}
    deadline_s = monotonic() + COMPILE_AT_MOST_S
    try:
        while (waiting or busy) and monotonic() < deadline_s:
            while waiting and len(busy) < jobs:
                worker = idle.pop() if idle else Worker(log)
                busy[worker.connection] = worker
                worker.send(rehearse, waiting.pop())
            for connection in wait(list(busy), timeout=1.0):
                worker = busy.pop(connection)
                try:
                    worker.receive()
                    idle.append(worker)
                except Exception:
                    worker.stop()
                progress.advance(task)
    finally:
        for worker in (*idle, *busy.values()):
            worker.stop()


def _traffic(cells: list[Cell]) -> list[Row]:
    """Count the bytes that each algorithm moves for one head, forward, at the lengths of a sweep."""
    from flashlab.attention.traffic import bytes_moved

    wanted: dict[tuple[Any, int, int, float], None] = {}
    for case in dict.fromkeys(cell.case for cell in cells if cell.case.seqlen <= LONGEST_TRAFFIC):
        wanted |= dict.fromkeys((name, case.seqlen, case.head_dim, 1.0) for name in ("standard", "tiled"))
        if case.mask.startswith("blocks:"):
            wanted["block_sparse", case.seqlen, case.head_dim, float(case.mask.partition(":")[2])] = None
    names = ("algorithm", "seqlen", "head_dim", "density")
    return [dict(zip(names, each, strict=True)) | bytes_moved(*each) for each in wanted]


def _jobs(asked: int | None, device: str) -> int:
    """Say how many processes compile ahead; where there are few cores, compiling ahead gains nothing."""
    if asked is not None:
        return asked
    cores = usable_cores()
    return min(cores // 2, 8) if cores > 2 and device == "cuda" else 0


def _title(cell: Cell) -> str:
    case = cell.case
    return f"{case.dtype} {case.mask} head_dim {case.head_dim} seqlen {case.seqlen} {cell.backend} {cell.pass_name}"


def _progress(console: Console) -> Progress:
    title = TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1))
    counts = BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    return Progress(*counts, title, console=console, expand=True)
