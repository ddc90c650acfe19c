"""Where text comes from: files and folders, data sets of the Hugging Face hub, the embedded corpus.

A source yields documents in an order that depends on nothing but itself, and knows how to go on from a position that it
gave before, so that what was interrupted is resumed with the document that came next.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from flashlab.errors import UserError
from flashlab.gpt2.corpus import describe, embedded_documents
from flashlab.gpt2.documents import Document, text_of_row
from flashlab.gpt2.files import Files, find_files, versions

EXTENSIONS = ["txt", "md", "jsonl"]
HUB = "hf:"

Position = Any  # what JSON can hold


class Source(Protocol):
    """Text to prepare.

    Attributes:
        identity: what the manifest says of it.
        total_bytes: of all documents, as they are stored; None if nobody knows.
        done_bytes: how many of them have been read.
    """

    identity: dict[str, Any]
    total_bytes: int | None
    done_bytes: int

    def read(self, position: Position) -> Iterator[Document]:
        """Yield the documents from a position on; None is the beginning."""

    def position(self) -> Position:
        """Return where the document begins that follows the one that `read` yielded last."""

    def key(self) -> list[Any]:
        """Return what has to be the same for work on it to be resumed."""


def open_source(src: list[str], extensions: list[str], field: str, separator: str) -> Source:
    """Find out what the command line names.

    Raises:
        UserError: there is no such thing, or nothing in it.
    """
    if not src:
        return Embedded()
    if any(name.startswith(HUB) for name in src):
        if len(src) > 1:
            raise UserError(f"{' '.join(src)}: a data set of the hub is prepared alone; name it as the only SRC")
        return Hub(src[0].removeprefix(HUB), field)
    return Files(find_files([Path(name) for name in src], extensions), separator)


class Hub:
    """A data set of the Hugging Face hub, streamed: OWNER/NAME, OWNER/NAME:CONFIG, either with @REVISION.

    A folder in the form that `datasets` reads works as well.

    Raises:
        UserError: `datasets` is not installed, or cannot open it.
    """

    def __init__(self, name: str, field: str) -> None:
        try:
            import datasets
        except ImportError:
            raise UserError(f"{HUB}{name} needs the package datasets: pip install datasets") from None
        self._name, self._field = f"{HUB}{name}", field
        name, _, revision = name.partition("@")
        path, _, config = name.partition(":")
        try:
            if not Path(path).is_dir():  # the revision of now: it may be another one when this is resumed
                from huggingface_hub import HfApi

                revision = HfApi().dataset_info(path, revision=revision or None).sha or revision
            self._data = datasets.load_dataset(
                path, config or None, split="train", revision=revision or None, streaming=True
            )
        except Exception as error:  # of the connection, the hub, the data set
            raise self._unreachable(error) from error
        self.identity = {"kind": "hub", "name": path, "config": config or None, "revision": revision or None}
        self._files = sorted(file for file in Path(path).rglob("*") if file.is_file())  # of a folder
        self.total_bytes = self._data.info.dataset_size
        self.done_bytes = 0

    def key(self) -> list[Any]:
        return [*self.identity.values(), *versions(self._files)]

    def position(self) -> dict[str, Any]:
        return {"rows": self._rows, "bytes": self.done_bytes, "state": self._data.state_dict()}

    def read(self, position: dict[str, Any] | None) -> Iterator[Document]:
        self._rows = 0
        if position:
            self._rows, self.done_bytes = position["rows"], position["bytes"]
            self._data.load_state_dict(position["state"])
        rows = iter(self._data)
        while True:
            try:
                row = next(rows, None)
            except Exception as error:  # whatever the connection or a decoder raises
                raise self._unreachable(error) from error
            if row is None:
                return
            self._rows += 1
            raw = text_of_row(row, self._field, f"{self._name}, row {self._rows:,}").encode("utf-8", "replace")
            self.done_bytes += len(raw)
            yield Document(raw, "row", self._name, self._rows)

    def _unreachable(self, error: Exception) -> UserError:
        reason = " ".join(str(error).split())[:300]
        return UserError(
            f"cannot read {self._name} ({reason}); check the name ({HUB}OWNER/NAME:CONFIG@REVISION) and the "
            "connection, and run the command again: it goes on where it was"
        )


class Embedded:
    """The embedded corpus."""

    def __init__(self) -> None:
        self._documents = embedded_documents()
        self.identity = {"kind": "embedded", **describe(self._documents)}
        self.total_bytes: int | None = self.identity["bytes"]
        self.done_bytes = 0
        self._next = 0

    def key(self) -> list[Any]:
        return [self.identity["sha256"]]

    def position(self) -> int:
        return self._next

    def read(self, position: int | None) -> Iterator[Document]:
        raws = [text.encode() for _, text in self._documents]
        self._next = position or 0
        self.done_bytes = sum(map(len, raws[: self._next]))
        while self._next < len(raws):
            number, self._next = self._next, self._next + 1
            self.done_bytes += len(raws[number])
            yield Document(raws[number], "text", self._documents[number][0], 0)
