"""`evaluate` and `generate` with a real vLLM: the answers and log-likelihoods of our own model.

Run by `make test-engines`, as test_engine.py.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from megatron_peft.commands import evaluate, generate, train
from tests.evaluation.local_tasks import write_tasks
from tests.evaluation.worded_llama import WORDS, save_worded_llama, save_worded_pairs
from tests.serving import runs
from tests.serving.test_engine import PYTHON

pytestmark = pytest.mark.engines
TASKS = ["tiny_choices", "tiny_answers", "tiny_texts"]
ENGINE = ["--engine", "vllm", "--engine-python", str(PYTHON)]
WAYS = {"merged": ENGINE, "adapter": [*ENGINE, "--engine-lora"]}
METHODS = {
    "lora": "--peft-method lora --lora-rank 8",
    "hybrid": "--peft-method hybrid --lora-rank 8 --boft-block-size 8 --boft-factors 2 --lora-ga-batches 2",
    "nf4": "--peft-method lora --lora-rank 8 --base-precision nf4",
}
TOLERANCE = 1e-3


@pytest.fixture(scope="module", params=METHODS)
def run(request, tmp_path_factory) -> Path:
    """The folder of a trained run, with the tasks and prompts beside it."""
    folder = tmp_path_factory.mktemp(request.param)
    save_worded_llama(folder / "base", **runs.SIZES)
    write_tasks(folder / "tasks", WORDS[:40], 12, stop=WORDS[7])
    prompts = [{"prompt": f"{WORDS[i]} {WORDS[i + 1]}"} for i in range(9)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    data = ["--train-data-path", str(save_worded_pairs(folder / "pairs.jsonl")), "--save", str(folder / "run")]
    flags = "--seq-length 16 --train-iters 8 --global-batch-size 4 --micro-batch-size 2 --lr 1e-2 --num-workers 0"
    words = [*flags.split(), *METHODS[request.param].split(), *data, "--pretrained-checkpoint", str(folder / "base")]
    assert train.main(words) == 0
    return folder


def scored(folder: Path, name: str, *flags: str) -> tuple[dict[str, Any], dict[tuple[str, int], Any]]:
    """The results, and (task, number of the question) -> what the model has answered."""
    output = folder / f"{name}.json"
    words = ["--load", str(folder / "run"), "--include-path", str(folder / "tasks"), "--output", str(output)]
    assert evaluate.main([*words, "--tasks", *TASKS, "--log-samples", *flags]) == 0
    lines = map(json.loads, (folder / f"{name}.samples.jsonl").read_text().splitlines())
    return json.loads(output.read_text()), {(line["task"], line["doc_id"]): line["resps"] for line in lines}


def numbers(answer: Any) -> Iterator[float]:
    """Those of a log-likelihood; the harness writes them as texts."""
    if isinstance(answer, list):
        for one in answer:
            yield from numbers(one)
    elif isinstance(answer, float):
        yield answer
    elif isinstance(answer, str) and answer.lstrip("-").replace(".", "").isdigit():
        yield float(answer)


def test_scores_and_answers_are_our_own(run):
    own, by_us = scored(run, "own")
    ways = WAYS if "lora" in run.name else {"merged": ENGINE}
    for name, flags in ways.items():
        results, answers = scored(run, name, *flags)
        assert answers.keys() == by_us.keys() and len(answers) == 12 * len(TASKS)
        for key, answer in answers.items():
            if key[0] == "tiny_answers":
                assert answer == by_us[key], key
            else:
                pairs = [*zip(numbers(answer), numbers(by_us[key]), strict=True)]
                assert pairs and all(abs(one - other) < TOLERANCE for one, other in pairs), (key, pairs)
        assert results["config"]["engine"].startswith("vLLM ")
        assert results["config"]["evaluation"]["engine"] == "vllm"
        compare(results["results"], own["results"])


def compare(results: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    for task, scores in own.items():
        for name, value in scores.items():
            assert results[task][name] == (pytest.approx(value, rel=1e-3) if isinstance(value, float) else value), name


def test_texts_that_fill_the_positions_are_scored(tmp_path):
    base = save_worded_llama(tmp_path / "base", **runs.SIZES)
    write_tasks(tmp_path / "tasks", WORDS[:40], 3, longest=280)
    words = ["--pretrained-checkpoint", str(base), "--include-path", str(tmp_path / "tasks"), "--tasks", *TASKS]
    assert evaluate.main([*words, "--output", str(tmp_path / "scores.json"), *ENGINE]) == 0
    assert json.loads((tmp_path / "scores.json").read_text())["config"]["truncated_requests"]["score"] == 4


def test_answers_to_prompts_are_our_own(run, capsys):
    texts = {}
    for name, flags in {"own": [], **WAYS}.items():
        if name == "adapter" and "lora" not in run.name:
            continue
        output = run / f"answers {name}.jsonl"
        words = ["--load", str(run / "run"), "--prompt-file", str(run / "prompts.jsonl"), "--output", str(output)]
        assert generate.main([*words, "--stop", WORDS[7], "--max-new-tokens", "12", *flags]) == 0
        texts[name] = output.read_text()
    assert len(set(texts.values())) == 1 and texts["own"].count("\n") == 9
    capsys.readouterr()
    prompt = ["--load", str(run / "run"), "--prompt", f"{WORDS[0]} {WORDS[1]}", "--max-new-tokens", "12"]
    assert generate.main([*prompt, "--stop", WORDS[7], *ENGINE]) == 0
    assert capsys.readouterr().out.strip() == json.loads(texts["own"].splitlines()[0])["answers"][0].strip()
    assert [path for path in run.iterdir() if path.name.startswith("served-")] == []


def test_drawn_answers_are_those_of_their_seed(run):
    if run.name.startswith("hybrid"):
        pytest.skip("one run is enough")
    drawn = ["--temperature", "1.0", "--num-samples", "3", "--max-new-tokens", "8", *ENGINE]
    for name in ("first", "second"):
        words = ["--load", str(run / "run"), "--prompt-file", str(run / "prompts.jsonl")]
        assert generate.main([*words, "--output", str(run / name), *drawn]) == 0
    assert (run / "first").read_text() == (run / "second").read_text()
    answers = [json.loads(line)["answers"] for line in (run / "first").read_text().splitlines()]
    assert any(len(set(three)) > 1 for three in answers)
