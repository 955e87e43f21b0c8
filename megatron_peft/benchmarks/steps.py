"""CPU seconds and memory of the methods' steps beside those of the frozen base, of full fine-tuning and of HF PEFT."""

import dataclasses
from statistics import median

from megatron_peft.benchmark.figures import Figure
from megatron_peft.benchmark.memory import Peak, peak_of_steps
from megatron_peft.benchmarks.measure import TurnsJob, median_ratio, over_ranks, time_turns
from megatron_peft.benchmarks.subjects import Setting
from megatron_peft.runtime.ranks import run_ranks

MIB = 2**20
LAYOUTS = (
    ({"tensor_parallel": 1}, 1.08),
    ({"tensor_parallel": 2}, 1.10),
    ({"tensor_parallel": 2, "sequence_parallel": True}, 1.12),
)
OVER_FULL = {"frozen": None, "lora": 0.72, "hf-peft-lora": None}
TIMEOUT_SECONDS = 3600.0


def lora_ratio_figures(setting: Setting, num_turns: int) -> list[Figure]:
    """LoRA over the frozen base, at TP1, TP2 and TP2 with sequence parallelism."""
    return [_over_frozen(dataclasses.replace(setting, **layout), "lora", limit, num_turns) for layout, limit in LAYOUTS]


def hybrid_ratio_figures(setting: Setting, num_turns: int) -> list[Figure]:
    """The Hybrid over the frozen base."""
    return [_over_frozen(setting, "hybrid", 1.20, num_turns)]


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


def _over_frozen(setting: Setting, name: str, limit: float, num_turns: int) -> Figure:
    figure = _ratio(_take_turns(setting, ("frozen", name), num_turns), name, "frozen", limit)
    return dataclasses.replace(figure, name=f"{setting.layout}: {figure.name}")


def _ratio(seconds: dict[str, list[float]], name: str, below: str, limit: float | None) -> Figure:
    ratio = median_ratio(seconds[name], seconds[below])
    note = f"{_spent(seconds, name)}; {_spent(seconds, below)}; {len(seconds[name])} turns"
    return Figure(f"{name} step / {below} step", ratio, limit, "", note)


def _take_turns(setting: Setting, names: tuple[str, ...], num_turns: int) -> dict[str, list[float]]:
    job = TurnsJob(setting, names, num_turns)
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
