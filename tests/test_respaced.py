"""Chains of fewer timesteps."""

import itertools

import numpy as np
import pytest
import torch
from chains import LEGAL, RandomNetwork, make

from trajectories import respaced

pytestmark = pytest.mark.filterwarnings("ignore:bar_Q")


@pytest.mark.parametrize("transition, schedule, K", LEGAL)
def test_respaced_matrices(transition, schedule, K):
    """Each step is the product of the skipped steps; bar_Q is unchanged."""
    full = make(K, 20, schedule, transition=transition)
    cases = [(1, [20]), (4, None), (19, None), (20, list(range(1, 21)))]
    for given, kept in [*cases, ([2, 3, 20], [2, 3, 20]), ((2, 3, 20), [2, 3, 20])]:
        d = respaced(full, given)
        kept = kept or d.network_t.tolist()[1:]
        assert d.network_t.tolist() == [0, *kept]
        assert d.timesteps == len(kept) and d.model is full.model
        assert kept == sorted(set(kept)) and kept[0] > 0 and kept[-1] == 20
        assert len(kept) == (given if isinstance(given, int) else 3)
        for i, (before, t) in enumerate(itertools.pairwise([0, *kept])):
            rows = np.eye(d.num_states)
            for s in range(before + 1, t + 1):
                rows = rows @ full.Q[s].numpy()
            np.testing.assert_allclose(d.Q[i + 1], rows, atol=1e-12)
            np.testing.assert_allclose(d.bar_Q[i + 1], full.bar_Q[t], atol=1e-12)


def test_a_number_of_timesteps_is_spread_evenly_over_what_is_lost():
    """Closed forms: alpha_bar = cos(...) at the kept timesteps, and 1 - t/T, linear in t."""
    few = respaced(make(2, 20, "mutual_info", transition="absorbing"), 4)
    assert few.network_t.tolist() == [0, 5, 10, 15, 20]
    t = respaced(make(2, 200, "cosine"), 15).network_t.double()
    alpha_bar = torch.cos((t / 200 + 0.008) / 1.008 * torch.pi / 2)
    lost = 1 - alpha_bar / alpha_bar[0]
    assert (lost - torch.arange(16) / 15).abs().max() < 0.005  # half of the largest step of 200


def test_gaussian_timesteps_are_spread_evenly_over_how_far_pixels_move():
    """Not over changed pixels: nearly all change in the first third, but only slightly."""
    d = make(32, 200, "cosine", transition="gaussian")
    few, distance = respaced(d, 10), abs(np.subtract.outer(np.arange(32), np.arange(32)))
    moved = [(d.bar_Q[t].numpy() * distance).sum(1).mean() for t in few.network_t]
    np.testing.assert_allclose(moved, np.linspace(0, 1, 11) * (32**2 - 1) / (3 * 32), atol=0.15)


def test_respacing_again_and_by_nothing():
    network = RandomNetwork(2, 2, 20)
    full = make(2, 20, model=network, reverse="joint", image_shape=(1, 1, 2))
    again = respaced(respaced(full, list(range(2, 21, 2))), [1, 5, 10])
    assert again.network_t.tolist() == [0, 2, 10, 20] and again.reverse == "joint"
    assert torch.allclose(again.Q, respaced(full, [2, 10, 20]).Q)
    assert torch.equal(respaced(full, 20).sample(50), full.sample(50))


def test_respacing_keeps_the_other_settings():
    d = make(2, 20, loss_type="hybrid", hybrid_weight=0.3, image_shape=(1, 8, 16))
    d = respaced(d, 7)
    assert (d.loss_type, d.hybrid_weight, d.image_shape) == ("hybrid", 0.3, (1, 8, 16))
    assert d.num_levels == 2


@pytest.mark.parametrize("given", [np.int64(2), torch.tensor(2)])
def test_respacing_takes_numbers_of_any_kind(given):
    few = respaced(make(2, 20), given)
    assert few.network_t.tolist() == respaced(make(2, 20), 2).network_t.tolist()
