"""The best rates of LoRA and LoRA-GA by a model's width: four small Llamas, five rates, three seeds, a parabola.

    python -m tools.widths runs/widths docs/results/widths

makes the models of bytes (trained on the English of the claim's messages, `megatron_peft.demo.data`), tunes each to
translate them into French, and writes the records and their table. A loss that is there already is not trained for
again.
"""

import json
import math
import sys
from collections.abc import Iterator
from itertools import islice, product
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn

from megatron_peft.checkpoint.folders import write_atomically
from megatron_peft.cli.parser import read_config
from megatron_peft.config import ParallelConfig
from megatron_peft.data.tokenizers import build_tokenizer
from megatron_peft.demo.data import Pair, read_pairs
from megatron_peft.models.families import read_shape
from megatron_peft.runtime.launch import seed_generators, start_model_parallel, world
from megatron_peft.training.run import build_state, data_of_rank, first_steps
from megatron_peft.training.step import train_step, validation_loss

WIDTHS, METHODS, RATES, SEEDS = (64, 128, 256, 512), ("lora", "lora-ga"), (2e-3, 3.5e-3, 6e-3, 1e-2, 1.7e-2), (1, 2, 3)
HEAD, LAYERS, ENGLISH_STEPS, ROWS, BYTES = 32, 2, 400, 12, 128
FLAGS = (
    "--seq-length 512 --pack-sequences --micro-batch-size 1 --global-batch-size 1 --train-iters 60 --lora-rank 8 "
    "--lora-alpha 16 --lr-decay-style WSD --lr-warmup-iters 6 --lr-wsd-decay-iters 12 --lr-wsd-decay-style linear "
    "--weight-decay 0 --clip-grad 1.0 --num-workers 0 --overlong truncate --save nowhere"
)


def make_model(width: int, folder: Path, pairs: list[Pair]) -> None:
    """A Llama that has seen English: its rate falls with the root of the width."""
    torch.manual_seed(width)
    tokenizer = transformers.ByT5Tokenizer()
    sizes: dict[str, Any] = {"hidden_size": width, "intermediate_size": 3 * width, "num_attention_heads": width // HEAD}
    config = transformers.LlamaConfig(vocab_size=len(tokenizer), num_hidden_layers=LAYERS, **sizes)
    model = transformers.LlamaForCausalLM(config)
    top = 2e-3 * (128 / width) ** 0.5
    optimizer = torch.optim.AdamW(model.parameters(), lr=top)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, ENGLISH_STEPS // 10, ENGLISH_STEPS)
    texts, loss = [pair.english for pair in pairs], torch.zeros(())
    for _ in range(ENGLISH_STEPS):
        chosen = [texts[at] for at in torch.randint(len(texts), (ROWS,)).tolist()]
        ids = tokenizer(chosen, padding=True, truncation=True, max_length=BYTES, return_tensors="pt")["input_ids"]
        loss = model(input_ids=ids, labels=ids.masked_fill(ids == tokenizer.pad_token_id, -100)).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    print(f"width {width}: {loss.item():.3f} nats a byte of English", flush=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def tuned(folder: Path, data: Path, method: str, rate: float, seed: int) -> float:
    """The held-out loss of a run."""
    words = [*FLAGS.split(), f"--peft-method={method}", f"--lr={rate}", f"--seed={seed}"]
    files = [f"--train-data-path={data / 'train.jsonl'}", f"--valid-data-path={data / 'tuning.jsonl'}"]
    config = read_config([*words, *files, f"--pretrained-checkpoint={folder}"])
    shape = read_shape(str(folder))
    seed_generators(seed)
    tokens = data_of_rank(config, build_tokenizer(config.data, str(folder)), shape)
    assert tokens.valid is not None
    state = build_state(config, shape, tokens.train_iters, first_steps(config, tokens.train))
    for step in islice(tokens.train, tokens.train_iters):
        train_step(state, step)
    return validation_loss(state.model_chunks, tokens.valid)


def best_rate(losses: dict[float, float]) -> float:
    """The vertex of the parabola through the losses over the logarithm of the rate; NaN if it opens downwards."""
    a, b, _ = np.polyfit([math.log(rate) for rate in losses], [*losses.values()], 2)
    return math.exp(-b / (2 * a)) if a > 0 else math.nan


def table(losses: dict[str, float]) -> dict[str, Any]:
    """Of `WIDTH METHOD RATE SEED` -> held-out loss: best rates by width, and how far they are apart."""
    rows = []
    for width in WIDTHS:
        best, lowest = [], []
        for method in METHODS:
            of_rates = {rate: [losses[f"{width} {method} {rate:g} {seed}"] for seed in SEEDS] for rate in RATES}
            means = {rate: mean(of_seeds) for rate, of_seeds in of_rates.items()}
            best.append(best_rate(means))
            lowest.append(min(means.values()))
        rows.append(
            [
                str(width),
                *(f"{rate:.2g}" for rate in best),
                f"{best[1] / best[0]:.2f}",
                *(f"{loss:.3f}" for loss in lowest),
            ]
        )
    columns = ["width", *(f"best rate, {m}" for m in METHODS), "their ratio", *(f"lowest loss, {m}" for m in METHODS)]
    title = f"Best rates at alpha / r = 2: parabola through {len(RATES)} rates, means of {len(SEEDS)} seeds"
    return {"title": title, "columns": columns, "rows": rows, "text_columns": 1}


def wanted() -> Iterator[tuple[int, str, float, int]]:
    """All runs, in order."""
    return product(WIDTHS, METHODS, RATES, SEEDS)


def main(arguments: list[str]) -> None:
    models, output = map(Path, arguments)
    data = Path("runs/demo/data/claim")
    record = output / "losses.json"
    losses: dict[str, float] = json.loads(record.read_text()) if record.exists() else {}
    output.mkdir(parents=True, exist_ok=True)
    with world("gloo"):
        start_model_parallel(ParallelConfig(), 1)
        for width, method, rate, seed in wanted():
            key, folder = f"{width} {method} {rate:g} {seed}", models / f"width-{width}"
            if key in losses:
                continue
            if not folder.exists():
                make_model(width, folder, read_pairs(data / "train.jsonl"))
            losses[key] = tuned(folder, data, method, rate, seed)
            print(f"{key}: {losses[key]:.4f}", flush=True)
            write_atomically(record, json.dumps(losses, indent=0) + "\n")
    write_atomically(output / "rates.json", json.dumps(table(losses), indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
