"""Requests that are answered already, in a file of JSON lines, so that a killed evaluation goes on where it was.

    {"key": "5f1c...", "answer": [-12.25, true]}

A key is a digest of everything that the answer depends on, the model's fingerprint included: an answer of another
checkpoint is never taken for one of this. A line is written whole; the last one, torn by a kill, is left out.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_peft.config import ConfigurationError
from megatron_peft.config.untrusted import parse_json


class FinishedRequests:
    """The answers by key.

    Args:
        path: of the file; made with the first answer.
        model: fingerprint of the model.
    """

    def __init__(self, path: Path, model: str) -> None:
        self._path = path
        self._model = model
        self._answers = dict(_read(path))

    def key(self, kind: str, *what: Any) -> str:
        """Of a request: its kind, and whatever else its answer depends on (as JSON)."""
        return hashlib.sha256(json.dumps([self._model, kind, *what]).encode()).hexdigest()[:32]

    def __contains__(self, key: str) -> bool:
        return key in self._answers

    def __getitem__(self, key: str) -> Any:
        return self._answers[key]

    def add(self, answers: Mapping[str, Any]) -> None:
        """Remember answers, on disk too."""
        self._answers |= answers
        lines = [json.dumps({"key": key, "answer": answer}) + "\n" for key, answer in answers.items()]
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with open(self._path, "a", encoding="utf-8") as file:
            file.write("".join(lines))


def _read(path: Path) -> Iterator[tuple[str, Any]]:
    if not path.exists():
        return
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:  # torn: begin the next line afresh
        path.write_text(whole, encoding="utf-8")
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            entry = parse_json(line, f"{path}:{number}")
            yield entry["key"], entry["answer"]
        except (ConfigurationError, KeyError, TypeError) as error:
            raise ConfigurationError(
                f"{path}:{number} is no answered request ({error!r}): remove the line, and it is asked again."
            ) from error
