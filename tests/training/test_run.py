"""A run from its configuration to its checkpoint, and errors before anything is loaded."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_peft.config import ConfigurationError
from megatron_peft.models.kernels import COMPILED
from megatron_peft.runtime.launch import stop_model_parallel
from megatron_peft.training import run as module
from megatron_peft.training.metrics import METRICS_FILE, read_metrics
from megatron_peft.training.run import finetune
from tests.one_rank import one_rank
from tests.time_limits import seconds
from tests.tiny_llama import VOCAB_SIZE

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def world():
    with one_rank(with_groups=False):
        yield


@pytest.fixture
def run(job):
    """Fine-tune a job's configuration with changes of its groups; returns its records."""

    def fine_tuned(folder, **groups):
        checkpoint = {"save": str(folder), **groups.pop("checkpoint", {})}
        config = job(num_steps=6, checkpoint=checkpoint, logging={"log_interval": 1}, **groups).config(1)
        finetune(config)
        stop_model_parallel()
        return {record["iteration"]: record for record in read_metrics(folder / METRICS_FILE)}

    return fine_tuned


def test_a_resumed_run_equals_one_that_was_never_interrupted(run, tmp_path, capsys):
    whole = run(tmp_path / "whole")
    first = run(tmp_path / "parts", training={"exit_interval": 3})
    assert sorted(first) == [1, 2, 3]
    both = run(tmp_path / "parts", checkpoint={"load": str(tmp_path / "parts")})
    assert sorted(both) == [1, 2, 3, 4, 5, 6]
    for name in ("loss", "grad_norm", "learning_rate", "consumed_samples", "consumed_tokens", "epoch"):
        assert [record[name] for record in both.values()] == [record[name] for record in whole.values()], name
    assert both[6]["validation_loss"] == whole[6]["validation_loss"]
    said = capsys.readouterr().out
    assert "--exit-interval reached at iteration 3" in said and "trained 6 iterations" in said


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"model": {"shape_flags": {"num_layers": 3}}}, "--num-layers 3 .*2"),
        ({"data_settings": {"vocab_size": 1500}}, "the embedding of --pretrained-checkpoint"),
        ({"checkpoint": {"save": f"{__file__}/run"}}, r"^--save .*\.py/run cannot be written \(Not a directory\)"),
    ],
)
def test_contradictions_and_unwritable_folders_are_errors(job, groups, message):
    with pytest.raises(ConfigurationError, match=message):
        finetune(job(**groups).config(1))


def test_if_one_node_cannot_compile_no_rank_fuses_what_is_compiled(job, monkeypatch, capsys):
    """The fused loss makes two collectives, the unfused one three: ranks that differ would wait for one another."""
    states = []
    monkeypatch.setattr(module, "gather_over_world", lambda value: [value, "node7: no C compiler"])
    monkeypatch.setattr(module, "train", lambda state, *_: states.append(state) or "")
    finetune(job(model={"bf16": True}).config(1))
    assert not any(states[0].config.model.transformer[name] for name in COMPILED)
    assert capsys.readouterr().out.count("WARNING: Triton cannot compile (node7: no C compiler)") == 1


def torchrun(files, save, *flags):
    """(exit code, what was printed) of two tensor-parallel ranks."""
    base, data = files
    command = [
        *(sys.executable, *"-m torch.distributed.run --nproc-per-node 2 --standalone pretrain_peft.py".split()),
        *("--pretrained-checkpoint", base, "--train-data-path", data, "--valid-data-path", data, "--save", str(save)),
        *f"--tokenizer-type NullTokenizer --vocab-size {VOCAB_SIZE - 1} --seq-length 32 --log-interval 1".split(),
        *"--peft-method lora --lora-rank 4 --lr 5e-3 --train-iters 3 --micro-batch-size 2".split(),
        *"--global-batch-size 8 --tensor-model-parallel-size 2 --sequence-parallel".split(),
    ]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run([*command, *flags], cwd=ROOT, env=environment, **pipes, timeout=seconds(400))
    return done.returncode, done.stdout


@pytest.mark.slow
def test_the_command_line_trains_and_saves(files, tmp_path):
    exit_code, output = torchrun(files, tmp_path)
    assert exit_code == 0, output
    records = read_metrics(tmp_path / METRICS_FILE)
    assert [record["iteration"] for record in records] == [1, 2, 3]
    assert records[-1]["validation_loss"] < records[0]["loss"]
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "3\n"
    assert (tmp_path / "iter_0000003").is_dir() and output.count("trainable parameters:") == 1
    assert "core attention: torch's scaled_dot_product_attention (--attention-backend auto)\n" in output


@pytest.mark.slow
def test_the_command_line_refuses_with_one_message(files, tmp_path):
    """As `tests/runtime/test_failure.py` sees without torchrun."""
    exit_code, output = torchrun(files, tmp_path, "--peft-target-modules", "lm_head")
    assert exit_code != 0
    said = "pretrain_peft.py: error: --peft-target-modules lm_head matches no linear layer."
    lines = output.splitlines()  # torchrun's own report ends with it too
    assert sum(line.startswith(said) for line in lines) == 1, output
    assert "megatron_peft/training" not in output, "a traceback of ours"
