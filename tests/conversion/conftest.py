"""A tiny Llama in every form of a Hugging Face folder, and runs with adapters."""

import json
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft.tuners.boft import layer as peft_boft_layer
from transformers import LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from megatron_peft.conversion import convert
from megatron_peft.conversion.verify import Difference, logits_of, random_tokens
from tests.conversion import adapter_runs
from tests.conversion.adapter_runs import Moved
from tests.conversion.megatron_folders import save_random
from tests.ranks import run_ranks
from tests.tiny_llama import VOCAB_SIZE, save_llama

ODD = {
    "vocab_size": 101, "intermediate_size": 72, "num_hidden_layers": 3, "rms_norm_eps": 1e-5,  # 101 is a prime
    "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 20000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 3.0,
        "original_max_position_embeddings": 32,
    },
}  # fmt: skip


@pytest.fixture(scope="session")
def saved_folders(tmp_path_factory) -> dict[str, Path]:
    """An odd model as one file, in shards, and both as pickles; a tied one as one file."""
    transformers_logging.disable_progress_bar()
    work = tmp_path_factory.mktemp("saved")
    folders = {kind: work / kind for kind in ("single", "sharded", "torch", "sharded torch", "tied")}
    save_llama(folders["tied"], tie_word_embeddings=True, **ODD)
    model = LlamaForCausalLM.from_pretrained(save_llama(folders["single"], **ODD))
    model.save_pretrained(folders["sharded"], max_shard_size="100KB")
    for kind in ("torch", "sharded torch"):
        folders[kind].mkdir()
        shutil.copy(folders["single"] / "config.json", folders[kind])
    state = model.state_dict()
    torch.save(state, folders["torch"] / "pytorch_model.bin")
    weight_map = {name: f"pytorch_model-0000{1 + ('mlp' in name)}-of-00002.bin" for name in state}
    for file in set(weight_map.values()):
        torch.save({name: state[name] for name in state if weight_map[name] == file}, folders["sharded torch"] / file)
    (folders["sharded torch"] / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folders


@pytest.fixture(scope="module", autouse=True)
def many_shares() -> Iterator[None]:
    """Tiny tensors are cut like large ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convert, "MIN_SHARD_BYTES", 1)
        yield


@pytest.fixture(scope="session")
def original(tmp_path_factory) -> Path:
    """An odd Llama of random numbers, for which no library is needed."""
    return save_random(tmp_path_factory.mktemp("original") / "odd")


@pytest.fixture(scope="session")
def odd_llama(saved_folders) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(saved_folders["single"]).eval()


@pytest.fixture
def copy_of(saved_folders, tmp_path) -> Callable[[str], Path]:
    """A copy of one of the saved folders, to be spoilt."""
    return lambda kind: Path(shutil.copytree(saved_folders[kind], tmp_path / kind))


@pytest.fixture(scope="session")
def moved(tmp_path_factory) -> Moved:
    """Runs with adapters, each at a layout of its own, and their bases."""
    files = adapter_runs.make_files(tmp_path_factory.mktemp("adapters"))
    came_back = run_ranks(2, adapter_runs.save_runs, files)
    return Moved(Path(files.bases), Path(files.work), all(came_back))


@pytest.fixture(scope="session")
def merged(moved, tmp_path_factory) -> Callable[[str], Path]:
    """The merged folder of a run, made once."""
    work = tmp_path_factory.mktemp("merged")
    return cache(lambda run: convert.merge(moved.run(run), work / run, progress=False))


@pytest.fixture(scope="session")
def apart() -> Callable[[Path, Path], Difference]:
    """How far the logits of two folders are apart, on the tokens of `verify`; the model of each runs once."""
    logits = cache(lambda folder: logits_of(folder, random_tokens(VOCAB_SIZE, 64)))
    return lambda folder, reference: Difference.of(logits(folder), logits(reference))


@pytest.fixture
def pure_torch(monkeypatch):
    """HF PEFT's BOFT with several factors, without its extension: [factors, blocks, b, b] -> [factors, n, n]."""
    block_diagonal = SimpleNamespace(apply=lambda x: torch.stack([torch.block_diag(*factor) for factor in x]))
    monkeypatch.setattr(peft_boft_layer, "get_fbd_cuda", lambda: True)
    monkeypatch.setattr(peft_boft_layer, "FastBlockDiag", block_diagonal)


@pytest.fixture
def no_extension(monkeypatch):
    monkeypatch.setattr(peft_boft_layer, "get_fbd_cuda", lambda: None)
