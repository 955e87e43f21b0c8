"""A run of any method as a LoRA: HF PEFT computes with it what the run does, up to what is told."""

import dataclasses
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_peft.checkpoint.folders import RECORD, write_manifest
from megatron_peft.checkpoint.run_record import read_run_record
from megatron_peft.config import ConfigurationError
from megatron_peft.conversion import lora_approximation
from megatron_peft.conversion.convert import hf_to_megatron, megatron_to_hf, merge
from megatron_peft.conversion.lora_approximation import RunAsLora, approximate, truncated_svd
from megatron_peft.conversion.megatron_files import StoredSlice, StoredTensor
from megatron_peft.conversion.peft_export import export_as_lora
from megatron_peft.conversion.trained_adapters import base_of, open_run, save_adapters
from megatron_peft.conversion.verify import logits_change, verify
from megatron_peft.models.families import read_shape
from tests.conversion.adapter_runs import config_of, trained_on
from tests.conversion.megatron_folders import global_tensors, save_run, tensors_of
from tests.kept import NewTensors

PRODUCTS = {"tp2": 4, "pp2": 4, "bloom": 4, "paper": 8}  # runs whose change is a product of this rank
OTHERS = [
    *("butterfly", "urnn", "hybrid", "replace"),
    *(pytest.param(run, marks=pytest.mark.slow) for run in ("boft", "projection", "riemannian", "folding")),
]


def changes_of(merged: Path, base: Path) -> dict[str, Tensor]:
    """dW of every changed matrix, by module."""
    before, after = tensors_of(base), tensors_of(merged)
    changes = {name: after[name].double() - before[name].double() for name in before if before[name].ndim == 2}
    return {name.removesuffix(".weight"): change for name, change in changes.items() if change.any()}


def found_in(run: Path, tolerance: float = 0.05, max_rank: int = 256) -> RunAsLora:
    opened = open_run(run)
    return approximate(opened, base_of(opened, None), tolerance, max_rank, progress=False)


def discarded_by_rank(matrix: Tensor) -> np.ndarray:
    """Relative Frobenius norm of what ranks 0, 1, ... leave out, by numpy's SVD of the whole."""
    squared = np.linalg.svd(matrix.numpy(), compute_uv=False) ** 2
    return np.sqrt(np.append(np.cumsum(squared[::-1])[::-1], 0) / squared.sum())


@pytest.fixture(scope="module", autouse=True)
def many_blocks() -> Iterator[None]:
    """Tiny layers are read in blocks like large ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lora_approximation, "BLOCK_ELEMENTS", 3000)
        yield


@pytest.mark.parametrize("run", PRODUCTS)
def test_a_change_that_is_a_product_is_exported_exactly(run, moved, merged, apart, tmp_path, capsys):
    adapter = export_as_lora(moved.run(run), tmp_path / "adapter", max_rank=PRODUCTS[run], num_tokens=0)
    assert apart(adapter, merged(run)).relative < 2e-5  # 0.1 to 1.1e-5, by processor
    assert apart(adapter, moved.base_of(run)).relative > 0.01
    config = config_of(adapter)
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (PRODUCTS[run], PRODUCTS[run], False)
    assert "(exact)" in capsys.readouterr().out


def test_the_low_rank_part_of_a_hybrid_whose_rotation_is_the_identity_is_exported_exactly(moved, tmp_path):
    """LoRA-GA's original start is subtracted, so its rank is 8; lambda is in the factors."""
    opened, run = open_run(moved.run("hybrid")), tmp_path / "run"
    tensors = {key: opened.tensor(key) for key in opened.stored if ".adapter." in key and "optimizer" not in key}
    tensors |= {key: torch.zeros_like(tensor) for key, tensor in tensors.items() if key.endswith("rotation.Q")}
    save_adapters(run, opened.record, tensors)
    adapter = export_as_lora(run, tmp_path / "adapter", num_tokens=0)
    assert config_of(adapter)["r"] == 8
    assert verify(adapter, merge(run, tmp_path / "merged", progress=False)).logits.relative < 1e-5


@pytest.mark.parametrize("run", OTHERS)
def test_residuals_are_those_of_the_discarded_singular_values(run, moved, merged):
    """At most rank 20 of the sides of 40 to 160: the sketch does not span them."""
    changes = changes_of(merged(run), moved.base_of(run))
    lora = found_in(moved.run(run), tolerance=0.2, max_rank=20)
    assert {one.module for one in lora.modules} == changes.keys()
    for module, found in ((one.module, one.factors) for one in lora.modules):
        change, product = changes[module], found.B.double() @ found.A.double()
        discarded = discarded_by_rank(change)
        smallest = min(int((discarded <= 0.2).argmax()), 20)
        assert smallest <= found.rank <= smallest + (discarded[smallest] > 0.99 * 0.2)
        assert found.residual == pytest.approx(discarded[found.rank], rel=0.02)
        assert found.residual == pytest.approx(float((change - product).norm() / change.norm()), rel=1e-3)
    left = torch.cat([(changes[one.module] - one.factors.B @ one.factors.A).flatten() for one in lora.modules])
    whole = torch.cat([change.flatten() for change in changes.values()])
    assert lora.residual == pytest.approx(float(left.norm() / whole.norm()), rel=1e-3)


@pytest.mark.parametrize("run", ["replace", pytest.param("riemannian", marks=pytest.mark.slow)])
def test_peft_computes_what_the_run_does_where_nothing_is_discarded(run, moved, merged, apart, tmp_path):
    """Other rotations differ in what is rotated, which the test above sees."""
    adapter = export_as_lora(moved.run(run), tmp_path / "adapter", tolerance=0, num_tokens=0)
    assert apart(adapter, merged(run)).relative < 1e-5


def test_the_change_of_logits_is_what_peft_and_transformers_compute(moved, merged, tmp_path):
    run, base = open_run(moved.run("tp2")), moved.base_of("tp2")
    lora = found_in(moved.run("tp2"), tolerance=0.3, max_rank=2)
    whole, layers = logits_change(run, base, lora, num_tokens=24)
    limits = {"tolerance": 0.3, "max_rank": 2, "num_tokens": 0}
    adapter = export_as_lora(moved.run("tp2"), tmp_path / "adapter", **limits)
    seen = verify(adapter, merged("tp2"), num_tokens=24)
    assert whole.logits.relative == pytest.approx(seen.logits.relative, rel=1e-3) and seen.logits.relative > 0.01
    assert (whole.same_best, whole.num_positions) == (seen.same_best, 48)
    before = tensors_of(base)
    for number in (0, 2):  # the merged model with base and factors in one layer
        mixed, tensors = Path(shutil.copytree(merged("tp2"), tmp_path / f"{number}")), tensors_of(merged("tp2"))
        for name, factors in ((f"{one.module}.weight", one.factors) for one in lora.modules):
            if f"layers.{number}." in name:
                tensors[name] = before[name] + factors.B @ factors.A
        save_file(tensors, mixed / "model.safetensors", metadata={"format": "pt"})
        alone = verify(mixed, merged("tp2"), num_tokens=24).logits.relative
        assert layers[number].relative == pytest.approx(alone, rel=1e-3) and alone > 1e-3


OTHERS_THAT_CHANGE = {
    "decoder.layers.0.input_layernorm.weight": 0.3,
    "embedding.word_embeddings.weight": 0.001,
    "decoder.layers.1.mlp.linear_fc2.bias": 0.01,
}
HF_NAMES = (
    *("model.layers.0.input_layernorm.weight", "model.embed_tokens.weight"),
    "model.layers.1.mlp.down_proj.bias",
)


def full_run(base: Path, folder: Path, changed: Mapping[str, float], noise: float = 0.001) -> Path:
    """A run of full fine-tuning: rank 3 and noise in every linear layer, and some numbers elsewhere."""
    draw, tensors = torch.Generator().manual_seed(3), global_tensors(base, padded_vocab_size=1024)
    for name, tensor in tensors.items():
        if ".linear_" in name and tensor.ndim == 2:
            out, in_features = tensor.shape
            low = torch.randn(out, 3, generator=draw) @ torch.randn(3, in_features, generator=draw)
            tensor += 0.02 * low + noise * torch.randn(out, in_features, generator=draw)
        tensor += changed.get(name, 0) * torch.randn(tensor.shape, generator=draw)
    save_run(base, folder, tensors, shape=read_shape(base))
    record = dataclasses.replace(read_run_record(folder), base_fingerprint=None, adapted_layers=())
    (folder / "iter_0000002" / RECORD).write_text(record.to_json())
    write_manifest(folder / "iter_0000002", {})
    return folder


def test_full_fine_tuning_is_exported_and_what_is_left_out_is_told(moved, tmp_path, capsys):
    base = moved.base("short")
    run = full_run(base, tmp_path / "run", OTHERS_THAT_CHANGE)
    adapter = export_as_lora(run, tmp_path / "adapter", pretrained_checkpoint=base)
    printed, card = capsys.readouterr().out, (tmp_path / "adapter" / "README.md").read_text()
    whole = megatron_to_hf(run, tmp_path / "whole", pretrained_checkpoint=base, progress=False)
    before, after = tensors_of(base), tensors_of(whole)
    assert config_of(adapter)["r"] == 3
    for name in HF_NAMES:
        assert f"{name} ({(after[name] - before[name]).norm() / before[name].norm():.2%} of its norm)" in printed
    squares = {name: (after[name].double() - before[name].double()).square().sum().item() for name in before}
    share = (sum(squares[name] for name in HF_NAMES) / sum(squares.values())) ** 0.5
    assert f"the changes of 3 others, {share:.2%} of the Frobenius norm of all changes" in printed
    assert all(line in card for line in printed.splitlines() if line.startswith(("A LoRA of rank 3", "Left out")))
    seen = verify(adapter, whole).logits.relative
    assert f"relative {seen:.3g}; same best token" in printed and seen > 0.01


def test_full_fine_tuning_of_linear_layers_alone_leaves_nothing_out(moved, tmp_path, capsys):
    base, run = moved.base("short"), full_run(moved.base("short"), tmp_path / "run", {}, noise=0)
    adapter = export_as_lora(run, tmp_path / "adapter", pretrained_checkpoint=base, tolerance=1e-6, num_tokens=0)
    assert "Left out" not in capsys.readouterr().out
    whole = megatron_to_hf(run, tmp_path / "whole", pretrained_checkpoint=base, progress=False)
    assert verify(adapter, whole).logits.relative < 1e-5


@pytest.mark.parametrize("run", ["boft", "urnn", "folding", "full"])
def test_no_tensor_is_as_large_as_a_modules_change(run, moved, tmp_path, monkeypatch):
    """Attention of one layer. Its smallest module is k of 40 x 96; 8 rows are a block, and 20 columns the sketch."""
    monkeypatch.setattr(lora_approximation, "BLOCK_ELEMENTS", 800)
    base = moved.base("short")
    opened = open_run(moved.run(run) if run != "full" else full_run(base, tmp_path / "run", {}))
    layers = tuple(f"decoder.layers.0.self_attention.linear_{name}" for name in ("qkv", "proj"))
    opened = dataclasses.replace(opened, record=dataclasses.replace(opened.record, adapted_layers=layers))
    with NewTensors() as made:
        found = approximate(opened, base_of(opened, base), 0.05, 4, progress=False)
    assert len(found.modules) == 4
    assert 120 * 20 <= made.largest < 40 * 96


def test_weights_that_are_not_finite_are_told(moved, tmp_path):
    run = full_run(moved.base("short"), tmp_path / "run", {}, noise=float("nan"))
    with pytest.raises(ConfigurationError, match=r"distcp holds NaN or infinities in decoder.layers.0.*.weight. Copy"):
        export_as_lora(run, tmp_path / "adapter", pretrained_checkpoint=moved.base("short"))
    assert not (tmp_path / "adapter").exists()


def test_a_change_is_told_that_is_not_finite_in_some_rows(moved):
    """As products that overflow make it of finite tensors. R is on the output's side: one of its blocks, some rows."""
    run = open_run(moved.run("hybrid"))
    name = next(name for name in run.stored if name.endswith("fc2.adapter.rotation.Q"))
    Q = run.stored[name].read()
    Q.view(-1)[-1] = torch.nan
    slices = (StoredSlice((0,) * Q.dim(), tuple(Q.shape), lambda index: Q[index]),)
    run.stored[name] = StoredTensor(tuple(Q.shape), Q.dtype, slices)
    with pytest.raises(ConfigurationError, match=r"change of decoder.layers.\d.mlp.linear_fc2.weight holds NaN or inf"):
        approximate(run, moved.base("short"), 0.05, 4, progress=False)


def test_modules_are_padded_to_one_rank_that_changes_nothing(moved, tmp_path):
    lora = found_in(moved.run("hybrid"), tolerance=0.3, max_rank=12)
    limits = {"tolerance": 0.3, "max_rank": 12, "num_tokens": 0}
    adapter = export_as_lora(moved.run("hybrid"), tmp_path / "adapter", **limits)
    tensors, config = load_file(adapter / "adapter_model.safetensors"), peft.PeftConfig.from_pretrained(str(adapter))
    assert len({one.factors.rank for one in lora.modules}) > 1
    assert config.r == config.lora_alpha == lora.rank and not config.rank_pattern
    for one in lora.modules:
        A, B = (tensors[f"base_model.model.{one.module}.lora_{side}.weight"] for side in "AB")
        assert len(A) == B.shape[1] == lora.rank
        assert torch.equal(A[: one.factors.rank], one.factors.A) and not A[one.factors.rank :].any()
        assert torch.equal(B[:, : one.factors.rank], one.factors.B) and not B[:, one.factors.rank :].any()


def test_a_product_above_the_largest_rank_is_truncated(moved, tmp_path, capsys):
    export_as_lora(moved.run("paper"), tmp_path / "adapter", max_rank=5, tolerance=0.001, num_tokens=0)
    printed = capsys.readouterr().out
    assert "14 of 14 modules reached the largest rank allowed with an error above --tolerance 0.001" in printed
    assert printed.startswith("layer   0: ") and "(exact)" not in printed and printed.count("_proj 5 (") == 14


def test_base_in_megatrons_form(moved, tmp_path, capsys):
    base = hf_to_megatron(moved.base("base"), tmp_path / "base", progress=False)
    run = trained_on(moved.run("butterfly"), tmp_path / "run", base)
    export_as_lora(run, tmp_path / "adapter", max_rank=4, num_tokens=0)
    export_as_lora(moved.run("butterfly"), tmp_path / "expected", max_rank=4, num_tokens=0)
    found, expected = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "expected"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert "in Megatron's form, which HF PEFT does not open" in capsys.readouterr().out
    assert config_of(tmp_path / "adapter")["base_model_name_or_path"] is None


def test_what_cannot_be_used_is_refused_before_anything_is_written(moved, tmp_path):
    settings: list[tuple[dict[str, Any], str]] = [
        ({"tolerance": 1.0}, r"--tolerance is 1; it is a relative error, at least 0 and below 1"),
        ({"tolerance": float("nan")}, r"--tolerance is nan"),
        ({"max_rank": 0}, r"--max-rank is 0; it must be above 0"),
        ({"num_tokens": -1}, r"--num-tokens is -1; it cannot be negative"),
        ({"license": "my own"}, r"--license 'my own' is not a license identifier"),
        ({"pretrained_checkpoint": moved.base("other")}, r"trained on the base .*base, but .*other is another one"),
    ]
    for setting, told in settings:
        with pytest.raises(ConfigurationError, match=told):
            export_as_lora(moved.run("tp2"), tmp_path / "adapter", **setting)
    assert not list(tmp_path.iterdir())


# The sketch of a matrix.

OUT, IN = 256, 192


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(shape[0]))


NUMBERS = torch.arange(1, IN + 1, dtype=torch.float64)
LEFT, RIGHT = (torch.linalg.qr(random(size, IN)).Q for size in (OUT, IN))
Q = 0.05 * random(OUT // 8, 8, 8)
D = torch.linalg.matrix_exp(Q - Q.mT) - torch.eye(8)  # of a rotation of noise
CASES = {
    "exponential": LEFT * torch.exp(-NUMBERS / 15) @ RIGHT.T,
    "power law": LEFT / NUMBERS @ RIGHT.T,
    "flat": torch.bmm(D, random(OUT, IN).view(OUT // 8, 8, IN)).view(OUT, IN),  # they hardly fall: the worst case
    "low rank and noise": random(OUT, 20) @ random(20, IN) + 0.05 * random(OUT + 1, IN)[1:],
    "exactly low rank": random(OUT, 7) @ random(7, IN),
}


def sketched(matrix: Tensor, tolerance: float = 0.05, max_rank: int = 64):
    """Of a matrix that is read in blocks of 48 rows."""
    rows = [slice(start, start + 48) for start in range(0, len(matrix), 48)]
    held: Any = SimpleNamespace(shape=matrix.shape, blocks=lambda: ((one, matrix[one]) for one in rows))
    return truncated_svd(held, tolerance, max_rank, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("tolerance", [0.3, 0.05, 1e-3])
@pytest.mark.parametrize("name", CASES)
def test_rank_is_the_smallest_and_the_error_that_of_the_discarded_singular_values(name, tolerance):
    matrix = CASES[name]
    left_out, truncation = discarded_by_rank(matrix), sketched(matrix, tolerance)
    smallest = int((left_out <= tolerance).argmax())
    assert truncation.rank == min(smallest, 64)
    assert left_out[truncation.rank] <= truncation.residual + 1e-7
    assert truncation.residual <= 1.01 * left_out[truncation.rank] + 1e-7
    measured = torch.linalg.norm(matrix - truncation.B @ truncation.A) / torch.linalg.norm(matrix)
    assert truncation.residual == pytest.approx(measured.item(), rel=1e-6, abs=1e-7)
    assert truncation.squared_norm == pytest.approx(matrix.square().sum().item(), rel=1e-12)


def test_tolerance_zero_ends_at_the_rank_of_the_matrix_and_no_change_has_rank_zero():
    low, none = sketched(CASES["exactly low rank"], tolerance=0), sketched(torch.zeros(OUT, IN, dtype=torch.float64))
    assert low.rank == 7 and low.residual < 1e-7
    assert none.rank == 0 and none.residual == 0
    assert none.A.shape == (0, IN) and none.B.shape == (OUT, 0)
    smaller_than_the_sketch = CASES["flat"][:40]
    assert sketched(smaller_than_the_sketch).residual <= 0.05
    assert sketched(smaller_than_the_sketch, tolerance=0).residual < 1e-7
