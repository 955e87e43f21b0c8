"""A record reads back; contradictions name both values; two bases have different fingerprints."""

import copy
import dataclasses
import json
import re

import pytest
import torch
from safetensors.torch import save_file

from megatron_peft.checkpoint import run_record
from megatron_peft.checkpoint.folders import RECORD, TRACKER, write_manifest
from megatron_peft.checkpoint.run_record import CurrentRun, RunRecord, changes, contradictions, fingerprint
from megatron_peft.config import ConfigurationError, flag
from tests.checkpoint.runs import SCHEDULE, SHAPE, make_config, make_record
from tests.conversion.megatron_folders import save_distributed

NEWER = json.dumps({**json.loads(make_record().to_json()), "format_version": 2})


@pytest.mark.parametrize(
    "text, told",
    [(NEWER, "format 2 .* update"), *((text, "cannot be read") for text in ("", "{", "[]", '{"format_version": 1}'))],
)
def test_a_record_reads_back_and_what_cannot_be_read_is_named(tmp_path, text, told):
    with pytest.raises(ConfigurationError, match="holds no checkpoint"):
        run_record.read_run_record(tmp_path)
    (tmp_path / RECORD).write_text(make_record().to_json())
    assert run_record.read_record(tmp_path) == run_record.read_run_record(tmp_path) == make_record()
    (tmp_path / RECORD).write_text(text)
    with pytest.raises(ConfigurationError, match=f"{RECORD}.* {told}"):
        run_record.read_record(tmp_path)
    (tmp_path / RECORD).unlink()
    with pytest.raises(ConfigurationError, match=f"^{tmp_path / RECORD} cannot be read: No such file or directory.$"):
        run_record.read_record(tmp_path)


GROUPS = {"checkpoint", "model", "peft", "optimizer", "data_settings", "training", "transformer"}


def here(schedule=None, **changes):
    """This run: that of make_record with changes, those of the configuration by group."""
    groups = {name: changes.pop(name) for name in GROUPS & changes.keys()}
    record = make_record()
    same = CurrentRun(make_config(**groups), SHAPE, record.adapted_layers, record.base_fingerprint, SCHEDULE)
    return dataclasses.replace(same, schedule={**SCHEDULE, **(schedule or {})}, **changes)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"peft": {"method": "full"}}, ["--peft-method lora", "--peft-method full"]),
        ({"peft": {"lora_rs": True}}, ["--lora-rs False", "--lora-rs True"]),
        ({"model": {"base_precision": "nf4"}}, ["--base-precision run", "--base-precision nf4", "--allow-other-base-"]),
        (
            {"model": {"base_precision": "nf4", "quantize_output_layer": True}},
            ["--base-precision run,", "--base-precision nf4 --quantize-output-layer, another base"],
        ),
        ({"shape": dataclasses.replace(SHAPE, hidden_size=64)}, ["hidden_size 96 there, 64 here", "bases/base"]),
    ],
)
def test_a_contradiction_names_both_values(changes, words):
    (message,) = contradictions(make_record(), here(**changes))
    assert all(word in message for word in ["--load runs", *words]), message


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"peft": {"lora_dropout": 0.5, "lora_plus_ratio": 4.0}},
        {"peft": {"method": "lora-ga", "lora_ga_batches": 3}},
        {"peft": {"target_modules": ("linear_f*1",)}},  # another pattern for the same layers
        {"model": {"base_precision": "nf4"}, "checkpoint": {"allow_other_base_precision": True}},
        {"base_fingerprint": None},  # the base cannot be read any more
        {"model": {"pretrained_checkpoint": "moved/elsewhere"}},
    ],
)
def test_what_may_change(changes):
    record = make_record(config=make_config(peft={"method": changes.get("peft", {}).get("method", "lora")}))
    assert contradictions(record, here(**changes)) == []
    assert run_record.optimizer_contradictions(record, here(**changes)) == []


@pytest.mark.parametrize(
    ("before", "now", "told"),
    [
        ({}, {}, ""),
        ({"data_digest": "12"}, {"data_digest": "12"}, ""),
        ({}, {"data_digest": "34"}, ""),  # an older record
        ({}, {"model": {"bf16": True}}, "--bf16 True (before: False)"),
        pytest.param(
            {},
            {"peft": {"lora_dropout": 0.5, "lora_plus_ratio": 4.0, "target_modules": ("linear_f*1",)}},
            "--lora-dropout 0.5 (before: 0.0), --lora-plus-ratio 4.0 (before: 1.0)",
            id="of the method",
        ),
        pytest.param(
            {"config": make_config(peft={"method": "hybrid"})},
            {"peft": {"method": "hybrid", "lora_ga_batches": 3, "peft_lr_rotation": 0.25}},
            "--peft-lr-rotation 0.25 (before: None)",
            id="of the hybrid, which is not initialized again",
        ),
        ({"data_digest": "12"}, {"data_digest": "34"}, "other contents of --train-data-path pairs.jsonl than before"),
        (
            {"data_digest": "12", "config": make_config(data_settings={"train_data_path": ("a.jsonl", "b.jsonl")})},
            {"data_digest": "34"},
            "--train-data-path pairs.jsonl (before: a.jsonl b.jsonl)",
        ),
        ({}, {"tokenizer_digest": "34"}, ""),  # an older record
        ({"tokenizer_digest": "12"}, {"tokenizer_digest": "34"}, "another tokenizer or chat template than before"),
        pytest.param(
            {"tokenizer_digest": "12", "config": make_config(data_settings={"chat_template": "/where/a.jinja"})},
            {"tokenizer_digest": "12", "data_settings": {"chat_template": "a.jinja"}},
            "",
            id="the template by another path",
        ),
    ],
)
def test_other_data_and_other_settings_give_a_warning(before, now, told):
    sentence = f"--load runs: the run continues with {told}, at the old position."
    assert changes(make_record(**before), here(**now)) == (sentence if told else "")


DECIDING = {  # which samples come, and what an update is
    "data": "train_data_path data_path split seq_length overlong pack_sequences packing seed prompt_column "
    "response_column messages_column text_column chat_template",
    "training": "global_batch_size seed",
    "model": "bf16",
    "optimizer": "adam_beta1 adam_beta2 adam_eps sgd_momentum clip_grad",
}


def with_other(run, section, name):
    """The run with another value, whether it can be used or not."""
    config, changed = copy.copy(run.config), copy.copy(getattr(run.config, section))
    object.__setattr__(changed, name, "another")
    object.__setattr__(config, section, changed)
    return dataclasses.replace(run, config=config)


@pytest.mark.parametrize(("section", "name"), [(one, name) for one in DECIDING for name in DECIDING[one].split()])
def test_all_that_decides_samples_and_updates_is_compared(section, name):
    assert f"{flag(name)} another (before: " in changes(make_record(), with_other(here(), section, name))


@pytest.mark.parametrize("name", ["hidden_dropout", "attention_dropout"])
def test_another_dropout_is_told(name):
    assert f"{flag(name)} 0.25 (before: 0.0)" in changes(make_record(), here(transformer={name: 0.25}))


SLOPING = {**SCHEDULE, "lr_decay_style": "WSD", "wsd_decay_steps": 4, "wd_incr_style": "linear"}


@pytest.mark.parametrize("name", [name for name in SLOPING if name != "num_steps"])
def test_every_part_of_a_schedule_is_compared_and_read_as_what_it_is(name):
    other = "cosine" if name.endswith("_style") else 12345
    record = make_record(schedule=SLOPING)
    (message,) = run_record.optimizer_contradictions(record, here(schedule={**SLOPING, name: other}))
    assert f"{SLOPING[name]} there, {other} here" in message
    plain = json.loads(record.to_json())
    with pytest.raises(ValueError, match="its schedule cannot be that of a run"):
        RunRecord.from_json(json.dumps({**plain, "schedule": {**plain["schedule"], name: True}}))


def test_a_packed_run_of_before_there_was_a_choice_of_packing_is_told_of_the_other_order():
    packed = {"pack_sequences": True}
    plain = json.loads(make_record(config=make_config(data_settings=packed)).to_json())
    del plain["config"]["data"]["packing"]
    record = RunRecord.from_json(json.dumps(plain))
    told = "--packing first-fit-decreasing (before: next-fit), at the old position"
    assert told in changes(record, here(data_settings=packed))
    assert changes(record, here(data_settings=packed | {"packing": "next-fit"})) == ""
    plain = json.loads(make_record().to_json())
    del plain["config"]["data"]["packing"]
    assert changes(RunRecord.from_json(json.dumps(plain)), here()) == ""  # a run that packs nothing


def test_several_contradictions_come_at_once_and_full_fine_tuning_does_not_look_at_adapters():
    assert len(contradictions(make_record(), here(peft={"lora_rank": 8, "lora_alpha": 8}))) == 2
    full = make_record(config=make_config(peft={"method": "full"}), adapted_layers=())
    now = here(peft={"method": "full", "lora_rank": 8}, adapted_layers=())
    assert contradictions(full, now) == []


def test_no_optimizer_or_another_schedule_is_refused_unless_one_is_chosen_or_both_are_the_same():
    (message,) = run_record.optimizer_contradictions(make_record(schedule=None, optimizer_steps=None), here())
    assert "--no-save-optim" in message and "--no-load-optim" in message
    other = {"max_lr": 1e-3, "lr_decay_steps": 20}
    (message,) = run_record.optimizer_contradictions(make_record(), here(schedule=other))
    assert "--lr: 0.005 there, 0.001 here" in message and "--lr-decay-iters" in message
    for choice in ("override_opt_param_scheduler", "use_checkpoint_opt_param_scheduler"):
        chosen = here(schedule={"max_lr": 1e-3}, optimizer={choice: True})
        assert run_record.optimizer_contradictions(make_record(), chosen) == []
    # A longer run at a constant rate.
    constant = {**SCHEDULE, "lr_decay_style": "constant"}
    longer = here(schedule={"lr_decay_style": "constant", "lr_decay_steps": 100, "wd_incr_steps": 100})
    assert run_record.optimizer_contradictions(make_record(schedule=constant), longer) == []


FOUR_LONGER = {"lr_decay_steps": SCHEDULE["lr_decay_steps"] + 4}


@pytest.mark.parametrize(
    ("schedule", "settings", "names"),
    [
        pytest.param(FOUR_LONGER, {}, "--train-iters 4:", id="the decay follows the length"),
        pytest.param(
            {**FOUR_LONGER, "lr_warmup_steps": 9}, {"lr_warmup_fraction": 0.5}, "--train-iters 4:", id="warmup"
        ),
        pytest.param({**FOUR_LONGER, "lr_warmup_steps": 9}, {}, "--lr-warmup-iters .or", id="another warmup too"),
        pytest.param(FOUR_LONGER, {"lr_decay_iters": 4}, "--lr-decay-iters .or", id="a decay of its own"),
    ],
)
def test_a_longer_run_is_refused_with_one_flag_as_the_hint(schedule, settings, names):
    longer = here(schedule=schedule, optimizer=settings, training={"train_iters": 4})
    (message,) = run_record.optimizer_contradictions(make_record(), longer)
    assert re.search(names, message) and ("add --override-opt-param-scheduler." in message) == ("iters 4" in names)
    chosen = here(schedule=schedule, optimizer={"override_opt_param_scheduler": True}, training={"train_iters": 4})
    assert run_record.optimizer_contradictions(make_record(), chosen) == []


def test_a_last_phase_of_wsd_is_compared_in_samples_also_with_a_record_that_does_not_hold_it():
    """The record's run has batches of 4."""
    wsd = {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 2, "lr_wsd_decay_style": "linear"}
    plain = json.loads(make_record(config=make_config(optimizer=wsd), schedule=SLOPING).to_json())
    for name in ("init_lr", "wsd_decay_steps", "lr_wsd_decay_style"):
        del plain["schedule"][name]
    record = RunRecord.from_json(json.dumps(plain))
    assert record.schedule == {**SLOPING, "wsd_decay_steps": 8, "lr_wsd_decay_style": "linear"}
    now = here(schedule=record.schedule, training={"global_batch_size": 8, "train_iters": 2})
    for samples, told in (8, []), (16, ["--lr-wsd-decay-iters (or -samples) in samples: 8 there, 16 here"]):
        another = dataclasses.replace(now, schedule={**now.schedule, "wsd_decay_steps": samples})
        problems = run_record.optimizer_contradictions(record, another)
        assert len(problems) == len(told) and all(words in problems[0] for words in told)
        stored = dataclasses.replace(
            another, config=make_config(optimizer={"use_checkpoint_opt_param_scheduler": True})
        )
        assert run_record.optimizer_contradictions(record, stored) == []


@pytest.mark.parametrize(
    ("before", "batch", "train_iters", "choice", "told"),
    [
        (4, 4, 3, "", ""),
        (4, 2, 4, "", ""),
        (4, 2, 6, "", "ends after 16 samples, but its learning rate decays over 12. Give --over.*--lr-decay-iters 8,"),
        (4, 2, 6, "override", "ends after 16 samples, but its learning rate decays over 12. Give --override"),
        (4, 2, 6, "use_checkpoint", "rate of 0 after 4 iterations, but this run has 6: .* or at most 4 it"),
        (4, 2, 4, "use_checkpoint", ""),
        (2, 4, 3, "", "ends after 8 samples, but its learning rate decays over 12. Give --over.*--lr-decay-iters 2, "),
        (2, 4, 3, "use_checkpoint", ""),
        (4, 12, 1, "", ""),  # over already
    ],
)
def test_a_run_whose_batches_are_others_now_ends_where_its_schedule_does(before, batch, train_iters, choice, told):
    """After two iterations, with a decay of 12 samples."""
    choices = {f"{choice}_opt_param_scheduler": True} if choice else {}
    now = here(optimizer=choices, training={"global_batch_size": batch, "train_iters": train_iters})
    record = make_record(position={"iteration": 2, "consumed_samples": 2 * before})
    problems = run_record.optimizer_contradictions(record, now)
    assert len(problems) == bool(told) and all(re.search(told, problem) for problem in problems), problems


def save_base(folder, weights, config="{}"):
    folder.mkdir()
    (folder / "config.json").write_text(config)
    save_file(weights, folder / "model.safetensors")
    return str(folder)


def weights(scale=1.0, name="w"):
    return {name: torch.arange(400_000, dtype=torch.float32) * scale}


def test_copies_are_the_same_and_other_bases_are_not(tmp_path):
    with pytest.raises(OSError, match="neither config.json nor weights"):
        fingerprint(str(tmp_path))
    base = fingerprint(save_base(tmp_path / "base", weights()))
    assert fingerprint(save_base(tmp_path / "copy", weights())) == base
    tuned = weights()
    tuned["w"][100_000:300_000] += 1  # everywhere but at the start and the end, as two fine-tunes differ
    for name, content in {
        "config": (weights(), '{"rope_theta": 1}'),
        "values": (weights(scale=1.5),),
        "names": (weights(name="v"),),
        "tuned": (tuned,),
    }.items():
        assert fingerprint(save_base(tmp_path / name, *content)) != base, name
    (tmp_path / "base" / "pytorch_model.bin").write_bytes(b"x")  # safetensors go first
    assert [path.name for path in run_record.weight_files(tmp_path / "base")] == ["model.safetensors"]


def test_a_relative_path_means_the_folder_that_is_there_now(tmp_path, monkeypatch):
    found = []
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        save_base(tmp_path / name / "base", weights(scale=len(name)))
        found.append(fingerprint("base"))
    assert found[0] != found[1]


def test_the_fingerprint_of_a_run_changes_with_the_run_and_its_iteration(tmp_path):
    """Of full fine-tuning: the weights lie below the iteration that the tracker names."""

    def run(name, values, iteration=2):
        folder = tmp_path / name / f"iter_{iteration:07d}"
        save_distributed(folder, {"w": values})
        (folder / RECORD).write_text("{}")
        write_manifest(folder, {})
        (tmp_path / name / TRACKER).write_text(f"{iteration}\n")
        run_record.fingerprint_of.cache_clear()
        return fingerprint(str(tmp_path / name))

    first = run("first", torch.zeros(300_000))
    assert set(first) == {"iter_0000002/__0_0.distcp", "iter_0000002/manifest.json"}
    other = torch.zeros(300_000)
    other[123_457] = 1.0  # between the sampled ranges: the manifest has its checksum
    assert run("second", other) != first
    assert run("first", torch.zeros(300_000), iteration=3) != first


def test_old_files_of_ranks_are_told_apart(tmp_path):
    files = [f"mp_rank_{rank:02d}/model_optim_rng.pt" for rank in range(2)]

    def ranks(name, value):
        for rank, file in enumerate(files):
            (tmp_path / name / file).parent.mkdir(parents=True)
            torch.save({"model": {"w": torch.full((4,), value * rank)}}, tmp_path / name / file)
        (tmp_path / name / "config.json").write_text("{}")
        return fingerprint(str(tmp_path / name))

    first, other = ranks("first", 1.0), ranks("other", 2.0)
    assert set(first) == {"config.json", *files}
    assert [name for name in first if first[name] != other[name]] == files[1:]
