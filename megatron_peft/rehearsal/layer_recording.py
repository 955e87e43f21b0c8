"""Records the segments of a model on tensors without numbers: its ends and one layer of each kind (`LayersToRecord`).

The training code runs a microbatch through a model of a few layers, without a pipeline, after the forward of another;
its forward and backward are cut where layers begin and end. Stages of any pipeline are put together from what is
recorded (`plan/recorded_layers.py`).
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor, nn

from megatron_peft.adapters.attach import linear_layers
from megatron_peft.adapters.step import adapters_step
from megatron_peft.models.kernels import fusions_on_a_gpu
from megatron_peft.parallel.layout import PARTIAL_OVER_TENSOR_PARALLEL
from megatron_peft.rehearsal.program import ENDS, Computation, Parameters, RecordedLayers, RecordedPass, Segment
from megatron_peft.rehearsal.recorder import Recorder, group_names
from megatron_peft.rehearsal.rehearsed_rank import Watch, gradients, microbatch_of
from megatron_peft.rehearsal.requests import LayersToRecord
from megatron_peft.runtime.fake_ranks import fake_rank
from megatron_peft.runtime.launch import model_parallel
from megatron_peft.training.run import build_chunks
from megatron_peft.training.state import wrap_data_parallel
from megatron_peft.training.step import finish_with, run_schedule

Place = tuple[str, Segment]  # "forward", "backward", "begin" or "finish"; and of what


@dataclass
class _Cuts(Watch):
    """A watch that cuts what it sees into passes: of those of one place the last one counts."""

    passes: dict[Place, RecordedPass] = field(default_factory=dict)
    place: Place | None = None
    since: int = 0  # what the recorder had when the place began, and the memory held
    bytes_before: int = 0
    bytes_of_microbatches: list[int] = field(default_factory=list)  # at their begin

    def cut(self, phase: str | None, segment: Segment = "") -> None:
        """What follows belongs to this place, or to none."""
        if self.place is not None:
            left, peak = self.memory.total - self.bytes_before, self.memory.highest - self.bytes_before
            self.passes[self.place] = RecordedPass(self.recorder.entries(self.since), left, peak)
        self.place = (phase, segment) if phase else None
        self.memory.start_peak()
        self.since, self.bytes_before = self.recorder.place, self.memory.total

    def mark(self, phase: Any, microbatch: int | None = None, chunk: int = 0) -> None:
        """Cut where megatron-core's schedule begins a microbatch, which is at an end of the model."""
        self.memory.phase = phase
        if phase == "forward":
            self.bytes_of_microbatches.append(self.memory.total)
        self.cut(phase, {"forward": "embedding", "backward": "head"}[phase]) if phase != "schedule" else self.cut(None)

    def watch_layers(self, model: Any, layers: Sequence[Segment]) -> None:
        """Cut where a layer or the final norm begins, and in backward where the gradient of its input is there."""

        def hook(segment: Segment, before: Segment) -> Callable[..., None]:
            def begin(module: nn.Module, args: Any, kwargs: Any) -> None:
                if self.place is None or self.place[0] != "forward":  # recomputed
                    return
                self.cut("forward", segment)
                x: Tensor = kwargs.get("hidden_states", args[0] if args else None)
                if x.grad_fn is not None:
                    x.register_hook(lambda _: self.cut("backward", before))

            return begin

        modules = [*model.decoder.layers, model.decoder.final_layernorm]
        for module, segment, before in zip(modules, (*layers, "head"), ("embedding", *layers), strict=True):
            module.register_forward_pre_hook(hook(segment, before), with_kwargs=True)


def recorded_layers(of: LayersToRecord) -> RecordedLayers:
    """Record them. Its process can be used for others afterwards, and for nothing else."""
    tp = of.run.parallel.tensor_model_parallel_size
    with fake_rank(0, tp), model_parallel(of.run.parallel, of.run.training.seed):
        fuses = {**fusions_on_a_gpu(of.run, of.shape), **of.fuses}
        cuts = _Cuts(Recorder(group_names(), fuses_sums=fuses["gradient_accumulation_fusion"]), fuses)
        [model] = build_chunks(of.run, of.shape, loads=False)
        wrapped = wrap_data_parallel([model], of.run)
        microbatches = [microbatch_of(of.lengths) for _ in range(2)]
        cuts.watch_layers(model, of.layers)
        given = [value for one in microbatches for value in vars(one).values() if isinstance(value, Tensor)]
        cuts.memory.assign("given", (*model.parameters(), *model.buffers(), *gradients(wrapped), *given))
        with cuts():
            cuts.cut("begin")
            with adapters_step(wrapped) as step:

                def finish(chunks: Sequence[nn.Module], *_: Any, **__: Any) -> None:
                    cuts.cut("finish")
                    step.finish(chunks)
                    cuts.cut(None)

                cuts.cut(None)
                finish_with(wrapped, finish)
                before = cuts.memory.total
                # The first one makes what all microbatches share. Layers that are recomputed leave nothing of the
                # rotary embedding to the next one, which only a backward shows.
                if of.run.model.transformer.get("recompute_granularity") != "full":
                    run_schedule(wrapped, [microbatches.pop(0)], forward_only=True)
                run_schedule(wrapped, microbatches, forward_only=False)
            # For the last layer alone: what is built for all together takes as many kernels.
            last = [model.decoder.layers[-1]]
            cuts.cut("begin", "one layer")
            with adapters_step(last) as step_of_one:
                cuts.cut("finish", "one layer")
                step_of_one.finish(last)
                cuts.cut(None)
        parameters = _parameters_of_segments(model, of)
    cached = cuts.bytes_of_microbatches[-1] - before + sum(one.nbytes for one in _shared(model))
    return RecordedLayers(cuts.passes, parameters, _fixed_kernels(cuts.passes, parameters), cached)


def _fixed_kernels(passes: Mapping[Place, RecordedPass], parameters: Mapping[Segment, Parameters]) -> dict[str, float]:
    """`RecordedLayers.fixed_kernels`, from those of all layers and of the last: others grow with what is trained."""
    trained = [one.num_trained for segment, one in parameters.items() if segment not in ENDS]
    share = trained[-1] / max(sum(trained), 1)
    found: dict[str, float] = {}
    for phase in ("begin", "finish"):
        of_all, of_one = (
            sum(entry.num_kernels for entry in passes[phase, layers].entries if isinstance(entry, Computation))
            for layers in ("", "one layer")
        )
        found[phase] = (of_one / of_all - share) / (1 - share) if of_all else 0.0
    return found


def _parameters_of_segments(model: Any, of: LayersToRecord) -> dict[Segment, Parameters]:
    """What layers share is left out; a tied output layer is the embedding's."""
    found: dict[Segment, Parameters] = {}
    seen = {id(one) for one in _shared(model)}
    modules = model.embedding, *model.decoder.layers, model
    for module, segment in zip(modules, ("embedding", *of.layers, "head"), strict=True):
        tensors = [one for one in (*module.parameters(), *module.buffers()) if id(one) not in seen]
        seen |= {*map(id, tensors)}
        mixed = 0 if segment in ENDS else sum(hasattr(one.module.adapter, "mix") for one in linear_layers(module))
        found[segment] = _parameters(tensors, of.run.model.bf16, mixed)
    return found


def _shared(model: Any) -> list[Tensor]:
    """Tensors of more than one layer: a stage has them once (`adapters/attach.py`)."""
    buffers = [buffer for layer in model.decoder.layers for buffer in layer.buffers()]
    counts = Counter(map(id, buffers))
    return [one for one in {id(one): one for one in buffers}.values() if counts[id(one)] > 1]


def _parameters(tensors: Sequence[Tensor], in_bf16: bool, num_mixed: int) -> Parameters:
    weights = [one for one in tensors if isinstance(one, nn.Parameter)]
    trained = [one for one in weights if one.requires_grad]
    in_float32 = sum(one.numel() for one in trained if in_bf16 and one.dtype == torch.float32)
    is_split = parallel_state.get_tensor_model_parallel_world_size() > 1
    weight_bytes = sum(one.nbytes for one in weights)
    return Parameters(
        weight_bytes,
        buffer_bytes=sum(one.nbytes for one in tensors) - weight_bytes,
        trained=sum(one.numel() for one in trained) - in_float32,
        trained_float32=in_float32,
        partial=sum(one.numel() for one in trained if is_split and getattr(one, PARTIAL_OVER_TENSOR_PARALLEL, False)),
        num_tensors=len(trained),
        largest=max((one.numel() for one in trained), default=0),
        num_mixed=num_mixed,
    )
