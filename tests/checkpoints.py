"""What tests of training compare: checkpoints, bit for bit."""

from collections.abc import Iterator
from typing import Any

import torch


def differences(a: Any, b: Any, place: str) -> Iterator[str]:
    """Name the places at which two nested values differ."""
    if isinstance(a, torch.Tensor):
        if not torch.equal(a, b):
            yield place
    elif isinstance(a, tuple):  # which torch makes a list of when it loads what fsdp has saved
        yield from differences(list(a), list(b), place)
    elif isinstance(a, dict | list) and len(a) == len(b):
        for key in a if isinstance(a, dict) else range(len(a)):
            yield from differences(a[key], b[key], f"{place}.{key}")
    elif a != b:
        yield f"{place}: {a} and {b}"
