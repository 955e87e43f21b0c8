"""The benchmarks by name: what each measures on which model. The code that measures, and torch, are imported later."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Workplace:
    """Where models lie and how long to measure. Its methods make a model if it is missing, and return its `Setting`.

    Args:
        output: folder of the results and of the models with random weights.
        model: Hugging Face folder of the 135M model.
        turns: of each step that is timed.
    """

    output: Path
    model: Path
    turns: int

    @property
    def downloads(self) -> Path:
        """Where the demo keeps what it downloads."""
        return self.model.parent / "downloads"

    def random_8_layers(self, **changes: Any) -> Any:
        """8 layers, hidden 512, 4 x 256 tokens."""
        return self.random("llama-8x512", {}, **changes)

    def pretrained_135m(self, **changes: Any) -> Any:
        """SmolLM2-135M-Instruct, 4 x 256 tokens."""
        from megatron_peft.benchmarks.subjects import Setting
        from megatron_peft.demo.data import prepare_model

        return Setting(str(prepare_model(self.model, self.downloads)), **changes)

    def random(self, name: str, shape: Mapping[str, Any], **changes: Any) -> Any:
        """A model of random weights, with a shape that differs by this from 8 layers, hidden 512."""
        from megatron_peft.benchmarks.subjects import Setting, save_shape

        return Setting(str(save_shape(self.output / name, **shape)), **changes)


@dataclass(frozen=True)
class Benchmark:
    """A title for the table, and the function that measures: MODULE:FUNCTION of this room, and its arguments."""

    title: str
    function: str
    arguments: Callable[[Workplace], tuple[Any, ...]]

    def measure(self, place: Workplace) -> list[Any]:
        """Its figures."""
        module, _, function = self.function.partition(":")
        return getattr(import_module(f"megatron_peft.benchmarks.{module}"), function)(*self.arguments(place))


WIDE = {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 2}
BENCHMARKS = {
    "layout-ratios": Benchmark(
        "CPU seconds of a step over the frozen base's: 8 layers, hidden 512, rank 16, b 8, m 3, 4 x 256 tokens",
        "steps:layout_ratio_figures",
        lambda place: (place.random_8_layers(), place.turns),
    ),
    "microbatch-ratios": Benchmark(
        "CPU seconds of a step over the frozen base's: 8 layers, hidden 512, rank 16, b 8, m 3, 8 times 512 tokens",
        "steps:ratio_figures",
        lambda place: (place.random_8_layers(rows=1, positions=512, microbatches=8), place.turns),
    ),
    "wide-ratios": Benchmark(
        "CPU seconds of a step over the frozen base's: 2 layers, hidden 2048, rank 16, b 8, m 3, 2 times 512 tokens",
        "steps:ratio_figures",
        lambda place: (place.random("llama-2x2048", WIDE, rows=1, positions=512, microbatches=2), place.turns),
    ),
    "boft-layer": Benchmark(
        "A layer of BOFT, b 8, m 3, 2048 x 2048, 1024 tokens, forward and backward",
        "layers:boft_layer_figures",
        lambda place: (place.turns,),
    ),
    "activations": Benchmark(
        "What autograd keeps for backward: 8 layers, hidden 512, rank 16, b 8, m 3, 4 x 256 tokens",
        "steps:activations_figures",
        lambda place: (place.random_8_layers(),),
    ),
    "collectives": Benchmark(
        "Collectives of a LoRA and a Hybrid step: 8 layers, hidden 512, rank 16, 4 x 256 tokens",
        "steps:collectives_figures",
        lambda place: (place.random_8_layers(),),
    ),
    "lora-full": Benchmark(
        "Steps of the 135M model, 4 x 256 tokens, one process: CPU seconds and peak memory",
        "steps:lora_full_figures",
        lambda place: (place.pretrained_135m(), place.turns),
    ),
    "hybrid-full": Benchmark(
        "The Hybrid and full fine-tuning of the 135M model, 4 x 256 tokens: CPU seconds and peak memory",
        "steps:hybrid_full_figures",
        lambda place: (place.pretrained_135m(), place.turns),
    ),
    "rotations": Benchmark(
        "Steps of BOFT and uRNN, the 135M model, 4 x 256 tokens: CPU seconds",
        "steps:rotation_figures",
        lambda place: (place.pretrained_135m(), place.turns),
    ),
    "lora-ga-start": Benchmark(
        "LoRA-GA's start on the 135M model, batches of 4 x 256 tokens",
        "steps:lora_ga_start_figures",
        lambda place: (place.pretrained_135m(),),
    ),
    "logits": Benchmark(
        "Logits of the 135M model against transformers'",
        "inference:logits_figures",
        lambda place: (place.pretrained_135m(rows=2, positions=96),),
    ),
    "loading": Benchmark(
        "Loading the 135M model", "files:loading_figures", lambda place: (place.pretrained_135m(tensor_parallel=3),)
    ),
    "reading": Benchmark(
        "What ranks read to load a model: 8 layers, hidden 512, files of 20 MB",
        "files:reading_figures",
        lambda place: (place.random("llama-8x512-files", {"max_file_size": "20MB"}),),
    ),
    "convert": Benchmark(
        "Loading and converting the 135M model beside plain safetensors",
        "files:convert_figures",
        lambda place: (Path(place.pretrained_135m().checkpoint), place.output / "convert"),
    ),
    "urnn-crossover": Benchmark(
        "A uRNN layer's rotation by dense blocks and by Fourier transforms: 4096 features, 1024 tokens",
        "layers:crossover_figures",
        lambda place: (place.turns,),
    ),
    "generation": Benchmark(
        "Greedy answers of the 135M model, their scores and their speed beside transformers'",
        "inference:generation_figures",
        lambda place: (place.pretrained_135m(), place.turns),
    ),
    "boft-generation": Benchmark(
        "Generation with BOFT, b 8, m 3, beside the base's: 8 layers, hidden 512, one prompt",
        "inference:boft_generation_figures",
        lambda place: (place.random_8_layers(), place.turns),
    ),
    "harness": Benchmark(
        "The shipped tasks on the 135M model: our backend of lm-eval beside its own, item by item",
        "inference:harness_figures",
        lambda place: (place.pretrained_135m().checkpoint, place.output / "harness", place.downloads),
    ),
    "startup": Benchmark(
        "pretrain_peft.py on the 135M model, one process",
        "files:startup_figures",
        lambda place: (place.pretrained_135m(),),
    ),
}
