"""What is asked of a model: the flags of generation and of evaluation on tasks."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import yaml

from megatron_peft.config.errors import Checked, Requirements, option, required_option
from megatron_peft.config.untrusted import parse_yaml

EngineName = Literal["vllm"]
engine_python = partial(
    option,
    Path(".venv-vllm/bin/python"),
    "the Python of the engine's environment (make engines makes the default)",
    needs="engine",
    metavar="FILE",
)
_of_engine = partial(option, group="serving engine")
_file = partial(option, None, check="not_empty", metavar="FILE")


@dataclass(frozen=True)
class Sampling(Checked):
    """How the next token is chosen."""

    temperature: float = option(0.0, "0 is greedy", check="not_negative")
    top_p: float = option(1.0, "sample from the smallest set of tokens with probability X")
    top_k: int = option(0, "sample from the N most likely tokens, before --top-p; 0: from all", check="not_negative")

    def check(self, require: Requirements) -> None:
        require(0 < self.top_p <= 1, f"--top-p is {self.top_p}; it is a probability, above 0 and at most 1.")


@dataclass(frozen=True, kw_only=True)
class EngineSettings(Checked):
    """The engine that answers in our own model's place."""

    engine: EngineName | None = _of_engine(None, "let this engine answer, with the merged weights of --load")
    engine_python: Path = engine_python(group="serving engine")
    engine_lora: bool = _of_engine(
        False, "give it the adapter of --load, on its base, instead of merged weights", needs="engine"
    )
    engine_args: tuple[str, ...] = _of_engine(
        (), "its own arguments, as tensor_parallel_size=8", needs="engine", metavar="NAME=VALUE"
    )

    def check(self, require: Requirements) -> None:
        for given in self.engine_args:
            name, separator, value = given.partition("=")
            message = f"--engine-args {given}: give NAME=VALUE, as tensor_parallel_size=8."
            require(name.isidentifier() and bool(separator and value), message)

    def arguments_of_engine(self) -> dict[str, Any]:
        """Their values, read as YAML reads them."""
        pairs = (given.partition("=") for given in self.engine_args)
        return {name: parse_yaml(value, f"--engine-args {name}", yaml.SafeLoader) for name, _, value in pairs}


@dataclass(frozen=True)
class AnswerSettings(EngineSettings):
    """The prompts of `megatron-peft generate`, and how they are answered."""

    prompt: str | None = option(None, "the prompt; the answer is printed while it is generated")
    prompt_file: str | None = _file("one prompt per line, or .jsonl with prompt or messages")
    output: str | None = _file("write prompts and answers as JSON lines (default: print them)")
    overwrite: bool = option(False, "replace an existing --output")
    max_new_tokens: int = option(
        128, "tokens of an answer, at most", check="positive", flags=("--max-new-tokens", "--num-tokens-to-generate")
    )
    temperature: float = option(Sampling.temperature, "0 is greedy")
    top_p: float = option(Sampling.top_p, "sample from the smallest set of tokens with probability X")
    top_k: int = option(Sampling.top_k, "sample from the N most likely tokens; 0: from all")
    num_samples: int = option(1, "answers per prompt", check="positive")
    # One that begins with a dash is typed alone, as --stop=---.
    stop: tuple[str, ...] = option((), r"an answer ends before any of these; \n is a newline", append=True)
    chat: bool = option(False, "treat the prompt as a user message and apply the tokenizer's chat template")
    system: str | None = option(
        None, "system message of each conversation that has none of its own", needs="chat", metavar="TEXT"
    )
    batch_size: int = option(
        16, "answers generated together", check="positive", flags=("--batch-size", "--max-batch-size")
    )
    sampling_seed: int = option(1234, "seed of sampling")

    def check(self, require: Requirements) -> None:
        super().check(require)
        given = [value for value in (self.prompt, self.prompt_file) if value is not None]
        require(len(given) == 1, "give exactly one of --prompt TEXT and --prompt-file FILE.")
        require(
            self.num_samples == 1 or self.temperature != 0,
            f"--num-samples {self.num_samples} with --temperature 0 gives the same answer {self.num_samples} "
            "times: use a --temperature above 0.",
        )
        sampling = self.sampling()
        samples = sampling == Sampling(sampling.temperature) or self.temperature > 0
        require(samples, "--top-p and --top-k choose among sampled tokens: give a --temperature above 0, as 1.")

    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_p, self.top_k)


@dataclass(frozen=True)
class HarnessSettings(EngineSettings):
    """The tasks of `megatron-peft evaluate`, and how they are run."""

    tasks: tuple[str, ...] = required_option("names of tasks, groups or tags", metavar="TASK")
    output: str = required_option("results as JSON, written when all tasks are done", metavar="FILE")
    include_path: tuple[str, ...] = option((), "folders with task files (YAML)", metavar="FOLDER")
    num_fewshot: int | None = option(None, "solved examples per question (default: the task's)", check="not_negative")
    limit: float | None = option(None, "first N questions of a task, or a share below 1", check="positive", metavar="N")
    batch_size: int = option(16, "requests per forward pass of a replica", check="positive")
    apply_chat_template: bool = option(False, "format questions with the tokenizer's chat template")
    sampling_seed: int = option(1234, "seed of sampled answers")
    log_samples: bool = option(False, "also write all questions and answers to OUTPUT.samples.jsonl")
    confirm_run_unsafe_code: bool = option(False, "allow tasks that run code: a model's, or functions of lm_eval.tasks")
    unsafe_execution: bool = option(False, "run such code without a sandbox")
    overwrite: bool = option(False, "replace an existing --output of another evaluation")

    def check(self, require: Requirements) -> None:
        super().check(require)
        whole = self.limit is None or self.limit < 1 or self.limit == int(self.limit)
        require(whole, f"--limit is {self.limit}; it is a number of questions, or below 1 a share of them.")

    def result_settings(self) -> dict[str, Any]:
        """The settings that change the results, for their file."""
        names = ("num_fewshot", "limit", "apply_chat_template", "sampling_seed")
        folders = list(self.include_path)
        values = {"tasks": list(self.tasks), "include_path": folders, **{name: getattr(self, name) for name in names}}
        # Without an engine such files are what they have always been.
        of_engine = {"engine": self.engine, "engine_lora": self.engine_lora, "engine_args": list(self.engine_args)}
        return values | (of_engine if self.engine else {})

    def side_file(self, kind: str) -> Path:
        """`scores.json` -> `scores.<kind>.jsonl`, next to --output."""
        path = Path(self.output)
        return path.with_name(f"{path.name.removesuffix('.json')}.{kind}.jsonl")


@dataclass(frozen=True)
class SyncSettings(Checked):
    """The server that `megatron-peft sync` gives a run's adapter to."""

    server: str = required_option(
        "address of a running vllm serve, as http://localhost:8000", metavar="URL", check="address"
    )
    name: str | None = option(
        None, "what clients call it, before -ITERATION (default: the run folder's name)", check="plain_name"
    )
    folder: str | None = option(
        None, "where the exported versions lie, which the server has to see too (default: served in the run's folder)"
    )
    follow: bool = option(False, "go on with each new checkpoint, until it is interrupted")
    skip: tuple[Literal["binding", "numbers"], ...] = option(
        (), "do not check what the engine binds, or do not compare log-probabilities, for which the model is loaded"
    )
    tolerance: float = option(
        1e-3,
        "refuse a version whose log-probability of a token differs from our own by more, in nats, on average; a "
        "server in bfloat16 wants 0.05",
        check="not_negative",
    )
    engine_python: Path = engine_python(needs="")
