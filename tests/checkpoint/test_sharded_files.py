"""Files that were cut short are named on every rank, and nothing hangs."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize("name", ["__1_0.distcp", ".metadata", "run_record.json"])
def test_a_file_cut_short_is_reported_on_all_ranks(two_ranks, name):
    messages = {facts["damaged"][name] for facts in two_ranks}
    (message,) = messages
    assert message.startswith("ConfigurationError")
    assert "is damaged" in message or "cannot be read" in message
