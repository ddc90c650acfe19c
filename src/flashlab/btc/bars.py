"""Minute bars: read them from CSV, clean them, fill the minutes that are missing.

A bar is one minute of trading: the first, highest, lowest and last price, and the volume traded. Raw files hold rows
that cannot be (a high below the low), rows out of order, minutes twice and minutes not at all; everything done about
that is counted in `Cleaning`.
"""

import csv
import difflib
import gzip
import hashlib
import re
import time
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from io import BytesIO
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, NoReturn

import numpy as np
import pandas as pd

from flashlab.errors import UserError

FEATURES = ("open", "high", "low", "close", "volume")
COLUMNS = ("timestamp", *FEATURES)
HEADER = ",".join(name.capitalize() for name in COLUMNS)  # as the public data sets spell it

CHUNK_ROWS = 1 << 18  # 12 MiB of float64: few enough to stay small, many enough to stay fast
HEAD_BYTES = 1 << 16
STEPS_BEFORE_JUDGED = 16  # bars of a stream after which their usual distance is known
EARLIEST = int(pd.Timestamp("2009-01-01").timestamp())  # Bitcoin's first block is of 2009-01-03
UNITS = {"seconds": 1, "milliseconds": 10**3, "microseconds": 10**6, "nanoseconds": 10**9}  # per second


@dataclass(frozen=True)
class Bars:
    """Minute bars in time order.

    Attributes:
        minute: int32 ``[N]``, minutes from 1970-01-01 UTC to the bar's open, strictly increasing.
        values: float32 ``[N, 5]``, in the order of `FEATURES`. A volume of NaN marks a minute that no row reported and
            that `fill_missing` filled.
    """

    minute: np.ndarray
    values: np.ndarray

    def __len__(self) -> int:
        return len(self.minute)

    @property
    def observed(self) -> np.ndarray:
        """Bool ``[N]``: whether a row of the source reported the bar."""
        return ~np.isnan(self.values[:, FEATURES.index("volume")])

    @property
    def time(self) -> np.ndarray:
        """datetime64[m] ``[N]``: when the bar opens, UTC."""
        return self.minute.astype("datetime64[m]")


@dataclass(frozen=True)
class Source:
    """One file that was read: its name, the SHA-256 of its bytes as stored, its size in bytes, its data rows."""

    name: str
    sha256: str
    size: int
    rows: int


@dataclass(frozen=True)
class Cleaning:
    """What reading and cleaning found; every count is of rows.

    An impossible row is dropped and counted once, under the first of its faults in the order below. The remaining rows
    are put in time order, and of several rows of one minute the last stays. So
    ``rows = non_finite + price_not_positive + high_below_low + outside_range + negative_volume + duplicates + kept``.

    Attributes:
        sources: the files, in the order given.
        rows: data rows read.
        non_finite: rows with an empty, NaN or infinite cell, or one too large for float32.
        price_not_positive: rows with a price of 0 or less.
        high_below_low: rows whose high is below their low.
        outside_range: rows whose open or close is outside [low, high].
        negative_volume: rows with a volume below 0.
        out_of_order: rows that came after a row of a later time, and were moved.
        duplicates: rows dropped because a later row was of the same minute.
        kept: bars that remain.
    """

    sources: tuple[Source, ...]
    rows: int
    non_finite: int
    price_not_positive: int
    high_below_low: int
    outside_range: int
    negative_volume: int
    out_of_order: int
    duplicates: int
    kept: int


def read_bars(sources: Sequence[Path]) -> tuple[Bars, Cleaning]:
    """Read minute bars from CSV files, drop what cannot be and put the rest in time order.

    A file is plain, .gz or .zip (told by its content), with a header naming `COLUMNS` in either case and any order;
    other columns are ignored. Times are Unix seconds, Unix milliseconds or ISO-8601 (UTC unless they say otherwise) and
    are floored to the minute.

    Args:
        sources: files, joined in the order given; where two report one minute the later file's row stays.

    Raises:
        UserError: a file is not there, not CSV, damaged, lacks a column, has a cell that is no number, times that
            cannot be those of Bitcoin minute bars, or no row that can be kept.
    """
    parts = [_read_source(Path(source)) for source in sources]
    counts: Counter[str] = sum((part[3] for part in parts), Counter())
    second = np.concatenate([part[1] for part in parts])
    values = np.concatenate([part[2] for part in parts])
    files = tuple(part[0] for part in parts)
    del parts

    if (np.diff(second) < 0).any():
        counts["out_of_order"] = int(np.count_nonzero(second < np.maximum.accumulate(second)))
        order = np.argsort(second, kind="stable")
        second, values = second[order], values[order]
    minute = (second // 60).astype(np.int32)
    is_last = np.append(minute[1:] != minute[:-1], True)
    if not is_last.all():
        counts["duplicates"] = int(np.count_nonzero(~is_last))
        minute, values = minute[is_last], values[is_last]

    counted = {field.name: counts[field.name] for field in fields(Cleaning) if field.name not in ("sources", "kept")}
    return Bars(minute, values), Cleaning(sources=files, kept=len(minute), **counted)


def stream_bars(lines: Iterable[bytes], warn: Callable[[str], None]) -> Iterator[tuple[int, np.ndarray]]:
    """Read minute bars from the lines of a CSV as they come.

    The rules are those of `read_bars`, as far as they can be without seeing what is still to come. A row that is left
    out is reported, also one with a cell that is no number: a stream outlives a garbled line. So is one of a minute
    before the last bar's. The last bar's minute may come again, and is then to replace it.

    Args:
        lines: the header, then rows.
        warn: is told of every row that is left out.

    Yields:
        The minute since 1970 UTC, never before the one yielded last, and float32 ``[5]`` in the order of `FEATURES`.

    Raises:
        UserError: there is no header or no row, a column is missing, or the bars are not a minute long.
    """
    name = Path("standard input")
    numbered = ((number, line) for number, line in enumerate(lines, start=1) if line.strip())
    head = list(islice(numbered, 2))
    if head and head[0][1].startswith((b"\x1f\x8b", b"PK\3\4")):
        raise UserError(f"{name} is compressed; unpack it first, as with zcat")
    layout = _find_layout(name, BytesIO(b"".join(line for _, line in head)))
    header = head[0][1].strip()
    unit, last = "", 0
    seconds: list[int] = []
    for number, line in chain(head[1:], numbered):
        if line.strip() == header:  # of the next file in a row of files
            continue
        try:
            cells = _parse_row(line, layout)
            unit = unit or _guess_unit(name, cells[:1])
            if np.isfinite(cells[0]) and not EARLIEST * UNITS[unit] <= cells[0] <= _latest() * UNITS[unit]:
                raise ValueError(f"its time is not between 2009 and tomorrow (Unix {unit}, or ISO-8601)")
            counts: Counter[str] = Counter()
            _, (*kept,) = _clean(cells[:, None], counts)
            if not kept:
                fault = next(name for name, count in counts.items() if count and name != "rows")
                raise ValueError(fault.replace("_", " "))
            second = int(cells[0]) // UNITS[unit]
            if second // 60 < last:
                raise ValueError("out of order")
        except (ValueError, csv.Error) as error:
            warn(f"{name}, line {number} is left out: {error}")
            continue
        last = second // 60
        if len(seconds) < STEPS_BEFORE_JUDGED:
            seconds.append(second)
            if len(seconds) == STEPS_BEFORE_JUDGED:
                _check_step(name, np.array(seconds))
        yield last, kept[0]


def fill_missing(bars: Bars, max_gap: int) -> Bars:
    """Fill the minutes without a bar: all prices are the previous close, the volume is NaN.

    Args:
        bars: bars in time order.
        max_gap: a gap of more missing minutes than this is left as it is.
    """
    steps = np.diff(bars.minute, append=bars.minute[-1:] + 1)  # the last bar is followed by no gap
    repeats = np.where(steps - 1 <= max_gap, steps, 1)
    source = np.repeat(np.arange(len(bars)), repeats)
    first = np.cumsum(repeats) - repeats
    age = np.arange(len(source)) - first[source]  # minutes since the last bar that was reported
    filled = age > 0
    values = bars.values[source]
    values[filled, :4] = values[filled, 3:4]
    values[filled, 4] = np.nan
    return Bars((bars.minute[source] + age).astype(np.int32), values)


def segments(bars: Bars) -> np.ndarray:
    """Find the runs of bars without a missing minute.

    Returns:
        int64 ``[K, 2]``: first row of each run and the row after its last.
    """
    edges = np.flatnonzero(np.diff(bars.minute) != 1) + 1
    bounds = np.concatenate([[0], edges, [len(bars)]]) if len(bars) else np.zeros(1)
    return np.stack([bounds[:-1], bounds[1:]], axis=1).astype(np.int64)


def log_features(values: np.ndarray) -> np.ndarray:
    """Take the natural log of the prices and ``log(1 + volume)``, a volume of NaN (a filled minute) counting as 0.

    Args:
        values: ``[N, 5]`` in the order of `FEATURES`.

    Returns:
        float64 ``[N, 5]``; a float32 log would round prices to about 0.01 basis points.
    """
    logs = np.empty(values.shape, dtype=np.float64)
    np.log(values[:, :4], out=logs[:, :4], dtype=np.float64)
    np.log1p(np.nan_to_num(values[:, 4]), out=logs[:, 4], dtype=np.float64)
    return logs


@dataclass(frozen=True)
class _Layout:
    """How to read one file.

    Attributes:
        skip: lines before the first row.
        width: columns of the header.
        positions: where each of `COLUMNS` stands.
        iso: whether times are ISO-8601.
    """

    skip: int
    width: int
    positions: dict[str, int]
    iso: bool

    def chunks(self, stream: IO[bytes], **options: object) -> Iterator[pd.DataFrame]:
        """Iterate over the rows, `CHUNK_ROWS` at a time; columns that are none of `COLUMNS` have a number as name."""
        names = {position: name for name, position in self.positions.items()}
        read_options = {
            "header": None,
            "skiprows": self.skip,
            "names": [names.get(position, position) for position in range(self.width)],
            "index_col": False,
            "chunksize": CHUNK_ROWS,
            "encoding_errors": "replace",  # a byte that is not UTF-8 then fails as a number, with its line
        } | options
        with pd.read_csv(stream, **read_options) as reader:  # type: ignore[call-overload]
            yield from reader


def _read_source(path: Path) -> tuple[Source, np.ndarray, np.ndarray, Counter[str]]:
    """Read one file: its description, int64 seconds ``[N]`` and float32 values ``[N, 5]`` of possible rows, counts."""
    seconds: list[np.ndarray] = []
    values: list[np.ndarray] = []
    counts: Counter[str] = Counter()
    unit = None
    with _open_csv(path) as (stream, sha256):
        layout = _find_layout(path, stream)
        # Of columns that nobody needs a byte is kept: `usecols` would let rows pass that have too many cells.
        dtypes: dict[Any, str] = dict.fromkeys(range(layout.width), "S1") | dict.fromkeys(FEATURES, "float64")
        dtypes["timestamp"] = "str" if layout.iso else "float64"
        try:
            for chunk in layout.chunks(stream, dtype=dtypes):
                if layout.iso:
                    times = _to_numbers("timestamp", chunk["timestamp"], layout)
                    if times.isna().sum() > chunk["timestamp"].isna().sum():
                        raise ValueError("a time is not ISO-8601")
                    chunk["timestamp"] = times
                cells = np.stack([chunk[column] for column in COLUMNS])
                finite = cells[0, np.isfinite(cells[0])]
                if len(finite):
                    unit = unit or _guess_unit(path, finite)
                    if finite.min() < EARLIEST * UNITS[unit] or finite.max() > _latest() * UNITS[unit]:
                        _fail_out_of_range(path, layout, unit)
                possible, kept = _clean(cells, counts)
                seconds.append(cells[0, possible].astype(np.int64) // UNITS[unit or "seconds"])
                values.append(kept)
        except pd.errors.ParserError as error:
            if found := re.search(r"in line (\d+), saw (\d+)", str(error)):
                _fail_too_wide(path, found[1], found[2], layout.width)
            raise UserError(
                f"{path} is not a CSV file: {' '.join(str(error).split())}; fetch or export it again"
            ) from error
        except ValueError:  # pandas says what it could not convert, but not where
            _fail_at(path, layout, lambda column, numbers: numbers.isna())
    second = np.concatenate(seconds)
    if not len(second):
        faults = ", ".join(f"{count} {name}" for name, count in counts.items() if count and name != "rows")
        raise UserError(
            f"{path}: not one of its {counts['rows']} rows can be a bar ({faults}); check that it is the right file"
        )
    _check_step(path, second)
    return Source(path.name, sha256, path.stat().st_size, counts["rows"]), second, np.concatenate(values), counts


def _parse_row(line: bytes, layout: _Layout) -> np.ndarray:
    """Read one row: float64 ``[6]`` in the order of `COLUMNS`, NaN for an empty cell."""
    row = next(csv.reader([line.decode("utf-8", "replace")]))
    if any(map(str.strip, row[layout.width :])):
        raise ValueError(f"{len(row)} cells under a header of {layout.width} columns")
    cells = np.full(len(COLUMNS), np.nan)
    for index, column in enumerate(COLUMNS):
        cell = row[layout.positions[column]].strip() if layout.positions[column] < len(row) else ""
        if column == "timestamp" and layout.iso and cell:
            (cells[index],) = _to_numbers(column, pd.Series([cell]), layout)
            if np.isnan(cells[index]):
                raise ValueError(f"{cell[:40]!r} is not an ISO-8601 time")
        elif not _is_number(cell):
            raise ValueError(f"{cell[:40]!r} is not a number")
        else:
            cells[index] = float(cell or "nan")
    return cells


def _clean(cells: np.ndarray, counts: Counter[str]) -> tuple[np.ndarray, np.ndarray]:
    """Find the possible rows of float64 ``[6, N]``, and add what is dropped to the counts.

    Returns:
        Bool ``[N]`` that marks the possible rows, and their values as float32 ``[M, 5]``.
    """
    open_, high, low, close, volume = cells[1:]
    with np.errstate(over="ignore"):
        values = cells[1:].T.astype(np.float32, order="C")
    # Zero and infinity are judged as float32, which is what is kept; order as float64, where rounding hides nothing.
    faults = {
        "non_finite": ~(np.isfinite(values).all(axis=1) & np.isfinite(cells[0])),
        "price_not_positive": (values[:, :4] <= 0).any(axis=1),
        "high_below_low": high < low,
        "outside_range": (open_ < low) | (open_ > high) | (close < low) | (close > high),
        "negative_volume": volume < 0,
    }
    possible = np.ones(cells.shape[1], bool)
    for name, fault in faults.items():
        counts[name] += int(np.count_nonzero(fault & possible))
        possible &= ~fault
    counts["rows"] += len(possible)
    return possible, values if possible.all() else values[possible]


@contextmanager
def _open_csv(path: Path) -> Iterator[tuple[IO[bytes], str]]:
    """Open a plain, .gz or .zip file for reading, with the SHA-256 of its bytes; name the file in what goes wrong."""
    if path.is_dir():
        found = sorted(file.name for pattern in ("*.csv", "*.csv.gz", "*.zip") for file in path.glob(pattern))
        raise UserError(f"{path} is a folder; name a CSV file{f', such as {path / found[0]}' if found else ''}")
    if not path.exists():
        raise UserError(f"{path} does not exist; check the path, or make the file with `flashlab data simulate`")
    if not path.is_file():
        raise UserError(f"{path} is not a regular file; store the CSV in a file first")
    try:
        with ExitStack() as stack:
            raw = stack.enter_context(path.open("rb"))
            sha256 = hashlib.file_digest(raw, "sha256").hexdigest()
            raw.seek(0)
            magic = raw.read(4)
            raw.seek(0)
            stream: Any = raw
            if magic[:2] == b"\x1f\x8b":
                stream = stack.enter_context(gzip.open(raw))
            elif magic in (b"PK\3\4", b"PK\5\6"):
                stream = stack.enter_context(_open_only_member(path, stack.enter_context(zipfile.ZipFile(raw))))
            yield stream, sha256
    except (EOFError, zlib.error, gzip.BadGzipFile, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path} is truncated or damaged: {error}; fetch or copy it again ({path.stat().st_size:,} bytes here)"
        ) from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; check its permissions and the disk") from error


def _open_only_member(path: Path, archive: zipfile.ZipFile) -> IO[bytes]:
    names = [name for name in archive.namelist() if not name.endswith("/") and not name.startswith("__MACOSX/")]
    if len(names) != 1:
        listed = f" ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})" if names else ""
        raise UserError(
            f"{path} holds {len(names)} files{listed}; expected one CSV: unpack it and name the one to read"
        )
    try:
        return archive.open(names[0])
    except (NotImplementedError, RuntimeError) as error:  # zipfile's words for an unknown method and for encryption
        raise UserError(f"{path} cannot be unpacked: {error}; unpack it and name the CSV inside") from error


def _find_layout(path: Path, stream: IO[bytes]) -> _Layout:
    """Read the header and the first rows, and go back to the start."""
    head = stream.read(HEAD_BYTES)
    stream.seek(0)
    if not head.strip():
        raise UserError(f"{path} is empty; expected a CSV with the header {HEADER}")
    lines = head.split(b"\n")
    skip = next(number for number, line in enumerate(lines, start=1) if line.strip())
    try:
        header_line = lines[skip - 1].decode("utf-8-sig")
        if b"\0" in head or (len(lines) == 1 and len(head) == HEAD_BYTES):
            raise ValueError
    except ValueError:  # UnicodeDecodeError is one
        raise UserError(f"{path} is a binary file; expected a CSV as UTF-8 text, plain, .gz or .zip") from None
    header = [name.strip() for name in next(csv.reader([header_line]))]
    positions = {name: position for position, name in reversed(list(enumerate(map(str.lower, header))))}
    for name in COLUMNS:
        if name not in positions:
            _fail_without_column(path, name, header, header_line)

    whole_lines = lines[skip:-1] if len(head) == HEAD_BYTES else lines[skip:]
    numbered = enumerate((line.decode("utf-8", "replace") for line in whole_lines), start=skip + 1)
    rows = {number: next(csv.reader([line])) for number, line in numbered if line.strip()}
    if not rows:
        raise UserError(f"{path} has a header but no rows; expected one row a minute")
    for number, row in rows.items():
        if any(map(str.strip, row[len(header) :])):
            _fail_too_wide(path, number, len(row), len(header))
    times = (row[positions["timestamp"]] for row in rows.values() if len(row) > positions["timestamp"])
    iso = not _is_number(next(filter(str.strip, times), ""))
    return _Layout(skip, len(header), {name: positions[name] for name in COLUMNS}, iso)


def _fail_too_wide(path: Path, line: int | str, cells: int | str, columns: int) -> NoReturn:
    raise UserError(
        f"{path}, line {line}: {cells} cells under a header of {columns} columns; "
        "write numbers with a decimal point and no thousands separators"
    )


def _fail_without_column(path: Path, name: str, header: list[str], header_line: str) -> NoReturn:
    wanted = name.capitalize()
    if all(map(_is_number, filter(None, header))):
        raise UserError(f"{path} has no header: its first line is numbers; add the line {HEADER}")
    for delimiter, spoken in {";": "semicolons", "\t": "tabs", "|": "'|'", " ": "spaces"}.items():
        if len(header) < len(COLUMNS) and header_line.count(delimiter) >= len(COLUMNS) - 1:
            raise UserError(f"{path} seems to be separated by {spoken}; expected commas: convert it first")
    spellings = {spelling.lower(): spelling for spelling in header}
    nearest = difflib.get_close_matches(name, spellings, n=1, cutoff=0.5)
    remedy = f"rename {spellings[nearest[0]]!r}?" if nearest else f"expected {HEADER}"
    raise UserError(f"{path} has no column {wanted!r}; {remedy} (its header is {', '.join(header)[:200]})")


def _is_number(text: str) -> bool:
    try:
        float(text or "nan")
    except ValueError:
        return False
    return True


def _to_numbers(column: str, text: pd.Series, layout: _Layout) -> pd.Series:
    """Turn cells into float64, ISO-8601 times into Unix seconds, what is neither into NaN."""
    if column == "timestamp" and layout.iso:
        times = pd.to_datetime(text, format="ISO8601", utc=True, errors="coerce")
        return (times - pd.Timestamp("1970-01-01", tz="UTC")).dt.total_seconds()
    return pd.to_numeric(text, errors="coerce").astype("float64")


def _fail_at(
    path: Path, layout: _Layout, is_bad: Callable[[str, pd.Series], pd.Series], expected: str | None = None
) -> NoReturn:
    """Name the first cell that is bad: read the file again, as text, since fast reading keeps no line numbers."""
    with _open_csv(path) as (stream, _):
        for chunk in layout.chunks(stream, dtype="str", skip_blank_lines=False):
            bad: dict[int, tuple[str, str]] = {}
            for column in COLUMNS:
                text = chunk[column].dropna()
                rows = text.index[is_bad(column, _to_numbers(column, text, layout))][:1]
                bad |= {row: (column, text[row]) for row in rows}
            if bad:
                row = min(bad)
                column, cell = bad[row]
                expected = expected or ("an ISO-8601 time" if layout.iso and column == "timestamp" else "a number")
                raise UserError(
                    f"{path}, line {layout.skip + row + 1}, column {column}: {cell[:40]!r} is not {expected}; "
                    "correct or delete the line"
                )
    raise UserError(f"{path}: expected {expected or 'a number'} in every row; look for the one that has none")


def _fail_out_of_range(path: Path, layout: _Layout, unit: str) -> NoReturn:
    def is_bad(column: str, numbers: pd.Series) -> pd.Series:
        return ~numbers.between(EARLIEST * UNITS[unit], _latest() * UNITS[unit]) & (column == "timestamp")

    _fail_at(path, layout, is_bad, f"a time between 2009 and tomorrow (Unix {unit}, or ISO-8601)")


def _guess_unit(path: Path, times: np.ndarray) -> str:
    """Say whether times are seconds or milliseconds since 1970, by their size."""
    typical = float(np.median(times))
    fitting = [unit for unit, per_second in UNITS.items() if EARLIEST <= typical / per_second <= _latest()]
    if not fitting:
        return "seconds"  # out of range in any unit: reported row by row
    if UNITS[fitting[0]] > 1000:
        raise UserError(
            f"{path}: its times seem to be in {fitting[0]} ({typical:.0f}); expected Unix seconds, milliseconds or "
            f"ISO-8601: divide them by {UNITS[fitting[0]] // 1000:,}"
        )
    return fitting[0]


def _latest() -> float:
    return time.time() + 24 * 3600


def _check_step(path: Path, second: np.ndarray) -> None:
    """Refuse bars of another length: the most common step in time must be a minute."""
    steps = np.diff(np.sort(second) if (np.diff(second) < 0).any() else second)
    steps = steps[steps > 0]
    if not len(steps):
        return
    steps = np.minimum(steps, 24 * 3600)
    in_minutes = np.bincount((steps + 30) // 60)
    if in_minutes.argmax() != 1:
        common = int(np.bincount(steps).argmax())
        raise UserError(f"{path}: its rows are {common:,} seconds apart, most of them; expected bars of one minute")
