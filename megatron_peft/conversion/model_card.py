"""The model card (README.md) of an exported adapter or a merged model, and the lines that serve it.

The front matter is what the Hugging Face hub reads: base, library, license, tags. Then come method, data and figures of
the run, from its record and its metrics, and last how to serve the folder. Nothing in it is asked from the network.
Folders stand there by their last names, and what others have named stands as it is, never as Markdown.
"""

import io
import re
import shlex
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from math import prod
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData
from huggingface_hub.repocard import metadata_load

from megatron_peft.checkpoint.folders import check_new, write_atomically
from megatron_peft.checkpoint.run_record import ADAPTER_CONFIG, RunRecord, find_checkpoint, read_record
from megatron_peft.config import ConfigurationError, errors, require, sources, untrusted
from megatron_peft.conversion.verify import verify
from megatron_peft.models.families import family_of, rules_for
from megatron_peft.models.rules import expected_tensors

CARD = "README.md"
LICENSE = re.compile(r"[A-Za-z0-9][\w.+-]*")  # the hub's identifiers are single words
LINK = re.compile(r"https://[\w./~%?=&#:@+-]+")
LICENSE_FIELDS = ("license", "license_name", "license_link")
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # values that --max-lora-rank of `vllm serve` takes
MERGED_INTO = {"original": "its original weights", "trained-values": "the values that it was trained on"}
NUM_TOKENS = 64
MEMORY = Path("/proc/meminfo")
VERIFIED = "\n## Verified in the engine that serves it\n"
NO_BASE = "HUGGING_FACE_BASE"  # where the base has no folder that others open


@dataclass(frozen=True)
class Exported:
    """What the card is of."""

    run: Path  # the checkpoint's folder
    record: RunRecord
    output: Path  # the folder that the card will lie in
    base: str | None  # the base's folder or name, as the run has it; None if there is none that others open
    is_adapter: bool  # of HF PEFT; else a whole model
    lora_rank: int | None = None
    license: str | None = None
    approximation: str = ""  # a section on what the export has left out
    into: str = "original"  # the values of a quantized base that adapters were merged into

    @property
    def name(self) -> str:
        return self.output.absolute().name


def check_export(output: str | Path, license: str | None) -> None:
    """ConfigurationError: --output exists, or --license is no identifier."""
    check_new(output)
    require(
        license is None or LICENSE.fullmatch(license) is not None,
        f"--license {license!r} is not a license identifier: give one like apache-2.0, llama3.1, or other.",
    )


def write_card(folder: Path, exported: Exported) -> None:
    """README.md in `folder`. A license that is not known is left out, and the user is told."""
    license: dict[str, Any] = {"license": exported.license} if exported.license else _license_of_base(exported.base)
    if not license:
        print(
            f"The model card names no license, since neither --license nor the base's card does: fill it in at the top "
            f"of {exported.output / CARD} before you publish it."
        )
    record, base, is_lora = exported.record, _named(exported.base), exported.lora_rank is not None
    tags = ["megatron-peft", record.config.peft.method, *(["lora"] if is_lora else [])]
    front = ModelCardData(
        base_model=base,
        library_name="peft" if exported.is_adapter else "transformers",
        pipeline_tag="text-generation",
        tags=list(dict.fromkeys(tags)),
        **license,
    )
    kind = "A LoRA adapter" if is_lora else "An adapter" if exported.is_adapter else "A model"
    trained_on = base or _named(record.config.model.pretrained_checkpoint) or ""
    sections = [
        f"---\n{front.to_yaml()}\n---",
        f"# {_literal(exported.name)}",
        f"{kind} fine-tuned from {_literal(trained_on)} with megatron_peft.",
        f"## Method\n\n{_method(exported)}",
        f"## Data\n\n{_data(record)}",
        f"## Figures\n\n{_figures(exported)}",
        exported.approximation,
        f"## How to serve it\n\n{_serving(exported, base, exported.name)}",
    ]
    text = "\n\n".join(section.strip() for section in sections if section) + "\n"
    (folder / CARD).write_text(text, encoding="utf-8")


def add_logits(exported: Exported, num_tokens: int | None) -> None:
    """Add to the card what `verify` finds of the run and the finished export, or print why it finds nothing.

    num_tokens: of each of two sequences; 0: add nothing; None: NUM_TOKENS of a run on a quantized base if the model in
        float32 has room, else 0.
    """
    if num_tokens is None and exported.record.config.model.base_precision != "run":
        needed = 4 * sum(map(prod, expected_tensors(rules_for(exported.record.shape)).values()))
        available = _available_bytes()
        if available is not None and needed > available / 2:
            print(
                f"The model card says nothing of logits: the model in float32 has {needed / 1e9:,.1f} GB, more than "
                f"half of the {available / 1e9:,.1f} GB that this machine has left. --num-tokens {NUM_TOKENS} does it "
                f"nevertheless; megatron-peft convert verify compares the finished folder with the run elsewhere."
            )
            return
        num_tokens = NUM_TOKENS
    if not num_tokens:
        return
    num_tokens = min(num_tokens, exported.record.shape.longest_sequence)
    try:
        comparison = verify(exported.run, exported.output, pretrained_checkpoint=exported.base, num_tokens=num_tokens)
    except ConfigurationError as error:
        print(f"The model card says nothing of logits: {error}")
        return
    of_trained, of_original = str(comparison.logits), str(comparison.on_original or "")
    rows = ("adapters on what they were trained on", of_trained), ("adapters on the original weights", of_original)
    with (exported.output / CARD).open("a", encoding="utf-8") as card:
        card.write(f"\n## Logits\n\nOn random tokens, compared with the run's own:\n\n{_table(rows)}\n")


def add_engine(folder: Path, sentences: Sequence[str]) -> None:
    """Say on the folder's card what an engine was seen to do, each sentence of which begins with the engine's name and
    version. What was said of any version of that engine before goes."""
    engine, card = sentences[0].split()[0], folder / CARD
    before, _, earlier = card.read_text(encoding="utf-8").partition(VERIFIED)
    kept = [line for line in earlier.strip().splitlines() if not line.startswith(f"- {engine} ")]
    lines = [*kept, *(f"- {sentence}" for sentence in sentences)]
    write_atomically(card, "\n".join([f"{before.rstrip()}\n{VERIFIED}", *lines]) + "\n")


def _available_bytes() -> int | None:
    """Memory that the machine can give without swapping; None where it does not say."""
    match = re.search(r"^MemAvailable: +(\d+) kB", MEMORY.read_text(), re.M) if MEMORY.exists() else None
    return 1024 * int(match[1]) if match else None


def serving_lines(output: Path, input: str | Path) -> str:
    """What the card of an export says about serving, with the folders of this machine."""
    run, config = find_checkpoint(input), output / ADAPTER_CONFIG
    adapter = untrusted.read_json_object(config) if config.is_file() else {}
    base = adapter.get("base_model_name_or_path")
    if base and Path(base).is_dir():
        base = str(Path(base).absolute())
    exported = Exported(run, read_record(run), output, base, bool(adapter), adapter.get("r"))
    return _serving(exported, base, str(output.absolute()))


def _license_of_base(base: str | None) -> dict[str, str]:
    """What the base's card says, if its fields are identifiers and its link is an address or a file of the base."""
    card = Path(base or "") / CARD
    if base is None or not card.is_file():
        return {}
    try:
        stated = metadata_load(card) or {}
    except (ValueError, OSError, yaml.YAMLError):
        return {}  # somebody else's card: the export does not depend on it
    known = stated if isinstance(stated.get("license"), str) else {}
    license = {name: known[name] for name in LICENSE_FIELDS if isinstance(known.get(name), str)}
    link = license.get("license_link", "")
    is_file = link == Path(link).name and (card.parent / link).is_file()
    are_names = all(LICENSE.fullmatch(license[name]) for name in ("license", "license_name") if name in license)
    return license if are_names and (not link or is_file or LINK.fullmatch(link)) else {}


def _named(base: str | None) -> str | None:
    """`org/name` of the Hub, also of a folder in its cache; of another folder its last name."""
    if base is None or sources.is_hub_name(base):
        return base
    return sources.hub_name(base) or Path(base).absolute().name


def _literal(text: str) -> str:
    """Text as Markdown's code, in which it cannot be a link, a heading, or a cell of a table."""
    text = "".join(letter if letter.isprintable() else " " for letter in text).replace("|", r"\|")
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{text}{fence}" if len(fence) == 1 else f"{fence} {text} {fence}"


def _table(rows: Iterable[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows if value)])


def _method(exported: Exported) -> str:
    record = exported.record
    peft, optimizer, base = record.config.peft, record.config.optimizer, record.config.model.base_precision
    merged = "" if exported.is_adapter else f"; merged into {MERGED_INTO[exported.into]}"
    used = (field for field in fields(peft) if field.name in peft.spec.fields(peft) and field.name != "method")
    values = ((errors.flag_of(field), getattr(peft, field.name)) for field in used)
    typed = " ".join(errors.spelled(name, value) for name, value in values if value not in (None, False))
    return _table([
        ("method", f"`{peft.method}`: {peft.spec.summary}"),
        ("settings", _literal(typed) if typed else ""),
        ("optimizer", f"{optimizer.optimizer}, learning rate {optimizer.lr:g}" if optimizer.lr else ""),
        ("samples a step", str(record.config.training.global_batch_size or "")),
        ("precision", "bf16" if record.config.model.bf16 else "float32"),
        ("base while it was trained", "" if base == "run" else f"{base}{merged}"),
    ])  # fmt: skip


def _data(record: RunRecord) -> str:
    """Names of files, without the folders of the machine."""
    data = record.config.data
    named = {"training": data.train_data_path or data.data_path, "validation": data.valid_data_path}
    rows = [(use, ", ".join(_literal(Path(path).name) for path in paths)) for use, paths in named.items()]
    longest = "" if record.longest_sample is None else f"{record.longest_sample:,} tokens"
    return _table([*rows, ("longest sample", longest), ("maximum sequence length", f"{data.seq_length:,} tokens")])


def _figures(exported: Exported) -> str:
    """The position of the checkpoint, and the last value of each metric up to it."""
    position = exported.record.position
    last: dict[str, float] = {}
    path = exported.run.parent / "metrics.jsonl"
    with path.open("rb") if path.is_file() else io.BytesIO() as file:
        for line in file:
            with suppress(ConfigurationError):  # a torn line
                metrics = untrusted.parse_json(line, str(path))
                iteration = metrics.get("iteration") if isinstance(metrics, dict) else None
                if isinstance(iteration, int) and iteration <= position["iteration"]:
                    last |= {name: value for name, value in metrics.items() if isinstance(value, int | float)}
    named = {"loss": "training loss", "validation_loss": "validation loss", "epoch": "epochs"}
    counts = {"iteration": "iterations", "consumed_samples": "samples", "consumed_tokens": "tokens"}
    rows = [(title, f"{position[name]:,}") for name, title in counts.items() if position.get(name)]
    rows += [(title, f"{last[name]:.4g}") for name, title in named.items() if name in last]
    return _table(rows) if rows else "The run's folder holds no figures."


def _serving(exported: Exported, base: str | None, folder: str) -> str:
    """Lines for vLLM, transformers and peft, or why there are none."""

    def python(model: str, last: str = "", first: str = "") -> str:
        load = f"model = AutoModelForCausalLM.from_pretrained({model!r})"
        lines = (first, "from transformers import AutoModelForCausalLM", load, last)
        return "```python\n" + "\n".join(filter(None, lines)) + "\n```"

    if not exported.is_adapter:
        return f"vLLM:\n\n```sh\nvllm serve {shlex.quote(folder)}\n```\n\ntransformers:\n\n{python(folder)}"
    base = base or NO_BASE
    merged = "Merge the run (`megatron-peft convert merge`) and serve the merged folder."
    family = family_of(exported.record.shape.architecture)
    fitting = [rank for rank in VLLM_RANKS if rank >= (exported.lora_rank or 0)]
    if not family.vllm_serves_lora:
        vllm = f"vLLM takes no LoRA for {family.architectures[0]}. {merged}"
    elif exported.lora_rank is None:
        vllm = f"vLLM serves LoRA only. Export the run with `--as-lora`, or: {merged[0].lower()}{merged[1:]}"
    elif not fitting:
        vllm = f"vLLM takes ranks up to {VLLM_RANKS[-1]}; this one is {exported.lora_rank}. {merged}"
    else:
        module = shlex.quote(f"{exported.name}={folder}")
        command = f"vllm serve {shlex.quote(base)} --enable-lora --max-lora-rank {fitting[0]} --lora-modules {module}"
        vllm = f"```sh\n{command}\n```"
    wrap = f"model = PeftModel.from_pretrained(model, {folder!r})"
    return "\n\n".join([
        f"vLLM:\n\n{vllm}",
        "The Python below needs the packages transformers and peft (`pip install transformers peft`).",
        f"transformers:\n\n{python(base, f'model.load_adapter({folder!r})')}",
        f"peft:\n\n{python(base, wrap, first='from peft import PeftModel')}",
    ])  # fmt: skip
