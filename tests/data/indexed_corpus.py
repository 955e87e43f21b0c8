"""Write small indexed datasets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder


def write_indexed(prefix: Path, documents: Sequence[Sequence[int]], dtype: type = np.uint16) -> str:
    """An indexed dataset of these documents; returns its prefix."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        builder.add_document(np.asarray(document), [len(document)])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def numbered_documents(num_documents: int, length: int = 5, first: int = 0) -> list[list[int]]:
    """Document i is `length` times the token `first + i`."""
    return [[first + i] * length for i in range(num_documents)]
