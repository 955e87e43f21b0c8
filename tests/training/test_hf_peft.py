"""tools/hf_peft.py trains the model that a cell trained: its losses and those of its test items are the run's."""

import json

import pytest

from megatron_peft.commands import train
from megatron_peft.experiment.records import CellRecord, from_items
from megatron_peft.training.metrics import read_metrics
from tests.evaluation.worded_llama import save_worded_llama
from tests.one_rank import one_rank
from tools import hf_peft

FLAGS = (
    "--seq-length 64 --pack-sequences --train-iters 6 --global-batch-size 2 "
    "--micro-batch-size 1 --lr 1e-2 --lr-decay-style cosine --clip-grad 0.5 --weight-decay 0.1 --num-workers 0 "
    "--log-interval 1 --eval-interval 6 --log-validation-items --seed 5"
)


@pytest.mark.slow
def test_losses_of_lora_are_the_runs_own_and_oft_learns_too(tmp_path):
    base = save_worded_llama(tmp_path / "base", num_hidden_layers=2)
    data = tmp_path / "pairs.jsonl"  # of unlike lengths: packs do not hold them in their order
    answers = enumerate((8, 30, 4, 40, 12, 20, 3, 16))
    pairs = [{"prompt": f"w{i} ", "completion": " ".join(f"w{(i + k) % 8}" for k in range(n))} for i, n in answers]
    data.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    files = [f"--pretrained-checkpoint={base}", *(f"--{one}-data-path={data}" for one in ("train", "valid", "test"))]
    flags = (*FLAGS.split(), *files, "--peft-method=lora", "--lora-rank=4")
    assert train.main([*flags, "--save", str(tmp_path / "run")]) == 0
    ours = read_metrics(tmp_path / "run" / "metrics.jsonl")
    cell = CellRecord("tiny", "talk", "lora", {}, 5, flags)
    found = {}
    for method in ("base", "lora", "oft"):
        with one_rank(with_groups=False):
            found[method] = hf_peft.trained_again(method, cell, None if method == "oft" else str(data))
    losses = [record["loss"] for record in ours]
    assert found["lora"]["losses"] == pytest.approx(losses, rel=1e-5)
    assert hf_peft.compared(losses, losses[:-1] + [losses[-1] + 0.25]) == {"most": 0.25, "steps_within": 5}
    assert found["lora"]["validation_loss"] == pytest.approx(ours[-1]["validation_loss"], rel=1e-5)
    (line,) = map(json.loads, (tmp_path / "run" / "validation_items.jsonl").read_text().splitlines())
    assert found["lora"]["items"] == [pytest.approx(item, rel=1e-4) for item in from_items([line])]
    assert found["base"]["validation_loss"] > found["lora"]["validation_loss"] and found["base"]["losses"] == []
    assert all(one["test_loss"] == pytest.approx(one["validation_loss"], rel=1e-5) for one in found.values())
    assert all(0 <= found[method]["bleu"] <= 100 for method in ("base", "lora"))
    rows = hf_peft.table([{**one, "of_cell": {"validation_loss": 1.0}} for one in found.values()])["rows"]
    assert [row[0] for row in rows] == ["the base model", "HF PEFT's LoRA", "HF PEFT's OFT"]
    oft = found["oft"]["losses"]
    assert oft[0] == pytest.approx(ours[0]["loss"], rel=1e-5) and oft[-1] != pytest.approx(ours[-1]["loss"], rel=1e-3)
