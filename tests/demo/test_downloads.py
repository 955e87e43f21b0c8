from __future__ import annotations

import subprocess

import pytest

from megatron_peft.config import ConfigurationError
from megatron_peft.demo import downloads
from megatron_peft.demo.downloads import fetch_source, fetch_wheel


@pytest.fixture
def pip(monkeypatch):
    """Stands in for pip: `pip.leaves` is the wheel that a download leaves behind; `pip.commands` what was asked."""

    class Pip:
        leaves: str | None = None
        stderr = ""
        commands: list[list[str]] = []

        def run(self, command, **_):
            self.commands.append(command)
            if self.leaves:
                (downloads.Path(command[command.index("-d") + 1]) / self.leaves).write_bytes(b"wheel")
            return subprocess.CompletedProcess(command, 0 if self.leaves else 1, "", self.stderr)

    fake = Pip()
    fake.commands = []
    monkeypatch.setattr(downloads.subprocess, "run", fake.run)
    return fake


def test_a_wheel_that_is_there_is_used_without_pip(tmp_path, pip):
    wheel = tmp_path / "jupyterlab_language_pack_fr_fr-4.5-py3-none-any.whl"
    wheel.write_bytes(b"")
    (tmp_path / "django-5.2-py3-none-any.whl").write_bytes(b"")
    assert fetch_wheel("jupyterlab-language-pack-fr-FR", tmp_path) == wheel
    assert pip.commands == []


def test_a_missing_wheel_is_downloaded_without_its_dependencies(tmp_path, pip):
    pip.leaves = "Django-5.2-py3-none-any.whl"
    folder = tmp_path / "downloads"
    assert fetch_wheel("django", folder) == folder / pip.leaves
    assert pip.commands[0][1:4] == ["-m", "pip", "download"]
    assert "--no-deps" in pip.commands[0] and "django" in pip.commands[0]


def test_no_network_says_what_to_do(tmp_path, pip):
    pip.stderr = "ERROR: No matching distribution found for django\n"
    with pytest.raises(ConfigurationError, match="No matching distribution found for django\n.*put its wheel into"):
        fetch_wheel("django", tmp_path)


def test_a_source_distribution_is_told_from_a_wheel(tmp_path, pip):
    (tmp_path / "vaderSentiment-3.3.2-py2.py3-none-any.whl").write_bytes(b"")
    pip.leaves = "vaderSentiment-3.3.2.tar.gz"
    assert fetch_source("vaderSentiment==3.3.2", tmp_path) == tmp_path / pip.leaves
    assert "--no-binary=:all:" in pip.commands[0] and "vaderSentiment==3.3.2" in pip.commands[0]
    assert fetch_source("vaderSentiment==3.3.2", tmp_path) == tmp_path / pip.leaves
    assert len(pip.commands) == 1
