"""The model card (README.md) of an exported adapter or a merged model, and the lines that serve it.

The front matter is what the Hugging Face hub reads: base, library, license, tags. Then come method, data and figures of
the run, from its record and its metrics, and last how to serve the folder. Nothing in it is asked from the network.
Folders stand there by their last names, and what others have named stands as it is, never as Markdown.
"""

import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData

from megatron_peft.checkpoint.record import ADAPTER_CONFIG, RunRecord, find_checkpoint, read_record
from megatron_peft.config import ConfigurationError, require
from megatron_peft.config.errors import flag_of, spelled
from megatron_peft.config.hub import hub_name, is_hub_name
from megatron_peft.config.untrusted import MAX_BYTES, parse_json, parse_yaml, read_json_object, read_text
from megatron_peft.models.families import family_of

CARD = "README.md"
HEADING = "## How to serve it"
METRICS = "metrics.jsonl"
LICENSE = re.compile(r"[A-Za-z0-9][\w.+-]*")  # the hub's identifiers are single words
LINK = re.compile(r"https://[\w./~%?=&#:@+-]+")
LICENSE_FIELDS = ("license", "license_name", "license_link")
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # values that --max-lora-rank of `vllm serve` takes
NO_BASE = "HUGGING_FACE_BASE"  # where the base has no folder that others open


@dataclass(frozen=True)
class Exported:
    """What the card is of.

    Args:
        run: the checkpoint's folder.
        record: of the run.
        output: the folder that the card will lie in.
        base: the base's folder or name, as the run has it; None if there is none that others open.
        is_adapter: an adapter of HF PEFT; else a whole model.
        lora_rank: of a LoRA.
        license: --license.
        approximation: a section on what the export has left out.
    """

    run: Path
    record: RunRecord
    output: Path
    base: str | None
    is_adapter: bool
    lora_rank: int | None = None
    license: str | None = None
    approximation: str = ""

    @property
    def name(self) -> str:
        return self.output.absolute().name

    @property
    def is_lora(self) -> bool:
        return self.lora_rank is not None


def check_license(license: str | None) -> None:
    """ConfigurationError: --license is no identifier."""
    require(
        license is None or LICENSE.fullmatch(license) is not None,
        f"--license {license!r} is not a license identifier: give one like apache-2.0, llama3.1, or other.",
    )


def write_card(folder: Path, exported: Exported) -> None:
    """README.md in `folder`. A license that is not known is left out, and the user is told."""
    license = _license(exported)
    if not license:
        print(
            f"The model card names no license, since neither --license nor the base's card does: fill it in at the top "
            f"of {exported.output / CARD} before you publish it."
        )
    (folder / CARD).write_text(_card(exported, license), encoding="utf-8")


def serving_lines(output: Path, input: str | Path) -> str:
    """What the card of an export says about serving, with the folders of this machine."""
    run, config = find_checkpoint(input), output / ADAPTER_CONFIG
    adapter = read_json_object(config) if config.is_file() else None
    base, rank = (adapter["base_model_name_or_path"], adapter.get("r")) if adapter else (None, None)
    if Path(base or "").is_dir():
        base = str(Path(base or "").absolute())
    exported = Exported(run, read_record(run), output, base, adapter is not None, rank)
    return _serving(exported, base, str(output.absolute()))


def _card(exported: Exported, license: Mapping[str, str]) -> str:
    sections = [
        f"---\n{_front_matter(exported, license)}\n---",
        f"# {_literal(exported.name)}",
        _summary(exported),
        f"## Method\n\n{_method(exported.record)}",
        f"## Data\n\n{_data(exported.record)}",
        f"## Figures\n\n{_figures(exported)}",
        exported.approximation,
        f"{HEADING}\n\n{_serving(exported, _named(exported.base), exported.name)}",
    ]
    return "\n\n".join(section.strip() for section in sections if section) + "\n"


def _front_matter(exported: Exported, license: Mapping[str, str]) -> str:
    tags = ["megatron-peft", exported.record.config.peft.method, *(["lora"] if exported.is_lora else [])]
    data = ModelCardData(
        base_model=_named(exported.base),
        library_name="peft" if exported.is_adapter else "transformers",
        pipeline_tag="text-generation",
        tags=list(dict.fromkeys(tags)),
        license=license.get("license"),
        license_name=license.get("license_name"),
        license_link=license.get("license_link"),
    )
    return data.to_yaml()


def _license(exported: Exported) -> dict[str, str]:
    """--license, or what the base's card says."""
    if exported.license:
        return {"license": exported.license}
    card = Path(exported.base or "") / CARD
    if exported.base is None or not card.is_file():
        return {}
    try:
        front = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", read_text(card), re.DOTALL)
        stated = parse_yaml(front[1], str(card), yaml.SafeLoader) if front else {}
    except ConfigurationError:
        return {}  # somebody else's card: the export does not depend on it
    known = stated if isinstance(stated, dict) and isinstance(stated.get("license"), str) else {}
    found = {name: known[name] for name in LICENSE_FIELDS if isinstance(known.get(name), str)}
    link = found.get("license_link", "")
    is_file = link == Path(link).name and (card.parent / link).is_file()
    are_names = all(LICENSE.fullmatch(found[name]) for name in ("license", "license_name") if name in found)
    return found if are_names and (not link or is_file or LINK.fullmatch(link)) else {}


def _named(base: str | None) -> str | None:
    """`org/name` of the Hub, also of a folder in its cache; of another folder its last name."""
    if base is None or is_hub_name(base):
        return base
    return hub_name(base) or Path(base).absolute().name


def _literal(text: str) -> str:
    """Text as Markdown's code, in which it cannot be a link, a heading, or a cell of a table."""
    text = "".join(one if one.isprintable() else " " for one in text).replace("|", r"\|")
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{text}{fence}" if len(fence) == 1 else f"{fence} {text} {fence}"


def _summary(exported: Exported) -> str:
    kind = "A LoRA adapter" if exported.is_lora else "An adapter" if exported.is_adapter else "A model"
    base = _named(exported.base) or _named(exported.record.config.model.pretrained_checkpoint)
    return f"{kind} fine-tuned from {_literal(base or '')} with megatron_peft."


def _method(record: RunRecord) -> str:
    peft = record.config.peft
    used = [one for one in fields(peft) if one.name in peft.spec.fields(peft) and one.name != "method"]
    values = ((flag_of(one), getattr(peft, one.name)) for one in used)
    typed = " ".join(spelled(name, value) for name, value in values if value not in (None, False))
    optimizer, training = record.config.optimizer, record.config.training
    rows = [
        ("method", f"`{peft.method}`: {peft.spec.summary}"),
        ("settings", _literal(typed) if typed else ""),
        ("optimizer", f"{optimizer.optimizer}, learning rate {optimizer.lr:g}" if optimizer.lr else ""),
        ("samples a step", str(training.global_batch_size or "")),
        ("precision", "bf16" if record.config.model.bf16 else "float32"),
    ]
    return _table(rows)


def _data(record: RunRecord) -> str:
    """Names of files, without the folders of the machine."""
    data = record.config.data
    named = {"training": data.train_data_path or data.data_path, "validation": data.valid_data_path}
    rows = [(use, ", ".join(_literal(Path(path).name) for path in paths)) for use, paths in named.items()]
    return _table([*rows, ("longest sample", f"{data.seq_length:,} tokens")])


def _figures(exported: Exported) -> str:
    position = exported.record.position
    last = _last_metrics(exported.run.parent / METRICS, position["iteration"])
    named = {"loss": "training loss", "validation_loss": "validation loss", "epoch": "epochs"}
    counts = {"iteration": "iterations", "consumed_samples": "samples", "consumed_tokens": "tokens"}
    rows = [(title, f"{position[name]:,}") for name, title in counts.items() if position.get(name)]
    rows += [(title, f"{last[name]:.4g}") for name, title in named.items() if name in last]
    return _table(rows) if rows else "The run's folder holds no figures."


def _last_metrics(path: Path, iteration: int) -> dict[str, float]:
    """The last number of each name up to an iteration; without those of a torn or foreign line."""
    found: dict[str, float] = {}
    for record in _metrics(path):
        if record["iteration"] <= iteration:
            found |= {name: value for name, value in record.items() if isinstance(value, int | float)}
    return found


def _metrics(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        return
    with path.open("rb") as file:
        for line in iter(lambda: file.readline(MAX_BYTES), b""):
            try:
                record = parse_json(line, str(path))
            except ConfigurationError:
                continue
            if isinstance(record, dict) and isinstance(record.get("iteration"), int):
                yield record


def _table(rows: list[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows if value)])


def _serving(exported: Exported, base: str | None, folder: str) -> str:
    if not exported.is_adapter:
        return f"vLLM:\n\n{_code(f'vllm serve {shlex.quote(folder)}')}\n\ntransformers:\n\n{_python(_model(folder))}"
    base = base or NO_BASE
    adapter = f"model.load_adapter({folder!r})"
    wrapped = f"model = PeftModel.from_pretrained(model, {folder!r})"
    return "\n\n".join([
        f"vLLM:\n\n{_vllm(exported, base, folder)}",
        f"transformers:\n\n{_python([*_model(base), adapter])}",
        f"peft:\n\n{_python(['from peft import PeftModel', *_model(base), wrapped])}",
    ])  # fmt: skip


def _vllm(exported: Exported, base: str, folder: str) -> str:
    """The line that serves an adapter, or why there is none and what to do."""
    merged = "Merge the run (`megatron-peft convert merge`) and serve the merged folder."
    family = family_of(exported.record.shape.architecture)
    if not family.vllm_serves_lora:
        return f"vLLM takes no LoRA for {family.architectures[0]}. {merged}"
    if exported.lora_rank is None:
        return f"vLLM serves LoRA only. Export the run with `--as-lora`, or: {merged[0].lower()}{merged[1:]}"
    fitting = [rank for rank in VLLM_RANKS if rank >= exported.lora_rank]
    if not fitting:
        return f"vLLM takes ranks up to {VLLM_RANKS[-1]}; this one is {exported.lora_rank}. {merged}"
    module = shlex.quote(f"{exported.name}={folder}")
    line = f"vllm serve {shlex.quote(base)} --enable-lora --max-lora-rank {fitting[0]} --lora-modules {module}"
    return _code(line)


def _model(folder: str) -> list[str]:
    return [
        "from transformers import AutoModelForCausalLM",
        f"model = AutoModelForCausalLM.from_pretrained({folder!r})",
    ]


def _code(line: str) -> str:
    return f"```sh\n{line}\n```"


def _python(lines: list[str]) -> str:
    return "```python\n" + "\n".join(lines) + "\n```"
