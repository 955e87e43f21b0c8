"""Scores a model on the held-out messages, split over as many ranks as it was trained on.

torchrun --nproc-per-node 3 -m megatron_peft.demo.scoring SCORE.json FLAGS writes the score; FLAGS are those of
pretrain_peft.py (--load names the trained adapters; without it the pretrained model is scored).
"""

import sys
from pathlib import Path

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.utils import unwrap_model
from rich.progress import Progress

from megatron_peft.checkpoint.load import load_checkpoint
from megatron_peft.cli.parser import parse_arguments
from megatron_peft.config import RunConfig
from megatron_peft.data.build import Data, build_data
from megatron_peft.data.tokenizers import Tokenizer, build_tokenizer
from megatron_peft.demo.data import read_pairs
from megatron_peft.demo.score import Score
from megatron_peft.demo.translation import corpus_bleu, translate
from megatron_peft.models.families import read_shape
from megatron_peft.runtime.failure import run_together
from megatron_peft.runtime.launch import start_model_parallel, world
from megatron_peft.training.run import build_state
from megatron_peft.training.state import TrainingState
from megatron_peft.training.terminal import count_parameters
from megatron_peft.training.validation import validation_loss

PROGRAM = "megatron_peft.demo.scoring"


def score(config: RunConfig, output: Path) -> None:
    """Write the score of the model that `config` describes to `output`, within a started world."""
    state, data, tokenizer = _load(config)
    assert data.valid is not None
    loss = validation_loss(state.model_chunks, data.valid)
    pairs = read_pairs(Path(config.data.valid_data_path[0]))
    is_writer = dist.get_rank() == 0
    with Progress(disable=not is_writer) as progress:
        task = progress.add_task("translating", total=len(pairs))
        chunks = unwrap_model(state.model_chunks)
        translations = translate(chunks, tokenizer, pairs, lambda done: progress.advance(task, done))
    trainable = count_parameters(state.model_chunks).trainable
    if is_writer:
        Score(*corpus_bleu(translations, pairs), loss, trainable, translations).write(output)


def _load(config: RunConfig) -> tuple[TrainingState, Data, Tokenizer]:
    assert config.model.pretrained_checkpoint is not None
    shape = read_shape(config.model.pretrained_checkpoint)
    start_model_parallel(config.parallel, config.training.seed)
    tokenizer = build_tokenizer(config.data, config.model.pretrained_checkpoint)
    data = build_data(
        config,
        tokenizer,
        data_parallel_rank=parallel_state.get_data_parallel_rank(),
        data_parallel_size=parallel_state.get_data_parallel_world_size(),
    )
    state = build_state(config, shape, data.train_iters)
    load_checkpoint(state)
    return state, data, tokenizer


def main() -> None:
    output, *flags = sys.argv[1:]
    config = parse_arguments(flags)
    with world(config.parallel):
        run_together(lambda: score(config, Path(output)), PROGRAM)


if __name__ == "__main__":
    main()
