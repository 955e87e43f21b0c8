"""What all ranks learn from the first one, which alone looks at a folder that another process may be changing."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_peft.config import ConfigurationError
from megatron_peft.runtime.launch import checked_together

Found = TypeVar("Found")


def from_first_rank(look: Callable[[], Found], group: dist.ProcessGroup | None = None) -> Found:
    """What `look` gives on rank 0, on all ranks. A collective.

    Raises:
        ConfigurationError: on all ranks, if it raised that or OSError on rank 0.
    """
    found: list[Any] = [checked_together(lambda: _on_first_rank(look), group)]
    dist.broadcast_object_list(found, src=0, group=group)
    return found[0]


def _on_first_rank(look: Callable[[], Found]) -> Found | None:
    if dist.get_rank() != 0:
        return None
    try:
        return look()
    except OSError as error:
        raise ConfigurationError(str(error)) from error
