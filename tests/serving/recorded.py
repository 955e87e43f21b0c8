"""Answers of a real vLLM, kept for tests without one: `python -m tests.serving.recorded PYTHON` writes them again."""

import json
import sys
import tempfile
from pathlib import Path

from megatron_peft.conversion.peft_export import export_adapter
from megatron_peft.serving import engine
from tests.serving import runs

FILE = Path(__file__).with_name("recorded.json")
KEPT = ("wrong prefix", "dropped module", "dropped A of q", "half of B's rows", "rank cut", "not finite", "DoRA")


def main(python: str) -> None:
    """The script's answer, with the settings of each adapter."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base, run = runs.trained(folder, "--peft-method", "lora", "--lora-rank", str(runs.RANK))
        adapter = export_adapter(run, folder / "adapter", license="mit")
        faults = {**runs.SILENT_IN_NAMES, **runs.SILENT_IN_CONFIG}
        folders = [adapter, *(runs.spoilt(adapter, folder / kept, faults[kept]) for kept in KEPT)]
        with engine.Engine(Path(python)) as vllm:
            answer = vllm.ask("bind", model=str(base), adapters=[*map(str, folders)], max_lora_rank=2 * runs.RANK)
        settings = [json.loads((one / "adapter_config.json").read_text()) for one in folders]
    found = {"engine": vllm.name, **answer, "names": ["good", *KEPT], "settings": settings}
    FILE.write_text(json.dumps(found).replace(name, "FOLDER") + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
