"""The prepared set: clean bars stored once through litdata, and a manifest that says all about them.

A folder (or object storage prefix) holds ``manifest.json`` and one folder of litdata chunks that the manifest names.
Replacing the manifest is what commits a new set: until then the previous one is whole, and whatever a killed run left
beside it is removed by the next. Windows for training are views of the bars, never copies, and minutes that cleaning
filled are filled again on reading rather than stored.
"""

import json
import shutil
import tempfile
import uuid
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jsonargparse.typing import NonNegativeInt, PositiveInt

from flashlab import __version__
from flashlab.btc.bars import FEATURES, Bars, fill_missing, log_features, read_bars, segments
from flashlab.btc.windows import PARTS, overlap, part_windows
from flashlab.errors import UserError, alone_in, replacing, writing
from flashlab.object_storage import open_storage

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
INDEX = "index.json"  # litdata's, beside its chunks
BAR_BYTES = 4 * (1 + len(FEATURES))  # int32 minute, float32 values
BLOCK_BARS = 16_384  # one litdata item, at most 393 kB: a window of 2048 touches at most two
CHUNK_BLOCKS = 20  # one litdata chunk, at most 8 MB


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
        """Read all bars into memory, once, each block checked against the manifest.

        Raises:
            UserError: a chunk is missing, damaged or out of reach.
        """
        return self._bars

    @cached_property
    def _bars(self) -> Bars:
        with stream_blocks(self) as read_block:
            blocks = [read_block(index) for index in range(len(self.manifest["block_crc32"]))]
        return Bars(np.concatenate([b.minute for b in blocks]), np.concatenate([b.values for b in blocks]))


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
    seed: NonNegativeInt = 0,
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
        context_length: bars a model may see; the gap between parts and, with --split seed, the windows are this long.
        seed: seed of the random split.

    Raises:
        UserError: a file cannot be used, there are too few bars for one window in each part, another prepare is at
            work in the folder, or the folder cannot be written.
    """
    if split == "seed" and (validation_start or test_start):
        raise UserError("--split seed draws windows at random: drop --validation_start and --test_start")
    with alone_in(out, "is being written by another prepare; wait for it, or choose another --out"):
        bars, cleaning = read_bars(src)
        filled = fill_missing(bars, max_gap) if missing == "fill" else bars
        runs = segments(filled) if missing == "fill" else np.array([[0, len(filled)]])
        if split == "chronological":
            parts = _chronological_parts(filled, validation_start, test_start, context_length)
            fit_on = slice(*parts["train"])
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
    _print_summary(out, manifest)


def open_set(path: str | Path) -> PreparedSet:
    """Open a prepared set in a folder or in object storage (``s3://``, ``gs://``; whatever litdata reads).

    Raises:
        UserError: there is no prepared set, or it is of another schema version.
    """
    path = str(path)
    remedy = "make it with `flashlab data prepare SRC --out DIR`"
    try:
        if "://" in path:
            text = open_storage(path)(MANIFEST).decode()
        else:
            text = (Path(path.removeprefix("local:")) / MANIFEST).read_text()
        manifest = json.loads(text)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path} is not a prepared set (it has no {MANIFEST}); {remedy}") from None
    except OSError as error:
        raise UserError(
            f"cannot read {path}/{MANIFEST}: {error.strerror}; check the path and its permissions"
        ) from error
    except ValueError:
        manifest = None
    if isinstance(manifest, dict) and manifest.get("kind") == "tokens":
        raise UserError(f"{path} holds tokens, not bars: they are for `flashlab gpt2 train`; give a prepared set")
    if not isinstance(manifest, dict) or "schema_version" not in manifest:
        raise UserError(f"{path}/{MANIFEST} is damaged, or another program's; {remedy}")
    if (version := manifest["schema_version"]) != SCHEMA_VERSION:
        raise UserError(f"{path} has schema version {version}, this flashlab reads {SCHEMA_VERSION}; {remedy}")
    if manifest.pop("crc32", None) != _checksum(manifest):
        raise UserError(f"{path}/{MANIFEST} was changed or damaged: its checksum differs; {remedy}")
    return PreparedSet(path, manifest)


@contextmanager
def stream_blocks(prepared: PreparedSet) -> Iterator[Callable[[int], Bars]]:
    """Open the stored blocks for random access.

    Yields:
        A function from a block's index to its bars. Of a remote set it fetches the chunks that it is asked for, each
        once, into a private folder that is removed at the end.

    Raises:
        UserError: a chunk is missing, damaged or out of reach.
    """
    manifest = prepared.manifest
    with tempfile.TemporaryDirectory(prefix="flashlab-") as cache:
        read: Callable[[int], bytes] | None = None

        def read_block(index: int) -> Bars:
            nonlocal read
            try:
                read = read or _open_chunks(prepared.chunks, Path(cache))
                block = read(index)
                if zlib.crc32(block) != manifest["block_crc32"][index]:
                    raise ValueError("its checksum differs")
            except UserError:
                raise
            except Exception as error:  # litdata lets whatever its readers meet through: EOFError, struct.error, ...
                place = f"{prepared.chunks} is damaged or out of reach at bar {index * manifest['block_bars']:,}"
                reason = " ".join(str(error).split()).split(". ")[0][:200]
                raise UserError(f"{place} ({reason}); prepare the set again") from error
            count = len(block) // BAR_BYTES
            values = np.frombuffer(block, np.float32, offset=4 * count).reshape(count, len(FEATURES))
            bars = Bars(np.frombuffer(block, np.int32, count), values)
            return bars if (max_gap := manifest["missing"]["max_gap"]) is None else fill_missing(bars, max_gap)

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
    if validation >= test and (validation_start or test_start):
        raise UserError(f"--validation_start {bars.time[validation]} must be before --test_start {bars.time[test]}")
    return {
        "train": (0, max(validation - gap, 0)),
        "validation": (validation, max(test - gap, validation)),
        "test": (test, len(bars)),
    }


def _fit_scaler(bars: Bars, fit_on: slice, mask_filled: bool) -> Scaler:
    values = bars.values[fit_on]
    if mask_filled:
        values = values[bars.observed[fit_on]]
    if not len(values):
        return Scaler([0.0] * 5, [1.0] * 5)  # too few bars: reported as such with the windows
    features = log_features(values)
    std = features.std(axis=0)
    return Scaler(features.mean(axis=0).tolist(), np.where(std > 0, std, 1.0).tolist())


def _require_windows(manifest: dict[str, Any], src: list[Path]) -> None:
    for part in PARTS:
        if not len(part_windows(manifest, part, manifest["split"]["context_length"])):
            length = manifest["split"]["context_length"]
            raise UserError(
                f"{', '.join(map(str, src))}: {manifest['bars']:,} bars leave no window of {length:,} + 1 consecutive "
                f"bars for the {part} part; give more bars, a smaller --context_length or a larger --max_gap"
            )


def _store(bars: Bars, manifest: dict[str, Any], out: Path) -> None:
    """Write the chunks, then commit them by replacing the manifest."""
    chunks = f"bars-{uuid.uuid4().hex}"
    partial = out / f".{MANIFEST}"
    try:
        with writing(out):
            (out / chunks).mkdir()
            checksums = _write_chunks(bars, out / chunks)
            manifest |= {"chunks": chunks, "block_bars": BLOCK_BARS, "block_crc32": checksums}
            partial.write_text(json.dumps(manifest | {"crc32": _checksum(manifest)}, indent=1))
            partial.replace(out / MANIFEST)
    finally:
        partial.unlink(missing_ok=True)
        committed = (out / MANIFEST).read_bytes() if (out / MANIFEST).exists() else b""
        for folder in out.glob(f"bars-{'[0-9a-f]' * 32}"):  # the set before, or what a run that failed has written
            if folder.name.encode() not in committed:
                shutil.rmtree(folder, ignore_errors=True)


def _write_chunks(bars: Bars, folder: Path) -> list[int]:
    """Write the bars through litdata, one item of bytes a block, and return each block's CRC-32."""
    from litdata.streaming import Cache  # slow to import, and most commands need it not

    stored = bars.observed
    stored[::BLOCK_BARS] = stored[BLOCK_BARS - 1 :: BLOCK_BARS] = stored[-1] = True  # a block is filled from within
    cache = Cache(str(folder), chunk_size=CHUNK_BLOCKS)
    checksums = []
    for index, start in enumerate(range(0, len(bars), BLOCK_BARS)):
        block = slice(start, start + BLOCK_BARS)
        item = bars.minute[block][stored[block]].tobytes() + bars.values[block][stored[block]].tobytes()
        cache[index] = item
        checksums.append(zlib.crc32(item))
    cache.done()
    cache.merge()
    return checksums


def _checksum(manifest: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(manifest).encode())


def _open_chunks(chunks: str, cache: Path) -> Callable[[int], bytes]:
    """Open litdata's chunks: gives a function that reads a block, of a remote set from a copy that grows in `cache`."""
    from litdata import StreamingDataset  # slow to import, and most commands need it not

    if "://" not in chunks:
        return StreamingDataset(chunks, cache_dir=str(cache), shuffle=False).__getitem__
    fetch = open_storage(chunks)

    def keep(name: str, content: bytes) -> None:
        with replacing(cache / Path(name).name) as partial:  # in the folder, whatever the index says
            partial.write_bytes(content)

    index = fetch(INDEX)
    keep(INDEX, index)
    chunk_of = [chunk for chunk in json.loads(index)["chunks"] for _ in range(chunk["chunk_size"])]
    dataset = StreamingDataset(str(cache), shuffle=False)

    def read(block: int) -> bytes:
        name, size = chunk_of[block]["filename"], chunk_of[block]["chunk_bytes"]
        if not (cache / name).exists():
            content = fetch(name)
            if len(content) != size:
                raise ValueError(f"{name} has {len(content):,} bytes, not {size:,}")
            keep(name, content)
        return dataset[block]

    return read


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
