"""The trained small run outside Megatron: merged in transformers, exported in Hugging Face PEFT."""

from collections.abc import Callable, Iterator
from pathlib import Path

from torch import Tensor

from megatron_peft.certify.certified_ranks import Job
from megatron_peft.certify.comparison import TOLERANCES, CertificateLine, difference_of_logits
from megatron_peft.config import ConfigurationError
from megatron_peft.conversion.peft import export_adapter
from megatron_peft.conversion.to_huggingface import megatron_to_hf, merge
from megatron_peft.conversion.verify import logits_of

MERGED, EXPORTED = "merged model in transformers", "exported adapter in Hugging Face PEFT"


def compare_converted(trained: tuple[Job, tuple[Tensor, Tensor]]) -> list[CertificateLine]:
    """Logits of what is converted with those of the trained model. Called on one rank, without a world.

    Args:
        trained: the run in its layout, and its logits before and after training.
    """
    return list(_comparisons(*trained))


def _comparisons(job: Job, logits: tuple[Tensor, Tensor]) -> Iterator[CertificateLine]:
    run = Path(str(job.config.checkpoint.save))
    has_adapters = job.config.peft.trains_adapters
    merged, exported = run.with_name("merged"), run.with_name("exported")
    to_hf = merge if has_adapters else megatron_to_hf
    yield _compare(MERGED, lambda: to_hf(run, merged, progress=False), job, logits)
    if has_adapters:
        try:
            yield _compare(EXPORTED, lambda: export_adapter(run, exported), job, logits)
        except ConfigurationError as error:
            reason = str(error).split(". ")[0].split(": ", 1)[-1]
            yield CertificateLine(
                EXPORTED, 0, None, 0.0, note=f"not compared ({reason}): the merged model stands for it"
            )


def _compare(name: str, convert: Callable[[], Path], job: Job, logits: tuple[Tensor, Tensor]) -> CertificateLine:
    found = logits_of(convert(), job.tokens)
    return difference_of_logits(name, found, logits[1], logits, TOLERANCES[job.config.model.bf16].logits)
