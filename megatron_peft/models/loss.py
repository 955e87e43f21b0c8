"""The loss of a frozen output layer in chunks of tokens, so that neither logits nor their gradient ever exist whole.

A chunk's logits, its losses and their gradient with respect to its hidden states are formed together in forward, by the
functions that would do it for all tokens at once, and nothing but that gradient is kept. Backward multiplies it by the
gradient of each token's loss, and completes it over the tensor-parallel ranks as the output layer does.

Letters: s sequence, b batch, t tensor-parallel size, h hidden size, n tokens of a chunk, v a rank's own vocabulary.
"""

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor
from torch.autograd import Function

from megatron_peft.adapters.frozen_linear import FrozenLinearCall, start_input_gradient, whole_sequence
from megatron_peft.adapters.linear import FrozenColumnParallelLinear
from megatron_peft.adapters.quantized_weight import dense_rows
from megatron_peft.config import RunConfig
from megatron_peft.models.shape import ModelShape
from megatron_peft.runtime.cpu_kernels import flat, linear, linear_into
from megatron_peft.runtime.precision import full_precision

LOGITS_BYTES = 2**26
ROWS_BYTES, FEW_BYTES = 2**25, 2**20  # of the output layer that are multiplied at a time


def chunk_tokens(chunk_size: int | None, vocab_size: int) -> int:
    """Tokens of a chunk by --cross-entropy-chunk-tokens; by default as many as have LOGITS_BYTES of float32 logits.

    vocab_size: of this rank, padded.
    """
    return max(1, LOGITS_BYTES // (4 * vocab_size)) if chunk_size is None else chunk_size


def loss_summary(config: RunConfig, shape: ModelShape) -> str:
    """The size of the chunks that a run's loss is formed in, in a line for its start; empty if there are none."""
    size = config.parallel.tensor_model_parallel_size
    vocab_size = shape.padded_vocab_size(config.model.make_vocab_size_divisible_by, size) // size
    tokens = config.training.micro_batch_size * config.data.seq_length
    num_tokens = min(chunk_tokens(config.model.cross_entropy_chunk_tokens, vocab_size), tokens)
    if not (config.peft.trains_adapters and num_tokens):
        return ""
    return (
        f"loss: in chunks of {num_tokens} tokens, whose float32 logits take {num_tokens * vocab_size * 4 / 1e6:.3g} MB "
        f"on a rank (--cross-entropy-chunk-tokens)"
    )


class OutputLayer(FrozenColumnParallelLinear):
    """megatron-core's output layer, whose logits of padded rows of the vocabulary have probability 0.

    vocab_size: of the whole model, without padding.
    hands_on_input: its output is its input.
    """

    vocab_size: int
    hands_on_input = False

    def forward(
        self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """[s / t under sequence parallelism, b, h] -> ([s, b, v], or gathered [s, b, vocabulary]; no bias)."""
        if self.hands_on_input:
            return input_, None
        logits, bias = super().forward(input_, weight, runtime_gather_output)
        return self.masked(logits), bias

    def call(self, weight: Tensor) -> FrozenLinearCall:
        """What the layer does to its input and to the input's gradient."""
        settings = {"bias": None, "allreduce_dgrad": self.allreduce_dgrad, "sequence_parallel": self.sequence_parallel}
        return self._call(weight, settings)

    def masked(self, logits: Tensor) -> Tensor:  # [..., v or vocabulary]
        """Replace the logits of padded rows by -inf, or by the lowest finite number if all rows here are padded.

        Transformer Engine's loss subtracts the largest logit of each rank, and -inf minus -inf is NaN.
        """
        first = 0
        if logits.shape[-1] == self.output_size_per_partition:
            first = self.tp_group.rank() * self.output_size_per_partition
        num_real = max(self.vocab_size - first, 0)
        if num_real < logits.shape[-1]:
            lowest = -torch.inf if num_real else torch.finfo(logits.dtype).min
            logits.detach()[..., num_real:] = lowest  # probability and gradient are 0
        return logits


class ChunkedLossModel(GPTModel):
    """megatron-core's model, whose loss is formed in chunks of `config.loss_chunk_tokens`, if there are any, once its
    output layer is frozen.
    """

    config: Any
    output_layer: OutputLayer

    def forward(self, *args: Any, only_hidden: bool = False, **kwargs: Any) -> Tensor:
        """Losses [b, s] if `labels` are given, or logits [b, s, v], on the last pipeline stage, like megatron-core's.

        only_hidden: not logits, but what they would be made of, [b, s, h]; without labels.
        """
        if not self.post_process:
            return super().forward(*args, **kwargs)
        head, has_labels = self.output_layer, kwargs.get("labels") is not None
        is_frozen = head.is_frozen and not self.output_weight.requires_grad
        in_chunks = has_labels and self.config.loss_chunk_tokens > 0 and is_frozen
        head.hands_on_input = only_hidden or in_chunks
        try:
            return super().forward(*args, **kwargs)
        finally:
            head.hands_on_input = False

    @property
    def output_weight(self) -> Any:
        """The output layer's [v, h], which is the embedding's where the two are tied."""
        is_tied = self.share_embeddings_and_output_weights
        return self.shared_embedding_or_output_weight() if is_tied else self.output_layer.weight

    def logits_of(self, hidden: Tensor) -> Tensor:  # [n, h] -> [n, vocabulary]
        """Logits in float32 of hidden states that every tensor-parallel rank has, gathered."""
        return self.output_layer(hidden[:, None], self.output_weight, runtime_gather_output=True)[0][:, 0].float()

    @full_precision
    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """[b, s], [s, b, v] -> [b, s]. Of an output layer that hands its input on, `logits` are that."""
        head = self.output_layer
        if not head.hands_on_input:
            return super().compute_language_model_loss(labels, logits)
        hidden, call = logits, head.call(self.output_weight)
        has_gradient = torch.is_grad_enabled() and hidden.requires_grad
        x, weight = whole_sequence(hidden.detach(), call), call.stored
        # The gradient takes the place of gathered tokens, which nobody else has.
        dx = x if call.splits_sequence else torch.empty(x.shape, dtype=x.dtype, device=x.device)
        num_chunks = max(-(-labels.numel() // self.config.loss_chunk_tokens), 1)
        chunks = [tensor.tensor_split(num_chunks) for tensor in (flat(x), flat(dx), labels.t().flatten())]
        room = x.new_empty(len(chunks[0][0]), len(weight))  # for the logits of every chunk: fresh memory takes long
        losses = [self._loss_of_chunk(room, has_gradient, weight, *some) for some in zip(*chunks, strict=True)]
        all_losses = torch.cat(losses, 1).view(labels.t().shape).t().contiguous()
        return _WithInputGradient.apply(hidden, all_losses, dx, call) if has_gradient else all_losses

    def _loss_of_chunk(
        self, room: Tensor, has_gradient: bool, weight: Tensor, x: Tensor, dx: Tensor, labels: Tensor
    ) -> Tensor:
        """[at least n, v], [v, h], [n, h], [n, h], [n] -> [1, n]; the logits are formed in `room`, and dx filled."""
        logits = room[: len(x)].detach()
        for rows, part in _rows(weight):
            linear_into(logits[:, rows], x, part)
        logits = self.output_layer.masked(logits)[:, None].requires_grad_(has_gradient)  # [n, 1, v]
        loss = super().compute_language_model_loss(labels[None], logits)
        if has_gradient:
            (gradient,) = torch.autograd.grad(loss, logits, torch.ones_like(loss))
            _multiply_into(dx, gradient.detach()[:, 0], weight)  # it may be in the memory of the logits
        return loss.detach()


def _rows(weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Rows of the output layer that are multiplied at a time: of a large one an eighth, since the product is copied."""
    return dense_rows(weight, min(ROWS_BYTES, max(weight.nbytes // 8, FEW_BYTES)))


def _multiply_into(dx: Tensor, gradient: Tensor, weight: Tensor) -> None:  # [n, h], [n, v], [v, h]
    """Put gradient W into dx. In low precision the product with some rows is rounded once, and the sum again."""
    total: Tensor | None = None
    for rows, part in _rows(weight):
        if rows.start == 0 and len(part) == len(weight):
            linear_into(dx, gradient, part.t())
            return
        product = linear(gradient[:, rows], part.t())
        total = product.float() if total is None else total.add_(product)
    assert total is not None
    dx.copy_(total)


class _WithInputGradient(Function):
    """The losses of tokens, with dx at hand: the gradient of each token's own loss, [s, b, h]."""

    @staticmethod
    def forward(ctx, hidden, losses, dx, call):  # type: ignore[override]
        ctx.save_for_backward(dx)
        ctx.call = call
        return losses

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        (dx,) = ctx.saved_tensors
        dx.mul_(grad.t()[..., None])
        return start_input_gradient(dx, ctx.call)(), None, None, None
