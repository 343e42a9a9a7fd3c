"""Transition matrices and noise schedules, against closed forms in plain Python."""

import itertools
import math

import numpy as np
import pytest
import torch
from chains import LEGAL, products, random_chain

from transitions import (
    FAMILIES,
    SCHEDULES,
    absorbing_transitions,
    check_transitions,
    fitted_betas,
    linear_betas,
    markov_chain,
)

pytestmark = pytest.mark.filterwarnings("ignore:bar_Q")


def transition_matrices(transition, schedule, K, T):
    return markov_chain(K, T, transition, schedule, None)[0].Q


@pytest.mark.parametrize("transition, schedule, K", LEGAL)
def test_every_family_makes_transition_matrices(transition, schedule, K):
    """[T+1, S, S] in float64, the identity at 0, rows summing to one, S - K extra states."""
    Q = transition_matrices(transition, schedule, K, 50)
    S = K + 1 if transition == "absorbing" else K
    assert Q.shape == (51, S, S) and Q.dtype == torch.float64
    assert FAMILIES[transition].extra_states == S - K
    assert torch.equal(Q[0], torch.eye(S, dtype=torch.float64))
    assert (Q >= 0).all()
    np.testing.assert_allclose(Q.sum(-1), 1, atol=1e-13)


def betas_by_hand(schedule, T):
    """The schedules as in the paper, in plain Python."""
    if schedule == "cosine":
        f = [math.cos((t / T + 0.008) / 1.008 * math.pi / 2) for t in range(T + 1)]
        return [1 - f[t] / f[t - 1] for t in range(1, T + 1)]
    if schedule == "mutual_info":
        return [1 / (T - t + 1) for t in range(1, T + 1)]
    return [1e-4 + (0.02 - 1e-4) * (t - 1) / (T - 1) for t in range(1, T + 1)]


@pytest.mark.parametrize("transition, schedule, K", [c for c in LEGAL if c[0] != "gaussian"])
def test_closed_forms(transition, schedule, K):
    """Q_t = (1 - beta_t) I + beta_t times the uniform distribution or the mask."""
    Q = transition_matrices(transition, schedule, K, 50)
    S = Q.shape[-1]
    target = np.eye(S)[[K] * S] if transition == "absorbing" else np.full((S, S), 1 / K)
    for t, beta in enumerate(betas_by_hand(schedule, 50), start=1):
        np.testing.assert_allclose(Q[t], (1 - beta) * np.eye(S) + beta * target, atol=1e-13)


@pytest.mark.parametrize("K", [3, 5, 16])
def test_gaussian_transitions(K):
    """Appendix A.2.3, entry by entry; symmetric; evenly spaced widths."""
    T, betas = 50, fitted_betas(50, K)
    Q = transition_matrices("gaussian", "fitted", K, T)
    np.testing.assert_allclose(np.diff(betas), (betas[-1] - betas[0]) / (T - 1), rtol=1e-9)
    for t in range(1, T + 1):
        scale = (K - 1) ** 2 * betas[t - 1].item()
        total = sum(math.exp(-4 * n**2 / scale) for n in range(-(K - 1), K))
        for i, j in itertools.product(range(K), repeat=2):
            if i != j:
                exact = math.exp(-4 * (i - j) ** 2 / scale) / total
                assert Q[t, i, j].item() == pytest.approx(exact, abs=1e-14)
    np.testing.assert_allclose(Q, Q.mT, atol=1e-15)
    assert Q[1, 1, 1].item() == pytest.approx(0.999, abs=1e-4)


@pytest.mark.parametrize(
    "transition, K, least",
    [("uniform", 2, 1), ("uniform", 8, 1), ("absorbing", 3, 1), ("gaussian", 5, 20)],
)
def test_default_schedules_reach_noise(transition, K, least):
    """x_T is uniform or fully masked; Gaussian transitions need a few steps for it."""
    for T in (1, 2, 20, 200):
        if least <= T:
            bar_Q_T = products(transition_matrices(transition, None, K, T).numpy())[T]
            if transition == "absorbing":
                assert (bar_Q_T[:, :K] == 0).all()
            else:
                distance = 0.5 * np.abs(bar_Q_T - 1 / K).sum(-1).max()
                assert distance <= (1e-4 if transition == "gaussian" else 1e-12)


def test_legal_combinations():
    """Each family's schedules, the default first; others raise one line."""
    listed = {transition: [] for transition, _, _ in LEGAL}
    for transition, schedule, _ in LEGAL:
        if schedule not in listed[transition]:
            listed[transition].append(schedule)
    assert {name: list(family.schedules) for name, family in FAMILIES.items()} == listed
    assert set(SCHEDULES) == {schedule for _, schedule, _ in LEGAL}
    for name, schedules in listed.items():
        for given in (None, *schedules):
            config = markov_chain(5, 20, name, given, None)[1]
            assert config == {"transition": name, "schedule": given or schedules[0]}
    illegal = {
        ("absorbing", "linear", 2): "mutual_info or cosine, not linear",
        ("gaussian", "linear", 4): "cosine or fitted, not linear",
        ("gaussian", "fitted", 2): "between 2 levels are uniform transitions",
        ("uniform", "nonsense", 2): "cosine or linear or mutual_info",
        ("nonsense", None, 2): "uniform, absorbing, gaussian",
    }
    for (transition, schedule, K), words in illegal.items():
        with pytest.raises(ValueError, match=words) as error:
            transition_matrices(transition, schedule, K, 20)
        assert "\n" not in str(error.value)


def test_chains_that_cannot_reach_noise_are_refused():
    with pytest.raises(ValueError, match="take more"):
        transition_matrices("gaussian", None, 4, 1)
    with pytest.raises(ValueError, match="masked"):
        absorbing_transitions(2, linear_betas(20, 2))


def test_ready_matrices_are_checked():
    """Invalid matrices are rejected; arrays and lists become float64 tensors."""
    Q = random_chain(3, 4, 6)[0]
    for given in (Q, torch.from_numpy(Q), Q.tolist()):
        checked = check_transitions(given, 3, 6)
        assert checked.dtype == torch.float64 and np.array_equal(checked, Q)
    assert check_transitions(torch.from_numpy(Q).float(), 3, 6).dtype == torch.float64
    negative, broken = Q.copy(), Q.copy()
    negative[2, 0, :2] = -0.5, Q[2, 0, :2].sum() + 0.5
    broken[2, 0] = np.nan
    for matrices, K, T, words in [
        (Q[[1] * 7], 3, 6, "identity"),
        (Q * 1.1, 3, 6, "summing to one"),
        (Q.transpose(0, 2, 1), 3, 6, "summing to one"),
        (negative, 3, 6, "probabilities"),
        (broken, 3, 6, "probabilities"),
        (Q, 3, 5, r"\[6, S, S\]"),
        (Q, 5, 6, "S >= 5"),
        (Q[:, :3], 3, 6, "S, S"),
        (Q[0], 3, 6, "S, S"),
    ]:
        with pytest.raises(ValueError, match=words):
            check_transitions(matrices, K, T)


def test_mutual_information_of_the_absorbing_default_falls_linearly():
    """I(x_t; x_0) = (1 - t/T) H(x_0) for masks and any distribution of x_0 (appendix A.7)."""
    T, probs = 20, np.array([0.7, 0.2, 0.1])
    entropy = -(probs * np.log(probs)).sum()
    for t, bar_Q in enumerate(products(transition_matrices("absorbing", None, 3, T).numpy())):
        joint = probs[:, None] * bar_Q[:3]
        independent, seen = probs[:, None] * joint.sum(0), joint > 0
        information = (joint[seen] * np.log(joint[seen] / independent[seen])).sum()
        assert information == pytest.approx((1 - t / T) * entropy, abs=1e-12)
