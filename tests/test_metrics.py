"""The metrics of evaluate.py against closed forms, brute force and counts by hand."""

import math

from cli import UserError

import numpy as np
import pytest
import torch

import metrics
from dataset import Dataset, load_dataset, take, to_levels
from diffusion import BoundTerms
from metrics import (
    Classifier,
    frechet_distance,
    isolated,
    judge,
    load_classifier,
    nearest_digits,
    quality,
    rows_of_classes,
    share_within,
    spread,
    summarize_bound,
    summarize_gain,
    train_classifier,
)

# --------------------------------------------------------------------------------------------------
# The bound


def bound_of(L_T, L_t_minus_1, L_0, n=5) -> BoundTerms:
    """Bound parts of some images, from n terms each."""
    parts = [torch.tensor(v, dtype=torch.float64) for v in (L_T, L_t_minus_1, L_0)]
    return BoundTerms(*parts, torch.ones(len(L_T), n, dtype=torch.long), torch.zeros(len(L_T), n))


def test_bound_of_one_binarization_by_hand():
    """Three images with totals 4, 7 and 10: mean 7, standard deviation 3."""
    summary = summarize_bound(bound_of([1, 1, 1], [2, 4, 6], [1, 2, 3]))
    expected = {"nats_per_image": 7, "L_T": 1, "sum_L_t_minus_1": 4, "L_0": 2, "label_cost": 0}
    expected |= {"standard_error": 3 / math.sqrt(3), "bits_per_dimension": 7 / 784 / math.log(2)}
    expected |= {"images": 3, "timesteps_per_image": 5, "binarizations": 1}
    assert summary == pytest.approx(expected)


def test_bound_of_several_binarizations_by_hand():
    """Two images, three binarizations: totals [1, 3], [2, 6], [3, 9]; means of images 2 and 6."""
    L_t_minus_1, L_0 = [[1, 3], [1.5, 5], [3, 9]], [[0, 0], [0.5, 1], [0, 0]]
    summary = summarize_bound(*map(bound_of, [[0, 0]] * 3, L_t_minus_1, L_0))
    assert summary["nats_per_image"] == pytest.approx(4)
    assert summary["standard_error"] == pytest.approx(2)  # of 2 and 6: sqrt(8) / sqrt(2)
    assert summary["L_0"] == pytest.approx(0.25)
    assert summary["sum_L_t_minus_1"] == pytest.approx(3.75)
    assert summary["binarizations"] == 3 and summary["images"] == 2


def test_gain_by_hand():
    """Two images, three trajectories: k = 1 gains nothing, k = 2 uses the first two, k = 3 all."""
    w = torch.tensor([[1.0, 3.0, 1.0], [2.0, 2.0, 2.0]], dtype=torch.float64)
    bound = {"nats_per_image": 5.0, "standard_error": 0.3}
    result = summarize_gain(w.log(), bound)
    gains = [0, (math.log(2) - math.log(3) / 3) / 2, (math.log(5 / 3) - math.log(3) / 3) / 2]
    assert result["images"] == 2  # standard errors are of 0 and twice the mean
    for k, gain, row in zip((1, 2, 3), gains, result["by_trajectories"], strict=True):
        expected = {"trajectories": k, "gain": gain, "gain_standard_error": gain}
        expected |= {"nats_per_image": 5 - gain, "standard_error": math.hypot(0.3, gain)}
        assert row == pytest.approx(expected, abs=1e-12)
    w = torch.tensor([[1.0, 3, 1, 1], [2, 2, 2, 2]], dtype=torch.float64)
    rows = summarize_gain(w.log(), bound)["by_trajectories"]
    groups = (math.log(2) + math.log(1)) / 2 - math.log(3) / 4  # from both groups of two
    assert [row["trajectories"] for row in rows] == [1, 2, 4]
    assert rows[1]["gain"] == pytest.approx(groups / 2)


# --------------------------------------------------------------------------------------------------
# Sets of features


def test_frechet_distance_of_gaussians():
    """Exact means and covariances: |mean_a - mean_b|^2 + sum over axes of (s_a - s_b)^2."""
    torch.manual_seed(0)
    raw = torch.randn(5000, 6, dtype=torch.float64)
    raw -= raw.mean(0)
    # covariance exactly the identity
    white = raw @ torch.linalg.inv(torch.linalg.cholesky(raw.T.cov())).T
    s_a = torch.arange(1, 7, dtype=torch.float64)
    s_b = torch.tensor([2, 2, 2, 5, 5, 5], dtype=torch.float64)
    turn, _ = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))
    shift = torch.arange(6, dtype=torch.float64)
    expected = (shift.square().sum() + (s_a - s_b).square().sum()).item()
    distance = frechet_distance(white * s_a @ turn, (white * s_b + shift) @ turn)
    assert distance == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(white, white) == pytest.approx(0, abs=1e-9)


def test_share_within_by_hand():
    """Reference 0, 1, 3, 7 on a line with k = 2: radii 3, 2, 3, 6."""
    reference = torch.tensor([[0.0], [1], [3], [7]], dtype=torch.float64)
    points = torch.tensor([[-3.0], [-3.5], [13], [13.5]], dtype=torch.float64)
    assert share_within(points, reference, k=2) == 0.5
    assert share_within(reference, reference, k=2) == 1


def test_share_within_in_blocks():
    """More points and references than fit in one block, against direct computation."""
    rng = np.random.default_rng(0)
    reference = np.concatenate([rng.normal(0, 1, (1050, 3)), rng.normal(3, 1, (1050, 3))])
    points = np.concatenate([rng.normal(5, 2, (1200, 3)), rng.normal(0, 1, (30, 3))])
    radius = [np.sort(np.linalg.norm(reference - r, axis=1))[3] for r in reference]
    within = [(np.linalg.norm(reference - point, axis=1) <= radius).any() for point in points]
    share = share_within(torch.from_numpy(points), torch.from_numpy(reference))
    assert share == pytest.approx(np.mean(within), abs=1e-12) and 0.1 < share < 0.9


def test_spread_and_rows_of_classes():
    x = torch.arange(10)
    assert spread(x, 4).tolist() == [0, 2, 5, 7] and spread(x, None) is x and spread(x, 11) is x
    labels = torch.tensor([0, 1, 0, 2, 0, 0, 1])
    rows = rows_of_classes(labels, torch.tensor([2, 5, 0]))  # rows 0, 2, 4, 5 are of class 0
    assert rows.tolist() == [0, 4, 1, 6] and rows.dtype == torch.int64


def test_nearest_digits_by_hand():
    """Nearest first, by summed level differences; each row starts with the sample."""
    train = torch.tensor([[[[0, 0], [0, 0]]], [[[1, 1], [1, 1]]], [[[3, 0], [1, 1]]]]).byte()
    samples = torch.tensor([[[[1, 0], [1, 1]]], [[[3, 0], [1, 1]]]], dtype=torch.uint8)
    rows, distances = nearest_digits(samples, train, k=3)
    assert distances.tolist() == [1, 0]
    expected = torch.stack([samples[0], *train[[1, 2, 0]], samples[1], *train[[2, 1, 0]]])
    assert torch.equal(rows, expected)
    rows, _ = nearest_digits(samples, train, k=1)
    assert torch.equal(rows, torch.stack([samples[0], train[1], samples[1], train[2]]))


# --------------------------------------------------------------------------------------------------
# What the eye sees


def picture(*white):
    image = torch.zeros(1, 1, 6, 6, dtype=torch.uint8)
    for row, column in white:
        image[0, 0, row, column] = 1
    return image


def test_isolated_pixels_by_hand():
    """A pixel has eight neighbours, fewer at the edge; edges do not wrap around."""
    alone = [picture((2, 2)), picture((0, 0)), picture((0, 0), (0, 5))]
    alone += [picture((1, 1), (1, 2), (4, 4)), picture((2, 2), (2, 4))]
    alone += [picture((5, 5), (3, 5), (2, 5))]
    not_alone = [picture(), picture((2, 2), (3, 3)), picture((0, 5), (1, 4))]
    not_alone += [picture((0, 0), (0, 1)), 1 - picture()]
    assert isolated(torch.cat(alone) > 0).tolist() == [True] * 6
    assert isolated(torch.cat(not_alone) > 0).tolist() == [False] * 5


class Corners(torch.nn.Module):
    """A classifier whose features and logits are the pixels (10, 10) and (10, 20)."""

    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(2, 2, bias=False)
        torch.nn.init.eye_(self.head.weight)

    def features(self, grey):
        return torch.stack([grey[:, 0, 10, 10], grey[:, 0, 10, 20]], dim=1)


def blank(n, level=0):
    """Images with all pixels at one level."""
    return torch.full((n, 1, 32, 32), level, dtype=torch.uint8)


def test_judge_scales_levels_and_keeps_the_order():
    x = blank(600)
    x[:, 0, 10, 10] = torch.arange(600) % 4
    x[:, 0, 10, 20] = 3
    features, logits = judge(Corners(), x, 4)
    assert features.dtype == torch.float64 and features.shape == logits.shape == (600, 2)
    np.testing.assert_allclose(features[:, 0], (torch.arange(600) % 4).double() / 3, atol=1e-7)
    assert (features[:, 1] == 1).all() and torch.equal(logits.double(), features)


def test_quality_by_hand():
    """Eight images of four levels: what counts and what doesn't."""
    x = blank(8)
    x[0, 0, 5, 5] = 2  # one white pixel alone
    x[1] = x[7] = 3  # all white,
    x[1, 0, 8, 8] = x[7, 0, 31, 31] = 1  # except one black pixel
    x[2, 0, 16, 31] = x[3, 0, 2, 2] = x[3, 0, 29, 29] = 1  # grey is not white
    x[4, 0, 10, 10], x[5, 0, 10, 20] = 1, 1  # the pixels of `Corners`
    x[6, 0, 5, 5] = x[6, 0, 6, 6] = 3  # two neighbours
    reference = torch.tensor([[0.0, 0], [1, 0], [0, 1], [1, 1], [0.5, 0.5]], dtype=torch.float64)
    asked = torch.tensor([0, 0, 0, 1, 0, 0, 1, 0])
    result = quality(x, reference, Corners(), 4, asked)
    features, _ = judge(Corners(), x, 4)
    expected = {
        "images": 8,
        "frechet_distance": frechet_distance(features, reference),
        "precision": 1,
        "recall": 1,  # digits far from (0, 0) are within sqrt(13) / 3 of (1, 1)
        "isolated_white": 1 / 8,
        "ink": (2 + 2 * (3 * 1023 + 1) + 1 + 2 + 1 + 1 + 6) / (3 * 8 * 1024),
        "label_accuracy": 5 / 8,
    }
    assert result == pytest.approx(expected)
    assert "label_accuracy" not in quality(x, reference, Corners(), 4)


def test_precision_is_of_samples_and_recall_of_digits():
    """All samples equal one digit: each is near a digit, but few digits are near a sample."""
    grid = torch.cartesian_prod(torch.linspace(0, 1, 5), torch.linspace(0, 1, 4))
    reference = grid.double()  # 20 digits
    collapsed = quality(blank(20), reference, Corners(), 2)
    assert collapsed["precision"] == 1 and collapsed["recall"] == 1 / 20
    everywhere = torch.cat([blank(5), blank(5, 30)])  # half of them far from all digits
    everywhere[1, 0, 10, 10] = everywhere[2, 0, 10, 20] = everywhere[3, 0, 10, 10:21] = 1
    result = quality(everywhere, reference, Corners(), 2)
    assert result["precision"] == 0.5 and result["recall"] == 1


def test_quality_compares_with_as_many_digits_as_there_are_samples():
    """Five samples and ten digits: every second digit, but all for the Fréchet distance."""
    reference = torch.full((10, 2), 9.0, dtype=torch.float64)
    near = [[0, 0], [0, 0.1], [0.1, 0], [0.1, 0.1], [0, 0.2]]
    reference[::2] = torch.tensor(near, dtype=torch.float64)
    x = blank(5)
    x[0, 0, 10, 10] = x[1, 0, 10, 20] = 1
    twice = x.repeat(2, 1, 1, 1)
    few, many = (quality(images, reference, Corners(), 2) for images in (x, twice))
    assert few["recall"] == 1 and many["recall"] == 0.5
    features, _ = judge(Corners(), x, 2)
    assert few["frechet_distance"] == pytest.approx(frechet_distance(features, reference))


# --------------------------------------------------------------------------------------------------
# The released classifier


def test_released_classifier_reads_digits():
    """In eval mode: predictions do not depend on the batch."""
    digits = take(load_dataset("validation", "offline"), 250)
    classifier = load_classifier()
    _, logits = judge(classifier, to_levels(digits.images), 2)
    assert (logits.argmax(1) == digits.labels).float().mean() > 0.98
    _, alone = judge(classifier, to_levels(digits.images[:3]), 2)
    np.testing.assert_allclose(alone, logits[:3], atol=1e-4)


def test_missing_and_damaged_classifier(monkeypatch, tmp_path):
    path = tmp_path / "classifier.pth"
    monkeypatch.setattr(metrics, "CLASSIFIER", path)
    with pytest.raises(UserError, match="train-classifier"):
        load_classifier()
    torch.save({"something": torch.zeros(1)}, tmp_path / "other.pth")
    for content in (b"nonsense", (tmp_path / "other.pth").read_bytes()):
        path.write_bytes(content)
        with pytest.raises(UserError, match="damaged") as error:
            load_classifier()
        assert "\n" not in str(error.value)


def few_digits(monkeypatch, train: Dataset, test: Dataset) -> list:
    """Replace MNIST by these; record the calls."""
    calls = []

    def load(split, data, data_root):
        calls.append((split, data, data_root))
        return train if split == "train" else test

    monkeypatch.setattr(metrics, "load_dataset", load)
    return calls


def test_training_a_classifier(monkeypatch, tmp_path, capsys):
    """It learns, prints its accuracy, loads with `load_classifier`, and is reproducible."""
    train = take(load_dataset("train", "offline"), 900)
    test = Dataset(train.images[1::3], train.labels[1::3], "offline")
    asked = few_digits(monkeypatch, train, test)
    train_classifier("root", tmp_path / "new" / "x.pth", epochs=4, batch_size=32)
    assert asked[:2] == [("train", "mnist", "root"), ("test", "mnist", "root")]
    monkeypatch.setattr(metrics, "CLASSIFIER", tmp_path / "new" / "x.pth")
    lines = capsys.readouterr().out.splitlines()
    for protocol, line in zip(("threshold", "dynamic"), lines, strict=True):
        x = to_levels(test.images, 2, protocol, torch.Generator().manual_seed(0))
        _, logits = judge(load_classifier(), x, 2)
        share = (logits.argmax(1) == test.labels).double().mean()
        assert share > 0.8 and line == f"accuracy {share:.4f} on {protocol} test digits"
    few_digits(monkeypatch, take(train, 64), test)
    for name in "ab":
        train_classifier("root", tmp_path / name, epochs=2, batch_size=32)
    one, two = (torch.load(tmp_path / name, weights_only=True) for name in "ab")
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_what_the_classifier_is_trained_on(monkeypatch, tmp_path):
    """All shifts by up to 2 pixels; half of the digits thresholded, half randomly binarized."""
    seen = []

    class Recorder(Classifier):
        def __init__(self):
            super().__init__()
            self.body = torch.nn.Conv2d(1, 64, 1)

        def forward(self, grey):
            seen.append(grey)
            return super().forward(grey)

    grey = torch.zeros(64, 1, 32, 32, dtype=torch.uint8)
    grey[:, :, 4, 4] = 255  # shows the shift
    grey[:, :, 10:20, 10:20] = 100  # black if thresholded, else white with probability 0.39
    digits = Dataset(grey, torch.arange(64) % 10, "mnist")
    few_digits(monkeypatch, digits, digits)
    monkeypatch.setattr(metrics, "Classifier", Recorder)
    train_classifier("root", tmp_path / "x.pth", epochs=50, batch_size=16)
    shifts, at_random = [], []
    for batch in seen:
        (corner,) = batch[0, 0, :8, :8].nonzero().tolist()
        shifts.append(tuple(corner))
        inside = batch.roll((4 - corner[0], 4 - corner[1]), (2, 3))[:, 0, 10:20, 10:20]
        at_random.append(inside.flatten(1).any(1))
        white = inside[at_random[-1]].mean().item()
        assert white == pytest.approx(0.39, abs=0.2) or not at_random[-1].any()
    assert set(shifts) == {(i, j) for i in range(2, 7) for j in range(2, 7)}
    assert torch.cat(at_random).double().mean().item() == pytest.approx(0.5, abs=0.05)
