"""The order of records is a map: every epoch shows every record once, weights and shares hold, and no state is kept."""

from collections import Counter

import numpy as np
import pytest

from unclip_jax.data.order import BLOCK, make_order, permuted
from unclip_jax.data.records import DataError


@pytest.mark.parametrize("size", [1, 2, 3, 7, 101])
def test_every_epoch_is_a_permutation(size):
    order = make_order(5, (size,))
    epochs = [[order(row) for row in range(epoch * size, (epoch + 1) * size)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
    assert size < 7 or len({tuple(epoch) for epoch in epochs}) == 3
    assert size < 100 or epochs[0] != [make_order(6, (size,))(row) for row in range(size)]


def test_permutations_look_random():
    keys, size = 600, 8
    counts = np.zeros((size, size))
    neighbours = 0
    for key in range(keys):
        row = [permuted(place, size, key * 7919) for place in range(size)]
        counts[range(size), row] += 1
        neighbours += sum(abs(a - b) == 1 for a, b in zip(row, row[1:], strict=False))
    expected = keys / size
    assert ((counts - expected) ** 2 / expected).sum() < 100  # chi-squared of 49 degrees of freedom: p < 1e-4
    assert abs(neighbours / keys - 2 * (size - 1) / size) < 0.15


def test_large_sources_need_no_table():
    order = make_order(0, (10**12,))
    seen = [order(row) for row in range(10**15, 10**15 + 500)]
    assert len(set(seen)) == 500 and 0.4e12 < np.mean(seen) < 0.6e12


def test_weights_are_exact_to_one_visit_an_epoch():
    weights = np.asarray([1, 0, 2, 0.5, 1.5, 0])
    order = make_order(3, (6,), weights=weights)
    for epoch in range(40):
        counts = Counter(order(row) for row in range(6 * epoch, 6 * epoch + 6))
        assert all(np.floor(6 * w / 5) <= counts[i] <= np.ceil(6 * w / 5) for i, w in enumerate(weights))
    counts = Counter(order(row) for row in range(2400))
    assert counts[1] == counts[5] == 0 and all(abs(counts[i] - 480 * w) < 70 for i, w in enumerate(weights))


def test_equal_weights_change_nothing():
    plain, weighted = make_order(3, (97,)), make_order(3, (97,), weights=np.full(97, 0.37))
    assert [plain(row) for row in range(500)] == [weighted(row) for row in range(500)]


def test_mixtures_deal_out_exact_shares():
    order = make_order(1, (50, 20, 9), (0.6, 0.3, 0.1), np.concatenate([np.ones(50), np.arange(20.0), np.ones(9)]))
    records = np.asarray([order(row) for row in range(BLOCK)])
    shares = [((records >= low) & (records < high)).mean() for low, high in ((0, 50), (50, 70), (70, 79))]
    assert shares == pytest.approx([0.6, 0.3, 0.1], abs=1e-9)
    counts = np.bincount(records, minlength=79)
    assert counts[:50].min() == counts[:50].max() == 0.6 * BLOCK / 50
    assert np.abs(counts[50:70] - 0.3 * BLOCK * np.arange(20) / 190).max() < 25
    assert abs((records[:1000] < 50).mean() - 0.6) < 0.06  # well mixed from the first


def test_attempts_name_other_records():
    order = make_order(1, (100,))
    assert len({order(17, attempt) for attempt in range(8)}) >= 6
    assert order(17, 3) == make_order(1, (100,))(17, 3)


@pytest.mark.parametrize("weights", [[1.0, 2.0], [1.0, np.nan, 1.0], [1.0, -1.0, 1.0], [0.0, 0.0, 0.0]])
def test_wrong_weights_are_refused(weights):
    with pytest.raises(DataError, match="weights"):
        make_order(0, (3,), weights=np.asarray(weights))
    with pytest.raises(DataError, match="1 in 10,000"):
        make_order(0, (3, 3), (1.0, 1e-6))
