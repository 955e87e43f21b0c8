"""What tools/generate.py does: prompts of a command line or a file, answers as they grow or into a file."""

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from megatron_peft.config import ConfigurationError, Requirements, RunConfig, require
from megatron_peft.config.untrusted import parse_json, read_text, require_regular
from megatron_peft.data.tokenizers import Tokenizer
from megatron_peft.evaluation.dispatch import AnswerPlan, generation_settings, over_replicas
from megatron_peft.evaluation.generation import OnToken, Sampling, StopTexts, generate
from megatron_peft.evaluation.model import AskedModel, load_model
from megatron_peft.runtime.launch import checked_together

# Prompts from a command line or a file, as records and as token ids.

Record = Mapping[str, Any]
JSON_SUFFIXES = (".json", ".jsonl")


def read_prompts(path: Path) -> list[Record]:
    """`{"prompt": ...}` of each line of a text; of JSON lines the objects, which hold prompt or messages.

    Raises:
        ConfigurationError: the file cannot be read, or holds no prompt; a line that is none, by its number.
    """
    require_regular(path, "--prompt-file")
    lines = read_text(path).splitlines()
    is_json = path.suffix in JSON_SUFFIXES
    found = [_record(line, f"{path}:{number}", is_json) for number, line in enumerate(lines, 1) if line.strip()]
    require(bool(found), f"--prompt-file {path} holds no prompt.")
    return found


def _record(line: str, place: str, is_json: bool) -> Record:
    if not is_json:
        return {"prompt": line}
    record = parse_json(line, place)
    is_prompt = isinstance(record, dict) and (isinstance(record.get("prompt"), str) or _are_messages(record))
    require(is_prompt, f'{place}: neither {{"prompt": "..."}} nor {{"messages": [...]}}.')
    return record


def _are_messages(record: Record) -> bool:
    messages = record.get("messages")
    return isinstance(messages, list) and bool(messages) and all(isinstance(one, dict) for one in messages)


def encode_prompts(records: Sequence[Record], tokenizer: Tokenizer, chat: bool, max_length: int) -> list[list[int]]:
    """Token ids of each record.

    Args:
        chat: a prompt is what a user says.
        max_length: positions of the model; a prompt and at least one new token must fit.

    Raises:
        ConfigurationError: a prompt that is too long or empty, by its number; messages without a chat template.
    """
    return list(_encoded(records, tokenizer, chat, max_length))


def _encoded(records: Sequence[Record], tokenizer: Tokenizer, chat: bool, max_length: int) -> Iterator[list[int]]:
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
        yield ids


def _ids(record: Record, tokenizer: Tokenizer, chat: bool) -> list[int]:
    messages = record.get("messages")
    if messages is None and chat:
        messages = [{"role": "user", "content": record["prompt"]}]
    if messages is None:
        return tokenizer.encode_prompt(record["prompt"])
    return tokenizer.encode(tokenizer.render_chat(messages, add_generation_prompt=True, tools=record.get("tools")))


def check_output(output: str | None) -> None:
    """Make the folder of `output`, if there is one. ConfigurationError: no file can be written there, or what is there
    is no plain file: a link, a pipe or a device would not be written to but replaced."""
    if output is None:
        return
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
    require(os.access(path.parent, os.W_OK), f"--output {path} cannot be written: {path.parent} gives no permission.")


@contextmanager
def request_bar(title: str, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Shows, on stderr, how many of `total` requests are answered; what it yields is told of each number more."""
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=total, completed=done)
        lines = _Lines(title, total, done)

        def advance(number: int) -> None:
            bar.advance(task, number)
            if not console.is_terminal:
                lines.advance(number)

        yield advance


class _Lines:
    """Says a line whenever a further tenth is done."""

    def __init__(self, title: str, total: int, done: int) -> None:
        self._title, self._total, self._done = title, total, done

    def advance(self, number: int) -> None:
        before, self._done = self._done, self._done + number
        if before * 10 // self._total < self._done * 10 // self._total:
            print(f"{self._title}: {self._done} of {self._total}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class AnswerSettings:
    """What tools/generate.py was asked for; its flags have these names."""

    prompt: str | None = None
    prompt_file: str | None = None
    output: str | None = None
    overwrite: bool = False
    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    num_samples: int = 1
    stop: Sequence[str] = ()
    chat: bool = False
    batch_size: int = 16
    sampling_seed: int = 1234

    def __post_init__(self) -> None:
        with Requirements(self) as require:
            require.positive("max_new_tokens", "num_samples", "batch_size")
            given = [value for value in (self.prompt, self.prompt_file) if value is not None]
            require(len(given) == 1, "give exactly one of --prompt TEXT and --prompt-file FILE.")
            require(
                self.num_samples == 1 or self.temperature != 0,
                f"--num-samples {self.num_samples} with --temperature 0 gives one answer {self.num_samples} times: "
                "give --temperature above 0.",
            )
            try:
                Sampling(self.temperature, self.top_p, self.top_k)
            except ConfigurationError as error:
                require.problems += error.problems

    @property
    def plan(self) -> AnswerPlan:
        sampling = Sampling(self.temperature, self.top_p, self.top_k)
        return AnswerPlan(tuple(map(unescaped, self.stop)), self.max_new_tokens, sampling, self.sampling_seed)

    def records(self) -> list[Record]:
        """What is asked. ConfigurationError: a file that cannot be read, or --output that cannot be written."""
        check_output(self.output)
        require(
            self.output is None or self.overwrite or not Path(self.output).exists(),
            f"--output {self.output} exists already: give another file, or --overwrite.",
        )
        require(
            self.output is None or self.prompt_file is None or Path(self.output).resolve() != self._prompts,
            f"--output {self.output} is the file of --prompt-file: give another one.",
        )
        if self.prompt_file is not None:
            return read_prompts(Path(self.prompt_file))
        assert self.prompt is not None
        return [{"prompt": self.prompt}]

    @property
    def _prompts(self) -> Path | None:
        return None if self.prompt_file is None else Path(self.prompt_file).resolve()


class AnswerFile:
    """--output: a draft beside it that holds each answer as soon as it is there, and takes its name at the end.

    Raises:
        ConfigurationError: it cannot be written; on a disk that fills, with what there is and where.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._draft, self._num_written = path, path.with_name(f".{path.name}.partial"), 0
        with self._failures_named():
            self._file = self._draft.open("w", encoding="utf-8")

    def add(self, line: str) -> None:
        with self._failures_named():
            self._file.write(line)
            self._file.flush()
        self._num_written += 1

    def publish(self) -> None:
        with self._failures_named():
            os.fsync(self._file.fileno())
            self._file.close()
            self._draft.replace(self._path)

    @contextmanager
    def _failures_named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            kept = f" The first {self._num_written} answers are in {self._draft}." if self._num_written else ""
            raise ConfigurationError(
                f"--output {self._path} cannot be written ({error.strerror}): make room there, or give another file."
                + kept
            ) from error


def unescaped(text: str) -> str:
    """A stop text of the command line: its `\\n` and `\\t` are what they stand for."""
    return text.replace("\\n", "\n").replace("\\t", "\t")


def answer(config: RunConfig, settings: AnswerSettings) -> None:
    """Print or write the answers of `config`'s model, within a started world.

    Raises:
        ConfigurationError: on every rank: files, checkpoint, prompts that are too long.
    """
    plan = settings.plan
    records = checked_together(settings.records)
    writes = settings.output is not None and dist.get_rank() == 0
    file = checked_together(lambda: AnswerFile(Path(str(settings.output))) if writes else None)
    model = load_model(config)
    ids = encode_prompts(records, model.tokenizer, settings.chat, model.max_length)
    stop = StopTexts(model.tokenizer, plan.until)
    is_first = dist.get_rank() == 0
    is_shown = settings.prompt is not None and settings.num_samples == 1 and settings.output is None
    if is_shown:
        stream = Stream(model.tokenizer, stop, sys.stdout.write if is_first else lambda text: None)
        _generate(model, settings, ids, ["0/0"], stream.add)
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
    model: AskedModel,
    settings: AnswerSettings,
    records: Sequence[Record],
    ids: Sequence[Sequence[int]],
    stop: StopTexts,
) -> Iterator[str]:
    """The object of each record with its answers, as JSON lines, in the order of the records. Collective."""
    num_samples = settings.num_samples
    portion = max(settings.batch_size * model.config.parallel.data_parallel_size // num_samples, 1)
    for start in range(0, len(records), portion):
        numbers = range(start, min(start + portion, len(records)))
        asked = [(number, sample) for number in numbers for sample in range(num_samples)]
        names = [f"{number}/{sample}" for number, sample in asked]
        found = _generate(model, settings, [ids[number] for number, _ in asked], names)
        texts = iter(stop.cut(model.tokenizer.decode(answer)) for answer in found)
        for number in numbers:
            answers = [next(texts) for _ in range(num_samples)]
            yield json.dumps({**records[number], "answers": answers}, ensure_ascii=False) + "\n"


def _generate(
    model: AskedModel,
    settings: AnswerSettings,
    prompts: Sequence[Sequence[int]],
    names: Sequence[str],
    on_token: OnToken = lambda row, token: None,
) -> list[list[int]]:
    rules = generation_settings(model, settings.plan, settings.batch_size)

    def work(own: Sequence[Any]) -> list[list[int]]:
        texts, own_names = [prompt for prompt, _ in own], [name for _, name in own]
        return generate(model.chunks, texts, rules, names=own_names, on_token=on_token)

    return over_replicas(list(zip(prompts, names, strict=True)), work)


class Stream:
    """Writes an answer as it grows, but for what may turn out to be a stop text or half a character."""

    def __init__(self, tokenizer: Tokenizer, stop: StopTexts, write: Callable[[str], Any]) -> None:
        self._tokenizer, self._stop, self._write = tokenizer, stop, write
        self._held = max((len(text) for text in stop.texts), default=1) - 1
        self._ids: list[int] = []
        self._num_written = 0

    def add(self, row: int, token: int) -> None:
        self._ids.append(token)
        text = self._text()
        if not text.endswith("\ufffd"):  # the first bytes of a character
            self._write_up_to(text[: len(text) - self._held])

    def end(self) -> None:
        self._write_up_to(self._text())
        self._write("\n")

    def _text(self) -> str:
        return self._stop.cut(self._tokenizer.decode(self._ids))

    def _write_up_to(self, text: str) -> None:
        self._write(text[self._num_written :])
        self._num_written = max(self._num_written, len(text))
