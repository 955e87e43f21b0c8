"""Run command lines one after another in one process, and keep what each of them says.

`python say.py LINES`, in the folder where they run: LINES holds a command line of `megatron-peft` in each line, and
`said.jsonl` becomes a record of each. Like a program of a tree it is run with the tree first in `sys.path`.
"""

import json
import os
import runpy
import sys
import traceback
from pathlib import Path

STREAMS = {"out": 1, "err": 2}


def main() -> None:
    lines = Path(sys.argv[1]).read_text().splitlines()
    with open("said.jsonl", "w", buffering=1) as file:
        for line in lines:
            file.write(json.dumps({"line": line, "cwd": os.getcwd(), "tree": sys.path[0], **_run(line.split())}) + "\n")


def _run(words: list[str]) -> dict[str, str | int]:
    """Exit code and text of both streams, those of processes that it starts too."""
    before = {name: os.dup(number) for name, number in STREAMS.items()}
    for name, number in STREAMS.items():
        with open(f".{name}", "wb") as file:
            os.dup2(file.fileno(), number)
    code: object = 0
    try:
        program = os.path.join(sys.path[0], "megatron_peft", "__main__.py")
        sys.argv = [program, *words]
        runpy.run_path(program, run_name="__main__")
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = "an exception"
    for name, number in STREAMS.items():
        getattr(sys, f"std{name}").flush()
        os.dup2(before[name], number)
        os.close(before[name])
    return {"exit_code": str(code), **{name: Path(f".{name}").read_text(errors="replace") for name in STREAMS}}


if __name__ == "__main__":
    main()
