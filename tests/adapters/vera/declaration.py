"""VeRA as a package of one's own would declare it."""

from dataclasses import dataclass

from megatron_peft.config.methods import Method, PeftOptions, option


@dataclass(frozen=True)
class VeraOptions(PeftOptions):
    """Flags of VeRA."""

    vera_rank: int = option(8, "rank of the pair that layers share", check="positive")
    vera_seed: int = option(0, "seed of that pair", check="not_negative")


class VeraMethod(Method):
    """Two trained vectors a layer, and one random pair of matrices for all layers of a size."""

    name = "vera"
    summary = "W + diag(b) B diag(d) A"
    options = (VeraOptions,)
    adapter = "tests.adapters.vera.adapter"
    cost = "r + out"

    def num_parameters(self, peft: VeraOptions, out_features: int, in_features: int) -> int:
        return peft.vera_rank + out_features


VERA = VeraMethod()
