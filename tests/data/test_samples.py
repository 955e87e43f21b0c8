"""Which sample each position of training has: the order of epochs, packs of short samples, blends of sources."""

import zlib
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_peft.data.samples import (
    BlendedOrder,
    PackedOrder,
    SampleOrder,
    first_fit_decreasing,
    pack_bounds,
    stable_order,
)

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
    # On every machine and with every version of numpy.
    assert SampleOrder(8, 1234, shuffle=True).permutation(0).tolist() == [4, 5, 3, 1, 2, 0, 6, 7]


@pytest.mark.parametrize(("epochs", "positions"), [(1, 10), (2, 20), (0.25, 3), (2.5, 25), (1.1, 11), (0.1 + 0.2, 3)])
def test_epochs_are_counted_in_positions_and_back(epochs, positions):
    order = SampleOrder(10, 0, shuffle=True)
    assert order.positions_in(epochs) == positions and order.epochs_at(positions) == positions / 10


@given(keys=st.lists(st.integers(0, 7), max_size=40).map(partial(np.asarray, dtype=np.int32)))
def test_a_stable_order_has_the_bounds_of_each_key(keys):
    order, bounds = stable_order(keys, 8)
    assert order.dtype == np.int32 and order.tolist() == np.argsort(keys, kind="stable").tolist()
    assert bounds.tolist() == [int((keys < key).sum()) for key in range(9)]


def test_an_epoch_of_packs_is_the_one_that_earlier_versions_drew():
    """A resumed run continues with it, on every machine and with every version of numpy."""
    lengths = np.random.RandomState(3).randint(1, 65, 5000)
    digests = {}
    for packing in ("first-fit-decreasing", "next-fit"):
        for shuffle in (True, False):
            order = PackedOrder(SampleOrder(5000, 11, shuffle), lengths, 64, packing)
            packs = [order.samples_at(order.epoch_length(0) + i).tolist() for i in range(order.epoch_length(1))]
            digests[packing, shuffle] = zlib.crc32(repr(packs).encode())
    assert digests == {
        ("first-fit-decreasing", True): 2080747987,
        ("first-fit-decreasing", False): 1813771525,
        ("next-fit", True): 3676059767,
        ("next-fit", False): 1608834306,
    }


def packed_one_by_one(lengths: np.ndarray, seq_length: int, packing: str) -> list[int]:
    """The pack of each sample, as the books have it."""
    room: list[int] = []
    packs = [0] * len(lengths)
    is_next_fit = packing == "next-fit"
    for sample in range(len(lengths)) if is_next_fit else np.argsort(-lengths, kind="stable"):
        looked_at = range(len(room))[-1:] if is_next_fit else range(len(room))
        pack = next((pack for pack in looked_at if room[pack] >= lengths[sample]), len(room))
        room[pack:] = room[pack:] or [seq_length]
        room[pack] -= lengths[sample]
        packs[sample] = pack
    return packs


@given(lengths=LENGTHS, seq_length=st.integers(10, 25))
def test_packs_are_those_of_the_books(lengths, seq_length):
    sizes = np.diff(pack_bounds(lengths, seq_length))
    assert np.repeat(np.arange(len(sizes)), sizes).tolist() == packed_one_by_one(lengths, seq_length, "next-fit")
    packs = first_fit_decreasing(lengths, seq_length).tolist()
    assert packs == packed_one_by_one(lengths, seq_length, "first-fit-decreasing")


@pytest.mark.parametrize("packing", ["next-fit", "first-fit-decreasing"])
@given(lengths=LENGTHS, seed=st.integers(0, 100), shuffle=st.booleans())
def test_positions_run_through_the_packs_of_one_epoch_after_the_other(packing, lengths, seed, shuffle):
    order = PackedOrder(SampleOrder(len(lengths), seed, shuffle), lengths, 12, packing)
    first, second = order.epoch_length(0), order.epoch_length(1)
    packs = [order.samples_at(position) for position in range(first + second)]
    for epoch, drawn in enumerate(map(np.concatenate, (packs[:first], packs[first:]))):
        expected = order.order.permutation(epoch).tolist()
        assert drawn.tolist() == expected if packing == "next-fit" else sorted(drawn) == sorted(expected)
    assert max(lengths[pack].sum() for pack in packs) <= 12
    assert order.positions_in(2) == first + second and order.epochs_at(first + second) == 2
    assert order.locate(first + second - 1) == (1, second - 1)


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
