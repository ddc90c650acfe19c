"""A document as it was read, and its text."""

import json
from typing import Any, Literal, NamedTuple

from flashlab.errors import UserError

Undecodable = Literal["refuse", "replace"]


class Document(NamedTuple):
    """A document as it was read: `kind` says what `raw` is, `where` and `place` where it stood."""

    raw: bytes
    kind: Literal["text", "json", "row"]  # a text, a line of a JSONL file, the text of a row
    where: str
    place: int  # first byte, line, row

    def text(self, field: str, undecodable: Undecodable) -> str:
        """Return its text.

        Raises:
            UserError: it is not UTF-8, or a line without a text in `field`; the message names file and place.
        """
        if self.kind != "json":
            return _decode(self.raw, undecodable, self.where, self.place)
        line = f"{self.where}:{self.place}"
        text = _decode(self.raw, undecodable, line, 0)
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{line} is not JSON ({error}); every line must be a JSON object") from None
        text = text_of_row(row, field, line)
        try:
            text.encode()
        except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell and UTF-8 cannot
            if undecodable == "refuse":
                raise UserError(
                    f"{line} holds half of a surrogate pair, which is no text; take --undecodable replace"
                ) from None
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return text


def text_of_row(row: Any, field: str, where: str) -> str:
    """Return the text of a row.

    Raises:
        UserError: it has none in that field.
    """
    if not isinstance(row, dict):
        raise UserError(f"{where} is not a JSON object, but {json.dumps(row)[:60]}; every line must be one")
    if not isinstance(text := row.get(field), str):
        has = "is not text" if field in row else f"is missing; there is {', '.join(map(str, row)) or 'nothing'}"
        raise UserError(f"{where}: the field {field!r} {has[:200]}; name the one with the text as --field")
    return text


def _decode(raw: bytes, undecodable: Undecodable, where: str, offset: int) -> str:
    try:
        return raw.decode("utf-8", "strict" if undecodable == "refuse" else "replace").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: byte {offset + error.start:,} is not UTF-8 (0x{raw[error.start]:02x}); convert the file, or "
            "take --undecodable replace"
        ) from None
