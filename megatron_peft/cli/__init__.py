"""The front: words -> flags -> configuration, and the processes of a run. The version needs no flags."""


def version() -> str:
    """`megatron-peft 0.1.0 (megatron-core 0.16.1, torch 2.13.0)`, of what is installed; nothing is imported."""
    from importlib import metadata  # which takes a sixth of the time of --help

    def installed(name: str) -> str:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return "not installed"

    ours, core, torch = map(installed, ("megatron-peft", "megatron-core", "torch"))
    return f"megatron-peft {ours} (megatron-core {core}, torch {torch})"
