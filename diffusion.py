"""Discrete denoising diffusion: D3PM, Austin et al. 2021 (arXiv:2107.03006), to be read beside sections 2 and 3.

Conventions
    x_0   clean images, integers [B, 1, H, W] in 0..K-1 (K = num_levels grey levels)
    x_t   noisy images, integers [B, 1, H, W] in 0..S-1 (S states of the chain; every level is a state, so S >= K)
    t     integers [B] in 1..T (T = timesteps); t = 0 is clean data, t = T is noise
    y     labels, integers [B] in 0..num_labels-1 or -1 for none; for networks that take labels
    distributions over x_0 are float [B, K, H, W], over x_t float [B, S, H, W]; the state axis comes second

Every pixel walks through the same Markov chain on its own; only the network looks at the whole image.
Public methods raise a ValueError for other shapes and dtypes; the values are looked at where that is free, on the CPU.
"""

import copy
import math
import operator
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial, reduce
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from transitions import check_transitions, family_and_schedule, transition_matrices

LOSSES = ("cross_entropy", "variational", "hybrid")
REVERSES = ("mixture", "joint", "argmax")
LAST_STEPS = ("draw", "mode")


@dataclass
class BoundTerms:
    """The terms of the negative bound for N images, in nats, float64; `t` and `terms` are those that were computed."""

    L_T: Tensor  # [N]
    L_t_minus_1: Tensor  # [N], the (estimated) sum over t = 2..T
    L_0: Tensor  # [N]
    t: Tensor  # int64 [N, n]
    terms: Tensor  # [N, n]

    @property
    def total(self) -> Tensor:
        return self.L_T + self.L_t_minus_1 + self.L_0


class DiscreteDiffusion(nn.Module):
    """The forward process, its reversal by a network, the bound, the loss and the sampler.

    Args:
        model: the network; `model(x_t, t)`, or `model(x_t, t, y)`, returns logits of x_0, float [B, K, H, W].
        num_levels: K, the number of grey levels, at least 2.
        timesteps: T, at least 1.
        transition: name of a transition family (`transitions.FAMILIES`); None for uniform.
        schedule: name of a noise schedule that goes with it; None for the family's own.
        loss_type: what `loss` returns: "cross_entropy", "variational" or "hybrid".
        hybrid_weight: lambda, the weight of the cross-entropy in the hybrid loss, on the scale of the authors' code.
        image_shape: (1, H, W) of the images.
        Q: your own transition matrices [T+1, S, S] instead of a family and its schedule: Q[0] the identity, rows
            summing to one, S >= K; the first K states are the grey levels.
        network_t: int64 [T+1], what the network is told for t = 0..T; t itself by default. See `respaced`.
        reverse: how p_theta(x_{t-1} | x_t) is made of the network's output: "mixture", "joint" or "argmax"; `p_theta`.

    Attributes:
        Q: float64 [T+1, S, S], Q[t][i, j] = q(x_t = j | x_{t-1} = i); Q[0] is the identity.
        bar_Q: float64 [T+1, S, S], bar_Q[t] = Q[1] Q[2] ... Q[t] (equation 3).
        prior: float64 [S], p(x_T), what sampling starts from: the mean over levels of q(x_T | x_0), which is the
            stationary distribution when the schedule reaches it.
        config: plain values and tensors that rebuild this object around a network.

    Raises:
        ValueError: for arguments out of range, unknown names, or matrices that are not transition matrices.
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
        if K < 2 or T < 1 or (T + 1) * (K + 1) ** 2 > 2**28:
            raise ValueError(
                f"K must be at least 2 and T at least 1, with T K^2 at most 2^28 for matrices that fit into memory; "
                f"got K = {K}, T = {T}"
            )
        if loss_type not in LOSSES:
            raise ValueError(f"unknown loss {loss_type!r}: choose from {', '.join(LOSSES)}")
        if reverse not in REVERSES:
            raise ValueError(f"unknown reverse step {reverse!r}: choose from {', '.join(REVERSES)}")
        if reverse == "argmax" and loss_type != "cross_entropy":
            raise ValueError(
                f"the bound of the argmax reverse step is infinite: the {loss_type} loss can't train it"
            )
        image_shape = tuple(map(operator.index, image_shape))
        if len(image_shape) != 3 or image_shape[0] != 1 or min(image_shape) < 1:
            raise ValueError(
                f"image_shape must be (1, H, W): one channel of grey levels; got {image_shape}"
            )
        self.config = {"num_levels": K, "timesteps": T, "image_shape": image_shape}
        self.config |= {
            "loss_type": loss_type,
            "hybrid_weight": float(hybrid_weight),
            "reverse": reverse,
        }
        if Q is None:
            transition = transition or "uniform"
            schedule = family_and_schedule(transition, schedule)[1]
            self.config |= {"transition": transition, "schedule": schedule}
            Q = transition_matrices(transition, schedule, K, T)
        elif transition or schedule:
            raise ValueError("give Q or the name of a transition and its schedule, not both")
        else:
            Q = check_transitions(Q, K, T)
            self.config["Q"] = Q
        if network_t is not None:
            self.config["network_t"] = network_t
        self.network_t = torch.arange(T + 1) if network_t is None else network_t
        self.model, self.num_labels = model, getattr(model, "num_labels", 0)
        self.num_levels, self.num_states, self.timesteps, self.image_shape = (
            K,
            Q.shape[-1],
            T,
            image_shape,
        )
        self.loss_type, self.hybrid_weight, self.reverse = loss_type, float(hybrid_weight), reverse
        # Plain float64 tensors on the CPU rather than buffers: exact, and MPS has no float64. See `_at`.
        self.Q, self.bar_Q = Q, Q.clone()
        for t in range(1, T + 1):
            self.bar_Q[t] = self.bar_Q[t - 1] @ Q[t]
        self.bar_Q /= self.bar_Q.sum(
            -1, keepdim=True
        )  # keeps rounding from adding up over T products
        self.prior = self.bar_Q[T, :K].mean(0)
        self._tables: dict[tuple, Tensor] = {}

        distance = 0.5 * (self.bar_Q[T, :K] - self.prior).abs().sum(-1).max().item()
        if distance > 1e-3:
            warnings.warn(
                f"bar_Q[T] is far from stationary (total variation {distance:.3f}): sampling starts from a "
                "distribution that the forward process does not reach, so L_T > 0. Use another schedule or a larger T.",
                stacklevel=1,  # the same line for every chain, so that it is said once
            )

    def around(self, model: nn.Module) -> "DiscreteDiffusion":
        """The same process around another network, sharing the matrices."""
        twin = copy.copy(self)
        twin._modules = {"model": model}
        return twin

    def respaced(self, timesteps: int | list[int]) -> "DiscreteDiffusion":
        """The same process seen at fewer timesteps, around the same network: bound and sampler take fewer passes.

        Between kept timesteps, Q is the product of those that were skipped, so bar_Q at a kept timestep, and with it
        what the network was trained for, stays the same. The network is told the original t.

        Args:
            timesteps: how many, from 1 to T; or those to keep, in rising order up to T. A number is spread so that
                each step moves pixels about as far, whatever the schedule.

        Raises:
            ValueError: for more timesteps than there are, or ones that are not such a list.
        """
        T = self.timesteps
        if isinstance(timesteps, list | tuple) or getattr(timesteps, "ndim", 0):
            kept = [0, *map(operator.index, timesteps)]
        else:
            n = operator.index(timesteps)
            if not 1 <= n <= T:
                raise ValueError(
                    f"the number of timesteps must be in 1..{T}, those of training, got {n}"
                )
            kept = [0, *self._spread(n)]
        if kept[-1] != T or any(a >= b for a, b in pairwise(kept)):
            raise ValueError(f"the timesteps to keep must rise from at least 1 to {T}")
        Q = [reduce(torch.matmul, self.Q[a + 1 : b + 1]) for a, b in pairwise(kept)]
        config = {
            key: value
            for key, value in self.config.items()
            if key not in ("transition", "schedule")
        }
        config |= {
            "timesteps": len(kept) - 1,
            "Q": torch.stack([self.Q[0], *Q]),
            "network_t": self.network_t[kept],
        }
        twin = type(self)(self.model, **config)
        twin.num_labels = self.num_labels  # which `around` may know better than the network
        return twin

    def _spread(self, n: int) -> list[int]:
        """n different timesteps up to T, evenly spaced, or nearly, in how far from their level pixels are on average.

        For uniform and absorbing transitions that is the share of pixels that are changed. For many levels and Gaussian
        transitions next to all are changed after a few steps, by little.
        """
        T, K = self.timesteps, self.num_levels
        level = torch.arange(self.num_states, dtype=torch.float64)
        distance = (level[:K, None] - level).abs()
        distance[:, K:] = K - 1  # a mask is far from every level
        moved = (
            torch.einsum("tij,ij->t", self.bar_Q[:, :K], distance) / K
        )  # [T+1], the mean over levels
        kept = [0]
        for k in range(1, n + 1):
            nearest = int((moved - k / n * moved[T]).abs().argmin())
            kept.append(
                min(max(nearest, kept[-1] + 1), T - (n - k))
            )  # distinct, and room for those to come
        return [*kept[1:-1], T]

    # -- the forward process q ----------------------------------------------------------------------------------------

    def _at(self, table: str, t: Tensor, like: Tensor) -> Tensor:
        """Q or bar_Q for a batch of t, on the device and in the dtype of `like`: looked up there, no waiting."""
        key = (table, like.device, like.dtype)
        if key not in self._tables:
            self._tables[key] = getattr(self, table).to(like.dtype).to(like.device)
        return self._tables[key][t.long().to(like.device)]

    def _network_t(self, t: Tensor, x: Tensor) -> Tensor:
        """What the network is told for t, int64 [B] on the device of x."""
        return self._at("network_t", t, torch.empty(0, dtype=torch.long, device=x.device))

    def q_x_t(self, x_0: Tensor, t: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """q(x_t | x_0) = row x_0 of bar_Q_t (equation 3), float [B, S, H, W]; t may be 0."""
        self._check_images("x_0", x_0, self.num_levels)
        self._check_t(t, x_0, least=0)
        return take_columns(
            self._at("bar_Q", t, torch.empty(0, dtype=dtype, device=x_0.device)).mT, x_0
        )

    def q_sample(self, x_0: Tensor, t: Tensor, u: Tensor | None = None) -> Tensor:
        """Draw x_t ~ q(x_t | x_0) in one jump (equation 3), int64 [B, 1, H, W].

        `u` are the uniforms in [0, 1) that the draw is made from, float [B, 1, H, W]; fresh ones by default.
        """
        return draw(self.q_x_t(x_0, t), u)

    def q_posterior(self, x_t: Tensor, x_0_probs: Tensor, t: Tensor) -> Tensor:
        """The distribution of x_{t-1} given x_t under a distribution over x_0, float [B, S, H, W].

        The mixture of exact posteriors, sum over x_0 of q(x_{t-1} | x_t, x_0) w(x_0), with equation 3's

            q(x_{t-1} = j | x_t, x_0) = Q_t[j, x_t] bar_Q_{t-1}[x_0, j] / bar_Q_t[x_0, x_t],

        where w is `x_0_probs` ([B, K, H, W]) restricted to the levels that can have led to x_t and renormalised. For a
        network that outputs p(x_0 | x_t), which is what cross-entropy trains, this is the exact conditional of each
        pixel.

        Raises:
            ValueError: if `x_0_probs` puts all its mass on levels from which x_t cannot be reached (seen on the CPU
                only; elsewhere the result is NaN there), or for t = 0.
        """
        self._check_images("x_t", x_t, self.num_states)
        self._check_t(t, x_t)
        K = x_0_probs.shape[1]
        likelihood = take_columns(
            self._at("bar_Q", t, x_0_probs)[:, :K], x_t
        )  # q(x_t | x_0), [B, K, H, W]
        possible = (
            likelihood > torch.finfo(likelihood.dtype).tiny ** 0.5
        )  # below, the factors of the ratio underflow
        w = torch.where(possible, x_0_probs, 0.0)
        mass = w.sum(1, keepdim=True)
        if mass.device.type == "cpu" and not (mass > 0).all():  # true of NaN, too
            raise ValueError("x_0_probs gives no probability to any level that can have led to x_t")
        w_over_likelihood = w / mass / torch.where(possible, likelihood, 1.0)
        bar_Q_before = self._at("bar_Q", t - 1, x_0_probs)[:, :K]
        mixed = torch.einsum("bkhw,bkj->bjhw", w_over_likelihood, bar_Q_before)
        return mixed * take_columns(self._at("Q", t, x_0_probs), x_t)

    # -- the reverse process p_theta ----------------------------------------------------------------------------------

    def x_0_logits(
        self, x_t: Tensor, t: Tensor, y: Tensor | None = None, guidance: float = 0.0
    ) -> Tensor:
        """The network's logits of x_0, [B, K, H, W], given labels y [B] (-1 for none) if any.

        Guidance W > 0 moves them away from those without a label: (1 + W) logits(y) - W logits (Ho and Salimans 2022).
        """
        self._check_images("x_t", x_t, self.num_states)
        self._check_t(t, x_t)
        t = self._network_t(t, x_t)
        if y is None:
            if guidance:
                raise ValueError("guidance needs labels y")
            return self.model(x_t, t)
        check_integers("y", y, (len(x_t),), -1, self.num_labels - 1)
        if not guidance:
            return self.model(x_t, t, y)
        twice = x_t.repeat(2, 1, 1, 1), t.repeat(2), torch.cat([y, torch.full_like(y, -1)])
        labelled, unlabelled = self.model(*twice).chunk(2)
        return labelled + guidance * (labelled - unlabelled)

    def p_theta(self, x_t: Tensor, t: Tensor, logits: Tensor | None = None) -> Tensor:
        """p_theta(x_{t-1} | x_t), float [B, S, H, W]: the one definition that loss, bound and sampler share.

        With p~, the softmax of the network's output for x_0, and `reverse`:

        mixture   sum over x_0 of q(x_{t-1} | x_t, x_0) p~(x_0): exact where p~ is p(x_0 | x_t); see `q_posterior`
        joint     equation 4, proportional to the sum over x_0 of q(x_{t-1}, x_t | x_0) p~(x_0), normalised at the end;
                  at the network's t = 1 it is p~ itself, as in the authors' code. Exact where p~ is proportional to
                  p(x_0 | x_t) / q(x_t | x_0), the leave-one-out posterior; given p(x_0 | x_t), which is what
                  cross-entropy trains, it counts the likelihood q(x_t | x_0) twice
        argmax    q(x_{t-1} | x_t, x_0) for the most probable x_0: the model's uncertainty is thrown away

        `logits` are those of x_0, by default the network's without labels; in half precision they count as float32.
        """
        logits = self.x_0_logits(x_t, t) if logits is None else logits
        logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
        if self.reverse == "mixture":
            return self.q_posterior(x_t, logits.softmax(1), t)
        likelihood = take_columns(self._at("bar_Q", t, logits)[:, : logits.shape[1]], x_t)
        possible = likelihood > torch.finfo(likelihood.dtype).tiny ** 0.5  # as in q_posterior
        if self.reverse == "argmax":
            best = torch.where(possible, logits, -torch.inf).argmax(1)
            return self.q_posterior(
                x_t, F.one_hot(best, logits.shape[1]).movedim(-1, 1).to(logits), t
            )
        # Weights p~ q(x_t | x_0) turn the mixture into equation 4; in logarithms, where products don't underflow.
        weights = torch.where(possible, logits + likelihood.log(), -torch.inf).softmax(1)
        p = self.q_posterior(x_t, weights, t)
        last = self._network_t(t, x_t) == 1  # a respaced chain's t = 1 is not the last
        p_tilde = F.pad(logits.softmax(1), (0, 0, 0, 0, 0, self.num_states - self.num_levels))
        return torch.where(last.view(-1, 1, 1, 1), p_tilde, p)

    def p_sample(
        self,
        x_t: Tensor,
        t: Tensor,
        u: Tensor | None = None,
        y=None,
        guidance: float = 0.0,
        mode: bool = False,
    ) -> Tensor:
        """One reverse step: draw x_{t-1} ~ p_theta(x_{t-1} | x_t), int64 [B, 1, H, W]; or take its `mode`.

        `u` as in `q_sample`, `y` and `guidance` as in `x_0_logits`.
        """
        return draw(self.p_theta(x_t, t, self.x_0_logits(x_t, t, y, guidance)), u, mode)

    # -- the objective ------------------------------------------------------------------------------------------------

    def loss(
        self, x_0: Tensor, t: Tensor | None = None, u: Tensor | None = None, y: Tensor | None = None
    ) -> Tensor:
        """The training objective, a scalar in nats per dimension; t is uniform on 1..T.

        cross_entropy   -log p_theta(x_0 | x_t), the second term of equation 5 on its own
        variational     T L_{t-1}, the first: an unbiased estimate of the bound, less the constant L_T
        hybrid          T (L_{t-1} + lambda times the second), lambda = `hybrid_weight`

        Equation 5 says bound + lambda cross-entropy, so sum over t of L_{t-1}, once lambda: there, lambda would be T
        times what it is here. The authors' code has lambda = 0.001 beside the one term L_{t-1} at the t that it has
        drawn, and its lambda is ours; the common factor T keeps the loss in the units of the bound.

        Bound and cross-entropy want one and the same output of the network for the mixture: p(x_0 | x_t). For the joint
        form they want two (see `p_theta`), but for absorbing transitions, where q(x_t | x_0) is the same for every
        possible x_0.

        Args:
            x_0: images, integers [B, 1, H, W].
            t, u: timesteps [B] and the uniforms of the noising [B, 1, H, W]; drawn unless they are given.
            y: labels, int64 [B], -1 for none; for networks that take labels.
        """
        t = self.draw_t(len(x_0)).to(x_0.device) if t is None else t
        x_t = self.q_sample(x_0, t, u)
        logits = self.x_0_logits(x_t, t, y)
        cross_entropy = F.cross_entropy(logits, x_0[:, 0].long())
        if self.loss_type == "cross_entropy":
            return cross_entropy
        variational = self.timesteps * self.L_t_minus_1(x_0, x_t, t, logits).mean() / x_0[0].numel()
        if self.loss_type == "variational":
            return variational
        return variational + self.timesteps * self.hybrid_weight * cross_entropy

    def draw_t(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n timesteps, each uniform on 1..T but spread evenly over the batch to cut variance; int64 [n], on the
        generator's device, which is the CPU by default.
        """
        device = generator.device if generator else "cpu"
        first = torch.rand((), generator=generator, dtype=torch.float64, device=device)
        position = (first + torch.randperm(n, generator=generator, device=device) / n) % 1
        return (position * self.timesteps).long().clamp(max=self.timesteps - 1) + 1

    # -- the variational bound (equation 1), in nats per image --------------------------------------------------------

    def L_T(self, x_0: Tensor) -> Tensor:
        """KL(q(x_T | x_0) || p(x_T)), float64 [B] on the CPU: the prior's cost; 0 when bar_Q[T] is stationary."""
        self._check_images("x_0", x_0, self.num_levels)
        kl = kl_divergence(
            self.bar_Q[self.timesteps, : self.num_levels], self.prior[None], dim=1
        )  # per level, [K]
        return kl[x_0.cpu().long()].sum((1, 2, 3))

    def L_t_minus_1(
        self, x_0: Tensor, x_t: Tensor, t: Tensor, logits: Tensor | None = None
    ) -> Tensor:
        """KL(q(x_{t-1} | x_t, x_0) || p_theta(x_{t-1} | x_t)), float [B]: its mean over x_t ~ q(x_t | x_0) is L_{t-1}.

        At t = 1 this is L_0 = -log p_theta(x_0 | x_1), since q(x_0 | x_1, x_0) is certain. It is +inf where the
        reverse process rules out what the forward process can do. `logits` as in `p_theta`.
        """
        self._check_images("x_0", x_0, self.num_levels)
        p = self.p_theta(x_t, t, logits)
        return kl_divergence(self._q_given_x_0(x_t, x_0, t, p), p, dim=1).sum((1, 2))

    def _q_given_x_0(self, x_t: Tensor, x_0: Tensor, t: Tensor, like: Tensor) -> Tensor:
        """q(x_{t-1} | x_t, x_0) as in `q_posterior`, [B, S, H, W], in the dtype of `like`."""
        before = take_columns(self._at("bar_Q", t - 1, like).mT, x_0)
        likelihood = take_columns(self._at("bar_Q", t, like).mT, x_0).gather(1, x_t.long())
        if (
            likelihood.device.type == "cpu"
            and not (likelihood > torch.finfo(likelihood.dtype).tiny ** 0.5).all()
        ):
            raise ValueError("x_0 can't have led to x_t")
        return likelihood.reciprocal() * before * take_columns(self._at("Q", t, like), x_t)

    @torch.no_grad()
    def bound_terms(
        self,
        x_0: Tensor,
        num_t: int | None = None,
        generator: torch.Generator | None = None,
        y: Tensor | None = None,
        batch_size: int = 250,
        progress: bool = False,
    ) -> BoundTerms:
        """L_T, the sum over t = 2..T of L_{t-1}, and L_0, each at one x_t ~ q(x_t | x_0): unbiased.

        Everything after the network's logits is float64: added up in float32, 1000 terms come out low by 0.01 nats.

        Args:
            x_0: images, integers [N, 1, H, W]; any N takes the memory of one batch.
            num_t: how many t of 2..T to draw per image, or None for all of them. L_0 is always computed.
            generator: a CPU generator that the t and the noise are drawn from.
            y: labels, int64 [N], as in `x_0_logits`.
        """
        x_0, N, T = x_0.cpu(), len(x_0), self.timesteps
        if y is not None:
            check_integers("y", y, (N,), -1, self.num_labels - 1)
        if num_t is None or T == 1:
            t = torch.arange(1, T + 1).expand(N, T)
        else:  # one t in each of num_t equal parts of 2..T, and within a part the images take turns: less variance
            turns = torch.stack(
                [torch.randperm(N, generator=generator) for _ in range(num_t)], dim=1
            )
            position = (
                torch.arange(num_t) + (turns + torch.rand(N, num_t, generator=generator)) / N
            ) / num_t
            t = torch.cat(
                [
                    torch.ones(N, 1, dtype=torch.long),
                    2 + (position * (T - 1)).long().clamp(max=T - 2),
                ],
                dim=1,
            )
        device, terms = self._device(), torch.empty(t.shape, dtype=torch.float64)
        with tqdm(
            total=t.numel(), desc="bound", unit="term", unit_scale=True, disable=not progress
        ) as bar:
            most = max(
                1, 2**23 // (self.num_states * x_0[0].numel())
            )  # many levels: fewer images at a time
            for rows in torch.arange(N).split(min(batch_size, most)):
                clean, label = x_0[rows], None if y is None else y[rows].to(device)
                for k in range(t.shape[1]):
                    x_t = self.q_sample(
                        clean, t[rows, k], torch.rand(clean.shape, generator=generator)
                    )
                    logits = self.x_0_logits(x_t.to(device), t[rows, k], label).cpu().double()
                    terms[rows, k] = self.L_t_minus_1(clean, x_t, t[rows, k], logits)
                    bar.update(len(rows))
        weight = 1 if num_t is None or T == 1 else (T - 1) / num_t
        return BoundTerms(self.L_T(x_0), weight * terms[:, 1:].sum(1), terms[:, 0], t, terms)

    def variational_bound(
        self, x_0: Tensor, num_t: int | None = None, generator=None, y=None
    ) -> Tensor:
        """The negative bound L_T + sum over t = 2..T of L_{t-1} + L_0 >= -log p_theta(x_0), float64 [N] on the CPU.

        An unbiased estimate; the arguments are those of `bound_terms`.
        """
        return self.bound_terms(x_0, num_t, generator, y).total

    # -- whole trajectories and their weights -------------------------------------------------------------------------

    def _walk(
        self,
        known: Tensor,
        uniforms: Callable[[], Tensor],
        y=None,
        guidance: float = 0.0,
        last_step: str = "draw",
    ) -> Iterator[tuple]:
        """Yields x_T, ..., x_0, each with the log-weight so far: given pixels follow q, the others the model.

        Given pixels draw x_T ~ q(x_T | x_0) and x_{t-1} ~ q(x_{t-1} | x_t, x_0), the others p(x_T) and p_theta. The
        log-weight is the sum over the given pixels of log p - log q at what they drew, float64 [B] on the
        `_exact_device`. There q > 0: where p is exactly zero it is -inf, and it is never NaN.

        Args:
            known: integers [B, 1, H, W]: levels, or -1 where the model draws.
            uniforms: gives those of the next draw, [B, 1, H, W], which is made on their device, in their precision.
            y, guidance: as in `x_0_logits`. last_step: as in `reverse_process`.

        Raises:
            ValueError: if the network's output is not finite.
        """
        B, device, known = len(known), self._device(), known.to(self._exact_device())
        given, x_0 = known >= 0, known.long().clamp(min=0)
        one_hot = F.one_hot(x_0[:, 0], self.num_levels).movedim(-1, 1)
        y = None if y is None else y.to(device)

        def q_step(
            x_t: Tensor, t: Tensor, logits: Tensor
        ) -> Tensor:  # where nothing is given, p_theta
            here = given.to(logits.device)
            q = self.q_posterior(x_t, torch.where(here, one_hot.to(logits), logits.softmax(1)), t)
            return (
                q
                if self.reverse == "mixture"
                else torch.where(here, q, self.p_theta(x_t, t, logits))
            )

        def log_ratio(p: Tensor, q: Tensor, x: Tensor) -> Tensor:
            return torch.where(given, p.gather(1, x).log() - q.gather(1, x).log(), 0.0).sum(
                (1, 2, 3)
            )

        p = self.prior.to(known.device)[None, :, None, None].expand(B, -1, *known.shape[2:])
        q = torch.where(given, self.q_x_t(x_0, torch.full((B,), self.timesteps), torch.float64), p)
        u = uniforms()
        x_t = draw(q.to(u.dtype).to(u.device), u)
        log_w = log_ratio(p, q, x_t.to(known.device))
        yield x_t, log_w
        for step in range(self.timesteps, 0, -1):
            u, t = uniforms(), torch.full((B,), step, device=known.device)
            logits = self.x_0_logits(x_t.to(device), t.to(device), y, guidance)
            exact, noisy = logits.to(known.device).double(), x_t.to(known.device)
            p, q = self.p_theta(noisy, t, exact), q_step(noisy, t, exact)
            mode = last_step == "mode" and step == 1
            x_t = draw(q if u.dtype == torch.float64 else q_step(x_t, t, logits.to(u)), u, mode)
            log_w = log_w + log_ratio(p, q, x_t.to(known.device))
            yield x_t, log_w
        if log_w.isnan().any():  # seen earlier on the CPU
            raise ValueError("the network's output is not finite")

    @torch.no_grad()
    def log_weights(
        self,
        x_0: Tensor,
        trajectories: int,
        generator: torch.Generator | None = None,
        y: Tensor | None = None,
        batch_size: int | None = None,
        progress: bool = False,
    ) -> Tensor:
        """log p_theta(x_{0:T}) - log q(x_{1:T} | x_0) of trajectories drawn from q(x_{1:T} | x_0), float64 [B, N].

        Over q, the mean of these is minus the negative bound, and the mean of their exponentials is p_theta(x_0): see
        `importance_weighted`.

        Args:
            x_0: images, integers [B, 1, H, W]; any B and N take the memory of one batch beside the result.
            trajectories: N, how many for each image.
            generator: a CPU generator that all is drawn from.
            y: labels, int64 [B], as in `x_0_logits`.
            batch_size: trajectories at a time (default: `suitable_batch`). With another, a generator draws others.
        """
        batch_size = self.suitable_batch() if batch_size is None else batch_size
        if trajectories < 1 or batch_size < 1:
            raise ValueError("trajectories and batch_size must be at least 1")
        x_0 = x_0.cpu()
        self._check_images("x_0", x_0, self.num_levels)

        def uniforms(n: int) -> Tensor:
            u = torch.rand(n, *x_0.shape[1:], generator=generator, dtype=torch.float64)
            return u.to(self._exact_device())

        log_w = torch.empty(len(x_0) * trajectories, dtype=torch.float64)
        total = len(log_w) * (self.timesteps + 1)
        with tqdm(
            total=total, desc="weights", unit="step", unit_scale=True, disable=not progress
        ) as bar:
            for pairs in torch.arange(len(log_w)).split(batch_size):
                rows = pairs // trajectories
                walk = self._walk(
                    x_0[rows], partial(uniforms, len(rows)), None if y is None else y[rows]
                )
                for _, so_far in walk:
                    whole = so_far
                    bar.update(len(pairs))
                log_w[pairs] = whole.cpu()
        return log_w.view(len(x_0), trajectories)

    # -- sampling -----------------------------------------------------------------------------------------------------

    def labels(self, n: int, first: int = 0) -> Tensor | None:
        """Labels for images first .. first + n - 1, i mod 10 for ten of them, int64 [n]; None without labels."""
        return torch.arange(first, first + n) % self.num_labels if self.num_labels else None

    @torch.no_grad()
    def reverse_process(
        self,
        n: int,
        seed: int = 0,
        first: int = 0,
        y: Tensor | None = None,
        guidance: float = 0.0,
        known: Tensor | None = None,
        particles: int = 1,
        last_step: str = "draw",
        progress: bool = False,
    ) -> Iterator[Tensor]:
        """Walk from noise to data: yields x_T, x_{T-1}, ..., x_0, each int64 [n, 1, H, W], T + 1 tensors in all.

        The n images are numbers first .. first + n - 1 of the sequence that `seed` stands for. Image i draws from a
        random stream of its own, derived from (seed, i), so it does not depend on n or on its neighbours.
        `y` and `guidance` as in `x_0_logits`. The `last_step` may "draw" x_0 from p_theta(x_0 | x_1), or take its
        "mode", as the authors' code does: fewer stray pixels, but x_0 is no draw from the model that the bound is of.

        Filling in: `known`, integers [n or 1, 1, H, W], holds the levels of the pixels that are given and -1 where they
        are to be drawn. N = `particles` walks are made for each image, in which the given pixels follow a forward
        trajectory that ends in what is given, the others p_theta; a walk's weight is the model's probability of the
        given pixels' steps over the forward process's; and one of the N is drawn in proportion to its weight. As N
        grows, x_0 follows the model's own p(x_unknown | x_known). N = 1 is the usual overwriting, "replacement", which
        is biased: what is drawn early knows nothing of what is given but its noise.
        All N walks come before the first x_t, with a progress bar if asked for.

        For absorbing transitions given pixels could also be there from the start instead of appearing at times of their
        own. Then each step sees all of them, and there is nothing to weigh; but the network is asked for x_0 under
        masks that no t in its training has, and what comes out is the model's conditional only if the order in which
        pixels appear makes no difference to it, as it makes none to a perfect network.
        """
        device = self._device()
        y = None if y is None else y.to(device)
        known = self._check_asked(known, n, particles, last_step)
        if known is not None:
            total = n * particles * (self.timesteps + 1)
            with tqdm(
                total=total, desc="filling in", unit="step", unit_scale=True, disable=not progress
            ) as bar:
                chain = self._fill(known, seed, first, y, guidance, particles, last_step, bar)
            yield from (x_t.long().to(device) for x_t in chain)
            return
        uniforms = self._uniforms(
            [np.random.default_rng((seed, i)) for i in range(first, first + n)]
        )
        x_t = draw(
            self.prior.float().to(device)[None, :, None, None].expand(n, -1, *self.image_shape[1:]),
            uniforms(),
        )
        yield x_t
        for t in range(self.timesteps, 0, -1):
            mode = last_step == "mode" and t == 1
            x_t = self.p_sample(
                x_t, torch.full((n,), t, device=device), uniforms(), y, guidance, mode
            )
            yield x_t

    def _uniforms(self, streams: list[np.random.Generator]) -> Callable[[], Tensor]:
        """A function that gives float32 [n, 1, H, W] on the network's device, each image's from its own stream."""

        def uniforms() -> Tensor:
            noise = np.stack(
                [stream.random(self.image_shape, dtype=np.float32) for stream in streams]
            )
            return torch.from_numpy(noise).to(self._device())

        return uniforms

    def _fill(
        self, known, seed: int, first: int, y, guidance: float, particles: int, last_step: str, bar
    ) -> Tensor:
        """x_T, ..., x_0 of one walk an image, drawn by its weight from `particles` walks: [T + 1, n, 1, H, W].

        Walk 0 of image i is of the stream (seed, i), like the ordinary one, walk j of (seed, i, j). A stream ends with
        the walk's Gumbel variable: the walk of the largest log-weight plus Gumbel variable is a draw by the weights.
        """
        n, states = len(known), torch.uint8 if self.num_states <= 256 else torch.int16
        chain, chosen = (
            torch.empty(self.timesteps + 1, *known.shape, dtype=states) for _ in range(2)
        )
        best = torch.full((n,), -math.inf, dtype=torch.float64)
        for j in range(particles):
            streams = [
                np.random.default_rng((seed, i, j) if j else (seed, i))
                for i in range(first, first + n)
            ]
            score = torch.zeros_like(best)
            for k, (x_t, log_w) in enumerate(
                self._walk(known, self._uniforms(streams), y, guidance, last_step)
            ):
                chain[k], score = x_t, log_w
                bar.update(n)
            score = score.cpu() + torch.tensor(
                [stream.gumbel() for stream in streams], dtype=torch.float64
            )
            if j == 0:
                score[(known < 0).flatten(1).all(1)] = (
                    math.inf
                )  # nothing to weigh: the ordinary walk
            better = score >= best
            best, chosen[:, better] = torch.where(better, score, best), chain[:, better]
        return chosen

    @torch.no_grad()
    def sample(
        self,
        n: int,
        seed: int = 0,
        first: int = 0,
        batch_size: int | None = None,
        progress: bool = False,
        y: Tensor | None = None,
        guidance: float = 0.0,
        known: Tensor | None = None,
        particles: int = 1,
        last_step: str = "draw",
    ) -> Tensor:
        """Draw n images from the model, or what is unknown of them: uint8 [n, 1, H, W] on the CPU.

        Any n takes the memory of one batch beside the result. See `reverse_process` for `seed` and `first`, for `known`
        and `particles`, and for `last_step`; `x_0_logits` for `guidance` and the labels `y`, int64 [n].
        By default the `batch_size` is `suitable_batch`.

        Raises:
            ValueError: if an argument is out of range.
        """
        batch_size = self.suitable_batch() if batch_size is None else batch_size
        if n < 1 or batch_size < 1 or first < 0 or not 0 <= seed < 2**32:
            raise ValueError(
                "n and batch_size must be at least 1, first at least 0, seed in 0..2^32-1"
            )
        if y is not None:
            check_integers("y", y, (n,), -1, self.num_labels - 1)
        known = self._check_asked(known, n, particles, last_step)
        images = torch.empty(n, *self.image_shape, dtype=torch.uint8)
        total = n * (self.timesteps + 1) * (1 if known is None else particles)
        with tqdm(
            total=total, desc="sampling", unit="step", unit_scale=True, disable=not progress
        ) as bar:
            for start in range(0, n, batch_size):
                batch = slice(start, min(start + batch_size, n))
                size, label = batch.stop - start, None if y is None else y[batch]
                if known is not None:
                    x_0 = self._fill(
                        known[batch],
                        seed,
                        first + start,
                        label,
                        guidance,
                        particles,
                        last_step,
                        bar,
                    )[-1]
                else:
                    for x_t in self.reverse_process(
                        size, seed, first + start, label, guidance, last_step=last_step
                    ):
                        x_0 = x_t
                        bar.update(size)
                images[batch] = x_0.cpu()
        return images

    # -- what every method asks of its arguments ----------------------------------------------------------------------

    def _device(self) -> torch.device:
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    def _exact_device(self) -> torch.device:
        """Where walks are weighed, in float64: with the network, but for MPS, which has none."""
        return torch.device("cpu") if self._device().type == "mps" else self._device()

    def suitable_batch(self) -> int:
        """How many images at a time suit the device: few enough for a CPU's caches, or enough to keep a GPU busy."""
        if self._device().type != "cuda":
            return 64
        return max(1, min(512, 2**24 // (self.num_states * math.prod(self.image_shape))))

    def _check_images(self, name: str, x: Tensor, states: int) -> None:
        check_integers(name, x, (None, 1, None, None), 0, states - 1)

    def _check_asked(
        self, known: Tensor | None, n: int, particles: int, last_step: str
    ) -> Tensor | None:
        """What is given of n images, int64 [n, 1, H, W] on the CPU; None if nothing is."""
        if last_step not in LAST_STEPS:
            raise ValueError(
                f"unknown last step {last_step!r}: choose from {', '.join(LAST_STEPS)}"
            )
        if particles < 1:
            raise ValueError(f"particles must be at least 1, got {particles}")
        if known is None:
            return None
        known, (_, H, W) = known.cpu(), self.image_shape
        check_integers(
            "known", known, (1 if known.shape[:1] == (1,) else n, 1, H, W), -1, self.num_levels - 1
        )
        return known.long().expand(n, -1, -1, -1) if (known >= 0).any() else None

    def _check_t(self, t: Tensor, x: Tensor, least: int = 1) -> None:
        check_integers("t", t, (len(x),), least, self.timesteps)


def check_integers(name: str, x: Tensor, shape: tuple, low: int, high: int) -> None:
    """Raise a ValueError unless x holds integers low..high in that shape, where None stands for any length."""
    fits = len(shape) == x.ndim and all(
        want in (None, have) for want, have in zip(shape, x.shape, strict=True)
    )
    if not fits or x.is_floating_point() or x.is_complex():
        wanted = ", ".join("any" if want is None else str(want) for want in shape)
        raise ValueError(f"{name} must be integers [{wanted}], got {x.dtype} {list(x.shape)}")
    if x.device.type == "cpu" and x.numel() and not (low <= x.min() and x.max() <= high):
        raise ValueError(f"{name} must be in {low}..{high}, got {x.min()}..{x.max()}")


def importance_weighted(log_w: Tensor) -> Tensor:
    """The importance-weighted negative bound -log (1/N) sum over n of w_n (Burda et al. 2016): [B, N] -> [B], in nats.

    For N = 1 it is the plain bound; in expectation it falls in N, towards -log p(x_0).
    """
    return math.log(log_w.shape[1]) - log_w.logsumexp(1)


# ---------------------------------------------------------------------------------------------------------------------
# The few operations on distributions that the equations above are made of


def take_columns(matrices: Tensor, x: Tensor) -> Tensor:
    """Column x of each image's matrix, pixel by pixel: matrices [B, R, S], x [B, 1, H, W] -> [B, R, H, W]."""
    B = len(x)
    index = x.long().view(B, 1, -1).expand(B, matrices.shape[1], -1)
    return matrices.gather(2, index).view(B, -1, *x.shape[2:])


def draw(probs: Tensor, u: Tensor | None = None, mode: bool = False) -> Tensor:
    """Sample from probs [B, S, H, W] by inverting the cumulative distribution at u [B, 1, H, W] -> int64 [B, 1, H, W];
    or take the most probable states, their `mode`.

    A state of probability exactly 0 is never drawn: u < 1 is scaled by the total, so rounding cannot push it past
    the last possible state. Nor is one of next to no probability because u is 0, which stands for 0 to its resolution.
    """
    if mode:
        return probs.argmax(1, keepdim=True)
    u = torch.rand(len(probs), 1, *probs.shape[2:], device=probs.device) if u is None else u
    u = u.clamp(min=torch.finfo(u.dtype).eps / 4)
    cumulative = probs.cumsum(1)
    return (u * cumulative[:, -1:] >= cumulative[:, :-1]).sum(1, keepdim=True)


def kl_divergence(q: Tensor, p: Tensor, dim: int) -> Tensor:
    """sum of q log(q / p) over `dim`, in nats: 0 log 0 = 0, and +inf where q > 0 = p.

    A q so small that its p can underflow (below 1e-19 in float32) counts as 0: its term is far below rounding.
    """
    counts = q > torch.finfo(q.dtype).tiny ** 0.5
    return (torch.xlogy(q, q) - q * torch.where(counts, p, 1.0).log()).sum(dim)
