"""One training step and all that it carries from step to step: weights, their average, the optimizer, the noise."""

import math
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.profiler import record_function

from dataset import stream_seed
from diffusion import DiscreteDiffusion
from model import accelerated

OPTIMIZERS = ("muon", "adamw")
DECAYS = ("late", "cosine")
WARMUP_STEPS = 100
LATE = 0.3  # the share of the steps over which the late decay goes down
BETAS = (0.9, 0.99)
WEIGHT_DECAY = 0.01
MAX_GRAD_NORM = 1.0


@dataclass(frozen=True)
class Processes:
    """Which process this is among those that torchrun has started: by number, and by number on this machine."""

    rank: int = 0
    local_rank: int = 0
    size: int = 1

    @classmethod
    def from_environment(cls) -> "Processes":
        """Raises ValueError if torchrun's variables are there in part or are not numbers."""
        text = [os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")]
        if not any(text):
            return cls()
        try:
            rank, local_rank, size = map(int, text)
            if not 0 <= local_rank <= rank < size:
                raise ValueError
        except (TypeError, ValueError):
            raise ValueError(
                f"RANK, LOCAL_RANK and WORLD_SIZE are {', '.join(map(repr, text))}: torchrun sets all three"
            ) from None
        return cls(rank, local_rank, size)

    def start(self, device: torch.device) -> torch.device:
        """Meet the others, if any; the device of this process."""
        if self.size == 1:
            return device
        if device.type == "cuda":
            device = torch.device("cuda", self.local_rank)
            torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        return device

    def mean(self, *values: float) -> list[float]:
        """The mean of each value over all processes, which wait here for each other."""
        if self.size == 1:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(sums)
        return (sums / self.size).tolist()

    def share(self, batch_size: int) -> slice:
        """This process's part of a batch. Raises ValueError if it can't be shared equally."""
        if batch_size % self.size:
            raise ValueError(f"the batch of {batch_size} can't be shared equally by {self.size} processes")
        return slice(self.rank * batch_size // self.size, (self.rank + 1) * batch_size // self.size)


class Trainer:
    """A diffusion in training.

    Args:
        diffusion: around the network, which is already on its device.
        total_steps: how many steps the learning rate is planned for.
        batch_size: images per step, those of all processes together.
        lr: the peak learning rate; see `learning_rate` for its course with `decay`.
        optimizer: "adamw" or "muon".
        label_dropout: the share of images whose label is hidden from a network that takes labels.
        seed: of the noise; with the number of the step it decides all that is random here.
        amp: run the network in bfloat16. compiled: compile it first.
        max_grad_norm: the gradient is clipped to this norm.

    Attributes:
        network: what is trained. averaged: the diffusion around the average of its weights, in eval mode.
        steps: how many steps are done.

    Raises:
        ValueError: for Muon and a network without `hidden_matrices`, or a batch that can't be shared equally.
    """

    def __init__(
        self,
        diffusion: DiscreteDiffusion,
        total_steps: int,
        batch_size: int = 128,
        lr: float = 1e-4,
        optimizer: str = "adamw",
        decay: str = "late",
        label_dropout: float = 0.1,
        seed: int = 0,
        amp: bool = False,
        compiled: bool = False,
        max_grad_norm: float = MAX_GRAD_NORM,
        processes: Processes = Processes(),
    ):
        self.network, self.steps = diffusion.model, 0
        self.total_steps, self.batch_size, self.lr, self.decay = total_steps, batch_size, lr, decay
        self.label_dropout, self.seed, self.max_grad_norm = label_dropout, seed, max_grad_norm
        self.shard = processes.share(batch_size)
        model = accelerated(self.network, amp, compiled)
        model = DistributedDataParallel(model) if processes.size > 1 else model
        self.diffusion = diffusion.around(model)
        self.average = AveragedModel(self.network, multi_avg_fn=move_average, use_buffers=True)
        self.averaged = diffusion.around(self.average.module).eval()
        self.network.train()
        if optimizer == "muon":
            self.optimizer: torch.optim.Optimizer = Muon(self.network, lr, torch.bfloat16 if amp else torch.float32)
        else:
            self.optimizer = torch.optim.AdamW(self.network.parameters(), lr, betas=BETAS, weight_decay=WEIGHT_DECAY)

    def step(self, x_0: Tensor, y: Tensor | None = None) -> Tensor:
        """Learn from one batch of all processes, x_0 [B, 1, H, W] and labels y [B]; the loss, a scalar, detached.

        The noise depends on (seed, step) alone: a resumed run draws what the uninterrupted one would have drawn, and
        processes that share a batch draw what one process would have drawn, and take their part of it.
        """
        device = next(self.network.parameters()).device
        with record_function("noise"):
            generator = torch.Generator().manual_seed(stream_seed(self.seed, 0, self.steps))
            t = self.diffusion.draw_t(len(x_0), generator)
            u = torch.rand(x_0.shape, generator=generator)
            if self.diffusion.num_labels and y is not None:
                y = y.masked_fill(torch.rand(len(y), generator=generator) < self.label_dropout, -1)
            else:
                y = None
            x_0, t, u, y = (v if v is None else v[self.shard].to(device) for v in (x_0, t, u, y))
        with record_function("forward"):
            loss = self.diffusion.loss(x_0, t, u, y)
        with record_function("backward"):
            self.optimizer.zero_grad()
            loss.backward()
        with record_function("optimizer"):
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.max_grad_norm)
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(self.lr, self.steps, self.total_steps, self.decay)
            self.optimizer.step()
        with record_function("average"):
            self.average.update_parameters(self.network)
        self.steps += 1
        return loss.detach()

    def validate(self, x_0: Tensor) -> float:
        """The averaged network's bound in nats per image, L_0 and one t a digit: the same noise each time."""
        return self.averaged.variational_bound(x_0, 1, torch.Generator().manual_seed(0)).mean().item()

    def state_dict(self) -> dict:
        return {
            "weights": self.network.state_dict(),
            "averaged_weights": self.average.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.steps,
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on where `state_dict` was taken. Raises ValueError if it is another network's or optimizer's."""
        try:
            self.network.load_state_dict(state["weights"])
            self.average.module.load_state_dict(state["averaged_weights"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, TypeError, ValueError, KeyError, AttributeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"the run to resume does not fit this version of the repository: {reason}") from None
        self.steps = state["step"]
        self.average.n_averaged.fill_(self.steps)


def learning_rate(peak: float, step: int, total: int, decay: str = "late") -> float:
    """A short warm-up; then the peak until the last 30 % of the steps, which go down to 0 in a line; or a cosine."""
    rate = peak * min(1.0, (step + 1) / max(1, min(WARMUP_STEPS, total // 10)))
    if decay == "cosine":
        return rate * 0.5 * (1 + math.cos(math.pi * step / total))
    return rate * min(1.0, (total - step) / (LATE * total))


def decay_start(total: int) -> int:
    """The first step of the late decay."""
    return math.ceil((1 - LATE) * total)


def move_average(averaged: list[Tensor], current: list[Tensor], n: Tensor) -> None:
    """Exponential moving average over about the last ninth of the steps so far, at most 1,000 of them."""
    decay = min(0.999, (1 + int(n)) / (10 + int(n)))
    for a, c in zip(averaged, current, strict=True):
        a.lerp_(c, 1 - decay) if a.is_floating_point() else a.copy_(c)


class Muon(torch.optim.AdamW):
    """AdamW, but the matrices inside the network step along their orthogonalised momentum (Jordan et al. 2024).

    torch.optim.Muon takes no convolutions, and computes in bfloat16, which most CPUs only emulate. The update is scaled
    to AdamW's typical size, so that one learning rate serves both (Liu et al. 2025, arXiv:2502.16982).
    """

    MOMENTUM = 0.95

    def __init__(self, network: nn.Module, lr: float, dtype: torch.dtype = torch.float32):
        if not hasattr(network, "hidden_matrices"):
            raise ValueError(f"muon needs a network with hidden_matrices(), which {type(network).__name__} has not")
        super().__init__(network.parameters(), lr, betas=BETAS, weight_decay=WEIGHT_DECAY)
        self.matrices, self.dtype = network.hidden_matrices(), dtype

    @torch.no_grad()
    def step(self):
        (group,) = self.param_groups
        for p in self.matrices:
            if p not in self.state:  # AdamW wants a step in every state that it loads
                self.state[p] = {"step": torch.tensor(0.0), "momentum": torch.zeros_like(p)}
            momentum = self.state[p]["momentum"]
            momentum.lerp_(p.grad, 1 - self.MOMENTUM)
            look_ahead = p.grad.lerp(momentum, self.MOMENTUM).flatten(1)  # Nesterov's
            update = orthogonalized(look_ahead, self.dtype)
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.add_(update.view_as(p), alpha=-group["lr"] * 0.2 * math.sqrt(max(update.shape)))
            p.grad = None  # AdamW passes over it
        super().step()


def orthogonalized(matrix: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """U V^T of the matrix U S V^T, roughly: its singular values come out between 0.7 and 1.2 (Newton-Schulz)."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = (wide / (wide.norm() + 1e-7)).to(dtype)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return (x if wide is matrix else x.T).to(matrix.dtype)
