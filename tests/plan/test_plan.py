"""`megatron-peft plan` and `--dry-run`: figures of known models, and errors that name what is wrong."""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from megatron_peft.cli.parser import RunFlags, read_config
from megatron_peft.commands import plan as plan_command
from megatron_peft.commands import train
from megatron_peft.commands.plan import PlanSettings, config_of, main
from megatron_peft.config import ConfigurationError, ParallelConfig, PeftConfig
from megatron_peft.models.families import read_shape
from megatron_peft.plan import layouts
from megatron_peft.plan import plan as plan_module
from megatron_peft.plan.cluster import SHIPPED, read_cluster
from megatron_peft.plan.timing import Accuracy
from megatron_peft.rehearsal.program import PHASES, Call, Product, RankRecord
from megatron_peft.rehearsal.rehearsal import RankGrid, RehearsedRun, StageProgram
from tests.ranks import run_ranks
from tests.tiny_llama import save_llama, save_pairs

MODELS = Path(__file__).parents[2] / "examples" / "models"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("plan") / "llama")


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(words) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["--world-size", "3", "--tensor-model-parallel-size", "2"],
            "3 processes cannot hold --tensor-model-parallel-size 2",
        ),
        (["--plot", "x.notanimage"], "--plot x.notanimage is no picture: its name must end in one of .png, .pdf, .svg"),
        (["--plot", "x.png", "--fit"], "--plot draws one run: leave out --fit"),
        (["--rehearsed", "3"], "--rehearsed 3 needs --fit."),
        (["--json", "."], "--json . is a folder: name a file in it"),
        (["--json", "no such folder/plan.json"], "--json"),
    ],
    ids=["a world", "no picture", "of a fit", "not of a fit", "a folder", "in no folder"],
)
def test_what_cannot_be_planned_written_or_rehearsed_is_named_before_anything_runs(base, capsys, words, expected):
    assert expected in refused(["--pretrained-checkpoint", str(base), *words], capsys)


def test_a_model_of_another_family_is_named(tmp_path, capsys):
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"model_type": "mamba", "architectures": ["MambaForCausalLM"]}))
    assert "mamba" in refused(["--pretrained-checkpoint", str(config)], capsys).lower()


def test_a_cluster_with_an_absurd_field_is_named_and_nothing_is_written(base, tmp_path, capsys):
    cluster, found = tmp_path / "own.yaml", tmp_path / "plan.json"
    cluster.write_text("name: own\ngpus_per_node: 0\n")
    words = ["--pretrained-checkpoint", str(base), "--cluster", str(cluster), "--json", str(found)]
    told = refused(words, capsys)
    assert "gpus_per_node" in told and "memory_gib" in told and not found.exists()


def test_a_plan_from_a_config_alone(base, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TTY_COMPATIBLE", "1")  # as at a terminal
    config = tmp_path / "llama-8b.json"
    config.write_text((base / "config.json").read_text())
    words = ["--pretrained-checkpoint", str(config), "--peft-method", "lora", "--lora-rank", "4", "--seq-length", "32"]
    layout = ["--tensor-model-parallel-size", "2", "--sequence-parallel", "--micro-batch-size", "2"]
    layout += ["--train-iters", "297"]  # of 2 x 32 tokens: just above the 18,944 parameters that are trained
    found, picture = tmp_path / "plan.json", tmp_path / "plan.png"
    assert main([*words, *layout, "--json", str(found), "--plot", str(picture)]) == 0
    plan = json.loads(found.read_text())
    assert plan["fits"] and plan["world_size"] == 2 and picture.stat().st_size > 10_000
    assert [rank["rank"] for rank in plan["ranks"]] == [0, 1]
    assert plan["parameters"] == {"trained": 18944, "frozen": 507520}
    told, waited = capsys.readouterr()
    assert "every call of every rank finds its partners" in told and "18,944 of 526,464" in told
    assert "tokens: up to 19,008, 1.0 a trained parameter. " in told and "a higher rank holds more" in told
    assert plan["tokens_of_the_run"] == 19008 and "hours for 19,008 tokens" in told
    shown = re.findall(r"Rehearsing .*?(\d+)/(\d+)", re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", waited))
    assert shown and shown[-1][0] == shown[-1][1], "a bar that ends with all that was to do"
    low, high = plan["seconds_range"]
    assert low <= plan["time"]["seconds"] <= high and plan["published_runs"]["number"] == 13
    assert f"s a step ({low:.3g} to {high:.3g}: 13 published runs were off by " in told
    assert "A plan ranks the layouts of a run on a cluster; its seconds are no promise." in told


@pytest.mark.parametrize(
    ("sizes", "ranks", "caption"),
    [
        pytest.param(
            (8, 2, 32),
            [0, 16, 17],
            "Rank 17 represents all tensor-parallel ranks but the first. "
            "Each rank stands for its data-parallel replicas.",
            id="TP PP DP",
        ),
        pytest.param((2, 1, 2), [0, 1], "Rank 1 represents all tensor-parallel ranks but the first.", id="TP"),
        pytest.param((1, 2, 2), [0, 1], None, id="PP"),
    ],
)
def test_memory_table_names_the_ranks_that_a_rank_stands_for(sizes, ranks, caption):
    tp, pp, world_size = sizes
    peaks = {phase: {"weights": 1} for phase in PHASES}
    records = tuple(RankRecord(rank, rank * pp // world_size, 1, (), {}, peaks) for rank in ranks)
    config: Any = SimpleNamespace(parallel=ParallelConfig(tp, pp, world_size=world_size))
    run = RehearsedRun(config, read_shape(str(MODELS / "laptop-cpu")), records, (), ())
    assert next(plan_module._tables(plan_module.Plan(run, read_cluster("8xa100"), None, None))).caption == caption


def test_plan_is_of_the_fullest_rank_all_parameters_and_both_ends_of_the_pipeline():
    config: Any = SimpleNamespace(parallel=ParallelConfig(1, 2, world_size=2))
    parameters = {"trained of stage": 10, "frozen of stage": 90}
    records = tuple(
        RankRecord(rank, rank, 1, (), parameters, {"loading": {"weights": 2**30}, "step": {"weights": num_gib * 2**30}})
        for rank, num_gib in ((0, 2), (1, 3))
    )
    message = Call("send", "pipeline", (0, 1), ((2**18,),), "float32", 1)
    received = replace(message, operation="recv", peer=0)
    tables = [(message, received), (received, replace(message, operation="broadcast"))]
    stages = tuple(StageProgram(RankGrid(1, 1, 2), rank, entries) for rank, entries in enumerate(tables))
    run = RehearsedRun(config, read_shape(str(MODELS / "laptop-cpu")), records, stages, (0, 0))
    plan = plan_module.Plan(run, read_cluster("8xa100"), None, None)
    trained, memory, _ = plan_module.summary(plan)
    assert trained == "trainable parameters: 20 of 200 (10.000%)"
    assert memory.startswith("memory: 3.00 GiB at most (rank 1): fits 73.1 GiB")
    *_, calls = plan_module._tables(plan)
    rows = list(zip(*(column.cells for column in calls.columns), strict=True))
    assert rows == [("0", "pipeline", "send", "1", "1.0"), ("1", "pipeline", "broadcast", "1", "1.0")]


@pytest.mark.parametrize("words", [pytest.param([], id="plan"), pytest.param(["--fit", "--rehearsed", "0"], id="fit")])
def test_tokens_flag_goes_before_the_length_of_the_run(base, monkeypatch, words):
    found: list[float] = []
    plan = SimpleNamespace(fits=True, problem=None, as_dict=lambda num_tokens: {})
    layout = SimpleNamespace(run=None, flags=[], as_dict=lambda num_tokens: {}, flags_to_leave_out=lambda config: [])
    monkeypatch.setattr(plan_module, "make_plan", lambda *of: plan)
    monkeypatch.setattr(plan_module, "print_plan", lambda plan, num_tokens: found.append(num_tokens))
    monkeypatch.setattr(plan_command, "_fitting", lambda *of: (1, [layout]))
    monkeypatch.setattr(layouts, "fit_tables", lambda layouts, title, num_tokens: found.append(num_tokens) or [])
    run = ["--pretrained-checkpoint", str(base), "--seq-length", "32"]
    run += ["--train-iters", "10", "--global-batch-size", "1", *words]
    assert [main([*run, *tokens]) for tokens in ([], ["--tokens", "5e9"])] == [0, 0]
    assert found == [320, 5e9]


@pytest.mark.parametrize(
    ("method", "num_tokens", "expected"),
    [
        ("lora", 1000, ""),
        ("lora", 1001, "a higher rank holds more"),
        ("hybrid", 5000, "a higher rank holds more"),
        ("boft", 1000, ""),
        ("boft", 1001, "an adapter with more parameters holds more"),
        ("full", 10**9, ""),
        ("lora", None, ""),
    ],
)
def test_an_adapter_with_fewer_parameters_than_the_run_has_tokens_is_told(method, num_tokens, expected):
    run = SimpleNamespace(
        config=SimpleNamespace(peft=PeftConfig(method=method)), parameters=lambda: {"trained": 1000, "frozen": 10**6}
    )
    found = [*plan_module.capacity(SimpleNamespace(run=run), num_tokens)]  # type: ignore[arg-type]
    assert [sentence.rpartition("; ")[2] for sentence in found] == [expected] * bool(expected)


def test_a_range_is_as_far_off_as_the_outermost_published_runs():
    accuracy = Accuracy((0.25, -0.2, 0.1, -0.04))
    assert accuracy.around(10.0) == (8.0, 12.5) and Accuracy((0.25, 0.1)).around(10.0) == (8.0, 10.0)
    assert Accuracy((-0.2, -0.1)).around(10.0) == (10.0, 12.5)
    told = "4 published runs were off by 15% in the median, 25% at most"
    assert str(accuracy) == told
    assert str(Accuracy(accuracy.errors, (0.3, 0.1))) == f"{told}; 2 layouts on another network by 20%, 30% at most"


SMALL = ["--lora-rank", "4", "--seq-length", "32"]


@pytest.mark.slow
def test_complex_products_take_time_too_and_a_short_model_s_positions_all_fit(base, tmp_path, capsys):
    found = tmp_path / "plan.json"
    words = ["--pretrained-checkpoint", str(base), *SMALL, "--peft-method", "hybrid", "--hybrid-rotation", "urnn"]
    words += ["--urnn-block-size", "4", "--tokens", "2e9", "--longest-sequence"]
    assert main([*words, "--json", str(found)]) == 0
    plan, positions = json.loads(found.read_text()), read_shape(str(base)).max_position_embeddings
    told = f"longest sequence: --seq-length {positions} fits, all positions of the model ("
    assert plan["longest_sequence"] == positions and told in capsys.readouterr().out
    assert plan["hours"] == pytest.approx(2e9 / plan["tokens_per_second"] / 3600)


def test_a_complex_product_is_four_real_ones_of_numbers_twice_as_long():
    whole, real = (Product("mm", 1, 2, 3, 4, dtype) for dtype in ("complex64", "float32"))
    assert (whole.flops, whole.num_bytes) == (4 * real.flops, 2 * real.num_bytes)


@pytest.fixture
def few_ways(monkeypatch):
    """To compute a layer: fewer are recorded."""
    monkeypatch.setattr(layouts, "MICRO_BATCHES", (1,))


def test_fit_finds_a_number_of_nodes_and_a_layout_that_can_be_trained(base, tmp_path, capsys, few_ways):
    """A cluster of one small GPU a node: one of them cannot hold the whole run."""
    cluster, saved = tmp_path / "own.yaml", tmp_path / "run.yaml"
    fields = yaml.safe_load(SHIPPED["8xa100"].read_text())
    one_small_gpu = {"name": "own", "gpus_per_node": 1, "memory_gib": 1, "reserved_gib": 1 - 2.4 / 1024}
    cluster.write_text(yaml.safe_dump({**fields, **one_small_gpu}))
    words = ["--pretrained-checkpoint", str(base), *SMALL, "--cluster", str(cluster), "--fit", "--rehearsed", "0"]
    words += ["--save-interval", "200"]  # a plan needs no --save for it
    assert main([*words, "--save-config", str(saved)]) == 0
    told = capsys.readouterr()
    assert "--global-batch-size 128 is assumed" in told.out and "2 GPUs (2 nodes) of own can hold the run" in told.out
    assert "1 GPUs (1 node) of own: nothing fits" in told.err
    data = ["--pretrained-checkpoint", str(base), "--train-data-path", "x.jsonl", "--train-iters", "1"]
    with pytest.raises(ConfigurationError, match="^--save-interval 200 needs --save.$"):
        read_config(["--config", str(saved), *data], {"WORLD_SIZE": "2"}, read_shape)
    data += ["--save", "runs/first"]
    config = read_config(["--config", str(saved), *data], {"WORLD_SIZE": "2"}, read_shape)
    assert config.checkpoint.save_interval == 200 and config.global_batch_size == 128
    assert config.parallel.pipeline_model_parallel_size == 2


def test_what_is_wrong_at_every_number_of_nodes_is_the_last_word(base, capsys):
    words = ["--pretrained-checkpoint", str(base), *SMALL, "--fit", "--global-batch-size", "0"]
    assert "--global-batch-size" in refused(words, capsys)
    words = ["--pretrained-checkpoint", str(base), *SMALL[2:], "--lora-rank", "5000", "--fit"]
    assert "--lora-rank 5000" in refused(words, capsys)


def test_fit_takes_a_run_of_a_layout_that_the_model_does_not_divide_by(base):
    """As a recipe's for another model: another layout is looked for."""
    words = ["--pretrained-checkpoint", str(base), *SMALL, "--tensor-model-parallel-size", "5"]
    assert config_of(PlanSettings(fit=True), RunFlags(words)).parallel.tensor_model_parallel_size == 5
    with pytest.raises(ConfigurationError, match="--tensor-model-parallel-size 5 does not divide"):
        config_of(PlanSettings(), RunFlags(words))


@pytest.mark.parametrize(
    ("words", "world_size"),
    [("", 2), ("--nproc-per-node 4", 4), ("--nproc-per-node 4 --nnodes 3", 12), ("--nproc-per-node gpu --nnodes 3", 2)],
)
def test_a_run_has_the_processes_that_its_launch_flags_start(base, words, world_size):
    words = ["--pretrained-checkpoint", str(base), *SMALL, "--tensor-model-parallel-size", "2", *words.split()]
    assert config_of(PlanSettings(), RunFlags(words)).parallel.world_size == world_size
    assert config_of(PlanSettings(world_size=8), RunFlags(words)).parallel.world_size == 8
    assert config_of(PlanSettings(fit=True), RunFlags(words)).parallel.world_size == 2


@pytest.mark.slow
def test_rehearsed_times_choose_among_the_layouts_that_fit(base, tmp_path, capsys, few_ways, monkeypatch):
    """Here the first is found to take longer than was thought."""
    found, usual, factors = tmp_path / "fit.json", plan_module.make_plan, iter((5.0, 1.0))

    def make_plan(*of: Any) -> plan_module.Plan:
        made = usual(*of)
        assert made.speed is not None
        time = replace(made.speed.time, seconds=made.speed.time.seconds * next(factors))
        return replace(made, speed=replace(made.speed, time=time))

    monkeypatch.setattr(plan_module, "make_plan", make_plan)
    words = ["--pretrained-checkpoint", str(base), *SMALL, "--fit", "--world-size", "1", "--rehearsed", "2"]
    words += ["--longest-sequence", "--global-batch-size", "8", "--tokens", "1e6"]
    assert main([*words, "--json", str(found)]) == 0
    written, told = json.loads(found.read_text()), capsys.readouterr().out
    plans = written["rehearsed"]
    assert f"longest sequence: --seq-length {written['longest_sequence']} fits" in told
    assert len(plans) == 2 and plans[1]["time"]["seconds"] < plans[0]["time"]["seconds"]
    assert "flags of layout 2: " in told and f"{plans[0]['hours']:,.1f} hours for 1,000,000 tokens" in told


@pytest.fixture
def dry_run(base, tmp_path, monkeypatch) -> list[str]:
    """Words of one, in a world of one process."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    pairs = str(save_pairs(tmp_path / "pairs.jsonl"))
    words = ["--dry-run", "--pretrained-checkpoint", str(base), "--train-data-path", pairs, "--train-iters", "2"]
    return [*words, "--tokenizer-type", "NullTokenizer", "--vocab-size", "1000", "--seq-length", "32"]


def test_a_dry_run_checks_and_writes_nothing(dry_run, tmp_path, capsys):
    save = tmp_path / "save"
    of_gpus = ["--distributed-backend", "nccl", "--transformer-impl", "transformer_engine"]
    assert train.main([*dry_run, *of_gpus, "--save", str(save), "--micro-batch-size", "2"]) == 0
    told, warned = capsys.readouterr()
    assert "note: --distributed-backend nccl needs a GPU" in warned
    assert "WARNING: on this machine --transformer-impl transformer_engine needs a GPU" in warned
    assert "40 training samples, 2 iterations" in told
    assert "no GPU. --cluster 8xh100 plans the run" in told and "GiB" not in told, "a plan of another machine"
    assert not save.exists()
    assert train.main([*dry_run, "--train-data-path", str(tmp_path / "none.jsonl")]) == 2
    assert "none.jsonl" in capsys.readouterr().err


def test_a_dry_run_plans_for_its_cluster_and_warns_if_that_is_too_small(dry_run, tmp_path, capsys):
    cluster = tmp_path / "own.yaml"
    fields = yaml.safe_load(SHIPPED["8xa100"].read_text())
    cluster.write_text(yaml.safe_dump({**fields, "name": "tiny", "memory_gib": 1, "reserved_gib": 1 - 1 / 1024}))
    assert train.main([*dry_run, "--cluster", str(cluster)]) == 0
    told = capsys.readouterr()
    assert "cluster: tiny" in told.out and "peak, validation" in told.out and "tokens: up to" not in told.out
    assert "WARNING: the run does not fit GPUs of tiny: rank 0 holds" in told.err
    assert re.search("to fit: --fit .*; these reduce memory: --bf16, --base-precision nf4, --recompute-g", told.out)
    length = dry_run.index("--train-iters")
    words = [*dry_run[:length], *dry_run[length + 2 :], "--lora-rank", "1", "--train-epochs", "100"]
    assert train.main([*words, "--cluster", str(cluster)]) == 0
    assert "tokens: up to 128,000, " in capsys.readouterr().out, "40 samples of 32"
    assert train.main([*dry_run, "--cluster", "8xh10"]) == 2
    assert "--cluster 8xh10 is neither a file" in capsys.readouterr().err


# Parameters of the published checkpoints, as the Hugging Face Hub counts them.
BLOOM_176B = {"model_type": "bloom", "hidden_size": 14336, "n_layer": 70, "n_head": 112, "vocab_size": 250880}
PUBLISHED = {
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.3-70b": 70_553_706_496,  # the shape of Llama-3.1-70B
    "llama-3.1-405b": 405_853_388_800,
    "bloomz-7b1": 7_069_016_064,
    "bloom-176b": 176_247_271_424,
}


def counted(folders: dict[str, str]) -> dict[str, dict[str, int]]:
    """Parameters of each model at TP 8, with LoRA of rank 16 on all linear layers, and rows of padding."""
    from megatron_peft.runtime.fake_ranks import fake_rank
    from megatron_peft.runtime.launch import start_model_parallel, stop_model_parallel
    from megatron_peft.training.run import build_chunks
    from megatron_peft.training.terminal import numbers_of_parameters

    found = {}
    for name, folder in folders.items():
        words = ["--pretrained-checkpoint", folder, "--tensor-model-parallel-size", "8", "--peft-method", "lora"]
        config = read_config(
            [*words, "--lora-rank", "16", "--bf16"], {"WORLD_SIZE": "8"}, read_shape, saved=lambda values: {}
        )
        shape = read_shape(folder)
        with fake_rank(0, 8):
            start_model_parallel(config.parallel, 1)
            numbers = numbers_of_parameters(build_chunks(config, shape, loads=False))
            stop_model_parallel()
        rows = shape.padded_vocab_size(config.model.make_vocab_size_divisible_by, 8) - shape.vocab_size
        padding = rows * shape.hidden_size * (1 if shape.tied_embeddings else 2)
        found[name] = {"frozen": numbers["frozen of stage"] - padding, "trained": numbers["trained of stage"]}
    return found


@pytest.mark.slow
def test_parameters_of_published_models_are_exact(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(BLOOM_176B))
    folders = {name: str(MODELS / name) for name in PUBLISHED} | {"bloom-176b": str(tmp_path)}
    [found] = run_ranks(1, counted, folders)
    assert {name: numbers["frozen"] for name, numbers in found.items()} == PUBLISHED
    # r (in + out) of qkv, proj, fc1 and fc2
    assert found["llama-3.1-8b"]["trained"] == 32 * 16 * (4096 * 2 + 6144 + 4096 + 4096 + 28672 + 14336 + 4096)
