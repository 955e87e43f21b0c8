"""Scores a model on the held-out messages, on as many ranks as it was trained on.

torchrun --nproc-per-node 3 -m megatron_peft.demo.scoring SCORE.json FLAGS writes the score; FLAGS are those of
pretrain_peft.py. --load names the trained adapters; without it the pretrained model is scored.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch.distributed as dist
from megatron.core.utils import unwrap_model

from megatron_peft.checkpoint.load import load_checkpoint
from megatron_peft.cli.parser import read_config, tell_error
from megatron_peft.config import ConfigurationError, RunConfig, require_packages
from megatron_peft.data.tokenizers import Tokenizer, build_tokenizer
from megatron_peft.demo.data import DemoScore, Pair, read_pairs, waiting
from megatron_peft.evaluation.generation import GenerationSettings, generate
from megatron_peft.models.families import read_shape
from megatron_peft.models.loss import ChunkedLossModel
from megatron_peft.runtime.failure import run_together
from megatron_peft.runtime.launch import start_model_parallel, world
from megatron_peft.training.run import Finetuned, build_state, data_of_rank
from megatron_peft.training.step import validation_loss
from megatron_peft.training.terminal import count_parameters

MAX_NEW_TOKENS = 64  # two held-out references are longer; an untrained model may never end
BATCH_SIZE = 128  # a step of many ends as soon as one of few


def translate(
    model_chunks: Sequence[ChunkedLossModel],
    tokenizer: Tokenizer,
    pairs: Sequence[Pair],
    report: Callable[[int], None] = lambda n: None,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> tuple[str, ...]:
    """The model's French for each pair's English; `report` gets the number of messages that were just finished."""
    settings = GenerationSettings(
        end_ids=frozenset({tokenizer.eos_id}),
        max_new_tokens=max_new_tokens,
        batch_size=BATCH_SIZE,
        is_complete=lambda ids: "\n" in tokenizer.decode(ids).lstrip(),  # an answer is one line
    )
    prompts = [tokenizer.encode_prompt(pair.prompt) for pair in pairs]
    texts = (tokenizer.decode(ids).strip().splitlines() for ids in generate(model_chunks, prompts, settings, report))
    # The first line that is not empty: an untrained model starts with blank lines and does not stop.
    return tuple(lines[0].strip() if lines else "" for lines in texts)


def score_model(
    trained: Finetuned, title: str, output: Path, *, loss: float | None = None, max_new_tokens: int = MAX_NEW_TOKENS
) -> None:
    """Write the score of a model to `output`, with a bar of that title. A collective over all ranks.

    Args: loss: of the held-out completions, where it is known: training ends with a validation.
    """
    state, data, tokenizer = trained
    assert data.valid is not None
    is_writer = dist.get_rank() == 0
    if loss is None:
        with waiting(f"{title}: loss", is_writer):
            loss = validation_loss(state.model_chunks, data.valid)
    pairs = read_pairs(Path(state.config.data.valid_data_path[0]))
    with waiting(f"{title}: translations", is_writer, len(pairs)) as advance:
        translations = translate(unwrap_model(state.model_chunks), tokenizer, pairs, advance, max_new_tokens)
    trainable = count_parameters(state.model_chunks)[0]
    if is_writer:
        from sacrebleu.metrics import BLEU

        metric = BLEU()  # with its default settings
        bleu = metric.corpus_score(list(translations), [[pair.french for pair in pairs]]).score
        DemoScore(bleu, str(metric.get_signature()), loss, trainable, translations).write(output)


def score(config: RunConfig, output: Path) -> None:
    """Write the score of the model that `config` describes to `output`. A collective over all ranks."""
    require_packages("demo", "sacrebleu")
    base = str(config.model.pretrained_checkpoint)
    shape = read_shape(base)
    start_model_parallel(config.parallel, config.training.seed)
    tokenizer = build_tokenizer(config.data, base)
    data = data_of_rank(config, tokenizer, shape)
    state = build_state(config, shape, data.train_iters)
    load_checkpoint(state)
    score_model(Finetuned(state, data, tokenizer), "scoring", output)


def main() -> None:
    """Score a run: the JSON file to write, then flags of pretrain_peft.py."""
    output, *flags = sys.argv[1:]
    try:
        config = read_config(flags)
    except ConfigurationError as error:
        sys.exit(tell_error(error))
    with world(config.parallel.distributed_backend, config.parallel.distributed_timeout_minutes):
        run_together(lambda: score(config, Path(output)), "megatron_peft.demo.scoring")


if __name__ == "__main__":
    main()
