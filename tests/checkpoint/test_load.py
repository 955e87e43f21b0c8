"""A resumed run equals the uninterrupted one, bit for bit; a damaged checkpoint is named, and an older one loaded."""

import math
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.dist_checkpointing import ShardedTensor

from megatron_peft.checkpoint import folders, load
from megatron_peft.checkpoint.load import load_checkpoint, load_trained_parameters
from megatron_peft.checkpoint.save import draft_checkpoint, write_new_folder
from megatron_peft.checkpoint.state import schedule_state, slices_of_range
from megatron_peft.checkpoint.tensors import load_parameters
from megatron_peft.config import CheckpointConfig, ConfigurationError, ParallelConfig, PeftConfig
from megatron_peft.conversion.megatron_files import open_distributed
from megatron_peft.runtime.launch import model_parallel, start_world, stop
from megatron_peft.training.update import rotation_learning_rate
from tests.checkpoint import rank_checks
from tests.checkpoint.rank_checks import (
    ON_FOUR,
    READ_ONCE,
    RESHARDED,
    RESUMED_ON_TWO,
    SLOWLY_RESHARDED,
    SLOWLY_RESUMED,
    resumed,
)
from tests.checkpoint.runs import LEFT_OUT, configure, differences, merged, start
from tests.conversion.megatron_folders import flip_a_byte, hold_nan
from tests.one_rank import one_rank
from tests.ranks import run_ranks


@pytest.mark.parametrize("name", RESUMED_ON_TWO)
def test_resumed_equals_uninterrupted(two_ranks, name):
    assert [facts["resumed"][name] for facts in two_ranks] == [[], []]


@pytest.mark.gpu("checkpoints")
@pytest.mark.slow
@pytest.mark.parametrize("way", ["saved at once", "--async-save"])
def test_resumed_equals_uninterrupted_alone(files, figure, way):
    """On any device, with kernels that give the same bits twice; cuBLAS's needs a variable that check-gpu sets."""
    model = {"transformer_impl": "local", "attention_backend": "unfused"}
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with one_rank(with_groups=False):
            differing = resumed(files, "hybrid", {"model": model}, way == "--async-save")
    finally:
        torch.use_deterministic_algorithms(False)
    figure(f"hybrid, {way}: what differs after a step", len(differing), 0, note=", ".join(differing)[:400])


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOWLY_RESUMED)
def test_resumed_equals_uninterrupted_elsewhere(two_slow_ranks, name):
    assert [facts["resumed"][name] for facts in two_slow_ranks] == [[], []]


@pytest.mark.parametrize("pair", RESHARDED, ids=" to ".join)
def test_another_layout_makes_the_same_checkpoint(two_ranks, pair):
    assert [facts["resharded"][pair] for facts in two_ranks] == [[], []]


@pytest.mark.slow
@pytest.mark.parametrize("pair", SLOWLY_RESHARDED, ids=" to ".join)
def test_more_layouts_make_the_same_checkpoint(two_slow_ranks, pair):
    assert [facts["resharded"][pair] for facts in two_slow_ranks] == [[], []]


def test_a_float32_run_takes_the_float32_copies_of_a_bf16_run(two_ranks):
    assert [facts["bf16 to float32"] for facts in two_ranks] == [[], []]


@pytest.mark.parametrize("pair", READ_ONCE, ids=" to ".join)
def test_a_byte_is_read_once_for_all_ranks_and_the_index_by_the_first(two_ranks, pair):
    read, stored, of_the_index = zip(*(facts["read once"][pair] for facts in two_ranks), strict=True)
    assert (sum(read), of_the_index) == (stored[0], (1, 0))


@pytest.mark.slow
@pytest.mark.parametrize("pair", ON_FOUR, ids=" to ".join)
def test_resumed_and_resharded_on_four_ranks(files, pair):
    assert run_ranks(4, rank_checks.on_four_ranks, (files, pair), limit=900) == [[]] * 4


def columns_that_were_read(folder: Path) -> list[float]:
    """Called on two replicas, of a parameter that is every other column of a matrix."""
    start_world()
    with model_parallel(ParallelConfig(world_size=2), seed=0):
        held = torch.arange(12.0).view(3, 4)[:, ::2]
        own = ShardedTensor.from_rank_offsets("w", held, replica_id=(0, 0, dist.get_rank()))
        write_new_folder([own], folder)
        held.zero_()
        load_parameters([own], folder)
    stop()
    return held.flatten().tolist()


def test_a_parameter_that_is_a_view_is_read_on_every_replica(tmp_path):
    found = run_ranks(2, columns_that_were_read, tmp_path / "new")
    assert found == [[0.0, 2.0, 4.0, 6.0, 8.0, 10.0]] * 2


def test_load_goes_back_with_a_warning_after_a_flipped_byte(two_ranks):
    assert [facts["gone back"]["iteration"] for facts in two_ranks] == [2, 2]
    (said,), on_the_second_rank = (facts["gone back"]["said"] for facts in two_ranks)
    assert "iter_0000003 is damaged: __1_0.distcp does not match its checksum" in said
    assert "FALLING BACK to" in said and "iter_0000002" in said and on_the_second_rank == []


@pytest.mark.parametrize(
    "asked, words",
    {
        "by name": ["iter_0000003 holds no whole checkpoint", "__1_0.distcp does not match"],
        "to score": ["__1_0.distcp does not match"],  # scoring takes no other checkpoint than the newest
        "none is whole": ["3 is damaged: __1_0.distcp", "2 is damaged: .metadata does not match", "from the beginning"],
    }.items(),
)
def test_the_damage_is_named_where_load_cannot_go_back(two_ranks, asked, words):
    for facts in two_ranks:
        message = facts["gone back"][asked]
        assert all(word in message for word in words), message


def test_a_flipped_byte_in_any_file_of_a_real_checkpoint_is_found(files, two_ranks, tmp_path):
    checkpoint = Path(shutil.copytree(Path(files.work, "lora-TP2", "iter_0000002"), tmp_path / "copy"))
    assert folders.damage(checkpoint) == [] and len(list(checkpoint.iterdir())) == 10
    for path in checkpoint.iterdir():
        before = path.read_bytes()
        flip_a_byte(path)
        (problem,) = folders.damage(checkpoint)
        assert problem.startswith(path.name)
        path.write_bytes(before)


def test_a_tracker_whose_checkpoint_is_missing_is_an_error(tmp_path):
    """The run would start over, and with --save in the same folder go on there."""
    assert load._candidates(tmp_path) == []
    (tmp_path / folders.TRACKER).write_text("12\n")
    with pytest.raises(ConfigurationError, match="holds no checkpoint .*, but its latest_.*names 12: .*--pretrained"):
        load._candidates(tmp_path)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.data())
def test_a_range_of_a_flattened_tensor_is_few_slices_in_order(shape, data):
    start = data.draw(st.integers(0, math.prod(shape)))
    end = data.draw(st.integers(start, math.prod(shape)))
    whole = torch.arange(math.prod(shape)).view(shape)
    position, found = start, list(slices_of_range(start, end, shape))
    for part in found:
        values = whole[tuple(slice(first, first + side) for first, side in zip(part.offset, part.shape, strict=True))]
        assert part.start == position
        position += math.prod(part.shape)
        assert values.flatten().tolist() == list(range(part.start, position))
    assert position == end
    assert len(found) <= 2 * len(shape) - 1


# What --load takes and refuses, and flags of --save, in a world of one; `test_load.py` loads at many layouts.


@pytest.fixture(scope="module")
def run(files):
    """Starts a run of LoRA+ with settings by group of the configuration."""

    def begin(disturbed=True, **settings):
        return start(configure(files, merged({"peft": {"lora_plus_ratio": 4.0}}, settings)), disturbed)

    with one_rank(with_groups=False):
        yield begin


@pytest.fixture(scope="module")
def folder(run, tmp_path_factory):
    """With a checkpoint of --lr 5e-3 after two of three steps."""
    folder = str(tmp_path_factory.mktemp("load_alone"))
    trained = run(checkpoint={"save": folder}, disturbed=False)
    trained.train(2)
    draft_checkpoint(trained.state).complete()
    return folder


@pytest.fixture(scope="module")
def loaded(run, folder):
    def load(optimizer=None, **flags):
        found = run(checkpoint={"load": folder, **flags}, optimizer=optimizer or {})
        assert load_checkpoint(found.state)
        return found

    return load


@pytest.fixture(scope="module")
def whole(loaded):
    """All that a run has after it was resumed."""
    return loaded().snapshot()


def kinds(names):
    """What kind of things differ: 'exp_avg decoder...' -> 'exp_avg'; parameters give 'parameter'."""
    return {name.partition(" ")[0] if " " in name else "parameter" for name in names}


GENERATORS, OPTIMIZER = {"torch", "python", "numpy"}, {"exp_avg", "exp_avg_sq", "steps", "rate"}


@pytest.mark.parametrize(
    "flag, differing, position",
    [
        ("finetune", OPTIMIZER | GENERATORS, (0, 0)),
        ("no_load_optim", OPTIMIZER, (2, 8)),
        ("no_load_rng", GENERATORS, (2, 8)),
    ],
    ids=["finetune", "no_load_optim", "no_load_rng"],
)
def test_flags_leave_their_part_out(whole, loaded, flag, differing, position):
    found = loaded(**{flag: True})
    assert kinds(differences(whole, found.snapshot())) == differing
    assert (found.state.position.iteration, found.state.position.consumed_samples) == position


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"peft": {"lora_rank": 8}}, ["--lora-rank 4", "--lora-rank 8"]),
        ({"peft": {"target_modules": ("linear_qkv",)}}, ["linear_fc2 (16 layers)", "--peft-target-modules linear_qkv"]),
        ({"optimizer": {"optimizer": "sgd"}}, ["--optimizer adam", "--optimizer sgd", "--no-load-optim"]),
        ({"model": {"pretrained_checkpoint": "other"}}, ["bases/base", "bases/other", "(model.safetensors)"]),
    ],
    ids=["rank", "layers", "optimizer", "base of the same shape"],
)
def test_another_run_is_refused_before_anything_changes(run, folder, settings, words):
    other = run(checkpoint={"load": folder}, **settings)
    before = other.snapshot()
    with pytest.raises(ConfigurationError) as error:
        load_checkpoint(other.state)
    assert all(word in str(error.value) for word in words), error.value
    assert differences(before, other.snapshot()) == []


@pytest.mark.parametrize(
    "flag, highest",
    [("use_checkpoint_opt_param_scheduler", 5e-3), ("override_opt_param_scheduler", 1e-3)],
    ids=["stored", "own"],
)
def test_the_rate_of_B_is_four_times_that_of_either_schedule(loaded, flag, highest):
    """After two of three steps of a cosine a quarter of the rate is left."""
    state = loaded(optimizer={"lr": 1e-3, flag: True}).state
    assert sorted(group["lr"] for group in state.optimizer.param_groups) == pytest.approx([highest / 4, highest])
    assert state.lr == highest, "of which a rotation's share in lambda is taken"


def test_a_rotations_own_rate_stays_what_it_is_with_the_checkpoints_schedule():
    """It is a number of its own, no multiple of --lr."""
    peft = PeftConfig("hybrid", peft_lr_rotation=1e-4)  # which is also this run's --lr, by default
    groups: list[dict[str, Any]] = [{"max_lr": rate, "min_lr": 0.0} for rate in (1e-4, 1e-4, 3e-4)]
    groups[1] |= {one.attribute: True for one in peft.spec.param_groups if one.is_labelled}
    optimizer = SimpleNamespace(decoupled_lr=3e-4, use_checkpoint_opt_param_scheduler=True)
    schedule = SimpleNamespace(**OWN, num_steps=0, state_dict=dict, step=lambda _: None)
    schedule.load_state_dict = lambda stored: vars(schedule).update(max_lr=stored["max_lr"], min_lr=stored["min_lr"])
    config = SimpleNamespace(peft=peft, optimizer=optimizer)
    state: Any = SimpleNamespace(schedule=schedule, config=config, optimizer=SimpleNamespace(param_groups=groups))
    load._load_schedule(state, {**OWN, "max_lr": 2e-3, "min_lr": 2e-4})
    assert [group["max_lr"] for group in groups] == [2e-3, 1e-4, 3e-4]
    assert [group["min_lr"] for group in groups] == pytest.approx([2e-4, 1e-5, 0.0])


OWN: dict[str, Any] = {"max_lr": 1e-4, "min_lr": 0.0, **LEFT_OUT}


def test_the_last_phase_of_wsd_is_the_checkpoints_with_its_schedule(run, tmp_path):
    """After two of three steps of four samples; the next run's phase is another, and then its style is."""
    wsd = {"lr": 1.0, "lr_decay_style": "WSD", "lr_wsd_decay_iters": 2, "lr_wsd_decay_style": "linear"}
    trained = run(checkpoint={"save": str(tmp_path)}, optimizer=wsd, disturbed=False)
    trained.train(2)
    draft_checkpoint(trained.state).complete()
    for changed in {"lr_wsd_decay_iters": 1, "lr_wsd_decay_style": "cosine"}, {"lr_decay_style": "linear"}:
        settings = {**wsd, **changed, "use_checkpoint_opt_param_scheduler": True}
        if "lr_decay_style" in changed:
            del settings["lr_wsd_decay_iters"]
        found = run(checkpoint={"load": str(tmp_path)}, optimizer=settings).state
        assert load_checkpoint(found)
        assert found.optimizer.param_groups[0]["lr"] == pytest.approx(0.5)
        assert schedule_state(found.schedule) == schedule_state(trained.state.schedule)


def test_a_resumed_run_may_change_the_rate_of_rotations_unless_it_takes_the_checkpoints_schedule(run, tmp_path):
    def boft(rate, **settings):
        peft = {"method": "boft", "boft_block_size": 2, "boft_factors": 2, "peft_lr_rotation": rate}
        return run(
            peft=peft, optimizer={"lr_decay_style": "constant", **settings.pop("optimizer", {})}, **settings
        ).state

    draft_checkpoint(boft(1e-3, checkpoint={"save": str(tmp_path)})).complete()
    resumed = boft(5e-4, checkpoint={"load": str(tmp_path)})
    assert load_checkpoint(resumed)
    assert rotation_learning_rate(resumed) == 5e-4
    stored = {"checkpoint": {"load": str(tmp_path)}, "optimizer": {"use_checkpoint_opt_param_scheduler": True}}
    with pytest.raises(
        ConfigurationError, match="with --peft-lr-rotation 0.001, which is kept with --use-ch.* has 0.0005"
    ):
        load_checkpoint(boft(5e-4, **stored))
    same = boft(1e-3, **stored)
    assert load_checkpoint(same) and rotation_learning_rate(same) == 1e-3


@pytest.mark.parametrize("key", ["decoder.layers.0.mlp.linear_fc2.adapter.A", "optimizer.exp_avg."])
def test_a_value_that_is_not_finite_is_named_with_its_file(key, run, folder, tmp_path):
    spoilt = Path(shutil.copytree(folder, tmp_path / "spoilt"))
    path = hold_nan(next(spoilt.glob("iter_*")), key)
    with pytest.raises(ConfigurationError, match=rf"{path} holds NaN or infinities in {key}.*has diverged: give one"):
        load_checkpoint(run(checkpoint={"load": str(spoilt)}).state)


def test_only_the_save_folder_may_be_without_a_checkpoint(run, tmp_path):
    """The same command starts a run and resumes it; anything else is a typo."""
    new, named = str(tmp_path / "new"), str(tmp_path / "new" / "iter_0000099")
    begun = run(checkpoint={"load": new, "save": new})
    assert load_checkpoint(begun.state) is None
    nothing = {"load": str(tmp_path / "nothing")}
    for asked in (nothing, nothing | {"save": new}, {"load": named, "save": new}, {"load": named, "save": named}):
        begun.state.config = replace(begun.state.config, checkpoint=CheckpointConfig(**asked))
        with pytest.raises(ConfigurationError, match=f"^--load {asked['load']} holds no checkpoint: give"):
            load_checkpoint(begun.state)


def test_trained_parameters_for_inference(run, whole, folder):
    bare, fewer = run(), run(peft={"target_modules": ("linear_qkv",)})
    record = load_trained_parameters(bare.chunks, folder)
    assert "parameter" not in kinds(differences(whole, bare.snapshot()))
    assert (record.config.peft.lora_rank, record.position["iteration"]) == (4, 2)
    with pytest.raises(ConfigurationError, match="holds 24 parameters that this run does not have"):
        load_trained_parameters(fewer.chunks, folder)


def test_adapters_only_without_the_optimizer_whose_parameters_can_be_taken(run, tmp_path, monkeypatch, caplog):
    """Each checkpoint has its own description of the adapters; the one beside them may fail."""
    monkeypatch.setattr(folders, "write_atomically", mock.Mock(side_effect=OSError("no space")))
    saved = run(checkpoint={"save": str(tmp_path), "no_save_optim": True, "no_save_rng": True})
    draft_checkpoint(saved.state).complete()
    assert f"{tmp_path}/adapter_config.json cannot be written: no space" in caplog.text
    assert [path.parent.name for path in tmp_path.rglob("adapter_config.json")] == ["iter_0000000"]
    keys = list(open_distributed(next(tmp_path.glob("iter_*"))))
    assert len(keys) == 4 * 4 * 2  # layers, linear layers, A and B
    assert all(key.endswith((".adapter.A", ".adapter.B")) for key in keys)
    with pytest.raises(ConfigurationError, match="--no-save-optim"):
        load_checkpoint(run(checkpoint={"load": str(tmp_path)}).state)
    assert load_checkpoint(run(checkpoint={"load": str(tmp_path), "no_load_optim": True}).state)
