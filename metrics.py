"""The numbers: a bound with its errors; how like real digits samples are, to a small classifier and to the eye."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from checkpoint import RELEASED, atomic_write
from dataset import load_digits, to_levels
from diffusion import BoundTerms, importance_weighted

CLASSIFIER = RELEASED.with_name("classifier.pth")
REAL_PIXELS = (
    28 * 28
)  # bits per dimension count these; the terms of the padded border stay in the sum
BATCH = 250


def summarize_bound(*draws: BoundTerms, label_cost: float = 0.0) -> dict:
    """Means in nats per image, their standard error over images, and bits per dimension.

    Args:
        draws: the terms of the same images, once or for several random binarizations of them. Several add the standard
            error over binarizations; that over images is then of each image's mean.
        label_cost: nats to add where the terms are those given the label, -log p(label): then it bounds p(image), too.
    """
    L_T, L_t_minus_1, L_0 = (torch.stack([getattr(d, name) for d in draws]).mean(0) for name in
                             ("L_T", "L_t_minus_1", "L_0"))  # fmt: skip
    total = L_T + L_t_minus_1 + L_0
    nats = total.mean().item() + label_cost
    summary = {
        "nats_per_image": nats,
        "standard_error": total.std().item() / len(total) ** 0.5,
        "bits_per_dimension": nats / REAL_PIXELS / math.log(2),
        "L_T": L_T.mean().item(),
        "sum_L_t_minus_1": L_t_minus_1.mean().item(),
        "L_0": L_0.mean().item(),
        "images": len(total),
        "timesteps_per_image": draws[0].t.shape[1],
    }
    if label_cost:
        summary["label_cost"] = label_cost
    if len(draws) > 1:
        of_draws = torch.stack([d.total.mean() for d in draws])
        summary["binarizations"] = len(draws)
        summary["standard_error_over_binarizations"] = of_draws.std().item() / len(draws) ** 0.5
    return summary


def summarize_gain(log_w: Tensor, bound: dict) -> dict:
    """How much lower the bound is with k weights averaged inside the logarithm, for k = 1, 2, 4, ..., K, all in nats.

    Args:
        log_w: log-weights, float64 [N, K], of images that may be fewer than the bound is of: the gain hardly varies
            between images. Groups of k out of the K are averaged over; the standard error is over images.
        bound: `summarize_bound` of the plain bound; less the gain, it is the importance-weighted bound, whose error is
            that of both.
    """
    K, rows = log_w.shape[1], []
    for k in [*(2**i for i in range(K.bit_length()) if 2**i < K), K]:
        weighted = (
            importance_weighted(log_w[:, : K // k * k].reshape(-1, k)).view(len(log_w), -1).mean(1)
        )
        gain = -log_w.mean(1) - weighted
        error = gain.std().item() / len(gain) ** 0.5
        rows.append({
            "trajectories": k,
            "gain": gain.mean().item(),
            "gain_standard_error": error,
            "nats_per_image": bound["nats_per_image"] - gain.mean().item(),
            "standard_error": math.hypot(bound["standard_error"], error),
        })  # fmt: skip
    return {
        "images": len(log_w),
        "deviation_within_an_image": log_w.std(1, correction=int(K > 1)).mean().item(),
        "by_trajectories": rows,
    }


# ---------------------------------------------------------------------------------------------------------------------
# The judge: a small classifier of digits


class Classifier(nn.Module):
    """Grey images in [0, 1], float [B, 1, 32, 32] -> logits [B, 10]; `features` are the 64 before the last layer."""

    def __init__(self):
        super().__init__()

        def layer(i: int, o: int, stride: int = 1) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU()
            )

        self.body = nn.Sequential(
            layer(1, 16, 2),
            layer(16, 16),
            layer(16, 32, 2),
            layer(32, 32),
            layer(32, 64, 2),
            layer(64, 64),
        )
        self.head = nn.Linear(64, 10)

    def features(self, grey: Tensor) -> Tensor:
        return self.body(grey).mean((2, 3))

    def forward(self, grey: Tensor) -> Tensor:
        return self.head(self.features(grey))


def load_classifier(device: torch.device | str = "cpu") -> Classifier:
    """The released judge in eval mode. Raises FileNotFoundError or ValueError in one line."""
    if not CLASSIFIER.exists():
        raise FileNotFoundError(
            f"{CLASSIFIER} is missing: restore it, or make it with evaluate.py --train-classifier"
        )
    classifier = Classifier()
    try:
        classifier.load_state_dict(torch.load(CLASSIFIER, map_location="cpu", weights_only=True))
    except Exception as error:  # torch raises half a dozen types here, with pages of text
        raise ValueError(f"{CLASSIFIER} is damaged ({type(error).__name__})") from None
    return classifier.eval().to(device)


def train_classifier(data_root, out, epochs: int = 12, batch_size: int = 128) -> None:
    """Train the judge on the training split, shifted by up to 2 pixels, half thresholded and half drawn from grey."""
    torch.manual_seed(0)
    digits, test = load_digits("train", "mnist", data_root), load_digits("test", "mnist", data_root)
    classifier = Classifier().to(memory_format=torch.channels_last)
    steps = len(digits.images) // batch_size
    optimizer = torch.optim.AdamW(classifier.parameters(), 3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=epochs * steps)
    with atomic_write(out) as file:
        for epoch in range(epochs):
            order = torch.randperm(len(digits.images))
            for rows in tqdm(
                order.split(batch_size)[:steps], desc=f"epoch {epoch + 1}/{epochs}", disable=None
            ):
                grey = digits.images[rows]
                protocols = [to_levels(grey, 2, "threshold"), to_levels(grey, 2, "dynamic")]
                x = torch.where(torch.rand(len(rows), 1, 1, 1) < 0.5, *protocols).float()
                dy, dx = torch.randint(-2, 3, (2,)).tolist()
                loss = F.cross_entropy(
                    classifier(x.roll((dy, dx), (2, 3))), digits.labels[rows], label_smoothing=0.05
                )
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
        torch.save(classifier.state_dict(), file)
    classifier.eval()
    for protocol in ("threshold", "dynamic"):
        x = to_levels(test.images, 2, protocol, torch.Generator().manual_seed(0))
        _, logits = judge(classifier, x, 2)
        print(
            f"{(logits.argmax(1) == test.labels).double().mean():.4f} of {protocol} test digits read right"
        )


@torch.no_grad()
def judge(classifier: Classifier, x: Tensor, num_levels: int) -> tuple[Tensor, Tensor]:
    """Features float64 [N, 64] and logits [N, 10] of images of levels [N, 1, 32, 32], both on the CPU."""
    device = classifier.head.weight.device
    features = [
        classifier.features(batch.to(device).float() / (num_levels - 1)) for batch in x.split(BATCH)
    ]
    features = torch.cat(features)
    return features.cpu().double(), classifier.head(features).cpu()


# ---------------------------------------------------------------------------------------------------------------------
# Sets of images


def spread(x: Tensor, n: int | None) -> Tensor:
    """n of the rows of x, evenly spaced: the first n would not do, since digits come in an order."""
    return x if n is None or n >= len(x) else x[torch.arange(n) * len(x) // n]


def rows_of_classes(labels: Tensor, counts: Tensor) -> Tensor:
    """The rows of counts[c] digits of each class c, or of as many as there are, evenly spaced: int64."""
    return torch.cat([spread((labels == c).nonzero()[:, 0], int(n)) for c, n in enumerate(counts)])


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of two sets of features [N, D] (Heusel et al. 2017)."""
    C_a, C_b = a.T.cov(), b.T.cov()
    # The trace of the square root is the sum of the square roots of the eigenvalues, which are real and not negative.
    root = torch.linalg.eigvals(C_a @ C_b).real.clamp(min=0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + C_a.trace() + C_b.trace() - 2 * root).item()


def share_within(points: Tensor, reference: Tensor, k: int = 3) -> float:
    """Share of `points` [N, D] within the k-th neighbour distance of some point of `reference` [M, D].

    Of samples in test digits this is precision, of test digits in samples recall (Kynkaanniemi et al. 2019, k = 3).
    In blocks: all distances at once would take 20 GB for 50,000 points.
    """
    radius = [
        torch.cdist(block, reference).kthvalue(k + 1, dim=1).values
        for block in reference.split(1000)
    ]
    radius = torch.cat(radius)  # k + 1: the nearest is the point itself
    within = [(torch.cdist(block, reference) <= radius).any(1) for block in points.split(1000)]
    return torch.cat(within).double().mean().item()


def isolated(x: Tensor) -> Tensor:
    """Whether images of two levels, [N, 1, H, W], have a white pixel with no white one among its eight neighbours."""
    white = x.float()
    neighbours = F.conv2d(white, white.new_ones(1, 1, 3, 3), padding=1) - white
    return ((white == 1) & (neighbours == 0)).flatten(1).any(1)


def quality(
    x: Tensor,
    reference: Tensor,
    classifier: Classifier,
    num_levels: int,
    asked: Tensor | None = None,
) -> dict:
    """How like real digits the images x [N, 1, 32, 32] are; `reference` are real digits' features [M, D].

    `asked` are the labels that the images were drawn for, int64 [N]. Isolated pixels and ink in the border of 2, where
    no digit has any, are shares of images; a pixel is white in the upper half of the levels.
    """
    features, logits = judge(classifier, x, num_levels)
    read, same_size = logits.argmax(1), spread(reference, len(x))
    white, border = (x >= num_levels / 2).byte(), torch.ones_like(x[:1], dtype=torch.bool)
    border[:, :, 2:-2, 2:-2] = False
    result = {
        "images": len(x),
        "frechet_distance": frechet_distance(features, reference),
        "precision": share_within(features, same_size),
        "recall": share_within(same_size, features),
        "mean_confidence": logits.softmax(1).amax(1).mean().item(),
        "isolated_white": isolated(white).double().mean().item(),
        "isolated_black": isolated(1 - white).double().mean().item(),
        "ink_in_border": ((x > 0) & border).flatten(1).any(1).double().mean().item(),
        "class_histogram": (torch.bincount(read, minlength=10) / len(x)).tolist(),
        "ink": x.double().mean().item() / (num_levels - 1),
    }
    if asked is not None:
        result["label_accuracy"] = (read == asked).double().mean().item()
    return result


def nearest_digits(samples: Tensor, train: Tensor, k: int = 7) -> tuple[Tensor, Tensor]:
    """Each sample followed by its k nearest training digits, [n (k + 1), 1, H, W], and the least distances [n].

    The distance is the sum of absolute level differences: for two levels, the Hamming distance in pixels.
    """
    distance = torch.cdist(samples.flatten(1).float(), train.flatten(1).float(), p=1)
    nearest = distance.topk(k, largest=False)
    rows = torch.cat([samples[:, None], train[nearest.indices]], dim=1)
    return rows.flatten(0, 1), nearest.values[:, 0]
