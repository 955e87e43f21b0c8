"""Four small tasks of the evaluation harness on data of our own: choices, answers, perplexity of texts."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MATCH = {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}
ANSWER = {
    **{"output_type": "generate_until", "doc_to_text": "{{question}}", "doc_to_target": "{{choices[label]}}"},
    "metric_list": [MATCH],
}
DRAWN = {"until": [], "max_gen_toks": 6, "do_sample": True, "temperature": 0.8, "top_p": 0.95}
TASKS: dict[str, dict[str, Any]] = {
    "tiny_choices": {
        **{"output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "choices"},
        **{"doc_to_target": "label", "target_delimiter": " "},
        "metric_list": [{**MATCH, "metric": name} for name in ("acc", "acc_norm")],
    },
    "tiny_answers": {**ANSWER, "generation_kwargs": {"until": ["STOP"], "max_gen_toks": 8, "do_sample": False}},
    "tiny_drawn": {**ANSWER, "generation_kwargs": DRAWN, "repeats": 2},
    "tiny_texts": {
        **{"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{question}} {{choices[0]}}"},
        "metric_list": [{"metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False}],
    },
}


def write_tasks(folder: Path, words: Sequence[str], num_questions: int, stop: str = "\n", longest: int = 60) -> Path:
    """The four tasks, with questions of one to sixty of these words, and one of `longest`.

    Args:
        stop: ends an answer.
    """
    draw = random.Random(0)

    def text(shortest: int, longest: int) -> str:
        return " ".join(draw.choices(words, k=draw.randint(shortest, longest)))

    folder.mkdir(parents=True, exist_ok=True)
    questions: list[dict[str, Any]] = [
        {"question": text(1, 60), "choices": [text(1, 3) for _ in range(4)], "label": draw.randrange(4)}
        for _ in range(num_questions)
    ]
    questions[-1]["question"] = text(longest, longest)
    (folder / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "questions.jsonl")}}}
    for name, task in TASKS.items():
        written = json.dumps({"task": name, **data, "test_split": "test", **task})  # which is YAML too
        (folder / f"{name}.yaml").write_text(written.replace("STOP", json.dumps(stop)[1:-1]))
    return folder
