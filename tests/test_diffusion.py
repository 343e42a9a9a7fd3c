"""The mathematics, against enumeration and closed forms that share no code with diffusion.py."""

import io
import itertools
import json
import math
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from chains import (
    LEGAL,
    Constant,
    ExactChain,
    Labelled,
    absorbing_chain,
    make,
    products,
    random_chain,
    two_masks_chain,
)
from enumeration import LIMITS, chi_square, fits

from diffusion import LOSSES, BoundTerms, DiscreteDiffusion
from model import UNet
from trajectories import fill_in, filling_process, respaced
from transitions import draw, gaussian_transitions, kl

pytestmark = pytest.mark.filterwarnings("ignore:bar_Q")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# -- the object ------------------------------------------------------------------------------------


@pytest.mark.parametrize("transition, schedule, K", LEGAL)
def test_bar_Q_is_the_product(transition, schedule, K):
    d = make(K, 50, schedule, transition=transition)
    assert d.bar_Q.dtype == d.Q.dtype == torch.float64 and d.num_states == d.Q.shape[-1]
    np.testing.assert_allclose(d.bar_Q, products(d.Q.numpy()), atol=1e-13)
    np.testing.assert_allclose(d.bar_Q.sum(-1), 1, atol=1e-15)


def test_bar_Q_of_the_papers_schedule():
    """alpha_bar_t = cos(...) to the last of 1000 products; uniform transitions are the default."""
    d = DiscreteDiffusion(Constant(2), timesteps=1000)
    for t in range(1001):
        alpha_bar = math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) / math.cos(
            0.008 / 1.008 * math.pi / 2
        )
        assert d.bar_Q[t, 0, 0] - d.bar_Q[t, 0, 1] == pytest.approx(alpha_bar, abs=1e-12)


@pytest.mark.parametrize("schedule", [None, "cosine"])
@pytest.mark.parametrize("K", [2, 8])
def test_absorbing_ends_all_masked(K, schedule):
    """L_T is exactly 0, sampling starts from the mask, levels never mix, no mask is left."""
    d = make(K, 30, schedule, transition="absorbing", image_shape=(1, 8, 8))
    assert torch.equal(d.bar_Q[30], torch.eye(K + 1, dtype=torch.float64)[[K] * (K + 1)])
    assert d.L_T(torch.zeros(1, 1, 8, 8, dtype=torch.long)).item() == 0
    assert (next(d.reverse_process(2)) == K).all()
    assert (
        d.bar_Q[:, :K, :K] - torch.diag_embed(d.bar_Q[:, :K, :K].diagonal(dim1=1, dim2=2)) == 0
    ).all()
    assert d.sample(2).max() < K


@pytest.mark.filterwarnings("default:bar_Q")
def test_linear_schedule_falls_short_and_says_so():
    """For T = 200, bar_Q[T] is [[0.566, 0.434], [0.434, 0.566]] and L_T is 8.97 nats."""
    with pytest.warns(UserWarning, match="far from stationary"):
        d = make(2, 200, "linear")
    np.testing.assert_allclose(d.bar_Q[200], [[0.566, 0.434], [0.434, 0.566]], atol=5e-4)
    stay = 0.5 + 0.5 * np.prod(1 - np.linspace(1e-4, 0.02, 200))
    L_T = 1024 * (stay * math.log(2 * stay) + (1 - stay) * math.log(2 * (1 - stay)))
    assert d.L_T(torch.ones(3, 1, 32, 32, dtype=torch.uint8)).tolist() == pytest.approx(
        [L_T] * 3, rel=1e-12
    )
    assert pytest.approx(8.97, abs=0.005) == L_T
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(2, 200)


@pytest.mark.parametrize(
    "Q, bar_Q",
    [random_chain(3, 4, 6), random_chain(3, 5, 6), two_masks_chain(3, 6)],
    ids=["one", "two", "masks"],
)
def test_own_matrices(Q, bar_Q):
    """A ready Q replaces the family. Samples show levels only, however many states there are."""
    d = DiscreteDiffusion(
        Constant(3), num_levels=3, timesteps=6, Q=torch.from_numpy(Q), image_shape=(1, 20, 20)
    )
    np.testing.assert_allclose(d.bar_Q, bar_Q, atol=1e-13)
    np.testing.assert_allclose(d.prior, bar_Q[6, :3].mean(0), atol=1e-13)
    *noisy, x_0 = d.reverse_process(5)
    assert torch.stack(noisy).max() == len(Q[0]) - 1 and x_0.max() == 2
    assert torch.equal(d.sample(5), x_0.byte())


@pytest.mark.parametrize(
    "kwargs", [{"transition": "gaussian"}, {"Q": torch.from_numpy(random_chain(3, 5, 20)[0])}]
)
def test_config_rebuilds_it_from_plain_values(kwargs):
    """The config has no numpy numbers, which torch.load(weights_only=True) would refuse."""
    given = {
        "num_levels": np.int64(3),
        "timesteps": np.int32(20),
        "image_shape": np.array([1, 8, 8]),
    }
    given |= {"loss_type": "hybrid", "hybrid_weight": np.float64(0.5)}
    d = DiscreteDiffusion(Constant(3), **given, **kwargs)
    plain = {key: value for key, value in d.config.items() if key != "Q"}
    assert {type(value) for value in plain.values()} <= {int, float, str, tuple}
    assert {type(side) for side in plain["image_shape"]} == {int}
    json.dumps(plain)
    file = io.BytesIO()
    torch.save(respaced(d, 5).config | {"of": d.config}, file)
    file.seek(0)
    shorter = torch.load(file, weights_only=True)
    again = DiscreteDiffusion(d.model, **shorter.pop("of"))
    assert again.config.keys() == d.config.keys() and torch.equal(again.Q, d.Q)
    assert (again.loss_type, again.hybrid_weight, again.image_shape) == ("hybrid", 0.5, (1, 8, 8))
    assert torch.equal(DiscreteDiffusion(d.model, **shorter).sample(3), respaced(d, 5).sample(3))


def test_around():
    """The same matrices around another network, even one without num_labels."""

    class Wrapped(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, *args):
            return -self.inner(*args)

    network = UNet(channels=(8, 8, 8), num_labels=10)
    torch.nn.init.normal_(network.own_state.bias)
    d = DiscreteDiffusion(network, timesteps=10, image_shape=(1, 8, 8))
    twin = d.around(Wrapped(network))
    assert (
        twin.Q is d.Q
        and twin.bar_Q is d.bar_Q
        and twin.prior is d.prior
        and twin.config == d.config
    )
    assert d.model is network and twin.model.inner is network
    assert twin.num_labels == respaced(twin, 3).num_labels == 10 and len(twin.labels(12)) == 12
    assert [name for name, _ in twin.named_parameters()] == [
        f"model.inner.{n}" for n, _ in network.named_parameters()
    ]
    x_t, t = torch.zeros(2, 1, 8, 8, dtype=torch.long), torch.tensor([3, 4])
    assert torch.equal(twin.x_0_logits(x_t, t), -d.x_0_logits(x_t, t))
    twin.eval()
    assert d.training and not twin.training


# -- forward noising -------------------------------------------------------------------------------


@pytest.mark.parametrize("transition, schedule, K", LEGAL)
def test_q_sample_frequencies(transition, schedule, K):
    torch.manual_seed(K)
    d = make(K, 20, schedule, transition=transition)
    for t, level in itertools.product((1, 7, 20), range(K)):
        x_t = d.q_sample(torch.full((20, 1, 50, 50), level), torch.full((20,), t))
        counts = torch.bincount(x_t.flatten(), minlength=d.num_states)
        assert fits(counts, d.bar_Q[t, level])


def test_q_sample_mixed_t_and_zeros():
    """Each image uses its own t; t = 0 changes nothing; states of probability zero never occur."""
    torch.manual_seed(0)
    Q, bar_Q = absorbing_chain(2, 4)
    d = DiscreteDiffusion(Constant(2), 2, 4, Q=torch.from_numpy(Q))
    x_0 = torch.randint(0, 2, (5, 1, 100, 100))
    x_t = d.q_sample(x_0, torch.arange(5))
    assert torch.equal(x_t[0], x_0[0]) and (x_t[4] == 2).all()
    for t in range(5):
        for level in (0, 1):
            chosen = x_t[t][x_0[t] == level]
            assert fits(torch.bincount(chosen, minlength=3), bar_Q[t, level])


def test_q_x_t_takes_every_integer_type():
    x_0 = torch.randint(0, 2, (3, 1, 4, 5), generator=seeded())
    d, t = make(2), torch.tensor([0, 7, 20])
    q = d.q_x_t(x_0, t, torch.float64)
    for b, i, j in itertools.product(range(3), range(4), range(5)):
        assert torch.equal(q[b, :, i, j], d.bar_Q[t[b], x_0[b, 0, i, j]])
    for dtype in (torch.uint8, torch.int32, torch.bool):
        assert torch.equal(d.q_x_t(x_0.to(dtype), t.int()), q.float())


def test_noising_step_by_step_is_the_jump():
    """Composing q(x_t | x_{t-1}), drawn here by torch.multinomial, gives the law of q_sample."""
    torch.manual_seed(1)
    K, t = 3, 12
    d = make(K)
    x = torch.zeros(40_000, dtype=torch.long)
    for step in range(1, t + 1):
        x = torch.multinomial(d.Q[step][x], 1)[:, 0]
    walked = torch.bincount(x, minlength=K)
    jumped = d.q_sample(torch.zeros(1, 1, 200, 200, dtype=torch.long), torch.tensor([t]))
    jumped = torch.bincount(jumped.flatten(), minlength=K)
    mean = (walked + jumped) / 80_000
    assert chi_square(walked, mean) + chi_square(jumped, mean) < LIMITS[2]


def test_draw_inverts_the_cumulative_distribution():
    """Exact borders; no state of probability zero even at the largest u, despite rounding."""
    probs = torch.tensor([0.25, 0.0, 0.5, 0.25]).view(1, 4, 1, 1)
    for u, state in [(0.0, 0), (0.2499, 0), (0.25, 2), (0.7499, 2), (0.75, 3), (1 - 2**-24, 3)]:
        assert draw(probs, torch.full((1, 1, 1, 1), u)).item() == state
    probs = torch.rand(2000, 6, 1, 1, generator=seeded())
    probs[:, -1] = 0
    probs /= probs.sum(1, keepdim=True)
    assert draw(probs, torch.full((2000, 1, 1, 1), 1 - 2**-24)).max() < 5
    probs = torch.cat([torch.zeros(2000, 1, 1, 1), probs], dim=1)
    assert draw(probs, torch.zeros(2000, 1, 1, 1)).min() > 0


@pytest.mark.parametrize("dtype, least", [(torch.float32, 1e-7), (torch.float64, 1e-15)])
def test_draw_takes_a_uniform_of_zero_for_a_small_one(dtype, least):
    """torch.rand gives a float32 zero every 17 million times: too often for probability 1e-30."""
    zero = torch.zeros(1, 1, 1, 1, dtype=dtype)
    for p, state in [(least, 0), (least / 1e3, 1), (1e-30, 1)]:
        assert draw(torch.tensor([p, 1 - p], dtype=dtype).view(1, 2, 1, 1), zero).item() == state


# -- the posterior, by brute force -----------------------------------------------------------------


def brute_force_posterior(Q, bar_Q, t, x_t, w):
    """p(x_{t-1} | x_t) under w(x_0): Bayes' rule, summed over every (x_0, x_{t-1})."""
    S, K = Q.shape[-1], len(w)
    possible = [x_0 for x_0 in range(K) if bar_Q[t][x_0, x_t] > 0]
    mass = sum(w[x_0] for x_0 in possible)
    result = np.zeros(S)
    for x_0 in possible:
        joint = np.array(
            [bar_Q[t - 1][x_0, x_before] * Q[t][x_before, x_t] for x_before in range(S)]
        )
        result += w[x_0] / mass * joint / joint.sum()
    return result


def chains():
    for transition, schedule, K in LEGAL:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            d = make(K, 6 if transition != "gaussian" else 20, schedule, transition=transition)
        yield pytest.param(K, d.Q.numpy(), d.bar_Q.numpy(), id=f"{transition}-{schedule}-{K}")
    for K in (2, 3, 5):
        yield pytest.param(K, *random_chain(K, K, 6), id=f"random-{K}")
        yield pytest.param(K, *random_chain(K, K + 2, 6, zeros=True), id=f"zeros-{K}")
        yield pytest.param(K, *two_masks_chain(K, 6), id=f"two-masks-{K}")


@pytest.mark.parametrize("K, Q, bar_Q", list(chains()))
@pytest.mark.parametrize("x_0_kind", ["one-hot", "spread"])
def test_posterior_is_bayes_rule(K, Q, bar_Q, x_0_kind):
    T, S = len(Q) - 1, Q.shape[-1]
    d = DiscreteDiffusion(Constant(K), K, T, Q=torch.from_numpy(Q))
    rng = np.random.default_rng(0)
    ws = np.eye(K) if x_0_kind == "one-hot" else rng.dirichlet(np.ones(K), 4)
    compared = 0
    for t in range(1, T + 1):
        for x_t, w in itertools.product(range(S), ws):
            if sum(w[k] for k in range(K) if bar_Q[t][k, x_t] > 0) == 0:
                continue
            probs = torch.from_numpy(w).view(1, K, 1, 1)
            got = d.q_posterior(torch.tensor([[[[x_t]]]]), probs, torch.tensor([t]))[0, :, 0, 0]
            np.testing.assert_allclose(got, brute_force_posterior(Q, bar_Q, t, x_t, w), atol=1e-12)
            compared += 1
    assert compared >= T * K


def test_posterior_pixel_layout():
    """A batch with its own t, x_t and w everywhere equals its pixels one by one."""
    torch.manual_seed(0)
    d = make(3)
    x_t, t = torch.randint(0, 3, (4, 1, 2, 5)), torch.tensor([1, 5, 19, 20])
    w = torch.rand(4, 3, 2, 5, dtype=torch.float64)
    w /= w.sum(1, keepdim=True)
    whole = d.q_posterior(x_t, w, t)
    for b, i, j in itertools.product(range(4), range(2), range(5)):
        expected = brute_force_posterior(
            d.Q.numpy(), d.bar_Q.numpy(), t[b].item(), x_t[b, 0, i, j].item(), w[b, :, i, j].numpy()
        )
        np.testing.assert_allclose(whole[b, :, i, j], expected, atol=1e-12)


@pytest.mark.parametrize("K", [8, 16])
def test_posterior_stays_finite_in_float32(K):
    """Gaussian chains have likelihoods down to 1e-80, and dividing by them could overflow."""
    d = make(K, 100, transition="gaussian")
    x_t = torch.arange(K).view(1, 1, 1, K).expand(100, 1, 1, K)
    p = d.q_posterior(x_t, torch.full((100, K, 1, K), 1 / K), torch.arange(1, 101))
    np.testing.assert_allclose(p.sum(1), 1, atol=1e-5)


def test_bound_stays_finite_where_probabilities_underflow():
    """Gaussian kernels between far levels underflow in float32; the bound must not be infinite."""
    d = make(8, 200, transition="gaussian")
    x_0, x_t, t = torch.tensor([[[[2, 5]]]]), torch.tensor([[[[0, 0]]]]), torch.tensor([36])
    w = torch.tensor(
        [0.998, 1.1e-3, 3.1e-4, 1.0e-4, 4.0e-5, 1.5e-5, 6.2e-6, 8.3e-7]
    )  # a trained network's
    logits = w.log().view(1, 8, 1, 1).expand(1, 8, 1, 2)
    low, high = (d.L_t_minus_1(x_0, x_t, t, v).item() for v in (logits, logits.double()))
    assert low == pytest.approx(high, rel=1e-4)


def test_posterior_of_the_impossible():
    """A visible pixel of an absorbing chain was always that level. Other levels are left out."""
    d = DiscreteDiffusion(Constant(2), 2, 5, Q=torch.from_numpy(absorbing_chain(2, 5)[0]))
    x_t, t = torch.zeros(1, 1, 1, 1, dtype=torch.long), torch.tensor([2])
    assert d.q_posterior(x_t, torch.tensor([0.0, 1.0]).view(1, 2, 1, 1), t).isnan().all()
    kept = d.q_posterior(x_t, torch.tensor([0.3, 0.7]).view(1, 2, 1, 1), t)
    assert kept.flatten().tolist() == [1, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_equal_logits_are_no_certainty_in_any_precision(dtype):
    """At t = 1 a level flips with probability 6e-4, which half precision could take for zero."""
    network = Constant(2, torch.zeros(2, dtype=dtype))
    d = make(2, 1000, model=network, image_shape=(1, 1, 2))
    x, t = torch.tensor([[[[0, 1]]]]), torch.tensor([1])
    p = d.p_theta(x, t)
    assert p.dtype == torch.float32
    np.testing.assert_allclose(p, 0.5, atol=1e-6)
    assert d.L_t_minus_1(x, x, t).item() == pytest.approx(2 * math.log(2), rel=1e-6)
    assert d.bound_terms(x).L_0.item() == pytest.approx(2 * math.log(2), rel=1e-12)


def test_double():
    """`.double()` takes network, loss and sampler to float64; the numbers stay what they were."""
    torch.manual_seed(0)
    network = UNet(channels=(8, 8, 8))
    torch.nn.init.normal_(network.unfold[-1].weight, std=0.1)
    d = DiscreteDiffusion(network, timesteps=10, loss_type="hybrid", image_shape=(1, 8, 8))
    x_0, t = torch.randint(0, 2, (4, 1, 8, 8)), torch.tensor([1, 4, 7, 10])
    u = torch.rand(x_0.shape)
    single, drawn = d.loss(x_0, t, u), d.sample(4)
    double = d.double().loss(x_0, t, u)
    assert double.dtype == torch.float64 and double.item() == pytest.approx(single.item(), rel=1e-5)
    assert d.p_theta(x_0, t).dtype == torch.float64 and (d.sample(4) == drawn).float().mean() > 0.99


# -- exactness: a perfect network makes a perfect sampler and the bound that theory says -----------

EXACT = [
    ({"transition": transition, "schedule": schedule}, K)
    for transition, schedule, K in LEGAL
    if K < 5
]
EXACT += [({"Q": "random"}, 2), ({"Q": "two masks"}, 2)]
exact = pytest.mark.parametrize(
    "kwargs, K", EXACT, ids=["-".join([*kw.values(), str(K)]) for kw, K in EXACT]
)


@exact
def test_one_pixel_returns_the_data_distribution(kwargs, K):
    chain = ExactChain("pixel", K, **kwargs)
    expected = np.zeros(len(chain.states))
    expected[:K] = chain.probs
    np.testing.assert_allclose(chain.final_distribution(), expected, atol=1e-9)


@exact
@pytest.mark.parametrize("name", ["pixel", "2x2"])
def test_mean_bound_is_what_theory_says(name, kwargs, K):
    """It exceeds the entropy by the prior's and the factorization's divergence, exactly."""
    chain = ExactChain(name, K, T=20 if kwargs.get("transition") == "gaussian" else 6, **kwargs)
    base, gap = chain.theory()
    assert gap > 1e-5 if name == "2x2" else gap == pytest.approx(0, abs=1e-9)
    assert sum(chain.mean_terms()) == pytest.approx(base + gap, abs=1e-9)


@exact
def test_respaced_chain_is_exact(kwargs, K):
    """With uneven gaps, it returns the data, and its bound is the theoretical one."""
    kept = [1, 4, 5, 13, 20]
    pixel = ExactChain("pixel", K, kept=kept, **kwargs)
    np.testing.assert_allclose(pixel.final_distribution()[:K], pixel.probs, atol=1e-9)
    square = ExactChain("2x2", K, kept=kept, **kwargs)
    assert sum(square.mean_terms()) == pytest.approx(sum(square.theory()), abs=1e-9)


@pytest.mark.parametrize("transition, K", [("uniform", 2), ("absorbing", 2), ("gaussian", 3)])
def test_factorization_gap_shrinks_with_T(transition, K):
    gaps = [ExactChain("2x2", K, T, transition=transition).theory()[1] for T in (20, 50, 125)]
    assert gaps[0] > 1.5 * gaps[1] > 2.25 * gaps[2] > 0


@pytest.mark.parametrize("transition, K", [("uniform", 2), ("uniform", 3), ("gaussian", 3)])
def test_the_joint_form_fails_the_exactness_tests(transition, K):
    """The tests above can tell: with the joint form, chain and bound are both off."""
    pixel = ExactChain("pixel", K, reverse="joint", transition=transition)
    assert np.abs(pixel.final_distribution() - pixel.probs).max() > 1e-4
    assert sum(pixel.mean_terms()) > sum(pixel.theory()) + 1e-3
    square = ExactChain("2x2", K, reverse="joint", transition=transition)
    assert sum(square.mean_terms()) > sum(square.theory()) + 1e-3


def test_joint_form_is_the_mixture_for_absorbing():
    """There q(x_t | x_0) is the same for every possible x_0, so counting it twice is harmless."""
    for T in (1, 6, 20):
        mixture, joint = (
            ExactChain("2x2", 3, T, transition="absorbing", reverse=r) for r in ("mixture", "joint")
        )
        for t in range(1, T + 1):
            np.testing.assert_allclose(
                mixture.reverse_kernel(t), joint.reverse_kernel(t), atol=1e-12
            )


@pytest.mark.parametrize(
    "reverse, schedule, expected",
    [("mixture", "cosine", 0.1000), ("joint", "cosine", 0.2488), ("mixture", "linear", 0.1025)],
)
def test_reference_figures_of_the_reverse_steps(reverse, schedule, expected):
    """P(x_0 = 1) of the one-pixel chain, started from noise, computed independently."""
    chain = ExactChain("pixel", 2, 200, reverse=reverse, schedule=schedule)
    distribution = chain.d.prior.numpy()
    for t in range(200, 0, -1):
        distribution = distribution @ chain.reverse_kernel(t)
    assert distribution[1] == pytest.approx(expected, abs=5e-5)


# -- fewer timesteps -------------------------------------------------------------------------------


@pytest.mark.parametrize("transition, schedule, K", LEGAL)
def test_respaced_matrices(transition, schedule, K):
    """A step is the product of the skipped steps; bar_Q stays the same."""
    whole = make(K, 20, schedule, transition=transition)
    for given, kept in [
        (1, [20]),
        (4, None),
        (19, None),
        (20, list(range(1, 21))),
        ([2, 3, 20], [2, 3, 20]),
    ]:
        d = respaced(whole, given)
        kept = kept or d.network_t.tolist()[1:]
        assert (
            d.network_t.tolist() == [0, *kept]
            and d.timesteps == len(kept)
            and d.model is whole.model
        )
        assert kept == sorted(set(kept)) and kept[0] > 0 and kept[-1] == 20
        assert len(kept) == (given if isinstance(given, int) else 3)
        for i, (before, t) in enumerate(itertools.pairwise([0, *kept])):
            rows = np.eye(d.num_states)
            for s in range(before + 1, t + 1):
                rows = rows @ whole.Q[s].numpy()
            np.testing.assert_allclose(d.Q[i + 1], rows, atol=1e-12)
            np.testing.assert_allclose(d.bar_Q[i + 1], whole.bar_Q[t], atol=1e-12)


def test_a_number_of_timesteps_is_spread_evenly_over_what_is_lost():
    """Closed forms: alpha_bar = cos(...) at the kept timesteps, and 1 - t/T, which is even in t."""
    assert respaced(make(2, 20, "mutual_info", transition="absorbing"), 4).network_t.tolist() == [
        0,
        5,
        10,
        15,
        20,
    ]
    t = respaced(make(2, 200, "cosine"), 15).network_t.double()
    alpha_bar = torch.cos((t / 200 + 0.008) / 1.008 * torch.pi / 2)
    lost = 1 - alpha_bar / alpha_bar[0]
    assert (lost - torch.arange(16) / 15).abs().max() < 0.005  # half of the largest step of 200


def test_gaussian_timesteps_are_spread_evenly_over_how_far_pixels_move():
    """Not over the changed pixels: nearly all change in the first third, but by little."""
    d = make(32, 200, "cosine", transition="gaussian")
    few, distance = respaced(d, 10), abs(np.subtract.outer(np.arange(32), np.arange(32)))
    moved = [(d.bar_Q[t].numpy() * distance).sum(1).mean() for t in few.network_t]
    np.testing.assert_allclose(moved, np.linspace(0, 1, 11) * (32**2 - 1) / (3 * 32), atol=0.15)


def test_respacing_again_and_by_nothing():
    network = RandomNetwork(2, 2, 20)
    whole = make(2, 20, model=network, reverse="joint", image_shape=(1, 1, 2))
    again = respaced(respaced(whole, list(range(2, 21, 2))), [1, 5, 10])
    assert again.network_t.tolist() == [0, 2, 10, 20] and again.reverse == "joint"
    assert torch.allclose(again.Q, respaced(whole, [2, 10, 20]).Q)
    assert torch.equal(respaced(whole, 20).sample(50), whole.sample(50))


def test_respacing_keeps_the_other_settings():
    d = make(2, 20, loss_type="hybrid", hybrid_weight=0.3, image_shape=(1, 8, 16))
    d = respaced(d, 7)
    assert (d.loss_type, d.hybrid_weight, d.image_shape, d.num_levels) == (
        "hybrid",
        0.3,
        (1, 8, 16),
        2,
    )


@pytest.mark.parametrize(
    "given", [np.int64(2), torch.tensor(2), (11, 20), np.array([11, 20]), torch.tensor([11, 20])]
)
def test_respacing_takes_numbers_of_any_kind(given):
    kept = respaced(make(2, 20), given).network_t.tolist()
    assert kept == respaced(make(2, 20), 2 if np.ndim(given) == 0 else [11, 20]).network_t.tolist()


# -- the bound of a network that is not perfect, against the likelihood of its whole chain ---------


class RandomNetwork(torch.nn.Module):
    """Arbitrary logits for every (x_t, t) of a two-pixel image."""

    def __init__(self, K, S, T):
        super().__init__()
        self.table = 2 * torch.randn(T + 1, S, S, K, 1, 2, dtype=torch.float64, generator=seeded())

    def forward(self, x_t, t):
        return self.table[t, x_t[:, 0, 0, 0], x_t[:, 0, 0, 1]]


@pytest.mark.parametrize("transition, schedule, K", [c for c in LEGAL if c[2] < 5])
def test_bound_and_losses_against_all_trajectories(transition, schedule, K):
    """The bound is E_q log q(x_1..x_T | x_0) / p(x_0..x_T), summed over every trajectory.

    The losses, averaged over every t and x_t, are the bound without L_T, the cross-entropy, and
    their weighted sum.
    """
    T, S = 3, K + (transition == "absorbing")
    network = RandomNetwork(K, S, T)
    kwargs = {"model": network, "image_shape": (1, 1, 2)}
    names = {"transition": transition, "schedule": schedule}
    if transition == "gaussian":  # three steps can't reach noise: wide kernels as they are
        steps = gaussian_transitions(K, torch.tensor([0.5, 1.0, 4.0], dtype=torch.float64))
        names = {"Q": torch.cat([torch.eye(K, dtype=torch.float64)[None], steps])}
    kwargs |= names
    d = make(K, T, **kwargs)
    states = list(itertools.product(range(S), repeat=2))
    N = len(states)
    x = torch.tensor(states).view(N, 1, 1, 2)
    step = [
        np.array([[np.prod([d.Q[t, a[i], b[i]] for i in (0, 1)]) for b in states] for a in states])
        for t in range(T + 1)
    ]
    back = [np.zeros((N, N))]  # back[t][x_t, x_{t-1}]
    for t in range(1, T + 1):
        possible = d.bar_Q[t, :K].numpy().max(0) > 0  # states that some level can have led to
        x_t_possible = [n for n in range(N) if possible[list(states[n])].all()]
        p = d.p_theta(x[x_t_possible], torch.full((len(x_t_possible),), t))[:, :, 0].numpy()
        kernel = np.zeros((N, N))
        kernel[x_t_possible] = [[row[b[0], 0] * row[b[1], 1] for b in states] for row in p]
        back.append(kernel)
    prior = np.array([np.prod([d.prior[s] for s in state]) for state in states])
    likelihood = prior
    for t in range(T, 0, -1):
        likelihood = likelihood @ back[t]

    trained = {name: make(K, T, loss_type=name, hybrid_weight=0.3, **kwargs) for name in LOSSES}
    for start in (n for n in range(N) if max(states[n]) < K):
        bound = 0.0
        for path in itertools.product(range(N), repeat=T):
            walk = (start, *path)
            q = np.prod([step[t][walk[t - 1], walk[t]] for t in range(1, T + 1)])
            if q > 0:
                p = prior[walk[-1]] * np.prod(
                    [back[t][walk[t], walk[t - 1]] for t in range(1, T + 1)]
                )
                bound += q * np.log(q / p)
        assert bound >= -np.log(likelihood[start]) - 1e-12

        terms, cross_entropy = 0.0, 0.0
        mean_loss = dict.fromkeys(LOSSES, 0.0)
        for t, n in itertools.product(range(1, T + 1), range(N)):
            weight = np.prod(
                [d.bar_Q[t, a, b] for a, b in zip(states[start], states[n], strict=True)]
            )
            if weight == 0:
                continue
            x_0, x_t, time = x[[start]], x[[n]], torch.tensor([t])
            terms += weight * d.L_t_minus_1(x_0, x_t, time).item()
            scores = network(x_t, time)[0, :, 0].numpy()
            log_probs = scores - np.log(np.exp(scores).sum(0))
            cross_entropy -= weight / T * np.mean([log_probs[states[start][i], i] for i in (0, 1)])
            for name, one in trained.items():
                one.q_sample = lambda *_, x_t=x_t: x_t
                mean_loss[name] += weight / T * one.loss(x_0, time).item()
        assert d.L_T(x[[start]]).item() + terms == pytest.approx(bound, abs=1e-9)
        assert mean_loss["variational"] == pytest.approx(terms / 2, abs=1e-9)
        assert mean_loss["cross_entropy"] == pytest.approx(cross_entropy, abs=1e-9)
        assert mean_loss["hybrid"] == pytest.approx(terms / 2 + T * 0.3 * cross_entropy, abs=1e-9)


# -- the bound as it is called in practice ---------------------------------------------------------


class Fixed(torch.nn.Module):
    """float32 logits that depend on t alone, and a record of what was asked."""

    def __init__(self, K, T):
        super().__init__()
        self.table, self.asked = 3 * torch.randn(T + 1, K, generator=seeded(1)), []

    def forward(self, x_t, t):
        self.asked.append((x_t, t))
        return self.table[t][:, :, None, None].expand(-1, -1, *x_t.shape[2:])


@pytest.mark.parametrize("num_t", [None, 4])
@pytest.mark.parametrize(
    "transition, schedule, K, T", [("uniform", "linear", 2, 1000), ("absorbing", None, 3, 20)]
)
def test_bound_terms_are_the_float64_sums_at_the_noise_that_was_drawn(
    transition, schedule, K, T, num_t
):
    """KL(q || p) of every pixel by Bayes' rule in float64, at the network's (x_t, t)."""
    network = Fixed(K, T)
    d = make(K, T, schedule, network, transition=transition, image_shape=(1, 4, 8))
    x_0 = torch.randint(0, K, (3, 1, 4, 8), generator=seeded(2))
    bound = d.bound_terms(x_0, num_t, seeded(3), batch_size=2)
    assert isinstance(bound, BoundTerms) and bound.terms.dtype == bound.total.dtype == torch.float64
    assert bound.t.shape == bound.terms.shape == (3, T if num_t is None else 5)
    if num_t is None:
        assert bound.t.tolist() == [list(range(1, T + 1))] * 3

    Q, bar_Q, kl = d.Q.numpy(), d.bar_Q.numpy(), {}

    def divergence(t, x_t, x_0):
        if (t, x_t, x_0) not in kl:
            w = np.exp(network.table[t].double().numpy())
            q, p = (
                brute_force_posterior(Q, bar_Q, t, x_t, v) for v in (np.eye(K)[x_0], w / w.sum())
            )
            kl[t, x_t, x_0] = (q[q > 0] * np.log(q[q > 0] / p[q > 0])).sum()
        return kl[t, x_t, x_0]

    asked = iter(network.asked)
    for rows in ([0, 1], [2]):
        for k in range(bound.t.shape[1]):
            x_t, t = next(asked)
            assert torch.equal(t, bound.t[rows, k])
            for row, noisy in zip(rows, x_t, strict=True):
                pixels = zip(noisy.flatten().tolist(), x_0[row].flatten().tolist(), strict=True)
                expected = sum(divergence(bound.t[row, k].item(), *pixel) for pixel in pixels)
                assert bound.terms[row, k].item() == pytest.approx(expected, rel=1e-10, abs=1e-12)
    with np.errstate(divide="ignore", invalid="ignore"):
        prior = bar_Q[T, :K].mean(0)
        L_T = np.nansum(bar_Q[T, :K] * np.log(bar_Q[T, :K] / prior), axis=1)[x_0.numpy()].sum(
            (1, 2, 3)
        )
    np.testing.assert_allclose(bound.L_T, L_T, rtol=1e-9, atol=1e-12)
    assert torch.equal(bound.L_0, bound.terms[:, 0])
    weight = 1 if num_t is None else (T - 1) / 4
    np.testing.assert_allclose(bound.L_t_minus_1, weight * bound.terms[:, 1:].sum(1), rtol=1e-12)


@pytest.mark.parametrize("num_t", [None, 1, 3])
def test_variational_bound_is_unbiased(num_t):
    """Each part is within 4 standard errors of the enumerated mean, and L_T is exact.

    The chain ends short of noise, so that L_T is not zero.
    """
    Q = torch.tensor([[0.9, 0.1], [0.1, 0.9]], dtype=torch.float64).repeat(9, 1, 1)
    Q[0] = torch.eye(2)
    chain = ExactChain("pixel", 2, T=8, Q=Q)
    n = 20_000
    x_0 = torch.zeros(n, 1, 1, 1, dtype=torch.long)
    x_0[: n // 10] = 1  # exactly P(x_0 = 1) = 0.1
    bound = chain.d.bound_terms(x_0, num_t, seeded())
    L_T, L_t_minus_1, L_0 = chain.mean_terms()
    assert L_T > 0.01
    assert bound.L_T.mean().item() == pytest.approx(L_T, abs=1e-12)
    for estimate, expected in ((bound.L_t_minus_1, L_t_minus_1), (bound.L_0, L_0)):
        error = (
            (estimate[: n // 10].var() * 0.1 / n + estimate[n // 10 :].var() * 0.9 / n)
            .sqrt()
            .item()
        )
        assert abs(estimate.mean().item() - expected) < 4 * error
    whole = chain.d.variational_bound(x_0, num_t, seeded())
    assert whole.shape == (n,) and whole.dtype == torch.float64
    assert torch.equal(whole, bound.L_T + bound.L_t_minus_1 + bound.L_0)


@pytest.mark.parametrize("T, N, num_t", [(11, 20, 3), (11, 20, 1), (1000, 37, 27), (2, 3, 2)])
def test_bound_terms_spread_t_evenly(T, N, num_t):
    """Where 2..T can share the draws equally they do, so the weight of the terms is right."""
    d = make(2, T, model=Fixed(2, T), image_shape=(1, 2, 2))
    x_0 = torch.randint(0, 2, (N, 1, 2, 2), generator=seeded(1))
    bound = d.bound_terms(x_0, num_t, seeded(4))
    assert bound.t.shape == (N, 1 + num_t) and (bound.t[:, 0] == 1).all()
    counts = torch.bincount(bound.t[:, 1:].flatten(), minlength=T + 1)
    assert (
        len(counts) == T + 1
        and (counts[:2] == 0).all()
        and (counts[2:] == N * num_t // (T - 1)).all()
    )
    by_t = torch.zeros(T + 1, dtype=torch.float64).index_add_(
        0, bound.t[:, 1:].flatten(), bound.terms[:, 1:].flatten()
    )
    assert bound.L_t_minus_1.mean().item() == pytest.approx(
        (by_t[2:] / counts[2:]).sum().item(), rel=1e-9
    )


def test_every_image_sees_every_t():
    """An image's own t are uniform on 2..T, one in each of num_t equal parts."""
    d, x_0 = make(2, 13, image_shape=(1, 1, 1)), torch.zeros(4, 1, 1, 1, dtype=torch.long)
    generator = seeded()
    t = torch.stack([d.bound_terms(x_0, 3, generator).t[:, 1:] for _ in range(500)])  # [500, 4, 3]
    for image in range(4):
        for part in range(3):
            counts = torch.bincount(t[:, image, part], minlength=14)
            expected = torch.zeros(14)
            expected[2 + 4 * part : 6 + 4 * part] = 1 / 4
            assert fits(counts, expected)


def test_bound_is_decided_by_its_generator():
    d = make(2, 20, model=Fixed(2, 20), image_shape=(1, 8, 8))
    x_0 = torch.zeros(3, 1, 8, 8, dtype=torch.uint8)
    torch.manual_seed(0)
    first = d.variational_bound(x_0, 2, seeded(1))
    torch.manual_seed(1)
    assert torch.equal(d.variational_bound(x_0, 2, seeded(1)), first)
    assert not torch.equal(d.variational_bound(x_0, 2, seeded(2)), first)


def test_bound_of_one_timestep():
    """L_0 alone: a network that knows nothing pays log 2 for each pixel, by hand."""
    x_0 = torch.randint(0, 2, (3, 1, 4, 4), generator=seeded())
    for num_t in (None, 1):
        bound = make(2, 1, image_shape=(1, 4, 4)).bound_terms(x_0, num_t)
        assert bound.L_t_minus_1.tolist() == [0, 0, 0]
        np.testing.assert_allclose(bound.total, 16 * math.log(2), rtol=1e-12)


def test_bound_shows_each_image_its_own_label():
    d = make(2, 4, model=Labelled(), image_shape=(1, 1, 1))
    x_0, y = torch.zeros(5, 1, 1, 1, dtype=torch.long), torch.tensor([0, 4, -1, 2, 1])
    with_labels = d.bound_terms(x_0, 2, seeded(), y, batch_size=2).terms
    assert d.model.seen.tolist() == [1]  # the last batch
    for n in range(5):  # at t = 1 the term is -log softmax(logits)[0], whatever x_1 was
        value = y[n].item() + 1
        assert with_labels[n, 0].item() == pytest.approx(math.log1p(math.exp(-3 * value)), rel=1e-9)
    assert torch.equal(
        d.variational_bound(x_0, 2, seeded(), y), d.bound_terms(x_0, 2, seeded(), y).total
    )
    np.testing.assert_allclose(d.bound_terms(x_0).L_0, math.log(2), rtol=1e-12)


def test_bound_is_infinite_where_the_model_rules_out_the_truth():
    network = Constant(2, torch.tensor([0.0, -torch.inf], dtype=torch.float64))
    d = make(2, 4, model=network, image_shape=(1, 1, 1))
    x_0 = torch.ones(1, 1, 1, 1, dtype=torch.long)
    assert d.L_t_minus_1(x_0, x_0, torch.tensor([1])).item() == math.inf
    assert d.L_t_minus_1(1 - x_0, x_0, torch.tensor([1])).item() == 0
    assert d.variational_bound(x_0).item() == math.inf


def test_kl_divergence_and_its_gradient_at_zeros():
    q = torch.tensor([0.0, 0.25, 0.75, 0.0])
    p = torch.tensor([0.0, 0.5, 0.25, 0.25], requires_grad=True)
    divergence = kl(q.log()[None], p.log()[None])
    assert divergence.item() == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(3), rel=1e-6)
    log_p = p.detach().log().requires_grad_()
    kl(q.log()[None], log_p[None]).backward()
    assert log_p.grad.tolist() == [0, -0.25, -0.75, 0]


# -- the loss --------------------------------------------------------------------------------------


def test_loss_is_cross_entropy():
    """Against -log softmax by hand, at random t and noise; it is the default loss."""
    x_0 = torch.randint(0, 3, (4, 1, 2, 2), generator=seeded())
    scores = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
    log_probs = [s - math.log(sum(math.exp(x) for x in scores.tolist())) for s in scores.tolist()]
    expected = -np.mean([log_probs[k] for k in x_0.flatten()])
    for dtype in (torch.int64, torch.uint8):
        d = make(3, model=Constant(3, scores), image_shape=(1, 2, 2))
        assert d.loss(x_0.to(dtype)).item() == pytest.approx(expected, abs=1e-12)


def test_loss_sees_what_it_is_given():
    d = make(2, image_shape=(1, 2, 2))
    x_0, t, u = (
        torch.ones(3, 1, 2, 2, dtype=torch.long),
        torch.tensor([1, 10, 20]),
        torch.full((3, 1, 2, 2), 0.4),
    )
    d.loss(x_0, t, u)
    x_t, told = d.model.seen
    assert torch.equal(told, t)
    # u = 0.4 flips a 1 to 0 exactly where bar_Q_t[1, 0] > 0.4
    assert x_t[:, 0, 0, 0].tolist() == [int(d.bar_Q[s, 1, 0] <= 0.4) for s in t]
    labelled = make(2, model=Labelled(), image_shape=(1, 2, 2))
    labelled.loss(x_0, t, u, torch.tensor([3, -1, 0]))
    assert labelled.model.seen.tolist() == [3, -1, 0]


@pytest.mark.parametrize("T, n", [(200, 128), (7, 128), (200, 3)])
def test_t_is_uniform_and_reaches_both_ends(T, n):
    torch.manual_seed(0)
    d = make(2, T)
    draws = torch.stack([d.draw_t(n) for _ in range(max(2000, 40 * T // n))])
    counts = torch.bincount(draws.flatten(), minlength=T + 1)
    assert counts[0] == 0 and len(counts) == T + 1 and (counts[1:] > 0).all()
    expected = draws.numel() / T
    assert (counts[1:] - expected).abs().max() < 5 * expected**0.5
    # Every place in the batch sees every t, and places in a batch are in no order.
    error = len(draws) ** -0.5
    assert (draws.double().mean(0) - (T + 1) / 2).abs().max() < 5 * T / 12**0.5 * error
    assert draws.amin(0).max() <= max(1, T // 50) and draws.amax(0).min() >= T - T // 50
    for other in (draws[:, :1], draws.roll(1, 1)):
        assert (draws - other).sign().double().mean(0).abs().max() < 5 * error
    # Within one batch t is spread: half of 1..T gets half of the batch, rounded up or down.
    lower = (draws <= T // 2).sum(1)
    assert (lower - n * (T // 2) / T).abs().max() <= 1
    assert torch.equal(d.draw_t(n, seeded(5)), d.draw_t(n, seeded(5)))


# -- labels and guidance ---------------------------------------------------------------------------


def test_labels():
    """One of each in turn, by the number of the image, as many as the network takes."""
    d = make(2, model=Labelled())
    assert d.labels(7).tolist() == [0, 1, 2, 3, 4, 0, 1] and d.labels(3, first=8).tolist() == [
        3,
        4,
        0,
    ]
    assert make(2).labels(7) is None


def test_guidance():
    """(1 + W) times the logits with the label, minus W times those without."""
    d = make(2, model=Labelled(), image_shape=(1, 4, 4))
    x_t, t, y = (
        torch.zeros(2, 1, 1, 1, dtype=torch.long),
        torch.tensor([3, 4]),
        torch.tensor([0, 4]),
    )
    assert d.x_0_logits(x_t, t)[:, 0].flatten().tolist() == [0, 0]
    assert d.x_0_logits(x_t, t, y)[:, 0].flatten().tolist() == [1, 5]
    assert d.x_0_logits(x_t, t, y, guidance=2.0)[:, 0].flatten().tolist() == [3, 15]
    assert d.x_0_logits(x_t, t, torch.tensor([-1, 4]), guidance=2.0)[:, 0].flatten().tolist() == [
        0,
        15,
    ]
    p = d.p_theta(x_t, t, d.x_0_logits(x_t, t, y, 2.0))
    w = torch.tensor([[3.0, -6], [15, -30]], dtype=torch.float64).softmax(1)[:, :, None, None]
    assert torch.equal(p, d.q_posterior(x_t, w, t))
    u = torch.full((2, 1, 1, 1), 0.9999)
    assert torch.equal(d.p_sample(x_t + 1, t, u, y, 2.0), draw(d.q_posterior(x_t + 1, w, t), u))
    labels = torch.tensor([0, 4, 2, 1, 0])
    whole = d.sample(5, y=labels, guidance=1.0)
    assert torch.equal(whole, d.sample(5, y=labels, guidance=1.0, batch_size=2))
    *_, x_0 = d.reverse_process(5, y=labels, guidance=1.0)
    assert torch.equal(x_0.byte(), whole)


def test_the_mode_of_the_last_step():
    """The walk is the same up to x_1. Given pixels stay, and the others are the most probable."""
    d = make(2, 6, model=Labelled(), image_shape=(1, 2, 4))
    y = torch.arange(200) % 5
    known = torch.tensor([[[[1, 0, -1, -1], [-1, -1, -1, 1]]]])
    how, few = {"y": y, "guidance": 0.5}, {"particles": 2}
    for given, process, draws in [
        (torch.zeros_like(known) - 1, d.reverse_process, d.sample),
        (known, partial(filling_process, d, known, **few), partial(fill_in, d, known, **few)),
    ]:
        *walk, drawn = process(200, **how)
        *same, x_0 = process(200, **how, last_step="mode")
        assert all(map(torch.equal, walk, same)) and not torch.equal(drawn, x_0)
        t, x_1 = torch.ones(200, dtype=torch.long), walk[-1].long()
        best = d.p_theta(x_1, t, d.x_0_logits(x_1, t, y, 0.5)).argmax(1, keepdim=True)
        assert torch.equal(x_0.long(), torch.where(given >= 0, given, best))
        assert torch.equal(draws(200, **how, last_step="mode", batch_size=7), x_0.byte())


# -- sampling --------------------------------------------------------------------------------------


def test_reverse_process_yields_every_step():
    d = make(2, 7, image_shape=(1, 4, 6))
    chain = list(d.reverse_process(3))
    assert len(chain) == 8
    assert all(x.shape == (3, 1, 4, 6) and x.dtype == torch.int64 and x.max() <= 1 for x in chain)


def test_images_have_random_streams_of_their_own():
    """Image i depends on (seed, i) alone: not on n, batch size or first. Seeds share no image."""
    d = make(2, 5, image_shape=(1, 8, 8))
    sheet = d.sample(7, seed=0)
    assert sheet.shape == (7, 1, 8, 8) and sheet.dtype == torch.uint8
    assert torch.equal(d.sample(7, seed=0, batch_size=3), sheet)
    assert torch.equal(d.sample(2, seed=0, first=4), sheet[4:6])
    torch.manual_seed(5)  # the global generator plays no part
    assert torch.equal(d.sample(3, seed=0), sheet[:3])
    everything = torch.cat([d.sample(40, seed=s) for s in range(3)]).flatten(1)
    assert len(everything.unique(dim=0)) == 120


def test_samples_of_a_perfect_network_follow_the_data():
    chain = ExactChain("2x2", 2, T=48)
    x_0 = chain.d.sample(3000, batch_size=500).flatten(1)
    codes = (x_0.long() * torch.tensor([8, 4, 2, 1])).sum(1)
    np.testing.assert_allclose(
        torch.bincount(codes, minlength=16) / 3000, chain.final_distribution(), atol=0.03
    )
    truth = np.zeros(16)
    truth[[0b0000, 0b1100, 0b1010, 0b1111, 0b1001]] = chain.probs
    np.testing.assert_allclose(chain.final_distribution(), truth, atol=0.02)


@pytest.mark.parametrize(
    "device, levels, batch", [("cpu", 2, 64), ("mps", 2, 64), ("cuda", 2, 512), ("cuda", 256, 64)]
)
def test_suitable_batch(device, levels, batch, monkeypatch):
    """Of 256 levels on a GPU, 64 images are 2**24 probabilities."""
    d = DiscreteDiffusion(torch.nn.Identity(), num_levels=levels, timesteps=2)
    monkeypatch.setattr(DiscreteDiffusion, "device", torch.device(device))
    assert d.suitable_batch() == batch
