"""Write Hugging Face safetensors, one shard at a time."""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.torch import save_file
from torch import Tensor

from megatron_peft.config import require, untrusted

DEFAULT_SHARD_BYTES = 5 * 10**9
INDEX_SUFFIX = ".safetensors.index.json"
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def require_no_overflow(values: Tensor, name: str) -> None:
    """ConfigurationError: what is to be written holds NaN or infinities, although what was read did not."""
    require(
        untrusted.is_finite(values),
        f"{name} would hold NaN or infinities in {str(values.dtype).removeprefix('torch.')}: give a wider --dtype, or "
        f"an older iter_* folder of a run that has diverged.",
    )


@torch.no_grad()
def write_safetensors(
    folder: Path,
    specs: Mapping[str, Tensor],
    tensors: Iterable[tuple[str, Tensor]],
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    stem: str = "model",
    advance: Callable[[int], None] = lambda num_bytes: None,
) -> None:
    """Write `<stem>.safetensors`, or several shards with an index, into `folder`.

    specs: shape and type of every tensor, without data (on `meta`), by name: the shards are planned from them.
    tensors: names and tensors, in the order of `specs`. Each is cast to the type of its spec. A shard is written, and
        its tensors are freed, when its last tensor has arrived.
    advance: called with the bytes of each tensor that has arrived.

    Raises ConfigurationError: the limit is 0, or a value does not fit the type.
    """
    require(max_shard_bytes > 0, f"--max-shard-size {max_shard_bytes} must be above 0.")
    split = split_state_dict_into_shards_factory(
        dict(specs),
        get_storage_size=lambda spec: spec.nbytes,
        filename_pattern=stem + "{suffix}.safetensors",
        max_shard_size=max_shard_bytes,
    )
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": dict(sorted(split.tensor_to_filename.items()))}
        (folder / f"{stem}{INDEX_SUFFIX}").write_text(json.dumps(index, indent=2) + "\n")
    shards: dict[str, dict[str, Tensor]] = {file: {} for file in split.filename_to_tensors}
    for name, tensor in tensors:
        spec, file = specs[name], split.tensor_to_filename[name]
        assert tensor.shape == spec.shape, (name, tensor.shape, spec.shape)
        # A copy, since safetensors refuses tensors that share memory, as the fused A of q, k and v does.
        shards[file][name] = tensor.detach().to("cpu", spec.dtype, copy=True).contiguous()
        require_no_overflow(shards[file][name], name)
        advance(spec.nbytes)
        if len(shards[file]) == len(split.filename_to_tensors[file]):
            save_file(shards.pop(file), folder / file, metadata={"format": "pt"})
    assert not shards, f"never written: {[*shards][:8]}"


def parse_bytes(text: str) -> int:
    """Return the number of bytes in `5GB`, `200MB`, `1GiB` or a plain number.

    Raises ConfigurationError: `text` is not a size, or less than one byte.
    """
    # huggingface_hub's parse_size_to_int accepts neither GiB nor plain bytes.
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B|)", text.strip().upper())
    num_bytes = 0 if match is None else int(float(match[1]) * UNITS[match[2]])
    require(num_bytes > 0, f"--max-shard-size {text!r} is not a size: use a form like 5GB, 500MB or 1GiB.")
    return num_bytes
