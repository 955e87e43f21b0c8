"""A running `vllm serve`, which takes adapters and answers over HTTP."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from typing import Any, TypeVar
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from megatron_peft.config import ConfigurationError, untrusted

Found = TypeVar("Found")
SECONDS = 600.0  # for one answer
START = "start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve BASE --enable-lora --max-lora-rank N"


class Server:
    """The server at an address; VLLM_API_KEY is its key, if it wants one. ConfigurationError: what it refuses.

    flag: that named the address, for messages; seconds: to wait for an answer, or for more of it.
    """

    def __init__(self, url: str, flag: str = "--server", seconds: float = SECONDS) -> None:
        self.url, self._flag, self._seconds = url.rstrip("/"), flag, seconds

    def models(self) -> list[dict[str, Any]]:
        """What it serves: of each at least its `id`, and the `parent` of an adapter, which a base does not have."""
        return self._read("/v1/models", None, lambda reply: [{**card, "id": str(card["id"])} for card in reply["data"]])

    def load(self, name: str, folder: Path) -> None:
        self._ask("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder.absolute())})

    def unload(self, name: str) -> None:
        self._ask("/v1/unload_lora_adapter", {"lora_name": name})

    def log_prob(self, name: str, context: Sequence[int], token: int) -> float:
        """log p of a token after others, in nats: of the only one that is allowed, as it was before that was forbidden.

        Log-probabilities of prompts end a vLLM that has several of them with an adapter in one batch.
        """
        request = {"model": name, "prompt": list(context), "max_tokens": 1, "temperature": 0, "logprobs": 0}
        request |= {"allowed_token_ids": [token], "ignore_eos": True}
        return self._read(
            "/v1/completions", request, lambda reply: float(reply["choices"][0]["logprobs"]["token_logprobs"][0])
        )

    def _read(self, path: str, content: Mapping[str, Any] | None, read: Callable[[Any], Found]) -> Found:
        answer = self._ask(path, content)
        try:
            return read(untrusted.parse_json(answer, f"{self.url}{path}"))
        except (KeyError, IndexError, TypeError, ValueError) as error:
            message = f"{self._flag} {self.url} answers {path} otherwise than vLLM: {answer[:200]}"
            raise ConfigurationError(message) from error

    def _ask(self, path: str, content: Mapping[str, Any] | None = None) -> str:
        key = os.environ.get("VLLM_API_KEY")
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
        data = None if content is None else json.dumps(content).encode()
        try:
            with urlopen(Request(self.url + path, data, headers), timeout=self._seconds) as answer:
                return answer.read().decode(errors="replace")
        except HTTPError as error:
            said = ""
            with suppress(OSError, HTTPException):
                said = error.read().decode(errors="replace")[:500]
            hint = f": {START}" if error.code == 404 and "lora_adapter" in path and "adapter" not in said else ""
            message = f"{self._flag} {self.url} refuses {path} ({error.code} {error.reason}: {said}){hint}."
            raise ConfigurationError(message) from error
        except (OSError, HTTPException, ValueError) as error:  # of a redirection too
            reason = getattr(error, "reason", None) or error or type(error).__name__
            raise ConfigurationError(f"{self._flag} {self.url} does not answer ({reason}): {START}.") from error
