from __future__ import annotations

import os
import signal

import pytest

from megatron_peft.training.signals import SAVE_AND_EXIT, ExitSignals


@pytest.fixture
def own_handler():
    """A handler of the test's own, so that a signal that is not caught ends no process."""
    received = []
    before = {number: signal.signal(number, lambda number, frame: received.append(number)) for number in SAVE_AND_EXIT}
    yield received
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_remembered_and_goes_no_further(own_handler, number):
    with ExitSignals(enabled=True) as signals:
        assert not signals.received
        os.kill(os.getpid(), number)
        assert signals.received
    assert own_handler == []


def test_afterwards_the_old_handlers_are_back(own_handler):
    with ExitSignals(enabled=True) as signals:
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    assert own_handler == [signal.SIGTERM] and not signals.received


def test_switched_off_signals_keep_their_meaning(own_handler):
    with ExitSignals(enabled=False) as signals:
        os.kill(os.getpid(), signal.SIGUSR1)
    assert own_handler == [signal.SIGUSR1] and not signals.received
