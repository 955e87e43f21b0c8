"""A cluster, as far as a step's time and memory depend on it: every constant of `timing.py`, read from a YAML file.

Two files are shipped, in `clusters/`; another has the same fields. A rate is what a kernel or a link has at most; an
efficiency says how much of that is reached.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from itertools import pairwise
from math import isfinite, log, log2
from pathlib import Path
from typing import Any

import yaml

from megatron_peft.config import ConfigurationError, RunConfig, require
from megatron_peft.config.untrusted import compose_yaml, parse_yaml, read_text

SHIPPED = {path.stem: path for path in sorted((Path(__file__).parent / "clusters").glob("*.yaml"))}
DEFAULT = "8xh100"

# Field -> (unit, least, most): beyond them it is a slip of units.
LIMITS: Mapping[str, tuple[str, float, float]] = {
    "gpus_per_node": ("GPUs", 1, 1024),
    "memory_gib": ("GiB", 1, 4096),
    "reserved_gib": ("GiB", 0, 1024),
    "bf16_tflops": ("TFLOP/s", 1, 100_000),
    "fp32_tflops": ("TFLOP/s", 0.1, 100_000),
    "memory_gb_per_second": ("GB/s", 10, 1_000_000),
    "memory_efficiency": ("of the rate", 0.05, 1),
    "attention_efficiency": ("of the rate", 0.01, 1),
    "sustained": ("of an isolated kernel's rate", 0.05, 1),
    "lost_per_doubling": ("of a GPU's speed", 0, 0.5),
    "tensor_overlap": ("of a tensor-parallel call", 0, 1),
    "launch_us": ("microseconds", 0.1, 1000),
    "call_us": ("microseconds", 0.1, 10_000),
    "node_link.gb_per_second": ("GB/s", 0.1, 100_000),
    "node_link.latency_us": ("microseconds", 0.01, 100_000),
    "network_link.gb_per_second": ("GB/s", 0.01, 100_000),
    "network_link.latency_us": ("microseconds", 0.01, 1_000_000),
}
EFFICIENCIES = "product_efficiency"
LINKS = ("node_link", "network_link")


@dataclass(frozen=True)
class Link:
    """What connects GPUs.

    Args:
        gb_per_second: 1e9 bytes a second, of one GPU in one direction, as a collective of large messages reaches it.
        latency_us: of a message, in microseconds.
    """

    gb_per_second: float
    latency_us: float


@dataclass(frozen=True)
class Cluster:
    """Nodes of GPUs. The files in `clusters/` say where each number is from.

    Args:
        name: for tables.
        gpus_per_node: consecutive ranks share a node.
        memory_gib: of a GPU, as torch sees it.
        reserved_gib: of it, what no rehearsal sees: CUDA's context, NCCL's buffers, workspaces, fragmentation.
        bf16_tflops, fp32_tflops: of products, at most.
        memory_gb_per_second: of a GPU's own memory, at most.
        memory_efficiency: reached by operations that are no products.
        product_efficiency: (GFLOP of a product, its part of the rate), ascending; linear in the logarithm between.
        attention_efficiency: of fused causal attention, without the half that the mask spares.
        sustained: what products reach on one node in a long run, beside what they reach alone. This and the next two
            are calibrated (tools/published.toml).
        lost_per_doubling: part of `sustained`, each time that the nodes double.
        tensor_overlap: part of a tensor-parallel call that is hidden where a run overlaps it with products.
        launch_us: that the host takes for an operation.
        call_us: that the host takes for a collective or a message.
        node_link, network_link: within a node, and between nodes.
        hidden: `tensor_overlap` in a run that overlaps (`of_run`).
    """

    name: str
    gpus_per_node: int
    memory_gib: float
    reserved_gib: float
    bf16_tflops: float
    fp32_tflops: float
    memory_gb_per_second: float
    memory_efficiency: float
    product_efficiency: tuple[tuple[float, float], ...]
    attention_efficiency: float
    sustained: float
    lost_per_doubling: float
    tensor_overlap: float
    launch_us: float
    call_us: float
    node_link: Link
    network_link: Link
    hidden: float = 0.0

    @property
    def usable_bytes(self) -> float:
        """Of a GPU's memory, for what a plan counts."""
        return (self.memory_gib - self.reserved_gib) * 2**30

    def of_run(self, run: RunConfig) -> "Cluster":
        """As a run of this size and with these flags finds it. Our own linear layers overlap nothing, so no flag of
        ours sets `tp_comm_overlap`."""
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
        """Of a group of global ranks. Each GPU has a network adapter of its own.

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
        """Of a collective or a message alone: alpha log2(n) + beta times the bytes that each rank sends.

        Args:
            operation, num_bytes: of a `record.Call`.
            group: its ranks; of a message both ends.
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

    Raises:
        ConfigurationError: there is no such file, or a field is missing, doubled, unknown or absurd; all are named.
    """
    path = SHIPPED.get(name.lower(), Path(name))
    if name.lower() not in SHIPPED and not path.exists():
        near = get_close_matches(name.lower(), SHIPPED, 1)
        hint = f"; did you mean {near[0]}?" if near else f". Shipped: {', '.join(SHIPPED)}."
        raise ConfigurationError(f"--cluster {name} is neither a file nor the name of a shipped cluster{hint}")
    place = f"--cluster {name}"
    text = read_text(path)
    values = parse_yaml(text, place)
    if doubled := [*_doubled(compose_yaml(text, place))]:
        raise ConfigurationError(*(f"{place}, {problem}" for problem in doubled))
    require(isinstance(values, dict), f"{place} is not a table of fields: write `gpus_per_node: 8`, a line for each.")
    return cluster_of(values, place)


def cluster_of_this_machine() -> Cluster | None:
    """With a GPU the shipped cluster of its kind, with the memory that it has; else None."""
    import torch

    if not torch.cuda.is_available():
        return None
    gpu = torch.cuda.get_device_properties(0)
    cluster = read_cluster("8xa100" if "A100" in gpu.name else DEFAULT)
    return replace(cluster, name=f"{gpu.name}, links of {cluster.name}", memory_gib=round(gpu.total_memory / 2**30, 1))


def _number_or_text(text: str) -> float | str:
    """A size of a product, of which 0.1 is 0.10; or a field's name."""
    try:
        return float(text)
    except ValueError:
        return text


def _doubled(table: yaml.Node | None) -> Iterator[str]:
    """Of which YAML would take the last."""
    if not isinstance(table, yaml.MappingNode):
        return
    places: dict[Any, str] = {}
    for key, value in table.value:
        yield from _doubled(value)
        place = f"line {key.start_mark.line + 1}, column {key.start_mark.column + 1}"
        name = _number_or_text(key.value)
        if name in places:
            yield f"{place}: {key.value} stands here and in {places[name]}: leave one out."
        places[name] = place


def cluster_of(values: Mapping[str, Any], place: str) -> Cluster:
    """The cluster that these fields describe. ConfigurationError with everything that is wrong, named after `place`."""
    problems = [*_unknown(values), *_missing_or_absurd(values)]
    if not isinstance(values.get("name", ""), str):
        problems.append(f"name is {str(values['name'])[:40]}; it must be a text.")
    curve, wrong = _curve(values.get(EFFICIENCIES))
    problems += wrong
    if not problems and values["reserved_gib"] >= values["memory_gib"]:
        problems.append(
            f"reserved_gib is {values['reserved_gib']}, which leaves nothing of memory_gib {values['memory_gib']}."
        )
    if problems:
        raise ConfigurationError(*(f"{place}: {problem}" for problem in problems))
    links: Any = {name: Link(**{key: float(number) for key, number in values[name].items()}) for name in LINKS}
    plain = {name: values[name] for name in LIMITS if "." not in name}
    return Cluster(name=str(values.get("name", place)), product_efficiency=curve, **plain, **links)


def _unknown(values: Mapping[str, Any]) -> Iterator[str]:
    known = {field.name for field in fields(Cluster)} - {"hidden"}
    found = [str(name) for name in values if name not in known]
    found += [f"{name}.{key}" for name in LINKS if isinstance(values.get(name), dict) for key in values[name]]
    every = sorted({*LIMITS, *known} - set(LINKS))
    for name in found:
        if name not in LIMITS:
            near = get_close_matches(name, every, 1)
            yield f"{name} is not a field; " + (f"did you mean {near[0]}?" if near else f"there are {every}.")


def _missing_or_absurd(values: Mapping[str, Any]) -> Iterator[str]:
    for name, (unit, least, most) in LIMITS.items():
        outer, _, inner = name.partition(".")
        value = values.get(outer)
        if inner:
            value = value.get(inner) if isinstance(value, dict) else None
        bounds = f"{least:,} to {most:,} {unit}"
        if value is None:
            yield f"{name} is missing; it is a number from {bounds}."
        elif type(value) not in (int, float) or not least <= value <= most:
            yield f"{name} is {str(value)[:40]}; it must be a number from {bounds}."
        elif name == "gpus_per_node" and type(value) is not int:
            yield f"{name} is {value}; it must be a whole number."


def _curve(value: Any) -> tuple[tuple[tuple[float, float], ...], list[str]]:
    """(`Cluster.product_efficiency`, what is wrong with it)."""
    needs = "; it maps GFLOP of a product to the part of bf16_tflops that it reaches, as in {1: 0.3, 1000: 0.7}"
    if value is None:
        return (), [f"{EFFICIENCIES} is missing{needs}."]
    if not isinstance(value, dict) or not value:
        return (), [f"{EFFICIENCIES} is {str(value)[:40]}{needs}."]
    if not all(type(number) in (int, float) and isfinite(number) for number in (*value, *value.values())):
        wrong = needs
    elif min(value) <= 0 or not all(0.01 <= part <= 1 for part in value.values()):
        wrong = f": sizes are above 0, and parts from 0.01 to 1{needs}"
    else:
        curve = tuple(sorted((float(size), float(part)) for size, part in value.items()))
        if all(part <= following for (_, part), (_, following) in pairwise(curve)):
            return curve, []
        wrong = ": a larger product must not reach less of the rate"
    return (), [f"{EFFICIENCIES} is {str(value)[:80]}{wrong}."]
