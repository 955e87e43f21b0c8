"""What a user waits for with an empty hand imports nothing heavy: --help, wrong flags, a model's shape, a worker."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.time_limits import seconds

HEAVY = {"torch", "megatron.core", "transformers", "numpy"}
PARSE = "from megatron_peft.cli.parser import read_config; read_config"
# What is run, one after the other -> what it prints.
SHOWN = {
    "import megatron_peft.commands.train as tool; tool.main(['--help'])": "--lora-rank N",
    f"{PARSE}(['--num-experts', '8', '--wibble'], {{}})": "",
    f"{PARSE}('--pretrained-checkpoint m --train-data-path a.jsonl --train-iters 1'.split(), {{}})": "",
    "import megatron_peft.commands.convert as tool; tool.main(['--help'])": "hf-to-megatron",
    "import megatron_peft.commands.evaluate as tool; tool.main(['--help'])": "--num-fewshot N",
    "import megatron_peft.commands.evaluate as tool; tool.main('--tasks x --output x'.split())": "",
    "import megatron_peft.commands.generate as tool; tool.main(['--help'])": "--num-samples N",
    "import megatron_peft.commands.generate as tool; tool.main([])": "",
    "import megatron_peft.commands.bench as tool; tool.main(['nope'])": "",
    "import megatron_peft.commands.check_gpu as tool; tool.main(['nope'])": "",
    "import megatron_peft.commands.certify as tool; tool.main(['--help'])": "--world-size N",
    "import megatron_peft.commands.demo as tool; tool.main(['--nope'])": "",
    "import megatron_peft.commands.program as tool; tool.main(['bench', '--version'])": "megatron-core",
    "import megatron_peft.commands.program as tool; tool.main(['--version'])": "megatron-core",
    "import megatron_peft.commands.program as tool; tool.main(['--help'])": "data preview",
    "import megatron_peft.commands.data as tool; tool.prepare_data(['--help'])": "gsm8k",
    "import megatron_peft.commands.data as tool; tool.preview_data(['--help'])": "--show-samples N",
    "from megatron_peft.models.families import FAMILIES, family_of; [*map(family_of, FAMILIES)]": "",
    "import megatron_peft; print(megatron_peft.PeftConfig.__name__, dir(megatron_peft))": "add_adapters",
}
PROGRAM = f"""
import contextlib, io, sys, time
for code, shown in {SHOWN}.items():
    began, printed = time.process_time(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit, ValueError):
        exec(code)
    assert shown in printed.getvalue(), (code, printed.getvalue())
    assert not {HEAVY} & sys.modules.keys(), (code, {HEAVY} & sys.modules.keys())
    assert time.process_time() - began < {seconds(4)}, (code, "takes seconds; under 1 measured")
"""


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True)


def test_nothing_heavy_is_imported() -> None:
    done = run_python(PROGRAM)
    assert done.returncode == 0, done.stderr


LIBRARY_WARNINGS = [
    "Transformer Engine and Apex are not installed. Falling back to Torch optimizers.",
    "Apex is not installed. Falling back to Torch Norm",
    "full scope is deprecated. Use empty cuda_graph_scope to capture the whole layer.",
    "`torch.distributed.all_gather_into_tensor` is deprecated. Use another one.",
    "`torch.distributed.reduce_scatter_tensor` is deprecated. Use another one.",
    "The .grad attribute of a Tensor that is not a leaf Tensor is being accessed.",
]


QUIET = "import warnings, logging; from megatron_peft.cli.command import quiet_libraries; quiet_libraries()\n"


def test_warnings_of_libraries_that_ask_for_nothing_are_silent_in_commands_alone() -> None:
    """Also torch's on a node without GPUs."""
    warned = f"for message in {LIBRARY_WARNINGS}: warnings.warn(message)\n"
    logged = "logger = logging.getLogger('torch.utils.cpp_extension')\nlogger.warning('No CUDA runtime is found')\n"
    told = run_python(f"{QUIET}{warned}{logged}warnings.warn('another one'); logger.warning('another log')").stderr
    assert "another one" in told and "another log" in told and "CUDA" not in told
    assert not any(message in told for message in LIBRARY_WARNINGS)
    told = run_python(f"import megatron_peft, warnings\n{warned}").stderr
    assert all(message in told for message in LIBRARY_WARNINGS)


@pytest.mark.slow
@pytest.mark.parametrize(
    "module", ["evaluation.answers", "conversion.verify", "data.preprocess", "benchmarks.steps", "training.run"]
)
def test_a_command_starts_without_a_word_of_its_libraries(module: str) -> None:
    """Each is the first that its command imports."""
    assert run_python(f"{QUIET}import megatron_peft.{module}").stderr == ""
