"""Prompts from the command line or a file, and answers streamed to the terminal or written to a file."""

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from megatron_peft.config import ConfigurationError, RunConfig, require
from megatron_peft.config.evaluation import AnswerSettings
from megatron_peft.config.untrusted import parse_json, read_text, require_regular
from megatron_peft.data.formats import plain_turn
from megatron_peft.data.tokenizers import Tokenizer
from megatron_peft.evaluation.dispatch import AnswerPlan, NamedPrompt, generate_answers
from megatron_peft.evaluation.generation import StopTexts
from megatron_peft.evaluation.model import InferenceModel, load_model
from megatron_peft.runtime.launch import checked_together

Record = Mapping[str, Any]
JSON_SUFFIXES = (".json", ".jsonl")


def read_prompts(path: Path) -> list[Record]:
    """`{"prompt": ...}` for each line of a text file; the objects of a JSON-lines file, with prompt or messages.

    Raises:
        ConfigurationError: the file cannot be read or has no prompt, or one of its lines is not a prompt.
    """
    require_regular(path, "--prompt-file")
    lines = read_text(path).splitlines()
    is_json = path.suffix in JSON_SUFFIXES
    found = [_record(line, f"{path}:{number}", is_json) for number, line in enumerate(lines, 1) if line.strip()]
    require(bool(found), f"--prompt-file {path} contains no prompt.")
    return found


def _record(line: str, place: str, is_json: bool) -> Record:
    if not is_json:
        return {"prompt": line}
    record = parse_json(line, place)
    found = record if isinstance(record, dict) else {}
    messages = found.get("messages")
    are_messages = isinstance(messages, list) and bool(messages) and all(isinstance(one, dict) for one in messages)
    is_prompt = isinstance(found.get("prompt"), str) or are_messages
    require(is_prompt, f'{place}: neither {{"prompt": "..."}} nor {{"messages": [...]}}.')
    if isinstance(messages, list):
        try:
            return {**found, "messages": [plain_turn(number, one) for number, one in enumerate(messages, 1)]}
        except ConfigurationError as error:
            raise ConfigurationError(f"{place}: {error}") from error
    return found


def encode_prompts(records: Sequence[Record], tokenizer: Tokenizer, chat: bool, max_length: int) -> list[list[int]]:
    """Token ids of each record.

    Args:
        chat: format a plain prompt as a user message with the chat template.
        max_length: positions of the model; a prompt and at least one new token must fit.

    Raises:
        ConfigurationError: a prompt is too long, or has messages and the tokenizer no chat template.
    """
    encoded = []
    for number, record in enumerate(records, 1):
        try:
            ids = _ids(record, tokenizer, chat) or [tokenizer.prefix_id]
        except ConfigurationError as error:
            raise ConfigurationError(f"prompt {number}: {error}") from error
        require(
            len(ids) < max_length,
            f"prompt {number} has {len(ids)} tokens, but the model has {max_length} positions for prompt and answer "
            "together: shorten it.",
        )
        encoded.append(ids)
    return encoded


def _ids(record: Record, tokenizer: Tokenizer, chat: bool) -> list[int]:
    messages = record.get("messages")
    if messages is None and chat:
        messages = [{"role": "user", "content": record["prompt"]}]
    if messages is None:
        return tokenizer.encode_prompt(record["prompt"])
    return tokenizer.encode(tokenizer.render_chat(messages, add_generation_prompt=True, tools=record.get("tools")))


def check_output(output: str | None) -> None:
    """Create the folder of --output. ConfigurationError: a file cannot be written there.

    Links, pipes and devices are refused, since the rename at the end would replace them instead of writing to them.
    """
    if output is None:
        return
    path = Path(output)
    require(not path.is_dir(), f"--output {path} is a folder: give a file.")
    is_plain = path.is_file() or not path.exists()
    require(
        is_plain and not path.is_symlink(),
        f"--output {path} is {'a link' if path.is_symlink() else 'a pipe or a device'}, not a file: give another path.",
    )
    _make_folder_of(path)


def _make_folder_of(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"--output {path} cannot be written ({error.strerror}).") from error
    require(
        os.access(path.parent, os.W_OK), f"--output {path} cannot be written: no permission to write to {path.parent}."
    )


@contextmanager
def request_bar(title: str, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Show the number of finished requests on stderr: a bar on a terminal, else a line every tenth of `total`.

    Yields a function to call with the number of requests that have just finished.
    """
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=total, completed=done)

        def advance(number: int) -> None:
            nonlocal done
            bar.advance(task, number)
            before, done = done, done + number
            if not console.is_terminal and before * 10 // total < done * 10 // total:
                print(f"{title}: {done} of {total}", file=sys.stderr, flush=True)

        yield advance


def plan_of(settings: AnswerSettings) -> AnswerPlan:
    """What the ranks need to know of the settings to answer."""
    stops = tuple(map(unescaped, settings.stop))
    return AnswerPlan(stops, settings.max_new_tokens, settings.sampling(), settings.sampling_seed)


def records_of(settings: AnswerSettings) -> list[Record]:
    """The prompts. ConfigurationError: --prompt-file cannot be read, or --output cannot be written."""
    check_output(settings.output)
    if settings.output is not None:
        _require_free(settings, Path(settings.output))
    if settings.prompt_file is not None:
        return read_prompts(Path(settings.prompt_file))
    assert settings.prompt is not None
    return [{"prompt": settings.prompt}]


def _require_free(settings: AnswerSettings, output: Path) -> None:
    """Nothing is replaced unasked, and never the prompts."""
    require(
        settings.overwrite or not output.exists(),
        f"--output {output} exists already: give another file, or --overwrite.",
    )
    require(
        settings.prompt_file is None or output.resolve() != Path(settings.prompt_file).resolve(),
        f"--output {output} is the file of --prompt-file: give another file.",
    )


class AnswerFile:
    """--output. Each answer is written to a draft next to it as it is generated; `publish` renames the draft.

    Raises:
        ConfigurationError: the draft cannot be written, for instance on a full disk; it keeps the answers so far.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._draft = path.with_name(f".{path.name}.partial")
        self._num_written = 0
        with self._explained_errors():
            self._file = self._draft.open("w", encoding="utf-8")

    def add(self, line: str) -> None:
        """Append a line; the operating system has it when this returns."""
        with self._explained_errors():
            self._file.write(line)
            self._file.flush()
        self._num_written += 1

    def publish(self) -> None:
        """Put the finished file in its place. Until then only its draft exists."""
        with self._explained_errors():
            os.fsync(self._file.fileno())
            self._file.close()
            self._draft.replace(self._path)

    @contextmanager
    def _explained_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            kept = f" The first {self._num_written} answers are in {self._draft}." if self._num_written else ""
            raise ConfigurationError(
                f"--output {self._path} cannot be written ({error.strerror}): free space, or give another file.{kept}"
            ) from error


def unescaped(text: str) -> str:
    """A stop text from the command line, with its `\\n` and `\\t` replaced by a new line and a tab."""
    return text.replace("\\n", "\n").replace("\\t", "\t")


def answer(config: RunConfig, settings: AnswerSettings) -> None:
    """Print or write the answers of `config`'s model, in a started world.

    Raises:
        ConfigurationError: on every rank: wrong files, a wrong checkpoint, a prompt that is too long.
    """
    plan = plan_of(settings)
    records = checked_together(lambda: records_of(settings))
    is_first = dist.get_rank() == 0
    writes = settings.output is not None and is_first
    file = checked_together(lambda: AnswerFile(Path(str(settings.output))) if writes else None)
    model = load_model(config)
    ids = encode_prompts(records, model.tokenizer, settings.chat, model.max_length)
    stop = StopTexts(model.tokenizer, plan.until)
    if settings.prompt is not None and settings.num_samples == 1 and settings.output is None:
        stream = Stream(model.tokenizer, stop, sys.stdout.write if is_first else lambda text: None)
        generate_answers(model, [NamedPrompt(tuple(ids[0]), "0/0")], plan, settings.batch_size, stream.add)
        stream.end()
        return
    with request_bar("answering", len(records)) as advance:
        for line in _lines(model, settings, records, ids, stop):
            if not is_first:
                continue
            advance(1)
            if file is None:
                print(line, end="", flush=True)
            else:
                file.add(line)
    if file is not None:
        file.publish()
        print(f"wrote {settings.output}")


def _lines(
    model: InferenceModel,
    settings: AnswerSettings,
    records: Sequence[Record],
    ids: Sequence[Sequence[int]],
    stop: StopTexts,
) -> Iterator[str]:
    """Each record with its answers, as a JSON line, in the order of the records. A collective of all ranks."""
    num_samples = settings.num_samples
    portion = max(settings.batch_size * model.config.parallel.data_parallel_size // num_samples, 1)
    for start in range(0, len(records), portion):
        numbers = range(start, min(start + portion, len(records)))
        prompts = [
            NamedPrompt(tuple(ids[number]), f"{number}/{sample}") for number in numbers for sample in range(num_samples)
        ]
        found = generate_answers(model, prompts, plan_of(settings), settings.batch_size)
        texts = iter(stop.cut(model.tokenizer.decode(answer)) for answer in found)
        for number in numbers:
            answers = [next(texts) for _ in range(num_samples)]
            yield json.dumps({**records[number], "answers": answers}, ensure_ascii=False) + "\n"


class Stream:
    """Writes an answer as it is generated, holding back what may become a stop text or is half a character."""

    def __init__(self, tokenizer: Tokenizer, stop: StopTexts, write: Callable[[str], Any]) -> None:
        self._tokenizer, self._stop, self._write = tokenizer, stop, write
        self._num_held = max((len(text) for text in stop.texts), default=1) - 1
        self._ids: list[int] = []
        self._num_written = 0

    def add(self, row: int, token: int) -> None:
        """Print what a new token adds, as soon as it is whole characters."""
        self._ids.append(token)
        text = self._text()
        if not text.endswith("\ufffd"):  # else the last bytes of a character are still missing
            self._write_up_to(text[: len(text) - self._num_held])

    def end(self) -> None:
        """Print what is left, and end the line."""
        self._write_up_to(self._text())
        self._write("\n")

    def _text(self) -> str:
        return self._stop.cut(self._tokenizer.decode(self._ids))

    def _write_up_to(self, text: str) -> None:
        self._write(text[self._num_written :])
        self._num_written = max(self._num_written, len(text))
