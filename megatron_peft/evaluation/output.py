"""The file that an evaluation or a file of answers goes to, checked before a model is loaded."""

import os
from pathlib import Path

from megatron_peft.config import ConfigurationError, require


def check_output(output: str | None) -> None:
    """Make the folder of `output`, if there is one. ConfigurationError: no file can be written there."""
    if output is None:
        return
    path = Path(output)
    require(not path.is_dir(), f"--output {path} is a folder: give a file.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"--output {path} cannot be written ({error.strerror}).") from error
    require(os.access(path.parent, os.W_OK), f"--output {path} cannot be written: {path.parent} gives no permission.")
