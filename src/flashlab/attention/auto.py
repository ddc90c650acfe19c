"""What ``backend="auto"`` runs: the fastest backend where calls like this one were measured, else a fixed order.

Two tables of measurements are looked up: the one that `flashlab tune` keeps for this machine, then the one that comes
with the package for this GPU, or for a GPU of the same compute capability. They rank the plain calls: sequences of one
length, full or causal. The nearest measured call answers for the others (see `_nearest`); batch size and heads are left
out, since both only multiply the same work. Windows, soft caps, ALiBi, packed sequences and causal masks with Sq != Sk
are ranked among the flash-attn packages alone, whose kernels compute them as they compute a plain call.
"""

import json
import logging
import math
import os
import platform
import re
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

from flashlab.attention import backends
from flashlab.attention.spec import AttentionSpec
from flashlab.errors import UserError

logger = logging.getLogger(__name__)

SCHEMA, KIND = 1, "attention_table"
SHIPPED = Path(__file__).with_name("auto_tables")
PACKAGES = ("flash-attn", "flash_attn_3", "flash-attn-4")  # distributions whose version decides what is fastest

# Where nothing was measured: what is used most comes first, since it is tested most. `standard` refuses nothing.
_FLASH_ATTN = ("flash_attention_2", "flash_attention_3", "flash_attention_4")
_SDPA = ("sdpa_flash", "sdpa_efficient", "sdpa_cudnn")
LAST = ("sdpa_math", "standard")  # they keep all Sq x Sk scores
ORDER = {
    "cuda": (*_FLASH_ATTN, *_SDPA, "flex_attention", *LAST),
    "cpu": ("sdpa_flash", *LAST),  # torch runs flex_attention uncompiled there
}
# FlexAttention skips what a mask hides; torch's other kernels get the mask as a tensor of Sq x Sk.
MASKED_ORDER = {"cuda": (*_FLASH_ATTN, "flex_attention", *_SDPA, *LAST), "cpu": ORDER["cpu"]}
# One query and a short cache: the tables that FlexAttention makes for each call take longer than the attention. In 16
# bits standard attention would round every score.
DECODING_FIRST = {"cuda": (*_FLASH_ATTN, "standard")}
SHORT_CACHE = 1024
NOT_MEASURED = "fixed order: nothing like it was measured"


class Choice(NamedTuple):
    """What auto chose.

    Attributes:
        backend: The backend that runs the call.
        source: Where the choice comes from, in words.
        refused: What was ranked before it, each with the reason why it cannot run the call.
    """

    backend: str
    source: str
    refused: tuple[tuple[str, str], ...] = ()


class Cell(NamedTuple):
    """One kind of call that was measured, and its backends, the fastest first."""

    dtype: str
    mask: str
    needs_grad: bool
    head_dim: int
    seqlen: int
    ranking: tuple[str, ...]


class Table(NamedTuple):
    """What was measured on one device, and (backend, dtype, head_dim) of what the check calls wrong there."""

    key: dict[str, str]
    capability: str | None
    cells: tuple[Cell, ...]
    wrong: frozenset[tuple[str, str, int]]


def choose(spec: AttentionSpec) -> Choice:
    """Choose the backend of a call: the fastest measured one that can run it, never one that was wrong here."""
    refused: list[tuple[str, str]] = []
    for name, source, wrong in _candidates(spec):
        reason = "the check called it wrong here" if wrong else backends.why_not(name, spec)
        if reason is None:
            return Choice(name, source, tuple(refused))
        refused.append((name, reason))
    raise AssertionError("standard attention refuses nothing")


def _candidates(spec: AttentionSpec) -> Iterator[tuple[str, str, bool]]:
    """Yield each backend once: its name, where its rank comes from, and whether it is known to be wrong."""
    masked = _is_masked(spec)
    ranked: dict[str, str] = {}
    wrong: set[tuple[str, str, int]] = set()
    kinds = {(_name(spec.dtype), spec.head_dim)}
    for origin, table in _tables(spec.device):
        wrong |= table.wrong
        cell = _nearest(table, spec)
        if cell is not None and not ranked:
            kinds.add((cell.dtype, cell.head_dim))
            source = f"{origin}: head_dim {cell.head_dim}, length {cell.seqlen}"
            ranking = [name for name in cell.ranking if name in (_FLASH_ATTN if masked else backends.BACKENDS)]
            ranked = {name: source for name in ranking if may_lead(name, spec.seqlen_k, spec.head_dim)}
    order = (MASKED_ORDER if masked else ORDER).get(spec.device.type, LAST)
    is_short = spec.seqlen_q == 1 and spec.seqlen_k <= SHORT_CACHE
    if spec.layout == "cache" and is_short and masked and spec.dtype == torch.float32:
        order = (*DECODING_FIRST.get(spec.device.type, ()), *order)
    for name in order:
        ranked.setdefault(name, NOT_MEASURED)
    for name, source in ranked.items():
        yield name, source, name != "standard" and any((name, *kind) in wrong for kind in kinds)


def may_lead(name: str, seqlen_k: int, head_dim: int) -> bool:
    """Say whether speed alone ranks a backend: not where it keeps scores that take twice the memory of q, k, v and out.

    Faster by some percent is not worth memory that grows with the square of the length.
    """
    return name not in LAST or seqlen_k <= 8 * head_dim


def _is_masked(spec: AttentionSpec) -> bool:
    """Say whether a call is more than what tables measure: a plain call, full or causal with Sq = Sk."""
    features = spec.softcap or spec.alibi or spec.block_sparse or spec.layout == "packed"
    return features or spec.window_size != (-1, -1) or (spec.causal and spec.seqlen_q != spec.seqlen_k)


def _nearest(table: Table, spec: AttentionSpec) -> Cell | None:
    """Find the measured call that says most about this one.

    Mask and pass must be the same; float16 and bfloat16 stand for each other, since tensor cores run both alike. The
    head dimension is the next measured one from this on, since kernels pad to a few sizes. The length is the nearest by
    ratio to that of a square call with as many scores. Decoding and lengths below a quarter of the shortest measured
    have no cell, since launching counts more there than computing; long calls have one, since rankings settle.
    """
    mask = "causal" if spec.causal else "full"
    alike = [
        cell
        for cell in table.cells
        if (cell.mask, cell.needs_grad) == (mask, spec.needs_grad)
        and _same_speed(cell.dtype) == _same_speed(_name(spec.dtype))
        and cell.head_dim >= spec.head_dim
    ]
    alike = [cell for cell in alike if cell.head_dim == min(cell.head_dim for cell in alike)]
    if spec.layout == "cache" or not alike:
        return None
    if 4 * min(spec.seqlen_q, spec.seqlen_k) < min(cell.seqlen for cell in alike):
        return None
    seqlen = math.sqrt(spec.seqlen_q * spec.seqlen_k)
    return min(alike, key=lambda cell: (abs(math.log(cell.seqlen / seqlen)), cell.dtype != _name(spec.dtype)))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _same_speed(dtype: str) -> str:
    return "half" if dtype in ("float16", "bfloat16") else dtype


@cache
def _tables(device: torch.device) -> tuple[tuple[str, Table], ...]:
    """Load the tables for a device, the tuned one first, each with words for where it comes from."""
    if device.type not in ORDER or (device.type == "cuda" and not torch.cuda.is_available()):
        return ()
    tables = []
    if (tuned := _load_tuned(device)) is not None:
        tables.append(("measured on this machine", tuned))
    if device.type == "cuda":
        name, capability = device_key(device)["device"], "{}.{}".format(*torch.cuda.get_device_capability(device))
        shipped = [parse(path.read_text(encoding="utf-8")) for path in sorted(SHIPPED.glob("*.json"))]
        same = [table for table in shipped if table.key["device"] == name]
        alike = [table for table in shipped if table.capability == capability]
        tables += [(f"measured on {table.key['device']}", table) for table in (same or alike)[:1]]
    return tuple(tables)


def forget() -> None:
    """Forget the loaded tables, and what was chosen by them; the next choice reads what is there then."""
    from flashlab.attention import interface  # here, since it imports this module

    _tables.cache_clear()
    interface._check_and_resolve.cache_clear()


def _load_tuned(device: torch.device) -> Table | None:
    path = None
    try:
        path = tuned_path(device)
        table = parse(path.read_text(encoding="utf-8"))
        if table.key != device_key(device):
            raise ValueError("it belongs to another machine")
        return table
    except (UserError, FileNotFoundError, NotADirectoryError):  # nobody tuned here
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())
        logger.warning("ignored the damaged table %s (%s): `flashlab tune` will rebuild it", path, said)
        return None


def parse(text: str) -> Table:
    """Read a table.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: the text is no table of this schema.
    """
    found = json.loads(text)
    if (found["schema"], found["kind"]) != (SCHEMA, KIND):
        raise ValueError(f"expected schema {SCHEMA} of {KIND}")
    cells = tuple(
        Cell(
            str(row["dtype"]),
            str(row["mask"]),
            bool(row["needs_grad"]),
            int(row["head_dim"]),
            int(row["seqlen"]),
            tuple(row["backends"].keys()),
        )
        for row in found["rows"]
    )
    if any(cell.seqlen < 1 for cell in cells):
        raise ValueError("a length below 1")
    wrong = frozenset((row["backend"], row["dtype"], int(row["head_dim"])) for row in found["wrong"])
    return Table(dict(found["key"]), found["capability"], cells, wrong)


@cache
def device_key(device: torch.device) -> dict[str, str]:
    """Say what a tuned table is valid for: the device, and the versions that decide what is fastest on it."""
    if device.type == "cuda":
        key = {"device": torch.cuda.get_device_name(device), "cuda": str(torch.version.cuda or torch.version.hip)}
        key["cudnn"] = str(torch.backends.cudnn.version())
    else:
        key = {"device": f"CPU {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"}
    key["torch"] = torch.__version__
    for package in PACKAGES if device.type == "cuda" else ():
        with suppress(metadata.PackageNotFoundError):
            key[package] = metadata.version(package)
    return key


def tuned_path(device: torch.device) -> Path:
    """Return where this machine's table is kept: one file for each key, so that no change is judged by old figures.

    Raises:
        UserError: there is no home folder to keep it in.
    """
    words: list[Any] = [part for name, version in device_key(device).items() for part in (name, version)]
    return cache_folder() / f"attention-{re.sub(r'[^a-z0-9.]+', '_', '-'.join(words[1:]).lower())}.json"


def cache_folder() -> Path:
    """Return the folder of what is kept between runs: FLASHLAB_CACHE, or flashlab in XDG_CACHE_HOME or ~/.cache.

    Raises:
        UserError: there is no home folder.
    """
    folder = os.environ.get("FLASHLAB_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "flashlab"
    try:
        return Path(folder).expanduser()
    except RuntimeError as error:
        raise UserError("there is no home folder to keep what is measured: set FLASHLAB_CACHE to a folder") from error
