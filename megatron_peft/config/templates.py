"""Templates of Jinja from outside, chat templates and those of tasks, rendered by a process of their own with limits.

`template_process` has the environments and the script. It starts with the first rendering and ends with this process.
"""

import marshal
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megatron_peft.config.errors import ConfigurationError, require

# Of one rendering. Templates in use need a millisecond and a megabyte; the longest texts have a million tokens.
SECONDS = 2.0  # of computing
MEMORY_BYTES = 512 << 20
MOST_CHARACTERS = 4 << 20  # of the rendered text
MOST_TEMPLATE_CHARACTERS = 1 << 18

_SCRIPT = Path(__file__).with_name("template_process.py")
# The packages that it needs, without a search of all that is installed, which would take longer than their import.
_START = "import runpy, sys; folders, script, *sys.argv[1:] = sys.argv[1:]; sys.path += folders.split(':'); "
_START += "runpy.run_path(script, run_name='__main__')"


class _Renderer:
    """The process, which is started again where it was ended by a limit, and by a fork of this process for itself."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._endless: set[tuple[str, str]] = set()

    def render(self, kind: str, template: str, values: Mapping[str, Any]) -> str:
        with self._lock:
            tried = (kind, template) in self._endless
            answer, text = (b"S", "") if tried else self._ask(marshal.dumps((kind, template, _plain(values))))
        if answer == b"T":
            return text
        if answer == b"S":
            self._endless.add((kind, template))
        faults = {
            b"L": f"writes more than {MOST_CHARACTERS:,} characters, the limit of a text: let it write less.",
            b"M": f"needs more than {MEMORY_BYTES >> 20} MiB of memory, the limit of a text: let it make less.",
            b"S": f"has not come to an end in {SECONDS:g} s of computing, the limit of a text: simplify its loops.",
        }
        raise ConfigurationError(f"it {faults[answer]}" if answer in faults else text)

    def _ask(self, asked: bytes) -> tuple[bytes, str]:
        process, self._process = self._process or _start(), None  # where Ctrl-C comes between, its answer is not read
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(len(asked).to_bytes(8) + asked)
            process.stdin.flush()
        except BrokenPipeError:
            pass  # what it ended with is told below
        if answer := process.stdout.read(1):
            text = process.stdout.read(int.from_bytes(process.stdout.read(8)))
            self._process = process
            return answer, text.decode("utf-8", "surrogatepass")
        ended = process.wait()
        if ended == -signal.SIGPROF:
            return b"S", ""
        raise ConfigurationError(f"the process that renders it has ended with {ended}, perhaps for want of memory.")


def render(kind: str, template: str, values: Mapping[str, Any]) -> str:
    """The text that a template of a "chat" or of a "task" makes of `values`, of which it gets plain copies; or, as
    "inputs", JSON of the variables that a template of a "chat" reads, and of the fields that it may.

    Raises ConfigurationError: the template's own fault, or the limit that it passes.
    """
    require_short(template)
    return _RENDERER.render(kind, template, values)


def require_short(template: str) -> None:
    """Raises ConfigurationError for one that would take seconds to parse."""
    most = MOST_TEMPLATE_CHARACTERS
    require(len(template) <= most, f"it has {len(template):,} characters, above the limit of a template, {most:,}.")


def _start() -> subprocess.Popen[bytes]:
    specs = [find_spec(name) for name in ("jinja2", "markupsafe")]
    folders = ":".join(str(Path(spec.origin).parents[1]) for spec in specs if spec and spec.origin)
    limits = map(str, (SECONDS, MEMORY_BYTES, MOST_CHARACTERS))
    words = [sys.executable, "-I", "-S", "-B", "-c", _START, folders, str(_SCRIPT), *limits]
    return subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def _plain(value: Any) -> Any:
    """A copy without objects, whose methods a template could call."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {_plain(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_plain, value)) if type(value) in (list, tuple) else [*map(_plain, value)]
    return _plain(value.tolist()) if hasattr(value, "tolist") else str(value)


_RENDERER = _Renderer()
os.register_at_fork(after_in_child=_RENDERER.__init__)
