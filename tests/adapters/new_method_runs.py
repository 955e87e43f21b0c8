"""The program that trains the method of docs/new-method.md: `python -m tests.adapters.new_method_runs FOLDER`.

It runs in a process of its own, since which methods there are is settled when megatron_peft is imported.
"""

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

LAYOUTS = {
    "TP2": {"parallel": {"tensor_model_parallel_size": 2}},
    "TP2+SP": {"parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True}},
    "PP2": {"parallel": {"pipeline_model_parallel_size": 2}},
    "DP2 distributed optimizer": {"optimizer": {"use_distributed_optimizer": True}},
}
SAVED = {"train_iters": 3, "save_interval": 3}


def main(folder: Path, layouts: dict[str, Any]) -> dict[str, Any]:
    """Curves by layout, and how far the merged and the exported model are from the trained one (logits)."""
    from megatron_peft.conversion.convert import merge
    from megatron_peft.conversion.peft_export import export_adapter, export_as_lora
    from megatron_peft.conversion.verify import verify
    from tests.ranks import run_ranks
    from tests.tiny_llama import VOCAB_SIZE, save_llama, save_pairs
    from tests.training.layout_runs import Job, run_jobs

    base, data = str(save_llama(folder / "base", num_hidden_layers=2)), str(save_pairs(folder / "pairs.jsonl"))
    curves: dict[str, Any] = {}
    for num_ranks, own in ((1, {"alone": {}}), (2, layouts)):
        jobs = []
        for name, changes in own.items():
            settings = {key: dict(value) for key, value in changes.items()}
            settings.setdefault("optimizer", {})["lr"] = 1e-2
            peft = {"method": "gains", "gains_lr_ratio": 10.0, "gains_bound": 0.8}
            jobs.append(Job(name, base, data, peft=peft, num_steps=12, **settings))
        if jobs:
            for name, report in run_ranks(num_ranks, run_jobs, jobs)[0].items():
                grad_norms = [step.grad_norm for step in report.curve.steps]
                curves[name] = {"losses": report.curve.losses, "grad_norms": grad_norms}
    run = train_two_ranks(folder, base, data, VOCAB_SIZE - 1)
    merged = merge(run, folder / "merged", progress=False)
    exported = export_adapter(run, folder / "exported")
    as_lora = export_as_lora(run, folder / "as lora", tolerance=0, num_tokens=0)  # the method has no `change`
    return {
        "curves": curves,
        "merged": verify(merged, run).logits.absolute,
        "exported": verify(exported, run).logits.absolute,
        "as lora": verify(as_lora, run).logits.absolute,
        "moved": verify(Path(base), run).logits.absolute,
    }


def train_two_ranks(folder: Path, base: str, data: str, vocab_size: int) -> Path:
    """A run by `megatron-peft train`, with the method's flags."""
    from megatron_peft.commands import train
    from tests.ranks import run_ranks

    flags = [
        *("--pretrained-checkpoint", base, "--train-data-path", data, "--save", str(folder / "run")),
        *f"--tokenizer-type NullTokenizer --vocab-size {vocab_size} --seq-length 32 --train-iters 4".split(),
        *"--global-batch-size 4 --peft-method gains --gains-bound 0.5 --gains-lr-ratio 30 --lr 1e-2".split(),
        *("--tensor-model-parallel-size", "2"),
    ]
    assert run_ranks(2, train.main, flags) == [0, 0]
    return folder / "run"


if __name__ == "__main__":
    folder, *names = sys.argv[1:]
    with contextlib.redirect_stdout(sys.stderr):
        found = main(Path(folder), {name: LAYOUTS[name] for name in names})
    print(json.dumps(found))
