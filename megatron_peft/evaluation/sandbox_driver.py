"""The script inside the sandbox, with the standard library only: one process runs the program, another judges it.

The judge reads a JSON object from stdin: code, check, user ids, limits by their names in `resource`, and the number of
files that /tmp may hold. It writes the verdict to stdout; what the program prints goes to stderr.

Code that a model wrote can read frames, patch builtins or exit, so the check runs in the judge's process, where
`candidate(function, *arguments)` sends a call to the program's process and gets plain values back.
"""

from __future__ import annotations

import builtins
import importlib
import json
import os
import resource
import select
import signal
import sys
from contextlib import suppress

TYPE_CHECKING = False
if TYPE_CHECKING:  # the script starts with every program: it imports only what it needs
    from collections.abc import Callable, Iterator
    from typing import Any, BinaryIO

MAX_DETAIL = 300  # characters of an exception
MAX_ANSWER_BYTES = 16 << 20
SECONDS_BETWEEN_COUNTS = 0.05  # of the files in /tmp, while the program runs
# Name in JSON -> type, to text, from text. Python limits decimals to 4300 digits.
TEXTS = {
    "int": (int, hex, lambda text: int(text, 16)),
    "float": (float, float.__repr__, float),
    "complex": (complex, complex.__repr__, complex),
    "bytes": ((bytes, bytearray), lambda value: value.hex(), bytes.fromhex),
}
COLLECTIONS = {kind.__name__: kind for kind in (list, tuple, set, frozenset, dict)}
EXACT_NUMBERS = {"Fraction": "fractions", "Decimal": "decimal"}


class Verdict(BaseException):
    """Ends the check with a verdict; not an Exception, so that the check does not catch it."""


class Other:
    """A result that is not a plain value: it equals only itself, and may be iterable."""

    def __init__(self, items: Any) -> None:
        self.items = items

    def __iter__(self) -> Iterator:
        return iter(self.items)  # TypeError if the result was not iterable


def encode(value: Any) -> Any:
    """A value as JSON; subclasses become their base class, and numpy's scalars Python's."""
    if getattr(value, "ndim", None) == 0:
        value = value.item()
    if value is None or isinstance(value, (bool, str)):
        return value
    for name, (kind, to_text, _) in TEXTS.items():
        if isinstance(value, kind):
            return [name, to_text(value)]
    for name, kind in COLLECTIONS.items():
        if isinstance(value, kind):
            return [name, [encode(item) for item in (value.items() if isinstance(value, dict) else value)]]
    name = type(value).__name__
    if EXACT_NUMBERS.get(name) == type(value).__module__:
        return [name, str(value)]
    return ["other", [encode(item) for item in value] if hasattr(value, "__iter__") else None]


def decode(encoded: Any) -> Any:
    """The inverse of `encode`. The other process may send anything, so this creates objects of these types only."""
    if encoded is None or isinstance(encoded, (bool, str)):
        return encoded
    kind, content = encoded
    if kind in TEXTS:
        return TEXTS[kind][2](content)
    if kind in COLLECTIONS:
        return COLLECTIONS[kind](map(decode, content))
    if kind in EXACT_NUMBERS:
        return getattr(importlib.import_module(EXACT_NUMBERS[kind]), kind)(content)
    return Other(content and [decode(item) for item in content])


def error_of(name: str, text: str) -> Exception:
    """An exception of this name, a subclass of Python's own exception of the name, so that a check can expect it."""
    base = getattr(builtins, name, None)
    parent = base if isinstance(base, type) and issubclass(base, Exception) else Exception
    named: Any = type(name, (parent,), {"__init__": lambda self: None, "__str__": lambda self: text})
    return named()


def confine(user: int, limits: dict[str, tuple[int, int]]) -> None:
    """Switch from root to `user`, then set the limits, which the process cannot raise again."""
    if user and os.getuid() == 0:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, name), value)


def read_nothing() -> None:
    """Make stdin empty."""
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)


def flush() -> None:
    """Flush stdout, unless the program has broken it."""
    with suppress(BaseException):
        sys.stdout.flush()


def serve(calls: BinaryIO, results: BinaryIO) -> None:
    """The program's process: runs the code, then its functions as the judge calls them."""
    process = os.getpid()

    def answer(function: Callable[..., Any], *arguments: Any) -> None:
        try:
            result = json.dumps({"value": encode(function(*arguments))})
        except BaseException as error:
            result = json.dumps({"error": [type(error).__name__, str(error)[:MAX_DETAIL]]})
        flush()
        if os.getpid() != process:  # the program has forked, and this is the child
            os._exit(0)
        results.write(result.encode() + b"\n")
        results.flush()

    job = json.loads(calls.readline())
    confine(job["user"], job["limits"])
    namespace = {"__name__": "__program__"}
    answer(lambda: exec(compile(job["code"], "<program>", "exec"), namespace))
    for line in calls:
        name, arguments = json.loads(line)
        answer(lambda *given, name=name: eval(name, namespace)(*given), *map(decode, arguments))


class ProgramProcess:
    """The judge's side of the program's process."""

    def __init__(self, process: int, calls: BinaryIO, results: int, max_files: int | None) -> None:
        self.process, self.calls, self.results, self.max_files = process, calls, results, max_files
        self.unread = bytearray()

    def ask(self, message: Any) -> Any:
        """Send a job, or a call of a function. Returns its result; raises what it raised."""
        with suppress(BrokenPipeError):  # the process has ended: `_line` raises the verdict
            self.calls.write(json.dumps(message).encode() + b"\n")
            self.calls.flush()
        result = json.loads(self._line())
        if "error" in result:
            raise error_of(*map(str, result["error"]))
        return decode(result["value"])

    def _line(self) -> bytes:
        searched = 0
        while True:
            # Counted before a result is accepted. Inodes use memory that no process limit counts, and bwrap cannot
            # limit those of a tmpfs.
            if self.max_files:
                tmp = os.statvfs("/tmp")
                if tmp.f_files - tmp.f_ffree > self.max_files:
                    raise Verdict(f"failed: more than {self.max_files} files in /tmp")
            end = self.unread.find(b"\n", searched)
            if end >= 0:
                line = bytes(self.unread[:end])
                del self.unread[: end + 1]
                return line
            searched = len(self.unread)
            if not select.select([self.results], [], [], SECONDS_BETWEEN_COUNTS)[0]:
                continue
            data = os.read(self.results, 1 << 20)
            if not data:
                code = os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])
                raise Verdict("timeout" if code == -signal.SIGXCPU else f"failed: ended by itself (code {code})")
            self.unread += data
            if len(self.unread) > MAX_ANSWER_BYTES:
                raise Verdict(f"failed: an answer of more than {MAX_ANSWER_BYTES} bytes")


def judge(program: ProgramProcess, job: dict[str, Any]) -> str:
    """The verdict: 'passed', 'failed: REASON' or 'timeout'. An exit, in the code or the check, is a failure too."""

    def candidate(function: str, *arguments: Any) -> Any:
        return program.ask([function, [encode(argument) for argument in arguments]])

    try:
        program.ask({"code": job["code"], "user": job["user"], "limits": job["limits"]})
        exec(compile(job["check"], "<check>", "exec"), {"__name__": "__check__", "candidate": candidate})
    except Verdict as verdict:
        return str(verdict)
    except BaseException as error:
        return f"failed: {type(error).__name__}: {error}"[:MAX_DETAIL]
    return "passed"


def main() -> None:
    """Check the job of standard input, and write the verdict to standard output."""
    (calls, calls_in), (results, results_in) = os.pipe(), os.pipe()
    # Fork before the job is read: the program's process must not hold the check or the pipe of the verdict.
    process = os.fork()
    if process == 0:
        try:
            os.dup2(2, 1)
            read_nothing()
            os.close(calls_in)
            os.close(results)
            serve(os.fdopen(calls, "rb"), os.fdopen(results_in, "wb"))
        finally:
            os._exit(1)  # without waiting for the program's threads, buffers and exit handlers
    os.close(calls)
    os.close(results_in)
    job = json.load(sys.stdin)
    verdict_pipe = os.dup(1)
    os.dup2(2, 1)  # the check may print
    read_nothing()
    confine(job["judge"], job["limits"])
    verdict = judge(ProgramProcess(process, os.fdopen(calls_in, "wb"), results, job["max_files"]), job)
    flush()
    os.write(verdict_pipe, verdict.encode("utf-8", "replace"))
    os._exit(0)


main()
