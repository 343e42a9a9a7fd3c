"""Discrete denoising diffusion: D3PM, Austin et al. 2021 (arXiv:2107.03006), sections 2 and 3.

Conventions
    x_0   clean images, integers [B, 1, H, W] in 0..K-1 (K = num_levels grey levels)
    x_t   noisy images, integers [B, 1, H, W] in 0..S-1 (S states; the first K are the levels)
    t     integers [B] in 1..T (T = timesteps); t = 0 is clean data, t = T is noise
    y     labels, integers [B] in 0..num_labels-1, or -1 for none; for networks that take labels

Distributions over x_0 are float [B, K, H, W], over x_t [B, S, H, W]. Every pixel follows the same
Markov chain; only the network sees the whole image. Arithmetic is in logarithms, which do not
underflow. Wrong shapes, dtypes and (on the CPU) values raise a ValueError.
"""

import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from transitions import Streams, as_float, check_choice, check_integers, draw, kl, markov_chain

LOSSES = ("cross_entropy", "variational", "hybrid")
REVERSES = ("mixture", "joint")
LAST_STEPS = ("draw", "mode")


@dataclass
class BoundTerms:
    """The terms of the negative bound (equation 1) of N images, float64, in nats per image."""

    L_T: Tensor  # [N]
    L_t_minus_1: Tensor  # [N], the sum over t = 2..T, or an estimate of it
    L_0: Tensor  # [N]
    t: Tensor  # int64 [N, n], the timesteps evaluated; t[:, 0] = 1
    terms: Tensor  # [N, n], the KL at t; L_0 at t = 1

    @property
    def total(self) -> Tensor:
        return self.L_T + self.L_t_minus_1 + self.L_0


class DiscreteDiffusion(nn.Module):
    """The forward process, its reversal by a network, the bound, the loss and the sampler.

    Args:
        model: the network; model(x_t, t) or model(x_t, t, y) returns logits of x_0, [B, K, H, W].
        num_levels, timesteps: K in 2..256, and T >= 1.
        transition, schedule: see `transitions.FAMILIES`; default: uniform, the family's first.
        loss_type, hybrid_weight: one of LOSSES, and the lambda of the hybrid; see `loss`.
        Q: your own transition matrices, float [T+1, S, S], in place of names; Q[0] = identity.
        network_t: int64 [T+1], the t that the network is given; 0..T unless the chain is respaced.
        reverse: how the network's output becomes p_theta, one of REVERSES; see `log_p_theta`.

    Q[t][i, j] = q(x_t = j | x_{t-1} = i) (equation 2), bar_Q and prior are those of
    `transitions.MarkovChain`. `config` rebuilds this object.
    """

    def __init__(
        self,
        model: nn.Module,
        num_levels: int = 2,
        timesteps: int = 200,
        transition: str | None = None,
        schedule: str | None = None,
        loss_type: str = "cross_entropy",
        hybrid_weight: float = 0.001,
        image_shape: tuple[int, int, int] = (1, 32, 32),
        Q: Tensor | None = None,
        network_t: Tensor | None = None,
        reverse: str = "mixture",
    ):
        super().__init__()
        K, T = operator.index(num_levels), operator.index(timesteps)
        check_choice("loss", loss_type, LOSSES)
        check_choice("reverse step", reverse, REVERSES)
        shape = tuple(map(operator.index, image_shape))
        if len(shape) != 3 or shape[0] != 1 or min(shape) < 1:
            raise ValueError(f"image_shape must be (1, H, W), one channel; got {shape}")
        self.chain, self.config = markov_chain(K, T, transition, schedule, Q)
        self.config |= {"num_levels": K, "timesteps": T, "image_shape": shape, "reverse": reverse}
        self.config |= {"loss_type": loss_type, "hybrid_weight": float(hybrid_weight)}
        self.config |= {} if network_t is None else {"network_t": network_t}
        self.network_t = torch.arange(T + 1) if network_t is None else network_t
        self.Q, self.bar_Q, self.prior = self.chain.Q, self.chain.bar_Q, self.chain.prior
        self.num_levels, self.num_states, self.timesteps = K, self.Q.shape[-1], T
        self.image_shape, self.reverse = shape, reverse
        self.loss_type, self.hybrid_weight = loss_type, float(hybrid_weight)
        self.model, self.num_labels = model, getattr(model, "num_labels", 0)
        for name in ("num_levels", "num_states"):
            built, needed = getattr(model, name, None), getattr(self, name)
            if built not in (None, needed):
                raise ValueError(f"the network has {name} = {built}, the chain has {needed}")

    def around(self, model: nn.Module) -> "DiscreteDiffusion":
        """The same process with another network, such as this one wrapped."""
        other = type(self)(model, **self.config)
        other.num_labels = self.num_labels  # wrappers do not always pass this attribute on
        return other

    # -- section 3: the forward process q ----------------------------------------------------------

    def q_x_t(self, x_0: Tensor, t: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """q(x_t | x_0) (equation 3), [B, S, H, W]: row x_0 of bar_Q_t; t may be 0."""
        x_0 = self._images("x_0", x_0, self.num_levels)
        return self.chain.rows("bar_Q", self._check_t(t, x_0, low=0), x_0, dtype)

    def q_sample(self, x_0: Tensor, t: Tensor, u: Tensor | None = None) -> Tensor:
        """Draw x_t ~ q(x_t | x_0), int64 [B, 1, H, W], with uniforms u [B, 1, H, W] if given."""
        return draw(self.q_x_t(x_0, t), u)

    def q_posterior(self, x_t: Tensor, x_0_probs: Tensor, t: Tensor) -> Tensor:
        """q(x_{t-1} | x_t, x_0) (equation 3) averaged over x_0_probs [B, K, H, W]: probabilities
        [B, S, H, W]. Levels with q(x_t | x_0) = 0 are left out; NaN if all are."""
        return self.log_q_posterior(x_t, as_float(x_0_probs).log(), t).exp()

    def log_q_posterior(self, x_t: Tensor, x_0: Tensor, t: Tensor, dtype=torch.float32) -> Tensor:
        """log q(x_{t-1} | x_t, x_0) (equation 3), [B, S, H, W]:

            q(x_{t-1} = j | x_t, x_0) = Q_t[j, x_t] bar_Q_{t-1}[x_0, j] / bar_Q_t[x_0, x_t]

        x_0: integer levels [B, 1, H, W], with the result in `dtype`; or unnormalized log p(x_0),
        float [B, K, H, W]: the log of the sum over x_0 of q(x_{t-1} | x_t, x_0) p(x_0).
        """
        x_t = self._images("x_t", x_t, self.num_states)
        t = self._check_t(t, x_t)
        dtype = x_0.dtype if x_0.is_floating_point() else dtype
        log_Q_t = self.chain.columns("log_Q", t, x_t, dtype)  # [B, S, H, W]
        likelihood = self._log_likelihood(x_t, t, dtype)  # log bar_Q_t[x_0, x_t], [B, K, H, W]
        if not x_0.is_floating_point():
            x_0_to_j = self.chain.rows("log_bar_Q", t - 1, x_0, dtype)
            return log_Q_t + x_0_to_j - likelihood.gather(1, x_0.long())
        possible = likelihood > -torch.inf
        log_p = torch.where(possible, x_0, -torch.inf).log_softmax(1)
        ratio = torch.where(possible, log_p - likelihood, -torch.inf)
        return log_Q_t + self.chain.log_q_x_t(ratio, t - 1)

    def _log_likelihood(self, x_t: Tensor, t: Tensor, dtype: torch.dtype) -> Tensor:
        """log q(x_t | x_0) for every x_0, [B, K, H, W]."""
        return self.chain.columns("log_bar_Q", t, x_t, dtype)[:, : self.num_levels]

    # -- section 3.3: the network and the reverse process p_theta ----------------------------------

    def x_0_logits(self, x_t: Tensor, t: Tensor, y=None, guidance: float = 0.0, **told) -> Tensor:
        """The network's logits of x_0, [B, K, H, W], given labels y [B] if any. With guidance W:
        (1 + W) logits(y) - W logits(no label) (Ho and Salimans 2022)."""
        x_t = self._images("x_t", x_t, self.num_states)
        t = self._check_t(t, x_t)
        if not 0 <= guidance < math.inf or (guidance and y is None):
            raise ValueError(f"guidance must be finite, at least 0, with labels y; got {guidance}")
        t = self._network_t(t, x_t)
        if y is None:
            return self.model(x_t, t, **told)
        y = self.check_labels(y, len(x_t)).to(x_t.device)
        if not guidance:
            return self.model(x_t, t, y, **told)
        both = torch.cat([y, torch.full_like(y, -1)])
        labelled, unlabelled = self.model(x_t.repeat(2, 1, 1, 1), t.repeat(2), both).chunk(2)
        return labelled + guidance * (labelled - unlabelled)

    def log_p_theta(self, x_t: Tensor, t: Tensor, logits=None) -> Tensor:
        """log p_theta(x_{t-1} | x_t), [B, S, H, W], which loss, bound and sampler share.

        With p~(x_0 | x_t), the softmax of `logits` (by default the network's, without labels):

        mixture   the default, not the paper's: sum over x_0 of q(x_{t-1} | x_t, x_0) p~(x_0 | x_t).
                  Exact, pixel by pixel, if p~ = p(x_0 | x_t), which cross-entropy trains.
        joint     equation 4, normalized: sum over x_0 of q(x_{t-1}, x_t | x_0) p~(x_0 | x_t).
                  Exact if p~ is proportional to p(x_0 | x_t) / q(x_t | x_0). Where the network's t
                  is 1, p~ itself is taken, as in the authors' code.
        """
        logits = as_float(self.x_0_logits(x_t, t) if logits is None else logits)
        x_t = self._images("x_t", x_t, self.num_states)
        if self.reverse == "mixture":
            return self.log_q_posterior(x_t, logits, t)
        # Weights p~ q(x_t | x_0) turn the mixture into equation 4.
        log_p_tilde, extra = logits.log_softmax(1), self.num_states - self.num_levels
        weights = log_p_tilde + self._log_likelihood(x_t, t, logits.dtype)
        log_p_tilde = F.pad(log_p_tilde, (0, 0, 0, 0, 0, extra), value=-torch.inf)
        last = (self._network_t(t, x_t) == 1).view(-1, 1, 1, 1)
        return torch.where(last, log_p_tilde, self.log_q_posterior(x_t, weights, t))

    def p_theta(self, x_t: Tensor, t: Tensor, logits=None) -> Tensor:
        """exp of `log_p_theta`."""
        return self.log_p_theta(x_t, t, logits).exp()

    # -- the bound (section 2, equation 1) and the loss (section 3.4, equation 5) ------------------

    def L_T(self, x_0: Tensor) -> Tensor:
        """KL(q(x_T | x_0) || p(x_T)), float64 [B] on the CPU, in nats per image."""
        x_0 = self._images("x_0", x_0, self.num_levels).cpu().long()
        return kl(self.chain.log_bar_Q[-1], self.prior.log()[None])[x_0].sum((1, 2, 3))

    def L_t_minus_1(self, x_0: Tensor, x_t: Tensor, t: Tensor, logits=None) -> Tensor:
        """KL(q(x_{t-1} | x_t, x_0) || p_theta(x_{t-1} | x_t)), float [B], in nats per image.

        At t = 1 this is L_0 = -log p_theta(x_0 | x_1). NaN if any q(x_t | x_0) = 0.
        """
        x_0 = self._images("x_0", x_0, self.num_levels)
        x_t = check_integers("x_t", x_t, tuple(x_0.shape), 0, self.num_states - 1)
        log_p = self.log_p_theta(x_t, t, logits)
        log_q = self.log_q_posterior(x_t, x_0, t, log_p.dtype)
        return kl(log_q, log_p).sum((1, 2))

    def loss(self, x_0: Tensor, t=None, u=None, y=None, **told) -> Tensor:
        """The training objective (equation 5), a scalar in nats per dimension.

        cross_entropy   -log p~(x_0 | x_t), the second term of equation 5 alone
        variational     T L_{t-1}: an unbiased estimate of the bound, without the constant L_T
        hybrid          T (L_{t-1} + lambda cross_entropy): lambda at each t, as the authors do

        t [B] and the uniforms of the noise u [B, 1, H, W] are drawn unless given; labels y [B].
        The network gets what else it is told.
        """
        x_0 = self.check_x_0(x_0)
        if len(x_0) == 0:
            raise ValueError("x_0 is an empty batch")
        t = self.draw_t(len(x_0)).to(x_0.device) if t is None else t
        x_t = self.q_sample(x_0, t, u)
        logits = as_float(self.x_0_logits(x_t, t, y, **told))
        cross_entropy = F.cross_entropy(logits, x_0[:, 0].long())
        if self.loss_type == "cross_entropy":
            return cross_entropy
        L_t_minus_1 = self.L_t_minus_1(x_0, x_t, t, logits).mean() / x_0[0].numel()
        if self.loss_type == "variational":
            return self.timesteps * L_t_minus_1
        return self.timesteps * (L_t_minus_1 + self.hybrid_weight * cross_entropy)

    def draw_t(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n timesteps, int64 [n], each uniform on 1..T, spread evenly to reduce the variance."""
        device = generator.device if generator else "cpu"
        offset = torch.rand((), generator=generator, dtype=torch.float64, device=device)
        position = (offset + torch.randperm(n, generator=generator, device=device) / n) % 1
        return (position * self.timesteps).long().clamp(max=self.timesteps - 1) + 1

    @torch.no_grad()
    def bound_terms(
        self, x_0: Tensor, num_t=None, generator=None, y=None, batch_size=250, progress=False
    ) -> BoundTerms:
        """Equation 1 for images [N, 1, H, W] and labels y [N]: an unbiased estimate, on the CPU.
        Draws num_t of t = 2..T per image; None takes all. The generator must be a CPU generator."""
        x_0 = self.check_x_0(x_0).cpu()
        N, T = len(x_0), self.timesteps
        y = None if y is None else self.check_labels(y, N)
        t, weight = torch.arange(1, T + 1).expand(N, T), 1.0
        if num_t is not None and num_t < 1:
            raise ValueError(f"num_t must be at least 1, got {num_t}")
        if num_t and T > 1:
            # One t in each of num_t equal parts of 2..T; each part is stratified over the images.
            turns = torch.stack([torch.randperm(N, generator=generator) for _ in range(num_t)], 1)
            position = (turns + torch.rand(N, num_t, generator=generator)) / N
            position = (position + torch.arange(num_t)) / num_t
            t = F.pad(2 + (position * (T - 1)).long().clamp(max=T - 2), (1, 0), value=1)
            weight = (T - 1) / num_t
        terms = torch.empty(t.shape, dtype=torch.float64)
        affordable = 2**23 // (self.num_states * math.prod(self.image_shape))
        with tqdm(total=t.numel(), desc="bound", unit_scale=True, disable=not progress) as bar:
            for rows in torch.arange(N).split(max(1, min(batch_size, affordable))):
                labels = None if y is None else y[rows]
                for k in range(t.shape[1]):
                    t_k = t[rows, k]
                    u = torch.rand(x_0[rows].shape, generator=generator)
                    x_t = self.q_sample(x_0[rows], t_k, u)
                    logits = self.x_0_logits(x_t.to(self.device), t_k, labels)
                    # float64, since float32 loses 0.01 nats over 1,000 terms
                    terms[rows, k] = self.L_t_minus_1(x_0[rows], x_t, t_k, logits.cpu().double())
                    bar.update(len(rows))
        return BoundTerms(self.L_T(x_0), weight * terms[:, 1:].sum(1), terms[:, 0], t, terms)

    def variational_bound(self, x_0: Tensor, num_t=None, generator=None, y=None) -> Tensor:
        """Total of `bound_terms`, nats per image, float64 [N]; its mean is >= -log p_theta(x_0)."""
        return self.bound_terms(x_0, num_t, generator, y).total

    # -- sampling ----------------------------------------------------------------------------------

    def p_sample(
        self, x_t: Tensor, t: Tensor, u=None, y=None, guidance: float = 0.0, mode: bool = False
    ) -> Tensor:
        """Draw x_{t-1} ~ p_theta(x_{t-1} | x_t), or take its mode: int64 [B, 1, H, W]."""
        return draw(self.p_theta(x_t, t, self.x_0_logits(x_t, t, y, guidance)), u, mode)

    @torch.no_grad()
    def reverse_process(
        self, n: int, seed: int = 0, first: int = 0, y=None, guidance=0.0, last_step="draw"
    ) -> Iterator[Tensor]:
        """Walk from noise to data: yields x_T, ..., x_0, T + 1 tensors, int64 [n, 1, H, W].

        Image i of first .. first + n - 1 has a random stream of its own, made from (seed, i), so
        it is the same in every batch. last_step: "draw" x_0 ~ p_theta(x_0 | x_1), or take its
        "mode" as the authors' code does, so that x_0 is not a sample from p_theta.
        """
        check_choice("last step", last_step, LAST_STEPS)
        streams, device = Streams(n, seed, first), self.device
        prior = self.prior.float().to(device)[None, :, None, None].expand(n, -1, 1, 1)
        x_t = draw(prior, streams.uniforms(self.image_shape, device))
        yield x_t
        for step in range(self.timesteps, 0, -1):
            u, t = streams.uniforms(self.image_shape, device), torch.full((n,), step, device=device)
            x_t = self.p_sample(x_t, t, u, y, guidance, last_step == "mode" and step == 1)
            yield x_t

    def sample(
        self, n: int, seed=0, first=0, batch_size=None, progress=False, y=None, **how
    ) -> Tensor:
        """Draw n images, uint8 [n, 1, H, W] on the CPU; arguments as in `reverse_process`."""
        batch_size = self.suitable_batch() if batch_size is None else batch_size
        if n < 1 or batch_size < 1:
            raise ValueError(f"n and batch_size must be at least 1, got {n} and {batch_size}")
        y = None if y is None else self.check_labels(y, n)
        images = torch.empty(n, *self.image_shape, dtype=torch.uint8)
        total = n * (self.timesteps + 1)
        with tqdm(total=total, desc="sampling", unit_scale=True, disable=not progress) as bar:
            for rows in torch.arange(n).split(batch_size):
                start, labels = first + int(rows[0]), None if y is None else y[rows]
                for x_t in self.reverse_process(len(rows), seed, start, labels, **how):
                    x_0 = x_t  # the last one
                    bar.update(len(rows))
                images[rows] = x_0.byte().cpu()
        return images

    def labels(self, n: int, first: int = 0) -> Tensor | None:
        """i mod num_labels for images i = first .. first + n - 1, int64 [n]; or None."""
        return torch.arange(first, first + n) % self.num_labels if self.num_labels else None

    @property
    def device(self) -> torch.device:
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    def suitable_batch(self) -> int:
        """How many images fit a CPU's caches, or keep a GPU busy within its memory."""
        affordable = max(1, 2**24 // (self.num_states * math.prod(self.image_shape)))
        return min(512 if self.device.type == "cuda" else 64, affordable)

    def _network_t(self, t: Tensor, x: Tensor) -> Tensor:
        return self.network_t.to(x.device)[t.long().to(x.device)]

    def _images(self, name: str, x: Tensor, states: int) -> Tensor:
        return check_integers(name, x, (None, 1, None, None), 0, states - 1)

    def _check_t(self, t: Tensor, x: Tensor, low: int = 1) -> Tensor:
        return check_integers("t", t, (len(x),), low, self.timesteps)

    def check_x_0(self, x_0: Tensor) -> Tensor:
        return check_integers("x_0", x_0, (None, *self.image_shape), 0, self.num_levels - 1)

    def check_labels(self, y: Tensor, n: int) -> Tensor:
        return check_integers("y", y, (n,), -1, self.num_labels - 1)
