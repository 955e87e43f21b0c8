"""Collectives of a LoRA step beside those of a step of the frozen base, and of a Hybrid step beside LoRA's.

Forward, backward and gradient sums; those of a few numbers (losses, norms, counts of tokens) are listed apart. Without
sequence parallelism LoRA adds one call, the coalesced sum of its partial gradients. With it, r-wide gathers and
scatters come on top, two for each column-parallel layer. The Hybrid adds to LoRA's one call for all lambdas and, for
each row-parallel layer, one r-wide call (two with sequence parallelism).
"""

import dataclasses
from collections import Counter
from collections.abc import Sequence

from megatron_peft.benchmark.collective_log import Collective, CollectiveLog
from megatron_peft.benchmark.figures import Figure
from megatron_peft.benchmarks.subjects import STEPS, Setting, join, leave
from megatron_peft.models.families import read_shape
from megatron_peft.runtime.ranks import run_ranks

MIB = 2**20
EXTRA_BYTES_ALLOWED = 1.03


def collectives_figures(setting: Setting) -> list[Figure]:
    """At TP2 and at TP2 with sequence parallelism."""
    layouts = [dataclasses.replace(setting, tensor_parallel=2, sequence_parallel=split) for split in (False, True)]
    return [figure for layout in layouts for figure in _compare(layout)]


def log_steps(setting: Setting) -> dict[str, list[Collective]]:
    """The calls of one step of the frozen base, of LoRA and of the Hybrid, on this rank. Started on ranks."""
    join(setting)
    calls = {name: _log(STEPS[name](setting)) for name in ("frozen", "lora", "hybrid")}
    leave()
    return calls


def _log(step) -> list[Collective]:
    step()  # the first step of an optimizer is not like the others
    with CollectiveLog() as log:
        step()
    return log.calls


def _compare(setting: Setting) -> list[Figure]:
    calls = run_ranks(setting.world_size, log_steps, setting)[0]
    frozen, lora, hybrid = ([c for c in calls[name] if not c.is_scalar] for name in ("frozen", "lora", "hybrid"))
    extra = extra_calls(frozen, lora)
    wide = [call for call in extra if call.name != "allreduce_" and call.width > setting.rank]
    sums = [call for call in extra if call.name == "allreduce_"]
    scalars = sum(call.is_scalar for call in calls["lora"])
    ratio = _bytes(lora) / _bytes(frozen)
    behind = f"frozen {_summary(frozen)}; LoRA {_summary(lora)}, and {scalars} of a few numbers"
    name = f"{setting.layout}: LoRA's"
    return [
        Figure(f"{name} all-reduces above the frozen base's", len(sums), 1, "calls", behind),
        Figure(f"{name} other calls wider than r", len(wide), 0, "calls", _names(extra)),
        Figure(f"{name} bytes over the frozen base's", ratio, EXTRA_BYTES_ALLOWED),
        *_hybrid_over_lora(setting, lora, hybrid),
    ]


def _hybrid_over_lora(setting: Setting, lora: list[Collective], hybrid: list[Collective]) -> list[Figure]:
    extra = extra_calls(lora, hybrid)
    # Flat ones are sums of gradients and of lambdas' norms; the others carry activations.
    wide = [call for call in extra if call.width > setting.rank and call.width < call.elements]
    num_row_layers = 2 * read_shape(setting.checkpoint).num_layers
    allowed = 1 + num_row_layers * (2 if setting.sequence_parallel else 1)
    name = f"{setting.layout}: the Hybrid's"
    return [
        Figure(f"{name} calls above LoRA's", len(hybrid) - len(lora), allowed, "calls", f"Hybrid {_summary(hybrid)}"),
        Figure(f"{name} calls wider than r above LoRA's", len(wide), 0, "calls", _names(extra)),
    ]


def extra_calls(base: Sequence[Collective], more: Sequence[Collective]) -> list[Collective]:
    """What `more` has and `base` has not, equal calls cancelling one by one."""
    return list((Counter(more) - Counter(base)).elements())


def _bytes(calls: Sequence[Collective]) -> int:
    return sum(call.num_bytes for call in calls)


def _summary(calls: Sequence[Collective]) -> str:
    return f"{len(calls)} calls / {_bytes(calls) / MIB:.1f} MiB"


def _names(calls: Sequence[Collective]) -> str:
    counts = Counter((call.name.strip("_"), call.num_bytes) for call in calls)
    return "more: " + ", ".join(f"{count} {name} of {size / MIB:.3g} MiB" for (name, size), count in counts.items())
