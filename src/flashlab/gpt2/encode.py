"""Documents to tokens in several processes, in order.

Which part a document belongs to is decided by the hash of its text alone: no order, no process and no other document
changes it, and equal documents are never in both parts.
"""

import hashlib
import os
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from flashlab.errors import UserError
from flashlab.gpt2.documents import Document, Undecodable
from flashlab.gpt2.tokenizer import Tokenizer
from flashlab.worker import Worker, WorkerLost

T = TypeVar("T")


class Encoded(NamedTuple):
    """Tokens of some documents by part: each document's, then an end of text; and how many documents there were."""

    tokens: dict[str, np.ndarray]
    documents: dict[str, int]
    text_bytes: int


@dataclass(frozen=True)
class Encoder:
    """Turns documents into tokens.

    Args:
        tokenizer: that numbers their texts.
        validation: share of the documents for the validation part.
        field: of JSON lines, which holds the text.
        undecodable: what to do about bytes that are no text.
    """

    tokenizer: Tokenizer
    validation: float
    field: str
    undecodable: Undecodable

    def __call__(self, documents: list[Document]) -> Encoded:
        """Encode documents; those without any text are left out.

        Raises:
            UserError: one cannot be read; the first such.
        """
        end = np.array([self.tokenizer.end_of_text], self.tokenizer.dtype)
        pieces: dict[str, list[np.ndarray]] = {"train": [end[:0]], "validation": [end[:0]]}
        size = 0
        for document in documents:
            text = document.text(self.field, self.undecodable)
            if text.strip():
                size += len(raw := text.encode())
                part = "validation" if is_validation(raw, self.validation) else "train"
                pieces[part] += [self.tokenizer.encode(text), end]
        return Encoded(
            {part: np.concatenate(arrays) for part, arrays in pieces.items()},
            {part: len(arrays) // 2 for part, arrays in pieces.items()},
            size,
        )


def is_validation(text: bytes, share: float) -> bool:
    """Say whether a document belongs to the validation part: by its hash, a number below 1."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest()) < share * 2**64


def encode_in_order(
    batches: Iterator[tuple[list[Document], T]], encoder: Encoder, processes: int
) -> Generator[tuple[Encoded, T], None, None]:
    """Encode batches in several processes, and yield them in their order, each with what came beside it.

    Close it to end the processes; they end with this one too.

    Raises:
        UserError: a document cannot be read, the first such, after all that is before it; or a process was killed.
    """
    workers: list[Worker] = []
    try:
        workers = [Worker(Path(os.devnull)) for _ in range(processes)]
        for worker in workers:
            worker.send(_begin, encoder)
        for worker in workers:
            worker.receive()
        yield from _in_order(batches, workers)
    except WorkerLost as error:
        raise UserError(
            f"a process that encodes text was lost ({error}), most likely for lack of memory; run the command again "
            "with fewer --processes or smaller --shard_bytes: what is done is kept"
        ) from error
    finally:
        for worker in workers:
            worker.stop()


def _in_order(batches: Iterator[tuple[list[Document], T]], workers: list[Worker]) -> Iterator[tuple[Encoded, T]]:
    free, busy = list(workers), dict[Any, tuple[Worker, int]]()  # by connection: the worker, and its batch
    beside, finished = list[T](), dict[int, Encoded | UserError]()
    begun, done, ended = 0, 0, False
    while True:
        while free and not ended and begun - done < 2 * len(workers):
            try:
                documents, place = next(batches, (None, None))
            except UserError as error:
                documents, finished[begun], ended = None, error, True
            if documents is None or place is None:
                ended = True
                break
            beside.append(place)
            (worker := free.pop()).send(_encode, documents)
            busy[worker.connection] = worker, begun
            begun += 1
        if done in finished:
            if isinstance(answer := finished.pop(done), UserError):
                raise answer
            yield answer, beside[done]
            done += 1
        elif not busy:
            return
        else:
            for connection in wait(list(busy)):
                worker, number = busy.pop(connection)
                free.append(worker)
                try:
                    finished[number] = worker.receive()
                except UserError as error:
                    finished[number] = error


_encoder: Encoder


def _begin(encoder: Encoder) -> None:
    global _encoder
    _encoder = encoder


def _encode(documents: list[Document]) -> Encoded:
    return _encoder(documents)
