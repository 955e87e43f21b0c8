"""Runs with adapters at two ranks, for the tests of moving adapters."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_peft.adapters.boft import ProjectedBoft
from megatron_peft.adapters.urnn import RiemannianUrnn
from megatron_peft.checkpoint.folders import RECORD, write_manifest
from megatron_peft.checkpoint.load import load_checkpoint
from megatron_peft.checkpoint.run_record import RunRecord, find_checkpoint, read_record
from megatron_peft.checkpoint.save import draft_checkpoint
from megatron_peft.checkpoint.state import TrainingState
from megatron_peft.config import ModelConfig
from megatron_peft.conversion.peft_export import export_adapter
from megatron_peft.conversion.peft_import import import_adapter
from megatron_peft.conversion.pretrained import known_fingerprint
from megatron_peft.parallel.layout import generator_for
from megatron_peft.runtime.launch import start_world
from tests.checkpoint.runs import Files, Run, Settings, configure, differences, merged, start
from tests.tiny_bloom import save_bloom
from tests.tiny_llama import save_llama, save_pairs

TP2: Settings = {"parallel": {"tensor_model_parallel_size": 2}}
PP2: Settings = {"parallel": {"pipeline_model_parallel_size": 2}}
# Some layers only (fc1 in two of them, fc2 in all, qkv in the last), float32 copies beside bfloat16, rank-stabilised.
SOME_LAYERS: Settings = {
    "model": {"bf16": True},
    "peft": {
        "target_modules": ("decoder.layers.[12].*fc1", "down_proj", "decoder.layers.3.*qkv"),
        "lora_rs": True,
        "lora_alpha": 6,
    },
}
SHORT: Settings = {"model": {"pretrained_checkpoint": "short"}}
BLOOM: Settings = {"model": {"pretrained_checkpoint": "bloom"}}
SHORT_TP2 = merged(TP2, SHORT)
# As HF PEFT knows it, of one factor and of three.
BOFT: Settings = {"peft": {"method": "boft", "rotation_side": "input", "boft_block_size": 4, "boft_factors": 1}}
BUTTERFLY: Settings = {"peft": {"boft_block_size": 2, "boft_factors": 3, "target_modules": ("linear_qkv", "*.0.*fc2")}}
PROJECTION: Settings = {"peft": {"boft_block_size": 2, "boft_factors": 2, "boft_parametrization": "projection"}}
PAPER: Settings = {"peft": {"method": "lora-ga", "lora_ga_init": "paper", "lora_rs": True, "lora_alpha": 3}}
URNN: Settings = {"peft": {"method": "urnn", "urnn_block_size": 4}}
REPLACE: Settings = {"peft": {"urnn_mode": "replace", "target_modules": ("linear_proj",)}}
HYBRID: Settings = {"peft": {"method": "hybrid", "boft_block_size": 2, "boft_factors": 2, "lora_ga_init": "original"}}
FOLDING: Settings = {"peft": {"lora_ga_init": "aligned", "hybrid_rotation": "urnn", "hybrid_merge_interval": 1}}
RUNS = {  # those of a layout stand together: its groups are made once
    "pp2": merged(PP2, SOME_LAYERS),
    "butterfly": merged(PP2, BOFT, BUTTERFLY),
    "tp2": TP2,
    "bloom": merged(TP2, BLOOM),
    "boft": merged(SHORT_TP2, BOFT),
    "projection": merged(SHORT_TP2, BOFT, PROJECTION),
    "paper": merged(SHORT_TP2, PAPER),
    "urnn": merged(SHORT_TP2, URNN),
    "riemannian": merged(SHORT_TP2, URNN, {"peft": {"urnn_update": "riemannian", "rotation_side": "input"}}),
    "replace": merged(TP2, BLOOM, URNN, REPLACE),
    "hybrid": merged(SHORT_TP2, HYBRID),
    "folding": merged(SHORT_TP2, URNN, HYBRID, FOLDING),
}
EVERY_LLAMA_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MOVED = {"A", "B", "A0", "B0", "Q", "P", "theta", "U"}


@dataclasses.dataclass(frozen=True)
class Moved:
    """`base`, `other` (of the same shape), and `short`, `small` and `bloom` of two layers are Hugging Face folders;
    `runs` are --save folders."""

    bases: Path
    runs: Path
    # Whether an adapter that went to HF PEFT and back is loaded by a run at TP2 with every parameter as it was.
    came_back: bool

    def base(self, name: str) -> Path:
        return self.bases / name

    def run(self, name: str) -> Path:
        return self.runs / name

    def base_of(self, run: str) -> Path:
        return self.base(RUNS[run].get("model", {}).get("pretrained_checkpoint", "base"))


def config_of(adapter: Path) -> dict[str, Any]:
    """The settings of an adapter of HF PEFT."""
    return json.loads((adapter / "adapter_config.json").read_text())


def copy_run(run: Path, to: Path, change: Callable[[RunRecord], RunRecord]) -> Path:
    """A whole copy of a run with another record."""
    shutil.copytree(run, to)
    checkpoint = find_checkpoint(to)
    (checkpoint / RECORD).write_text(change(read_record(checkpoint)).to_json())
    write_manifest(checkpoint, {})
    return to


def with_config(**groups: Any) -> Callable[[RunRecord], RunRecord]:
    """A change of a record: other groups of its configuration."""
    return lambda record: dataclasses.replace(record, config=dataclasses.replace(record.config, **groups))


def trained_on(run: Path, to: Path, base: Path) -> Path:
    """A copy of a run whose record names another base, by its fingerprint too."""
    named, fingerprint = with_config(model=ModelConfig(pretrained_checkpoint=str(base))), known_fingerprint(base)
    return copy_run(run, to, lambda record: dataclasses.replace(named(record), base_fingerprint=fingerprint))


def make_files(folder: Path) -> Files:
    save_llama(folder / "bases" / "base")
    save_llama(folder / "bases" / "other", seed=1)
    save_llama(folder / "bases" / "small", hidden_size=72, num_hidden_layers=2)
    save_llama(folder / "bases" / "short", num_hidden_layers=2)
    save_bloom(folder / "bases" / "bloom", n_layer=2)
    return Files(str(folder / "bases"), str(save_pairs(folder / "pairs.jsonl")), str(folder / "runs"))


def save_runs(files: Files) -> bool:
    """Write every run of RUNS; returns `came_back`. Called on each of two ranks."""
    start_world()
    for name, settings in RUNS.items():
        run = start(configure(files, merged(settings, {"checkpoint": {"save": str(Path(files.work, name))}})))
        _fill_adapters(run.state)
        run.train(1)
        if run.state.config.peft.hybrid_merge_interval:  # the change is in the weights now: another one beside it
            _fill_adapters(run.state)
        draft_checkpoint(run.state).complete()
        if name == "tp2":
            before = _adapters(run)
    there, back = Path(files.work, "there"), Path(files.work, "back")
    if dist.get_rank() == 0:
        export_adapter(Path(files.work, "tp2"), there)
        import_adapter(there, back, pretrained_checkpoint=Path(files.bases, "base"))
    dist.barrier()
    again = start(configure(files, merged(TP2, {"checkpoint": {"load": str(back), "finetune": True}})))
    return load_checkpoint(again.state) and not differences(before, _adapters(again))


def _adapters(run: Run) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in run.snapshot().items() if name.startswith("decoder")}


@torch.no_grad()
def _fill_adapters(state: TrainingState) -> None:
    """Move every tensor by random numbers: split ones differ between the ranks, the others do not."""
    for number, chunk in enumerate(state.model_chunks):
        for name, tensor in [*chunk.named_parameters(), *chunk.named_buffers()]:
            if ".adapter." in name and name.rpartition(".")[2] in MOVED:
                seed = 1 + dist.get_rank() * tensor.tensor_model_parallel
                values = torch.randn(tensor.shape, generator=generator_for(seed, f"{number}.{name}"))
                tensor.add_(0.1 * values)
        for module in chunk.modules():  # blocks that are to be orthogonal or unitary are made so
            if isinstance(module, ProjectedBoft):
                module.project()
            if isinstance(module, RiemannianUrnn):
                nearest, _, other = torch.linalg.svd(torch.view_as_complex(module.U))
                module.U.copy_(torch.view_as_real(nearest @ other))
    state.optimizer.reload_model_params()
