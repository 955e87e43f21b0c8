"""The loss in chunks of tokens beside that of whole logits: numbers, memory, what is communicated; when it is so.

Layouts, packing, recompute, LoRA-GA's start and validation: tests/training/test_layout.py, where every split run has
chunks and the run of one process has none. Families: tests/models/test_every_family.py.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from math import prod
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_peft.adapters.attach import freeze
from megatron_peft.config import ModelConfig, ParallelConfig, make_run
from megatron_peft.models import loss
from megatron_peft.models.gpt import build_model_chunks
from megatron_peft.models.kernels import Installed
from megatron_peft.models.shape import ModelShape
from megatron_peft.rehearsal.program import Call
from megatron_peft.rehearsal.recorder import LiveMemory, Recorder
from megatron_peft.runtime import cpu_kernels
from megatron_peft.runtime.launch import model_parallel, start_world
from tests.one_rank import Place, one_rank
from tests.ranks import run_ranks
from tests.tiny_gpt import SIZES, tiny_gpt

VOCAB, ROWS, LENGTH = SIZES["vocab_size"], 2, 12
TOKENS = torch.arange(ROWS * LENGTH).reshape(ROWS, LENGTH) % VOCAB
LABELS = (TOKENS * 7 + 3) % VOCAB
WEIGHTS = torch.linspace(-1.0, 2.0, ROWS * LENGTH).reshape(ROWS, LENGTH).relu()  # of the tokens' losses; some are 0
SHAPE = ModelShape(**SIZES)


@pytest.fixture
def world():
    with one_rank():
        yield


def _frozen(shape: dict[str, Any] | None = None, **model: Any) -> Any:
    """A model whose output layer's input begins the graph, and is the last of `model.hidden`."""
    chunk: Any = tiny_gpt(shape, make_vocab_size_divisible_by=128, **model)
    freeze(chunk)
    chunk.hidden = []

    def begin_graph(module: Any, inputs: Any, output: Tensor) -> Tensor:
        chunk.hidden.append(output.detach().requires_grad_(torch.is_grad_enabled()))
        return chunk.hidden[-1]

    chunk.decoder.register_forward_hook(begin_graph)
    return chunk


def _losses(model: Any) -> Tensor:
    return model(TOKENS, torch.arange(LENGTH).expand(ROWS, -1), None, labels=LABELS)


def _note_logits(monkeypatch: Any, note: Callable[[Tensor, Tensor], None]) -> None:
    """Called with hidden states and rows of the output layer, whenever logits are made of them."""
    linear_into = loss.linear_into

    def noted(y: Tensor, x: Tensor, weight: Tensor) -> None:
        if weight.is_contiguous():  # else it is transposed, and makes a gradient
            note(x, weight)
        linear_into(y, x, weight)

    monkeypatch.setattr(loss, "linear_into", noted)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 5, 24, 100])
def test_losses_and_gradients_are_those_of_whole_logits(world, monkeypatch, num_tokens, tied, fused, bf16):
    if fused:  # megatron-core's functions, run eagerly
        monkeypatch.setattr(Installed, "detected", lambda: Installed(cuda=True))
    model = _frozen({"tied_embeddings": tied}, bf16=bf16, transformer_impl="local")
    assert model.config.cross_entropy_loss_fusion == (fused and bf16)
    found, sizes = [], []
    _note_logits(monkeypatch, lambda x, _: sizes.append(len(x)))
    with torch.compiler.set_stance("force_eager"):
        for asked in (0, num_tokens):
            model.config.loss_chunk_tokens = asked
            losses = _losses(model)
            (losses * WEIGHTS).sum().backward()
            found.append((losses.detach(), model.hidden[-1].grad))
            with torch.no_grad():
                torch.testing.assert_close(_losses(model), losses)
    assert sum(sizes) == 2 * ROWS * LENGTH and max(sizes) <= num_tokens, (
        "twice all tokens, none of them for chunks of 0"
    )
    tolerances = {"rtol": 2e-2, "atol": 2e-2 * float(found[0][1].abs().max())} if bf16 else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(found[1], found[0], **tolerances)
    assert found[0][1].abs().sum() > 0


def test_a_trained_output_layer_has_whole_logits_and_its_gradient(world, monkeypatch):
    monkeypatch.setattr(loss, "linear_into", None)
    model = tiny_gpt(cross_entropy_chunk_tokens=5)
    _losses(model).sum().backward()
    assert model.output_layer.weight.grad.any()


@torch.no_grad()
def test_logits_are_still_answered_after_a_loss(world):
    model = _frozen(cross_entropy_chunk_tokens=5)
    _losses(model)
    logits = model(TOKENS, torch.arange(LENGTH).expand(ROWS, -1), None)
    hidden = model(TOKENS, torch.arange(LENGTH).expand(ROWS, -1), None, only_hidden=True)
    assert logits.shape == (ROWS, LENGTH, 128) and hidden.shape == (ROWS, LENGTH, SIZES["hidden_size"])
    torch.testing.assert_close(model.logits_of(hidden.flatten(0, 1)).unflatten(0, (ROWS, LENGTH)), logits)


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("precision", ["nf4", "fp8"])
def test_a_quantized_output_layer_is_dense_some_rows_at_a_time(world, monkeypatch, precision, trains):
    sizes = {"tied_embeddings": False, "hidden_size": 64, "ffn_hidden_size": 128, "kv_channels": 16}
    model = _frozen(sizes, base_precision=precision, quantize_output_layer=True)
    for parameter in model.parameters():
        if parameter.is_meta:
            values = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
            parameter.quantized.fill_rows(slice(None), values * 0.2)
    found, rows = [], []
    monkeypatch.setattr(loss, "ROWS_BYTES", 10 * 64 * 4)
    _note_logits(monkeypatch, lambda _, weight: rows.append(len(weight)))
    with torch.set_grad_enabled(trains):
        for model.config.loss_chunk_tokens in (0, 5):
            losses = _losses(model)
            if trains:
                (losses * WEIGHTS).sum().backward()
            found.append((losses.detach(), model.hidden[-1].grad if trains else losses))
    torch.testing.assert_close(found[1], found[0])
    assert rows == ([10] * 12 + [8]) * 5, "128 rows with padding, in each of five chunks"


@pytest.mark.parametrize("num_tokens", [1, 5, 24])
def test_rows_of_an_output_layer_are_multiplied_after_one_another_by_onednn(world, monkeypatch, num_tokens):
    model = _frozen()
    monkeypatch.setattr(cpu_kernels, "_FEWEST_FOR_ONEDNN", 0)
    monkeypatch.setattr(loss, "FEW_BYTES", 0)
    if not cpu_kernels.onednn_takes(torch.ones(1)):
        pytest.skip("a torch without oneDNN")
    rows, found = [], []
    _note_logits(monkeypatch, lambda _, weight: rows.append(len(weight)))
    for model.config.loss_chunk_tokens in (0, num_tokens):
        losses = _losses(model)
        (losses * WEIGHTS).sum().backward()
        found.append((losses.detach(), model.hidden[-1].grad))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)
    assert rows == [16] * 8 * -(-ROWS * LENGTH // num_tokens), "an eighth of 128 rows, for each chunk"


def test_a_gradient_of_many_rows_is_as_exact_in_bfloat16_as_of_all_at_once(world):
    """Of 64 products that are added, each rounded once; the running sum is in float32."""
    sizes = {"tied_embeddings": False, "hidden_size": 64, "ffn_hidden_size": 128, "kv_channels": 16}
    model = _frozen(sizes, bf16=True, base_precision="nf4", quantize_output_layer=True)
    weight, generator = model.output_weight, torch.Generator().manual_seed(0)
    weight.quantized.fill_rows(slice(None), torch.randn(weight.shape, generator=generator))
    gradient = torch.randn(16, len(weight), generator=generator).bfloat16()
    exact = gradient.double() @ weight.quantized.dense().double()
    errors = []
    for most_bytes in (2**30, 2 * 64 * 2):
        dx = torch.empty(16, 64, dtype=torch.bfloat16)
        with mock.patch.object(loss, "_rows", lambda weight, most=most_bytes: loss.dense_rows(weight, most)):
            loss._multiply_into(dx, gradient, weight)
        errors.append(float((dx.double() - exact).norm() / exact.norm()))
    assert errors[1] < 1.5 * errors[0] < 5e-3


def test_no_tokens_have_no_losses(world):
    model = _frozen(cross_entropy_chunk_tokens=5)
    empty = torch.zeros(0, 1, SIZES["hidden_size"], requires_grad=True)
    model.output_layer.hands_on_input = True
    assert model.compute_language_model_loss(torch.zeros(1, 0, dtype=torch.long), empty).shape == (1, 0)


class _Live(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = LiveMemory()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.memory.see(args, result)
        return result


@pytest.mark.parametrize("trains", [True, False])
def test_no_more_than_the_logits_of_a_chunk_are_alive(world, trains):
    vocab_size, num_tokens = 2048, 3
    model = _frozen({"vocab_size": vocab_size}, cross_entropy_chunk_tokens=num_tokens)
    hidden = torch.randn(LENGTH, ROWS, SIZES["hidden_size"], requires_grad=trains)
    model.output_layer.hands_on_input = True
    with _Live() as live:
        live.memory.see((hidden, model.output_weight), ())
        live.memory.start_peak()
        before = live.memory.total
        losses = model.compute_language_model_loss(LABELS, hidden)
        if trains:
            losses.sum().backward()
    above = live.memory.highest - before
    logits, gradient = 4 * num_tokens * vocab_size, 4 * hidden.numel()
    assert logits < above < logits + 2 * gradient + 4096, "2048 of 4 bytes are the logits of a token"


SPLIT = {"TP2": {}, "TP2+SP": {"sequence_parallel": True}}


def calls_of_a_loss(_: Any) -> dict[tuple[str, int], tuple[list[Call], Tensor]]:
    """Calls of forward and backward and the losses, by layout and tokens of a chunk. Started on two ranks."""
    start_world()
    found = {}
    for name, settings in SPLIT.items():
        parallel = ParallelConfig(2, **settings, world_size=2)
        with model_parallel(parallel, 1):
            for asked in (0, 5):
                # 37 tokens: all rows of the second rank are padding.
                config = ModelConfig("none", cross_entropy_chunk_tokens=asked)
                (model,) = build_model_chunks(replace(SHAPE, tied_embeddings=True), config, parallel)
                freeze(model)
                for parameter in model.parameters():
                    torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(0))
                hidden: list[Tensor] = []
                model.decoder.register_forward_hook(lambda _, __, output, to=hidden: to.append(output.requires_grad_()))
                with Recorder(keeps_work=False) as log:
                    losses = _losses(model)
                    (losses * WEIGHTS).sum().backward()
                found[name, asked] = [one for one in log.entries() if isinstance(one, Call)], losses.detach()
                if not settings:  # of all ranks' logits, those of real tokens
                    logits = model.logits_of(hidden[-1].detach().transpose(0, 1).flatten(0, 1))[:, :VOCAB]
                    expected = cross_entropy(logits, LABELS.flatten(), reduction="none").view(LABELS.shape)
                    torch.testing.assert_close(losses.detach(), expected)
            (model,) = build_model_chunks(SHAPE, ModelConfig("none"), parallel)
            assert model.config.loss_chunk_tokens == loss.chunk_tokens(None, 128), "128 rows of the vocabulary a rank"
    return found


def test_chunks_communicate_three_numbers_a_token_and_wide_calls_once(world):
    of_rank = run_ranks(2, calls_of_a_loss, None)[0]
    for layout in SPLIT:
        (whole, losses), (chunks, in_chunks) = of_rank[layout, 0], of_rank[layout, 5]
        torch.testing.assert_close(in_chunks, losses)
        wide = [
            Counter((call.operation, call.shapes) for call in calls if call.shapes[0][-1] == SIZES["hidden_size"])
            for calls in (whole, chunks)
        ]
        assert wide[0] == wide[1] and wide[0]
        narrow = [call for call in chunks if call.shapes[0][-1] != SIZES["hidden_size"]]
        assert {call.operation for call in narrow} == {"all_reduce"}
        assert sum(prod(call.shapes[0]) for call in narrow) == 3 * ROWS * LENGTH


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_loss_is_finite_where_a_rank_has_padded_rows_alone(dtype):
    """Transformer Engine joins each rank's largest logit and the sum of exponentials of what is left of the others."""
    size, num_rows = 4, 16  # ranks, and rows of each: the third has padded rows too, the last has no others
    whole = torch.randn(3, size * num_rows, generator=torch.Generator().manual_seed(0)).to(dtype)
    heads: Any = [SimpleNamespace(vocab_size=VOCAB, output_size_per_partition=num_rows, tp_group=Place(rank, size))
                  for rank in range(size)]  # fmt: skip
    logits = whole.clone().split(num_rows, 1)
    masked = [loss.OutputLayer.masked(head, part).float() for head, part in zip(heads, logits, strict=True)]
    largest = torch.stack([part.amax(1) for part in masked])
    sums = torch.stack([(part - most[:, None]).exp().sum(1) for part, most in zip(masked, largest, strict=True)])
    total = (sums * (largest - largest.amax(0)).exp()).sum(0)
    torch.testing.assert_close(total.log() + largest.amax(0), whole[:, :VOCAB].float().logsumexp(1))
    gradient = torch.cat(masked, 1).sub(largest.amax(0)[:, None]).exp() / total[:, None]
    assert not gradient[:, VOCAB:].any()


def test_a_chunk_has_64_mebibytes_of_logits_on_a_rank_or_what_is_asked():
    assert loss.chunk_tokens(None, 128256) == 130 and loss.chunk_tokens(None, 128256 // 8) == 1046
    assert loss.chunk_tokens(None, 10**9) == 1
    assert (loss.chunk_tokens(0, 128256), loss.chunk_tokens(7, 128256)) == (0, 7)
    shape = replace(SHAPE, vocab_size=128256)
    settings = {"pretrained_checkpoint": "m", "mock_data": True, "train_iters": 1, "lr": 1.0, "world_size": 8}
    settings |= {"tensor_model_parallel_size": 8, "global_batch_size": 1, "micro_batch_size": 1}
    told = loss.loss_summary(make_run(**settings, method="lora", seq_length=4096), shape)
    assert told.startswith("loss: in chunks of 1040 tokens, whose float32 logits take 67.1 MB on a rank")
    told = loss.loss_summary(make_run(**settings, method="lora", seq_length=512), shape)
    assert told.startswith("loss: in chunks of 512 tokens, whose float32 logits take 33 MB"), "no microbatch has more"
    for settings in ({"method": "full"}, {"method": "lora", "cross_entropy_chunk_tokens": 0}):
        base = {"pretrained_checkpoint": "m", "mock_data": True, "train_iters": 1, "lr": 1.0}
        assert loss.loss_summary(make_run(**base, **settings), shape) == ""
