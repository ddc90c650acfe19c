import gzip
import json
import random
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from flashlab.gpt2.corpus import embedded_documents
from flashlab.gpt2.prepare import prepare

MERGES = 150


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Some 400 documents of English, Python and other scripts, none of them alike."""
    pieces = [text[start : start + 3000] for _, text in embedded_documents()[:100] for start in (0, 5000)]
    others = [
        "Ein Satz mit Umlauten: äöüß.",
        "日本語の文章です。",
        "emoji 🙂🙃 and \u0000 control\r\nlines\t",
        "'ll 12345 'tis",
    ]
    chance = random.Random(0)
    words = "".join(pieces).split()
    made = [" ".join(chance.choices(words, k=chance.randint(1, 400))) for _ in range(200)]
    return list(dict.fromkeys([piece for piece in pieces if piece.strip()] + others + made))


@pytest.fixture(scope="session")
def corpus(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The documents as a folder: JSONL, plain and compressed, and text files. Read it, never write into it."""
    folder = tmp_path_factory.mktemp("corpus") / "corpus"
    (folder / "deep/er").mkdir(parents=True)
    lines = [json.dumps({"text": text, "number": number}) for number, text in enumerate(texts)]
    third = len(texts) // 3
    (folder / "a.jsonl").write_text("\n".join(lines[:third]) + "\n\n")
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(("\n".join(lines[third : 2 * third]) + "\n").encode(), mtime=0))
    for number, text in enumerate(texts[2 * third :]):
        (folder / f"deep/er/{number:03}.txt").write_bytes(text.encode())
    (folder / "deep/notes.log").write_text("not one of the extensions")
    (folder / ".hidden.txt").write_text("hidden")
    return folder


def printable_bytes() -> dict[int, str]:
    """Map bytes to the characters by which GPT-2's files spell them."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + n) for n, byte in enumerate(others)}


@pytest.fixture(scope="session")
def merges(texts: list[str]) -> list[tuple[bytes, bytes]]:
    """Pairs of a byte pair encoding that was learnt from the documents, in order."""
    words = dict(Counter(f" {word}".encode() for text in texts for word in text.split()).most_common(1000))
    split = {word: [bytes([byte]) for byte in word] for word in words}
    learnt = []
    for _ in range(MERGES):
        pairs: Counter[tuple[bytes, bytes]] = Counter()
        for word, parts in split.items():
            for pair in pairwise(parts):
                pairs[pair] += words[word]
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        learnt.append(best)
        split = {word: merge(parts, best) for word, parts in split.items()}
    return learnt


def merge(parts: list[bytes], pair: tuple[bytes, bytes]) -> list[bytes]:
    """Join every occurrence of a pair, from the left."""
    joined = []
    for part in parts:
        if joined and (joined[-1], part) == pair:
            joined[-1] += part
        else:
            joined.append(part)
    return joined


@pytest.fixture(scope="session")
def vocabulary(merges: list[tuple[bytes, bytes]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small vocabulary in the files of GPT-2's release."""
    folder = tmp_path_factory.mktemp("vocabulary")
    character = printable_bytes()

    def spell(token: bytes) -> str:
        return "".join(character[byte] for byte in token)

    order = sorted(range(256), key=lambda byte: (ord(character[byte]) >= 256, ord(character[byte])))
    tokens = [bytes([byte]) for byte in order] + [first + second for first, second in merges]
    numbers = {spell(token): number for number, token in enumerate(tokens)} | {"<|endoftext|>": len(tokens)}
    (folder / "encoder.json").write_text(json.dumps(numbers))
    lines = [f"{spell(first)} {spell(second)}" for first, second in merges]
    (folder / "vocab.bpe").write_text("\n".join(["#version: 0.2", *lines]) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def token_set(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The documents as a set of bytes in some twenty shards, a fifth of them for validation. Never write into it."""
    out = tmp_path_factory.mktemp("sets") / "set"
    prepare([str(corpus)], out=out, validation=0.2, shard_bytes=20_000, processes=1)
    return out
