"""A signal before training ends the run at once; in training it is remembered (tests/training/test_loop.py)."""

import multiprocessing
import os
import signal
import time

import pytest

from megatron_peft.runtime.exit_signals import EndedBySignal, ExitSignals, ends_before_training
from tests.time_limits import seconds


@pytest.fixture
def seen():
    """A handler of the test's own, and what it saw."""
    found: list[int] = []
    numbers = (signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.signal(number, lambda number, frame: found.append(number)) for number in numbers}
    yield found
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)
def test_a_signal_before_training_raises_and_in_training_is_remembered(seen: list[int], number: signal.Signals) -> None:
    with pytest.raises(EndedBySignal, match=f"{number.name} while no step was running") as error:
        with ends_before_training(True):
            with ExitSignals(True) as signals:
                os.kill(os.getpid(), number)
            assert signals.received
            os.kill(os.getpid(), number)
    assert error.value.exit_code == 128 + number and seen == []
    os.kill(os.getpid(), number)
    assert seen == [number], "handlers are restored"


def test_without_the_flag_signals_act_as_usual(seen: list[int]) -> None:
    with ends_before_training(False), ExitSignals(False) as signals:
        os.kill(os.getpid(), signal.SIGTERM)
    assert seen == [signal.SIGTERM] and not signals.received


def test_a_worker_that_was_forked_meanwhile_is_simply_ended() -> None:
    context = multiprocessing.get_context("fork")
    with ends_before_training(True):
        has_begun = context.Event()
        worker = context.Process(target=lambda: (has_begun.set(), time.sleep(600)), daemon=True)
        worker.start()
        assert has_begun.wait(seconds(60))
        worker.terminate()
        worker.join(seconds(60))
    assert worker.exitcode == -signal.SIGTERM


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1, signal.SIGTERM], ids=lambda number: number.name)
def test_what_a_launcher_sends_after_a_failure_is_not_told(capfd, number):
    with ExitSignals(True, prints=True) as signals:
        signal.raise_signal(number)
    is_told = f"{number.name}: ending after this step" in capfd.readouterr().err
    assert signals.received and is_told is (number != signal.SIGTERM)
