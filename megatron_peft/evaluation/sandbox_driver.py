"""What runs inside the sandbox, as two processes: one runs the program, the other is its judge.

A script of its own, with the standard library only: it is never imported. The judge reads one JSON object from stdin:
the program's code, its check, the users to become, the limits by their names in `resource`, and how many files /tmp may
hold. It writes the verdict to stdout; what the program prints goes to stderr.

Code that a model wrote can do anything to the interpreter that runs it: read frames, patch builtins, exit. So the check
runs in the judge. There `candidate(function, *arguments)` sends a call to the program's process, and only plain values
come back. The judge forks that process before it reads the job, so neither the check nor the pipe of the verdict is
anywhere in it.
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

TYPE_CHECKING = False
if TYPE_CHECKING:  # it starts with every program, so it imports no more than it runs
    from collections.abc import Callable, Iterator
    from typing import Any, BinaryIO

MAX_DETAIL = 300  # characters of an exception that are worth keeping
MAX_ANSWER_BYTES = 16 << 20
SECONDS_BETWEEN_COUNTS = 0.05  # of the files in /tmp, while the program runs
SEQUENCES = {kind.__name__: kind for kind in (list, tuple, set, frozenset)}
EXACT_NUMBERS = {"Fraction": "fractions", "Decimal": "decimal"}


class Verdict(BaseException):
    """What the judge says when there is nothing more to hear from the program; no check catches it by accident."""


class Other:
    """A result that is no plain value: it equals nothing else, whatever its class says; it may be iterable."""

    def __init__(self, items: Any) -> None:
        self.items = items

    def __iter__(self) -> Iterator:
        return iter(self.items)  # a TypeError, where it was not iterable


def encode(value: Any) -> Any:
    """A value as JSON. Subclasses go as their base, and numpy's scalars as Python's."""
    if getattr(value, "ndim", None) == 0:
        value = value.item()
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return ["int", hex(value)]  # a decimal may have no more than 4300 digits
    if isinstance(value, float):
        return ["float", float.hex(value)]
    if isinstance(value, complex):
        return ["complex", [float.hex(value.real), float.hex(value.imag)]]
    if isinstance(value, (bytes, bytearray)):
        return ["bytes", value.hex()]
    if isinstance(value, dict):
        return ["dict", [[encode(key), encode(item)] for key, item in value.items()]]
    for name, kind in SEQUENCES.items():
        if isinstance(value, kind):
            return [name, [encode(item) for item in value]]
    name = type(value).__name__
    if EXACT_NUMBERS.get(name) == type(value).__module__:
        return [name, str(value)]
    return ["other", [encode(item) for item in value] if hasattr(value, "__iter__") else None]


def decode(told: Any) -> Any:
    """The value that `encode` made JSON of. It comes from a process that may send anything, so it makes no object but
    those named here."""
    if told is None or isinstance(told, (bool, str)):
        return told
    kind, content = told
    if kind == "int":
        return int(content, 16)
    if kind == "float":
        return float.fromhex(content)
    if kind == "complex":
        return complex(*map(float.fromhex, content))
    if kind == "bytes":
        return bytes.fromhex(content)
    if kind == "dict":
        return {decode(key): decode(item) for key, item in content}
    if kind in SEQUENCES:
        return SEQUENCES[kind](map(decode, content))
    if kind in EXACT_NUMBERS:
        return getattr(importlib.import_module(EXACT_NUMBERS[kind]), kind)(content)
    return Other(content and [decode(item) for item in content])


def error_of(name: str, text: str) -> Exception:
    """An exception of that name: a kind of Python's own of the name, so that a check may expect it."""
    base = getattr(builtins, name, None)
    kind = base if isinstance(base, type) and issubclass(base, Exception) else Exception
    named: Any = type(name, (kind,), {"__init__": lambda self: None, "__str__": lambda self: text})
    return named()


def confine(user: int, limits: dict[str, tuple[int, int]]) -> None:
    """Becomes `user` (where it is root), then takes the limits, which it cannot raise again."""
    if user and os.getuid() == 0:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, name), value)


def read_nothing() -> None:
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)


def flush() -> None:
    """What was printed is kept, if the program left its standard output as it was."""
    try:
        sys.stdout.flush()
    except BaseException:
        pass


def serve(asked: BinaryIO, answers: BinaryIO) -> None:
    """The program's process: runs the code, then its functions as they are asked for.

    Whatever the code leaves behind (threads, buffers, exit handlers) is not waited for.
    """
    process = os.getpid()

    def answer(function: Callable[..., Any], *arguments: Any) -> None:
        try:
            told = json.dumps({"value": encode(function(*arguments))})
        except BaseException as error:
            told = json.dumps({"error": [type(error).__name__, str(error)[:MAX_DETAIL]]})
        flush()
        if os.getpid() != process:  # a fork of the program's that came back here
            os._exit(0)
        answers.write(told.encode() + b"\n")
        answers.flush()

    job = json.loads(asked.readline())
    confine(job["user"], job["limits"])
    namespace = {"__name__": "__program__"}
    answer(lambda: exec(compile(job["code"], "<program>", "exec"), namespace))
    for line in asked:
        name, arguments = json.loads(line)
        answer(lambda *given, name=name: eval(name, namespace)(*given), *map(decode, arguments))


class Program:
    """The program's process, as the judge sees it."""

    def __init__(self, process: int, ask: BinaryIO, answers: int, max_files: int | None) -> None:
        self.process, self.ask, self.answers, self.max_files = process, ask, answers, max_files
        self.unread = bytearray()

    def load(self, job: dict[str, Any]) -> None:
        self._result(job)

    def call(self, function: str, *arguments: Any) -> Any:
        return self._result([function, [encode(argument) for argument in arguments]])

    def _result(self, message: Any) -> Any:
        try:
            self.ask.write(json.dumps(message).encode() + b"\n")
            self.ask.flush()
        except BrokenPipeError:
            pass  # reading says what became of it
        told = json.loads(self._line())
        if "error" in told:
            raise error_of(*map(str, told["error"]))
        return decode(told["value"])

    def _line(self) -> bytes:
        searched = 0
        while True:
            self._count_files()  # no answer is believed before that
            end = self.unread.find(b"\n", searched)
            if end >= 0:
                line = bytes(self.unread[:end])
                del self.unread[: end + 1]
                return line
            searched = len(self.unread)
            if not select.select([self.answers], [], [], SECONDS_BETWEEN_COUNTS)[0]:
                continue
            piece = os.read(self.answers, 1 << 20)
            if not piece:
                raise Verdict(self._how_it_ended())
            self.unread += piece
            if len(self.unread) > MAX_ANSWER_BYTES:
                raise Verdict(f"failed: an answer of more than {MAX_ANSWER_BYTES} bytes")

    def _count_files(self) -> None:
        """Inodes are memory that no limit of a process counts, and bwrap has no flag for those of a tmpfs."""
        if self.max_files:
            tmp = os.statvfs("/tmp")
            if tmp.f_files - tmp.f_ffree > self.max_files:
                raise Verdict(f"failed: more than {self.max_files} files in /tmp")

    def _how_it_ended(self) -> str:
        code = os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])
        return "timeout" if code == -signal.SIGXCPU else f"failed: ended by itself (code {code})"


def judge(program: Program, job: dict[str, Any]) -> str:
    """'passed', or 'failed: ' and why, or 'timeout'. An exit is a failure too: the check comes last."""
    try:
        program.load({"code": job["code"], "user": job["user"], "limits": job["limits"]})
        exec(compile(job["check"], "<check>", "exec"), {"__name__": "__check__", "candidate": program.call})
    except Verdict as verdict:
        return str(verdict)
    except BaseException as error:
        return f"failed: {type(error).__name__}: {error}"[:MAX_DETAIL]
    return "passed"


def main() -> None:
    (asked, ask), (answers, answer) = os.pipe(), os.pipe()
    process = os.fork()
    if process == 0:
        try:
            os.dup2(2, 1)
            read_nothing()
            os.close(ask)
            os.close(answers)
            serve(os.fdopen(asked, "rb"), os.fdopen(answer, "wb"))
        finally:
            os._exit(1)
    os.close(asked)
    os.close(answer)
    job = json.load(sys.stdin)
    verdict_to = os.dup(1)
    os.dup2(2, 1)  # a check may print
    read_nothing()
    confine(job["judge"], job["limits"])
    verdict = judge(Program(process, os.fdopen(ask, "wb"), answers, job["max_files"]), job)
    flush()
    os.write(verdict_to, verdict.encode("utf-8", "replace"))
    os._exit(0)


main()
