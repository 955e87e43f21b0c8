"""--data-path and its like: prefixes of indexed datasets, with or without weights, checked before anything is built."""

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from megatron.core.datasets.indexed_dataset import DType, get_bin_path, get_idx_path

from megatron_peft.config import require

_HEADER = struct.Struct("<9sQBQQ")  # of an index: magic, version, type of a token, sequences, document bounds


class Blend(NamedTuple):
    """What megatron-core calls a blend; `weights` is None where only prefixes were given."""

    prefixes: list[str]
    weights: list[float] | None


def parse_blend(paths: Sequence[str], flag: str) -> Blend:
    """`p q` or `0.3 p 0.7 q`. Raises ConfigurationError for another mixture, and for a dataset that is not whole."""
    given = " ".join([flag, *paths])
    weights = [_number(path) for path in paths]
    weighted = any(weight is not None for weight in weights)
    pairs = len(paths) % 2 == 0 and all((weight is None) == bool(i % 2) for i, weight in enumerate(weights))
    require(not weighted or pairs, f"{given}: give prefixes only, or a weight before each prefix (0.3 A 0.7 B).")
    chosen = [weight for weight in weights if weight is not None]
    require(all(weight > 0 for weight in chosen), f"{given}: weights must be above 0.")
    prefixes = list(paths[1::2] if weighted else paths)
    for prefix in prefixes:
        _require_whole(prefix, flag)
    return Blend(prefixes, chosen or None)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _require_whole(prefix: str, flag: str) -> None:
    """Both files are there, the index is one, and the tokens are all there."""
    index, data = Path(get_idx_path(prefix)), Path(get_bin_path(prefix))
    missing = [str(path) for path in (index, data) if not path.is_file()]
    require(
        not missing,
        f"{flag} {prefix}: {' and '.join(missing)} not found. A prefix is a path without .bin and .idx, as "
        "tools/preprocess_data.py writes it.",
    )
    expected = _expected_bytes(index, f"{flag} {prefix}: {index}")
    actual = data.stat().st_size
    require(
        actual == expected,
        f"{flag} {prefix}: {data} has {actual} bytes where its index expects {expected}; it is torn.",
    )


def _expected_bytes(index: Path, named: str) -> int:
    """Size of the data file that an index describes. (megatron-core's own reader leaves out the sizes, follows any
    pointer wherever it leads, and complains once more when it is collected.)

    Raises:
        ConfigurationError: it is torn, or its sequences or documents do not follow one another from the first on.
    """
    with index.open("rb") as file:
        num_bytes, header = index.stat().st_size, file.read(_HEADER.size)
        fields = _HEADER.unpack(header) if len(header) == _HEADER.size else (b"", 0, 0, 0, 0)
        magic, version, dtype_code, num_sequences, num_bounds = fields
        known = magic == b"MMIDIDX\0\0" and version == 1 and dtype_code in {dtype.value for dtype in DType}
        require(
            known and num_bytes == _HEADER.size + num_sequences * (4 + 8) + num_bounds * 8,
            f"{named} is not an index of Megatron's, or it is torn ({num_bytes} bytes).",
        )
        lengths = np.fromfile(file, np.int32, num_sequences)
        pointers = np.fromfile(file, np.int64, num_sequences)
        bounds = np.fromfile(file, np.int64, num_bounds)
    ends = np.cumsum(lengths, dtype=np.int64) * DType.size(dtype_code)
    astray = (lengths < 0) | (pointers != np.append(0, ends)[:-1])
    require(
        not astray.any(),
        f"{named} is damaged: sequence {astray.argmax() if len(astray) else 0} does not begin where the one before it "
        "ends, or its length is below 0. Copy it again, or make it anew with tools/preprocess_data.py.",
    )
    in_order = num_bounds > 0 and bounds[0] == 0 and bounds[-1] == num_sequences and (np.diff(bounds) >= 0).all()
    require(
        bool(in_order),
        f"{named} is damaged: its documents are not its {num_sequences} sequences in their order. Copy it again, or "
        "make it anew with tools/preprocess_data.py.",
    )
    return int(ends[-1]) if num_sequences else 0
