"""What a user waits for with an empty hand imports nothing heavy: --help, wrong flags, a model's shape, a worker."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.time_limits import seconds

HEAVY = {"torch", "megatron.core", "transformers", "numpy"}
NONE = "heavy:"
PARSE = "from megatron_peft.cli.parser import read_config; read_config"
PROGRAM = """
import contextlib, sys, time
with contextlib.suppress(SystemExit, ValueError):
    {code}
assert time.process_time() < {limit}, "seconds; under 1 measured"
print("\\nheavy:", *sorted({heavy} & sys.modules.keys()))
"""


@pytest.mark.parametrize(
    ("code", "shown", "heavy"),
    [
        ("import megatron_peft.commands.train as tool; tool.main(['--help'])", "--lora-rank N", NONE),
        (f"{PARSE}(['--num-experts', '8', '--wibble'], {{}})", "", NONE),
        (f"{PARSE}('--pretrained-checkpoint m --train-data-path a.jsonl --train-iters 1'.split(), {{}})", "", NONE),
        ("import megatron_peft.commands.convert as tool; tool.main(['--help'])", "hf-to-megatron", NONE),
        ("import megatron_peft.commands.evaluate as tool; tool.main(['--help'])", "--num-fewshot N", NONE),
        ("import megatron_peft.commands.evaluate as tool; tool.main('--tasks x --output x'.split())", "", NONE),
        ("import megatron_peft.commands.generate as tool; tool.main(['--help'])", "--num-samples N", NONE),
        ("import megatron_peft.commands.generate as tool; tool.main([])", "", NONE),
        ("import megatron_peft.commands.bench as tool; tool.main(['nope'])", "", NONE),
        ("import megatron_peft.commands.check_gpu as tool; tool.main(['nope'])", "", NONE),
        ("import megatron_peft.commands.certify as tool; tool.main(['--help'])", "--world-size N", NONE),
        ("import megatron_peft.commands.demo as tool; tool.main(['--nope'])", "", NONE),
        ("import megatron_peft.commands.program as tool; tool.main(['bench', '--version'])", "megatron-core", NONE),
        ("import megatron_peft.commands.program as tool; tool.main(['--version'])", "megatron-core", NONE),
        ("import megatron_peft.commands.program as tool; tool.main(['--help'])", "data preview", NONE),
        ("from megatron_peft.models.families import FAMILIES, family_of; [*map(family_of, FAMILIES)]", "", NONE),
        ("import megatron_peft; print(megatron_peft.PeftConfig.__name__, dir(megatron_peft))", "add_adapters", NONE),
        ("import megatron_peft.commands.preprocess", "", NONE),
    ],
)
def test_nothing_heavy_is_imported(code: str, shown: str, heavy: str) -> None:
    program = PROGRAM.format(code=code, heavy=HEAVY, limit=seconds(4))
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *answer, found = done.stdout.splitlines()
    assert found == heavy and shown in "\n".join(answer), done.stdout


LIBRARY_WARNINGS = [
    "Transformer Engine and Apex are not installed. Falling back to Torch optimizers.",
    "Apex is not installed. Falling back to Torch Norm",
    "full scope is deprecated. Use empty cuda_graph_scope to capture the whole layer.",
    "`torch.distributed.all_gather_into_tensor` is deprecated. Use another one.",
    "`torch.distributed.reduce_scatter_tensor` is deprecated. Use another one.",
]


def answered(code: str) -> str:
    """What a process prints on stderr."""
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    return done.stderr


def test_warnings_of_libraries_that_ask_for_nothing_are_silent() -> None:
    messages = [*LIBRARY_WARNINGS, "another one"]
    told = answered(f"import megatron_peft, warnings\nfor message in {messages}: warnings.warn(message)")
    assert "another one" in told and not any(message in told for message in LIBRARY_WARNINGS)


def test_torch_is_silent_on_a_node_without_gpus() -> None:
    logged = "logger.warning('No CUDA runtime is found'); logger.warning('another one')"
    told = answered(f"import logging, megatron_peft; logger = logging.getLogger('torch.utils.cpp_extension'); {logged}")
    assert "another one" in told and "CUDA" not in told


@pytest.mark.slow
@pytest.mark.parametrize(
    "module", ["evaluation.answers", "conversion.verify", "commands.preprocess", "benchmarks.steps", "training.run"]
)
def test_a_command_starts_without_a_word_of_its_libraries(module: str) -> None:
    """Each is the first that its command imports."""
    assert answered(f"import megatron_peft.{module}") == ""
