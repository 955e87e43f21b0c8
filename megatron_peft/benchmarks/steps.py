"""CPU seconds and memory of the methods' steps beside those of the frozen base, of full fine-tuning and of HF PEFT."""

import dataclasses
import time
from collections import Counter
from collections.abc import Sequence
from math import prod
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor, nn

from megatron_peft.adapters.attach import attach_adapters, start_gradients_at_the_embedding
from megatron_peft.benchmarks.measure import (
    MIB,
    Figure,
    Peak,
    StepsJob,
    TurnsJob,
    median_ratio,
    over_ranks,
    peak_of_steps,
    run_steps,
    time_turns,
)
from megatron_peft.benchmarks.subjects import (
    STEPS,
    Setting,
    Step,
    frozen_step,
    join,
    leave,
    load_base,
    lora_ga_start,
    microbatch,
)
from megatron_peft.models.families import read_shape
from megatron_peft.rehearsal.program import ITEM_BYTES, Call
from megatron_peft.rehearsal.recorder import Recorder, group_names
from megatron_peft.runtime.cpu_kernels import give_back_freed_memory
from megatron_peft.runtime.ranks import run_ranks

METHODS = ("lora", "boft", "urnn", "hybrid")

# What a step may take beyond its floor, in hundredths of the frozen base's step. The floor is measured in the same run.
BOOKKEEPING = {"lora": 5.0, "boft": 8.0, "urnn": 10.0, "hybrid": 16.0}
LAYOUTS: tuple[dict[str, Any], ...] = (
    {"tensor_parallel": 1},
    {"tensor_parallel": 2},
    {"tensor_parallel": 2, "sequence_parallel": True},
)
OVER_FULL = {"frozen": None, "lora": 0.72, "hf-peft-lora": None}
TIMEOUT_SECONDS = 3600.0


def layout_ratio_figures(setting: Setting, num_turns: int) -> list[Figure]:
    """`ratio_figures` at TP1, TP2 and TP2 with sequence parallelism."""
    layouts = [dataclasses.replace(setting, **layout) for layout in LAYOUTS]
    return [figure for layout in layouts for figure in ratio_figures(layout, num_turns)]


def ratio_figures(setting: Setting, num_turns: int) -> list[Figure]:
    """Each method's step beyond its floor, both over the frozen base's step with the same products; in the note the
    two, the spread, and the ratio to MKL's."""
    seconds = _take_turns(setting, ("frozen", "frozen-mkl", *METHODS), num_turns, METHODS)
    return [_beyond_floor(setting.layout, seconds, name) for name in METHODS]


def lora_full_figures(setting: Setting, num_turns: int) -> list[Figure]:
    """The steps of `OVER_FULL` over full fine-tuning's, LoRA over HF PEFT's, and the peak memory of each alone."""
    seconds = _take_turns(setting, (*OVER_FULL, "full"), num_turns)
    times = [_ratio(seconds, name, "full", limit) for name, limit in OVER_FULL.items()]
    peer = _ratio(seconds, "lora", "hf-peft-lora", 1.0)
    return [*times, peer, *_memory(setting, dict.fromkeys(OVER_FULL))]


def hybrid_full_figures(setting: Setting, num_turns: int) -> list[Figure]:
    """Time and peak memory of the Hybrid over full fine-tuning's."""
    seconds = _take_turns(setting, ("hybrid", "full"), num_turns)
    return [_ratio(seconds, "hybrid", "full", 0.80), *_memory(setting, {"hybrid": 0.60})]


def rotation_figures(setting: Setting, num_turns: int) -> list[Figure]:
    """BOFT over LoRA, uRNN over the frozen base."""
    seconds = _take_turns(setting, ("frozen", "lora", "boft", "urnn"), num_turns)
    return [_ratio(seconds, "boft", "lora", 1.10), _ratio(seconds, "urnn", "frozen", 1.30)]


def _beyond_floor(layout: str, seconds: dict[str, list[float]], name: str) -> Figure:
    step = _ratio(seconds, name, "frozen", None)
    turns = [above / below for above, below in zip(seconds[name], seconds["frozen"], strict=True)]
    floor = 1 + median_ratio(seconds[f"{name} adds"], seconds["frozen"])
    floor -= median_ratio(seconds[f"{name} spares"], seconds["frozen"])
    below = "" if step.measured >= floor else "below its floor: not measured, take more --turns; "
    note = (
        f"{below}step {step.measured:.3f} ({min(turns):.3f} to {max(turns):.3f}; against MKL "
        f"{median_ratio(seconds[name], seconds['frozen-mkl']):.3f}), floor {floor:.3f}; {step.note}"
    )
    what, unit = f"{layout}: {name} step beyond its floor", "hundredths of the frozen step"
    return Figure(what, 100 * (step.measured - floor), BOOKKEEPING[name], unit, note)


def _ratio(seconds: dict[str, list[float]], name: str, below: str, limit: float | None) -> Figure:
    ratio = median_ratio(seconds[name], seconds[below])
    note = f"{_spent(seconds, name)}; {_spent(seconds, below)}; {len(seconds[name])} turns"
    return Figure(f"{name} step / {below} step", ratio, limit, "", note)


def _take_turns(
    setting: Setting, names: tuple[str, ...], num_turns: int, floors: tuple[str, ...] = ()
) -> dict[str, list[float]]:
    job = TurnsJob(setting, names, num_turns, floors)
    return over_ranks(run_ranks(setting.world_size, time_turns, job, timeout=TIMEOUT_SECONDS))


def _spent(seconds: dict[str, list[float]], name: str) -> str:
    return f"{name} {median(seconds[name]):.3f} CPU s"


def _memory(setting: Setting, limits: dict[str, float | None]) -> list[Figure]:
    full = peak_of_steps(setting, "full")
    peaks = {name: peak_of_steps(setting, name) for name in limits}
    return [
        Figure(f"{name}: peak memory / full's", peak.above_start / full.above_start, limits[name], "", note)
        for name, peak in peaks.items()
        for note in [_sizes(peak, full)]
    ]


def _sizes(peak: Peak, full: Peak) -> str:
    return (
        f"{peak.above_start / MIB:,.0f} MiB and {full.above_start / MIB:,.0f} MiB above the process before the model "
        f"({peak.start / MIB:,.0f} MiB)"
    )


# Bytes that autograd keeps for backward, a layer of the model, by method.
#
# Counted by hooks in one forward of the whole model: each storage once, weights and buffers not at all. What a method
# adds to the frozen base's is divided by the number of layers.

ACTIVATIONS_TIMEOUT_SECONDS = 1200.0

LIMIT = 1.001  # lambda and what it multiplies are a few scalars


def activations_figures(setting: Setting) -> list[Figure]:
    """BOFT's and uRNN's extra over LoRA's, the Hybrid's over LoRA's and BOFT's together."""
    kept = run_ranks(1, count_methods, setting, timeout=ACTIVATIONS_TIMEOUT_SECONDS)[0]
    num_layers = read_shape(setting.checkpoint).num_layers
    extra = {name: (num_bytes - kept["frozen"]) / num_layers for name, num_bytes in kept.items()}
    frozen = f"frozen {kept['frozen'] / num_layers / MIB:.1f} MiB a layer"
    return [
        _over(extra, "boft", ("lora",), frozen),
        _over(extra, "urnn", ("lora",), frozen),
        _over(extra, "hybrid", ("lora", "boft"), frozen),
    ]


def count_methods(setting: Setting) -> dict[str, int]:
    """Bytes by method, and of the frozen base. Started on a rank."""
    torch.set_num_threads(1)
    join(setting)
    kept = {name: _kept(setting, name) for name in ("frozen", *METHODS)}
    leave()
    return kept


def _over(extra: dict[str, float], name: str, others: Sequence[str], frozen: str) -> Figure:
    allowed = sum(extra[other] for other in others)
    note = f"{extra[name] / MIB:.2f} and {allowed / MIB:.2f} MiB a layer more; {frozen}"
    return Figure(f"{name}: kept for backward / {' and '.join(others)}'s", extra[name] / allowed, LIMIT, "", note)


def _kept(setting: Setting, method: str) -> int:
    (model,), _ = load_base(setting)
    model.requires_grad_(False)
    if method == "frozen":
        start_gradients_at_the_embedding(model)
    else:
        attach_adapters([model], setting.peft(method), seed=0)
    batch = microbatch(setting, read_shape(setting.checkpoint).vocab_size)
    saved = SavedBytes(model)
    with saved:
        loss = model(batch.tokens, batch.position_ids, None, labels=batch.labels)
    del loss
    return saved.num_bytes


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Context manager; counts what autograd keeps while it is entered, but for the tensors of `model`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(self._keep, lambda tensor: tensor)
        own = [*model.parameters(), *model.buffers()]
        self._seen = {tensor.untyped_storage().data_ptr() for tensor in own}
        self._held: list[Tensor] = []  # so that no address is used twice
        self.num_bytes = 0

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self._held.append(tensor)
            self.num_bytes += storage.nbytes()
        return tensor


# Collectives of a LoRA step beside those of a step of the frozen base, and of a Hybrid step beside LoRA's.
#
# Forward, backward and gradient sums; those of a few numbers (losses, norms, counts of tokens) are listed apart.
# Without sequence parallelism LoRA adds one call, the coalesced sum of its partial gradients. With it, r-wide gathers
# and scatters come on top, two for each column-parallel layer. The Hybrid adds to LoRA's one call for all lambdas
# and, for each row-parallel layer, one r-wide call (two with sequence parallelism).

EXTRA_BYTES_ALLOWED = 1.03
MOST_NUMBERS = 8  # of a sum of losses, a norm, a count of tokens


def collectives_figures(setting: Setting) -> list[Figure]:
    """At TP2 and at TP2 with sequence parallelism."""
    layouts = [dataclasses.replace(setting, tensor_parallel=2, sequence_parallel=split) for split in (False, True)]
    return [figure for layout in layouts for figure in _compare(layout)]


def log_steps(setting: Setting) -> dict[str, list[Call]]:
    """The calls of one step of the frozen base of megatron-core's own layers, of LoRA and of the Hybrid, on this rank.

    Started on ranks.
    """
    join(setting)
    steps = {"frozen": "frozen-mkl", "lora": "lora", "hybrid": "hybrid"}
    calls = {name: _log(STEPS[step](setting)) for name, step in steps.items()}
    leave()
    return calls


def _log(step) -> list[Call]:
    step()  # the first step of an optimizer is not like the others
    with Recorder(group_names(), keeps_work=False) as log:
        step()
    # Where one is waited for is not compared.
    return [dataclasses.replace(entry, handle=None) for entry in log.entries() if isinstance(entry, Call)]


def num_elements(call: Call) -> int:
    """Of the whole tensor: what is gathered, or what is summed."""
    return sum(map(prod, call.shapes)) * (len(call.group) if call.operation == "all_gather" else 1)


def _width(call: Call) -> int:
    """Elements of the last axis."""
    return call.shapes[0][-1] if call.shapes and call.shapes[0] else 1


def _compare(setting: Setting) -> list[Figure]:
    calls = run_ranks(setting.world_size, log_steps, setting)[0]
    frozen, lora, hybrid = (
        [one for one in calls[name] if num_elements(one) > MOST_NUMBERS] for name in ("frozen", "lora", "hybrid")
    )
    extra = extra_calls(frozen, lora)
    wide = [call for call in extra if call.operation != "all_reduce" and _width(call) > setting.rank]
    sums = [call for call in extra if call.operation == "all_reduce"]
    scalars = len(calls["lora"]) - len(lora)
    ratio = _bytes(lora) / _bytes(frozen)
    behind = f"frozen {_summary(frozen)}; LoRA {_summary(lora)}, and {scalars} of a few numbers"
    name = f"{setting.layout}: LoRA's"
    return [
        Figure(f"{name} all-reduces above the frozen base's", len(sums), 1, "calls", behind),
        Figure(f"{name} other calls wider than r", len(wide), 0, "calls", _names(extra)),
        Figure(f"{name} bytes over the frozen base's", ratio, EXTRA_BYTES_ALLOWED),
        *_hybrid_over_lora(setting, lora, hybrid),
    ]


def _hybrid_over_lora(setting: Setting, lora: list[Call], hybrid: list[Call]) -> list[Figure]:
    extra = extra_calls(lora, hybrid)
    # Flat ones are sums of gradients and of lambdas' norms; the others carry activations.
    wide = [call for call in extra if setting.rank < _width(call) < num_elements(call)]
    num_row_layers = 2 * read_shape(setting.checkpoint).num_layers
    allowed = 1 + num_row_layers * (2 if setting.sequence_parallel else 1)
    name = f"{setting.layout}: the Hybrid's"
    return [
        Figure(f"{name} calls above LoRA's", len(hybrid) - len(lora), allowed, "calls", f"Hybrid {_summary(hybrid)}"),
        Figure(f"{name} calls wider than r above LoRA's", len(wide), 0, "calls", _names(extra)),
    ]


def extra_calls(base: Sequence[Call], more: Sequence[Call]) -> list[Call]:
    """What `more` has and `base` has not, equal calls cancelling one by one."""
    return list((Counter(more) - Counter(base)).elements())


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
LORA_GA_TIMEOUT_SECONDS = 1800.0


def lora_ga_start_figures(setting: Setting) -> list[Figure]:
    """Of a start from eight batches; memory of a start from one, since no batch adds to it."""
    frozen, start = run_ranks(1, time_start, setting, timeout=LORA_GA_TIMEOUT_SECONDS)[0]
    peaks = [_peak(setting, name).peak / MIB for name in ("lora-ga-start", "frozen")]
    ratio, note = start / frozen, f"{start:.2f} and {frozen:.2f} CPU s a batch; {NUM_BATCHES} batches"
    sizes = f"peaks of {peaks[0]:,.0f} and {peaks[1]:,.0f} MiB"
    return [
        Figure("LoRA-GA's start, a batch / frozen forward and backward", ratio, MAX_RATIO, "", note),
        Figure(
            "LoRA-GA's start: peak memory above the frozen step's", peaks[0] - peaks[1], MAX_EXTRA_MIB, "MiB", sizes
        ),
    ]


def _peak(setting: Setting, name: str) -> Peak:
    job = StepsJob(setting, name, num_steps=1)
    return run_ranks(1, run_steps_giving_back, job, timeout=LORA_GA_TIMEOUT_SECONDS)[0]


def run_steps_giving_back(job: StepsJob) -> Peak:
    """`run_steps` of a process that keeps nothing of what it frees. Started on a rank."""
    give_back_freed_memory()
    return run_steps(job)


def time_start(setting: Setting) -> tuple[float, float]:
    """CPU seconds a batch of the frozen base (half of them before the start, half after) and of the start."""
    torch.set_num_threads(1)
    join(setting)
    frozen, start = frozen_step(setting), lora_ga_start(setting, NUM_BATCHES)
    frozen()
    before = [_cpu_seconds(frozen) for _ in range(NUM_BATCHES // 2)]
    whole = _cpu_seconds(start)
    after = [_cpu_seconds(frozen) for _ in range(NUM_BATCHES // 2)]
    leave()
    return mean(before + after), whole / NUM_BATCHES


def _cpu_seconds(step: Step) -> float:
    begin = time.process_time()
    step()
    return time.process_time() - begin
