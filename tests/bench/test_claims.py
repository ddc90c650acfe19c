import json
from pathlib import Path

import pytest
from sweep_builder import build_sweep

from flashlab.bench import claims
from flashlab.bench.analysis import load
from flashlab.errors import UserError
from flashlab.results import results

SHAPE = {"head_dims": (64, 128), "masks": ("full", "causal")}


@pytest.fixture
def measured(tmp_path):
    """Write a sweep and return its path."""

    def write(sweep=None, name="sweep.json"):
        (tmp_path / name).write_text(json.dumps(sweep or build_sweep(**SHAPE)))
        return tmp_path / name

    return write


def judged(page):
    """Read the rows of a table: first cell -> the others."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line[:1] == "|"]
    return {first: others for first, *others in cells}


def only(table, words):
    (found,) = [cells for first, cells in table.items() if words in first]
    return found


def change(sweep, backend, **factors):
    for row in sweep["rows"]:
        if row["backend"] == backend and row["status"] == "ok":
            for name, factor in factors.items():
                row[name] *= factor
    return sweep


@pytest.mark.parametrize(
    ("words", "backend", "factors", "verdict"),
    [
        ("linearly", "tiled", {}, "holds"),
        ("10 times less memory", "standard", {"peak_memory_mib": 3}, "holds"),
        ("10 times less memory", "standard", {"peak_memory_mib": 0.1}, "**does not hold**"),
        ("Up to 3 times as fast", "flash_attention_2", {"latency_ms": 0.3}, "holds"),
        ("Up to 3 times as fast", "flash_attention_2", {"latency_ms": 3}, "**does not hold**"),
        ("2 to 4 times as fast", "flash_attention_2", {"latency_ms": 1.2}, "holds partly"),
        ("up to 335", "flash_attention_2", {"tflops_per_s": 1.0}, "holds"),  # 321: more than 95 %
        ("up to 335", "flash_attention_2", {"tflops_per_s": 0.98}, "**does not hold**"),
        ("as FlashAttention-2, forward", "flash_attention_4", {"latency_ms": 0.5}, "holds"),
        ("as FlashAttention-2, forward", "flash_attention_4", {}, "holds partly"),
        ("up to 740", "flash_attention_4", {}, "**does not hold**"),
        ("cuDNN", "sdpa_cudnn", {"latency_ms": 9}, "holds"),
        ("non-zero blocks", "tiled", {}, "not measured"),
        ("20 times less memory", "tiled", {}, "not measured"),  # standard ran out of memory
    ],
)
def test_the_verdict_follows_from_the_rows(words, backend, factors, verdict, measured):
    path = measured(change(build_sweep(**SHAPE), backend, **factors))
    assert only(judged(claims.claims(path)), words)[-1] == verdict


def test_memory_that_grows_faster_is_not_linear(measured):
    sweep = build_sweep(**SHAPE)
    for row in sweep["rows"]:
        if row["backend"] == "flash_attention_2" and row["status"] == "ok":
            row["peak_memory_mib"] *= row["seqlen"] ** 0.3
    _, here, verdict = only(judged(claims.claims(measured(sweep))), "linearly")
    assert here.startswith("memory ~ length^1.30 (flash_attention_2); standard 1.")
    assert verdict == "**does not hold**"


def test_memory_counts_the_inputs_and_prefers_the_readme_s_shape(measured):
    sweep = build_sweep(head_dims=(64,), masks=("full",), passes=("forward_backward",))
    readme = {"num_heads": 12, "num_kv_heads": 12, "batch_size": 8}
    for row in [row for row in sweep["rows"] if row["seqlen"] == 2048 and row["status"] == "ok"]:
        memory = {"standard": 2304.0, "flash_attention_2": 96.0}.get(row["backend"], 96.0)
        sweep["rows"].append(row | readme | {"peak_memory_mib": memory})
    table = judged(claims.claims(measured(sweep)))
    inputs_mib = 4 * 8 * 2048 * 12 * 64 * 2 / 2**20
    ratio = (2304 + inputs_mib) / (96 + inputs_mib)
    here = only(table, "10 times less")[1]
    assert here == f"{ratio:.2f} times less (flash_attention_2 against standard, 1 cell, length 2,048)"


def test_several_files_are_one(measured):
    long = measured(build_sweep(**SHAPE, lengths=(2048, 4096)), "long.json")
    short = measured(build_sweep(**SHAPE, lengths=(512, 1024)), "short.json")
    alone, both = (only(judged(claims.claims(*paths)), "2 to 4 times") for paths in ([short], [short, long]))
    assert "4 cells, length 512 to 1,024" in alone[1]
    assert "6 cells, length 512 to 2,048" in both[1]  # at 4,096 standard runs out of memory
    assert len(claims.join([load(short), load(short)]).rows) == len(load(short).rows)


def test_published_figures_stand_beside_the_same_cells(measured):
    sweep = build_sweep(**SHAPE)
    for row in sweep["rows"]:
        if (row["backend"], row["pass"], row["head_dim"]) == ("flash_attention_2", "forward", 128):
            row["tflops_per_s"] = 360.0
    table = judged(claims.published(measured(sweep)))
    assert table["FA2 (FA2) forward, head dim 128, full"][:2] == ["309 / 360", "350 / 360"]
    assert table["FA2 (FA2) forward, head dim 128, full"][-1] == "holds"
    assert any(first.startswith("FA3 (FA4)") for first in table)
    other_tokens = claims.published(measured(build_sweep(**SHAPE, tokens=8192)))
    assert judged(other_tokens)["FA2 (FA2) forward, head dim 128, full"] == [
        *("309 / -", "350 / -", "362 / -", "368 / -", "370 / -"),
        "370 / 378",  # one sequence of 16k is 16k tokens
        "holds",
    ]


@pytest.mark.parametrize("options", [{"backends": ("sdpa_math",)}, {"gpu": False}, {"passes": ("backward",)}])
def test_a_partial_sweep_leaves_claims_open(options, measured):
    path = measured(build_sweep(**(SHAPE | {"lengths": (512, 1024)} | options)))
    assert any(cells[-1] == "not measured" for cells in judged(claims.claims(path)).values())
    for renderer in (claims.published, claims.sweep_tables):
        assert "nan" not in renderer(path)


def test_blocks_of_a_page_are_rendered(measured, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Path("assets/results")
    folder.mkdir(parents=True)
    measured().rename(folder / "sweep.json")
    rows = [
        {"backend": "tiled", "case": "one", "status": "ok", "reason": None, "errors": {}},
        {"backend": "tiled", "case": "two", "status": "wrong", "reason": "dk is off", "errors": {}},
        {"backend": "sdpa_flash", "case": "one", "status": "unsupported", "reason": None, "errors": {}},
    ]
    record = build_sweep(**SHAPE) | {"kind": "attention_check", "rows": rows}
    (folder / "check.json").write_text(json.dumps(record))
    blocks = ["claims sweep.json", "published sweep.json", "sweep sweep.json", "check check.json"]
    Path("README.md").write_text("".join(f"<!-- results: {block} -->\n<!-- /results -->\n" for block in blocks))
    assert results() == 0
    page = Path("README.md").read_text()
    assert "3 calls on NVIDIA H200" in page
    assert "1 of them without a reason" in page
    assert "| `tiled` | 1 | 0 | 1 |\n| `sdpa_flash` | 0 | 1 | 0 |" in page
    assert "| Memory grows linearly with length |" in page
    assert "- **auto reaches 0.97" in page
    assert results(check=True) == 0
    (folder / "check.json").write_text(json.dumps(record | {"kind": "attention_sweep"}))
    with pytest.raises(UserError, match=r"check\.json is of kind 'attention_sweep', not 'attention_check'"):
        results()
