"""A cluster, as far as a step's time and memory depend on it: every constant of `timing.py`, read from a YAML file.

Two files are shipped, in `clusters/`; another has the same fields. A rate is what a kernel or a link has at most; an
efficiency says how much of that is reached.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite, log, log2
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from megatron_peft.config import ConfigurationError, RunConfig, require
from megatron_peft.config.errors import validation_problems
from megatron_peft.config.untrusted import parse_yaml, read_text

SHIPPED = {path.stem: path for path in sorted((Path(__file__).parent / "clusters").glob("*.yaml"))}
DEFAULT = "8xh100"

FORM = ConfigDict(extra="forbid")


def within(least: float, most: float) -> Any:
    """Limits of a field's number."""
    return Field(ge=least, le=most, strict=True)


def _curve(value: Any) -> tuple[tuple[float, float], ...]:
    """Return {GFLOP of a product: its part of bf16_tflops} as ascending pairs. Raises ValueError for anything else."""
    numbers = (*value, *value.values()) if isinstance(value, dict) else ()
    are_numbers = all(type(number) in (int, float) and isfinite(number) for number in numbers)
    pairs = sorted(value.items()) if numbers and are_numbers else []
    parts = [part for _, part in pairs]
    if not pairs or pairs[0][0] <= 0 or parts != sorted(parts) or not 0.01 <= parts[0] <= parts[-1] <= 1:
        raise ValueError(
            "it maps GFLOP of a product, above 0, to the part of bf16_tflops that it reaches, from 0.01 to 1 and not "
            "less for a larger product, as in {1: 0.3, 1000: 0.7}"
        )
    return tuple((float(size), float(part)) for size, part in pairs)


@dataclass(frozen=True)
class Link:
    """What connects GPUs."""

    __pydantic_config__ = FORM

    gb_per_second: Annotated[
        float, within(0.01, 100_000)
    ]  # 1e9 bytes, of one GPU in one direction, as a collective of large messages reaches it
    latency_us: Annotated[float, within(0.01, 1_000_000)]  # microseconds of a message


@dataclass(frozen=True)
class Cluster:
    """Nodes of GPUs. The files in `clusters/` say where each number is from.

    Each has the least and the most that it may be: beyond them it is a slip of units. `sustained` and the two after it
    are calibrated (tools/published.toml).
    """

    __pydantic_config__ = FORM

    name: Annotated[str, Field(strict=True)]  # for tables
    gpus_per_node: Annotated[int, within(1, 1024)]  # consecutive ranks share a node
    memory_gib: Annotated[float, within(1, 4096)]  # of a GPU, as torch sees it
    # Of it, what no rehearsal sees: CUDA's context, NCCL's buffers, workspaces, fragmentation.
    reserved_gib: Annotated[float, within(0, 1024)]
    bf16_tflops: Annotated[float, within(1, 100_000)]  # of products, at most
    fp32_tflops: Annotated[float, within(0.1, 100_000)]
    memory_gb_per_second: Annotated[float, within(10, 1_000_000)]  # of a GPU's own memory, at most
    memory_efficiency: Annotated[float, within(0.05, 1)]  # reached by operations that are no products
    # (GFLOP of a product, its part of the rate), ascending; linear in the logarithm between.
    product_efficiency: Annotated[tuple[tuple[float, float], ...], BeforeValidator(_curve)]
    # Of fused causal attention, without the half that the mask spares.
    attention_efficiency: Annotated[float, within(0.01, 1)]
    # What products reach on one node in a long run, beside what they reach alone; and lose, each time the nodes double.
    sustained: Annotated[float, within(0.05, 1)]
    lost_per_doubling: Annotated[float, within(0, 0.5)]
    tensor_overlap: Annotated[float, within(0, 1)]  # that is hidden where a run overlaps it
    launch_us: Annotated[float, within(0.1, 1000)]  # that the host takes for an operation
    call_us: Annotated[float, within(0.1, 10_000)]  # that it takes for a collective or a message
    node_link: Link  # within a node
    network_link: Link  # between nodes
    hidden: Annotated[float, within(0, 1)] = 0.0  # `tensor_overlap` in a run that overlaps (`of_run`)

    @property
    def usable_bytes(self) -> float:
        return (self.memory_gib - self.reserved_gib) * 2**30

    def of_run(self, run: RunConfig) -> "Cluster":
        """The cluster that a run of this size and with these flags finds. Our own linear layers overlap nothing, so no
        flag of ours sets `tp_comm_overlap`."""
        doublings = log2(max(run.parallel.world_size / self.gpus_per_node, 1.0))
        overlaps = run.parallel.sequence_parallel and run.model.transformer.get("tp_comm_overlap", False)
        return replace(
            self,
            sustained=self.sustained * (1 - self.lost_per_doubling) ** doublings,
            hidden=self.tensor_overlap if overlaps else 0.0,
        )

    def efficiency(self, flops: float) -> float:
        """Part of the rate that a product of so many operations reaches alone."""
        sizes = [size for size, _ in self.product_efficiency]
        gflop = flops / 1e9
        after = bisect_right(sizes, gflop)
        if after in (0, len(sizes)):
            return self.product_efficiency[max(after - 1, 0)][1]
        (low, least), (high, most) = self.product_efficiency[after - 1 : after + 1]
        return least + (most - least) * log(gflop / low) / log(high / low)

    def link(self, group: Sequence[int]) -> Link:
        """The link of a group of global ranks. Each GPU has a network adapter of its own.

        The ranks of a group that share a node share their adapters too: a collective crosses between nodes once for
        all of them.
        """
        on_nodes = Counter(rank // self.gpus_per_node for rank in group)
        if len(on_nodes) == 1:
            return self.node_link
        num_sharing = min(on_nodes.values())
        across = self.network_link.gb_per_second * num_sharing
        return Link(min(across, self.node_link.gb_per_second), self.network_link.latency_us)

    def call_seconds(self, operation: str, num_bytes: float, group: Sequence[int]) -> float:
        """What a collective or a message takes alone: alpha log2(n) + beta times the bytes that each rank sends.

        `num_bytes` are those of a `program.Call`; the group of a message is both ends.
        """
        n, link = len(group), self.link(group)
        if n == 1:
            return 0.0
        times = {
            "all_reduce": 2 * (n - 1) / n,
            "reduce_scatter": (n - 1) / n,
            "all_to_all": (n - 1) / n,
            "all_gather": n - 1,  # of the own shard
            "barrier": 0.0,
        }.get(operation, 1.0)
        return link.latency_us * 1e-6 * max(log2(n), 1.0) + times * num_bytes / (link.gb_per_second * 1e9)


def read_cluster(name: str) -> Cluster:
    """The cluster of --cluster: the name of a shipped one, or the path of a file.

    ConfigurationError: there is no such file, a field is doubled, or some are missing, unknown or absurd; it names all.
    """
    path, place = SHIPPED.get(name.lower(), Path(name)), f"--cluster {name}"
    shipped = ", ".join(SHIPPED)
    require(path.exists(), f"{place} is neither a file nor the name of a shipped cluster. Shipped: {shipped}.")
    values = parse_yaml(read_text(path), place)
    require(isinstance(values, dict), f"{place} is not a table of fields: write `gpus_per_node: 8`, a line for each.")
    return cluster_of(values, place)


def cluster_of_this_machine() -> Cluster | None:
    """The shipped cluster of this machine's GPU, with the memory that it has; None: there is no GPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    gpu = torch.cuda.get_device_properties(0)
    cluster = read_cluster("8xa100" if "A100" in gpu.name else DEFAULT)
    return replace(cluster, name=f"{gpu.name}, links of {cluster.name}", memory_gib=round(gpu.total_memory / 2**30, 1))


def cluster_of(values: Mapping[str, Any], place: str) -> Cluster:
    """Return the cluster that these fields describe.

    Raises ConfigurationError with everything that is wrong, named after `place`.
    """
    try:
        cluster = TypeAdapter(Cluster).validate_python({"name": place, **values})
    except ValidationError as error:
        raise ConfigurationError(*(f"{place}: {problem}" for problem in validation_problems(error))) from error
    require(
        cluster.reserved_gib < cluster.memory_gib,
        f"{place}: reserved_gib is {cluster.reserved_gib}, which leaves nothing of memory_gib {cluster.memory_gib}.",
    )
    return cluster
