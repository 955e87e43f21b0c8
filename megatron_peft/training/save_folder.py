"""The folder of --save before a run writes there: whose it is, and its removal if nothing is written. Without torch."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from megatron_peft.checkpoint import folders
from megatron_peft.config import CheckpointConfig, ConfigurationError, require

MODEL_FILES = ("config.json", "adapter_model.safetensors", "adapter_model.bin")  # of transformers and PEFT


def require_usable(settings: CheckpointConfig) -> None:
    """Check that the run would replace no files of another run or program. `Saver` checks again under its lock.

    Raises:
        ConfigurationError: --save holds a model, an adapter, or the checkpoints of a run that is not resumed.
    """
    if settings.save is None:
        return
    folder = Path(settings.save)
    foreign = [name for name in MODEL_FILES if (folder / name).exists()]
    require(
        not foreign or folders.newest_checkpoint(folder) is not None,
        f"--save {folder} holds a model or an adapter that no run wrote there ({', '.join(foreign)}), whose files a "
        f"run would replace: give another --save.",
    )
    if settings.resume == "never":
        folders.require_own(folder, settings.load, settings.finetune)


@contextmanager
def removed_if_unused(save: str | None) -> Iterator[None]:
    """Remove what the start of a run has made of --save if the run ends before it writes anything there."""
    folder = Path(save) if save is not None else None
    made = [path for path in (folder, *folder.parents) if not path.exists()] if folder else []
    before = {*folder.iterdir()} if folder and folder.is_dir() else set[Path]()
    try:
        yield
    finally:
        with suppress(OSError, ConfigurationError):  # another process may have the folder by now
            if folder and {*folder.iterdir()} - before == {folder / folders.LOCK}:
                lock = folders.FolderLock(folder, grace_seconds=0.0)
                (folder / folders.LOCK).unlink()
                lock.release()
            for path in made:
                path.rmdir()  # if it is empty
