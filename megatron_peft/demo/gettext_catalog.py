"""Reads GNU gettext's compiled catalogs (.mo).

The standard library's reader drops the English plural of a message; this one keeps singular and plural as two pairs.
"""

import struct
from collections.abc import Iterator

from megatron_peft.config import ConfigurationError

MAGIC = 0x950412DE
CONTEXT_END = "\x04"  # "context\x04message"
PLURAL_SEPARATOR = "\0"  # "singular\0plural"


def read_messages(catalog: bytes) -> Iterator[tuple[str, str]]:
    """(English, translation) of every message, without its context; singular and plural apart.

    Raises ConfigurationError when the bytes are not a catalog.
    """
    for original, translation in _entries(catalog):
        originals = original.split(CONTEXT_END)[-1].split(PLURAL_SEPARATOR)
        translations = translation.split(PLURAL_SEPARATOR)
        if not originals[0]:
            continue  # the header
        yield originals[0], translations[0]
        if len(originals) == 2:
            yield originals[1], translations[-1]  # the last form is that of many


def _entries(catalog: bytes) -> Iterator[tuple[str, str]]:
    """The (original, translation) strings of the file's two tables of (length, offset)."""
    try:
        order = "<" if struct.unpack_from("<I", catalog)[0] == MAGIC else ">"
        magic, _, count, originals_at, translations_at = struct.unpack_from(order + "5I", catalog)
        if magic != MAGIC:
            raise ValueError(f"magic number {magic:#x}")
        for index in range(count):
            original, translation = (
                _text(catalog, *struct.unpack_from(order + "2I", catalog, table + 8 * index))
                for table in (originals_at, translations_at)
            )
            yield original, translation
    except (struct.error, ValueError) as error:
        raise ConfigurationError(f"not a compiled gettext catalog (.mo): {error}.") from error


def _text(catalog: bytes, length: int, offset: int) -> str:
    if offset + length > len(catalog):
        raise ValueError(f"a message ends at byte {offset + length} of {len(catalog)}")
    return catalog[offset : offset + length].decode("utf-8")
