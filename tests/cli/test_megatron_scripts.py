"""Flags of Megatron-LM's published Llama and Mistral scripts: each is served, accepted or refused with a way out."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_peft.cli.flags import flags_of, served_flags
from megatron_peft.cli.parser import read_config
from megatron_peft.config import ConfigurationError
from megatron_peft.config.evaluation import AnswerSettings
from tools import reference

Script = Mapping[str, Any]
SCRIPTS: Sequence[Script] = reference.scripts()
OUTCOMES = ("served", "accepted", "refused", "mistyped")
TARGETS = {name: one.target for one in served_flags() for name in one.names}
OF_GENERATE = {name for one in flags_of(AnswerSettings) for name in one.names}
BY_SAMPLES = {"--train-samples", "--lr-decay-samples", "--lr-warmup-samples"}
DATA = {"--mock-data", "--data-path", "--train-data-path"}


def script_id(script: Script) -> str:
    return " ".join([Path(script["path"]).name, script.get("variant", "")]).strip()


def entries(*outcomes: str) -> set[str]:
    return {flag for script in SCRIPTS for outcome in outcomes for flag in script.get(outcome, ())}


def complaint(*flags: str) -> str:
    """What is told about flags, given beside what every run needs; empty if nothing is wrong."""
    own = {word for word in flags if word.startswith("--")}
    needed = ["--pretrained-checkpoint", "model", *([] if own & DATA else ["--mock-data"])]
    length = ["--train-samples", "3000000000"] if own & BY_SAMPLES else ["--train-iters", "10"]
    try:
        read_config([*needed, *([] if "--train-samples" in own else length), *flags], {})
    except ConfigurationError as error:
        return str(error)
    return ""


def outcome_of(flag: str, script: Script) -> str:
    name = flag.split()[0]
    if script.get("program") == "megatron-peft generate" and name in OF_GENERATE:
        return "served"
    told = [problem for problem in complaint(*flag.split()).splitlines() if problem.startswith(name)]
    if any("needs" not in problem for problem in told):  # alone it may need another flag of its script
        return "refused"
    return "accepted" if TARGETS[name] == "nothing" else "served"


@pytest.mark.parametrize("script", SCRIPTS, ids=script_id)
def test_each_flag_is_what_the_list_says(script: Script) -> None:
    listed = {flag: "refused" if one == "mistyped" else one for one in OUTCOMES for flag in script.get(one, ())}
    assert {flag: outcome_of(flag, script) for flag in listed} == listed


def test_four_of_five_are_served_or_accepted(capsys: pytest.CaptureFixture[str]) -> None:
    """Of the flags with their values, of the names, and of all places where a script gives one."""
    good, bad = entries("served", "accepted"), entries("refused")
    names, bad_names = ({flag.split()[0] for flag in flags} for flags in (good | bad, bad))
    places = [outcome for script in SCRIPTS for outcome in OUTCOMES[:3] for _ in script[outcome]]
    shares = {
        "flags with their values": len(good) / len(good | bad),
        "names": len(names - bad_names) / len(names),
        "places": sum(outcome != "refused" for outcome in places) / len(places),
    }
    with capsys.disabled():
        print("\nserved or accepted:", ", ".join(f"{share:.1%} of {what}" for what, share in shares.items()))
    assert min(shares.values()) >= 0.8


def test_the_whole_training_script_is_taken_without_fp8() -> None:
    for script in SCRIPTS[:2]:
        flags = [word for outcome in OUTCOMES[:2] for flag in script[outcome] for word in flag.split()]
        assert complaint(*flags) == ""


def test_a_refusal_names_the_way_out() -> None:
    ways_out = ("; remove it", "; use ", "; answers come from", "did you mean --", "takes no value")
    told = {flag: complaint(*flag.split()) for flag in entries("refused", "mistyped")}
    assert {flag: words for flag, words in told.items() if not any(way in words for way in ways_out)} == {}


TOLD = {
    "--fp8-format hybrid": "--fp8-format is a Megatron flag .* [(]FP8[)]; remove it; --bf16 trains in bfloat16.",
    "--fp8-param-gather": "[(]FP8[)]; remove it; --bf16 trains in bfloat16.",
    "--context-parallel-size 2": "invalid choice: '2' .* remove it; --sequence-parallel with --tensor-model",
    "--hierarchical-context-parallel-sizes 2 2": "[(]context parallelism[)]; remove it; --sequence-parallel with",
    "--expert-model-parallel-size 8": "invalid choice: '8' .* mixtures of experts are not supported.",
    "--use-megatron-fsdp": "[(]fully sharded data parallelism[)]; remove it; --use-distributed-optimizer shards",
    "--tokenizer-type TikTokenizer": "invalid choice: 'TikTokenizer' .* use HuggingFaceTokenizer with a folder",
    "--ckpt-format torch": "invalid choice: 'torch' .* megatron-peft convert converts them.",
    "--transformer-impl inference_optimized": "invalid choice: 'inference_optimized' .* use auto.",
}


def test_what_is_refused_says_what_to_use() -> None:
    told = {flags: complaint(*flags.split()) for flags in TOLD}
    assert {flags: words for flags, words in told.items() if not re.search(TOLD[flags], words)} == {}


def test_values_are_read_as_megatron_reads_them() -> None:
    base = ["--pretrained-checkpoint", "m", "--train-iters", "1"]
    config = read_config([*base, "--mock-data", "--sequence-parallel", "--split", "'99,1,0'", "--use-flash-attn"], {})
    assert config.parallel.sequence_parallel is False and config.data.split == "'99,1,0'"
    assert config.model.attention_backend == "flash" and config.data.mock_data
    both = ["--mock-data", "--use-flash-attn", "--attention-backend", "auto"]
    assert read_config([*base, *both], {}).model.attention_backend == "flash"
    assert read_config([*base, *both[:1], *both[2:], both[1]], {}).model.attention_backend == "flash"
    two = ["--mock-data", "--sequence-parallel", "--tensor-model-parallel-size", "2", "--no-mmap-bin-files"]
    config = read_config([*base, *two], {"WORLD_SIZE": "2"})
    assert config.parallel.sequence_parallel and not config.data.mmap_bin_files


def test_the_table_of_the_documentation_has_every_accepted_and_refused_flag() -> None:
    table = reference.script_tables()
    shown = entries("accepted") | {flag.split()[0] for flag in entries("refused")}
    assert [flag for flag in shown if f"`{flag}`" not in table] == []
