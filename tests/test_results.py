import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from flashlab.btc.metrics import evaluate_forecasts
from flashlab.errors import UserError
from flashlab.results import results

BLOCK = "# Title\n\n<!-- results: btc {} -->\n{}<!-- /results -->\n\nThe end.\n"


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    """A project whose README and one page of docs show a result."""
    monkeypatch.chdir(tmp_path)
    for folder in ("assets/results", "docs"):
        (tmp_path / folder).mkdir(parents=True)
    minute, truth = np.arange(4 * 1440), np.random.default_rng(0).normal(size=(4 * 1440, 5))
    scaler = SimpleNamespace(mean=np.zeros(5), std=np.ones(5))
    forecasts = {"model": truth * [0.5, 0.5, 0.5, 2.5, 0.5], "persistence": np.zeros_like(truth)}
    Path("assets/results/small.json").write_text(json.dumps(evaluate_forecasts(minute, truth, forecasts, scaler)))
    Path("README.md").write_text(BLOCK.format("small.json", ""))
    Path("docs/results.md").write_text(BLOCK.format("small.json", "| typed | by hand |\n"))


def test_pages_follow_the_files(capsys):
    assert results() == 0
    readme = Path("README.md").read_text()
    assert readme.startswith("# Title\n\n<!-- results: btc small.json -->\n")
    assert readme.endswith("<!-- /results -->\n\nThe end.\n")
    assert "+50.0" in next(line for line in readme.splitlines() if line.startswith("| Open"))
    assert "loses" in next(line for line in readme.splitlines() if line.startswith("| Close"))
    assert Path("docs/results.md").read_text() == readme
    assert results(check=True) == 0
    capsys.readouterr()
    Path("README.md").write_text(readme.replace("+50.0", "+51.0"))
    assert results(check=True) == 1
    assert capsys.readouterr().err == "README.md: block `btc small.json` is stale: run `flashlab results`\n"
    assert "+51.0" in Path("README.md").read_text()


@pytest.mark.parametrize(
    ("readme", "complaint"),
    [
        ("\n<!-- results: btc small.json -->\n", r"README\.md, line 2: the block does not end"),
        ("<!-- results: btc small.json -->\n" + BLOCK.format("small.json", ""), r"README\.md, line 1: the block"),
        ("<!-- results: btd small.json -->\n<!-- /results -->\n", r"README\.md: no renderer 'btd'.*did you mean 'btc'"),
        (BLOCK.format("gone.json", ""), r"assets/results/gone\.json: No such file"),
        ("<!-- results: prepare gone.json -->\n<!-- /results -->\n", "block `prepare gone.json`.*FileNotFoundError"),
        ("<!-- results: prepare small.json -->\n<!-- /results -->\n", "block `prepare small.json`.*'time_ratio'"),
        ("<!-- results: prepare -->\n<!-- /results -->\n", "block `prepare`.*name the files that it takes"),
    ],
)
def test_a_block_that_cannot_be_rendered_leaves_every_page(readme, complaint):
    Path("README.md").write_text(readme)
    before = Path("docs/results.md").read_text()
    with pytest.raises(UserError, match=complaint):
        results()
    assert Path("README.md").read_text() == readme
    assert Path("docs/results.md").read_text() == before


def test_another_folder_is_refused(monkeypatch):
    monkeypatch.chdir("docs")
    with pytest.raises(UserError, match=r"no README\.md here: run `flashlab results` in the project's root folder"):
        results()
