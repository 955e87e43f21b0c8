"""The sandboxed environments of Jinja, and the script that renders with them: jinja2 and the standard library only.

A sandbox keeps a template from Python's internals, but not from `'x' * 10**10`, or from comparing nested lists in C for
a year. The kernel does: the script limits its own memory and files, and a timer ends it in the midst of a rendering.
"""

import json
import marshal
import re
import resource
import signal
import sys
from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache, partial
from typing import Any, NoReturn

from jinja2 import StrictUndefined, Template, TemplateError, meta, nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.utils import Namespace


class _Generation(Extension):
    """transformers' tag around what the assistant writes."""

    tags = {"generation"}

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _PlainNamespace(Namespace):
    """A namespace that cannot have `__html__` and the like, which Python would call."""

    def __init__(*args: Any, **values: Any) -> None:  # no name is taken: a template may have namespace(self=...)
        Namespace.__init__(args[0])
        for name, value in dict(*args[1:], **values).items():
            args[0][name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise SecurityError(f"a namespace cannot have the attribute {name!r}")
        super().__setitem__(name, value)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


@lru_cache
def _environment(kind: str) -> ImmutableSandboxedEnvironment:
    """The environment of "chat" templates, with all that transformers gives them, or of a "task"."""
    if kind == "task":
        made = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
        made.filters["regex_replace"] = lambda text, pattern, repl, count=0: re.sub(pattern, repl, text, count=count)
    else:
        extensions = [_Generation, "jinja2.ext.loopcontrols"]
        made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        made.filters["tojson"] = partial(json.dumps, ensure_ascii=False)  # Jinja's own escapes HTML
        made.globals["raise_exception"] = _raise_exception
        made.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    made.globals["namespace"] = _PlainNamespace
    return made


@lru_cache
def _compiled(kind: str, template: str) -> Template:
    return _environment(kind).from_string(template)


def _inputs(template: str) -> str:
    """JSON: the variables that a chat template reads, and the attributes and strings of its code."""
    tree = _environment("chat").parse(template)
    texts = {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
    fields = texts | {node.attr for node in tree.find_all(nodes.Getattr)}
    # This computes what is constant: `{{ 'x' * 10**10 }}`.
    return json.dumps([sorted(meta.find_undeclared_variables(tree)), sorted(fields)])


def _answer(kind: str, template: str, values: Mapping[str, Any], most_characters: int) -> tuple[str, str]:
    """(what it is, text): rendered text, too Long, out of Memory, or another Fault and its message."""
    try:
        text = _inputs(template) if kind == "inputs" else _compiled(kind, template).render(values)
    except MemoryError:
        return "M", ""
    except Exception as error:  # noqa: BLE001 - a template is a program
        return "F", (str(error) or type(error).__name__)[:most_characters]
    return ("L", "") if len(text) > most_characters else ("T", text)


def main() -> None:
    """Answer what comes through stdin, to its end. The arguments are limits: seconds, bytes, characters of a text."""
    seconds, memory_bytes, most_characters = float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    # A run that gets one of these may go on for a while. SIGPROF, the timer's, keeps its default: the process ends.
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(ignored, signal.SIG_IGN)
    for name, most in (("AS", memory_bytes), ("FSIZE", 0), ("NPROC", 0), ("CORE", 0)):
        limit = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(limit)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(limit, (most, most))
    while True:
        try:
            kind, template, values = marshal.load(sys.stdin.buffer)
        except EOFError:
            return
        signal.setitimer(signal.ITIMER_PROF, seconds)
        answer = _answer(kind, template, values, most_characters)
        signal.setitimer(signal.ITIMER_PROF, 0)
        marshal.dump(answer, sys.stdout.buffer)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
