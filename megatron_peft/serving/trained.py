"""What a run has trained, opened by a serving engine: its merged weights, or its adapter on its base."""

import io
import tempfile
from collections.abc import Mapping
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any

import torch

from megatron_peft.checkpoint.folders import megatron_files
from megatron_peft.checkpoint.run_record import ADAPTER_CONFIG, find_checkpoint, read_record
from megatron_peft.config import ConfigurationError, PeftConfig, RunConfig, require
from megatron_peft.config.evaluation import EngineSettings
from megatron_peft.config.untrusted import read_json_object
from megatron_peft.conversion.convert import megatron_to_hf, merge
from megatron_peft.conversion.lora_approximation import approximate
from megatron_peft.conversion.model_card import VLLM_RANKS
from megatron_peft.conversion.peft_export import (
    PeftAdapter,
    export_adapter,
    export_as_lora,
    form_of,
    in_lora_form,
    in_own_form,
)
from megatron_peft.conversion.trained_adapters import Run, TrainedAdapters, base_of, open_adapters, open_run
from megatron_peft.models.families import family_of
from megatron_peft.models.shape import ModelShape
from megatron_peft.runtime.exit_signals import ends_before_training
from megatron_peft.serving.engine import Engine, largest_rank, rank_limit

# Of what a LoRA stands for, relative Frobenius norm: what its rank is chosen for, and what is refused.
LORA_ERROR, MOST_ERROR = 1e-6, 1e-3


def open_engine(config: RunConfig, how: EngineSettings, near: str | None) -> tuple[Engine, int]:
    """An engine with the model of --load, or of --pretrained-checkpoint alone; and its longest sequence, in tokens.

    near: a file, next to which the model is written until the engine has read it.

    ConfigurationError: no engine, several processes, a method that cannot be served as it was asked.
    """
    parallel, base_is_whole = config.parallel, config.model.base_precision == "run"
    message = (
        "--engine runs beside one process: leave out --nproc-per-node, and give --engine-args tensor_parallel_size=N."
    )
    require(parallel.world_size == 1, message)
    is_merged = config.checkpoint.load is not None and not how.engine_lora
    text = f"--base-precision {config.model.base_precision}: an engine computes with the base as it is, or with merged "
    require(base_is_whole or is_merged, f"{text}weights: give --load without --engine-lora.")
    require(not how.engine_lora or config.checkpoint.load is not None, "--engine-lora: give --load, the run to serve.")
    engine = Engine(how.engine_python)
    try:
        return engine, _opened(engine, config, how, near, is_merged)
    except BaseException:
        engine.close()
        raise


def _opened(engine: Engine, config: RunConfig, how: EngineSettings, near: str | None, is_merged: bool) -> int:
    """The longest sequence of what the engine has loaded."""
    kept = tempfile.TemporaryDirectory(prefix="served-", dir=near and Path(near).parent)
    with ends_before_training(True), kept as folder:  # SIGTERM removes it too
        with redirect_stdout(io.StringIO()):  # of which exports there are, and their cards, nothing is left
            model = _model(config, Path(folder, "model"), is_merged)
            adapter = export_adapter(str(config.checkpoint.load), Path(folder, "adapter")) if how.engine_lora else None
        settings: dict[str, Any] = {"dtype": "bfloat16" if config.model.bf16 else "float32"}
        tokenizer = Path(config.data.tokenizer_model or model)
        if (tokenizer / "tokenizer_config.json").is_file():  # without one no text ends an answer early
            settings |= {"skip_tokenizer_init": False, "tokenizer": str(tokenizer.absolute())}
        if adapter is not None:
            settings |= lora_settings(read_json_object(adapter / ADAPTER_CONFIG))
        return engine.open(model, [adapter] if adapter else [], settings | how.arguments_of_engine())["longest"]


def _model(config: RunConfig, folder: Path, is_merged: bool) -> Path:
    base = Path(str(config.model.pretrained_checkpoint))
    if not is_merged:
        return base if megatron_files(base) is None else megatron_to_hf(base, folder)
    dtype, load = torch.bfloat16 if config.model.bf16 else torch.float32, str(config.checkpoint.load)
    if not config.peft.trains_adapters:
        return megatron_to_hf(load, folder, pretrained_checkpoint=base, dtype=dtype)
    # As the model that was trained; the base's own weights are another one after a quantized base.
    into = "original" if config.model.base_precision == "run" else "trained-values"
    return merge(load, folder, pretrained_checkpoint=base, dtype=dtype, into=into, num_tokens=0)


def export_lora(run: Run, output: Path, base: str | Path | None = None) -> Path:
    """The run's adapter in a form that vLLM serves: as it is, or as a LoRA that equals it.

    ConfigurationError: vLLM takes none for the model's family, or none that equals it has a rank that vLLM takes.
    """
    with redirect_stdout(io.StringIO()):
        if _has_lora(run):
            return export_adapter(run, output, pretrained_checkpoint=base)
        limits: dict[str, Any] = {"tolerance": LORA_ERROR, "refused_above": MOST_ERROR, "max_rank": VLLM_RANKS[-1]}
        return export_as_lora(run, output, pretrained_checkpoint=base, num_tokens=0, progress=False, **limits)


def lora_of(run: Run, base: str | Path | None = None) -> PeftAdapter:
    """What `export_lora` writes, without a file: its tensors are computed as they are asked for."""
    if _has_lora(run):
        return in_own_form(open_adapters(run))
    opened = open_run(run)
    lora = approximate(opened, base_of(opened, base), LORA_ERROR, VLLM_RANKS[-1], False, MOST_ERROR)
    return in_lora_form(lora, opened.record.shape.num_layers)


def _has_lora(run: Run) -> bool:
    record = run.record if isinstance(run, TrainedAdapters) else read_record(find_checkpoint(run))
    return is_lora(record.config.peft, record.shape)


def is_lora(peft: PeftConfig, shape: ModelShape) -> bool:
    """Whether the method's own form is one. ConfigurationError: vLLM takes none for the model's family."""
    family = family_of(shape.architecture)
    require(family.vllm_serves_lora, f"vLLM takes no LoRA for {family.architectures[0]}: merge the run, and serve it.")
    form = form_of(peft)
    with suppress(ConfigurationError):
        return form is not None and form.config(peft, []).get("peft_type") == "LORA"
    return False


def lora_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """What an engine has to be told to serve the adapter with this config."""
    message = f"--engine-lora: vLLM serves LoRA only, not {config.get('peft_type')}: leave it out, for merged weights."
    require(config.get("peft_type") == "LORA", message)
    # vLLM scores several prompts at once with an adapter only if it knows its modules, and it finds those that it fuses
    # by the last parts of their names alone.
    modules = sorted({name.rpartition(".")[2] for name in config["target_modules"]})
    return {"max_lora_rank": rank_limit(largest_rank(config)), "lora_target_modules": modules}
