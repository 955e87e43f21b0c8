"""The trained small run of a certificate outside Megatron: in transformers, Hugging Face PEFT and a serving engine."""

from collections.abc import Callable, Iterator
from pathlib import Path

from torch import Tensor

from megatron_peft.certify.comparison import CertificateLine, compare_logits
from megatron_peft.checkpoint.run_record import ADAPTER_CONFIG
from megatron_peft.config import ConfigurationError, RunConfig
from megatron_peft.config.untrusted import read_json_object
from megatron_peft.conversion import verify
from megatron_peft.conversion.convert import megatron_to_hf, merge
from megatron_peft.conversion.model_card import VLLM_RANKS
from megatron_peft.conversion.peft_export import export_adapter
from megatron_peft.serving.engine import largest_rank, rank_limit
from megatron_peft.serving.served import after_prefixes, bindings_of, served_log_probs
from megatron_peft.serving.trained import export_lora

Trained = tuple[RunConfig, Tensor, tuple[Tensor, Tensor]]  # tokens, and logits on them before and after training


def compare_converted(trained: Trained) -> list[CertificateLine]:
    """The trained small run outside Megatron: merged in transformers, exported in Hugging Face PEFT. On one rank."""
    config, tokens, logits = trained
    run, has_adapters = Path(str(config.checkpoint.save)), config.peft.trains_adapters

    def compared(name: str, write: Callable[[], Path], instead: str = "") -> CertificateLine:
        try:
            folder = write()
        except ConfigurationError as error:
            reason = str(error).rstrip(".").split(". ")[0].split(": ", 1)[-1]
            return CertificateLine(name, 0, None, 0.0, note=f"not compared ({reason}){instead}")
        return compare_logits(name, verify.logits_of(folder, tokens), logits, 1, config.model.bf16)

    to_hf = merge if has_adapters else megatron_to_hf
    merged = compared("merged model in transformers", lambda: to_hf(run, run.with_name("merged"), progress=False))
    if not has_adapters:
        return [merged]
    name, instead = "exported adapter in Hugging Face PEFT", ": the merged model stands for it"
    exported = compared(
        name, lambda: export_adapter(run, run.with_name("exported")), instead if merged.num_compared else ""
    )
    return [merged, exported]


def compare_in_engine(
    python: Path, config: RunConfig, tokens: Tensor, logits: tuple[Tensor, Tensor]
) -> Iterator[CertificateLine]:
    """vLLM with the merged model that `compare_converted` has written, and with the adapters as a LoRA, which it has to
    bind, at the lowest limit of ranks that holds them and at the next one."""
    run, base = Path(str(config.checkpoint.save)), Path(str(config.model.pretrained_checkpoint))
    after_training = (after_prefixes(logits[0]), after_prefixes(logits[1]))

    def served(what: str, model: Path, adapter: Path | None = None, limit: int = 1) -> CertificateLine:
        try:
            name, *log_probs = served_log_probs(python, model, [adapter] if adapter else [], tokens, limit)
        except ConfigurationError as error:
            return CertificateLine(f"{what} in vLLM", 0, None, 0.0, error=str(error))
        return compare_logits(f"{what} in {name}", log_probs[-1], after_training, 1, config.model.bf16)

    merged = run.with_name("merged")
    if merged.is_dir():
        yield served("merged model", merged)
    if not config.peft.trains_adapters:
        return
    try:
        adapter = export_lora(run, run.with_name("served"))
        limit = rank_limit(largest_rank(read_json_object(adapter / ADAPTER_CONFIG)))
    except ConfigurationError as error:
        yield CertificateLine("adapter bound by vLLM", 0, None, 0.0, note=f"not compared ({error})")
        return
    try:
        (binding,) = bindings_of(python, base, [adapter])
    except ConfigurationError as error:
        yield CertificateLine("adapter bound by vLLM", 0, None, 0.0, error=str(error))
        return
    yield CertificateLine(f"modules bound by {binding.engine}", binding.num_bound, None, 0.0, binding.problems)
    for at_most in [rank for rank in VLLM_RANKS if rank >= limit][:2]:
        yield served(f"adapter of ranks up to {at_most}", base, adapter, at_most)
