"""The forward process, the posterior and exact chains, against enumeration and closed forms that
share no code with diffusion.py."""

import io
import itertools
import json
import math
import warnings

import numpy as np
import pytest
import torch
from chains import (
    LEGAL,
    Constant,
    ExactChain,
    absorbing_chain,
    brute_force_posterior,
    make,
    products,
    random_chain,
    seeded,
    two_masks_chain,
)
from enumeration import LIMITS, chi_square, fits

from diffusion import DiscreteDiffusion
from model import UNet
from trajectories import respaced
from transitions import draw

pytestmark = pytest.mark.filterwarnings("ignore:bar_Q")


# -- the object ------------------------------------------------------------------------------------


@pytest.mark.parametrize("transition, schedule, K", LEGAL)
def test_bar_Q_is_the_product(transition, schedule, K):
    d = make(K, 50, schedule, transition=transition)
    assert d.bar_Q.dtype == d.Q.dtype == torch.float64 and d.num_states == d.Q.shape[-1]
    np.testing.assert_allclose(d.bar_Q, products(d.Q.numpy()), atol=1e-13)
    np.testing.assert_allclose(d.bar_Q.sum(-1), 1, atol=1e-15)


def test_bar_Q_of_the_papers_schedule():
    """alpha_bar_t = cos(...), up to the last of 1000 products; uniform is the default."""
    d = DiscreteDiffusion(Constant(2), timesteps=1000)
    for t in range(1001):
        alpha_bar = math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) / math.cos(
            0.008 / 1.008 * math.pi / 2
        )
        assert d.bar_Q[t, 0, 0] - d.bar_Q[t, 0, 1] == pytest.approx(alpha_bar, abs=1e-12)


@pytest.mark.parametrize("schedule", [None, "cosine"])
@pytest.mark.parametrize("K", [2, 8])
def test_absorbing_ends_all_masked(K, schedule):
    """L_T is exactly 0, sampling starts from masks, levels never mix, and no mask remains."""
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
    """The user's Q replaces the family. Samples have only levels, however many states there are."""
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
    """No NumPy numbers, which torch.load(weights_only=True) would reject."""
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
    """The same matrices with another network, even one without num_labels."""

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
    """Each image uses its own t; t = 0 changes nothing; impossible states never occur."""
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


def test_composed_steps_match_q_sample():
    """Composing q(x_t | x_{t-1}), drawn with torch.multinomial, gives the law of q_sample."""
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
    """Exact borders; no impossible state even at the largest u, despite rounding."""
    probs = torch.tensor([0.25, 0.0, 0.5, 0.25]).view(1, 4, 1, 1)
    for u, state in [(0.0, 0), (0.2499, 0), (0.25, 2), (0.7499, 2), (0.75, 3), (1 - 2**-24, 3)]:
        assert draw(probs, torch.full((1, 1, 1, 1), u)).item() == state
    probs = torch.rand(2000, 6, 1, 1, generator=seeded())
    probs[:, -1] = 0
    probs /= probs.sum(1, keepdim=True)
    assert draw(probs, torch.full((2000, 1, 1, 1), 1 - 2**-24)).max() < 5
    probs = torch.cat([torch.zeros(2000, 1, 1, 1), probs], dim=1)
    assert draw(probs, torch.zeros(2000, 1, 1, 1)).min() > 0


@pytest.mark.parametrize("dtype, smallest", [(torch.float32, 1e-7), (torch.float64, 1e-15)])
def test_draw_treats_a_zero_uniform_as_a_small_one(dtype, smallest):
    """torch.rand gives a float32 zero every 17 million draws: too often for probability 1e-30."""
    zero = torch.zeros(1, 1, 1, 1, dtype=dtype)
    for p, state in [(smallest, 0), (smallest / 1e3, 1), (1e-30, 1)]:
        assert draw(torch.tensor([p, 1 - p], dtype=dtype).view(1, 2, 1, 1), zero).item() == state


# -- the posterior, by brute force -----------------------------------------------------------------


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
    """A batch whose t, x_t and w all vary equals its pixels one by one."""
    torch.manual_seed(0)
    d = make(3)
    x_t, t = torch.randint(0, 3, (4, 1, 2, 5)), torch.tensor([1, 5, 19, 20])
    w = torch.rand(4, 3, 2, 5, dtype=torch.float64)
    w /= w.sum(1, keepdim=True)
    batch = d.q_posterior(x_t, w, t)
    for b, i, j in itertools.product(range(4), range(2), range(5)):
        expected = brute_force_posterior(
            d.Q.numpy(), d.bar_Q.numpy(), t[b].item(), x_t[b, 0, i, j].item(), w[b, :, i, j].numpy()
        )
        np.testing.assert_allclose(batch[b, :, i, j], expected, atol=1e-12)


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
    """An unmasked pixel of an absorbing chain has always had that level; others are ignored."""
    d = DiscreteDiffusion(Constant(2), 2, 5, Q=torch.from_numpy(absorbing_chain(2, 5)[0]))
    x_t, t = torch.zeros(1, 1, 1, 1, dtype=torch.long), torch.tensor([2])
    assert d.q_posterior(x_t, torch.tensor([0.0, 1.0]).view(1, 2, 1, 1), t).isnan().all()
    kept = d.q_posterior(x_t, torch.tensor([0.3, 0.7]).view(1, 2, 1, 1), t)
    assert kept.flatten().tolist() == [1, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_equal_logits_are_not_certain_in_any_precision(dtype):
    """At t = 1 a level flips with probability 6e-4, which half precision could round to zero."""
    network = Constant(2, torch.zeros(2, dtype=dtype))
    d = make(2, 1000, model=network, image_shape=(1, 1, 2))
    x, t = torch.tensor([[[[0, 1]]]]), torch.tensor([1])
    p = d.p_theta(x, t)
    assert p.dtype == torch.float32
    np.testing.assert_allclose(p, 0.5, atol=1e-6)
    assert d.L_t_minus_1(x, x, t).item() == pytest.approx(2 * math.log(2), rel=1e-6)
    assert d.bound_terms(x).L_0.item() == pytest.approx(2 * math.log(2), rel=1e-12)


def test_double():
    """`.double()` moves network, loss and sampler to float64 without changing values."""
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


# -- exactness: a perfect network gives a perfect sampler and the theoretical bound ----------------

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
    """It exceeds the entropy by exactly the KL terms of prior and factorization."""
    chain = ExactChain(name, K, T=20 if kwargs.get("transition") == "gaussian" else 6, **kwargs)
    base, gap = chain.theory()
    assert gap > 1e-5 if name == "2x2" else gap == pytest.approx(0, abs=1e-9)
    assert sum(chain.mean_terms()) == pytest.approx(base + gap, abs=1e-9)


@exact
def test_respaced_chain_is_exact(kwargs, K):
    """Even with uneven gaps it returns the data, and its bound is the theoretical one."""
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
    """So the tests above have power: the joint form gets both chain and bound wrong."""
    pixel = ExactChain("pixel", K, reverse="joint", transition=transition)
    assert np.abs(pixel.final_distribution() - pixel.probs).max() > 1e-4
    assert sum(pixel.mean_terms()) > sum(pixel.theory()) + 1e-3
    square = ExactChain("2x2", K, reverse="joint", transition=transition)
    assert sum(square.mean_terms()) > sum(square.theory()) + 1e-3


def test_joint_form_is_the_mixture_for_absorbing():
    """q(x_t | x_0) is the same for every possible x_0, so counting it twice is harmless."""
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
    """P(x_0 = 1) of the one-pixel chain started from noise, computed independently."""
    chain = ExactChain("pixel", 2, 200, reverse=reverse, schedule=schedule)
    distribution = chain.d.prior.numpy()
    for t in range(200, 0, -1):
        distribution = distribution @ chain.reverse_kernel(t)
    assert distribution[1] == pytest.approx(expected, abs=5e-5)
