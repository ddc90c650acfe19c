"""The prepared set: clean bars stored once through litdata, and a manifest that says all about them.

A folder (or object storage prefix) holds ``manifest.json`` and one folder of litdata chunks that the manifest names.
Replacing the manifest is what commits a new set: until then the previous one is whole, and whatever a killed run left
beside it is removed by the next. Windows for training are views of the stored bars, never copies.
"""

import json
import os
import shutil
import tempfile
import uuid
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
from filelock import FileLock, Timeout
from jsonargparse.typing import NonNegativeInt, PositiveInt

from flashlab import __version__
from flashlab.btc.bars import Bars, fill_missing, log_features, read_bars, segments
from flashlab.btc.windows import PARTS, overlap, part_windows
from flashlab.errors import UserError, writing

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
BLOCK_BARS = 16_384  # one litdata item, 393 kB: a window of 2048 touches at most two
CHUNK_BYTES = "8MB"


@dataclass(frozen=True)
class Scaler:
    """Mean and standard deviation ``[5]`` of the log features over the training part."""

    mean: list[float]
    std: list[float]


@dataclass(frozen=True)
class PreparedSet:
    """A prepared set that was opened: where it is, and its manifest."""

    path: str
    manifest: dict[str, Any]

    @property
    def chunks(self) -> str:
        """Folder or URL of the litdata chunks."""
        return f"{self.path.rstrip('/')}/{self.manifest['chunks']}"

    @property
    def scaler(self) -> Scaler:
        return Scaler(**self.manifest["scaler"])

    def bars(self) -> Bars:
        """Read all bars into memory, each block checked against the manifest.

        Raises:
            UserError: a chunk is missing or damaged.
        """
        with stream_blocks(self) as read_block:
            blocks = [read_block(index) for index in range(len(self.manifest["block_crc32"]))]
        minute, values = (np.concatenate(column) for column in zip(*blocks, strict=True))
        return Bars(minute, values)


def prepare(
    src: list[Path],
    *,
    out: Path,
    missing: Literal["fill", "raw"] = "fill",
    max_gap: NonNegativeInt = 240,
    mask_filled: bool = True,
    split: Literal["chronological", "seed"] = "chronological",
    validation_start: str | None = None,
    test_start: str | None = None,
    context_length: PositiveInt = 2048,
    seed: int = 0,
) -> None:
    """Clean minute bars, split them and store them once, ready for training.

    Args:
        src: CSV files (.csv, .gz, .zip) with Timestamp, Open, High, Low, Close and Volume.
        out: folder of the prepared set; a set that is there already is replaced at the very end.
        missing: fill missing minutes with the previous close and no volume, or take the raw rows as consecutive.
        max_gap: a gap of more missing minutes ends a segment, and no window crosses it (with --missing fill).
        mask_filled: leave filled minutes out of loss and metrics.
        split: chronological is train, validation and test in time order with a gap of one context between them and the
            scaler fitted on train; seed is the published protocol: scaler of the whole series, windows of one context
            at a stride of 512, 80/10/10 % of them drawn at random.
        validation_start: first day of the validation part, as 2017-01-01; by default it starts after 80 % of the bars.
        test_start: first day of the test part; by default it starts after 90 % of the bars.
        context_length: bars a model may see; the gap between parts and, with --split seed, the windows have this length.
        seed: seed of the random split.

    Raises:
        UserError: a file cannot be used, there are too few bars for one window in each part, another prepare is at
            work in the folder, or the folder cannot be written.
    """
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(out / ".lock", timeout=0):
            bars, cleaning = read_bars(src)
            filled = fill_missing(bars, max_gap) if missing == "fill" else bars
            runs = segments(filled) if missing == "fill" else np.array([[0, len(filled)]])
            if split == "chronological":
                parts = _chronological_parts(filled, validation_start, test_start, context_length)
                fit_on = slice(*parts["train"])
            elif validation_start or test_start:
                raise UserError("--split seed draws windows at random: drop --validation_start and --test_start")
            else:
                parts, fit_on = {}, slice(0, len(filled))
            manifest: dict[str, Any] = {
                "schema_version": SCHEMA_VERSION,
                "flashlab": __version__,
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
                "bars": len(filled),
                "start": f"{filled.time[0]}Z",
                "end": f"{filled.time[-1]}Z",
                "cleaning": asdict(cleaning),
                "missing": {
                    "mode": missing,
                    "max_gap": max_gap if missing == "fill" else None,
                    "filled": len(filled) - len(bars),
                    "mask_filled": mask_filled,
                },
                "segments": runs.tolist(),
                "split": {
                    "kind": split,
                    "context_length": context_length,
                    "seed": seed if split == "seed" else None,
                    "parts": parts,
                    "starts": {part: f"{filled.time[bounds[0]]}Z" for part, bounds in parts.items()},
                },
                "scaler": asdict(_fit_scaler(filled, fit_on, mask_filled)),
            }
            _require_windows(manifest, src)
            _store(filled, manifest, out)
    except Timeout:
        raise UserError(f"{out} is being written by another prepare; wait for it, or choose another --out") from None
    _print_summary(out, manifest)


def open_set(path: str | Path) -> PreparedSet:
    """Open a prepared set in a folder or in object storage (``s3://``, ``gs://``; whatever litdata reads).

    Raises:
        UserError: there is no prepared set, or it is of another schema version.
    """
    path = str(path)
    remedy = "make it with `flashlab data prepare SRC --out DIR`"
    try:
        if "://" in path or path.startswith("local:"):
            text = _download(f"{path.rstrip('/')}/{MANIFEST}")
        else:
            text = (Path(path) / MANIFEST).read_text()
        manifest = json.loads(text)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path} is not a prepared set (it has no {MANIFEST}); {remedy}") from None
    except OSError as error:
        raise UserError(
            f"cannot read {path}/{MANIFEST}: {error.strerror}; check the path and its permissions"
        ) from error
    except ValueError:
        raise UserError(f"{path}/{MANIFEST} is damaged; {remedy}") from None
    if (version := manifest.get("schema_version")) != SCHEMA_VERSION:
        raise UserError(f"{path} has schema version {version}, this flashlab reads {SCHEMA_VERSION}; {remedy}")
    return PreparedSet(path, manifest)


@contextmanager
def stream_blocks(prepared: PreparedSet) -> Iterator[Any]:
    """Open the stored blocks for random access.

    Yields:
        A function from a block's index to its minutes int32 ``[n]`` and values float32 ``[n, 5]``. Chunks of a remote
        set are fetched when first touched, into a private cache that is removed at the end.

    Raises:
        UserError: a chunk is missing or damaged.
    """
    from litdata import StreamingDataset  # slow to import, and most commands need it not

    checksums = prepared.manifest["block_crc32"]
    with tempfile.TemporaryDirectory(prefix="flashlab-") as cache:
        dataset: Any = None

        def read_block(index: int) -> tuple[np.ndarray, np.ndarray]:
            nonlocal dataset
            try:
                if dataset is None:
                    dataset = StreamingDataset(prepared.chunks, cache_dir=cache, shuffle=False)
                block = dataset[index]
                minute, values = block["minute"], block["values"]
                if zlib.crc32(values.tobytes(), zlib.crc32(minute.tobytes())) != checksums[index]:
                    raise ValueError("checksum differs")
            except UserError:
                raise
            except Exception as error:  # litdata lets whatever its readers meet through: EOFError, struct.error, ...
                raise UserError(
                    f"{prepared.chunks} is damaged at bar {index * BLOCK_BARS:,} ({' '.join(str(error).split())[:120]}); "
                    "prepare the set again"
                ) from error
            return minute, values

        yield read_block


def _chronological_parts(
    bars: Bars, validation_start: str | None, test_start: str | None, gap: int
) -> dict[str, tuple[int, int]]:
    """Cut the series at two times; the last `gap` bars before each cut belong to no part."""
    cuts = []
    done = 0.0
    for option, day, part in (
        ("validation_start", validation_start, "train"),
        ("test_start", test_start, "validation"),
    ):
        done += PARTS[part]
        try:
            cut = int(len(bars) * done) if day is None else int(np.searchsorted(bars.time, np.datetime64(day, "m")))
        except ValueError:
            raise UserError(f"--{option} {day!r} is not a day; write it as 2017-01-01") from None
        if day is not None and not 0 < cut < len(bars):
            raise UserError(f"--{option} {day} is outside the bars, which run from {bars.time[0]} to {bars.time[-1]}")
        cuts.append(cut)
    validation, test = cuts
    if validation >= test:
        raise UserError(f"--validation_start {bars.time[validation]} must be before --test_start {bars.time[test]}")
    return {
        "train": (0, max(validation - gap, 0)),
        "validation": (validation, max(test - gap, validation)),
        "test": (test, len(bars)),
    }


def _fit_scaler(bars: Bars, fit_on: slice, mask_filled: bool) -> Scaler:
    features = log_features(bars.values[fit_on])
    if mask_filled:
        features = features[bars.observed[fit_on]]
    if not len(features):
        return Scaler([0.0] * 5, [1.0] * 5)  # too few bars: reported as such with the windows
    std = features.std(axis=0)
    return Scaler(features.mean(axis=0).tolist(), np.where(std > 0, std, 1.0).tolist())


def _require_windows(manifest: dict[str, Any], src: list[Path]) -> None:
    for part in PARTS:
        if not len(part_windows(manifest, part, manifest["split"]["context_length"])):
            length = manifest["split"]["context_length"]
            raise UserError(
                f"{', '.join(map(str, src))}: {manifest['bars']:,} bars leave no window of {length:,} + 1 consecutive bars "
                f"for the {part} part; give more bars, a smaller --context_length or a larger --max_gap"
            )


def _store(bars: Bars, manifest: dict[str, Any], out: Path) -> None:
    from litdata.streaming import Cache

    chunks = f"bars-{uuid.uuid4().hex[:8]}"
    committed = False
    try:
        with writing(out):
            (out / chunks).mkdir()
            cache = Cache(str(out / chunks), chunk_bytes=CHUNK_BYTES)
            checksums = []
            for index, start in enumerate(range(0, len(bars), BLOCK_BARS)):
                block = slice(start, start + BLOCK_BARS)
                minute, values = bars.minute[block], np.ascontiguousarray(bars.values[block])
                cache[index] = {"minute": minute, "values": values}
                checksums.append(zlib.crc32(values.tobytes(), zlib.crc32(minute.tobytes())))
            cache.done()
            cache.merge()
            manifest |= {"chunks": chunks, "block_bars": BLOCK_BARS, "block_crc32": checksums}
            partial = out / f".{MANIFEST}"
            partial.write_text(json.dumps(manifest, indent=1))
            os.replace(partial, out / MANIFEST)
            committed = True
    finally:
        for folder in out.glob("bars-*"):  # this run's when it failed, else those of runs before it
            if (folder.name == chunks) != committed:
                shutil.rmtree(folder, ignore_errors=True)


def _download(url: str) -> str:
    from litdata.streaming.downloader import get_downloader

    folder, name = url.rsplit("/", 1)
    with tempfile.TemporaryDirectory(prefix="flashlab-") as cache:
        target = Path(cache) / name
        try:
            get_downloader(folder, cache, []).download_file(url, str(target))
        except Exception as error:  # whatever the store's client raises
            raise UserError(
                f"cannot fetch {url}: {' '.join(str(error).split())[:200]}; check URL and credentials"
            ) from error
        return target.read_text()


def _print_summary(out: Path, manifest: dict[str, Any]) -> None:
    cleaning, missing, split = manifest["cleaning"], manifest["missing"], manifest["split"]
    dropped = cleaning["rows"] - cleaning["kept"]
    print(f"{out}: {manifest['bars']:,} bars from {manifest['start']} to {manifest['end']}")
    print(
        f"  {cleaning['rows']:,} rows read, {dropped:,} dropped, {missing['filled']:,} missing minutes filled, "
        f"{len(manifest['segments']):,} segment(s)"
    )
    for part in PARTS:
        since = f" from {split['starts'][part]}" if split["starts"] else ""
        print(f"  {part}: {len(part_windows(manifest, part, split['context_length'])):,} windows{since}")
    if split["kind"] == "seed":
        print(
            f"  {overlap(manifest):.1%} of the test bars also stand in training windows: this split does not tell how "
            "well bars that were never seen are forecast"
        )
