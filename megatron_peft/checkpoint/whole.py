"""The newest checkpoint whose files are all as they were written. Every rank reads its share of them."""

import logging
from pathlib import Path

import torch.distributed as dist

from megatron_peft.checkpoint.folders import TRACKER, checkpoints
from megatron_peft.checkpoint.manifest import damage
from megatron_peft.config import ConfigurationError, require
from megatron_peft.parallel.collectives import from_first_rank

logger = logging.getLogger(__name__)


def find_whole_checkpoint(folder: Path) -> Path | None:
    """The checkpoint to go on from; a damaged one is named in a warning and the next older one is taken. A collective.

    Args:
        folder: of --load: a --save folder, or a checkpoint itself, for which no other is taken.

    Returns:
        None if there is no checkpoint at all.

    Raises:
        ConfigurationError: on every rank, if there are checkpoints but none is whole; it names the damage. Also if
            the tracker names one and there is none.
    """
    candidates = from_first_rank(lambda: _candidates(folder))
    problems: list[str] = []
    for checkpoint in candidates:
        found = _damage_on_all_ranks(checkpoint)
        if not found:
            _say_loudly(problems, checkpoint)
            return checkpoint
        problems.append(_told(checkpoint, found))
    if problems:
        raise ConfigurationError(
            f"--load {folder} holds no whole checkpoint: {' '.join(problems)} Copy the damaged files again, give "
            f"another --load, or start from the beginning without --load."
        )
    return None


def _candidates(folder: Path) -> list[Path]:
    found, tracker = checkpoints(folder), folder / TRACKER
    named = tracker.read_text(errors="replace").strip() if tracker.is_file() else ""
    require(
        bool(found) or not named,
        f"--load {folder} holds no checkpoint of a run, but its {TRACKER} names {named}: copy it back; or, to start "
        f"from the beginning, remove the file. A model of another program is given as --pretrained-checkpoint.",
    )
    return found


def require_whole(checkpoint: Path) -> None:
    """A collective. Raises ConfigurationError on every rank, naming the files, if the checkpoint is damaged."""
    found = _damage_on_all_ranks(checkpoint)
    if found:
        raise ConfigurationError(f"{_told(checkpoint, found)} Copy it again, or give another checkpoint.")


def _damage_on_all_ranks(checkpoint: Path) -> list[str]:
    num_ranks = dist.get_world_size()
    by_rank: list[list[str]] = [[] for _ in range(num_ranks)]
    dist.all_gather_object(by_rank, damage(checkpoint, dist.get_rank(), num_ranks))
    return list(dict.fromkeys(problem for problems in by_rank for problem in problems))


def _told(checkpoint: Path, found: list[str]) -> str:
    return f"{checkpoint} is damaged: {'; '.join(found)}."


def _say_loudly(problems: list[str], checkpoint: Path) -> None:
    if problems and dist.get_rank() == 0:
        logger.warning("WARNING: %s GOING BACK to %s, the newest that is whole.", " ".join(problems), checkpoint)
