"""Log-weights of trajectories, against sums over all trajectories; their summary."""

import itertools
import math

import numpy as np
import pytest
import torch
from chains import Constant, seeded
from enumeration import NAMES, Enumeration, small_chain

from diffusion import DiscreteDiffusion
from metrics import summarize_gain
from model import UNet
from trajectories import fill_in, importance_weighted, log_weights, walk
from transitions import draw

pytestmark = pytest.mark.filterwarnings("ignore:bar_Q")


def log_weights_of(monkeypatch, e, image, paths, partial=False):
    """The log-weights of these walks, [n], or their partial sums, [T + 1, n]."""
    x = torch.from_numpy(e.states[paths]).view(len(paths), e.T + 1, 1, 1, e.D)
    steps = iter(x.unbind(1))
    monkeypatch.setattr("trajectories.draw", lambda q, u, mode=False: next(steps))
    x_0 = torch.from_numpy(e.states[image]).view(1, 1, 1, -1).expand(len(paths), -1, -1, -1)
    y = None if e.y is None else torch.full((len(paths),), e.y)
    if partial:
        uniforms = lambda: torch.rand(x_0.shape, dtype=torch.float64)  # noqa: E731
        return torch.stack([log_w for _, log_w in walk(e.d, x_0, uniforms, y)])
    return log_weights(e.d, x_0, 1, y=y, batch_size=len(paths))[:, 0]


CASES = [*((name, None) for name in NAMES), ("labels", 0), ("labels", 1)]


@pytest.mark.parametrize("name, y", CASES)
def test_weights_of_every_trajectory(name, y, monkeypatch):
    """Each is p(x_{0:T}) / q(x_{1:T} | x_0), and the mean over q is p(x_0)."""
    e = Enumeration(small_chain(name), y=y)
    likelihood = e.law()
    assert likelihood.sum() == pytest.approx(1)
    for image in e.images:
        paths, q, w = e.walks(e.states[image])
        assert q.sum() == pytest.approx(1) and set(paths[:, -1]) == {image}
        log_w = log_weights_of(monkeypatch, e, image, paths)
        assert log_w.dtype == torch.float64
        np.testing.assert_allclose(log_w, np.log(w), atol=1e-10)
        assert q @ log_w.exp().numpy() == pytest.approx(likelihood[image], abs=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_mean_log_weight_is_the_bound_term_by_term(name, monkeypatch):
    """At x_T the mean is -L_T, and step t adds the mean of -L_{t-1} over x_t ~ q(x_t | x_0)."""
    e = Enumeration(small_chain(name))
    for image in e.images:
        paths, q, _ = e.walks(e.states[image])
        log_w = log_weights_of(monkeypatch, e, image, paths, partial=True)
        x_0 = torch.from_numpy(e.states[image]).view(1, 1, 1, -1)
        means = [q @ log_w[0].numpy(), *(q @ step.numpy() for step in log_w.diff(dim=0))]
        assert means[0] == pytest.approx(-e.d.L_T(x_0).item(), abs=1e-12)
        for t, mean in zip(range(e.T, 0, -1), means[1:], strict=True):
            pixels = [e.bar_Q[t][a, e.states[:, i]] for i, a in enumerate(e.states[image])]
            weight = np.prod(pixels, axis=0)
            x_t = torch.from_numpy(e.states[weight > 0])[:, None, None]
            time = torch.full((len(x_t),), t)
            logits = e.d.x_0_logits(x_t, time).double()
            terms = e.d.L_t_minus_1(x_0.expand(len(x_t), -1, -1, -1), x_t, time, logits)
            assert mean == pytest.approx(-weight[weight > 0] @ terms.numpy(), abs=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_drawn_weights_follow_their_distribution(name):
    """Two images, batch sizes that divide neither: log w has the enumerated distribution."""
    e, n = Enumeration(small_chain(name)), 4000
    images = [e.images[0], e.images[-1]]
    x_0 = torch.from_numpy(e.states[images])[:, None, None]
    drawn = log_weights(e.d, x_0.byte(), n, seeded(), batch_size=999)
    assert drawn.shape == (2, n)
    for image, log_w in zip(images, drawn.numpy(), strict=True):
        _, q, w = e.walks(e.states[image])
        grid = np.quantile(np.log(w), np.linspace(0.01, 0.99, 50)) + 1e-6
        exact = np.array([q[np.log(w) <= point].sum() for point in grid])
        distance = np.abs((log_w[:, None] <= grid).mean(0) - exact).max()
        assert distance < 2.2 / n**0.5  # Kolmogorov: once in 10,000
        assert log_w.std() > 0.1


@pytest.mark.parametrize("name", NAMES)
def test_importance_weighted_bound_falls_towards_the_likelihood(name):
    """Summed over all pairs and triples of trajectories: larger K gives a tighter bound."""
    d = small_chain(name, D=1)
    e = Enumeration(d, D=1)
    likelihood = e.law()
    for image in e.images:
        _, q, w = e.walks(e.states[image])
        bounds = []
        for K in (1, 2, 3):
            rows = np.array(list(itertools.product(range(len(q)), repeat=K)))
            weighted = importance_weighted(torch.from_numpy(np.log(w))[rows])
            bounds.append(weighted.numpy() @ q[rows].prod(1))
        assert bounds[0] == pytest.approx(-(q @ np.log(w)))
        assert bounds[0] > bounds[1] > bounds[2] > -np.log(likelihood[image])


def test_importance_weighted_by_hand():
    log_w = torch.tensor([[0.0, math.log(3)], [-1000, -1000], [-math.inf, 0]], dtype=torch.float64)
    assert importance_weighted(log_w).tolist() == pytest.approx([-math.log(2), 1000, math.log(2)])


def test_what_the_model_rules_out_has_weight_zero():
    """Not NaN: the network says that a pixel is never 1, but the walk must end in 1."""

    never = Constant(2, torch.tensor([0.0, -math.inf]))
    d = DiscreteDiffusion(never, timesteps=4, image_shape=(1, 1, 1))
    x_0 = torch.tensor([0, 1]).view(2, 1, 1, 1)
    log_w = log_weights(d, x_0, 5)
    assert log_w[0].isfinite().all() and (log_w[1] == -math.inf).all()
    assert importance_weighted(log_w)[1] == math.inf


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("reverse", ["mixture", "joint"])
def test_weights_on_cuda_are_those_on_the_cpu(reverse):
    """The walk runs in float64 on the GPU, with noise from the CPU."""
    torch.manual_seed(0)
    network = UNet(channels=(8, 8, 8), num_labels=10)
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.1)
    d = DiscreteDiffusion(network, timesteps=20, reverse=reverse)
    x_0, y = torch.randint(0, 2, (6, 1, 32, 32)), torch.arange(6)
    on_cpu = log_weights(d, x_0, 3, seeded(), y, batch_size=4)
    other = log_weights(d, x_0, 3, seeded(), y + 1, batch_size=4)
    on_gpu = log_weights(d.cuda(), x_0.cuda(), 3, seeded(), y, batch_size=4)
    assert on_gpu.device.type == "cpu" and torch.allclose(on_gpu, on_cpu, rtol=1e-3)
    assert not torch.allclose(on_gpu, other, rtol=1e-2)
    known = x_0.masked_fill(torch.rand(x_0.shape) < 0.5, -1).cuda()
    filled = fill_in(d, known, 6, y=y, particles=3)
    assert torch.equal(torch.where(known.cpu() < 0, filled, known.cpu()), filled)
    network.unfold[-1].bias.data.fill_(math.nan)
    with pytest.raises(ValueError, match="not finite"):
        log_weights(d, x_0, 1)


def test_weights_are_drawn_in_double_precision(monkeypatch):
    """float32 uniforms are multiples of 6e-8: rare jumps would be too frequent."""
    rounded = []

    def spy(q, u, mode=False):
        rounded.extend([torch.equal(q, q.float().double()), torch.equal(u, u.float().double())])
        return draw(q, u)

    monkeypatch.setattr("trajectories.draw", spy)
    log_weights(small_chain("uniform-mutual_info"), torch.zeros(9, 1, 1, 2, dtype=torch.long), 2)
    assert rounded[:6] == [False] * 6  # the last draw is of x_0, which is certain


@pytest.mark.parametrize("kwargs", [{"trajectories": 0}, {"trajectories": 1, "batch_size": 0}])
def test_log_weights_refuses_bad_numbers(kwargs):
    with pytest.raises(ValueError):
        log_weights(small_chain("labels"), torch.zeros(1, 1, 1, 2, dtype=torch.long), **kwargs)
    with pytest.raises(ValueError, match=r"0\.\.1"):
        log_weights(small_chain("labels"), torch.full((1, 1, 1, 2), 2), 1)


# --------------------------------------------------------------------------------------------------
# The gain in numbers


def test_gain_by_hand():
    """Two images, three trajectories: k = 1 gains nothing, k = 2 uses two, k = 3 all."""
    w = torch.tensor([[1.0, 3.0, 1.0], [2.0, 2.0, 2.0]], dtype=torch.float64)
    bound = {"nats_per_image": 5.0, "standard_error": 0.3}
    result = summarize_gain(w.log(), bound)
    rows = result["by_trajectories"]
    assert result["images"] == 2 and [row["trajectories"] for row in rows] == [1, 2, 3]
    gains = [0, (math.log(2) - math.log(3) / 3) / 2, (math.log(5 / 3) - math.log(3) / 3) / 2]
    assert [row["gain"] for row in rows] == pytest.approx(gains, abs=1e-12)
    errors = [row["gain_standard_error"] for row in rows]
    assert errors == pytest.approx(gains, abs=1e-12)  # of 0 and twice the mean
    assert [row["nats_per_image"] for row in rows] == pytest.approx([5 - gain for gain in gains])
    errors = [math.hypot(0.3, gain) for gain in gains]
    assert [row["standard_error"] for row in rows] == pytest.approx(errors)
    w = torch.tensor([[1.0, 3, 1, 1], [2, 2, 2, 2]], dtype=torch.float64)
    four = summarize_gain(w.log(), bound)["by_trajectories"]
    assert [row["trajectories"] for row in four] == [1, 2, 4]
    groups = (math.log(2) + math.log(1)) / 2 - math.log(3) / 4
    assert four[1]["gain"] == pytest.approx(groups / 2)  # from both groups of two
