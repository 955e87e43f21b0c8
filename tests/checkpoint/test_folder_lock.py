"""One process at a time saves into a folder, and a killed one leaves no lock behind."""

from __future__ import annotations

import subprocess
import sys
from contextlib import contextmanager

import pytest

from megatron_peft.checkpoint import folder_lock
from megatron_peft.checkpoint.folder_lock import FolderLock
from megatron_peft.config import ConfigurationError

HOLDER = """
import os, sys, time
from pathlib import Path
from megatron_peft.checkpoint.folder_lock import FolderLock
lock = FolderLock(Path(sys.argv[1]))
if os.fork() == 0:  # as a worker of the data: it outlives its parent
    time.sleep(20)
    os._exit(0)
print("holds it", flush=True)
time.sleep(600)
"""


@contextmanager
def holder(folder):
    process = subprocess.Popen([sys.executable, "-c", HOLDER, folder], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "holds it\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path):
    with holder(tmp_path) as process:
        with pytest.raises(ConfigurationError, match=f"--save {tmp_path}: .*process {process.pid} on .*another --save"):
            FolderLock(tmp_path, grace_seconds=0.2)
        process.kill()
        lock = FolderLock(tmp_path)
    assert lock.is_held
    lock.release()


def test_a_lock_that_was_given_back_can_be_taken(tmp_path):
    FolderLock(tmp_path / "new").release()
    with holder(tmp_path / "new") as process:
        assert f"process {process.pid}" in (tmp_path / "new" / folder_lock.LOCK).read_text()


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, caplog):
    def no_locks(descriptor, command):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(folder_lock.fcntl, "lockf", no_locks)
    lock = FolderLock(tmp_path)
    assert not lock.is_held and "cannot be locked" in caplog.text
    lock.release()
