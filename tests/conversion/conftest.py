"""Tiny Llamas of odd shapes, saved by transformers."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from tests.conversion import adapter_runs
from tests.conversion.adapter_runs import Moved
from tests.ranks import run_ranks

# 6 query heads on 2 key-value heads, head_dim 20 where hidden / heads is 16, every bias, a prime vocabulary.
ODD = {
    "vocab_size": 101,
    "hidden_size": 96,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 20,
    "attention_bias": True,
    "mlp_bias": True,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 20000.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 3.0,
        "original_max_position_embeddings": 32,
    },
}


def random_llama(**changes: object) -> LlamaForCausalLM:
    """A Llama whose every parameter is random: transformers starts biases at 0 and norms at 1."""
    torch.manual_seed(7)
    model = LlamaForCausalLM(LlamaConfig(**{**ODD, **changes})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(mean=1.0 if "norm" in name else 0.0, std=0.2)
    return model


@pytest.fixture(scope="session")
def odd_llama() -> LlamaForCausalLM:
    return random_llama()


@pytest.fixture(scope="session")
def tied_llama() -> LlamaForCausalLM:
    return random_llama(tie_word_embeddings=True)


@pytest.fixture(scope="session")
def saved_folders(odd_llama: LlamaForCausalLM, tied_llama: LlamaForCausalLM, tmp_path_factory) -> dict[str, Path]:
    """The odd model as one file, in shards and as pytorch_model.bin; the tied one as one file."""
    transformers_logging.disable_progress_bar()
    folders = {kind: tmp_path_factory.mktemp("saved") / kind for kind in ("single", "sharded", "torch", "tied")}
    odd_llama.save_pretrained(folders["single"])
    odd_llama.save_pretrained(folders["sharded"], max_shard_size="100KB")
    tied_llama.save_pretrained(folders["tied"])
    folders["torch"].mkdir()
    shutil.copy(folders["single"] / "config.json", folders["torch"])
    torch.save(odd_llama.state_dict(), folders["torch"] / "pytorch_model.bin")
    return folders


@pytest.fixture
def copy_of(saved_folders: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of one of the saved folders, to be spoilt."""
    return lambda kind: Path(shutil.copytree(saved_folders[kind], tmp_path / kind))


@pytest.fixture(scope="session")
def moved(tmp_path_factory) -> Moved:
    """Runs with adapters, each at a layout of its own, and their bases."""
    files = adapter_runs.make_files(tmp_path_factory.mktemp("adapters"))
    came_back = run_ranks(2, adapter_runs.save_runs, files)
    return Moved(Path(files.bases), Path(files.work), all(came_back))
