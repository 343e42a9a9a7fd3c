"""Metrics of evaluate.py: bounds with standard errors, and the quality of samples."""

import math
from itertools import pairwise

from cli import UserError

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from checkpoint import RELEASED, atomic_write
from dataset import load_dataset, spread, to_levels
from diffusion import BoundTerms
from trajectories import importance_weighted

CLASSIFIER = RELEASED.with_name("classifier.pth")
BATCH = 250


def standard_error(x: Tensor) -> float:
    return x.std().item() / len(x) ** 0.5 if len(x) > 1 else math.nan


def summarize_bound(*draws: BoundTerms, label_cost: float = 0.0, pixels: int = 28 * 28) -> dict:
    """Means in nats per image, their standard error over images, and bits per dimension.

    Args:
        draws: bound terms of the same images, one for each random binarization.
        label_cost: -log p(label) in nats, added if the terms are conditional on the label, so
            that the sum still bounds -log p(image).
        pixels: for bits per dimension, without padding. The bound includes padding.
    """

    def mean(part: str) -> Tensor:  # over the binarizations: float64 [images]
        return torch.stack([getattr(draw, part) for draw in draws]).mean(0)

    total = mean("total") + label_cost
    nats = total.mean().item()
    return {
        "nats_per_image": nats,
        "standard_error": standard_error(total),
        "bits_per_dimension": nats / pixels / math.log(2),
        "L_T": mean("L_T").mean().item(),
        "sum_L_t_minus_1": mean("L_t_minus_1").mean().item(),
        "L_0": mean("L_0").mean().item(),
        "label_cost": label_cost,
        "images": len(total),
        "timesteps_per_image": draws[0].t.shape[1],
        "binarizations": len(draws),
    }


def summarize_gain(log_w: Tensor, bound: dict) -> dict:
    """The gain from averaging k weights inside the logarithm, for k = 1, 2, 4, ..., N.

    Args:
        log_w: log-weights, float64 [B, N], split into groups of k trajectories.
        bound: from `summarize_bound`, possibly of more images. Subtracting the gain gives the
            importance-weighted bound, whose standard error combines both.
    """
    N, rows = log_w.shape[1], []
    for k in [*(2**i for i in range(N.bit_length()) if 2**i < N), N]:
        groups = log_w[:, : N // k * k].reshape(-1, k)
        gains = -log_w.mean(1) - importance_weighted(groups).view(len(log_w), -1).mean(1)
        gain, error = gains.mean().item(), standard_error(gains)
        row = {"trajectories": k, "gain": gain, "gain_standard_error": error}
        row["nats_per_image"] = bound["nats_per_image"] - gain
        row["standard_error"] = math.hypot(bound["standard_error"], error)
        rows.append(row)
    return {"images": len(log_w), "by_trajectories": rows}


# --------------------------------------------------------------------------------------------------
# The classifier that judges samples


class Classifier(nn.Module):
    """Grey images in [0, 1], float [B, 1, 32, 32] -> logits [B, 10]."""

    def __init__(self):
        super().__init__()
        widths, layers = [1, 16, 16, 32, 32, 64, 64], []
        for i, pair in enumerate(pairwise(widths)):
            convolution = nn.Conv2d(*pair, 3, stride=2 - i % 2, padding=1, bias=False)
            layers.append(nn.Sequential(convolution, nn.BatchNorm2d(pair[1]), nn.ReLU()))
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(64, 10)

    def features(self, grey: Tensor) -> Tensor:
        """The input of the last layer, [B, 64]."""
        return self.body(grey).mean((2, 3))

    def forward(self, grey: Tensor) -> Tensor:
        return self.head(self.features(grey))


def load_classifier(device: torch.device | str = "cpu") -> Classifier:
    """The released classifier in eval mode. Raises UserError if it is missing or damaged."""
    classifier = Classifier()
    try:
        classifier.load_state_dict(torch.load(CLASSIFIER, map_location="cpu", weights_only=True))
    except Exception as error:  # torch raises many types
        reason = "missing" if isinstance(error, FileNotFoundError) else "damaged"
        remedy = "restore it, or train it with evaluate.py --train-classifier"
        raise UserError(f"{CLASSIFIER} is {reason}: {remedy}") from None
    return classifier.eval().to(device)


def train_classifier(data_root, out, epochs: int = 12, batch_size: int = 128) -> None:
    """Train on shifted digits, half of them randomly binarized, and print the test accuracy."""
    torch.manual_seed(0)
    digits, test = (load_dataset(split, "mnist", data_root) for split in ("train", "test"))
    classifier = Classifier().to(memory_format=torch.channels_last)
    steps = len(digits.images) // batch_size
    optimizer = torch.optim.AdamW(classifier.parameters(), 3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=epochs * steps)
    with atomic_write(out) as file:
        for epoch in range(epochs):
            order = torch.randperm(len(digits.images)).split(batch_size)[:steps]
            for rows in tqdm(order, desc=f"epoch {epoch + 1}/{epochs}", disable=None):
                grey, y = digits.images[rows], digits.labels[rows]
                protocols = [to_levels(grey, 2, "threshold"), to_levels(grey, 2, "dynamic")]
                x = torch.where(torch.rand(len(rows), 1, 1, 1) < 0.5, *protocols).float()
                x = x.roll(torch.randint(-2, 3, (2,)).tolist(), (2, 3))
                optimizer.zero_grad()
                F.cross_entropy(classifier(x), y, label_smoothing=0.05).backward()
                optimizer.step()
                schedule.step()
        torch.save(classifier.state_dict(), file)
    classifier.eval()
    for protocol in ("threshold", "dynamic"):
        x = to_levels(test.images, 2, protocol, torch.Generator().manual_seed(0))
        _, logits = judge(classifier, x, 2)
        accuracy = (logits.argmax(1) == test.labels).double().mean()
        print(f"accuracy {accuracy:.4f} on {protocol} test digits")


@torch.no_grad()
def judge(classifier: Classifier, x: Tensor, num_levels: int) -> tuple[Tensor, Tensor]:
    """Features float64 [N, 64] and logits [N, 10] of levels [N, 1, 32, 32], both on the CPU."""
    device = classifier.head.weight.device
    batches = (batch.to(device).float() / (num_levels - 1) for batch in x.split(BATCH))
    features = torch.cat([classifier.features(batch) for batch in batches])
    return features.cpu().double(), classifier.head(features).cpu()


# --------------------------------------------------------------------------------------------------
# Sets of images


def rows_of_classes(labels: Tensor, counts: Tensor) -> Tensor:
    """Indices, int64, of counts[c] evenly spaced digits of each class c, or all of them."""
    return torch.cat([spread((labels == c).nonzero()[:, 0], int(n)) for c, n in enumerate(counts)])


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of features [N, D] (Heusel 2017)."""
    C_a, C_b = a.T.cov(), b.T.cov()
    # The root's trace is the sum of the eigenvalues' roots, here real and non-negative.
    root = torch.linalg.eigvals(C_a @ C_b).real.clamp(min=0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + C_a.trace() + C_b.trace() - 2 * root).item()


def share_within(points: Tensor, reference: Tensor, k: int = 3) -> float:
    """Share of `points` [N, D] within the k-th neighbour distance of a point of `reference` [M, D].

    Precision for samples among test digits, recall for test digits among samples (Kynkaanniemi
    2019). In blocks, as all distances between 50,000 points would take 20 GB.
    """
    # k + 1, since each point is its own nearest neighbour
    distances = (torch.cdist(block, reference) for block in reference.split(1000))
    radius = torch.cat([block.kthvalue(k + 1, dim=1).values for block in distances])
    within = [(torch.cdist(block, reference) <= radius).any(1) for block in points.split(1000)]
    return torch.cat(within).double().mean().item()


def isolated(white: Tensor) -> Tensor:
    """Which images, bool [N, 1, H, W], have a white pixel with 8 black neighbours: bool [N]."""
    white = white.float()
    neighbours = F.conv2d(white, white.new_ones(1, 1, 3, 3), padding=1) - white
    return ((white == 1) & (neighbours == 0)).flatten(1).any(1)


def quality(
    x: Tensor, reference: Tensor, classifier: Classifier, num_levels: int, asked=None
) -> dict:
    """Compare images x, levels [N, 1, 32, 32], with real digits by their features `reference`.

    `asked`: the labels that the images were drawn for, int64 [N].
    """
    features, logits = judge(classifier, x, num_levels)
    same_size = spread(reference, len(x))
    result = {
        "images": len(x),
        "frechet_distance": frechet_distance(features, reference),
        "precision": share_within(features, same_size),
        "recall": share_within(same_size, features),
        "isolated_white": isolated(x >= num_levels / 2).double().mean().item(),
        "ink": x.double().mean().item() / (num_levels - 1),
    }
    if asked is not None:
        result["label_accuracy"] = (logits.argmax(1) == asked).double().mean().item()
    return result


def nearest_digits(samples: Tensor, train: Tensor, k: int = 7, p: int = 1) -> tuple[Tensor, Tensor]:
    """Each sample and its k nearest training images, [n (k + 1), 1, H, W]; smallest distances [n].
    p = 1 sums absolute differences of levels, p = 0 counts pixels that differ."""
    distance = torch.cdist(samples.flatten(1).float(), train.flatten(1).float(), p=p)
    nearest = distance.topk(min(k, len(train)), largest=False)
    rows = torch.cat([samples[:, None], train[nearest.indices]], dim=1)
    return rows.flatten(0, 1), nearest.values[:, 0]
