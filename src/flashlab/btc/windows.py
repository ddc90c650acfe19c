"""Which windows of the series each part consists of.

A window of context length S starting at row s has the inputs s .. s+S-1 and the targets s+1 .. s+S. No window crosses
the end of a segment, and every target lies in the window's own part.
"""

from typing import Any

import numpy as np

SEED_STRIDE = 512  # the published protocol's, with windows of 2048 bars
PARTS = {"train": 0.8, "validation": 0.1, "test": 0.1}  # their shares unless days are given


def part_windows(manifest: dict[str, Any], part: str, context_length: int, stride: int | None = None) -> np.ndarray:
    """List the first rows of a part's windows.

    Args:
        manifest: of the prepared set.
        part: "train", "validation" or "test".
        context_length: S. With the seed split it must be the one the set was split with.
        stride: rows between windows that follow each other; one context when None. The seed split has its own.

    Returns:
        int64 ``[W]``, in increasing order.
    """
    split = manifest["split"]
    if split["kind"] == "seed":
        starts = _starts(manifest["segments"], context_length, SEED_STRIDE)
        order = np.random.default_rng(split["seed"]).permutation(len(starts))
        bounds = np.cumsum([int(share * len(starts)) for share in PARTS.values()][:-1])
        return np.sort(starts[np.split(order, bounds)[list(PARTS).index(part)]])
    begin, end = split["parts"][part]
    inside = [(max(start, begin), min(stop, end)) for start, stop in manifest["segments"]]
    return _starts(inside, context_length, stride or context_length)


def scored_windows(
    manifest: dict[str, Any], part: str, context_length: int, min_history: int
) -> tuple[np.ndarray, np.ndarray]:
    """List the windows that together forecast a part's bars, and the first target of each that counts.

    Chronological split: every bar of the part that can have more than half a context of history in its segment counts
    once, with no less; the first windows begin in the gap before the part, whose bars are history and never targets.
    Seed split: the part's own windows, in which a target counts when `min_history` bars of the window come before it,
    which is all that any forecaster sees.

    Returns:
        int64 ``[W]`` first rows, and int64 ``[W]`` positions p: the targets start + 1 + p and later count.
    """
    split = manifest["split"]
    if split["kind"] == "seed":
        starts = part_windows(manifest, part, context_length)
        return starts, np.full(len(starts), min_history - 1)
    begin, end = split["parts"][part]
    half = context_length // 2
    all_starts, all_firsts = [], []
    for start, stop in manifest["segments"]:
        high = min(stop, end) - context_length - 1
        if high < max(start, begin - context_length):
            continue
        low = min(max(start, begin - half - 1), high)
        starts = np.append(np.arange(low, high, context_length - half), high)
        done = max(low + half, begin - 1)  # rows up to here have too little history, or belong to no part
        scored_to = np.concatenate([[done], starts[:-1] + context_length])  # last row scored before each window
        all_starts.append(starts)
        all_firsts.append(scored_to - starts)
    if not all_starts:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    return np.concatenate(all_starts), np.concatenate(all_firsts)


def rolling_windows(runs: np.ndarray, context_length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """List the windows that together forecast the bar after every bar, none of which sees a later one.

    A run's first window begins with it. Once a window holds a whole context, the next begins half a context before its
    end: so there is always half a context of history, and a stream can go on for ever.

    Args:
        runs: int64 ``[K, 2]`` as of `bars.segments`.
        context_length: S.

    Returns:
        int64 ``[W]`` first rows; int64 ``[W]`` the row after each window, at most S later; int64 ``[W]`` the first row
        of each whose forecast is not the window before's.
    """
    kept = context_length // 2
    all_windows = []
    for start, stop in runs:
        starts = np.append(start, np.arange(start + context_length, stop, context_length - kept) - kept)
        firsts = np.append(start, starts[1:] + kept)
        all_windows.append(np.stack([starts, np.minimum(starts + context_length, stop), firsts]))
    starts, stops, firsts = np.concatenate([*all_windows, np.zeros((3, 0))], axis=1).astype(np.int64)
    return starts, stops, firsts


def overlap(manifest: dict[str, Any]) -> float:
    """Return the share of the test part's bars that also stand in training windows."""
    length = manifest["split"]["context_length"]
    covered = {}
    for part in ("train", "test"):
        edges = np.zeros(manifest["bars"] + 1, np.int64)
        starts = part_windows(manifest, part, length)
        np.add.at(edges, starts, 1)
        np.add.at(edges, starts + length + 1, -1)
        covered[part] = np.cumsum(edges[:-1]) > 0
    return float((covered["train"] & covered["test"]).sum() / covered["test"].sum())


def _starts(segments: Any, context_length: int, stride: int) -> np.ndarray:
    pieces = [np.arange(start, stop - context_length, stride) for start, stop in segments]
    return np.concatenate([*pieces, np.zeros(0)]).astype(np.int64)
