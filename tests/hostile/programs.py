"""The programs at work in a folder of good files of which one was replaced; each call is a fork of one rank.

base/                      a Llama with a tokenizer of whole words; bin/ and sharded/ its weights in other files
data.jsonl, chat.jsonl     pairs, conversations; tokens_text_document.idx and .bin are indexed texts
run/, peft/                what training saved, and its adapters for HF PEFT
prompts.jsonl              for megatron-peft generate; tasks/ for megatron-peft evaluate
gsm8k/, pairs.tsv          for megatron-peft data prepare, as problems.jsonl.gz
table.csv                  pairs; table.parquet and table.arrow too
grid.yaml, cells/          an experiment, and its results
"""

import gc
import gzip
import importlib
import json
import os
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

from tests.time_limits import seconds

LIMIT_SECONDS = 15.0  # of a program whose imports are done
MOST_BYTES = 1 << 35  # of a program's address space: who reads /dev/zero to its end must not take the machine along
OF_A_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
IMPORTED = (
    *("pretrain_peft", "tools.convert", "tools.evaluate", "tools.experiment", "tools.generate", "tools.report"),
    *("tools.prepare_data", "tools.preprocess_data", "megatron_peft.training.run", "lm_eval.tasks"),
    *("megatron_peft.evaluation.harness_run", "megatron_peft.evaluation.answers", "megatron_peft.evaluation.model"),
    *("megatron_peft.conversion.peft_export", "megatron_peft.conversion.peft_import", "megatron_peft.tasks.readers"),
    *("megatron_peft.conversion.convert", "scipy.io"),
    *("megatron_peft.commands.data", "megatron_peft.experiment.report", "megatron_peft.experiment.runner"),
)
CHECKPOINT = "run/iter_0000001"
GOOD_RUNS = (
    "pretrain_peft --pretrained-checkpoint base --train-data-path data.jsonl --train-iters 1 --seq-length 64 "
    "--peft-method lora --save run --num-workers 0",
    "tools.convert export-adapter --input run --output peft",
    "tools.preprocess_data --input texts.jsonl --output-prefix tokens --tokenizer-model base --append-eod",
)
Plant = Callable[[Path], None]  # makes a good file bad


class Call(NamedTuple):
    """`line` is a program and its flags, called in a folder where `plant` was given the path of `file`."""

    line: str
    file: str
    plant: Plant


class Answer(NamedTuple):
    """`code` is None where the program had not ended in time; `told` is what it wrote to the terminal."""

    code: int | None
    told: str
    seconds: float = 0.0
    peak_bytes: int = 0  # resident, of the program alone


def answers(argument: tuple[Path, Sequence[Call]], more: Sequence[str] = ()) -> list[Answer]:
    """Of each call. To be run on a rank: it changes the environment and imports what the programs do.

    more: good runs, after `GOOD_RUNS`.
    """
    folder, calls = argument
    for name in OF_A_RANK:
        os.environ.pop(name, None)
    os.environ |= {"TQDM_DISABLE": "1", "HF_DATASETS_CACHE": str(folder / "cache")}
    for name in IMPORTED:
        importlib.import_module(name)
    good = _good_files(folder / "good", (*GOOD_RUNS, *more))
    gc.freeze()  # or each fork, as it ends, would look through (and copy) all that was imported
    return [_answer_of(call, good, folder / str(number)) for number, call in enumerate(calls)]


def _answer_of(call: Call, good: Path, folder: Path) -> Answer:
    """The files are links to the good ones, but for the one that is replaced; its name may be a pattern."""
    shutil.copytree(good, folder, copy_function=os.link)
    path = next(folder.glob(call.file)) if "*" in call.file else folder / call.file
    content = path.read_bytes() if path.exists() else None
    path.unlink(missing_ok=True)
    if content is not None:
        path.write_bytes(content)
    call.plant(path)
    return run(call.line, folder)


def run(line: str, folder: Path) -> Answer:
    """A program in a fork of this process, ended when its time is up, with all that it started."""
    output = folder.with_suffix(".told")
    child = os.fork()
    if child == 0:
        _be_the_program(line.split(), folder, output)
    code, begun = None, time.monotonic()
    while code is None and time.monotonic() < begun + seconds(LIMIT_SECONDS):
        ended, status, used = os.wait4(child, os.WNOHANG)
        code = os.waitstatus_to_exitcode(status) if ended else time.sleep(0.01)
    if code is None:
        os.killpg(child, signal.SIGKILL)
        _, _, used = os.wait4(child, 0)
    told = output.read_text(errors="replace")
    return Answer(code, told, time.monotonic() - begun, 1024 * used.ru_maxrss)


def _be_the_program(words: Sequence[str], folder: Path, output: Path) -> NoReturn:
    os.setpgrp()
    os.chdir(folder)
    resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
    for stream in (1, 2):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    sys.argv = list(words)
    code: object = 1
    try:
        code = importlib.import_module(words[0]).main()
    except SystemExit as error:
        code = error.code
    except BaseException:  # noqa: BLE001 - as the interpreter would
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 0 if code is None else 1)


def sign(folder: Path) -> None:
    """Make a checkpoint's manifest anew for files that were changed, as somebody who means harm would."""
    from megatron_peft.checkpoint.folders import MANIFEST, write_manifest

    (folder / MANIFEST).unlink()  # a link to the good one
    write_manifest(folder, {})


def _good_files(folder: Path, runs: Sequence[str]) -> Path:
    import torch
    from safetensors.torch import load_file

    from tests.evaluation.local_tasks import write_tasks
    from tests.evaluation.worded_llama import save_worded_llama, save_worded_pairs
    from tests.experiment.small_results import write_cells

    save_worded_llama(folder / "base")
    weights = load_file(folder / "base" / "model.safetensors")
    for other in ("bin", "sharded"):
        shutil.copytree(folder / "base", folder / other)
        (folder / other / "model.safetensors").rename(folder / other / "all.safetensors")
    torch.save(weights, folder / "bin" / "pytorch_model.bin")
    index = {"weight_map": dict.fromkeys(weights, "all.safetensors")}
    (folder / "sharded" / "model.safetensors.index.json").write_text(json.dumps(index))
    save_worded_pairs(folder / "data.jsonl")
    turns = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
    _write_lines(folder / "chat.jsonl", [{"messages": turns}] * 8)
    _write_lines(folder / "texts.jsonl", [{"text": f"w{number} w1 w2"} for number in range(8)])
    _write_lines(folder / "prompts.jsonl", [{"prompt": "w1 w2"}])
    (folder / "gsm8k").mkdir()
    for name in ("train", "test"):
        problems = [{"question": f"{name} {number}?", "answer": "So. #### 7"} for number in range(60)]
        _write_lines(folder / "gsm8k" / f"{name}.jsonl", problems)
    (folder / "pairs.tsv").write_text("".join(f"word {number}\tmot {number}\n" for number in range(60)))
    os.chdir(folder)  # tasks name their data as they are given
    write_tasks(Path("tasks"), ["w1", "w2"], num_questions=2, longest=8)
    write_cells(folder)
    _write_pairs(folder, [{"prompt": f"w{number} ", "completion": f"w{number + 1}"} for number in range(8)])
    (folder / "grid.yaml").write_bytes((folder / "experiment.yaml").read_bytes())
    for line in runs:
        answer = run(line, folder)
        assert answer.code == 0, answer.told
    return folder


def _write_pairs(folder: Path, records: Sequence[dict[str, str]]) -> None:
    from datasets import Dataset
    from datasets.arrow_writer import ArrowWriter

    table = Dataset.from_list(list(records))
    table.to_parquet(folder / "table.parquet")
    table.to_csv(folder / "table.csv")
    with ArrowWriter(path=str(folder / "table.arrow"), features=table.features) as writer:
        writer.write_batch(table.to_dict())
        writer.finalize()
    solved = {"prompt": "def f():\n", "canonical_solution": "    return 1\n"}
    problem = {"task_id": "a/0", **solved, "test": "def check(f):\n    assert f() == 1\n", "entry_point": "f"}
    (folder / "problems.jsonl.gz").write_bytes(gzip.compress(json.dumps(problem).encode()))


def _write_lines(path: Path, records: Sequence[object]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
