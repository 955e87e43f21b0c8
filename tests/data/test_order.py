from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_peft.data.order import SampleOrder


@given(num_samples=st.integers(1, 50), seed=st.integers(-5, 2**33), epoch=st.integers(0, 3))
def test_an_epoch_is_a_permutation(num_samples, seed, epoch):
    order = SampleOrder(num_samples, seed, shuffle=True)
    seen = [int(order.samples_at(epoch * num_samples + i)[0]) for i in range(num_samples)]
    assert sorted(seen) == list(range(num_samples))


def test_epochs_and_seeds_differ_and_the_same_seed_does_not():
    def epoch(seed: int, number: int) -> list[int]:
        return SampleOrder(50, seed, shuffle=True).permutation(number).tolist()

    assert epoch(1, 0) != epoch(1, 1)
    assert epoch(1, 0) != epoch(2, 0)
    assert epoch(1, 3) == epoch(1, 3)


def test_the_order_of_a_seed_is_the_same_on_every_machine_and_version():
    assert SampleOrder(8, 1234, shuffle=True).permutation(0).tolist() == [4, 5, 3, 1, 2, 0, 6, 7]


def test_without_shuffling_each_epoch_is_in_file_order():
    order = SampleOrder(3, 1234, shuffle=False)
    assert [int(order.samples_at(i)[0]) for i in range(7)] == [0, 1, 2, 0, 1, 2, 0]


@pytest.mark.parametrize(("epochs", "positions"), [(1, 10), (2, 20), (0.25, 3), (2.5, 25), (1.1, 11), (0.1 + 0.2, 3)])
def test_epochs_are_counted_in_positions(epochs, positions):
    assert SampleOrder(10, 0, shuffle=True).positions_in(epochs) == positions


def test_positions_are_counted_in_epochs():
    order = SampleOrder(10, 0, shuffle=True)
    assert [order.epochs_at(position) for position in (0, 5, 10, 25)] == [0, 0.5, 1, 2.5]
