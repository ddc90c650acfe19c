"""Mistakes that are the user's to fix, stops, and what is said of other errors."""

import errno
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from socket import gethostname
from tempfile import TemporaryFile
from types import FrameType
from typing import TextIO

from filelock import FileLock, Timeout

LOCK = ".lock"
REMEDIES = {
    errno.ENOSPC: "free space there, or choose another folder",
    errno.EDQUOT: "free space there, or choose another folder",
    errno.EACCES: "permit writing there, or choose another folder",
    errno.EPERM: "permit writing there, or choose another folder",
    errno.EEXIST: "a file stands where a folder should be: choose another",
    errno.ENOTDIR: "a file stands where a folder should be: choose another",
}


class UserError(Exception):
    """A mistake in input or configuration, or a machine that lacks something.

    The message is one line that says what was wrong, where, and what to do. The command line prints it to stderr and
    exits with code 2; no traceback is shown. Anything else that escapes is a bug and keeps its traceback.
    """


class Terminated(KeyboardInterrupt):
    """SIGTERM came."""


@contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM stop what runs as Ctrl-C does, so that processes are ended and temporary folders taken away."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise Terminated

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the file system refuses while `path` is written into a `UserError` that names it.

    Raises:
        UserError: the disk is full, the folder is not writable, or a file stands where a folder should be.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:  # not the system's: EOFError's kin, a library's own
            raise
        remedy = REMEDIES.get(error.errno, "choose another folder")
        raise UserError(f"cannot write {path}: {error.strerror}; {remedy}") from error


@contextmanager
def making(folder: Path) -> Iterator[None]:
    """Make a folder where it is missing; what was made is taken away again if nothing came to be in it.

    Raises:
        OSError: the file system refuses it.
    """
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        with suppress(OSError):
            for path in created:
                path.rmdir()  # refused where there is something in it


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a file whole or not at all: gives the name to write to, in a folder that is made where it is missing.

    The name is nobody else's: processes of containers that share a folder may have one number, but not one host name.

    Raises:
        UserError: as of `writing`.
    """
    partial = path.with_name(f".{path.name}.{gethostname()}-{os.getpid()}.partial")
    with writing(path), making(path.parent):
        try:
            yield partial
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def check_writable(option: str, path: Path) -> None:
    """Make sure that a file can be written, not after minutes of work; nothing is left there.

    Args:
        option: that names it.
        path: the file.

    Raises:
        UserError: it is a folder, or as of `writing`.
    """
    with writing(path):
        if path.is_dir():
            raise UserError(f"{option} {path} is a folder: name a file")
        with making(path.parent):
            TemporaryFile(dir=path.parent).close()


@contextmanager
def alone_in(folder: Path, busy: str) -> Iterator[None]:
    """Make a folder as `making` does, and keep every other process that asks out of it, in other containers too.

    Args:
        folder: where they write.
        busy: what to say to the second: a verb, and the remedy.

    Raises:
        UserError: somebody is there, or as of `writing`.
    """
    lock = FileLock(folder / LOCK)
    with ExitStack() as made:
        with writing(folder):
            made.enter_context(making(folder))
            try:
                lock.acquire(timeout=0)
            except Timeout:
                raise UserError(f"{folder} {busy}") from None
        try:
            yield
        finally:
            with suppress(OSError):
                if all(path.name == LOCK for path in folder.iterdir()):
                    (folder / LOCK).unlink(missing_ok=True)
            lock.release()


def write_text(path: Path, text: str) -> None:
    """Write a text as `replacing` does."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def print_now(text: str, *, end: str = "\n", file: TextIO | None = None) -> bool:
    """Print at once; say whether somebody still reads. Once nobody does (`| head`), nothing is printed any more.

    Raises:
        UserError: what is printed cannot be written, as to a full disk.
    """
    file = file or sys.stdout
    try:
        print(text, end=end, file=file, flush=True)
        return True
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())  # for what Python flushes as it ends
        if isinstance(error, BrokenPipeError):
            return False
        raise UserError(f"cannot write standard output: {error.strerror}; redirect it elsewhere") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Tell memory that ran out, of a GPU or of the machine, from other failures."""
    said = f"{type(error).__name__}: {error}".lower()
    marks = ("memoryerror", "out of memory", "can't allocate memory", "alloc_failed", "not enough memory")
    return any(mark in said for mark in marks)


@contextmanager
def enough_memory(remedy: str) -> Iterator[None]:
    """Turn memory that ran out into a `UserError`, which ends with what to do.

    Raises:
        UserError: it ran out.
    """
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise UserError(f"the memory does not suffice ({one_line(error)}); {remedy}") from error
        raise


def one_line(error: BaseException) -> str:
    """Shorten an error to one line: its type and what it says."""
    said = " ".join(str(error).split())
    return f"{type(error).__name__}: {said if len(said) <= 300 else said[:299] + '…'}"
