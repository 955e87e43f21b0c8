"""The demo's model and messages for an experiment, with messages to tune on that are neither trained on nor scored.

python -m megatron_peft.demo.experiment_data FOLDER makes FOLDER/model and FOLDER/data as tools/demo.py does, and
splits data/train.jsonl into data/experiment/train.jsonl and data/experiment/tuning.jsonl, by a hash of the words.
data/reviews is a second task: sentences of film reviews, positive or negative.
"""

import hashlib
import json
import sys
from collections.abc import Iterable
from pathlib import Path

from megatron_peft.config import ConfigurationError
from megatron_peft.demo.data import WORD, Pair, prepare_pairs, read_pairs
from megatron_peft.demo.model import prepare_model
from megatron_peft.demo.reviews import prepare_reviews

TUNING_OF = 72  # one group of messages in so many: about 40 of 3,000


def prepare(folder: Path) -> None:
    """Make what is not there yet. Raises ConfigurationError when a download fails."""
    prepare_model(folder / "model", folder / "downloads")
    prepare_reviews(folder / "data" / "reviews", folder / "downloads")
    files = prepare_pairs(folder / "data", folder / "downloads")
    pairs = read_pairs(files.train)
    split = folder / "data" / "experiment"
    split.mkdir(exist_ok=True)
    _write_lines(split / "train.jsonl", (pair for pair in pairs if not is_for_tuning(pair)))
    _write_lines(split / "tuning.jsonl", (pair for pair in pairs if is_for_tuning(pair)))


def is_for_tuning(pair: Pair) -> bool:
    """By a hash of the words of its English, other than the one that holds messages out."""
    words = " ".join(WORD.findall(pair.english.casefold()))
    return int.from_bytes(hashlib.sha256(f"tuning {words}".encode()).digest()[:8], "big") % TUNING_OF == 0


def _write_lines(path: Path, pairs: Iterable[Pair]) -> None:
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(pair.as_record(), ensure_ascii=False) + "\n" for pair in pairs)
    temporary.replace(path)


def main() -> None:
    try:
        prepare(Path(sys.argv[1]))
    except ConfigurationError as error:
        sys.exit(f"experiment_data: error: {error}")


if __name__ == "__main__":
    main()
