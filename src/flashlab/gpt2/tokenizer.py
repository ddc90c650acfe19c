"""Tokenizers: text to numbers and back. Bytes need nothing; GPT-2's byte pair encoding comes from tiktoken.

Text that spells a special token is text: only `prepare` puts an end-of-text token anywhere.
"""

import base64
import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from flashlab.errors import UserError

END_OF_TEXT = "<|endoftext|>"
VOCABULARY = "vocabulary.tiktoken"
# The names that GPT-2's release and Hugging Face give to one and the same pair of files: merges, and numbers of tokens.
PAIRS = (("vocab.bpe", "encoder.json"), ("merges.txt", "vocab.json"))

TokenizerName = Literal["bytes", "gpt2"]


class Tokenizer(ABC):
    """Turns text into numbers below `vocab_size` and back.

    Attributes:
        name: what the command line calls it.
        tokens: bytes of every token, in the order of their numbers; the last one is the end of a text.
        pattern: what a text is cut by before bytes are paired.
    """

    name: TokenizerName
    tokens: list[bytes]
    pattern: str = ""

    @property
    def vocab_size(self) -> int:
        return len(self.tokens)

    @property
    def end_of_text(self) -> int:
        return len(self.tokens) - 1

    @property
    def dtype(self) -> np.dtype:
        """Of stored tokens: the smallest type that holds the vocabulary."""
        return np.dtype(np.uint16 if self.vocab_size <= 2**16 else np.int32)

    @cached_property
    def fingerprint(self) -> str:
        """Equal for two tokenizers that number every text alike."""
        digest = hashlib.sha256(self.pattern.encode())
        for token in self.tokens:
            digest.update(len(token).to_bytes(4, "little") + token)
        return digest.hexdigest()[:32]

    @abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """Return the tokens of a text ``[T]`` in `dtype`, without an end-of-text token."""

    def decode_bytes(self, tokens: Iterable[int]) -> bytes:
        """Return the bytes of tokens: of a part of a text, which may begin or end within a character."""
        return b"".join(self.tokens[token] for token in tokens)

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the text of tokens, with U+FFFD for bytes that are no text."""
        return self.decode_bytes(tokens).decode("utf-8", "replace")

    def describe(self) -> dict[str, Any]:
        """Return what a manifest or a checkpoint keeps, to tell this tokenizer from others."""
        return {
            "name": self.name,
            "vocab_size": self.vocab_size,
            "end_of_text": self.end_of_text,
            "fingerprint": self.fingerprint,
        }

    def require(self, described: dict[str, Any], of: str) -> None:
        """Refuse what was made with another tokenizer.

        Raises:
            UserError: `of`, which `describe` was kept with, was made with another one.
        """
        if described["fingerprint"] != self.fingerprint:
            raise UserError(
                f"{of} was made with the tokenizer {described['name']} ({described['vocab_size']:,} tokens, "
                f"fingerprint {described['fingerprint'][:8]}), not with {self.name} ({self.vocab_size:,}, "
                f"{self.fingerprint[:8]}); give that one, or prepare the set anew"
            )


def reload_tokenizer(described: dict[str, Any], read: Callable[[], bytes], vocabulary: str, of: str) -> Tokenizer:
    """Return the tokenizer that something was made with.

    Args:
        described: what its `describe` said.
        read: gives the vocabulary that was kept, if there is one to it.
        vocabulary: where that is.
        of: what was made with it.

    Raises:
        UserError: the vocabulary is damaged or another one, or tiktoken is not installed.
    """
    tokenizer: Tokenizer = ByteTokenizer()
    if described["name"] != tokenizer.name:
        tokenizer = BytePairTokenizer.from_tiktoken(read(), vocabulary)
    tokenizer.require(described, of)
    return tokenizer


class ByteTokenizer(Tokenizer):
    """The 256 bytes of UTF-8 and an end of text: 257 tokens, nothing to download, nothing to train."""

    name = "bytes"

    def __init__(self) -> None:
        self.tokens = [bytes([byte]) for byte in range(256)] + [END_OF_TEXT.encode()]

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(self.dtype)


class BytePairTokenizer(Tokenizer):
    """GPT-2's byte pair encoding: 50,257 tokens with its own vocabulary.

    Args:
        ranks: number of every token but the end of text, in the order in which pairs are merged.
        of: where they are from, for an error.

    Raises:
        UserError: they are no vocabulary, or tiktoken is not installed.
    """

    name = "gpt2"

    def __init__(self, ranks: dict[bytes, int], of: str) -> None:
        tiktoken = _import_tiktoken()
        from tiktoken_ext.openai_public import r50k_pat_str

        numbered = sorted(ranks, key=ranks.__getitem__)
        if [ranks[token] for token in numbered] != list(range(len(ranks))):
            raise UserError(f"{of} is no vocabulary: its {len(ranks):,} tokens are not numbered from 0 without gaps")
        if missing := 256 - sum(len(token) == 1 for token in ranks):
            raise UserError(f"{of} is no vocabulary of GPT-2's kind: {missing} of the 256 bytes have no token")
        self.tokens, self.pattern = [*numbered, END_OF_TEXT.encode()], r50k_pat_str
        self._encoding = tiktoken.Encoding(
            "gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: len(ranks)}
        )

    @classmethod
    def from_tiktoken(cls, content: bytes, of: str) -> "BytePairTokenizer":
        """Read the text of a .tiktoken file.

        Raises:
            UserError: as of the class.
        """
        try:
            pairs = [line.split() for line in content.splitlines() if line]
            return cls({base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}, of)
        except ValueError as error:
            raise UserError(
                f"{of} is no .tiktoken file ({error}); give such a file, or a folder with vocab.bpe and encoder.json"
            ) from None

    def encode(self, text: str) -> np.ndarray:
        return self._encoding.encode_to_numpy(text, disallowed_special=()).astype(self.dtype)

    def to_tiktoken(self) -> bytes:
        """Return the vocabulary as the text of a .tiktoken file."""
        return b"".join(b"%s %d\n" % (base64.b64encode(token), n) for n, token in enumerate(self.tokens[:-1]))


def load_tokenizer(name: TokenizerName, vocabulary: Path | None = None) -> Tokenizer:
    """Load a tokenizer.

    Args:
        name: bytes, or gpt2.
        vocabulary: of gpt2: a .tiktoken file, or a folder with vocab.bpe and encoder.json (merges.txt and vocab.json).
            Otherwise it is downloaded once and kept.

    Raises:
        UserError: tiktoken is not installed, the vocabulary cannot be fetched, or the files are not one.
    """
    if name == "bytes":
        if vocabulary is not None:
            raise UserError("--vocabulary is for --tokenizer gpt2: bytes have none")
        return ByteTokenizer()
    if vocabulary is None:
        return BytePairTokenizer(_fetch_gpt2(), "GPT-2's published vocabulary")
    of = f"--vocabulary {vocabulary}"
    try:
        if vocabulary.is_file():
            return BytePairTokenizer.from_tiktoken(vocabulary.read_bytes(), of)
    except OSError as error:
        raise UserError(f"cannot read {of}: {error.strerror}; check the path and its permissions") from error
    return BytePairTokenizer(_read_pair(vocabulary), of)


def _import_tiktoken() -> Any:
    try:
        import tiktoken
    except ImportError:
        raise UserError(
            "--tokenizer gpt2 needs the package tiktoken: pip install tiktoken, or take --tokenizer bytes"
        ) from None
    return tiktoken


def _fetch_gpt2() -> dict[bytes, int]:
    """Read GPT-2's vocabulary from tiktoken's cache, or download it into that; tiktoken compares the files' SHA-256."""
    _import_tiktoken()
    from tiktoken_ext.openai_public import gpt2

    from flashlab.attention.auto import cache_folder  # imports torch, which not every process here needs

    variables = ("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR")
    folder = next((os.environ[name] for name in variables if name in os.environ), str(cache_folder() / "tiktoken"))
    try:
        with _tiktoken_cache(folder):
            return gpt2()["mergeable_ranks"]
    except Exception as error:  # of the connection, the proxy, the hash, the folder
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"cannot fetch GPT-2's vocabulary into {folder or 'memory'} ({reason}); connect once, or give a folder "
            "with vocab.bpe and encoder.json as --vocabulary"
        ) from error


def _read_pair(folder: Path) -> dict[bytes, int]:
    _import_tiktoken()
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks

    for merges, numbers in PAIRS:
        if (folder / merges).exists() and (folder / numbers).exists():
            try:
                with _tiktoken_cache(""):  # it would take a file of the same name for the same file
                    return data_gym_to_mergeable_bpe_ranks(str(folder / merges), str(folder / numbers))
            except (AssertionError, ValueError, LookupError, TypeError, AttributeError, OSError) as error:
                raise UserError(
                    f"--vocabulary {folder}: {merges} and {numbers} are damaged or do not belong together; fetch both "
                    "again"
                ) from error
    pairs = " or ".join(" and ".join(pair) for pair in PAIRS)
    raise UserError(f"--vocabulary {folder} is no .tiktoken file and no folder with {pairs}; check the path")


@contextmanager
def _tiktoken_cache(folder: str) -> Iterator[None]:
    """Have tiktoken keep files in a folder, or none of them for an empty name."""
    before = os.environ.get("TIKTOKEN_CACHE_DIR")
    os.environ["TIKTOKEN_CACHE_DIR"] = folder
    try:
        yield
    finally:
        if before is None:
            del os.environ["TIKTOKEN_CACHE_DIR"]
        else:
            os.environ["TIKTOKEN_CACHE_DIR"] = before
