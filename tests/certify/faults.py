"""Faults of the kind that programs like this one shipped: one line each, broken in all of a certificate's processes.

A fault that does nothing in one process shows against it. Those that do the same there show where another program
computes (transformers, Hugging Face PEFT), or not at all: they stand in NOT_SEEN.

Certificates are made in forks of one process that has imported everything, at a third of the cost of the command's own.
"""

import inspect
import multiprocessing
import pickle
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from types import CodeType
from typing import Any

from megatron_peft.config import CheckpointConfig, RunConfig
from megatron_peft.models.shape import ModelShape
from megatron_peft.runtime import ranks

RANK = "torch.distributed.get_rank()"
IMPORTED = ("megatron_peft.certify.certify", "transformers.models.llama.modeling_llama", "peft", "torch._dynamo")


@dataclass(frozen=True)
class Break:
    """`old` stands once in a module, in a function; `new` takes its place."""

    module: str
    old: str
    new: str

    def plant(self) -> None:
        """In this process: functions keep who they are and get other code, wherever they were imported to."""
        module = import_module(self.module)
        source = Path(str(module.__file__)).read_text()
        assert source.count(self.old) == 1, f"{self.old!r} stands {source.count(self.old)} times in {self.module}"
        texts = source, source.replace(self.old, self.new)
        before, after = (dict(_functions(compile(text, str(module.__file__), "exec"))) for text in texts)
        changed = [name for name, code in after.items() if code != before.get(name)]
        assert changed, f"{self.new!r} changes no function of {self.module}"
        for name in changed:
            _function(module, name).__code__ = after[name]


def _functions(code: CodeType) -> Iterator[tuple[str, CodeType]]:
    """Of a module, and of its classes; not those within functions."""
    for inner in code.co_consts:
        if isinstance(inner, CodeType) and "<" not in inner.co_qualname:
            if inner.co_flags & inspect.CO_OPTIMIZED:
                yield inner.co_qualname, inner
            else:
                yield from _functions(inner)


def _function(module: Any, name: str) -> Any:
    found: Any = module
    for part in name.split("."):
        found = inspect.getattr_static(found, part)
    while not hasattr(found, "__code__") or hasattr(found, "__wrapped__"):
        found = getattr(found, "__wrapped__", None) or getattr(found, "fget", None) or found.__func__
    return found


@dataclass(frozen=True)
class Case:
    """A run to be certified."""

    config: RunConfig
    shape: ModelShape
    broken: Break | None = None  # in all of the certificate's processes
    until: str | None = None  # name of a comparison after which no others are made


def certified(cases: Sequence[Case]) -> list[Any]:
    """Certificates of the cases; of one that ends early, the comparisons so far. Called without a world."""
    for name in IMPORTED:
        import_module(name)
    ranks._server = multiprocessing.get_context("fork")  # type: ignore[assignment]
    return [_in_a_fork(case) for case in cases]


def _in_a_fork(case: Case) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "found")
        process = multiprocessing.get_context("fork").Process(target=_certify, args=(case, path))
        process.start()
        process.join()
        return pickle.loads(path.read_bytes()) if process.exitcode == 0 else []


def _certify(case: Case, path: Path) -> None:
    from megatron_peft.certify import certify

    if case.broken is not None:
        case.broken.plant()
    if case.until is None:
        found: Any = certify.certify(case.config, case.shape)
    else:
        run, found = (case.config, case.shape), []
        small = certify.small_run(*run, path.parent)
        if case.until not in (RESUMED, RESHARDED, MERGED, EXPORTED):  # what nobody looks at is not saved
            small = replace(small, split=replace(small.split, checkpoint=CheckpointConfig()))
        for line in certify.compare_all(small, certify.wide_run(*run, path.parent / "wide")):
            found.append(line)
            if line.name == case.until:
                break
    path.write_bytes(pickle.dumps(found))


@dataclass(frozen=True)
class Fault:
    """A break, the run that has it, and what the certificate says of it."""

    kind: str
    what: str
    broken: Break
    method: str  # and layout: of the run, by the names of `test_certify.py`
    layout: str
    line: str = ""  # of the certificate, on which it is refused
    named: str = ""  # words of that line's problems


def _of(kind: str, module: str, *rows: tuple[str, ...]) -> list[Fault]:
    return [Fault(kind, what, Break(module, old, new), *rest) for what, old, new, *rest in rows]


# fmt: off
STEP, FROZEN = "megatron_peft.training.step", "megatron_peft.adapters.frozen_linear"
LOW_RANK = "megatron_peft.adapters.low_rank"
SUMS = "    sum_partial_gradients_over_tensor_parallel(model, group)"
START, FIRST = "trained tensors at the start", "gradients of step 1"
MERGED, EXPORTED = "merged model in transformers", "exported adapter in Hugging Face PEFT"
RESUMED, RESHARDED = "resumed run", "trained tensors after resharding"

FAULTS = [
    *_of("collective", STEP,
        ("a sum over tensor ranks is missing", SUMS, "    pass", "lora", "TP2", FIRST, "linear_proj.adapter.B"),
        ("it is made twice", SUMS, f"{SUMS};{SUMS.strip()}", "lora", "TP2", FIRST, "linear_fc2.adapter.B"),
        ("it is missing above four ranks", SUMS, f"    if group.size() <= 4:\n    {SUMS}",
         "lora", "TP8+SP", f"{FIRST}, at TP8+SP", "linear_proj.adapter.B"),
        ("it has another group", SUMS, SUMS.replace("group", "parallel_state.get_data_parallel_group()"),
         "lora", "TP2+SP", FIRST, "linear_fc2.adapter.B"),
        ("replicas keep their own gradients", "finalize_model_grads(list(model), None, *args, **kwargs)", "pass",
         "lora", "DP2 plain", FIRST, "linear_fc1.adapter.B"),
        ("replicas' gradients are averaged", "1.0 / num_tokens.clamp(min=1)",
         "1.0 / num_tokens.clamp(min=1) / parallel_state.get_data_parallel_world_size()",
         "lora", "DP2", FIRST, "linear_fc1.adapter.B"),
        ("every tensor rank counts its losses", "counts = parallel_state.get_tensor_model_parallel_rank() == 0",
         "counts = True", "lora", "TP2", "loss tokens of a step", "step 1")),
    *_of("collective", "megatron_peft.parallel.collectives",
        ("a mean for a sum", "tensor.copy_(summed)", "tensor.copy_(summed / group.size())",
         "lora", "TP2", FIRST, "linear_proj.adapter.B")),
    *_of("collective", FROZEN,
        ("the input's gradient is not summed",
         "return start_sum_over_tensor_parallel(dx, call.group) if call.sums_input_gradient else lambda: dx",
         "return lambda: dx", "lora", "TP2", FIRST, "linear_proj.adapter.B"),
        ("an output is not summed", "return reduce_from_tensor_model_parallel_region(y, group=self.group)",
         "return y", "lora", "TP2", "losses", "step 1"),
        ("replicated factors count every token on each rank",
         "return slice(num_tokens * rank // size, num_tokens * (rank + 1) // size)",
         "return slice(0, num_tokens)", "hybrid", "TP2", FIRST, "linear_proj.adapter")),
    *_of("collective", "megatron.core.distributed.finalize_model_grads",
        ("a tied head's gradient stays on its stage",
         "    _allreduce_word_embedding_grads(model, config, embd_group, pp_group)", "    pass",
         "full", "PP2", FIRST, "embedding.word_embeddings.weight"),
        ("norms' gradients are of a rank's own tokens",
         "    _allreduce_non_tensor_model_parallel_grads(model, config, tp_group)", "    pass",
         "full", "TP2+SP", FIRST, "layernorm.weight")),
    *_of("collective", "megatron_peft.adapters.hybrid",
        ("lambda is of a rank's own gradients", "    sum_coalesced([sums], group)", "    pass",
         "hybrid", "TP2", "lambdas", "linear_qkv")),
    *_of("collective", "megatron_peft.lora_ga.initialize",
        ("LoRA-GA starts from one replica's gradients",
         "    sum_coalesced([sketch.branch.total for sketch in sketches], data_parallel_group)", "    pass",
         "lora-ga", "DP2", "copies on several ranks, at the start", "adapter.A"),
        ("LoRA-GA starts from one tensor rank's",
         "[sketch.branch.total for sketch in sketches if sketch.total_is_partial]", "[]",
         "lora-ga", "TP2", START, "adapter.A"),
        ("LoRA-GA starts from one tensor rank's, in bfloat16",
         "[sketch.branch.total for sketch in sketches if sketch.total_is_partial]", "[]",
         "lora-ga", "TP2 bf16", START, "all together")),
    *_of("collective", "megatron_peft.training.step",
        ("validation is of one replica", "    dist.all_reduce(total)\n", "    pass\n",
         "lora", "DP2", "validation loss", "step 1")),
    *_of("seed", LOW_RANK,
        ("each rank draws factors of its own", 'generator=generator_for(seed, f"{name}.A")',
         f'generator=generator_for(seed + {RANK}, f"{{name}}.A")',
         "lora", "TP2", "copies on several ranks, at the start", "linear_qkv.adapter.A"),
        ("ranks draw their slice alike", "layout.slice_input(A)", "A[:, : layout.local_in_features]",
         "lora", "TP2", START, "linear_proj.adapter.A")),
    *_of("collective", f"{LOW_RANK}_linear",
        ("each rank's tokens have its own part of du",
         "start_sum_scatter_sequence_over_tensor_parallel(du, call.group) if call.splits_sequence",
         "(lambda: du.chunk(call.group.size())[call.group.rank()]) if call.splits_sequence",
         "lora", "TP2+SP", "gradients of step 2", "linear_fc1.adapter.A")),
    *_of("seed", "megatron_peft.adapters.attach",
        ("a seed of each stage", 'f"{name}.adapter", seed, dtype)', f'f"{{name}}.adapter", seed + {RANK}, dtype)',
         "lora", "PP2", START, "decoder.layers.1")),
    *_of("seed", "megatron_peft.parallel.layout",
        ("the last rank holds the first slice",
         "whole.unflatten(-1, (self.group.size(), -1))[..., self.group.rank(), :]",
         "whole.unflatten(-1, (self.group.size(), -1))[..., -1 - self.group.rank(), :]",
         "lora", "TP2", START, "linear_proj.adapter.A")),
    *_of("scale", LOW_RANK,
        ("alpha grows with the ranks", "peft.lora_scale, peft.lora_dropout", "layout.group.size() * peft.lora_scale, 0",
         "lora", "TP2", FIRST, "linear_qkv.adapter.B"),
        ("alpha is doubled in training", "peft.lora_scale, peft.lora_dropout", "2 * peft.lora_scale, 0",
         "lora", "TP2", MERGED, "largest difference"),
        ("a merged change is half of it", "B.to(weight.dtype), A.to(weight.dtype), alpha=scale)",
         "B.to(weight.dtype), A.to(weight.dtype), alpha=scale / 2)", "lora", "DP2", MERGED, "largest difference"),
        ("an exported alpha is the rank's", "whole_number(grown_alpha(peft.lora_alpha, growth, peft.lora_rs))",
         "whole_number(grown_alpha(peft.lora_rank, growth, peft.lora_rs))", "lora", "DP2", EXPORTED, "largest")),
    *_of("scale", "megatron_peft.adapters.hybrid",
        ("lambda and 1 - lambda are exchanged in a merge", "weight.lerp(rotated, 1 - mix)",
         "weight.lerp(rotated, mix)", "hybrid", "TP2", MERGED, "largest difference")),
    *_of("scale", STEP,
        ("losses are divided by a replica's own tokens",
         "dist.all_reduce(num_tokens, group=parallel_state.get_data_parallel_group(with_context_parallel=True))",
         "pass", "lora", "DP2", FIRST, "linear_fc1.adapter.B")),
    *_of("scale", "megatron.core.optimizer_param_scheduler",
        ("learning rates grow with the ranks", "param_group['lr'] = self.get_lr(param_group)",
         "param_group['lr'] = self.get_lr(param_group) * __import__('torch').distributed.get_world_size()",
         "lora", "DP2", "trained tensors", "adapter.B")),
    *_of("scale", "megatron.core.optimizer.optimizer",
        ("clipping counts copies on each rank", "if grad_not_none and is_not_shared and is_not_tp_duplicate",
         "if grad_not_none and is_not_shared", "lora", "TP2", "gradient norms", "step 1")),
    *_of("data", "megatron_peft.data.build",
        ("replicas see the same samples", "data_parallel_rank=data_parallel_rank,", "data_parallel_rank=0,",
         "lora", "DP2", "samples of each step", "replica 1")),
    *_of("data", "megatron_peft.data.batches",
        ("replicas take halves of a batch", "starts = range(mine, mine + self.global_batch_size, chunk)",
         "starts = range(first + self.data_parallel_rank * self.global_batch_size // self.data_parallel_size, first + "
         "(self.data_parallel_rank + 1) * self.global_batch_size // self.data_parallel_size, self.micro_batch_size)",
         "lora", "DP2", "samples of each step", "another of that step's"),
        ("microbatches come in reverse", "for start in starts]", "for start in reversed(starts)]",
         "lora", "DP2", "samples of each step", "step 1"),
        ("the loss counts padding", "np.zeros(length, dtype=np.float32)", "np.ones(length, dtype=np.float32)", "lora",
         "TP2+SP", "loss tokens of a step", "step")),
    *_of("data", "megatron_peft.data.samples",
        ("ranks shuffle a second epoch apart", "return self.permutation(epoch)[offset",
         "return self.permutation(epoch * (1 + __import__('torch').distributed.get_rank()))[offset",
         "lora", "DP2", "samples of each step", "step 4")),
    *_of("resume", "megatron_peft.checkpoint.state",
        ("moments are not saved", "if param.state.get(name) is not None:", "if False:",
         "lora", "TP2", RESUMED, "adapter.A differs after"),
        ("float32 copies are not saved", "if param.master.dtype != param.parameter.dtype:", "if False:",
         "lora", "TP2 bf16", RESUMED, "adapter.A differs after"),
        ("the count of updates is lost", "param.set_steps(steps[entry.key])", "param.set_steps(1)",
         "lora", "TP2", RESUMED, "adapter.A differs after"),
        ("torch's generator is lost", 'torch.set_rng_state(states["torch"])', "pass",
         "lora", "TP2", RESUMED, "generator torch"),
        ("the ranks' own generator is lost", "_tracker().set_states(tracked)", "pass",
         "lora", "TP2", RESUMED, "generator tracker"),
        ("moments of up are taken for gate's",
         "first = int(data_of(whole).storage_offset() - data_of(entry).storage_offset())", "first = 0",
         "lora", "TP2", RESUMED, "linear_fc1.adapter.B"),
        ("shards of replicas overlap", "begin = first + part.start - param.start", "begin = 0",
         "lora", "DP2", RESUMED, "adapter.A differs after")),
    *_of("resume", "megatron_peft.checkpoint.load",
        ("data begin again", "setattr(state.position, name, value)",
         'setattr(state.position, name, 0 if name == "consumed_samples" else value)',
         "lora", "TP2", RESUMED, "consumed_samples"),
        ("the lowest validation loss is lost", "state.best = record.best", "pass",
         "lora", "TP2", RESUMED, "lowest validation loss: loss"),
        ("the schedule begins again", "    _load_schedule(state, record.schedule)", "    pass",
         "lora", "TP2", RESUMED, "schedule")),
    *_of("resume", "megatron_peft.data.batches",
        ("steps begin at the first sample", "self._build(count(self.consumed_samples, size))",
         "self._build(count(0, size))", "lora", "TP2", RESUMED, "adapter.B differs after")),
    *_of("resume", "megatron_peft.adapters.hybrid",
        ("lambda is not saved", 'torch.tensor(peft.initial_mix, device=device))',
         'torch.tensor(peft.initial_mix, device=device), persistent=False)', "hybrid", "TP2", RESUMED, "differs")),
    *_of("reshard", "megatron_peft.adapters.linear",
        ("gate's and up's rows are one piece",
         "sharded[key] = apply_swiglu_sharded_factory(sharded[key], sharded_offsets)",
         "pass", "lora", "TP2", FIRST, "linear_fc1.adapter.B")),
    *_of("reshard", "megatron.core.utils",
        ("ranks save their slices in reverse", "new_offsets.append((tp_axis + prepend_axis_num, tp_rank, tp_size))",
         "new_offsets.append((tp_axis + prepend_axis_num, tp_size - 1 - tp_rank, tp_size))",
         "lora", "TP2", START, "linear_proj.adapter.A")),
    *_of("reshard", "megatron_peft.parallel.collectives",
        ("columns of a base weight are exchanged", "rows.view(num_rows, size, columns.shape[1]).transpose(0, 1)",
         "rows.view(num_rows, size, columns.shape[1]).transpose(0, 1).flip(0)",
         "lora", "TP2", "logits before training", "largest difference")),
]

NOT_SEEN = [
    *_of("dropout", LOW_RANK,
        ("ranks with their own features share masks",
         'if self.layout.split == "column" or call.output_sum == "own tokens":', "if True:", "lora dropout", "TP2")),
    *_of("in one process too", STEP,
        ("microbatches of few tokens count as much as others",
         "loss = torch.sum(token_losses.float() * loss_mask)",
         "loss = torch.sum(token_losses.float() * loss_mask) / loss_mask.sum()", "lora", "TP2")),
    *_of("in one process too", "megatron_peft.data.samples",
        ("an epoch is not shuffled again", "[self.seed % 2**32, epoch]).shuffle(samples)",
         "[self.seed % 2**32, 0]).shuffle(samples)", "lora", "DP2")),
    *_of("in one process too", "megatron_peft.adapters.attach",
        ("all layers start alike", 'f"{name}.adapter", seed, dtype)', '"adapter", seed, dtype)', "lora", "PP2")),
    *_of("warmup and decay", "megatron_peft.training.update",
        ("rates are not warmed up", "lr_warmup_steps=warmup,", "lr_warmup_steps=0,", "lora", "TP2")),
]
# fmt: on
