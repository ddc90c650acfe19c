import errno
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from itertools import islice
from multiprocessing import active_children
from pathlib import Path

import numpy as np
import psutil
import pytest

from flashlab.cli import main
from flashlab.errors import UserError
from flashlab.gpt2 import prepare as prepare_module
from flashlab.gpt2.documents import Document
from flashlab.gpt2.encode import Encoder, encode_in_order
from flashlab.gpt2.prepare import prepare
from flashlab.gpt2.tokenizer import ByteTokenizer, load_tokenizer
from flashlab.gpt2.tokens import open_set

PARTS = ("train", "validation")
HOW = {"validation": 0.2, "shard_bytes": 20_000, "processes": 1}


def files_of(out):
    """Return all files of a set by name and content, but for the time and for how far a progress bar was."""
    found = {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    found.pop(".lock", None)
    manifest = json.loads(found["manifest.json"])
    log = f"{manifest['folder']}/shards.log"
    lines = [json.loads(line) | {"done_bytes": None} for line in found[log].splitlines()]
    return found | {"manifest.json": manifest | {"created": None, "crc32": None}, log: lines}


def stored_tokens(tokens, part):
    """Read the tokens of a part behind litdata's header of three numbers."""
    dtype = tokens.manifest["dtype"]
    paths = [Path(tokens.folder(part)) / shard["name"] for shard in tokens.shards(part)]
    return np.concatenate([np.fromfile(path, dtype, offset=12) for path in paths])


def stored_texts(tokens, part):
    """Return the texts that stand between the end-of-text tokens."""
    stored, tokenizer = stored_tokens(tokens, part), tokens.tokenizer
    assert stored[-1] == tokenizer.end_of_text
    ends = np.flatnonzero(stored == tokenizer.end_of_text)
    starts = [0, *(ends[:-1] + 1)]
    return [tokenizer.decode(stored[start:end]) for start, end in zip(starts, ends, strict=True)]


# --- what is in a set


def is_validation(text, share):
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) / 2**64 < share


@pytest.mark.parametrize("tokenizer", ["bytes", "gpt2"])
def test_every_document_is_there_once_in_order_in_the_part_that_its_hash_says(
    corpus, texts, vocabulary, tmp_path, tokenizer
):
    if tokenizer == "gpt2":
        pytest.importorskip("tiktoken")
    prepare(
        [str(corpus)], out=tmp_path, tokenizer=tokenizer, vocabulary=vocabulary if tokenizer == "gpt2" else None, **HOW
    )
    tokens = open_set(tmp_path, verify=True)
    expected = {part: [text for text in texts if is_validation(text, 0.2) == (part == "validation")] for part in PARTS}
    for part in PARTS:
        assert stored_texts(tokens, part) == expected[part]
        said = tokens.manifest["parts"][part]
        assert said["documents"] == len(expected[part])
        assert said["tokens"] == len(stored_tokens(tokens, part))
    assert 0.1 < len(expected["validation"]) / len(texts) < 0.3
    assert tokens.manifest["dtype"] == "uint16"
    assert len(tokens.shards("train")) > 10
    if tokenizer == "gpt2":
        assert tokens.tokenizer.fingerprint == load_tokenizer("gpt2", vocabulary).fingerprint


def test_processes_do_not_change_the_result(token_set, corpus, tmp_path):
    prepare([str(corpus)], out=tmp_path / "set", **HOW | {"processes": 3})
    assert files_of(tmp_path / "set") == files_of(token_set)


def test_a_document_keeps_its_part_whatever_stands_beside_it(tmp_path):
    lines = [json.dumps({"text": f"document {number}"}) for number in range(20_000)]
    parts = []
    for name, chosen in (("all", lines), ("some", lines[::-3]), ("twice", lines[:5000] * 2)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(chosen))
        prepare([str(tmp_path / f"{name}.jsonl")], out=tmp_path / name, validation=0.05, processes=1)
        tokens = open_set(tmp_path / name)
        parts.append({part: set(stored_texts(tokens, part)) for part in PARTS})
        assert not parts[-1]["train"] & parts[-1]["validation"]
    everything, some, twice = parts
    for part in PARTS:
        assert some[part] < everything[part]
        assert twice[part] < everything[part]
    assert abs(len(everything["validation"]) - 1000) < 4 * (20_000 * 0.05 * 0.95) ** 0.5


def test_the_embedded_corpus_is_taken_without_a_source(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["gpt2", "prepare", "--out", "set", "--processes", "1"]) == 0
    manifest = open_set("set", verify=True).manifest
    assert manifest["source"]["kind"] == "embedded"
    assert manifest["source"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert manifest["source"]["bytes"] == pytest.approx(manifest["text_bytes"], rel=1e-3)
    assert manifest["options"]["validation"] == 0.05
    assert manifest["parts"]["validation"]["documents"] > 5
    said = capsys.readouterr().out
    assert f"train: {manifest['parts']['train']['tokens']:,} tokens" in said


def test_a_data_set_of_the_hub_is_streamed(texts, token_set, tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows/a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    stopped(monkeypatch, 4, lambda: prepare([f"hf:{tmp_path / 'rows'}"], out=tmp_path / "set", **HOW))
    prepare([f"hf:{tmp_path / 'rows'}"], out=tmp_path / "set", **HOW)
    for part in PARTS:
        assert stored_texts(open_set(tmp_path / "set"), part) == stored_texts(open_set(token_set), part)


@pytest.mark.parametrize("separator", ["---", "# x", "null", "\n\n", "<|endoftext|>"])
def test_a_separator_is_taken_as_it_is_written(tmp_path, monkeypatch, separator):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text(separator.join(f"document {number}" for number in range(50)))
    options = ["--out", "set", "--validation", "0.2", "--processes", "1", f"--separator={separator}"]
    assert main(["gpt2", "prepare", "a.txt", *options]) == 0
    stored = [text for part in PARTS for text in stored_texts(open_set("set"), part)]
    assert sorted(stored) == sorted(f"document {number}" for number in range(50))


# --- interruptions


def stopped(monkeypatch, shards, work):
    """Interrupt a preparation after some shards."""
    store = prepare_module._store

    def stop(folder, done, *arguments):
        if len(done) == shards:
            raise KeyboardInterrupt
        store(folder, done, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "_store", stop)
        with pytest.raises(KeyboardInterrupt):
            work()


def start(corpus, out, processes=2):
    options = ["--validation", "0.2", "--shard_bytes", "20000", "--processes", str(processes)]
    return subprocess.Popen(
        [sys.executable, "-m", "flashlab", "gpt2", "prepare", str(corpus), "--out", str(out), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def shards_done(out):
    return sum(path.read_bytes().count(b"\n") for path in out.glob("tokens-*/shards.log"))


def wait_until(happened, seconds=60):
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.001)


def kill_somewhere(corpus, out, chance):
    """Kill a preparation with SIGKILL after a few shards and a moment; say whether it had not ended by then."""
    before, more = shards_done(out), chance.randint(0, 6)
    process = start(corpus, out)
    wait_until(lambda: shards_done(out) >= before + more or process.poll() is not None)
    time.sleep(chance.uniform(0, 0.03))
    with suppress(psutil.NoSuchProcess):
        children = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.wait()
        wait_until(lambda: not any(child.is_running() and child.status() != "zombie" for child in children))
    process.communicate()
    return process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_a_set_that_was_killed_again_and_again_equals_one_that_was_not(corpus, token_set, tmp_path, kills):
    chance, out, killed = random.Random(kills), tmp_path / "set", 0
    while killed < kills:
        if kill_somewhere(corpus, out, chance):
            killed += 1
            with pytest.raises(UserError, match="is not a token set"):
                open_set(out)
        else:  # it was done: start anew
            assert files_of(out) == files_of(token_set)
            out = tmp_path / f"set{killed}"
    before = shards_done(out)
    process = start(corpus, out)
    said, errors = process.communicate(timeout=100)
    assert process.returncode == 0, errors
    assert f"goes on after {before:,} shards" in said if before else "goes on" not in said
    assert files_of(out) == files_of(token_set)
    print(f"{killed} kills, the last after {before} shards")


def test_ctrl_c_ends_every_process_and_what_was_done_is_kept(corpus, token_set, tmp_path):
    process = start(corpus, tmp_path / "set")
    wait_until(lambda: shards_done(tmp_path / "set") >= 2)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "flashlab: interrupted\n")
    wait_until(lambda: not any(child.is_running() for child in children))
    prepare([str(corpus)], out=tmp_path / "set", **HOW)
    assert files_of(tmp_path / "set") == files_of(token_set)


def cut(path, count):
    os.truncate(path, path.stat().st_size - count)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "kept"),
    [
        (lambda work: None, 6),
        (lambda work: cut(work / "shards.log", 10), 5),
        (lambda work: cut(work / "shards.log", 1), 6),
        (lambda work: cut(work / "validation.bin", 2), None),
        (lambda work: flip(work / "validation.bin"), None),
        (lambda work: (work / "validation.bin").unlink(), 0),
        (lambda work: cut(work / "train/shard-000003.bin", 1), 3),
        (lambda work: flip(work / "train/shard-000004.bin"), 4),
        (lambda work: (work / "train/shard-000000.bin").unlink(), 0),
        (lambda work: (work / "validation.bin").open("ab").write(b"left by a kill"), 6),
        (lambda work: (work / "train/.shard-000006.bin").mkdir(), 6),
    ],
)
def test_what_is_damaged_is_made_again_and_what_is_whole_is_kept(
    corpus, token_set, tmp_path, monkeypatch, capsys, damage, kept
):
    out = tmp_path / "set"
    stopped(monkeypatch, 6, lambda: prepare([str(corpus)], out=out, **HOW))
    [work] = out.glob("tokens-*")
    damage(work)
    prepare([str(corpus)], out=out, **HOW)
    assert files_of(out) == files_of(token_set)
    said = capsys.readouterr().out
    if kept is not None:
        assert (f"goes on after {kept} shards" in said) == (kept > 0)


@pytest.mark.parametrize("step", ["write_shard", "write_index", "write_text", "checksum"])
@pytest.mark.parametrize("count", [1, 2])
def test_a_stop_while_the_set_is_completed_leaves_none_that_looks_whole(
    corpus, token_set, tmp_path, monkeypatch, step, count
):
    work, calls = getattr(prepare_module, step), []

    def stop(*arguments):
        in_question = "validation" in str(arguments[0]) or step != "write_shard"
        calls.extend([arguments] * in_question)
        if len(calls) == count and in_question:
            raise KeyboardInterrupt
        return work(*arguments)

    with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
        patch.setattr(prepare_module, step, stop)
        patch.setattr(prepare_module, "VALIDATION_SHARD", 60_000)
        prepare([str(corpus)], out=tmp_path, **HOW)
    if len(calls) == count:
        with pytest.raises(UserError, match="is not a token set"):
            open_set(tmp_path)
    monkeypatch.setattr(prepare_module, "VALIDATION_SHARD", 60_000)
    prepare([str(corpus)], out=tmp_path, **HOW)
    tokens = open_set(tmp_path, verify=True)
    assert len(tokens.shards("validation")) > 1
    assert all(np.array_equal(stored_tokens(tokens, p), stored_tokens(open_set(token_set), p)) for p in PARTS)


def test_a_set_inside_the_folder_of_its_text_is_not_text(texts, tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for _ in range(2):
        prepare([str(tmp_path)], out=tmp_path / "set", **HOW)
    assert "was prepared before and is whole" in capsys.readouterr().out


def test_a_set_that_is_whole_is_verified_and_left_alone(corpus, tmp_path, capsys, monkeypatch):
    prepare([str(corpus)], out=tmp_path, **HOW)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.setattr(prepare_module, "_store", None)
    prepare([str(corpus)], out=tmp_path, **HOW | {"processes": 2})
    assert "was prepared before and is whole" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_set_that_was_damaged_later_is_repaired_and_is_none_until_then(corpus, token_set, tmp_path, monkeypatch):
    prepare([str(corpus)], out=tmp_path, **HOW)
    tokens = open_set(tmp_path)
    shard = Path(tokens.folder("train")) / tokens.shards("train")[7]["name"]
    flip(shard)
    assert open_set(tmp_path)
    with pytest.raises(UserError, match=f"{shard.name} is damaged: its checksum differs; prepare the set again"):
        open_set(tmp_path, verify=True)
    stopped(monkeypatch, 9, lambda: prepare([str(corpus)], out=tmp_path, **HOW))
    with pytest.raises(UserError, match="is not a token set"):
        open_set(tmp_path)
    prepare([str(corpus)], out=tmp_path, **HOW)
    assert files_of(tmp_path) == files_of(token_set)


def test_the_set_before_is_whole_until_the_next_one_is_and_gone_then(corpus, token_set, tmp_path, monkeypatch):
    prepare([str(corpus)], out=tmp_path, **HOW)
    other = HOW | {"validation": 0.3}
    stopped(monkeypatch, 5, lambda: prepare([str(corpus)], out=tmp_path, **other))
    assert open_set(tmp_path, verify=True).manifest["options"]["validation"] == 0.2
    prepare([str(corpus)], out=tmp_path, **other)
    assert open_set(tmp_path, verify=True).manifest["options"]["validation"] == 0.3
    assert len(list(tmp_path.glob("tokens-*"))) == 1


def test_text_that_changed_is_not_gone_on_with(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"one {n}"}) + "\n" for n in range(500)))
    how = HOW | {"shard_bytes": 1000}
    stopped(monkeypatch, 5, lambda: prepare([str(tmp_path / "a.jsonl")], out=tmp_path / "set", **how))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"two {n}"}) + "\n" for n in range(500)))
    prepare([str(tmp_path / "a.jsonl")], out=tmp_path / "set", **how)
    assert "goes on" not in capsys.readouterr().out
    tokens = open_set(tmp_path / "set")
    assert all(text.startswith("two") for part in PARTS for text in stored_texts(tokens, part))


# --- mistakes


@pytest.mark.parametrize(
    ("content", "options", "complaint"),
    [
        ("", [], "there is no text in it; give files with text"),
        ('{"text": ""}\n{"text": " \\n"}\n', [], "there is no text in it"),
        (
            '{"text": "a"}\n',
            [],
            "none of 1 document.s. fell into the validation part.*0.0005.*give more documents, or cut",
        ),
        ('{"text": "a"}\n', ["--validation", "0.9999"], "all 1 documents fell into the validation part; take less"),
        ('{"text": "a"}\n' + "[" * 10_000, [], r"a\.jsonl:2 is not JSON .maximum recursion"),
        ('{"text": "a"}\n', ["--validation", "0"], "validation"),
        ('{"text": "a"}\n{"b": "c"}\n', [], r"a\.jsonl:2: the field 'text' is missing"),
        ('{"text": "a"}\n', ["--field", "body"], r"a\.jsonl:1: the field 'body' is missing; there is text"),
        ('{"text": "a"}\n', ["--validation", "1.5"], "validation"),
        ('{"text": "a"}\n', ["--tokenizer", "words"], "tokenizer"),
        ('{"text": "a"}\n', ["--vocabulary", "x"], "--vocabulary is for --tokenizer gpt2"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, capsys, content, options, complaint):
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_text(content)
    assert main(["gpt2", "prepare", "a.jsonl", "--out", "deep/set", "--processes", "1", *options]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("flashlab: error: ")
    assert re.search(complaint, error), error
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_the_first_mistake_is_named_however_many_processes_look(tmp_path):
    lines = [json.dumps({"text": "x" * 100}) for _ in range(400)]
    lines[151] = lines[390] = "oops"
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"a\.jsonl:152 is not JSON"):
        prepare([str(tmp_path / "a.jsonl")], out=tmp_path / "set", shard_bytes=2000, processes=2)
    assert shards_done(tmp_path / "set") > 5
    assert not active_children()


def test_bytes_that_are_no_text_can_be_replaced(tmp_path):
    for number in range(30):
        (tmp_path / f"{number}.txt").write_bytes(b"caf\xe9 %d" % number)
    with pytest.raises(UserError, match=r"0\.txt: byte 3 is not UTF-8 \(0xe9\)"):
        prepare([str(tmp_path)], out=tmp_path / "set", **HOW)
    prepare([str(tmp_path)], out=tmp_path / "set", undecodable="replace", **HOW)
    assert "caf\ufffd 7" in [text for part in PARTS for text in stored_texts(open_set(tmp_path / "set"), part)]


def test_a_full_disk_is_one_line_and_what_was_done_is_kept(corpus, token_set, tmp_path, monkeypatch):
    out, write = tmp_path / "set", prepare_module.write_shard

    def full(folder, name, tokens):
        if name == "shard-000004.bin":
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(folder, name, tokens)

    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "write_shard", full)
        with pytest.raises(
            UserError, match=r"cannot write .*set: No space left on device; free space there, or choose"
        ):
            prepare([str(corpus)], out=out, **HOW)
    assert shards_done(out) == 4
    assert not active_children()
    prepare([str(corpus)], out=out, **HOW)
    assert files_of(out) == files_of(token_set)


def test_a_folder_that_cannot_be_made_is_one_line(corpus, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*; a file stands where a folder should be"):
        prepare([str(corpus)], out=tmp_path / "file/set", **HOW)


def test_two_preparations_keep_out_of_each_others_folder(corpus, tmp_path):
    process = start(corpus, tmp_path / "set")
    try:
        wait_until(lambda: shards_done(tmp_path / "set") >= 1)
        with pytest.raises(
            UserError, match="is being written by another prepare; wait for it, or choose another --out"
        ):
            prepare([str(corpus)], out=tmp_path / "set", **HOW)
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)


def test_a_process_that_was_killed_is_one_line():
    encoder = Encoder(ByteTokenizer(), 0.5, "text", "refuse")

    def one_is_killed():
        for number in range(100):
            if number == 20:
                active_children()[0].kill()
            yield [Document(b"a" * 100_000, "text", "a.txt", 0)], number

    complaint = r"was lost \(its process was ended by SIGKILL\), .*fewer --processes or smaller --shard_bytes"
    with pytest.raises(UserError, match=complaint):
        list(encode_in_order(one_is_killed(), encoder, 2))
    assert not active_children()


def test_what_comes_before_a_source_that_breaks_is_encoded():
    def breaks():
        for number in range(7):
            yield [Document(b"a" * 10**number, "text", "a.txt", 0)], number
        raise UserError("the connection broke")

    encoding = encode_in_order(breaks(), Encoder(ByteTokenizer(), 0, "text", "refuse"), 2)
    done = [(number, encoded.text_bytes) for encoded, number in islice(encoding, 7)]
    assert done == [(number, 10**number) for number in range(7)]
    with pytest.raises(UserError, match="the connection broke"):
        next(encoding)


def test_text_is_not_read_far_ahead_of_what_is_encoded():
    read = []

    def batches():
        for number in range(30):
            read.append(number)
            yield [Document(b"a" * (10**6 if number == 0 else 10), "text", "a.txt", 0)], number

    for _, number in encode_in_order(batches(), Encoder(ByteTokenizer(), 0, "text", "refuse"), 2):
        assert read[-1] - number <= 4


def test_processes_that_encode_do_not_load_torch():
    code = "import sys, flashlab.gpt2.encode; print({'torch', 'litdata', 'lightning'} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "set()"
