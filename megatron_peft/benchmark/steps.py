"""CPU seconds of a LoRA step beside those of the frozen base, of full fine-tuning and of HF PEFT."""

from __future__ import annotations

import dataclasses
from statistics import median

from megatron_peft.benchmark.figures import Figure
from megatron_peft.benchmark.memory import Peak, peak_of_steps
from megatron_peft.benchmark.subjects import Setting
from megatron_peft.benchmark.timing import TurnsJob, median_ratio, over_ranks, time_turns
from megatron_peft.runtime.ranks import run_ranks

MIB = 2**20
LAYOUTS = (
    ({"tensor_parallel": 1}, 1.08),
    ({"tensor_parallel": 2}, 1.10),
    ({"tensor_parallel": 2, "sequence_parallel": True}, 1.12),
)
OVER_FULL = {"frozen": None, "lora": 0.72, "hf-peft-lora": None}
TIMEOUT_SECONDS = 3600.0
TIMER = f"{time_turns.__module__}:{time_turns.__name__}"


def lora_ratio_figures(setting: Setting, num_turns: int) -> list[Figure]:
    """LoRA over the frozen base, at TP1, TP2 and TP2 with sequence parallelism."""
    return [_over_frozen(dataclasses.replace(setting, **layout), limit, num_turns) for layout, limit in LAYOUTS]


def lora_full_figures(setting: Setting, num_turns: int) -> list[Figure]:
    """The steps of `OVER_FULL` over full fine-tuning's, LoRA over HF PEFT's, and the peak memory of each alone."""
    seconds = _take_turns(setting, (*OVER_FULL, "full"), num_turns)
    full = _spent(seconds, "full")
    times = [
        Figure(f"{name} step / full step", median_ratio(seconds[name], seconds["full"]), limit, "", note)
        for name, limit in OVER_FULL.items()
        for note in [f"{_spent(seconds, name)}; {full}"]
    ]
    ours, theirs = seconds["lora"], seconds["hf-peft-lora"]
    note = f"{_spent(seconds, 'lora')}; {_spent(seconds, 'hf-peft-lora')}"
    return [*times, Figure("LoRA step / HF PEFT's", median_ratio(ours, theirs), 1.0, "", note), *_memory(setting)]


def _over_frozen(setting: Setting, limit: float, num_turns: int) -> Figure:
    seconds = _take_turns(setting, ("frozen", "lora"), num_turns)
    ratio = median_ratio(seconds["lora"], seconds["frozen"])
    note = f"{_spent(seconds, 'lora')}; {_spent(seconds, 'frozen')}; {num_turns} turns"
    return Figure(f"{setting.layout}: LoRA step / frozen base step", ratio, limit, "", note)


def _take_turns(setting: Setting, names: tuple[str, ...], num_turns: int) -> dict[str, list[float]]:
    job = TurnsJob(setting, names, num_turns)
    return over_ranks(run_ranks(setting.world_size, TIMER, job, timeout=TIMEOUT_SECONDS))


def _spent(seconds: dict[str, list[float]], name: str) -> str:
    return f"{name} {median(seconds[name]):.3f} CPU s"


def _memory(setting: Setting) -> list[Figure]:
    peaks = {name: peak_of_steps(setting, name) for name in (*OVER_FULL, "full")}
    full = peaks["full"]
    return [
        Figure(f"{name}: peak memory / full's", peak.above_start / full.above_start, None, "", _sizes(peak, full))
        for name, peak in peaks.items()
        if peak is not full
    ]


def _sizes(peak: Peak, full: Peak) -> str:
    return (
        f"{peak.above_start / MIB:,.0f} MiB and {full.above_start / MIB:,.0f} MiB above the process before the model "
        f"({peak.start / MIB:,.0f} MiB)"
    )
