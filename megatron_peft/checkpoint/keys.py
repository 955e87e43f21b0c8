"""Keys of the tensors in a checkpoint. Nothing here knows torch: tools look at keys without a model."""

NOT_PARAMETERS = ("optimizer.", "rng.")
ADAPTER = ".adapter."


def master_key(key: str) -> str:
    """Key of the float32 copy that bf16 training keeps of a parameter."""
    return f"optimizer.master.{key}"
