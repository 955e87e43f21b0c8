"""The commands and files of a Markdown page, in order.

A fenced block of `sh` is run, and so are the lines of a `console` block that begin with `$ `. A block of another
language whose first line is a comment with a file's name, `# run.yaml`, is that file. A block below the comment
`<!-- not run: REASON -->` is neither.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)
_NOT_RUN = re.compile(r"<!-- not run: ([^>]+) -->\s*\Z")
_FILE = re.compile(r"\A# ([\w-]+\.\w+)\n")


@dataclass(frozen=True)
class Block:
    """A block of a page that is run or written.

    Args:
        place: `README.md, line 7`.
        text: commands for a shell, or the contents of the file.
        file: its name; empty for commands.
        not_run: why the block is left alone; empty otherwise.
    """

    place: str
    text: str
    file: str = ""
    not_run: str = ""


def blocks_of(page: Path, name: str) -> Iterator[Block]:
    """The blocks of a page that are commands or files, also those that are not to be run.

    Args:
        name: of the page, for `Block.place`.
    """
    text = page.read_text(encoding="utf-8")
    for found in _FENCE.finditer(text):
        language, content = found.groups()
        place = f"{name}, line {text.count(chr(10), 0, found.start()) + 1}"
        reason = _NOT_RUN.search(text, 0, found.start())
        not_run = reason.group(1) if reason else ""
        file = _FILE.match(content)
        if language == "sh":
            yield Block(place, content, not_run=not_run)
        elif language == "console":
            typed = [line.removeprefix("$ ") for line in content.splitlines() if line.startswith("$ ")]
            yield Block(place, "\n".join(typed) + "\n", not_run=not_run)
        elif file:
            yield Block(place, content, file.group(1), not_run)
