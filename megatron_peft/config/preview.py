"""What `megatron-peft data preview` takes besides the flags of a run; `data.preview.Preview` does the work."""

from dataclasses import dataclass
from typing import Literal

from megatron_peft.config.errors import Requirements, option


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
