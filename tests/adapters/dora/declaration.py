"""A method like DoRA, as a package of one's own would declare it."""

from dataclasses import dataclass

from megatron_peft.config.methods import Method, PeftOptions, option


@dataclass(frozen=True)
class DoraOptions(PeftOptions):
    """Flags of DoRA."""

    dora_rank: int = option(8, "inner size of the low-rank factors", check="positive")
    dora_scale: float = option(2.0, "s, the scale of the low-rank change", check="positive")


class DoraMethod(Method):
    """A low-rank change, and a trained length of each row."""

    name = "dora"
    summary = "diag((1 + m) |W| / |W + s B A|) (W + s B A), |.| of each row"
    options = (DoraOptions,)
    adapter = "tests.adapters.dora.adapter"
    cost = "r (in + out) + out"

    def num_parameters(self, peft: DoraOptions, out_features: int, in_features: int) -> int:
        return peft.dora_rank * (in_features + out_features) + out_features


DORA = DoraMethod()
