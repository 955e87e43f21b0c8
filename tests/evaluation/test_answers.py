"""Settled before `generate` and `evaluate` ask a model: settings, prompts, files, flags of a run; the stream too.

And answers before and after training: the base's and the run's own, to prompts of the validation data.
"""

import json
import os
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from megatron_peft import config as c
from megatron_peft.checkpoint.folders import MANIFEST
from megatron_peft.cli.parser import RunFlags, read_config
from megatron_peft.config import ConfigurationError, ParallelConfig, PeftConfig, RunConfig
from megatron_peft.config.evaluation import AnswerSettings, HarnessSettings, Sampling
from megatron_peft.evaluation import answers, harness_run, model
from megatron_peft.evaluation.answers import (
    AnswerFile,
    Stream,
    encode_prompts,
    plan_of,
    question_of,
    questions_of,
    read_prompts,
    records_of,
    write_samples,
)
from megatron_peft.evaluation.generation import StopTexts
from megatron_peft.evaluation.model import end_ids, load_model, model_fingerprint, run_on_a_model, saved_values
from megatron_peft.runtime.launch import stop_model_parallel
from megatron_peft.training.run import finetune
from tests.evaluation.worded_llama import save_worded_llama, save_worded_pairs
from tests.one_rank import one_rank
from tests.recorded_calls import recorded_calls
from tests.tiny_llama import save_llama
from tests.training.recorded_saves import small_files_only

BYTES: Any = SimpleNamespace(  # a byte an id
    special_tokens={},
    prefix_id=1,
    encode=lambda text: list(text.encode()),
    decode=lambda ids: bytes(ids).decode(errors="replace"),
    encode_prompt=lambda text: [0, *text.encode()] if text else [],
    render_chat=lambda messages, add_generation_prompt=False, tools=None: (
        "".join(f"<{message['content']}>" for message in messages) + "?" * add_generation_prompt
    ),
)


@pytest.mark.parametrize(
    ("answer", "stops", "grown", "ended"),
    [
        ("café".encode(), [], "café", "café\n"),
        ("é".encode()[:1], [], "", "\ufffd\n"),  # half a character waits
        (b"one\nQ:two", ["\nQ:"], "one", "one\n"),  # a stop is never shown
        (b"one\nQ", ["\nQ:"], "one", "one\nQ\n"),  # and what may become one is held back
        (b"The end", ["The end"], "", "\n"),  # of a text that is nothing else too
    ],
)
def test_the_text_grows_but_for_half_a_character_and_what_may_be_a_stop(answer, stops, grown, ended):
    written: list[str] = []
    stream = Stream(BYTES, StopTexts(BYTES, stops), written.append)
    for token in answer:
        stream.add(0, token)
    assert "".join(written) == grown
    stream.end()
    assert "".join(written) == ended


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (lambda: Sampling(temperature=-1.0), "--temperature is -1.0; it cannot be negative"),
        (lambda: Sampling(top_p=0.0), "--top-p is 0.0; it is a probability, above 0 and at most 1"),
        (lambda: AnswerSettings("a", "b"), "exactly one of"),
        (lambda: AnswerSettings("a", top_k=3), "--top-p and --top-k choose among sampled tokens: give a --temperature"),
        (lambda: AnswerSettings("a", top_p=0.5), "--top-p and --top-k choose among sampled tokens"),
        (lambda: AnswerSettings("a", num_samples=3), "--num-samples 3 with --temperature 0 gives the same answer"),
        (lambda: AnswerSettings("a", max_new_tokens=0), "--max-new-tokens is 0; it must be above 0"),
        (lambda: HarnessSettings([], "", limit=0), "--limit is 0; it must be above 0"),
        (lambda: HarnessSettings([], "", batch_size=0), "--batch-size is 0"),
        (lambda: HarnessSettings([], "", limit=2.5), "--limit is 2.5; it is a number of questions, or below 1 a share"),
        (lambda: HarnessSettings([], "", num_fewshot=-1), "--num-fewshot is -1; it cannot be negative"),
    ],
)
def test_settings_out_of_range_and_contradictions_are_told(settings, message):
    with pytest.raises(ConfigurationError, match=message):
        settings()


def test_a_stop_text_writes_a_new_line_as_backslash_n_and_a_prompt_stands_as_it_is():
    settings = AnswerSettings(prompt="$\\theta$", stop=["\\n\\n"], temperature=0.5, top_k=3, sampling_seed=9)
    assert records_of(settings) == [{"prompt": "$\\theta$"}]
    until, plan = answers.plan_of(settings)
    assert until == ("\n\n",) and (plan.sampling.temperature, plan.sampling.top_k, plan.seed) == (0.5, 3, 9)


def test_an_answer_is_on_the_disk_before_the_next_is_asked_and_the_file_is_open_before_the_model(tmp_path, monkeypatch):
    path, seen = tmp_path / "new" / "out.jsonl", []
    draft = path.with_name(".out.jsonl.partial")

    def load(config, *_):
        seen.append(draft.read_text())
        return nullcontext(SimpleNamespace(tokenizer=BYTES, max_length=9))

    def lines(*_):
        for line in ("one\n", "two\n"):
            seen.append(draft.read_text())
            yield line

    monkeypatch.setattr(answers, "checked_together", lambda check: check())
    monkeypatch.setattr(answers.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(answers, "opened_model", load)
    monkeypatch.setattr(answers, "_lines", lines)
    answers.answer(_config(), AnswerSettings(prompt="a", output=str(path)))
    assert seen == ["", "", "one\n"] and path.read_text() == "one\ntwo\n"


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("link", "is a link, not a file: give another path"),
        ("pipe", "is a pipe or a device, not a file"),
        ("folder", "is a folder: give a file"),
        ("mine/x", "cannot be written"),
    ],
)
def test_what_is_no_plain_file_is_never_replaced(tmp_path, name, told):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    path = tmp_path / name
    with pytest.raises(ConfigurationError, match=f"--output {path} {told}"):
        records_of(AnswerSettings(prompt="a", output=str(path), overwrite=True))
    with pytest.raises(ConfigurationError, match=f"--output {path} {told}"):
        harness_run._checked_tasks(_config(), HarnessSettings([], str(path), overwrite=True))
    assert (tmp_path / "link").is_symlink() and (tmp_path / "mine").read_text() == "mine"


@pytest.mark.parametrize("found", [("other", {}), ("this", {"tasks": ["b"]}), ("this", {"limit": 3.0}), None])
def test_other_results_are_not_replaced_unless_asked(tmp_path, monkeypatch, found):
    """Those of another model, of another task, of fewer questions; what holds no results."""
    monkeypatch.setattr(harness_run, "model_fingerprint", lambda config: "this")
    monkeypatch.setattr(harness_run, "find_tasks", lambda *_: "found")
    path = tmp_path / "scores.json"
    settings = HarnessSettings(["a"], str(path))

    def text(fingerprint, changed):
        evaluation = settings.result_settings() | changed
        return json.dumps({"config": {"checkpoint_fingerprint": fingerprint, "evaluation": evaluation}})

    path.write_text(text(*found) if found else "mine")
    with pytest.raises(ConfigurationError, match="scores.json exists already.*--overwrite"):
        harness_run._checked_tasks(_config(), settings)
    assert harness_run._checked_tasks(_config(), replace(settings, overwrite=True))[0] == "found"
    path.write_text(text("this", {}))
    assert harness_run._checked_tasks(_config(), settings)[0] == "found"


def test_a_file_that_is_there_is_replaced_where_that_is_asked_for_and_never_the_prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("hello\n")
    with pytest.raises(ConfigurationError, match="prompts.txt exists already: give another file, or --overwrite"):
        records_of(AnswerSettings(prompt="a", output=str(path)))
    records_of(AnswerSettings(prompt="a", output=str(path), overwrite=True))
    with pytest.raises(ConfigurationError, match="is the file of --prompt-file"):
        records_of(AnswerSettings(prompt_file=str(path), output=str(path), overwrite=True))


def test_answers_are_kept_as_they_come_where_the_disk_fills(tmp_path, monkeypatch):
    file, line = AnswerFile(tmp_path / "out.jsonl"), '{"answers": ["yes"]}\n'
    with small_files_only(3 * len(line)):
        for _ in range(3):
            file.add(line)
        with pytest.raises(ConfigurationError, match=r"The first 3 answers are in .*\.out\.jsonl\.partial"):
            file.add(line)
    assert (tmp_path / ".out.jsonl.partial").read_text() == 3 * line and not (tmp_path / "out.jsonl").exists()
    whole = AnswerFile(tmp_path / "out.jsonl")
    whole.add(line)
    calls = recorded_calls(monkeypatch)
    whole.publish()
    assert (tmp_path / "out.jsonl").read_text() == line
    assert calls == [("fsync", tmp_path / ".out.jsonl.partial"), ("replace", tmp_path / "out.jsonl")]


@pytest.mark.parametrize(
    ("num_samples", "batch_size", "portions"), [(1, 2, [4, 1]), (2, 2, [4, 4, 2]), (3, 1, 5 * [3])]
)
def test_every_answer_has_a_random_stream_of_its_own_and_its_place(monkeypatch, num_samples, batch_size, portions):
    """On two replicas, in portions of a batch for each."""
    asked: list[list[str]] = []

    def generated(model, prompts, until, plan):
        asked.append([name for _, name in prompts])
        return [[*name.encode()] for _, name in prompts]

    monkeypatch.setattr(answers, "generate_answers", generated)
    model: Any = SimpleNamespace(tokenizer=BYTES, batches_at_once=2)
    settings = AnswerSettings(prompt_file="f", num_samples=num_samples, batch_size=batch_size, temperature=1.0)
    records = [{"prompt": f"p{number}"} for number in range(5)]
    lines = [*answers._lines(model, settings, records, [[1]] * 5)]
    assert [len(names) for names in asked] == portions
    for number, line in enumerate(lines):
        own = [f"{number}/{sample}" for sample in range(num_samples)]
        assert json.loads(line) == {"prompt": f"p{number}", "answers": own}
    assert len(lines) == 5


def test_answers_of_another_base_checkpoint_or_precision_are_not_taken_for_those_of_this_model(tmp_path, monkeypatch):
    monkeypatch.setattr(model, "base_fingerprint", lambda folder: {"weights": folder})
    monkeypatch.setattr(model.run_record, "find_checkpoint", lambda load: tmp_path / load)
    for load in ("one", "other"):
        (tmp_path / load).mkdir()
        (tmp_path / load / MANIFEST).write_text(load)
    changes: list[dict[str, Any]] = [{}, {"bf16": False}, {"base_precision": "nf4"}, {"base_precision": "fp8"}]
    changes.append({"base_precision": "fp8", "quantize_output_layer": True})
    found = {
        model_fingerprint(replace(config, checkpoint=replace(config.checkpoint, load=load)))
        for base in ("a", "b")
        for config in (replace(_config(base), model=replace(_config(base).model, **one)) for one in changes)
        for load in (None, "one", "other")
    }
    assert len(found) == 30


PARTS = '{{"messages": [{{"role": "user", "content": [{{"type": "{}", "text": "Hi"}}]}}], "id": 4}}'


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.txt", "one\n\n{two\n", [{"prompt": "one"}, {"prompt": "{two"}]),
        ("a.jsonl", '{"prompt": "x", "id": 3}\n', [{"prompt": "x", "id": 3}]),
        ("a.jsonl", '{"prompt": "x"}\nx\n', r"a\.jsonl:2: not JSON"),
        ("a.jsonl", '{"text": "x"}\n', r'a\.jsonl:1: neither {"prompt": "..."} nor'),
        ("a.jsonl", "[1]\n", r"a\.jsonl:1: neither"),
        ("a.jsonl", '{"messages": "hi"}', r"a\.jsonl:1: neither"),
        ("a.jsonl", PARTS.format("text"), [{"messages": [{"role": "user", "content": "Hi"}], "id": 4}]),
        ("a.jsonl", PARTS.format("image"), r'a\.jsonl:1: "content" of message 1 has a part of type image'),
        ("a.txt", "\n", "contains no prompt"),
        ("a.txt", None, "--prompt-file .*a.txt cannot be read"),
    ],
)
def test_a_file_holds_a_prompt_a_line_and_wrong_lines_are_named(tmp_path, name, text, expected):
    if text is not None:
        (tmp_path / name).write_text(text)
    if isinstance(expected, list):
        assert read_prompts(tmp_path / name) == expected
    else:
        with pytest.raises(ConfigurationError, match=expected):
            read_prompts(tmp_path / name)


def test_a_conversation_is_read_as_in_training(tmp_path):
    file, turns = tmp_path / "a.jsonl", [{"from": "human", "value": "Hi"}]
    file.write_text(json.dumps({"messages": turns, "system": "S", "tools": '[{"name": "f"}]'}))
    [found] = read_prompts(file)
    assert found["messages"] == [{"role": "system", "content": "S"}, {"role": "user", "content": "Hi"}]
    assert found["tools"] == [{"name": "f"}]
    file.write_text(json.dumps({"messages": turns, "tools": "f"}))
    with pytest.raises(ConfigurationError, match=r'a\.jsonl:1: "tools" is not a list of objects'):
        read_prompts(file)


def test_prompts_and_conversations_become_ids_and_leave_room_for_a_token():
    records = [{"prompt": "a"}, {"prompt": ""}, {"messages": [{"role": "user", "content": "b"}]}]
    assert encode_prompts(records, BYTES, False, 9) == [[0, 97], [1], [60, 98, 62, 63]]
    assert encode_prompts(records[:1], BYTES, True, 9) == [[60, 97, 62, 63]]
    with pytest.raises(ConfigurationError, match="prompt 1 has 4 tokens, but the model has 4 positions"):
        encode_prompts([{"prompt": "abc"}], BYTES, False, 4)
    # The answer that data have is not shown to the model.
    answered = [*records[2]["messages"], {"role": "assistant", "content": "c"}]
    assert encode_prompts([{"messages": answered}], BYTES, False, 9) == [[60, 98, 62, 63]]
    with pytest.raises(ConfigurationError, match="prompt 1: all of its messages are the assistant's"):
        encode_prompts([{"messages": answered[1:]}], BYTES, False, 9)


HI = {"role": "user", "content": "b"}


@pytest.mark.parametrize(
    ("record", "text"),
    [
        pytest.param({"prompt": "a"}, "<S><a>?", id="prompt"),
        pytest.param({"messages": [HI]}, "<S><b>?", id="messages"),
        pytest.param({"messages": [{"role": "system", "content": "T"}, HI]}, "<T><b>?", id="system message of its own"),
    ],
)
def test_generate_puts_the_system_message_first(record, text, monkeypatch):
    asked, settings = [], AnswerSettings(prompt="", chat=True, system="S")
    monkeypatch.setattr(answers, "generate_answers", lambda model, prompts, *_: asked.extend(prompts))
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    answers._answer(SimpleNamespace(tokenizer=BYTES, max_length=99), settings, [record], *plan_of(settings), None)
    assert bytes(asked[0][0]).decode() == text


LORA = PeftConfig(lora_rank=3, lora_rs=True, target_modules=("linear_qkv", "*fc1"), lora_dropout=0.1)


@pytest.mark.parametrize(("named", "ids"), [("2", {2}), ("[2, 5]", {2, 5}), ("null", set())])
def test_a_model_may_name_several_ends_or_none(tmp_path, named, ids):
    assert end_ids(str(tmp_path)) == set()
    (tmp_path / "generation_config.json").write_text(f'{{"eos_token_id": {named}}}')
    assert end_ids(str(tmp_path)) == ids
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ConfigurationError, match="generation_config.json: not JSON"):
        end_ids(str(tmp_path))


def test_what_ends_the_data_of_a_run_ends_an_answer_beside_what_the_base_names(tmp_path):
    base = save_llama(tmp_path / "base", num_hidden_layers=1)
    (base / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    config = replace(_config(str(base)), parallel=ParallelConfig())
    with one_rank(with_groups=False):
        assert load_model(config).end_ids == {2, 5, config.data.vocab_size}


def _config(base: str = "base", peft: PeftConfig = LORA) -> RunConfig:
    model = {"pretrained_checkpoint": base, "bf16": True, "make_vocab_size_divisible_by": 64, "world_size": 4}
    data = {"train_data_path": ("a.jsonl",), "tokenizer_type": "NullTokenizer", "vocab_size": 99, "seed": 7}
    training = {"train_epochs": 3, "micro_batch_size": 2, "global_batch_size": 8, "tensor_model_parallel_size": 2}
    return replace(c.make_run(**model, **data, **training), peft=peft)


@pytest.fixture
def run(monkeypatch, tmp_path) -> str:
    """The base model's folder, which a run named `run` was trained on."""
    record = SimpleNamespace(config=_config(str(tmp_path / "base")))
    monkeypatch.setattr(model.run_record, "read_run_record", lambda folder: record)
    (tmp_path / "base").mkdir()
    return str(tmp_path / "base")


def _parse(*argv: str) -> RunConfig:
    return read_config(argv, {"WORLD_SIZE": "2"}, saved=saved_values)


def test_all_of_a_run_that_decides_its_answers_is_taken_from_it():
    config = _config(peft=PeftConfig(method="boft"))
    config = replace(config, model=replace(config.model, base_precision="nf4", quantize_output_layer=True))
    data = replace(config.data, tokenizer_model="tokens", chat_template="{{ messages }}")
    tokenizer = {"tokenizer_type": "NullTokenizer", "vocab_size": 99}
    tokenizer |= {"tokenizer_model": "tokens", "chat_template": "{{ messages }}"}
    base = {"pretrained_checkpoint": "base", "bf16": True, "make_vocab_size_divisible_by": 64}
    base |= {"base_precision": "nf4", "quantize_output_layer": True}
    found = model.values_of_model(replace(config, data=data))
    assert found == {**base, **tokenizer, "seed": 7, "method": "boft"}


def test_the_layout_is_the_users_what_is_typed_holds_and_a_base_that_is_not_there_is_told(run, tmp_path):
    config = _parse("--load", "run", "--pipeline-model-parallel-size", "2")
    assert config.peft == LORA and config.model.pretrained_checkpoint == run and config.model.bf16
    assert config.parallel == ParallelConfig(pipeline_model_parallel_size=2, world_size=2)
    assert config.checkpoint.load == "run" and config.training.seed == config.data.seed == 7
    config = _parse("--load=run", "--pretrained-checkpoint", "elsewhere", "--lora-rank", "5")
    assert config.model.pretrained_checkpoint == "elsewhere" and config.peft.lora_rank == 5
    record: Any = model.run_record.read_run_record("run")
    quantized = replace(record.config.model, base_precision="nf4", quantize_output_layer=True)
    record.config = replace(record.config, model=quantized)
    assert _parse("--load=run").model.quantization == quantized.quantization
    on_its_own = _parse("--load=run", "--base-precision=run", "--allow-other-base-precision").model
    assert on_its_own.base_precision == "run" and not on_its_own.quantize_output_layer
    (tmp_path / "base").rmdir()
    with pytest.raises(ConfigurationError, match=f"base model {run}, which does not exist.*--pretrained-checkpoint"):
        saved_values({"load": "run"})
    assert saved_values({"load": "run", "pretrained_checkpoint": "here"})


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--load", ""], "^--load is empty: give the folder of a run"),
        (["--load", "nowhere"], "^nowhere holds no checkpoint"),
        (["--pretrained-checkpoint", "nowhere", "--wibble"], "(?s)^--wibble is not a known flag.*nowhere"),
    ],
)
def test_what_is_wrong_is_told_before_a_world_is_made(flags, told):
    ran = []
    with pytest.raises(ConfigurationError, match=told):
        run_on_a_model(lambda *both: ran.append(both), 1, RunFlags(flags))
    assert not ran and not dist.is_initialized()


TURNS = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b"), ("user", "c"))]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"prompt": "a ", "completion": "b"}, ("a ", "b", {"prompt": "a "})),
        ({"messages": TURNS}, ("a", "b", {"messages": TURNS[:1]})),
        (
            {"messages": [*TURNS, {"role": "assistant", "content": "d"}], "tools": [{}]},
            ("c", "d", {"messages": TURNS, "tools": [{}]}),
        ),
        ({"messages": TURNS[1:]}, None),
        ({"messages": TURNS[:1]}, None),
        ({"messages": "a"}, None),
        ({"text": "a"}, None),
    ],
)
def test_what_a_record_asks(record, expected):
    assert question_of(record) == expected


def test_a_run_without_prompts_is_an_error(tmp_path, monkeypatch):
    base, file = save_worded_llama(tmp_path / "base"), tmp_path / "texts.jsonl"

    def ask(*paths: str):
        config = c.make_run(pretrained_checkpoint="where it was", train_data_path=("a.jsonl",), valid_data_path=paths)
        monkeypatch.setattr(answers.run_record, "read_run_record", lambda run: SimpleNamespace(config=config))
        return questions_of("run", 2, str(base))

    file.write_text('{"text": "w1 w2"}\n')
    for paths, told in (((), "was trained without"), ((str(file),), "are plain text")):
        with pytest.raises(ConfigurationError, match=told):
            ask(*paths)
    file.write_text(json.dumps({"instruction": "w1 w2", "input": "", "output": "w3"}))  # Alpaca's
    (question,) = ask(str(file))
    assert "w1 w2" in question[0] and question[1] == "w3"


def _samples(folder: Path, name: str, flags: str) -> list[dict[str, str]]:
    """Of a run that is trained before."""
    run, pairs = folder / name, str(folder / "pairs.jsonl")
    where = ["--pretrained-checkpoint", str(folder / "base"), "--save", str(run)]
    common = "--micro-batch-size 4 --seq-length 32 --num-workers 0 --log-interval 10 --train-iters 30"
    data = ["--train-data-path", pairs, "--valid-data-path", pairs]
    finetune(read_config([*where, *data, *common.split(), *flags.split()]))
    stop_model_parallel()
    config = read_config(["--load", str(run)], saved=saved_values)
    write_samples(config, run / "samples.jsonl", str(run), 4, max_new_tokens=6)
    stop_model_parallel()
    return [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_before_is_the_base_and_after_the_run_for_every_kind_of_method(tmp_path):
    """Full fine-tuning changes the base's own weights, and merging the Hybrid does."""
    save_worded_llama(tmp_path / "base")
    save_worded_pairs(tmp_path / "pairs.jsonl")
    hybrid = "--peft-method hybrid --lora-rank 8 --lora-ga-batches 1 --boft-block-size 4 --boft-factors 1"
    with one_rank(with_groups=False):
        full = _samples(tmp_path, "full", "--peft-method full --lr 3e-3")
        mixed = _samples(tmp_path, "hybrid", f"{hybrid} --lr 8e-3 --hybrid-merge-interval 8 --train-iters 12")
    assert [one["prompt"] for one in full] == ["w0 ", "w2 ", "w4 ", "w6 "]
    assert full[1]["reference"] == full[1]["after"] == "w3 w4 w5"
    assert [one["before"] for one in full] == [one["before"] for one in mixed]
    assert all(one["before"] != one["after"] for one in (*full, *mixed))
