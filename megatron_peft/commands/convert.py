"""Convert weights and adapters between Hugging Face, HF PEFT and Megatron.

megatron-peft convert hf-to-megatron --input HF_FOLDER --output MEGATRON_FOLDER
megatron-peft convert megatron-to-hf --input MEGATRON_FOLDER_OR_RUN --output HF_FOLDER
megatron-peft convert merge          --input RUN --output HF_FOLDER
megatron-peft convert export-adapter --input RUN --output HF_PEFT_FOLDER [--as-lora] [--gguf]
megatron-peft convert import-adapter --input HF_PEFT_FOLDER --pretrained-checkpoint HF_FOLDER --output RUN
megatron-peft convert verify         --input FOLDER --reference FOLDER [--engine vllm|llama.cpp --engine-python PYTHON]
An existing output is never overwritten. docs/moving-weights.md lists every conversion.
"""

import shlex
import shutil
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

from megatron_peft.cli.command import Command
from megatron_peft.cli.launch import tell_loading
from megatron_peft.config import Checked, ConfigurationError, Requirements, flag, option, require, required_option
from megatron_peft.config.sources import local_model

Dtype = Literal["float32", "bfloat16", "float16"]
_num_tokens = partial(
    option,
    None,
    "compare the output's logits with the run's on two sequences of N random tokens, with the model in memory in "
    "float32; 0: do not (default: 64 with --as-lora, and after a run with --base-precision if the model takes at most "
    "half of the memory that is left, else 0)",
    check="not_negative",
)
_engine_python = partial(
    option, None, "the Python of the engine's environment (default: the one that make engines makes)", metavar="FILE"
)


@dataclass(frozen=True, kw_only=True)
class _Folders(Checked):
    input: str = required_option("what is read", metavar="FOLDER")


@dataclass(frozen=True, kw_only=True)
class _Conversion(_Folders):
    output: str = required_option("must not exist", metavar="FOLDER")


@dataclass(frozen=True, kw_only=True)
class _FromBase(_Folders):
    pretrained_checkpoint: str | None = option(
        None, "base model: a folder, or ORG/NAME of the Hub (default: the one that the input names)", metavar="FOLDER"
    )

    @property
    def base(self) -> str | None:
        """The base model's folder. ConfigurationError: the Hub and its cache do not have it."""
        given = self.pretrained_checkpoint
        return given and local_model(given, "--pretrained-checkpoint")


@dataclass(frozen=True, kw_only=True)
class HfToMegatron(_Conversion):
    """convert a Hugging Face folder to a Megatron distributed checkpoint"""

    dtype: Dtype | None = option(None, "dtype of the weights (default: as stored)")
    make_vocab_size_divisible_by: int = option(
        128, "pad the rows of embedding and output layer to a multiple of N", check="positive"
    )

    def run(self) -> int:
        import torch

        from megatron_peft.conversion.convert import hf_to_megatron

        multiple, dtype = self.make_vocab_size_divisible_by, self.dtype and getattr(torch, self.dtype)
        folder = local_model(self.input, "--input")
        return _wrote(hf_to_megatron(folder, self.output, dtype=dtype, make_vocab_size_divisible_by=multiple))


@dataclass(frozen=True, kw_only=True)
class _WithCard(_FromBase, _Conversion):
    license: str | None = option(
        None, "license of the model card, like apache-2.0 (default: that of the base's card)", metavar="NAME"
    )


@dataclass(frozen=True, kw_only=True)
class _ToHuggingFace(_WithCard):
    dtype: Dtype | None = option(None, "dtype of the weights (default: as stored)")
    max_shard_size: str = option("5GB", "largest safetensors file", metavar="SIZE")

    conversion: ClassVar[str]

    def settings(self) -> dict[str, Any]:
        """Arguments of this conversion alone."""
        return {}

    def run(self) -> int:
        import torch

        from megatron_peft.conversion import convert
        from megatron_peft.conversion.writer import parse_bytes

        write = getattr(convert, self.conversion)
        size, dtype = parse_bytes(self.max_shard_size), self.dtype and getattr(torch, self.dtype)
        card = {"pretrained_checkpoint": self.base, "license": self.license, **self.settings()}
        return _wrote(write(self.input, self.output, dtype=dtype, max_shard_bytes=size, **card), self.input)


@dataclass(frozen=True, kw_only=True)
class MegatronToHf(_ToHuggingFace):
    """convert a Megatron checkpoint, or a run of full fine-tuning, to a Hugging Face folder"""

    conversion = "megatron_to_hf"


@dataclass(frozen=True, kw_only=True)
class Merge(_ToHuggingFace):
    """merge a run's adapters into their base and write a Hugging Face folder"""

    into: Literal["original", "trained-values"] = option(
        "original",
        "after a run with --base-precision: merge into the base's weights as they are, or into what they were rounded "
        "to while it trained",
    )

    num_tokens: int | None = _num_tokens()

    conversion = "merge"

    def settings(self) -> dict[str, Any]:
        return {"into": self.into, "num_tokens": self.num_tokens}


@dataclass(frozen=True, kw_only=True)
class ExportAdapter(_WithCard):
    """convert a run's adapters, or with --as-lora any run, to an adapter of HF PEFT"""

    as_lora: bool = option(False, "approximate the change of the weights by a LoRA, whatever the method, full included")
    tolerance: float | None = option(
        None,
        "with --as-lora: the smallest rank whose relative Frobenius error is at most X, in each module (default: 0.05)",
        check="positive",
    )
    max_rank: int | None = option(None, "with --as-lora: largest rank (default: 256)", check="positive")
    num_tokens: int | None = _num_tokens()
    gguf: bool = option(False, "also write adapter.gguf in the folder, by llama.cpp's own converter, in float32")
    engine_python: Path | None = _engine_python(needs="gguf")

    def run(self) -> int:
        names = ("tolerance", "max_rank", "num_tokens")
        limits: dict[str, Any] = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        of_lora = [flag(name) for name in limits if name != "num_tokens"]
        require(self.as_lora or not of_lora, f"{', '.join(of_lora)}: give --as-lora too, or leave it out.")
        card: dict[str, Any] = {"pretrained_checkpoint": self.base, "license": self.license}
        from megatron_peft.conversion.peft_export import export_adapter, export_as_lora
        from megatron_peft.serving.engine import LlamaCpp
        from megatron_peft.serving.served import base_of_adapter

        export = export_as_lora if self.as_lora else export_adapter
        with LlamaCpp(self.engine_python) if self.gguf else nullcontext() as converter:
            output = export(self.input, self.output, **card, **limits)
            if converter is None:
                return _wrote(output, self.input)
            try:
                file = converter.write_gguf(output, base_of_adapter(output, self.base))
            except ConfigurationError:
                shutil.rmtree(output)
                raise
        _wrote(output, self.input)
        print(f"\nllama.cpp:\n\nllama-server --model BASE.gguf --lora {shlex.quote(str(file.absolute()))}")
        return 0


@dataclass(frozen=True, kw_only=True)
class ImportAdapter(_FromBase, _Conversion):
    """convert an adapter of HF PEFT to a run's adapters, for --load"""

    def run(self) -> int:
        from megatron_peft.conversion.peft_import import import_adapter

        return _wrote(import_adapter(self.input, self.output, pretrained_checkpoint=self.base))


@dataclass(frozen=True, kw_only=True)
class Verify(_FromBase):
    """run two models on the same tokens and compare their logits"""

    reference: str | None = option(
        None,
        "the model to compare with (default, with --engine and an adapter: what HF PEFT computes, which reads the same "
        "alpha: a run alone shows a wrong one)",
        flags=("--reference", "--output"),
        metavar="FOLDER",
    )
    engine: Literal["vllm", "llama.cpp"] | None = option(
        None, "run --input in the engine that serves it, and list what the engine does not bind of an adapter"
    )
    engine_python: Path | None = _engine_python(needs="engine")
    binding_only: bool = option(False, "with --engine: only what it binds, which needs no weights", needs="engine")
    update_card: bool = option(
        False, "with --engine: the model card of --input tells what its engine was seen to do", needs="engine"
    )
    num_tokens: int = option(64, "tokens in each of two sequences", check="positive")
    per_layer: bool = option(False, "also print the difference after each layer")
    tolerance: float = option(
        1e-4,
        "exit with 1 if the difference divided by the largest logit is above X (with --engine: of log-probabilities)",
        check="not_negative",
    )

    def check(self, require: Requirements) -> None:
        require(self.engine is not None or self.reference is not None, "give --reference, the model to compare with.")

    def run(self) -> int:
        """Print the differences. Exit code 1 if the logits differ by more than the tolerance."""
        if self.engine is not None:
            return self._serve()
        from megatron_peft.conversion.verify import verify

        folders = local_model(self.input, "--input"), local_model(self.reference or "", "--reference")
        difference = verify(*folders, pretrained_checkpoint=self.base, num_tokens=self.num_tokens)
        if self.per_layer:
            for number, layer in enumerate(difference.layers):
                print(f"layer {number:3}: {layer}")
        close, original = difference.logits.relative <= self.tolerance, difference.on_original
        print(
            f"logits: {difference.logits} ({'at most' if close else 'above'} --tolerance {self.tolerance:g}); "
            f"largest logit {difference.logits.scale:.4g}; "
            f"same best token at {difference.same_best} of {difference.num_positions} positions"
        )
        if original is not None:  # either may have been merged
            close |= original.relative <= self.tolerance
            print(f"logits with the original weights of the base, not those that were trained on: {original}")
        return 0 if close else 1

    def _serve(self) -> int:
        from megatron_peft.serving.engine import Engine, LlamaCpp
        from megatron_peft.serving.served import check_served

        reference = None if self.reference is None else Path(local_model(self.reference, "--reference"))
        tolerance = None if self.binding_only else self.tolerance
        folder, kind = Path(local_model(self.input, "--input")), LlamaCpp if self.engine == "llama.cpp" else Engine
        tokens, card = self.num_tokens, self.update_card
        return check_served(self.engine_python, folder, self.base, reference, tokens, tolerance, kind, card)


COMMANDS: dict[str, Any] = {
    "hf-to-megatron": HfToMegatron,
    "megatron-to-hf": MegatronToHf,
    "merge": Merge,
    "export-adapter": ExportAdapter,
    "import-adapter": ImportAdapter,
    "verify": Verify,
}


def _wrote(output: Path, run: str = "") -> int:
    """Tell what was written; after a run's export the lines that serve it come last."""
    from megatron_peft.conversion.model_card import CARD, serving_lines

    print(f"wrote {output}")
    if (output / CARD).is_file():
        print(f"\n{serving_lines(output, run)}")
    return 0


def run(command: Any) -> int:
    """Exit code 1 if `verify` finds a difference above --tolerance."""
    tell_loading()
    return command.run()


main = Command("convert", __doc__, COMMANDS, run)
