"""The training step and its parts, against the same step written out by hand."""

import math
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import trainer as trainer_module
from dataset import stream_seed
from diffusion import DiscreteDiffusion
from model import Autocast, UNet, accelerated
from trainer import (
    Muon,
    Processes,
    Recorded,
    Trainer,
    decay_start,
    learning_rate,
    move_average,
    orthogonalized,
)

SMALL = {"image_shape": (1, 16, 16)}


def small_diffusion(num_labels=10, **kwargs) -> DiscreteDiffusion:
    torch.manual_seed(0)
    network = UNet(channels=(8, 8, 8), num_labels=num_labels)
    return DiscreteDiffusion(network, timesteps=10, **SMALL | kwargs)


def batch(i: int, size: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(i)
    x_0 = torch.randint(0, 2, (size, 1, 16, 16), generator=generator, dtype=torch.uint8)
    return x_0, torch.randint(0, 10, (size,), generator=generator)


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def steps(trainer: Trainer, n: int) -> list[float]:
    return [trainer.step(*batch(i)).item() for i in range(trainer.steps, trainer.steps + n)]


# --------------------------------------------------------------------------------------------------
# The step


@pytest.mark.parametrize("decay", ["late", "cosine"])
def test_steps_are_those_written_out_by_hand(decay, monkeypatch):
    """24 steps: noise by (seed, step), label dropout, clipping, learning rate, AdamW, the average.

    The clipping norm lies between the gradient norms.
    """
    peak, total, seed, max_norm = 0.01, 24, 7, 0.3
    d = small_diffusion()
    network, average = (UNet(channels=(8, 8, 8), num_labels=10) for _ in range(2))
    network.load_state_dict(d.model.state_dict())
    optimizer = torch.optim.AdamW(network.parameters(), betas=(0.9, 0.99), weight_decay=0.3)
    monkeypatch.setattr(trainer_module, "MAX_GRAD_NORM", max_norm)
    options = {"decay": decay, "weight_decay": 0.3, "label_dropout": 0.3, "seed": seed}
    trainer = Trainer(d, total, 8, peak, **options)
    clipped = []
    for i in range(total):
        x_0, y = batch(i)
        loss = trainer.step(x_0, y)
        assert loss.ndim == 0 and not loss.requires_grad

        generator = torch.Generator().manual_seed(stream_seed(seed, 0, i))
        t = d.draw_t(8, generator)
        u = torch.rand(8, 1, 16, 16, generator=generator)
        y = torch.where(torch.rand(8, generator=generator) < 0.3, -1, y)
        x_t = (u >= d.q_x_t(x_0, t)[:, :1]).long()
        expected = F.cross_entropy(network(x_t, t, y), x_0[:, 0].long())
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)

        network.zero_grad()
        expected.backward()
        norm = torch.stack([p.grad.norm() for p in network.parameters()]).norm()
        clipped.append((norm > max_norm).item())
        for p in network.parameters():
            p.grad *= (max_norm / (norm + 1e-6)).clamp(max=1)
        warm = min(1, (i + 1) / 2)  # a tenth of 24
        late, cosine = min(1.0, (24 - i) / (0.3 * 24)), 0.5 + 0.5 * math.cos(math.pi * i / total)
        down = late if decay == "late" else cosine
        optimizer.param_groups[0]["lr"] = peak * warm * down
        assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(peak * warm * down)
        optimizer.step()
        keep = 0 if i == 0 else min(0.999, (1 + i) / (10 + i))
        with torch.no_grad():
            for a, p in zip(average.parameters(), network.parameters(), strict=True):
                a.copy_(keep * a + (1 - keep) * p)
    assert 2 < sum(clipped) < total - 2
    for name, p in network.named_parameters():
        assert torch.allclose(trainer.network.get_parameter(name), p, atol=1e-6), name
    for name, p in average.named_parameters():
        assert torch.allclose(trainer.averaged.model.get_parameter(name), p, atol=1e-6), name
    assert trainer.steps == total


def test_gradients_are_clipped_to_norm_1(monkeypatch):
    loss = DiscreteDiffusion.loss
    monkeypatch.setattr(DiscreteDiffusion, "loss", lambda *args, **told: 1000 * loss(*args, **told))
    trainer = Trainer(small_diffusion(0), 10, 8)
    trainer.step(*batch(0))
    norms = [p.grad.norm() for p in trainer.network.parameters() if p.grad is not None]
    assert torch.stack(norms).norm() == pytest.approx(1, rel=1e-3)


class Drawing(UNet):
    """A network that draws random numbers and records them. Its config doesn't rule out dropout."""

    config = None

    def forward(self, x_t, t, y=None):
        self.drawn = torch.rand(3)
        return super().forward(x_t, t, y)

    def __setattr__(self, name, value):
        if name == "config":
            value = {key: v for key, v in value.items() if key != "dropout"}
        super().__setattr__(name, value)


@pytest.mark.parametrize("part", ["seed", "step", "share"])
def test_dropout_is_a_function_of_seed_step_and_share(part):
    """It does not depend on earlier draws, and its stream is not the noise's."""
    drawn = []
    for i in (0, 0, 1):
        network = Drawing(channels=(8, 8, 8))
        d = DiscreteDiffusion(network, timesteps=10, **SMALL)
        trainer = Trainer(d, 9, 8, seed=i * (part == "seed"))
        trainer.steps, trainer.shard = i * (part == "step"), slice(4 * i * (part == "share"), 8)
        torch.rand(len(drawn))
        trainer.step(*batch(0))
        drawn.append(network.drawn)
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    noise = torch.Generator().manual_seed(stream_seed(0, 0, 0))
    assert not torch.equal(drawn[0], torch.rand(3, generator=noise))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_step_leaves_the_global_generator_alone(dropout, monkeypatch):
    """Without dropout its state is not even saved and restored, which takes time."""
    network = UNet(channels=(8, 8, 8), dropout=dropout)
    trainer = Trainer(DiscreteDiffusion(network, timesteps=10, **SMALL), 9, 8)
    before = torch.get_rng_state()
    with monkeypatch.context() as patch:
        if not dropout:
            patch.setattr(torch, "get_rng_state", lambda: pytest.fail("no need"))
        trainer.step(*batch(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_noise_is_a_function_of_seed_and_step(monkeypatch):
    """The same in a resumed run, different for every step and seed. A network without labels gets
    none."""
    seen = []

    def spy(self, x_0, t, u, y=None, loss=DiscreteDiffusion.loss):
        seen.append((t, u, y))
        return loss(self, x_0, t, u, y)

    monkeypatch.setattr(DiscreteDiffusion, "loss", spy)
    for seed, first in ((0, 0), (0, 1), (1, 0)):
        trainer = Trainer(small_diffusion(0), 10, 8, seed=seed)
        trainer.steps = first
        steps(trainer, 2)
    u = [u for _, u, _ in seen]
    assert torch.equal(u[1], u[2])  # both are step 1 of seed 0
    for a, b in ((0, 1), (0, 4), (1, 5)):
        assert not torch.equal(u[a], u[b])
    assert all(y is None for *_, y in seen)


def test_t_does_not_depend_on_the_position_in_the_batch():
    """And is not sorted: at each position, its mean over 400 steps is that of 1..10."""
    trainer, (x_0, y), drawn = Trainer(small_diffusion(), 10, 8), batch(0), []
    for trainer.steps in range(400):
        drawn.append(trainer._draw_noise(x_0, y)["t"])
    t = torch.stack(drawn).double()
    assert ((t.mean(0) - 5.5).abs() < 0.6).all()  # four standard deviations
    assert (t.min(0).values == 1).all() and (t.max(0).values == 10).all()


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_share_of_hidden_labels(share, monkeypatch):
    seen = []

    def spy(self, x_0, t, u, y, loss=DiscreteDiffusion.loss):
        seen.append(y)
        return loss(self, x_0, t, u, y)

    monkeypatch.setattr(DiscreteDiffusion, "loss", spy)
    trainer = Trainer(small_diffusion(), 10, 8, label_dropout=share)
    x_0, y = batch(0)
    trainer.step(x_0, y)
    assert torch.equal(seen[0], y if share == 0 else torch.full_like(y, -1))
    trainer.step(x_0)  # labels are optional for a network that takes them
    assert (seen[1] == -1).all()


def test_each_process_tells_its_network_how_its_pictures_were_augmented(monkeypatch):
    told, forward = [], UNet.forward

    def spy(self, x_t, t, y=None, maps=None):
        told.append(maps)
        return forward(self, x_t, t, y, maps)

    monkeypatch.setattr(UNet, "forward", spy)
    network = UNet(channels=(8, 8, 8), augmented=True)
    torch.nn.init.normal_(network.own_state.weight)  # zero, it would hide what it is told
    diffusion = DiscreteDiffusion(network, timesteps=10, **SMALL)
    trainer, maps = Trainer(diffusion, 10, 8), torch.randn(8, 6)
    trainer.shard = slice(2, 6)  # of the second of several processes
    trainer.step(batch(0)[0], maps=maps)
    trainer.validate(batch(0)[0])
    assert torch.equal(told[0], maps[2:6]) and all(one is None for one in told[1:])
    assert trainer.network.embed_maps.weight.grad.abs().sum() > 0


# --------------------------------------------------------------------------------------------------
# Validation and state


@pytest.mark.parametrize("training", [True, False])
def test_validation_is_the_bound_of_the_average(training):
    """Of the averaged network, one t per digit, always the same noise; nothing is trained."""
    d = small_diffusion()
    trainer = Trainer(d.train() if training else d.eval(), 20, 8, lr=0.05)
    steps(trainer, 6)
    before = trainer.state_dict()["weights"]["fold.weight"].clone()
    x_0 = batch(100, 60)[0]
    measured = trainer.validate(x_0)
    assert isinstance(measured, float) and measured == trainer.validate(x_0)
    network = UNet(channels=(8, 8, 8), num_labels=10).eval()
    for weights, same in (("averaged_weights", True), ("weights", False)):
        network.load_state_dict(trainer.state_dict()[weights])
        d = DiscreteDiffusion(network, timesteps=10, **SMALL)
        bound = d.variational_bound(x_0, 1, torch.Generator().manual_seed(0)).mean().item()
        assert (measured == pytest.approx(bound, rel=1e-6)) == same
    assert trainer.network.training and not trainer.averaged.model.training
    assert torch.equal(trainer.network.fold.weight, before)


@pytest.mark.parametrize("optimizer, dropout", [("adamw", 0.0), ("muon", 0.0), ("muon", 0.3)])
def test_resuming_is_exact(optimizer, dropout):
    """Loading a state into a trainer with other weights continues the run exactly."""
    options = {"lr": 0.01, "optimizer": optimizer, "seed": 3}

    def small():
        network = UNet(channels=(8, 8, 8), num_labels=10, dropout=dropout)
        return DiscreteDiffusion(network, timesteps=10, **SMALL)

    torch.manual_seed(0)
    straight = Trainer(small(), 12, 8, **options)
    losses = steps(straight, 5)
    halfway = {key: copy(value) for key, value in straight.state_dict().items()}
    losses += steps(straight, 7)
    torch.manual_seed(1)
    other = Trainer(small(), 12, 8, **options)
    other.load_state_dict(halfway)
    assert other.steps == 5
    assert steps(other, 7) == losses[5:]
    for key in ("weights", "averaged_weights"):
        assert equal(other.state_dict()[key], straight.state_dict()[key])
    assert not equal(straight.state_dict()["weights"], straight.state_dict()["averaged_weights"])


def test_resuming_on_another_device_type():
    """CUDA leaves a capturable flag and a tensor of the rate, which mean nothing elsewhere."""
    straight = Trainer(small_diffusion(), 12, 8, 0.01)
    steps(straight, 5)
    state = copy(straight.state_dict())
    state["optimizer"]["param_groups"][0] |= {"capturable": True, "lr": torch.tensor(0.3)}
    losses = steps(straight, 7)
    other = Trainer(small_diffusion(), 12, 8, 0.01)
    other.load_state_dict(state)
    assert state["optimizer"]["param_groups"][0]["capturable"]
    assert steps(other, 7) == losses
    assert isinstance(other.optimizer.param_groups[0]["lr"], float)


def test_recorded_calls(monkeypatch):
    """Three calls run eagerly; then one capture is replayed on each input. This fake graph only
    remembers what to run."""
    asked, recordings = [], []

    def function(x):
        asked.append(x)
        return x.sum()

    @contextmanager
    def graph(it, stream):
        recordings.append(stream)
        asked.clear()
        yield

    class Graph:
        def replay(self):
            recorded.result.copy_(function(**recorded.inputs))

    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, fake in {
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda _: nullcontext(),
        "graph": graph,
        "CUDAGraph": Graph,
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    recorded = Recorded(function)
    given = [torch.full((2,), float(i)) for i in range(7)]
    results = [recorded(x=x) for x in given]
    assert [r.item() for r in results] == [0, 2, 4, 6, 8, 10, 12]
    assert recordings == [stream]
    assert all(x is asked[0] for x in asked) and all(asked[0] is not x for x in given)
    assert [x[0].item() for x in given] == list(range(7))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize(
    "kind", ["adamw softmax cross_entropy", "muon softmax variational", "muon logistic hybrid"]
)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recorded_steps_equal_eager_steps(kind, dropout):
    """Also after loading a state into a trainer with a graph, and on moving between devices."""
    optimizer, output, loss = kind.split()

    def make(device, usual=Recorded.WARMUP):
        torch.manual_seed(0)
        network = UNet(channels=(8, 8, 8), num_labels=10, output=output, dropout=dropout).to(device)
        d = DiscreteDiffusion(network, timesteps=10, loss_type=loss, **SMALL)
        trainer = Trainer(d, 40, 8, 0.01, optimizer)
        if device == "cuda":
            trainer.update.WARMUP = usual
        return trainer

    recorded, plain = make("cuda"), make("cuda", usual=100)
    assert steps(recorded, 6) == pytest.approx(steps(plain, 6), rel=0.01)
    assert hasattr(recorded.update, "graph") and not hasattr(plain.update, "graph")
    middle = copy(plain.state_dict())
    steps(recorded, 3)
    recorded.load_state_dict(copy(middle))
    expected = steps(plain, 6)
    assert steps(recorded, 6) == pytest.approx(expected, rel=0.01)
    assert hasattr(recorded.update, "graph")
    for p, q in zip(*(t.averaged.model.parameters() for t in (recorded, plain)), strict=True):
        assert torch.allclose(p, q, atol=0.01)

    there, back = make("cpu"), make("cuda")
    there.load_state_dict(copy(middle))
    assert all(map(math.isfinite, steps(there, 2)))  # of another noise
    there.load_state_dict(copy(middle))
    back.load_state_dict(there.state_dict())
    assert steps(back, 6) == pytest.approx(expected, rel=0.01)


def copy(value):
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: copy(item) for key, item in value.items()}
    return [copy(item) for item in value] if isinstance(value, list) else value


DAMAGE = [
    lambda state: state.update(weights={"nonsense": torch.zeros(1)}),
    lambda state: state.update(weights=None),
    lambda state: state.update(averaged_weights={}),
    lambda state: state["optimizer"].pop("param_groups"),
    lambda state: state["optimizer"]["param_groups"][0]["params"].pop(),
]


@pytest.mark.parametrize("damage", DAMAGE)
def test_state_that_does_not_fit(damage):
    trainer = Trainer(small_diffusion(), 12, 8)
    state = copy(trainer.state_dict())
    damage(state)
    with pytest.raises(ValueError, match="does not fit this version") as error:
        trainer.load_state_dict(state)
    assert "\n" not in str(error.value)


def test_the_rate_stays_at_0_after_the_decay():
    """A schedule that follows the clock may end between two looks at it."""
    assert [learning_rate(1, step, 1000) for step in (1000, 1001, 1020)] == [0, 0, 0]


def test_learning_rate_by_hand():
    late = [learning_rate(2.0, step, 1000) for step in (0, 49, 99, 100, 700, 701, 850, 999)]
    assert late == pytest.approx([0.02, 1, 2, 2, 2, 2 * 299 / 300, 1, 2 / 300])
    cosine = [learning_rate(2.0, step, 1000, "cosine") for step in (0, 100, 500, 999)]
    tenth, end = (1 + math.cos(math.pi * share) for share in (0.1, 0.999))
    assert cosine == pytest.approx([0.02, tenth, 1, end])
    constant = [learning_rate(2.0, step, 1000, "constant") for step in (0, 99, 700, 999)]
    assert constant == pytest.approx([0.02, 2, 2, 2])
    short = [learning_rate(2.0, step, 30) for step in range(4)]
    assert short == pytest.approx([2 / 3, 4 / 3, 2, 2])  # a warm-up of a tenth of the steps
    assert learning_rate(2.0, 0, 1) == pytest.approx(2)


@pytest.mark.parametrize("total", [1, 3, 10, 16, 1000, 1001])
def test_the_decay_starts_where_the_rate_leaves_its_peak(total):
    """Before decay_start the rate is at its peak, so a longer run can continue a checkpoint from
    there; then it falls."""
    start = decay_start(total)
    warm = max(1, min(100, total // 10))
    assert all(learning_rate(1.0, step, total) == 1 for step in range(warm - 1, start))
    rates = [learning_rate(1.0, step, total) for step in range(start, total)]
    assert all(0 < b < a for a, b in pairwise([1.001, *rates]))
    assert start == {1: 1, 3: 3, 10: 7, 16: 12, 1000: 700, 1001: 701}[total]


def test_moving_average_by_hand():
    """Over a ninth of the steps early, a thousand later; integers, as in batch norm, are copied."""
    for n, keep in ((0, 0), (1, 2 / 11), (8, 0.5), (100, 101 / 110), (10**6, 0.999)):
        averaged, current = nn.BatchNorm1d(1), nn.BatchNorm1d(1)
        nn.init.constant_(current.weight, 2)
        current.running_mean += 1
        current.num_batches_tracked += 5
        move_average(averaged, current, n)
        assert averaged.weight.item() == pytest.approx(keep * 1 + (1 - keep) * 2)
        assert averaged.running_mean.item() == pytest.approx(1 - keep)
        assert averaged.num_batches_tracked == 5
        assert current.weight.item() == 2 and current.running_mean.item() == 1


def test_buffers_are_averaged_too():
    class WithNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.out = nn.BatchNorm2d(1), nn.Conv2d(1, 2, 1)

        def forward(self, x, t):
            return self.out(self.norm(x.float()))

    trainer = Trainer(DiscreteDiffusion(WithNorm(), timesteps=5, **SMALL), 10, 8)
    steps(trainer, 3)
    averaged, current = trainer.averaged.model.norm, trainer.network.norm
    assert averaged.num_batches_tracked == current.num_batches_tracked == 3
    assert 0 < (averaged.running_mean - current.running_mean).abs() < current.running_mean.abs()


# --------------------------------------------------------------------------------------------------
# Muon


def newton_schulz(matrix: torch.Tensor) -> torch.Tensor:
    """The plain iteration on the matrix itself."""
    x = matrix if len(matrix) <= matrix.shape[1] else matrix.T
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x - 4.7750 * square @ x + 2.0315 * square @ square @ x
    return x if x.shape == matrix.shape else x.T


def test_orthogonalized():
    """Matches the plain iteration in float64 for any shape and scale; close to U V^T."""
    torch.manual_seed(0)
    shapes = ((8, 40), 1), ((40, 8), 1), ((8, 8), 1e-4), ((8, 40), 1e4), ((9, 8), 1)
    matrices = [scale * torch.randn(shape) for shape, scale in shapes]
    matrices += [torch.outer(*torch.randn(2, 8)), torch.zeros(8, 8)]
    updates = orthogonalized(matrices)
    for matrix, update in zip(matrices[:-1], updates, strict=False):
        assert torch.allclose(update.double(), newton_schulz(matrix.double()), atol=1e-4)
    for matrix, update in zip(matrices[:-2], updates, strict=False):
        U, _, Vh = torch.linalg.svd(matrix, full_matrices=False)
        turned = U.T @ update @ Vh.T
        assert (turned - torch.eye(8)).abs().max() < 0.4 and (turned.diagonal() > 0.6).all()
    assert not updates[-1].any()


def test_muon_by_hand():
    """Hidden matrices follow their orthogonalized Nesterov momentum at AdamW's size; AdamW alone
    updates the rest."""
    torch.manual_seed(0)
    network = UNet(channels=(8, 8, 16)).to(memory_format=torch.channels_last)
    matrices = {id(p) for p in network.hidden_matrices()}
    twin = UNet(channels=(8, 8, 16))
    with torch.no_grad():
        for p, q in zip(network.parameters(), twin.parameters(), strict=True):
            p += 0.1 * torch.randn_like(p)
            q.copy_(p)
    options = {"lr": 0.05, "betas": (0.9, 0.99), "weight_decay": 0.01, "foreach": True}
    muon, adamw = Muon(network, **options), torch.optim.AdamW(twin.parameters(), **options)
    parameters = list(enumerate(network.parameters()))
    by_hand = {i: p.detach().clone() for i, p in parameters if id(p) in matrices}
    momenta = {i: torch.zeros_like(p) for i, p in by_hand.items()}
    assert len(by_hand) > 20
    for k in range(3):
        rate = 0.05 / (k + 1)  # the rate of each step comes from the group
        for optimizer in (muon, adamw):
            optimizer.param_groups[0]["lr"] = rate
        for i, (p, q) in enumerate(zip(network.parameters(), twin.parameters(), strict=True)):
            q.grad = torch.randn_like(q)
            p.grad = torch.empty_like(p).copy_(q.grad)
            if i in by_hand:
                momenta[i] = momenta[i].lerp(p.grad, 0.05)
                ahead = p.grad.lerp(momenta[i], 0.95).flatten(1)
                update = newton_schulz(ahead.double()).float().view(p.shape)
                size = 0.2 * max(ahead.shape) ** 0.5
                by_hand[i] = (1 - rate * 0.01) * by_hand[i] - rate * size * update
        muon.step()
        adamw.step()
    for i, (p, q) in enumerate(zip(network.parameters(), twin.parameters(), strict=True)):
        if i in by_hand:
            assert torch.allclose(p, by_hand[i], atol=1e-5)
            assert not torch.allclose(p, q, atol=1e-5)
        else:
            assert torch.equal(p, q)


def test_optimizers_of_the_trainer():
    """Muon needs a network with hidden_matrices()."""
    adamw = Trainer(small_diffusion(), 10).optimizer
    assert type(adamw) is torch.optim.AdamW and adamw.defaults["weight_decay"] == 0.01
    adam = Trainer(small_diffusion(), 10, optimizer="adam").optimizer
    assert type(adam) is torch.optim.Adam
    assert adam.defaults["betas"] == (0.9, 0.999) and adam.defaults["weight_decay"] == 0
    muon = Trainer(small_diffusion(), 10, optimizer="muon", weight_decay=0.3).optimizer
    assert type(muon) is Muon and muon.defaults["betas"] == (0.9, 0.99)
    assert muon.defaults["weight_decay"] == 0.3
    with pytest.raises(ValueError, match=r"hidden_matrices\(\), which Linear lacks"):
        Trainer(DiscreteDiffusion(nn.Linear(1, 1)), 10, optimizer="muon")


# --------------------------------------------------------------------------------------------------
# bfloat16, compilation, several processes


def test_autocast():
    """The network runs in bfloat16 with plain attention; logits and weights stay float32."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x, t, y=None):
            self.seen = torch.is_autocast_enabled("cpu"), torch.backends.cuda.flash_sdp_enabled(), y
            out = self.layer(x)
            self.dtype = out.dtype
            return out

    network = Network()
    out = Autocast(network)(torch.ones(4, 3), None, "label")
    assert out.dtype == torch.float32 and network.dtype == torch.bfloat16
    assert network.seen == (True, False, "label") and torch.backends.cuda.flash_sdp_enabled()
    assert torch.equal(out, out.bfloat16().float())


@pytest.mark.parametrize(
    "level, has_it, slow",
    [
        ("AVX2", None, True),
        ("AVX512", False, True),
        ("AVX512", True, False),
        ("AVX512", None, False),  # torch 2.4 can't tell
        ("DEFAULT", False, False),  # ARM
    ],
)
def test_a_warning_where_bfloat16_is_emulated(level, has_it, slow, monkeypatch, recwarn):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: level)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_it, raising=False)
    if has_it is None:
        monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")
    accelerated(UNet(channels=(8, 8, 8)), amp=False, compiled=False)
    accelerated(UNet(channels=(8, 8, 8)).to("meta"), amp=True, compiled=False)
    assert not recwarn
    accelerated(UNet(channels=(8, 8, 8)), amp=True, compiled=False)
    messages = [str(warning.message) for warning in recwarn]
    assert messages == ["this CPU only emulates bfloat16: --amp makes it slower"] * slow


def test_amp_and_compile_wrap_what_is_trained(monkeypatch):
    """But not the averaged and saved network, whose parameter names are unchanged. On a CPU dropout
    draws as it does uncompiled, which is faster."""
    compiled, chosen = [], []
    wrap = nn.Sequential

    def compile(model, options):
        compiled.append(model)
        chosen.append(options)
        return wrap(model)

    monkeypatch.setattr(torch, "compile", compile)
    d = small_diffusion(0)
    trainer = Trainer(d, 10, 8, amp=True, compiled=True)
    assert isinstance(compiled[0], Autocast) and compiled[0].network is d.model
    assert isinstance(trainer.diffusion.model, wrap)
    assert trainer.diffusion.model[0] is compiled[0]
    assert trainer.state_dict()["weights"].keys() == trainer.state_dict()["averaged_weights"].keys()
    assert trainer.state_dict()["weights"].keys() == small_diffusion(0).model.state_dict().keys()
    plain = Trainer(small_diffusion(0), 10, 8)
    assert plain.diffusion.model is plain.network and len(compiled) == 1
    accelerated(UNet(channels=(8, 8, 8)).to("meta"), amp=False, compiled=True)
    assert chosen == [{"fallback_random": True}, None]


def test_amp_stays_close():
    """bfloat16 changes the loss of one step only by rounding, 2^-8 an operation."""
    losses = []
    for amp in (False, True):
        d = small_diffusion()
        torch.nn.init.normal_(d.model.unfold[-1].weight, std=0.1)  # else every logit is 0
        losses += steps(Trainer(d, 20, 8, lr=0.01, amp=amp), 1)
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.02)


def test_processes_share_a_batch():
    images = list(range(12))
    shares = [images[Processes(rank, rank, 3).share(12)] for rank in range(3)]
    assert shares == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    with pytest.raises(ValueError, match="batch of 13 can't be shared equally by 3"):
        Processes(0, 0, 3).share(13)
    with pytest.raises(ValueError, match="can't be shared"):
        Trainer(small_diffusion(), 10, 13, processes=Processes(0, 0, 3))


VARIABLES = {
    (None, None, None): Processes(),
    ("", "", ""): Processes(),
    ("2", "0", "4"): Processes(2, 0, 4),
    ("1", "1", "2"): Processes(1, 1, 2),
}
WRONG = ("1", None, None), (None, None, "2"), ("0", "0", ""), ("0", "zero", "2")
WRONG += ("2", "0", "2"), ("-1", "-1", "2"), ("0", "1", "2")


@pytest.mark.parametrize("values, result", (VARIABLES | dict.fromkeys(WRONG)).items())
def test_variables_of_torchrun(values, result, monkeypatch):
    for name, value in zip(("RANK", "LOCAL_RANK", "WORLD_SIZE"), values, strict=True):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    if result:
        assert Processes.from_environment() == result
    else:
        with pytest.raises(ValueError, match="torchrun sets all three"):
            Processes.from_environment()


def test_one_process_needs_no_sync():
    alone = Processes()
    assert alone.mean(1, 2.5) == [1, 2.5]
    assert alone.start(torch.device("cpu")) == torch.device("cpu")
    assert alone.share(5) == slice(0, 5)
