"""Hugging Face PEFT's LoRA and OFT beside a cell of an experiment: its packs, order, rates, steps and test items.

    python -m tools.hf_peft lora docs/results/claim KEY runs/hf_peft

trains the cell's model again with transformers and PEFT, and writes losses, held-out losses and, with --score, BLEU,
and a table of all that is in the folder. A LoRA begins with the cell's own A; where megatron-core has one matrix (q, k
and v; gate and up), PEFT's share their A, so that both are the same model and their curves can be compared. PEFT's OFT
rotates by blocks of 32 of the input. `base` is the model before any training.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, OFTConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from megatron_peft.checkpoint.state import TrainingState
from megatron_peft.cli.parser import read_config
from megatron_peft.config import PeftConfig, require
from megatron_peft.data.batches import GlobalBatches, Microbatch
from megatron_peft.data.tokenizers import build_tokenizer
from megatron_peft.experiment.records import CellRecord, read_records, versions
from megatron_peft.models.families import read_shape
from megatron_peft.runtime.launch import start_model_parallel, world
from megatron_peft.training.run import build_state, data_of_rank

BLOCK = 32  # of OFT
FUSED = {"q_proj": "linear_qkv", "k_proj": "linear_qkv", "v_proj": "linear_qkv", "o_proj": "linear_proj"}
FUSED |= {"gate_proj": "linear_fc1", "up_proj": "linear_fc1", "down_proj": "linear_fc2"}
FIRST = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}  # whose A they share
SCORE = "-m megatron_peft.demo.scoring {output} --pretrained-checkpoint {model} --valid-data-path {messages}"
SCORE += " --train-data-path {messages} --seq-length 256 --train-iters 1"  # which a run has to have


def build(method: str, folder: str, peft: PeftConfig, state: TrainingState) -> PeftModel:
    """PEFT's model, in float32; of LoRA with the first A of `state`'s adapters.

    Raises ConfigurationError: the cell's LoRA has a setting that is not made here.
    """
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if method == "base":
        return model.requires_grad_(False)  # type: ignore[return-value]
    if method == "oft":
        settings = OFTConfig(oft_block_size=BLOCK, target_modules="all-linear", use_cayley_neumann=False)
        return get_peft_model(model, settings).train()  # type: ignore[return-value]
    plain = PeftConfig(method="lora", lora_rank=peft.lora_rank, lora_alpha=peft.lora_alpha)
    require(peft == plain, f"only a LoRA's rank and alpha are made here; the cell has other settings too: {peft}")
    settings = LoraConfig(r=peft.lora_rank, lora_alpha=peft.lora_alpha, target_modules="all-linear")  # type: ignore[arg-type]
    model = get_peft_model(model, settings).train()
    starts = {name: x for chunk in state.model_chunks for name, x in chunk.named_parameters() if ".adapter.A" in name}
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if not (found := re.search(r"layers\.(\d+)\.\w+\.(\w+)$", name)) or not hasattr(module, "lora_A"):
            continue
        number, kind = found.groups()
        if kind in FIRST:
            module.lora_A["default"] = modules[name.replace(kind, FIRST[kind])].lora_A["default"]  # type: ignore[index]
        else:
            ours = next(x for key, x in starts.items() if f"layers.{number}." in key and f".{FUSED[kind]}." in key)
            module.lora_A["default"].weight.data.copy_(ours.detach())  # type: ignore[index]
    return model  # type: ignore[return-value]


def loss_sums(model: nn.Module, batch: Microbatch) -> Tensor:
    """Of each position's loss, zero where none counts: [s] of a pack, whose samples do not see each other.

    In float64, since torch's sum over a vocabulary of 49,152 in float32 is off by 7e-6 here, always to the same side.
    """
    logits = model(input_ids=batch.tokens, position_ids=batch.position_ids, use_cache=False).logits
    losses = nn.functional.cross_entropy(logits.flatten(0, 1).double(), batch.labels.flatten(), reduction="none")
    return losses * batch.loss_mask.flatten()


def held_out(model: nn.Module, batches: GlobalBatches) -> list[list[float]]:
    """[sum of losses, tokens] of each item, in the order of the file, as a cell's record has them."""
    items: list[list[float]] = []
    with torch.no_grad():
        for batch in (batch for step in batches for batch in step):
            assert batch.lengths is not None
            each = zip(
                *(x.split(list(batch.lengths)) for x in (loss_sums(model, batch), batch.loss_mask[0])), strict=True
            )
            items += [[float(sums.double().sum()), float(mask.sum())] for sums, mask in list(each)[: batch.num_samples]]
    return [item for _, item in sorted(zip(batches.own_samples(), items, strict=True))]


def train(model: PeftModel, state: TrainingState, steps: Iterable[list[Microbatch]], clip: float) -> Iterator[float]:
    """The loss of each step; rates, decay and Adam's constants are those of `state`. Rotations are never decayed."""
    trained = [x for x in model.parameters() if x.requires_grad]
    ours = state.config.optimizer
    betas = ours.adam_beta1, ours.adam_beta2
    decay = 0.0 if isinstance(model.peft_config["default"], OFTConfig) else ours.weight_decay
    optimizer = torch.optim.AdamW(trained, betas=betas, eps=ours.adam_eps, weight_decay=decay)
    for step in steps:
        optimizer.param_groups[0]["lr"] = state.optimizer.param_groups[0]["lr"]
        optimizer.zero_grad()
        loss = sum(loss_sums(model, batch).sum() for batch in step) / sum(batch.num_loss_tokens for batch in step)
        assert isinstance(loss, Tensor)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, clip)
        optimizer.step()
        state.schedule.step(increment=state.config.global_batch_size)
        yield loss.item()


def trained_again(method: str, cell: CellRecord, messages: str | None) -> dict[str, Any]:
    """What is written of a run."""
    config = read_config([*cell.flags, "--save", "nowhere"])
    base = str(config.model.pretrained_checkpoint)
    shape = read_shape(base)
    start_model_parallel(config.parallel, config.training.seed)
    tokenizer = build_tokenizer(config.data, base)
    data = data_of_rank(config, tokenizer, shape)
    state = build_state(config, shape, data.train_iters)
    model = build(method, base, config.peft, state)
    steps = (step for _, step in zip(range(data.train_iters), data.train, strict=False))
    losses = []
    for loss in train(model, state, steps, config.optimizer.clip_grad) if method != "base" else ():
        losses.append(loss)
        print(f"iteration {len(losses)}: {loss:.6f}", flush=True)
    assert data.valid is not None
    items, tested = (held_out(model.eval(), source) if source else [] for source in (data.valid, data.test))
    found: dict[str, Any] = {
        "method": method,
        "cell": cell.key,
        "losses": losses,
        "validation_loss": mean_loss(items),
        "test_loss": mean_loss(tested) if tested else None,
        "of_cell": {"validation_loss": cell.validation_loss, "test_loss": cell.test_loss, **cell.scores},
        "curves": None,
        "items": items,
        "trainable_parameters": sum(x.numel() for x in model.parameters() if x.requires_grad),
        "versions": {**versions(), "peft": version("peft")},
    }
    if messages:
        found["bleu"] = bleu(model, base, messages)
    return found


def compared(losses: Sequence[float], others: Sequence[float]) -> dict[str, float]:
    """The largest difference of two curves, and for how many steps it is within 1e-4: rounding parts them later."""
    differences = [abs(a - b) for a, b in zip(losses, others, strict=True)]
    within = next((number for number, difference in enumerate(differences) if difference > 1e-4), len(differences))
    return {"most": max(differences), "steps_within": within}


def mean_loss(items: list[list[float]]) -> float:
    return sum(one for one, _ in items) / sum(tokens for _, tokens in items)


def table(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What documents show (`tools/documents.py`) of the runs."""

    def shown(value: float | None, form: str = ".4f") -> str:
        return "" if value is None else format(value, form)

    names = {"base": "the base model", "lora": "HF PEFT's LoRA", "oft": "HF PEFT's OFT"}
    lines = []
    for one in sorted(found, key=lambda one: ([*names].index(one["method"]), one["cell"])):
        values, of_cell = (*map(one.get, ("validation_loss", "test_loss", "bleu")),), one["of_cell"]
        numbers = [shown(value, ".2f" if at == 2 else ".4f") for at, value in enumerate(values)]
        beside = "" if one["method"] == "base" else one["cell"].split(",", 2)[-1].replace(",", " ")
        own = shown(of_cell["validation_loss"]) if beside else ""
        told = "{most:.1e}, {steps_within} steps within 1e-4".format(**one["curves"]) if one["curves"] else ""
        lines.append([names[one["method"]], beside, *numbers, own, told])
    columns = ["model", "beside", "held-out loss", "test loss", "BLEU", "held-out loss of that", "curves differ by"]
    return {"title": "Beside the experiment's own runs", "columns": columns, "rows": lines, "text_columns": 2}


def bleu(model: Any, base: str, messages: str) -> float:
    """Of the model, merged, by the same program that scores the cells."""
    with tempfile.TemporaryDirectory() as folder:
        merged, output = Path(folder, "model"), Path(folder, "score.json")
        (model.merge_and_unload() if isinstance(model, PeftModel) else model).save_pretrained(merged)
        transformers.AutoTokenizer.from_pretrained(base).save_pretrained(merged)
        words = SCORE.format(output=output, model=merged, messages=messages).split()
        subprocess.run([sys.executable, *words], check=True)
        return float(json.loads(output.read_text())["bleu"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=("base", "lora", "oft"))
    parser.add_argument("experiment", type=Path, help="folder of an experiment's results")
    parser.add_argument("key", help="of a finished cell in it")
    parser.add_argument("output", type=Path, help="folder of the results")
    parser.add_argument("--score", metavar="MESSAGES.jsonl", help="also translate these messages")
    asked = parser.parse_args()
    cell = read_records(asked.experiment)[asked.key]
    with world("gloo"):
        found = trained_again(asked.method, cell, asked.score)
    if asked.method == "lora":
        found["curves"] = compared(found["losses"], [value for _, _, value in cell.curves["loss"]])
    asked.output.mkdir(parents=True, exist_ok=True)
    path = asked.output / f"{asked.method},{cell.key}.json"
    path.write_text(json.dumps(found) + "\n")
    written = table([json.loads(one.read_text()) for one in asked.output.glob("*,*.json")])
    (asked.output / "table.json").write_text(json.dumps(written, indent=1, ensure_ascii=False) + "\n")
    print(*written["rows"], sep="\n")


if __name__ == "__main__":
    main()
