"""What a rank reads and how much memory it takes to load its part of a model."""

from dataclasses import dataclass

from megatron_peft.benchmark.figures import Figure
from megatron_peft.benchmark.memory import peak_of_bare_torch, peak_resident_bytes
from megatron_peft.benchmarks.subjects import Setting, join, leave, load_base
from megatron_peft.runtime.ranks import run_ranks

MIB = 2**20
READ_OVER_SLICES = 1.05
MIB_ABOVE_THE_SHARD = 300


@dataclass(frozen=True)
class Loaded:
    """Bytes of one rank: read from the files, of its parameters, largest resident set."""

    read: int
    shard: int
    peak: int


def loading_figures(setting: Setting) -> list[Figure]:
    """The rank that read the most against its slices, and the rank that grew the most against its part of the model."""
    ranks = run_ranks(setting.world_size, load, setting)
    bare = peak_of_bare_torch()
    most_read = max(ranks, key=lambda rank: rank.read / rank.shard)
    largest = max(ranks, key=lambda rank: rank.peak - rank.shard)
    above = (largest.peak - largest.shard - bare) / MIB
    read_note = f"{most_read.read / MIB:.1f} MiB read, {most_read.shard / MIB:.1f} MiB held"
    peak_note = f"peak {largest.peak / MIB:.0f}, model {largest.shard / MIB:.0f}, torch alone {bare / MIB:.0f} MiB"
    read, memory = "bytes read / bytes of the rank's slices", "peak memory above model and python with torch"
    return [
        Figure(f"{setting.layout}: {read}", most_read.read / most_read.shard, READ_OVER_SLICES, "", read_note),
        Figure(f"{setting.layout}: {memory}", above, MIB_ABOVE_THE_SHARD, "MiB", peak_note),
    ]


def load(setting: Setting) -> Loaded:
    """Started on ranks."""
    join(setting)
    chunks, report = load_base(setting)
    shard = sum(parameter.nbytes for chunk in chunks for parameter in chunk.parameters())
    leave()
    return Loaded(report.bytes_read, shard, peak_resident_bytes())
