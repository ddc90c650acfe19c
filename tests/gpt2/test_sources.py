import gzip
import io
import json
import re
import sys
from itertools import islice
from pathlib import Path

import pandas
import pytest

from flashlab.errors import UserError
from flashlab.gpt2 import files as files_module
from flashlab.gpt2 import sources
from flashlab.gpt2.corpus import embedded_documents
from flashlab.gpt2.documents import Document
from flashlab.gpt2.files import PIECE, Files, find_files
from flashlab.gpt2.sources import Embedded, Hub, open_source

EXTENSIONS = ["txt", "jsonl"]


def files(*paths, separator=""):
    return Files(list(paths), separator)


def texts_of(source, position=None):
    return [document.text("text", "refuse") for document in source.read(position)]


def rows_of(texts, folder, name="rows.jsonl"):
    folder.mkdir(exist_ok=True, parents=True)
    (folder / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


# --- what is read


def test_a_folder_is_read_in_order_whatever_its_files_are_packed_in(corpus, texts):
    found = find_files([corpus], EXTENSIONS)
    assert [path.relative_to(corpus).as_posix() for path in found[:3]] == ["a.jsonl", "b.jsonl.gz", "deep/er/000.txt"]
    assert texts_of(Files(found)) == texts


def test_extensions_are_told_with_or_without_dots_in_any_case(tmp_path):
    for name in ("a.TXT", "b.rst", "c.jsonl.zst", "d.py", "e"):
        (tmp_path / name).write_text("x")
    names = {path.name for path in find_files([tmp_path], [".txt", "RST", "jsonl"])}
    assert names == {"a.TXT", "b.rst", "c.jsonl.zst"}
    assert find_files([tmp_path / "e", tmp_path / "d.py"], ["txt"]) == [tmp_path / "e", tmp_path / "d.py"]


@pytest.mark.parametrize("block", [1, 7, 1000, 2**20])
@pytest.mark.parametrize("separator", ["", "\n\n", "<|endoftext|>"])
def test_a_text_is_cut_by_what_it_holds_and_not_by_how_it_is_read(tmp_path, monkeypatch, block, separator):
    monkeypatch.setattr(files_module, "PIECE", 200)
    monkeypatch.setattr(files_module, "READ", block)
    lines = [f"line {number} äöü 🙂\n" * (number % 4 + 1) for number in range(60)]
    text = separator.join(lines) + "日本" * 300 + "\n" + "end"
    (tmp_path / "a.txt").write_text(text)
    documents = list(files(tmp_path / "a.txt", separator=separator).read(None))
    cut = [document.raw.decode() for document in documents]  # fails where a character was cut
    assert max(len(document.raw) for document in documents) <= 200
    raw = text.encode()
    for document in documents:
        assert raw[document.place : document.place + len(document.raw)] == document.raw
    if not separator:
        assert "".join(cut) == text
        assert all(piece.endswith("\n") for piece in cut if "日" not in piece and "end" not in piece)
    elif separator == "<|endoftext|>":
        assert cut[:59] == lines[:59]
        assert "".join(cut) == text.replace(separator, "")


def test_a_file_of_64_kib_is_one_document_and_a_longer_one_is_several(tmp_path):
    line = "x" * 99 + "\n"
    (tmp_path / "a.txt").write_text((line * 700)[:PIECE])
    (tmp_path / "b.txt").write_text((line * 700)[: PIECE + 1])
    assert [len(text) for text in texts_of(files(tmp_path / "a.txt"))] == [PIECE]
    assert [len(text) for text in texts_of(files(tmp_path / "b.txt"))] == [PIECE // 100 * 100, PIECE % 100 + 1]


def test_archives_of_several_parts_are_read_to_the_end(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    parts = [b"one\n" * 40_000, b"two\n" * 50_000]
    (tmp_path / "a.txt.gz").write_bytes(b"".join(map(gzip.compress, parts)))
    compress = zstandard.ZstdCompressor().compress
    (tmp_path / "a.txt.zst").write_bytes(b"".join(map(compress, parts)))
    long = zstandard.ZstdCompressor(compression_params=zstandard.ZstdCompressionParameters(window_log=28))
    (tmp_path / "b.txt.zst").write_bytes(long.compress(b"".join(parts)))
    for path in tmp_path.iterdir():
        assert "".join(texts_of(files(path))) == b"".join(parts).decode()


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffword".encode())
    assert texts_of(files(tmp_path / "a.txt")) == ["word"]


# --- resuming


@pytest.fixture(params=["files", "text", "zst", "embedded", "hub"])
def make(request, corpus, texts, tmp_path, monkeypatch):
    """A function that opens the same source anew."""
    if request.param == "files":
        return lambda: open_source([str(corpus)], EXTENSIONS, "text", "")
    if request.param == "text":
        (tmp_path / "a.txt").write_text("\n--\n".join(texts))
        return lambda: files(tmp_path / "a.txt", separator="\n--\n")
    if request.param == "zst":
        zstandard = pytest.importorskip("zstandard")
        raw = (rows_of(texts, tmp_path / "rows") / "rows.jsonl").read_bytes()
        (tmp_path / "a.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(raw))
        return lambda: files(tmp_path / "a.jsonl.zst", corpus / "a.jsonl")
    if request.param == "embedded":
        documents = embedded_documents()
        monkeypatch.setattr(sources, "embedded_documents", lambda: documents)  # finding them takes a second
        return Embedded
    pytest.importorskip("datasets")
    rows_of(texts[:150], tmp_path / "rows", "a.jsonl")
    rows_of(texts[150:], tmp_path / "rows", "b.jsonl")
    return lambda: Hub(str(tmp_path / "rows"), "text")


def test_reading_goes_on_from_any_position_that_was_given(make):
    expected = list(make().read(None))
    for done in [*range(0, len(expected), 37), len(expected) - 1, len(expected)]:
        source = make()
        begun = list(islice(source.read(None), done))
        position = json.loads(json.dumps(source.position())) if done else None
        resumed = make()
        assert begun + list(resumed.read(position)) == expected
        if resumed.total_bytes is not None and done < len(expected):
            assert resumed.done_bytes == resumed.total_bytes
    assert make().key() == make().key()


def test_a_file_that_was_changed_is_another_source(corpus, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one")
    before = files(path).key()
    path.write_text("two")
    assert files(path).key() != before != files(path, path).key()


# --- mistakes: one line that names file and place


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.txt", b"good\n" * 20_000 + b"b\xffd", r"a\.txt: byte 100,001 is not UTF-8 \(0xff\); convert the file, or"),
        ("a.txt", "ä".encode("utf-16"), r"a\.txt: byte 0 is not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": "b\xff"}\n', r"a\.jsonl:3: byte 11 is not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', r"a\.jsonl:2 is not JSON \(Expecting value.*every line must be"),
        (
            "a.jsonl",
            b'{"text": "a"}\n{"body": "b", "id": 1}\n',
            r":2: the field 'text' is missing; there is body, id; n",
        ),
        ("a.jsonl", b'{"text": ["a"]}\n', r"a\.jsonl:1: the field 'text' is not text; name the one with"),
        ("a.jsonl", b'{"text": null}\n', r"a\.jsonl:1: the field 'text' is not text"),
        ("a.json", b'[\n{"text": "b"}]', r"a\.json:1 is not JSON"),
        ("a.json", b'[{"text": "b"}]', r"a\.json:1 is not a JSON object, but \[\{"),
        ("a.jsonl", b'{"text": "\\ud83d"}\n', r"a\.jsonl:1 holds half of a surrogate pair.*--undecodable replace"),
    ],
)
def test_a_line_or_byte_that_is_no_text_is_named(tmp_path, name, content, complaint):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=complaint) as caught:
        texts_of(files(tmp_path / name))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        (Document(b"a\xff\xc3b", "text", "a.txt", 0), "a\ufffd\ufffdb"),
        (Document(b'{"text": "a\xff"}', "json", "a.jsonl", 1), "a\ufffd"),
        (Document(b'{"text": "a\\ud83d"}', "json", "a.jsonl", 1), "a\ufffd"),
        (Document(b'{"text": "\\ud83d\\ude42"}', "json", "a.jsonl", 1), "🙂"),
    ],
)
def test_what_is_no_text_can_be_replaced(document, expected):
    assert document.text("text", "replace") == expected


@pytest.mark.parametrize("kind", ["gz", "zst"])
@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_archive_is_named(tmp_path, kind, damage):
    raw = "".join(f"{number * 7919 % 10007} " for number in range(100_000)).encode()
    if kind == "gz":
        packed = gzip.compress(raw)
    else:
        packed = pytest.importorskip("zstandard").ZstdCompressor(write_checksum=True).compress(raw)
    middle = len(packed) // 2
    packed = packed[:middle] if damage == "cut" else packed[:middle] + b"\0" * 50 + packed[middle + 50 :]
    (tmp_path / f"a.txt.{kind}").write_bytes(packed)
    with pytest.raises(UserError, match=rf"a\.txt\.{kind} is damaged or cut short \(.*\); fetch it again"):
        texts_of(files(tmp_path / f"a.txt.{kind}"))


@pytest.mark.parametrize(
    ("src", "complaint"),
    [
        (["nowhere.txt"], r"nowhere\.txt: there is no such file or folder; .*hub is hf:OWNER/NAME"),
        (["empty"], r"empty holds no file that ends in \.jsonl, \.txt \(or these with \.gz, \.zst\); .*--extensions"),
        (["hf:a/b", "c.txt"], "hf:a/b c.txt: a data set of the hub is prepared alone"),
    ],
)
def test_what_is_not_there_is_named(tmp_path, monkeypatch, src, complaint):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    with pytest.raises(UserError, match=complaint):
        open_source(src, EXTENSIONS, "text", "")


@pytest.mark.parametrize(
    ("package", "src", "remedy"),
    [("datasets", "hf:a/b", "datasets"), ("zstandard", "a.txt.zst", "zstandard")],
)
def test_a_missing_package_is_named_with_its_remedy(tmp_path, monkeypatch, package, src, remedy):
    monkeypatch.chdir(tmp_path)
    Path("a.txt.zst").write_bytes(b"\x28\xb5\x2f\xfd" + bytes(20))
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=re.escape(f"{src} needs the package {package}: pip install {remedy}")):
        texts_of(open_source([src], EXTENSIONS, "text", ""))


# --- the hub


def test_rows_of_a_data_set_are_read_through_datasets(tmp_path, texts):
    pytest.importorskip("datasets")
    pandas.DataFrame({"body": texts, "id": range(len(texts))}).to_parquet(rows_of([], tmp_path / "set") / "a.parquet")
    (tmp_path / "set/rows.jsonl").unlink()
    source = Hub(str(tmp_path / "set"), "body")
    assert [document.raw.decode() for document in source.read(None)] == texts
    with pytest.raises(UserError, match=r"set, row 1: the field 'text' is missing; there is body, id"):
        list(Hub(str(tmp_path / "set"), "text").read(None))


def test_a_folder_of_rows_that_was_changed_is_another_source(tmp_path, texts):
    pytest.importorskip("datasets")
    before = Hub(str(rows_of(texts, tmp_path / "set")), "text").key()
    assert Hub(str(rows_of(texts[:1], tmp_path / "set")), "text").key() != before


def test_a_name_has_a_configuration_and_a_revision_which_is_pinned(monkeypatch):
    datasets = pytest.importorskip("datasets")
    hub = pytest.importorskip("huggingface_hub")
    asked = []

    class Api:
        def dataset_info(self, name, revision):
            asked.append((name, revision))
            return type("Info", (), {"sha": "0123abc"})

    def load(path, config, **how):
        asked.append((path, config, how))
        return type("Data", (), {"info": type("Info", (), {"dataset_size": 39_769_491_688})})

    monkeypatch.setattr(hub, "HfApi", Api)
    monkeypatch.setattr(datasets, "load_dataset", load)
    source = Hub("HuggingFaceFW/fineweb:sample-10BT@v1", "text")
    how = {"split": "train", "revision": "0123abc", "streaming": True}
    assert asked == [("HuggingFaceFW/fineweb", "v1"), ("HuggingFaceFW/fineweb", "sample-10BT", how)]
    assert source.key() == ["hub", "HuggingFaceFW/fineweb", "sample-10BT", "0123abc"]
    assert source.total_bytes == 39_769_491_688
    Hub("a/b", "text")
    assert asked[2:] == [("a/b", None), ("a/b", None, how)]


def test_a_hub_out_of_reach_is_one_line(monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    pytest.importorskip("datasets")

    class Api:
        def dataset_info(self, *_, **__):
            raise ConnectionError("Name or service\nnot known")

    monkeypatch.setattr(hub, "HfApi", Api)
    with pytest.raises(
        UserError, match=r"^cannot read hf:a/b \(Name or service not known\); check the name .* goes on"
    ):
        Hub("a/b", "text")


def test_a_connection_that_breaks_is_one_line(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    source = Hub(str(rows_of(["one", "two", "three"], tmp_path / "rows")), "text")

    def rows():
        yield {"text": "one"}
        raise OSError("reset by peer")

    monkeypatch.setattr(source, "_data", rows())
    with pytest.raises(UserError, match=r"cannot read hf:.*rows \(reset by peer\)"):
        list(source.read(None))


def test_a_zstandard_reader_gives_no_more_than_is_asked_for(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    (tmp_path / "a").write_bytes(zstandard.ZstdCompressor().compress(b"ab" * 2**20))
    with (tmp_path / "a").open("rb") as file:
        stream = files_module._decompress(file)
        assert isinstance(stream, io.BufferedReader)
        assert stream.read(3) == b"aba"
        assert len(stream.read()) == 2**21 - 3
