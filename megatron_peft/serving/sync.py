"""A run's newest adapter on a running server: exported under a new name, bound, loaded, compared; the old one unloaded.

vLLM's cache of prefixes knows an adapter by its name and path, so each version lies under a path that none had before.
"""

import hashlib
import json
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import fmean
from typing import Any
from uuid import uuid4

from megatron_peft.checkpoint import run_record
from megatron_peft.checkpoint.folders import MANIFEST, locked, write_atomically
from megatron_peft.config import ConfigurationError, PeftConfig, require, require_packages
from megatron_peft.config.evaluation import SyncSettings
from megatron_peft.config.untrusted import read_json_object
from megatron_peft.conversion.hf_files import SafetensorsFile
from megatron_peft.conversion.trained_adapters import Run, TrainedAdapters
from megatron_peft.conversion.verify import random_tokens
from megatron_peft.models.shape import ModelShape
from megatron_peft.parallel.collectives import awaited_from_first_rank
from megatron_peft.serving.engine import Engine
from megatron_peft.serving.served import bindings_of
from megatron_peft.serving.server import SECONDS, Server
from megatron_peft.serving.trained import export_lora, is_lora

PREFIXES = (1, 5, 17, 32)  # tokens of a prompt before the compared ones
BOUND = "bound.json"  # what the engine was seen to bind whole
SEEN = "seen.json"  # in the folder of a version that was loaded
LOCK = "lock"


Asked = Sequence[tuple[Sequence[int], int]]  # tokens, and the one whose log-probability after them is compared


def asked_tokens(vocab_size: int, longest: int) -> Asked:
    """What is compared of every version, from sequences of at most `longest` tokens."""
    row = random_tokens(vocab_size, max(PREFIXES) + 1)[0].tolist()
    return [(row[:length], row[length]) for length in PREFIXES if length <= longest]


def started_sync(
    settings: SyncSettings, peft: PeftConfig, shape: ModelShape, base: str | None, run: Path, **how: Any
) -> "Sync":
    """The first rank gives versions of the run in the folder `run`. A collective.

    how: `flags` and `seconds` of `Sync`.

    ConfigurationError, on every rank: nothing that can be served, no server, no engine to ask what it binds, a folder
    that cannot be written or that another has.
    """
    message = f"{run}: --peft-method full trains no adapter: merge or convert it, and serve the folder."
    require(peft.trains_adapters, message)
    require_packages("peft", "peft")
    is_lora(peft, shape)  # or why vLLM takes none
    sync = Sync(settings, Path(str(base)), run, **how)
    awaited_from_first_rank(sync.start)
    return sync


class Sync:
    """What the first rank does."""

    def __init__(
        self, settings: SyncSettings, base: Path, run: Path, flags: str = "--", seconds: float = SECONDS
    ) -> None:
        """base: the model's folder; run: the run's, from which versions have name and folder if `settings` has none.

        flags: what stands in front of the names of `settings`, in messages; seconds: to wait for an answer.
        """
        self.server = Server(settings.server, f"{flags}server", seconds)
        self._settings, self._base, self._flags = settings, base, flags
        self._name = settings.name or run.name
        self._folder = Path(settings.folder or run / "served").absolute()
        self._of_base: float | None = None

    def start(self) -> None:
        """Take the folder, as long as this process lives, and ask server and engine whether they are there."""
        folder = f"{self._flags}folder {self._folder}"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._lock = (self._folder / LOCK).open("w")
        except OSError as error:
            message = f"{folder} cannot be written ({error.strerror}): give one that the server sees too."
            raise ConfigurationError(message) from error
        message = f"{folder}: another sync gives its versions from there: end it, or give another folder."
        locked(self._lock.fileno(), self._folder, lambda: message, 0.0)
        self.server.models()
        if "binding" not in self._settings.skip:
            with Engine(self._settings.engine_python, f"{self._flags}engine-python"):
                pass

    def give(self, run: Run, own: float | None, prompts: Asked) -> str:
        """Load this version, and unload the others. Returns what was done, for a terminal.

        run: a checkpoint, or the adapters as they are now, which lie in memory.
        own: log p of what is asked by our own model, its mean; None: it is not compared.
        ConfigurationError: it is bound or computed otherwise, and is unloaded again; or the server does not answer.
        """
        began, lines = time.monotonic(), list[str]()
        is_open = isinstance(run, TrainedAdapters)
        record = run.record if is_open else run_record.read_record(Path(run))
        name = f"{self._name}-{record.position['iteration']:07d}"
        served = {model["id"]: model for model in self.server.models()}
        roots = {each: Path(str(model.get("root"))) for each, model in served.items()}
        of_this = [each for each in served if re.fullmatch(rf"{re.escape(self._name)}-\d{{7,}}", each)]
        earlier = [each for each in of_this if roots[each].parent == self._folder]
        text = f"{self.server.url} serves {name} from {roots.get(name)}, not from here: give another {self._flags}name."
        require(name not in served or name in earlier, text)
        whole = None if is_open else hashlib.sha256((Path(run) / MANIFEST).read_bytes()).hexdigest()
        if name in served and whole and self._seen(roots[name]) in ((whole, True), (whole, own is not None)):
            return f"{self.server.url} serves {name} already"
        adapter = self._folder / f"{name}-{uuid4().hex[:8]}"
        try:
            self._export(run, adapter)
            if "binding" not in self._settings.skip:
                lines += self._require_bound(adapter)
            if name in served:  # of another run, or never compared
                self.server.unload(name)
            compared = self._loaded(name, adapter, served, own, prompts)
        except BaseException:
            shutil.rmtree(adapter, ignore_errors=True)
            raise
        write_atomically(adapter / SEEN, json.dumps({"checkpoint": whole, "is_compared": own is not None}))
        for version in earlier:
            if version != name:
                self.server.unload(version)
            shutil.rmtree(roots[version], ignore_errors=True)
        others = [version for version in earlier if version != name]
        gone = f"; unloaded {', '.join(others)}" if others else ""
        seconds = time.monotonic() - began
        return "\n".join([*lines, f"{self.server.url} serves {name}{compared}{gone}; {seconds:.2f} s"])

    def _export(self, run: Run, adapter: Path) -> None:
        try:
            export_lora(run, adapter, self._base)
        except ConfigurationError as error:
            problems = (problem.replace("--output", f"{self._flags}folder") for problem in error.problems)
            raise type(error)(*problems) from error

    def _seen(self, adapter: Path) -> tuple[str, bool] | None:
        """The digest of the manifest of this version's checkpoint, and whether its numbers were compared."""
        with suppress(ConfigurationError, KeyError):
            seen = read_json_object(adapter / SEEN)
            return seen["checkpoint"], seen["is_compared"]
        return None

    def _loaded(self, name: str, adapter: Path, served: Mapping[str, Any], own: float | None, prompts: Asked) -> str:
        self.server.load(name, adapter)
        try:
            return "" if own is None else self._compared(name, served, own, prompts)
        except BaseException:  # an interrupt too: what was not compared is not served
            self.server.unload(name)
            raise

    def _compared(self, name: str, served: Mapping[str, Any], own: float, prompts: Asked) -> str:
        if self._of_base is None:
            base = next((each for each, about in served.items() if about.get("parent") is None), None)
            require(base is not None, f"{self.server.url} lists no base model, with which a version is compared.")
            assert base is not None
            self._of_base = self._answered(base, prompts)
        mean = self._answered(name, prompts)
        text = f"log-probability of a token {mean:.6f}, our own {own:.6f}, the base's {self._of_base:.6f}"
        tolerance = self._settings.tolerance
        require(abs(mean - own) <= tolerance, f"{name}: {text}: more apart than {self._flags}tolerance {tolerance:g}.")
        return f": {text}"

    def _answered(self, name: str, prompts: Asked) -> float:
        return fmean(self.server.log_prob(name, context, token) for context, token in prompts)

    def _require_bound(self, adapter: Path) -> list[str]:
        """Ask the engine, unless an adapter of the same config, names and shapes was bound whole before.

        Returns what it says, if it was asked.
        """
        headers = SafetensorsFile(adapter / "adapter_model.safetensors").headers()
        shapes = {name: header.shape for name, header in headers.items()}
        looks = json.dumps([shapes, read_json_object(adapter / run_record.ADAPTER_CONFIG)], sort_keys=True)
        digest, known = hashlib.sha256(looks.encode()).hexdigest(), self._folder / BOUND
        with suppress(ConfigurationError):
            if read_json_object(known) == {"digest": digest}:
                return []
        (binding,) = bindings_of(self._settings.engine_python, self._base, [adapter])
        if binding.problems:
            raise ConfigurationError(*(f"{adapter}: {problem}" for problem in binding.problems))
        write_atomically(known, json.dumps({"digest": digest}))
        return [str(binding)]
