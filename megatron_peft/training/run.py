"""Run a fine-tuning configuration: check everything, build the model, load weights, train."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from math import isfinite
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel

from megatron_peft.adapters.attach import all_names, attach_adapters
from megatron_peft.checkpoint.folders import newest_checkpoint, write_atomically
from megatron_peft.checkpoint.load import check_resume, load_checkpoint, require_something_to_load, resolve_resume
from megatron_peft.checkpoint.save import Saver
from megatron_peft.config import ConfigurationError, RunConfig, config_to_dict, flag, missing_for_training, require
from megatron_peft.conversion.pretrained import (
    ReadingGroups,
    checked_shape,
    load_pretrained,
    open_weights,
    require_same_model,
)
from megatron_peft.data.batches import Step
from megatron_peft.data.build import Data, build_data
from megatron_peft.data.tokenizers import Tokenizer, build_tokenizer, doubt_about_vocabulary, require_vocabulary_fits
from megatron_peft.models.gpt import build_model_chunks, require_transformer_engine, uses_transformer_engine
from megatron_peft.models.kernels import (
    Installed,
    Training,
    attention_summary,
    require_cross_entropy,
    require_norm_recompute,
    require_packed_attention,
    without_compiled,
)
from megatron_peft.models.shape import ModelShape
from megatron_peft.parallel.collectives import from_first_rank, require_same
from megatron_peft.runtime.launch import checked_together, gather_over_world, start_model_parallel
from megatron_peft.runtime.stacks import Stacks
from megatron_peft.training.loop import train
from megatron_peft.training.lora_ga_start import first_steps, start_lora_ga
from megatron_peft.training.metrics import require_loggers
from megatron_peft.training.state import TrainingState, schedule_values, start_state
from megatron_peft.training.terminal import print_rank_0, resume_summary, training_summary
from megatron_peft.training.validation import START_TOLERANCE, start_losses

RUN_FILE = "run.yaml"
MODEL_FILES = ("config.json", "adapter_model.safetensors", "adapter_model.bin")  # of transformers and PEFT


def data_of_rank(config: RunConfig, tokenizer: Tokenizer, shape: ModelShape) -> Data:
    """The data of a run that this rank's replica reads, in the present groups; raises like `build_data`."""
    return build_data(
        config,
        tokenizer,
        data_parallel_rank=parallel_state.get_data_parallel_rank(),
        data_parallel_size=parallel_state.get_data_parallel_world_size(),
        num_ids=shape.vocab_size,
    )


def build_state(
    config: RunConfig, shape: ModelShape, train_iters: int, start_steps: Sequence[Step] = ()
) -> TrainingState:
    """Build the model, attach adapters, load pretrained weights, and make optimizer and schedule.

    Args:
        shape: of the base model.
        train_iters: iterations of the whole run, for the schedule.
        start_steps: global batches for LoRA-GA's start; empty if it does not run.

    Raises:
        ConfigurationError: the targets match nothing, the rank is too large, or the weights do not fit the shape.
    """
    chunks = build_chunks(config, shape)
    if start_steps:
        start_lora_ga(chunks, config, start_steps)
    return start_state(chunks, config, shape, train_iters)


def build_chunks(config: RunConfig, shape: ModelShape, loads: bool = True) -> list[GPTModel]:
    """This rank's part of the model, with adapters and pretrained weights.

    Args:
        shape: of the base model.
        loads: False leaves the base's weights as they were allocated.

    Raises:
        ConfigurationError: as for `build_state`.
    """
    chunks = build_model_chunks(shape, config.model, config.parallel, Training.of(config))
    adapted: list[str] = []
    if config.peft.trains_adapters:
        adapted = attach_adapters(chunks, config.peft, config.training.seed)
    if loads:
        assert config.model.pretrained_checkpoint is not None
        report = load_pretrained(
            chunks,
            config.model.pretrained_checkpoint,
            shape,
            tensor_parallel_rank=parallel_state.get_tensor_model_parallel_rank(),
            tensor_parallel_size=config.parallel.tensor_model_parallel_size,
            progress=dist.get_rank() == 0,
            groups=ReadingGroups.of_layout(),
        )
        print_rank_0(f"read {report.counts.bytes / 2**20:,.1f} MiB of weights on this rank in {report.seconds:.1f} s")
        print_rank_0(training_summary(config, all_names(adapted), chunks))
    return chunks


def check_run(config: RunConfig) -> ModelShape:
    """What `finetune` checks before it builds the model, in this process alone, whatever the world of `config`.

    Nothing is written. Returns the shape of the base model.

    Raises:
        ConfigurationError: something is wrong with the model, its files, the tokenizer, the data or a checkpoint.
    """
    if missing := missing_for_training({**vars(config.data), **vars(config.training)}):
        raise ConfigurationError(*missing)
    require_loggers(config.logging)
    config = replace(config, checkpoint=resolve_resume(config.checkpoint))
    assert config.model.pretrained_checkpoint is not None
    shape = checked_shape(config)
    open_weights(config.model.pretrained_checkpoint, shape)
    tokenizer = _checked_tokenizer(config, shape)
    require_something_to_load(config.checkpoint)
    size = config.parallel.data_parallel_size
    data = build_data(config, tokenizer, data_parallel_rank=0, data_parallel_size=size, num_ids=shape.vocab_size)
    _check_validation_data(config, data)
    check_resume(config, shape, schedule_values(config, data.train_iters))
    print_rank_0(
        f"flags, model, tokenizer and data can be used: {data.train.order.epoch_length(0):,} training samples, "
        f"{data.train_iters:,} iterations"
    )
    return shape


class Finetuned(NamedTuple):
    """A run that has ended, with what it read."""

    state: TrainingState
    data: Data
    tokenizer: Tokenizer


def finetune(
    config: RunConfig, run_file: str = "", planned_peak: Callable[[], int | str | None] | None = None
) -> Finetuned:
    """Train `config` to its end. The processes must be joined (`runtime.launch.world`).

    Args:
        run_file: written to run.yaml in the folder of --save, so that the run can be repeated from it.
        planned_peak: of this rank's memory in bytes, once it is known; printed beside the measured one.

    Raises:
        ConfigurationError: on every rank, before anything large is loaded or anything is written, if something is
            wrong with the model, the layout, the data, the targets or the folders.
    """
    # Checks go from cheap to expensive, each on all ranks together: a rank that fails alone would hang the others.
    _require_same_configuration(config)
    from_first_rank(lambda: require_loggers(config.logging))
    config = replace(config, checkpoint=from_first_rank(lambda: resolve_resume(config.checkpoint)))
    if missing := missing_for_training({**vars(config.data), **vars(config.training)}):
        raise ConfigurationError(*missing)
    checked_together(lambda: require_transformer_engine(config.model))
    shape = checked_together(lambda: checked_shape(config))
    attention = checked_together(lambda: _require_kernels(config, shape))
    problem = next(filter(None, gather_over_world(Installed.detected().compile_problem)), "")
    config, warning = without_compiled(config, shape, problem)
    base = config.model.pretrained_checkpoint
    require_same_model(str(base))
    start_model_parallel(config.parallel, config.training.seed, config.parallel.num_virtual_stages(shape.num_layers))
    tokenizer = checked_together(lambda: _checked_tokenizer(config, shape))
    folder = config.data.tokenizer_model or base
    require_same(_tokenizer_facts(tokenizer), f"the tokenizer in --tokenizer-model {folder}", "another one")
    from_first_rank(lambda: require_something_to_load(config.checkpoint))
    checked_together(lambda: _check_save_folder(config))
    with Stacks(config.checkpoint.save, dist.get_rank()), Saver(config.checkpoint) as saver:
        data = data_of_rank(config, tokenizer, shape)
        _check_validation_data(config, data)
        check_resume(config, shape, schedule_values(config, data.train_iters))
        print_rank_0("\n".join(filter(None, [attention, warning])))
        state = build_state(config, shape, data.train_iters, first_steps(config, data.train))
        state.data_digest = data.digest
        checkpoint = load_checkpoint(state)
        if checkpoint is None:
            _check_start(state, data)
        if checkpoint is not None:
            epoch = data.train.order.epochs_at(state.position.consumed_samples)
            print_rank_0(resume_summary(checkpoint, state, data.train_iters, epoch))
        elif config.checkpoint.resume == "auto":
            print_rank_0(f"--resume auto: --save {config.checkpoint.save} holds no checkpoint, so a new run starts")
        _note_unknown_lengths(config)
        if config.checkpoint.save and run_file:
            path = Path(config.checkpoint.save) / RUN_FILE
            from_first_rank(lambda: _write_run_file(path, run_file))
        # A resumed run skips the samples that it has trained on.
        data.train.consumed_samples = state.position.consumed_samples
        print_rank_0(train(state, data, saver, planned_peak))
    return Finetuned(state, data, tokenizer)


def _require_kernels(config: RunConfig, shape: ModelShape) -> str:
    """The line that names core attention; raises ConfigurationError if a kernel that the run needs is not there."""
    installed = Installed.detected()
    require_cross_entropy(config.model, installed)
    require_norm_recompute(config.model, installed)
    with_engine = uses_transformer_engine(config.model.transformer_impl, installed)
    require_packed_attention(config, shape, with_engine, installed)
    return attention_summary(config, shape, with_engine, installed)


def _write_run_file(path: Path, text: str) -> None:
    try:
        write_atomically(path, text)
    except OSError as error:
        raise ConfigurationError(
            f"{path} cannot be written ({error.strerror}): free disk space, or use another --save folder."
        ) from error


def _check_validation_data(config: RunConfig, data: Data) -> None:
    """Raises ConfigurationError if a flag needs a validation loss, but --split leaves nothing to validate."""
    require(
        data.valid is not None or not (config.training.early_stopping_patience or config.checkpoint.keep_best),
        f"--early-stopping-patience and --keep-best need a validation loss, but --split {config.data.split} leaves no "
        f"validation data: give a split with some, or --valid-data-path.",
    )


def _note_unknown_lengths(config: RunConfig) -> None:
    if config.parallel.pipeline_model_parallel_size > 1 and not config.data.pad_to_seq_length:
        print_rank_0(
            "without --pad-to-seq-length pipeline stages tell one another the size of every message, and wait for it: "
            "give it where samples or packs are nearly as long as --seq-length"
        )


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
    require_vocabulary_fits(tokenizer, shape.vocab_size)
    if doubt := doubt_about_vocabulary(tokenizer, shape.vocab_size):
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


def _check_save_folder(config: RunConfig) -> None:
    if config.checkpoint.save is None:
        return
    folder = Path(config.checkpoint.save)
    foreign = [name for name in MODEL_FILES if (folder / name).exists()]
    require(
        not foreign or newest_checkpoint(folder) is not None,
        f"--save {folder} holds a model or an adapter that no run wrote there ({', '.join(foreign)}), whose files a "
        f"run would replace: give another --save.",
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ConfigurationError(
            f"--save {folder} cannot be written ({error.strerror}): give a folder that you may write to."
        ) from error
