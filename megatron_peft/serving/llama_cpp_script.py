"""llama.cpp, asked by lines of JSON like `vllm_script.py`: GGUF files, what they bind, log-probabilities.

`PYTHON llama_cpp_script.py` needs xllamacpp, and llama.cpp's converters in the folder llama.cpp of its environment. A
model is a folder of Hugging Face, an adapter one of HF PEFT, or a .gguf file. `alphas` has one for each adapter, with
which its scale is alpha / rank: the converter ignores use_rslora.

    versions   of xllamacpp, torch and transformers, of those that are installed; {} without the converters
    convert    adapter, alpha, model, output. Writes a .gguf file in float32; of the model config.json is read
    bind       model, of which config.json is read, adapters, alphas. Answer as there, and after whether a pair of
               factors is finite its scale
    open       model, adapters, settings (alphas, max_model_len). The model is converted to float32, with numbers for
               its tokens, and its file is gone when it is open
    log_probs  prompts. Answer as there
"""

import json
import logging
import math
import os
import runpy
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

CONVERTERS = Path(sys.prefix) / "llama.cpp"
CONFIG = "adapter_config.json"


def _versions():
    versions = {}
    for name in ("xllamacpp", "torch", "transformers") if CONVERTERS.is_dir() else ():
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            pass
    return versions


def _run(converter, *words):
    """A converter, in this process; what it says of an error is raised."""
    said, handler = [], logging.Handler(logging.ERROR)
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger().handlers = [handler]
    sys.argv = [converter, *map(str, words)]
    try:
        runpy.run_path(str(CONVERTERS / f"{converter}.py"), run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise RuntimeError(f"{converter}.py: {' '.join(said) or f'exit code {end.code}'}") from end


def _model_class(model):
    from conversion import ModelBase, ModelType, get_model_architecture, get_model_class

    return get_model_class(get_model_architecture(ModelBase.load_hparams(Path(model), False), ModelType.TEXT))


def _number_the_tokens(self):
    """Stand in for a tokenizer: prompts of ids need none, and converters know only some."""
    size = self.hparams["vocab_size"]
    self.gguf_writer.add_tokenizer_model("llama")
    self.gguf_writer.add_tokenizer_pre("default")
    self.gguf_writer.add_token_list([f"<{token}>" for token in range(size)])
    self.gguf_writer.add_token_scores([0.0] * size)
    self.gguf_writer.add_token_types([1] * size)


def _check_pairs(file):
    """Name the module of which the converter would say AssertionError."""
    from safetensors import safe_open

    shapes = {}
    with safe_open(file, "pt") as tensors:
        for name in tensors.keys():
            module, _, factor = name.removeprefix("base_model.model.").rpartition(".lora_")
            shapes.setdefault(module, {})[factor.removeprefix("embedding_")[:1]] = tensors.get_slice(name).get_shape()
    for module, of in shapes.items():
        if of.keys() != {"A", "B"} or of["A"][0] != of["B"][-1]:
            raise ValueError(f"{module} has no pair of factors of one rank: {of}")


def _convert(adapter, alpha, model, output):
    adapter = Path(adapter)
    if (file := adapter / "adapter_model.safetensors").is_file():
        _check_pairs(file)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, adapter.name)
        folder.mkdir()
        for file in adapter.iterdir():
            (folder / file.name).symlink_to(file.absolute())
        (folder / CONFIG).unlink()
        settings = {**json.loads((adapter / CONFIG).read_text()), "lora_alpha": alpha, "use_rslora": False}
        (folder / CONFIG).write_text(json.dumps(settings))
        _run("convert_lora_to_gguf", folder, "--base", model, "--outfile", output, "--outtype", "f32")
    return {}


def _file(adapter, alpha, model, output):
    if adapter.endswith(".gguf"):
        return adapter
    _convert(adapter, alpha, model, output)
    return output


def _bind(model, adapters, alphas):
    slots, bindings = _layers_with_lora(model), []
    with tempfile.TemporaryDirectory() as folder:
        for at, (adapter, alpha) in enumerate(zip(adapters, alphas, strict=True)):
            try:
                bindings.append(_bound_by(_file(adapter, alpha, model, f"{folder}/{at}.gguf"), slots))
            except Exception as error:
                bindings.append({"error": f"{type(error).__name__}: {error}"})
    return {"slots": slots, "adapters": bindings}


def _layers_with_lora(model):
    """The names that llama.cpp gives to the linear layers and the embedding of a model without weights."""
    import gguf
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(model)
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(config)
    names, slots = gguf.get_tensor_name_map(_model_class(model).model_arch, config.num_hidden_layers), {}
    for name, module in built.named_modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Embedding)) and (slot := names.get_name(name)):
            sizes = [getattr(module, size, None) for size in ("out_features", "in_features")]
            slots[f"{slot}.weight"] = [[name, *sizes]]
    return slots


def _bound_by(file, slots):
    import gguf

    read = gguf.GGUFReader(file)
    alpha, tensors = float(read.fields["adapter.lora.alpha"].contents()), {t.name: t for t in read.tensors}
    pairs = {slot: [tensors.get(f"{slot}.lora_{name}") for name in "ab"] for slot in slots}
    bound = {slot: [_described(A, B, alpha)] for slot, (A, B) in pairs.items()}
    unbound = sorted(name for name in tensors if name.rpartition(".lora_")[0] not in slots)
    return {"bound": bound, "unbound": unbound, "error": None}


def _described(A, B, alpha):
    import gguf
    import numpy

    if A is None or B is None:
        return None
    shapes = [[int(size) for size in reversed(factor.shape)] for factor in (A, B)]
    finite = all(numpy.isfinite(gguf.dequantize(factor.data, factor.tensor_type)).all() for factor in (A, B))
    return [*shapes, bool(finite), alpha / shapes[1][-1]]


class _Engine:
    """llama.cpp's server without its port, in float32 throughout, with its adapters read."""

    def __init__(self, model, adapters, settings):
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.n_ctx, params.n_parallel, params.warmup, params.cache_prompt = settings["max_model_len"], 1, False, False
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        _model_class(model).set_vocab = _number_the_tokens
        with tempfile.TemporaryDirectory() as folder:
            params.model.path = f"{folder}/model.gguf"
            _run("convert_hf_to_gguf", model, "--outfile", params.model.path, "--outtype", "f32")
            pairs = enumerate(zip(adapters, settings.get("alphas", ()), strict=True))
            files = [_file(adapter, alpha, model, f"{folder}/{at}.gguf") for at, (adapter, alpha) in pairs]
            params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(file, 0.0) for file in files]
            self.server = xllamacpp.Server(params)
        self.vocab_size = json.loads(Path(model, "config.json").read_text())["vocab_size"]
        self.choices = [[]] + [[{"id": at, "scale": 1.0}] for at in range(len(files))]

    def log_probs(self, prompts):
        return {"log_probs": [[self._after(prompt, lora) for prompt in prompts] for lora in self.choices]}

    def _after(self, prompt, lora):
        how = {"max_tokens": 1, "temperature": 0.0, "logprobs": self.vocab_size, "ignore_eos": True, "lora": lora}
        answer = self.server.handle_completions({"prompt": prompt, **how})
        (token,) = answer["choices"][0]["logprobs"]["content"]
        of_token = {near["id"]: near["logprob"] for near in token["top_logprobs"]}
        log_probs = [of_token[token] for token in range(self.vocab_size)]
        return [math.nan if value is None else value for value in log_probs]  # JSON of the server has null for it


DONE = {"versions": _versions, "convert": _convert, "bind": _bind}


def main():
    """Answer the requests. What the engine prints goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.path[:0] = [str(CONVERTERS), str(CONVERTERS / "gguf-py")]
    engine = None
    for line in sys.stdin:
        request = json.loads(line)
        done = request.pop("do")
        try:
            if done == "open":
                engine, answer = _Engine(**request), {}
            elif done in DONE:
                answer = DONE[done](**request)
            else:
                answer = getattr(engine, done)(**request)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
