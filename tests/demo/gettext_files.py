"""Compiled gettext catalogs for tests."""

from __future__ import annotations

import struct

from megatron_peft.demo.gettext_catalog import MAGIC


def compile_catalog(messages: dict[str, str], order: str = "<") -> bytes:
    """A .mo file, laid out as msgfmt does: header, two tables of (length, offset), the strings."""
    originals, translations = list(messages), list(messages.values())
    tables, strings, offset = b"", b"", 28 + 16 * len(messages)
    for text in originals + translations:
        data = text.encode()
        tables += struct.pack(order + "2I", len(data), offset + len(strings))
        strings += data + b"\0"
    header = struct.pack(order + "7I", MAGIC, 0, len(messages), 28, 28 + 8 * len(messages), 0, 0)
    return header + tables + strings
