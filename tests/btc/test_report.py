import json
import re
import resource
from types import SimpleNamespace

import numpy as np
import pytest
from torch.utils.tensorboard import SummaryWriter

from flashlab.btc.baselines import BASELINES
from flashlab.btc.figures import choose_blocks
from flashlab.btc.metrics import evaluate_forecasts
from flashlab.btc.report import print_summary, read_curves
from flashlab.cli import main

PICTURES = {"skill", "errors", "together", "open", "high", "low", "close", "volume", "losses"}


def write_run(folder):
    """Three days of bars, and a model that beats the baselines at ranges and loses at the close."""
    rng = np.random.default_rng(0)
    rows = np.arange(200, 200 + 3 * 1440)
    close = 9 + 1e-3 * rng.normal(size=rows[-1] + 1).cumsum()
    opened = np.append(close[0], close[:-1])
    up, down = rng.exponential(1e-3, size=(2, len(close)))
    volume = rng.normal(2, 1, size=len(close)).clip(0)
    bars = np.stack([opened, np.maximum(opened, close) + up, np.minimum(opened, close) - down, close, volume], axis=1)
    last = close[rows - 1]
    noise = 5e-4 * rng.normal(size=len(rows))
    model = np.stack([last, last + 1.4e-3, last - 1.4e-3, last + noise, np.full(len(rows), 2)], axis=1)
    forecasts = {"model": model} | {
        name: forecast(bars, rows, np.arange(120, 1000)) for name, forecast in BASELINES.items()
    }
    scaler = SimpleNamespace(mean=bars.mean(axis=0), std=bars.std(axis=0))
    metrics = evaluate_forecasts(rows + 25_000_000, bars[rows], forecasts, scaler)
    metrics["run"] = {"config": {"note": "<script>alert(1)</script> | *"}, "seconds": 1.5}
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(metrics))
    arrays = {name: values.astype(np.float32) for name, values in ({"truth": bars[rows]} | forecasts).items()}
    np.savez(folder / "forecasts.npz", minute=rows + 25_000_000, **arrays)
    with SummaryWriter(folder / "logs") as log:
        for step in range(0, 500, 10):
            log.add_scalar("train/loss", 1 / (1 + step), step)
            log.add_scalar("train/lr", 1e-3, step)
        log.add_scalar("val/loss", 0.5, 100)
    return metrics


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """A run with its report, the metrics in it, and what the terminal saw."""
    run = tmp_path_factory.mktemp("runs") / "trial"
    metrics = write_run(run)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "200")
        assert main(["report", str(run)]) == 0
    return run, metrics


def test_html_and_markdown_say_the_same(reported):
    run, metrics = reported
    html, markdown = (run / "report.html").read_text(), (run / "report.md").read_text()
    for line in metrics["verdicts"]:
        assert line in html
        assert line in markdown
    headings = re.findall(r"<h2>(.+)</h2>", html)
    assert headings == re.findall(r"^## (.+)$", markdown, re.MULTILINE)
    numbers = re.findall(r"<td[^>]*>([^<]*\d[^<]*)</td>", html)
    cells = {cell.strip().strip("*") for line in markdown.splitlines() for cell in line.split("|")}
    assert len(numbers) > 100
    assert {cell for cell in numbers if "script" not in cell} <= cells


def test_html_stands_alone_and_markdown_links_to_its_pictures(reported):
    run, _ = reported
    html, markdown = (run / "report.html").read_text(), (run / "report.md").read_text()
    sources = re.findall(r'(?:src|href)="([^"]{,30})', html)
    assert len(sources) == len(PICTURES)
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert len(html) < 1.5e6
    linked = re.findall(r"\]\((images/.+?)\)", markdown)
    assert {f"images/{name}.png" for name in PICTURES} == set(linked)
    assert all((run / link).read_bytes().startswith(b"\x89PNG") for link in linked)


def test_a_lost_comparison_is_printed_as_lost(reported, capsys, monkeypatch):
    run, metrics = reported
    lost = next(line for line in metrics["verdicts"] if line.startswith("Close: loses to"))
    assert f'<li class="loses">{lost}</li>' in (run / "report.html").read_text()
    assert f"- **{lost}**" in (run / "report.md").read_text()
    monkeypatch.setenv("COLUMNS", "200")
    print_summary(metrics)
    assert lost in capsys.readouterr().out


def test_what_a_run_is_called_and_holds_cannot_break_the_page(reported):
    run, _ = reported
    assert "<script" not in (run / "report.html").read_text()
    assert r"\<script\>alert(1)\</script\> \| \*" in (run / "report.md").read_text()


def test_a_full_disk_leaves_the_previous_report(tmp_path, capsys):
    run = tmp_path / "run"
    write_run(run)
    (run / "report.md").write_text("previous")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # enough for a picture, but not for the page
    try:
        assert main(["report", str(run)]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    message = capsys.readouterr().err
    assert re.fullmatch(r"flashlab: error: cannot write .*run/report\.html: File too large; .*\n", message)
    assert sorted(path.name for path in run.iterdir()) == ["forecasts.npz", "logs", "metrics.json", "report.md"]
    assert (run / "report.md").read_text() == "previous"


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda run: (run / "metrics.json").unlink(), "has no metrics.json: run `flashlab evaluate "),
        (lambda run: (run / "forecasts.npz").unlink(), "has no forecasts.npz: run `flashlab evaluate "),
        (lambda run: (run / "metrics.json").write_text('{"schema_version"'), "metrics.json is not JSON"),
        (lambda run: (run / "forecasts.npz").write_bytes((run / "forecasts.npz").read_bytes()[:9000]), "is damaged"),
        (lambda run: np.savez(run / "forecasts.npz", minute=np.zeros(3)), "is damaged"),
        (lambda run: shorten(run / "forecasts.npz"), "are of different evaluations"),
    ],
)
def test_what_is_missing_or_damaged_is_named(spoil, complaint, tmp_path, capsys):
    run = tmp_path / "run"
    write_run(run)
    spoil(run)
    before = sorted(run.rglob("*"))
    assert main(["report", str(run)]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert str(run) in message
    assert complaint in message
    assert sorted(run.rglob("*")) == before


def shorten(path):
    arrays = {name: values[:100] for name, values in np.load(path).items()}
    np.savez(path, **arrays)


def test_blocks_are_chosen_by_rule():
    minute = np.arange(100 * 120, 105 * 120)
    truth = np.zeros((len(minute), 5))
    for block, height in enumerate([3, 9, 1, 5, 7]):
        truth[block * 120 : (block + 1) * 120, 1] = height
    keep = np.r_[0:130, 240:600]  # of the wildest block, the second, only ten minutes are left
    order = np.random.default_rng(0).permutation(keep)
    order = np.append(order, order[:50])  # some rows twice, as overlapping windows have them
    blocks = choose_blocks(minute[order], truth[order])
    shown = {title: minute[order][rows] for title, rows in blocks.items()}
    np.testing.assert_array_equal(shown["Median"], minute[:120])  # of heights 1, 3, 5, 7
    np.testing.assert_array_equal(shown["Most volatile"], minute[480:600])


def test_curves_of_a_resumed_run_are_one(tmp_path):
    for folder, steps, value in (("version_0", range(0, 60, 10), 1.0), ("version_1", range(30, 90, 10), 2.0)):
        with SummaryWriter(tmp_path / folder) as log:
            for step in steps:
                log.add_scalar("train/loss", value, step)
    steps, values = read_curves(tmp_path)["train/loss"]
    assert steps.tolist() == list(range(1, 90, 10))
    assert values.tolist() == [1, 1, 1, 2, 2, 2, 2, 2, 2]
    assert read_curves(tmp_path / "nothing") == {}
