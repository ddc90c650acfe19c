"""Documents of text and JSONL files, plain or compressed."""

import gzip
import io
import zlib
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from flashlab.errors import UserError
from flashlab.gpt2.documents import Document

COMPRESSED = (".gz", ".zst")
JSON_LINES = (".jsonl", ".ndjson", ".json")
PIECE = 2**16  # bytes; a longer text is cut into documents, at the ends of lines
READ = 2**20


class Files:
    """Text and JSONL files, plain, .gz or .zst (told by the content), one after the other.

    A text file is one document, or several: between separators, and where it is longer than 64 KiB.
    """

    def __init__(self, paths: list[Path], separator: str = "") -> None:
        self._paths, self._separator = paths, separator.encode()
        self._sizes = [_readable(path, path.stat).st_size for path in paths]
        self.total_bytes: int | None = sum(self._sizes)
        self.done_bytes = 0
        self.identity = {
            "kind": "files",
            "files": [{"name": str(path), "bytes": size} for path, size in zip(paths, self._sizes, strict=True)],
        }
        self._position = [0, 0, 0]  # file, byte of its text, line

    def key(self) -> list[Any]:
        return versions(self._paths)

    def position(self) -> list[int]:
        return self._position

    def read(self, position: list[int] | None) -> Iterator[Document]:
        first, offset, line = position or (0, 0, 0)
        for number, path in enumerate(self._paths[first:], first):
            before, name = sum(self._sizes[:number]), str(path)
            with _readable(path, partial(path.open, "rb")) as file:
                try:
                    stream = _decompress(file)
                    _skip(stream, offset)
                    if _suffix(path) in JSON_LINES:
                        for line, raw in enumerate(stream, line + 1):  # noqa: B020 - it goes on from there
                            offset += len(raw)
                            self._position, self.done_bytes = [number, offset, line], before + file.tell()
                            if raw.strip():
                                yield Document(raw, "json", name, line)
                    else:
                        for start, end, raw in _cut(stream, offset, self._separator):
                            self._position, self.done_bytes = [number, end, 0], before + file.tell()
                            yield Document(raw, "text", name, start)
                except (EOFError, OSError, zlib.error) as error:  # OSError: gzip's own, and a disk's
                    raise UserError(f"{path} is damaged or cut short ({error}); fetch it again") from error
            offset = line = 0


def versions(paths: Iterable[Path]) -> list[list[Any]]:
    """Tell files from what they were before or will be: path, bytes, time of the last change."""
    return [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in paths]


def find_files(src: list[Path], extensions: list[str]) -> list[Path]:
    """Return files as given, and those in folders that have one of the extensions, compressed or not, sorted.

    Raises:
        UserError: there is no such file, or no such file in a folder.
    """
    suffixes = {f".{extension.lstrip('.').lower()}" for extension in extensions}
    found = []
    for path in src:
        if path.is_dir():
            inside = [
                file
                for file in path.rglob("*")
                if _suffix(file) in suffixes
                and file.is_file()
                and not any(part.startswith(".") for part in file.relative_to(path).parts)
            ]
            if not inside:
                raise UserError(
                    f"{path} holds no file that ends in {', '.join(sorted(suffixes))} (or these with .gz, .zst); name "
                    "others with --extensions"
                )
            found += sorted(inside, key=lambda file: file.relative_to(path).as_posix())
        elif path.exists():
            found.append(path)
        else:
            raise UserError(
                f"{path}: there is no such file or folder; check the path (a data set of the Hugging Face hub is "
                "hf:OWNER/NAME)"
            )
    return found


def _suffix(path: Path) -> str:
    """Return the extension in front of .gz and .zst."""
    name = path.name.lower()
    for compressed in COMPRESSED:
        name = name.removesuffix(compressed)
    return Path(name).suffix


def _readable(path: Path, use: Any) -> Any:
    try:
        return use()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check the path and its permissions") from error


def _decompress(file: BinaryIO) -> BinaryIO:
    start = file.peek(4)[:4]  # type: ignore[attr-defined]
    if start[:2] == b"\x1f\x8b":
        return gzip.GzipFile(fileobj=file)  # type: ignore[return-value]
    if start == b"\x28\xb5\x2f\xfd":
        return io.BufferedReader(_Zstandard(file), READ)
    return file


class _Zstandard(io.RawIOBase):
    """Decompresses frames, and says when the last one is cut short, which the library's own reader does not."""

    def __init__(self, file: BinaryIO) -> None:
        try:
            import zstandard
        except ImportError:
            raise UserError(f"{file.name} needs the package zstandard: pip install zstandard") from None
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)
        self._error = zstandard.ZstdError
        self._file, self._left = file, memoryview(b"")
        self._frame: Any = None
        self._compressed = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._left:
            self._compressed = self._compressed or self._file.read(READ // 8)
            if not self._compressed:
                if self._frame is not None:
                    raise EOFError("it ends within a frame")
                return 0
            self._frame = self._frame or self._decompressor.decompressobj()
            try:
                self._left = memoryview(self._frame.decompress(self._compressed))
            except self._error as error:
                raise EOFError(error) from error
            self._compressed = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame = None
        count = min(len(buffer), len(self._left))
        buffer[:count], self._left = self._left[:count], self._left[count:]
        return count


def _skip(stream: BinaryIO, count: int) -> None:
    if stream.seekable() and not isinstance(stream, gzip.GzipFile):
        stream.seek(count)
        return
    while count:
        if not (block := stream.read(min(count, READ))):
            raise EOFError("it has become shorter")
        count -= len(block)


def _cut(stream: BinaryIO, offset: int, separator: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Yield documents as (first byte, where the next one begins, bytes); what is cut depends on the text alone."""
    reach = PIECE + max(len(separator), 1)  # must be seen to know that neither separator nor end comes in time
    buffer, start, ended = b"", 0, False
    while True:
        while not ended and len(buffer) - start < reach:
            block = stream.read(READ)
            buffer, offset, start, ended = buffer[start:] + block, offset + start, 0, not block
        if start == len(buffer):
            return
        at = buffer.find(separator, start, start + reach) if separator else -1
        if at >= 0:
            end, following = at, at + len(separator)
        else:
            following = end = len(buffer) if len(buffer) - start <= PIECE else _last_line_end(buffer, start)
        if end > start:
            yield offset + start, offset + following, buffer[start:end]
        start = following


def _last_line_end(buffer: bytes, start: int) -> int:
    """Return where to cut a long text: behind a line, else behind a character."""
    end = buffer.rfind(b"\n", start, start + PIECE) + 1
    if end <= start:
        end = start + PIECE
        while buffer[end] & 0xC0 == 0x80 and end > start + PIECE - 4:  # within a character of UTF-8
            end -= 1
    return end
