"""What runs in the process of a rehearsed rank: the training code, with a recorder of calls, products and memory."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from megatron_peft.checkpoint import folders, save, tensors
from megatron_peft.checkpoint.tensors import PlannedFiles, Written, sharded_parameters
from megatron_peft.data.batches import Microbatch
from megatron_peft.models import layers
from megatron_peft.models.kernels import fusions_on_a_gpu
from megatron_peft.models.shape import ModelShape
from megatron_peft.parallel.collectives import from_first_rank
from megatron_peft.rehearsal.program import Memory, RankRecord
from megatron_peft.rehearsal.recorder import LiveMemory, Recorder, group_names
from megatron_peft.rehearsal.requests import Lengths, RankToRehearse
from megatron_peft.runtime.fake_ranks import (
    fake_rank,
    replaced,
    watched_batches,
    watched_kernels,
    watched_schedule,
    watched_storages,
)
from megatron_peft.runtime.launch import start_model_parallel, stop_model_parallel
from megatron_peft.training import step
from megatron_peft.training.run import build_chunks, start_lora_ga
from megatron_peft.training.state import TrainingState, start_state
from megatron_peft.training.step import train_step
from megatron_peft.training.terminal import numbers_of_parameters
from megatron_peft.training.update import mixtures
from megatron_peft.training.validation import (
    largest_orthogonality_error,
    layers_without_gradient,
    start_losses,
    validation_loss,
    whole_parameters,
)


@dataclass
class Watch:
    """What is seen of a rank: `recorder`'s entries, and `memory` with the peaks of the phases that have ended.

    What `fuses` (`kernels.fusions`) says is one kernel on a GPU counts as one.
    """

    recorder: Recorder
    fuses: Mapping[str, bool] = field(default_factory=dict)
    memory: LiveMemory = field(default_factory=LiveMemory)
    peaks: dict[str, Memory] = field(default_factory=dict)

    @contextmanager
    def __call__(self) -> Iterator["Watch"]:
        """Watch what this process does meanwhile."""
        with ExitStack() as stack:
            stack.enter_context(watched_schedule(self.mark, ended=self.recorder.forget_sends))
            stack.enter_context(watched_batches(self.recorder.batch))
            if self.recorder.keeps_work:
                stack.enter_context(register_module_forward_pre_hook(self.memory.begin_call))
                stack.enter_context(register_module_forward_hook(self.memory.end_call, always_call=True))
                stack.enter_context(watched_storages(self.memory.resized))
                stack.enter_context(watched_kernels(self.recorder.one_kernel))
                stack.enter_context(fused_kernels(self.recorder.one_kernel, self.fuses))
                stack.enter_context(self.memory)
            stack.enter_context(self.recorder)
            yield self

    def mark(self, phase: Any, microbatch: int | None = None, chunk: int = 0) -> None:
        """What follows belongs to this phase of a step."""
        self.memory.phase = phase
        self.recorder.mark(phase, microbatch, chunk)

    @contextmanager
    def phase(self, name: Any) -> Iterator[None]:
        """Look for the peak of this phase."""
        self.memory.start_peak()
        if not self.recorder.keeps_work:
            self.recorder.mark(name)
        yield
        self.peaks[name] = self.memory.peak()
        self.recorder.forget_sends()


@contextmanager
def fused_kernels(one_kernel: Callable[..., Any], fuses: Mapping[str, bool]) -> Iterator[None]:
    """As `watched_kernels`, of the rotary embedding and SwiGLU where `fuses` has them."""
    rotate, swiglu, swiglu_backward = layers._rotate, layers._SwiGLU.forward, layers._SwiGLU.backward

    def rotate_back(grad: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return (grad * cos).add_((grad * sin).roll(grad.shape[-1] // 2, -1))

    class Rotation(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *args):  # type: ignore[override]
            ctx.save_for_backward(*args[1:])
            return one_kernel(rotate, args)

        @staticmethod
        def backward(ctx, grad):  # type: ignore[override]
            return one_kernel(rotate_back, (grad, *ctx.saved_tensors)), None, None

    of_swiglu: dict[str, Callable[..., Any]] = {
        "forward": lambda ctx, x: one_kernel(partial(swiglu, ctx), (x,)),
        "backward": lambda ctx, grad: one_kernel(lambda g, _: swiglu_backward(ctx, g), (grad, *ctx.saved_tensors)),
    }
    with ExitStack() as stack:
        if fuses.get("apply_rope_fusion"):
            stack.enter_context(replaced(layers, "_rotate", Rotation.apply))
        for name, function in of_swiglu.items() if fuses.get("bias_activation_fusion") else ():
            stack.enter_context(replaced(layers._SwiGLU, name, staticmethod(function)))
        yield


def rehearse_rank(of: RankToRehearse) -> RankRecord:
    """Run one rank. Its process can be used for others afterwards, and for nothing else."""
    # Transformer Engine needs a GPU.
    config = replace(of.config, model=replace(of.config.model, transformer_impl="local"))
    of = replace(of, config=config)

    with fake_rank(of.rank, config.parallel.world_size, lambda value: of_all_stages(value, of.shape)):
        num_stages = config.parallel.num_virtual_stages(of.shape.num_layers)
        start_model_parallel(config.parallel, config.training.seed, num_stages)
        fuses = fusions_on_a_gpu(config, of.shape)
        recorder = Recorder(group_names(), not of.calls_alone, fuses["gradient_accumulation_fusion"])
        watch = Watch(recorder, fuses)
        steps = of.lengths * of.num_microbatches if len(of.lengths) == 1 else of.lengths
        with watch():
            waiting = [microbatch_of(of.lengths[-1]) for _ in range(of.num_waiting)]
            record = watch_run(watch, of, [microbatch_of(one) for one in steps])
            del waiting  # which the device held until here
        stop_model_parallel()
        return record


def of_all_stages(value: Any, shape: ModelShape) -> Any:
    """What the ranks of all stages give, from what this one gives to a gather.

    Layers of the other stages have the names of ours, with other numbers: `attach.all_names` gathers a set of them. A
    stage without trained parameters gives megatron-core's optimizer an empty list of groups, the others give at least
    the usual one.
    """
    if isinstance(value, set):
        ends = {name.split(".", 3)[3] for name in value} or {*shape.linear_layers(1)}
        return {f"decoder.layers.{number}.{end}" for number in range(shape.num_layers) for end in ends}
    return value if value != [] else [(None, False)]


def watch_run(watch: Watch, of: RankToRehearse, microbatches: Sequence[Microbatch], loads: bool = False) -> RankRecord:
    """Build, start and train a rank's part of the model, on fake ranks or on real ones.

    Where calls alone are recorded, they are those of all phases, with what a run's loop adds: a log line, the best
    validation, a checkpoint; not those of timers and stragglers.

    Args:
        loads: read the base's weights, which needs numbers.
        microbatches: of the recorded step. One step, on as few of them as the schedule takes, comes before it:
            the optimizer makes its moments in the first.
    """
    config, memory = of.config, watch.memory
    shortest = microbatches[: config.parallel.pipeline_model_parallel_size if config.parallel.is_interleaved else 1]
    memory.start_peak()
    chunks = build_chunks(config, of.shape, loads)
    memory.name_modules(chunks)
    memory.assign("weights", _parameters(chunks))
    memory.assign("buffers", (buffer for chunk in chunks for buffer in chunk.buffers()))
    watch.peaks["loading"] = memory.peak(assigned_since=True)
    if config.peft.spec.starts_from_gradients and "start" in of.phases:
        with watch.phase("start"):
            start_lora_ga(chunks, config, [list(microbatches)])
    state = start_state(chunks, config, of.shape, train_iters=1000)
    memory.assign("weights", _parameters(chunks))  # the distributed optimizer has moved them to its buffers
    memory.assign("gradients", gradients(state.model_chunks))
    memory.assign("optimizer", moments_of(state))
    if of.calls_alone and config.peft.trains_adapters:
        with watch.phase("start"):
            start_losses(state, list(microbatches))
    with watch.phase("step"):
        train_step(state, shortest)
    memory.assign("optimizer", moments_of(state))
    since = watch.recorder.place
    watch.mark("begin")
    usual = step.finish_gradients

    def finish(*args: Any, **kwargs: Any) -> None:
        watch.mark("finish")
        usual(*args, **kwargs)
        watch.mark("update")

    with watch.phase("step"), replaced(step, "finish_gradients", finish):
        if of.calls_alone:
            layers_without_gradient(state)
        train_step(state, list(microbatches), by_layer=of.calls_alone)
        if of.calls_alone:
            mixtures(state)  # of a log line
    entries = watch.recorder.entries(since)
    memory.phase = None
    if "validation" in of.phases:
        with watch.phase("validation"):
            validation_loss(state.model_chunks, [list(shortest)])
            if of.calls_alone:
                from_first_rank(lambda: state.best.after(1.0, 1))
                with whole_parameters(state.model_chunks):
                    largest_orthogonality_error(state)
    if "saving" in of.phases:
        with watch.phase("saving"):
            if of.calls_alone:
                _save(state)
            else:
                modules = [chunk.module for chunk in state.model_chunks]
                save.tensors_to_save(state, sharded_parameters(modules, config.peft.trains_adapters))
    if of.calls_alone:
        entries = watch.recorder.entries()
    return RankRecord(of.rank, of.stage, len(microbatches), entries, numbers_of_parameters(chunks), watch.peaks)


def _save(state: TrainingState) -> None:
    """The collectives of a checkpoint of a run, which is not written."""
    with (
        whole_parameters(state.model_chunks),
        replaced(folders, "start_draft", lambda *_: Path()),
        replaced(save, "base_fingerprint", lambda _: None),
        replaced(tensors, "mcore_to_pyt_state_dict", lambda own: own),
        replaced(PlannedFiles, "write", lambda _: Written([], {})),
        replaced(save.DraftedCheckpoint, "_publish", lambda *_: None),
    ):
        save.draft_checkpoint(state).complete()


def microbatch_of(lengths: Lengths) -> Microbatch:
    """A microbatch of these sizes, without numbers."""
    size = lengths.rows, lengths.positions
    ids = torch.zeros(size, dtype=torch.int64)
    packed = lengths.packed
    return Microbatch(
        tokens=ids,
        labels=torch.zeros_like(ids),
        loss_mask=torch.ones(size),
        position_ids=torch.zeros_like(ids),
        num_samples=lengths.rows,
        cu_seqlens=torch.zeros(len(packed) + 1, dtype=torch.int32) if packed else None,
        lengths=packed or None,
    )


def _parameters(chunks: Sequence[nn.Module]) -> Iterator[nn.Parameter]:
    return (parameter for chunk in chunks for parameter in chunk.parameters())


def gradients(chunks: Iterable[Any]) -> Iterator[Tensor]:
    """The buffers of gradients: megatron-core's `buffers`, not nn.Module's method."""
    return (buffer.grad_data for chunk in chunks for buffer in chunk.buffers)


def moments_of(state: TrainingState) -> Iterator[Tensor]:
    """Moments, and the float32 copies of parameters."""
    for part in getattr(state.optimizer, "chained_optimizers", [state.optimizer]):
        if getattr(part, "is_stub_optimizer", False):
            continue
        optimizer: Any = part.optimizer
        weights = {parameter for chunk in state.model_chunks for parameter in chunk.parameters()}
        copies = (one for group in optimizer.param_groups for one in group["params"] if one not in weights)
        moments = (one for moments in optimizer.state.values() for one in moments.values() if isinstance(one, Tensor))
        yield from (*copies, *moments)
