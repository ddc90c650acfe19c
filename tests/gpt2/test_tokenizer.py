import base64
import json
import pickle
import random
import sys
from itertools import pairwise

import numpy as np
import pytest

from flashlab.errors import UserError
from flashlab.gpt2.tokenizer import BytePairTokenizer, ByteTokenizer, load_tokenizer

# What GPT-2's release cuts texts by, as its source has it.
PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


@pytest.fixture(scope="module", params=["bytes", "gpt2"])
def tokenizer(request, vocabulary):
    if request.param == "bytes":
        return ByteTokenizer()
    pytest.importorskip("tiktoken")
    return load_tokenizer("gpt2", vocabulary)


@pytest.fixture
def pair(vocabulary, tmp_path):
    """A copy of the two files, to damage."""
    pytest.importorskip("tiktoken")
    for name in ("vocab.bpe", "encoder.json"):
        (tmp_path / name).write_bytes((vocabulary / name).read_bytes())
    return tmp_path


def test_every_text_comes_back(tokenizer, texts):
    for text in ["", *texts]:
        tokens = tokenizer.encode(text)
        assert tokens.dtype == tokenizer.dtype == np.uint16
        assert tokenizer.decode(tokens) == text
        assert tokens.size == 0 or tokens.max() < tokenizer.end_of_text


def test_part_of_a_character_is_decoded_as_bytes_and_shown_as_a_replacement(tokenizer):
    tokens = ByteTokenizer().encode("🙂") if tokenizer.name == "bytes" else tokenizer.encode("🙂")
    assert tokenizer.decode_bytes(tokens[:1]) == "🙂".encode()[: len(tokenizer.tokens[tokens[0]])]
    assert tokenizer.decode([*tokenizer.encode("a"), tokenizer.encode("🙂")[0]]).startswith("a\ufffd")


def test_text_that_spells_the_end_of_a_text_is_text(tokenizer):
    tokens = tokenizer.encode("a<|endoftext|>b")
    assert tokenizer.end_of_text not in tokens
    assert tokenizer.decode([*tokens, tokenizer.end_of_text]) == "a<|endoftext|>b<|endoftext|>"


def test_processes_can_be_handed_a_tokenizer(tokenizer, texts):
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert all(np.array_equal(copy.encode(text), tokenizer.encode(text)) for text in texts[:50])
    assert copy.fingerprint == tokenizer.fingerprint


def test_bytes_are_257_tokens():
    tokenizer = ByteTokenizer()
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (257, 256)
    assert tokenizer.encode("Aä").tolist() == [65, 0xC3, 0xA4]


def test_byte_pairs_are_those_of_the_algorithm(vocabulary, merges, texts):
    """Against merging by the book: always the pair that was learnt first."""
    pytest.importorskip("tiktoken")
    import regex

    tokenizer = load_tokenizer("gpt2", vocabulary)
    numbers = {token: number for number, token in enumerate(tokenizer.tokens)}
    rank = {pair: number for number, pair in enumerate(merges)}

    def encode(word):
        parts = [bytes([byte]) for byte in word]
        while True:
            ranked = [(rank[pair], at) for at, pair in enumerate(pairwise(parts)) if pair in rank]
            if not ranked:
                return [numbers[part] for part in parts]
            _, at = min(ranked)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]

    merged = 0
    for text in random.Random(0).sample(texts, 60) + texts[-5:]:
        expected = [token for word in regex.findall(PATTERN, text) for token in encode(word.encode())]
        assert tokenizer.encode(text).tolist() == expected
        merged += len(text.encode()) - len(expected)
    assert merged > 10_000


def test_a_vocabulary_is_the_same_from_every_file_that_holds_it(vocabulary, tmp_path):
    pytest.importorskip("tiktoken")
    expected = load_tokenizer("gpt2", vocabulary)
    (tmp_path / "merges.txt").write_bytes((vocabulary / "vocab.bpe").read_bytes())
    (tmp_path / "vocab.json").write_bytes((vocabulary / "encoder.json").read_bytes())
    (tmp_path / "small.tiktoken").write_bytes(expected.to_tiktoken())
    for path in (tmp_path, tmp_path / "small.tiktoken"):
        found = load_tokenizer("gpt2", path)
        assert found.describe() == expected.describe()
        assert found.tokens == expected.tokens


def test_a_vocabulary_that_differs_in_one_merge_is_told_apart(pair, vocabulary):
    load_tokenizer("gpt2", pair)  # files of the same names are read anew
    numbers = json.loads((pair / "encoder.json").read_text())
    swapped = [name for name, number in numbers.items() if number in (300, 301)]
    numbers[swapped[0]], numbers[swapped[1]] = numbers[swapped[1]], numbers[swapped[0]]
    lines = (pair / "vocab.bpe").read_text().split("\n")
    lines[1 + 44], lines[1 + 45] = lines[1 + 45], lines[1 + 44]
    (pair / "encoder.json").write_text(json.dumps(numbers))
    (pair / "vocab.bpe").write_text("\n".join(lines))
    one, other = load_tokenizer("gpt2", vocabulary), load_tokenizer("gpt2", pair)
    assert one.fingerprint != other.fingerprint
    with pytest.raises(UserError, match=r"^runs/x was made with the tokenizer gpt2 \(407 tokens, fingerprint .*give"):
        other.require(one.describe(), "runs/x")
    one.require(one.describe(), "runs/x")


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda folder: (folder / "vocab.bpe").unlink(), "is no .tiktoken file and no folder with vocab.bpe and"),
        (lambda folder: (folder / "encoder.json").write_text("{}"), "are damaged or do not belong together"),
        (lambda folder: (folder / "encoder.json").write_text("[1"), "are damaged or do not belong together"),
        (lambda folder: (folder / "vocab.bpe").write_bytes(b"\xff\xfe"), "are damaged or do not belong together"),
        (lambda folder: (folder / "vocab.bpe").write_text("#\na b c\n"), "are damaged or do not belong together"),
    ],
)
def test_damaged_files_are_refused_in_one_line(pair, damage, complaint):
    damage(pair)
    with pytest.raises(UserError, match=complaint) as caught:
        load_tokenizer("gpt2", pair)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"<html>not found</html>", "is no .tiktoken file"),
        (b"!!!! 0\n", "is no .tiktoken file"),
        (b"QQ== 0\nQg== 2\n", r"its 2 tokens are not numbered from 0 without gaps"),
        (b"QQ== 0\nQg== 1\n", r"254 of the 256 bytes have no token"),
    ],
)
def test_a_file_that_is_no_vocabulary_is_refused(tmp_path, content, complaint):
    pytest.importorskip("tiktoken")
    (tmp_path / "x.tiktoken").write_bytes(content)
    with pytest.raises(UserError, match=rf"x.tiktoken .*{complaint}"):
        load_tokenizer("gpt2", tmp_path / "x.tiktoken")


def test_a_missing_path_and_a_vocabulary_for_bytes_are_refused(tmp_path):
    pytest.importorskip("tiktoken")
    with pytest.raises(UserError, match=r"nowhere is no .tiktoken file and no folder with .*; check the path"):
        load_tokenizer("gpt2", tmp_path / "nowhere")
    with pytest.raises(UserError, match="bytes have none"):
        load_tokenizer("bytes", tmp_path)


def test_a_missing_tiktoken_is_named_with_its_remedy(vocabulary, monkeypatch):
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    for path in (vocabulary, None):
        with pytest.raises(UserError, match=r"needs the package tiktoken: pip install tiktoken"):
            load_tokenizer("gpt2", path)
    assert load_tokenizer("bytes").vocab_size == 257


def test_the_vocabulary_is_fetched_once_and_kept(vocabulary, monkeypatch, tmp_path):
    load = pytest.importorskip("tiktoken.load")
    fetched = []

    def fetch(url):
        fetched.append(url.rpartition("/")[2])
        return (vocabulary / fetched[-1]).read_bytes()

    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    monkeypatch.delenv("DATA_GYM_CACHE_DIR", raising=False)
    monkeypatch.setenv("FLASHLAB_CACHE", str(tmp_path))
    monkeypatch.setattr(load, "read_file", fetch)
    with pytest.raises(UserError, match=r"cannot fetch GPT-2's vocabulary into .*/tiktoken \(Hash mismatch.*give a"):
        load_tokenizer("gpt2")  # which it is not: tiktoken knows the hash of the published one
    monkeypatch.setattr(load, "check_hash", lambda data, expected: True)
    expected = load_tokenizer("gpt2", vocabulary).fingerprint
    fetched.clear()
    for _ in range(2):
        assert load_tokenizer("gpt2").fingerprint == expected
        assert fetched == ["vocab.bpe", "encoder.json"]
    assert len(list((tmp_path / "tiktoken").iterdir())) == 2


def test_without_a_connection_the_remedy_is_files(monkeypatch, tmp_path):
    load = pytest.importorskip("tiktoken.load")

    def fetch(url):
        raise ConnectionError(f"no route\nto {url}")

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(load, "read_file", fetch)
    with pytest.raises(
        UserError, match=r"cannot fetch .* \(no route to http.*vocab.bpe and encoder.json as --voc"
    ) as e:
        load_tokenizer("gpt2")
    assert "\n" not in str(e.value)


def test_a_vocabulary_beyond_65536_takes_four_bytes_a_token():
    pytest.importorskip("tiktoken")
    ranks = {bytes([byte]): byte for byte in range(256)}
    ranks |= {bytes([255, *number.to_bytes(3, "big")]): 256 + number for number in range(2**16)}
    tokenizer = BytePairTokenizer(ranks, "made up")
    assert tokenizer.dtype == np.int32
    assert tokenizer.encode("abc").dtype == np.int32
    assert base64.b64decode(tokenizer.to_tiktoken().split()[0]) == b"\0"
