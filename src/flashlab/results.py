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
from flashlab.btc.bench import efficiency, name_of
from flashlab.btc.metrics import COMPARISONS, TITLES, comparisons, load_metrics, number, time_range
from flashlab.errors import UserError, one_line, write_text
from flashlab.gpt2 import report as gpt2
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
        try:
            rendered = RENDERERS[renderer](*(FOLDER / file for file in files))
        except (OSError, LookupError, TypeError, ValueError, AttributeError) as error:  # files may lack anything
            raise UserError(
                f"{page}: cannot render the block `{name}` ({one_line(error)}); name the files that it takes, or "
                "measure them anew"
            ) from error
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


def full_run(path: Path) -> str:
    """Say how long a run took from the first command's start to the second one's end, and what came of it."""
    metrics = load_metrics(path)
    wall, finished = metrics["wall"], metrics["run"]["training"]["finished"]
    told = (
        f"**{wall['both_s']:.0f} s** of wall time: `flashlab train` {wall['train_s']:.0f} s, {finished['seconds']:.0f} "
        f"of them in Lightning, compiling included ({finished['ms_per_step']:.2f} ms a step); `flashlab evaluate` "
        f"{wall['evaluate_s']:.0f} s. No compiled kernel was in a cache before.\n"
    )
    return f"\n{told}{btc(path)}"


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


def loops(*paths: Path) -> str:
    """Show how fast the forecaster trains, from the figures of `flashlab bench train`."""
    parts = []
    for path in paths:
        record = read(path, "btc_train_bench", "flashlab bench train")
        measured = [row for row in record["rows"] if row["status"] == "ok"]
        published = next((row["bars_per_s"] for row in measured if row["contestant"] == "published"), None)
        rows = [
            (
                name_of(row),
                f"`{row['attention_backend']}`" if "attention_backend" in row else "",
                f"{row['ms_per_step']:.2f}",
                f"{row['bars_per_s'] / 1e6:.2f}",
                f"{row['bars_per_s'] / published:.1f}" if published else "",
                f"{share:.1%}" if (share := efficiency(row, measured)) else "",
                f"{row['busy_share']:.0%}",
                f"{row['peak_memory_mib']:,}",
                f"{row['kernels_per_step']:,}",
            )
            for row in measured
        ]
        header = (
            "Loop, preset, GPUs x batch",
            "Attention",
            "ms a step",
            "M bars/s",
            "times the published loop",
            "of as many single GPUs",
            "GPU busy",
            "MiB at most",
            "kernels a step",
        )
        shown = [column for column in zip(header, *rows, strict=True) if any(column[1:])]
        header, *rows = zip(*shown, strict=True)
        align = "".join("l" if name in ("Attention", "Loop, preset, GPUs x batch") else "r" for name in header)
        parts.append(f"{describe_machine(record)}.\n\n{markdown(Table('', header, rows, align))}")
    return "\n" + "".join(parts)


def kernels(path: Path) -> str:
    """Show what a captured step of the default preset consists of, from the figures of `flashlab bench train`."""
    record = read(path, "btc_train_bench", "flashlab bench train")
    step = next(row for row in record["rows"] if (row["contestant"], row["config"]) == ("captured", "default"))
    rows = [
        (f"`{shorten(kernel['name'])}`", f"{kernel['calls_per_step']:.0f}", f"{1e3 * kernel['ms_per_step']:.0f}")
        for kernel in step["kernels"]
    ]
    told = (
        f"Of {step['busy_ms_per_step']:.2f} ms in which a kernel ran, {step['kernels_per_step']} kernels in all, the "
        f"{len(rows)} longest:"
    )
    return f"\n{told}\n\n" + markdown(Table("", ("Kernel", "calls a step", "microseconds a step"), rows, "lrr"))


def shorten(name: str) -> str:
    """Shorten the name of a kernel to what tells it from others."""
    return re.split(r"[<(]", name.removeprefix("void "))[0][:72]


def heads(path: Path) -> str:
    """Show head shapes beside each other, from the figures of examples/btc_forecast/heads.py."""
    record = read(path, "btc_heads", "examples/btc_forecast/heads.py")
    skills = [f"{feature} over persistence" for feature in ("open", "high", "low", "volume", "average")]
    rows = [
        (
            f"{row['num_heads']} of {row['head_dim']}",
            f"{row['ms_per_step']:.2f}",
            f"{row['bars_per_s'] / 1e6:.1f}",
            f"{row['best_val_loss']:.4f}",
            *(f"{row['skill'][skill]:+.1%}" for skill in skills),
        )
        for row in record["rows"]
    ]
    header = ("Heads", "ms a step", "M bars/s", "validation loss", *(skill.split()[0] for skill in skills))
    told = f"{describe_machine(record)}; {record['rows'][0]['parameters']:,} parameters each; skill over persistence."
    return f"\n{told}\n\n" + markdown(Table("", header, rows, "l" + "r" * (len(header) - 1)))


# name of a renderer -> function of the files its block names
RENDERERS: dict[str, Callable[..., str]] = {
    "btc": btc,
    "check": check,
    "claims": claims,
    "full_run": full_run,
    "gpt2_ablation": gpt2.ablation,
    "gpt2_backends": gpt2.backends,
    "gpt2_bench": gpt2.bench,
    "gpt2_runs": gpt2.runs,
    "gpt2_sampling": gpt2.sampling,
    "gpt2_scaling": gpt2.scaling,
    "heads": heads,
    "interruptions": interruptions,
    "kernels": kernels,
    "loops": loops,
    "object_storage": object_storage,
    "overhead": overhead,
    "prepare": prepare,
    "published": published,
    "support": support,
    "sweep": sweep_tables,
}
