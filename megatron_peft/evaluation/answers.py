"""Answers of a model to prompts: those of `megatron-peft generate`, streamed to the terminal or written to a file, and
those of `megatron-peft report --samples`, by a run and by its base.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_peft.checkpoint import folders, run_record
from megatron_peft.config import ConfigurationError, RunConfig, is_indexed, parse_blend, require, writing
from megatron_peft.config.evaluation import AnswerSettings
from megatron_peft.config.untrusted import parse_json, read_text, require_regular
from megatron_peft.data.files import RecordFiles
from megatron_peft.data.records import ColumnNames, Fit, conversation
from megatron_peft.data.tokenizers import Tokenizer, build_tokenizer
from megatron_peft.evaluation.generation import GenerationSettings, StopTexts, generate_answers
from megatron_peft.evaluation.model import InferenceModel, load_model, opened_model, restore_base
from megatron_peft.runtime.launch import checked_together
from megatron_peft.runtime.progress import progress_bar

Record = Mapping[str, Any]


def answer(config: RunConfig, settings: AnswerSettings) -> None:
    """Print or write the answers of `config`'s model, in a started world. All ranks raise its ConfigurationErrors."""
    until, plan = plan_of(settings)
    records = checked_together(lambda: records_of(settings))
    is_first = dist.get_rank() == 0
    file = checked_together(lambda: AnswerFile(Path(settings.output)) if settings.output and is_first else None)
    with opened_model(config, settings, settings.output) as model:
        _answer(model, settings, records, until, plan, file)


def _answer(
    model: InferenceModel,
    settings: AnswerSettings,
    records: Sequence[Record],
    until: tuple[str, ...],
    plan: GenerationSettings,
    file: "AnswerFile | None",
) -> None:
    is_first = dist.get_rank() == 0
    ids = encode_prompts(records, model.tokenizer, settings.chat, model.max_length, settings.system)
    if settings.prompt is not None and settings.num_samples == 1 and settings.output is None:
        write = sys.stdout.write if is_first else lambda text: None
        stream = Stream(model.tokenizer, StopTexts(model.tokenizer, until), write)
        generate_answers(model, [(ids[0], "0/0")], until, plan, stream.add)
        stream.end()
        return
    with progress_bar("answering", len(records)) as advance:
        for line in _lines(model, settings, records, ids):
            if file is not None:
                file.add(line)
            elif is_first:
                print(line, end="", flush=True)
            advance(is_first)
    if file is not None:
        file.publish()
        print(f"wrote {settings.output}")


def plan_of(settings: AnswerSettings) -> tuple[tuple[str, ...], GenerationSettings]:
    """The texts that end an answer, with new lines and tabs for their `\\n` and `\\t`; how answers are generated."""
    until = tuple(text.replace("\\n", "\n").replace("\\t", "\t") for text in settings.stop)
    how = {"batch_size": settings.batch_size, "sampling": settings.sampling(), "seed": settings.sampling_seed}
    return until, GenerationSettings(frozenset(), settings.max_new_tokens, **how)


def records_of(settings: AnswerSettings) -> list[Record]:
    """The prompts. ConfigurationError: --prompt-file cannot be read, or --output cannot be written."""
    prompts = None if settings.prompt_file is None else Path(settings.prompt_file)
    if settings.output is not None:
        check_output(settings.output)
        output = Path(settings.output)
        # Nothing is replaced unasked, and never the prompts.
        may_write = settings.overwrite or not output.exists()
        require(may_write, f"--output {output} exists already: give another file, or --overwrite.")
        is_other = prompts is None or output.resolve() != prompts.resolve()
        require(is_other, f"--output {output} is the file of --prompt-file: give another file.")
    return [{"prompt": settings.prompt}] if prompts is None else read_prompts(prompts)


def check_output(output: str) -> None:
    """Create the folder of --output. ConfigurationError: a file cannot be written there."""
    path = Path(output)
    require(not path.is_dir(), f"--output {path} is a folder: give a file.")
    # The rename at the end would replace a link or a pipe instead of writing to it.
    kind = "a link" if path.is_symlink() else "a pipe or a device"
    is_plain = path.is_file() or not path.exists()
    require(is_plain and not path.is_symlink(), f"--output {path} is {kind}, not a file: give another path.")
    with writing(f"--output {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
    may_write = os.access(path.parent, os.W_OK)
    require(may_write, f"--output {path} cannot be written: no permission to write to {path.parent}.")


def read_prompts(path: Path) -> list[Record]:
    """`{"prompt": ...}` for each line of a text file; the objects of a JSON-lines file, with prompt or messages."""
    require_regular(path, "--prompt-file")
    every = enumerate(read_text(path).split("\n"), 1)  # not splitlines: a text may have U+2028
    lines = [(f"{path}:{number}", line.removesuffix("\r")) for number, line in every if line.strip()]
    require(bool(lines), f"--prompt-file {path} contains no prompt.")
    if path.suffix not in (".json", ".jsonl"):
        return [{"prompt": line} for _, line in lines]
    records = []
    for place, line in lines:
        record = parse_json(line, place)
        messages = record.get("messages") if isinstance(record, dict) else None
        if messages and isinstance(messages, list) and all(isinstance(message, dict) for message in messages):
            try:
                record |= conversation("messages", record)
            except ConfigurationError as error:
                raise ConfigurationError(f"{place}: {error}") from error
        else:
            is_prompt = isinstance(record, dict) and isinstance(record.get("prompt"), str) and not messages
            require(is_prompt, f'{place}: neither {{"prompt": "..."}} nor {{"messages": [...]}}.')
        records.append(record)
    return records


def encode_prompts(
    records: Sequence[Record], tokenizer: Tokenizer, chat: bool, max_length: int, system: str | None = None
) -> list[list[int]]:
    """Return the token ids of each record, which leave room for an answer in `max_length`.

    Args:
        chat: make a prompt the message of a user.
        system: first message of each conversation that does not begin with a system message.
    """
    encoded = []
    first = [] if system is None else [{"role": "system", "content": system}]
    for number, record in enumerate(records, 1):
        try:
            messages = record.get("messages")
            if messages is None and chat:
                messages = [{"role": "user", "content": record["prompt"]}]
            if messages is None:
                ids = tokenizer.encode_prompt(record["prompt"])
            else:
                turns = [*messages]
                while turns and turns[-1].get("role") == "assistant":  # the answer, where data are asked
                    turns.pop()
                require(bool(turns), "all of its messages are the assistant's: nothing is asked.")
                turns = turns if turns[0].get("role") == "system" else [*first, *turns]
                text = tokenizer.render_chat(turns, add_generation_prompt=True, tools=record.get("tools"))
                ids = tokenizer.encode(text)
        except ConfigurationError as error:
            raise ConfigurationError(f"prompt {number}: {error}") from error
        positions = f"the model has {max_length} positions for prompt and answer together"
        require(len(ids) < max_length, f"prompt {number} has {len(ids)} tokens, but {positions}: shorten it.")
        encoded.append(ids or [tokenizer.prefix_id])
    return encoded


def _lines(
    model: InferenceModel, settings: AnswerSettings, records: Sequence[Record], ids: Sequence[Sequence[int]]
) -> Iterator[str]:
    """Each record with its answers, as a JSON line, in the order of the records. A collective of all ranks."""
    until, plan = plan_of(settings)
    stop = StopTexts(model.tokenizer, until)
    num_samples = settings.num_samples
    portion = max(settings.batch_size * model.batches_at_once // num_samples, 1)
    for start in range(0, len(records), portion):
        numbers = range(start, min(start + portion, len(records)))
        prompts = [(ids[number], f"{number}/{sample}") for number in numbers for sample in range(num_samples)]
        texts = iter(stop.cut(model.tokenizer.decode(ids)) for ids in generate_answers(model, prompts, until, plan))
        for number in numbers:
            answers = [next(texts) for _ in range(num_samples)]
            yield json.dumps({**records[number], "answers": answers}, ensure_ascii=False) + "\n"


class AnswerFile:
    """--output. Each answer is written to a draft next to it as it is generated; `publish` renames the draft."""

    def __init__(self, path: Path) -> None:
        self._path, self._draft, self._num_written = path, path.with_name(f".{path.name}.partial"), 0
        with self._writing():
            self._file = self._draft.open("w", encoding="utf-8")

    def add(self, line: str) -> None:
        """Append a line; the operating system has it when this returns."""
        with self._writing():
            self._file.write(line)
            self._file.flush()
        self._num_written += 1

    def publish(self) -> None:
        """Put the finished file in its place. Until then only its draft exists."""
        with self._writing():
            os.fsync(self._file.fileno())
            self._file.close()
            self._draft.replace(self._path)

    def _writing(self) -> AbstractContextManager[None]:
        kept = f". The first {self._num_written} answers are in {self._draft}" if self._num_written else ""
        return writing(f"--output {self._path}", f"free space, or give another file{kept}")


class Stream:
    """Writes an answer as it is generated, holding back what may become a stop text or is half a character."""

    def __init__(self, tokenizer: Tokenizer, stop: StopTexts, write: Callable[[str], Any]) -> None:
        self._tokenizer, self._stop, self._write = tokenizer, stop, write
        self._num_held = max((len(text) for text in stop.texts), default=1) - 1
        self._ids, self._num_written = list[int](), 0

    def add(self, row: int, token: int) -> None:
        """Print what a new token adds, as soon as it is whole characters."""
        self._ids.append(token)
        self._show()

    def end(self) -> None:
        self._show(is_whole=True)
        self._write("\n")

    def _show(self, is_whole: bool = False) -> None:
        text = self._stop.cut(self._tokenizer.decode(self._ids))
        if not is_whole:  # the last bytes of a character may be missing
            text = "" if text.endswith("\ufffd") else text[: max(len(text) - self._num_held, 0)]
        self._write(text[self._num_written :])
        self._num_written = max(self._num_written, len(text))


def write_samples(config: RunConfig, output: Path, run: str, num_samples: int, max_new_tokens: int) -> None:
    """Write what a run and its base answer to prompts of its validation data, greedily. In a started world.

        {"prompt": "...", "reference": "the answer in the data", "before": "the base's", "after": "the run's"}

    `run` is the --save folder of the run, or a checkpoint in it, which --load of `config` names too.
    """
    questions = checked_together(lambda: questions_of(run, num_samples, config.model.pretrained_checkpoint))
    model = load_model(config)
    ids = encode_prompts([record for *_, record in questions], model.tokenizer, False, model.max_length)
    prompts = [(prompt, str(number)) for number, prompt in enumerate(ids)]
    plan = GenerationSettings(frozenset(), max_new_tokens, batch_size=16)
    with progress_bar("answering", 2 * len(questions)) as advance:
        after = generate_answers(model, prompts, (), plan)
        advance(len(questions))
        restore_base(model.chunks, model.config, model.shape)
        before = generate_answers(model, prompts, (), plan)
        advance(len(questions))
    lines = ""
    for (prompt, reference, _), *pair in zip(questions, before, after, strict=True):
        first, second = map(model.tokenizer.decode, pair)
        line = {"prompt": prompt, "reference": reference, "before": first, "after": second}
        lines += json.dumps(line, ensure_ascii=False) + "\n"

    def write() -> None:
        with writing(f"--samples: {output}"):
            folders.write_atomically(output, lines)

    checked_together(lambda: write() if dist.get_rank() == 0 else None)


def questions_of(run: str, num_samples: int, base: str | None) -> list[tuple[str, str, Record]]:
    """(prompt as a person reads it, its answer, what is asked), spread evenly over the validation data of a run.

    `base` is the folder of its base model, which may have moved.
    """
    config = run_record.read_run_record(run).config
    data = config.data
    paths = data.data_path or data.valid_data_path
    reason = f"was validated on indexed data ({paths[0]})" if paths else "was trained without"
    message = f"--samples takes prompts from the run's --valid-data-path, but {run} {reason}."
    require(bool(paths) and not is_indexed(paths), message)
    records = RecordFiles(parse_blend(paths, "--valid-data-path").prefixes, "--valid-data-path")
    tokenizer = build_tokenizer(data, base)
    fit = Fit(tokenizer, data.seq_length, columns=ColumnNames.of(data))
    chosen = range(0, len(records), max(len(records) // num_samples, 1))[:num_samples]
    candidates = (question_of(fit.format_of(records, index).native(records[index])) for index in chosen)
    questions = [question for question in candidates if question is not None]
    require(bool(questions), f"--samples needs prompts, but the records of {' '.join(paths)} are plain text.")
    return questions


def question_of(record: Record) -> tuple[str, str, Record] | None:
    """What a record asks: its prompt, or its messages up to the last of the assistant. None if it asks nothing."""
    if isinstance(record.get("prompt"), str):
        return record["prompt"], str(record.get("completion", "")), {"prompt": record["prompt"]}
    messages = record.get("messages")
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        return None
    last = max((at for at, message in enumerate(messages) if message.get("role") == "assistant"), default=0)
    if not last:
        return None
    tools = {"tools": record["tools"]} if record.get("tools") else {}
    prompt, reference = (str(message.get("content")) for message in messages[last - 1 : last + 1])
    return prompt, reference, {"messages": messages[:last], **tools}
