"""Which token comes next: the likeliest, or one drawn from the likeliest.

Every row has a random stream of its own, seeded by the run's seed and the row's name, and a token takes one number from
it. So a row's answer depends neither on the rows beside it nor on the layout.

Letters: b rows, v vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_peft.config import Requirements
from megatron_peft.parallel.layout import generator_for


@dataclass(frozen=True)
class Sampling:
    """What is drawn from.

    Args:
        temperature: logits are divided by it; 0 takes the likeliest token.
        top_k: only the k likeliest tokens; 0 for all.
        top_p: of those, the fewest likeliest ones that together have this probability.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        with Requirements(self) as require:
            require.not_negative("temperature", "top_k")
            require(0 < self.top_p <= 1, f"--top-p is {self.top_p}; it is a probability, above 0 and at most 1.")


GREEDY = Sampling()


class RandomStreams:
    """Numbers between 0 and 1 for rows with names."""

    def __init__(self, seed: int, names: Sequence[str]) -> None:
        self._generators = [generator_for(seed, name) for name in names]

    def draw(self, rows: Sequence[int]) -> Tensor:
        """The next number of each of these rows: [b], float64."""
        return torch.cat([torch.rand(1, generator=self._generators[row], dtype=torch.float64) for row in rows])


def choose_tokens(logits: Tensor, sampling: Sampling, draws: Tensor | None) -> Tensor:
    """The next token of each row: the first whose cumulative probability, in the order of ids, exceeds its draw.

    The order of ids, unlike that of probabilities, is not upset by rounding.

    Args:
        logits: [b, v], float32.
        draws: [b], between 0 and 1; not looked at when the likeliest is taken.

    Returns:
        [b] ids.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    assert draws is not None
    cumulative = probabilities(logits, sampling).double().cumsum(-1)
    targets = draws.to(logits.device) * cumulative[:, -1]
    return torch.searchsorted(cumulative, targets[:, None], right=True).squeeze(-1)


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """[b, v] -> [b, v]: softmax(logits / temperature) over the tokens that are drawn from, 0 elsewhere."""
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        smallest = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if sampling.top_p < 1:
        logits = logits.masked_fill(_beyond(logits, sampling.top_p), -torch.inf)
    return logits.softmax(-1)


def _beyond(logits: Tensor, top_p: float) -> Tensor:
    """True for tokens before which, by falling probability, `top_p` is reached already."""
    ordered, ids = logits.softmax(-1).sort(-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    return (before >= top_p).scatter(-1, ids, before >= top_p)
