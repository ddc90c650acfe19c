import gzip
import re

import pytest
from matplotlib import image

from flashlab.btc.bars import HEADER
from flashlab.cli import main

MINUTE_0 = 1_500_000_000 // 60  # 2017-07-14 02:40 UTC


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write_bars(path, minutes, **changes: str) -> None:
    """Write rows of equal bars; `changes` gives other lines in place of those of some minutes, as m3="..."."""
    lines = [changes.get(f"m{m}", f"{(MINUTE_0 + m) * 60},100,110,90,105,{m % 4}") for m in minutes]
    path.write_text("\n".join([HEADER, *lines]) + "\n")


def test_says_what_a_file_holds(tmp_path, capsys):
    minutes = [*range(100), *range(103, 200), *range(260, 300), 20]
    bad = f"{(MINUTE_0 + 5) * 60},100,110,90,105,-1"
    write_bars(tmp_path / "bars.csv", minutes, m5=bad)
    assert main(["data", "describe", "bars.csv"]) == 0
    said = capsys.readouterr().out
    for line in (
        "bars 236 of 238 rows",
        "time 2017-07-14 02:40 to 2017-07-14 07:39 UTC (0.2 days)",
        "missing minutes 64 (21.3%)",
        "without trades 25.0% of the bars have a volume of 0",
        "rows dropped 1 with negative volume 1 with a later row of the same minute",
        "rows moved 1 that came after a later one",
        "3 gaps; the largest",
        "2017-07-14 06:00 2017-07-14 07:00 60",
        "2017-07-14 04:20 2017-07-14 04:23 3",
        "high 110 110 110 110",
        "volume 0 2 1.50847 3",
        "2017-07-14 236 16.4% ███",
        "plot: bars.csv.png",
    ):
        assert line in re.sub(r"\s+", " ", said), line
    assert max(map(len, said.splitlines())) <= 80


@pytest.mark.parametrize("name", ["bars.png", "pictures/bars.svg", "bars.pdf"])
def test_draws_where_asked(tmp_path, name):
    write_bars(tmp_path / "bars.csv", range(10))
    assert main(["data", "describe", "bars.csv", "--plot", name]) == 0
    assert (tmp_path / name).stat().st_size > 5000
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize(("days", "counted"), [(1, "day"), (100, "month"), (1000, "year")])
def test_the_plot_is_a_picture_whatever_the_length(tmp_path, capsys, recwarn, days, counted):
    write_bars(tmp_path / "bars.csv", [*range(100), *range(days * 1440 - 100, days * 1440)])
    assert main(["data", "describe", str(tmp_path / "bars.csv")]) == 0
    picture = image.imread(tmp_path / "bars.csv.png")
    assert picture.shape[0] > picture.shape[1] > 900
    assert picture[..., :3].std() > 0.05
    assert f"bars by {counted}" in capsys.readouterr().out
    assert not recwarn.list


def test_one_bar_is_enough(tmp_path, recwarn):
    write_bars(tmp_path / "bars.csv", [0])
    assert main(["data", "describe", "bars.csv"]) == 0
    assert not recwarn.list


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("nothing.csv", None, "nothing.csv does not exist; check the path"),
        ("empty.csv", b"", "empty.csv is empty; expected a CSV with the header"),
        ("columns.csv", b"Timestamp,Open,High,Low,Price,Volume\n1,1,1,1,1,1\n", "columns.csv has no column 'Close'"),
        ("cell.csv", f"{HEADER}\n1500000000,1,1,1,1,much\n".encode(), "cell.csv, line 2, column volume: 'much' is not"),
        ("tabs.csv", f"{HEADER}\n".replace(",", "\t").encode(), "tabs.csv seems to be separated by tabs"),
        ("cut.csv.gz", gzip.compress(b"x" * 1000, mtime=0)[:-9], "cut.csv.gz is truncated or damaged"),
        ("binary.csv", bytes(1000), "binary.csv is a binary file"),
        ("folder", "a folder", "folder is a folder without manifest.json"),
    ],
)
def test_bad_input_is_one_line_and_leaves_the_plot(tmp_path, capsys, name, content, said):
    (plot := tmp_path / f"{name}.png").write_text("earlier")
    if content == "a folder":
        (tmp_path / name).mkdir()
    elif content is not None:
        (tmp_path / name).write_bytes(content)
    assert main(["data", "describe", name]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"flashlab: error: {said}")
    assert captured.err.count("\n") == 1
    assert plot.read_text() == "earlier"


def test_a_plot_that_cannot_be_written(tmp_path, capsys):
    write_bars(tmp_path / "bars.csv", range(10))
    assert main(["data", "describe", "bars.csv", "--plot", "bars.doc"]) == 2
    assert "--plot bars.doc: expected a name that ends in .png, .svg, .pdf" in capsys.readouterr().err
    assert main(["data", "describe", "bars.csv", "--plot", "bars.csv/plot.png"]) == 2
    assert "cannot write bars.csv/plot.png" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["bars.csv"]
