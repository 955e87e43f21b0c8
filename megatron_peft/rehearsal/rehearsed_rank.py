"""What runs in the process of a rehearsed rank: the training code, with a recorder of calls, products and memory."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor, nn
from torch.distributed.checkpoint import SavePlan
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from megatron_peft.adapters.attach import linear_layers
from megatron_peft.adapters.quantized_weight import stored_tensors
from megatron_peft.adapters.step import adapters_step
from megatron_peft.checkpoint import folders, save, tensors
from megatron_peft.checkpoint.state import TrainingState
from megatron_peft.data.batches import Microbatch
from megatron_peft.models import layers
from megatron_peft.models.kernels import fusions_on_a_gpu
from megatron_peft.models.loss import ChunkedLossModel
from megatron_peft.models.shape import ModelShape
from megatron_peft.parallel.collectives import from_first_rank
from megatron_peft.parallel.layout import PARTIAL_OVER_TENSOR_PARALLEL
from megatron_peft.rehearsal import program
from megatron_peft.rehearsal.program import Parameters, RankRecord, RecordedLayers, RecordedPass, Segment
from megatron_peft.rehearsal.recorder import Recorder
from megatron_peft.rehearsal.requests import LayersToRecord, Lengths, RankToRehearse
from megatron_peft.runtime import fake_ranks
from megatron_peft.runtime.fake_ranks import fake_rank, replaced
from megatron_peft.runtime.launch import model_parallel
from megatron_peft.training import step, update
from megatron_peft.training.run import build_chunks, start_lora_ga
from megatron_peft.training.terminal import numbers_of_parameters


class Watch(Recorder):
    """A recorder that is told what no operation tells, with the peaks of memory in the phases that have ended.

    What `fuses` (`kernels.fusions`) says is one kernel on a GPU counts as one.
    """

    def __init__(self, fuses: Mapping[str, bool], keeps_work: bool = True) -> None:
        super().__init__(keeps_work, fuses.get("gradient_accumulation_fusion", False))
        self.fuses, self.peaks = fuses, dict[str, program.Memory]()

    @contextmanager
    def watching(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(fake_ranks.watched_schedule(self.mark, ended=self.forget_sends))
            stack.enter_context(fake_ranks.watched_batches(self.batch))
            chunk = self.once_a_shape(ChunkedLossModel._loss_of_chunk)
            stack.enter_context(replaced(ChunkedLossModel, "_loss_of_chunk", chunk))
            if self.keeps_work:
                stack.enter_context(register_module_forward_pre_hook(self.memory.begin_call))
                stack.enter_context(register_module_forward_hook(self.memory.end_call, always_call=True))
                stack.enter_context(fake_ranks.watched_storages(self.memory.resized))
                stack.enter_context(fake_ranks.watched_kernels(self.one_kernel))
                stack.enter_context(fused_kernels(self.one_kernel, self.fuses))
            stack.enter_context(self)
            yield

    @contextmanager
    def phase(self, name: Any) -> Iterator[None]:
        """Look for the peak of this phase."""
        self.memory.start_peak()
        if not self.keeps_work:
            self.mark(name)
        yield
        self.peaks[name] = self.memory.peak()
        self.forget_sends()


@contextmanager
def fused_kernels(one_kernel: Callable[..., Any], fuses: Mapping[str, bool]) -> Iterator[None]:
    """What `fake_ranks.watched_kernels` does, for the rotary embedding and SwiGLU where `fuses` has them."""
    rotate, swiglu, swiglu_backward = layers._rotate, layers._SwiGLU.forward, layers._SwiGLU.backward

    def of_saved(ctx: Any, grad: Tensor) -> Tensor:
        return one_kernel(lambda grad, _: swiglu_backward(ctx, grad), (grad, *ctx.saved_tensors))

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

    with ExitStack() as stack:
        if fuses.get("apply_rope_fusion"):
            stack.enter_context(replaced(layers, "_rotate", Rotation.apply))
        if fuses.get("bias_activation_fusion"):
            stack.enter_context(replaced(layers._SwiGLU, "forward", lambda *args: one_kernel(swiglu, args)))
            stack.enter_context(replaced(layers._SwiGLU, "backward", of_saved))
        yield


def rehearse_rank(of: RankToRehearse) -> RankRecord:
    """Run one rank. Its process can be used for others afterwards, and for nothing else."""
    # Transformer Engine needs a GPU.
    config = replace(of.config, model=replace(of.config.model, transformer_impl="local"))
    of, parallel = replace(of, config=config), config.parallel
    num_stages = parallel.num_virtual_stages(of.shape.num_layers)
    with (
        fake_rank(of.rank, parallel.world_size, lambda value: of_all_stages(value, of.shape)),
        model_parallel(parallel, config.training.seed, num_stages),
    ):
        watch = Watch(fusions_on_a_gpu(config, of.shape), not of.calls_alone)
        with watch.watching():
            waiting = [microbatch_of(of.lengths) for _ in range(of.num_waiting)]
            record = watch_run(watch, of, [microbatch_of(of.lengths) for _ in range(of.num_microbatches)])
            del waiting  # which the device held until here
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
    """Build, start and train a rank's part of the model, on fake ranks or on real ones, which read (`loads`) weights.

    One step, on as few of the microbatches as the schedule takes, comes before the recorded one: the optimizer makes
    its moments in the first. Where calls alone are recorded, they are those of all phases, with what a run's loop adds:
    a log line, the best validation, a checkpoint; not those of timers and stragglers.
    """
    config, memory = of.config, watch.memory
    shortest = microbatches[: config.parallel.pipeline_model_parallel_size if config.parallel.is_interleaved else 1]
    memory.start_peak()
    chunks = build_chunks(config, of.shape, loads)
    memory.name_modules(chunks)
    parameters = [
        tensor for chunk in chunks for parameter in chunk.parameters() for tensor in stored_tensors(parameter)
    ]
    memory.assign("buffers", (buffer for chunk in chunks for buffer in chunk.buffers()))
    memory.assign("weights", parameters)  # a quantized one is stored in buffers
    watch.peaks["loading"] = memory.peak(assigned_since=True)
    if config.peft.spec.starts_from_gradients and of.all_phases:
        with watch.phase("start"):
            start_lora_ga(chunks, config, [list(microbatches)])
    state = update.start_state(chunks, config, of.shape, train_iters=1000)
    memory.assign("weights", parameters)  # the distributed optimizer has moved them to its buffers
    memory.assign("gradients", gradients(state.model_chunks))
    memory.assign("optimizer", moments_of(state))
    if of.calls_alone and config.peft.trains_adapters:
        with watch.phase("start"):
            step.start_losses(state, list(microbatches))
    with watch.phase("step"):
        step.train_step(state, shortest)
    memory.assign("optimizer", moments_of(state))
    since = watch.place
    watch.mark("begin")
    usual = step.finish_gradients

    def finish(*args: Any, **kwargs: Any) -> None:
        watch.mark("finish")
        usual(*args, **kwargs)
        watch.mark("update")

    with watch.phase("step"), replaced(step, "finish_gradients", finish):
        if of.calls_alone:
            step.layers_without_gradient(state)
        step.train_step(state, list(microbatches), by_layer=of.calls_alone)
        if of.calls_alone:
            update.mixtures(state)  # of a log line
    entries = watch.entries(since)
    memory.phase = None
    if of.all_phases:
        with watch.phase("validation"):
            step.validation_loss(state.model_chunks, [list(shortest)])
            if of.calls_alone:
                from_first_rank(lambda: state.best.after(1.0, 1))
                with step.whole_parameters(state.model_chunks):
                    step.largest_orthogonality_error(state)
        with watch.phase("saving"):
            if of.calls_alone:
                _save(state)
            else:
                save.tensors_to_save(state, state.entries)
    if of.calls_alone:
        entries = watch.entries()
    return RankRecord(of.rank, of.stage, len(microbatches), entries, numbers_of_parameters(chunks), watch.peaks)


def _save(state: TrainingState) -> None:
    """The collectives of a checkpoint of a run, which is not written."""
    with (
        step.whole_parameters(state.model_chunks),
        replaced(folders, "start_draft", lambda *_: Path()),
        replaced(save, "base_fingerprint", lambda _: None),
        replaced(tensors.RankFiles, "write", lambda _: tensors.Written(SavePlan([]), [], {})),
        replaced(save.DraftedCheckpoint, "_publish", lambda *_: None),
    ):
        save.draft_checkpoint(state).complete()


def microbatch_of(lengths: Lengths) -> Microbatch:
    """A microbatch of these sizes, without numbers."""
    size, packed = (lengths.rows, lengths.positions), lengths.packed
    ids = torch.zeros(size, dtype=torch.int64)
    return Microbatch(
        tokens=ids,
        labels=torch.zeros_like(ids),
        loss_mask=torch.ones(size),
        position_ids=torch.zeros_like(ids),
        num_samples=lengths.rows,
        cu_seqlens=torch.zeros(len(packed) + 1, dtype=torch.int32) if packed else None,
        lengths=packed or None,
    )


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
        copies = (copy for group in optimizer.param_groups for copy in group["params"] if copy not in weights)
        moments = (m for moments in optimizer.state.values() for m in moments.values() if isinstance(m, Tensor))
        yield from (*copies, *moments)


# The segments of a model, on tensors without numbers: its ends and one layer of each kind (`LayersToRecord`). A
# microbatch runs through a model of a few layers, without a pipeline, after the forward of another; its forward and
# backward are cut where layers begin and end. Stages of any pipeline are put together from what is recorded.

Place = tuple[str, Segment]  # "forward", "backward", "begin" or "finish"; and of what


class _Cuts(Watch):
    """A watch that cuts what it sees into passes: of those of one place the last one counts."""

    def __init__(self, fuses: Mapping[str, bool]) -> None:
        super().__init__(fuses)
        self.passes: dict[Place, RecordedPass] = {}
        self.now: Place | None = None
        self.since = self.bytes_before = 0  # what was recorded when it began, and what the memory held
        self.bytes_of_microbatches: list[int] = []  # at their begin

    def cut(self, phase: str | None, segment: Segment = "") -> None:
        """What follows belongs to this place, or to none."""
        if self.now is not None:
            left, peak = self.memory.total - self.bytes_before, self.memory.highest - self.bytes_before
            self.passes[self.now] = RecordedPass(self.entries(self.since), left, peak)
        self.now = (phase, segment) if phase else None
        self.memory.start_peak()
        self.since, self.bytes_before = self.place, self.memory.total

    def mark(self, phase: Any, microbatch: int | None = None, chunk: int = 0) -> None:
        """Cut where megatron-core's schedule begins a microbatch, which is at an end of the model."""
        self.memory.phase = phase
        if phase == "forward":
            self.bytes_of_microbatches.append(self.memory.total)
        self.cut(phase, {"forward": "embedding", "backward": "head"}[phase]) if phase != "schedule" else self.cut(None)

    def watch_layers(self, model: Any, names: Sequence[Segment]) -> None:
        """Cut where a layer or the final norm begins, and in backward where the gradient of its input is there."""

        def hook(segment: Segment, before: Segment) -> Callable[..., None]:
            def begin(module: nn.Module, args: Any, kwargs: Any) -> None:
                if self.now is None or self.now[0] != "forward":  # recomputed
                    return
                self.cut("forward", segment)
                x: Tensor = kwargs.get("hidden_states", args[0] if args else None)
                if x.grad_fn is not None:
                    x.register_hook(lambda _: self.cut("backward", before))

            return begin

        modules = [*model.decoder.layers, model.decoder.final_layernorm]
        for module, segment, before in zip(modules, (*names, "head"), ("embedding", *names), strict=True):
            module.register_forward_pre_hook(hook(segment, before), with_kwargs=True)


def recorded_layers(of: LayersToRecord) -> RecordedLayers:
    """Record them. Its process can be used for others afterwards, and for nothing else."""
    tp = of.run.parallel.tensor_model_parallel_size
    with fake_rank(0, tp), model_parallel(of.run.parallel, of.run.training.seed):
        cuts = _Cuts({**fusions_on_a_gpu(of.run, of.shape), **of.fuses})
        [model] = build_chunks(of.run, of.shape, loads=False)
        wrapped = update.wrap_data_parallel([model], of.run)
        microbatches = [microbatch_of(of.lengths) for _ in range(2)]
        cuts.watch_layers(model, of.layers)
        given = [  # held to the end: what the first microbatch gave back would be missing in what it leaves
            value for microbatch in microbatches for value in vars(microbatch).values() if isinstance(value, Tensor)
        ]
        cuts.memory.assign("given", (*model.parameters(), *model.buffers(), *gradients(wrapped), *given))
        with cuts.watching():
            cuts.cut("begin")
            with adapters_step(wrapped) as own_step:

                def finish(chunks: Sequence[nn.Module], *_: Any, **__: Any) -> None:
                    cuts.cut("finish")
                    own_step.finish(chunks)
                    cuts.cut(None)

                cuts.cut(None)
                step.finish_with(wrapped, finish)
                before = cuts.memory.total
                # The first one makes what all microbatches share. Layers that are recomputed leave nothing of the
                # rotary embedding to the next one, which only a backward shows.
                if of.run.model.transformer.get("recompute_granularity") != "full":
                    step.run_schedule(wrapped, [microbatches.pop(0)], forward_only=True)
                step.run_schedule(wrapped, microbatches, forward_only=False)
            # For the last layer alone: what is built for all together takes as many kernels.
            last = [model.decoder.layers[-1]]
            cuts.cut("begin", "one layer")
            with adapters_step(last) as step_of_one:
                cuts.cut("finish", "one layer")
                step_of_one.finish(last)
                cuts.cut(None)
        parameters = _parameters_of_segments(model, of)
    cached = cuts.bytes_of_microbatches[-1] - before + sum(tensor.nbytes for tensor in _shared(model))
    return RecordedLayers(cuts.passes, parameters, _fixed_kernels(cuts.passes, parameters), cached)


def _fixed_kernels(
    passes: Mapping[tuple[str, Segment], RecordedPass], parameters: Mapping[Segment, Parameters]
) -> dict[str, float]:
    """`RecordedLayers.fixed_kernels`, from those of all layers and of the last: others grow with what is trained."""
    trained = [numbers.num_trained for segment, numbers in parameters.items() if segment not in program.ENDS]
    share = trained[-1] / max(sum(trained), 1)
    shares: dict[str, float] = {}
    for phase in ("begin", "finish"):
        of_all, of_one = (
            sum(entry.num_kernels for entry in passes[phase, layers].entries if isinstance(entry, program.Computation))
            for layers in ("", "one layer")
        )
        shares[phase] = (of_one / of_all - share) / (1 - share) if of_all else 0.0
    return shares


def _parameters_of_segments(model: Any, of: LayersToRecord) -> dict[Segment, Parameters]:
    """What layers share is left out; a tied output layer is the embedding's."""
    by_segment: dict[Segment, Parameters] = {}
    seen = {id(tensor) for tensor in _shared(model)}
    is_split = parallel_state.get_tensor_model_parallel_world_size() > 1
    modules = model.embedding, *model.decoder.layers, model
    for module, segment in zip(modules, ("embedding", *of.layers, "head"), strict=True):
        held = [tensor for tensor in (*module.parameters(), *module.buffers()) if id(tensor) not in seen]
        seen |= {*map(id, held)}
        weights = [tensor for tensor in held if isinstance(tensor, nn.Parameter)]
        trained = [tensor for tensor in weights if tensor.requires_grad]
        in_float32 = sum(tensor.numel() for tensor in trained if of.run.model.bf16 and tensor.dtype == torch.float32)
        summed = (
            tensor.numel() for tensor in trained if is_split and getattr(tensor, PARTIAL_OVER_TENSOR_PARALLEL, False)
        )
        adapted = () if segment in program.ENDS else linear_layers(module)
        stored = {id(tensor): tensor.nbytes for weight in weights for tensor in stored_tensors(weight)}
        buffers = (tensor for tensor in held if not isinstance(tensor, nn.Parameter) and id(tensor) not in stored)
        by_segment[segment] = Parameters(
            sum(stored.values()),
            buffer_bytes=sum(tensor.nbytes for tensor in buffers),
            trained=sum(tensor.numel() for tensor in trained) - in_float32,
            trained_float32=in_float32,
            partial=sum(summed),
            num_tensors=len(trained),
            largest=max((tensor.numel() for tensor in trained), default=0),
            num_mixed=sum(hasattr(layer.module.adapter, "mix") for layer in adapted),
        )
    return by_segment


def _shared(model: Any) -> list[Tensor]:
    """Tensors of more than one layer: a stage has them once (`adapters/attach.py`)."""
    buffers = [buffer for layer in model.decoder.layers for buffer in layer.buffers()]
    counts = Counter(map(id, buffers))
    return [buffer for buffer in {id(buffer): buffer for buffer in buffers}.values() if counts[id(buffer)] > 1]
