"""Run a fine-tuning configuration: check everything, build the model, load weights, start LoRA-GA, train."""

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from hashlib import sha256
from math import ceil, isfinite
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from rich import console, progress

from megatron_peft.adapters.attach import all_names, attach_adapters
from megatron_peft.checkpoint import folders, load
from megatron_peft.checkpoint.save import Saver
from megatron_peft.checkpoint.state import Position, TrainingState
from megatron_peft.config import (
    ConfigurationError,
    RunConfig,
    config_to_dict,
    flag,
    missing_for_training,
    require,
    writing,
)
from megatron_peft.conversion import pretrained
from megatron_peft.data.batches import GlobalBatches, Step
from megatron_peft.data.build import Data, build_data, index_folder
from megatron_peft.data.tokenizers import Tokenizer, build_tokenizer, require_vocabulary_fits
from megatron_peft.lora_ga.initialize import init_from_gradients
from megatron_peft.models import gpt, kernels
from megatron_peft.models.loss import ChunkedLossModel, loss_summary
from megatron_peft.models.shape import ModelShape
from megatron_peft.parallel.collectives import from_first_rank, require_same
from megatron_peft.runtime.failure import stacks_folder, stacks_written
from megatron_peft.runtime.launch import (
    checked_together,
    gather_over_world,
    place_on_node,
    seed_generators,
    start_model_parallel,
)
from megatron_peft.training.live_sync import LiveSync
from megatron_peft.training.loop import AfterStep, saves_weights, train
from megatron_peft.training.metrics import require_loggers
from megatron_peft.training.save_folder import removed_if_unused, require_usable
from megatron_peft.training.step import START_TOLERANCE, finish_with, run_schedule, start_losses
from megatron_peft.training.terminal import large_batch_warning, print_rank_0, resume_summary, training_summary
from megatron_peft.training.update import schedule_values, start_state

RUN_FILE = "run.yaml"


def data_of_rank(config: RunConfig, tokenizer: Tokenizer, shape: ModelShape, rank: int | None = None) -> Data:
    """The data that a data-parallel rank reads (None: this one, in the present groups); raises like `build_data`."""
    rank = parallel_state.get_data_parallel_rank() if rank is None else rank
    size = config.parallel.data_parallel_size
    return build_data(config, tokenizer, data_parallel_rank=rank, data_parallel_size=size, num_ids=shape.vocab_size)


def build_state(
    config: RunConfig, shape: ModelShape, train_iters: int, start_steps: Sequence[Step] = ()
) -> TrainingState:
    """The model, with adapters and weights, optimizer and schedule of a run of `train_iters` iterations.

    start_steps: global batches for LoRA-GA's start; empty if it does not run.
    Raises ConfigurationError: the targets match nothing, the rank is too large, or the weights do not fit the shape.
    """
    chunks = build_chunks(config, shape)
    if start_steps:
        start_lora_ga(chunks, config, start_steps)
    return start_state(chunks, config, shape, train_iters)


def build_chunks(config: RunConfig, shape: ModelShape, loads: bool = True) -> list[ChunkedLossModel]:
    """This rank's part of the model, with adapters, and with weights if it `loads`; raises like `build_state`."""
    chunks = gpt.build_model_chunks(shape, config.model, config.parallel, kernels.Training.of(config))
    adapted: list[str] = []
    if config.peft.trains_adapters:
        adapted = attach_adapters(chunks, config.peft, config.training.seed)
    if loads:
        assert config.model.pretrained_checkpoint is not None
        report = pretrained.load_pretrained(
            chunks,
            config.model.pretrained_checkpoint,
            shape,
            tensor_parallel_rank=parallel_state.get_tensor_model_parallel_rank(),
            tensor_parallel_size=config.parallel.tensor_model_parallel_size,
            progress=dist.get_rank() == 0,
            together=True,
        )
        print_rank_0(f"read {report.counts.bytes / 2**20:,.1f} MiB of weights on this rank in {report.seconds:.1f} s")
        print_rank_0(training_summary(config, all_names(adapted), chunks))
    return chunks


def check_run(config: RunConfig) -> tuple[ModelShape, int]:
    """What `finetune` checks before it builds the model, in this process alone, whatever the world of `config`.

    Nothing is written. Returns the shape of the base model, and the iterations of the run.
    """
    if missing := missing_for_training({**vars(config.data), **vars(config.training)}):
        raise ConfigurationError(*missing)
    require_loggers(config.logging)
    config = replace(config, checkpoint=load.resolve_resume(config.checkpoint))
    assert config.model.pretrained_checkpoint is not None
    shape = pretrained.checked_shape(config)
    pretrained.open_weights(config.model.pretrained_checkpoint, shape)
    tokenizer = _checked_tokenizer(config, shape)
    load.require_something_to_load(config.checkpoint)
    data = _checked_data(config, tokenizer, shape, rank=0)
    print_rank_0(
        f"flags, model, tokenizer and data can be used: {data.train.order.epoch_length(0):,} training samples, "
        f"{data.train_iters:,} iterations"
    )
    return shape, data.train_iters


class Finetuned(NamedTuple):
    """A run that has ended, with what it read."""

    state: TrainingState
    data: Data
    tokenizer: Tokenizer


def finetune(
    config: RunConfig,
    run_file: str = "",
    planned_peak: Callable[[], int | str | None] | None = None,
    after_step: AfterStep | None = None,
) -> Finetuned:
    """Train `config` to its end. The processes must be joined (`runtime.launch.world`).

    run_file: written to run.yaml in the folder of --save, so that the run can be repeated from it.
    after_step: as of `train`, in the place of what --sync-server asks for.
    Raises ConfigurationError, on every rank, before anything large is loaded or anything is written.
    """
    # Checks go from cheap to expensive, each on all ranks together: a rank that fails alone would hang the others.
    _require_same_configuration(config)
    from_first_rank(lambda: require_loggers(config.logging))
    config = replace(config, checkpoint=from_first_rank(lambda: load.resolve_resume(config.checkpoint)))
    if missing := missing_for_training({**vars(config.data), **vars(config.training)}):
        raise ConfigurationError(*missing)
    checked_together(lambda: gpt.require_transformer_engine(config.model))
    shape = checked_together(lambda: pretrained.checked_shape(config))
    attention = checked_together(lambda: _require_kernels(config, shape))
    problem = next(filter(None, gather_over_world(kernels.Installed.detected().compile_problem)), "")
    config, warning = kernels.without_compiled(config, shape, problem)
    base = config.model.pretrained_checkpoint
    pretrained.require_same_model(str(base))
    start_model_parallel(config.parallel, config.training.seed, config.parallel.num_virtual_stages(shape.num_layers))
    tokenizer = checked_together(lambda: _checked_tokenizer(config, shape))
    folder = config.data.tokenizer_model or base
    require_same(_tokenizer_facts(tokenizer), f"the tokenizer in --tokenizer-model {folder}", "another one")
    from_first_rank(lambda: load.require_something_to_load(config.checkpoint))
    own_folder = config.checkpoint.save if dist.get_rank() == 0 else None
    stacks = stacks_written(stacks_folder(), dist.get_rank())
    with removed_if_unused(own_folder), stacks, _open_saver(config) as saver:
        print_rank_0("reading the data")
        data = _checked_data(config, tokenizer, shape)
        if folder := index_folder(config.data):
            print_rank_0(f"indices of the data: {folder} (--data-cache-path)")
        if after_step is None and config.checkpoint.sync_server:
            after_step = LiveSync(config, shape, data).after_step
        lines = [attention, loss_summary(config, shape), warning, large_batch_warning(config, data.train.order)]
        if not saves_weights(config.checkpoint):
            lines.append("WARNING: without --save nothing that this run trains is saved: give --save FOLDER to keep it")
        print_rank_0("\n".join(filter(None, lines)))
        print_rank_0(f"building the model and reading the weights of {base}")
        state = build_state(config, shape, data.train_iters, first_steps(config, data.train))
        state.data_digest, state.tokenizer_digest = data.digest, tokenizer.digest
        state.longest_sample = data.longest_sample
        checkpoint = load.load_checkpoint(state)
        data = replace(data, train_iters=length_of_resumed(config, data, state.position))
        if checkpoint is not None:
            epoch = data.train.order.epochs_at(state.position.consumed_samples)
            print_rank_0(resume_summary(checkpoint, state, data.train_iters, epoch))
        else:
            _check_start(state, data)
            if config.checkpoint.resume == "auto":
                print_rank_0(f"--resume auto: --save {config.checkpoint.save} holds no checkpoint, so a new run starts")
        _note_unknown_lengths(config)
        if config.checkpoint.save and run_file:
            path = Path(config.checkpoint.save) / RUN_FILE
            from_first_rank(lambda: _write_run_file(path, run_file))
        # A resumed run skips the samples that it has trained on.
        data.train.consumed_samples = state.position.consumed_samples
        print_rank_0(train(state, data, saver, planned_peak, after_step))
    return Finetuned(state, data, tokenizer)


def length_of_resumed(config: RunConfig, data: Data, position: Position) -> int:
    """Iterations of the whole run, of which those before `position` may have had another global batch."""
    training, done = config.training, position.consumed_samples
    if training.train_epochs is not None:  # all of their samples
        left = ceil((data.train.order.positions_in(training.train_epochs) - done) / config.global_batch_size)
        return position.iteration + left
    if training.train_samples is not None:  # no step beyond them
        return position.iteration + (training.train_samples - done) // config.global_batch_size
    return data.train_iters


def _note_unknown_lengths(config: RunConfig) -> None:
    if config.parallel.pipeline_model_parallel_size > 1 and not config.data.pad_to_seq_length:
        print_rank_0(
            "without --pad-to-seq-length pipeline stages tell one another the size of every message, and wait for it: "
            "give it where samples or packs are nearly as long as --seq-length"
        )


def _require_kernels(config: RunConfig, shape: ModelShape) -> str:
    """The line that names core attention; raises ConfigurationError if a kernel that the run needs is not there."""
    installed = kernels.Installed.detected()
    kernels.require_cross_entropy(config.model, installed)
    kernels.require_norm_recompute(config.model, installed)
    with_engine = gpt.uses_transformer_engine(config.model.transformer_impl, installed)
    kernels.require_packed_attention(config, shape, with_engine, installed)
    return kernels.attention_summary(config, shape, with_engine, installed)


def _write_run_file(path: Path, text: str) -> None:
    with writing(str(path), "free disk space, or use another --save folder"):
        folders.write_atomically(path, text)


def _checked_data(config: RunConfig, tokenizer: Tokenizer, shape: ModelShape, rank: int | None = None) -> Data:
    """What `data_of_rank` gives. Raises ConfigurationError if nothing is left to validate, or a checkpoint is unfit."""
    data = data_of_rank(config, tokenizer, shape, rank)
    require(
        data.valid is not None or not (config.training.early_stopping_patience or config.checkpoint.keep_best),
        f"--early-stopping-patience and --keep-best need a validation loss, but --split {config.data.split} leaves no "
        f"validation data: give a split with some, or --valid-data-path.",
    )
    load.check_resume(config, shape, schedule_values(config, data.train_iters))
    return data


def _require_same_configuration(config: RunConfig) -> None:
    """Raises ConfigurationError on every rank if a rank was started with other flags than rank 0."""
    own = {
        (section, name): value for section, fields in config_to_dict(config).items() for name, value in fields.items()
    }
    first = from_first_rank(lambda: own)
    changed = [f"{flag(key[1])} {value} (rank 0: {first[key]})" for key, value in own.items() if value != first[key]]
    differing = list(dict.fromkeys(changed))  # a flag may be in two sections, as --seed is
    checked_together(
        lambda: require(
            not differing,
            f"rank {dist.get_rank()} was started with {', '.join(differing)}: start all ranks with the same command.",
        )
    )


def _tokenizer_facts(tokenizer: Tokenizer) -> Mapping[str, object]:
    some = range(0, tokenizer.largest_id + 1, tokenizer.largest_id // 1000 + 1)
    return {
        "its vocabulary": sha256(tokenizer.decode(range(tokenizer.largest_id + 1)).encode()).hexdigest(),
        "the ids of a text": tokenizer.encode(tokenizer.decode(some)),
        "its special tokens": (tokenizer.bos_id, tokenizer.eos_id, dict(tokenizer.special_tokens)),
        "its chat template": tokenizer.chat_template,
    }


def _checked_tokenizer(config: RunConfig, shape: ModelShape) -> Tokenizer:
    tokenizer = build_tokenizer(config.data, config.model.pretrained_checkpoint)
    if config.data.mock_data:  # its ids are the model's own, and no text is read
        return tokenizer
    if doubt := require_vocabulary_fits(tokenizer, shape.vocab_size):
        print_rank_0(doubt)
    return tokenizer


def _check_start(state: TrainingState, data: Data) -> None:
    """Warn if untrained adapters change the model's loss, as none should. A collective.

    Raises ConfigurationError if the base model's loss is not finite.
    """
    peft = state.config.peft
    if not peft.trains_adapters or peft.spec.replaces_base(peft):
        return
    ours, base = start_losses(state, data.train.step_at(0))
    require(
        isfinite(base) or not state.config.training.check_for_nan_in_loss_and_grad,
        f"the loss of --pretrained-checkpoint {state.config.model.pretrained_checkpoint} is {base} before anything is "
        f"trained: its weights contain NaN, or are too large. Download it again, or continue anyway with "
        f"--no-check-for-nan-in-loss-and-grad.",
    )
    if not abs(ours - base) <= START_TOLERANCE[state.config.model.bf16] * abs(base):
        print_rank_0(
            f"WARNING: with untrained adapters the model's loss is {ours:.6f}, but the base model's is {base:.6f}: the "
            f"run does not start from the pretrained model."
        )


def _open_saver(config: RunConfig) -> Saver:
    checked_together(lambda: _check_save_folder(config))
    return Saver(config.checkpoint)


def _check_save_folder(config: RunConfig) -> None:
    if config.checkpoint.save is None or place_on_node().rank > 0:  # a node's ranks see the same folder
        return
    require_usable(config.checkpoint)
    folder = Path(config.checkpoint.save)
    with writing(f"--save {folder}", "give a folder that you may write to"):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


# LoRA-GA's initialization within a run: its batches, progress bar and report.

START_FILE = "lora_ga_start.json"
NUM_PASSES = 2
POSITIONS_THAT_FIT = 256


def first_steps(config: RunConfig, train: GlobalBatches) -> Sequence[Step]:
    """The run's first --lora-ga-batches global batches, which it will also train on; empty for other methods.

    The gradient is a sum over their tokens, so the microbatches are others than in training: samples of like lengths
    share one. A product of few tokens takes up to three times as long a token.

    Raises ConfigurationError, on every rank: the training data has fewer samples.
    """
    if not config.peft.spec.starts_from_gradients:
        return ()
    folder = config.checkpoint.load
    # The first rank decides, as for what is loaded: another node may not see a new checkpoint yet.
    if from_first_rank(lambda: folder is not None and folders.newest_checkpoint(Path(folder)) is not None):
        return ()  # a resumed run takes the factors from its checkpoint
    size, wanted = config.global_batch_size, config.peft.lora_ga_batches
    num_samples = train.order.epoch_length(0)
    most = num_samples // size
    require(
        wanted <= most,
        f"--lora-ga-batches {wanted} of --global-batch-size {size} are {wanted * size} samples, but the training data "
        f"has {num_samples}: use {f'at most {most}, or ' if most else ''}a smaller --global-batch-size.",
    )
    stages = config.parallel.pipeline_model_parallel_size if config.parallel.is_interleaved else 1
    # No more memory than the longest samples take in training. Where these are short there is room for more: nothing
    # has gradients or moments yet. (Not with --pad-to-seq-length, where the stages expect messages of one size.)
    most_positions = config.training.micro_batch_size * config.data.seq_length
    most_positions = max(most_positions, 0 if config.data.pad_to_seq_length else POSITIONS_THAT_FIT)
    microbatches = train.in_few_microbatches(wanted, most_positions, stages)
    a_step = len(train.layout.microbatches(0))
    return [microbatches[first : first + a_step] for first in range(0, len(microbatches), a_step)]


def start_lora_ga(model_chunks: Sequence[torch.nn.Module], config: RunConfig, steps: Sequence[Step]) -> None:
    """Initialize the low-rank factors of bare chunks from the gradient over `steps`, and report it. A collective."""
    data_parallel: Any = parallel_state.get_data_parallel_group()
    # completion tokens of the global batches, over all replicas
    own_tokens = sum(microbatch.num_loss_tokens for step in steps for microbatch in step)
    total = torch.tensor(own_tokens, device=torch.cuda.current_device())
    dist.all_reduce(total, group=data_parallel)
    passes = iter(range(1, NUM_PASSES + 1))
    has_bar = console.Console().is_terminal and dist.get_rank() == 0

    def replay() -> None:
        # The same dropout in both passes, so that they see one gradient.
        seed_generators(config.training.seed)
        finish_with(model_chunks, None)  # no sums of gradients: the sketches are summed instead
        which = f"pass {next(passes)} of {NUM_PASSES}"
        for microbatches in progress.track(steps, f"LoRA-GA start, {which}", transient=True, disable=not has_bar):
            run_schedule(model_chunks, microbatches, forward_only=False)
        if not has_bar:
            print_rank_0(f"LoRA-GA start: {which} over {config.peft.lora_ga_batches} batches done")

    report = init_from_gradients(model_chunks, config.peft, config.training.seed, replay, int(total))
    seed_generators(config.training.seed)  # the run's dropout is that of a run without this start
    energy = {name: value for of_rank in gather_over_world(report.energy) for name, value in of_rank.items()}
    if dist.get_rank() == 0:
        print_rank_0(start_report(config, report.seconds, energy))


def start_report(config: RunConfig, seconds: float, energy: Mapping[str, float]) -> str:
    """Write each layer's number beside metrics.jsonl, if there is a --save folder, and summarize each kind of layer.

    `energy`: share of the gradient's squared norm in its r leading directions, by global name of the layer.
    """
    peft, save = config.peft, config.checkpoint.save
    lines = [
        f"LoRA-GA start ({peft.lora_ga_init}) took {seconds:.1f} s; the gradient's squared norm in rank "
        f"{peft.lora_rank}:",
        f"  {'':<12} layers   mean   lowest (layer)   highest (layer)",
    ]
    for kind in sorted({name.rpartition(".")[2] for name in energy}):
        values = {_layer(name): value for name, value in energy.items() if name.endswith(f".{kind}")}
        lowest, highest = min(values, key=values.__getitem__), max(values, key=values.__getitem__)
        lines.append(
            f"  {kind:<12} {len(values):6d}  {sum(values.values()) / len(values):.3f}   {values[lowest]:.3f} "
            f"{f'({lowest})':<8}   {values[highest]:.3f} {f'({highest})':<9}".rstrip()
        )
    if save is not None:
        path = Path(save) / START_FILE
        record = {name: getattr(peft, name) for name in ("lora_ga_init", "lora_ga_batches", "lora_rank")}
        record |= {"seconds": seconds, "energy": dict(sorted(energy.items(), key=lambda kv: (_layer(kv[0]), kv[0])))}
        with suppress(OSError):  # a full disk: the run's first checkpoint will report it
            folders.write_atomically(path, json.dumps(record, indent=2) + "\n")
            lines.append(f"  each layer: {path}")
    return "\n".join(lines)


def _layer(name: str) -> int:
    return int(name.split(".")[2])
