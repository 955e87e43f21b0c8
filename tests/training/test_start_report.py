"""What is said of LoRA-GA's start, and what is written."""

from __future__ import annotations

import json

from megatron_peft.config import PeftConfig
from megatron_peft.training.start_report import START_FILE, WholeStart, start_table, write_start

ENERGY = {
    f"decoder.layers.{layer}.{module}": energy
    for module, energies in {
        "mlp.linear_fc2": [0.5, 0.75, 1.0],
        "self_attention.linear_qkv": [0.25, 0.125, 0.5],
    }.items()
    for layer, energy in zip((9, 10, 11), energies, strict=True)
}
START = WholeStart(PeftConfig("lora-ga", lora_rank=4, lora_ga_batches=2), 12.34, ENERGY)


def test_a_line_for_each_kind_of_layer(tmp_path):
    lines = start_table(START, tmp_path / START_FILE).splitlines()
    assert lines[0] == "LoRA-GA start (aligned) took 12.3 s; part of the gradient's squared norm in rank 4:"
    assert [line.split()[:3] for line in lines[1:3]] == [["linear_fc2", "3", "layers"], ["linear_qkv", "3", "layers"]]
    assert lines[1].endswith("mean 0.750   lowest 0.500 (layer 9)   highest 1.000 (layer 11)")
    assert lines[2].endswith("mean 0.292   lowest 0.125 (layer 10)   highest 0.500 (layer 11)")
    assert lines[3:] == [f"  each layer's: {tmp_path / START_FILE}"]


def test_each_layers_number_is_written_in_the_order_of_layers(tmp_path):
    path = write_start(START, str(tmp_path))
    assert path == tmp_path / START_FILE
    record = json.loads(path.read_text())
    assert record["energy"] == ENERGY
    assert list(record["energy"])[:2] == [
        "decoder.layers.9.mlp.linear_fc2",
        "decoder.layers.9.self_attention.linear_qkv",
    ]
    assert (record["lora_ga_init"], record["lora_rank"], record["lora_ga_batches"]) == ("aligned", 4, 2)


def test_without_a_folder_nothing_is_written_or_pointed_at(tmp_path):
    assert write_start(START, None) is None
    assert write_start(START, str(tmp_path / "missing")) is None
    assert len(start_table(START, None).splitlines()) == 3
