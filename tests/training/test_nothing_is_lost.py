"""A user's files are never replaced, and a run that could not train, or would mix ranks up, does not start."""

import dataclasses
import gc
import json
import os
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_peft.adapters.blocks import HeldBlocks
from megatron_peft.checkpoint import state
from megatron_peft.config import CheckpointConfig, ConfigurationError, LoggingConfig
from megatron_peft.runtime.launch import start_world, stop_model_parallel
from megatron_peft.training import loop
from megatron_peft.training import run as finetune_module
from megatron_peft.training.metrics import METRICS_FILE, read_metrics
from megatron_peft.training.run import finetune
from megatron_peft.training.step import NonFiniteError
from tests.data.tiny_tokenizers import save_tokenizer
from tests.ranks import run_ranks
from tests.tiny_llama import save_llama
from tests.training.layout_runs import Job


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def saved(run, tmp_path_factory) -> Path:
    """Two --save folders: `elsewhere`, and `run` with a copy of it inside."""
    folder = tmp_path_factory.mktemp("saved")
    for name in ("run", "elsewhere"):
        run(checkpoint={"save": str(folder / name)}, num_steps=2)
    shutil.copytree(folder / "elsewhere", folder / "run" / "inner")
    return folder


TAKEN = "--save .*run already holds the checkpoints of a run .*iter_0000002"


@pytest.mark.parametrize(
    ("load", "told"),
    [
        ({}, TAKEN),
        ({"load": "elsewhere"}, TAKEN),
        ({"load": "run", "finetune": True}, TAKEN),
        ({"load": "run/inner"}, TAKEN),
        ({"load": "run/iter_0000099"}, "--load .*run/iter_0000099 holds no checkpoint"),
        ({"load": "run/nothing"}, "--load .*run/nothing holds no checkpoint"),
    ],
    ids=["new", "from another", "finetune", "from one inside", "no such iteration", "no such folder"],
)
def test_a_new_run_is_refused_where_another_has_saved(run, saved, tmp_path, load, told):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    before = contents(tmp_path / "run")
    settings = load | {"load": str(tmp_path / load["load"])} if load else {}
    with pytest.raises(ConfigurationError, match=told):
        run(checkpoint={"save": str(tmp_path / "run"), **settings}, peft={"method": "full"})
    assert contents(tmp_path / "run") == before


def test_a_run_may_go_on_from_an_iteration_of_its_own(run, saved, tmp_path):
    save = shutil.copytree(saved / "run", tmp_path / "run")
    run(checkpoint={"save": str(save), "load": str(save / "iter_0000002")}, num_steps=2)


def test_the_records_of_a_run_that_never_saved_are_kept(run, tmp_path):
    (tmp_path / METRICS_FILE).write_text('{"iteration": 1, "loss": 2.5}\n')
    run(checkpoint={"save": str(tmp_path)}, num_steps=2)
    assert (tmp_path / "metrics.1.jsonl").read_text() == '{"iteration": 1, "loss": 2.5}\n'
    assert [record["iteration"] for record in read_metrics(tmp_path / METRICS_FILE)] == [1, 2]


def test_a_run_longer_than_the_checkpoints_schedule_is_refused(run, tmp_path):
    run(checkpoint={"save": str(tmp_path)}, num_steps=2)
    longer = {"checkpoint": {"save": str(tmp_path), "load": str(tmp_path)}, "num_steps": 4}
    with pytest.raises(ConfigurationError, match="a learning rate of 0 after 2 iterations, but this run has 4"):
        run(optimizer={"use_checkpoint_opt_param_scheduler": True}, **longer)
    run(optimizer={"override_opt_param_scheduler": True}, **longer)
    rates = [record["learning_rate"] for record in read_metrics(tmp_path / METRICS_FILE)]
    assert len(rates) == 4 and rates[2] > 0


@pytest.mark.parametrize("is_taken", [False, True])
def test_a_folder_that_is_moved_is_made_again_unless_another_run_has_it(run, tmp_path, monkeypatch, caplog, is_taken):
    save, other = tmp_path / "run", tmp_path / "other"
    run(checkpoint={"save": str(other)}, num_steps=3)
    step = loop.step.train_step

    def moves_the_folder(state, *arguments, **settings):
        if state.position.iteration == 1:
            save.rename(tmp_path / "moved")
            if is_taken:
                shutil.copytree(other, save)
        return step(state, *arguments, **settings)

    monkeypatch.setattr(loop.step, "train_step", moves_the_folder)
    settings = {"checkpoint": {"save": str(save), "save_interval": 1}, "num_steps": 3}
    if is_taken:
        with pytest.raises(ConfigurationError, match="another run has that folder now"):
            run(**settings)
        assert contents(save) == contents(other)
    else:
        run(**settings)
        assert {path.name for path in save.glob("iter_*")} == {"iter_0000002", "iter_0000003"}
        assert [record["iteration"] for record in read_metrics(save / METRICS_FILE)] == [2, 3]
        assert "metrics.jsonl was moved or removed during the run" in caplog.text
    kept = read_metrics(tmp_path / "moved" / METRICS_FILE)
    assert [record["iteration"] for record in kept] == ([1, 2] if is_taken else [1])


def test_what_a_resumed_run_changes_gives_a_warning(run, files, tmp_path, caplog):
    data = shutil.copy(files[1], tmp_path / "pairs.jsonl")
    settings = {"num_steps": 2, "data_settings": {"train_data_path": (str(data),)}}
    run(checkpoint={"save": str(tmp_path)}, **settings)
    run(checkpoint={"save": str(tmp_path), "load": str(tmp_path)}, **settings)
    assert "the run continues" not in caplog.text
    text = Path(data).read_text()
    Path(data).write_text(text.replace("1", "2", 1))
    settings["data_settings"] |= {"seed": 7, "vocab_size": 999}
    run(checkpoint={"save": str(tmp_path), "load": str(tmp_path)}, **settings)
    told = f"--seed 7 (before: 1234), other contents of --train-data-path {data} than before, "
    told += "another tokenizer or chat template than before"
    assert f"the run continues with {told}, at the old position" in caplog.text


def test_generators_of_another_kind_of_device_start_from_the_seed(run, tmp_path, monkeypatch, caplog):
    own = state.random_states

    def those_of_a_gpu():
        return {name: one[:16] if name.startswith(state.TRACKER) else one for name, one in own().items()}

    with monkeypatch.context() as patched:
        patched.setattr(state, "random_states", those_of_a_gpu)
        run(checkpoint={"save": str(tmp_path)}, num_steps=2)
    run(checkpoint={"save": str(tmp_path), "load": str(tmp_path)}, num_steps=2)
    assert "for this layout and device: they start from --seed" in caplog.text


def test_groups_of_runs_that_have_ended_leave_no_thread(run):
    def num_threads() -> int:
        gc.collect()
        return len(os.listdir("/proc/self/task"))

    run(num_steps=1)
    before = num_threads()
    for _ in range(2):
        run(num_steps=1)
    assert num_threads() == before


HYBRID = {"method": "hybrid", "lora_rank": 4, "lora_ga_batches": 2, "boft_block_size": 4, "boft_factors": 1}


@pytest.mark.parametrize("spoilt", [False, True])
def test_untrained_adapters_that_change_the_model_give_a_warning(run, monkeypatch, capsys, spoilt):
    if spoilt:
        build = finetune_module.build_state
        monkeypatch.setattr(finetune_module, "build_state", lambda *args: _with_ones(build(*args)))
    for peft in (HYBRID, {**HYBRID, "method": "boft"}):
        run(num_steps=1, peft=peft)
        told = "with untrained adapters the model's loss is" in capsys.readouterr().out
        assert told == spoilt


def _with_ones(state):
    for chunk in state.model_chunks:
        for parameter in chunk.parameters():
            if parameter.requires_grad:
                torch.nn.init.constant_(parameter, 0.05)
    return state


def test_a_half_of_the_hybrid_that_is_cut_off_is_named(run, monkeypatch, capsys):
    monkeypatch.setattr(HeldBlocks, "accumulate", lambda *args: None)
    run(num_steps=1, peft=HYBRID)
    said = capsys.readouterr().out
    assert "8 adapted layers have no gradient" in said and "linear_fc1 (its rotation)" in said
    assert "(its low rank)" not in said


@pytest.mark.parametrize("name", ["save", "load", "tensorboard_dir", "wandb_save_dir"])
def test_an_empty_folder_name_is_refused(name):
    section = CheckpointConfig if name in ("save", "load") else LoggingConfig
    with pytest.raises(ConfigurationError, match=f"--{name.replace('_', '-')} has an empty value"):
        section(**{name: ""})


def test_saving_into_the_folder_of_a_model_is_refused(run, tmp_path):
    (tmp_path / "adapter_config.json").write_text("of PEFT")
    for name in ("adapter_model.safetensors", "config.json"):
        (tmp_path / name).write_text("{}")
        with pytest.raises(ConfigurationError, match=f"--save {tmp_path} holds a model .*{name}.* give another --save"):
            run(checkpoint={"save": str(tmp_path)}, num_steps=1)
        assert {path.name for path in tmp_path.iterdir()} == {name, "adapter_config.json"}
        (tmp_path / name).unlink()
    run(checkpoint={"save": str(tmp_path)}, num_steps=1)
    (tmp_path / "config.json").write_text("{}")  # beside a run's checkpoints, where it is no base
    run(checkpoint={"save": str(tmp_path), "load": str(tmp_path)}, num_steps=1)


@pytest.mark.parametrize(
    ("method", "error", "told"),
    [
        ("lora", ConfigurationError, "the loss of --pretrained-checkpoint .*base is nan before anything is trained"),
        ("full", NonFiniteError, "iteration 1: the loss is NaN .*Nothing is trained yet: check the weights"),
    ],
)
def test_a_base_that_overflows_is_an_error(run, files, tmp_path, method, error, told):
    base = Path(shutil.copytree(files[0], tmp_path / "base"))
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"][:] = 3e38  # finite, as every weight must be
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(error, match=told):
        run(num_steps=1, peft={"method": method}, base=str(base))


DIFFERENT = {
    "flags": "rank 1 was started with --lr 0.25 (rank 0: 0.005): start all ranks with",
    "one of two seeds": "rank 1 was started with --seed 7 (rank 0: 1234): start all ranks with",
    "data": "the train data data.jsonl of rank 1 has other contents than that of rank 0",
    "base": "--pretrained-checkpoint base is another model on rank 1 than on rank 0 (model.safetensors): copy",
    "vocabulary": "--tokenizer-model words is another one on rank 1 than on rank 0 (its vocabulary): copy",
    "merges": "--tokenizer-model words is another one on rank 1 than on rank 0 (the ids of a text): copy",
}


def told_on_a_rank(asked: list[tuple[list[Job], Path]]) -> list[str]:
    """What each run says on this rank: with its own job, in its own folder."""
    start_world()
    rank = torch.distributed.get_rank()
    os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "GROUP_RANK": str(rank)}
    told = []
    for jobs, folder in asked:
        os.chdir(folder / str(rank))
        try:
            finetune(jobs[rank].config(2))
            told.append("nothing: it trained")
        except ConfigurationError as error:
            told.append(str(error))
        stop_model_parallel()
    return told


@pytest.fixture(scope="module")
def told(job, request, tmp_path_factory):
    """`told(differing)`: its folder, and what each of two ranks says. Those that were chosen share a world."""
    name = test_ranks_that_were_started_or_read_differently_do_not_train.__name__
    chosen = [item.callspec.params["differing"] for item in request.session.items if item.originalname == name]
    folders = {differing: tmp_path_factory.mktemp("ranks") for differing in chosen}

    @cache
    def all_told() -> list[list[str]]:
        return run_ranks(2, told_on_a_rank, [(differing_jobs(job, *one), one[1]) for one in folders.items()])

    return lambda differing: (folders[differing], [rank[chosen.index(differing)] for rank in all_told()])


def differing_jobs(job, differing: str, folder: Path) -> list[Job]:
    """Of each rank; where files differ they have one name and size, as node-local copies have."""
    own = job(parallel={"tensor_model_parallel_size": 2}, checkpoint={"save": str(folder / "run")})
    base = "base" if differing == "base" else "model"  # a process reads a folder's weights once
    data = Path(own.data).read_text()
    changed = data[: len(data) // 2] + data[len(data) // 2 :].replace("1", "2", 1)
    for rank in ("0", "1"):
        shutil.copytree(own.base, folder / rank / base, dirs_exist_ok=True)
        (folder / rank / "data.jsonl").write_text(changed if (rank, differing) == ("1", "data") else data)
        save_tokenizer(folder / rank / "words")
    if differing == "base":
        save_llama(folder / "1" / "base", num_hidden_layers=2, seed=1)
    words = folder / "1" / "words" / "tokenizer.json"
    described = json.loads(words.read_text())
    vocabulary, merges = described["model"]["vocab"], described["model"]["merges"]
    if differing == "vocabulary":
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    if differing == "merges":
        merges.reverse()
    words.write_text(json.dumps(described))
    own = dataclasses.replace(own, base=base, data="data.jsonl")
    if differing in ("vocabulary", "merges"):
        own.data_settings.update(tokenizer_type="HuggingFaceTokenizer", tokenizer_model="words", vocab_size=None)
    other = {"flags": {"optimizer": {"lr": 0.25}}, "one of two seeds": {"data_settings": {"seed": 7}}}
    return [own, dataclasses.replace(own, **other.get(differing, {}))]


@pytest.mark.parametrize("differing", DIFFERENT)
def test_ranks_that_were_started_or_read_differently_do_not_train(told, differing):
    folder, messages = told(differing)
    assert messages[0] == messages[1] and DIFFERENT[differing] in messages[0], messages[0]
    assert not list((folder / "run").glob("iter_*"))
    assert not (folder / "run").exists() or differing not in ("flags", "one of two seeds")
