"""What a process finds in which a method of one's own is installed: nothing of the project may be imported before."""

import json
import multiprocessing
import os
import shutil
import sys
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import Any

STEPS, SAVED = 4, 2
RUN = (
    f"--tokenizer-type NullTokenizer --seq-length 32 --train-iters {STEPS} --global-batch-size 4 --micro-batch-size 2 "
    "--lr 1e-2 --log-interval 1 --num-workers 0"
)
TP2 = ("--tensor-model-parallel-size", "2")


def install(packages: Path) -> None:
    """The metadata of packages lies there, as pip leaves it, and their modules if they are not the tests' own."""
    sys.path.insert(0, str(packages))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(packages), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])


def see(asked: tuple[Path, dict[str, dict[str, Any]], Path]) -> dict[str, Any]:
    """How often DoRA computes its norms in a step; bytes that --fit records of what layers share, of a run of VeRA and
    of LoRA; differences of adapted layers at TP2+SP from one rank."""
    packages, plug_ins, folder = asked
    install(packages)
    norms, adapters = norms_of_a_step(plug_ins["dora"], folder)
    shared = {f"{name}'s bytes": shared_bytes(peft) for name, peft in (("lora", {}), ("vera", plug_ins["vera"]))}
    return {"norms": norms, "adapters": adapters, **shared, "layers": layers_of_many_ranks(plug_ins)}


def layers_of_many_ranks(plug_ins: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Relative to a tensor's largest number, by method, layer and tensor."""
    from megatron_peft.config import LinearSizes, PeftConfig
    from tests.adapters.many_ranks import fake_groups, run_layer

    found: dict[str, dict[str, float]] = {name: {} for name in plug_ins}
    sizes = {"linear_fc1": LinearSizes("column", 64, 16, 2, 2), "linear_fc2": LinearSizes("row", 16, 32, 2)}
    for (name, peft), (layer, size) in product(plug_ins.items(), sizes.items()):
        with fake_groups(2) as groups:
            one, many = (run_layer(layer, size, PeftConfig(**peft), groups[n], (4, 3), n == 2) for n in (1, 2))
        for tensor, whole in one.items():
            error = (many[tensor] - whole).abs().max() / whole.abs().max()
            found[name][f"{layer} {tensor}"] = float(error)
    return found


def shared_bytes(peft: dict[str, Any]) -> int:
    from megatron_peft.config import make_run
    from megatron_peft.models.shape import ModelShape
    from megatron_peft.rehearsal.rehearsed_rank import recorded_layers
    from megatron_peft.rehearsal.requests import LayersToRecord

    shape = ModelShape("llama", 2, 64, 128, 4, 2, 16, 128, 64)
    base = {"pretrained_checkpoint": "(none)", "mock_data": True, "seq_length": 16, "train_iters": 1, "method": "lora"}
    return recorded_layers(LayersToRecord.of(make_run(**base | peft), shape)).cached


def norms_of_a_step(peft: dict[str, Any], folder: Path) -> tuple[int, int]:
    """Of two microbatches, and the number of adapters."""
    from megatron_peft.training.step import train_step
    from tests.adapters.dora.adapter import DoraAdapter
    from tests.one_rank import one_rank
    from tests.tiny_llama import save_llama, save_pairs
    from tests.training.layout_runs import Job, build

    base, data = save_llama(folder / "base", num_hidden_layers=1), save_pairs(folder / "pairs.jsonl")
    computed, plain = [], DoraAdapter.squared_lengths
    DoraAdapter.squared_lengths = lambda self, weight: computed.append(self) or plain(self, weight)  # type: ignore[method-assign]
    with one_rank():
        state, batches = build(Job("job", str(base), str(data), peft=peft, training={"micro_batch_size": 4}).config(1))
        step = next(iter(batches.train))
        assert len(step) == 2
        train_step(state, step)
    DoraAdapter.squared_lengths = plain  # type: ignore[method-assign]
    return len(computed), len(set(computed))


def certificates(asked: tuple[Path, dict[str, Any]]) -> list[Any]:
    """In one layout of each kind."""
    packages, peft = asked
    install(packages)
    from tests.certify.faults import Case, certified
    from tests.certify.test_certify import LLAMA, OVERLAPPED, PP2, TP2, run_of

    layouts: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({**TP2, "sequence_parallel": True}, {}),
        ({**PP2, "num_layers_per_virtual_pipeline_stage": 1}, {}),
        ({}, OVERLAPPED),
    ]
    return certified([Case(run_of(peft, parallel, 2, **others), LLAMA) for parallel, others in layouts])


def base_and_flags(folder: Path) -> tuple[Path, list[str]]:
    from tests.tiny_llama import VOCAB_SIZE, save_llama, save_pairs

    base, data = save_llama(folder / "base", num_hidden_layers=2), save_pairs(folder / "pairs.jsonl")
    flags = [*RUN.split(), "--vocab-size", str(VOCAB_SIZE - 1), "--pretrained-checkpoint", str(base)]
    return base, [*flags, "--train-data-path", str(data)]


def life(asked: tuple[Path, dict[str, Any], Path]) -> dict[str, Any]:
    """Losses of a run at TP2, of its second half resumed there and on one rank; how far what is made of it is from it;
    exit codes and reports of the commands that plan it.
    """
    packages, peft, folder = asked
    install(packages)
    from megatron_peft.commands import plan, train
    from megatron_peft.config import ConfigurationError
    from megatron_peft.conversion.convert import merge
    from megatron_peft.conversion.peft_export import export_adapter, export_as_lora
    from megatron_peft.conversion.verify import verify
    from megatron_peft.runtime import ranks
    from tests.ranks import run_ranks

    server, ranks._server = ranks._server, multiprocessing.get_context("fork")  # type: ignore[assignment]
    base, flags = base_and_flags(folder)
    for name, value in peft.items():
        flags += ["--peft-method" if name == "method" else f"--{name.replace('_', '-')}", str(value)]

    def trained(name: str, num_ranks: int, *more: str) -> list[float]:
        assert run_ranks(num_ranks, train.main, [*flags, "--save", str(folder / name), *more]) == [0] * num_ranks
        lines = (folder / name / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["loss"] for line in lines]

    found: dict[str, Any] = {"losses": trained("run", 2, *TP2)}
    trained("half", 2, *TP2, "--exit-interval", str(SAVED))
    shutil.copytree(folder / "half", folder / "moved")
    found["resumed"] = trained("half", 2, *TP2, "--load", str(folder / "half"))
    found["resharded"] = trained("alone", 1, "--load", str(folder / "moved"))
    run = folder / "run"
    merged = merge(run, folder / "merged", progress=False)
    as_lora = export_as_lora(run, folder / "as lora", tolerance=0, num_tokens=0)
    models = {"merged": merged, "as lora": as_lora, "moved": base}
    with suppress(ConfigurationError):  # the method has no format of HF PEFT
        models["exported"] = export_adapter(run, folder / "exported")
    found |= {name: verify(model, run).logits.absolute for name, model in models.items()}
    ranks._server = server  # a fork of this process, which has had a world, does not rehearse
    layouts = {"plan": ("--world-size", "2", *TP2), "fit": ("--world-size", "2", "--fit", "--rehearsed", "1")}
    for name, words in layouts.items():
        report = folder / f"{name}.json"
        found[f"{name} ended with"] = plan.main([*flags, *words, "--json", str(report)])
        found[name] = json.loads(report.read_text())
    return found


def exported_alone(asked: tuple[Path, dict[str, Any], Path]) -> float:
    """How far VeRA's export for Hugging Face PEFT is from a run of the layers that it can express."""
    packages, peft, folder = asked
    install(packages)
    from megatron_peft.commands import train
    from megatron_peft.conversion.peft_export import export_adapter
    from megatron_peft.conversion.verify import verify

    _, flags = base_and_flags(folder)
    flags += ["--peft-method", "vera", "--vera-rank", "4", "--save", str(folder / "run")]
    assert train.main([*flags, "--peft-target-modules", "linear_proj", "linear_fc2"]) == 0
    return verify(export_adapter(folder / "run", folder / "exported"), folder / "run").logits.absolute
