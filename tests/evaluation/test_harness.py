"""Scores of the harness: those of its own backend to the last item, at any layout, with standard errors; finished
requests survive a kill."""

import io
import json
import os
import random
import signal
import threading
import time
from collections.abc import Mapping
from contextlib import redirect_stdout, suppress
from pathlib import Path
from statistics import stdev
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist
from lm_eval.api.metrics import acc_all, bleu, bypass_agg, f1_score, mean, weighted_perplexity
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager
from torch.utils import collect_env
from transformers import AutoTokenizer

from megatron_peft.cli.parser import read_config
from megatron_peft.config import ConfigurationError
from megatron_peft.config.evaluation import AnswerSettings, HarnessSettings
from megatron_peft.data.tokenizers import HuggingFaceTokenizer
from megatron_peft.evaluation import harness, model
from megatron_peft.evaluation.answers import answer
from megatron_peft.evaluation.harness import FinishedRequests, _is_score
from megatron_peft.evaluation.harness_run import NUM_DRAWS, evaluate, evaluator_utils
from megatron_peft.evaluation.model import saved_values
from megatron_peft.runtime.launch import start_world, stop, stop_model_parallel
from megatron_peft.training.run import finetune
from tests.data.tiny_tokenizers import CHATML, save_tokenizer
from tests.evaluation.local_tasks import TASKS, write_tasks
from tests.evaluation.worded_llama import WORDS, save_worded_llama, save_worded_pairs
from tests.one_rank import one_rank
from tests.ranks import RanksFailed, run_ranks

LAYOUTS = {
    "TP2": ["--tensor-model-parallel-size", "2"],
    "PP2": ["--pipeline-model-parallel-size", "2"],
    "DP2": ["--save-interval", "9"],
}
QUICK_LAYOUTS = ("PP2", "DP2")
PROMPTS = [{"prompt": "w1 w2"}, {"messages": [{"role": "user", "content": "w9"}], "id": 7}, {"prompt": "w4"}]


# Evaluations and answers of a trained run, alone and split among ranks. They find a model in `base`, training data in
# `pairs.jsonl`, tasks in `tasks`; what they write lies beside these.


def run_flags(folder: Path) -> list[str]:
    return ["--load", str(folder / "run")]


def run_alone(folder: Path) -> dict[str, Any]:
    """Train, then ask the base, the run, and the base as the harness's own backend sees it."""
    start_world()
    _without_pip()
    _train(folder)
    base = ["--pretrained-checkpoint", str(folder / "base")]
    found = {"base": _evaluate(folder, "base", base), "run": _evaluate(folder, "run", run_flags(folder))}
    found["finished"] = len((folder / "run.requests.jsonl").read_text().splitlines())
    found["hf"] = _by_the_harness(folder)
    found["streamed"] = _printed(lambda: _answer(folder, prompt="w1 w2", max_new_tokens=5))
    _answer(folder, prompt_file=str(folder / "prompts.jsonl"), output=str(folder / "alone.jsonl"), max_new_tokens=16)
    found["complaints"] = [
        _complaint([*run_flags(folder), "--lora-rank", "4"], "w1"),
        _complaint([*run_flags(folder), "--pretrained-checkpoint", str(folder / "other")], "w1"),
        _complaint(run_flags(folder), "w1 " * 300),
    ]
    return found


def run_until_killed(job: tuple[Path, int, float]) -> None:
    """The evaluation of the run, killed so many seconds after so many of its requests are answered on disk."""
    folder, num_requests, seconds = job
    file = folder / "stopped.requests.jsonl"

    def kill() -> None:
        while not file.exists() or file.read_bytes().count(b"\n") < num_requests:
            time.sleep(0.001)
        time.sleep(seconds)
        os.kill(os.getpid(), signal.SIGKILL)

    start_world()
    threading.Thread(target=kill, daemon=True).start()
    _evaluate(folder, "stopped", run_flags(folder))


def run_again(folder: Path) -> dict[str, Any]:
    """To its end, and once more over the results that it has written."""
    start_world()
    _evaluate(folder, "stopped", run_flags(folder))
    return _evaluate(folder, "stopped", run_flags(folder))


def run_split(job: tuple[Path, list[str]]) -> dict[str, Any]:
    """The trained run at these layouts: results, and a file of answers that are drawn."""
    folder, layouts = job
    start_world()
    _without_pip()
    found: dict[str, Any] = {}
    drawn = {"temperature": 1.0, "num_samples": 2, "batch_size": 3, "max_new_tokens": 16}
    for layout in dict.fromkeys(layouts):
        flags = LAYOUTS[layout]
        found[layout] = _evaluate(folder, layout, [*run_flags(folder), *flags])
        _answer(folder, flags, prompt_file=str(folder / "prompts.jsonl"), output=str(folder / layout), **drawn)
    found["streamed"] = _printed(lambda: _answer(folder, LAYOUTS["DP2"], prompt="w1 w2", max_new_tokens=5))
    return found


def _without_pip() -> None:
    """The harness asks pip for every package and writes its list beside each result: two seconds each time."""
    collect_env.get_pip_packages = lambda *_: ("pip3", "")


def _train(folder: Path) -> None:
    flags = ["--pretrained-checkpoint", str(folder / "base"), "--train-data-path", str(folder / "pairs.jsonl")]
    flags += "--peft-method lora --lora-rank 3 --lora-alpha 9 --lr 2e-2 --seq-length 32 --num-workers 0".split()
    flags += ["--global-batch-size", "8", "--train-iters", "6", "--save", str(folder / "run"), "--seed", "5"]
    _printed(lambda: finetune(read_config(flags)))
    stop_model_parallel()


def _evaluate(folder: Path, name: str, flags: list[str], **changes: Any) -> dict[str, Any]:
    """The file of results, and the file of questions and answers by (task, number)."""
    output, asked = folder / f"{name}.json", {"batch_size": 4, "log_samples": True, **changes}
    settings = HarnessSettings(list(TASKS), str(output), [str(folder / "tasks")], **asked)
    _ask(flags, lambda config: evaluate(config, settings))
    samples = map(json.loads, output.with_suffix(".samples.jsonl").read_text().splitlines())
    return {**json.loads(output.read_text()), "samples": {(one["task"], one["doc_id"]): one for one in samples}}


def _answer(folder: Path, flags: list[str] | None = None, **settings: Any) -> None:
    _ask([*run_flags(folder), *(flags or [])], lambda config: answer(config, AnswerSettings(**settings)))


def _ask(flags: list[str], question: Any) -> None:
    question(read_config(flags, {"WORLD_SIZE": str(dist.get_world_size())}, saved=saved_values))
    dist.barrier()
    stop_model_parallel()


def _by_the_harness(folder: Path) -> dict[str, Any]:
    from lm_eval.models.huggingface import HFLM

    names = [name for name in TASKS if name != "tiny_drawn"]
    manager = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
    model = HFLM(pretrained=str(folder / "base"), device="cpu", dtype="float32", batch_size=4)
    results: Any = simple_evaluate(model=model, tasks=names, task_manager=manager)  # pyright: ignore
    plain = json.loads(json.dumps(results["samples"], default=str))
    samples = {(task, one["doc_id"]): one for task, of_task in plain.items() for one in of_task}
    return {"results": results["results"], "samples": samples}


def _printed(work: Any) -> str:
    written = io.StringIO()
    with redirect_stdout(written):
        work()
    return written.getvalue()


def _complaint(flags: list[str], prompt: str) -> str:
    try:
        _ask(flags, lambda config: answer(config, AnswerSettings(prompt=prompt)))
    except ConfigurationError as error:
        stop_model_parallel()
        return str(error)
    return "nothing"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("asked")
    save_worded_llama(folder / "base")
    save_worded_llama(folder / "other", seed=1)
    save_worded_pairs(folder / "pairs.jsonl")
    write_tasks(folder / "tasks", WORDS[:50], num_questions=9, stop=" w", longest=280)
    (folder / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in PROMPTS))
    return folder


@pytest.fixture(scope="module")
def alone(place) -> Mapping[str, Any]:
    try:
        return run_alone(place)
    finally:
        stop()


@pytest.fixture(scope="module")
def split(place, alone, request) -> Mapping[str, Any]:
    """What the first rank found, by layout, at the layouts that were chosen."""
    specs = [getattr(item, "callspec", None) for item in request.session.items if item.path == request.path]
    chosen = {spec.params["layout"] for spec in specs if spec and "layout" in spec.params}
    return run_ranks(2, run_split, (place, [*chosen & {*LAYOUTS}, *QUICK_LAYOUTS]))[0]


def _same_numbers(found, expected):
    for task, scores in expected["results"].items():
        wanted = {name: pytest.approx(value, rel=1e-4) for name, value in scores.items() if isinstance(value, float)}
        assert {name: found["results"][task][name] for name in wanted} == wanted


def _same_items(found, expected):
    assert found.keys() == expected.keys()
    for key, sample in found.items():
        wanted = expected[key]
        assert sample["doc"] == wanted["doc"]
        for answers, others in zip(sample["filtered_resps"], wanted["filtered_resps"], strict=True):
            _same_answer(answers, others)


def _same_answer(answer, other):
    if isinstance(answer, list):  # log-likelihood, and whether it was the likeliest
        assert float(answer[0]) == pytest.approx(float(other[0]), abs=5e-5)
        assert str(answer[1]) == str(other[1])
    elif isinstance(answer, float):
        assert answer == pytest.approx(float(other), rel=1e-5)
    else:
        assert answer == other


def test_scores_are_those_of_the_harness_own_backend_to_the_last_item(alone):
    """Choices, answers and perplexities, among them a question too long for the model: it loses its beginning."""
    asked_of_both = {key: one for key, one in alone["base"]["samples"].items() if key[0] != "tiny_drawn"}
    _same_items(asked_of_both, alone["hf"]["samples"])
    _same_numbers(alone["base"], alone["hf"])
    assert alone["base"]["config"]["truncated_requests"] == {"score": 4, "generate": 3}
    assert alone["run"]["results"]["tiny_texts"] != alone["base"]["results"]["tiny_texts"], "training shows"


class FullEngine:
    """It takes what vLLM takes with `max_model_len`: a prompt that leaves room for one token at least."""

    name, max_model_len = "vLLM's stand-in", 256

    def __init__(self) -> None:
        self.longest = 0  # prompt to score

    def ask(self, what: str, **asked: Any) -> dict[str, Any]:
        if what == "generate":
            return {"answers": [[] for _ in asked["prompts"]]}
        for context, ids in asked["pairs"]:
            prompt_len = len(context) + len(ids)
            assert prompt_len < self.max_model_len, "(prompt + requested output tokens) is longer than the model"
            self.longest = max(self.longest, prompt_len)
        return {"scores": [[-1.0, False] for _ in asked["pairs"]]}

    def close(self) -> None:
        pass


def test_an_engine_is_given_as_much_to_score_as_it_takes(place, monkeypatch):
    """Choices of a question and a rolling text, both longer than the model, are cut to leave it its room."""
    engine = FullEngine()
    monkeypatch.setattr(model, "open_engine", lambda *_: (engine, engine.max_model_len))
    with one_rank(with_groups=False):
        flags = ["--pretrained-checkpoint", str(place / "base")]
        found = _evaluate(place, "engine", flags, engine="vllm")
    assert engine.longest == engine.max_model_len - 1
    assert found["config"]["truncated_requests"]["score"] == 4


GEN_PREFIXES = {"plain": "The best answer is", "line": "\n```python\n", "space": "Answer: "}
TRIMMED = CHATML.replace("m['content']", "m['content'] | trim")


@pytest.mark.parametrize("template", [CHATML, TRIMMED], ids=["as it is", "trimmed"])
@pytest.mark.parametrize("prefix", [None, *GEN_PREFIXES])
def test_an_answer_goes_on_from_the_gen_prefix_of_a_task_as_in_the_harness_own_backend(tmp_path, template, prefix):
    from lm_eval.models.huggingface import HFLM

    folder = str(save_tokenizer(tmp_path / "tokenizer", chat_template=template))
    ours: Any = object.__new__(harness.HarnessModel)
    ours._model = SimpleNamespace(tokenizer=HuggingFaceTokenizer(folder))
    theirs: Any = object.__new__(HFLM)
    theirs.tokenizer, theirs.chat_template_args = AutoTokenizer.from_pretrained(folder), {}
    write_tasks(tmp_path, WORDS, 3)
    written = json.loads((tmp_path / "tiny_answers.yaml").read_text())
    written |= {"gen_prefix": prefix and GEN_PREFIXES[prefix], "fewshot_split": "test", "num_fewshot": 1}
    (tmp_path / "tiny_answers.yaml").write_text(json.dumps(written))
    (task,) = TaskManager(include_path=str(tmp_path), include_defaults=False).load(["tiny_answers"])["tasks"].values()

    def of_both(chat: list[dict[str, str]], **how: Any) -> str:
        return json.dumps([by.apply_chat_template(chat, **how) for by in (ours, theirs)])

    task.build_all_requests(apply_chat_template=True, fewshot_as_multiturn=True, chat_template=of_both)
    end = (GEN_PREFIXES[prefix] if prefix else "<|im_start|>assistant").strip()
    for our_prompt, their_prompt in (json.loads(request.args[0]) for request in task.instances):
        assert our_prompt == their_prompt and our_prompt.strip().endswith(end)


@pytest.mark.parametrize("layout", [*QUICK_LAYOUTS, pytest.param("TP2", marks=pytest.mark.slow)])
def test_every_layout_gives_the_scores_of_one_process(alone, split, layout):
    _same_items(split[layout]["samples"], alone["run"]["samples"])
    _same_numbers(split[layout], alone["run"])


def test_two_draws_of_one_question_differ(alone):
    drawn = [one["resps"][0] for (task, _), one in alone["run"]["samples"].items() if task == "tiny_drawn"]
    assert drawn and all(first != second for first, second in drawn)


def test_results_say_what_was_asked(place, alone, split):
    config = alone["run"]["config"]
    assert (config["checkpoint"], config["iteration"], config["peft_method"]) == (run_flags(place)[1], 6, "lora")
    assert config["sampling_seed"] == 1234 and config["fewshot_seed"] == 1234
    assert {"lm-eval", "megatron-core"} <= config["package_versions"].keys()
    assert alone["run"]["versions"].keys() == set(TASKS)
    assert alone["run"]["results"]["tiny_choices"]["acc_stderr,none"] > 0
    assert alone["run"]["results"]["tiny_texts"]["word_perplexity_stderr,none"] > 0, "which the harness does not have"
    assert split["PP2"]["config"]["pipeline_model_parallel_size"] == 2
    assert split["DP2"]["config"]["checkpoint_fingerprint"] == config["checkpoint_fingerprint"]
    assert alone["base"]["config"]["checkpoint_fingerprint"] != config["checkpoint_fingerprint"]


@pytest.mark.slow
def test_an_evaluation_that_was_killed_goes_on_and_ends_with_the_same_numbers(place, alone):
    """What was answered is not asked again, and the rest, drawn answers too, is what it would have been."""
    seed = random.randrange(1 << 32)
    draw, file = random.Random(seed), place / "stopped.requests.jsonl"
    moment = draw.randint(1, alone["finished"] // 2), draw.uniform(0, 0.02)
    with pytest.raises(RanksFailed):
        run_ranks(1, run_until_killed, (place, *moment))
    left = file.read_text().splitlines(keepends=True)
    whole = sum(line.endswith("\n") for line in left)
    print(f"seed {seed}: killed after {whole} of {alone['finished']} requests")
    assert moment[0] <= whole < alone["finished"] and not (place / "stopped.json").exists()
    (again,) = run_ranks(1, run_again, place)
    _same_items(again["samples"], alone["run"]["samples"])
    lines = file.read_text().splitlines(keepends=True)
    assert lines[:whole] == left[:whole]
    assert len({json.loads(line)["key"] for line in lines}) == len(lines) == alone["finished"]


def test_answers_to_a_file_keep_its_fields_and_are_those_that_are_shown_as_they_grow(place, alone, split):
    lines = [json.loads(line) for line in (place / "alone.jsonl").read_text().splitlines()]
    assert [{name: line[name] for name in line if name != "answers"} for line in lines] == PROMPTS
    assert [len(line["answers"]) for line in lines] == [1, 1, 1]
    assert alone["streamed"].splitlines()[-1].split() == lines[0]["answers"][0].split()[:5] != []
    assert split["streamed"] == alone["streamed"], "where replicas could share the work"


def test_drawn_answers_are_the_same_at_every_layout(place, split):
    texts = {(place / layout).read_text() for layout in LAYOUTS if layout in split}
    assert len(texts) == 1
    answers = [json.loads(line)["answers"] for line in texts.pop().splitlines()]
    assert all(len(pair) == 2 for pair in answers) and any(first != second for first, second in answers)


def test_what_cannot_be_asked_is_told(place, alone):
    other_rank, other_base, too_long = alone["complaints"]
    assert "was trained with --lora-rank 3, but this run has --lora-rank 4" in other_rank
    assert "was trained on the base model" in other_base
    assert "prompt 1 has 300 tokens, but the model has 256 positions" in too_long


def test_a_second_evaluation_with_the_same_output_is_refused_and_loses_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "GRACE_SECONDS", 0.1)
    path = tmp_path / "scores.requests.jsonl"
    first = FinishedRequests(path, "model")
    first.add({"a": 1})
    child = os.fork()
    if child == 0:  # locks are a process's own
        with suppress(BaseException):
            FinishedRequests(path, "model")
            os._exit(0)
        os._exit(1 + (path.read_text().count("\n") != 1))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    first.add({"b": 2})
    del first
    assert FinishedRequests(path, "model").keys() == {"a", "b"}, "when it has ended, the next one goes on"


def test_answers_come_back_to_their_model_and_kind(tmp_path):
    path = tmp_path / "deep" / "scores.requests.jsonl"
    first = FinishedRequests(path, "model")
    keys = [first.key("score", [1, 2], [3]), first.key("score", [1], [2, 3])]
    first.add({keys[0]: [-1.5, True]})
    first.add({keys[1]: [[5, 6], "é"]})
    again, other = FinishedRequests(path, "model"), FinishedRequests(path, "other")
    assert again[keys[0]] == [-1.5, True] and again[keys[1]] == [[5, 6], "é"]
    by_engine = FinishedRequests(tmp_path / "other", "model", ("vLLM 1",))
    asked = ("score", [1, 2], [3])
    for unknown in (
        again.key("score", [9], [9]),
        again.key("generate", *asked[1:]),
        other.key(*asked),
        by_engine.key(*asked),
    ):
        assert unknown not in again


@pytest.mark.parametrize("answer", [5, [1], ["x", True], [None, None], "text", {}, [1.0, 1]])
def test_an_answer_of_another_form_than_the_request_has_is_named(tmp_path, answer):
    finished = FinishedRequests(tmp_path / "file", "model")
    finished.add({"a": [-1.5, True], "b": (-2, False), "c": answer})
    finished.require_answers(["a", "b", "d"], _is_score)
    with pytest.raises(ConfigurationError, match="file has no such answer to the request c .*remove its line"):
        finished.require_answers(["a", "b", "c"], _is_score)


def test_a_full_disk_is_told(tmp_path):
    finished = FinishedRequests(tmp_path / "file", "model")
    with open("/dev/full", "wb", buffering=0) as finished._file:
        with pytest.raises(ConfigurationError, match="file cannot be written .No space left on device."):
            finished.add({"a": 1})


def test_a_file_that_was_cut_anywhere_loses_no_more_than_its_last_line(tmp_path):
    path = tmp_path / "file"
    FinishedRequests(path, "model").add({"a": 1, "b": "two\nlines", "c": 3})
    whole = path.read_bytes()
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        known = FinishedRequests(path, "model")
        assert sum(key in known for key in "abc") == whole[:length].count(b"\n")
        known.add({"d": 4})
        again = FinishedRequests(path, "model")
        assert again["d"] == 4 and sum(key in again for key in "abc") == whole[:length].count(b"\n")


@pytest.mark.parametrize(
    "line", [b"{torn}", b"[]", b'{"key": "a"}', b'{"key": "\xff", "answer": 1}', b'{"key": [], "answer": 1}']
)
def test_a_whole_line_that_is_no_answer_is_named(tmp_path, line):
    (tmp_path / "file").write_bytes(b'{"key": "a", "answer": 1}\n' + line + b"\n")
    with pytest.raises(ConfigurationError, match="file:2 is not an answered request .*remove the line"):
        FinishedRequests(tmp_path / "file", "model")


DRAW = random.Random(0)
LABELS = [(DRAW.randrange(2), DRAW.randrange(2)) for _ in range(150)]
TEXTS = [" ".join(DRAW.choices("abcdefgh", k=9)) for _ in range(40)]
ITEMS = {
    f1_score: LABELS,
    bleu: [(text, text if DRAW.random() < 0.5 else text[::-1]) for text in TEXTS],
    weighted_perplexity: [(DRAW.gauss(-20, 2), 9) for _ in range(300)],
}


def leave_one_out(statistic: Any, items: list[Any]) -> float:
    """The jackknife's error: of the statistic without each of the items in turn."""
    values = [statistic([*items[:place], *items[place + 1 :]]) for place in range(len(items))]
    middle = sum(values) / len(values)
    return ((len(items) - 1) / len(items) * sum((value - middle) ** 2 for value in values)) ** 0.5


@pytest.mark.parametrize("statistic", ITEMS)
def test_a_score_without_a_formula_is_drawn_again_in_silence(statistic, capsys):
    error = evaluator_utils.stderr_for_metric(statistic, NUM_DRAWS)
    assert error is not None, "perplexities too, for which the harness has none"
    assert error(ITEMS[statistic]) == pytest.approx(leave_one_out(statistic, ITEMS[statistic]), rel=0.3)
    assert capsys.readouterr().out == ""


def test_a_formula_is_used_where_there_is_one():
    items = [DRAW.gauss(0, 1) for _ in range(30)]
    formula, other, none = (evaluator_utils.stderr_for_metric(metric, 1) for metric in (mean, acc_all, bypass_agg))
    assert formula(items) == pytest.approx(stdev(items) / 30**0.5)
    assert other.__module__ == "lm_eval.api.metrics" and none is None


@pytest.mark.parametrize("given", [{"temperature": "hot"}, {"top_k": float("inf")}])
def test_a_sampling_setting_that_is_no_number_is_told_with_its_task(given):
    model: Any = object.__new__(harness.HarnessModel)
    model.max_length, model._batch_size, model._seed = 64, 1, 0
    wanted = {"until": ["b"], "max_gen_toks": 4, "do_sample": True, **given}
    request: Any = SimpleNamespace(args=("a", wanted), task_name="mine")
    with pytest.raises(ConfigurationError, match="generation_kwargs of task mine: "):
        model._plan(request)
