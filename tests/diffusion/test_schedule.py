import numpy as np
import pytest

from unclip_jax.config import DiffusionConfig
from unclip_jax.diffusion.schedule import (
    fast27_timesteps,
    make_schedule,
    pair_table,
    reverse_table,
    step_table,
    strided_timesteps,
)

COSINE = make_schedule(DiffusionConfig(schedule="cosine"))
LINEAR = make_schedule(DiffusionConfig(schedule="linear"))


def test_cosine_has_the_published_values():
    expected = {0: 0.999958716, 500: 0.49228517, 957: 4.278e-3, 998: 2.4288e-6, 999: 2.4288e-9}
    for t, abar in expected.items():
        # The float32 product of 1000 factors is off by 1.3e-5 at most, the quoted digits by 1e-4.
        assert COSINE.alphas_cumprod[t] == pytest.approx(abar, rel=2e-5 if t <= 500 else 1.2e-4)
    assert 1 / np.sqrt(COSINE.alphas_cumprod[999]) == pytest.approx(20291, rel=2e-5)


def test_linear_runs_between_its_ends():
    assert LINEAR.betas[[0, -1]] == pytest.approx([1e-4, 0.02], rel=1e-6)
    assert np.ptp(np.diff(LINEAR.betas)) < 1e-8
    assert LINEAR.alphas_cumprod[-1] == pytest.approx(4.036e-5, rel=1e-3)


def test_a_shorter_linear_schedule_adds_as_much_noise():
    short = make_schedule(DiffusionConfig(schedule="linear", steps=250))
    assert short.betas.sum() == pytest.approx(LINEAR.betas.sum(), rel=1e-5)


@pytest.mark.parametrize("schedule", [COSINE, LINEAR, make_schedule(DiffusionConfig(schedule="linear", steps=10))])
def test_tables_are_float32_throughout(schedule):
    assert all(table.dtype == np.float32 for table in schedule)
    assert np.all((schedule.betas > 0) & (schedule.betas <= np.float32(0.999)))
    assert np.all(np.diff(schedule.alphas_cumprod) < 0)
    product = np.float64(1)
    for beta, abar, rest in zip(*schedule, strict=True):
        product = product * np.float64(np.float32(1) - beta)  # as torch's cumprod accumulates on a CPU
        assert abar == np.float32(product) and rest == np.float32(1) - abar


def test_one_minus_abar_differs_from_beta_at_zero_as_published_samplers_have_it():
    ratio = COSINE.betas[0] / COSINE.one_minus_alphas_cumprod[0]
    assert ratio == pytest.approx(0.99947, abs=1e-5)


def test_strided_timesteps_are_those_of_karlo():
    n25 = "999 957 916 874 832 791 749 708 666 624 583 541 500 458 416 375 333 291 250 208 166 125 83 42 0"
    assert strided_timesteps(25).tolist() == [int(t) for t in n25.split()]
    assert strided_timesteps(7).tolist() == [999, 832, 666, 500, 333, 166, 0]
    assert strided_timesteps(1).tolist() == [999]
    assert strided_timesteps(1000).tolist() == list(range(999, -1, -1))
    assert strided_timesteps(3, 10).tolist() == [9, 4, 0]  # 4.5 rounds to even


@pytest.mark.parametrize("n", [0, -3, 1001])
def test_impossible_step_counts_are_refused(n):
    with pytest.raises(ValueError, match="between 1 and 1000"):
        strided_timesteps(n)


def test_fast27():
    timesteps = fast27_timesteps()
    assert len(timesteps) == 27 and timesteps[0] == 997 and timesteps[-1] == 0
    # Sections of 10, 10, 3, 2, 2 steps, the noisiest last.
    assert np.histogram(timesteps, bins=[0, 200, 400, 600, 800, 1000])[0].tolist() == [10, 10, 3, 2, 2]
    assert np.all(np.diff(timesteps) < 0)


@pytest.mark.parametrize(("n", "bucket"), [(1, 32), (32, 32), (33, 64), (64, 64), (250, 256), (1000, 1024)])
def test_step_tables_come_in_buckets(n, bucket):
    table = step_table(strided_timesteps(n))
    assert table.t.shape == table.t_next.shape == (bucket,)
    assert table.length == n
    assert table.t[:n].tolist() == strided_timesteps(n).tolist()
    assert table.t_next[: n - 1].tolist() == table.t[1:n].tolist() and table.t_next[n - 1] == -1


def test_reverse_table_walks_back():
    down, up = step_table(strided_timesteps(25)), reverse_table(strided_timesteps(25))
    pairs = list(zip(down.t[:25].tolist(), down.t_next[:25].tolist(), strict=True))
    assert list(zip(up.t_next[:25].tolist(), up.t[:25].tolist(), strict=True)) == pairs[::-1]
    assert up.t[0] == -1 and up.t_next[24] == 999


def test_explicit_pairs_may_jump_up():
    table = pair_table([(999, 500), (500, 700), (700, -1)], capacity=3)
    assert table.t.tolist() == [999, 500, 700] and table.t_next.tolist() == [500, 700, -1]


@pytest.mark.parametrize("pairs", [[], [(5, 5)], [(5, -2)], [(9 - i, 8 - i) for i in range(9)]])
def test_impossible_tables_are_refused(pairs):
    with pytest.raises(ValueError, match="step"):
        pair_table(pairs, capacity=8)


def test_timesteps_that_do_not_descend_are_refused():
    with pytest.raises(ValueError, match="descend"):
        step_table(np.array([10, 20, 0], np.int32))
