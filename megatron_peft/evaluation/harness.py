"""Our model as a model of lm-evaluation-harness: log-likelihoods and answers.

Tokens, truncation and end tokens follow the harness's own `hf` backend, so both give the same scores: a text that is
too long loses its beginning, and an empty context becomes the beginning-of-sequence token.
"""

import fcntl
import hashlib
import itertools
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from megatron_peft.checkpoint.folders import GRACE_SECONDS
from megatron_peft.config import ConfigurationError, require
from megatron_peft.config.evaluation import Sampling
from megatron_peft.config.untrusted import parse_json, require_regular
from megatron_peft.evaluation.answers import request_bar
from megatron_peft.evaluation.dispatch import AnswerPlan, NamedPrompt, RankDispatcher
from megatron_peft.evaluation.generation import GREEDY, StopTexts
from megatron_peft.evaluation.model import InferenceModel, describe
from megatron_peft.evaluation.scoring import Continuation


class FinishedRequests:
    """Answers by key, in a file of JSON lines, so that a killed evaluation resumes where it stopped.

        {"key": "5f1c...", "answer": [-12.25, true]}

    Args:
        path: of the file, which is locked as long as this object lives.
        model: fingerprint of the model, part of every key.

    Raises:
        ConfigurationError: a line of the file is not an answered request; another evaluation writes to it.
    """

    def __init__(self, path: Path, model: str) -> None:
        self._path = path
        self.model = model
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            require_regular(path)
        # Opened once: a lock of `fcntl`, which works on network file systems, ends with the first close of its file.
        self._file = open(path, "a+b")  # noqa: SIM115
        self._lock()
        self._answers = dict(self._read())

    def key(self, kind: str, *what: Any) -> str:
        """A digest of the model, the kind of the request, and `what`, all else that its answer depends on (JSON)."""
        return hashlib.sha256(json.dumps([self.model, kind, *what]).encode()).hexdigest()[:32]

    def __contains__(self, key: str) -> bool:
        return key in self._answers

    def __getitem__(self, key: str) -> Any:
        return self._answers[key]

    def add(self, answers: Mapping[str, Any]) -> None:
        """Keep answers, in the file too."""
        self._answers |= answers
        lines = [json.dumps({"key": key, "answer": answer}) + "\n" for key, answer in answers.items()]
        try:
            self._file.write("".join(lines).encode())
            self._file.flush()
        except OSError as error:
            raise ConfigurationError(
                f"{self._path} cannot be written ({error.strerror}): free disk space, and the same command goes on."
            ) from error

    def require_answers(self, keys: Iterable[str], is_answer: Callable[[Any], bool]) -> None:
        """Raises ConfigurationError for one of the known answers that is none to such a request."""
        wrong = [key for key in keys if key in self and not is_answer(self[key])]
        require(
            not wrong,
            f"{self._path} has no such answer to the request {''.join(wrong[:1])} as the model gives: remove its line "
            "to repeat the request.",
        )

    def _lock(self) -> None:
        deadline = time.monotonic() + GRACE_SECONDS
        while True:
            try:
                return fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError) as error:
                if time.monotonic() >= deadline:
                    raise ConfigurationError(
                        f"{self._path} is in use by another evaluation: wait for its end, or give another --output."
                    ) from error
                time.sleep(0.1)
            except OSError:  # a file system without locks
                return

    def _read(self) -> Iterator[tuple[str, Any]]:
        self._file.seek(0)
        content = self._file.read()
        whole = content[: content.rfind(b"\n") + 1]
        self._file.truncate(len(whole))  # without the line that a kill cut
        for number, line in enumerate(whole.splitlines(), 1):
            place = f"{self._path}:{number}"
            try:
                entry = parse_json(line, place)
                yield entry["key"] + "", entry["answer"]
            except (ConfigurationError, KeyError, TypeError) as error:
                raise ConfigurationError(
                    f"{place} is not an answered request ({error!r}): remove the line to repeat the request."
                ) from error


def _is_score(answer: Any) -> bool:
    """A log-likelihood, and whether it is of the likeliest continuation."""
    is_pair = isinstance(answer, list | tuple) and len(answer) == 2
    return is_pair and type(answer[0]) in (int, float) and type(answer[1]) is bool


MAX_NEW_TOKENS = 256  # the harness's default
MOST_STOP_TEXTS = 1000  # each is looked for after each token
SUPPORTED_SETTINGS = {"until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k"}


@dataclass(frozen=True)
class _Request:
    """A continuation or a prompt, the key of its answer, and its sort key."""

    key: str
    content: Any
    sort_key: Any


class HarnessModel(TemplateLM):
    """The harness's model. It runs on rank 0, and its forwards on all ranks.

    Args:
        dispatcher: of `dispatch.make_dispatcher`.
        finished: known answers; new ones are added portion by portion.
        batch_size: requests per forward pass of a replica.
        seed: of sampling.
    """

    def __init__(
        self, model: InferenceModel, dispatcher: RankDispatcher, finished: FinishedRequests, batch_size: int, seed: int
    ) -> None:
        super().__init__()
        self._model = model
        self._dispatcher = dispatcher
        self._finished = finished
        self._portion = batch_size * model.config.parallel.data_parallel_size
        self._seed = seed
        self.truncated: Counter[str] = Counter()

    @property
    def eot_token_id(self) -> int:
        """Id of the token that ends a text."""
        return self._model.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """Id of the token before a text without context."""
        return self._model.tokenizer.prefix_id

    @property
    def max_length(self) -> int:
        """Positions of the model."""
        return self._model.max_length

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
        return self._model.tokenizer.render_chat(chat_history, add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str:
        return "the tokenizer's own" if chat_template else ""

    def get_model_info(self) -> Mapping[str, Any]:
        """What the results say about the model, in addition to the harness's own fields."""
        return {**describe(self._model), "sampling_seed": self._seed, "truncated_requests": dict(self.truncated)}

    def _loglikelihood_tokens(self, requests: Sequence[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        def score(continuations: Sequence[Continuation]) -> list[tuple[float, bool]]:
            return [(one.log_likelihood, one.is_greedy) for one in self._dispatcher.call("score", continuations)]

        continuations = [self._truncated(context, ids) for _, context, ids in requests]
        keyed = [
            _Request(self._finished.key("score", one.context, one.ids), one, (-len(one.context), one.context))
            for one in continuations
        ]
        return [(total, greedy) for total, greedy in self._answers("scoring", keyed, score, _is_score)]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts, each token with as much context as the model has positions for."""
        windows = [list(self._windows(request.args[0])) for request in requests]
        scores = iter(self._loglikelihood_tokens([("", *window) for text in windows for window in text]))
        return [sum(total for total, _ in itertools.islice(scores, len(text))) for text in windows]

    def _windows(self, text: str) -> Iterator[tuple[list[int], list[int]]]:
        """(context, continuation) pairs whose continuations cover the text once."""
        rolling = get_rolling_token_windows(
            token_list=self.tok_encode(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.max_length,
            context_len=1,
        )
        return map(make_disjoint_window, rolling)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """An answer to each request; with sampling, equal requests have different random streams."""
        plans = [self._plan(request) for request in requests]
        texts = [""] * len(requests)
        for plan in dict.fromkeys(plans):
            chosen = [index for index, one in enumerate(plans) if one == plan]
            prompts = self._named([self._prompt(requests[index].args[0], plan) for index in chosen], plan)
            answer = partial(self._generated, plan)
            found = self._answers("answering", prompts, answer, self._are_ids)
            stop = StopTexts(self._model.tokenizer, plan.until)
            for index, ids in zip(chosen, found, strict=True):
                texts[index] = stop.cut(self._model.tokenizer.decode(ids))
        return texts

    def _generated(self, plan: AnswerPlan, prompts: Sequence[NamedPrompt]) -> Any:
        return self._dispatcher.call("generate", prompts, plan)

    def _are_ids(self, answer: Any) -> bool:
        largest = self._model.tokenizer.largest_id
        return isinstance(answer, list | tuple) and all(type(one) is int and 0 <= one <= largest for one in answer)

    def _named(self, prompts: Sequence[tuple[int, ...]], plan: AnswerPlan) -> Iterator[_Request]:
        """Requests whose random streams are named by content, so that a resumed evaluation samples the same answers."""
        seen: Counter[tuple[int, ...]] = Counter()
        for ids in prompts:
            name = f"{hashlib.sha256(json.dumps(ids).encode()).hexdigest()}/{seen[ids]}"
            seen[ids] += plan.sampling != GREEDY
            what = plan.until, plan.max_new_tokens, plan.sampling.__dict__, plan.seed
            yield _Request(self._finished.key("generate", ids, name, *what), NamedPrompt(ids, name), (-len(ids), ids))

    def _answers(
        self, title: str, requests: Iterable[_Request], compute: Callable, is_answer: Callable[[Any], bool]
    ) -> list[Any]:
        """Answers in the order of the requests: known ones, and `compute` of the others in portions, longest first."""
        requests = list(requests)
        self._finished.require_answers([one.key for one in requests], is_answer)
        unknown = {one.key: one for one in requests if one.key not in self._finished}
        pending = sorted(unknown.values(), key=lambda one: one.sort_key)
        num_distinct = len({one.key for one in requests})
        with request_bar(title, num_distinct, done=num_distinct - len(pending)) as advance:
            for start in range(0, len(pending), self._portion):
                portion = pending[start : start + self._portion]
                found = compute([one.content for one in portion])
                self._finished.add({one.key: answer for one, answer in zip(portion, found, strict=True)})
                advance(len(portion))
        return [self._finished[one.key] for one in requests]

    def _truncated(self, context: Sequence[int], ids: Sequence[int]) -> Continuation:
        """Drop the beginning of a context that is too long. The last token needs no position."""
        require(
            len(ids) <= self.max_length,
            f"a continuation of {len(ids)} tokens does not fit the {self.max_length} positions of the model.",
        )
        excess = max(len(context) + len(ids) - 1 - self.max_length, 0)
        self.truncated["score"] += excess > 0
        return Continuation(tuple(context[excess:]), tuple(ids))

    def _prompt(self, text: str, plan: AnswerPlan) -> tuple[int, ...]:
        ids = self.tok_encode(text) or [self.prefix_token_id]
        room = self.max_length - plan.max_new_tokens
        self.truncated["generate"] += len(ids) > room
        return tuple(ids[-room:])

    def _plan(self, request: Instance) -> AnswerPlan:
        arguments: Any = request.args
        try:
            given: dict[str, Any] = {**normalize_gen_kwargs(arguments[1], MAX_NEW_TOKENS)}
        except (TypeError, ValueError, OverflowError) as error:
            raise ConfigurationError(f"generation_kwargs of task {request.task_name}: {error}.") from error
        unknown = sorted(given.keys() - SUPPORTED_SETTINGS)
        require(
            not unknown,
            f"generation_kwargs of task {request.task_name}: {', '.join(unknown)} is not supported; "
            f"use {', '.join(sorted(SUPPORTED_SETTINGS))}.",
        )
        longest, until = given["max_gen_toks"], given["until"]
        require(
            all(isinstance(text, str) for text in until) and len(until) <= MOST_STOP_TEXTS,
            f"generation_kwargs of task {request.task_name}: until must be a text, or a list of at most "
            f"{MOST_STOP_TEXTS} texts.",
        )
        require(longest > 0, f"generation_kwargs of task {request.task_name}: max_gen_toks must be above 0.")
        require(
            longest < self.max_length,
            f"task {request.task_name} generates answers of {longest} tokens, but the model has {self.max_length} "
            "positions for question and answer together: lower the task's max_gen_toks.",
        )
        return AnswerPlan(tuple(until), longest, self._sampling(given, request), self._seed)

    def _sampling(self, given: Mapping[str, Any], request: Instance) -> Sampling:
        if not given["do_sample"]:
            return GREEDY
        try:
            return Sampling(
                float(given.get("temperature", 1.0)), float(given.get("top_p", 1.0)), int(given.get("top_k", 0))
            )
        except (ConfigurationError, TypeError, ValueError, OverflowError) as error:
            raise ConfigurationError(f"generation_kwargs of task {request.task_name}: {error}") from error
