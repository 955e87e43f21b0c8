"""A run from its configuration to its checkpoint, and started again; errors before anything is loaded; signals."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from megatron_peft.checkpoint.folders import BEST, LOCK, TRACKER
from megatron_peft.checkpoint.run_record import read_run_record
from megatron_peft.config import METHODS, CheckpointConfig, ConfigurationError, PeftConfig
from megatron_peft.data.batches import GlobalBatches
from megatron_peft.models.kernels import COMPILED
from megatron_peft.runtime.launch import stop_model_parallel
from megatron_peft.training import loop, terminal
from megatron_peft.training import run as module
from megatron_peft.training.metrics import METRICS_FILE, read_metrics
from megatron_peft.training.run import finetune
from tests.time_limits import seconds, wait_until
from tests.tiny_llama import VOCAB_SIZE
from tests.training.layout_runs import run_each

ROOT = Path(__file__).resolve().parents[2]
FLAGS = (
    f"--tokenizer-type NullTokenizer --vocab-size {VOCAB_SIZE - 1} --seq-length 32 --global-batch-size 8 "
    "--tensor-model-parallel-size 2 --lr 5e-3 --log-interval 1"
)


@pytest.fixture
def run(run, capsys):
    """Returns what was printed."""

    def fine_tuned(**fields):
        run(**fields)
        return capsys.readouterr().out

    return fine_tuned


def test_a_resumed_run_equals_one_that_was_never_interrupted_and_says_what_is_left(run, tmp_path):
    def save(name):
        return {"save": str(tmp_path / name), "resume": "auto"}

    def records(name):
        return {record["iteration"]: record for record in read_metrics(tmp_path / name / METRICS_FILE)}

    told = run(checkpoint=save("whole"), num_steps=6)
    assert "resumed from" not in told and "without --save" not in told
    run(checkpoint=save("parts"), training={"micro_batch_size": 8, "exit_interval": 3}, num_steps=6)
    assert sorted(records("parts")) == [1, 2, 3]
    told = run(checkpoint=save("parts"), num_steps=6)
    place = f"{tmp_path}/parts/iter_0000003: iteration 3 of 6, 24 samples (epoch 0.60); 3 iterations left"
    assert f"resumed from {place}\n" in told and "trained 3 iterations (4 to 6): the run is complete\n" in told
    whole, parts = records("whole"), records("parts")
    assert sorted(parts) == sorted(whole) == [1, 2, 3, 4, 5, 6]
    for name in ("loss", "grad_norm", "learning_rate", "consumed_samples", "consumed_tokens", "epoch"):
        assert [record[name] for record in parts.values()] == [record[name] for record in whole.values()], name
    assert parts[6]["validation_loss"] == whole[6]["validation_loss"]
    told = run(checkpoint=save("parts"), num_steps=6)
    assert "nothing to do: the run was complete at iteration 6; to train longer, raise its length and add" in told
    told = run(checkpoint={"load": str(tmp_path / "parts"), "finetune": True})
    assert f"the parameters of {tmp_path}/parts/iter_0000006 (--finetune): the run starts at iteration 0 of 4" in told
    assert "\nWARNING: without --save nothing that this run trains is saved: give --save FOLDER to keep it\n" in told


def test_if_one_node_cannot_compile_no_rank_fuses_what_is_compiled(run, monkeypatch):
    """The fused loss makes two collectives, the unfused one three: ranks that differ would wait for one another."""
    states = []
    monkeypatch.setattr(module, "gather_over_world", lambda value: [value, "node7: no C compiler"])
    monkeypatch.setattr(module, "train", lambda state, *_: states.append(state) or "")
    printed = run(model={"bf16": True})
    assert not any(states[0].config.model.transformer[name] for name in COMPILED)
    assert printed.count("WARNING: Triton cannot compile (node7: no C compiler)") == 1


def test_a_large_batch_is_one_of_the_samples_in_its_packs(run, monkeypatch):
    monkeypatch.setattr(module, "train", lambda *_: "")
    monkeypatch.setattr(terminal, "LARGE_BATCH", 9)
    assert "samples: large batches" not in run()
    printed = run(data_settings={"pack_sequences": True})
    told = re.search(r"WARNING: --global-batch-size 8 is (\d+) samples: large", printed)
    assert told is not None and int(told[1]) > 8


@pytest.mark.slow
def test_the_command_line_trains_and_saves_or_refuses_with_one_message(files, tmp_path):
    """On two ranks of torchrun; `tests/runtime/test_failure.py` sees the message without it."""
    base, data = files
    command = [
        *(sys.executable, *"-m torch.distributed.run --nproc-per-node 2 --standalone pretrain_peft.py".split()),
        *("--pretrained-checkpoint", base, "--train-data-path", data, "--valid-data-path", data),
        *("--save", str(tmp_path), *FLAGS.split(), *"--train-iters 3 --sequence-parallel".split()),
    ]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    run = partial(subprocess.run, cwd=ROOT, env=environment, **pipes, timeout=seconds(400))
    refused = run([*command, "--peft-target-modules", "lm_head"])
    said = "pretrain_peft.py: error: --peft-target-modules lm_head matches no linear layer."
    assert refused.returncode != 0 and "megatron_peft/training" not in refused.stdout, "a traceback of ours"
    told = [line for line in refused.stdout.splitlines() if line.startswith(said)]
    assert len(told) == 1, refused.stdout  # torchrun's own report ends with it too
    done = run(command)
    assert done.returncode == 0, done.stdout
    records = read_metrics(tmp_path / METRICS_FILE)
    assert [record["iteration"] for record in records] == [1, 2, 3]
    assert records[-1]["validation_loss"] < records[0]["loss"]
    assert (tmp_path / TRACKER).read_text() == "3\n"
    assert (tmp_path / "iter_0000003").is_dir() and done.stdout.count("trainable parameters:") == 1
    assert "core attention: torch's scaled_dot_product_attention (--attention-backend auto)\n" in done.stdout


@pytest.mark.parametrize("error", [ConfigurationError("bad data"), KeyboardInterrupt()], ids=["refused", "Ctrl-C"])
@pytest.mark.parametrize("existing", ["none", "empty", "log.txt"])
def test_a_run_that_ends_in_its_start_leaves_its_folder_as_it_was(run, tmp_path, monkeypatch, error, existing):
    save = tmp_path / "runs" / "first"
    if existing != "none":
        save.mkdir(parents=True)
    if existing == "log.txt":
        (save / existing).touch()
    before = sorted(tmp_path.rglob("*"))

    def fails(*_: object) -> None:
        assert (save / LOCK).is_file()
        raise error

    monkeypatch.setattr(module, "data_of_rank", fails)
    with pytest.raises(type(error)):
        run(checkpoint={"save": str(save)})
    assert sorted(tmp_path.rglob("*")) == before


def test_a_run_reports_each_phase_of_its_start(run, monkeypatch):
    monkeypatch.setattr(module, "train", lambda *_: "")
    lines = run().splitlines()
    assert lines[0] == "reading the data"
    assert any(line.startswith("building the model and reading the weights of ") for line in lines)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"optimizer": {"lr": 1e-3}}, "was trained with another schedule .--lr: 0.005 there, 0.001 here"),
        ({"num_steps": 9}, "--train-iters 4, .* this run has --train-iters 9: .* add --override-opt-param-scheduler.$"),
        ({"peft": {"method": "full"}}, "--peft-method lora, but this run has --peft-method full"),
        ({"peft": {"lora_rank": 8}}, "--lora-rank 4, but this run has --lora-rank 8"),
        ({"logging": {"wandb_project": "p", "wandb_exp_name": "e"}}, "--wandb-project needs the package wandb"),
        ({"model": {"shape_flags": {"num_layers": 3}}}, "--num-layers 3 .*2"),
        ({"data_settings": {"vocab_size": 1500}}, "the embedding of --pretrained-checkpoint"),
        ({"checkpoint": {"save": f"{__file__}/run"}}, r"^--save .*\.py/run cannot be written \(Not a directory\)"),
    ],
    ids=["schedule", "length", "method", "rank", "wandb", "shape", "vocabulary", "no folder"],
)
def test_contradictions_are_errors_before_weights_are_read(run, finished, monkeypatch, groups, message):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr(module.gpt, "build_model_chunks", lambda *_: pytest.fail("the model is built"))
    with pytest.raises(ConfigurationError, match=message):
        run(**{"checkpoint": {"load": finished}, **groups})


@pytest.fixture(scope="module")
def finished(job, world, tmp_path_factory):
    """The --save folder of a run of four steps."""
    folder = str(tmp_path_factory.mktemp("finished"))
    finetune(job(num_steps=4, checkpoint={"save": folder}).config(1))
    stop_model_parallel()
    return folder


def test_a_validation_that_a_signal_ends_is_made_up_for_when_the_run_resumes(run, files, tmp_path, monkeypatch):
    """A run that is told to stop in every fourth batch of validation, until it is done, equals one that never is."""
    groups = {"data_settings": {"test_data_path": (files[1],)}, "logging": {"log_interval": 1}}
    groups["training"] = {"eval_interval": 2, "eval_iters": None, "early_stopping_patience": 3}

    def save(name):
        return {"save": str(tmp_path / name), "resume": "auto", "keep_best": True}

    told = run(checkpoint=save("undisturbed"), **groups)
    assert "test loss at iteration 4: " in told
    step_at, built = GlobalBatches.step_at, []

    def signals(self, first):
        if self.end is not None and built.append(first) is None and len(built) % 8 == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return step_at(self, first)

    monkeypatch.setattr(GlobalBatches, "step_at", signals)
    found = [run(checkpoint=save("interrupted"), **groups) for _ in range(4)]
    ends = ["asked to stop at iteration 2", "asked to stop at iteration 4", "nothing to do", "nothing to do"]
    assert all(end in one for end, one in zip(ends, found, strict=True)), found
    assert "test loss at iteration 4: not measured, since the run was asked to stop" in found[2]
    for line in (-3, -1):  # the test loss, and the lowest validation loss
        assert found[3].splitlines()[line].replace("interrupted", "undisturbed") == told.splitlines()[line]

    def kept(name):
        lines = read_metrics(tmp_path / name / METRICS_FILE)
        by_iteration = {line["iteration"]: {} for line in lines}
        for line in lines:
            by_iteration[line["iteration"]] |= line
        names = ("loss", "validation_loss", "epoch")
        figures = [{name: line.get(name) for name in names} for line in by_iteration.values()]
        return figures, read_run_record(tmp_path / name).best, (tmp_path / name / BEST).readlink()

    assert kept("interrupted") == kept("undisturbed")


def test_a_run_file_that_cannot_be_written_is_a_clear_error(tmp_path):
    with pytest.raises(ConfigurationError, match=r"run.yaml cannot be written \(.*\): .* another --save folder"):
        module._write_run_file(tmp_path / "gone" / "run.yaml", "lr: 1\n")


def test_a_damaged_record_is_left_to_the_load_which_goes_back(run, tmp_path):
    save = {"save": str(tmp_path), "save_interval": 2}
    run(checkpoint=save)
    (tmp_path / "iter_0000004" / "run_record.json").write_text("{")
    assert f"resumed from {tmp_path}/iter_0000002" in run(checkpoint={**save, "load": str(tmp_path)})


def test_resume_auto_starts_then_resumes_and_says_which(run, finished, tmp_path):
    """With --load --finetune the run begins from another one's parameters, once."""
    auto = {"save": str(tmp_path / "run"), "resume": "auto", "load": finished, "finetune": True}
    told = run(checkpoint=auto, training={"exit_interval": 3})
    assert f"loaded the parameters of {finished}/iter_0000004 (--finetune)" in told
    assert f"resumed from {tmp_path}/run/iter_0000003: iteration 3 of 4" in run(checkpoint=auto)
    assert "nothing to do" in run(checkpoint={"save": auto["save"], "resume": "auto"})
    told = run(checkpoint={"save": str(tmp_path / "new"), "resume": "auto"})
    assert f"--resume auto: --save {tmp_path}/new holds no checkpoint, so a new run starts\n" in told
    own = (
        f"^--save {tmp_path}/new \\(--resume auto\\) was trained with --lora-rank 4, .*: give --lora-rank 4, or another"
    )
    with pytest.raises(ConfigurationError, match=f"{own} --save.$"):
        run(checkpoint={"save": str(tmp_path / "new"), "resume": "auto"}, peft={"lora_rank": 8})


def test_resume_auto_never_starts_over_in_place_of_a_run_whose_checkpoint_is_lost(run, tmp_path):
    (tmp_path / TRACKER).write_text("40\n")
    with pytest.raises(ConfigurationError, match="holds no checkpoint of a run, but its latest_.* names 40"):
        run(checkpoint={"save": str(tmp_path), "resume": "auto"})
    with pytest.raises(ConfigurationError, match="--resume auto needs --save"):
        CheckpointConfig(resume="auto")


@pytest.mark.parametrize(
    ("groups", "flag"),
    [
        ({"training": {"early_stopping_patience": 2}}, "--early-stopping-patience 2"),
        ({"checkpoint": {"keep_best": True, "save": "runs"}}, "--keep-best"),
        ({"logging": {"log_validation_items": True}, "checkpoint": {"save": "runs"}}, "--log-validation-items"),
    ],
)
@pytest.mark.parametrize("without", [{"data_settings": {"valid_data_path": ()}}, {"training": {"eval_iters": 0}}])
def test_flags_that_need_a_validation_loss_say_so(job, groups, flag, without):
    merged = {key: {**groups.get(key, {}), **without.get(key, {})} for key in {*groups, *without}}
    with pytest.raises(ConfigurationError, match=f"^{flag} needs a validation loss: give --valid-data-path"):
        job(**merged).config(1)


def test_losses_of_validation_samples_need_a_folder(job):
    with pytest.raises(ConfigurationError, match="--log-validation-items writes to the folder of --save: give one"):
        job(logging={"log_validation_items": True}).config(1)


def test_the_best_checkpoint_is_kept_and_can_be_loaded(run, tmp_path, monkeypatch):
    losses, train = {2: 2.0, 4: 3.0, 6: 4.0}, module.train

    def with_known_losses(state, *rest):
        monkeypatch.setattr(loop.step, "validation_loss", lambda *_: losses[state.position.iteration])
        return train(state, *rest)

    monkeypatch.setattr(module, "train", with_known_losses)
    save = {"save": str(tmp_path), "save_interval": 1, "keep_last_checkpoints": 1, "keep_best": True}
    settings = {"num_steps": 6, "training": {"eval_interval": 2, "early_stopping_patience": 2}}
    told = run(checkpoint=save, **{**settings, "training": {**settings["training"], "exit_interval": 5}})
    lowest = f"lowest validation loss 2.000000E+00 at iteration 2: {tmp_path}/best"
    assert f"--exit-interval reached at iteration 5\n{lowest}\n" in f"{told}\n"
    assert os.readlink(tmp_path / BEST) == "iter_0000002"
    assert {path.name for path in tmp_path.glob("iter_*")} == {"iter_0000002", "iter_0000005"}
    record = read_run_record(tmp_path)
    assert record.longest_sample == 21, "not --seq-length"
    assert dataclasses.astuple(record.best) == (2.0, 2, 1, False)
    told = run(checkpoint={**save, "load": str(tmp_path)}, **settings)
    assert "stopped early at iteration 6: 2 validation losses without a lower one" in told
    again = {**save, "load": str(tmp_path)}
    assert "nothing to do: the run was complete at iteration 6" in run(checkpoint=again, **settings)
    told = run(checkpoint={**save, "load": str(tmp_path / BEST)}, num_steps=6, training={"exit_interval": 3})
    assert f"resumed from {tmp_path}/best: iteration 2 of 6" in told


def test_the_base_is_recorded_by_its_absolute_path(run, files, tmp_path, monkeypatch):
    monkeypatch.chdir(Path(files[0]).parent)
    run(num_steps=1, checkpoint={"save": str(tmp_path)}, base="base")
    record = json.loads((tmp_path / "iter_0000001" / "run_record.json").read_text())
    told = json.loads((tmp_path / "adapter_config.json").read_text())
    assert record["config"]["model"]["pretrained_checkpoint"] == told["base_model_name_or_path"] == files[0]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_launcher_saves_and_ends_all_ranks(files, tmp_path, number):
    """One line, the exit code, no orphan."""
    paths = ["--pretrained-checkpoint", files[0], "--train-data-path", files[1], "--save", tmp_path / "run"]
    program = [sys.executable, *"-m megatron_peft train --nproc-per-node 2 --train-iters 100000".split()]
    output = tmp_path / "output"
    with output.open("w") as file:
        launcher = subprocess.Popen([*program, *FLAGS.split(), *paths], cwd=ROOT, stdout=file, stderr=file)
    wait_until(lambda: re.search(r"iteration +3", output.read_text()) or launcher.poll() is not None, "a third step")
    launcher.send_signal(number)
    assert launcher.wait(seconds(120)) == 128 + number, output.read_text()
    told = [line for line in output.read_text().splitlines() if number.name in line]
    if number == signal.SIGINT:  # SIGTERM is what a launcher sends after a failure too
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


# Flags of other methods have no effect: a run with all of them set is the same, bit for bit, as one without.

# Values that a method would act on, of every field of PeftConfig but the method and its targets.
OTHERS = {
    "lora_rank": 3, "lora_alpha": 7.0, "lora_dropout": 0.5, "lora_rs": True, "lora_plus_ratio": 4.0,
    "lora_max_norm_ratio": 1e-4, "lora_ga_batches": 2, "lora_ga_init": "paper", "rotation_side": "input",
    "peft_lr_rotation": 0.5, "boft_block_size": 4, "boft_factors": 1, "boft_parametrization": "projection",
    "urnn_block_size": 8, "urnn_update": "riemannian", "urnn_mode": "replace", "hybrid_rotation": "urnn",
    "hybrid_lambda": "raw", "hybrid_lambda_init": 0.3, "hybrid_lambda_ema": 0.1, "hybrid_lambda_min": 0.1,
    "hybrid_lambda_max": 0.7, "hybrid_merge_interval": 1,
}  # fmt: skip
OWN = {
    "full": {},
    "lora": {"lora_rank": 4},
    "lora-ga": {"lora_rank": 4, "lora_ga_batches": 1},
    "boft": {"boft_block_size": 2, "boft_factors": 2},
    "urnn": {"urnn_block_size": 4},
    "hybrid": {"lora_rank": 4, "lora_ga_batches": 1, "boft_block_size": 2, "boft_factors": 2},
}


def with_others(method: str) -> dict:
    read = METHODS[method].fields(PeftConfig(method))
    return {**OWN[method], **{name: value for name, value in OTHERS.items() if name not in read}}


@pytest.fixture(scope="module")
def curves(job, world):
    """Of a run of each method, as it is, and with all flags of others set."""
    peft = {method: {"method": method, **own} for method, own in OWN.items()}
    peft |= {f"{method} and others": {"method": method, **with_others(method)} for method in OWN}
    small = {"num_steps": 2, "training": {"global_batch_size": 4}}
    found = run_each([job(name=name, peft=settings, **small) for name, settings in peft.items()])
    return {name: report.curve for name, report in found.items()}


def test_every_flag_is_among_them():
    assert OTHERS.keys() == {one.name for one in dataclasses.fields(PeftConfig)} - {"method", "target_modules"}
    defaults = PeftConfig()
    assert all(getattr(defaults, name) != value for name, value in OTHERS.items())


@pytest.mark.parametrize("method", OWN)
def test_flags_of_other_methods_have_no_effect(curves, method):
    assert curves[f"{method} and others"] == curves[method]
    assert PeftConfig(method, **with_others(method)).unused_flags or method == "hybrid"
