"""Which sample each position of training has: the order of epochs, packs of short samples, blends of sources."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_peft.data.samples import BlendedOrder, PackedOrder, SampleOrder, first_fit_decreasing, pack_bounds

LENGTHS = st.lists(st.integers(1, 10), min_size=1, max_size=60).map(np.asarray)


@given(num_samples=st.integers(1, 50), seed=st.integers(-5, 2**33), epoch=st.integers(0, 3))
def test_an_epoch_is_a_permutation(num_samples, seed, epoch):
    order = SampleOrder(num_samples, seed, shuffle=True)
    seen = [int(order.samples_at(epoch * num_samples + i)[0]) for i in range(num_samples)]
    assert sorted(seen) == list(range(num_samples))


def test_epochs_and_seeds_differ_and_the_same_seed_does_not():
    places = ((1, 0), (1, 0), (1, 1), (2, 0))  # seed and epoch
    first, again, *others = (SampleOrder(50, seed, shuffle=True).permutation(epoch).tolist() for seed, epoch in places)
    assert first == again and first not in others


def test_the_order_of_a_seed_is_the_same_on_every_machine_and_version():
    assert SampleOrder(8, 1234, shuffle=True).permutation(0).tolist() == [4, 5, 3, 1, 2, 0, 6, 7]


@pytest.mark.parametrize(("epochs", "positions"), [(1, 10), (2, 20), (0.25, 3), (2.5, 25), (1.1, 11), (0.1 + 0.2, 3)])
def test_epochs_are_counted_in_positions_and_back(epochs, positions):
    order = SampleOrder(10, 0, shuffle=True)
    assert order.positions_in(epochs) == positions and order.epochs_at(positions) == positions / 10


@given(lengths=LENGTHS, seq_length=st.integers(10, 25))
def test_packs_hold_every_sample_once_in_order_and_are_as_full_as_greed_makes_them(lengths, seq_length):
    bounds = pack_bounds(lengths, seq_length)
    assert bounds[0] == 0 and bounds[-1] == len(lengths) and (np.diff(bounds) > 0).all()
    totals = [lengths[a:b].sum() for a, b in zip(bounds, bounds[1:], strict=False)]
    assert max(totals) <= seq_length
    firsts = lengths[bounds[1:-1]]
    assert all(total + first > seq_length for total, first in zip(totals, firsts, strict=False))


@given(lengths=LENGTHS, seed=st.integers(0, 100), shuffle=st.booleans())
def test_positions_run_through_the_packs_of_one_epoch_after_the_other(lengths, seed, shuffle):
    order = PackedOrder(SampleOrder(len(lengths), seed, shuffle), lengths, 12, "next-fit")
    first, second = order.epoch_length(0), order.epoch_length(1)
    packs = [order.samples_at(position) for position in range(first + second)]
    assert np.concatenate(packs[:first]).tolist() == order.order.permutation(0).tolist()
    assert np.concatenate(packs[first:]).tolist() == order.order.permutation(1).tolist()
    assert max(lengths[pack].sum() for pack in packs) <= 12
    assert order.positions_in(2) == first + second
    assert order.epochs_at(first + second) == 2


def packed_one_by_one(lengths: np.ndarray, seq_length: int) -> list[int]:
    """First-fit decreasing as the books have it."""
    room: list[int] = []
    packs = [0] * len(lengths)
    for sample in np.argsort(-lengths, kind="stable"):
        fits = [pack for pack, left in enumerate(room) if left >= lengths[sample]]
        pack = fits[0] if fits else len(room)
        room[pack:] = room[pack:] or [seq_length]
        room[pack] -= lengths[sample]
        packs[sample] = pack
    return packs


@given(lengths=LENGTHS, seq_length=st.integers(10, 25))
def test_first_fit_decreasing_is_that_of_the_books(lengths, seq_length):
    assert first_fit_decreasing(lengths, seq_length).tolist() == packed_one_by_one(lengths, seq_length)


@given(lengths=LENGTHS, seed=st.integers(0, 100), shuffle=st.booleans())
def test_packs_of_first_fit_decreasing_hold_each_sample_of_an_epoch_once(lengths, seed, shuffle):
    order = PackedOrder(SampleOrder(len(lengths), seed, shuffle), lengths, 12)
    for epoch in (0, 1):
        first, size = epoch * order.epoch_length(0), order.epoch_length(epoch)
        packs = [order.samples_at(first + i) for i in range(size)]
        assert sorted(np.concatenate(packs)) == list(range(len(lengths)))
        assert max(lengths[pack].sum() for pack in packs) <= 12
    assert order.locate(first + size - 1) == (1, size - 1) and order.epochs_at(first + size) == 2


def test_packs_come_in_another_order_each_epoch_and_longest_first_in_none():
    lengths = np.repeat([9, 7, 5, 3, 1], 20)
    order = PackedOrder(SampleOrder(100, 5, True), lengths, 10)
    size = order.epoch_length(0)
    first, again, second = ([order.samples_at(start + i).tolist() for i in range(size)] for start in (0, 0, size))
    longest = [lengths[pack].max() for pack in first]
    assert first == again != second and sorted(longest)[::-1] != longest


def test_packs_of_an_evaluation_stand_where_their_first_sample_stood():
    lengths = np.asarray([3, 7, 2, 8, 1, 9])
    order = PackedOrder(SampleOrder(6, 0, False), lengths, 10)
    assert [sorted(order.samples_at(i)) for i in range(3)] == [[0, 1], [2, 3], [4, 5]]


@pytest.mark.parametrize(("sigma", "most"), [(0.5, 0.005), (1.0, 0.005)])
def test_first_fit_decreasing_fills_sequences_that_next_fit_leaves_open(sigma, most):
    """Lengths of instruction data are about lognormal."""
    drawn = np.random.RandomState(0).lognormal(5, sigma, 5000)
    lengths = np.clip(drawn, 1, 1024).astype(int)
    order = SampleOrder(len(lengths), 0, True)
    packings = ("next-fit", "first-fit-decreasing")
    packs = np.asarray([PackedOrder(order, lengths, 1024, packing).epoch_length(0) for packing in packings])
    before, after = lengths.sum() / (1024 * packs)
    assert before < 0.93 and after > 1 - most


@settings(max_examples=5)
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=4), seed=st.integers(0, 9), shuffle=st.booleans())
def test_a_blend_draws_in_proportion_and_each_source_in_its_own_order(lengths, seed, shuffle):
    weights = np.arange(1, len(lengths) + 1) / 2
    order = BlendedOrder(lengths, weights, seed, shuffle)
    before, drawn = np.split(order.take(np.arange(order.num_samples + 700)), [order.num_samples - 50])
    assert order.samples_at(order.num_samples + 5).tolist() == [drawn[55]]
    starts = np.cumsum([0, *lengths])
    for source, share in enumerate(weights / weights.sum()):
        own = drawn[(drawn >= starts[source]) & (drawn < starts[source + 1])] - starts[source]
        assert abs(len(own) - 750 * share) <= 2
        done = int(((before >= starts[source]) & (before < starts[source + 1])).sum())
        expected = SampleOrder(lengths[source], seed + source, shuffle).take(np.arange(done, done + len(own)))
        assert own.tolist() == expected.tolist()


def test_a_blend_can_be_packed():
    lengths = np.asarray([5, 4, 3, 2, 1, 6])
    order = PackedOrder(BlendedOrder([4, 2], [3, 1], 1, True), lengths, 8)
    packs = [order.samples_at(i) for i in range(order.epoch_length(0))]
    drawn = np.concatenate(packs)
    assert max(lengths[pack].sum() for pack in packs) <= 8
    assert abs((drawn < 4).mean() - 0.75) < 0.001
