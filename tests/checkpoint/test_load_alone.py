"""What --load takes and refuses, and flags of --save, in a world of one; `test_load.py` loads at many layouts."""

import pytest

from megatron_peft.checkpoint.load import load_checkpoint, load_trained_parameters
from megatron_peft.checkpoint.save import draft_checkpoint
from megatron_peft.config import ConfigurationError
from megatron_peft.conversion.megatron_files import open_distributed
from tests.checkpoint.runs import configure, differences, merged, start
from tests.one_rank import one_rank


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


@pytest.fixture
def loaded(run, folder):
    def load(optimizer=None, **flags):
        found = run(checkpoint={"load": folder, **flags}, optimizer=optimizer or {})
        assert load_checkpoint(found.state)
        return found

    return load


def kinds(names):
    """What kind of things differ: 'exp_avg decoder...' -> 'exp_avg'; parameters give 'parameter'."""
    return {name.partition(" ")[0] if " " in name else "parameter" for name in names}


GENERATORS = {"torch", "python", "numpy"}
OPTIMIZER = {"exp_avg", "exp_avg_sq", "steps", "rate"}


@pytest.mark.parametrize(
    "flag, differing, position",
    [
        ("finetune", OPTIMIZER | GENERATORS, (0, 0)),
        ("no_load_optim", OPTIMIZER, (2, 8)),
        ("no_load_rng", GENERATORS, (2, 8)),
    ],
    ids=["finetune", "no_load_optim", "no_load_rng"],
)
def test_flags_leave_their_part_out(loaded, flag, differing, position):
    whole, found = loaded().snapshot(), loaded(**{flag: True})
    assert kinds(differences(whole, found.snapshot())) == differing
    assert (found.state.position.iteration, found.state.position.consumed_samples) == position


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"peft": {"lora_rank": 8}}, ["--lora-rank 4", "--lora-rank 8"]),
        (
            {"peft": {"target_modules": ("linear_qkv",)}},
            ["linear_fc2 (16 layers)", "--peft-target-modules linear_qkv"],
        ),
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
def test_whichever_rate_is_taken_that_of_B_is_four_times_as_high(loaded, flag, highest):
    """After two of three steps of a cosine a quarter of the rate is left."""
    state = loaded(optimizer={"lr": 1e-3, flag: True}).state
    assert sorted(group["lr"] for group in state.optimizer.param_groups) == pytest.approx([highest / 4, highest])


def test_a_folder_without_a_checkpoint_starts_from_the_beginning(run, tmp_path):
    assert load_checkpoint(run(checkpoint={"load": str(tmp_path / "nothing")}).state) is False


def test_trained_parameters_for_inference(run, loaded, folder):
    bare, fewer = run(), run(peft={"target_modules": ("linear_qkv",)})
    record = load_trained_parameters(bare.chunks, folder)
    assert "parameter" not in kinds(differences(loaded().snapshot(), bare.snapshot()))
    assert (record.config.peft.lora_rank, record.position["iteration"]) == (4, 2)
    with pytest.raises(ConfigurationError, match="holds 24 parameters that this run does not have"):
        load_trained_parameters(fewer.chunks, folder)


def test_adapters_only_without_the_optimizer_whose_parameters_can_be_taken(run, tmp_path):
    draft_checkpoint(
        run(checkpoint={"save": str(tmp_path), "no_save_optim": True, "no_save_rng": True}).state
    ).complete()
    keys = list(open_distributed(next(tmp_path.glob("iter_*"))))
    assert len(keys) == 4 * 4 * 2  # layers, linear layers, A and B
    assert all(key.endswith((".adapter.A", ".adapter.B")) for key in keys)
    with pytest.raises(ConfigurationError, match="--no-save-optim"):
        load_checkpoint(run(checkpoint={"load": str(tmp_path)}).state)
    assert load_checkpoint(run(checkpoint={"load": str(tmp_path), "no_load_optim": True}).state)
