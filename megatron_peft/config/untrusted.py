"""Read JSON and YAML files that come from outside.

Whatever is wrong with such a file is one ConfigurationError with its name, and its line if it has lines: text that is
not UTF-8 or not JSON, numbers that are not finite or have thousands of digits, unpaired surrogates, values nested too
deep, pipes and devices. `conversion.hf_files` reads weights, `checkpoint.safe_pickle` the index of a
checkpoint, `data.build` indexed data, and `data.tokenizers` tokenizers.
"""

import gzip
import json
import stat
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from megatron_peft.config.errors import ConfigurationError, require

if TYPE_CHECKING:  # a command line is checked without torch
    from torch import Tensor

TOO_DEEP = "nested too deep"


def require_regular(path: Path, flag: str = "") -> None:
    """Raises ConfigurationError, with the `flag` that named it, unless `path` is a regular file."""
    named = f"{flag} {path}".strip()
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise ConfigurationError(f"{named} cannot be read: {error.strerror}.") from error
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe or a device"
        raise ConfigurationError(f"{named} is {kind}, not a file: give the path of a file.")


def is_finite(values: "Tensor") -> bool:
    """Whether no value is NaN or an infinity."""
    if not (values.is_floating_point() and values.numel()):
        return True
    if values.element_size() == 1:  # float8, which has no extremes
        values = values.float()
    # Extremes are NaN if any value is. They are exact, need no memory, and take half as long as a copy. Of strided
    # values torch finds them faster one by one.
    return all(map(isfinite, values.aminmax() if values.is_contiguous() else (values.amin(), values.amax())))


def require_finite(values: "Tensor", name: str, file: Path) -> None:
    """Raises ConfigurationError if a tensor of a file, or a slice of it, holds NaN or infinities."""
    require(
        is_finite(values),
        f"{file} holds NaN or infinities in {name}. Copy or download the file again; if a run wrote it, the run has "
        f"diverged: give one of its older iter_* folders.",
    )


def read_bytes(path: Path) -> bytes:
    """Read all of a file, unpacked if it is named .gz. Raises ConfigurationError if it cannot be read."""
    require_regular(path)
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            return file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigurationError(f"{path} cannot be read: {error}.") from error


def read_text(path: Path) -> str:
    """The text of a UTF-8 file. Raises as `read_bytes` does."""
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{path} is not text in UTF-8: {error}.") from error


def read_json(path: Path) -> Any:
    """The value of a JSON file. Raises ConfigurationError with the file's name, and the line."""
    return parse_json(read_text(path), str(path))


def read_json_object(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds. Raises as `read_json` does."""
    value = read_json(path)
    require(isinstance(value, dict), f"{path} must be a JSON object, not {type(value).__name__}.")
    return value


def _finite(text: str) -> float:
    value = float(text)
    if not isfinite(value):
        raise ValueError(f"{text[:40]} is not a finite number")
    return value


_DECODER = json.JSONDecoder(parse_constant=_finite, parse_float=_finite)  # json.loads would make one for each line


def parse_json(text: str | bytes, place: str | Callable[[], str]) -> Any:
    """The value that `text` holds. Raises ConfigurationError that begins with `place`, as in `data.jsonl, line 7`."""
    try:
        value = _DECODER.decode(text if isinstance(text, str) else text.decode(json.detect_encoding(text)))
        if (b"\\ud" if isinstance(text, bytes) else "\\ud") in text.lower():  # type: ignore[operator]
            _require_encodable(value)
        return value
    except (ValueError, OverflowError, RecursionError) as error:
        reason = TOO_DEEP if isinstance(error, RecursionError) else str(error)
        if isinstance(error, json.JSONDecodeError):
            line = f"line {error.lineno}, " if error.lineno > 1 else ""
            reason = f"not JSON: {error.msg} ({line}character {error.colno})"
        raise ConfigurationError(f"{place if isinstance(place, str) else place()}: {reason}.") from error


def _require_encodable(value: Any) -> None:
    """Raise ValueError for a string with an unpaired surrogate, which no file and no terminal takes."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError("a string contains an unpaired surrogate") from error


class StrictLoader(yaml.SafeLoader):
    """Refuses a key that stands twice in a table, as YAML requires and PyYAML does not."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        places: dict[Any, str] = {}
        for key in (key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"):
            name = self.construct_object(key, deep=True)
            if name in places:
                problem = f"{key.value} stands here and in {places[name]}: leave one out"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            places[name] = f"line {key.start_mark.line + 1}, column {key.start_mark.column + 1}"
        return super().construct_mapping(node, deep)


def _whole_number(loader: StrictLoader, node: yaml.ScalarNode) -> int | str:
    """As of YAML 1.2: in 1.1, which is PyYAML's, 24:00:00 is a number of seconds."""
    return node.value if ":" in node.value else loader.construct_yaml_int(node)


StrictLoader.add_constructor("tag:yaml.org,2002:int", _whole_number)


def parse_yaml(text: str, place: str, loader: type = StrictLoader) -> Any:
    """The value that `text` holds. `loader` makes plain values only; yaml.SafeLoader is for files of other projects."""
    with _yaml_errors(place):
        value = yaml.load(text, loader)
        json.dumps(value, default=str, skipkeys=True)  # ValueError for an alias within what it names
        return value


UNFINISHED = ("while parsing a flow", "while scanning a quoted scalar", "while scanning a simple key")  # of PyYAML


def compose_yaml(text: str, place: str) -> yaml.Node | None:
    """The nodes of `text` with their lines and columns, of which no value has been made; None for an empty file."""
    with _yaml_errors(place):
        return yaml.compose(text, yaml.SafeLoader)


@contextmanager
def _yaml_errors(place: str) -> Iterator[None]:
    try:
        yield
    except (yaml.YAMLError, ValueError, OverflowError, TypeError, RecursionError) as error:
        reason = TOO_DEEP if isinstance(error, RecursionError) else str(error)
        if isinstance(error, yaml.MarkedYAMLError) and (mark := error.problem_mark or error.context_mark):
            words = ", ".join(filter(None, (error.context, error.problem)))
            begun = error.context_mark
            if begun and begun.line < mark.line and (error.context or "").startswith(UNFINISHED):
                words += f" (line {mark.line + 1}, column {mark.column + 1})"
                mark = begun  # a bracket that is never closed is no fault of the next line
            reason = f"line {mark.line + 1}, column {mark.column + 1}: {words}"
        raise ConfigurationError(f"{place} is not YAML: {reason}.") from error
