"""`megatron-peft sync`: a run's newest checkpoint on a running server, compared with our own model."""

import time
from pathlib import Path
from statistics import fmean

from megatron_peft.checkpoint import run_record
from megatron_peft.checkpoint.load import load_trained_parameters
from megatron_peft.config import RunConfig
from megatron_peft.config.evaluation import SyncSettings
from megatron_peft.conversion.pretrained import read_model_shape
from megatron_peft.evaluation.generation import Continuation, score_all
from megatron_peft.evaluation.model import InferenceModel, load_model
from megatron_peft.parallel.collectives import awaited_from_first_rank, from_first_rank
from megatron_peft.runtime.launch import checked_together
from megatron_peft.serving.sync import Asked, asked_tokens, started_sync

SECONDS_BETWEEN = 1.0  # looks for a new checkpoint


def sync_run(config: RunConfig, settings: SyncSettings) -> None:
    """Give the server the newest checkpoint of --load, and with --follow each later one, in a started world.

    ConfigurationError, on every rank: no run with adapters, no such server, or a version that is bound or computed
    otherwise, which is unloaded again, so that the one before stays.
    """
    run, base = Path(str(config.checkpoint.load)), config.model.pretrained_checkpoint
    folder = from_first_rank(lambda: run_record.find_checkpoint(run)).resolve().parent
    shape = checked_together(lambda: read_model_shape(Path(str(base))))
    sync = started_sync(settings, config.peft, shape, base, folder)  # before the model is loaded
    model = None if "numbers" in settings.skip else load_model(config)
    prompts, newest = asked_tokens(shape.vocab_size, shape.longest_sequence), None
    while True:
        checkpoint = from_first_rank(lambda: run_record.find_checkpoint(run))
        if checkpoint != newest:
            own = None if model is None else _log_prob(model, checkpoint, prompts)
            awaited_from_first_rank(lambda at=checkpoint, own=own: print(sync.give(at, own, prompts), flush=True))
            newest = checkpoint
        elif settings.follow:
            time.sleep(SECONDS_BETWEEN)
        if not settings.follow:
            return


def _log_prob(model: InferenceModel, checkpoint: Path, prompts: Asked) -> float:
    load_trained_parameters(model.chunks, checkpoint)
    continuations = [Continuation((*tokens,), (token,)) for tokens, token in prompts]
    return fmean(score.log_likelihood for score in score_all(model, continuations, len(prompts)))
