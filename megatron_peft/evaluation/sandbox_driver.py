"""What runs inside the sandbox: it takes its limits, runs the program, and writes the verdict.

A script of its own, with the standard library only: it is never imported. It reads one JSON object from stdin: the
program, the token that proves a verdict, the user to become and the limits by their names in `resource`.
"""

import json
import os
import resource
import sys

MAX_DETAIL = 300  # characters of an exception that are worth keeping


def confine(user: int, limits: dict) -> None:
    """Becomes `user` (where it is root), then takes the limits, which it cannot raise again."""
    if user and os.getuid() == 0:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, name), tuple(value))


def run(program: str) -> str:
    """'passed', or 'failed: ' and why. An exit is a failure too: the program's checks come last."""
    try:
        exec(compile(program, "<program>", "exec"), {"__name__": "__program__"})
    except BaseException as error:
        return f"failed: {type(error).__name__}: {error}"[:MAX_DETAIL]
    return "passed"


def flush() -> None:
    """What was printed is kept, if the program left its standard output as it was."""
    try:
        sys.stdout.flush()
    except BaseException:
        pass


def main() -> None:
    """Whatever the program leaves behind (threads, buffers, exit handlers) is not waited for."""
    job = json.load(sys.stdin)
    verdict_to = os.dup(1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    confine(job["user"], job["limits"])
    process = os.getpid()
    verdict = run(job.pop("program"))
    flush()
    if os.getpid() == process:  # not a fork of the program's that came back here
        os.write(verdict_to, f"\n{job['token']} {verdict}\n".encode("utf-8", "replace"))
    os._exit(0)


main()
