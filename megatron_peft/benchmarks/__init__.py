"""The benchmarks and the lines of check-gpu by name. The code that measures, and torch, are imported later."""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

SIZES_VARIABLE = "MEGATRON_PEFT_CHECK_GPU"  # of the environment: which sizes the tests of check-gpu take


@dataclass(frozen=True)
class Benchmark:
    """An entry of benchmarks.toml, which explains the fields."""

    title: str
    measure: str
    model: str = ""
    shape: Mapping[str, Any] = field(default_factory=dict)
    setting: Mapping[str, Any] = field(default_factory=dict)
    layouts: Sequence[Mapping[str, Any]] = ({},)

    def figures(self, output: Path, model_135m: Path, turns: int) -> list[Any]:
        """Make the model if it is missing, and measure.

        Args: output: folder of the models with random weights; turns: of each step that is timed.
        """
        from megatron_peft.benchmarks.subjects import Setting, save_shape
        from megatron_peft.demo.data import prepare_model

        if self.model == "135M":
            prepare_model(model_135m, model_135m.parent / "downloads")
        elif self.model:
            save_shape(output / self.model, **self.shape)
        checkpoint = model_135m if self.model == "135M" else output / self.model
        module, _, function = self.measure.partition(":")
        measure = getattr(import_module(f"megatron_peft.benchmarks.{module}"), function)
        settings = (Setting(str(checkpoint), turns=turns, **self.setting, **layout) for layout in self.layouts)
        return [figure for setting in settings for figure in measure(setting)]


@dataclass(frozen=True)
class Line:
    """An entry of check_gpu.toml, which explains the fields."""

    title: str
    settles: Sequence[str] = ()


def _entries(name: str) -> dict[str, Any]:
    return tomllib.loads(Path(__file__).with_name(name).read_text(encoding="utf-8"))


BENCHMARKS = {name: Benchmark(**entry) for name, entry in _entries("benchmarks.toml").items()}
LINES = {name: Line(**entry) for name, entry in _entries("check_gpu.toml").items()}
