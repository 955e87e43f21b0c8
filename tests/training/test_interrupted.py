"""Ctrl-C and SIGTERM under `megatron-peft train --nproc-per-node 2`: saved, one line, the exit code, no orphan."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_peft.checkpoint.folders import TRACKER
from tests.time_limits import seconds, wait_until
from tests.tiny_llama import VOCAB_SIZE, save_llama, save_pairs

ROOT = Path(__file__).parents[2]
FLAGS = (
    f"--tokenizer-type NullTokenizer --vocab-size {VOCAB_SIZE - 1} --seq-length 24 --global-batch-size 2 "
    "--tensor-model-parallel-size 2 --train-iters 100000 --lr 1e-3 --log-interval 1"
)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_launcher_saves_and_ends_all_ranks(tmp_path, number):
    model, data = save_llama(tmp_path / "base", num_hidden_layers=2), save_pairs(tmp_path / "pairs.jsonl")
    paths = ["--pretrained-checkpoint", model, "--train-data-path", data, "--save", tmp_path / "run"]
    program = [sys.executable, "-m", "megatron_peft", "train", "--nproc-per-node", "2"]
    output = tmp_path / "output"
    with output.open("w") as file:
        launcher = subprocess.Popen([*program, *FLAGS.split(), *paths], cwd=ROOT, stdout=file, stderr=file)
    wait_until(lambda: re.search(r"iteration +3", output.read_text()) or launcher.poll() is not None, "a third step")
    launcher.send_signal(number)
    assert launcher.wait(seconds(120)) == 128 + number, output.read_text()
    told = [line for line in output.read_text().splitlines() if number.name in line]
    if number == signal.SIGINT:  # SIGTERM is told of a second later, where the step still runs
        assert told[0] == f"{number.name}: ending after this step (Ctrl-\\ ends at once)", told
    assert not re.search("Traceback|death signal|closing signal", output.read_text()), output.read_text()
    saved, last = int((tmp_path / "run" / TRACKER).read_text()), re.findall(r"iteration +(\d+)", output.read_text())[-1]
    assert saved >= 3 and saved >= int(last)
    assert not _processes_that_name(str(tmp_path))


def _processes_that_name(path: str) -> list[str]:
    """Command lines, of Linux."""
    files = Path("/proc").glob("[0-9]*/cmdline")
    lines = [file.read_bytes().replace(b"\0", b" ").decode(errors="replace") for file in files if file.exists()]
    return [line for line in lines if path in line]
