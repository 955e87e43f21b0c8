"""The manifest of a checkpoint: size and checksum of every file, so that a torn or changed one is found and named.

    manifest.json   {"format_version": 1, "files": {"__0_0.distcp": {"size": 12345, "crc32": "89abcdef"}, ...},
                     "crc32_of_files": "01234567"}

CRC-32 finds every change within any 32 bits in a row, hence every flipped byte; it guards against accidents, not
against somebody who means harm. The manifest guards itself: its text must be exactly what its contents are written as,
and it holds the checksum of its list.
"""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from megatron_peft.config import ConfigurationError
from megatron_peft.config.untrusted import parse_json, read_text, require_regular

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
_CHUNK_BYTES = 4 * 1024 * 1024


class FileSum(NamedTuple):
    """What a file is recognised by: its size in bytes and the CRC-32 of all of them, as eight hexadecimal digits."""

    size: int
    crc32: str


def measure(path: Path) -> FileSum:
    """Read a file whole. Raises OSError if it cannot be read."""
    size, crc = 0, 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            size, crc = size + len(chunk), zlib.crc32(chunk, crc)
    return FileSum(size, f"{crc:08x}")


def write_manifest(folder: Path, known: Mapping[str, FileSum]) -> None:
    """List all files of `folder`. Those that are `known` (by name; their writers measured them) are not read again."""
    paths = (path for path in sorted(folder.iterdir()) if path.name != MANIFEST)
    files = {path.name: known.get(path.name) or measure(path) for path in paths}
    (folder / MANIFEST).write_text(_text(files))


def read_manifest(folder: Path) -> dict[str, FileSum]:
    """{file name: sum}. Raises OSError if it cannot be read, ValueError if it is not as it was written."""
    text = read_text(folder / MANIFEST)
    try:
        files = {
            name: FileSum(entry["size"], entry["crc32"]) for name, entry in parse_json(text, MANIFEST)["files"].items()
        }
    except (ConfigurationError, AttributeError, KeyError, TypeError) as error:
        raise ValueError("it is no manifest") from error
    odd = [name for name, (size, _) in files.items() if type(size) is not int or size < 0 or name != Path(name).name]
    if odd:
        raise ValueError(f"it lists {odd[0]!r}, which is no file of that folder, or has no size")
    if text != _text(files):
        raise ValueError("it is not as it was written")
    return files


def damage(checkpoint: Path, share: int = 0, num_shares: int = 1) -> list[str]:
    """What is wrong with a checkpoint's files, each named; empty if all of them are whole.

    Args:
        checkpoint: an iteration's folder.
        share, num_shares: of the files, the largest dealt out first: each rank checks its own share.
    """
    try:
        files = read_manifest(checkpoint)
    except (OSError, ValueError) as error:
        return [f"{MANIFEST} cannot be read: {error}"]
    by_size = sorted(files, key=lambda name: (-files[name].size, name))
    problems = (_damage_of(checkpoint / name, files[name]) for name in by_size[share::num_shares])
    return [problem for problem in problems if problem]


def _damage_of(path: Path, expected: FileSum) -> str:
    try:
        size = path.stat().st_size
        require_regular(path)
        if size != expected.size:
            return f"{path.name} has {size} bytes instead of {expected.size}"
        found = measure(path)
    except FileNotFoundError:
        return f"{path.name} is missing"
    except (OSError, ConfigurationError) as error:
        return f"{path.name} cannot be read: {error}"
    return "" if found == expected else f"{path.name} has other bytes than were written"


def _text(files: Mapping[str, FileSum]) -> str:
    listed = {name: entry._asdict() for name, entry in sorted(files.items())}
    crc = zlib.crc32(json.dumps(listed).encode())
    return json.dumps({"format_version": FORMAT_VERSION, "files": listed, "crc32_of_files": f"{crc:08x}"}, indent=1)
