"""Hostile and unlucky files, each given to the program that a user would give it to, which says where the fault is.

Adding a file to a folder of `fixtures/` adds it to the tests. What would be large or deep is made here instead.
"""

import json
import os
import pickle
import re
import struct
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.hostile.programs import CHECKPOINT, Answer, Call, Plant, answers, sign
from tests.ranks import run_ranks

FIXTURES = Path(__file__).with_name("fixtures")
DEEP = b"[" * 100_000 + b"]" * 100_000

_SHORT = "--train-iters 1 --peft-method lora --num-workers 0"
TRAIN = f"pretrain_peft --pretrained-checkpoint base --train-data-path data.jsonl --seq-length 64 {_SHORT}"
CHAT = f"pretrain_peft --pretrained-checkpoint base --train-data-path chat.jsonl --seq-length 64 {_SHORT}"
INDEXED = f"pretrain_peft --pretrained-checkpoint base --data-path tokens_text_document --seq-length 8 {_SHORT}"
RESUME = f"{TRAIN} --load run"
GENERATE = "tools.generate --pretrained-checkpoint base --prompt-file prompts.jsonl --max-new-tokens 2"
FROM_BIN = "tools.generate --pretrained-checkpoint bin --prompt w1 --max-new-tokens 2"
FROM_RUN = "tools.generate --load run --prompt w1 --max-new-tokens 2"
CONVERT = "tools.convert hf-to-megatron --input base --output out"
SHARDED = "tools.convert hf-to-megatron --input sharded --output out"
MERGE = "tools.convert merge --input run --output out --pretrained-checkpoint base"
EXPORT = "tools.convert export-adapter --input run --output out --pretrained-checkpoint base"
IMPORT = "tools.convert import-adapter --input peft --output out --pretrained-checkpoint base"
EVALUATE = "tools.evaluate --pretrained-checkpoint base --tasks tiny_choices --include-path tasks --output out.json"
GSM8K = "tools.prepare_data gsm8k --input gsm8k --output out"
HUMANEVAL = "tools.prepare_data humaneval --input problems.jsonl.gz --output out"
PAIRS = "tools.prepare_data translation --input pairs.tsv --output out --source-language E --target-language F"
PREPROCESS = "tools.preprocess_data --input texts.jsonl --output-prefix other --tokenizer-model base"
ANSWER = EVALUATE.replace("tiny_choices", "tiny_answers")
EXPERIMENT = "tools.experiment grid.yaml --list"
REPORT = "tools.report ."

RECORD = f"{CHECKPOINT}/run_record.json"
ADAPTER = "peft/adapter_config.json"
INDEX = "sharded/model.safetensors.index.json"
JSON_FILES = {
    "base/config.json": TRAIN,
    "data.jsonl": TRAIN,
    "prompts.jsonl": GENERATE,
    ADAPTER: IMPORT,
    INDEX: SHARDED,
    RECORD: FROM_RUN,
    f"{CHECKPOINT}/manifest.json": RESUME,
    "base/generation_config.json": GENERATE,
    "base/tokenizer.json": TRAIN,
    "base/tokenizer_config.json": TRAIN,
    "gsm8k/train.jsonl": GSM8K,
    "texts.jsonl": PREPROCESS,
    "cells/tiny,talk,lora,lr=0.4,seed=1.json": REPORT,
}
NO_FILES = {
    **JSON_FILES,
    "base/model.safetensors": CONVERT,
    "base/chat_template.jinja": CHAT,
    "peft/adapter_model.safetensors": IMPORT,
    "bin/pytorch_model.bin": FROM_BIN,
    "tokens_text_document.idx": INDEXED,
    f"{CHECKPOINT}/.metadata": FROM_RUN,
    "pairs.tsv": PAIRS,
    "grid.yaml": EXPERIMENT,
}


class Case(NamedTuple):
    """`told` is a regular expression that the program's words must hold; without one, they name the file."""

    name: str
    line: str
    file: str
    plant: Plant
    told: str = ""

    def __str__(self) -> str:
        words = self.line.split()
        program = words[1] if words[0] == "tools.convert" else words[0].removeprefix("tools.")
        return f"{program}-{Path(self.file).name}-{self.name}"


def holds(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def fixtures(folder: str) -> Iterator[tuple[str, Plant]]:
    for path in sorted((FIXTURES / folder).iterdir()):
        yield path.name.partition(".")[0], partial(holds, content=path.read_bytes())


def with_values(path: Path, values: dict[str, str]) -> None:
    """The JSON object of `path` with other values, as they are written. `a.b` is b within a."""
    content, written = json.loads(path.read_text()), {}
    for number, (key, value) in enumerate(values.items()):
        *outer, last = key.split(".")
        inner = content
        for name in outer:
            inner = inner[name]
        inner[last] = f"<{number}>"
        written[f'"<{number}>"'] = value
    text = json.dumps(content)
    for stand_in, value in written.items():
        text = text.replace(stand_in, value)
    path.write_text(text)


def value(key: str, written: str) -> Plant:
    return partial(with_values, values={key: written})


def recorded(path: Path, key: str, written: str) -> None:
    with_values(path, {key: written})
    sign(path.parent)


def listed_with_size(path: Path, size: Any) -> None:
    """A manifest that is as it would be written, but for the size of a file."""
    from megatron_peft.checkpoint.folders import FileSum, write_manifest

    path.unlink()
    write_manifest(path.parent, {"run_record.json": FileSum(size, "0")})


def patched(path: Path, offset: int, content: bytes) -> None:
    old = path.read_bytes()
    path.write_bytes(old[:offset] + content + old[offset + len(content) :])


def replaced(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink(missing_ok=True)
    make(path)


def as_it_was(path: Path) -> None:
    """The flags are at fault."""


def pickled(path: Path, kind: str) -> None:
    import torch

    weights: dict[str, Any] = torch.load(path, weights_only=True)
    name, weight = "model.norm.weight", weights["model.norm.weight"]
    torch.save(
        {
            "sparse": {**weights, name: weight.to_sparse()},
            "without numbers": {**weights, name: weight.to("meta")},
            "complex": {**weights, name: weight.to(torch.complex64)},
            "keys that are numbers": dict(enumerate(weights.values())),
            "a list": list(weights.values()),
            "a function": {**weights, "model.run": os.system},
        }[kind],
        path,
    )


def index_of_tokens(place: str, form: str, *numbers: int) -> Plant:
    """Other numbers in the index of eight documents, of a sequence of four tokens each."""
    lengths, pointers = 34, 34 + 8 * 4
    offset = {"count": 18, "lengths": lengths, "pointers": pointers, "documents": pointers + 8 * 8}[place]
    return partial(patched, offset=offset, content=struct.pack(f"<{form}", *numbers))


def cases_of_json() -> Iterator[Case]:
    for file, line in JSON_FILES.items():
        yield Case("100,000 deep", line, file, partial(holds, content=DEEP))
        for name, plant in fixtures("json"):
            whole = file in ("base/config.json", "data.jsonl") or (file == RECORD and name in ("null", "list"))
            if whole or name in ("digits", "surrogate"):
                yield Case(name, line, file, plant)
    for name, plant in fixtures("third_line"):
        yield Case(f"line 3 {name}", TRAIN, "data.jsonl", plant, "data.jsonl, line 3: ")
    for name in ("list", "empty_messages", "torn"):
        yield Case(f"line 3 {name}", GENERATE, "prompts.jsonl", dict(fixtures("third_line"))[name], "prompts.jsonl:3: ")


def cases_of_no_files() -> Iterator[Case]:
    kinds = (os.mkfifo, partial(os.symlink, "/dev/zero"), os.mkdir)
    pipe, device, folder = (partial(replaced, make=make) for make in kinds)
    yield from (Case("a pipe", line, file, pipe) for file, line in NO_FILES.items())
    for file in ("data.jsonl", "base/config.json", "prompts.jsonl", "pairs.tsv"):
        yield Case("a device", NO_FILES[file], file, device)
        yield Case("a folder", NO_FILES[file], file, folder)


def cases_of_models() -> Iterator[Case]:
    for key, written in (
        *(("rms_norm_eps", text) for text in ("Infinity", "NaN", "1e999", "-1e-5", "0", '"1"', "1e30", "1e-300")),
        *(("rope_parameters.rope_theta", text) for text in ("Infinity", "1e999", "-1", "0", "1e300", "9" * 400)),
        *(("num_hidden_layers", text) for text in ("1e12", "1000000000000", "100000", "99999", "true")),
        *((key, "1000000000000") for key in ("hidden_size", "vocab_size", "num_attention_heads", "head_dim")),
        *((key, "2147483646") for key in ("hidden_size", "head_dim", "intermediate_size")),
        ("model_type", "[]"),
        ("model_type", '"x"'),
        ("architectures", "[[]]"),
        ("architectures", "5"),
        ("rope_parameters", '{"rope_type": []}'),
        ("rope_parameters", '{"rope_type": "llama3", "factor": 1e999}'),
        ("dtype", "[]"),
        ("dtype", '"no_type"'),
    ):
        told = "" if written not in ("99999", "2147483646") else "the tensors in base do not fit its config.json"
        yield Case(f"{key} {written[:16]}", TRAIN, "base/config.json", value(key, written), told)
    yield Case("dtype {}", MERGE, "base/config.json", value("dtype", "{}"))
    for kind in ("sparse", "without numbers", "complex", "keys that are numbers", "a list", "a function"):
        told = "model.norm.weight complex64" if kind == "complex" else ""
        yield Case(kind, FROM_BIN, "bin/pytorch_model.bin", partial(pickled, kind=kind), told)
    for length in (2**64 - 1, 2**40, 0):
        plant = partial(patched, offset=0, content=struct.pack("<Q", length))
        yield Case(f"header of {length} bytes", CONVERT, "base/model.safetensors", plant)
    header = struct.pack("<Q", len(DEEP)) + DEEP
    yield Case("header 100,000 deep", CONVERT, "base/model.safetensors", partial(holds, content=header))
    for file in ("../all.safetensors", "/etc/passwd", "..", "config.json", "long" * 80):
        plant = value("weight_map", json.dumps({"a": file}))
        yield Case(f"names {file[:20]}", SHARDED, INDEX, plant, re.escape(file[:20]))
    for written in ('"x"', "[[2]]", "[1.5]"):
        yield Case(f"ends {written}", GENERATE, "base/generation_config.json", value("eos_token_id", written))


def cases_of_adapters_and_runs() -> Iterator[Case]:
    for key, written in (
        *(("lora_alpha", text) for text in ("Infinity", "1e300", "-1", "9" * 400)),
        *(("r", text) for text in ("1000000000000", "-1", "1e3", "9" * 400)),
        *(("target_modules", text) for text in ('"("', "5", "[[]]")),
        ("exclude_modules", "5"),
        ("layers_to_transform", '"x"'),
        ("lora_dropout", '"x"'),
        ("peft_type", "[]"),
    ):
        yield Case(f"{key} {written[:13]}", IMPORT, ADAPTER, value(key, written))
    yield Case("r 2147483646", IMPORT, ADAPTER, value("r", "2147483646"), "the tensors in peft do not fit")
    for key, written in (
        *(("position", text) for text in ("null", "[]", "{}", '{"iteration": -1}', '{"iteration": 1, "__class__": 5}')),
        *(("shape", text) for text in ("null", "{}")),
        *(("config", text) for text in ("null", "[]", "{}")),
        ("shape.num_query_groups", "0"),
        ("shape.rope_scaling", "[]"),
        ("config.peft", "[]"),
        ("config.peft.method", "[]"),
        ("config.peft.lora_rank", '"x"'),
        ("config.training.micro_batch_size", '"x"'),
        ("format_version", '"x"'),
        ("adapted_layers", "5"),
        ("schedule", "[]"),
        ("optimizer_steps", "[]"),
        ("schedule.max_lr", '"x"'),
        ("schedule.num_steps", "1.5"),
        ("shape.architecture", "[]"),
        ("shape.gated_linear_unit", '"x"'),
        ("shape.linear_biases", "{}"),
        ("base_fingerprint", '{"config.json": 5}'),
        ("data_digest", "5"),
    ):
        yield Case(f"{key} {written}", RESUME, RECORD, partial(recorded, key=key, written=written))
    for size in ("x", -1):
        yield Case(f"a size of {size}", RESUME, f"{CHECKPOINT}/manifest.json", partial(listed_with_size, size=size))


def cases_of_data() -> Iterator[Case]:
    for name, plant in {
        "more sequences than bytes": index_of_tokens("count", "Q", 2**62),
        "a length below 0": index_of_tokens("lengths", "2i", -4, 12),
        "a pointer below 0": index_of_tokens("pointers", "q", -8),
        "a pointer outside": index_of_tokens("pointers", "2q", 0, 2**40),
        "documents not in order": index_of_tokens("documents", "3q", 0, 5, 2),
        "a document outside": index_of_tokens("documents", "2q", 0, 99),
    }.items():
        yield Case(name, INDEXED, "tokens_text_document.idx", plant)
    deep = b"{{ " + b"(" * 5000 + b"1" + b")" * 5000 + b" }}"
    for name, plant in (*fixtures("chat_template"), ("5,000 deep", partial(holds, content=deep))):
        told = "chat.jsonl, line 1: .*chat template"
        yield Case(name, CHAT, "base/chat_template.jinja", plant, told)
    chat = GENERATE.replace("--prompt-file prompts.jsonl", "--prompt w1 --chat")
    told = "prompt 1: the chat template in base"
    yield Case("attack of --chat", chat, "base/chat_template.jinja", dict(fixtures("chat_template"))["attack"], told)
    for key, written in (
        ("model.vocab", '{"w1": -5}'),
        ("model.vocab", '{"w1": 1000000000000000}'),
        ("pre_tokenizer", '{"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": false}'),
        ("model", '{"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}'),
        ("added_tokens", "5"),
    ):
        yield Case(f"{key} {written[:20]}", TRAIN, "base/tokenizer.json", value(key, written))
    for key, written in (("eos_token", "5"), ("tokenizer_class", "5"), ("added_tokens_decoder", "5")):
        yield Case(f"{key} {written}", TRAIN, "base/tokenizer_config.json", value(key, written))
    for name, plant in fixtures("gzip"):
        yield Case(name, HUMANEVAL, "problems.jsonl.gz", plant)
    deep = b"[" * 5000
    for name, plant in (*fixtures("yaml"), ("5,000 deep", partial(holds, content=deep))):
        yield Case(name, EXPERIMENT, "grid.yaml", plant)
        if name in ("5,000 deep", "python_tag"):
            yield Case(name, REPORT, "experiment.yaml", plant)
        if name in ("5,000 deep", "python_tag", "tab"):
            yield Case(name, EVALUATE, "tasks/tiny_choices.yaml", plant)
    for written in ('"iteration": "x"', '"loss": "x"', '"learning_rate": []', '"grad_norm_by_layer": {"a": "x"}'):
        plant = partial(holds, content=f'{{"iteration": 1, "loss": 2.0, {written}}}\n'.encode())
        yield Case(written, "tools.report run", "run/metrics.jsonl", plant, "metrics.jsonl, line 1: ")


def cases_of_tasks() -> Iterator[Case]:
    told = "--tasks tiny_choices: "
    for key, written in (
        ("doc_to_text", "\"{{ cycler.__init__.__globals__.os.system('id') }}\""),
        ("metric_list", '[{"metric": "acc", "aggregation": "nope"}]'),
        ("num_fewshot", "5"),
    ):
        yield Case(f"{key} {written[:20]}", EVALUATE, "tasks/tiny_choices.yaml", value(key, written), told)
    for key, written in (("until", "5"), ("max_gen_toks", '"many"'), ("max_gen_toks", "-5"), ("temperature", '"hot"')):
        kwargs = f"generation_kwargs.{key}"
        told = "error: --tasks tiny_answers(: generation_kwargs of task tiny_answers: | cannot be loaded: .*hot)"
        yield Case(f"{key} {written[:20]}", ANSWER, "tasks/tiny_answers.yaml", value(kwargs, written), told)
    plant = partial(holds, content=b'{"key": "\xff", "answer": 1}\n')
    yield Case("no_utf8", EVALUATE, "out.requests.jsonl", plant, "out.requests.jsonl:1 is not")


def not_finite(path: Path, name: str) -> None:
    """The last value of the first tensor with `name` in its name."""
    if path.suffix == ".distcp":
        from tests.conversion.megatron_folders import hold_nan

        hold_nan(path.parent, name)
        return
    import torch
    from safetensors.torch import load_file, save_file

    is_safe = path.suffix == ".safetensors"
    weights = load_file(path) if is_safe else torch.load(path, weights_only=True)
    next(tensor for key, tensor in weights.items() if name in key).view(-1)[-1] = torch.inf
    save_file(weights, path, {"format": "pt"}) if is_safe else torch.save(weights, path)


def without_slices(path: Path) -> None:
    """An index that lists the tensors and no slice of them."""
    index = pickle.loads(path.read_bytes())
    for tensor in index.state_dict_metadata.values():
        getattr(tensor, "chunks", []).clear()
    path.write_bytes(pickle.dumps(index))
    sign(path.parent)


def cases_of_weights() -> Iterator[Case]:
    """NaN and infinities, wherever weights enter; tensors of which nothing is stored."""
    run, adapter, head = f"{CHECKPOINT}/__0_0.distcp", "decoder.layers.1.mlp.linear_fc2.adapter", "lm_head"
    for line, file, name in (
        *((line, "base/model.safetensors", head) for line in (GENERATE, EVALUATE, CONVERT, TRAIN, MERGE)),
        *((line, run, adapter) for line in (FROM_RUN, MERGE, EXPORT, f"{EXPORT} --as-lora", RESUME)),
        (IMPORT, "peft/adapter_model.safetensors", "lora_B"),
        (FROM_BIN, "bin/pytorch_model.bin", head),
    ):
        told = rf"{re.escape(Path(file).name)} holds NaN or infinities in .*{re.escape(name)}"
        yield Case("not finite", line, file, partial(not_finite, name=name), told)
    told = r"\.metadata is damaged: slices of a tensor are missing or overlap"
    yield Case("no slices", FROM_RUN, f"{CHECKPOINT}/.metadata", without_slices, told)


def cases_of_flags() -> Iterator[Case]:
    """Numbers and names that no file holds."""
    for words in (
        *("--train-iters 1e30", f"--train-iters {10**30}", "--global-batch-size 1000000000000"),
        *("--micro-batch-size 1000000000000", "--lora-rank 1000000000000", "--num-workers 1000000000"),
    ):
        yield Case(words, f"{TRAIN} {words}", "data.jsonl", as_it_was, words.partition(" ")[0])
    for name in ("../x", "a/x", ".."):
        yield Case(f"--task-name {name}", f"{PAIRS} --task-name {name}", "pairs.tsv", as_it_was, f"--task-name {name}")


CASES = [
    case
    for cases in (
        *(cases_of_json, cases_of_no_files, cases_of_models, cases_of_adapters_and_runs, cases_of_data),
        *(cases_of_tasks, cases_of_flags, cases_of_weights),
    )
    for case in cases()
]


@pytest.fixture(scope="module")
def answered(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Answer]:
    """By the case's number, of those that were asked for: they share one process's imports."""
    found = [getattr(item, "callspec", None) for item in request.session.items if item.path == request.path]
    numbers = [one.params["number"] for one in found if one]
    calls = [Call(CASES[number].line, CASES[number].file, CASES[number].plant) for number in numbers]
    (told,) = run_ranks(1, answers, (tmp_path_factory.mktemp("hostile"), calls), limit=600)
    return dict(zip(numbers, told, strict=True))


def pick(number: int, case: Case) -> list[pytest.MarkDecorator]:
    """`make test` takes every third one, as neighbours differ by file or fault; of `evaluate`, which is slow, half."""
    left_out = number % 3 or (case.line.startswith("tools.evaluate") and number % 2 == 0)
    return [pytest.mark.slow] if left_out else []


@pytest.mark.parametrize(
    "number", [pytest.param(number, id=str(case), marks=pick(number, case)) for number, case in enumerate(CASES)]
)
def test_a_hostile_file_ends_the_program_with_2_and_is_named(number: int, answered: dict[int, Answer]) -> None:
    case, (code, told, *_) = CASES[number], answered[number]
    assert code == 2, f"{code}: {told[-2000:]}"
    assert "Traceback" not in told and re.search(case.told or re.escape(Path(case.file).name), told), told[-2000:]
