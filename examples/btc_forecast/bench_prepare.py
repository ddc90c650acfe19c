"""Measure the preparing of a CSV beside a bare `pandas.read_csv` of it, in one process and in turn."""

import resource
import tempfile
from json import dumps
from pathlib import Path
from statistics import median
from time import perf_counter

import pandas as pd
from jsonargparse.typing import PositiveInt

from flashlab.btc.prepare import open_set, prepare
from flashlab.cli import script
from flashlab.errors import check_writable, write_text


def bench(src: Path, *, rounds: PositiveInt = 5, json: Path | None = None) -> None:
    """Print the time of both, the peak memory of preparing and the bytes that it stores.

    Args:
        src: CSV file.
        rounds: how often both are timed; the medians count.
        json: file to write the figures to.
    """
    if json:
        check_writable("--json", json)
    seconds: dict[str, list[float]] = {"read_csv": [], "prepare": []}
    with tempfile.TemporaryDirectory() as out:
        prepare([src], out=Path(out))  # imports what it needs, untimed
        peak_memory_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        for _ in range(rounds):
            for name, call in (
                ("read_csv", lambda: pd.read_csv(src)),
                ("prepare", lambda: prepare([src], out=Path(out))),
            ):
                start = perf_counter()
                call()
                seconds[name].append(perf_counter() - start)
        stored = sum(path.stat().st_size for path in Path(out).rglob("*") if path.is_file())
        raw = open_set(out).manifest["cleaning"]["kept"] * 5 * 4  # open, high, low, close and volume as float32
    times = {name: median(values) for name, values in seconds.items()}
    figures = {
        "read_csv_s": times["read_csv"],
        "prepare_s": times["prepare"],
        "time_ratio": times["prepare"] / times["read_csv"],
        "peak_memory_mib": peak_memory_mib,
        "stored_bytes_ratio": stored / raw,
    }
    print(*(f"{name:20} {value:8.3f}" for name, value in figures.items()), sep="\n")
    if json:
        write_text(json, dumps({"source": src.name, "rounds": rounds} | figures, indent=1))


if __name__ == "__main__":
    script(bench)
