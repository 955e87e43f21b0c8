"""Cluster files: what is shipped, what is refused, and what a call costs."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import TypeAdapter

from megatron_peft.config import ConfigurationError
from megatron_peft.plan.cluster import SHIPPED, Cluster, cluster_of, read_cluster

FIELDS: dict[str, Any] = yaml.safe_load(SHIPPED["8xh100"].read_text())
SCHEMA = TypeAdapter(Cluster).json_schema()
OF_LINKS = {f"{link}.": SCHEMA["$defs"]["Link"]["properties"] for link in ("node_link", "network_link")}
LIMITS = {
    prefix + name: (field["minimum"], field["maximum"])
    for prefix, found in {"": SCHEMA["properties"], **OF_LINKS}.items()
    for name, field in found.items()
    if "minimum" in field
}


def changed(name: str, value: Any) -> dict[str, Any]:
    """The shipped fields with another value; None takes the field out."""
    fields, (outer, _, inner) = deepcopy(FIELDS), name.partition(".")
    table = fields[outer] if inner else fields
    if value is None:
        del table[inner or outer]
    else:
        table[inner or outer] = value
    return fields


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_clusters_are_read_by_their_names(name):
    assert read_cluster(name).gpus_per_node == 8 and read_cluster(name.upper()) == read_cluster(str(SHIPPED[name]))


@pytest.mark.parametrize("name", sorted({*LIMITS, "product_efficiency", "node_link", "network_link"} - {"hidden"}))
def test_a_missing_field_is_named(name):
    with pytest.raises(ConfigurationError, match=f"x.yaml: {name} is missing"):
        cluster_of(changed(name, None), "x.yaml")


@pytest.mark.parametrize("name", LIMITS)
@pytest.mark.parametrize("value", [-1, 1e12, "many", True, [1]])
def test_an_absurd_value_is_named_with_its_limits(name, value):
    with pytest.raises(ConfigurationError, match=f"{name} is .*: Input should be "):
        cluster_of(changed(name, value), "x.yaml")


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("gpus_per_nod", 8, "gpus_per_nod is not a field"),
        ("node_link.latency", 8, "node_link.latency is not a field"),
        ("gpus_per_node", 7.5, "gpus_per_node is 7.5: Input should be a valid integer"),
        ("reserved_gib", 80, "leaves nothing of memory_gib"),
        *(
            ("product_efficiency", wrong, f"product_efficiency is {wrong}: it maps GFLOP of a product")
            for wrong in ({1: 0.5, 10: 0.2}, {0: 0.5}, {1: 7}, {1: 0.001}, {1: 0.1, 2: float("nan")}, {}, 0.5)
        ),
    ],
)
def test_what_is_wrong_is_said(name, value, told):
    with pytest.raises(ConfigurationError) as caught:
        cluster_of(changed(name, value), "x.yaml")
    assert told in str(caught.value)


@pytest.mark.parametrize("name", LIMITS)
def test_its_limits_are_allowed(name):
    for limit in LIMITS[name]:
        other = {"memory_gib": {"reserved_gib": 0}, "reserved_gib": {"memory_gib": 4096}}.get(name, {})
        cluster_of({**changed(name, limit), **other}, "x.yaml")


def test_what_is_reserved_is_not_for_the_plan():
    cluster = cluster_of({**FIELDS, "memory_gib": 80, "reserved_gib": 7.5}, "x.yaml")
    assert cluster.usable_bytes == 72.5 * 2**30


def test_everything_that_is_wrong_is_said_at_once():
    with pytest.raises(ConfigurationError) as caught:
        cluster_of({**changed("launch_us", None), "memory_gib": 0}, "x.yaml")
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "neither a file nor the name of a shipped cluster. Shipped: 8xa100, 8xh100."),
        ("[1]", "not a table of fields"),
        ("{a: [", "not YAML"),
        ("", "not a table"),
    ],
)
def test_a_file_that_is_no_cluster_is_refused(text, told, tmp_path: Path):
    path = tmp_path / "8xh10"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigurationError) as caught:
        read_cluster(str(path) if text is not None else "8xh10")
    assert told in str(caught.value)


@pytest.mark.parametrize(
    "again",
    ["launch_us: 5\n", "{node_link: {latency_us: 1, gb_per_second: 9, latency_us: 2}}"],
    ids=["at the top", "inside a field"],
)
def test_a_field_that_stands_twice_is_named_with_both_places(again, tmp_path: Path):
    path = tmp_path / "own.yaml"
    path.write_text(again if again.startswith("{") else SHIPPED["8xh100"].read_text() + again)
    with pytest.raises(ConfigurationError) as caught:
        read_cluster(str(path))
    name = "latency_us" if again.startswith("{") else "launch_us"
    [told] = caught.value.problems
    assert "own.yaml is not YAML: line" in told and f": {name} stands here and in line" in told


def test_a_size_that_stands_twice_is_named_however_it_is_written(tmp_path: Path):
    (tmp_path / "own.yaml").write_text("product_efficiency: {0.1: 0.3, 1: 0.5, 0.10: 0.4}\n")
    with pytest.raises(ConfigurationError, match="0.10 stands here and in line 1"):
        read_cluster(str(tmp_path / "own.yaml"))


def test_efficiency_rises_between_the_sizes_that_are_given():
    cluster = cluster_of(changed("product_efficiency", {1: 0.2, 100: 0.6}), "x")
    assert [cluster.efficiency(size * 1e9) for size in (0.1, 1, 100, 1e6)] == [0.2, 0.2, 0.6, 0.6]
    assert cluster.efficiency(10e9) == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("operation", "group", "seconds"),
    [
        ("all_reduce", range(8), 3 * 6e-6 + 2 * 7 / 8 * 1e9 / 360e9),
        ("reduce_scatter", range(8), 3 * 6e-6 + 7 / 8 * 1e9 / 360e9),
        ("all_to_all", range(8), 3 * 6e-6 + 7 / 8 * 1e9 / 360e9),
        ("all_gather", range(8), 3 * 6e-6 + 7 * 1e9 / 360e9),  # bytes are those of a shard
        ("send", (0, 1), 6e-6 + 1e9 / 360e9),
        ("send", (0, 8), 12e-6 + 1e9 / 45e9),
        ("all_reduce", (0, 8), 12e-6 + 1e9 / 45e9),
        ("all_reduce", (0, 4, 8, 12), 24e-6 + 2 * 3 / 4 * 1e9 / 90e9),  # two of a node have two adapters
        ("all_reduce", range(16), 48e-6 + 2 * 15 / 16 * 1e9 / 360e9),  # eight adapters are as fast as the node's links
        ("all_reduce", (3,), 0.0),
        ("barrier", range(2), 6e-6),
    ],
)
def test_a_call_costs_latency_and_its_bytes(operation, group, seconds):
    assert read_cluster("8xh100").call_seconds(operation, 1e9, tuple(group)) == pytest.approx(seconds)
