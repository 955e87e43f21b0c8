"""Initial values that depend on the run's seed and on a parameter's global name, never on the layout."""

import hashlib

import torch


def generator_for(seed: int, name: str) -> torch.Generator:
    """A CPU generator seeded by (seed, name). Draw the whole global tensor from it, then slice."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
