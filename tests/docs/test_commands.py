"""The commands that the README and the pages show work, in this order, in a fresh folder with an empty HOME.

A fenced block of `sh` is run, and so are the lines of a `console` block that begin with `$ `. A block of another
language whose first line is a comment with a file's name, `# run.yaml`, is that file. A block below the comment
`<!-- not run: REASON -->` is neither.
"""

import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.time_limits import seconds

FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)
NOT_RUN = re.compile(r"<!-- not run: ([^>]+) -->\s*\Z")
FILE = re.compile(r"\A# ([\w-]+\.\w+)\n")


class Block(NamedTuple):
    """A block of a page that is run or written."""

    place: str  # `README.md, line 7`
    text: str  # commands for a shell, or the contents of the file
    file: str = ""  # its name; empty for commands
    not_run: str = ""  # why it is left alone; empty otherwise


def blocks_of(page: Path, name: str) -> Iterator[Block]:
    """The blocks of a page that are commands or files, also those that are not to be run."""
    text = page.read_text(encoding="utf-8")
    for found in FENCE.finditer(text):
        language, content = found.groups()
        place = f"{name}, line {text.count(chr(10), 0, found.start()) + 1}"
        reason, file = NOT_RUN.search(text, 0, found.start()), FILE.match(content)
        not_run = reason.group(1) if reason else ""
        if language == "sh":
            yield Block(place, content, not_run=not_run)
        elif language == "console":
            typed = [line.removeprefix("$ ") for line in content.splitlines() if line.startswith("$ ")]
            yield Block(place, "\n".join(typed) + "\n", not_run=not_run)
        elif file:
            yield Block(place, content, file.group(1), not_run)


ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [block for page in PAGES for block in blocks_of(page, str(page.relative_to(ROOT)))]
LIMIT_SECONDS = 3600
DEMO_CPU_SECONDS = 240  # of all its processes, set-up aside
KEPT_VARIABLES = ("PATH", "LANG", "TMPDIR", "SSL_", "REQUESTS_", "PIP_", "UV_", "http", "HTTP", "no_proxy", "NO_PROXY")


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """The files of this tree as a fresh clone has them, with the environment that `make install` would make."""
    folder = tmp_path_factory.mktemp("clone") / "megatron-peft"
    words = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("this tree is no clone, so its files are not known")
    for name in filter(None, listed.stdout.split("\0")):
        source = ROOT / name
        if source.is_file() and name != ".venv":
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, folder / name)
    (folder / ".venv").symlink_to(sys.prefix)
    # Older than the environment, which must not be made to point here.
    for path in (folder / "pyproject.toml", folder / "setup.py", *(folder / "requirements").iterdir()):
        os.utime(path, (0, 0))
    return folder


@pytest.fixture(scope="module")
def environment(clone) -> dict[str, str]:
    """Of a new user: nothing of this process but where programs are and how the network is reached."""
    home = clone.parent / "home"
    home.mkdir()
    kept = {name: value for name, value in os.environ.items() if name.startswith(KEPT_VARIABLES)}
    path = [folder for folder in kept["PATH"].split(os.pathsep) if not folder.startswith(sys.prefix)]
    # The environment may have been installed from another tree, whose package would be found first.
    return {**kept, "PATH": os.pathsep.join(path), "HOME": str(home), "PYTHONPATH": str(clone)}


@pytest.mark.docs
@pytest.mark.timeout(seconds(LIMIT_SECONDS))
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.place)
def test_what_a_page_shows_works(clone, environment, block) -> None:
    if block.not_run:
        pytest.skip(block.not_run)
    if block.file:
        (clone / block.file).write_text(block.text, encoding="utf-8")
        return
    commands = block.text.replace("make test\n", "")  # which runs by itself, for longer than all of them
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    shell = ["bash", "-euo", "pipefail", "-c", commands]
    done = subprocess.run(shell, cwd=clone, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    print(done.stdout[-4000:], done.stderr[-4000:], sep="\n")
    assert done.returncode == 0, f"{block.place} ended with exit code {done.returncode}:\n{block.text}"
    if "make demo" in commands:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        taken = used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime
        assert taken <= seconds(DEMO_CPU_SECONDS), f"the demo took {taken:.0f} CPU seconds"


PAGE = """
```sh
make install
```

```yaml
# run.yaml
lr: 1
```

```yaml
lr: 2
```

<!-- not run: it needs a cluster -->
```sh
sbatch x
```

```console
$ echo a
a
$ echo b
```
"""


def test_commands_and_files_of_a_page_are_found(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text(PAGE)
    assert [*blocks_of(tmp_path / "page.md", "page.md")] == [
        Block("page.md, line 2", "make install\n"),
        Block("page.md, line 6", "# run.yaml\nlr: 1\n", file="run.yaml"),
        Block("page.md, line 16", "sbatch x\n", not_run="it needs a cluster"),
        Block("page.md, line 20", "echo a\necho b\n"),
    ]


def test_the_first_screen_has_commands() -> None:
    first = [block for block in BLOCKS if block.place.startswith("README.md") and not block.file]
    assert first and not first[0].not_run
