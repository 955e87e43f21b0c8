"""A serving engine in a process of its own, under the Python of its own environment, asked by lines of JSON.

`vllm_script.py` runs there, imports nothing of ours, and says what may be asked.
"""

import json
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from megatron_peft.config import ConfigurationError, require
from megatron_peft.conversion.model_card import VLLM_RANKS

SCRIPT = Path(__file__).with_name("vllm_script.py")
HINT = "give --engine-python the Python of an environment with vLLM (make engines makes .venv-vllm for CPUs)."
LAST_WORDS = 2000  # characters
SECONDS_TO_END = 20.0


class Engine:
    """The process. ConfigurationError: it cannot be started, has no vLLM, or has failed; with its last words.

    name: with the version, `vLLM 0.32.0`.
    """

    def __init__(self, python: Path) -> None:
        self._python, self._told = python, tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._told}
        try:
            self._process = subprocess.Popen([str(python), str(SCRIPT)], text=True, **pipes)
        except OSError as error:
            told = f"--engine-python {python} cannot be started ({error.strerror}): {HINT}"
            raise ConfigurationError(told) from error
        versions = self.ask("versions")
        if "vllm" not in versions:
            self.close()
            raise ConfigurationError(f"--engine-python {python} has no vLLM: {HINT}")
        self.name = f"vLLM {versions['vllm']}"

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def open(self, model: Path, adapters: Sequence[Path], settings: Mapping[str, Any]) -> dict[str, Any]:
        """Load the model of a folder, and read adapters for it; settings are arguments of vLLM's `LLM`."""
        folders = [str(adapter.absolute()) for adapter in adapters]
        return self.ask("open", model=str(model.absolute()), adapters=folders, settings=settings)

    def ask(self, what: str, **arguments: Any) -> dict[str, Any]:
        """The script's answer to one of its requests."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        with suppress(BrokenPipeError):  # why it ended is what it said last
            stdin.write(json.dumps({"do": what, **arguments}) + "\n")
            stdin.flush()
        answer = json.loads(stdout.readline() or "null")
        if answer is None or "error" in answer:
            raise ConfigurationError(self._failure((answer or {}).get("error")))
        return answer

    def _failure(self, error: str | None) -> str:
        if error is None:
            error = f"it ended with exit code {self._process.wait()}"
        self._told.seek(0)
        said = self._told.read().decode(errors="replace").strip()[-LAST_WORDS:]
        return f"vLLM failed ({error}).{f' It said last: {said}' if said else ''}"

    def close(self) -> None:
        """End the process, which ends with its input."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._told.close()


def rank_limit(rank: int) -> int:
    """The smallest --max-lora-rank that vLLM takes and that holds `rank`. ConfigurationError: there is none."""
    limit = next((limit for limit in VLLM_RANKS if rank <= limit), None)
    require(limit is not None, f"rank {rank} is above {VLLM_RANKS[-1]}, the highest that vLLM serves: merge it.")
    assert limit is not None
    return limit
