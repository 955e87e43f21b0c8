#!/usr/bin/env python3
"""How long the step lasts in which a save in the background starts, beside a common step.

    python tests/stress/async_save.py --model runs/demo/model

Full fine-tuning in one process, 4 x 256 tokens a step. What a save adds to its step (the plan, the copy of all tensors)
is timed apart, since steps by themselves differ by more on a busy machine; so is the writing behind it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402

from megatron_peft.checkpoint.saver import Saver  # noqa: E402
from megatron_peft.config import (  # noqa: E402
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    ParallelConfig,
    PeftConfig,
    RunConfig,
    TrainingConfig,
)
from megatron_peft.data.build import build_data  # noqa: E402
from megatron_peft.data.tokenizers import build_tokenizer  # noqa: E402
from megatron_peft.models.huggingface import read_shape  # noqa: E402
from megatron_peft.runtime.launch import start_model_parallel, world  # noqa: E402
from megatron_peft.training.build import build_state  # noqa: E402
from megatron_peft.training.state import TrainingState  # noqa: E402
from megatron_peft.training.step import train_step  # noqa: E402

SEQUENCE, SAMPLES = 256, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("runs/demo/model"))
    parser.add_argument("--pairs", type=int, default=4, help="of a common step and one with a save")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work, world(ParallelConfig()):
        print(json.dumps(_measure(_config(options.model, Path(work), 1 + 2 * options.pairs), options.pairs)))


def _config(model: Path, work: Path, num_steps: int) -> RunConfig:
    data = work / "text.jsonl"
    line = json.dumps({"text": " ".join(str(number) for number in range(1, SEQUENCE))})
    data.write_text(f"{line}\n" * 2 * SAMPLES)
    return RunConfig(
        parallel=ParallelConfig(),
        model=ModelConfig(pretrained_checkpoint=str(model)),
        peft=PeftConfig(method="full"),
        data=DataConfig(
            train_data_path=(str(data),),
            seq_length=SEQUENCE,
            tokenizer_type="NullTokenizer",
            vocab_size=1000,
            num_workers=0,
        ),
        training=TrainingConfig(
            micro_batch_size=SAMPLES, global_batch_size=SAMPLES, train_iters=num_steps, eval_interval=None
        ),
        checkpoint=CheckpointConfig(save=str(work / "run"), async_save=True, keep_last_checkpoints=1),
    )


def _measure(config: RunConfig, pairs: int) -> dict[str, object]:
    assert config.model.pretrained_checkpoint is not None
    start_model_parallel(config.parallel, config.training.seed)
    data = build_data(config, build_tokenizer(config.data, None), data_parallel_rank=0, data_parallel_size=1)
    state = build_state(config, read_shape(config.model.pretrained_checkpoint), data.train_iters)
    steps = iter(data.train)
    common, starting, writing = [], [], []
    with Saver(config.checkpoint) as saver:
        _step(state, steps)
        for _ in range(pairs):
            common.append(_seconds(lambda: _step(state, steps)))
            _step(state, steps)
            starting.append(_seconds(lambda: saver.start(state)))
            writing.append(_seconds(lambda: _finish(saver)))
    ratio = 1 + statistics.median(starting) / statistics.median(common)
    return {
        "parameters": sum(parameter.numel() for parameter in state.model_chunks[0].parameters()),
        "torch": torch.__version__,
        "common_step_seconds": [round(value, 2) for value in common],
        "seconds_to_start_a_save": [round(value, 2) for value in starting],
        "seconds_until_published": [round(value, 2) for value in writing],
        "step_with_save_to_common_step": round(ratio, 3),
    }


def _seconds(action: Callable[[], object]) -> float:
    before = time.perf_counter()
    action()
    return time.perf_counter() - before


def _step(state: TrainingState, steps: Iterator[list]) -> None:
    train_step(state, next(steps))
    state.position.iteration += 1


def _finish(saver: Saver) -> None:
    outcome = saver.finish()
    assert outcome is not None and outcome.error is None


if __name__ == "__main__":
    main()
