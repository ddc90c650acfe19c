"""Keep the numbers in README.md and docs/ equal to the result files: nobody types one into Markdown.

A block names its renderer and its files in assets/results; `flashlab results` writes what stands between the marks:

    <!-- results: btc real.json seed_fill.json -->
    <!-- /results -->
"""

import difflib
import json
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flashlab.attention.support import markdown as support_table
from flashlab.bench.analysis import describe_machine, read
from flashlab.bench.claims import claims, markdown, published, sweep_tables
from flashlab.btc.metrics import COMPARISONS, TITLES, comparisons, load_metrics, number, time_range
from flashlab.errors import UserError, write_text
from flashlab.report import Table

FOLDER = Path("assets/results")
OPENING = re.compile(r"^<!-- results: .*$", re.MULTILINE)
BLOCK = re.compile(r"^<!-- results: ([^\n]+) -->\n(.*?)^<!-- /results -->$", re.MULTILINE | re.DOTALL)


def results(*, check: bool = False) -> int:
    """Rewrite the numbers in README.md and docs/ from the files in assets/results.

    Args:
        check: change nothing; name the blocks that are stale and exit with 1.
    """
    if not Path("README.md").is_file():
        raise UserError("there is no README.md here: run `flashlab results` in the project's root folder")
    pages = [Path("README.md"), *sorted(Path("docs").rglob("*.md"))]
    updates = {page: update(page) for page in pages}  # everything is rendered before anything is written
    for page, (text, stale) in updates.items():
        if stale and not check:
            write_text(page, text)
        for name in stale:
            if check:
                print(f"{page}: block `{name}` is stale: run `flashlab results`", file=sys.stderr)
            else:
                print(f"{page}: wrote block `{name}`")
    return int(check and any(stale for _, stale in updates.values()))


def update(page: Path) -> tuple[str, list[str]]:
    """Render every block of a page.

    Returns:
        The page as it should be, and the names of the blocks that differ from it.

    Raises:
        UserError: a block that does not end, asks for an unknown renderer, or for a file that is missing or damaged.
    """
    text = page.read_text(encoding="utf-8")
    stale = []

    def render(block: re.Match[str]) -> str:
        name, shown = block.groups()
        renderer, *files = name.split()
        if renderer not in RENDERERS:
            nearest = difflib.get_close_matches(renderer, RENDERERS, n=1, cutoff=0.0)[0]
            raise UserError(f"{page}: no renderer {renderer!r} for the block `{name}`; did you mean {nearest!r}?")
        rendered = RENDERERS[renderer](*(FOLDER / file for file in files))
        if rendered != shown:
            stale.append(name)
        return f"<!-- results: {name} -->\n{rendered}<!-- /results -->"

    for opening in OPENING.finditer(text):
        block = BLOCK.match(text, opening.start())
        if block is None or OPENING.search(block[2]):
            line = text.count("\n", 0, opening.start()) + 1
            raise UserError(f"{page}, line {line}: the block does not end: write <!-- /results --> on a line below it")
    return BLOCK.sub(render, text), stale


def btc(*paths: Path) -> str:
    """Show what forecasters of Bitcoin bars are worth, from the `metrics.json` of each."""
    parts = []
    for path in paths:
        metrics = load_metrics(path)

        def r2(feature: str, scores: dict[str, Any] = metrics["scores"]) -> str:
            of = (f"{TITLES.get(name, name)} {number(score[feature]['r2'], '.4f')}" for name, score in scores.items())
            return f"{feature} R2: {', '.join(of)}"

        parts.append(
            f"**{path.stem}**: {metrics['rows']:,} bars, {time_range(metrics)}; {r2('average')}; {r2('volume')}.\n\n"
        )
        rows = [COMPARISONS, ("---", "---:", "---", "---:", "---:"), *comparisons(metrics)]
        parts.append("".join(f"| {' | '.join(row)} |\n" for row in rows) + "\n")
    return "\n" + "".join(parts)


def prepare(path: Path) -> str:
    """Say what preparing a CSV costs, from the figures of examples/btc_forecast/bench_prepare.py."""
    figures = json.loads(path.read_text())
    return (
        f"Preparing takes {figures['time_ratio']:.1f} times as long as a bare `pandas.read_csv` of the file (medians "
        f"of {figures['rounds']}, imports left out), {figures['peak_memory_mib']:.0f} MiB of memory at most, and "
        f"stores {figures['stored_bytes_ratio']:.2f} times the reported bars' float32 bytes.\n"
    )


def interruptions(path: Path) -> str:
    """Count the runs that were killed and resumed, from what tests/btc/test_interruptions.py writes."""
    rows = json.loads(path.read_text())["rows"]
    alike = sum(row["status"] == "ok" for row in rows)
    places = ", ".join(f"{count} in {place}" for place, count in Counter(row["fell_in"] for row in rows).most_common())
    return f"Killed: {len(rows)} runs ({places}). Resumed, and equal to an uninterrupted run bit for bit: {alike}.\n"


def object_storage(path: Path) -> str:
    """Show what training fetches from object storage, from what tests/object_store.py measures."""
    figures = json.loads(path.read_text())
    rows = [
        (
            f"`{row['options'] or '--data.stream false'}`",
            *(str(row[name]) for name in ("devices", "epochs", "requests")),
            f"{row['times_the_set']:.2f}",
        )
        for row in figures["rows"]
    ]
    header = ("Options", "processes that train", "epochs", "requests", "bytes fetched / bytes of the set")
    return (
        f"\nA set of {figures['set_bytes'] / 1e6:.0f} MB, {1000 * figures['latency_s']:.0f} ms before every answer. "
        f"All its bars into memory: {figures['storage_s']:.1f} s, from a folder {figures['folder_s']:.1f} s.\n\n"
    ) + markdown(Table("", header, rows, "lrrrr"))


def check(path: Path) -> str:
    """Count what `flashlab check` found, backend by backend."""
    record = read(path, "attention_check", f"flashlab check --json {path}")
    counts: dict[str, Counter[str]] = {}
    for row in record["rows"]:
        counts.setdefault(row["backend"], Counter())[row["status"]] += 1
    statuses = ["ok", "unsupported", "wrong"]
    statuses += sorted({status for found in counts.values() for status in found} - set(statuses))
    rows = [(f"`{backend}`", *(f"{found[status]:,}" for status in statuses)) for backend, found in counts.items()]
    bare = sum(row["status"] == "unsupported" and not row.get("reason") for row in record["rows"])
    without = "each with its reason" if not bare else f"{bare:,} of them without a reason"
    told = f"{len(record['rows']):,} calls on {describe_machine(record)}; what is unsupported is refused, {without}."
    return f"\n{told}\n\n" + markdown(Table("", ("Backend", *statuses), rows, "l" + "r" * len(statuses)))


def overhead(path: Path) -> str:
    """Show what the interface adds to a call, from the figures of examples/attention_bench/overhead.py."""
    record = read(path, "attention_overhead", "examples/attention_bench/overhead.py --json")
    columns = ("direct_us", "interface_us", "overhead_us", "compiled_overhead_us")
    rows = [
        (f"`{row['backend']}`", *("-" if row.get(name) is None else f"{row[name]:.1f}" for name in columns))
        for row in record["rows"]
    ]
    header = ("Microseconds a call", "its own function", "through `attention`", "added", "added under torch.compile")
    return f"\n{describe_machine(record)}.\n\n" + markdown(Table("", header, rows, "l" + "r" * len(columns)))


def support(path: Path) -> str:
    """Show which backend supports what, from the facts of `flashlab backends`."""
    record = read(path, "attention_support", "flashlab backends --docs")
    return f"\n{describe_machine(record)}.\n\n{support_table(record['rows'])}\n"


# name of a renderer -> function of the files its block names
RENDERERS: dict[str, Callable[..., str]] = {
    "btc": btc,
    "check": check,
    "claims": claims,
    "interruptions": interruptions,
    "object_storage": object_storage,
    "overhead": overhead,
    "prepare": prepare,
    "published": published,
    "support": support,
    "sweep": sweep_tables,
}
