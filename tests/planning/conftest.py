"""Slow tests of this folder have a target of their own, `make test-rehearsals`: they take most of an hour."""

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent.name == "planning" and item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.rehearsal)
