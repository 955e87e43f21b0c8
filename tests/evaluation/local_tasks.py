"""Four small tasks of the evaluation harness on data of our own: choices, answers, perplexity of texts."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

COMMON = """
task: NAME
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/questions.jsonl}}
test_split: test
"""
TASKS = {
    "tiny_choices": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: label
target_delimiter: " "
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
""",
    "tiny_answers": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[label]}}"
generation_kwargs: {until: ["STOP"], max_gen_toks: 8, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
""",
    "tiny_drawn": """
output_type: generate_until
doc_to_text: "{{question}}"
repeats: 2
doc_to_target: "{{choices[label]}}"
generation_kwargs: {until: [], max_gen_toks: 6, do_sample: true, temperature: 0.8, top_p: 0.95}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
""",
    "tiny_texts": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}} {{choices[0]}}"
metric_list:
  - {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
""",
}


def write_tasks(
    folder: Path, words: Sequence[str], num_questions: int = 12, stop: str = "\\n", longest: int = 60
) -> Path:
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
    for name, yaml in TASKS.items():
        text = (COMMON + yaml).replace("NAME", name).replace("FOLDER", str(folder)).replace("STOP", stop)
        (folder / f"{name}.yaml").write_text(text)
    return folder
