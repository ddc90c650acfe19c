import json
import re

import numpy as np
import pandas as pd
import pytest
from sweep_builder import BANDWIDTH, PEAK, build_sweep

from flashlab.bench import analysis, figures
from flashlab.cli import main

PICTURES = {
    "tflops_forward",
    "tflops_forward_backward",
    "speedup_over_standard_forward",
    "speedup_over_standard_forward_backward",
    "speedup_over_flash_attention_2_forward",
    "speedup_over_flash_attention_2_forward_backward",
    "memory",
    "split",
    "roofline",
    "traffic",
    "blocks",
}
FEW = {"lengths": (512, 1024, 2048), "head_dims": (64,), "masks": ("full",), "passes": ("forward",)}


def write(folder, sweep):
    folder.mkdir(exist_ok=True)
    (folder / "sweep.json").write_text(json.dumps(sweep))
    return analysis.load(folder / "sweep.json")


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """A sweep with its report, as HTML and as Markdown without its escapes."""
    folder = tmp_path_factory.mktemp("sweeps") / "trial"
    sweep = write(folder, build_sweep(head_dims=(64, 256), masks=("full", "causal", "blocks:0.25", "blocks:0.5")))
    assert main(["report", str(folder)]) == 0
    markdown = (folder / "report.md").read_text()
    return sweep, folder, (folder / "report.html").read_text(), re.sub(r"\\([_*|<>#\[\]])", r"\1", markdown)


def test_a_whole_sweep_has_every_picture(reported):
    _, folder, html, markdown = reported
    assert {path.stem for path in (folder / "images").iterdir()} == PICTURES
    assert html.count('src="data:image/png;base64,') == len(PICTURES)
    assert set(re.findall(r"\]\(images/(.+?)\.png\)", markdown)) == PICTURES
    assert len(html) < 1.5e6
    assert "<script" not in html


def test_words_follow_from_the_rows(reported):
    sweep, _, html, markdown = reported
    assert "Fastest forward: flash_attention_4 in 16 of 24 cells, at lengths 2,048 to 16,384;" in markdown
    choices = analysis.auto_choices(sweep)
    said = (
        f"in {len(choices) - 1} of {len(choices)} cells; worst: 0.929 (flash_attention_4 where sdpa_cudnn is fastest:"
    )
    assert said in markdown
    assert re.search(r'<li class="loses">auto reaches 0.97', html)
    assert re.search(r'<li class="loses">Cells with wrong results, which were not timed: tiled 3\.', html)
    assert re.search(r'<td class="r loses">FA4 0\.93 loses</td>', html)
    assert (
        "| unsupported | flash_attention_3 | 144 | everywhere | flash_attention_3 is not installed | see *doctor* |"
        in (markdown)
    )
    assert "| missing | sdpa_efficient | 12 | head dim 256; length 16,384 |" in markdown
    assert re.search(r"\| oom \| standard \| \d+ \| causal, full; lengths 4,096 to 16,384 \|", markdown)


def test_words_change_with_the_rows(tmp_path):
    sweep = build_sweep(**FEW)
    for row in sweep["rows"]:
        if row["backend"] == "sdpa_efficient":
            row["latency_ms"] /= 100
    write(tmp_path, sweep)
    assert main(["report", str(tmp_path / "sweep.json")]) == 0
    markdown = (tmp_path / "report.md").read_text().replace("\\", "")
    assert "Fastest forward: sdpa_efficient in 3 of 3 cells, at lengths 512 to 2,048." in markdown
    assert "auto reaches 0.97 of the fastest backend's speed or more in 0 of 3 cells" in markdown


def test_crossings_lie_where_the_lines_meet(reported):
    sweep, *_ = reported
    table = analysis.panels(analysis.wide(sweep, "forward"))[("bfloat16", 256, 8, 8, "full")]
    start, turns = analysis.crossings(table["flex_attention"], table["flash_attention_2"])
    assert start == "behind"
    assert turns == [pytest.approx(1900, rel=0.05)]  # 0.6 / (1 + 500 / S) = 0.55 / (1 + 300 / S)
    assert analysis.crossings(table["flash_attention_2"], table["flash_attention_2"] * 1.01) == ("even", [])
    assert analysis.crossings(table["sdpa_cudnn"], table["standard"]) == ("ahead", [])
    back_and_forth = pd.Series([1.0, 4.0, 1.0], [512, 1024, 2048]), pd.Series([2.0, 2.0, 2.0], [512, 1024, 2048])
    assert analysis.crossings(*back_and_forth) == ("ahead", [pytest.approx(512 * 2**0.5), pytest.approx(1024 * 2**0.5)])


def test_memory_exponents_are_of_one_sequence(reported):
    """The batch shrinks as the length grows, so that the memory of the whole call says nothing."""
    sweep, *_ = reported
    fits = analysis.exponents(sweep).query("mask == 'full' and head_dim == 64 and `pass` == 'forward'")
    fits = fits.set_index("backend")
    assert fits.loc["flash_attention_2", "exponent"] == pytest.approx(1.0)
    assert 1.9 < fits.loc["standard", "exponent"] < fits.loc["standard", "last"] < 2.0


def test_a_cell_is_memory_bound_by_its_bytes(reported):
    sweep, *_ = reported
    rows = analysis.bounds(sweep).query("`pass` == 'forward' and mask == 'full' and seqlen == 1024 and head_dim == 64")
    rows = rows.set_index("backend")
    tensor, scores = 16 * 1024 * 32 * 64 * 2, 16 * 32 * 1024**2 * 2
    assert rows.loc["flash_attention_2", "bytes"] == 4 * tensor
    assert rows.loc["standard", "bytes"] == 4 * tensor + 4 * scores
    flops = 4 * 16 * 32 * 1024**2 * 64
    for backend, row in rows.iterrows():
        assert row["flops"] == pytest.approx(flops)
        assert row["memory_bound"] == (row["bytes"] / BANDWIDTH / 1e9 > flops / PEAK / 1e12), backend
    assert rows.loc["standard", "memory_bound"]
    assert not rows.loc["flash_attention_2", "memory_bound"]


def test_block_sparse_time_is_fitted(tmp_path):
    sweep = build_sweep(
        backends=("flex_attention",),
        masks=("blocks:0.25", "blocks:0.5", "blocks:0.75"),
        **{key: value for key, value in FEW.items() if key != "masks"},
    )
    for row in sweep["rows"]:
        flops = row["tflops_per_s"] * row["latency_ms"]
        row["latency_ms"] = 3 + 7 * float(row["mask"].removeprefix("blocks:"))
        row["tflops_per_s"] = flops / row["latency_ms"]
    fits = analysis.block_fits(write(tmp_path, sweep))
    assert len(fits) == 3  # lengths
    np.testing.assert_allclose(fits[["dense_ms", "fixed", "r2"]], [[10, 0.3, 1]] * 3, rtol=1e-3)


@pytest.mark.parametrize(
    ("options", "drawn"),
    [
        ({"backends": ("flash_attention_2",)}, {"tflops_forward", "memory", "roofline", "traffic"}),
        ({"backends": ("sdpa_flash", "sdpa_cudnn")}, {"tflops_forward", "memory", "roofline", "traffic"}),
        ({"gpu": False}, {"tflops_forward", "speedup_over_standard_forward", "roofline", "traffic"}),
        ({"lengths": (512,)}, {"tflops_forward", "speedup_over_standard_forward", "memory", "roofline", "traffic"}),
        ({"masks": ("blocks:0.25", "blocks:0.5", "blocks:0.75")}, {"blocks", "traffic"}),
        ({"passes": ("backward",)}, {"traffic"}),
        ({"backends": ("flash_attention_3",)}, set()),
    ],
)
def test_a_partial_sweep_says_which_pictures_it_lacks(options, drawn, tmp_path):
    write(tmp_path, build_sweep(**(FEW | options)))
    assert main(["report", str(tmp_path)]) == 0
    markdown = (tmp_path / "report.md").read_text()
    images = {path.stem for path in (tmp_path / "images").iterdir()}
    assert drawn <= images < PICTURES
    assert set(re.findall(r"\]\(images/(.+?)\.png\)", markdown)) == (images if drawn else set())
    assert ("No picture here: " in markdown) == bool(drawn)
    assert "nan" not in markdown


def test_a_share_above_the_roof_is_explained(tmp_path, reported):
    sweep = build_sweep(**FEW)
    sweep["ceilings"]["matmul_tflops_per_s"] = 100.0
    write(tmp_path, sweep)
    assert main(["report", str(tmp_path)]) == 0
    markdown = (tmp_path / "report.md").read_text()
    assert re.search(r"Above the roof, .*: \d+ of \d+ cells, at up to \d{3} %\. .* measured too low", markdown)
    assert "Above the roof" not in reported[3]


def test_a_machine_that_was_not_quiet_is_said_first(tmp_path, reported):
    sweep = build_sweep(**FEW)
    ok = [row for row in sweep["rows"] if row["status"] == "ok"]
    for row in ok[::4]:
        row["latency_ms_p90"] = 3 * row["latency_ms_p10"]
    write(tmp_path, sweep)
    assert main(["report", str(tmp_path)]) == 0
    first = next(line for line in (tmp_path / "report.md").read_text().splitlines() if line.startswith("- "))
    assert first.startswith("- **The machine was not quiet: in ")
    assert "(at most 3 times)" in first
    assert "not quiet" not in reported[3]


def test_no_words_stand_twice(reported):
    _, _, _, markdown = reported
    lines = [line for line in markdown.splitlines() if len(line) > 25 and line[0] not in "|-"]
    assert len(lines) == len(set(lines))
    captions = re.findall(r"!\[(.*)\]\(.*\n\n\*(.*)\*$", markdown, re.MULTILINE)
    assert len(captions) == len(PICTURES)
    assert all(alt != caption for alt, caption in captions)


def test_block_sparse_counts_that_tiled_hides_are_not_drawn(tmp_path):
    sweep = build_sweep(**FEW)
    sweep["traffic"] += [row | {"algorithm": "block_sparse"} for row in sweep["traffic"] if row["algorithm"] == "tiled"]
    (legend,) = figures.traffic(write(tmp_path, sweep)).legends
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels == ["standard", "tiled", "block-sparse, 25 % of blocks", "block-sparse, 50 % of blocks", "theory"]


def test_a_sweep_without_ceilings_and_traffic_is_reported(tmp_path):
    sweep = build_sweep(**FEW)
    del sweep["ceilings"], sweep["traffic"], sweep["machine"]
    write(tmp_path, sweep)
    assert main(["report", str(tmp_path)]) == 0
    assert not {"roofline.png", "traffic.png"} & {path.name for path in (tmp_path / "images").iterdir()}


def test_panels_of_one_head_dim_are_told_apart(tmp_path):
    sweep = build_sweep(**FEW)
    half = [row | {"num_heads": 16, "num_kv_heads": 4, "dtype": "float16"} for row in sweep["rows"]]
    loaded = write(tmp_path, sweep | {"rows": sweep["rows"] + half})
    names = [analysis.panel_name(panel, loaded) for panel in analysis.panels(analysis.wide(loaded, "forward"))]
    assert names == ["head dim 64, full, bfloat16, 32 heads", "head dim 64, full, float16, 16 heads, 4 for k and v"]


def test_of_a_cell_measured_twice_the_later_row_counts(tmp_path):
    sweep = build_sweep(**FEW)
    sweep["rows"].append(sweep["rows"][0] | {"latency_ms": 123.0})
    assert (write(tmp_path, sweep).rows["latency_ms"] == 123.0).sum() == 1


def spoil_row(**changes):
    return lambda sweep: sweep["rows"][1].update(changes)


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda sweep: sweep.update(kind="attention_check"), "is of kind 'attention_check', not 'attention_sweep'"),
        (lambda sweep: sweep.update(schema=2), "has schema 2, this flashlab reads 1"),
        (lambda sweep: sweep.update(rows=[]), "has no rows"),
        (lambda sweep: sweep.update(rows=[[1]]), "has no rows"),
        (lambda sweep: sweep["rows"][1].pop("seqlen"), "is damaged: row 2 has seqlen None"),
        (spoil_row(latency_ms=None), "is damaged: row 2 has latency_ms None"),
        (spoil_row(latency_ms=-1.0), "is damaged: row 2 has latency_ms -1.0"),
        (spoil_row(latency_ms_p90="slow"), "is damaged: row 2 has latency_ms_p90 'slow'"),
        (spoil_row(tflops_per_s="fast"), "is damaged: row 2 has tflops_per_s 'fast'"),
        (spoil_row(status="fine"), "is damaged: row 2 has status 'fine'"),
        (spoil_row(**{"pass": ["forward"]}), "is damaged: row 2 has pass"),
        (lambda sweep: sweep.update(ceilings={"matmul_tflops_per_s": 1}), "is damaged: ceilings or traffic"),
        (lambda sweep: sweep.update(traffic=[{"algorithm": "tiled", "density": "half"}]), "is damaged: ceilings or"),
    ],
)
def test_a_damaged_or_foreign_file_is_one_line(spoil, complaint, tmp_path, capsys):
    spoil(sweep := build_sweep(**FEW))
    (tmp_path / "sweep.json").write_text(json.dumps(sweep))
    assert_refused(tmp_path, complaint, capsys)


@pytest.mark.parametrize("content", ["", '{"schema": 1', "[1, 2]", "\0\xff"])
def test_what_is_not_a_result_is_one_line(content, tmp_path, capsys):
    (tmp_path / "sweep.json").write_text(content)
    assert_refused(tmp_path, "`flashlab bench sweep` writes it", capsys)


def test_a_run_of_gpt2_is_sent_to_what_shows_it(tmp_path, capsys):
    (tmp_path / "run.json").write_text('{"tokens_per_step": 2048}')
    assert_refused(tmp_path, f"`make tensorboard` shows its curves, `flashlab gpt2 sample {tmp_path}` what", capsys)


def test_a_folder_that_holds_neither_is_told_of_both(tmp_path, capsys):
    assert_refused(tmp_path, "has no metrics.json: run `flashlab evaluate ", capsys)
    assert_refused(tmp_path, "no sweep.json: run `flashlab bench sweep` first", capsys)
    assert_refused(tmp_path / "nowhere", "there is no such file or folder", capsys)


def assert_refused(path, complaint, capsys):
    before = sorted(path.rglob("*"))
    assert main(["report", str(path)]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert str(path) in message
    assert complaint in message
    assert sorted(path.rglob("*")) == before
