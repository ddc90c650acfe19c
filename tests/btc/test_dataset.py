import gc
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from flashlab.btc.bars import FEATURES
from flashlab.btc.dataset import Windows
from flashlab.btc.prepare import open_set
from flashlab.btc.windows import part_windows
from flashlab.errors import UserError
from flashlab.training.batches import EndlessBatches, Shuffled, loader

OPEN, HIGH, LOW, CLOSE, VOLUME = range(len(FEATURES))
CONTEXT = 32


def same(one, other) -> bool:
    """Compare bit for bit: NaN equals NaN."""
    return [batch.numpy().tobytes() for batch in one] == [batch.numpy().tobytes() for batch in other]


# --- the same windows from wherever they come


def batches_of(path, num_workers=0, **how):
    """Read a few epochs of mirrored training windows in shuffled batches."""
    prepared = open_set(path)
    starts = part_windows(prepared.manifest, "train", CONTEXT, stride=21)
    windows = Windows(prepared, starts, CONTEXT, mirror=True, **how)
    return list(loader(windows, EndlessBatches(Shuffled(len(windows), 5), 24, 30), num_workers=num_workers))


@pytest.fixture(scope="module")
def expected(many_blocks):
    return batches_of(many_blocks)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("where", ["memory", "folder", "local:"])
def test_batches_are_the_same_from_everywhere(many_blocks, expected, where, num_workers):
    path = {"local:": f"local:{many_blocks}"}.get(where, many_blocks)
    assert same(batches_of(path, stream=where != "memory", num_workers=num_workers), expected)


def test_windows_are_the_bars_of_their_rows(many_blocks, prepared):
    bars = open_set(prepared).bars()
    starts = np.array([0, 1, 67, 68, 99, 100, 168, 4320 - CONTEXT - 1])  # also those that end or begin at a block
    windows = Windows(open_set(many_blocks), starts, CONTEXT, stream=True)
    for start, window in zip(starts, next(iter(loader(windows))), strict=True):
        np.testing.assert_array_equal(window, bars.values[start : start + CONTEXT + 1])
    np.testing.assert_array_equal(windows[3], bars.values[68 : 68 + CONTEXT + 1])


def test_a_window_may_span_several_blocks(many_blocks):
    prepared = open_set(many_blocks)
    starts = np.array([0, 50, 199])
    batches = [list(loader(Windows(prepared, starts, 450, stream=stream))) for stream in (True, False)]
    assert same(*batches)
    assert batches[0][0].shape == (3, 451, 5)


def test_streaming_leaves_no_files_behind(many_blocks, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for path in (many_blocks, f"local:{many_blocks}"):
        open_set(path).bars()
        for num_workers in (0, 2):
            batches_of(path, stream=True, num_workers=num_workers)
    gc.collect()
    assert not list(tmp_path.glob("flashlab-*"))


# --- damage


def truncate(chunk: Path) -> None:
    chunk.write_bytes(chunk.read_bytes()[:-5000])


def flip_a_bit(chunk: Path) -> None:
    content = bytearray(chunk.read_bytes())
    content[len(content) // 2] ^= 1
    chunk.write_bytes(content)


def flip_an_offset(chunk: Path) -> None:
    content = bytearray(chunk.read_bytes())
    content[6] ^= 1
    chunk.write_bytes(content)


def remove_index(chunk: Path) -> None:
    (chunk.parent / "index.json").unlink()


def damage_index(chunk: Path) -> None:
    (chunk.parent / "index.json").write_text("{")


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, flip_an_offset, Path.unlink, remove_index, damage_index])
@pytest.mark.parametrize("how", ["memory", "stream", "stream with workers"])
def test_damage_is_one_line_that_says_where(many_blocks, tmp_path, monkeypatch, damage, how):
    monkeypatch.setattr("litdata.streaming.item_loader._MAX_WAIT_TIME", 0.1)  # 2 s else
    shutil.copytree(many_blocks, tmp_path / "set")
    prepared = open_set(tmp_path / "set")
    damage(Path(prepared.chunks) / "chunk-0-2.bin")  # bars 1,400 to 2,100
    starts = part_windows(prepared.manifest, "train", CONTEXT, stride=100)
    with pytest.raises(UserError) as caught:
        for _ in loader(
            Windows(prepared, starts, CONTEXT, stream=how != "memory"), num_workers=2 * how.endswith("workers")
        ):
            pass
    message = str(caught.value)
    del caught
    started = time.monotonic()
    gc.collect()
    assert time.monotonic() - started < 4  # no worker is left that must be killed after 5 s
    bar = "0" if "index" in damage.__name__ and damage is not flip_an_offset else "(1,[4-9]00|2,000)"
    assert "\n" not in message
    assert message.startswith(f"{prepared.chunks} is damaged or out of reach at bar ")
    assert message.endswith("prepare the set again")
    assert re.search(rf"at bar {bar} \(", message)


# --- mirror


def test_mirrored_windows_follow_the_plain_ones(prepared):
    opened = open_set(prepared)
    starts = part_windows(opened.manifest, "train", CONTEXT)
    windows = Windows(opened, starts, CONTEXT, mirror=True)
    assert len(windows) == 2 * len(starts)
    mixed = windows.__getitems__([3, len(starts) + 3, 0])
    plain, mirrored = mixed[0], mixed[1]
    assert torch.equal(torch.nan_to_num(plain), torch.nan_to_num(Windows(opened, starts, CONTEXT)[3]))
    for feature, of in ((OPEN, OPEN), (HIGH, LOW), (LOW, HIGH), (CLOSE, CLOSE)):
        torch.testing.assert_close(mirrored[:, feature], 1 / plain[:, of])
    assert same([mirrored[:, VOLUME]], [plain[:, VOLUME]])
    assert (mirrored[:, HIGH] >= mirrored[:, LOW]).all()


def test_mirroring_twice_gives_the_bars_back(prepared, monkeypatch):
    opened = open_set(prepared)
    filled = np.flatnonzero(~opened.bars().observed)
    starts = filled[:5] - 3  # windows with filled minutes
    windows = Windows(opened, starts, CONTEXT, mirror=True)
    once = windows.__getitems__(list(range(5, 10)))
    monkeypatch.setattr(windows, "_read", lambda starts, length: once.clone())
    twice = windows.__getitems__(list(range(5, 10)))
    plain = Windows(opened, starts, CONTEXT).__getitems__(list(range(5)))
    torch.testing.assert_close(twice, plain, rtol=1e-6, atol=0, equal_nan=True)
    assert plain[:, 3, VOLUME].isnan().all()
    assert torch.equal(once[..., VOLUME].isnan(), plain[..., VOLUME].isnan())
