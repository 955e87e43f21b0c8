"""What is off while a model generates or is scored, and on again afterwards: dropout and sequence parallelism."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

# What modules and their configuration call it; static batching refuses all of it.
SEQUENCE_PARALLEL_SWITCHES = ("sequence_parallel", "scatter_to_sequence_parallel", "reduce_scatter_embeddings")


@contextmanager
def inference(model_chunks: Sequence[nn.Module]) -> Iterator[None]:
    """No gradients, no dropout, no sequence parallelism; each chunk is left as it was found."""
    were_training = [chunk.training for chunk in model_chunks]
    for chunk in model_chunks:
        chunk.eval()
    try:
        with torch.no_grad(), _without_sequence_parallelism(model_chunks):
            yield
    finally:
        for chunk, was_training in zip(model_chunks, were_training, strict=True):
            chunk.train(was_training)


@contextmanager
def _without_sequence_parallelism(model_chunks: Sequence[nn.Module]) -> Iterator[None]:
    """Switch it off in modules and configurations, and afterwards on again exactly where it was on.

    megatron-core's own `set_model_to_sequence_parallel` remembers models by `id`, which a later model may inherit.
    """
    modules = (module for chunk in model_chunks for module in chunk.modules())
    owners = {id(owner): owner for module in modules for owner in (module, getattr(module, "config", None))}
    switched = [(o, name) for o in owners.values() for name in SEQUENCE_PARALLEL_SWITCHES if getattr(o, name, False)]
    for owner, name in switched:
        setattr(owner, name, False)
    try:
        yield
    finally:
        for owner, name in switched:
            setattr(owner, name, True)
