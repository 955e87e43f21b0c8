"""Loading a trained or a base model for evaluation and generation; its configuration comes from the run's record."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from torch import nn

from megatron_peft.adapters.attach import attach_adapters, linear_layers
from megatron_peft.checkpoint import run_record
from megatron_peft.checkpoint.folders import MANIFEST
from megatron_peft.checkpoint.load import load_trained_parameters
from megatron_peft.checkpoint.save import base_fingerprint
from megatron_peft.checkpoint.tensors import adapted_layers
from megatron_peft.cli.parser import RunFlags
from megatron_peft.config import ConfigurationError, RunConfig, field_names, require
from megatron_peft.config.evaluation import EngineSettings
from megatron_peft.config.model import QUANTIZATION
from megatron_peft.config.untrusted import read_json_object
from megatron_peft.conversion.pretrained import checked_shape, load_pretrained, read_model_shape
from megatron_peft.data.tokenizers import Tokenizer, build_tokenizer, require_vocabulary_fits
from megatron_peft.models.gpt import build_model_chunks
from megatron_peft.models.loss import ChunkedLossModel
from megatron_peft.models.shape import ModelShape
from megatron_peft.runtime.failure import run_together
from megatron_peft.runtime.launch import checked_together, start_model_parallel, world
from megatron_peft.serving.engine import Engine
from megatron_peft.serving.trained import open_engine

ENGINE_BATCHES = 32


@dataclass(frozen=True)
class InferenceModel:
    """A loaded model on this rank; `config` has the layout of the evaluation, not that of the training run."""

    config: RunConfig
    shape: ModelShape
    chunks: list[ChunkedLossModel]  # of this rank, without a data-parallel wrapper
    tokenizer: Tokenizer
    end_ids: frozenset[int]  # tokens that end an answer
    record: run_record.RunRecord | None  # of the run that trained it; None for a base model
    max_length: int  # the longest sequence, in tokens
    scored_length: int  # the longest that is scored, without its last token, which our own model does not read
    engine: Engine | None = None  # that answers in the place of the chunks, of which there are none

    @property
    def batches_at_once(self) -> int:
        """Batches that are asked together: one of each replica, or as many as keep an engine busy."""
        return self.config.parallel.data_parallel_size if self.engine is None else ENGINE_BATCHES


@contextmanager
def opened_model(config: RunConfig, how: EngineSettings, output: str | None) -> Iterator[InferenceModel]:
    """What `load_model` loads; an engine ends with the block."""
    model = load_model(config, how, output)
    try:
        yield model
    finally:
        if model.engine is not None:
            model.engine.close()


def load_model(config: RunConfig, how: EngineSettings | None = None, output: str | None = None) -> InferenceModel:
    """Load the model of --load, or of --pretrained-checkpoint, in a started world. Creates the layout's groups.

    how: the engine that loads it instead, if one is chosen, with files next to `output` while it does.

    ConfigurationErrors are raised on every rank: no checkpoint, another base or method, a layout that does not divide.
    """
    # With a key-value cache, our core attention applies the key mask of padded prompts; Transformer Engine's does not.
    config = replace(config, model=replace(config.model, transformer_impl="local"))
    base, load = config.model.pretrained_checkpoint, config.checkpoint.load
    assert base is not None

    def checked() -> tuple[ModelShape, Tokenizer]:
        shape, tokenizer = checked_shape(config), build_tokenizer(config.data, base)
        require_vocabulary_fits(tokenizer, shape.vocab_size)
        return shape, tokenizer

    shape, tokenizer = checked_together(checked)
    start_model_parallel(config.parallel, config.training.seed, config.parallel.num_virtual_stages(shape.num_layers))
    ends, longest = end_ids(base) | {tokenizer.eos_id}, shape.longest_sequence
    if how is not None and how.engine is not None:
        engine, most = open_engine(config, how, output)
        record = run_record.read_run_record(load) if load else None
        # vLLM reads the last token too, and refuses a prompt that leaves no room for one that it generates.
        lengths = min(longest, most), min(longest, most - 2)
        return InferenceModel(config, shape, [], tokenizer, ends, record, *lengths, engine)
    chunks = build_model_chunks(shape, config.model, config.parallel)
    if load is not None and config.peft.trains_adapters:
        attach_adapters(chunks, config.peft, config.training.seed)
    _load_base(chunks, config, shape, progress=dist.get_rank() == 0)
    record = None
    if load is not None:
        run = run_record.CurrentRun(config, shape, adapted_layers(chunks), base_fingerprint(base), {})

        def refuse_another() -> None:
            # The first rank speaks for all: it alone has read the base model's files.
            saved = run_record.read_record(run_record.find_checkpoint(load)) if dist.get_rank() == 0 else None
            if saved is not None and (problems := run_record.contradictions(saved, run)):
                raise ConfigurationError(*problems)

        checked_together(refuse_another)
        record = load_trained_parameters(chunks, load)
    return InferenceModel(config, shape, chunks, tokenizer, ends, record, longest, longest)


def _load_base(chunks: Sequence[nn.Module], config: RunConfig, shape: ModelShape, progress: bool) -> None:
    load_pretrained(
        chunks,
        str(config.model.pretrained_checkpoint),
        shape,
        tensor_parallel_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_parallel_size=config.parallel.tensor_model_parallel_size,
        progress=progress,
        together=True,
    )


def restore_base(chunks: Sequence[nn.Module], config: RunConfig, shape: ModelShape) -> None:
    """Take the adapters off, and read the base's weights again: some methods train or replace them. A collective."""
    for layer in (layer for chunk in chunks for layer in linear_layers(chunk)):
        layer.module.adapter = None
    _load_base(chunks, config, shape, progress=False)


def model_fingerprint(config: RunConfig) -> str:
    """32 hexadecimal digits that identify base, checkpoint and precision. Call it on the first rank."""
    base, load = base_fingerprint(config.model.pretrained_checkpoint), config.checkpoint.load
    manifest = (run_record.find_checkpoint(load) / MANIFEST).read_text() if load else None
    parts = [dict(base or {}), manifest, config.model.bf16]
    # What is not quantized adds nothing: such fingerprints are what they have always been.
    parts += [value for value in config.model.quantization.values() if value not in ("run", False)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def end_ids(base: str) -> frozenset[int]:
    """The `eos_token_id` of the base model's `generation_config.json`; a chat model may list several."""
    path = Path(base, "generation_config.json")
    if not path.exists():
        return frozenset()
    ends = read_json_object(path).get("eos_token_id")
    ids = ends if isinstance(ends, list) else [] if ends is None else [ends]
    require(all(type(id_) is int for id_ in ids), f"{path}: eos_token_id {ends} must hold only token ids.")
    return frozenset(ids)


# Section of RunConfig -> fields that an evaluation takes from the run's record. The layout, and the path of a base that
# has moved, are the user's flags.
SAVED: dict[str, tuple[str, ...]] = {
    "model": ("pretrained_checkpoint", "bf16", *QUANTIZATION, "make_vocab_size_divisible_by"),
    "data": ("tokenizer_type", "tokenizer_model", "vocab_size", "chat_template"),
    "training": ("seed",),  # a method may draw parameters that it never trains
}


def saved_values(typed: Mapping[str, Any]) -> dict[str, Any]:
    """Model, method and tokenizer of the run in the folder `typed["load"]`, by field; `saved` of `read_config`."""
    load = typed.get("load")
    if load is None:
        return {}
    require(load != "", "--load is empty: give the folder of a run, or omit the flag.")
    record = run_record.read_run_record(load)
    base = record.config.model.pretrained_checkpoint
    is_there = "pretrained_checkpoint" in typed or (base is not None and Path(base).exists())
    problem = f"--load {load} was trained on the base model {base}, which does not exist"
    require(is_there, f"{problem}: give its current folder with --pretrained-checkpoint.")
    values = values_of_model(record.config)
    if typed.get("base_precision") == "run":  # which no flag could take back
        values.pop("quantize_output_layer", None)
    return values


def values_of_model(config: RunConfig) -> dict[str, Any]:
    """Field -> value of a configuration's model, method and tokenizer, without defaults."""
    values: dict[str, Any] = {}
    for section, names in {**SAVED, "peft": field_names(type(config.peft))}.items():
        fields = getattr(config, section)
        given = {name: getattr(fields, name) for name in names}
        values |= {name: value for name, value in given.items() if value != getattr(type(fields), name, None)}
    return values


def run_on_a_model(main: Callable[[RunConfig, Any], None], settings: Any, run_flags: RunFlags) -> None:
    """Run `main` on all processes of a started world with the model's configuration and its own settings.

    Raises ConfigurationError: something is wrong with the flags.
    """
    config = run_flags.config(read_shape=read_model_shape, saved=saved_values)
    with world(config.parallel.distributed_backend, config.parallel.distributed_timeout_minutes):
        run_together(lambda: main(config, settings), program=run_flags.program)
