"""What training will see of a dataset, before it: samples token by token, lengths, truncation, packing, steps.

Of a large dataset the figures are estimated from random records, each as likely as any other, with 95% intervals.
Imports no torch and no megatron-core.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple
from unicodedata import category

import numpy as np
from rich.console import Console
from rich.text import Text

from megatron_peft.config import DataConfig, not_obeyed, parse_blend
from megatron_peft.config.model import PreviewOptions
from megatron_peft.data.files import RecordFiles
from megatron_peft.data.records import Fit
from megatron_peft.data.samples import PackedOrder, SampleOrder, sample_from_ids
from megatron_peft.data.tokenizers import build_tokenizer

Z = 1.96  # of a 95% interval
_MOST_PACKED = 50_000


class Estimate(NamedTuple):
    """A figure and its 95% interval, which is the figure itself where all records were read."""

    value: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        value, low, high = (format(number, spec) for number in self)
        return value if low == high == value else f"{value} [{low} to {high}]"


class Preview:
    """A dataset of a run, opened, of which n records are measured.

    chosen: their numbers; whole: input positions of the record; kept: of the sample, 0 where it is skipped; trained,
    cut: tokens that the loss counts, and that it would count if nothing were cut off. int64 [n] each.
    """

    def __init__(
        self,
        config: DataConfig,
        options: PreviewOptions,
        pretrained_checkpoint: str | None = None,
        global_batch_size: int = 1,
        micro_batch_size: int = 1,
    ) -> None:
        """`options` have checked the flags; the sizes of batches are those of the run.

        Raises ConfigurationError for whatever is wrong with the files, the tokenizer, or a record that is read.
        """
        self.config, self.options = config, options
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.blend = parse_blend(config.train_data_path, "--train-data-path")
        self.tokenizer = build_tokenizer(config, pretrained_checkpoint)
        self.records = RecordFiles(self.blend.prefixes, "--train-data-path")
        self.fit = Fit.of(config, self.tokenizer)
        self.is_exact = options.exact or (not self.blend.weights and len(self.records) <= options.sampled_records)
        self.chosen, self.left_out = self._choose(), Counter[str]()
        rows = np.zeros((len(self.chosen), 4), dtype=np.int64)
        for row, index in zip(rows, self.chosen.tolist(), strict=True):
            ids, trained = self.fit.tokenized(self.records, index)
            whole, sample = sample_from_ids(ids, trained, len(ids)), self.fit.cut(ids, trained)
            num_trained = int(sample.loss_mask.sum())
            row[:] = len(whole), len(sample), num_trained, int(whole.loss_mask.sum()) - num_trained
            self.left_out.update(self.fit.left_out(self.records, index))
        self.whole, self.kept, self.trained, self.cut = rows.T

    def _choose(self) -> np.ndarray:
        """int64 [n]: all records, or random ones; in a weighted blend each source has its share of them."""
        if self.is_exact:
            return np.arange(len(self.records))
        random, n = np.random.default_rng(self.config.seed), self.options.sampled_records
        if not self.blend.weights:
            return random.choice(len(self.records), n, replace=False)
        weights, lengths = np.asarray(self.blend.weights), self.records.lengths
        counts = np.diff(np.round(np.cumsum([0, *weights]) / weights.sum() * n)).astype(int)
        starts = np.cumsum([0, *lengths])
        shares = [random.choice(length, k, replace=k > length) for length, k in zip(lengths, counts, strict=True)]
        return np.concatenate([start + share for start, share in zip(starts, shares, strict=False)])

    def share(self, which: np.ndarray) -> Estimate:
        """Share of the records, by Wilson's interval. which: bool [n]."""
        n, p = len(which), float(which.mean())
        if self.is_exact:
            return Estimate(p, p, p)
        center, scale = (p + Z**2 / (2 * n)) / (1 + Z**2 / n), Z / (1 + Z**2 / n)
        half = scale * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
        return Estimate(p, max(0.0, center - half), min(1.0, center + half))

    def ratio(self, part: np.ndarray, whole: np.ndarray) -> Estimate:
        """Sum of `part` by sum of `whole`, by the variance of a ratio of means. [n] each; a mean is a ratio to ones."""
        if not whole.any():
            return Estimate(0.0, 0.0, 0.0)
        value = float(part.sum() / whole.sum())
        unseen = 1 - len(part) / len(self.records) if not self.blend.weights else 1.0
        spread = (part - value * whole).std() / whole.mean() * math.sqrt(max(unseen, 0.0) / len(part))
        half = 0.0 if self.is_exact else Z * float(spread)
        return Estimate(value, value - half, value + half)

    @property
    def num_samples(self) -> Estimate:
        """Samples of an epoch: records that are not skipped."""
        return Estimate(*(share * len(self.records) for share in self.share(self.kept > 0)))

    def num_packs(self, packing: str) -> float:
        """Sequences of an epoch with --pack-sequences.

        The records that were read stand for all, each as often as the other: few leave the last packs open.
        """
        copies = 1 if self.is_exact else max(1, min(len(self.records), _MOST_PACKED) // len(self.kept))
        used = np.tile(self.kept[self.kept > 0], copies)
        if not len(used):
            return 0.0
        order = PackedOrder(SampleOrder(len(used), self.config.seed, True), used, self.config.seq_length, packing)
        return order.epoch_length(0) / (len(self.kept) * copies) * len(self.records)

    def fill(self, num_sequences: float) -> float:
        """Tokens of an epoch by the positions of so many sequences."""
        tokens = float(self.kept.mean()) * len(self.records)
        return tokens / (num_sequences * self.config.seq_length) if num_sequences else 0.0

    @property
    def padding(self) -> float:
        """Share of the positions of a padded microbatch that are padding."""
        size = self.micro_batch_size
        used = np.random.default_rng(self.config.seed).permutation(self.kept[self.kept > 0])
        rows = used[: len(used) // size * size].reshape(-1, size)
        return 1 - rows.sum() / (size * rows.max(axis=1).sum()) if len(rows) else 0.0

    def steps(self, samples: float) -> int:
        """Steps of an epoch of so many samples or packs."""
        return math.ceil(samples / self.global_batch_size - 1e-9)


# What is printed. Everything that color says, a mark says too: «trained», ‹cut off›.

_BARS, _BAR_WIDTH = 10, 32
_BETWEEN = "·"  # tokens
# Style of a token by its state, and the marks around a run of them.
_STYLES = {"trained": "bold green", "context": "", "cut": "red"}
_MARKS = {"trained": ("«", "»"), "cut": ("‹", "›"), "gap": ("", "")}


def show(preview: Preview, console: Console | None = None) -> None:
    """Print all of it, by default to standard output, with color as --color says."""
    if console is None:
        forced = {"auto": None, "always": True, "never": False}[preview.options.color]
        console = Console(force_terminal=forced, no_color=True if forced is False else None, highlight=False)
    for line in (*_sources(preview), "", *_lengths(preview), "", *_batches(preview), *_notes(preview)):
        console.print(Text(line), soft_wrap=True)
    for text in _samples(preview):
        console.print(text, soft_wrap=True)


def _sources(preview: Preview) -> Iterator[str]:
    records, weights = preview.records, preview.blend.weights or [None] * len(preview.blend.prefixes)
    for path, length, end, weight in zip(records.paths, records.lengths, records.ends, weights, strict=True):
        name = preview.fit.format_of(records, end - 1).name
        share = "" if weight is None else f", weight {weight:g}"
        yield f"{path}: {length:,} records, {name}{share}"
    if not preview.is_exact:
        n = len(preview.chosen)
        yield f"from {n:,} random records, in brackets 95% intervals; --exact reads all {len(records):,}"


def _lengths(preview: Preview) -> Iterator[str]:
    """Lengths of samples, in tokens, with what was cut off and skipped."""
    config, whole, kept, trained, cut = preview.config, preview.whole, preview.kept, preview.trained, preview.cut
    used = kept[kept > 0]
    if len(used):
        middle, most, nearly = np.percentile(used, (50, 90, 99))
        yield (
            f"positions of a sample (its tokens but one): mean {preview.ratio(used, np.ones_like(used)):,.1f}, median "
            f"{middle:,.0f}, 90% {most:,.0f}, 99% {nearly:,.0f}, longest {used.max():,}"
        )
        width = max(1, math.ceil(used.max() / _BARS))
        counts = np.bincount((used - 1) // width)
        for i, count in enumerate(counts):
            bar = "#" * round(count / counts.max() * _BAR_WIDTH)
            yield f"  {i * width + 1:>6} - {(i + 1) * width:>6}  {bar:<{_BAR_WIDTH}} {count / len(used):6.1%}"
    yield f"trained: {preview.ratio(trained, kept):.1%} of the tokens"
    longer, skipped = whole > config.seq_length, kept == 0
    if (longer & ~skipped).any() or not preview.is_exact:
        lost = preview.ratio(np.where(skipped, 0, cut), trained + cut)
        yield (
            f"cut at --seq-length {config.seq_length}: {preview.share(longer & ~skipped):.1%} of the samples, "
            f"{lost:.1%} of the tokens to train"
        )
    if longer.any():
        yield f"longest record: {whole.max():,} positions, above --seq-length {config.seq_length}"
    why = ""
    if config.overlong == "error" and (longer & skipped).any():
        why = ", which --overlong error ends a run for"
    elif skipped.any():
        prompt = "their prompt alone fills --seq-length" if config.overlong == "truncate" else "longer"
        why = f" (first: {_first_place(preview, skipped)}); {int((longer & skipped).sum())}: {prompt}"
    if skipped.any() or not preview.is_exact:
        yield f"skipped: {preview.share(skipped):.1%} of the records{why}"


def _first_place(preview: Preview, which: np.ndarray) -> str:
    return preview.records.place(int(preview.chosen[which].min()))


def _batches(preview: Preview) -> Iterator[str]:
    config, size = preview.config, preview.micro_batch_size
    packs = {name: preview.num_packs(name) for name in ("first-fit-decreasing", "next-fit")}
    filled = ", ".join(f"{packing} {preview.fill(num_packs):.1%}" for packing, num_packs in packs.items())
    alone = preview.fill(preview.num_samples.value)
    yield f"fill of --seq-length {config.seq_length}: one sample {alone:.1%}; packed: {filled}"
    if size > 1 and not config.pack_sequences:
        yield f"padding in microbatches of {size}: {preview.padding:.1%} of the positions"
    if preview.blend.weights:
        yield "a weighted blend has no epoch: --train-iters or --train-samples set its length"
        return
    plain, packed = Estimate(*map(preview.steps, preview.num_samples)), preview.steps(packs[config.packing])
    batch = preview.global_batch_size
    yield f"an epoch: {plain:,.0f} steps of --global-batch-size {batch}; with --pack-sequences {packed:,}"


def _notes(preview: Preview) -> Iterator[str]:
    empty = preview.trained + preview.cut <= 1  # there is nothing to learn from these but that a text ends
    if empty.any():
        yield (
            f"WARNING: {preview.share(empty):.1%} of the records train no token but the end of a text: their "
            f"completions are empty (first: {_first_place(preview, empty)})"
        )
    if preview.left_out:
        yield f"fields that nothing reads: {', '.join(map(not_obeyed, preview.left_out))}"


def _samples(preview: Preview) -> Iterator[Text]:
    """Records spread over the measured ones, so that each source has some."""
    count = min(preview.options.show_samples, len(preview.chosen))
    random = np.random.default_rng(preview.config.seed)
    parts = np.array_split(np.sort(preview.chosen), max(count, 1))
    if count:
        yield Text(f"\nmarks: {_BETWEEN} between tokens, «trained», ‹cut off›", style="dim")
    for number, part in enumerate(parts[:count], 1):
        index = int(random.choice(part))
        ids, trained = preview.fit.tokenized(preview.records, index)
        states = _states(ids, trained, preview.fit)
        cut = f", {states.count('cut'):,} cut off" if "cut" in states else ""
        title = f"\nsample {number} of {count}: {preview.records.place(index)}"
        yield Text(f"{title}; {len(ids):,} tokens, {states.count('trained'):,} trained{cut}", style="bold")
        yield _colored(preview.tokenizer.texts(ids), states, preview.options.max_tokens)


def _states(ids: Sequence[int], trained: Sequence[bool], fit: Fit) -> list[str]:
    """The state of each token: trained, context, cut, or unread (behind the last that is trained)."""
    whole, kept = len(sample_from_ids(ids, trained, len(ids))), len(fit.cut(ids, trained))
    last = kept + 1 if kept else 0  # a sample of n positions predicts one token more than it reads
    states = ["trained" if flag and i else "context" for i, flag in enumerate(trained[:last])]
    states += ["cut" if whole > kept else "unread"] * (whole + 1 - last)
    return (states + ["unread"] * len(ids))[: len(ids)]


def _colored(texts: Sequence[str], states: Sequence[str], most: int) -> Text:
    """Tokens with a mark between them, and marks around those that are trained or cut; the middle of many left out."""
    tokens = [(visible(text), state) for text, state in zip(texts, states, strict=True)]
    if len(tokens) > most:
        gap = (f" ... {len(tokens) - most:,} tokens ... ", "gap")
        tokens = [*tokens[: most - most // 2], gap, *tokens[len(tokens) - most // 2 :]]
    colored = Text()
    for state, run in groupby(tokens, key=lambda token: token[1]):
        before, after = _MARKS.get(state, ("", _BETWEEN))
        colored.append(before)
        colored.append(_BETWEEN.join(text for text, _ in run if text), style=_STYLES.get(state, "dim"))
        colored.append(after)
    return colored[:-1] if colored.plain.endswith(_BETWEEN) else colored


def visible(text: str) -> str:
    """Text of which a terminal does nothing but show it: control characters are escaped; a line break is \\n, and
    breaks the line."""
    escaped = "".join(c if category(c)[0] != "C" or c == "\n" else c.encode("unicode_escape").decode() for c in text)
    return escaped.replace("\n", "\\n\n")
