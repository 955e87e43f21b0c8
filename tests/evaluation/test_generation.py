"""Answers: those of transformers, at any layout, with every method, in any batch; what is drawn; what ends them."""

import os
import random
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import example, given
from hypothesis import settings as limits
from hypothesis import strategies as st
from megatron.core import parallel_state
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from megatron_peft.adapters.attach import attach_adapters
from megatron_peft.adapters.quantized_weight import trained_values
from megatron_peft.benchmarks import SIZES_VARIABLE
from megatron_peft.checkpoint.tensors import global_slices, sharded_parameters
from megatron_peft.config import ConfigurationError, ModelConfig, ParallelConfig, PeftConfig
from megatron_peft.config.evaluation import Sampling
from megatron_peft.conversion.pretrained import load_pretrained
from megatron_peft.evaluation import generation
from megatron_peft.evaluation.generation import Continuation, GenerationSettings, StopTexts, choose_tokens
from megatron_peft.models import loss
from megatron_peft.models.families import read_shape
from megatron_peft.models.gpt import build_model_chunks
from megatron_peft.parallel.layout import generator_for
from megatron_peft.runtime.launch import start_model_parallel, start_world, stop, stop_model_parallel
from megatron_peft.runtime.precision import full_precision
from tests.one_rank import one_rank
from tests.ranks import run_ranks
from tests.tiny_bloom import save_bloom
from tests.tiny_gpt import tiny_gpt
from tests.tiny_llama import VOCAB_SIZE, save_llama

FAMILIES = ("base", "bloom")
NUM_NEW = 8
DRAWN = Sampling(temperature=0.9, top_p=0.9, top_k=50)
# What is compared with one process. A collective of gloo takes a millisecond whatever it carries: no more than tells.
COMPARED = {
    "TP2": ("base", "lora", "boft-input", "hybrid", "bloom", "drawn, bloom with LoRA"),
    "TP2+SP": ("boft-input", "urnn", "hybrid"),  # and so LoRA, and BOFT of the output
    "PP2": ("lora", "drawn"),
    "PP2 interleaved": ("hybrid", "drawn, bloom with LoRA"),
    "TP2xPP2+SP": ("drawn, bloom with LoRA",),
}
QUICK_LAYOUTS = ("TP2+SP", "PP2 interleaved")
TP2, PP2 = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
SP = {**TP2, "sequence_parallel": True}
LAYOUTS = {
    "TP2": TP2,
    "TP2+SP": SP,
    "PP2": PP2,
    "PP2 interleaved": {**PP2, "num_layers_per_virtual_pipeline_stage": 1},
    "TP2xPP2+SP": {**SP, **PP2},
}
GROUPS_OF_FOUR = {"boft_block_size": 2, "boft_factors": 2}
METHODS: dict[str, dict[str, Any] | None] = {
    "base": None,
    "lora": {"method": "lora", "lora_rank": 4},
    "boft": {"method": "boft", **GROUPS_OF_FOUR},
    "boft-input": {"method": "boft", "rotation_side": "input", **GROUPS_OF_FOUR},
    "urnn": {"method": "urnn", "urnn_block_size": 4},
    "hybrid": {"method": "hybrid", "lora_rank": 4, **GROUPS_OF_FOUR},
}


@dataclass(frozen=True)
class Job:
    """What to ask of a model, and at which layout (fields of ParallelConfig)."""

    base: str
    prompts: list[list[int]]
    settings: GenerationSettings
    continuations: list[Continuation] = field(default_factory=list)
    parallel: dict[str, Any] = field(default_factory=dict)
    peft: dict[str, Any] | None = None
    names: list[str] | None = None
    score_batch_size: int = 8
    model: dict[str, Any] = field(default_factory=dict)  # fields of ModelConfig


@dataclass(frozen=True)
class Outcome:
    """Answers and scores; whether the model was left as it was found; numbers that `report` was told."""

    answers: list[list[int]]
    scores: list[generation.ContinuationScore]
    left_as_found: bool
    reported: list[int]


def run_jobs(jobs: list[Job]) -> list[Outcome]:
    """On each rank of a world."""
    start_world()
    return [_run(job) for job in jobs]


def _run(job: Job) -> Outcome:
    shape = read_shape(job.base)
    parallel = ParallelConfig(**job.parallel, world_size=dist.get_world_size())
    start_model_parallel(parallel, 1, parallel.num_virtual_stages(shape.num_layers))
    chunks = build_model_chunks(shape, ModelConfig(job.base, **job.model), parallel)
    if job.peft:
        attach_adapters(chunks, PeftConfig(**job.peft), seed=1)
        _stir_adapters(chunks)
    rank, size = parallel_state.get_tensor_model_parallel_rank(), parallel.tensor_model_parallel_size
    load_pretrained(chunks, job.base, shape, tensor_parallel_rank=rank, tensor_parallel_size=size, progress=False)
    before = _switches(chunks)
    reported: list[int] = []
    answers = generation.generate(chunks, job.prompts, job.settings, reported.append, names=job.names)
    scores = generation.score_continuations(chunks, job.continuations, job.score_batch_size)
    outcome = Outcome(answers, scores, _switches(chunks) == before, reported)
    stop_model_parallel()
    return outcome


@torch.no_grad()
def _stir_adapters(chunks) -> None:
    """Adapters start at no change: add the same random numbers to every global tensor at any layout."""
    trained = {parameter.data_ptr() for chunk in chunks for parameter in chunk.parameters()}
    for entry in sharded_parameters(chunks, only_adapters=True):
        for part in global_slices(entry) if entry.data.data_ptr() in trained else ():
            whole = torch.randn(part.global_shape, generator=generator_for(1, part.key))
            box = zip(part.global_offset, part.local_shape, strict=True)
            part.data.add_(0.2 * whole[tuple(slice(start, start + length) for start, length in box)])


def _switches(chunks) -> list[Any]:
    modules = [module for chunk in chunks for module in chunk.modules()]
    owners = [owner for module in modules for owner in (module, getattr(module, "config", None))]
    names = (*generation.SEQUENCE_PARALLEL_SWITCHES, "training")
    return [getattr(owner, name, None) for owner in owners for name in names]


def greedy_by_transformers(base, prompts, end_id=-1):
    """Each prompt alone and whole at every token: no batch, no padding, no cache."""
    model = AutoModelForCausalLM.from_pretrained(base)
    how = {"max_new_tokens": NUM_NEW, "do_sample": False, "use_cache": False, "eos_token_id": end_id}
    texts = [model.generate(torch.tensor([prompt]), **how)[0, len(prompt) :].tolist() for prompt in prompts]
    return [text[: text.index(end_id)] if end_id in text else text for text in texts]


def scores_by_transformers(base, continuations):
    """(sum of log-probabilities, all likeliest) of each, alone and whole."""
    model = AutoModelForCausalLM.from_pretrained(base)
    scores = []
    for one in continuations:
        with torch.no_grad():
            logits = model(torch.tensor([[*one.context, *one.ids]])).logits[0, len(one.context) - 1 : -1]
        ids = torch.tensor(one.ids)
        total = logits.log_softmax(-1).gather(-1, ids[:, None]).sum()
        scores.append((float(total), bool((logits.argmax(-1) == ids).all())))
    return scores


def some_continuations(prompts, answers):
    """Choices of one context (one token, several, the likeliest ones), and a text that starts from one token."""
    draw = random.Random(1)
    found = []
    for prompt, answer in zip(prompts, answers, strict=True):
        found += [Continuation(tuple(prompt), tuple(answer[:length])) for length in (1, 3) if answer]
        lengths = (1, 1, 2, 5)
        found += [Continuation(tuple(prompt), tuple(draw.choices(range(VOCAB_SIZE), k=k))) for k in lengths]
    found.append(Continuation((3,), tuple(draw.choices(range(VOCAB_SIZE), k=40))))
    draw.shuffle(found)
    return found


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Job:
    """Seven prompts of one to nineteen tokens, two of them equal. The shortest, first of its batch, ends first."""
    base = str(save_llama(tmp_path_factory.mktemp("base")))
    draw = random.Random(0)
    prompts = [[draw.randrange(VOCAB_SIZE) for _ in range(length)] for length in (5, 1, 19, 8, 2, 13)]
    answers = greedy_by_transformers(base, prompts)
    settings = GenerationSettings(frozenset({answers[1][4]}), NUM_NEW, batch_size=4)
    assert answers[1][4] not in answers[0][:5] + answers[4][:5], "the shortest must end before those beside it"
    return Job(base, [*prompts, prompts[3]], settings, some_continuations(prompts, answers))


@pytest.fixture(scope="module")
def jobs(job, tmp_path_factory) -> dict[str, Job]:
    """Everything that is compared between layouts, by name."""
    bloom = replace(job, base=str(save_bloom(tmp_path_factory.mktemp("bloom"))))
    drawn = replace(job.settings, sampling=DRAWN, seed=5)
    return {
        **{name: replace(job, peft=peft) for name, peft in METHODS.items()},
        "bloom": bloom,
        "drawn": replace(job, settings=drawn),
        "drawn, bloom with LoRA": replace(bloom, settings=drawn, peft=METHODS["lora"]),
    }


@pytest.fixture(scope="module")
def alone(jobs):
    """Outcomes of one process, by name; `one by one` has batches of one row."""
    lora, drawn = jobs["lora"], jobs["drawn"]
    everything = {
        **jobs,
        "one by one": replace(lora, settings=replace(lora.settings, batch_size=1), score_batch_size=1),
        "drawn, one by one": replace(drawn, settings=replace(drawn.settings, batch_size=1)),
        "drawn, other seed": replace(drawn, settings=replace(drawn.settings, seed=6)),
        "drawn, reversed": replace(drawn, prompts=drawn.prompts[::-1], names=[str(i) for i in range(7)][::-1]),
    }
    names = FAMILIES if SIZES_VARIABLE in os.environ else [*everything]  # check-gpu asks for these alone
    try:
        with full_precision:
            return dict(zip(names, run_jobs([everything[name] for name in names]), strict=True))
    finally:
        stop()


def _same(outcome, expected):
    assert outcome.answers == expected.answers
    for found, wanted in zip(outcome.scores, expected.scores, strict=True):
        assert found.is_greedy == wanted.is_greedy
        assert found.log_likelihood == pytest.approx(wanted.log_likelihood, rel=1e-5, abs=1e-4)
    assert outcome.left_as_found


@pytest.mark.gpu("answers")
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_one_prompt_at_a_time_without_a_cache(jobs, alone, family):
    job = jobs[family]
    (end_id,) = job.settings.end_ids
    assert alone[family].answers == greedy_by_transformers(job.base, job.prompts, end_id)
    first, *ended = alone[family].reported
    assert first == 0 and sum(ended) == 7
    assert len(ended) > 2 or family == "bloom", "answers are counted as they end, not batch by batch"


@pytest.mark.gpu("answers")
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_one_text_at_a_time(jobs, alone, figure, family):
    expected = scores_by_transformers(jobs[family].base, jobs[family].continuations)
    assert {greedy for _, greedy in expected} == {True, False} or family == "bloom"
    found = alone[family].scores
    assert [one.is_greedy for one in found] == [greedy for _, greedy in expected]
    largest = max(abs(one.log_likelihood - total) for one, (total, _) in zip(found, expected, strict=True))
    figure(f"{family}: largest difference of a score", largest, 1e-4, note=f"{len(found)} texts")


def test_adapters_take_part(alone):
    for method in METHODS.keys() - {"base"}:
        assert alone[method].answers != alone["base"].answers and alone[method].scores != alone["base"].scores, method


def test_what_is_beside_a_row_changes_nothing(alone):
    _same(alone["one by one"], alone["lora"])
    assert alone["drawn, one by one"].answers == alone["drawn"].answers
    assert alone["drawn, reversed"].answers == alone["drawn"].answers[::-1]


def test_draws_follow_the_seed_and_the_name(alone):
    drawn = alone["drawn"].answers
    assert drawn != alone["base"].answers and drawn != alone["drawn, other seed"].answers
    assert drawn[3] != drawn[6], "two answers to one prompt"


@pytest.fixture(scope="module")
def split(jobs, request):
    """Outcomes of every rank, by (layout, name), at the layouts that were chosen."""
    specs = [getattr(item, "callspec", None) for item in request.session.items if item.path == request.path]
    chosen = {spec.params["layout"] for spec in specs if spec and "layout" in spec.params}
    outcomes = {}
    for num_ranks in (2, 4):
        layouts = [at for at in COMPARED if at in chosen and (4 if "x" in at else 2) == num_ranks]
        keys = [(at, name) for at in layouts for name in COMPARED[at]]
        if not keys:
            continue
        split = [replace(jobs[name], parallel=LAYOUTS[at]) for at, name in keys]
        by_rank = run_ranks(num_ranks, run_jobs, split)
        outcomes |= {key: [of_rank[i] for of_rank in by_rank] for i, key in enumerate(keys)}
    return outcomes


@pytest.mark.parametrize(
    "layout", [pytest.param(one, marks=[] if one in QUICK_LAYOUTS else [pytest.mark.slow]) for one in COMPARED]
)
def test_every_layout_answers_and_scores_as_one_process(split, alone, layout):
    """Sequence parallelism too: left on, megatron-core refuses a cache, or answers differ."""
    for name in COMPARED[layout]:
        for outcome in split[layout, name]:
            _same(outcome, alone[name])


def test_a_quantized_base_answers_and_scores_as_transformers_on_its_values(job, tmp_path):
    """The output layer too; split, and without an adapter that would have frozen it."""
    base = save_llama(tmp_path / "base", hidden_size=64, intermediate_size=128, num_attention_heads=4, head_dim=32)
    (tmp_path / "values").mkdir()
    (tmp_path / "values" / "config.json").write_bytes((base / "config.json").read_bytes())
    tensors = load_file(base / "model.safetensors")
    for name, x in tensors.items():
        if "proj.weight" in name or "lm_head" in name:
            tensors[name] = trained_values(x, "fp8", torch.float32)
    save_file(tensors, tmp_path / "values" / "model.safetensors", metadata={"format": "pt"})
    quantized = {"base_precision": "fp8", "quantize_output_layer": True}
    job = replace(job, base=str(base), parallel=SP, model=quantized)
    answers = greedy_by_transformers(tmp_path / "values", job.prompts, *job.settings.end_ids)
    expected = scores_by_transformers(tmp_path / "values", job.continuations)
    for outcome in (rank[0] for rank in run_ranks(2, run_jobs, [job])):
        assert outcome.answers == answers and outcome.left_as_found
        found = [one.log_likelihood for one in outcome.scores]
        assert found == pytest.approx([total for total, _ in expected], rel=1e-5, abs=1e-4)


def _generate_by_script(monkeypatch, settings, script, told=lambda row, token: None, copies=1):
    """`generate` over a model that says what `script` holds for the first token of a prompt."""

    class Rows:
        def __init__(self, model_chunks, padding, num_columns):
            self.num_columns, self.seen, self.step = num_columns, 0, 0

        def forward(self, tokens):
            if self.seen == 0:
                self.lines = [script[row[-1]] for row in tokens.tolist()]
                assert len(self.lines) == len(script), "equal prompts go through the model once"
            self.seen += tokens.shape[1]
            assert len(tokens) == len(self.lines) and self.seen <= self.num_columns
            said = torch.tensor([[line[self.step]] for line in self.lines])
            self.step += 1
            return torch.nn.functional.one_hot(said, 10).float()

        def keep(self, rows):
            self.lines = [self.lines[row] for row in rows]

    monkeypatch.setattr(generation, "CachedRows", Rows)
    monkeypatch.setattr(generation, "left_padded", lambda rows: (torch.tensor(rows), [0] * len(rows)))
    monkeypatch.setattr(generation, "from_last_stage", lambda values: values)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))
    prompts = [[first] for first in script] * copies
    return generation.generate([torch.nn.Module()], prompts, settings, on_token=told)


def test_an_answer_ends_at_an_end_with_its_last_token_or_at_the_longest_text(monkeypatch):
    settings = GenerationSettings(frozenset({9, 0}), 5, is_complete=lambda ids: ids[-1] == 3)
    script = {1: [4, 3, 7], 2: [5, 6, 9], 7: [0], 8: [4, 4, 4, 4, 4, 4]}
    told: list[tuple[int, int]] = []
    answers = _generate_by_script(monkeypatch, settings, script, lambda row, token: told.append((row, token)))
    assert answers == [[4, 3], [5, 6], [], [4, 4, 4, 4, 4]]
    assert told[:4] == [(0, 4), (1, 5), (3, 4), (0, 3)], "a token is told when it comes, an end is not told"
    settings = GenerationSettings(frozenset({9}), 3, batch_size=4)
    script = {1: [4, 9], 2: [5, 6, 7]}
    assert _generate_by_script(monkeypatch, settings, script, copies=2) == [[4], [5, 6, 7]] * 2, "equal prompts"
    settings = GenerationSettings(frozenset({9}), 3, batch_size=2)
    assert _generate_by_script(monkeypatch, settings, {1: [4, 9]}, copies=3) == [[4]] * 3, "a last batch of one"
    settings = GenerationSettings(frozenset(), 5, max_length=3)
    assert _generate_by_script(monkeypatch, settings, {1: [4, 4, 4]}) == [[4, 4]]
    assert settings.room([1, 2, 3]) == 0 and settings.room([1]) == 2
    assert GenerationSettings(frozenset(), 5).room([1] * 100) == 5


def _logits(seed, rows=3, vocabulary=40):
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * 3


@limits(max_examples=60)
@example(0, 1.0, 1.0, 1)  # the likeliest alone
@given(st.integers(0, 10**6), st.floats(0.1, 5), st.floats(0.05, 0.999) | st.just(1.0), st.integers(0, 60))
def test_probabilities_are_those_of_transformers_warpers(seed, temperature, top_p, top_k):
    expected = logits = _logits(seed)
    warpers = [TemperatureLogitsWarper(temperature), *([TopKLogitsWarper(top_k)] if top_k else [])]
    for warper in [*warpers, *([TopPLogitsWarper(top_p)] if top_p < 1 else [])]:
        expected = warper(None, expected)
    found = generation.probabilities(logits, Sampling(temperature, top_p, top_k))
    assert torch.allclose(found, expected.softmax(-1), atol=1e-6)


def test_frequencies_are_the_probabilities():
    sampling, logits = Sampling(temperature=2.0, top_p=0.8), _logits(2, rows=1, vocabulary=6)
    draws = torch.rand(20_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    drawn = choose_tokens(logits.expand(20_000, -1), sampling, draws)
    frequencies = torch.bincount(drawn, minlength=6) / 20_000
    assert torch.allclose(frequencies, generation.probabilities(logits, sampling)[0], atol=0.015)


@pytest.mark.parametrize(("draw", "token"), [(0.0, 1), (1 - 1e-16, 2)])
def test_the_ends_of_the_interval_draw_tokens_that_are_kept(draw, token):
    logits = torch.tensor([[-torch.inf, 1.0, 0.5, -torch.inf]])
    assert choose_tokens(logits, Sampling(temperature=1.0), torch.tensor([draw], dtype=torch.float64)).item() == token


def test_rounding_of_the_logits_does_not_move_a_draw():
    """In order of probability two tokens that are almost equal would change places, and the answer with them."""
    logits = torch.zeros(1, 8)
    nudged = logits + 1e-7 * torch.randn(1, 8, generator=torch.Generator().manual_seed(1))
    for draw in torch.arange(0.03, 1, 0.1, dtype=torch.float64):
        chosen = [choose_tokens(x, Sampling(temperature=1.0), draw[None]).item() for x in (logits, nudged)]
        assert chosen[0] == chosen[1]


LETTERS: Any = SimpleNamespace(special_tokens={}, decode=lambda ids: "".join(map(chr, ids)))


def test_an_answer_ends_with_any_of_the_texts_and_is_cut_at_the_first():
    stop = StopTexts(LETTERS, ("###", "\n\n"))
    assert all(stop.is_complete([*map(ord, text)]) for text in ("a\n\nb", "\n\n", "x" * 500 + "###"))
    assert not any(stop.is_complete([*map(ord, text)]) for text in ("", "a b", "a\n", "###" + "x" * 500))
    for none in (StopTexts(LETTERS, ()), StopTexts(LETTERS, ("",))):
        assert not none.is_complete([97]) and none.cut("a") == "a"
    assert StopTexts(LETTERS, ("###", "Q:")).cut("an answer Q: and ### more Q:") == "an answer "
    special = StopTexts(SimpleNamespace(special_tokens={"<end>": 7}), ("<end>", "ab"))
    assert special.end_ids == {7} and special.texts == ["ab"]
    strips = SimpleNamespace(special_tokens={}, decode=lambda ids: "".join(map(chr, ids)).lstrip())
    assert StopTexts(strips, (" ab",)).is_complete([*map(ord, "x ab")]), "a tokenizer may strip a text's first space"


def test_an_engine_is_asked_for_the_answers_that_generate_gives(monkeypatch):
    monkeypatch.setattr(generation, "over_replicas", lambda items, work: work(items))
    asked, told = {}, []

    def ask(what: str, **request: Any) -> dict[str, Any]:
        asked.update(request)
        return {"answers": [[4, 8], [6, 5]]}

    tokenizer = SimpleNamespace(special_tokens={"<end>": 8})
    model: Any = SimpleNamespace(
        engine=SimpleNamespace(ask=ask), tokenizer=tokenizer, end_ids=frozenset({7}), max_length=6
    )
    settings = GenerationSettings(frozenset({9}), 4, sampling=Sampling(0.5, 0.9, 3), seed=2)
    prompts = [([1, 2, 3], "0/0"), ([1] * 6, "1/0"), ([5], "2/0")]  # the second leaves no room for an answer
    answers = generation.generate_answers(model, prompts, ("ab", "<end>"), settings, lambda *one: told.append(one))
    assert answers == [[4], [], [6, 5]] and told == [(0, 4), (2, 6), (2, 5)]
    assert asked == {
        "prompts": [[1, 2, 3], [5]],
        "max_tokens": [3, 4],
        "seeds": [generator_for(2, name).initial_seed() % 2**63 for name in ("0/0", "2/0")],
        "sampling": {"temperature": 0.5, "top_p": 0.9, "top_k": 3},
        "stop": ["ab"],
        "ends": [7, 8, 9],
    }


@pytest.mark.parametrize(("count", "shares"), [(3, [[0, 1], [2]]), (1, [[0], []])], ids=["three", "one"])
def test_replicas_share_items_and_a_single_one_is_the_first_replicas(count, shares, monkeypatch):
    monkeypatch.setattr(generation, "gather_over_world", lambda share, group: [share])
    for rank, share in enumerate(shares):
        group = SimpleNamespace(rank=lambda rank=rank: rank, size=lambda: 2)
        monkeypatch.setattr(parallel_state, "get_data_parallel_group", lambda group=group: group)
        assert generation.over_replicas(range(count), list) == share


# A forward with a cache, and what is off meanwhile; how continuations are batched. test_harness.py has replicas.

MODEL = [torch.nn.Module()]
MODEL[0].vocab_size, MODEL[0].logits_of = 10, lambda hidden: hidden
TEXT, OTHER = [3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1]


def _logits_of(model, hidden):
    return model.logits_of(hidden.flatten(0, 1)).unflatten(0, hidden.shape[:2])


def test_a_cache_gives_the_logits_of_the_whole_text():
    """In pieces, beside a shorter row, after rows were dropped and doubled, with the cache still empty or not."""
    with one_rank():
        chunks = [tiny_gpt()]
        with generation.inference(chunks):
            texts = (torch.tensor([text]) for text in (TEXT, OTHER + TEXT[5:]))
            whole, other = (chunks[0](text, torch.arange(text.shape[1])[None], None)[0] for text in texts)
            tokens, padding = generation.left_padded([OTHER, TEXT[:5]])
            assert padding == [2, 0]
            rows = generation.CachedRows(chunks, padding, 10)
            first = _logits_of(chunks[0], rows.forward(tokens, only_hidden=True))
            assert torch.allclose(first[1], whole[:5], atol=1e-5) and torch.allclose(first[0, 2:], other[:3], atol=1e-5)
            rows.keep([1, 1, 0])
            rest = _logits_of(chunks[0], rows.forward(torch.tensor([TEXT[5:]] * 3), only_hidden=True))
            assert torch.allclose(rest, torch.stack([whole[5:], whole[5:], other[3:]]), atol=1e-5)

            empty = generation.CachedRows(chunks, [0], 10)
            empty.keep([0, 0])
            last = empty.forward(torch.tensor([TEXT, TEXT]))
            assert torch.allclose(last, whole[-1:].expand(2, 1, -1), atol=1e-5)


def _chunk(config):
    chunk, norm = torch.nn.Module(), torch.nn.Module()
    chunk.norm, norm.config, norm.sequence_parallel = norm, config, True
    chunk.scatter_to_sequence_parallel, chunk.reduce_scatter_embeddings = True, False
    return chunk


def test_everything_is_off_inside_and_after_an_error_as_it_was():
    config = SimpleNamespace(sequence_parallel=True)
    training, evaluated = _chunk(config), _chunk(config).eval()
    with pytest.raises(KeyError), generation.inference([training, evaluated]):
        owners = [owner for chunk in (training, evaluated) for owner in (chunk, chunk.norm, config)]
        assert not any(
            getattr(owner, name, False) for owner in owners for name in generation.SEQUENCE_PARALLEL_SWITCHES
        )
        assert not training.training and not torch.is_grad_enabled()
        raise KeyError
    assert config.sequence_parallel and training.norm.sequence_parallel and training.scatter_to_sequence_parallel
    assert training.training and not evaluated.training and torch.is_grad_enabled()
    assert not training.reduce_scatter_embeddings


@pytest.fixture
def passes(monkeypatch):
    """MODEL's, which always says the token after the last: the rows of each of them. Its hidden states are logits."""
    seen: list[list] = []

    def hidden_states(model_chunks, rows):
        seen.append(rows)
        texts = [[context[-1], *before] for context, before in rows]
        longest = max(map(len, texts))
        said = torch.tensor([[(token + 1) % 10 for token in text] + [0] * (longest - len(text)) for text in texts])
        return 10.0 * torch.nn.functional.one_hot(said, 10)

    monkeypatch.setattr(generation, "_hidden_states", hidden_states)
    monkeypatch.setattr(generation, "from_last_stage", lambda values: values)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))
    return seen


def test_choices_of_one_token_are_one_row(passes):
    choices = [Continuation((1, 2), (token,)) for token in (3, 4, 5)]
    choices += [Continuation((1, 2), (3, token)) for token in (4, 5)]
    scores = generation.score_continuations(MODEL, choices, batch_size=8)
    assert passes == [[((1, 2), ()), ((1, 2), (3,))]]
    assert [one.is_greedy for one in scores] == [True, False, False, True, False]
    assert scores[0].log_likelihood > scores[1].log_likelihood == scores[2].log_likelihood


def test_batches_hold_like_lengths_and_answers_come_back_in_order(passes):
    items = [Continuation((0,) * length, (1 if length % 2 else 2,)) for length in (1, 4, 2, 4, 3)]
    scores = generation.score_continuations(MODEL, items, 2)
    assert [sorted({len(context) for context, _ in rows}) for rows in passes] == [[4], [2, 3], [1]]
    assert [one.is_greedy for one in scores] == [True, False, False, False, True]


def test_scores_are_of_few_logits_at_a_time(passes, monkeypatch):
    """Of three positions: continuations that begin or end inside of a chunk have the scores of all at once."""
    items = [Continuation((length,), tuple(range(length + 1, 2 * length))) for length in (5, 2, 3, 4)]
    items += [Continuation((5,), (6, 7, 1))]
    whole = generation.score_continuations(MODEL, items, batch_size=8)
    assert [one.is_greedy for one in whole] == [True] * 4 + [False]
    sizes = []
    monkeypatch.setattr(MODEL[0], "logits_of", lambda hidden: sizes.append(len(hidden)) or hidden)
    monkeypatch.setattr(loss, "LOGITS_BYTES", 3 * 4 * 10)
    assert generation.score_continuations(MODEL, items, batch_size=8) == whole
    assert max(sizes) == 3 and len(sizes) > 3


def test_empty_prompts_and_nothing_to_score_are_refused():
    with pytest.raises(ConfigurationError, match="a prompt is empty"):
        generation.generate(MODEL, [[1], []], GenerationSettings(frozenset(), 1))
    with pytest.raises(ConfigurationError, match="has no token"):
        generation.score_continuations(MODEL, [Continuation((), (1,))], 1)
