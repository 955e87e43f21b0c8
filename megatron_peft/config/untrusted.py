"""The one reader of JSON and YAML files that come from outside: it knows their size, depth and numbers.

Whatever is wrong with such a file is one ConfigurationError with its name, and its line if it has lines: text that is
not UTF-8 or not JSON, numbers that are not finite or have thousands of digits, halves of a surrogate pair, values
nested too deep, pipes and devices. `conversion.hf_files` reads weights, `checkpoint.safe_pickle` the index of a
checkpoint, `data.build` indexed data, and `data.tokenizers` tokenizers.
"""

import gzip
import json
import re
import signal
import stat
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import inf, isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from megatron_peft.config.errors import ConfigurationError, require

if TYPE_CHECKING:  # a command line is checked without torch
    from torch import Tensor

MAX_BYTES = 1 << 28  # of a file that is read whole; datasets are mapped
MAX_DEPTH = 100
MAX_JSON_VALUES = 8_000_000  # of one text: an empty list is two bytes of it and 64 of memory
MAX_YAML_CHARACTERS = 1 << 20  # of one text: PyYAML takes a minute and a gigabyte for five times as many
MAX_YAML_VALUES = 1_000_000  # a value counts each time that an alias names it: ten lines can hold a billion
TOO_DEEP = f"nested deeper than {MAX_DEPTH} levels"
_HALF_OF_A_PAIR = re.compile("[\ud800-\udfff]")


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


def read_bytes(path: Path, most: int = MAX_BYTES) -> bytes:
    """All of a file, unpacked if it is named .gz. Raises ConfigurationError: it cannot be read, or is too large."""
    require_regular(path)
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read(most + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigurationError(f"{path} cannot be read: {error}.") from error
    require(len(content) <= most, f"{path} has more than {most >> 20} MiB, the limit for such files.")
    return content


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
        comma, square, curly, half = (b",", b"[", b"{", b"\\ud") if isinstance(text, bytes) else (",", "[", "{", "\\ud")
        num_brackets = text.count(square) + text.count(curly)  # type: ignore[arg-type]
        if len(text) > MAX_JSON_VALUES and text.count(comma) + num_brackets > MAX_JSON_VALUES:  # type: ignore[arg-type]
            raise ValueError(f"it holds more than {MAX_JSON_VALUES:,} values: split it, or write JSON lines")
        value = _DECODER.decode(text if isinstance(text, str) else text.decode(json.detect_encoding(text)))
        if num_brackets > MAX_DEPTH or half in text.lower():  # type: ignore[operator]
            _walk(value)
        return value
    except (ValueError, OverflowError, RecursionError) as error:
        reason = TOO_DEEP if isinstance(error, RecursionError) else str(error)
        if isinstance(error, json.JSONDecodeError):
            line = f"line {error.lineno}, " if error.lineno > 1 else ""
            reason = f"not JSON: {error.msg} ({line}character {error.colno})"
        raise ConfigurationError(f"{place if isinstance(place, str) else place()}: {reason}.") from error


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
    with _yaml_errors(text, place):
        value = yaml.load(text, loader)
        _walk(value, MAX_YAML_VALUES)
    return value


UNFINISHED = ("while parsing a flow", "while scanning a quoted scalar", "while scanning a simple key")  # of PyYAML


def compose_yaml(text: str, place: str) -> yaml.Node | None:
    """The nodes of `text` with their lines and columns, of which no value has been made; None for an empty file."""
    with _yaml_errors(text, place):
        return yaml.compose(text, yaml.SafeLoader)


@contextmanager
def _yaml_errors(text: str, place: str) -> Iterator[None]:
    size = len(text)
    require(
        size <= MAX_YAML_CHARACTERS,
        f"{place} has {size:,} characters, above the limit of YAML, {MAX_YAML_CHARACTERS:,}.",
    )
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


@contextmanager
def limited_to(seconds: float) -> Iterator[None]:
    """Raises TimeoutError after `seconds` of CPU time: an untrusted template or pattern may run forever.

    In the main thread only; there, everything is looked at once before it is used.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise TimeoutError(f"it has not come to an end in {seconds:g} s")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def _walk(value: Any, most_values: float = inf) -> None:
    """ValueError for values that are nested too deeply, too many, or not encodable. Without recursion."""
    level, num_values = [value], 1
    for _ in range(MAX_DEPTH + 1):
        following: list[Any] = []
        for item in level:
            following += _values_in(item)
            if num_values + len(following) > most_values:
                raise ValueError(f"it holds more than {most_values:,} values")
        level, num_values = following, num_values + len(following)
        if not level:
            return
    raise ValueError(TOO_DEEP)


def _values_in(value: Any) -> Sequence[Any]:
    if isinstance(value, str) and _HALF_OF_A_PAIR.search(value):
        raise ValueError("a string contains an unpaired surrogate")
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    return value if isinstance(value, list) else ()
