"""The benchmarks by name: what each measures on which model."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_peft.benchmarks.files import convert_figures, loading_figures, reading_figures, startup_figures
from megatron_peft.benchmarks.inference import (
    boft_generation_figures,
    generation_figures,
    harness_figures,
    logits_figures,
)
from megatron_peft.benchmarks.layers import boft_layer_figures, crossover_figures
from megatron_peft.benchmarks.measure import Figure
from megatron_peft.benchmarks.steps import (
    activations_figures,
    collectives_figures,
    hybrid_full_figures,
    layout_ratio_figures,
    lora_full_figures,
    lora_ga_start_figures,
    ratio_figures,
    rotation_figures,
)
from megatron_peft.benchmarks.subjects import Setting, save_shape
from megatron_peft.demo.data import prepare_model


@dataclass(frozen=True)
class Workplace:
    """Where models lie and how long to measure.

    Args:
        output: folder of the results and of the model with random weights.
        model: Hugging Face folder of the 135M model; made if it is missing.
        turns: of each step that is timed.
    """

    output: Path
    model: Path
    turns: int

    def random_8_layers(self) -> Setting:
        """8 layers, hidden 512, 4 x 256 tokens."""
        return Setting(str(save_shape(self.output / "llama-8x512")))

    def microbatches_of_512(self) -> Setting:
        """8 layers, hidden 512, 8 microbatches of 512 tokens."""
        return dataclasses.replace(self.random_8_layers(), rows=1, positions=512, microbatches=8)

    def random_2_wide_layers(self) -> Setting:
        """2 layers, hidden 2048, 2 microbatches of 512 tokens."""
        wide: Any = {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 2}
        checkpoint = save_shape(self.output / "llama-2x2048", **wide)
        return Setting(str(checkpoint), rows=1, positions=512, microbatches=2)

    def random_8_layers_in_files(self) -> Setting:
        """The same model in files of 20 MB."""
        return Setting(str(save_shape(self.output / "llama-8x512-files", max_file_size="20MB")))

    def pretrained_135m(self) -> Setting:
        """SmolLM2-135M-Instruct, 4 x 256 tokens."""
        return Setting(str(prepare_model(self.model, self.model.parent / "downloads")))


@dataclass(frozen=True)
class Benchmark:
    """A title for the table, and the function that measures."""

    title: str
    measure: Callable[[Workplace], list[Figure]]


BENCHMARKS = {
    "layout-ratios": Benchmark(
        "CPU seconds of a step over the frozen base's: 8 layers, hidden 512, rank 16, b 8, m 3, 4 x 256 tokens",
        lambda place: layout_ratio_figures(place.random_8_layers(), place.turns),
    ),
    "microbatch-ratios": Benchmark(
        "CPU seconds of a step over the frozen base's: 8 layers, hidden 512, rank 16, b 8, m 3, 8 times 512 tokens",
        lambda place: ratio_figures(place.microbatches_of_512(), place.turns),
    ),
    "wide-ratios": Benchmark(
        "CPU seconds of a step over the frozen base's: 2 layers, hidden 2048, rank 16, b 8, m 3, 2 times 512 tokens",
        lambda place: ratio_figures(place.random_2_wide_layers(), place.turns),
    ),
    "boft-layer": Benchmark(
        "A layer of BOFT, b 8, m 3, 2048 x 2048, 1024 tokens, forward and backward",
        lambda place: boft_layer_figures(place.turns),
    ),
    "activations": Benchmark(
        "What autograd keeps for backward: 8 layers, hidden 512, rank 16, b 8, m 3, 4 x 256 tokens",
        lambda place: activations_figures(place.random_8_layers()),
    ),
    "collectives": Benchmark(
        "Collectives of a LoRA and a Hybrid step: 8 layers, hidden 512, rank 16, 4 x 256 tokens",
        lambda place: collectives_figures(place.random_8_layers()),
    ),
    "lora-full": Benchmark(
        "Steps of the 135M model, 4 x 256 tokens, one process: CPU seconds and peak memory",
        lambda place: lora_full_figures(place.pretrained_135m(), place.turns),
    ),
    "hybrid-full": Benchmark(
        "The Hybrid and full fine-tuning of the 135M model, 4 x 256 tokens: CPU seconds and peak memory",
        lambda place: hybrid_full_figures(place.pretrained_135m(), place.turns),
    ),
    "rotations": Benchmark(
        "Steps of BOFT and uRNN, the 135M model, 4 x 256 tokens: CPU seconds",
        lambda place: rotation_figures(place.pretrained_135m(), place.turns),
    ),
    "lora-ga-start": Benchmark(
        "LoRA-GA's start on the 135M model, batches of 4 x 256 tokens",
        lambda place: lora_ga_start_figures(place.pretrained_135m()),
    ),
    "logits": Benchmark(
        "Logits of the 135M model against transformers'",
        lambda place: logits_figures(dataclasses.replace(place.pretrained_135m(), rows=2, positions=96)),
    ),
    "loading": Benchmark(
        "Loading the 135M model",
        lambda place: loading_figures(dataclasses.replace(place.pretrained_135m(), tensor_parallel=3)),
    ),
    "reading": Benchmark(
        "What ranks read to load a model: 8 layers, hidden 512, files of 20 MB",
        lambda place: reading_figures(place.random_8_layers_in_files()),
    ),
    "convert": Benchmark(
        "Loading and converting the 135M model beside plain safetensors",
        lambda place: convert_figures(Path(place.pretrained_135m().checkpoint), place.output / "convert"),
    ),
    "urnn-crossover": Benchmark(
        "A uRNN layer's rotation by dense blocks and by Fourier transforms: 4096 features, 1024 tokens",
        lambda place: crossover_figures(place.turns),
    ),
    "generation": Benchmark(
        "Greedy answers of the 135M model, their scores and their speed beside transformers'",
        lambda place: generation_figures(place.pretrained_135m(), place.turns),
    ),
    "boft-generation": Benchmark(
        "Generation with BOFT, b 8, m 3, beside the base's: 8 layers, hidden 512, one prompt",
        lambda place: boft_generation_figures(place.random_8_layers(), place.turns),
    ),
    "harness": Benchmark(
        "The shipped tasks on the 135M model: our backend of lm-eval beside its own, item by item",
        lambda place: harness_figures(
            place.pretrained_135m().checkpoint, place.output / "harness", place.model.parent / "downloads"
        ),
    ),
    "startup": Benchmark(
        "pretrain_peft.py on the 135M model, one process", lambda place: startup_figures(place.pretrained_135m())
    ),
}
