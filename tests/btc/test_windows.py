from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from flashlab.btc.windows import PARTS, SEED_STRIDE, overlap, part_windows, scored_windows

CASES = 200


def chronological(rng: np.random.Generator) -> tuple[dict[str, Any], int]:
    """Draw segments, parts with a gap of one context between them, and the context length."""
    context_length = int(rng.integers(1, 12))
    edges = np.unique(rng.integers(0, 300, rng.integers(0, 12)))
    bounds = [0, *edges[edges > 0].tolist(), 300]
    validation, test = sorted(rng.integers(1, 300, 2).tolist())
    parts = {
        "train": (0, max(validation - context_length, 0)),
        "validation": (validation, max(test - context_length, validation)),
        "test": (test, 300),
    }
    segments = list(pairwise(bounds))
    split = {"kind": "chronological", "context_length": context_length, "parts": parts}
    return {"bars": 300, "segments": segments, "split": split}, context_length


def seed_split(bars: int, context_length: int, seed: int, segments: list[tuple[int, int]] | None = None) -> dict:
    split = {"kind": "seed", "context_length": context_length, "seed": seed}
    return {"bars": bars, "segments": segments or [(0, bars)], "split": split}


def whole_windows(manifest: dict[str, Any], context_length: int) -> Iterator[range]:
    """Iterate over every run of context + 1 rows in one segment, whatever the part."""
    for start, stop in manifest["segments"]:
        for first in range(start, stop - context_length):
            yield range(first, first + context_length + 1)


@pytest.mark.parametrize("part", PARTS)
def test_windows_of_stride_1_are_all_that_fit_in_part_and_segment(part):
    for case in range(CASES):
        manifest, length = chronological(np.random.default_rng(case))
        begin, end = manifest["split"]["parts"][part]
        possible = [rows[0] for rows in whole_windows(manifest, length) if begin <= rows[0] and rows[-1] < end]
        assert part_windows(manifest, part, length, stride=1).tolist() == possible


def test_no_bar_is_in_two_parts_and_no_input_of_one_is_a_target_of_another():
    for case in range(CASES):
        manifest, length = chronological(np.random.default_rng(case))
        rows, targets, inputs = {}, {}, {}
        for part in PARTS:
            starts = part_windows(manifest, part, length, stride=1)[:, None]
            rows[part] = set((starts + np.arange(length + 1)).ravel().tolist())
            scored, firsts = scored_windows(manifest, part, length, min_history=1)
            targets[part] = rows[part] | {
                s + 1 + p for s, f in zip(scored, firsts, strict=True) for p in range(f, length)
            }
            inputs[part] = {int(s) + p for s in scored for p in range(length)}
        for one, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
            assert not targets[one] & targets[other]
            assert not inputs[other] & targets[one]  # not even a scored window's history was a target


def test_windows_follow_each_other_at_the_stride_from_the_start_of_each_segment():
    manifest = {
        "segments": [(0, 50), (50, 55), (60, 100)],
        "split": {"kind": "chronological", "parts": {"train": (5, 92)}},
    }
    assert part_windows(manifest, "train", 10).tolist() == [5, 15, 25, 35, 60, 70, 80]
    assert part_windows(manifest, "train", 10, stride=17).tolist() == [5, 22, 39, 60, 77]


@pytest.mark.parametrize("part", PARTS)
def test_every_bar_that_can_be_scored_is_scored_once(part):
    for case in range(CASES):
        manifest, length = chronological(np.random.default_rng(case))
        begin, end = manifest["split"]["parts"][part]
        half = length // 2
        possible = set()
        for rows in whole_windows(manifest, length):
            if begin - length <= rows[0] and rows[-1] < end:
                possible.update(row for row in rows[half + 1 :] if row >= begin)
        starts, firsts = scored_windows(manifest, part, length, min_history=1)
        scored = [start + 1 + p for start, first in zip(starts, firsts, strict=True) for p in range(first, length)]
        assert sorted(scored) == sorted(possible)
        assert (firsts >= half).all()  # so that half + 1 bars or more come before every target
        whole = {rows[0] for rows in whole_windows(manifest, length)}
        assert set(starts.tolist()) <= whole


def test_seed_split_draws_80_10_10_of_all_windows():
    segments = [(0, 100_000), (100_007, 100_500), (101_000, 160_000)]
    manifest = seed_split(160_000, 256, seed=1, segments=segments)
    parts = {part: part_windows(manifest, part, 256) for part in PARTS}
    drawn = np.sort(np.concatenate(list(parts.values())))
    expected = [first for start, stop in segments for first in range(start, stop - 256, SEED_STRIDE)]
    assert drawn.tolist() == expected
    assert [len(starts) for starts in parts.values()] == [248, 31, 32]
    for starts in parts.values():
        assert (np.diff(starts) > 0).all()
        assert starts[0] < 20_000 < 140_000 < starts[-1]  # drawn from everywhere


def test_seed_split_is_a_function_of_its_seed():
    one, same, other = (part_windows(seed_split(100_000, 512, seed), "test", 512).tolist() for seed in (1, 1, 2))
    assert one == same != other


def test_overlap_is_the_share_of_test_bars_in_training_windows():
    manifest = seed_split(40_000, 700, seed=3, segments=[(0, 20_000), (20_100, 40_000)])
    rows = {
        part: {int(start) + row for start in part_windows(manifest, part, 700) for row in range(701)}
        for part in ("train", "test")
    }
    expected = len(rows["test"] & rows["train"]) / len(rows["test"])
    assert 0 < expected < 1
    assert overlap(manifest) == pytest.approx(expected)


def test_overlap_of_the_published_protocol_is_nearly_all():
    assert 0.98 < overlap(seed_split(1_000_000, 2048, seed=0)) < 1


def test_seed_split_scores_the_targets_with_enough_history_in_their_window():
    manifest = seed_split(100_000, 512, seed=0)
    starts, firsts = scored_windows(manifest, "test", 512, min_history=120)
    assert starts.tolist() == part_windows(manifest, "test", 512).tolist()
    assert (firsts == 119).all()  # target start + 1 + 119 comes after the 120 bars start .. start + 119


def test_no_window_gives_no_rows():
    manifest = {"segments": [(0, 10)], "split": {"kind": "chronological", "parts": {"test": (0, 10)}}}
    assert part_windows(manifest, "test", 10).shape == (0,)
    assert [found.shape for found in scored_windows(manifest, "test", 10, min_history=1)] == [(0,), (0,)]
    assert part_windows(manifest, "test", 9).tolist() == [0]
