"""The token set: shards of tokens as litdata's TokensLoader reads them, and a manifest that says all about them.

A folder (or object storage prefix) holds ``manifest.json`` and one folder that it names, with the parts ``train`` and
``validation``. The manifest is written last, so that what was interrupted has none and is no set.
"""

import json
import shutil
import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from flashlab.errors import UserError, write_text
from flashlab.gpt2.tokenizer import VOCABULARY, Tokenizer, reload_tokenizer
from flashlab.object_storage import open_storage

SCHEMA_VERSION = 1
KIND = "tokens"
MANIFEST = "manifest.json"
INDEX = "index.json"  # what litdata reads

Part = Literal["train", "validation"]
REMEDY = "make it with `flashlab gpt2 prepare SRC --out DIR`"


@dataclass(frozen=True)
class TokenSet:
    """A token set that was opened: where it is, and its manifest."""

    path: str
    manifest: dict[str, Any]

    def folder(self, part: Part) -> str:
        """Folder or URL of a part's shards."""
        return f"{self.path.rstrip('/')}/{self.manifest['folder']}/{part}"

    def shards(self, part: Part) -> list[dict[str, Any]]:
        """Name, bytes, tokens and crc32 of a part's shards, in order."""
        return self.manifest["parts"][part]["shards"]

    @property
    def is_local(self) -> bool:
        return "://" not in self.path

    @property
    def vocab_size(self) -> int:
        return self.manifest["tokenizer"]["vocab_size"]

    def read(self, name: str) -> bytes:
        """Read a file of the set whole.

        Raises:
            UserError: it is missing or out of reach.
        """
        try:
            return _read(self.path, name)
        except OSError as error:
            raise UserError(
                f"cannot read {self.path}/{name}: {error.strerror}; prepare the set again: what is whole is kept"
            ) from error

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that it was made with, from the vocabulary that it keeps.

        Raises:
            UserError: the vocabulary is missing or damaged, or tiktoken is not installed.
        """
        name = f"{self.manifest['folder']}/{VOCABULARY}"
        return reload_tokenizer(
            self.manifest["tokenizer"], lambda: self.read(name), f"{self.path}/{name}", of=self.path
        )


def open_set(path: str | Path, tokenizer: Tokenizer | None = None, *, verify: bool = False) -> TokenSet:
    """Open a token set in a folder or in object storage (``s3://``, ``gs://``; whatever litdata reads).

    Args:
        path: where it is.
        tokenizer: that a model has, if the set has to be made with that one.
        verify: also read all shards and compare their checksums (of a folder).

    Raises:
        UserError: there is no set, it is of another schema version or another tokenizer, or a shard is missing, cut
            short or damaged.
    """
    path = str(path)
    try:
        manifest = json.loads(_read(path, MANIFEST))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path} is not a token set (it has no {MANIFEST}); {REMEDY}") from None
    except OSError as error:
        raise UserError(
            f"cannot read {path}/{MANIFEST}: {error.strerror}; check the path and its permissions"
        ) from error
    except ValueError:
        manifest = None
    if isinstance(manifest, dict) and "cleaning" in manifest:
        raise UserError(f"{path} holds bars, not tokens: they are for `flashlab train`; give a token set")
    if not isinstance(manifest, dict) or manifest.get("kind") != KIND:
        raise UserError(f"{path}/{MANIFEST} is damaged, or another program's; {REMEDY}")
    if (version := manifest.get("schema_version")) != SCHEMA_VERSION:
        raise UserError(f"{path} has schema version {version}, this flashlab reads {SCHEMA_VERSION}; {REMEDY}")
    if manifest.pop("crc32", None) != checksum(manifest):
        raise UserError(f"{path}/{MANIFEST} was changed or damaged: its checksum differs; {REMEDY}")
    tokens = TokenSet(path, manifest)
    if tokenizer is not None:
        tokenizer.require(manifest["tokenizer"], path)
    if tokens.is_local:
        for part in manifest["parts"]:
            for shard in tokens.shards(part):
                if damage := damage_of(Path(tokens.folder(part)), shard, verify=verify):
                    raise UserError(f"{damage}; prepare the set again: what is whole is kept")
    return tokens


def write_shard(folder: Path, name: str, tokens: np.ndarray) -> dict[str, Any]:
    """Write a shard with litdata, whole or not at all, and return what the manifest keeps of it."""
    from litdata.streaming import Cache, TokensLoader  # slow to import, and not every process here needs it

    partial = folder / f".{name}"
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    partial.mkdir(parents=True)
    try:
        cache = Cache(str(partial), chunk_bytes=2**62, item_loader=TokensLoader())
        cache[0] = tokens
        cache.done()
        cache.merge()
        index = json.loads((partial / INDEX).read_text())
        [chunk] = index["chunks"]
        written = partial / chunk["filename"]
        content = written.read_bytes()
        written.replace(folder / name)
        (partial / INDEX).replace(folder / INDEX)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return {"name": name, "bytes": len(content), "tokens": len(tokens), "crc32": zlib.crc32(content)}


def write_index(folder: Path, shards: list[dict[str, Any]]) -> None:
    """Have litdata's index, which `write_shard` left for one shard, list all of them."""
    index = json.loads((folder / INDEX).read_text())
    index["chunks"] = [
        {"chunk_bytes": shard["bytes"], "chunk_size": 1, "dim": shard["tokens"], "filename": shard["name"]}
        for shard in shards
    ]
    index["updated_at"] = str(zlib.crc32(json.dumps(shards).encode()))  # of the same set the same
    write_text(folder / INDEX, json.dumps(index))


def damage_of(folder: Path, shard: dict[str, Any], *, verify: bool) -> str | None:
    """Say what is wrong with a shard on disk, if something is: by its size, and if asked by its checksum."""
    path = folder / shard["name"]
    try:
        if (size := path.stat().st_size) != shard["bytes"]:
            return f"{path} is cut short or damaged: it has {size:,} bytes of {shard['bytes']:,}"
        if verify and zlib.crc32(path.read_bytes()) != shard["crc32"]:
            return f"{path} is damaged: its checksum differs"
    except FileNotFoundError:
        return f"{path} is missing"
    except OSError as error:
        return f"cannot read {path}: {error.strerror}"
    return None


def checksum(manifest: dict[str, Any]) -> int:
    """Return the CRC-32 of a manifest without its own."""
    return zlib.crc32(json.dumps(manifest).encode())


def _read(path: str, name: str) -> bytes:
    return open_storage(path)(name) if "://" in path else (Path(path) / name).read_bytes()
