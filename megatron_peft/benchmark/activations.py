"""Bytes that autograd keeps for backward, a layer of the model, by method.

Counted by hooks in one forward of the whole model: each storage once, weights and buffers not at all. What a method
adds to the frozen base's is divided by the number of layers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from megatron_peft.adapters.attach import attach_adapters, start_gradients_at_the_embedding
from megatron_peft.benchmark.figures import Figure
from megatron_peft.benchmarks.subjects import Setting, join, leave, load_base, microbatch
from megatron_peft.models.families import read_shape
from megatron_peft.runtime.ranks import run_ranks

MIB = 2**20
METHODS = ("lora", "boft", "urnn", "hybrid")
TIMEOUT_SECONDS = 1200.0

LIMIT = 1.001  # lambda and what it multiplies are a few scalars


def activations_figures(setting: Setting) -> list[Figure]:
    """BOFT's and uRNN's extra over LoRA's, the Hybrid's over LoRA's and BOFT's together."""
    kept = run_ranks(1, count_methods, setting, timeout=TIMEOUT_SECONDS)[0]
    num_layers = read_shape(setting.checkpoint).num_layers
    extra = {name: (num_bytes - kept["frozen"]) / num_layers for name, num_bytes in kept.items()}
    frozen = f"frozen {kept['frozen'] / num_layers / MIB:.1f} MiB a layer"
    return [
        _over(extra, "boft", ("lora",), frozen),
        _over(extra, "urnn", ("lora",), frozen),
        _over(extra, "hybrid", ("lora", "boft"), frozen),
    ]


def count_methods(setting: Setting) -> dict[str, int]:
    """Bytes by method, and of the frozen base. Started on a rank."""
    torch.set_num_threads(1)
    join(setting)
    kept = {name: _kept(setting, name) for name in ("frozen", *METHODS)}
    leave()
    return kept


def _over(extra: dict[str, float], name: str, others: Sequence[str], frozen: str) -> Figure:
    allowed = sum(extra[other] for other in others)
    note = f"{extra[name] / MIB:.2f} and {allowed / MIB:.2f} MiB a layer more; {frozen}"
    return Figure(f"{name}: kept for backward / {' and '.join(others)}'s", extra[name] / allowed, LIMIT, "", note)


def _kept(setting: Setting, method: str) -> int:
    (model,), _ = load_base(setting)
    model.requires_grad_(False)
    if method == "frozen":
        start_gradients_at_the_embedding(model)
    else:
        attach_adapters([model], setting.peft(method), seed=0)
    batch = microbatch(setting, read_shape(setting.checkpoint).vocab_size)
    saved = SavedBytes(model)
    with saved:
        loss = model(batch.tokens, batch.position_ids, None, labels=batch.labels)
    del loss
    return saved.num_bytes


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Context manager; counts what autograd keeps while it is entered, but for the tensors of `model`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(self._keep, lambda tensor: tensor)
        own = [*model.parameters(), *model.buffers()]
        self._seen = {tensor.untyped_storage().data_ptr() for tensor in own}
        self._held: list[Tensor] = []  # so that no address is used twice
        self.num_bytes = 0

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self._held.append(tensor)
            self.num_bytes += storage.nbytes()
        return tensor
