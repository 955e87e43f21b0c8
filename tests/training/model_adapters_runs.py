"""The code of docs/your-own-model.md, on ranks started by test_model_adapters.py."""

import re
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing

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
