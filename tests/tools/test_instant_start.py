"""What a user waits for with an empty hand imports nothing heavy: --help, wrong flags, a model's shape, a worker."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.time_limits import seconds

HEAVY = {"torch", "megatron.core", "transformers", "numpy"}
NONE = "heavy:"
PARSE = "from megatron_peft.cli.parser import parse_arguments; parse_arguments"
PROGRAM = """
import contextlib, sys, time
with contextlib.suppress(SystemExit):
    {code}
assert time.process_time() < {limit}, "seconds; under 1 measured"
print("\\nheavy:", *sorted({heavy} & sys.modules.keys()))
"""


@pytest.mark.parametrize(
    ("code", "shown", "heavy"),
    [
        ("import tools.preview_data as tool; tool.main(['--help'])", "--sampled-records N", NONE),
        (f"{PARSE}(['--help'])", "--lora-rank N", NONE),
        (f"{PARSE}(['--num-experts', '8', '--wibble'], {{}})", "", NONE),
        (f"{PARSE}('--pretrained-checkpoint m --train-data-path a.jsonl --train-iters 1'.split(), {{}})", "", NONE),
        ("import tools.convert as tool; tool.main(['--help'])", "hf-to-megatron", NONE),
        ("import tools.evaluate as tool; tool.main(['--help'])", "--num-fewshot N", NONE),
        ("import tools.generate as tool; tool.main(['--help'])", "--num-samples N", NONE),
        ("from megatron_peft.models.families import FAMILIES, family_of; [*map(family_of, FAMILIES)]", "", NONE),
        ("import megatron_peft.data.documents", "", "heavy: numpy"),
    ],
)
def test_nothing_heavy_is_imported(code: str, shown: str, heavy: str) -> None:
    program = PROGRAM.format(code=code, heavy=HEAVY, limit=seconds(4))
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *answer, found = done.stdout.splitlines()
    assert found == heavy and shown in "\n".join(answer), done.stdout
