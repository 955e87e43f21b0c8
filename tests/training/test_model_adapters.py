"""A GPTModel and a loop of the user's own, as docs/your-own-model.md has them, and what is refused there."""

import re
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module

from megatron_peft import ConfigurationError, ModelAdapters, PeftConfig, add_adapters
from megatron_peft.adapters.rotation import BlockRotation
from megatron_peft.config import ParallelConfig
from megatron_peft.runtime.launch import model_parallel, start_world, stop
from tests.one_rank import one_rank
from tests.ranks import run_ranks
from tests.tiny_gpt import tiny_gpt

LORA = {"method": "lora", "lora_rank": 4, "lora_alpha": 8.0}
GROUPS = {"boft_block_size": 4, "boft_factors": 2}
HYBRID = {"method": "hybrid", "lora_rank": 4, "lora_alpha": 8.0, **GROUPS}
OTHERS = {
    "lora": LORA,
    "lora-ga": {**LORA, "method": "lora-ga", "lora_ga_init": "paper", "lora_max_norm_ratio": 0.1},
    "lora+": {**LORA, "lora_plus_ratio": 2.0},
    "projected": {"method": "boft", **GROUPS, "boft_parametrization": "projection"},
    "input": {"method": "boft", **GROUPS, "rotation_side": "input"},
    "riemannian": {"method": "urnn", "urnn_block_size": 8, "urnn_update": "riemannian", "peft_lr_rotation": 0.1},
    "biased": {**HYBRID, "biased": True},
    "merging": {**HYBRID, "hybrid_merge_interval": 5},
}

PAGE = Path(__file__).parents[2] / "docs" / "your-own-model.md"
START, MODEL, LOOP, MEGATRON, CHECKPOINT = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.M | re.S)
PEFT = re.compile(r"megatron_peft\.PeftConfig\(.*\)")


def run_page(job: tuple[Path, Path | None, dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """What is measured, by method: the page as it is, and with the fields of other methods.

    The second folder is that of another layout, whose files are loaded too.
    """
    folder, other, methods = job
    names: dict[str, Any] = {"folder": str(folder), "other": other and str(other)}
    exec(START, names)
    found = {name: _trained(names, name, fields) for name, fields in methods.items()}
    found["megatron-core"] = _trained(names, "megatron-core", {})
    return found


def _trained(start: dict[str, Any], name: str, fields: dict[str, Any]) -> dict[str, Any]:
    """Train; then save, load after the adapters were spoilt (also by megatron-core itself), and merge."""
    names, by_schedule = {**start, "folder": str(Path(start["folder"], name))}, name == "megatron-core"
    exec(_model(fields), names)
    exec(LOOP.partition("losses = []")[0] + MEGATRON if by_schedule else LOOP, names)
    found = {"losses": names["losses"], "grad_norm": names["grad_norm"], "lambda": names["adapters"].mixtures}
    model, (save, load, merge) = names["model"], CHECKPOINT.splitlines()[-3:]
    trained = _logits(names)
    exec(save, names)
    with torch.no_grad():
        for parameter in names["adapters"].parameters():
            parameter.add_(0.5)
    spoilt = _logits(names)
    if by_schedule:
        own = names["adapters"].sharded_state_dict()
        model.load_state_dict(dist_checkpointing.load(own, names["folder"]), strict=False)
    else:
        exec(load, names)
    found["loaded"] = float((_logits(names) - trained).abs().max())
    found["spoilt"] = float((spoilt - trained).abs().max())
    found["loss"] = float(names["loss_of"](names["batches"][0]))
    if names["other"]:
        names["adapters"].load(Path(names["other"], name))
        found["loss of the other's"] = float(names["loss_of"](names["batches"][0]))
        exec(load, names)
    exec(merge, names)
    found["merged"] = float((_logits(names) - trained).abs().max())
    found["left"] = [name for name, _ in model.named_parameters() if "adapter" in name]
    return found


def _model(fields: dict[str, Any]) -> str:
    """The page's model with other fields of PeftConfig, if any; `biased`: one with biases and no gate."""
    code, fields = MODEL, dict(fields)
    if fields.pop("biased", False):
        code = code.replace("gated_linear_unit=True", "").replace("add_bias_linear=False", "")
        code = re.sub(r"^    ,\n|^    activation_func.*\n", "", code, flags=re.M)
    return PEFT.sub(f"megatron_peft.PeftConfig(**{fields!r})", code) if fields else code


def _logits(names: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return names["model"](names["batches"][0][:, :-1], names["positions"], None)


def pages(folder: Path, methods: Mapping[str, Any]) -> list[Any]:
    """What the page gives on one process and at TP2."""
    found = []
    for num_ranks, other in ((1, None), (2, folder / "1")):
        (folder / str(num_ranks)).mkdir()
        found.append(run_ranks(num_ranks, run_page, (folder / str(num_ranks), other, methods))[0])
    return found


def check(found: Any, name: str) -> None:
    alone, split = (one[name] for one in found)
    assert split["losses"] == pytest.approx(alone["losses"], rel=2e-5)
    assert split["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-2)
    assert split["loss of the other's"] == pytest.approx(alone["loss"], rel=1e-6)
    assert split["lambda"] == pytest.approx(alone["lambda"], rel=1e-3)
    assert alone["losses"][-1] < alone["losses"][1], "of the same batch"
    for one in (alone, split):
        assert one["loaded"] == 0 and one["spoilt"] > 0.01 and one["left"] == []
        assert one["merged"] < 2e-5


def test_the_page_trains_the_same_on_one_process_and_at_tp2(tmp_path):
    """Its Hybrid moves lambda, and megatron-core's optimizer trains alike."""
    found = pages(tmp_path, {"hybrid": {}})
    for name in ("hybrid", "megatron-core"):
        check(found, name)
        losses = found[0][name]["losses"]
        assert losses[-1] < losses[1] - 0.05
    for one in found:
        assert len(one["hybrid"]["lambda"]) == 8 and {*one["hybrid"]["lambda"].values()}.isdisjoint({0.5})
        assert one["megatron-core"]["losses"] == pytest.approx(one["hybrid"]["losses"], rel=1e-4)


@pytest.mark.slow
def test_every_kind_of_step_is_the_same_at_tp2(tmp_path):
    found = pages(tmp_path, OTHERS)
    for name in OTHERS:
        check(found, name)


@pytest.fixture(scope="module")
def world():
    with one_rank():
        yield


def own_model(**settings: Any) -> GPTModel:
    sizes: dict[str, Any] = {"num_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "ffn_hidden_size": 24}
    config = TransformerConfig(**{**sizes, **settings})
    return GPTModel(config, get_gpt_layer_local_spec(), vocab_size=32, max_sequence_length=8)


class FusedLinear(ColumnParallelLinear):
    """Another library's layer."""


def fused(model: GPTModel) -> GPTModel:
    model.decoder.layers[0].mlp.linear_fc1.__class__ = FusedLinear
    return model


def of_expert(model: GPTModel) -> GPTModel:
    layer: Any = model.decoder.layers[0]
    layer.mlp.linear_fc2.is_expert = True
    return model


def with_adapters(model: GPTModel) -> GPTModel:
    add_adapters(model, PeftConfig(lora_rank=2))
    return model


def wrapped(model: GPTModel) -> DistributedDataParallel:
    return DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)


def on_meta(model: GPTModel) -> GPTModel:
    return model.to("meta")


@pytest.mark.parametrize(
    ("change", "fields", "message"),
    [
        (fused, {}, "decoder.layers.0.mlp.linear_fc1 is a FusedLinear: .* get_gpt_layer_local_spec"),
        (of_expert, {}, "decoder.layers.0.mlp.linear_fc2 is an expert's RowParallelLinear"),
        (with_adapters, {}, "has adapters already"),
        (wrapped, {}, "wrapped in DistributedDataParallel: wrap it afterwards"),
        (on_meta, {}, "the model is on meta, but this rank trains on cpu"),
        (lambda model: torch.nn.Linear(2, 2), {}, "Linear has no TransformerLayer of megatron-core: pass a GPTModel"),
        (lambda model: model, {"method": "full"}, "method='full'.* has no adapters"),
        (
            lambda model: model,
            {"target_modules": ("q_proj",)},
            "q_proj matches no linear layer. There are linear_fc1, ",
        ),
        (lambda model: model, {"lora_rank": 17}, "--lora-rank 17 is above 16, the smaller side of"),
        (lambda model: model, {"method": "boft", "boft_factors": 5}, "--boft-block-size 8"),
    ],
)
def test_a_model_that_takes_no_adapters_is_refused_and_stays_as_it_was(world, change, fields, message):
    model = change(own_model())
    trainable = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(ConfigurationError, match=message):
        add_adapters(model, PeftConfig(**{"lora_rank": 2, **fields}))
    assert [parameter.requires_grad for parameter in model.parameters()] == trainable
    if change not in (with_adapters, wrapped, on_meta, of_expert, fused) and isinstance(model, GPTModel):
        assert len(add_adapters(model, PeftConfig(lora_rank=2)).names) == 4


QKV = "decoder.layers.0.self_attention.linear_qkv"


def test_targets_are_megatrons_names_or_those_that_the_model_is_given(world):
    """Layers that take no adapter may be left out, and our own models take part too."""
    for model, targets, names, count in (
        (fused(own_model()), ("linear_qkv", "linear_proj"), None, 2),
        (own_model(), ("query",), {"query": "linear_qkv"}, 1),
        (tiny_gpt(), ("q_proj", "down_proj"), None, 4),
    ):
        peft = PeftConfig(lora_rank=2, target_modules=targets)
        adapters = add_adapters(model, peft, huggingface_modules=names)
        assert len(adapters.names) == count and QKV in adapters.names


def test_a_field_that_the_method_does_not_read_is_named(world, capsys):
    add_adapters(own_model(), PeftConfig("lora", hybrid_merge_interval=3))
    assert "note: --hybrid-merge-interval 3 has no effect with --peft-method lora\n" in capsys.readouterr().out


@pytest.mark.parametrize("settings", [{}, {"add_bias_linear": False, "gated_linear_unit": True}])
def test_untrained_adapters_change_nothing(world, settings):
    model, tokens = own_model(hidden_dropout=0.0, attention_dropout=0.0, **settings), torch.arange(8)[None]
    before = model(tokens, tokens, None)
    keys = set(model.state_dict())
    add_adapters(model, PeftConfig(method="hybrid", lora_rank=2, boft_block_size=4, boft_factors=2))
    torch.testing.assert_close(model(tokens, tokens, None), before, rtol=0, atol=1e-6)
    assert keys < set(model.state_dict())


def gradients(model: GPTModel) -> dict[str, torch.Tensor]:
    tokens = torch.arange(8)[None]
    model.zero_grad()
    model(tokens, tokens, None, labels=tokens).sum().backward()
    return {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}


@pytest.mark.parametrize("make", [tiny_gpt, lambda: own_model(hidden_dropout=0.0, attention_dropout=0.0)])
def test_a_merged_model_trains_as_an_ordinary_one_and_so_does_what_is_unfrozen_beside_adapters(world, make):
    """Our models form the loss of a frozen output layer in chunks, and others' linear layers have biases."""
    model = make()
    expected = gradients(model)
    assert len(expected) == len([*model.parameters()])
    untargeted = add_adapters(model, PeftConfig(lora_rank=2, target_modules=("linear_fc1",)))
    for name, parameter in model.named_parameters():
        if name.endswith(("qkv.weight", "proj.weight", "fc2.weight", "output_layer.weight")):
            parameter.requires_grad_(True)
            torch.testing.assert_close(gradients(model)[name], expected[name])
            parameter.requires_grad_(False)
    untargeted.param_groups(1e-3)
    fc1 = model.decoder.layers[0].mlp.linear_fc1.weight.requires_grad_(True)
    with pytest.raises(ConfigurationError, match=r"^decoder.layers.0.mlp.linear_fc1: the weight .* gets no gradient"):
        untargeted.param_groups(1e-3)
    fc1.requires_grad_(False)
    untargeted.merge()
    torch.testing.assert_close(gradients(model.requires_grad_(True)), expected)


def test_a_start_from_means_is_that_of_their_mean_however_often_they_come(world):
    starts, tokens = [], torch.arange(8)[None]
    for count in (1, 4):
        model = tiny_gpt()
        adapters = add_adapters(model, PeftConfig("lora-ga", lora_rank=2, lora_ga_init="paper"))

        def replay(model=model, count=count):
            for _ in range(count):
                model(tokens, tokens, None, labels=tokens).mean().backward()

        adapters.start_from_gradients(replay, num_tokens=count)
        starts.append([parameter.detach() for parameter in adapters.parameters()])
    torch.testing.assert_close(*starts)


def stepped(adapters: ModelAdapters, optimizer: Any, **settings: Any) -> float:
    for parameter in adapters.parameters():
        parameter.grad = torch.ones_like(parameter)
    return adapters.step(optimizer, **settings)


def test_groups_have_the_rates_and_the_decay_of_the_method(world):
    peft = PeftConfig(method="hybrid", lora_rank=2, lora_plus_ratio=4.0, boft_block_size=4, boft_factors=2)
    adapters = add_adapters(model := own_model(), peft)
    model.decoder.final_layernorm.weight.requires_grad = True  # a vector is not decayed, as by Megatron
    groups = adapters.param_groups(lr=0.8, weight_decay=0.1)
    found = {(group["lr"], group["weight_decay"]): len(group["params"]) for group in groups}
    assert found == {(0.8, 0.1): 4, (3.2, 0.1): 4, (0.1, 0.0): 4, (0.8, 0.0): 1}


def test_clipping_is_by_the_norm_that_is_returned(world):
    adapters = add_adapters(own_model(), PeftConfig(lora_rank=2))
    optimizer = torch.optim.SGD(adapters.param_groups(lr=1.0))
    before = [parameter.detach().clone() for parameter in adapters.parameters()]
    norm = stepped(adapters, optimizer, clip_grad=2.0)
    assert norm == pytest.approx(sum(parameter.numel() for parameter in before) ** 0.5)
    moved = torch.cat([(a - b).flatten() for a, b in zip(before, adapters.parameters(), strict=True)])
    assert float(moved.norm()) == pytest.approx(2.0, rel=1e-4) and adapters.iteration == 1
    adapters.begin_step()
    assert all((parameter.grad == 0).all() for parameter in adapters.parameters())
    for parameter in adapters.parameters():  # as megatron-core's DistributedDataParallel has it
        parameter.main_grad = torch.ones_like(parameter)  # type: ignore[attr-defined]
    adapters.begin_step()
    for parameter in adapters.parameters():  # backward's own gradient is added to it, once
        assert parameter.grad is None and (parameter.main_grad == 0).all()  # type: ignore[attr-defined]


REFUSED = r"gradients are not complete, .*: call adapters.sum_gradients\(\) after the last"


def test_a_step_of_lora_is_refused_too_before_factors_of_every_rank_are_summed(world):
    adapters = add_adapters(own_model(), PeftConfig(lora_rank=2))
    optimizer = torch.optim.SGD(adapters.param_groups(lr=1.0))
    adapters.begin_step()
    with pytest.raises(ConfigurationError, match=REFUSED):
        adapters.step(optimizer)
    adapters.sum_gradients()
    adapters.step(optimizer)


def test_a_step_builds_blocks_once_and_is_refused_without_their_gradients(world):
    adapters = add_adapters(own_model(), PeftConfig(method="boft", boft_block_size=4, boft_factors=2))
    optimizer = torch.optim.SGD(adapters.param_groups(lr=1.0))
    rotations = [one for one in adapters.model_chunks[0].modules() if isinstance(one, BlockRotation)]
    adapters.begin_step()
    assert len(rotations) == 4 and all(one.held is not None for one in rotations)
    with pytest.raises(ConfigurationError, match=REFUSED):
        adapters.step(optimizer)
    adapters.sum_gradients()
    assert all(one.held is None for one in rotations) and adapters.step(optimizer) == 0


def test_an_optimizer_without_the_methods_groups_is_refused(world):
    adapters = add_adapters(own_model(), PeftConfig(lora_rank=2))
    with pytest.raises(ConfigurationError, match="make the optimizer of adapters.param_groups"):
        stepped(adapters, torch.optim.SGD(adapters.parameters()))
    with pytest.raises(ConfigurationError, match="learning rate is 0"):
        adapters.param_groups(lr=0)
    adapters.param_groups(lr=1.0)
    with pytest.raises(ConfigurationError, match="SimpleNamespace is not an optimizer of torch"):
        stepped(adapters, SimpleNamespace())
    with pytest.raises(ConfigurationError, match="--peft-method lora has no such start"):
        adapters.start_from_gradients(lambda: None)


def test_merges_into_weights_of_less_than_float32_are_refused_when_adapters_are_added(world):
    with pytest.raises(ConfigurationError, match="merges changes into weights, which must be float32, not torch.bfl"):
        add_adapters(own_model().bfloat16(), PeftConfig(**OTHERS["merging"]))


def test_adapters_are_added_after_float16module_which_rounds_rotations(world):
    peft, tokens = PeftConfig(**HYBRID), torch.arange(8)[None]
    model = own_model(bf16=True, params_dtype=torch.bfloat16)
    adapters, module = add_adapters(model, peft), Float16Module(model.config, model)
    with pytest.raises(ConfigurationError, match="float32, not torch.bfloat16: add the adapters after Float16Module"):
        adapters.begin_step()
    with pytest.raises(ConfigurationError, match="add the adapters after Float16Module"):
        adapters.start_from_gradients(lambda: None)
    with pytest.raises(ConfigurationError, match="add the adapters after Float16Module"):
        adapters.param_groups(lr=1.0)
    adapters.merge()
    adapters = add_adapters(model, peft)
    optimizer = torch.optim.SGD(adapters.param_groups(lr=1.0))
    adapters.begin_step()
    module(tokens, tokens, None).sum().backward()
    adapters.sum_gradients()
    assert adapters.step(optimizer) > 0


def test_replicas_and_late_gathers_are_refused_where_they_would_not_be_summed(world, monkeypatch):
    adapters = add_adapters(own_model(), PeftConfig(lora_rank=2))
    chunk = SimpleNamespace(ddp_config=SimpleNamespace(overlap_param_gather=True))
    monkeypatch.setattr("megatron_peft.training.model_adapters.DistributedDataParallel", SimpleNamespace)
    with pytest.raises(ConfigurationError, match="set overlap_param_gather=False"):
        adapters.finalize_model_grads([chunk])  # pyright: ignore[reportArgumentType]
    monkeypatch.setattr("megatron_peft.training.model_adapters.parallel_state.get_data_parallel_world_size", lambda: 2)
    for parameter in adapters.parameters():  # as DistributedDataParallel has it, which sums nothing by itself here
        parameter.main_grad = torch.ones_like(parameter)  # type: ignore[attr-defined]
    with pytest.raises(ConfigurationError, match="there are data-parallel replicas: wrap the model"):
        adapters.sum_gradients()


def test_an_optimizer_of_torch_is_refused_where_gradients_are_scattered(world):
    model = own_model()
    adapters = add_adapters(model, PeftConfig(lora_rank=2))
    settings = DistributedDataParallelConfig(use_distributed_optimizer=True)
    optimizer = torch.optim.SGD(adapters.param_groups(lr=1.0))
    adapters.finalize_model_grads([DistributedDataParallel(model.config, settings, model)])
    with pytest.raises(ConfigurationError, match="use megatron-core's get_megatron_optimizer, or use_distributed_opt"):
        adapters.step(optimizer)


@pytest.mark.parametrize("name", ["riemannian", "projected"])
def test_blocks_that_move_by_plain_gradients_are_refused_with_a_scaled_loss(world, name):
    adapters = add_adapters(own_model(), PeftConfig(**{**OTHERS[name], "urnn_block_size": 8}))
    for settings, told in ({"fp16": True}, "fp16=True"), ({"bf16": True, "loss_scale": 2.0}, "loss_scale=2.0"):
        scaled = OptimizerConfig(lr=1.0, **settings)
        with pytest.raises(ConfigurationError, match=rf"{told}\) they are multiplied by a loss scale: train in bf16"):
            adapters.config_overrides(scaled)
        assert add_adapters(own_model(), PeftConfig(**LORA)).config_overrides(scaled)
    assert adapters.config_overrides(OptimizerConfig(lr=1.0, bf16=True))


def loaded_after_a_forward(folder: Path) -> dict[int, list[float]]:
    """Called on two ranks: by TP, the losses of adapters, and of others that loaded them after a forward."""
    found, tokens, positions = {}, torch.arange(16)[None], torch.arange(15)[None]

    def loss_of(model: GPTModel) -> float:
        with torch.no_grad():
            return float(model(tokens[:, :-1], positions, None, labels=tokens[:, 1:]).sum())

    start_world()
    for size in (1, 2):
        with model_parallel(ParallelConfig(tensor_model_parallel_size=size, world_size=2), seed=0):
            models, peft = [tiny_gpt(), tiny_gpt()], PeftConfig("urnn", urnn_block_size=4)
            trained, other = (add_adapters(model, peft, seed=seed) for seed, model in enumerate(models))
            for parameter in trained.parameters():
                parameter.data += 0.3
            trained.save(folder / str(size))
            loss_of(models[1])
            other.load(folder / str(size))
            found[size] = [loss_of(model) for model in models]
    stop()
    return found


def test_what_an_earlier_forward_computed_is_not_kept_when_adapters_are_loaded(tmp_path):
    """Replicas and tensor-parallel ranks get theta_0 and Pi of uRNN by broadcast."""
    for found in run_ranks(2, loaded_after_a_forward, tmp_path):
        for trained, loaded in found.values():
            assert loaded == trained


def refused_by_one(_: Any) -> str:
    """Called on two ranks, of which the last unfreezes a weight: what a rank is told."""
    start_world()
    with model_parallel(ParallelConfig(world_size=2), seed=0):
        model = tiny_gpt()
        adapters = add_adapters(model, PeftConfig(lora_rank=2))
        model.decoder.layers[0].mlp.linear_fc1.weight.requires_grad_(torch.distributed.get_rank() == 1)
        try:
            adapters.param_groups(1e-3)
            message = ""
        except ConfigurationError as error:
            message = str(error)
    stop()
    return message


def test_a_weight_that_one_rank_unfreezes_ends_all_with_its_message():
    first, last = run_ranks(2, refused_by_one, None)
    assert first == last and first.startswith("decoder.layers.0.mlp.linear_fc1: the weight")


def test_a_folder_of_adapters_is_whole_and_new(world, tmp_path):
    peft = PeftConfig(lora_rank=2)
    adapters = add_adapters(own_model(), peft)
    adapters.save(tmp_path / "saved")
    with pytest.raises(ConfigurationError, match="saved exists already"):
        adapters.save(tmp_path / "saved")
    with pytest.raises(ConfigurationError, match=r"is \[2, 16\] in .* but \[3, 16\] in this run"):
        add_adapters(own_model(), PeftConfig(lora_rank=3)).load(tmp_path / "saved")
    data = next((tmp_path / "saved").glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(ConfigurationError, match="is damaged"):
        adapters.load(tmp_path / "saved")
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
