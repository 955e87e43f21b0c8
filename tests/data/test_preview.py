"""What the preview of a data set says is what training will see of it, and what it estimates covers the truth."""

import io
import json
import re
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from megatron_peft.commands.data import preview_data
from megatron_peft.config import DataConfig
from megatron_peft.config.model import PreviewOptions
from megatron_peft.data.instruction import InstructionDataset
from megatron_peft.data.preview import Preview, show, visible
from megatron_peft.data.samples import PackedOrder, SampleOrder
from tests.data.test_instruction import RECORDS
from tests.time_limits import seconds


def preview(*paths: str, sizes: tuple[int, int] = (2, 2), options: dict | None = None, **data) -> Preview:
    numbers = {"tokenizer_type": "NullTokenizer", "vocab_size": 999}
    config = DataConfig(train_data_path=paths, **{"seq_length": 4, **numbers, **data})
    return Preview(config, PreviewOptions(**(options or {})), None, *sizes)


def shown(found: Preview, **console) -> str:
    out = io.StringIO()
    show(found, Console(file=out, highlight=False, **console))
    return out.getvalue()


def length(found: Preview):
    """Mean input positions of a sample."""
    used = found.kept[found.kept > 0]
    return found.ratio(used, np.ones_like(used))


def test_figures_of_a_small_file_are_those_of_the_data_set_that_training_builds(write_lines):
    path = write_lines(RECORDS)
    found = preview(path)
    dataset = InstructionDataset(found.records, found.fit)
    assert found.is_exact and length(found) == (dataset.lengths.mean(),) * 3
    assert found.num_samples == (len(dataset),) * 3 and found.steps(len(dataset)) == 2
    order = PackedOrder(SampleOrder(3, 1234, True), dataset.lengths, 4)
    assert found.num_packs(order.packing) == (packs := order.epoch_length(0))
    assert found.fill(packs) == pytest.approx(dataset.lengths.sum() / (4 * packs))
    trained = sum(dataset[i].loss_mask.sum() for i in range(3))
    assert found.trained.sum() == trained


def test_padding_is_what_the_rows_of_a_microbatch_lack_to_its_longest(write_lines):
    records = [{"text": "1"}, {"text": "1 2 3"}, {"text": "1 2"}] * 2  # 1, 3 and 2 positions
    found = preview(write_lines(records), sizes=(2, 3))
    used = np.random.default_rng(found.config.seed).permutation([1, 3, 2] * 2)
    assert found.padding == pytest.approx(1 - 12 / (3 * (used[:3].max() + used[3:].max())))


def test_empty_completions_are_told_with_the_first(write_lines):
    records = [{"prompt": "1", "completion": "2"}, *[{"prompt": "1", "completion": ""}] * 3]
    told = shown(preview(path := write_lines(records)))
    assert "WARNING: 75.0% of the records train no token but the end of a text: their completions are empty" in told
    assert f"(first: {path}, line 2)" in told
    assert "WARNING" not in shown(preview(write_lines(records[:1])))


def test_text_names_what_is_cut_and_skipped_and_where(write_lines):
    text = shown(preview(write_lines(RECORDS)))
    assert "cut at --seq-length 4: 20.0% of the samples, 18.2% of the tokens to train" in text
    assert "longest record: 6 positions, above --seq-length 4" in text
    assert re.search(r"skipped: 40.0% of the records \(first: .*data.jsonl, line 3\); 1: their prompt alone", text)
    assert "an epoch: 2 steps of --global-batch-size 2; with --pack-sequences 2" in text
    assert "which --overlong error ends a run for" in shown(preview(write_lines(RECORDS), overlong="error"))


def test_each_token_is_marked_as_training_takes_it(write_lines):
    long = {"prompt": "1 2", "completion": " 3 4 5 6"}
    text = shown(preview(write_lines([long])))
    assert "line 1; 7 tokens, 3 trained, 2 cut off" in text and "1·2·«3·4·5»‹6·999›" in text
    skipped = shown(preview(write_lines([RECORDS[0], long]), overlong="skip", options={"show_samples": 2}))
    assert "‹1·2·3·4·5·6·999›" in skipped
    assert "1·2·«3» ... 1 tokens ... «5»‹6·999›" in shown(preview(write_lines([long]), options={"max_tokens": 6}))


def test_color_says_nothing_that_marks_do_not_and_data_cannot_write_to_the_terminal(write_lines, tokenizer_folder):
    record = {"prompt": "the cat\x1b[31m \u202e", "completion": " sat\n on \u65e5"}
    data = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": str(tokenizer_folder), "seq_length": 64}
    found = preview(write_lines([record]), **data)
    plain, colored = shown(found), shown(found, force_terminal=True, color_system="standard", width=200)
    assert "\x1b" not in plain and "\\x1b" in plain and "\\u202e" in plain and "\u65e5" in plain
    assert all(c == "\n" or c.isprintable() for c in visible("a\nb\t\x00\u200bd\u00e9j\u00e0"))
    assert "\x1b[1;32m" in colored and re.sub(r"\x1b\[[\d;]*m", "", colored) == plain


def test_texts_of_tokens_join_to_the_text_whatever_bytes_they_hold(hf):
    text = "the cat \u00e9\u65e5\U0001f600 sat\n  on"
    texts = hf.texts(ids := hf.encode(text))
    assert "".join(texts) == text and len(texts) == len(ids) and texts[1] == " cat"


def test_estimates_cover_the_truth_as_often_as_they_say(write_lines):
    """Long records are no likelier than short ones: the mean would be twice as large."""
    lengths = np.sort(np.clip(np.random.RandomState(0).lognormal(2, 0.9, 1500), 1, 60).astype(int))
    path = write_lines([{"text": " 1" * int(length)} for length in lengths])
    truth = preview(path, seq_length=32, options={"exact": True})
    hits = np.zeros(4)
    for seed in range(15):
        found = preview(path, seq_length=32, seed=seed, options={"sampled_records": 200})
        longer, of_truth = (one.share(one.whole > 32) for one in (found, truth))
        pairs = [(length(found), length(truth)), (longer, of_truth), (found.num_samples, truth.num_samples)]
        pairs += [(found.ratio(found.trained, found.kept), truth.ratio(truth.trained, truth.kept))]
        packs, of_truth = (one.num_packs("first-fit-decreasing") for one in (found, truth))
        assert packs == pytest.approx(of_truth, rel=0.25)
        hits += [estimate.low <= exact.value <= estimate.high for estimate, exact in pairs]
    assert len(truth.chosen) == 1500 and length(truth).low == length(truth).high
    assert (hits >= 12).all(), hits


def test_an_interval_is_as_wide_as_one_of_95_percent(write_lines):
    """2 x 1.96 standard deviations over the root of n, for the mean of n independent draws."""
    lengths = np.random.RandomState(0).randint(1, 30, 4000)
    path = write_lines([{"text": " 1" * int(length)} for length in lengths])
    found = preview(path, seq_length=64, options={"sampled_records": 400})
    width = 2 * 1.96 * np.std(found.whole, ddof=1) / 400**0.5
    assert length(found).high - length(found).low == pytest.approx(width, rel=0.15)


def test_a_weighted_blend_is_drawn_by_its_weights_and_has_no_epoch_and_samples_are_of_every_source(write_lines):
    short, long = write_lines([{"text": "1"}] * 50), write_lines([{"text": "1 1 1"}] * 50, "long.jsonl")
    found = preview("3", short, "1", long, options={"sampled_records": 400})
    assert length(found).value == 0.75 * 1 + 0.25 * 3
    text = shown(found)
    assert 'records, "text", weight 3' in text and "a weighted blend has no epoch" in text
    paths = [write_lines([{"text": "1 2 3"}] * 30, f"{name}.jsonl") for name in "abc"]
    told = shown(preview(*paths), width=200)
    assert all(f"of 3: {path}, line" in told for path in paths)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--tokenizer-model t", "nothing to preview: give --train-data-path"),
        ("--train-data-path nowhere.txt --tokenizer-model t", "nowhere.txt: no file of records; names of files"),
        ("--train-data-path 1 a.jsonl --tokenizer-model t --exact", "--exact reads each record once, but"),
        ("--train-data-path a.jsonl", "no tokenizer: give --tokenizer-model, or --pretrained-checkpoint"),
        ("--train-data-path a.jsonl --sampled-records 1", "--sampled-records is 1; it must be above 1"),
        ("--train-data-path a.jsonl --lr x", "--lr: invalid number"),
    ],
)
def test_what_cannot_be_previewed_is_an_error_with_exit_code_2(tmp_path, monkeypatch, capsys, flags, told):
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_text('{"text": "1"}\n')
    assert preview_data(flags.split()) == 2
    assert told in capsys.readouterr().err


def test_the_flags_of_a_run_are_taken_whatever_its_layout(write_lines, capsys):
    flags = "--tensor-model-parallel-size 2 --peft-method lora --train-iters 5 --lr 1e-3 --global-batch-size 4"
    numbers = "--tokenizer-type NullTokenizer --vocab-size 999 --pretrained-checkpoint nowhere --show-samples 1"
    assert preview_data([*f"{flags} {numbers}".split(), "--train-data-path", write_lines(RECORDS)]) == 0
    assert "steps of --global-batch-size 4" in capsys.readouterr().out
    started = ["--nproc-per-node", "6", "--train-data-path", write_lines(RECORDS)]
    assert preview_data([*flags.replace(" --global-batch-size 4", "").split(), *numbers.split(), *started]) == 0
    assert "steps of --global-batch-size 3" in capsys.readouterr().out


@pytest.mark.slow
def test_a_file_of_a_million_lines_takes_seconds(tmp_path, tokenizer_folder):
    path = tmp_path / "large.jsonl"
    record = json.dumps({"prompt": "the cat sat on the mat " * 8, "completion": " le chat noir dort" * 5})
    path.write_text(f"{record}\n" * 1_000_000)
    flags = ["--train-data-path", str(path), "--tokenizer-model", str(tokenizer_folder), "--seq-length", "512"]
    words = [sys.executable, "-m", "megatron_peft", "data", "preview", *flags]
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run(words, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
    assert "1,000,000 records" in done.stdout and "from 2,000 random records" in done.stdout
    took = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
    assert took < seconds(12)  # of the processor; about 5 on an idle machine, half of it imports
