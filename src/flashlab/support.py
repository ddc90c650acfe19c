"""`flashlab backends`: what each attention backend supports on this machine, printed and written into the docs."""

import re
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.table import Table

from flashlab import results
from flashlab.attention import support
from flashlab.errors import UserError
from flashlab.machine import choose_device, provenance, write_result

PAGE = Path("docs/attention.md")


def backends(*, device: Literal["auto", "cpu", "cuda"] = "auto", json: Path | None = None, docs: bool = False) -> None:
    """Say which attention backend supports what on this machine, and why not.

    Args:
        device: Where the calls would run; auto is the GPU if there is one.
        json: Write the facts to this file as well.
        docs: Write them to assets/results as well, and their table into docs/attention.md.
    """
    place = choose_device(device)
    name = torch.cuda.get_device_name() if place == "cuda" else "CPU"
    kept = results.FOLDER / f"support_{re.sub(r'[^a-z0-9]+', '_', name.lower())}.json"
    if docs:
        _check_page(f"<!-- results: support {kept.name} -->")
    rows = support.examine(torch.device(place))
    _print(name, rows)
    facts = {**provenance("attention_support"), "device": name, "call": support.PLAIN, "rows": rows}
    for path in ([json] if json else []) + ([kept] if docs else []):
        write_result(path, facts)
    if docs:
        results.results()


def _check_page(block: str) -> None:
    if not PAGE.is_file():
        raise UserError(f"--docs: there is no {PAGE} here: run it in the project's root folder")
    if block not in PAGE.read_text(encoding="utf-8"):
        raise UserError(f"{PAGE} has no place for the table: write {block} and below it <!-- /results -->")


def _print(device: str, rows: list[support.Row]) -> None:
    summary = support.summarise(rows)
    table = Table("", *(name.replace("_", "_\n") for name in summary.header), title=device, box=None)
    for line in summary.lines:
        table.add_row(*line)
    console = Console()
    console.print(table)
    for number, reason in enumerate(summary.reasons, 1):
        console.print(f"({number}) {reason}", markup=False, highlight=False)
    for sentence in summary.absent:
        console.print(f"not here: {sentence}", markup=False, highlight=False)
