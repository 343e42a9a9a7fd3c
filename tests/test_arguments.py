"""What the Python interface accepts and rejects, with a ValueError of one line."""

import numpy as np
import pytest
import torch
from chains import Constant, Labelled, make

from diffusion import DiscreteDiffusion
from model import UNet
from trajectories import fill_in, filling_process, log_weights, respaced

SHAPE = (1, 8, 8)
X = torch.zeros(2, *SHAPE, dtype=torch.long)
T_1 = torch.tensor([1, 1])
HALF = torch.full((2, 2, 8, 8), 0.5)
# Two levels and the mask, five labels
DOOR = make(2, 10, model=Labelled(), transition="absorbing", image_shape=SHAPE)


def refused(words, function, *args, **kwargs):
    with pytest.raises(ValueError, match=words) as error:
        function(*args, **kwargs)
    assert "\n" not in str(error.value)


# -- the constructor ------------------------------------------------------------------------------

NO_CHAIN = torch.eye(2).expand(5, 2, 2)


@pytest.mark.parametrize(
    "kwargs, words",
    [
        ({"num_levels": 1}, r"K must be in 2\.\.256"),
        ({"timesteps": 0}, "T at least 1"),
        ({"num_levels": 11_600, "timesteps": 1}, "fit into memory"),
        ({"transition": "nonsense"}, "unknown transition"),
        ({"schedule": "nonsense"}, "not nonsense"),
        ({"loss_type": "nonsense"}, "unknown loss 'nonsense': choose from .*hybrid"),
        ({"reverse": "nonsense"}, "unknown reverse step 'nonsense': choose from .*joint"),
        ({"image_shape": (3, 32, 32)}, "one channel"),
        ({"image_shape": (32, 32)}, "image_shape"),
        ({"image_shape": (1, 0, 8)}, "image_shape"),
        ({"Q": NO_CHAIN}, "timesteps"),
        ({"timesteps": 4, "Q": NO_CHAIN, "transition": "uniform"}, "not both"),
        ({"timesteps": 4, "Q": NO_CHAIN, "schedule": "cosine"}, "not both"),
    ],
)
def test_chains_that_are_refused(kwargs, words):
    refused(words, DiscreteDiffusion, Constant(2), **kwargs)


@pytest.mark.parametrize(
    "levels, states, kwargs, words",
    [
        (2, 2, {"transition": "absorbing"}, "network has num_states = 2, the chain has 3"),
        (2, 3, {}, "network has num_states = 3, the chain has 2"),
        (4, 4, {"num_levels": 8}, "network has num_levels = 4, the chain has 8"),
    ],
)
def test_networks_for_other_chains_are_refused(levels, states, kwargs, words):
    network, chain = UNet(levels, states, (8, 8, 8)), DiscreteDiffusion(Constant(2), **kwargs)
    refused(words, DiscreteDiffusion, network, **kwargs)
    refused(words, chain.around, network)


@pytest.mark.parametrize("given", [0, 21, -1, [], [5], [0, 20], [5, 5, 20], [9, 5, 20], [5, 21]])
def test_respacing_refuses_other_timesteps(given):
    refused("20", respaced, make(2, 20), given)


# -- images ---------------------------------------------------------------------------------------

BAD_IMAGES = {
    "float": X.float(),
    "colour": X.expand(2, 3, 8, 8),
    "no channel": X[:, 0],
    "no batch": X[0],
    "negative": X - 1,
    "too high": X + 3,
}


@pytest.mark.parametrize("x", BAD_IMAGES.values(), ids=BAD_IMAGES.keys())
@pytest.mark.parametrize(
    "method, name",
    [
        (lambda x: DOOR.q_x_t(x, T_1), "x_0"),
        (lambda x: DOOR.q_sample(x, T_1), "x_0"),
        (lambda x: DOOR.loss(x), "x_0"),
        (lambda x: DOOR.L_T(x), "x_0"),
        (lambda x: DOOR.L_t_minus_1(x, X, T_1), "x_0"),
        (lambda x: DOOR.variational_bound(x), "x_0"),
        (lambda x: log_weights(DOOR, x, 1), "x_0"),
        (lambda x: DOOR.q_posterior(x, HALF, T_1), "x_t"),
        (lambda x: DOOR.x_0_logits(x, T_1), "x_t"),
        (lambda x: DOOR.p_theta(x, T_1), "x_t"),
        (lambda x: DOOR.p_sample(x, T_1), "x_t"),
        (lambda x: DOOR.L_t_minus_1(X, x, T_1), "x_t"),
    ],
)
def test_other_images_are_refused(method, name, x):
    refused(rf"^{name} must be (integers|in 0..{1 if name == 'x_0' else 2},)", method, x)


def test_the_mask_is_a_state_and_no_level():
    mask = X + 2
    assert DOOR.x_0_logits(mask, T_1).shape == (2, 2, 8, 8)
    refused(r"x_0 must be in 0\.\.1, got 2\.\.2", DOOR.q_sample, mask, T_1)


@pytest.mark.parametrize("shape", [(1, 16, 16), (1, 8, 16), (1, 4, 4)])
@pytest.mark.parametrize(
    "method",
    [
        lambda x: DOOR.loss(x),
        lambda x: DOOR.bound_terms(x),
        lambda x: DOOR.variational_bound(x),
        lambda x: log_weights(DOOR, x, 1),
        lambda x: fill_in(DOOR, x, 2),
        lambda x: filling_process(DOOR, x, 2),
    ],
)
def test_images_of_another_size_are_refused(method, shape):
    refused(r"must be integers \[.*, 1, 8, 8\]", method, torch.zeros(2, *shape, dtype=torch.long))


def test_images_that_the_network_can_not_fold_are_refused():
    d = DiscreteDiffusion(UNet(channels=(8, 8, 8)), timesteps=2, image_shape=(1, 28, 28))
    refused(r"multiples of 8, got .*28, 28", d.sample, 1)


class Neighbours(torch.nn.Module):
    """Exact logits that depend on the pixels above and to the left."""

    def forward(self, x_t, t):
        above, left = x_t.roll(1, 2).double(), x_t.roll(1, 3).double()
        return torch.cat([above - left, 2 * left], dim=1)


LAYOUTS = {
    "transposed": lambda x: x.mT.contiguous().mT,
    "sliced": lambda x: x.repeat_interleave(2, 3)[..., ::2],
    "reversed batch": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "channels last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("transition", ["uniform", "absorbing"])
def test_layout_in_memory_does_not_matter(layout, transition):
    """Non-contiguous images, probabilities and uniforms give the same results."""
    shape = (1, 4, 6)
    d = make(2, 4, None, Neighbours(), transition=transition, image_shape=shape)
    generator = torch.Generator().manual_seed(0)
    x_0 = torch.randint(0, 2, (3, *shape), generator=generator)
    u = torch.rand(x_0.shape, generator=generator)
    probs = torch.rand(3, 2, *shape[1:], generator=generator)
    t = torch.tensor([1, 2, 4])
    x_t = d.q_sample(x_0, t, u)
    known = x_0.masked_fill(u < 0.5, -1)
    for name, method in {
        "q_sample": lambda f: d.q_sample(f(x_0), t, f(u)),
        "q_posterior": lambda f: d.q_posterior(f(x_t), f(probs), t),
        "p_theta": lambda f: d.p_theta(f(x_t), t),
        "p_sample": lambda f: d.p_sample(f(x_t), t, f(u)),
        "L_t_minus_1": lambda f: d.L_t_minus_1(f(x_0), f(x_t), t),
        "loss": lambda f: d.loss(f(x_0), t, f(u)),
        "bound": lambda f: d.variational_bound(f(x_0), 2, generator.manual_seed(1)),
        "weights": lambda f: log_weights(d, f(x_0), 2, generator.manual_seed(1), batch_size=4),
        "fill_in": lambda f: fill_in(d, f(known), 3, particles=2),
    }.items():
        other = method(layout)
        torch.testing.assert_close(other, method(lambda x: x), equal_nan=True, msg=name)


@pytest.mark.parametrize("num_t", [None, 3])
def test_nothing_to_do(num_t):
    """An empty batch has empty bounds and weights, and its loss is an error."""
    none, y = X[:0], T_1[:0]
    assert DOOR.variational_bound(none, num_t, y=y).shape == (0,)
    assert DOOR.bound_terms(none, num_t).terms.shape == (0, (num_t or 9) + 1)
    assert log_weights(DOOR, none, 3, y=y).shape == (0, 3)
    refused("x_0 is an empty batch", DOOR.loss, none)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_posterior_computes_in_float32(dtype):
    """At small t levels flip too rarely for half precision, which would be certain."""
    d = make(2, 1000)
    x_t, t = torch.tensor([0, 1]).view(1, 1, 1, 2).expand(3, -1, -1, -1), torch.tensor([1, 2, 9])
    probs = torch.tensor([0.3, 0.7]).view(1, 2, 1, 1).expand(3, -1, 1, 2).to(dtype)
    p = d.q_posterior(x_t, probs, t)
    assert p.dtype == torch.float32 and p.min() > 0
    torch.testing.assert_close(p, d.q_posterior(x_t, probs.float(), t), rtol=0, atol=0)


# -- timesteps, labels, guidance ------------------------------------------------------------------


@pytest.mark.parametrize(
    "t", [[0, 1], [11, 1], [-1, 1], [1.0, 2.0], [1], [1, 1, 1], [[1], [1]], 1], ids=str
)
def test_other_timesteps_are_refused(t):
    """t is in 1..T, one per image; only q(x_t | x_0) takes t = 0, clean data."""
    t = torch.tensor(t)
    methods = [
        lambda: DOOR.q_posterior(X, HALF, t),
        lambda: DOOR.x_0_logits(X, t),
        lambda: DOOR.p_theta(X, t),
        lambda: DOOR.p_sample(X, t),
        lambda: DOOR.loss(X, t),
        lambda: DOOR.L_t_minus_1(X, X, t),
    ]
    if t.tolist() == [0, 1]:
        assert torch.equal(DOOR.q_sample(X, t)[0], X[0])
    else:
        methods += [lambda: DOOR.q_x_t(X, t), lambda: DOOR.q_sample(X, t)]
    for method in methods:
        refused(r"^t must be", method)


def with_labels(y, guidance=0.0, d=DOOR):
    """All methods that take labels or, with guidance, those that take it."""
    methods = [
        lambda: d.x_0_logits(X, T_1, y, guidance),
        lambda: d.p_sample(X, T_1, torch.full(X.shape, 0.3), y, guidance),
        lambda: d.sample(2, y=y, guidance=guidance),
        lambda: torch.stack(list(d.reverse_process(2, y=y, guidance=guidance))),
        lambda: fill_in(d, X - 1, 2, y=y, guidance=guidance, particles=2),
        lambda: filling_process(d, X, 2, y=y, guidance=guidance, particles=2),
    ]
    if guidance:
        return methods
    generator = torch.Generator()
    return [
        *methods,
        lambda: d.loss(X, T_1, torch.full(X.shape, 0.3), y),
        lambda: d.variational_bound(X, 1, generator.manual_seed(0), y),
        lambda: log_weights(d, X, 1, generator.manual_seed(0), y),
    ]


@pytest.mark.parametrize("y", [[0, 5], [-2, 0], [0], [0, 1, 2], [0.0, 1.0], [[0], [1]]], ids=str)
def test_other_labels_are_refused(y):
    """Labels are 0..4 or -1, one per image."""
    for method in (*with_labels(torch.tensor(y)), *with_labels(y, 1.0)):
        refused(r"^y must be", method)


def test_labels_for_a_network_without_are_refused():
    for method in with_labels(torch.tensor([0, 1]), d=make(2, 10, image_shape=SHAPE)):
        refused(r"^y must be", method)


@pytest.mark.parametrize("guidance", [0.0, 0.5])
@pytest.mark.parametrize("kind", [list, np.array, lambda y: np.array(y, np.int32), torch.tensor])
def test_labels_of_any_kind(kind, guidance):
    labels = torch.tensor([3, -1])
    expected = with_labels(labels, guidance)
    for method, same in zip(with_labels(kind([3, -1]), guidance), expected, strict=True):
        assert torch.equal(method(), same())


@pytest.mark.parametrize("guidance", [-1.0, -1e-9, float("inf"), float("nan")])
def test_other_guidance_is_refused(guidance):
    for method in with_labels(torch.tensor([0, 1]), guidance):
        refused("guidance must be finite", method)


def test_guidance_without_labels_is_refused():
    for method in with_labels(None, 0.5):
        refused(r"guidance .* with labels y", method)


# -- known pixels and numbers ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", [lambda known: known.numpy(), lambda known: known.tolist()])
def test_known_pixels_of_any_kind(kind):
    known = X - torch.eye(8, dtype=torch.long)
    for function in (fill_in, filling_process):
        got = function(DOOR, kind(known), 2, particles=2)
        assert torch.equal(got, function(DOOR, known, 2, particles=2))


NUMBERS = [
    {"n": 0},
    {"batch_size": 0},
    {"seed": -1},
    {"seed": 2**32},
    {"seed": None},
    {"seed": 1.5},
    {"first": -1},
    {"first": 0.5},
]


@pytest.mark.parametrize("kwargs", NUMBERS, ids=str)
@pytest.mark.parametrize(
    "function",
    [DOOR.sample, lambda **kwargs: fill_in(DOOR, X[:1], **kwargs)],
    ids=["sample", "fill"],
)
def test_other_numbers_are_refused(function, kwargs):
    ((name, value),) = kwargs.items()
    refused(rf"{name}.* must be .*got .*{value}", function, **{"n": 1} | kwargs)


def test_shapes_that_do_not_go_together():
    """No silent broadcasting, and no error about singleton dimensions."""
    for x_0, x_t in ((X[:1], X), (X, X[:1]), (X, X[..., :4])):
        with pytest.raises(ValueError, match=r"^(x_t|t) must be integers"):
            DOOR.L_t_minus_1(x_0, x_t, torch.ones(len(x_t), dtype=torch.long))
    for num_t in (0, -1):
        with pytest.raises(ValueError, match="num_t must be at least 1"):
            DOOR.variational_bound(X, num_t)
    with pytest.raises(ValueError, match="known must be integers"):
        fill_in(DOOR, torch.tensor(0), 1)
    assert torch.equal(DOOR.q_x_t(X, [3, 4]), DOOR.q_x_t(X, torch.tensor([3, 4])))
