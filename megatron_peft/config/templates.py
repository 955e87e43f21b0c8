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
            answer, text = ("S", "") if tried else self._ask((kind, template, _plain(values)))
        if answer == "S":
            self._endless.add((kind, template))
        faults = {
            "L": f"it writes more than {MOST_CHARACTERS:,} characters, the limit of a text: let it write less.",
            "M": f"it needs more than {MEMORY_BYTES >> 20} MiB of memory, the limit of a text: let it make less.",
            "S": f"it has not come to an end in {SECONDS:g} s of computing, the limit of a text: simplify its loops.",
        }
        require(answer == "T", faults.get(answer, text))
        return text

    def _ask(self, request: tuple[str, str, Any]) -> tuple[str, str]:
        process, self._process = self._process or _start(), None  # where Ctrl-C comes between, its answer is not read
        assert process.stdin is not None and process.stdout is not None
        try:
            marshal.dump(request, process.stdin)
            process.stdin.flush()
            answer = marshal.load(process.stdout)
        except (BrokenPipeError, EOFError) as error:
            ended = process.wait()
            if ended == -signal.SIGPROF:
                return "S", ""
            raise ConfigurationError(
                f"the process that renders it has ended with {ended}, perhaps for want of memory."
            ) from error
        self._process = process
        return answer


def render(kind: str, template: str, values: Mapping[str, Any]) -> str:
    """The text that a template of a "chat" or of a "task" makes of `values`, of which it gets plain copies; or, as
    "inputs", JSON of the variables that a template of a "chat" reads, and of the fields that it may.

    Raises ConfigurationError: the template's own fault, or the limit that it passes.
    """
    size, most = len(template), MOST_TEMPLATE_CHARACTERS  # a longer one would take seconds to parse
    require(size <= most, f"it has {size:,} characters, above the limit of a template, {most:,}.")
    return _RENDERER.render(kind, template, values)


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
        return tuple(map(_plain, value)) if type(value) is tuple else [*map(_plain, value)]
    return _plain(value.tolist()) if hasattr(value, "tolist") else str(value)


_RENDERER = _Renderer()
os.register_at_fork(after_in_child=_RENDERER.__init__)
