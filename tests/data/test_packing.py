from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megatron_peft.data.packing import PackedOrder, pack_bounds

LENGTHS = st.lists(st.integers(1, 10), min_size=1, max_size=60).map(np.asarray)


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
    order = PackedOrder(lengths, 12, seed, shuffle)
    first, second = order.epoch_length(0), order.epoch_length(1)
    packs = [order.samples_at(position) for position in range(first + second)]
    assert np.concatenate(packs[:first]).tolist() == order.permutation(0).tolist()
    assert np.concatenate(packs[first:]).tolist() == order.permutation(1).tolist()
    assert max(lengths[pack].sum() for pack in packs) <= 12
    assert order.positions_in(2) == first + second
    assert order.epochs_at(first + second) == 2


def test_packing_does_not_depend_on_where_one_starts_reading():
    lengths = np.random.RandomState(0).randint(1, 10, 100)
    straight, jumping = PackedOrder(lengths, 16, 3, True), PackedOrder(lengths, 16, 3, True)
    expected = [straight.samples_at(position).tolist() for position in range(150)]
    assert [jumping.samples_at(position).tolist() for position in reversed(range(150))] == expected[::-1]
