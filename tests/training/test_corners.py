"""Ranks that differ: they equal one process, and agree on errors and signals."""

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_peft.config import ConfigurationError
from megatron_peft.runtime.launch import start_world
from megatron_peft.training import run as training_run
from megatron_peft.training.loop import train
from megatron_peft.training.step import NonFiniteError, train_step
from tests.one_rank import one_rank
from tests.ranks import run_ranks
from tests.tiny_llama import save_llama, save_pairs
from tests.training.layout_runs import Job, built, differences, run_each
from tests.training.recorded_saves import RecordedSaves, signal_at

PP2 = {"parallel": {"pipeline_model_parallel_size": 2}}
TP2 = {"parallel": {"tensor_model_parallel_size": 2}}
SP = {"parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True}}
RUNS = {
    "first layer": {"peft": {"lora_rank": 4, "target_modules": ("decoder.layers.0.*",), "lora_plus_ratio": 4.0}},
    "last layer": {"peft": {"lora_rank": 4, "target_modules": ("decoder.layers.3.*",)}},
    "frozen ones between": {"peft": {"lora_rank": 4, "target_modules": ("o_proj", "decoder.layers.2.mlp.*")}},
    "tied lora": {"peft": {"lora_rank": 4}},
    "tied full": {"peft": {"method": "full"}, "optimizer": {"lr": 1e-3}},
}
LAYOUTS = {
    "first layer": {"PP2": PP2, "PP2 sharded": {**PP2, "optimizer": {"use_distributed_optimizer": True}}},
    "last layer": {"PP2": PP2},
    "frozen ones between": {"TP2": TP2, "TP2+SP": SP},
    "tied lora": {"PP2": PP2},
    "tied full": {"PP2": PP2, "TP2+SP": SP},
}
CASES = [(run, layout) for run, layouts in LAYOUTS.items() for layout in layouts]
POISONED = {"PP2": PP2, "DP2": {}}


BAD_RANK = 1


def found_by_a_rank(asked: tuple[list[Job], list[Job], Job]) -> dict[str, Any]:
    """Reports that are compared; what is said where BAD_RANK's last loss is NaN; what its signal does."""
    start_world()
    compared, poisoned, signalled = asked
    errors = {job.name: _poisoned(job) for job in poisoned}
    stopped = [_signalled(signalled, "train"), _signalled(signalled, "valid")]
    return {"reports": run_each(compared), "errors": errors, "stopped": stopped}


def _poisoned(job: Job) -> str:
    def spoil(module: Any, inputs: Any, losses: torch.Tensor) -> torch.Tensor:
        return losses * torch.nan

    with built(job) as (state, data):
        if dist.get_rank() == BAD_RANK:
            state.model_chunks[0].module.register_forward_hook(spoil)
        before = [parameter.detach().clone() for parameter in state.model_chunks[0].parameters()]
        try:
            train_step(state, next(iter(data.train)))
        except NonFiniteError as error:
            unchanged = all(map(torch.equal, before, state.model_chunks[0].parameters()))
            return str(error) if unchanged else "parameters were changed"
    return "no error"


def _signalled(job: Job, split: str) -> tuple[str, list[int], bool]:
    saver = RecordedSaves()
    with built(job) as (state, data):
        if dist.get_rank() == BAD_RANK:
            signal_at(getattr(data, split), state.config.global_batch_size, signal.SIGUSR1)
        return train(state, data, saver), saver.saved, state.best.was_interrupted


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corners")
    bases = [str(save_llama(folder / f"{n}", tie_word_embeddings=bool(n), intermediate_size=64)) for n in (0, 1)]
    data = str(save_pairs(folder / "pairs.jsonl"))

    def job(name, run, groups):
        settings = {"training": {"micro_batch_size": 4}, **RUNS[run], **groups}
        return Job(name, bases[run.startswith("tied")], data, num_steps=4, **settings)

    with one_rank(with_groups=False):
        alone = run_each([job(run, run, {}) for run in RUNS])
    compared = [job(f"{run} {layout}", run, LAYOUTS[run][layout]) for run, layout in CASES]
    poisoned = [job(name, "tied lora", groups) for name, groups in POISONED.items()]
    validates = {"training": {"micro_batch_size": 4, "eval_interval": 3}}
    signalled = job("", "tied lora", {"checkpoint": {"save": str(folder / "save")}, **validates})
    return alone, run_ranks(2, found_by_a_rank, (compared, poisoned, signalled))


@pytest.mark.parametrize("run, layout", CASES)
def test_two_ranks_equal_one(found, run, layout):
    """A stage without trainable parameters; an embedding on the first stage that is the last one's output layer."""
    alone, by_rank = found[0][run], [rank["reports"][f"{run} {layout}"] for rank in found[1]]
    assert min(step.grad_norm for step in alone.curve.steps) > 0
    assert alone.curve.validation_loss < alone.curve.losses[0], "it learns"
    assert by_rank[0].curve == by_rank[1].curve and differences(by_rank, alone) == {}


@pytest.mark.parametrize("layout", POISONED)
def test_nan_on_one_rank_stops_all_before_the_update(found, layout):
    messages = [rank["errors"][layout] for rank in found[1]]
    assert messages[0] == messages[1]
    assert messages[0].startswith("iteration 1: the loss is NaN or infinite (")
    assert f"rank {BAD_RANK}, microbatch 0" in messages[0] and f"rank {1 - BAD_RANK}," not in messages[0]


def test_a_signal_to_one_rank_stops_all_after_the_same_step(found):
    assert [rank["stopped"][0] for rank in found[1]] == [("asked to stop at iteration 2", [2], False)] * 2


def test_a_signal_to_one_rank_ends_the_validation_of_all(found):
    assert [rank["stopped"][1] for rank in found[1]] == [("asked to stop at iteration 3", [3], True)] * 2


def test_a_run_file_that_cannot_be_written_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"run.yaml cannot be written \(.*\): .* another --save folder"):
        training_run._write_run_file(tmp_path / "gone" / "run.yaml", "lr: 1\n")
