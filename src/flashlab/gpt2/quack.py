"""Whether the kernels of the package quack can run here: Tri Dao's, which flash-attn 4 is built on and comes with."""

from functools import cache
from importlib import import_module

import torch

ALIGNED = 8  # features of 16 bits: rows begin where the GPU can copy 16 bytes at once


def why_not(module: str, device: str, dtype: torch.dtype, sizes: tuple[int, ...]) -> str | None:
    """Say why kernels of a module cannot run here, or return None when they can.

    Args:
        module: the one that has them, as quack.cross_entropy.
        device: its type, as cuda.
        dtype: what they are to compute in.
        sizes: the features in rows of the tensors that they are to be given.
    """
    if device != "cuda":
        return f"it needs a CUDA device; the model is on {device}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it is for bfloat16 and float16; the model computes in {dtype}".replace("torch.", "")
    if odd := [size for size in sizes if size % ALIGNED]:
        return f"it takes rows in multiples of {ALIGNED}; got {odd[0]:,}"
    return _problem(module)


@cache
def _problem(module: str) -> str | None:
    try:
        import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if missing == module.partition(".")[0]:
            return "the package quack-kernels is not installed; it comes with flash-attn 4"
        return f"the package quack-kernels lacks the module {missing}"
    except Exception as error:  # made for another torch, it fails in its own ways
        return f"the package quack-kernels does not load: {' '.join(str(error).split())}"
    major, minor = torch.cuda.get_device_capability()
    return None if major >= 9 else f"it needs a GPU of compute capability 9.0 or newer; this one has {major}.{minor}"
