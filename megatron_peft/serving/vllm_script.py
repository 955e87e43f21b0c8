"""What vLLM makes of a model and an adapter: which tensors it binds, and log-probabilities. Run by vLLM's own Python.

`PYTHON vllm_script.py REQUEST.json ANSWER.json`, without any import of the project's. A request has the folder of a
`model`, those of `adapters`, `max_lora_rank`, and `prompts`, lists of token ids: with an empty list nothing is run, and
the model has no weights. An answer has

    versions    of vllm, torch and transformers
    slots       {layer that takes a LoRA: [[name in the adapter, outputs, inputs], ...]}, several of a fused layer
    adapters    of each: `error`, what vLLM raised when it read it, or null; `unbound`, its names that are in no slot;
                `bound`, {layer: [[shape of A, shape of B, whether both are finite] or null, ...]}, of each name
    log_probs   of the whole vocabulary after each prompt: without an adapter, and with each
"""

import json
import os
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the model is in this process, where it can be asked
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ["HF_HUB_OFFLINE"] = "1"


def _versions():
    found = {}
    for package in ("vllm", "vllm-cpu", "torch", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            pass
    return found


def _bind(request):
    """The engine's model without weights, and its own manager of adapters, which reads the folder."""
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.lora.request import LoRARequest
    from vllm.lora.worker_manager import WorkerLoRAManager
    from vllm.model_executor.model_loader.utils import initialize_model

    settings = EngineArgs(
        model=request["model"],
        dtype="float32",
        load_format="dummy",
        skip_tokenizer_init=True,
        enforce_eager=True,
        enable_lora=True,
        max_lora_rank=request["max_lora_rank"],
        max_loras=1,
    ).create_engine_config()
    with set_current_vllm_config(settings), tempfile.TemporaryDirectory() as folder:
        init_distributed_environment(1, 0, f"file://{folder}/meeting", 0, "gloo")
        initialize_model_parallel(1, 1)
        with torch.device("meta"):
            model = initialize_model(settings)
        manager = WorkerLoRAManager(settings, torch.device("cpu"), getattr(model, "embedding_modules", {}))
        manager.create_lora_manager(model, settings)
        slots, found = _layers_with_lora(manager._adapter_manager), []
        for at, folder in enumerate(request["adapters"], 1):
            try:
                read = manager._load_adapter(LoRARequest(f"adapter {at}", at, folder))
                found.append(_bound_by(read, slots))
            except Exception as error:
                found.append({"error": f"{type(error).__name__}: {error}"})
        return {"slots": slots, "adapters": found}


def _layers_with_lora(manager):
    """The layers that take a LoRA, by the buffers that they keep for its factors, one for each of a fused layer's."""
    slots = {}
    for name, layer in manager.modules.items():
        parts = manager.packed_modules.get(name) or [name]
        sizes = [(None, None)]  # of the embedding and of the output layer, which keep theirs in another form
        if isinstance(layer.lora_a_stacked, (tuple, list)):
            factors = zip(layer.lora_a_stacked, layer.lora_b_stacked, strict=True)
            sizes = [(B.shape[-2], A.shape[-1]) for A, B in factors]
        slots[name] = [[part, *size] for part, size in zip(parts, sizes, strict=True)]
    return slots


def _bound_by(read, slots):
    bound = {}
    for layer, parts in slots.items():
        bound[layer] = [_described(read.loras.get(part)) for part, _, _ in parts]
    known = {part for parts in slots.values() for part, _, _ in parts}
    unbound = sorted(name for name in read.loras if name not in known)
    return {"bound": bound, "unbound": unbound, "error": None}


def _described(one):
    import torch

    A, B = getattr(one, "lora_a", None), getattr(one, "lora_b", None)
    if A is None or B is None:
        return None
    return [list(A.shape), list(B.shape), bool(torch.isfinite(A).all() and torch.isfinite(B).all())]


def _run(request):
    """The engine itself, in float32, asked for the next token's log-probabilities after each prompt."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    settings = dict(
        model=request["model"],
        dtype="float32",
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=request["max_model_len"],
        max_logprobs=-1,
        disable_log_stats=True,
    )
    adapters = request["adapters"]
    if adapters:
        settings |= dict(enable_lora=True, max_lora_rank=request["max_lora_rank"], max_loras=1)
    engine = LLM(**settings)
    asked = [{"prompt_token_ids": prompt} for prompt in request["prompts"]]
    greedy = SamplingParams(temperature=0.0, max_tokens=1, logprobs=-1, detokenize=False)

    def log_probs(lora):
        found = []
        for output in engine.generate(asked, greedy, lora_request=lora, use_tqdm=False):
            (of_token,) = output.outputs[0].logprobs
            found.append([of_token[token].logprob for token in range(len(of_token))])
        return found

    requests = [LoRARequest(f"adapter {at}", at, folder) for at, folder in enumerate(adapters, 1)]
    for lora in requests:  # an error in `generate` would leave the engine waiting for ever
        engine.llm_engine.add_lora(lora)
    return {"log_probs": [log_probs(lora) for lora in (None, *requests)]}


def main():
    """Read the request, write the answer."""
    request = json.loads(Path(sys.argv[1]).read_text())
    answer = {"versions": _versions()}
    answer |= _run(request) if request["prompts"] else _bind(request)
    Path(sys.argv[2]).write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
