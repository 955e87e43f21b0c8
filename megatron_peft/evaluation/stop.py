"""Texts that end an answer."""

from collections.abc import Sequence

from megatron_peft.data.tokenizers import Tokenizer

_FURTHER_TOKENS = 4  # a tokenizer may treat the first token of a text differently


class StopTexts:
    """Ends an answer as soon as one of some texts stands in it, however its tokens are cut.

    Args:
        tokenizer: of the model.
        texts: empty ones end nothing.

    `end_ids` are those of them that are special tokens: they never appear in a decoded text.
    """

    def __init__(self, tokenizer: Tokenizer, texts: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        special = tokenizer.special_tokens
        self.end_ids = frozenset(special[text] for text in texts if text in special)
        self.texts = [text for text in texts if text and text not in special]
        # A token that shows holds at least one byte, so that many tokens from the end are enough.
        self._num_tokens = max((len(text.encode()) for text in self.texts), default=0) + _FURTHER_TOKENS

    def is_complete(self, ids: Sequence[int]) -> bool:
        """Whether the answer so far holds one of the texts, the newest token being part of it."""
        if not self.texts:
            return False
        tail = self._tokenizer.decode(ids[-self._num_tokens :])
        return any(text in tail for text in self.texts)

    def cut(self, text: str) -> str:
        """An answer up to the first of the texts."""
        for stop in self.texts:
            text = text.split(stop, 1)[0]
        return text
