"""The host never waits for the device within forward, backward and gradient sums, and twice in a whole step.

On two gloo ranks modes see each read of a number and each blocking copy from the host.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.optimizer import optimizer
from torch import Tensor, nn

from megatron_peft.checkpoint.state import TrainingState
from megatron_peft.data.batches import Microbatch
from megatron_peft.runtime.launch import start_world
from megatron_peft.training import run
from megatron_peft.training.step import finish_gradients, finish_with, run_schedule, train_step
from megatron_peft.training.update import CLIP_EPSILON
from tests.benchmarks.gpu_subjects import chosen_sizes, losses_of, state_of
from tests.benchmarks.gpu_subjects import microbatches as microbatches_of_llama
from tests.one_rank import one_rank
from tests.ranks import run_ranks
from tests.training.layout_runs import Job, built
from tests.training.test_layout import BOFT, LORA, PP2, RECOMPUTE, SP, TP2, URNN
from tests.training.test_short_runs import run_packs
from tests.training.waits import Waits

HYBRID: dict[str, Any] = {"method": "hybrid", "lora_rank": 4, "lora_ga_batches": 1}
METHODS: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "lora": LORA,
    "lora bounded": {**LORA, "lora_max_norm_ratio": 1e-3},
    "lora-ga": {**LORA, "method": "lora-ga", "lora_ga_init": "paper", "lora_ga_batches": 1},
    "boft": BOFT,
    "urnn": URNN,
    "hybrid": {**HYBRID, **BOFT, "method": "hybrid", "hybrid_lambda": "rms"},
    "boft input": {**BOFT, "rotation_side": "input"},
    "projection": {**BOFT, "boft_parametrization": "projection"},
    "riemannian": {**URNN, "urnn_update": "riemannian", "peft_lr_rotation": 0.1},
    "hybrid urnn": {**URNN, **HYBRID, "hybrid_rotation": "urnn", "hybrid_lambda": "descent"},
}
ON_DEVICE = " with the norm on the device"
WAITS_OF_A_STEP = 2  # for losses and what is finite, and for the norm of the gradients
FIXED = {"pad_to_seq_length": True}
PACKED = {"pack_sequences": True}
LAYOUTS: dict[str, dict[str, Any]] = {
    "TP2": {"parallel": TP2},
    "TP2+SP packed": {"parallel": SP, "data_settings": PACKED},
    "PP2": {"parallel": PP2, "data_settings": FIXED},
    "PP2 packed": {"parallel": PP2, "data_settings": FIXED | PACKED},
}
# Further ones on ranks.
WITH_FLAGS: dict[str, dict[str, Any]] = {
    "TP2 bf16 recomputed": {"parallel": TP2, "model": {"bf16": True}, "transformer": RECOMPUTE},
    "PP2 interleaved": {"parallel": {**PP2, "pipeline_model_parallel_layout": "E|t|t|L"}, "data_settings": FIXED},
    "DP2 distributed bf16": {"model": {"bf16": True}, "optimizer": {"use_distributed_optimizer": True}},
    "DP2 distributed overlapped": {
        "optimizer": {"use_distributed_optimizer": True},
        "training": {"micro_batch_size": 1, "global_batch_size": 4, "overlap_grad_reduce": True},
    },
}
SIZES: dict[str, Any] = {"num_steps": 1, "training": {"micro_batch_size": 2, "global_batch_size": 4}}


def _norm_on_device(grads: list[Tensor], norm_type: float = 2.0, grad_stats_parallel_group: Any = None) -> Tensor:
    total = torch.stack([torch.linalg.vector_norm(grad) for grad in grads]).square().sum().view(1)
    dist.all_reduce(total, group=grad_stats_parallel_group)
    return total.sqrt()


def _clip_on_device(parameters: list[nn.Parameter], max_norm: float, total_norm: Tensor, **_: Any) -> None:
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    torch._foreach_mul_(gradients, (max_norm / (total_norm + CLIP_EPSILON)).clamp_max(1.0)[0])


@contextmanager
def norms_on_device() -> Iterator[None]:
    """Compute the norm of the gradients and clip by it as megatron-core 0.19 does with Transformer Engine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimizer, "get_grad_norm_fp32", _norm_on_device)
        patch.setattr(optimizer, "clip_grad_by_total_norm_fp32", _clip_on_device)
        yield


def waits_of(given: list[Job]) -> dict[str, tuple[list[str], list[str], list[str]]]:
    """Of each job: reads in forward, backward and gradient sums; reads in the first whole step, and in the second."""
    start_world()
    found = {}
    for job in given:
        with built(job) as (state, data), norms_on_device() if ON_DEVICE in job.name else nullcontext():
            found[job.name] = waits_of_steps(state, data.train.step_at(0))
    return found


def waits_of_steps(state: TrainingState, step: list[Microbatch]) -> tuple[list[str], list[str], list[str]]:
    """In forward, backward and gradient sums; in a whole step; in another one."""
    finish_with(state.model_chunks, finish_gradients)
    with Waits() as in_sums:
        run_schedule(state.model_chunks, step, forward_only=False)
    with Waits() as in_first:
        train_step(state, step, by_layer=True)
    with Waits() as in_second:
        train_step(state, step, by_layer=True)
    return in_sums.found, in_first.found, in_second.found


def check_waits(files, cases, suffix: str = "") -> None:
    groups = {(method, layout): {**SIZES, **(LAYOUTS | WITH_FLAGS)[layout]} for method, layout in cases}
    jobs = [
        Job(" ".join(case) + suffix, *files, peft=METHODS[case[0]], **settings) for case, settings in groups.items()
    ]
    for by_name in run_ranks(2, waits_of, jobs):
        assert [*by_name] == [job.name for job in jobs]
        for name, (in_sums, in_first, in_second) in by_name.items():
            assert not in_sums, f"{name}: {in_sums}"
            # In the first, megatron-core 0.19 asks once for what its optimizer then remembers, and the Hybrid puts on
            # the device which layer a norm belongs to.
            once = "core/optimizer/optimizer.py", "adapters/hybrid.py"
            for reads in ([read for read in in_first if not any(place in read for place in once)], in_second):
                places = [read.rpartition("/")[2].partition(":")[0] for read in reads]
                norm = "update.py" if ON_DEVICE in name else "clip_grads.py"
                assert places == ["launch.py", norm], f"{name}: {reads}"


@pytest.mark.parametrize("suffix", [pytest.param("", id="norm on the host"), pytest.param(ON_DEVICE, id="on device")])
def test_a_step_waits_twice_for_the_device_after_the_sums(files, suffix):
    cases = [("riemannian", "TP2"), ("lora bounded", "TP2")] if suffix else []
    check_waits(files, [("hybrid", "TP2+SP packed"), ("lora", "PP2 packed"), *cases], suffix)


@pytest.mark.gpu("waits")
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["padded", *["packed"] * run_packs("auto", bf16=True)])
@pytest.mark.parametrize("method", chosen_sizes().methods)
def test_a_step_of_a_process_alone_waits_twice(llama, figure, method, kind):
    """In bf16, after two steps: libraries wait while they start."""
    with one_rank():
        state = state_of(llama, method, model={"bf16": True})
        losses_of(state, 2, kind == "packed")
        in_sums, _, in_step = waits_of_steps(state, microbatches_of_llama(kind == "packed"))
    figure(f"{method}, {kind}: waits in its microbatches", len(in_sums), 0, note=", ".join(in_sums))
    figure(f"{method}, {kind}: waits in a step", len(in_step), WAITS_OF_A_STEP, note=", ".join(in_step))


@pytest.mark.slow
def test_a_step_of_any_method_waits_twice_for_the_device_after_the_sums(files):
    check_waits(files, product(METHODS, LAYOUTS | WITH_FLAGS))


def test_the_mode_sees_what_waits():
    x = torch.arange(4.0)
    with Waits() as waits:
        x[1] = 2.0
        x[x > 2] = 0.0
        x.sum() + x.max()
    assert not waits.found
    with Waits() as waits:
        host = torch.tensor([1.0, 2.0, 3.0, 4.0])
        host.to(x.device, non_blocking=True), x.new_full((2,), 1.0), x.copy_(x + 1)
    assert not waits.found
    reads = [
        lambda: x.sum().item(), lambda: x.tolist(), lambda: bool(x[0] > 1), lambda: x.nonzero(), lambda: x[x > 1],
        lambda: x.numpy(), lambda: torch.linalg.inv(torch.eye(2)), lambda: float(x[0]),
        lambda: torch.tensor([1.0], device=x.device), lambda: torch.as_tensor([1.0], device=x.device),
        lambda: x.new_tensor([1.0, 2.0]), lambda: torch.tensor([1.0, 2.0]).to(x.device), lambda: x.copy_(host),
        lambda: torch.from_numpy(host.numpy()).to(x.device),
    ]  # fmt: skip
    for read in reads:
        with Waits() as waits:
            read()
        assert waits.found, read


@pytest.mark.parametrize(("layout", "notes"), [("PP2", 0), ("PP2 packed", 0), ("TP2", 0), ("PP2 unpadded", 1)])
def test_a_pipeline_of_unknown_lengths_says_so_once(files, capsys, monkeypatch, layout, notes):
    groups = {**LAYOUTS, "PP2 unpadded": {"parallel": PP2}}[layout]
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    run._note_unknown_lengths(Job("note", *files, **SIZES, **groups).config(2))
    assert capsys.readouterr().out.count("without --pad-to-seq-length pipeline stages tell one another") == notes
