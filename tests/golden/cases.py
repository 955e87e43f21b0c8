"""What golden runs: models, methods, layouts and the flags of each; commands that do not train; and what is called
otherwise in older trees."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.golden.tree import Tree
from tests.tiny_bloom import save_bloom
from tests.tiny_llama import VOCAB_SIZE, save_llama, save_pairs

# ---- The table of changes. Everything below it is written in the newest names; a tree is given those that it knows.
# Program -> its names, newest first: the first that a tree has is taken. Words after a program's file are given to it
# first: "train": ("cli/main.py train", "pretrain_peft.py").
PROGRAMS = {
    "say": (str(Path(__file__).with_name("say.py")),),  # this one for every tree
    "train": ("pretrain_peft.py",),
    **{name: (f"tools/{name}.py",) for name in ("generate", "convert", "evaluate", "experiment", "report")},
}
# Newest flag (with its value, where that changed) -> what a tree gets whose --help does not know it:
# "--hybrid-merge-interval": "--hybrid-fold-interval", "--urnn-update manifold": "--urnn-update riemannian"
FLAGS: dict[str, str] = {"--packing next-fit": "", "--cross-entropy-chunk-tokens 0": ""}
# Pattern -> newest spelling, in the names of what is compared (fields of metrics, layers, tensors of a checkpoint):
# r"\.adapter\.lora_a$": ".adapter.A"
NAMES: dict[str, str] = {}
# Fields of metrics.jsonl that are never the same twice, and those that older trees do not write.
NOT_COMPARED = {"step_seconds", "tokens_per_second", "memory_bytes", "peak_memory_bytes", "interval_steps"}
# ---- The end of the table.

NUM_STEPS, LAST_STEP = 4, 6  # a run stops after four of its six iterations, and is resumed there
BOFT = "--boft-block-size 2 --boft-factors 2"
LORA_GA = "--lora-rank 4 --lora-ga-batches 2"
URNN = "--urnn-block-size 4"
HYBRID = f"--peft-method hybrid {LORA_GA} --peft-lr-rotation 2e-3"
LLAMA = {
    "full": "--peft-method full --lr 1e-3",
    "lora": "--peft-method lora --lora-rank 4 --lora-plus-ratio 4",
    "lora-ga aligned": f"--peft-method lora-ga {LORA_GA}",
    "lora-ga paper": f"--peft-method lora-ga {LORA_GA} --lora-ga-init paper",
    "lora-ga original": f"--peft-method lora-ga {LORA_GA} --lora-ga-init original",
    "boft cayley": f"--peft-method boft {BOFT}",
    "boft projection": f"--peft-method boft {BOFT} --boft-parametrization projection",
    "boft input": f"--peft-method boft {BOFT} --rotation-side input",
    "urnn structured": f"--peft-method urnn {URNN}",
    "urnn riemannian": f"--peft-method urnn {URNN} --urnn-update riemannian --peft-lr-rotation 0.2",
    "hybrid boft": f"{HYBRID} {BOFT}",
    "hybrid urnn": f"{HYBRID} --hybrid-rotation urnn {URNN} --hybrid-lambda descent",
    "hybrid merged": f"{HYBRID} {BOFT} --hybrid-merge-interval 3 --lora-ga-init original",
}
BLOOM = {  # what one family's runs suffice for: bfloat16, dropout with recompute, packed samples
    "lora bf16": "--peft-method lora --lora-rank 4 --bf16",
    "boft dropout": f"--peft-method boft {BOFT} --hidden-dropout 0.1 --attention-dropout 0.1 "
    "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    "hybrid packed": f"{HYBRID} {BOFT} --pack-sequences --packing next-fit",
}
METHODS = {"llama": LLAMA, "bloom": BLOOM}
TP2 = "--tensor-model-parallel-size 2"
CHUNKED = "TP2, loss in chunks"  # of two methods alone: what follows the loss is the same
LAYOUTS = {  # name -> ranks, flags
    "alone": (1, ""),
    "TP2": (2, TP2),
    "TP2+SP": (2, f"{TP2} --sequence-parallel"),
    "PP2": (2, "--pipeline-model-parallel-size 2"),
    "DP2": (2, "--use-distributed-optimizer"),
    CHUNKED: (2, f"{TP2} --cross-entropy-chunk-tokens 5"),
}
TRAINING = (
    f"--tokenizer-type NullTokenizer --vocab-size {VOCAB_SIZE - 1} --num-workers 0 --seq-length 32 "
    f"--micro-batch-size 4 --global-batch-size 8 --train-iters {LAST_STEP} --log-interval 1 --eval-interval 2 "
    "--eval-iters 1 --lr 5e-3 --lr-decay-style cosine --clip-grad 0.5 --cross-entropy-chunk-tokens 0"
)
PROMPTS = ("3 14 15", "92 65 35 89 79", "500")
NUM_TOKENS = 8  # of an answer

# Name -> command lines of `megatron-peft`, run one after another in one folder, where they may write.
TEXT = f"--tokenizer-type NullTokenizer --vocab-size {VOCAB_SIZE - 1} --seq-length 32"
RUN = (
    f"{TEXT} --pretrained-checkpoint {{inputs}}/llama --train-data-path {{inputs}}/pairs.jsonl --train-iters 6 "
    "--micro-batch-size 1 --global-batch-size 4 --lora-rank 4"
)
COMMANDS = (
    "train plan data convert generate evaluate certify experiment report demo bench sync check-gpu completion "
    "data:prepare data:preprocess data:preview convert:hf-to-megatron convert:megatron-to-hf convert:merge "
    "convert:export-adapter convert:import-adapter convert:verify"
)
SAID = {
    "help": ["--help", *(f"{command} --help".replace(":", " ") for command in COMMANDS.split())],
    "errors": Path(__file__).with_name("errors.txt").read_text().splitlines(),
    "print-config": [f"train {RUN} --save run --print-config"],
    "preview": [f"data preview {TEXT} --train-data-path {{inputs}}/pairs.jsonl --pack-sequences --show-samples 2"],
    "plan": [f"plan {RUN} {TP2} --pipeline-model-parallel-size 2 --json plan.json"],
    "plan --fit": [f"plan {RUN} --fit --world-size 2 --rehearsed 1 --json fit.json --save-config fit.yaml"],
    "certify": [f"certify {RUN} {TP2} --world-size 2 --output certificate.json"],
}


@dataclass(frozen=True)
class Case:
    """One model trained by one method at one layout."""

    model: str
    method: str
    layout: str

    def __str__(self) -> str:
        return f"{self.model} {self.method}, {self.layout}"


@dataclass(frozen=True)
class Commands:
    """What some commands say and write."""

    name: str

    def __str__(self) -> str:
        return f"says {self.name}"


CASES: list[Case | Commands] = [Commands(name) for name in SAID]
CASES += [
    Case(model, method, layout)
    for model in METHODS
    for method in METHODS[model]
    for layout in LAYOUTS
    if layout != CHUNKED or (model, method) in (("llama", "lora"), ("llama", "hybrid boft"))
]


BAD = {  # file -> what it holds; `errors.txt` names them
    "json.jsonl": '{"prompt": "1 2", "completion": "3"}\n{"prompt": \n',
    "fields.jsonl": '{"question": "1 2"}\n',
    "empty.jsonl": "",
    "section.yaml": "trainning:\n  lr: 1\n",
    "list.yaml": "- 1\n",
    "values.yaml": "lora-rnak: 4\nlr: many\nbf16: perhaps\n",
    "family/config.json": '{"model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"]}',
}


@dataclass(frozen=True)
class Inputs:
    """Models, data and prompts in a folder, bad ones too; both trees read them."""

    folder: Path

    @classmethod
    def write(cls, folder: Path) -> Inputs:
        save_llama(folder / "llama")
        save_bloom(folder / "bloom")
        save_pairs(folder / "pairs.jsonl")
        (folder / "prompts.jsonl").write_text("".join(f"{json.dumps({'prompt': prompt})}\n" for prompt in PROMPTS))
        bad = folder / "bad"
        shutil.copytree(folder / "llama", bad / "cut")
        weights = bad / "cut" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        for name, text in BAD.items():
            (bad / name).parent.mkdir(exist_ok=True)
            (bad / name).write_text(text)
        return cls(folder)


def train(tree: Tree, case: Case, inputs: Inputs, folder: Path) -> None:
    """Train, save and answer the prompts; at PP2 the adapters are merged into the base and exported as LoRA too.

    `folder` then holds `run`, `answers.jsonl`, `merged` and `exported`.
    """
    num_ranks, layout = LAYOUTS[case.layout]
    run(tree, "train", f"{_flags(case, inputs)} --save run --exit-interval {NUM_STEPS}", folder, num_ranks)
    answer = f"--load run --prompt-file {inputs.folder}/prompts.jsonl --output answers.jsonl"
    layout = "" if case.layout == "DP2" else layout
    run(tree, "generate", f"{answer} --max-new-tokens {NUM_TOKENS} {layout}", folder, num_ranks)
    if case.layout == "PP2":
        command = "megatron-to-hf" if case.method == "full" else "merge"
        run(tree, "convert", f"{command} --input run --output merged", folder)
        run(tree, "convert", "export-adapter --as-lora --max-rank 8 --input run --output exported", folder)


def say(tree: Tree, case: Commands, inputs: Inputs, folder: Path) -> None:
    """Run its commands; `folder` then holds `said.jsonl` and what they wrote."""
    folder.mkdir(parents=True)
    lines = [line.format(inputs=inputs.folder, run=RUN, text=TEXT) for line in SAID[case.name]]
    lines = [line.format(inputs=inputs.folder) for line in lines]  # RUN has inputs
    (folder / "lines.txt").write_text("\n".join(lines))
    run(tree, "say", "lines.txt", folder)


def resume(tree: Tree, case: Case, inputs: Inputs, run_of_base: Path, folder: Path) -> None:
    """Train the last iterations from the checkpoint that the base wrote; `folder` then holds `run`."""
    run(tree, "train", f"{_flags(case, inputs)} --load {run_of_base} --save run", folder, LAYOUTS[case.layout][0])


def _flags(case: Case, inputs: Inputs) -> str:
    data = f"{inputs.folder}/pairs.jsonl"
    paths = f"--pretrained-checkpoint {inputs.folder / case.model} --train-data-path {data} --valid-data-path {data}"
    return f"{paths} {TRAINING} {METHODS[case.model][case.method]} {LAYOUTS[case.layout][1]}"


def run(tree: Tree, program: str, flags: str, folder: Path, num_ranks: int = 1) -> str:
    """What a program of the table prints, given flags in the tree's own spelling; `folder` is made."""
    folder.mkdir(parents=True, exist_ok=True)
    words = flags.split()
    if any(newest.split()[0] in words for newest in FLAGS):
        words = spelled(words, tree.run(PROGRAMS[program], [*words, "--help"], folder))
    return tree.run(PROGRAMS[program], words, folder, num_ranks)


def spelled(words: Sequence[str], help_text: str, changes: dict[str, str] = FLAGS) -> list[str]:
    """`words` with the older spelling of each flag of `changes` whose newest one `help_text` does not know."""
    known = set(re.findall(r"[\w-]+", help_text))
    line = f" {' '.join(words)} "
    for newest, older in changes.items():
        if not set(newest.split()) <= known:
            line = line.replace(f" {newest} ", f" {older} ")
    return line.split()


def newest_name(name: str) -> str:
    for pattern, newest in NAMES.items():
        name = re.sub(pattern, newest, name)
    return name
