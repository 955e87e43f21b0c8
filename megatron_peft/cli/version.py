"""The version, in a file that imports nothing: `megatron-peft --version` reads no flags."""


def version() -> str:
    """`megatron-peft 0.1.0 (megatron-core 0.16.1, torch 2.13.0)`, of what is installed; nothing is imported."""
    ours, core, torch = map(_installed, ("megatron-peft", "megatron-core", "torch"))
    return f"megatron-peft {ours} (megatron-core {core}, torch {torch})"


def _installed(name: str) -> str:
    from importlib import metadata  # which takes a sixth of the time of --help

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
