"""CPU seconds and memory of the methods' steps beside those of the frozen base, of full fine-tuning and of HF PEFT."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor, nn

from megatron_peft.adapters.attach import attach_adapters, freeze, start_gradients_at_the_embedding
from megatron_peft.benchmarks.measure import MIB, Figure, cpu_seconds, median_ratio, peak_of_steps, seconds_of_steps
from megatron_peft.benchmarks.subjects import (
    STEPS,
    Setting,
    frozen_step,
    load_base,
    lora_ga_start,
    microbatch,
    on_ranks,
)
from megatron_peft.models.families import read_shape
from megatron_peft.rehearsal.program import ITEM_BYTES, Call
from megatron_peft.rehearsal.recorder import Recorder

METHODS = ("lora", "boft", "urnn", "hybrid")

# What a step may take beyond its floor, in hundredths of the frozen base's step. The floor is measured in the same run.
BOOKKEEPING = {"lora": 5.0, "boft": 8.0, "urnn": 10.0, "hybrid": 16.0}
OVER_UNQUANTIZED = 1.30
OVER_FULL = {"frozen": None, "lora": 0.72, "hf-peft-lora": None}


def ratio_figures(setting: Setting) -> list[Figure]:
    """Each method's step beyond its floor, both over the frozen base's step with the same products; in the note the
    two, the spread, and the ratio to MKL's."""
    seconds = seconds_of_steps(setting, ("frozen", "frozen-mkl", *METHODS), floors=METHODS)
    figures = []
    for name in METHODS:
        step = _ratio(seconds, name, "frozen", None)
        turns = [above / below for above, below in zip(seconds[name], seconds["frozen"], strict=True)]
        floor = 1 + median_ratio(seconds[f"{name} adds"], seconds["frozen"])
        floor -= median_ratio(seconds[f"{name} spares"], seconds["frozen"])
        below = "" if step.measured >= floor else "below its floor: not measured, take more --turns; "
        note = (
            f"{below}step {step.measured:.3f} ({min(turns):.3f} to {max(turns):.3f}; against MKL "
            f"{median_ratio(seconds[name], seconds['frozen-mkl']):.3f}), floor {floor:.3f}; {step.note}"
        )
        what, unit = f"{setting.layout}: {name} step beyond its floor", "hundredths of the frozen step"
        figures.append(Figure(what, 100 * (step.measured - floor), BOOKKEEPING[name], unit, note))
    return figures


def lora_full_figures(setting: Setting) -> list[Figure]:
    """The steps of `OVER_FULL` over full fine-tuning's, LoRA over HF PEFT's, and the peak memory of each alone."""
    seconds = seconds_of_steps(setting, (*OVER_FULL, "full"))
    times = [_ratio(seconds, name, "full", limit) for name, limit in OVER_FULL.items()]
    peer = _ratio(seconds, "lora", "hf-peft-lora", 1.0)
    return [*times, peer, *_memory(setting, dict.fromkeys(OVER_FULL))]


def hybrid_full_figures(setting: Setting) -> list[Figure]:
    """Time and peak memory of the Hybrid over full fine-tuning's."""
    seconds = seconds_of_steps(setting, ("hybrid", "full"))
    return [_ratio(seconds, "hybrid", "full", 0.80), *_memory(setting, {"hybrid": 0.60})]


def rotation_figures(setting: Setting) -> list[Figure]:
    """BOFT over LoRA, uRNN over the frozen base."""
    seconds = seconds_of_steps(setting, ("frozen", "lora", "boft", "urnn"))
    return [_ratio(seconds, "boft", "lora", 1.10), _ratio(seconds, "urnn", "frozen", 1.30)]


def quantized_figures(setting: Setting) -> list[Figure]:
    """LoRA's step on a quantized base over the same step on the run's own."""
    names = ("lora on nf4", "lora on fp8")
    seconds = seconds_of_steps(setting, ("lora", *names))
    return [_ratio(seconds, name, "lora", OVER_UNQUANTIZED) for name in names]


def _ratio(seconds: dict[str, list[float]], name: str, below: str, limit: float | None) -> Figure:
    ratio = median_ratio(seconds[name], seconds[below])
    spent = "; ".join(f"{step} {median(seconds[step]):.3f} CPU s" for step in (name, below))
    return Figure(f"{name} step / {below} step", ratio, limit, "", f"{spent}; {len(seconds[name])} turns")


def _memory(setting: Setting, limits: dict[str, float | None]) -> list[Figure]:
    whole, before = peak_of_steps(setting, "full")
    figures = []
    for name, limit in limits.items():
        peak, start = peak_of_steps(setting, name)
        above, above_of_full = peak - start, whole - before
        note = (
            f"{above / MIB:,.0f} MiB and {above_of_full / MIB:,.0f} MiB above the process before the model "
            f"({start / MIB:,.0f} MiB)"
        )
        figures.append(Figure(f"{name}: peak memory / full's", above / above_of_full, limit, "", note))
    return figures


# Bytes that autograd keeps for backward, a layer of the model, by method.
#
# Counted by hooks in one forward of the whole model: each storage once, weights and buffers not at all. What a method
# adds to the frozen base's is divided by the number of layers.

LIMIT = 1.001  # lambda and what it multiplies are a few scalars


def activations_figures(setting: Setting) -> list[Figure]:
    """BOFT's and uRNN's extra over LoRA's, the Hybrid's over LoRA's and BOFT's together."""
    kept = on_ranks(count_methods, setting)[0]
    num_layers = read_shape(setting.checkpoint).num_layers
    extra = {name: (num_bytes - kept["frozen"]) / num_layers for name, num_bytes in kept.items()}
    figures = []
    for name, others in {"boft": ("lora",), "urnn": ("lora",), "hybrid": ("lora", "boft")}.items():
        allowed = sum(extra[other] for other in others)
        note = (
            f"{extra[name] / MIB:.2f} and {allowed / MIB:.2f} MiB a layer more; "
            f"frozen {kept['frozen'] / num_layers / MIB:.1f} MiB a layer"
        )
        what = f"{name}: kept for backward / {' and '.join(others)}'s"
        figures.append(Figure(what, extra[name] / allowed, LIMIT, "", note))
    return figures


def count_methods(setting: Setting) -> dict[str, int]:
    """Bytes by method, and of the frozen base. Started on a rank."""
    batch = microbatch(setting, read_shape(setting.checkpoint).vocab_size)
    kept = {}
    for name in ("frozen", *METHODS):
        (model,), _ = load_base(setting)
        freeze(model)
        if name == "frozen":
            start_gradients_at_the_embedding(model)
        else:
            attach_adapters([model], setting.run(name).peft, seed=0)
        forward = partial(model, batch.tokens, batch.position_ids, None, labels=batch.labels)
        kept[name] = saved_bytes(model, forward)
    return kept


def saved_bytes(model: nn.Module, forward: Callable[[], Any]) -> int:
    """Bytes that autograd keeps of a forward, but for the tensors of `model`."""
    seen = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    held = []  # so that no address is used twice

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            held.append(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    return sum(storage.nbytes() for storage in held)


# Collectives of a LoRA step beside those of a step of the frozen base, and of a Hybrid step beside LoRA's.
#
# Forward, backward and gradient sums; those of a few numbers (losses, norms, counts of tokens) are listed apart.
# Without sequence parallelism LoRA adds one call, the coalesced sum of its partial gradients. With it, r-wide gathers
# and scatters come on top, two for each column-parallel layer. The Hybrid adds to LoRA's one call for all lambdas
# and, for each row-parallel layer, one r-wide call (two with sequence parallelism).

EXTRA_BYTES_ALLOWED = 1.03
MOST_NUMBERS = 8  # of a sum of losses, a norm, a count of tokens


def log_steps(setting: Setting) -> dict[str, list[Call]]:
    """The calls of a step of megatron-core's own frozen base, LoRA and the Hybrid, on this rank. Started on ranks."""
    calls = {}
    for name, step_name in {"frozen": "frozen-mkl", "lora": "lora", "hybrid": "hybrid"}.items():
        step = STEPS[step_name](setting)
        step()  # the first step of an optimizer is not like the others
        with Recorder(keeps_work=False) as log:
            step()
        # Where a call is waited for is not compared.
        made = [entry for entry in log.entries() if isinstance(entry, Call)]
        # Nor is whether the loss's numbers, one a token, lie as the tokens do or in one column.
        sums = [call.operation == "all_reduce" and len(call.shapes[0]) == 2 for call in made]
        shapes = [((num_elements(call),),) if flat else call.shapes for call, flat in zip(made, sums, strict=True)]
        both = zip(made, shapes, strict=True)
        calls[name] = [dataclasses.replace(call, handle=None, shapes=shape) for call, shape in both]
    return calls


def num_elements(call: Call) -> int:
    """Elements of the whole tensor: what is gathered, or what is summed."""
    return sum(map(prod, call.shapes)) * (len(call.group) if call.operation == "all_gather" else 1)


def collectives_figures(setting: Setting) -> list[Figure]:
    """LoRA beside the frozen base, and the Hybrid beside LoRA."""

    def width(call: Call) -> int:
        """Elements of the last axis."""
        return call.shapes[0][-1] if call.shapes and call.shapes[0] else 1

    calls = on_ranks(log_steps, setting)[0]
    frozen, lora, hybrid = (
        [call for call in calls[name] if num_elements(call) > MOST_NUMBERS] for name in ("frozen", "lora", "hybrid")
    )
    # What one step has and the other has not, equal calls cancelling one by one.
    extra, hybrids = ([*(Counter(more) - Counter(base)).elements()] for base, more in ((frozen, lora), (lora, hybrid)))
    wide = [call for call in extra if call.operation != "all_reduce" and width(call) > setting.rank]
    sums = [call for call in extra if call.operation == "all_reduce"]
    # Flat ones are sums of gradients and of lambdas' norms; the others carry activations.
    hybrids_wide = [call for call in hybrids if setting.rank < width(call) < num_elements(call)]
    num_row_layers = 2 * read_shape(setting.checkpoint).num_layers
    allowed = 1 + num_row_layers * (2 if setting.sequence_parallel else 1)
    scalars = len(calls["lora"]) - len(lora)
    behind = f"frozen {_summary(frozen)}; LoRA {_summary(lora)}, and {scalars} of a few numbers"
    its, hybrid_its = f"{setting.layout}: LoRA's", f"{setting.layout}: the Hybrid's"
    over_lora, calls_behind = len(hybrid) - len(lora), f"Hybrid {_summary(hybrid)}"
    return [
        Figure(f"{its} all-reduces above the frozen base's", len(sums), 1, "calls", behind),
        Figure(f"{its} other calls wider than r", len(wide), 0, "calls", _names(extra)),
        Figure(f"{its} bytes over the frozen base's", _bytes(lora) / _bytes(frozen), EXTRA_BYTES_ALLOWED),
        Figure(f"{hybrid_its} calls above LoRA's", over_lora, allowed, "calls", calls_behind),
        Figure(f"{hybrid_its} calls wider than r above LoRA's", len(hybrids_wide), 0, "calls", _names(hybrids)),
    ]


def _bytes(calls: Sequence[Call]) -> int:
    return sum(num_elements(call) * ITEM_BYTES[call.dtype] for call in calls)


def _summary(calls: Sequence[Call]) -> str:
    return f"{len(calls)} calls / {_bytes(calls) / MIB:.1f} MiB"


def _names(calls: Sequence[Call]) -> str:
    counts = Counter((call.operation, _bytes([call])) for call in calls)
    return "more: " + ", ".join(f"{count} {name} of {size / MIB:.3g} MiB" for (name, size), count in counts.items())


# What LoRA-GA's start costs: CPU seconds a batch beside the frozen base's forward and backward, and memory.
#
# A resident set holds what is in use and what the C library keeps of what was freed: for the same frozen step 120 MiB
# more in one run than in another, which is more than is measured here. So both sides give back at once what they free.

NUM_BATCHES = 8
MAX_RATIO, MAX_EXTRA_MIB = 2.3, 100.0


def lora_ga_start_figures(setting: Setting) -> list[Figure]:
    """A start from eight batches; memory of a start from one, since no batch adds to it."""
    frozen, start = on_ranks(time_start, setting)[0]
    peaks = [
        peak_of_steps(setting, name, num_steps=1, keeps_freed=False).peak / MIB for name in ("lora-ga-start", "frozen")
    ]
    note = f"{start:.2f} and {frozen:.2f} CPU s a batch; {NUM_BATCHES} batches"
    sizes = f"peaks of {peaks[0]:,.0f} and {peaks[1]:,.0f} MiB"
    more = peaks[0] - peaks[1]
    return [
        Figure("LoRA-GA's start, a batch / frozen forward and backward", start / frozen, MAX_RATIO, "", note),
        Figure("LoRA-GA's start: peak memory above the frozen step's", more, MAX_EXTRA_MIB, "MiB", sizes),
    ]


def time_start(setting: Setting) -> tuple[float, float]:
    """CPU seconds a batch of the frozen base (half of them before the start, half after) and of the start."""
    frozen, start = frozen_step(setting), lora_ga_start(setting, NUM_BATCHES)
    frozen()
    before = [cpu_seconds(frozen) for _ in range(NUM_BATCHES // 2)]
    whole = cpu_seconds(start)
    after = [cpu_seconds(frozen) for _ in range(NUM_BATCHES // 2)]
    return mean(before + after), whole / NUM_BATCHES
