"""Text to token ids: Hugging Face, sentencepiece and null tokenizers behind one small interface.

Every class also has the attributes that megatron-core's datasets ask of a tokenizer (`eod`, `unique_identifiers`,
`vocab_size`); none has `pad`, so those datasets pad with -1, which no token can be mistaken for.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from os.path import commonprefix
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from megatron_peft.config import ConfigurationError, DataConfig, require
from megatron_peft.config.untrusted import limited_to, read_json_object, require_regular


class Part(NamedTuple):
    """A stretch of text, and whether the loss counts its tokens."""

    text: str
    trained: bool


def chat_parts(render: Callable[..., str], messages: Sequence[Any]) -> list[Part]:
    """Parts whose texts join to `render(messages)`; an assistant's turn begins after its generation prompt.

    Templates say nowhere where a turn begins, so each boundary is found by rendering what comes before it. That
    works only for templates that write a conversation from left to right; `ConfigurationError` for the others, and
    for a conversation in which the assistant never speaks.
    """
    whole = render(messages)
    parts: list[Part] = []
    position = 0
    for turn in (i for i, message in enumerate(messages) if message["role"] == "assistant"):
        start = _turn_start(render, whole, messages[:turn]) if turn else 0
        end = _prefix_length(whole, render(messages[: turn + 1])) if turn + 1 < len(messages) else len(whole)
        if not position <= start <= end:
            raise ConfigurationError(_NOT_LEFT_TO_RIGHT)
        parts += [Part(whole[position:start], False), Part(whole[start:end], True)]
        position = end
    if not parts:
        raise ConfigurationError('no message has the role "assistant", so there is nothing to learn.')
    return [*parts, Part(whole[position:], False)]


def _turn_start(render: Callable[..., str], whole: str, before: Sequence[Any]) -> int:
    """Behind the generation prompt, or behind as much of it as the turn has: some templates put into the prompt what
    they leave out of a finished turn (an opened thought)."""
    prompt = render(before, True)
    if whole.startswith(prompt):
        return len(prompt)
    return max(_prefix_length(whole, render(before)), len(commonprefix([whole, prompt])))


def _prefix_length(whole: str, prefix: str) -> int:
    if not whole.startswith(prefix):
        raise ConfigurationError(_NOT_LEFT_TO_RIGHT)
    return len(prefix)


_NOT_LEFT_TO_RIGHT = (
    "the chat template renders a turn otherwise when others follow it, so the assistant's tokens cannot be told "
    "apart: split the conversation into records of one answer each, or use records with prompt and completion."
)


Message = Mapping[str, Any]
Tools = Sequence[Mapping[str, Any]]  # functions that the assistant may call, each a JSON schema
RENDER_SECONDS = 20.0  # no conversation takes a second; a template may hold loops within loops


# Of a folder: what may be opened, and what must hold a JSON object.
_READ = ("*.json", "*.jinja", "*.txt", "*.model")
_JSON_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "config.json")


class Tokenizer(Protocol):
    """What the rest of the package knows of a tokenizer. Ids are Python integers up to `largest_id`."""

    vocab_size: int  # how many ids there are; an added token may have an id above it
    largest_id: int
    bos_id: int | None  # put before a prompt; None where the tokenizer does not do so by itself
    eos_id: int
    special_tokens: Mapping[str, int]  # those that `decode` leaves out
    prefix_id: int  # what a text without a context follows: beginning of sequence, or else end of sequence
    chat_template: str  # empty where there is none

    @property
    def eod(self) -> int:
        """megatron-core's name for `eos_id`."""
        ...

    @property
    def unique_identifiers(self) -> OrderedDict[str, Any]:
        """What megatron-core hashes to name its cached indices."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids of `text` alone, without special tokens around it."""
        ...

    def encode_prompt(self, text: str) -> list[int]:
        """Ids to generate from: the beginning-of-sequence token, if the tokenizer has that habit, then `text`."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, special tokens left out."""
        ...

    def render_chat(
        self, messages: Sequence[Message], add_generation_prompt: bool = False, tools: Tools | None = None
    ) -> str:
        """The conversation as one text, special tokens included: encode it with `encode`."""
        ...

    def chat_parts(self, messages: Sequence[Message], tools: Tools | None = None) -> list[Part]:
        """`render_chat` cut into parts, each marked as trained (what the assistant says) or not."""
        ...


class _Base:
    """What the three tokenizers share; `identity` is what tells two of a kind apart."""

    def __init__(self, vocab_size: int, bos_id: int | None, eos_id: int, identity: str) -> None:
        self.vocab_size = vocab_size
        self.largest_id = vocab_size - 1
        self.bos_id = bos_id
        self.eos_id = eos_id
        self.prefix_id = eos_id
        self.special_tokens: Mapping[str, int] = {}
        self.chat_template = ""
        self._identity = identity

    @property
    def eod(self) -> int:
        return self.eos_id

    @property
    def unique_identifiers(self) -> OrderedDict[str, Any]:
        return OrderedDict({"class": type(self).__name__, "model": self._identity, "vocab_size": self.vocab_size})

    def encode(self, text: str) -> list[int]:
        raise NotImplementedError

    def encode_prompt(self, text: str) -> list[int]:
        return ([] if self.bos_id is None else [self.bos_id]) + self.encode(text)

    def render_chat(
        self, messages: Sequence[Message], add_generation_prompt: bool = False, tools: Tools | None = None
    ) -> str:
        raise ConfigurationError(
            f"{type(self).__name__} has no chat template, which records with messages need: use "
            "--tokenizer-type HuggingFaceTokenizer, or records with prompt and completion."
        )

    def chat_parts(self, messages: Sequence[Message], tools: Tools | None = None) -> list[Part]:
        return chat_parts(partial(self.render_chat, tools=tools), messages)


class HuggingFaceTokenizer(_Base):
    """The tokenizer of a local Hugging Face folder, read by transformers. Nothing is fetched."""

    def __init__(self, folder: str) -> None:
        from transformers import AutoTokenizer

        require(Path(folder).is_dir(), f"--tokenizer-model {folder}: no such folder.")
        for path in (path for pattern in _READ for path in sorted(Path(folder).glob(pattern))):
            require_regular(path, "--tokenizer-model")
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # noqa: BLE001 - the libraries raise whatever their parsers do
            raise ConfigurationError(
                f"--tokenizer-model {folder} holds no tokenizer that transformers can read: {_fault(folder, error)}"
            ) from error
        eos_id = self._tokenizer.eos_token_id
        require(
            eos_id is not None,
            f"--tokenizer-model {folder}: the tokenizer has no end-of-sequence token; tokenizer_config.json names it.",
        )
        super().__init__(len(self._tokenizer), None, eos_id, folder)
        self.largest_id = max(self._tokenizer.get_vocab().values())
        self.folder = folder
        if self._tokenizer.bos_token_id is not None:
            self.prefix_id = self._tokenizer.bos_token_id
        added = self._tokenizer.added_tokens_decoder
        self.special_tokens: Mapping[str, int] = {
            token.content: index for index, token in added.items() if token.special
        }
        template = self._tokenizer.chat_template or ""
        self.chat_template = template if isinstance(template, str) else "\n".join(template.values())
        with_specials = self._tokenizer.encode("a")
        if with_specials[:1] == [self._tokenizer.bos_token_id]:
            self.bos_id = self._tokenizer.bos_token_id

    def encode(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def render_chat(
        self, messages: Sequence[Message], add_generation_prompt: bool = False, tools: Tools | None = None
    ) -> str:
        require(
            self._tokenizer.chat_template is not None,
            f"the tokenizer in {self.folder} has no chat template, which records with messages need: give "
            "--tokenizer-model a folder that has one, or use records with prompt and completion.",
        )
        try:
            with limited_to(RENDER_SECONDS):
                return self._tokenizer.apply_chat_template(
                    list(messages),
                    tools=list(tools) if tools else None,  # type: ignore[arg-type]  # a list of schemas is one of them
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                )
        except Exception as error:  # noqa: BLE001 - a template is a program
            raise ConfigurationError(
                f"the chat template in {self.folder} refuses the messages: {_first_line(error)}"
            ) from error


class SentencePieceTokenizer(_Base):
    """A sentencepiece `.model` file. As in megatron-core, no beginning-of-sequence token is put before a text."""

    def __init__(self, model_file: str) -> None:
        from sentencepiece import SentencePieceProcessor

        path = Path(model_file)
        path = path / "tokenizer.model" if path.is_dir() else path
        require(path.is_file(), f"--tokenizer-model {path}: no such file.")
        try:
            self._model = SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise ConfigurationError(f"--tokenizer-model {path} is not a sentencepiece model: {error}") from error
        eos_id = self._model.eos_id()
        require(eos_id >= 0, f"--tokenizer-model {path}: the model has no end-of-sequence token.")
        super().__init__(self._model.get_piece_size(), None, eos_id, str(path))
        if self._model.bos_id() >= 0:
            self.prefix_id = self._model.bos_id()

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode(list(ids))


class NullTokenizer(_Base):
    """Text is ids separated by spaces. As in megatron-core up to 0.17, `vocab_size` ids come from the text and one
    more, `vocab_size` itself, ends a document: a model with V rows takes --vocab-size V - 1. Newer ones count the end
    in; here a flag means the same whatever is installed."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__(vocab_size + 1, None, vocab_size, "")

    def encode(self, text: str) -> list[int]:
        try:
            ids = [int(word) for word in text.split()]
        except ValueError as error:
            raise ConfigurationError(f"NullTokenizer reads ids separated by spaces, not {_shorten(text)!r}.") from error
        bad = [i for i in ids if not 0 <= i < self.vocab_size]
        require(not bad, f"NullTokenizer: id {bad[:1]} is not below --vocab-size {self.eos_id}.")
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(str(i) for i in ids)


def build_tokenizer(config: DataConfig, pretrained_checkpoint: str | None) -> Tokenizer:
    """The tokenizer of --tokenizer-type; --tokenizer-model defaults to the base model's folder.

    Raises `ConfigurationError` where it cannot be read.
    """
    source = config.tokenizer_model or pretrained_checkpoint
    builders: dict[str, Callable[[], Tokenizer]] = {
        "HuggingFaceTokenizer": lambda: HuggingFaceTokenizer(_required(source)),
        "SentencePieceTokenizer": lambda: SentencePieceTokenizer(_required(source)),
        "NullTokenizer": lambda: NullTokenizer(config.vocab_size or 0),
    }
    return builders[config.tokenizer_type]()


def require_vocabulary_fits(tokenizer: Tokenizer, model_vocab_size: int) -> None:
    """Raise `ConfigurationError` if the tokenizer has an id for which the model (of so many rows) has no row."""
    require(
        tokenizer.largest_id < model_vocab_size,
        f"the tokenizer has ids up to {tokenizer.largest_id}, but the embedding of --pretrained-checkpoint has "
        f"{model_vocab_size} rows: give --tokenizer-model the tokenizer that belongs to it.",
    )


def doubt_about_vocabulary(tokenizer: Tokenizer, model_vocab_size: int) -> str:
    """A sentence for the user if most probably the tokenizer is another model's; else empty.

    Models round their vocabularies up by a few hundred rows at most; a tenth of them without a token is no rounding.
    """
    if tokenizer.largest_id + 1 >= 0.9 * model_vocab_size:
        return ""
    return (
        f"WARNING: the tokenizer has ids up to {tokenizer.largest_id}, but the embedding of --pretrained-checkpoint "
        f"has {model_vocab_size} rows: is it the tokenizer of another model? --tokenizer-model names it."
    )


def _required(source: str | None) -> str:
    if not source:
        raise ConfigurationError("no tokenizer: give --tokenizer-model, or --pretrained-checkpoint with one in it.")
    return source


def _fault(folder: str, error: Exception) -> str:
    """What is wrong with a folder that transformers does not read: the file that is no JSON, or else its own words."""
    files = [path for path in (Path(folder, name) for name in _JSON_FILES) if path.is_file()]
    for path in files:
        try:
            read_json_object(path)
        except ConfigurationError as found:
            return str(found)
    return f"{type(error).__name__}: {_first_line(error)} (read: {', '.join(path.name for path in files) or 'no file'})"


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _shorten(text: str, limit: int = 40) -> str:
    return text if len(text) <= limit else text[:limit] + "..."
