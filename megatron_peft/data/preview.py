"""What training will see of a dataset, before it: samples token by token, lengths, truncation, packing, steps.

Of a large dataset the figures are estimated from random records, each as likely as any other, with 95% intervals.
Imports no torch and no megatron-core.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import NamedTuple
from unicodedata import category

import numpy as np
from rich.console import Console
from rich.text import Text

from megatron_peft.config import Blend, DataConfig, kind_of_source, not_obeyed, parse_blend
from megatron_peft.config.model import PreviewOptions
from megatron_peft.data.files import RecordFiles
from megatron_peft.data.formats import ColumnNames
from megatron_peft.data.records import Fit
from megatron_peft.data.samples import PackedOrder, SampleOrder, sample_from_ids
from megatron_peft.data.tokenizers import Tokenizer, build_tokenizer

Z = 1.96  # of a 95% interval


class Estimate(NamedTuple):
    """A figure and its 95% interval, which is the figure itself where all records were read."""

    value: float
    low: float
    high: float

    def times(self, factor: float) -> "Estimate":
        return Estimate(*(one * factor for one in self))


@dataclass(frozen=True)
class Measured:
    """Of n records, int64 [n] each.

    records: their numbers; whole: input positions of the record; kept: of the sample, 0 where it is skipped;
    trained, cut: tokens that the loss counts, and that it would count if nothing were cut off.
    """

    records: np.ndarray
    whole: np.ndarray
    kept: np.ndarray
    trained: np.ndarray
    cut: np.ndarray
    left_out: Counter[str]

    @property
    def empty(self) -> np.ndarray:
        """bool [n]: there is nothing to learn from the record but that a text ends."""
        return self.trained + self.cut <= 1


@dataclass(frozen=True)
class Batches:
    """Of the run: samples a step, samples of a microbatch."""

    global_batch_size: int = 1
    micro_batch_size: int = 1


class Preview:
    """A dataset of a run, opened and measured.

    Raises ConfigurationError for whatever is wrong with the files, the tokenizer, or a record that is read. `options`
    have checked the flags.
    """

    def __init__(
        self, config: DataConfig, batches: Batches, options: PreviewOptions, pretrained_checkpoint: str | None = None
    ) -> None:
        self.config, self.batches, self.options = config, batches, options
        self.blend = parse_blend(config.train_data_path, "--train-data-path")
        self.tokenizer, self.records = self._open(pretrained_checkpoint)
        self.fit = Fit(self.tokenizer, config.seq_length, config.overlong, ColumnNames.of(config))
        self.is_exact = options.exact or (not self.blend.weights and len(self.records) <= options.sampled_records)
        self.measured = _measure(self.records, self.fit, self._chosen())

    def _open(self, pretrained_checkpoint: str | None) -> tuple[Tokenizer, RecordFiles]:
        open_records = partial(RecordFiles, self.blend.prefixes, "--train-data-path", with_digest=False)
        if any(kind_of_source(path) != "json" for path in self.blend.prefixes):
            return build_tokenizer(self.config, pretrained_checkpoint), open_records()
        with ThreadPoolExecutor(1) as pool:  # the files are searched for lines while transformers is imported
            records = pool.submit(open_records)
            return build_tokenizer(self.config, pretrained_checkpoint), records.result()

    def _chosen(self) -> np.ndarray:
        """int64 [n]: all records, or random ones; in a weighted blend each source has its share of them."""
        if self.is_exact:
            return np.arange(len(self.records))
        random = np.random.default_rng(self.config.seed)
        if not self.blend.weights:
            return random.choice(len(self.records), self.options.sampled_records, replace=False)
        return np.concatenate([*_shares(self.blend, self.records.lengths, self.options.sampled_records, random)])

    @property
    def num_records(self) -> int:
        return len(self.records)

    def share(self, which: np.ndarray) -> Estimate:
        """Of the records, by Wilson's interval. which: bool [n]."""
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
        unseen = 1 - len(part) / self.num_records if not self.blend.weights else 1.0
        spread = (part - value * whole).std() / whole.mean() * math.sqrt(max(unseen, 0.0) / len(part))
        half = 0.0 if self.is_exact else Z * float(spread)
        return Estimate(value, value - half, value + half)

    @property
    def length(self) -> Estimate:
        """Mean input positions of a sample."""
        used = self.measured.kept[self.measured.kept > 0]
        return self.ratio(used, np.ones_like(used))

    @property
    def num_samples(self) -> Estimate:
        """Samples of an epoch: records that are not skipped."""
        return self.share(self.measured.kept > 0).times(self.num_records)

    @property
    def packs(self) -> Estimate:
        """Sequences of an epoch with --pack-sequences. Its interval is from packing other draws of the same records."""
        kept, random = self.measured.kept, np.random.default_rng(self.config.seed)
        value = self._packs_per_record(self.config.packing)
        draws = 0 if self.is_exact else _DRAWS
        others = [_num_packs(random.choice(kept, len(kept)), self.config, self.config.packing) for _ in range(draws)]
        half = Z * float(np.std(others, ddof=1)) / len(kept) if others else 0.0
        return Estimate(value, max(0.0, value - half), value + half).times(self.num_records)

    def fill(self, packing: str | None = None) -> float:
        """Tokens of a sequence, of --seq-length: with `packing`, or with one sample in each."""
        kept = self.measured.kept
        sequences = self._packs_per_record(packing) if packing else float((kept > 0).mean())
        return float(kept.mean() / (sequences * self.config.seq_length)) if sequences else 0.0

    def _packs_per_record(self, packing: str) -> float:
        """The records that were read stand for all, each as often as the other: few leave the last packs open."""
        kept = self.measured.kept
        copies = 1 if self.is_exact else max(1, min(self.num_records, _MOST_PACKED) // len(kept))
        return _num_packs(np.tile(kept, copies), self.config, packing) / (len(kept) * copies)

    @property
    def padding(self) -> float:
        """Share of the positions of a padded microbatch that are padding."""
        size = self.batches.micro_batch_size
        used = self.measured.kept[self.measured.kept > 0]
        used = np.random.default_rng(self.config.seed).permutation(used)
        rows = used[: len(used) // size * size].reshape(-1, size)
        return 1 - rows.sum() / (size * rows.max(axis=1).sum()) if len(rows) else 0.0

    def steps(self, samples: Estimate) -> Estimate:
        """Of an epoch."""
        return Estimate(*(math.ceil(one / self.batches.global_batch_size - 1e-9) for one in samples))


_DRAWS = 25
_MOST_PACKED = 50_000


def _shares(blend: Blend, lengths: Sequence[int], n: int, random: np.random.Generator) -> Iterator[np.ndarray]:
    weights = np.asarray(blend.weights)
    counts = np.diff(np.round(np.cumsum([0, *weights]) / weights.sum() * n)).astype(int)
    start = 0
    for length, count in zip(lengths, counts, strict=True):
        yield start + random.choice(length, count, replace=count > length)
        start += length


def _measure(records: RecordFiles, fit: Fit, chosen: np.ndarray) -> Measured:
    rows, left_out = np.zeros((len(chosen), 4), dtype=np.int64), Counter[str]()
    for row, index in zip(rows, chosen, strict=True):
        ids, trained = fit.tokenized(records, int(index))
        whole = sample_from_ids(ids, trained, len(ids))
        sample = fit.cut(ids, trained)
        num_trained = int(sample.loss_mask.sum())
        row[:] = len(whole), len(sample), num_trained, int(whole.loss_mask.sum()) - num_trained
        left_out.update(fit.left_out(records, int(index)))
    whole, kept, trained, cut = rows.T
    return Measured(chosen, whole, kept, trained, cut, left_out)


def _num_packs(kept: np.ndarray, config: DataConfig, packing: str) -> int:
    used = kept[kept > 0]
    if not len(used):
        return 0
    order = SampleOrder(len(used), config.seed, shuffle=True)
    return PackedOrder(order, used, config.seq_length, packing).epoch_length(0)


# What is printed. Everything that color says, a mark says too: «trained», ‹cut off›.

_BARS, _BAR_WIDTH = 10, 32
_STYLES = {"trained": "bold green", "context": "", "cut": "red", "unread": "dim"}
_BETWEEN = "·"  # tokens
_MARKS = {"trained": ("«", "»"), "cut": ("‹", "›"), "gap": ("", "")}


def show(preview: Preview, console: Console) -> None:
    """Print all of it."""
    for line in (*_head(preview), "", *_lengths(preview), "", *_batches(preview), *_notes(preview)):
        console.print(Text(line), soft_wrap=True)
    for text in _samples(preview):
        console.print(text, soft_wrap=True)


def console_of(options: PreviewOptions) -> Console:
    """Standard output, with color as --color says."""
    forced = {"auto": None, "always": True, "never": False}[options.color]
    return Console(force_terminal=forced, no_color=True if forced is False else None, highlight=False)


def _head(preview: Preview) -> Iterator[str]:
    records, weights = preview.records, preview.blend.weights or [None] * len(preview.blend.prefixes)
    start = 0
    for path, length, weight in zip(records.paths, records.lengths, weights, strict=True):
        name = preview.fit.format_of(records, start).name
        share = "" if weight is None else f", weight {weight:g}"
        yield f"{path}: {length:,} records, {name}{share}"
        start += length
    if not preview.is_exact:
        n = len(preview.measured.records)
        yield f"from {n:,} random records, in brackets 95% intervals; --exact reads all {len(records):,}"


def _lengths(preview: Preview) -> Iterator[str]:
    """Of samples, in tokens, with what was cut off and skipped."""
    found, limit = preview.measured, preview.config.seq_length
    used = found.kept[found.kept > 0]
    if len(used):
        middle, most, nearly = np.percentile(used, (50, 90, 99))
        yield (
            f"positions of a sample (its tokens but one): mean {_number(preview.length)}, median {middle:,.0f}, "
            f"90% {most:,.0f}, "
            f"99% {nearly:,.0f}, longest {used.max():,}"
        )
        yield from _histogram(used)
    trained = preview.ratio(found.trained, found.kept)
    yield f"trained: {_percent(trained)} of the tokens"
    longer, skipped = found.whole > limit, found.kept == 0
    if (longer & ~skipped).any() or not preview.is_exact:
        lost = preview.ratio(np.where(skipped, 0, found.cut), found.trained + found.cut)
        yield (
            f"cut at --seq-length {limit}: {_percent(preview.share(longer & ~skipped))} of the samples, "
            f"{_percent(lost)} of the tokens to train"
        )
    if skipped.any() or not preview.is_exact:
        yield f"skipped: {_percent(preview.share(skipped))} of the records{_why_skipped(preview, longer, skipped)}"


def _why_skipped(preview: Preview, longer: np.ndarray, skipped: np.ndarray) -> str:
    if not skipped.any():
        return ""
    if preview.config.overlong == "error" and (longer & skipped).any():
        return ", which --overlong error ends a run for"
    prompt = "their prompt alone fills --seq-length" if preview.config.overlong == "truncate" else "longer"
    return f" (first: {preview.records.place(_first(preview, skipped))}); {int((longer & skipped).sum())}: {prompt}"


def _first(preview: Preview, which: np.ndarray) -> int:
    return int(preview.measured.records[which].min())


def _histogram(lengths: np.ndarray) -> Iterator[str]:
    """A bar for each of ten ranges of equal width."""
    width = max(1, math.ceil(lengths.max() / _BARS))
    counts = np.bincount((lengths - 1) // width)
    for i, count in enumerate(counts):
        bar = "#" * round(count / counts.max() * _BAR_WIDTH)
        yield f"  {i * width + 1:>6} - {(i + 1) * width:>6}  {bar:<{_BAR_WIDTH}} {count / len(lengths):6.1%}"


def _batches(preview: Preview) -> Iterator[str]:
    packings = DataConfig.__dataclass_fields__["packing"].default, "next-fit"
    filled = ", ".join(f"{packing} {preview.fill(packing):.1%}" for packing in packings)
    yield f"fill of --seq-length {preview.config.seq_length}: one sample {preview.fill():.1%}; packed: {filled}"
    size = preview.batches.micro_batch_size
    if size > 1 and not preview.config.pack_sequences:
        yield f"padding in microbatches of {size}: {preview.padding:.1%} of the positions"
    if preview.blend.weights:
        yield "a weighted blend has no epoch: --train-iters or --train-samples set its length"
        return
    plain, packed = preview.steps(preview.num_samples), preview.steps(preview.packs)
    batch = preview.batches.global_batch_size
    yield (
        f"an epoch: {_number(plain, 0)} steps of --global-batch-size {batch}; with --pack-sequences "
        f"{_number(packed, 0)}"
    )


def _notes(preview: Preview) -> Iterator[str]:
    left_out, empty = preview.measured.left_out, preview.measured.empty
    if empty.any():
        place = preview.records.place(_first(preview, empty))
        yield (
            f"WARNING: {_percent(preview.share(empty))} of the records train no token but the end of a text: their "
            f"completions are empty (first: {place})"
        )
    if left_out:
        yield f"fields that nothing reads: {', '.join(map(not_obeyed, left_out))}"


def _samples(preview: Preview) -> Iterator[Text]:
    chosen = _chosen(preview)
    count = len(chosen)
    if count:
        yield Text(f"\nmarks: {_BETWEEN} between tokens, «trained», ‹cut off›", style="dim")
    for number, index in enumerate(chosen, 1):
        ids, trained = preview.fit.tokenized(preview.records, index)
        states = _states(ids, trained, preview)
        counts = Counter(states)
        cut = f", {counts['cut']:,} cut off" if counts["cut"] else ""
        title = f"\nsample {number} of {count}: {preview.records.place(index)}"
        yield Text(f"{title}; {len(ids):,} tokens, {counts['trained']:,} trained{cut}", style="bold")
        yield _colored(preview.tokenizer.texts(ids), states, preview.options.max_tokens)


def _chosen(preview: Preview) -> list[int]:
    """Records to show, spread over the measured ones, so that each source has some."""
    count = min(preview.options.show_samples, len(preview.measured.records))
    random = np.random.default_rng(preview.config.seed)
    parts = np.array_split(np.sort(preview.measured.records), max(count, 1))
    return [int(random.choice(part)) for part in parts[:count]]


def _states(ids: Sequence[int], trained: Sequence[bool], preview: Preview) -> list[str]:
    """Of each token: trained, context, cut, or unread (behind the last that is trained)."""
    whole = sample_from_ids(ids, trained, len(ids))
    kept = len(preview.fit.cut(ids, trained))
    last = kept + 1 if kept else 0  # a sample of n positions predicts one token more than it reads
    after = "cut" if len(whole) > kept else "unread"
    states = ["trained" if flag and i else "context" for i, flag in enumerate(trained[:last])]
    states += [after] * (len(whole) + 1 - last)
    return (states + ["unread"] * len(ids))[: len(ids)]


def _colored(texts: Sequence[str], states: Sequence[str], most: int) -> Text:
    """Tokens with a mark between them, and marks around those that are trained or cut; the middle of many left out."""
    tokens = [(visible(text), state) for text, state in zip(texts, states, strict=True)]
    if len(tokens) > most:
        gap = (f" ... {len(tokens) - most:,} tokens ... ", "gap")
        tokens = [*tokens[: most - most // 2], gap, *tokens[len(tokens) - most // 2 :]]
    found = Text()
    for state, run in groupby(tokens, key=lambda token: token[1]):
        before, after = _MARKS.get(state, ("", _BETWEEN))
        found.append(before)
        found.append(_BETWEEN.join(text for text, _ in run if text), style=_STYLES.get(state, "dim"))
        found.append(after)
    return found[:-1] if found.plain.endswith(_BETWEEN) else found


def visible(text: str) -> str:
    """Text of which a terminal does nothing but show it: control characters are escaped; a line break is \\n, and
    breaks the line."""
    escaped = "".join(c if category(c)[0] != "C" or c == "\n" else c.encode("unicode_escape").decode() for c in text)
    return escaped.replace("\n", "\\n\n")


def _number(estimate: Estimate, digits: int = 1) -> str:
    return _with_interval(*(f"{one:,.{digits}f}" for one in estimate))


def _percent(estimate: Estimate) -> str:
    return _with_interval(*(f"{one:.1%}" for one in estimate))


def _with_interval(value: str, low: str, high: str) -> str:
    return value if low == high == value else f"{value} [{low} to {high}]"


def preview_data(
    config: DataConfig, batches: Batches, options: PreviewOptions, pretrained_checkpoint: str | None = None
) -> None:
    """Open, measure and print. Raises ConfigurationError as `Preview` does."""
    show(Preview(config, batches, options, pretrained_checkpoint), console_of(options))
