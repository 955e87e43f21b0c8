"""Our model as a model of lm-evaluation-harness: log-likelihoods and answers.

Tokens, truncation and end tokens follow the harness's `hf` backend, so both give the same scores: a text that is
too long loses its beginning, and an empty context becomes the beginning-of-sequence token.

The harness runs on rank 0 only, so tasks are read, answers scored and code executed once. The other ranks wait for its
calls.
"""

import datetime
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from megatron_peft.checkpoint.folders import GRACE_SECONDS, locked
from megatron_peft.config import ConfigurationError, require, writing
from megatron_peft.config.evaluation import Sampling
from megatron_peft.config.untrusted import parse_json, require_regular
from megatron_peft.evaluation.generation import Continuation, GenerationSettings, StopTexts, generate_answers, score_all
from megatron_peft.evaluation.model import InferenceModel
from megatron_peft.runtime.launch import gloo_group
from megatron_peft.runtime.progress import progress_bar

Action = Callable[..., Any]  # on a model, of all ranks


class RankDispatcher:
    """Calls of rank 0 that run on all ranks of a started world. Creating it is a collective."""

    def __init__(self, model: InferenceModel) -> None:
        self.model = model
        # Between two calls rank 0 may execute code for hours, longer than a collective may wait.
        self._group = gloo_group(datetime.timedelta(days=20))

    def call(self, action: Action, *arguments: Any) -> Any:
        """Run `action(model, *arguments)` on every rank. Called on rank 0; returns the result there."""
        self._broadcast((action, arguments))
        return action(self.model, *arguments)

    def serve(self) -> None:
        """Run the calls of rank 0 until it calls `stop`. Called on all other ranks."""
        while message := self._broadcast(None):
            action, arguments = message
            action(self.model, *arguments)

    def stop(self) -> None:
        """End `serve` on the other ranks. Called on rank 0."""
        self._broadcast(None)

    def _broadcast(self, message: Any) -> Any:
        messages = [message]
        dist.broadcast_object_list(messages, src=0, group=self._group)  # here the others wait
        return messages[0]


class FinishedRequests(dict[str, Any]):
    """Answers by key, in a file of JSON lines, so that a killed evaluation resumes where it stopped.

        {"key": "5f1c...", "answer": [-12.25, true]}

    The harness has a cache too, but without sampled answers, and not bound to a checkpoint. The file is locked as long
    as this object lives; `model`, the fingerprint of the model, is part of every key, as is what names an engine.
    """

    def __init__(self, path: Path, model: str, engine: Sequence[Any] = ()) -> None:
        self._path, self.model, self._engine = path, model, engine
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            require_regular(path)
        # Opened once: a lock of `fcntl`, which works on network file systems, ends with the first close of its file.
        self._file = open(path, "a+b")  # noqa: SIM115
        refusal = f"{path} is in use by another evaluation: wait for its end, or give another --output."
        locked(self._file.fileno(), path, lambda: refusal, GRACE_SECONDS)
        self._file.seek(0)
        content = self._file.read()
        whole = content[: content.rfind(b"\n") + 1]
        self._file.truncate(len(whole))  # without the line that a kill cut
        for number, line in enumerate(whole.splitlines(), 1):
            place = f"{path}:{number}"
            try:
                entry = parse_json(line, place)
                self[entry["key"] + ""] = entry["answer"]
            except (ConfigurationError, KeyError, TypeError) as error:
                message = f"{place} is not an answered request ({error!r}): remove the line to repeat the request."
                raise ConfigurationError(message) from error

    def key(self, kind: str, *what: Any) -> str:
        """A digest of the model, the kind of the request, and all else that its answer depends on (JSON)."""
        return hashlib.sha256(json.dumps([self.model, *self._engine, kind, *what]).encode()).hexdigest()[:32]

    def add(self, answers: Mapping[str, Any]) -> None:
        self.update(answers)
        lines = [json.dumps({"key": key, "answer": answer}) + "\n" for key, answer in answers.items()]
        with writing(str(self._path), "free disk space, and the same command goes on"):
            self._file.write("".join(lines).encode())
            self._file.flush()

    def require_answers(self, keys: Iterable[str], is_answer: Callable[[Any], bool]) -> None:
        """Raises ConfigurationError if a known answer to these requests is not of their kind."""
        for key in keys:
            problem = f"{self._path} has no such answer to the request {key} as the model gives"
            require(key not in self or is_answer(self[key]), f"{problem}: remove its line to repeat the request.")


def _is_score(answer: Any) -> bool:
    """A log-likelihood, and whether it is of the likeliest continuation."""
    return isinstance(answer, list | tuple) and [*map(type, answer)] in ([float, bool], [int, bool])


MAX_NEW_TOKENS = 256  # the harness's default
SUPPORTED_SETTINGS = {"until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k"}

# The key of its answer, and a continuation, or a prompt with the name of its random stream: both begin with a context.
Request = tuple[str, tuple[tuple[int, ...], Any]]


class HarnessModel(TemplateLM):
    """The harness's model. It runs on rank 0, and its forwards on all ranks, with `batch_size` requests per replica."""

    def __init__(self, dispatcher: RankDispatcher, finished: FinishedRequests, batch_size: int, seed: int) -> None:
        super().__init__()
        self._model, self._dispatcher, self._finished = dispatcher.model, dispatcher, finished
        self._batch_size, self._seed = batch_size, seed
        self.max_length, self._scored_length = dispatcher.model.max_length, dispatcher.model.scored_length
        self.truncated: Counter[str] = Counter()  # kind of request -> how many lost their beginning

    @property
    def eot_token_id(self) -> int:
        return self._model.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self._model.tokenizer.prefix_id

    @property
    def tokenizer_name(self) -> str:
        return json.dumps(self._model.tokenizer.unique_identifiers)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids, with one beginning-of-sequence token if the tokenizer adds it by default."""
        tokenizer = self._model.tokenizer
        ids, bos_id = tokenizer.encode(string), tokenizer.bos_id
        if add_special_tokens is False or bos_id is None or ids[:1] == [bos_id]:
            return ids
        return [bos_id, *ids]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        # Without one, the last message is a task's `gen_prefix`, with which the answer begins.
        is_begun = not add_generation_prompt
        return self._model.tokenizer.render_chat(chat_history, add_generation_prompt, continue_final_message=is_begun)

    def chat_template(self, chat_template: bool | str = False) -> str:
        return "the tokenizer's own" if chat_template else ""

    def get_model_info(self) -> Mapping[str, Any]:
        """What the results say about the model, in addition to the harness's fields."""
        config, record = self._model.config, self._model.record
        sizes = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "data_parallel_size")
        return {
            "pretrained_checkpoint": config.model.pretrained_checkpoint,
            "checkpoint": config.checkpoint.load,
            "iteration": None if record is None else record.position["iteration"],
            "peft_method": None if record is None else config.peft.method,
            "bf16": config.model.bf16,
            **({} if self._model.engine is None else {"engine": self._model.engine.name}),
            **{name: getattr(config.parallel, name) for name in sizes},
            "sampling_seed": self._seed,
            "truncated_requests": dict(self.truncated),
        }

    def _loglikelihood_tokens(self, requests: Sequence[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        keyed = []
        for _, context, ids in requests:
            text = f"a continuation of {len(ids)} tokens does not fit the {self._scored_length} positions to score it."
            require(len(ids) <= self._scored_length, text)
            excess = max(len(context) + len(ids) - 1 - self._scored_length, 0)
            self.truncated["score"] += excess > 0
            continuation = Continuation(tuple(context[excess:]), tuple(ids))
            keyed.append((self._finished.key("score", *continuation), continuation))
        scores = self._answers("scoring", keyed, _is_score, score_all, self._batch_size)
        return [(total, greedy) for total, greedy in scores]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts, each token with as much context as the model has positions for."""
        windows = []
        for request in requests:
            ids = self.tok_encode(request.args[0])
            rolling = get_rolling_token_windows(ids, self.prefix_token_id, self._scored_length, context_len=1)
            windows.append([*map(make_disjoint_window, rolling)])  # whose continuations cover the text once
        scores = iter(self._loglikelihood_tokens([("", *window) for text in windows for window in text]))
        return [sum(total for total, _ in itertools.islice(scores, len(text))) for text in windows]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """An answer to each request; with sampling, equal requests have different random streams."""
        plans = [self._plan(request) for request in requests]
        texts = [""] * len(requests)
        for until, settings in dict.fromkeys(plans):
            chosen = [index for index, plan in enumerate(plans) if plan == (until, settings)]
            prompts = self._prompts([requests[index].args[0] for index in chosen], until, settings)
            answers = self._answers("answering", [*prompts], self._are_ids, generate_answers, until, settings)
            stop = StopTexts(self._model.tokenizer, until)
            for index, ids in zip(chosen, answers, strict=True):
                texts[index] = stop.cut(self._model.tokenizer.decode(ids))
        return texts

    def _plan(self, request: Instance) -> tuple[tuple[str, ...], GenerationSettings]:
        """(texts that end the answer, how it is generated), as the task's `generation_kwargs` say."""
        arguments: Any = request.args
        place = f"generation_kwargs of task {request.task_name}:"
        try:
            given: dict[str, Any] = {**normalize_gen_kwargs(arguments[1], MAX_NEW_TOKENS)}
            sampling = Sampling()
            if given["do_sample"]:
                top_p, top_k = float(given.get("top_p", 1)), int(given.get("top_k", 0))
                sampling = Sampling(float(given.get("temperature", 1)), top_p, top_k)
        except (ConfigurationError, TypeError, ValueError, OverflowError) as error:
            raise ConfigurationError(f"{place} {error}") from error
        unknown, known = ", ".join(sorted(given.keys() - SUPPORTED_SETTINGS)), ", ".join(sorted(SUPPORTED_SETTINGS))
        require(not unknown, f"{place} {unknown} is not supported; use {known}.")
        longest, until = given["max_gen_toks"], given["until"]
        require(all(isinstance(text, str) for text in until), f"{place} until must be a text, or a list of texts.")
        positions = f"{self.max_length}, the positions of the model for question and answer together"
        message = f"{place} max_gen_toks is {longest}; it must be above 0, and below {positions}."
        require(0 < longest < self.max_length, message)
        plan = GenerationSettings(frozenset(), longest, batch_size=self._batch_size, sampling=sampling, seed=self._seed)
        return tuple(until), plan

    def _prompts(self, texts: Sequence[str], until: Sequence[str], settings: GenerationSettings) -> Iterator[Request]:
        """Requests whose random streams are named by content, so that a resumed evaluation samples the same answers."""
        room = self.max_length - settings.max_new_tokens
        what = until, settings.max_new_tokens, settings.sampling.__dict__, settings.seed
        seen: Counter[tuple[int, ...]] = Counter()
        for text in texts:
            ids = self.tok_encode(text) or [self.prefix_token_id]
            self.truncated["generate"] += len(ids) > room
            ids = tuple(ids[-room:])
            name = f"{hashlib.sha256(json.dumps(ids).encode()).hexdigest()}/{seen[ids]}"
            seen[ids] += settings.sampling.temperature > 0
            yield self._finished.key("generate", ids, name, *what), (ids, name)

    def _are_ids(self, answer: Any) -> bool:
        largest = self._model.tokenizer.largest_id
        return isinstance(answer, list | tuple) and all(type(id_) is int and 0 <= id_ <= largest for id_ in answer)

    def _answers(
        self, title: str, requests: Sequence[Request], is_answer: Callable[[Any], bool], action: Action, *settings: Any
    ) -> list[Any]:
        """Answers in the order of the requests: known ones, and those of `action(model, requests, *settings)` to the
        others in portions, longest first."""
        finished, distinct = self._finished, dict(requests)
        finished.require_answers(distinct, is_answer)
        pending = [key for key in distinct if key not in finished]
        pending.sort(key=lambda key: (-len(distinct[key][0]), distinct[key][0]))
        size = self._batch_size * self._model.batches_at_once
        with progress_bar(title, len(distinct), done=len(distinct) - len(pending)) as advance:
            for start in range(0, len(pending), size):
                portion = pending[start : start + size]
                answers = self._dispatcher.call(action, [distinct[key] for key in portion], *settings)
                finished.add(dict(zip(portion, answers, strict=True)))
                advance(len(portion))
        return [finished[key] for key, _ in requests]
