import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest
from litdata.streaming import Cache

from flashlab import __version__
from flashlab.btc import prepare as prepare_module
from flashlab.btc.bars import HEADER, fill_missing, log_features, read_bars
from flashlab.btc.prepare import SCHEMA_VERSION, open_set, prepare
from flashlab.btc.simulate import simulate_bars
from flashlab.btc.windows import PARTS, part_windows
from flashlab.cli import main
from flashlab.errors import UserError

CONTEXT = 32


def run(*arguments) -> int:
    return main(["data", "prepare", "--context_length", str(CONTEXT), *map(str, arguments)])


def contents(folder: Path) -> dict[str, bytes | None]:
    """Everything in a folder, byte for byte."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def one_line(capsys) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("flashlab: error: ")
    assert captured.err.count("\n") == 1
    return captured.err


def write(path: Path, rows: pd.DataFrame) -> Path:
    rows.to_csv(path, index=False)
    return path


@pytest.fixture(scope="module")
def long_csv(tmp_path_factory) -> Path:
    """Bars for the seed split, whose windows are far between."""
    return write(tmp_path_factory.mktemp("long") / "long.csv", simulate_bars(8, seed=1))


@pytest.fixture
def rows(bars_csv) -> pd.DataFrame:
    return pd.read_csv(bars_csv)


@pytest.fixture
def previous(prepared, tmp_path) -> Path:
    """A prepared set to overwrite."""
    shutil.copytree(prepared, tmp_path / "set")
    return tmp_path / "set"


@pytest.fixture
def other_csv(rows, tmp_path) -> Path:
    """Bars that make another set than `previous`."""
    return write(tmp_path / "other.csv", rows[: len(rows) // 2])


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(prepare_module, "BLOCK_BARS", 500)
    monkeypatch.setattr(prepare_module, "CHUNK_BLOCKS", 2)


# --- what a set holds


def test_the_manifest_says_all_about_the_set(bars_csv, prepared, rows):
    manifest = open_set(prepared).manifest
    bars, cleaning = read_bars([bars_csv])
    source = {"name": "bars.csv", "sha256": sha256(bars_csv.read_bytes()).hexdigest()}
    source |= {"size": bars_csv.stat().st_size, "rows": len(rows)}
    assert manifest["schema_version"] == SCHEMA_VERSION
    assert manifest["flashlab"] == __version__
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", manifest["created"])
    assert manifest["cleaning"]["sources"] == [source]
    assert manifest["cleaning"]["rows"] == manifest["cleaning"]["kept"] == cleaning.kept == len(bars)
    assert (manifest["bars"], manifest["start"], manifest["end"]) == (4320, "2024-12-29T00:00Z", "2024-12-31T23:59Z")
    filled = 4320 - len(rows)
    assert manifest["missing"] == {"mode": "fill", "max_gap": 240, "filled": filled, "mask_filled": True}
    assert manifest["segments"] == [[0, 4320]]
    assert manifest["split"] == {
        "kind": "chronological",
        "context_length": CONTEXT,
        "seed": None,
        "parts": {"train": [0, 3456 - CONTEXT], "validation": [3456, 3888 - CONTEXT], "test": [3888, 4320]},
        "starts": {"train": "2024-12-29T00:00Z", "validation": "2024-12-31T09:36Z", "test": "2024-12-31T16:48Z"},
    }


@pytest.mark.parametrize(("missing", "max_gap"), [("fill", 0), ("fill", 3), ("fill", 240), ("raw", 240)])
@pytest.mark.parametrize("block_bars", [1, 7, 16_384])
def test_bars_read_back_are_those_cleaned_bit_for_bit(rows, tmp_path, monkeypatch, missing, max_gap, block_bars):
    monkeypatch.setattr(prepare_module, "BLOCK_BARS", block_bars)
    is_there = np.random.default_rng(0).random(600) < 0.5  # gaps of every length, within blocks and across
    csv = write(tmp_path / "bars.csv", rows[:600][is_there])
    options = ["--missing", missing, "--max_gap", max_gap, "--context_length", 2]
    assert run(csv, "--out", tmp_path / "set", *options) == 0
    bars = read_bars([csv])[0]
    expected = fill_missing(bars, max_gap) if missing == "fill" else bars
    stored = open_set(tmp_path / "set").bars()
    assert stored.minute.tobytes() == expected.minute.tobytes()
    assert stored.values.tobytes() == expected.values.tobytes()
    assert (stored.minute.dtype, stored.values.dtype) == (np.int32, np.float32)


@pytest.mark.parametrize(
    ("options", "segments"),
    [
        (["--max_gap", 9], [[0, 1000], [1000, 4310]]),
        (["--max_gap", 10], [[0, 4320]]),
        (["--missing", "raw"], [[0, 4310]]),
    ],
)
def test_a_gap_longer_than_max_gap_ends_a_segment(prepared, tmp_path, options, segments):
    bars = open_set(prepared).bars()  # without gaps
    columns = [bars.minute * 60, *np.nan_to_num(bars.values.T)]
    rows = pd.DataFrame(dict(zip(HEADER.split(","), columns, strict=True)))
    csv = write(tmp_path / "gap.csv", rows.drop(range(1000, 1010)))
    assert run(csv, "--out", tmp_path / "set", *options) == 0
    assert open_set(tmp_path / "set").manifest["segments"] == segments


def test_bars_are_stored_once(long_csv, tmp_path):
    sizes = []
    for options in ([], ["--split", "seed", "--context_length", 1024]):  # windows that share no bars, or half of them
        assert run(long_csv, "--out", tmp_path / "set", *options) == 0
        sizes.append(sum(path.stat().st_size for path in (tmp_path / "set").rglob("*")))
    values = open_set(tmp_path / "set").manifest["cleaning"]["kept"] * 5 * 4  # filled minutes take no space
    assert all(size <= 1.25 * values for size in sizes)
    assert abs(sizes[0] - sizes[1]) < 1000  # of the manifest


# --- splits and the scaler


def test_parts_start_at_the_days_given(bars_csv, tmp_path):
    days = ["--validation_start", "2024-12-30", "--test_start", "2024-12-31"]
    assert run(bars_csv, "--out", tmp_path / "set", *days) == 0
    split = open_set(tmp_path / "set").manifest["split"]
    assert split["parts"] == {"train": [0, 1440 - CONTEXT], "validation": [1440, 2880 - CONTEXT], "test": [2880, 4320]}
    assert split["starts"]["test"] == "2024-12-31T00:00Z"


@pytest.mark.parametrize(
    ("options", "fits_on", "counts_filled"),
    [
        ([], 9216 - CONTEXT, False),
        (["--mask_filled", "false"], 9216 - CONTEXT, True),
        (["--split", "seed"], 11520, False),
        (["--split", "seed", "--mask_filled", "false"], 11520, True),
    ],
)
def test_the_scaler_is_that_of_the_training_part(long_csv, tmp_path, options, fits_on, counts_filled):
    assert run(long_csv, "--out", tmp_path / "set", *options) == 0
    opened = open_set(tmp_path / "set")
    bars = opened.bars()
    features = log_features(bars.values)[:fits_on]
    if not counts_filled:
        features = features[bars.observed[:fits_on]]
    np.testing.assert_allclose(opened.scaler.mean, features.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(opened.scaler.std, features.std(axis=0), rtol=1e-9)


def test_later_bars_do_not_reach_the_scaler(rows, prepared, tmp_path):
    gap_starts = pd.Timestamp(open_set(prepared).bars().time[3456 - CONTEXT]).timestamp()
    later = rows["Timestamp"] >= gap_starts
    assert 0 < later.sum() < len(rows) / 4
    rows.loc[later, HEADER.split(",")[1:]] *= 3
    assert run(write(tmp_path / "changed.csv", rows), "--out", tmp_path / "set") == 0
    assert open_set(tmp_path / "set").scaler == open_set(prepared).scaler
    rows.loc[~later, "Volume"] *= 3
    assert run(write(tmp_path / "changed.csv", rows), "--out", tmp_path / "set") == 0
    assert open_set(tmp_path / "set").scaler != open_set(prepared).scaler


def test_the_seed_split_says_how_much_of_its_test_part_was_seen(long_csv, tmp_path, capsys):
    options = ["--split", "seed", "--seed", 7, "--missing", "raw", "--context_length", 700]
    assert run(long_csv, "--out", tmp_path / "set", *options) == 0
    said = capsys.readouterr().out
    manifest = open_set(tmp_path / "set").manifest
    assert manifest["split"]["seed"] == 7
    rows = {
        part: {start + row for start in part_windows(manifest, part, 700).tolist() for row in range(701)}
        for part in PARTS
    }
    share = len(rows["train"] & rows["test"]) / len(rows["test"])
    assert 0 < share < 1
    assert f"{share:.1%} of the test bars also stand in training windows" in said


# --- a set is replaced whole or not at all


@contextmanager
def failing(method: str, name: str, error: BaseException) -> Iterator[None]:
    """Let writing the chunks, or a file operation on the file of that name, leave an empty file and fail."""
    if name == "chunks":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Cache, method, Mock(side_effect=error))
            yield
        return
    original = getattr(Path, method)

    def fail(self: Path, *arguments, **options):
        if self.name != name:
            return original(self, *arguments, **options)
        if method != "replace":
            self.touch()
        raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, method, fail)
        yield


STAGES = [
    ("mkdir", "set"),
    ("__setitem__", "chunks"),
    ("done", "chunks"),
    ("merge", "chunks"),
    ("write_text", ".manifest.json"),
    ("replace", ".manifest.json"),
]


@pytest.mark.parametrize(("method", "name"), STAGES)
def test_a_full_disk_leaves_the_previous_set(previous, other_csv, small_blocks, capsys, method, name):
    before = contents(previous)
    with failing(method, name, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))):
        assert run(other_csv, "--out", previous) == 2
    assert f"cannot write {previous}: No space left on device; free space" in one_line(capsys)
    assert contents(previous) == before


@pytest.mark.parametrize(("method", "name"), STAGES[1:])
@pytest.mark.parametrize("error", [RuntimeError("a bug"), KeyboardInterrupt()])
def test_an_exception_leaves_the_previous_set_or_nothing(
    previous, other_csv, small_blocks, tmp_path, method, name, error
):
    before = contents(previous)
    for out in (previous, tmp_path / "new" / "set"):
        with pytest.raises(type(error)), failing(method, name, error):
            prepare([other_csv], out=out, context_length=CONTEXT)
    assert contents(previous) == before
    assert not (tmp_path / "new").exists()


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 300 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small disk can be mounted by root alone")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_disk_that_fills_up_leaves_the_previous_set(small_disk, bars_csv, rows, tmp_path, capsys):
    assert run(bars_csv, "--out", small_disk / "set") == 0  # 104 kB
    before = contents(small_disk)
    later = rows.assign(Timestamp=rows["Timestamp"] + 3 * 24 * 3600)
    csv = write(tmp_path / "more.csv", pd.concat([rows, later]))  # 207 kB
    capsys.readouterr()
    for out in ("set", "new"):
        assert run(csv, "--out", small_disk / out) == 2
        assert f"cannot write {small_disk / out}: No space left on device" in one_line(capsys)
    assert contents(small_disk) == before
    open_set(small_disk / "set").bars()


def kill_at_file_operation(number: int, *arguments) -> bool:
    """Prepare in a process that is killed before that file operation in the folder of the set; say whether it was."""
    if not (child := os.fork()):
        signal.alarm(60)
        out, count = str(arguments[arguments.index("--out") + 1]), 0

        def kill(event: str, audited: tuple) -> None:
            nonlocal count
            if event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir") and str(audited[0]).startswith(out):
                count += 1
                if count == number:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(kill)
        os._exit(run(*arguments))
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL)
    return status == signal.SIGKILL


def test_killed_before_any_file_operation_the_set_is_whole(previous, other_csv, small_blocks):
    was = open_set(previous).bars()
    found = []
    for number in range(1, 100):
        killed = kill_at_file_operation(number, other_csv, "--out", previous)
        found.append(len(open_set(previous).bars()))
        if not killed:
            break
    assert not killed
    assert number > 10
    # The previous set until the manifest is replaced, the new one from then on.
    new = found[-1]
    switch = found.index(new)
    assert found == [len(was)] * switch + [new] * (len(found) - switch)
    assert 5 < switch < len(found) - 1
    kept = open_set(previous).manifest["chunks"]
    assert sorted(path.name for path in previous.iterdir()) == [".lock", kept, "manifest.json"]


def test_two_prepares_at_once(previous, other_csv, bars_csv, monkeypatch, capfd):
    original = prepare_module.read_bars
    codes = []

    def read_while_another_prepares(sources):
        if not (child := os.fork()):
            monkeypatch.undo()
            code = run(bars_csv, "--out", previous)
            sys.stderr.flush()
            os._exit(code)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        return original(sources)

    monkeypatch.setattr(prepare_module, "read_bars", read_while_another_prepares)
    assert run(other_csv, "--out", previous) == 0
    assert codes == [2]
    assert capfd.readouterr().err == (
        f"flashlab: error: {previous} is being written by another prepare; wait for it, or choose another --out\n"
    )
    assert open_set(previous).manifest["cleaning"]["sources"][0]["name"] == "other.csv"


def test_other_files_in_the_folder_stay(bars_csv, tmp_path):
    out = tmp_path / "set"
    for name in ("bars-2017/a.csv", "bars-20170101/b.csv", "source"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(name)
    for _ in range(2):
        assert run(bars_csv, "--out", out) == 0
    assert all((out / name).read_text() == name for name in ("bars-2017/a.csv", "bars-20170101/b.csv", "source"))
    assert len(list(out.glob("bars-*"))) == 3


# --- what cannot be done is one line


def test_out_is_a_file(bars_csv, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    for out in ("file", "file/set"):
        assert run(bars_csv, "--out", tmp_path / out) == 2
        assert f"cannot write {tmp_path / out}: " in one_line(capsys)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(not Path("/sys/kernel").is_dir(), reason="needs /sys, where even root may not write")
@pytest.mark.parametrize("out", ["/sys/kernel", "/sys/flashlab/set"])
def test_out_cannot_be_written(bars_csv, capsys, out):
    assert run(bars_csv, "--out", out) == 2
    assert re.search(rf"cannot write {out}: .*; (permit writing there, or )?choose another folder", one_line(capsys))


RAW = ["--missing", "raw"]
DAY = "--validation_start"


@pytest.mark.parametrize(
    ("count", "options", "said"),
    [
        (20, RAW, "few.csv: 20 bars leave no window of 32 + 1 consecutive bars for the train part; give more bars"),
        (250, RAW, "250 bars leave no window of 32 + 1 consecutive bars for the validation part"),
        (4000, ["--split", "seed"], "bars leave no window of 32 + 1 consecutive bars for the validation part"),
        (250, [*RAW, "--split", "seed"], "250 bars leave no window of 32 + 1 consecutive bars for the train part"),
        (1, [], "1 bars leave no window of 32 + 1 consecutive bars for the train part"),
        (4000, [DAY, "soon"], "--validation_start 'soon' is not a day; write it as 2017-01-01"),
        (
            4000,
            [DAY, "2030-01-01"],
            "--validation_start 2030-01-01 is outside the bars, which run from 2024-12-29T00:00",
        ),
        (4000, ["--test_start", "2024-12-01"], "--test_start 2024-12-01 is outside the bars"),
        (4000, ["--test_start", "2024-12-30"], "must be before --test_start 2024-12-30T00:00"),
        (
            4000,
            [DAY, "2024-12-31", "--test_start", "2024-12-30"],
            "--validation_start 2024-12-31T00:00 must be before --test_start 2024-12-30T00:00",
        ),
        (4000, ["--split", "seed", DAY, "2024-12-30"], "--split seed draws windows at random: drop --validation_start"),
        (4000, ["--split", "seed", "--seed", "-1"], "-1"),
        (4000, ["--max_gap", "-1"], "-1"),
        (4000, ["--split", "random"], "random"),
    ],
)
def test_bad_input_leaves_the_previous_set_or_nothing(rows, previous, tmp_path, capsys, count, options, said):
    csv = write(tmp_path / "few.csv", rows[:count])
    before = contents(previous)
    for out in (previous, tmp_path / "new" / "set"):
        assert run(csv, "--out", out, *options) == 2
        assert said in one_line(capsys)
    assert contents(previous) == before
    assert not (tmp_path / "new").exists()


def test_all_rows_bad(rows, previous, tmp_path, capsys):
    csv = write(tmp_path / "bad.csv", rows.assign(Close=-1))
    before = contents(previous)
    assert run(csv, "--out", previous) == 2
    assert f"bad.csv: not one of its {len(rows)} rows can be a bar ({len(rows)} price_not_positive)" in one_line(capsys)
    assert contents(previous) == before


def other_version(text: str) -> str:
    return json.dumps(json.loads(text) | {"schema_version": 99})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (other_version, f"has schema version 99, this flashlab reads {SCHEMA_VERSION}; make it with"),
        (lambda text: text[:-100], "manifest.json is damaged, or another program's; make it with"),
        (lambda text: "[1]", "manifest.json is damaged, or another program's"),
        (lambda text: '{"name": "app"}', "manifest.json is damaged, or another program's"),
        (lambda text: "\0" * 100, "manifest.json is damaged, or another program's"),
        (lambda text: text.replace("3888", "3808"), "manifest.json was changed or damaged: its checksum differs"),
    ],
)
def test_a_manifest_that_cannot_be_used(previous, tmp_path, monkeypatch, capsys, change, said):
    monkeypatch.chdir(tmp_path)
    manifest = previous / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(change(text))
    assert manifest.read_text() != text
    assert main(["data", "describe", str(previous)]) == 2
    assert said in one_line(capsys)


def test_a_damaged_set_can_be_made_anew(previous, bars_csv, prepared):
    (previous / "manifest.json").write_text("damaged")
    shutil.rmtree(next(previous.glob("bars-*")))
    assert run(bars_csv, "--out", previous) == 0
    assert open_set(previous).bars().values.tobytes() == open_set(prepared).bars().values.tobytes()


def test_what_is_no_prepared_set(tmp_path, bars_csv):
    for path in (tmp_path, tmp_path / "nothing", bars_csv):
        with pytest.raises(UserError, match=r"is not a prepared set \(it has no manifest.json\); make it with"):
            open_set(path)
    (tmp_path / "manifest.json").mkdir()
    with pytest.raises(UserError, match=r"cannot read .*/manifest.json: Is a directory"):
        open_set(tmp_path)


def test_a_damaged_chunk_is_one_line(previous, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    chunk = Path(open_set(previous).chunks) / "chunk-0-0.bin"
    content = bytearray(chunk.read_bytes())
    content[-1] ^= 1
    chunk.write_bytes(content)
    assert main(["data", "describe", str(previous)]) == 2
    assert f"{chunk.parent} is damaged or out of reach at bar 0 (its checksum differs); prepare" in one_line(capsys)
