"""Configuration that contradicts itself is refused, each problem once with its flag and numbers; records of it last."""

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from megatron_peft.config import (
    METHODS,
    CheckpointConfig,
    ConfigurationError,
    DataConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerSettings,
    ParallelConfig,
    PeftConfig,
    Requirements,
    RunConfig,
    TrainingConfig,
    config_from_dict,
    config_to_dict,
    make_run,
    missing_for_training,
)
from megatron_peft.config.run import missing_to_profile


class Nothing:
    """Of a type that no field has; its name is the same in every process."""

    def __repr__(self) -> str:
        return "nothing"


DATA = {"train_data_path": ("a.jsonl",)}
INDEXED = {"data_path": ("p",)}
MODEL = {"pretrained_checkpoint": "m"}
INTERLEAVED = {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1, "world_size": 2}
PP2 = {"pipeline_model_parallel_size": 2, "world_size": 2}
ACCOUNTED = {**PP2, "account_for_embedding_in_pipeline_split": True}
UNEVEN = {"decoder_first_pipeline_num_layers": 2, "decoder_last_pipeline_num_layers": 2}
SEQUENCE_PARALLEL = {"tensor_model_parallel_size": 2, "sequence_parallel": True, "world_size": 2}

NF4 = {"base_precision": "nf4"}
BLOCK = {"recompute_method": "block", "recompute_num_layers": 1}
DISTRIBUTED_RECOMPUTE = {
    "transformer": {**BLOCK, "recompute_granularity": "full", "distribute_saved_activations": True}
}


def run_config(**values: Any) -> RunConfig:
    return make_run(**{**MODEL, **DATA, "train_iters": 10, **values})


CONTRADICTIONS: dict[Callable[..., object], list[tuple[dict[str, Any], str]]] = {
    ParallelConfig: [
        ({"tensor_model_parallel_size": 3, "world_size": 4}, "4 processes cannot hold .* 3"),
        ({"tensor_model_parallel_size": 0}, "--tensor-model-parallel-size is 0"),
        ({"sequence_parallel": True}, "--sequence-parallel: .* above 1"),
        ({"num_layers_per_virtual_pipeline_stage": 2}, "--num-layers-per-virtual-pipeline-stage"),
        ({"decoder_first_pipeline_num_layers": 2}, "--decoder-first-pipeline-num-layers"),
        ({**INTERLEAVED, "decoder_last_pipeline_num_layers": 2}, "mutually exclusive ways to divide"),
        ({"account_for_loss_in_pipeline_split": True}, "^--account-for-loss-in-pipeline-split: only .* above 1"),
        (UNEVEN, "^--decoder-first-pipeline-num-layers, --decoder-last-pipeline-num-layers: only with --pipe"),
        ({**ACCOUNTED, "decoder_first_pipeline_num_layers": 2}, "mutually exclusive"),
        ({**ACCOUNTED, "pipeline_model_parallel_layout": "Et|L"}, "mutually exclusive ways to divide"),
        ({**PP2, "pipeline_model_parallel_layout": "Et|t|L"}, "3 stages, which --pipeline-model-parallel-size 2 does"),
        ({**PP2, "pipeline_model_parallel_layout": "Et|mL"}, "must hold E .embedding., t .layer. and L"),
        ({**PP2, "pipeline_model_parallel_layout": "|EtL"}, "must hold E .embedding., t .layer. and L"),
        ({**PP2, "pipeline_model_parallel_layout": "E(t*999)*99999|L"}, "repeat less than 1,000 times"),
    ],
    ModelConfig: [
        ({**MODEL, "quantize_output_layer": True}, "--quantize-output-layer needs --base-precision nf4 or fp8"),
        ({}, "no base model: --pretrained-checkpoint"),
        ({**MODEL, "transformer": {"hidden_dropout": 1.5}}, "--hidden-dropout is 1.5"),
        ({**MODEL, "transformer": {"recompute_granularity": "full"}}, "full needs --recompute-method"),
        ({**MODEL, "transformer": BLOCK}, "--recompute-method, --recompute-num-layers: only with .* full"),
        ({**MODEL, "recompute_modules": ("mlp",)}, "--recompute-modules: only with --recompute-granularity selective"),
        (
            {**MODEL, "recompute_modules": ("moe",), "transformer": {"recompute_granularity": "selective"}},
            "--recompute-modules is .'moe',.; it must be a tuple, each one of core_attn, layernorm, mlp",
        ),
    ],
    PeftConfig: [
        ({"method": "prefix"}, "--peft-method prefix is not one of full, lora, lora-ga, boft, urnn, hybrid.$"),
        ({"method": "qlora"}, "urnn, hybrid; use lora with --base-precision nf4.$"),
        ({"method": "lora_ga"}, "urnn, hybrid; did you mean lora-ga.$"),
        ({"lora_rank": 0}, "--lora-rank is 0; it must be above 0"),
        ({"lora_dropout": 1.0}, "--lora-dropout is 1.0; it is a fraction"),
        ({"method": "boft", "boft_block_size": 5}, "--boft-block-size is 5; its halves are paired: use an even size"),
        ({"method": "urnn", "urnn_block_size": 9}, "--urnn-block-size is 9; its halves are paired: use an even size"),
        ({"method": "hybrid", "hybrid_lambda": "fixed:1.5"}, "descent, or fixed:X with X from 0 to 1"),
        ({"method": "hybrid", "hybrid_lambda": "fixed:"}, "descent, or fixed:X with X from 0 to 1"),
        ({"method": "hybrid", "hybrid_lambda": "fixed:-0.1"}, "descent, or fixed:X with X from 0 to 1"),
        ({"method": "hybrid", "hybrid_lambda": "norms"}, "descent, or fixed:X with X from 0 to 1"),
        ({"method": "hybrid", "hybrid_lambda_init": 0.99}, "--hybrid-lambda-init 0.99 and --hybrid-lambda-max 0.98"),
        ({"method": "hybrid", "hybrid_lambda_min": 0.0}, "--hybrid-lambda-min 0.0"),
        ({"method": "hybrid", "hybrid_merge_interval": 0}, "--hybrid-merge-interval is 0; it must be above 0"),
        ({"target_modules": ()}, "--peft-target-modules needs at least one name"),
    ],
    DataConfig: [
        ({**DATA, **INDEXED}, "mutually exclusive"),
        ({**DATA, "mock_data": True}, "and --mock-data are mutually exclusive"),
        ({**INDEXED, "mock_data": True}, "and --mock-data are mutually exclusive"),
        ({**DATA, "split": "9,1"}, "--split 9,1 needs --data-path or --mock-data"),
        ({**INDEXED, "split": "9;1"}, "--split 9;1"),
        ({**INDEXED, "split": "0,0,0"}, "--split 0,0,0"),
        ({**INDEXED, "split": "1,1,1,1"}, "--split 1,1,1,1"),
        ({"train_data_path": ("a.jsonl", "b")}, "--train-data-path mixes .*a.jsonl b.*or leave out b .no .idx: b; "),
        ({"train_data_path": ("1", "a.parquet", "2", "b")}, "--train-data-path mixes JSON files or tables"),
        ({"valid_data_path": ("0.5", "a.jsonl", "b.jsonl")}, "--valid-data-path .*a weight before each path"),
        ({"data_path": ("a.jsonl",)}, "--data-path a.jsonl takes prefixes of indexed data"),
        ({**DATA, "prompt_column": "a", "text_column": "b"}, "--text-column name columns of different formats"),
        ({**DATA, "text_column": ""}, "--text-column has an empty value"),
        ({**INDEXED, "pack_sequences": True}, "--pack-sequences"),
        ({**DATA, "tokenizer_type": "NullTokenizer"}, "needs --vocab-size"),
        ({**DATA, "tokenizer_type": "SentencePieceTokenizer"}, "needs --tokenizer-model"),
        ({**DATA, "tokenizer_type": "Llama2Tokenizer"}, "Llama2Tokenizer needs --tokenizer-model FILE.model"),
    ],
    TrainingConfig: [
        ({"train_iters": 1, "train_epochs": 1}, "given: --train-iters, --train-epochs"),
        ({"manual_gc_interval": 5}, "--manual-gc-interval 5 needs --manual-gc"),
    ],
    OptimizerSettings: [
        ({"lr": 1e-4, "min_lr": 1e-3}, "--min-lr 0.001 is above --lr 0.0001"),
        ({"lr_warmup_init": 1.0}, "--lr-warmup-init 1.0 is above"),
        ({"lr_warmup_init": 1e-4, "decoupled_lr": 1e-5}, "--lr-warmup-init 0.0001 is above --decoupled-lr 1e-05"),
        ({"lr_warmup_fraction": 0.1, "lr_warmup_iters": 1}, "--lr-warmup-samples are mutually exclusive"),
        ({"lr_warmup_fraction": 0.1, "lr_warmup_samples": 8}, "^--lr-warmup-fraction, .* are mutually exclusive"),
        ({"lr_warmup_fraction": 1.0}, "--lr-warmup-fraction is 1.0"),
        ({"lr_decay_style": "WSD"}, "--lr-wsd-decay-iters"),
        ({"lr_wsd_decay_iters": 3}, "--lr-decay-style WSD, and no other style, .* It is linear"),
        ({"end_weight_decay": 0.1}, "--weight-decay-incr-style"),
        ({"weight_decay_incr_style": "linear", "end_weight_decay": 0.1}, "given: linear, None and 0.1"),
        ({"lr": -1.0}, "^--lr is -1.0; it must be above 0.$"),
        ({"decoupled_lr": -1.0, "decoupled_min_lr": 0.1}, "^--decoupled-lr is -1.0; it must be above 0.$"),
        (
            {"weight_decay_incr_style": "cosine", "start_weight_decay": 0.2, "end_weight_decay": 0.1},
            "given: cosine, 0.2 and 0.1",
        ),
        ({"overlap_param_gather": True}, "--overlap-param-gather needs --use-distributed-optimizer"),
        ({"optimizer": "sgd", "use_distributed_optimizer": True}, "shards Adam only"),
        ({"decoupled_min_lr": 1e-5}, "--decoupled-min-lr 1e-05 needs --decoupled-lr"),
        ({"decoupled_lr": 1e-5, "decoupled_min_lr": 1e-4}, "--decoupled-min-lr 0.0001 is above --decoupled-lr 1e-05"),
        ({"override_opt_param_scheduler": True, "use_checkpoint_opt_param_scheduler": True}, "mutually exclusive"),
    ],
    CheckpointConfig: [
        ({"save_interval": 5}, "--save-interval 5 needs --save"),
        ({"exit_on_missing_checkpoint": True}, "--exit-on-missing-checkpoint needs --load"),
    ],
    LoggingConfig: [
        ({"peak_tflops": 989.0}, "--peak-tflops 989.0 needs --log-throughput"),
        ({"log_interval": 0}, "--log-interval is 0"),
        ({"memory_snapshot_path": "s.pickle"}, "--memory-snapshot-path s.pickle needs --record-memory-history"),
        ({"profile_step_start": 0}, "--profile-step-start 0 needs --profile"),
        ({"profile_step_end": 20}, "--profile-step-end 20 needs --profile"),
        ({"use_pytorch_profiler": True, "tensorboard_dir": "t"}, "--use-pytorch-profiler needs --profile"),
        ({"use_pytorch_profiler": True, "profile": True}, "--use-pytorch-profiler needs --tensorboard-dir"),
        ({"profile_ranks": (0, 1)}, "--profile-ranks 0 1 needs --profile or --record-memory-history"),
    ],
    run_config: [
        ({"micro_batch_size": 2, "global_batch_size": 7, "world_size": 2}, "size 7 .* 2 x 2 .* = 4: use 4 or 8"),
        ({"micro_batch_size": 4, "global_batch_size": 3}, "= 4: use 4.$"),
        ({**INTERLEAVED, "global_batch_size": 3}, "2 microbatches a step, but --global-batch-size 3 gives 3"),
        ({**PP2, "pipeline_model_parallel_layout": "Et|t|t|L", "global_batch_size": 3}, "but --global-batch-size 3 "),
        ({**INTERLEAVED, "global_batch_size": 2, "transformer": {"overlap_p2p_comm": False}}, "use 3 stages or more"),
        ({**SEQUENCE_PARALLEL, "seq_length": 33}, "--seq-length 33 .* use 32"),
        ({**SEQUENCE_PARALLEL, "seq_length": 1}, "--seq-length 1 .* use 2"),
        ({"lr_decay_samples": 5}, "--lr-decay-samples .* use --lr-decay-iters"),
        ({"train_iters": None, "train_samples": 9, "lr_warmup_iters": 1}, "-iters .* use --lr-warmup-samples"),
        ({"lr_warmup_iters": 10}, "--lr-warmup-iters 10 .* below the 10 iters"),
        ({"lr_warmup_iters": 5, "lr_decay_iters": 5}, "--lr-warmup-iters 5 .* below the 5 iters"),
        ({"overlap_param_gather": True, "use_distributed_optimizer": True}, "gather needs --overlap-grad-reduce"),
        (DISTRIBUTED_RECOMPUTE, "--distribute-saved-activations"),
        ({**NF4, "method": "full"}, "--base-precision nf4 keeps .* but --peft-method full trains them: leave out one"),
        ({**NF4, "method": "urnn", "urnn_mode": "replace"}, "but --urnn-mode replace replaces them"),
        ({**NF4, "method": "hybrid", "hybrid_merge_interval": 2}, "but --hybrid-merge-interval merges into them"),
        ({**DISTRIBUTED_RECOMPUTE, **SEQUENCE_PARALLEL}, "--distribute-saved-activations"),
    ],
}


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        pytest.param(section, values, message, id=f"{section.__name__} {message}")
        for section, cases in CONTRADICTIONS.items()
        for values, message in cases
    ],
)
def test_a_contradiction_is_one_problem(section: Any, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as caught:
        section(**values)
    assert len(caught.value.problems) == 1


def test_all_contradictions_of_a_group_are_told_at_once() -> None:
    with pytest.raises(ConfigurationError) as caught:
        OptimizerSettings(lr=-1.0, min_lr=-2.0, lr_warmup_init=-3.0, clip_grad=-1)
    flags = {problem.split(" ")[0] for problem in caught.value.problems}
    assert flags == {"--lr", "--min-lr", "--lr-warmup-init", "--clip-grad"}
    assert str(caught.value).count("\n") == len(caught.value.problems) - 1


def test_contradictions_between_valid_sections_are_told_beside_invalid_ones() -> None:
    """A check that reads a section which could not be made complains of nothing."""
    wrong = {"lora_rank": -3, "seq_length": 0, "micro_batch_size": 3, "global_batch_size": 2, "lr": 1e-4}
    with pytest.raises(ConfigurationError) as error:
        run_config(**wrong, **SEQUENCE_PARALLEL)
    told = "--lora-rank is -3", "--seq-length is 0", "--global-batch-size 2 is not a multiple of --micro-batch-size 3"
    assert len(error.value.problems) == len(told)
    for problem, beginning in zip(error.value.problems, told, strict=True):
        assert problem.startswith(beginning)


def test_a_run_that_trains_needs_data_and_a_length() -> None:
    asked = RunConfig(ParallelConfig(), ModelConfig("m"), PeftConfig(), DataConfig(), TrainingConfig())
    data, length = missing_for_training({**vars(asked.data), **vars(asked.training)})
    assert data.startswith("no training data") and length.endswith("(none given).")
    assert not missing_for_training({**DATA, "train_epochs": 2})


PROFILE = {"profile": True, "profile_step_start": 4}
NINE_SAMPLES = {"train_iters": None, "train_samples": 9, "global_batch_size": 2}
NONE_PROFILED = "--profile-step-start below 4, the last step of the run or of --profile-step-end, but it is 4"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"record_memory_history": True, "profile_ranks": (1, 2, -1), "world_size": 2},
            "--profile-ranks: leave out [2, -1], as the ranks of this run are 0 to 1",
        ),
        ({**PROFILE, "profile_ranks": (1,)}, "--profile-ranks: leave out"),
        ({**PROFILE, "train_iters": 4}, NONE_PROFILED),
        ({**PROFILE, "profile_step_end": 4}, NONE_PROFILED),
        ({**PROFILE, **NINE_SAMPLES}, NONE_PROFILED),
        ({**PROFILE, "train_iters": 5}, ""),  # the fifth step is profiled, whatever --profile-step-end says
        ({**PROFILE, "train_iters": None, "train_epochs": 0.1}, ""),  # nobody knows yet how many steps that is
        ({"train_iters": 1}, ""),
    ],
)
def test_ranks_and_steps_to_profile_are_the_runs(values: dict[str, Any], message: str) -> None:
    problems = missing_to_profile(run_config(**values))
    assert len(problems) == bool(message) and message in "".join(problems)


def test_another_error_is_not_replaced_by_the_requirements() -> None:
    with pytest.raises(ZeroDivisionError), Requirements(None) as requirements:
        requirements(False, "unmet")
        _ = 1 // 0


def test_what_is_only_just_allowed() -> None:
    run_config(min_lr=1e-3, lr=1e-3, lr_warmup_init=1e-3)
    run_config(decoupled_lr=1e-3, decoupled_min_lr=1e-3, lr=1e-2, lr_warmup_init=1e-3)
    run_config(lr_warmup_iters=9)
    run_config(lr_warmup_iters=10, lr_decay_iters=11)


def test_a_rank_waits_as_long_as_the_flag_that_was_given_says() -> None:
    assert ParallelConfig().seconds_to_wait == 600 == 10 * ParallelConfig(distributed_timeout_minutes=1).seconds_to_wait
    assert ParallelConfig(distributed_timeout_seconds_after_init=7).seconds_to_wait == 7


def test_tokens_of_a_run_are_those_of_full_sequences() -> None:
    batch = {"global_batch_size": 8, "micro_batch_size": 2, "seq_length": 100}
    for length, num_tokens in (
        ({"train_iters": 3}, 3 * 8 * 100),
        ({"train_iters": None, "train_samples": 39}, 4 * 8 * 100),
        ({"train_iters": None, "train_epochs": 2.0}, None),
    ):
        assert run_config(**batch, **length).num_tokens == num_tokens


def test_sizes_of_a_batch() -> None:
    for values, sizes in (
        ({"tensor_model_parallel_size": 2, "world_size": 8, "global_batch_size": 24}, (4, 3, 24)),
        ({"world_size": 4}, (4, 1, 8)),  # one microbatch a rank
    ):
        config = run_config(micro_batch_size=2, **values)
        assert (config.parallel.data_parallel_size, config.num_microbatches, config.global_batch_size) == sizes


WHOLE_MATRICES = [  # method, settings, whether steps end on whole matrices
    ("boft", {}, False),
    ("boft", {"boft_parametrization": "projection"}, True),
    ("urnn", {"urnn_update": "riemannian"}, True),
    ("urnn", {}, False),
    ("hybrid", {"boft_parametrization": "projection"}, True),
    ("hybrid", {"hybrid_rotation": "urnn", "boft_parametrization": "projection"}, False),
    ("hybrid", {"hybrid_rotation": "urnn", "urnn_update": "riemannian"}, True),
    ("lora", {"boft_parametrization": "projection"}, False),
]


def test_which_steps_end_on_whole_matrices() -> None:
    found = [(method, given, PeftConfig(method, **given)) for method, given, _ in WHOLE_MATRICES]
    assert [(*case, peft.spec.updates_whole_parameters(peft)) for *case, peft in found] == WHOLE_MATRICES


def test_scales_and_rates() -> None:
    assert PeftConfig(lora_rank=16, lora_alpha=32).lora_scale == 2
    assert PeftConfig(lora_rank=16, lora_alpha=32, lora_rs=True).lora_scale == 8
    rated = (PeftConfig("boft"), PeftConfig("hybrid"), PeftConfig("hybrid", peft_lr_rotation=5e-4))
    groups = [(peft, group) for peft in rated for group in peft.spec.param_groups if group.attribute == "is_rotation"]
    assert [group.learning_rate and group.learning_rate(peft, 8e-3) for peft, group in groups] == [8e-3, 1e-3, 5e-4]


@pytest.mark.parametrize(
    ("method", "settings", "unused"),
    [
        ("full", {"lora_rank": 8, "target_modules": ("a", "b")}, {"--lora-rank 8", "--peft-target-modules a b"}),
        ("lora", {"lora_rank": 8, "hybrid_merge_interval": 3}, {"--hybrid-merge-interval 3"}),
        ("boft", {"urnn_update": "riemannian", "boft_factors": 2}, {"--urnn-update riemannian"}),
        ("hybrid", {"urnn_block_size": 32, "boft_factors": 2}, {"--urnn-block-size 32"}),
        ("hybrid", {"hybrid_rotation": "urnn", "boft_factors": 2, "urnn_block_size": 32}, {"--boft-factors 2"}),
        ("hybrid", {"hybrid_rotation": "urnn", "urnn_mode": "replace"}, {"--urnn-mode replace"}),
        ("hybrid", {"rotation_side": "input"}, {"--rotation-side input"}),
        ("hybrid", {"lora_rank": 8, "lora_rs": True, "urnn_block_size": 64}, set()),
    ],
)
def test_flags_of_other_methods_are_kept_and_named(method: str, settings: dict[str, Any], unused: set[str]) -> None:
    peft = PeftConfig(method, **settings)
    assert {name: getattr(peft, name) for name in settings} == settings
    assert set(peft.unused_flags) == unused


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("boft", {"boft_parametrization": "x"}, "--boft-parametrization is 'x'; it must be one of cayley, projection."),
        ("hybrid", {"hybrid_rotation": "x"}, "--hybrid-rotation is 'x'; it must be one of boft, urnn."),
        ("lora-ga", {"lora_ga_init": None}, "--lora-ga-init is None; it must be one of aligned, paper, original."),
        ("lora", {"lora_rank": "8"}, "--lora-rank is '8'; it must be a whole number."),
        ("lora", {"lora_rank": 8.0}, "--lora-rank is 8.0; it must be a whole number."),
        ("lora", {"lora_rank": True}, "--lora-rank is True; it must be a whole number."),
        ("lora", {"lora_alpha": math.inf}, "--lora-alpha is inf; it must be a finite number."),
        ("lora", {"lora_max_norm_ratio": math.nan}, "--lora-max-norm-ratio is nan; it must be a finite number."),
        ("lora", {"lora_rs": 1}, "--lora-rs is 1; it must be True or False."),
        ("lora", {"lora_dropout": Nothing()}, "--lora-dropout is nothing; it must be a finite number."),
    ],
)
def test_a_value_of_another_type_is_told_with_its_flag(method: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        PeftConfig(method, **settings, lora_plus_ratio=-1)
    found = {message, "--lora-plus-ratio is -1; it must be above 0."}
    assert set(caught.value.problems) == (found if method != "boft" else {message})
    with pytest.raises(ConfigurationError) as unread:  # a run records what its method does not read, too
        PeftConfig("full", **settings, lora_plus_ratio=-1)
    assert unread.value.problems == (message,)


def test_values_of_the_right_type_and_those_of_another_method_whose_range_is_not_checked() -> None:
    peft = PeftConfig("lora", lora_rank=np.int64(8), lora_alpha=10**400, lora_dropout=np.float32(0.5), lora_rs=True)
    assert (peft.lora_rank, peft.lora_max_norm_ratio) == (8, None)
    with pytest.raises(ConfigurationError, match="--train-iters is '10'; it must be a whole number"):
        TrainingConfig(train_iters="10")  # pyright: ignore[reportArgumentType]
    peft = PeftConfig("lora", boft_block_size=-1, lora_ga_batches=0)
    assert peft.unused_flags == ["--lora-ga-batches 0", "--boft-block-size -1"]


@pytest.fixture
def config() -> RunConfig:
    return run_config(
        **{"tensor_model_parallel_size": 2, "world_size": 4, "target_modules": ("linear_qkv",), "lora_rank": 4},
        **{"shape_flags": {"swiglu": True}, "transformer": {"hidden_dropout": 0.1}, "bf16": True},
        **{"train_data_path": ("0.5", "a", "0.5", "b"), "save": "runs/a", "save_interval": 5},
    )


def test_a_record_comes_back_equal_and_one_of_an_older_version_takes_defaults(config: RunConfig) -> None:
    record = json.loads(json.dumps(config_to_dict(config)))
    assert config_from_dict(record) == config
    del record["logging"], record["peft"]["lora_rs"]
    assert config_from_dict(record) == config


def test_a_record_holds_no_flags_of_other_methods_but_those_that_were_set() -> None:
    config = run_config(lora_rank=4, boft_factors=2)
    recorded = config_to_dict(config)
    assert recorded["peft"].keys() == METHODS["lora"].fields(config.peft) | {"boft_factors"}
    assert config_from_dict(json.loads(json.dumps(recorded))) == config


def test_a_record_is_read_though_the_defaults_of_its_method_are_refused(config: RunConfig, monkeypatch) -> None:
    def needs_rank_4(self: Any, peft: PeftConfig, require: Requirements) -> None:
        require(peft.lora_rank == 4, "a rank of 4 is needed")

    monkeypatch.setattr(type(METHODS["lora"]), "check", needs_rank_4)
    assert config_from_dict(config_to_dict(config)) == config  # of rank 4, which is not the default


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("peft", {"method": "not-installed", "its_bound": 0.5}, "--peft-method not-installed is not one of full, lora"),
        ("peft", {"quantum_rank": 1}, "peft.quantum_rank"),
        ("quantum", {"rank": 1}, "quantum.rank"),
    ],
)
def test_a_record_of_another_package_or_a_newer_version_is_refused_by_name(
    config: RunConfig, section: str, values: dict[str, Any], message: str
) -> None:
    record = config_to_dict(config)
    record.setdefault(section, {}).update(values)
    with pytest.raises(ConfigurationError, match=message):
        config_from_dict(record)


def test_an_error_escapes_what_a_terminal_would_obey() -> None:
    """Names of tensors and files stand in it."""
    told = str(ConfigurationError("a\x1b[31m\x9b\u202e\r", "é\t\n  b"))
    assert told == "a\\x1b[31m\\x9b\\u202e\\r\né\t\n  b"
