import gzip
import io
import os
import time
import zipfile
from dataclasses import asdict
from hashlib import sha256

import numpy as np
import pandas as pd
import pytest

from flashlab.btc import bars as bars_module
from flashlab.btc.bars import FEATURES, HEADER, Bars, fill_missing, log_features, read_bars, segments
from flashlab.errors import UserError

START = 1_500_000_000 // 60 * 60  # 2017-07-14 02:40 UTC


def make_rows(count: int, seed: int = 0) -> pd.DataFrame:
    """Possible bars of consecutive minutes."""
    rng = np.random.default_rng(seed)
    close = 2000 + rng.normal(size=count).cumsum().round(2)
    open_ = np.concatenate([[2000.0], close[:-1]])
    high = np.maximum(open_, close) + rng.integers(0, 3, count)
    low = np.minimum(open_, close) - rng.integers(0, 3, count)
    volume = rng.exponential(size=count).round(6)
    seconds = START + 60 * np.arange(count)
    return pd.DataFrame(dict(zip(HEADER.split(","), (seconds, open_, high, low, close, volume), strict=True)))


def write(path, rows: pd.DataFrame | str | bytes):
    content = rows.to_csv(index=False) if isinstance(rows, pd.DataFrame) else rows
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def zipped(files: dict[str, bytes]) -> bytes:
    with zipfile.ZipFile(buffer := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


@pytest.fixture
def rows() -> pd.DataFrame:
    return make_rows(500)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(bars_module, "CHUNK_ROWS", 7)


def assert_bars(bars: Bars, rows: pd.DataFrame) -> None:
    np.testing.assert_array_equal(bars.minute, rows["Timestamp"] // 60)
    np.testing.assert_array_equal(bars.values, rows[HEADER.split(",")[1:]].to_numpy(np.float32))
    assert bars.minute.dtype == np.int32
    assert bars.values.dtype == np.float32
    assert bars.values.flags.c_contiguous


# --- reading


@pytest.mark.parametrize(
    ("name", "pack"),
    [
        ("bars.csv", bytes),
        ("bars.csv.gz", gzip.compress),
        ("bars.zip", lambda text: zipped({"__MACOSX/._bars.csv": b"junk", "folder/bars.csv": text})),
        ("packed but named plainly.csv", gzip.compress),
    ],
)
def test_reads_every_packing_alike(tmp_path, rows, name, pack):
    path = write(tmp_path / name, pack(rows.to_csv(index=False).encode()))
    bars, cleaning = read_bars([path])
    assert_bars(bars, rows)
    assert (cleaning.rows, cleaning.kept) == (500, 500)
    source = cleaning.sources[0]
    content = path.read_bytes()
    assert (source.name, source.rows, source.size) == (name, 500, len(content))
    assert source.sha256 == sha256(content).hexdigest()


SPELLINGS = {
    "lower case": lambda rows: rows.rename(columns=str.lower),
    "spaces in the header": lambda rows: rows.rename(columns=" {}".format),
    "other columns, other order": lambda rows: rows.assign(datetime="2017", Weighted="x")[
        ["datetime", "Volume", "Close", "Timestamp", "Low", "High", "Weighted", "Open"]
    ],
    "float seconds": lambda rows: rows.astype({"Timestamp": float}),
    "milliseconds": lambda rows: rows.assign(Timestamp=rows["Timestamp"] * 1000),
    "ISO": lambda rows: rows.assign(Timestamp=pd.to_datetime(rows["Timestamp"], unit="s")),
    "ISO with Z": lambda rows: rows.assign(
        Timestamp=pd.to_datetime(rows["Timestamp"], unit="s").dt.strftime("%Y-%m-%dT%H:%M:%SZ")
    ),
    "ISO with an offset": lambda rows: rows.assign(
        Timestamp=pd.to_datetime(rows["Timestamp"], unit="s", utc=True).dt.tz_convert("Asia/Tokyo").map(str)
    ),
    "off-minute times": lambda rows: rows.assign(Timestamp=rows["Timestamp"] + rows.index % 60),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_reads_every_spelling_alike(tmp_path, rows, spelling, small_chunks):
    assert_bars(read_bars([write(tmp_path / "bars.csv", SPELLINGS[spelling](rows))])[0], rows)


@pytest.mark.parametrize(
    "change", [lambda text: text.replace("\n", "\r\n"), lambda text: "\ufeff" + text, lambda text: f"\n{text}\n\n"]
)
def test_line_ends_byte_order_mark_and_blank_lines_do_not_matter(tmp_path, rows, change):
    bars, cleaning = read_bars([write(tmp_path / "bars.csv", change(rows.to_csv(index=False)))])
    assert_bars(bars, rows)
    assert cleaning.rows == 500


def test_properties_of_bars(tmp_path, rows):
    bars, _ = read_bars([write(tmp_path / "bars.csv", rows)])
    assert len(bars) == 500
    assert bars.observed.all()
    assert bars.time[0] == np.datetime64("2017-07-14T02:40")


# --- cleaning


def test_cleaning_counts_exactly(tmp_path):
    """Every fault at a known place; a row with several faults counts once, under the first."""
    rows = make_rows(30).astype(float)
    cells = {
        (1, "Close"): np.nan,
        (2, "Volume"): np.inf,
        (3, "High"): 1e300,  # infinite as float32
        (4, "Timestamp"): np.nan,
        (5, "Low"): 0.0,
        (6, "Open"): -1.0,
        (7, "High"): 1.0,  # below the low, and open and close are outside too: counted as high_below_low
        (8, "Open"): 9000.0,
        (9, "Close"): 1.0,
        (10, "Volume"): -0.5,
    }
    for (row, column), value in cells.items():
        rows.loc[row, column] = value
    rows.loc[11, "Volume"] = 0.0  # a minute without trades is possible
    again = rows.loc[[12]].assign(Volume=77.0)  # the later row of a minute stays
    impossible = rows.loc[[13]].assign(Low=-1.0)  # an impossible row never replaces a possible one
    late = rows.loc[14]
    joined = pd.concat([rows.drop(index=14), again, impossible, late.to_frame().T])
    bars, cleaning = read_bars([write(tmp_path / "bars.csv", joined)])
    counts = {name: count for name, count in asdict(cleaning).items() if name != "sources"}
    assert counts == {
        "rows": 32,
        "non_finite": 4,
        "price_not_positive": 3,
        "high_below_low": 1,
        "outside_range": 2,
        "negative_volume": 1,
        "out_of_order": 2,
        "duplicates": 1,
        "kept": 20,
    }
    expected = rows.drop(index=range(1, 11))
    expected.loc[12, "Volume"] = 77.0
    assert_bars(bars, expected.astype({"Timestamp": int}))


def test_order_is_judged_before_rounding_to_float32(tmp_path):
    rows = make_rows(9)
    rows.loc[1, ["Open", "High", "Low", "Close"]] = [2000.00001, 2000.00001, 2000.00002, 2000.00002]
    _, cleaning = read_bars([write(tmp_path / "bars.csv", rows)])
    assert cleaning.high_below_low == 1


def test_disorder_and_duplicates_across_chunks_and_files(tmp_path, small_chunks):
    """The answer must be that of one stable sort over all rows, wherever the chunks and files end."""
    rng = np.random.default_rng(1)
    rows = make_rows(200).assign(Timestamp=START + 60 * rng.permutation(np.repeat(np.arange(100), 2)))
    first, second = write(tmp_path / "1.csv", rows[:90]), write(tmp_path / "2.csv", rows[90:])
    bars, cleaning = read_bars([first, second])
    expected = rows.drop_duplicates("Timestamp", keep="last").sort_values("Timestamp")
    assert_bars(bars, expected)
    assert cleaning.duplicates == 100
    assert cleaning.out_of_order == (rows["Timestamp"] < rows["Timestamp"].cummax()).sum()
    assert [source.rows for source in cleaning.sources] == [90, 110]


def test_the_later_file_stays_where_two_overlap(tmp_path, rows):
    other = rows[300:].assign(Volume=5.0)
    paths = [write(tmp_path / "a.csv", rows[:400]), write(tmp_path / "b.csv", other)]
    assert_bars(read_bars(paths)[0], pd.concat([rows[:300], other]))
    assert_bars(read_bars(paths[::-1])[0], pd.concat([rows[:400], other[100:]]))


def test_sparse_bars_are_still_minute_bars(tmp_path):
    """Early years have a trade every few minutes; the most common step is a minute nevertheless."""
    rows = make_rows(5000)
    kept = rows[np.random.default_rng(0).random(5000) < 0.2]
    assert len(read_bars([write(tmp_path / "bars.csv", kept)])[0]) == len(kept)


# --- what bad input gets


def broken(change) -> bytes:
    """The text of good bars, changed."""
    return change(make_rows(40).to_csv(index=False)).encode()


def replaced(line: int, column: int, text: str):
    def change(csv: str) -> str:
        lines = [row.split(",") for row in csv.splitlines()]
        lines[line - 1][column] = text
        return "\n".join(map(",".join, lines)) + "\n"

    return change


GOOD = make_rows(40).to_csv(index=False).encode()
ROWS = GOOD.split(b"\n", 1)[1]
BAD = {
    "empty": (b"", "is empty; expected a CSV with the header Timestamp,Open,High,Low,Close,Volume"),
    "blank": (b"\n\n", "is empty"),
    "header only": (f"{HEADER}\n".encode(), "has a header but no rows"),
    "no header": (GOOD.split(b"\n", 1)[1], f"has no header: its first line is numbers; add the line {HEADER}"),
    "missing column": (GOOD.replace(b"Volume", b"Volume_(BTC)"), "has no column 'Volume'; rename 'Volume_(BTC)'?"),
    "unlike any column": (GOOD.replace(b"Open", b"xyz"), f"has no column 'Open'; expected {HEADER} (its header is"),
    "semicolons": (GOOD.replace(b",", b";"), "separated by semicolons; expected commas"),
    "tabs": (GOOD.replace(b",", b"\t"), "separated by tabs; expected commas"),
    "decimal commas": (GOOD.replace(b".", b","), "line 2: 11 cells under a header of 6 columns; write numbers with"),
    "decimal commas further on": (
        GOOD + ROWS * 40 + ROWS.replace(b".", b","),
        "line 1642: 11 cells under a header of 6 columns; write numbers with",
    ),
    "text in a cell": (broken(replaced(17, 4, "n.a")), "line 17, column close: 'n.a' is not a number; correct or"),
    "text in a time": (broken(replaced(9, 0, "noon")), "line 9, column timestamp: 'noon' is not a number"),
    "after blank lines": (b"\n" + broken(replaced(9, 3, "x")), "line 10, column low: 'x'"),
    "dates not ISO": (broken(replaced(2, 0, "14/07/2017 02:40")), "column timestamp: '14/07/2017 02:40' is not an ISO"),
    "not UTF-8": (GOOD[:600] + b"\xe9" + GOOD[600:], "line 12, column volume: '1.413673\ufffd' is not a"),
    "thousands": (broken(replaced(3, 1, '"2,000"')), "line 3, column open: '2,000' is not a number"),
    "truncated .gz": (gzip.compress(GOOD)[:-300], "is truncated or damaged: Compressed file ended"),
    "damaged .gz": (gzip.compress(GOOD)[:-8] + bytes(8), "is truncated or damaged: CRC check failed"),
    "garbage in .gz": (gzip.compress(GOOD)[:200] + bytes(200), "is truncated or damaged"),
    "truncated .zip": (zipped({"bars.csv": GOOD})[:-80], "is truncated or damaged: File is not a zip file"),
    "damaged .zip": (zipped({"b": GOOD})[:60] + bytes(10) + zipped({"b": GOOD})[70:], "is truncated or damaged"),
    "two in a .zip": (zipped({"a.csv": GOOD, "b.csv": GOOD}), "holds 2 files (a.csv, b.csv); expected one CSV"),
    "none in a .zip": (zipped({}), "holds 0 files; expected one CSV"),
    "binary": (b"\x7fELF" + bytes(range(256)) * 10, "is a binary file; expected a CSV"),
    "random": (np.random.default_rng(0).bytes(100_000), "is a binary file; expected a CSV"),
    "UTF-16": (GOOD.decode().encode("utf-16"), "is a binary file; expected a CSV"),
    "binary further on": (GOOD * 4000 + bytes(500), "is not a number; correct or delete the line"),
    "unclosed quote": (broken(replaced(17, 1, '"')), "is not a CSV file: Error tokenizing data"),
    "all impossible": (
        make_rows(40).assign(High=1.0).to_csv(index=False).encode(),
        "not one of its 40 rows can be a bar (40 high_below_low); check that it is the right file",
    ),
    "before 2009": (broken(replaced(30, 0, "1000000000")), "line 30, column timestamp: '1000000000' is not a time b"),
    "after tomorrow": (broken(replaced(30, 0, str(int(time.time()) + 90_000))), "is not a time between 2009 and tom"),
    "ISO before 2009": (
        broken(lambda csv: "\n".join([HEADER, *(f"{year}-01-01,1,1,1,1,1" for year in range(2007, 2012))])),
        "line 2, column timestamp: '2007-01-01' is not a time between 2009 and tomorrow",
    ),
    "ISO beyond nanoseconds": (
        broken(lambda csv: "\n".join([HEADER, *(f"{year}-01-01,1,1,1,1,1" for year in (2015, 2016, 9999))])),
        "line 4, column timestamp: '9999-01-01' is not a time between 2009 and tomorrow",
    ),
    "units mixed": (broken(replaced(30, 0, "1500000000000")), "(Unix seconds, or ISO-8601); correct or delete"),
    "microseconds": (
        make_rows(9).assign(Timestamp=lambda rows: rows["Timestamp"] * 10**6).to_csv(index=False).encode(),
        "times seem to be in microseconds (1500000180000000); expected Unix seconds, milliseconds or ISO-8601: "
        "divide them by 1,000",
    ),
    "row numbers": (make_rows(9).assign(Timestamp=range(9)).to_csv(index=False).encode(), "'0' is not a time"),
    "hours": (
        make_rows(40).assign(Timestamp=lambda rows: START + rows.index * 3600).to_csv(index=False).encode(),
        "its rows are 3,600 seconds apart, most of them; expected bars of one minute",
    ),
    "trades": (
        make_rows(40).assign(Timestamp=lambda rows: START + rows.index * 2).to_csv(index=False).encode(),
        "its rows are 2 seconds apart, most of them; expected bars of one minute",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_that_names_file_place_and_remedy(tmp_path, name, small_chunks):
    content, message = BAD[name]
    path = write(tmp_path / "bars.csv", content)
    with pytest.raises(UserError) as caught:
        read_bars([write(tmp_path / "good.csv", GOOD), path])
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300 + len(str(path))


def test_a_path_that_is_no_file(tmp_path):
    with pytest.raises(UserError, match=r"nothing\.csv does not exist; check the path"):
        read_bars([tmp_path / "nothing.csv"])
    with pytest.raises(UserError, match=r"is a folder; name a CSV file$"):
        read_bars([tmp_path])
    write(tmp_path / "bars.csv.gz", gzip.compress(GOOD))
    with pytest.raises(UserError, match=r"is a folder; name a CSV file, such as .*/bars\.csv\.gz"):
        read_bars([tmp_path])
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="is not a regular file"):
        read_bars([tmp_path / "pipe"])


def test_a_file_that_cannot_be_read(tmp_path, monkeypatch):
    path = write(tmp_path / "bars.csv", GOOD)

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(path), "open", refuse)
    with pytest.raises(UserError, match=r"cannot read .*bars\.csv: Permission denied; check its permissions"):
        read_bars([path])


# --- filling and segments


@pytest.fixture
def gappy() -> Bars:
    rng = np.random.default_rng(2)
    minute = np.cumsum(np.where(rng.random(400) < 0.8, 1, rng.integers(2, 12, 400))).astype(np.int32)
    return Bars(minute, make_rows(400).to_numpy()[:, 1:].astype(np.float32))


@pytest.mark.parametrize("max_gap", [0, 1, 4, 100])
def test_fill_adds_exactly_the_minutes_of_gaps_up_to_max_gap(gappy, max_gap):
    filled = fill_missing(gappy, max_gap)
    expected, values = [], []  # the definition, one minute at a time
    for row, minute in enumerate(gappy.minute):
        gap = minute - gappy.minute[row - 1] - 1 if row else 0
        close = gappy.values[row - 1, 3]
        if 0 < gap <= max_gap:
            expected += range(minute - gap, minute)
            values += [[close] * 4 + [np.nan]] * gap
        expected.append(minute)
        values.append(gappy.values[row])
    np.testing.assert_array_equal(filled.minute, expected)
    np.testing.assert_array_equal(filled.values, np.array(values, np.float32))
    assert (filled.minute.dtype, filled.values.dtype) == (np.int32, np.float32)
    np.testing.assert_array_equal(filled.minute[filled.observed], gappy.minute)

    again = fill_missing(filled, max_gap)
    np.testing.assert_array_equal(again.values, filled.values)


@pytest.mark.parametrize("max_gap", [0, 4, 100])
def test_segments_cover_all_bars_and_break_only_at_missing_minutes(gappy, max_gap):
    filled = fill_missing(gappy, max_gap)
    ranges = segments(filled)
    assert ranges.dtype == np.int64
    assert np.concatenate([np.arange(*pair) for pair in ranges]).tolist() == list(range(len(filled)))
    for start, stop in ranges:
        assert (np.diff(filled.minute[start:stop]) == 1).all()
    assert (filled.minute[ranges[1:, 0]] - filled.minute[ranges[1:, 0] - 1] > max(max_gap + 1, 1)).all()
    assert len(ranges) == 1 + (np.diff(gappy.minute) - 1 > max_gap).sum()


def test_fill_and_segments_of_one_bar_and_of_none(gappy):
    for count in (1, 0):
        bars = Bars(gappy.minute[:count], gappy.values[:count])
        assert len(fill_missing(bars, 10)) == count
        assert segments(bars).tolist() == [[0, 1]] * count


def test_log_features_are_logs_and_a_filled_minute_has_no_volume():
    values = np.array([[1, 10, 0.1, np.e, np.e - 1], [2, 2, 2, 2, np.nan]], np.float32)
    logs = log_features(values)
    assert logs.dtype == np.float64
    np.testing.assert_allclose(logs[0], [0, np.log(10), np.log(0.1), 1, 1], atol=1e-7)
    np.testing.assert_allclose(logs[1], [np.log(2)] * 4 + [0])
    assert list(FEATURES) == ["open", "high", "low", "close", "volume"]
