"""`flashlab gpt2 prepare`: text to shards of tokens.

One process reads documents and collects them to batches of `shard_bytes`; the others turn each batch into tokens; the
first writes them, in order, each as one shard with a line in ``shards.log`` that says where the next one begins. So
what is finished is always a beginning, a run that was killed goes on behind it, and how many processes there were
changes nothing.
"""

import hashlib
import json
import os
import shutil
import sys
import zlib
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple

import numpy as np
from jsonargparse.typing import OpenUnitInterval, PositiveInt
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from flashlab import __version__
from flashlab.errors import UserError, alone_in, write_text, writing
from flashlab.gpt2.documents import Document, Undecodable
from flashlab.gpt2.encode import Encoded, Encoder, encode_in_order
from flashlab.gpt2.sources import EXTENSIONS, Position, Source, open_source
from flashlab.gpt2.tokenizer import VOCABULARY, BytePairTokenizer, TokenizerName, load_tokenizer
from flashlab.gpt2.tokens import KIND, MANIFEST, SCHEMA_VERSION, checksum, damage_of, open_set, write_index, write_shard
from flashlab.machine import usable_cores

VALIDATION = 0.0005
VALIDATION_EMBEDDED = 0.05  # of a few hundred documents
VALIDATION_SHARD = 2**23  # tokens
DONE = "shards.log"  # lines of JSON, under a name that no folder of text is searched for
VALIDATION_TOKENS = "validation.bin"  # of the shards that are done; becomes the validation part at the end
LINE_EVERY_S = 10


def prepare(
    src: list[str] = [],  # noqa: B006
    *,
    out: Path,
    tokenizer: TokenizerName = "bytes",
    vocabulary: Path | None = None,
    validation: OpenUnitInterval | None = None,
    extensions: list[str] = EXTENSIONS,
    field: str = "text",
    separator: str = "",
    undecodable: Undecodable = "refuse",
    shard_bytes: PositiveInt = 2**24,
    processes: PositiveInt | None = None,
) -> None:
    """Turn text into the shards of tokens that GPT-2 is trained on. What was interrupted goes on where it was.

    Args:
        src: text files, JSONL files (both also .gz, .zst), folders of them, or one data set of the Hugging Face hub as
            hf:OWNER/NAME, hf:OWNER/NAME:CONFIG, either with @REVISION; by default the embedded corpus, Python's own
            documentation and library.
        out: folder of the token set; a set that is there already is replaced at the very end.
        tokenizer: bytes (257 tokens, needs nothing), or gpt2 (50,257 tokens; its vocabulary is downloaded once).
        vocabulary: of gpt2, where it should not be downloaded: a folder with vocab.bpe and encoder.json, or a .tiktoken
            file.
        validation: share of the documents that are kept for validation, chosen by the hash of their text; by default
            0.0005, and 0.05 of the embedded corpus.
        extensions: of files that are taken from folders, each also with .gz or .zst behind it.
        field: of a JSONL line or a row, which holds the text.
        separator: between the documents of a text file; without one a file is one. What is longer than 64 KiB is cut.
        undecodable: refuse bytes that are not UTF-8, or replace them by U+FFFD.
        shard_bytes: bytes of text in a shard.
        processes: that encode text side by side; by default one per core, fewer for little text. They do not change
            the result.

    Raises:
        UserError: there is no text, or a file, a line, a package or the vocabulary cannot be used; no document falls
            into one of the parts; another prepare is at work in the folder, or it cannot be written.
    """
    source = open_source(src, extensions, field, separator)
    used = load_tokenizer(tokenizer, vocabulary)
    if validation is None:
        validation = VALIDATION_EMBEDDED if source.identity["kind"] == "embedded" else VALIDATION
    options = {
        "validation": validation,
        "field": field,
        "separator": separator,
        "undecodable": undecodable,
        "shard_bytes": shard_bytes,
    }
    identity = [SCHEMA_VERSION, source.identity["kind"], source.key(), used.fingerprint, options]
    folder = f"tokens-{hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]}"
    manifest: dict[str, Any] = {
        "kind": KIND,
        "schema_version": SCHEMA_VERSION,
        "flashlab": __version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "tokenizer": used.describe(),
        "dtype": used.dtype.name,
        "source": source.identity,
        "options": options,
        "folder": folder,
    }
    with _alone_in(out, folder) as work:
        if whole := _whole(out, folder):
            _print_summary(out, whole, "was prepared before and is whole")
            return
        with writing(out):
            shards = _resume(work)
        batches = _batches(source, shards[-1]["next"] if shards else None, shard_bytes)
        encoder = Encoder(used, validation, field, undecodable)
        with (
            _Bar(source, shards) as bar,
            closing(encode_in_order(batches, encoder, processes or _processes(source, shard_bytes))) as all_encoded,
        ):
            for encoded, at in all_encoded:
                with writing(out):
                    _store(work, shards, encoded, at)
                bar.advance(shards[-1])
        with writing(out):
            if isinstance(used, BytePairTokenizer):
                (work / VOCABULARY).write_bytes(used.to_tiktoken())
            _commit(out, work, manifest, shards)
    _print_summary(out, manifest, "prepared")


def _processes(source: Source, shard_bytes: int) -> int:
    """Return one process per core, or fewer for little text: each takes half a second to start."""
    if source.total_bytes is None:
        return usable_cores()
    return min(usable_cores(), 1 + 4 * source.total_bytes // shard_bytes)  # 4: it may be compressed


@contextmanager
def _alone_in(out: Path, folder: str) -> Iterator[Path]:
    """Keep every other prepare out of the folder; take away what was made if not one shard came of it."""
    work = out / folder
    with alone_in(out, "is being written by another prepare; wait for it, or choose another --out"):
        try:
            yield work
        finally:
            if not (work / DONE).exists() or not (work / DONE).stat().st_size:
                shutil.rmtree(work, ignore_errors=True)


def _whole(out: Path, folder: str) -> dict[str, Any] | None:
    """Return the manifest of the set that was to be made, if it is there and whole; take it away if it is not whole."""
    try:
        if json.loads((out / MANIFEST).read_text())["folder"] == folder:
            return open_set(out, verify=True).manifest
    except UserError:
        (out / MANIFEST).unlink()
    except (OSError, ValueError, LookupError, TypeError):
        pass  # there is none, or one that `_commit` replaces
    return None


def _resume(work: Path) -> list[dict[str, Any]]:
    """Return the lines of the shards that are done and whole, up to the first that is not; cut off what follows."""
    (work / VALIDATION_TOKENS).parent.mkdir(exist_ok=True)
    (work / VALIDATION_TOKENS).touch()
    (work / DONE).touch()
    stored = (work / VALIDATION_TOKENS).read_bytes()
    lines = (work / DONE).read_text().splitlines()
    shards: list[dict[str, Any]] = []
    begin = crc = 0  # of validation tokens
    with suppress(ValueError):  # a line that a kill cut short
        for line in lines:
            shard = json.loads(line)
            end = shard["validation_end"]
            crc = zlib.crc32(stored[begin:end], crc)
            if len(stored) < end or crc != shard["validation_crc32"]:
                break
            if shard["shard"] and damage_of(work / "train", shard["shard"], verify=True):
                break
            shards.append(shard)
            begin = end
    os.truncate(work / VALIDATION_TOKENS, begin)
    write_text(work / DONE, "".join(json.dumps(shard) + "\n" for shard in shards))
    return shards


class _Place(NamedTuple):
    """Where the batch after this one begins."""

    position: Position
    done_bytes: int


def _batches(source: Source, position: Position, shard_bytes: int) -> Iterator[tuple[list[Document], _Place]]:
    """Yield documents of `shard_bytes` at a time."""
    batch: list[Document] = []
    size = 0
    for document in source.read(position):
        batch.append(document)
        size += len(document.raw)
        if size >= shard_bytes:
            yield batch, _Place(source.position(), source.done_bytes)
            batch, size = [], 0
    if batch:
        yield batch, _Place(source.position(), source.done_bytes)


def _store(work: Path, shards: list[dict[str, Any]], encoded: Encoded, at: _Place) -> None:
    """Write a batch: its shard, its validation tokens, then the line that makes both count."""
    train, validation = encoded.tokens["train"], encoded.tokens["validation"].tobytes()
    shard = write_shard(work / "train", f"shard-{len(shards):06}.bin", train) if len(train) else None
    with (work / VALIDATION_TOKENS).open("ab") as file:
        file.write(validation)
    before = shards[-1] if shards else {"validation_end": 0, "validation_crc32": 0}
    line = {
        "shard": shard,
        "documents": encoded.documents,
        "text_bytes": encoded.text_bytes,
        "validation_end": before["validation_end"] + len(validation),
        "validation_crc32": zlib.crc32(validation, before["validation_crc32"]),
        "next": at.position,
        "done_bytes": at.done_bytes,
    }
    with (work / DONE).open("a") as done:
        done.write(json.dumps(line) + "\n")
    shards.append(line)


def _commit(out: Path, work: Path, manifest: dict[str, Any], shards: list[dict[str, Any]]) -> None:
    """Write the validation part and the indexes, and make it a set by writing the manifest.

    Raises:
        UserError: a part has no document.
    """
    documents = {part: sum(shard["documents"][part] for shard in shards) for part in ("train", "validation")}
    if not all(documents.values()):
        shutil.rmtree(work)  # no set comes of it
        raise UserError(_why_empty(documents, manifest))
    tokens = np.fromfile(work / VALIDATION_TOKENS, manifest["dtype"])
    parts = {
        "train": [shard["shard"] for shard in shards if shard["shard"]],
        "validation": [
            write_shard(work / "validation", f"shard-{number:06}.bin", tokens[start : start + VALIDATION_SHARD])
            for number, start in enumerate(range(0, len(tokens), VALIDATION_SHARD))
        ],
    }
    for part, written in parts.items():
        write_index(work / part, written)
    manifest["text_bytes"] = sum(shard["text_bytes"] for shard in shards)
    manifest["parts"] = {
        part: {"documents": documents[part], "tokens": sum(shard["tokens"] for shard in written), "shards": written}
        for part, written in parts.items()
    }
    write_text(out / MANIFEST, json.dumps(manifest | {"crc32": checksum(manifest)}))
    for folder in out.glob(f"tokens-{'[0-9a-f]' * 16}"):  # the set before, or one that was never finished
        if folder != work:
            shutil.rmtree(folder, ignore_errors=True)


def _why_empty(documents: dict[str, int], manifest: dict[str, Any]) -> str:
    count, share = sum(documents.values()), manifest["options"]["validation"]
    source = manifest["source"]
    names = [file["name"] for file in source.get("files", [])] or [source.get("name", "the corpus")]
    name = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    if not count:
        return f"{name}: there is no text in it; give files with text"
    if not documents["train"]:
        return f"{name}: all {count:,} documents fell into the validation part; take less than --validation {share:g}"
    remedy = f"take {5 / count:.2g} for about 5, or give more text"
    if count < 10:
        remedy = "give more documents, or cut the text into some with --separator"
    return (
        f"{name}: none of {count:,} document(s) fell into the validation part, for which --validation {share:g} takes "
        f"that share of them; {remedy}"
    )


class _Bar:
    """Says how far it is: a bar, or a line every ten seconds where no bar can move."""

    def __init__(self, source: Source, shards: list[dict[str, Any]]) -> None:
        self._total = source.total_bytes
        self._tokens = sum(shard["shard"]["tokens"] for shard in shards if shard["shard"])
        self._first = self._done = shards[-1]["done_bytes"] if shards else 0
        self._first_tokens = self._tokens
        self._started = self._said = monotonic()
        self._progress = Progress(
            TextColumn("prepare"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TextColumn("{task.fields[tokens]}"),
            TimeRemainingColumn(),
            disable=not sys.stdout.isatty(),
        )
        self._task = self._progress.add_task("", total=self._total, completed=self._done, tokens="")
        if shards:
            print(f"goes on after {len(shards):,} shards ({self._tokens:,} tokens) that were done before", flush=True)

    def __enter__(self) -> "_Bar":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def advance(self, shard: dict[str, Any]) -> None:
        """Count a shard that was written."""
        now = monotonic()
        self._tokens += shard["shard"]["tokens"] if shard["shard"] else 0
        self._done = shard["done_bytes"]
        took = max(now - self._started, 1e-9)
        tokens = f"{self._tokens:,} tokens, {(self._tokens - self._first_tokens) / took:,.0f}/s"
        self._progress.update(self._task, completed=self._done, tokens=tokens)
        if self._progress.disable and now - self._said >= LINE_EVERY_S:
            self._said = now
            of = left = ""
            if self._total and self._done > self._first:
                seconds = (self._total - self._done) * took / (self._done - self._first)
                of, left = f" of {self._total / 1e6:,.0f}", f", {timedelta(seconds=max(round(seconds), 0))} left"
            print(f"{self._done / 1e6:,.0f}{of} MB, {tokens}{left}", flush=True)


def _print_summary(out: Path, manifest: dict[str, Any], how: str) -> None:
    parts, tokenizer = manifest["parts"], manifest["tokenizer"]
    size = sum(shard["bytes"] for part in parts.values() for shard in part["shards"])
    print(f"{out}: {how}; {manifest['text_bytes'] / 1e6:,.1f} MB of text, {size / 1e6:,.1f} MB of shards")
    for name, part in parts.items():
        count = len(part["shards"])
        print(f"  {name}: {part['tokens']:,} tokens of {part['documents']:,} documents in {count:,} shard(s)")
    print(f"  tokenizer: {tokenizer['name']}, {tokenizer['vocab_size']:,} tokens, {tokenizer['fingerprint'][:8]}")
