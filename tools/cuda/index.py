"""What a package index says of a package: releases, files and requirements. Nothing is installed, built or imported.

The index is pip's own (PIP_INDEX_URL or `pip config`). It must speak JSON (PEP 691), as PyPI does.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from email.parser import Parser
from functools import cache
from io import BytesIO
from urllib.error import HTTPError
from urllib.parse import urljoin
from urllib.request import Request, urlopen
from zipfile import ZipFile

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_sdist_filename, parse_wheel_filename
from packaging.version import Version

PYPI = "https://pypi.org/simple"
TIMEOUT_SECONDS = 120


@dataclass(frozen=True)
class File:
    """A file of a release: a wheel, or an sdist (`tags` empty)."""

    name: str
    url: str
    version: Version
    tags: frozenset[str]
    requires_python: str
    yanked: bool

    def read(self) -> bytes:
        """The file itself."""
        return _read(self.url)

    def sources(self) -> dict[str, str]:
        """Python files of a wheel by their path."""
        with ZipFile(BytesIO(self.read())) as wheel:
            return {name: wheel.read(name).decode() for name in wheel.namelist() if name.endswith(".py")}

    def requirements(self) -> list[Requirement]:
        """Requires-Dist, from the metadata that stands beside the file (PEP 658), or from a small wheel itself."""
        try:
            text = _read(f"{self.url}.metadata").decode()
        except HTTPError as error:
            if error.code != 404 or not self.tags:
                raise
            with ZipFile(BytesIO(self.read())) as wheel:
                (path,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
                text = wheel.read(path).decode()
        return [Requirement(line) for line in Parser().parsestr(text).get_all("Requires-Dist") or []]


def files(package: str) -> list[File]:
    """All files that the index has of a package; of names that are no versions, none."""
    url = f"{_index()}/{canonicalize_name(package)}/"
    answer = json.loads(_read(url, accept="application/vnd.pypi.simple.v1+json"))
    return list(_parsed(answer["files"], url))


def releases(package: str, first: str) -> list[File]:
    """One wheel of every release from `first` on that is neither yanked nor a preview, the oldest first."""
    wheels = {
        file.version: file
        for file in files(package)
        if file.tags and not file.yanked and not file.version.is_prerelease and file.version >= Version(first)
    }
    return [wheels[version] for version in sorted(wheels)]


def _parsed(listed: list[dict], base: str) -> Iterator[File]:
    for file in listed:
        name, tags = file["filename"], frozenset()
        try:
            if name.endswith(".whl"):
                _, version, _, wheel_tags = parse_wheel_filename(name)
                tags = frozenset(map(str, wheel_tags))
            else:
                _, version = parse_sdist_filename(name)
        except ValueError:
            continue
        python = file.get("requires-python") or ""
        yield File(name, urljoin(base, file["url"]), version, tags, python, bool(file.get("yanked")))


@cache
def _index() -> str:
    """pip's index; the environment (PIP_INDEX_URL) is in what pip answers."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    settings = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    urls = [line.split("=", 1)[1].strip("'\"") for line in settings if line.partition("=")[0].endswith("index-url")]
    main = [url for url in urls if "extra" not in url]
    return (main[-1] if main else PYPI).rstrip("/")


def _read(url: str, accept: str = "*/*") -> bytes:
    with urlopen(Request(url, headers={"Accept": accept}), timeout=TIMEOUT_SECONDS) as answer:
        return answer.read()
