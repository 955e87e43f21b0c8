"""From items to a benchmark's folder: which texts are one item, which part an item goes to, what is written of it."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_peft.config import ConfigurationError
from megatron_peft.tasks.prepare import (
    BenchmarkData,
    Document,
    HashSplit,
    Prepared,
    TaskTemplate,
    TestItems,
    Tests,
    normalized,
    prepare,
)

ALIKE = {"The cat sat.": "the  CAT\nsat", "It's 3.50 €": "it s 3 50", "ﬁne ① word": "fine 1 word"}
ALIKE |= {"Straße": "STRASSE", "L'été": "l’été"}
OTHER = {"3 apples": "4 apples", "été": "ete", "not good": "good"}


def test_words_numbers_and_accents_count_and_case_punctuation_and_forms_do_not() -> None:
    assert [text for text, other in ALIKE.items() if normalized(text) != normalized(other)] == []
    assert [text for text, other in OTHER.items() if normalized(text) == normalized(other)] == []


def item(*texts: str, fragments: tuple[str, ...] = ()) -> Document:
    return Document({}, texts, f"file, {texts[0]}", fragments)


def test_shares_are_those_of_the_flags() -> None:
    parts = Counter(HashSplit(10, 20).split_of(item(f"item {n}")) for n in range(5000))
    assert (parts["test"], parts["valid"]) == pytest.approx((1000, 500), rel=0.12)


def test_part_depends_on_text_and_seed_only_and_test_items_stay_test() -> None:
    """valid moves behind test; an item of test stays in test when its share grows."""
    small, large = HashSplit(5, 5), HashSplit(5, 10)
    numbered = [item(f"{n}") for n in range(2000)]
    assert all(large.split_of(one) == "test" for one in numbered if small.split_of(one) == "test")
    texts = [f"Item {n}." for n in range(300)]
    parts = [HashSplit(30).split_of(item(text)) for text in texts]
    assert parts == [HashSplit(30).split_of(item(text.upper() + "!")) for text in texts]
    assert parts != [HashSplit(30, seed=1).split_of(item(text)) for text in texts]


@pytest.mark.parametrize(
    ("shares", "message"), [((50, 50), "50 and --test-percent 50 leave nothing"), ((-1,), "--valid-percent is -1")]
)
def test_shares_must_leave_something(shares: tuple[int, ...], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        HashSplit(*shares)


def test_test_items_are_recognized_by_any_text_and_by_long_fragments_inside() -> None:
    tests = TestItems()
    tests.add(item("How many apples?", "an answer"))
    assert tests.match(item("how many APPLES")) == "file, How many apples?"
    assert tests.match(item("other", "An answer!")) is not None
    assert tests.match(item("How many pears?")) is None
    assert tests.match(item("how many apples are there")) is None, "only fragments may stand inside"
    long = "return the sum of all the even numbers in the list"
    tests.add(item("...", fragments=(long, "return x", "")))
    assert tests.match(item("please: " + long.replace(" ", "\n") + ", quickly")) is not None
    assert tests.match(item("def f(x): return x")) is tests.match(item("!!!")) is None


def test_a_task_prompts_and_answers_by_choice_or_text() -> None:
    mnli = TaskTemplate("glue_mnli")
    fields = {"premise": "It rains.", "hypothesis": " It is wet", "label": 1}
    assert mnli.prompt(fields) == "It rains.\nQuestion: It is wet. True, False or Neither?\nAnswer:"
    assert mnli.completion(fields) == " Neither"
    fields = {"source": "Open", "target": "Ouvrir", "source_language": "English", "target_language": "French"}
    assert TaskTemplate("translation").completion(fields) == " Ouvrir"
    assert TaskTemplate("humaneval_greedy").completion({"canonical_solution": "    return 1"}) == "    return 1"
    template, asked = TaskTemplate("instructions"), {"instruction": "Add.", "input": "1 2"}
    assert template.prompt(asked).endswith("### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n")
    assert template.prompt({**asked, "input": ""}).endswith("Add.\n\n### Response:\n")


def test_missing_field_and_change_that_does_not_apply_are_errors() -> None:
    with pytest.raises(ConfigurationError, match="glue_qqp: doc_to_text fails: 'question2' is undefined"):
        TaskTemplate("glue_qqp").prompt({"question1": "What?"})
    assert TaskTemplate("glue_qqp", {"task: glue_qqp": "task: mine"}).task == "mine"
    with pytest.raises(ConfigurationError, match="does not hold 'repeats: 20' once"):
        TaskTemplate("glue_qqp", {"repeats: 20": "repeats: 5"})


def test_filled_task_names_its_data(tmp_path: Path) -> None:
    text = TaskTemplate("glue_qqp").filled({"test": tmp_path / 'a "b".jsonl'})
    task = yaml.safe_load(text)
    assert task["dataset_path"] == "json"
    assert task["dataset_kwargs"] == {"data_files": {"test": str(tmp_path / 'a "b".jsonl')}}
    assert text.startswith("# QQP of GLUE")


def test_a_filled_task_names_its_data_whatever_the_folders_name(tmp_path: Path) -> None:
    for name in ("a[1] b*?", "a1 bcd"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "test.jsonl").write_text(f'{{"folder": "{name}"}}\n')
    task = yaml.safe_load(TaskTemplate("glue_qqp").filled({"test": tmp_path / "a[1] b*?" / "test.jsonl"}))
    rows = datasets.load_dataset("json", **task["dataset_kwargs"], cache_dir=str(tmp_path / "cache"), split="test")
    assert list(rows) == [{"folder": "a[1] b*?"}]


GSM8K, SST2 = TaskTemplate("gsm8k_8shot"), TaskTemplate("glue_sst2")
SENTENCES = [f"sentence {n}" for n in range(50)]


def items(texts: list[str], name: str = "train") -> list[Document]:
    return [Document({"sentence": t, "label": 1}, (t,), f"{name}, line {n}") for n, t in enumerate(texts, 1)]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run(folder: Path, train: list[str], test: list[str], valid: float = 20, tested: float = 0, **settings) -> Prepared:
    benchmark = BenchmarkData(SST2, items(train), [Tests((SST2,), items(test, "test"))])
    return prepare(benchmark, folder, HashSplit(valid, tested), **settings)


def test_test_items_are_left_out_and_counted(tmp_path: Path) -> None:
    done = run(tmp_path / "out", [*SENTENCES, "A TEST, item!"], ["a test item"])
    written = {"train.jsonl", "valid.jsonl", "fewshot.jsonl", "test.jsonl", "glue_sst2.yaml"}
    assert {path.name for path in done.folder.iterdir()} == written
    assert done.counts["removed"] == 1
    assert done.example == "train, line 51 is the test item of test, line 1"
    trained = lines(done.folder / "train.jsonl") + lines(done.folder / "valid.jsonl")
    assert len(trained) == 50 and "TEST" not in str(trained)
    assert set(trained[0]) == {"prompt", "completion"} and trained[0]["completion"] == " positive"
    assert lines(done.folder / "test.jsonl")[0] == {"sentence": "a test item", "label": 1}


TEXTS = st.lists(st.text("ab .A", min_size=1, max_size=6), max_size=30)


@settings(max_examples=15)
@given(train=TEXTS, test=st.lists(st.text("ab .A", min_size=1, max_size=6), min_size=1, max_size=10))
def test_no_test_item_is_ever_trained_on(train: list[str], test: list[str], tmp_path_factory) -> None:
    train = [*train, *(f"filler {n}" for n in range(40))]
    done = run(tmp_path_factory.mktemp("x") / "out", train, test, valid=30)
    trained = lines(done.folder / "train.jsonl") + lines(done.folder / "valid.jsonl")
    texts = {normalized(record["prompt"].partition("\nQuestion")[0]) for record in trained} - {""}
    assert not texts & {normalized(text) for text in test}
    assert len(trained) + done.counts["removed"] == len(train)


def test_items_that_share_any_text_are_in_the_same_part(tmp_path: Path) -> None:
    """Of each three the second has a text of the first and one of the third; texts without words join nothing."""
    threes = (("a {}", "!", "x {}"), ("b {}", "X {}!", "y {}"), ("c {}", "?", "Y, {}"))
    texts = [tuple(text.format(n) for text in one) for one in threes for n in range(100)]
    documents = [Document({"sentence": one[0], "label": 1}, one, one[0]) for one in texts]
    done = prepare(BenchmarkData(SST2, documents, [Tests((SST2,))]), tmp_path / "out", HashSplit(20, 30))
    parts = {}
    for name in ("train.jsonl", "valid.jsonl", "test.jsonl"):
        for record in lines(done.folder / name):
            sentence = record.get("sentence", record.get("prompt", "").partition("\n")[0])
            parts.setdefault(sentence.split()[1], []).append(name)
    assert [(len(of_three), len({*of_three})) for of_three in parts.values()] == [(3, 1)] * 100
    counts = Counter(of_three[0] for of_three in parts.values())
    assert (counts["valid.jsonl"], counts["test.jsonl"]) == pytest.approx((20, 30), abs=12)


@pytest.mark.parametrize(
    ("train", "test", "overlap", "message"),
    [
        ([*SENTENCES, "A!"], ["a"], "error", "train, line 51 is the test item of test, line 1.*--overlap remove"),
        (SENTENCES, [], "remove", "no item for glue_sst2: give a file of test items, or a --test-percent"),
        (["a"], ["a"], "remove", "train.jsonl and valid.jsonl would be empty: 0 items .* and 1 left out"),
        (["a"], ["b"], "keep", "--overlap is keep; it must be remove or error"),
    ],
)
def test_what_cannot_be_prepared_is_an_error_and_nothing_is_left(tmp_path: Path, train, test, overlap, message) -> None:
    with pytest.raises(ConfigurationError, match=message):
        run(tmp_path / "out", train, test, overlap=overlap)
    assert list(tmp_path.iterdir()) == []


def problems(number: int) -> list[Document]:
    return [Document({"question": f"q{n}", "answer": "#### 1"}, (f"q{n}",), f"line {n}") for n in range(number)]


def test_solved_examples_come_from_training_items_which_must_be_enough(tmp_path: Path) -> None:
    items = problems(200)
    done = prepare(BenchmarkData(GSM8K, items, [Tests((GSM8K,), items[:2])]), tmp_path / "out", HashSplit(50))
    shown = [record["question"] for record in lines(done.folder / "fewshot.jsonl")]
    trained = [record["prompt"] for record in lines(done.folder / "train.jsonl")]
    assert len(shown) == 64 < len(trained), "the first ones, for the task's 8 and for --num-fewshot"
    assert [f"Question: {question}\nAnswer:" for question in shown] == trained[:64]
    benchmark = BenchmarkData(GSM8K, problems(9)[:7], [Tests((GSM8K,), problems(9)[7:])])
    with pytest.raises(ConfigurationError, match="8 solved items are shown before each question, and there are 7"):
        prepare(benchmark, tmp_path / "other", HashSplit(0))
