"""The score of one model on the held-out messages, and its file."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_peft.config.untrusted import read_json_object


@dataclass(frozen=True)
class Score:
    """What one model is worth; `translations` are in the order of the held-out messages.

    BLEU is from 0 to 100; the loss is the mean over the completions' tokens.
    """

    bleu: float
    bleu_signature: str
    validation_loss: float
    trainable_parameters: int
    translations: tuple[str, ...]

    def write(self, path: Path) -> None:
        """The file appears whole or not at all."""
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(asdict(self), ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        temporary.replace(path)

    @classmethod
    def read(cls, path: Path) -> "Score":
        fields = read_json_object(path)
        return cls(**{**fields, "translations": tuple(fields["translations"])})
