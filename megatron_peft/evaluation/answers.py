"""Answers of a model to prompts: those of `megatron-peft generate`, streamed to the terminal or written to a file, and
those of `megatron-peft report --samples`, by a run and by its base.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from megatron_peft.checkpoint.folders import write_atomically
from megatron_peft.checkpoint.run_record import read_run_record
from megatron_peft.config import ConfigurationError, RunConfig, is_indexed, parse_blend, require
from megatron_peft.config.evaluation import AnswerSettings
from megatron_peft.config.untrusted import parse_json, read_text, require_regular
from megatron_peft.data.files import RecordFiles
from megatron_peft.data.records import ColumnNames, Fit, plain_turn
from megatron_peft.data.tokenizers import Tokenizer, build_tokenizer
from megatron_peft.evaluation.generation import GenerationSettings, StopTexts, generate_answers
from megatron_peft.evaluation.model import InferenceModel, load_model, restore_base
from megatron_peft.runtime.launch import checked_together

Record = Mapping[str, Any]
JSON_SUFFIXES = (".json", ".jsonl")


def answer(config: RunConfig, settings: AnswerSettings) -> None:
    """Print or write the answers of `config`'s model, in a started world.

    Raises:
        ConfigurationError: on every rank: wrong files, a wrong checkpoint, a prompt that is too long.
    """
    until, plan = plan_of(settings)
    records = checked_together(lambda: records_of(settings))
    is_first = dist.get_rank() == 0
    writes = settings.output is not None and is_first
    file = checked_together(lambda: AnswerFile(Path(str(settings.output))) if writes else None)
    model = load_model(config)
    ids = encode_prompts(records, model.tokenizer, settings.chat, model.max_length)
    if settings.prompt is not None and settings.num_samples == 1 and settings.output is None:
        write = sys.stdout.write if is_first else lambda text: None
        stream = Stream(model.tokenizer, StopTexts(model.tokenizer, until), write)
        generate_answers(model, [(ids[0], "0/0")], until, plan, stream.add)
        stream.end()
        return
    with request_bar("answering", len(records)) as advance:
        for line in _lines(model, settings, records, ids):
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


def plan_of(settings: AnswerSettings) -> tuple[tuple[str, ...], GenerationSettings]:
    """The texts that end an answer, with new lines and tabs for their `\\n` and `\\t`; how answers are generated."""
    until = tuple(text.replace("\\n", "\n").replace("\\t", "\t") for text in settings.stop)
    plan = GenerationSettings(
        frozenset(),
        settings.max_new_tokens,
        batch_size=settings.batch_size,
        sampling=settings.sampling(),
        seed=settings.sampling_seed,
    )
    return until, plan


def records_of(settings: AnswerSettings) -> list[Record]:
    """The prompts. ConfigurationError: --prompt-file cannot be read, or --output cannot be written."""
    if settings.output is not None:
        check_output(settings.output)
        output = Path(settings.output)
        # Nothing is replaced unasked, and never the prompts.
        require(
            settings.overwrite or not output.exists(),
            f"--output {output} exists already: give another file, or --overwrite.",
        )
        require(
            settings.prompt_file is None or output.resolve() != Path(settings.prompt_file).resolve(),
            f"--output {output} is the file of --prompt-file: give another file.",
        )
    return [{"prompt": settings.prompt}] if settings.prompt_file is None else read_prompts(Path(settings.prompt_file))


def check_output(output: str) -> None:
    """Create the folder of --output. ConfigurationError: a file cannot be written there.

    Links, pipes and devices are refused, since the rename at the end would replace them instead of writing to them.
    """
    path = Path(output)
    require(not path.is_dir(), f"--output {path} is a folder: give a file.")
    is_plain = path.is_file() or not path.exists()
    require(
        is_plain and not path.is_symlink(),
        f"--output {path} is {'a link' if path.is_symlink() else 'a pipe or a device'}, not a file: give another path.",
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"--output {path} cannot be written ({error.strerror}).") from error
    require(
        os.access(path.parent, os.W_OK), f"--output {path} cannot be written: no permission to write to {path.parent}."
    )


def read_prompts(path: Path) -> list[Record]:
    """`{"prompt": ...}` for each line of a text file; the objects of a JSON-lines file, with prompt or messages.

    Raises:
        ConfigurationError: the file cannot be read or has no prompt, or one of its lines is not a prompt.
    """
    require_regular(path, "--prompt-file")
    lines = [(f"{path}:{number}", line) for number, line in enumerate(read_text(path).splitlines(), 1) if line.strip()]
    require(bool(lines), f"--prompt-file {path} contains no prompt.")
    return [_prompt(line, place) if path.suffix in JSON_SUFFIXES else {"prompt": line} for place, line in lines]


def _prompt(line: str, place: str) -> Record:
    record = parse_json(line, place)
    if isinstance(record, dict):
        messages = record.get("messages")
        if messages and isinstance(messages, list) and all(isinstance(message, dict) for message in messages):
            try:
                return {**record, "messages": [plain_turn(number, turn) for number, turn in enumerate(messages, 1)]}
            except ConfigurationError as error:
                raise ConfigurationError(f"{place}: {error}") from error
        if isinstance(record.get("prompt"), str) and not messages:
            return record
    raise ConfigurationError(f'{place}: neither {{"prompt": "..."}} nor {{"messages": [...]}}.')


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
            messages = record.get("messages")
            if messages is None and chat:
                messages = [{"role": "user", "content": record["prompt"]}]
            if messages is None:
                ids = tokenizer.encode_prompt(record["prompt"])
            else:
                text = tokenizer.render_chat(messages, add_generation_prompt=True, tools=record.get("tools"))
                ids = tokenizer.encode(text)
        except ConfigurationError as error:
            raise ConfigurationError(f"prompt {number}: {error}") from error
        require(
            len(ids) < max_length,
            f"prompt {number} has {len(ids)} tokens, but the model has {max_length} positions for prompt and answer "
            "together: shorten it.",
        )
        encoded.append(ids or [tokenizer.prefix_id])
    return encoded


def _lines(
    model: InferenceModel, settings: AnswerSettings, records: Sequence[Record], ids: Sequence[Sequence[int]]
) -> Iterator[str]:
    """Each record with its answers, as a JSON line, in the order of the records. A collective of all ranks."""
    until, plan = plan_of(settings)
    stop = StopTexts(model.tokenizer, until)
    num_samples = settings.num_samples
    portion = max(settings.batch_size * model.config.parallel.data_parallel_size // num_samples, 1)
    for start in range(0, len(records), portion):
        numbers = range(start, min(start + portion, len(records)))
        prompts = [(ids[number], f"{number}/{sample}") for number in numbers for sample in range(num_samples)]
        texts = iter(stop.cut(model.tokenizer.decode(ids)) for ids in generate_answers(model, prompts, until, plan))
        for number in numbers:
            answers = [next(texts) for _ in range(num_samples)]
            yield json.dumps({**records[number], "answers": answers}, ensure_ascii=False) + "\n"


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


class Question(NamedTuple):
    """The prompt of a record as a person reads it, its answer, and the record that `encode_prompts` takes."""

    prompt: str
    reference: str
    record: Record


def write_samples(config: RunConfig, output: Path, run: str, num_samples: int, max_new_tokens: int) -> None:
    """Write what a run and its base answer to prompts of its validation data, greedily. In a started world.

        {"prompt": "...", "reference": "the answer in the data", "before": "the base's", "after": "the run's"}

    Args:
        config: of the model, with --load naming the run.
        run: the --save folder of the run, or a checkpoint in it.

    Raises:
        ConfigurationError: on every rank: no validation data, a prompt that is too long, a folder that is read-only.
    """
    questions = checked_together(lambda: questions_of(run, num_samples))
    model = load_model(config)
    ids = encode_prompts([question.record for question in questions], model.tokenizer, False, model.max_length)
    prompts = [(prompt, str(number)) for number, prompt in enumerate(ids)]
    plan = GenerationSettings(frozenset(), max_new_tokens, batch_size=16)
    with request_bar("answering", 2 * len(questions)) as advance:
        after = generate_answers(model, prompts, (), plan)
        advance(len(questions))
        restore_base(model.chunks, model.config, model.shape)
        before = generate_answers(model, prompts, (), plan)
        advance(len(questions))
    lines = ""
    for question, *pair in zip(questions, before, after, strict=True):
        texts = dict(zip(("before", "after"), map(model.tokenizer.decode, pair), strict=True))
        line = {"prompt": question.prompt, "reference": question.reference, **texts}
        lines += json.dumps(line, ensure_ascii=False) + "\n"

    def write() -> None:
        try:
            write_atomically(output, lines)
        except OSError as error:
            raise ConfigurationError(f"--samples: {output} cannot be written ({error.strerror}).") from error

    checked_together(lambda: write() if dist.get_rank() == 0 else None)


def questions_of(run: str, num_samples: int) -> list[Question]:
    """Prompts spread evenly over the validation data of a run. ConfigurationError: it has none with prompts."""
    config = read_run_record(run).config
    data = config.data
    paths = data.data_path or data.valid_data_path
    require(
        bool(paths) and not is_indexed(paths),
        f"--samples takes prompts from the run's --valid-data-path, but {run} "
        + (f"was validated on indexed data ({paths[0]})." if paths else "was trained without."),
    )
    records = RecordFiles(parse_blend(paths, "--valid-data-path").prefixes, "--valid-data-path")
    tokenizer = build_tokenizer(data, config.model.pretrained_checkpoint)
    fit = Fit(tokenizer, data.seq_length, columns=ColumnNames.of(data))
    chosen = range(0, len(records), max(len(records) // num_samples, 1))[:num_samples]
    asked = (question_of(fit.format_of(records, index).native(records[index])) for index in chosen)
    questions = [question for question in asked if question is not None]
    require(bool(questions), f"--samples needs prompts, but the records of {' '.join(paths)} are plain text.")
    return questions


def question_of(record: Record) -> Question | None:
    """What is asked in a record of training data: its prompt, or its messages up to the last of the assistant.

    None for a plain text, and for messages in which nothing is asked.
    """
    if isinstance(record.get("prompt"), str):
        return Question(record["prompt"], str(record.get("completion", "")), {"prompt": record["prompt"]})
    messages = record.get("messages")
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        return None
    turns = [at for at, message in enumerate(messages) if message.get("role") == "assistant"]
    if not turns or turns[-1] == 0:
        return None
    asked, reply = messages[: turns[-1]], messages[turns[-1]]
    tools = {"tools": record["tools"]} if record.get("tools") else {}
    return Question(str(asked[-1].get("content")), str(reply.get("content")), {"messages": asked, **tools})
