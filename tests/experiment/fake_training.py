"""Stands in for pretrain_peft.py: the loss is a function of the flags, and it takes a moment.

As `fake_training.py score OUTPUT CHECKPOINTS FLAGS` it writes a score that follows from the run's metrics.
FAKE_SECONDS in the environment is how long; a file named as FAKE_KILL says is removed, and the process killed; a file
named as FAKE_APPENDS says grows by a line.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path


def value(name: str, default: str = "") -> str:
    return sys.argv[sys.argv.index(name) + 1] if name in sys.argv else default


def score(output: Path, checkpoints: Path) -> None:
    assert (checkpoints / "latest_checkpointed_iteration.txt").exists(), "nothing to score"
    last = json.loads((checkpoints / "metrics.jsonl").read_text().splitlines()[-1])
    accuracy = 100 - 10 * last["validation_loss"]
    output.write_text(json.dumps({"results": {"task": {"acc,none": accuracy}}, "items": [accuracy, accuracy - 1]}))


def train() -> None:
    trap = Path(os.environ.get("FAKE_KILL", "/nowhere"))
    if trap.exists():
        trap.unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    if "FAKE_APPENDS" in os.environ:
        with open(os.environ["FAKE_APPENDS"], "a") as file:
            file.write("more\n")
    if value("--lr") == "9":
        sys.exit("the loss is not a number")
    if float(value("--lr")) > 9:
        sys.exit("iteration 2: the loss is NaN or infinite." + 100 * " torchrun says more.")
    save = Path(value("--save"))
    save.mkdir(parents=True, exist_ok=True)
    time.sleep(float(os.environ.get("FAKE_SECONDS", "0")))
    loss = abs(float(value("--lr")) - 0.3) + int(value("--seed")) / 100 + len(value("--peft-method")) / 10
    print("trainable parameters: 1,024 of 2,048 (50%)")
    every = {"grad_norm": 1.0, "step_seconds": 0.5}
    if "--log-grad-norm-by-layer" in sys.argv:
        every |= {"grad_norm_by_layer": {"0": 0.12345, "1": None}}
    records = [{"iteration": at, "epoch": at / 2, "loss": loss + 1 / at, **every} for at in (1, 2)]
    records[-1] |= {"validation_loss": loss, "peak_memory_bytes": 100}
    if value("--exit-interval") == "1" and "--load" not in sys.argv:
        records.pop()
        print("--exit-interval reached at iteration 1")
    print("test loss at iteration 2: 5.000000E-01")
    if "--log-validation-items" in sys.argv:
        sums, counts = {"0": loss, "1": 3 * loss}, {"0": 1, "1": 3}
        items = {"iteration": 2, "loss_sums": sums, "num_tokens": counts}
        for name in ("validation_items.jsonl", "test_items.jsonl"):
            (save / name).write_text(json.dumps(items) + "\n")
    (save / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if value("--peft-method") == "hybrid":
        lambdas = [{"iteration": at, "lambda": {"decoder.layers.0.mlp.linear_fc1": at / 10}} for at in (1, 2)]
        (save / "lambda.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lambdas))
    (save / "iter_0000002").mkdir(exist_ok=True)
    (save / "latest_checkpointed_iteration.txt").write_text(str(len(records)))


if __name__ == "__main__":
    if sys.argv[1] == "score":
        score(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        train()
