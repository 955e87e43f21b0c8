"""Text to token ids: Hugging Face, sentencepiece and null tokenizers behind one small interface; chat templates.

megatron-core's datasets read `eod`, `unique_identifiers` and `vocab_size`; without a `pad` they pad with -1, no token.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from hashlib import sha256
from os.path import commonprefix
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import TemplateError, meta, nodes

from megatron_peft.config import SENTENCEPIECE, ConfigurationError, DataConfig, require
from megatron_peft.config.sources import local_tokenizer
from megatron_peft.config.untrusted import read_json_object, read_text, require_regular


class TemplateInputs(NamedTuple):
    """What a chat template, a program of Jinja that writes a conversation as text, reads."""

    variables: frozenset[str]  # messages, tools, ...
    fields: frozenset[str]  # possibly, of a message: attributes and strings of its code, not of its comments


@lru_cache
def template_inputs(template: str) -> TemplateInputs:
    """Raises ConfigurationError for a template that is not valid."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    try:
        tree = _compile_jinja_template(template).environment.parse(template)
        variables = meta.find_undeclared_variables(tree)
    except (TemplateError, RecursionError) as error:
        raise ConfigurationError(f"the chat template cannot be read: {str(error).rstrip('.')}.") from error
    texts = {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
    return TemplateInputs(frozenset(variables), frozenset(texts | {node.attr for node in tree.find_all(nodes.Getattr)}))


class ChatSegment(NamedTuple):
    """Part of a rendered conversation, and whether the loss counts its tokens."""

    text: str
    trained: bool


def split_chat(render: Callable[..., str], messages: Sequence[Any]) -> list[ChatSegment]:
    """Segments whose texts join to `render(messages)`; an assistant's turn begins after its generation prompt.

    Raises ConfigurationError for a template that does not write from left to right, and without an assistant's turn.
    """
    whole = render(messages)

    def length_of(prefix: str) -> int:
        require(whole.startswith(prefix), _NOT_LEFT_TO_RIGHT)
        return len(prefix)

    segments: list[ChatSegment] = []
    position = 0
    for turn in (i for i, message in enumerate(messages) if message["role"] == "assistant"):
        # A template does not mark where a turn begins: each boundary is found by rendering what comes before it.
        start = 0
        if not turn and isinstance(content := messages[0].get("content"), str):  # after what a template puts before it
            start = max(whole.find(content.strip()), 0)
        if turn:
            prompt = render(messages[:turn], True)
            start = len(prompt)
            if not whole.startswith(prompt):  # which may hold what a finished turn leaves out (an opening <think>)
                start = max(length_of(render(messages[:turn])), len(commonprefix([whole, prompt])))
        end = length_of(render(messages[: turn + 1])) if turn + 1 < len(messages) else len(whole)
        require(position <= start <= end, _NOT_LEFT_TO_RIGHT)
        segments += [ChatSegment(whole[position:start], False), ChatSegment(whole[start:end], True)]
        position = end
    roles = ", ".join(dict.fromkeys(f'"{message["role"]}"' for message in messages))
    require(
        bool(segments),
        f'no message has the role "assistant", so there is nothing to learn (its roles are {roles}): give the answers '
        'the role "assistant".',
    )
    return [*segments, ChatSegment(whole[position:], False)]


_NOT_LEFT_TO_RIGHT = (
    "the chat template renders a turn differently when others follow it, so the assistant's tokens cannot be found: "
    "split the conversation into records of one answer each, or use records with prompt and completion."
)

Message = Mapping[str, Any]
Tools = Sequence[Mapping[str, Any]]  # functions that the assistant may call, each a JSON schema
_CONTEXT = 8  # ids before an id that decide how it is written
_INCOMPLETE = "\ufffd"  # what stands for bytes that are no character yet
# Files of a Hugging Face folder: those that transformers may open, and those that must hold a JSON object.
_READ = ("*.json", "*.jinja", "*.txt", "*.model")
_JSON_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "config.json")


class Tokenizer:
    """What the rest of the package uses of a tokenizer. Ids are Python integers up to `largest_id`."""

    def __init__(self, vocab_size: int, eos_id: int, identity: str) -> None:
        self.vocab_size, self.largest_id = vocab_size, vocab_size - 1  # an added token may have an id above their count
        self.bos_id: int | None = None  # put before a prompt; None where the tokenizer does not do so by itself
        self.eos_id = eos_id  # ends what is trained on
        self.prefix_id = eos_id  # precedes a text without a context: the beginning of sequence or else its end
        self.special_tokens: Mapping[str, int] = {}  # those that `decode` leaves out
        self.chat_template = ""
        self._identity = identity  # distinguishes two tokenizers of a class

    @property
    def eod(self) -> int:
        """megatron-core's name for `eos_id`."""
        return self.eos_id

    @property
    def unique_identifiers(self) -> OrderedDict[str, Any]:
        """What megatron-core hashes to name its cached indices."""
        return OrderedDict({"class": type(self).__name__, "model": self._identity, "vocab_size": self.vocab_size})

    @property
    def digest(self) -> str:
        """A digest of all that decides which ids a text has, and of the chat template."""
        return f"{type(self).__name__} {self.vocab_size}"

    def encode(self, text: str) -> list[int]:
        """Ids of `text` alone, without special tokens around it."""
        raise NotImplementedError

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, special tokens left out."""
        raise NotImplementedError

    def texts(self, ids: Sequence[int]) -> list[str]:
        """The text of each id, special tokens too. Bytes that only together are a character stand at the last one."""
        return [self.decode([i]) for i in ids]

    def encode_prompt(self, text: str) -> list[int]:
        """Ids to generate from: the beginning-of-sequence token, if the tokenizer adds one, then `text`."""
        return ([] if self.bos_id is None else [self.bos_id]) + self.encode(text)

    def render_chat(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = False,
        tools: Tools | None = None,
        continue_final_message: bool = False,
    ) -> str:
        """The conversation as one text, special tokens included: encode it with `encode`.

        continue_final_message: the text ends with the last message's content, for the model to go on from there.
        """
        raise ConfigurationError(
            f"{type(self).__name__} has no chat template, which records with messages need: use "
            "--tokenizer-type HuggingFaceTokenizer, or records with prompt and completion."
        )


def _files_of(folder: str) -> list[Path]:
    return sorted({path for pattern in _READ for path in Path(folder).glob(pattern)})


class HuggingFaceTokenizer(Tokenizer):
    """The tokenizer of a local Hugging Face folder, read by transformers. Nothing is fetched."""

    def __init__(self, folder: str, chat_template: str | None = None) -> None:
        """`chat_template` is that of --chat-template, in place of the folder's own."""
        folder = local_tokenizer(folder, "--tokenizer-model")
        hint = "give the folder of a tokenizer, or ORG/NAME of the Hugging Face Hub"
        require(Path(folder).is_dir(), f"--tokenizer-model {folder}: no such folder: {hint}.")
        for path in _files_of(folder):
            require_regular(path, "--tokenizer-model")
        try:
            reader = _class_that_reads(Path(folder))
            self._tokenizer = reader.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # noqa: BLE001 - the libraries raise whatever their parsers do
            raise ConfigurationError(
                f"--tokenizer-model {folder} holds no tokenizer that transformers can read: {_fault(folder, error)}"
            ) from error
        eos_id = self._tokenizer.eos_token_id
        require(
            eos_id is not None,
            f"--tokenizer-model {folder}: the tokenizer has no end-of-sequence token; tokenizer_config.json names it.",
        )
        super().__init__(len(self._tokenizer), eos_id, folder)
        self.largest_id = max(self._tokenizer.get_vocab().values())
        self.folder = folder
        if self._tokenizer.bos_token_id is not None:
            self.prefix_id = self._tokenizer.bos_token_id
        added = self._tokenizer.added_tokens_decoder
        self.special_tokens = {token.content: index for index, token in added.items() if token.special}
        self._template_of = "--chat-template" if chat_template else f"the chat template in {folder}"
        if chat_template:
            self._tokenizer.chat_template = _read_chat_template(chat_template)
        given: Any = self._tokenizer.chat_template or ""
        named = [*given.values()] if isinstance(given, dict) else [given]
        are_texts = all(isinstance(template, str) for template in named)
        require(are_texts, f"--tokenizer-model {folder}: its chat_template is not a text, or names of texts.")
        self.chat_template = "\n".join(named)
        with self._faults_told("a"):
            with_specials = self._tokenizer.encode("a")
        if with_specials[:1] == [self._tokenizer.bos_token_id]:
            self.bos_id = self._tokenizer.bos_token_id

    def encode(self, text: str) -> list[int]:
        with self._faults_told(text):
            return self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    @contextmanager
    def _faults_told(self, text: str) -> Iterator[None]:
        """Raises ConfigurationError for words without a token (if unknown ones have none), numbers as texts, ..."""
        try:
            yield
        except BaseException as error:  # a panic of tokenizers is not an Exception
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            message = f"--tokenizer-model {self.folder} cannot encode {text[:40]!r}: {_first_line(error)}"
            raise ConfigurationError(message) from error

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    @property
    def digest(self) -> str:
        digest = sha256(self.chat_template.encode())
        for path in _files_of(self.folder):
            digest.update(f"\n{path.name}\n".encode() + path.read_bytes())
        return digest.hexdigest()

    def texts(self, ids: Sequence[int]) -> list[str]:
        decode = partial(self._tokenizer.decode, clean_up_tokenization_spaces=False)
        windows = [(max(0, end - _CONTEXT), end) for end in range(len(ids))]
        # Not each id by itself: a sentencepiece model's decoder leaves out the space that a text begins with.
        known = [decode(ids[first:end]).rstrip(_INCOMPLETE) for first, end in windows]
        whole = [decode(ids[first : end + 1]).rstrip(_INCOMPLETE) for first, end in windows]
        return [text[len(before) :] for before, text in zip(known, whole, strict=True)]

    def render_chat(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = False,
        tools: Tools | None = None,
        continue_final_message: bool = False,
    ) -> str:
        require(
            self._tokenizer.chat_template is not None,
            f"the tokenizer in {self.folder} has no chat template, which records with messages need: give "
            "--chat-template FILE, --tokenizer-model a folder that has one, or records with prompt and completion.",
        )
        try:
            return self._tokenizer.apply_chat_template(
                [*messages],
                tools=[*tools] if tools else None,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tokenize=False,
            )
        except Exception as error:  # noqa: BLE001 - a template is a program
            raise ConfigurationError(f"{self._template_of} refuses the messages: {_first_line(error)}") from error


def _read_chat_template(given: str) -> str:
    """The text of --chat-template, which is that text (any template has a brace), or a file.

    Raises ConfigurationError for a file that cannot be read, and for what is no template.
    """
    text = given
    if "{" not in given:
        require_regular(Path(given), "--chat-template")
        text = read_text(Path(given))
    try:
        template_inputs(text)
    except ConfigurationError as error:
        raise ConfigurationError(f"--chat-template {given if text != given else ''}: {error}") from error
    return text


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece `.model` file. `adds_bos`: its token is put before a text, as Llama 2 was trained."""

    def __init__(self, model_file: str, adds_bos: bool = False) -> None:
        from sentencepiece import SentencePieceProcessor

        path = Path(model_file)
        path = path / "tokenizer.model" if path.is_dir() else path
        require(path.is_file(), f"--tokenizer-model {path}: no such file.")
        try:
            self._model = SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise ConfigurationError(f"--tokenizer-model {path} is not a sentencepiece model: {error}") from error
        eos_id, bos_id = self._model.eos_id(), self._model.bos_id()
        require(eos_id >= 0, f"--tokenizer-model {path}: the model has no end-of-sequence token.")
        require(bos_id >= 0 or not adds_bos, f"--tokenizer-model {path}: the model has no beginning-of-sequence token.")
        super().__init__(self._model.get_piece_size(), eos_id, f"{path}{' with BOS' if adds_bos else ''}")
        self.path = path
        self.prefix_id = bos_id if bos_id >= 0 else eos_id
        self.bos_id = bos_id if adds_bos else None

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode(list(ids))

    @property
    def digest(self) -> str:
        return f"{sha256(self.path.read_bytes()).hexdigest()} {self.bos_id}"

    def texts(self, ids: Sequence[int]) -> list[str]:
        return [self._model.id_to_piece(i).replace("\u2581", " ") for i in ids]


class NullTokenizer(Tokenizer):
    """Text is ids separated by spaces, below `vocab_size`; `vocab_size` itself ends a document."""

    def __init__(self, vocab_size: int) -> None:
        # As in megatron-core up to 0.17; newer ones count the end in. Here a flag means the same whatever is installed.
        super().__init__(vocab_size + 1, vocab_size, "")

    def encode(self, text: str) -> list[int]:
        try:
            ids = [int(word) for word in text.split()]
        except ValueError as error:
            raise ConfigurationError(f"NullTokenizer reads ids separated by spaces, not {text[:40]!r}.") from error
        bad = [i for i in ids if not 0 <= i < self.vocab_size]
        require(not bad, f"NullTokenizer: id {bad[:1]} is not below --vocab-size {self.eos_id}.")
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(str(i) for i in ids)


def build_tokenizer(config: DataConfig, pretrained_checkpoint: str | None) -> Tokenizer:
    """The tokenizer of --tokenizer-type; --tokenizer-model defaults to the base model's folder."""
    source = config.tokenizer_model or pretrained_checkpoint
    require(
        not config.chat_template or config.tokenizer_type == "HuggingFaceTokenizer",
        f"--chat-template needs --tokenizer-type HuggingFaceTokenizer, but it is {config.tokenizer_type}.",
    )
    if config.tokenizer_type == "NullTokenizer":
        return NullTokenizer(config.vocab_size or 0)
    if not source:
        raise ConfigurationError("no tokenizer: give --tokenizer-model, or --pretrained-checkpoint with one in it.")
    if config.tokenizer_type in SENTENCEPIECE:
        return SentencePieceTokenizer(source, adds_bos=config.tokenizer_type == "Llama2Tokenizer")
    return HuggingFaceTokenizer(source, config.chat_template)


def require_vocabulary_fits(tokenizer: Tokenizer, num_rows: int) -> str:
    """A warning if the tokenizer is probably another model's, else empty.

    Raises `ConfigurationError` if it has an id without a row in the model's embedding.
    """
    largest = tokenizer.largest_id
    differ = f"the tokenizer has ids up to {largest}, but the embedding of --pretrained-checkpoint has {num_rows} rows"
    require(largest < num_rows, f"{differ}: give --tokenizer-model the tokenizer that belongs to it.")
    # Models pad their vocabularies by a few hundred rows at most; a tenth of the rows without a token is not padding.
    is_doubtful = largest + 1 < 0.9 * num_rows
    return f"WARNING: {differ}: is it the tokenizer of another model? --tokenizer-model names it." * is_doubtful


# AutoTokenizer takes a class that tokenizer_config.json names, but for types of models that have classes of their own.
_PLAIN_CLASSES, _PLAIN_TYPES = ("TokenizersBackend", "PreTrainedTokenizerFast"), ("llama", "bloom")


def _class_that_reads(folder: Path) -> Any:
    """AutoTokenizer, which imports torch, or the class that it would choose. The import is half of a preview's time."""
    config, model = (folder / name for name in ("tokenizer_config.json", "config.json"))
    if config.is_file() and model.is_file() and (folder / "tokenizer.json").is_file():
        named, model_type = read_json_object(config), read_json_object(model).get("model_type")
        if named.get("tokenizer_class") in _PLAIN_CLASSES and "auto_map" not in named and model_type in _PLAIN_TYPES:
            from transformers import PreTrainedTokenizerFast

            return PreTrainedTokenizerFast
    from transformers import AutoTokenizer

    return AutoTokenizer


def _fault(folder: str, error: Exception) -> str:
    """Why transformers cannot read the folder: the file that is not JSON, or else its own message."""
    files = [path for path in (Path(folder, name) for name in _JSON_FILES) if path.is_file()]
    for path in files:
        try:
            read_json_object(path)
        except ConfigurationError as damaged:
            return str(damaged)
    return f"{type(error).__name__}: {_first_line(error)} (read: {', '.join(path.name for path in files) or 'no file'})"


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
