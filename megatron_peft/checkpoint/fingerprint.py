"""A cheap fingerprint of a base model's folder, so that adapters are never put on another base.

It reads config.json whole, and of each weight file the size and a few stretches: the start (with safetensors it holds
names, types, shapes and offsets), the end, and some between, so that two models of one shape differ as well. Of a run
that is a base it takes the checkpoint that its tracker names, with the checksums of its manifest.
"""

import hashlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from megatron_peft.checkpoint.manifest import MANIFEST
from megatron_peft.checkpoint.megatron_folder import RANK_FILES, RANK_FOLDER, megatron_files

WEIGHT_PATTERNS = ("*.safetensors", "*.bin", "*.distcp")  # the first that matches anything counts
_START_BYTES = 256 * 1024
_END_BYTES = 64 * 1024
_NUM_SAMPLES, _SAMPLE_BYTES = 16, 4096


@lru_cache
def fingerprint(folder: str) -> dict[str, str]:
    """{file, as named from the folder: digest} of config.json and the weight files. Kept: a run asks at each save.

    Raises:
        OSError: the folder or a file cannot be read.
    """
    root = Path(folder)
    place = megatron_files(root) or root
    described = [path for path in (root / "config.json", place / "config.json", place / MANIFEST) if path.is_file()]
    files = dict.fromkeys([*described, *weight_files(place)])
    if not files:
        raise FileNotFoundError(f"{folder} holds neither config.json nor weights")
    return {str(path.relative_to(root)): sampled_digest(path) for path in files}


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights, by name: those of one pattern, or of tensor- and pipeline-parallel ranks."""
    matches = (sorted(folder.glob(pattern)) for pattern in WEIGHT_PATTERNS)
    ranks = (path for path in sorted(folder.glob("mp_rank_*")) if RANK_FOLDER.fullmatch(path.name))
    of_ranks = [path / name for path in ranks for name in RANK_FILES if (path / name).is_file()]
    return next((found for found in matches if found), of_ranks)


def sampled_digest(path: Path) -> str:
    """Of a file's size and some of its bytes, all of them if it is small."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        for start, length in _stretches(size):
            file.seek(start)
            digest.update(file.read(length))
    return digest.hexdigest()


def _stretches(size: int) -> Iterator[tuple[int, int]]:
    """(first byte, number of bytes) of what is read; all of a small file."""
    if size <= _START_BYTES + _END_BYTES:
        yield 0, size
        return
    yield 0, _START_BYTES
    for sample in range(1, _NUM_SAMPLES + 1):
        yield size * sample // (_NUM_SAMPLES + 1), _SAMPLE_BYTES
    yield size - _END_BYTES, _END_BYTES
