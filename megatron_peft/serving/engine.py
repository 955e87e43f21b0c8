"""A serving engine in a process of its own, under the Python of its own environment, asked by lines of JSON.

A script runs there (`vllm_script.py`, `llama_cpp_script.py`), imports nothing of ours, and says what may be asked.
"""

import json
import math
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Timer
from typing import Any, Self

from megatron_peft.checkpoint.run_record import ADAPTER_CONFIG
from megatron_peft.config import ConfigurationError, require
from megatron_peft.config.untrusted import read_json_object
from megatron_peft.conversion.model_card import VLLM_RANKS

GGUF = "adapter.gguf"
LAST_WORDS = 2000  # characters
SECONDS_TO_END = 20.0
SECONDS_TO_ANSWER = 3600.0  # of a large model that is loaded, or of many long answers


class Engine:
    """The process. ConfigurationError: it cannot be started, has no vLLM, or has failed; with its last words.

    name: with the version, `vLLM 0.32.0`.
    """

    library, package, script, needs, environment = "vLLM", "vllm", "vllm_script.py", "vLLM", ".venv-vllm"

    def __init__(self, python: Path | None = None, flag: str = "--engine-python") -> None:
        """python: None is that of the environment that `make engines` makes; flag: that named it, for messages."""
        self._python = python = python or Path(self.environment, "bin", "python")
        hint = (
            f"give {flag} the Python of an environment with {self.needs} (make engines makes "
            f"{self.environment} for CPUs)."
        )
        self._told = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        script = Path(__file__).with_name(self.script)
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._told}
        try:
            self._process = subprocess.Popen([str(python), str(script)], text=True, **pipes)
        except OSError as error:
            message = f"{flag} {python} cannot be started ({error.strerror}): {hint}"
            raise ConfigurationError(message) from error
        try:
            versions = self.ask("versions")
        except BaseException:
            self.close()
            raise
        if self.package not in versions:
            self.close()
            raise ConfigurationError(f"{flag} {python} has no {self.library}: {hint}")
        self.name = f"{self.library} {versions[self.package]}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @staticmethod
    def of_adapters(settings: Sequence[Mapping[str, Any]], least_rank: int = 1) -> dict[str, Any]:
        """What the engine has to be told of adapters with these configs."""
        return {"max_lora_rank": rank_limit(max(least_rank, *map(largest_rank, settings)))}

    def open(self, model: Path, adapters: Sequence[Path], settings: Mapping[str, Any]) -> dict[str, Any]:
        """Load the model of a folder, and read adapters for it; the script says what settings there are."""
        folders = [str(adapter.absolute()) for adapter in adapters]
        return self.ask("open", model=str(model.absolute()), adapters=folders, settings=settings)

    def ask(self, what: str, **arguments: Any) -> dict[str, Any]:
        """The script's answer to one of its requests."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        with suppress(BrokenPipeError):  # why it ended is what it said last
            stdin.write(json.dumps({"do": what, **arguments}) + "\n")
            stdin.flush()
        limit, asked_at = Timer(SECONDS_TO_ANSWER, self._process.kill), time.monotonic()
        limit.start()
        try:
            line = stdout.readline()
        finally:
            limit.cancel()
        try:
            answer = json.loads(line or "null")
        except ValueError as error:
            raise ConfigurationError(f"--engine-python {self._python} is no Python: it said {line[:80]!r}.") from error
        if answer is None or "error" in answer:
            is_late = time.monotonic() - asked_at >= SECONDS_TO_ANSWER
            late = f"no answer in {SECONDS_TO_ANSWER:g} s" if is_late else None
            raise ConfigurationError(self._failure((answer or {}).get("error", late)))
        return answer

    def _failure(self, error: str | None) -> str:
        if error is None:
            error = f"it ended with exit code {self._process.wait()}"
        self._told.seek(0)
        said = self._told.read().decode(errors="replace").strip()[-LAST_WORDS:]
        return f"{self.library} failed ({error}).{f' It said last: {said}' if said else ''}"

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


class LlamaCpp(Engine):
    """llama.cpp, which reads GGUF files: adapters are .gguf files too, or folders that its own converter converts."""

    library, package, script, environment = "llama.cpp", "xllamacpp", "llama_cpp_script.py", ".venv-llama-cpp"
    needs = "xllamacpp, and llama.cpp's converters in its folder llama.cpp"

    @staticmethod
    def of_adapters(settings: Sequence[Mapping[str, Any]], least_rank: int = 1) -> dict[str, Any]:
        return {"alphas": [plain_alpha(config) for config in settings]}

    def write_gguf(self, adapter: Path, base: Path) -> Path:
        """GGUF in the adapter's folder; of the base its config.json is read."""
        output, settings = adapter / GGUF, read_json_object(adapter / ADAPTER_CONFIG)
        folders = {"adapter": str(adapter.absolute()), "model": str(base.absolute()), "output": str(output.absolute())}
        self.ask("convert", alpha=plain_alpha(settings), **folders)
        return output


def plain_alpha(settings: Mapping[str, Any]) -> float:
    """The alpha with which alpha / rank is the adapter's scale. ConfigurationError: llama.cpp cannot compute it."""
    message = f"llama.cpp takes LoRA only, not {settings.get('peft_type')}: export the run with --as-lora, or merge it."
    require(settings.get("peft_type") == "LORA", message)
    is_rs = settings.get("use_rslora")
    names = ["use_dora", "alpha_pattern", *(["rank_pattern"] if is_rs else [])]  # one alpha holds for all modules
    unknown = [name for name in names if settings.get(name)] + ["bias"] * (settings.get("bias", "none") != "none")
    require(not unknown, f"llama.cpp knows no {', '.join(unknown)} of {ADAPTER_CONFIG}: merge the adapter.")
    return settings["lora_alpha"] * (math.sqrt(settings["r"]) if is_rs else 1)


def largest_rank(settings: Mapping[str, Any]) -> int:
    """The largest rank of any module of an adapter with this config."""
    ranks = [settings.get("r", 0), *(settings.get("rank_pattern") or {}).values()]
    wrong = [rank for rank in ranks if not isinstance(rank, int)]
    require(not wrong, f"{ADAPTER_CONFIG} has a rank that is no whole number: {wrong[:1]}.")
    return max(ranks)


def rank_limit(rank: int) -> int:
    """The smallest --max-lora-rank that vLLM takes and that holds `rank`. ConfigurationError: there is none."""
    limit = next((limit for limit in VLLM_RANKS if rank <= limit), None)
    require(limit is not None, f"rank {rank} is above {VLLM_RANKS[-1]}, the highest that vLLM serves: merge it.")
    assert limit is not None
    return limit
