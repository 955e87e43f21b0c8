"""What `megatron-peft data preview` takes besides the flags of a run; `data.preview.Preview` does the work."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_peft.config.errors import Requirements, option, require
from megatron_peft.config.model import DataConfig
from megatron_peft.config.sources import RECORD_NAMES, kind_of_source, parse_blend

FLAG = "--train-data-path"


@dataclass(frozen=True)
class PreviewOptions:
    """How much is read, and what is shown."""

    show_samples: int = option(3, "samples to show token by token", check="not_negative")
    max_tokens: int = option(
        400, "tokens to show of a sample; the middle of a longer one is left out", check="positive"
    )
    sampled_records: int = option(2000, "random records that the figures are estimated from", check="positive")
    exact: bool = option(False, "take the figures from all records")
    color: Literal["auto", "always", "never"] = option("auto", "color what is shown; auto: on a terminal")

    def __post_init__(self) -> None:
        with Requirements(self) as unmet:
            unmet.fields()
            unmet(self.sampled_records > 1, f"--sampled-records is {self.sampled_records}; it must be above 1.")

    def check(self, data: DataConfig) -> None:
        """Raises ConfigurationError for data that cannot be previewed, or not like this; no file is opened."""
        paths = data.train_data_path
        require(bool(paths), f"nothing to preview: give {FLAG} FILE.jsonl.")
        prefixes = [path for path in parse_blend(paths, FLAG).prefixes if kind_of_source(path) == "indexed"]
        missing = [path for path in prefixes if not Path(f"{path}.idx").exists()]
        require(not missing, f"{FLAG} {' '.join(missing)}: no file of records; {RECORD_NAMES}.")
        require(
            not prefixes,
            f"{FLAG} {' '.join(paths)} names indexed data, whose tokens are cut into sequences without regard to "
            f"records: there is nothing to preview. Give the records that it was made from ({RECORD_NAMES}).",
        )
        require(
            not (self.exact and parse_blend(paths, FLAG).weights),
            f"--exact reads each record once, but {FLAG} has weights: leave out one of them.",
        )
