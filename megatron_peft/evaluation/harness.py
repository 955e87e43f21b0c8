"""Our model as a model of the language model evaluation harness: log-likelihoods and answers.

Tokens, truncation and ends follow the harness's own backend for Hugging Face models, so that both give the same scores:
a text that is too long loses its beginning, and an empty context stands for the beginning-of-sequence token.
"""

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from megatron_peft.config import ConfigurationError, require
from megatron_peft.config.untrusted import parse_json
from megatron_peft.evaluation.answers import request_bar
from megatron_peft.evaluation.dispatch import AnswerPlan, Crew, NamedPrompt
from megatron_peft.evaluation.generation import GREEDY, Sampling, StopTexts
from megatron_peft.evaluation.model import AskedModel, describe
from megatron_peft.evaluation.scoring import Continuation

# Requests that are answered already, in a file of JSON lines, so that a killed evaluation goes on where it was.
#
#     {"key": "5f1c...", "answer": [-12.25, true]}
#
# A key is a digest of everything that the answer depends on, the model's fingerprint included: an answer of another
# checkpoint is never taken for one of this. A line is written whole; the last one, torn by a kill, is left out.


class FinishedRequests:
    """The answers by key.

    Args:
        path: of the file; made with the first answer.
        model: fingerprint of the model.
    """

    def __init__(self, path: Path, model: str) -> None:
        self._path = path
        self._model = model
        self._answers = dict(_read(path))

    def key(self, kind: str, *what: Any) -> str:
        """Of a request: its kind, and whatever else its answer depends on (as JSON)."""
        return hashlib.sha256(json.dumps([self._model, kind, *what]).encode()).hexdigest()[:32]

    def __contains__(self, key: str) -> bool:
        return key in self._answers

    def __getitem__(self, key: str) -> Any:
        return self._answers[key]

    def add(self, answers: Mapping[str, Any]) -> None:
        """Remember answers, on disk too."""
        self._answers |= answers
        lines = [json.dumps({"key": key, "answer": answer}) + "\n" for key, answer in answers.items()]
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with open(self._path, "a", encoding="utf-8") as file:
            file.write("".join(lines))


def _read(path: Path) -> Iterator[tuple[str, Any]]:
    if not path.exists():
        return
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:  # torn: begin the next line afresh
        path.write_text(whole, encoding="utf-8")
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            entry = parse_json(line, f"{path}:{number}")
            yield entry["key"], entry["answer"]
        except (ConfigurationError, KeyError, TypeError) as error:
            raise ConfigurationError(
                f"{path}:{number} is no answered request ({error!r}): remove the line, and it is asked again."
            ) from error


MAX_NEW_TOKENS = 256  # the harness's default
SERVED_SETTINGS = {"until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k"}


@dataclass(frozen=True)
class _Request:
    """One thing to ask: the key of its answer, what is asked, and what sorts it."""

    key: str
    what: Any
    order: Any


class HarnessModel(TemplateLM):
    """Runs on the first rank; the others serve in the crew.

    Args:
        model: what is asked.
        crew: of `dispatch.make_crew`.
        finished: answers that are known; new ones are added as they come.
        batch_size: requests in a forward of a replica.
        seed: of answers that are drawn.
    """

    def __init__(self, model: AskedModel, crew: Crew, finished: FinishedRequests, batch_size: int, seed: int) -> None:
        super().__init__()
        self._model = model
        self._crew = crew
        self._finished = finished
        self._portion = batch_size * model.config.parallel.data_parallel_size
        self._seed = seed
        self.truncated: Counter[str] = Counter()

    @property
    def eot_token_id(self) -> int:
        return self._model.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self._model.tokenizer.prefix_id

    @property
    def max_length(self) -> int:
        """Tokens that go into the model."""
        return self._model.max_length

    @property
    def tokenizer_name(self) -> str:
        return json.dumps(self._model.tokenizer.unique_identifiers)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; the beginning-of-sequence token once, if the tokenizer puts it there by itself."""
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
        """What the results say about the model, beside the harness's own notes."""
        return {**describe(self._model), "sampling_seed": self._seed, "truncated_requests": dict(self.truncated)}

    def _loglikelihood_tokens(self, requests: Sequence[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        items = [self._fitted(context, ids) for _, context, ids in requests]
        asked = [
            _Request(self._finished.key("score", one.context, one.ids), one, (-len(one.context), one.context))
            for one in items
        ]
        return [(total, greedy) for total, greedy in self._answers("scoring", asked, self._score)]

    def _score(self, continuations: Sequence[Continuation]) -> list[tuple[float, bool]]:
        return [(one.log_likelihood, one.is_greedy) for one in self._crew.order("score", continuations)]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, each token with as much before it as the model holds."""
        windows = [list(self._windows(request.args[0])) for request in requests]
        scores = iter(self._loglikelihood_tokens([("", *window) for text in windows for window in text]))
        return [sum(total for total, _ in itertools.islice(scores, len(text))) for text in windows]

    def _windows(self, text: str) -> Iterator[tuple[list[int], list[int]]]:
        """(context, what is predicted), which together cover the text once."""
        rolling = get_rolling_token_windows(
            token_list=self.tok_encode(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.max_length,
            context_len=1,
        )
        return map(make_disjoint_window, rolling)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """An answer to each request; equal requests that are drawn have draws of their own."""
        plans = [self._plan(request) for request in requests]
        texts = [""] * len(requests)
        for plan in dict.fromkeys(plans):
            chosen = [index for index, one in enumerate(plans) if one == plan]
            prompts = [self._prompt(requests[index].args[0], plan) for index in chosen]
            stop = StopTexts(self._model.tokenizer, plan.until)
            for index, ids in zip(
                chosen, self._answers("answering", self._asked(prompts, plan), self._ask(plan)), strict=True
            ):
                texts[index] = stop.cut(self._model.tokenizer.decode(ids))
        return texts

    def _ask(self, plan: AnswerPlan) -> Callable[[Sequence[NamedPrompt]], list[list[int]]]:
        return lambda prompts: self._crew.order("generate", prompts, plan)

    def _asked(self, prompts: Sequence[tuple[int, ...]], plan: AnswerPlan) -> Iterator[_Request]:
        """Named by what is asked, not by their place: what is left of a killed evaluation draws the same."""
        seen: Counter[tuple[int, ...]] = Counter()
        for ids in prompts:
            name = f"{hashlib.sha256(json.dumps(ids).encode()).hexdigest()}/{seen[ids]}"
            seen[ids] += plan.sampling != GREEDY
            what = plan.until, plan.max_new_tokens, plan.sampling.__dict__, plan.seed
            yield _Request(self._finished.key("generate", ids, name, *what), NamedPrompt(ids, name), (-len(ids), ids))

    def _answers(self, title: str, requests: Iterator[_Request] | Sequence[_Request], ask: Callable) -> list[Any]:
        """Answers in the order of the requests: known ones, and the others portion by portion, longest first."""
        requests = list(requests)
        unknown = {one.key: one for one in requests if one.key not in self._finished}
        pending = sorted(unknown.values(), key=lambda one: one.order)
        num_distinct = len({one.key for one in requests})
        with request_bar(title, num_distinct, done=num_distinct - len(pending)) as advance:
            for start in range(0, len(pending), self._portion):
                portion = pending[start : start + self._portion]
                found = ask([one.what for one in portion])
                self._finished.add({one.key: answer for one, answer in zip(portion, found, strict=True)})
                advance(len(portion))
        return [self._finished[one.key] for one in requests]

    def _fitted(self, context: Sequence[int], ids: Sequence[int]) -> Continuation:
        """Without the beginning that the model has no room for. The last token does not go into it."""
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
        given: dict[str, Any] = {**normalize_gen_kwargs(arguments[1], MAX_NEW_TOKENS)}
        unknown = sorted(given.keys() - SERVED_SETTINGS)
        require(
            not unknown,
            f"generation_kwargs of task {request.task_name} hold {', '.join(unknown)}, which are not served: "
            f"there are {', '.join(sorted(SERVED_SETTINGS))}.",
        )
        longest = given["max_gen_toks"]
        require(
            longest < self.max_length,
            f"task {request.task_name} asks for answers of {longest} tokens, but the model has {self.max_length} "
            "positions for question and answer together: lower its max_gen_toks.",
        )
        return AnswerPlan(tuple(given["until"]), longest, self._sampling(given, request), self._seed)

    def _sampling(self, given: Mapping[str, Any], request: Instance) -> Sampling:
        if not given["do_sample"]:
            return GREEDY
        try:
            return Sampling(
                float(given.get("temperature", 1.0)), float(given.get("top_p", 1.0)), int(given.get("top_k", 0))
            )
        except ConfigurationError as error:
            raise ConfigurationError(f"generation_kwargs of task {request.task_name}: {error}") from error


register_model("megatron-peft")(HarnessModel)
