"""BOFT on the input side is HF PEFT's BOFT: the layer, an adapter that goes there, one that comes from there."""

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from peft.tuners.boft import layer as peft_boft_layer
from safetensors.torch import load_file, save_file
from torch import nn

from megatron_peft.adapters import boft
from megatron_peft.adapters.boft import LARGEST_NUMBER, Boft, from_huggingface, inverse_cayley
from megatron_peft.adapters.linear import AdaptedColumnParallelLinear
from megatron_peft.checkpoint.run_record import read_run_record
from megatron_peft.config import ConfigurationError, PeftConfig
from megatron_peft.conversion.peft_export import export_adapter
from megatron_peft.conversion.peft_import import import_adapter
from megatron_peft.conversion.trained_adapters import open_adapters
from megatron_peft.conversion.verify import verify
from tests.conversion.adapter_runs import copy_run, with_config
from tests.conversion.test_peft import check_that_peft_finds_every_tensor, make_peft_adapter
from tests.one_rank import one_rank

IN, OUT = 64, 24
LOAD_IT = "Load it with --finetune --peft-method boft"


@pytest.fixture
def pure_torch(monkeypatch):
    """HF PEFT's BOFT with several factors, without its extension: [factors, blocks, b, b] -> [factors, n, n]."""
    block_diagonal = SimpleNamespace(apply=lambda x: torch.stack([torch.block_diag(*factor) for factor in x]))
    monkeypatch.setattr(peft_boft_layer, "get_fbd_cuda", lambda: True)
    monkeypatch.setattr(peft_boft_layer, "FastBlockDiag", block_diagonal)


@pytest.fixture
def no_extension(monkeypatch):
    monkeypatch.setattr(peft_boft_layer, "get_fbd_cuda", lambda: None)


@pytest.mark.parametrize("factors", [1, 3])
def test_layers_have_the_same_output_and_gradients(factors, pure_torch):
    draw = torch.Generator().manual_seed(2)
    config = peft.BOFTConfig(boft_block_size=8, boft_n_butterfly_factor=factors)
    theirs = peft_boft_layer.Linear(nn.Linear(IN, OUT), "default", config)
    D = theirs.boft_R["default"]
    sizes: Any = TransformerConfig(num_layers=1, hidden_size=IN, num_attention_heads=1, perform_initialization=False)
    sizes.linear_biases = {"linear_fc1"}
    settings = PeftConfig("boft", rotation_side="input", boft_block_size=8, boft_factors=factors)
    with one_rank():
        ours = AdaptedColumnParallelLinear(IN, OUT, config=sizes, init_method=None, tp_comm_buffer_name="fc1")
        ours.requires_grad_(False)
        ours.adapter = Boft(ours.layout, settings, "layer.adapter", 0, torch.float32)
        with torch.no_grad():
            D.normal_(std=0.3, generator=draw)
            ours.adapter.Q.copy_(from_huggingface(D))
            ours.weight.copy_(theirs.base_layer.weight.normal_(std=IN**-0.5, generator=draw))
            ours.bias.copy_(theirs.base_layer.bias)
        x, weights = (torch.randn(5, 2, size, generator=draw) for size in (IN, OUT))
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        outputs = [ours(inputs[0])[0], theirs(inputs[1])]
        for output in outputs:
            (output * weights).sum().backward()
    assert (outputs[0] - outputs[1]).abs().max() < 1e-5
    assert (inputs[0].grad - inputs[1].grad).abs().max() < 1e-5
    # A number above the diagonal stands for two of theirs; they differentiate (D - D^T) / 2 in each.
    torch.testing.assert_close(ours.adapter.Q.grad, 2 * from_huggingface(D.grad), atol=1e-5, rtol=1e-5)


def test_an_eigenvalue_of_minus_one_has_no_inverse_cayley():
    around = torch.diag(torch.tensor([-1.0, -1.0, 1.0, 1.0], dtype=torch.float64))
    assert not (inverse_cayley(around).abs() < LARGEST_NUMBER).all()


def test_blocks_with_an_eigenvalue_of_minus_one_are_refused(moved, tmp_path, monkeypatch):
    monkeypatch.setattr(boft, "LARGEST_NUMBER", 1e-3)
    with pytest.raises(ConfigurationError, match=r"a block of decoder.layers.0.* has an eigenvalue of -1, .* merge"):
        export_adapter(moved.run("projection"), tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("run", ["boft", "butterfly", "projection"])
def test_peft_computes_what_the_adapted_model_does(run, moved, tmp_path, pure_torch):
    export_adapter(moved.run(run), tmp_path / "adapter")
    assert verify(tmp_path / "adapter", moved.run(run)).logits.absolute < 1e-4
    assert verify(tmp_path / "adapter", moved.base("base")).logits.absolute > 0.1
    check_that_peft_finds_every_tensor(tmp_path / "adapter", moved.base("base"))


def test_several_factors_need_the_extension(moved, tmp_path, no_extension, capsys):
    export_adapter(moved.run("boft"), tmp_path / "one", license="mit")
    assert capsys.readouterr().out == ""
    export_adapter(moved.run("butterfly"), tmp_path / "three")
    assert "HF PEFT opens this adapter only with its CUDA extension" in capsys.readouterr().out
    with pytest.raises(ConfigurationError, match=r"HF PEFT cannot open .*three .*boft_R.* needs its CUDA extension"):
        verify(tmp_path / "three", moved.run("butterfly"))


def test_the_output_side_is_refused(moved, tmp_path):
    turned = replace(read_run_record(moved.run("boft")).config.peft, rotation_side="output")
    run = copy_run(moved.run("boft"), tmp_path / "run", with_config(peft=turned))
    with pytest.raises(ConfigurationError, match=r"rotated the output side .* rotates the input: .*merge"):
        export_adapter(run, tmp_path / "adapter")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("run", ["boft", "butterfly"])
def test_export_and_import_give_the_run_back(run, moved, tmp_path, capsys):
    export_adapter(moved.run(run), tmp_path / "adapter")
    import_adapter(tmp_path / "adapter", tmp_path / "run", pretrained_checkpoint=moved.base("base"))
    before, after = open_adapters(moved.run(run)), open_adapters(tmp_path / "run")
    layers, settings = before.record.adapted_layers, before.record.config.peft
    assert after.record.adapted_layers == layers
    assert all(torch.equal(after.of(layer)["Q"], before.of(layer)["Q"]) for layer in layers)
    flags = f"--boft-block-size {settings.boft_block_size} --boft-factors {settings.boft_factors} --rotation-side input"
    assert f"{LOAD_IT} {flags} --peft-target-modules " in capsys.readouterr().out


@pytest.fixture
def make_adapter(moved, tmp_path):
    """Makes a BOFT of HF PEFT with random rotations in the folder `adapter`."""
    defaults = {"boft_block_size": 4, "target_modules": ["o_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    base, folder = moved.base("base"), tmp_path / "adapter"
    return lambda **settings: make_peft_adapter(base, folder, peft.BOFTConfig(**defaults | settings), "boft_R", 0.3)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"boft_block_num": 8, "boft_block_size": 0, "target_modules": ["down_proj"]},
        {"boft_block_size": 2, "boft_n_butterfly_factor": 3, "layers_to_transform": [1, 2]},
    ],
    ids=["blocks", "number of blocks", "butterfly"],
)
def test_imported_adapter_computes_what_it_does_in_peft(settings, moved, make_adapter, tmp_path, pure_torch):
    adapter = make_adapter(**settings)
    import_adapter(adapter, tmp_path / "run", pretrained_checkpoint=moved.base("base"))
    assert verify(tmp_path / "run", adapter).logits.absolute < 1e-4
    assert verify(tmp_path / "run", moved.base("base")).logits.absolute > 0.1


def test_a_factor_that_was_not_trained_is_told(moved, make_adapter, tmp_path, no_extension, capsys):
    adapter = make_adapter(boft_n_butterfly_factor=2, boft_dropout=0.25, target_modules=["o_proj"])
    capsys.readouterr()
    import_adapter(adapter, tmp_path / "run", pretrained_checkpoint=moved.base("base"))
    factor, dropout, flags = capsys.readouterr().out.splitlines()
    assert factor.startswith("The adapter holds 1 butterfly factor instead of the 2 of its config: HF PEFT trains one")
    assert dropout == "boft_dropout=0.25 is left out: rotations have no dropout here."
    assert flags.startswith(f"{LOAD_IT} --boft-block-size 4 --boft-factors 1 --rotation-side input")
    assert read_run_record(tmp_path / "run").config.peft.boft_factors == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ["q_proj"]}, r"q_proj, .*v_proj share an input in .*linear_qkv and therefore need"),
        ({"target_modules": ["gate_proj", "up_proj"]}, r"one for .*gate_proj, .*up_proj, or different ones\. Merge"),
        ({"boft_block_size": 0, "boft_block_num": 20}, r"boft_block_num=20 .* gives blocks of 6 and 8 features; all"),
        ({"boft_block_size": 5, "target_modules": ["down_proj"]}, "--boft-block-size is 5; .* use an even size"),
        ({"bias": "boft_only"}, 'uses unsupported settings: bias="boft_only"'),
        ({"fan_in_fan_out": True}, "uses unsupported settings: fan_in_fan_out=true"),
    ],
    ids=["part of a fused layer", "different in a fused layer", "sizes", "odd", "bias", "transposed"],
)
def test_what_has_no_place_here_is_refused(settings, message, moved, make_adapter, tmp_path, no_extension):
    adapter = make_adapter(**settings)
    if "fan_in_fan_out" in settings:  # HF PEFT puts it right for linear layers, in its config as well
        config = json.loads((adapter / "adapter_config.json").read_text())
        (adapter / "adapter_config.json").write_text(json.dumps({**config, **settings}))
    with pytest.raises(ConfigurationError, match=message):
        import_adapter(adapter, tmp_path / "run", pretrained_checkpoint=moved.base("base"))
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_scaled_outputs_are_refused(moved, make_adapter, tmp_path, no_extension):
    weights = make_adapter() / "adapter_model.safetensors"
    tensors, name = load_file(weights), "base_model.model.model.layers.2.mlp.down_proj.boft_s"
    tensors[name][3] = 1.5
    save_file(tensors, weights)
    with pytest.raises(ConfigurationError, match=rf"{name} .* scales output features by 1 to 1\.5; .* Merge it with"):
        import_adapter(tmp_path / "adapter", tmp_path / "run", pretrained_checkpoint=moved.base("base"))
