#!/usr/bin/env python3
"""How long the step lasts in which a save in the background starts, beside a common step.

    python tests/stress/async_save.py --model runs/demo/model

Full fine-tuning in one process, 4 x 256 tokens a step, interleaved: a step, a step with a save, ... The save's files
are waited for outside of the clock, so that the next common step does not share the processor with them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
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
    parser.add_argument("--pairs", type=int, default=4, help="of steps, after one to warm up")
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
    common, saving, writing = [], [], []
    with Saver(config.checkpoint) as saver:
        _seconds(state, steps)
        for _ in range(pairs):
            common.append(_seconds(state, steps))
            saving.append(_seconds(state, steps, saver))
            before = time.perf_counter()
            outcome = saver.finish()
            assert outcome is not None and outcome.error is None
            writing.append(time.perf_counter() - before)
    ratio = statistics.median(saved / plain for saved, plain in zip(saving, common, strict=True))
    return {
        "parameters": sum(parameter.numel() for parameter in state.model_chunks[0].parameters()),
        "torch": torch.__version__,
        "common_step_seconds": [round(value, 2) for value in common],
        "step_with_save_seconds": [round(value, 2) for value in saving],
        "seconds_until_published": [round(value, 2) for value in writing],
        "median_ratio": round(ratio, 3),
    }


def _seconds(state: TrainingState, steps: Iterator[list], saver: Saver | None = None) -> float:
    """Of one step, as the loop does it: the save starts after the optimizer."""
    microbatches = next(steps)
    before = time.perf_counter()
    train_step(state, microbatches)
    state.position.iteration += 1
    if saver is not None:
        saver.start(state)
    return time.perf_counter() - before


if __name__ == "__main__":
    main()
