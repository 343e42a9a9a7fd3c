"""What a model is worth: its bound on test digits, the quality of its samples, and whether it only remembers.

    python evaluate.py                                        # the model that ships with the repository
    python evaluate.py results_d3pm/checkpoints/last.pth
    python evaluate.py CHECKPOINT --exact --images 500        # every t for 500 digits, instead of a few t for all
    python evaluate.py --train-classifier                     # how the judge of the samples was made

Writes evaluation.json, bound_terms.png and nearest.png into the folder of the checkpoint's run (or --out-dir).
Samples are those of sample.py's defaults; the bound is that of the whole chain.
"""

import argparse
import json
import math
import os
import sys
import warnings
from pathlib import Path

# Read when torch loads: waiting threads sleep instead of spinning, 3 times as fast beside another busy program.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from dataset import image_grid, load_digits, to_levels
from diffusion import RELEASED, DiscreteDiffusion, atomic_write, load_checkpoint, read_checkpoint, save_checkpoint
from model import pick_device
from sample import GUIDANCE, TIMESTEPS

CLASSIFIER = Path(__file__).parent / "results_d3pm" / "released" / "classifier.pth"
REAL_PIXELS = 28 * 28  # bits per dimension count these; the terms of the padded border stay in the sum
BATCH = 250

# ---------------------------------------------------------------------------------------------------------------------
# The bound


@torch.no_grad()
def bound_terms(
    diffusion: DiscreteDiffusion, x_0: Tensor, repeats: int | None, device, progress: bool = False, seed: int = 0
) -> dict:
    """The terms of the variational bound on images x_0 [N, 1, H, W], without labels, in nats.

    Args:
        repeats: how many t of 2..T to draw per image; None for every t. L_0 (t = 1) is always computed for all images.
        seed: of the t and of the noise.

    Returns:
        L_T, L_0: float64 [N]; L_t_minus_1: float64 [N], the (estimated) sum over t = 2..T; t, terms: what was drawn,
        flat, for the plot.
    """
    generator = torch.Generator().manual_seed(seed)
    T, N = diffusion.timesteps, len(x_0)
    if repeats is None:
        ts = torch.arange(1, T + 1).expand(N, T)
    else:
        # For each image one t in each of `repeats` equal parts of 2..T: less variance than independent draws.
        position = (torch.arange(repeats) + torch.rand(N, repeats, generator=generator)) / repeats
        ts = torch.cat([torch.ones(N, 1, dtype=torch.long), 2 + (position * (T - 1)).long().clamp(max=T - 2)], dim=1)
    if T == 1:
        ts = ts[:, :1]
    terms = torch.empty(ts.shape, dtype=torch.float64)
    with tqdm(total=ts.numel(), desc="bound", unit="term", unit_scale=True, disable=not progress) as bar:
        for rows in torch.arange(N).split(BATCH):
            batch = x_0[rows].to(device)
            for k in range(ts.shape[1]):
                t = ts[rows, k].to(device)
                u = torch.rand(batch.shape, generator=generator).to(device)
                terms[rows, k] = diffusion.L_t_minus_1(batch, diffusion.q_sample(batch, t, u), t).cpu().double()
                bar.update(len(rows))
    weight = 1 if repeats is None else (T - 1) / repeats
    return {
        "L_T": diffusion.L_T(x_0).double(),
        "L_t_minus_1": weight * terms[:, 1:].sum(1),
        "L_0": terms[:, 0],
        "t": ts.flatten(),
        "terms": terms.flatten(),
    }


def summarize_bound(*draws: dict) -> dict:
    """Means in nats per image, their standard error over images, and bits per dimension.

    Args:
        draws: what bound_terms gave for the same images, once or for several random binarizations of them. Several add
            the standard error over binarizations; that over images is then of each image's mean.
    """
    mean = {key: torch.stack([terms[key] for terms in draws]).mean(0) for key in ("L_T", "L_t_minus_1", "L_0")}
    total = mean["L_T"] + mean["L_t_minus_1"] + mean["L_0"]
    nats, error = total.mean().item(), total.std().item() / len(total) ** 0.5
    summary = {
        "nats_per_image": nats,
        "standard_error": error,
        "bits_per_dimension": nats / REAL_PIXELS / math.log(2),
        "L_T": mean["L_T"].mean().item(),
        "sum_L_t_minus_1": mean["L_t_minus_1"].mean().item(),
        "L_0": mean["L_0"].mean().item(),
        "images": len(total),
    }
    if len(draws) > 1:
        of_draws = torch.stack([(d["L_T"] + d["L_t_minus_1"] + d["L_0"]).mean() for d in draws])
        summary["binarizations"] = len(draws)
        summary["standard_error_over_binarizations"] = of_draws.std().item() / len(draws) ** 0.5
    return summary


def plot_terms(draws: list[dict], network_t: Tensor, path: Path) -> None:
    from matplotlib.figure import Figure

    t, terms = (torch.cat([draw[key] for draw in draws]) for key in ("t", "terms"))
    sums = torch.zeros(len(network_t), dtype=torch.float64).index_add_(0, t, terms)
    counts = torch.bincount(t, minlength=len(network_t))
    seen = counts > 0
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    axis.plot(network_t[seen], (sums / counts)[seen], marker=".", linewidth=0.8)
    axis.set(
        xlabel="t", ylabel="mean term of the bound, nats per image", yscale="log", title="Where the bound comes from"
    )
    axis.grid(alpha=0.3, which="both")
    save_figure(figure, path)


# ---------------------------------------------------------------------------------------------------------------------
# The judge: a small classifier of digits


class Classifier(nn.Module):
    """Grey images in [0, 1], float [B, 1, 32, 32] -> logits [B, 10]; `features` are the 64 before the last layer."""

    def __init__(self):
        super().__init__()

        def layer(i: int, o: int, stride: int = 1) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU())

        self.body = nn.Sequential(
            layer(1, 16, 2), layer(16, 16), layer(16, 32, 2), layer(32, 32), layer(32, 64, 2), layer(64, 64)
        )
        self.head = nn.Linear(64, 10)

    def features(self, grey: Tensor) -> Tensor:
        return self.body(grey).mean((2, 3))

    def forward(self, grey: Tensor) -> Tensor:
        return self.head(self.features(grey))


def load_classifier(device) -> Classifier:
    if not CLASSIFIER.exists():
        raise FileNotFoundError(f"{CLASSIFIER} is missing: restore it, or make it with evaluate.py --train-classifier")
    classifier = Classifier()
    try:
        classifier.load_state_dict(torch.load(CLASSIFIER, map_location="cpu", weights_only=True))
    except Exception as error:  # torch raises half a dozen types here, with pages of text
        raise ValueError(f"{CLASSIFIER} is damaged ({type(error).__name__})") from None
    return classifier.eval().to(device)


def train_classifier(data_root: str, epochs: int = 12, batch_size: int = 128) -> None:
    """Train the judge on the training split, shifted by up to 2 pixels, half thresholded and half drawn from grey."""
    torch.manual_seed(0)
    digits, test = load_digits("train", "mnist", data_root), load_digits("test", "mnist", data_root)
    classifier = Classifier().to(memory_format=torch.channels_last)
    steps = len(digits.images) // batch_size
    optimizer = torch.optim.AdamW(classifier.parameters(), 3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=epochs * steps)
    for epoch in range(epochs):
        order = torch.randperm(len(digits.images))
        for rows in tqdm(order.split(batch_size)[:steps], desc=f"epoch {epoch + 1}/{epochs}", disable=None):
            grey = digits.images[rows]
            protocols = [to_levels(grey, 2, "threshold"), to_levels(grey, 2, "dynamic")]
            x = torch.where(torch.rand(len(rows), 1, 1, 1) < 0.5, *protocols).float()
            dy, dx = torch.randint(-2, 3, (2,)).tolist()
            loss = F.cross_entropy(classifier(x.roll((dy, dx), (2, 3))), digits.labels[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    save_checkpoint(CLASSIFIER, classifier.state_dict())
    classifier.eval()
    for protocol in ("threshold", "dynamic"):
        x = to_levels(test.images, 2, protocol, torch.Generator().manual_seed(0))
        _, logits = judge(classifier, x, 2, "cpu")
        print(f"{(logits.argmax(1) == test.labels).double().mean():.4f} of {protocol} test digits read right")
    print(f"Wrote {CLASSIFIER} ({CLASSIFIER.stat().st_size / 1000:.0f} kB)")


@torch.no_grad()
def judge(classifier: Classifier, x: Tensor, num_levels: int, device) -> tuple[Tensor, Tensor]:
    """Features float64 [N, 64] and logits [N, 10] of images of levels [N, 1, 32, 32]."""
    features = [classifier.features(batch.to(device).float() / (num_levels - 1)) for batch in x.split(BATCH)]
    features = torch.cat(features)
    return features.cpu().double(), classifier.head(features).cpu()


# ---------------------------------------------------------------------------------------------------------------------
# Sample quality


def spread(x: Tensor, n: int | None) -> Tensor:
    """n of the rows of x, evenly spaced: the first n would not do, since digits come in an order."""
    return x if n is None or n >= len(x) else x[torch.arange(n) * len(x) // n]


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of two sets of features [N, D] (Heusel et al. 2017)."""
    C_a, C_b = a.T.cov(), b.T.cov()
    # The trace of the square root is the sum of the square roots of the eigenvalues, which are real and not negative.
    root = torch.linalg.eigvals(C_a @ C_b).real.clamp(min=0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + C_a.trace() + C_b.trace() - 2 * root).item()


def share_within(points: Tensor, reference: Tensor, k: int = 3) -> float:
    """Share of `points` [N, D] within the k-th neighbour distance of some point of `reference` [M, D].

    Of samples in test digits this is precision, of test digits in samples recall (Kynkaanniemi et al. 2019, k = 3).
    """
    radius = torch.cdist(reference, reference).kthvalue(k + 1, dim=1).values  # the nearest is the point itself
    return (torch.cdist(points, reference) <= radius).any(1).double().mean().item()


def quality(x: Tensor, reference: Tensor, classifier: Classifier, num_levels: int, device, asked=None) -> dict:
    """How like the features of real digits those of the images x are; `reference` are real digits' features [N, D]."""
    features, logits = judge(classifier, x, num_levels, device)
    read, same_size = logits.argmax(1), spread(reference, len(x))
    result = {
        "images": len(x),
        "frechet_distance": frechet_distance(features, reference),
        "precision": share_within(features, same_size),
        "recall": share_within(same_size, features),
        "mean_confidence": logits.softmax(1).amax(1).mean().item(),
        "class_histogram": (torch.bincount(read, minlength=10) / len(x)).tolist(),
        "ink": x.double().mean().item() / (num_levels - 1),
    }
    if asked is not None:
        result["read_as_asked"] = (read == asked).double().mean().item()
    return result


def nearest_digits(samples: Tensor, train: Tensor, k: int = 7) -> tuple[Tensor, Tensor]:
    """Each sample followed by its k nearest training digits, [n (k + 1), 1, H, W], and the least distances [n].

    The distance is the sum of absolute level differences: for two levels, the Hamming distance in pixels.
    """
    distance = torch.cdist(samples.flatten(1).float(), train.flatten(1).float(), p=1)
    nearest = distance.topk(k, largest=False)
    rows = torch.cat([samples[:, None], train[nearest.indices]], dim=1)
    return rows.flatten(0, 1), nearest.values[:, 0]


# ---------------------------------------------------------------------------------------------------------------------


def save_figure(figure, path: Path) -> None:
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120)


def write_json(path: Path, value) -> None:
    with atomic_write(path) as file:
        file.write(json.dumps(value, indent=2).encode())


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoint", nargs="?", type=Path, help="a .pth file written by train.py (default: the released model)")
    add("--timesteps", type=int, metavar="N", help="steps from noise to digits (default: those of sample.py for the "
        "samples, all for the bound); the bound becomes that of the shorter chain")  # fmt: skip
    add("--binarizations", type=int, default=1, metavar="N", help="average the bound over N random binarizations of "
        "the digits (default 1); for checkpoints of train.py --binarize dynamic")  # fmt: skip
    add("--images", type=int, metavar="N", help="bound on N of the digits only (default all)")
    add("--repeats", type=int, default=4, help="timesteps drawn per digit for the bound (default 4)")
    add("--exact", action="store_true", help="every timestep for the bound: T passes over the digits")
    add("--num-samples", type=int, default=500, help="images drawn to judge (default 500)")
    add("--guidance", type=float, metavar="W", help="of the samples (default: that of sample.py)")
    add("--no-labels", action="store_true", help="draw them without classes from a conditional checkpoint")
    add("--seed", type=int, default=0, help="of the samples, as for sample.py (default 0)")
    add("--data", choices=["auto", "mnist", "offline"], default="auto", help="as for train.py (default auto)")
    add("--data-root", default="data", help="where MNIST is or goes (default data)")
    add(
        "--out-dir",
        type=Path,
        help="where to write (default: the folder of the run; results_d3pm/evaluation for the released model)",
    )
    add("--device", default="auto", help="cpu, cuda, mps, ... (default auto: the best there is)")
    add("--train-classifier", action="store_true", help="make the classifier that judges samples; needs MNIST")
    args = parser.parse_args()
    if args.checkpoint and args.train_classifier:
        parser.error("give a checkpoint or --train-classifier")
    if min(args.repeats, args.binarizations) < 1 or (args.images or 2) < 2 or args.seed < 0:
        parser.error("--repeats and --binarizations must be at least 1, --images at least 2, --seed at least 0")
    if args.guidance is not None and (args.no_labels or not 0 <= args.guidance < math.inf):
        parser.error("--guidance must be at least 0, and needs labels")
    if args.num_samples < 20:
        parser.error("--num-samples must be at least 20: fewer say nothing about a distribution")
    return args


def main() -> None:
    args = parse_arguments()
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    if args.train_classifier:
        train_classifier(args.data_root)
        return
    device = pick_device(args.device)
    if args.checkpoint is None:
        args.checkpoint = RELEASED
        print(f"Using the released model, {RELEASED}")
    folder = args.checkpoint.parent
    run = folder.parent if folder.name == "checkpoints" else folder
    if folder.resolve() == RELEASED.parent:  # part of the repository
        run = Path("results_d3pm") / "evaluation"
    diffusion = load_checkpoint(args.checkpoint, device, args.timesteps)
    checkpoint = read_checkpoint(args.checkpoint)
    if diffusion.classes(1) is None and (args.no_labels or args.guidance is not None):
        flag = "--no-labels" if args.no_labels else "--guidance"
        raise ValueError(f"{flag}: {args.checkpoint} was trained without classes")
    classifier = load_classifier(device)
    K, protocol, trained_on = diffusion.num_classes, checkpoint.get("binarize", "threshold"), checkpoint["data"]
    if args.binarizations > 1 and protocol != "dynamic":
        raise ValueError(f"--binarizations: {args.checkpoint} was trained on digits that are not drawn at random")
    out_dir = args.out_dir or run
    out_dir.mkdir(parents=True, exist_ok=True)

    def levels(grey: Tensor, seed: int) -> Tensor:
        return to_levels(grey, K, protocol, torch.Generator().manual_seed(seed))

    # MNIST's test split where MNIST is at hand; else the offline digits that are kept out of training.
    train = load_digits("train", args.data, args.data_root)
    if train.source == "mnist":
        test, name = load_digits("test", "mnist", args.data_root), "MNIST test split"
    else:
        test, name = load_digits("validation", "offline"), "offline validation digits (not the MNIST test split)"
    seen = trained_on == "mnist" and train.source == "offline"  # all offline digits are from MNIST's training split
    if trained_on == "offline" and train.source == "mnist":
        train = load_digits("train", "offline")  # where memorized digits would come from
    x_test, x_train = levels(test.images, 0), levels(train.images, 1)
    what = f"{K} levels" if K > 2 else f"{protocol} binarization"
    report = {"checkpoint": os.path.relpath(args.checkpoint), "digits": name, "levels": K, "binarization": protocol}
    report["timesteps"] = diffusion.timesteps
    report["digits_were_in_training"] = seen
    written = ["evaluation.json", "nearest.png"]

    (out_dir / "bound_terms.png").unlink(missing_ok=True)
    if seen:
        print("No bound: the offline digits are part of MNIST's training split, which this model was trained on.")
    else:
        grey = spread(test.images, args.images)
        repeats = None if args.exact else args.repeats
        draws = [
            bound_terms(diffusion, levels(grey, seed), repeats, device, progress=True, seed=seed)
            for seed in range(args.binarizations)
        ]
        bound = summarize_bound(*draws) | {
            "timesteps_per_image": diffusion.timesteps if args.exact else 1 + args.repeats
        }
        report["bound"] = bound
        plot_terms(draws, diffusion.network_t, out_dir / "bound_terms.png")
        written.append("bound_terms.png")
        print(
            f"Bound, {name}, {what}, no labels: {bound['nats_per_image']:.2f} +- {bound['standard_error']:.2f} nats "
            f"per image = {bound['bits_per_dimension']:.4f} bits per dimension\n"
            f"  L_T {bound['L_T']:.3f}, sum of L_(t-1) {bound['sum_L_t_minus_1']:.2f}, L_0 {bound['L_0']:.3f}"
        )
        if args.binarizations > 1:
            print(
                f"  mean of {args.binarizations} binarizations, whose standard error is "
                f"{bound['standard_error_over_binarizations']:.3f}"
            )

    asked = None if args.no_labels else diffusion.classes(args.num_samples)
    guidance = GUIDANCE if args.guidance is None else args.guidance
    sampler = diffusion if args.timesteps else diffusion.respaced(min(TIMESTEPS, diffusion.timesteps))
    samples = sampler.sample(args.num_samples, args.seed, progress=True, y=asked, guidance=guidance)
    reference, _ = judge(classifier, x_test, K, device)
    report["samples"] = {"timesteps": sampler.timesteps, "guidance": 0.0 if asked is None else guidance}
    report["samples"] |= quality(samples, reference, classifier, K, device, asked)
    report["training_digits"] = quality(spread(x_train, args.num_samples), reference, classifier, K, device)
    columns = {"samples": "samples", "training_digits": "training digits"}
    if asked is not None:  # what their even classes, which MNIST has not, are worth to real digits
        rows = torch.cat(
            [spread((train.labels == c).nonzero()[:, 0], int(n)) for c, n in enumerate(asked.bincount(minlength=10))]
        )
        columns["training_digits_of_these_classes"] = "of these classes"
        report["training_digits_of_these_classes"] = quality(x_train[rows], reference, classifier, K, device)
    print(" " * 18 + "".join(f"{heading:>17}" for heading in columns.values()))
    for key in ("frechet_distance", "precision", "recall", "mean_confidence", "ink", "read_as_asked"):
        shown = "".join(f"{report[column][key]:17.3f}" for column in columns if key in report[column])
        if shown:
            print(f"{key.replace('_', ' '):18}{shown}")
    for key in ("samples", "training_digits"):
        shares = " ".join(f"{share:.2f}" for share in report[key]["class_histogram"])
        print(f"classes 0-9, {columns[key]}: {shares}")

    rows, least = nearest_digits(samples[:8], x_train)
    report["nearest_training_digit"] = {"least_distances": least.tolist()}
    with atomic_write(out_dir / "nearest.png") as file:
        image_grid(rows, K, columns=8).save(file, format="png")
    write_json(out_dir / "evaluation.json", report)
    print(f"Wrote {', '.join(written)} in {out_dir}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"evaluate.py: error: {(str(error) or type(error).__name__).splitlines()[0]}")
    except KeyboardInterrupt:
        sys.exit(130)
