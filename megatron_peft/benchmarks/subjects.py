"""What is measured: steps of the frozen base, of the methods, of full fine-tuning, and of HF PEFT's LoRA.

Microbatches of random tokens, all of which count in the loss. A step of ours that trains is the training loop's own
`train_step`: forward, backward, gradient sums, the check for NaN, clipping and Adam. The frozen base has nothing to
update, so its step is forward, backward (the embedding's output requires a gradient, so that it runs through every
layer) and the gradient sums. It multiplies as the methods do, on a CPU by oneDNN, or as megatron-core does, by MKL.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from torch import nn

from megatron_peft.adapters.attach import attach_adapters, freeze, start_gradients_at_the_embedding
from megatron_peft.config import RunConfig, make_run
from megatron_peft.conversion.pretrained import LoadReport, load_pretrained
from megatron_peft.data.batches import Microbatch
from megatron_peft.models.families import read_shape
from megatron_peft.models.gpt import build_model_chunks
from megatron_peft.runtime.launch import start_model_parallel, start_world, stop
from megatron_peft.runtime.ranks import run_ranks
from megatron_peft.training.run import build_state, start_lora_ga
from megatron_peft.training.step import finish_gradients, finish_with, run_schedule, train_step
from megatron_peft.training.update import wrap_data_parallel

Step = Callable[[], Any]

SHAPE: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": 4096,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
}
TIMEOUT_SECONDS = 3600.0
LEARNING_RATE = 1e-4
NUM_ITERS = 1000  # length of the learning-rate schedule; no run gets there


@dataclass(frozen=True)
class Setting:
    """A model, a layout, a microbatch, and how often a step is timed.

    checkpoint: Hugging Face folder.
    rank: of LoRA, on all four linear layers; alpha is twice that. block_size, num_factors: of BOFT.
    """

    checkpoint: str
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    sequence_parallel: bool = False
    rows: int = 4
    positions: int = 256
    microbatches: int = 1
    rank: int = 16
    block_size: int = 8
    num_factors: int = 3
    data_parallel: int = 1
    bf16: bool = False
    base_precision: str = "run"
    turns: int = 9

    @property
    def layout(self) -> str:
        """The layout's usual short name, such as TP2+SP or TP2 x PP2."""
        sizes = {"TP": self.tensor_parallel, "PP": self.pipeline_parallel, "DP": self.data_parallel}
        named = [f"{axis}{size}" for axis, size in sizes.items() if size > 1]
        return (" x ".join(named) or "TP1") + "+SP" * self.sequence_parallel

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.tensor_parallel * self.pipeline_parallel * self.data_parallel

    def run(self, method: str = "lora") -> RunConfig:
        """The configuration of a run of this method."""
        return make_run(
            method=method,
            lora_rank=self.rank,
            lora_alpha=2 * self.rank,
            boft_block_size=self.block_size,
            boft_factors=self.num_factors,
            tensor_model_parallel_size=self.tensor_parallel,
            pipeline_model_parallel_size=self.pipeline_parallel,
            sequence_parallel=self.sequence_parallel,
            world_size=self.world_size,
            bf16=self.bf16,
            base_precision=self.base_precision,
            pretrained_checkpoint=self.checkpoint,
            train_data_path=("random.jsonl",),  # never opened
            seq_length=self.positions,
            micro_batch_size=self.rows,
            global_batch_size=self.rows * self.microbatches * self.data_parallel,
            train_iters=NUM_ITERS,
            lr=LEARNING_RATE,
        )


def save_shape(folder: Path, max_file_size: str = "5GB", **changes: Any) -> Path:
    """A model of SHAPE (8 layers, hidden 512) and `changes` with random weights, as a Hugging Face folder; once."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**{**SHAPE, **changes}))
        model.save_pretrained(folder, max_shard_size=max_file_size)
    return folder


def on_ranks(function: Callable[..., Any], setting: Setting, **more: Any) -> list[Any]:
    """What `function(setting, **more)` returns on each rank of the setting's layout; all of it is pickled."""
    run = partial(in_world, function=function, **more)
    return run_ranks(setting.world_size, run, setting, timeout=TIMEOUT_SECONDS)


def in_world(setting: Setting, function: Callable[..., Any], **more: Any) -> Any:
    """Call a function in the world of this process and the groups of the layout, on one thread."""
    torch.set_num_threads(1)
    start_world()
    start_model_parallel(setting.run().parallel, seed=1)
    answer = function(setting, **more)
    stop()
    return answer


def microbatch(setting: Setting, vocab_size: int) -> Microbatch:
    """Random tokens, the same on every rank."""
    size = setting.rows, setting.positions + 1
    tokens = torch.randint(vocab_size, size, generator=torch.Generator().manual_seed(0))
    return Microbatch(
        tokens=tokens[:, :-1].contiguous(),
        labels=tokens[:, 1:].contiguous(),
        loss_mask=torch.ones(setting.rows, setting.positions),
        position_ids=torch.arange(setting.positions).expand(setting.rows, -1).contiguous(),
        num_samples=setting.rows,
    )


def training_step(setting: Setting, method: str) -> Step:
    """`train_step` on the same microbatches again and again, of a `--peft-method`; the Hybrid starts as LoRA does."""
    shape = read_shape(setting.checkpoint)
    state = build_state(setting.run(method), shape, NUM_ITERS)
    batch = [microbatch(setting, shape.vocab_size)] * setting.microbatches
    return lambda: train_step(state, batch)


def _lora_on(setting: Setting, precision: str) -> Step:
    return training_step(replace(setting, base_precision=precision), "lora")


def load_base(setting: Setting) -> tuple[list[nn.Module], LoadReport]:
    """This rank's part of the base model with its pretrained weights, and what was read for it."""
    shape, run = read_shape(setting.checkpoint), setting.run()
    chunks = build_model_chunks(shape, run.model, run.parallel)
    report = load_pretrained(
        chunks,
        setting.checkpoint,
        shape,
        tensor_parallel_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_parallel_size=setting.tensor_parallel,
        progress=False,
        together=True,
    )
    return list(chunks), report


def frozen_step(setting: Setting, by_mkl: bool = False) -> Step:
    """Forward, backward and gradient sums of the base model, none of which is trained.

    Args: by_mkl: megatron-core's own linear layers, for which torch multiplies by MKL; else ours, as under an adapter.
    """
    chunks, _ = load_base(setting)
    for chunk in chunks:
        if by_mkl:
            chunk.requires_grad_(False)
        else:
            freeze(chunk)
        start_gradients_at_the_embedding(chunk)
    wrapped = wrap_data_parallel(chunks, setting.run())
    batch = [microbatch(setting, read_shape(setting.checkpoint).vocab_size)] * setting.microbatches
    finish_with(wrapped, finish_gradients)
    return lambda: run_schedule(wrapped, batch, forward_only=False)


def lora_ga_start(setting: Setting, num_batches: int) -> Step:
    """LoRA-GA's start of every layer from the same batch, so many times over."""
    chunks, _ = load_base(setting)
    config = setting.run("lora-ga")
    attach_adapters(chunks, config.peft, config.training.seed)
    batch = [microbatch(setting, read_shape(setting.checkpoint).vocab_size)]
    return lambda: start_lora_ga(chunks, config, [batch] * num_batches)


def load_with_transformers(setting: Setting) -> Any:
    """The same weights in transformers' own model, float32."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(setting.checkpoint, dtype=torch.float32)


def hf_peft_step(setting: Setting) -> Step:
    """The same training with transformers and HF PEFT: forward, backward, clipping, AdamW."""
    from peft import LoraConfig, get_peft_model

    model = load_with_transformers(setting)
    batch = microbatch(setting, model.config.vocab_size)
    lora = LoraConfig(r=setting.rank, lora_alpha=2 * setting.rank, target_modules="all-linear")
    model = get_peft_model(model, lora).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.01)

    def step() -> float:
        optimizer.zero_grad()
        # shift_labels: already shifted, so that every position counts as it does in ours.
        answer = model(input_ids=batch.tokens, labels=batch.labels, shift_labels=batch.labels, use_cache=False)
        answer.loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        return answer.loss.item()

    return step


STEPS: dict[str, Callable[[Setting], Step]] = {
    "frozen": frozen_step,
    "frozen-mkl": partial(frozen_step, by_mkl=True),
    **{method: partial(training_step, method=method) for method in ("lora", "boft", "urnn", "hybrid", "full")},
    **{f"lora on {precision}": partial(_lora_on, precision=precision) for precision in ("nf4", "fp8")},
    "lora-ga-start": lambda setting: lora_ga_start(setting, num_batches=1),
    "hf-peft-lora": hf_peft_step,
}
