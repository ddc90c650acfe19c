"""Forecast the next bar for every bar of a CSV, or for every bar of a stream as soon as it comes."""

import gzip
import io
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from jsonargparse.typing import PositiveInt
from rich.progress import track

from flashlab.btc.bars import FEATURES, HEAD_BYTES, HEADER, Bars, fill_missing, read_bars, segments, stream_bars
from flashlab.btc.evaluate import read_config
from flashlab.btc.model import CLOSE, PRICES, VOLUME, WARM_UP, Forecaster
from flashlab.btc.module import load_forecaster
from flashlab.btc.stream import Stream
from flashlab.btc.windows import rolling_windows
from flashlab.errors import UserError, print_now, replacing
from flashlab.training.callbacks import BEST
from flashlab.training.run import read_record

STREAM = Path("-")
ROW = "%d" + len(FEATURES) * ",%.8g" + "\n"  # a float32 has no more digits


def predict(
    run: Path,
    src: Path,
    *,
    out: Path | None = None,
    checkpoint: str = BEST,
    backend: str = "auto",
    batch_size: PositiveInt = 16,
) -> int:
    """Forecast the bar after every bar of a CSV, or of standard input as the bars come.

    Writes a CSV with the forecast bar's Timestamp, Open, High, Low, Close and Volume, a row a minute from the 16th
    reported bar on. Missing minutes are filled as in the set that the run was trained on.

    Args:
        run: folder of the run.
        src: CSV file (.csv, .gz, .zip) with Timestamp, Open, High, Low, Close and Volume; - reads a CSV from standard
            input and prints each forecast as soon as its bar came.
        out: CSV to write, compressed if it ends in .gz; RUN/forecasts.csv when not given.
        checkpoint: file under RUN/checkpoints.
        backend: attention backend; auto takes the best that can run.
        batch_size: windows at a time.

    Raises:
        UserError: there is no such run or checkpoint, the CSV cannot be used or is too short, or the file cannot be
            written.
    """
    if src == STREAM and out is not None:
        raise UserError("--out does not go with -: forecasts of a stream are printed; redirect them to a file")
    config = read_config(run)
    max_gap = _max_gap(run)
    torch.set_float32_matmul_precision("highest")  # file and stream agree to float32's rounding, on a GPU as well
    forecaster = load_forecaster(run / "checkpoints" / checkpoint).forecaster.eval()
    forecaster.to("cuda" if torch.cuda.is_available() else "cpu")
    for block in forecaster.blocks:
        block.backend = backend  # type: ignore[assignment]
    context_length = config["data"]["context_length"]
    to_rows = partial(_to_rows, f"{run}/checkpoints/{checkpoint}")
    if src == STREAM:
        return _predict_stream(Stream(forecaster, context_length), max_gap, to_rows)
    out = out or run / "forecasts.csv"
    if out.is_dir() or (out.exists() and src.exists() and out.samefile(src)):
        raise UserError(f"--out {out}: expected a file to write, other than {src}")
    bars, _ = read_bars([src])
    if max_gap is not None:
        bars = fill_missing(bars, max_gap)
    runs = segments(bars) if max_gap is not None else np.array([[0, len(bars)]])
    if not (warm := _warmed_up(bars, runs)).any():
        raise UserError(_too_few(str(src), int(bars.observed.sum())))
    count, times = 0, []
    with _writing_whole(out) as file:
        file.write(HEADER + "\n")
        for rows, forecast in forecast_bars(forecaster, bars, runs, warm, context_length, batch_size):
            file.write(to_rows(bars.minute[rows] + 1, forecast))
            count += len(rows)
            times += [bars.time[rows[0]] + 1, bars.time[rows[-1]] + 1]
    print(f"wrote {count:,} forecasts, {times[0]} to {times[-1]} UTC, to {out}")
    return 0


@torch.inference_mode()
def forecast_bars(
    forecaster: Forecaster, bars: Bars, runs: np.ndarray, wanted: np.ndarray, context_length: int, batch_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Forecast the bar after each wanted one, in the windows of `rolling_windows`, a batch of them at a time.

    Args:
        forecaster: in evaluation.
        bars: N bars.
        runs: int64 ``[K, 2]``, rows between which there is no gap.
        wanted: bool ``[N]``.
        context_length: S.
        batch_size: windows at a time.

    Yields:
        int64 ``[M]`` rows, rising, and float64 ``[M, 5]`` the forecasts of the bars after them, in log units.
    """
    device = forecaster.input.weight.device
    starts, stops, firsts = rolling_windows(runs, context_length)
    for index in track(range(0, len(starts), batch_size), "forecast", transient=True):
        start, stop, first = (of[index : index + batch_size, None] for of in (starts, stops, firsts))
        rows = start + np.arange((stop - start).max())
        # A window that is shorter than others goes on with its last bar: no forecast sees what comes later.
        windows = torch.from_numpy(bars.values[np.minimum(rows, stop - 1)])
        chosen = (rows >= first) & (rows < stop)
        chosen[chosen] = wanted[rows[chosen]]
        if chosen.any():
            log_bars = forecaster(windows.to(device)).log_bars.double().cpu().numpy()
            yield rows[chosen], log_bars[chosen]


def _warmed_up(bars: Bars, runs: np.ndarray) -> np.ndarray:
    """Mark the bars from the `WARM_UP`th reported one of their run on, those whose forecasts training has scored."""
    reported = bars.observed.cumsum()
    before = np.repeat(reported[runs[:, 0]] - bars.observed[runs[:, 0]], np.diff(runs)[:, 0])
    return reported - before >= WARM_UP


def _predict_stream(stream: Stream, max_gap: int | None, to_rows: Callable[[np.ndarray, np.ndarray], str]) -> int:
    """Print the forecast after each bar of standard input, for those of `_warmed_up`."""
    last, reported, seen, printed = 0, 0, 0, 0  # minute; reported bars since the last long gap, and in all; rows
    newest = np.zeros(len(FEATURES), np.float32)
    for minute, bar in stream_bars(_standard_input(), _warn):
        seen += minute != last
        missing = minute - last - 1 if last and max_gap is not None else 0
        forecasts = []
        if minute == last:
            forecasts.append((minute, stream.replace_last(bar)))
        else:
            if missing > (max_gap or 0):
                _warn(f"{missing:,} minutes are missing before {np.datetime64(minute, 'm')}: warming up anew")
                stream.clear()
                reported = missing = 0
            filled = np.append(np.repeat(newest[CLOSE], 4), np.float32("nan"))
            forecasts += [(last + 1 + age, stream.append(filled)) for age in range(missing)]
            if reported < WARM_UP:
                forecasts.clear()
            forecasts.append((minute, stream.append(bar)))
            reported += 1
        last, newest = minute, bar
        if reported >= WARM_UP:
            minutes, log_bars = map(np.array, zip(*forecasts, strict=True))
            text = to_rows(minutes + 1, log_bars)
            if not print_now(text if printed else f"{HEADER}\n{text}", end=""):
                return 128 + signal.SIGPIPE
            printed += len(forecasts)
    if not printed:
        raise UserError(_too_few("standard input", seen))
    return 0


def _standard_input() -> Iterator[bytes]:
    if sys.stdin is None:
        raise UserError("standard input is closed; pipe a CSV into it, or name a file")
    try:
        yield from iter(lambda: sys.stdin.buffer.readline(HEAD_BYTES), b"")
    except OSError as error:
        raise UserError(f"cannot read standard input: {error.strerror}; pipe a CSV into it, or name a file") from error


def _warn(message: str) -> None:
    print(f"flashlab: {message}", file=sys.stderr)


def _max_gap(run: Path) -> int | None:
    """Read up to how many missing minutes a run's set has filled; None if it took the rows as consecutive."""
    try:
        return read_record(run)["trained_on"]["missing"]["max_gap"]
    except (KeyError, TypeError):
        raise UserError(f"{run / 'run.json'} is missing or damaged; name a whole run, or train again") from None


def _too_few(source: str, count: int) -> str:
    return f"{source}: {count:,} bars, but forecasts begin after {WARM_UP} without a long gap; give more bars"


def _to_rows(model: str, minutes: np.ndarray, log_bars: np.ndarray) -> str:
    """Write forecasts as lines of CSV, in the prices' units and coins."""
    values = np.empty_like(log_bars)
    with np.errstate(over="ignore"):
        values[:, PRICES] = np.exp(log_bars[:, PRICES])
        values[:, VOLUME] = np.expm1(log_bars[:, VOLUME].clip(min=0))  # there is no volume below 0
    bad = ~np.isfinite(values).all(axis=1)
    if bad.any():
        raise UserError(
            f"{model}: its forecast for {np.datetime64(int(minutes[bad][0]), 'm')} is not finite; check the bars "
            "before it, or take another checkpoint"
        )
    return "".join(ROW % row for row in zip((minutes.astype(np.int64) * 60).tolist(), *values.T.tolist(), strict=True))


@contextmanager
def _writing_whole(out: Path) -> Iterator[IO[str]]:
    """Open a file, compressed if its name ends in .gz, that is there whole at the end or not at all."""
    with replacing(out) as partial, ExitStack() as stack:
        file: Any = stack.enter_context(partial.open("wb"))
        if out.suffix == ".gz":  # without name and time in its header: the bytes depend on the forecasts alone
            file = stack.enter_context(gzip.GzipFile("", "wb", compresslevel=6, fileobj=file, mtime=0))
        yield stack.enter_context(io.TextIOWrapper(file, encoding="utf-8", newline=""))
