"""evaluate.py end to end: the digits used, each number of the report, what is printed, written and
refused. test_metrics.py tests the numbers' definitions."""

import dataclasses
import hashlib
import json
import math
import os
import shutil
from functools import cache, partial
from pathlib import Path

import cli

import numpy as np
import pytest
import torch
from own import SIZE, own_folder, own_model
from PIL import Image
from scripts import call, fail, files, snapshot, succeed, untrained

import evaluate
import metrics
import pictures
from checkpoint import RELEASED
from dataset import CLASSES, Dataset, load_dataset, stream_seed, take, to_levels
from diffusion import DiscreteDiffusion
from metrics import judge, load_classifier, nearest_digits, quality, rows_of_classes, spread
from model import Autocast
from pictures import image_grid
from trajectories import log_weights, respaced

pytestmark = pytest.mark.usefixtures("fresh_directory", "few_digits")
SMALL = "--num-samples 20 --images 12 --repeats 2"
CPU = ["--device", "cpu"]


@cache
def digits_of(source, split) -> Dataset:
    """Small disjoint sets of real digits; of MNIST 100, 60 and 50."""
    offline = load_dataset("train", "offline")
    if source == "offline":
        whole, n = (offline, 80) if split == "train" else (load_dataset(split, "offline"), 40)
        return take(whole, n)
    first, last = {"train": (0, 100), "validation": (100, 160), "test": (160, 210)}[split]
    rows = torch.randperm(len(offline.images), generator=seeded(0))[first:last]
    return Dataset(offline.images[rows], offline.labels[rows], "mnist")


@pytest.fixture
def few_digits(monkeypatch):
    """Replace all data by these, with MNIST present; record the calls. Skip the slow figures."""
    monkeypatch.setattr(evaluate, "save_figure", lambda figure, file: file.write(b"a figure"))
    calls = []

    def load(split, data="auto", data_root="data"):
        calls.append((split, data, data_root))
        return digits_of("offline" if data == "offline" else "mnist", split)

    monkeypatch.setattr(evaluate, "load_dataset", load)
    return calls


def evaluated(flags="", path="x.pth", small=SMALL, out_dir=".", device="cpu") -> tuple[dict, str]:
    """The report of evaluate.py and its stdout."""
    flags = f"{small} {flags} --overwrite --device {device}".split()
    out = succeed("evaluate.py", path, *flags)
    return json.loads((Path(out_dir) / "evaluation.json").read_text()), out


def check(report, expected) -> None:
    for key in expected:
        assert close(report[key], expected[key]), key


def close(a, b) -> bool:
    """Whether two reports agree in every number."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(close(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(close, a, b))
    return a == b if isinstance(a, str | bool) else a == pytest.approx(b, rel=1e-6, abs=1e-9)


def seeded(seed) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def levels(grey, seed=0, protocol="threshold", K=2) -> torch.Tensor:
    """Random binarization draws from its own streams, numbered by `seed`."""
    return to_levels(grey, K, protocol, seeded(stream_seed(seed)))


def expected_bound(d, digits, n, num_t, protocol="threshold", binarizations=1, y=None) -> dict:
    """Mean and error of bound and parts, over n digits or random binarizations."""
    draws = []
    for seed in range(binarizations):
        x_0 = spread(levels(digits.images, seed, protocol), n)
        draws.append(d.bound_terms(x_0, num_t, seeded(seed), y))
    parts = {"L_T": torch.stack([draw.L_T for draw in draws])}
    parts["sum_L_t_minus_1"] = torch.stack([draw.L_t_minus_1 for draw in draws])
    parts["L_0"] = torch.stack([draw.L_0 for draw in draws])
    total = sum(parts.values()) + (0 if y is None else math.log(10))
    mean = total.mean(0)
    expected = {key: value.mean().item() for key, value in parts.items()}
    nats, error = mean.mean().item(), mean.std().item() / math.sqrt(n)
    expected |= {"nats_per_image": nats, "standard_error": error, "images": n}
    expected["bits_per_dimension"] = nats / 784 / math.log(2)
    expected["timesteps_per_image"] = draws[0].t.shape[1]
    cost = 0 if y is None else math.log(10)
    return expected | {"label_cost": cost, "binarizations": binarizations}


def expected_samples(x, asked, test, other, train, how, protocol="threshold", K=2) -> dict:
    """The expected report for samples x. Random levels: stream 0 for test digits, else 1."""
    classifier = load_classifier()
    as_levels = partial(levels, protocol=protocol, K=K)
    reference, _ = judge(classifier, as_levels(test.images, 0), K)
    real = as_levels(other.images, 1)
    usual = {"guidance": 0.0, "last_step": "mode", "labels": asked is not None}
    report = {"real_digits": quality(spread(real, len(x)), reference, classifier, K)}
    report["samples"] = usual | how | quality(x, reference, classifier, K, asked)
    if asked is not None:
        rows = rows_of_classes(other.labels, asked.bincount(minlength=10))
        report["real_digits_of_these_classes"] = quality(real[rows], reference, classifier, K)
    distances = (x[:8, None].int() - as_levels(train.images, 1)[None].int()).abs().sum((2, 3, 4))
    report["nearest_training_digit"] = {"least_distances": distances.amin(1).tolist()}
    return report


# --------------------------------------------------------------------------------------------------
# The report


@pytest.mark.parametrize("trained_on, split", [("mnist", "test"), ("offline", "validation")])
def test_every_figure_of_the_report(trained_on, split):
    """A conditional model of thresholded MNIST: bound and samples on one split, real digits of the
    other split, nearest digits from its training data."""
    d = untrained("x.pth", config={"num_labels": 10}, data=trained_on)
    report, _ = evaluated(f"--split {split}")
    test, train = digits_of("mnist", split), digits_of(trained_on, "train")
    other = digits_of("mnist", "validation" if split == "test" else "test")
    y = torch.arange(20) % 10
    x = respaced(d, 30).sample(20, 0, y=y, last_step="mode")
    expected = expected_samples(x, y, test, other, train, {"timesteps": 30})
    expected["bound"] = expected_bound(d, test, 12, 2)
    expected["bound_with_labels"] = expected_bound(d, test, 12, 2, y=spread(test.labels, 12))
    expected |= {"checkpoint": "x.pth", "digits": f"MNIST {split} split", "levels": 2}
    expected["sha256"] = hashlib.sha256(Path("x.pth").read_bytes()).hexdigest()
    expected |= {"binarization": "threshold", "timesteps": 60, "digits_were_in_training": False}
    assert report.pop("provenance")["torch"] == torch.__version__
    assert report.keys() == expected.keys()
    check(report, expected)
    rows, _ = nearest_digits(x[:8], levels(train.images))
    assert np.array_equal(Image.open("nearest.png"), image_grid(rows, columns=8))


def test_every_figure_of_an_unconditional_dynamic_report(monkeypatch):
    terms, plot = [], evaluate.plot_terms
    monkeypatch.setattr(evaluate, "plot_terms", lambda *args: terms.append(args) or plot(*args))
    d = untrained("x.pth", timesteps=20, binarize="dynamic")
    report, out = evaluated("--binarizations 3 --data offline --seed 4")
    validation, train = (digits_of("offline", split) for split in ("validation", "train"))
    x, how = d.sample(20, 4, last_step="mode"), {"timesteps": 20}
    expected = expected_samples(x, None, validation, train, train, how, "dynamic")
    expected["bound"] = expected_bound(d, validation, 12, 2, "dynamic", 3)
    name = "offline validation digits (not the MNIST test split)"
    expected |= {"digits": name, "digits_were_in_training": False}
    check(report, expected | {"binarization": "dynamic", "timesteps": 20})
    assert out.startswith(f"{name}, 2 levels, dynamic, 20 of 20 timesteps\n")
    assert "real_digits_of_these_classes" not in report
    assert "label_accuracy" not in report["samples"]
    ((network_t, t, values),) = terms
    assert torch.equal(network_t, d.network_t) and t.shape == values.shape == (3 * 12 * 3,)
    x_0 = spread(levels(validation.images, 0, "dynamic"), 12)
    first = d.bound_terms(x_0, 2, seeded(0))
    assert torch.equal(t[:36], first.t.flatten())
    assert torch.allclose(values[:36], first.terms.flatten())


def test_noise_is_independent_of_the_binarization(monkeypatch):
    """With one seed, both would draw from the same stream."""
    untrained("x.pth", timesteps=2, binarize="dynamic")
    x_0, noise, sample = [], [], DiscreteDiffusion.q_sample

    def q_sample(self, clean, t, u=None):
        x_0.append(clean)
        noise.append(u)
        return sample(self, clean, t, u)

    monkeypatch.setattr(DiscreteDiffusion, "q_sample", q_sample)
    evaluated("--exact --num-samples 0", small="")
    grey = digits_of("mnist", "test").images
    for clean, u in zip(x_0, noise, strict=True):
        assert clean.shape == grey.shape and not torch.equal(clean, (u * 255 < grey).byte())


def test_levels_of_grey():
    d = untrained("x.pth", timesteps=10, config={"num_levels": 4, "num_states": 4})
    report, out = evaluated()
    test, other = (digits_of("mnist", split) for split in ("test", "validation"))
    x, train = d.sample(20, last_step="mode"), digits_of("offline", "train")
    expected = expected_samples(x, None, test, other, train, {"timesteps": 10}, K=4)
    check(report, expected | {"levels": 4})
    assert "4 levels" in out
    rows, _ = nearest_digits(x[:8], to_levels(train.images, 4))
    assert np.array_equal(Image.open("nearest.png"), image_grid(rows, 4, columns=8))


def test_no_bound_on_digits_from_training(monkeypatch):
    """The offline digits are part of MNIST's training split: for a model trained on it they give no
    bound, and flags of the bound are refused."""
    untrained("x.pth", data="mnist", timesteps=10)
    flags = "--data", "offline", *CPU
    for flag in ("images 12", "repeats 2", "exact", "trajectories 3", "num-samples 0"):
        with monkeypatch.context() as patch:
            no_work(patch)
            line = fail("evaluate.py", "x.pth", *flags, *f"--{flag}".split())
        assert "the offline digits are in MNIST's training split" in line
        assert f"--{flag.split()[0]} does nothing" in line or flag == "num-samples 0"
    report, out = evaluated("--data offline", small="--num-samples 20")
    assert "No bound: the offline digits are in MNIST's training split" in out
    assert "nats" not in out and "bound" not in report
    assert report["digits_were_in_training"] is True and report["samples"]["images"] == 20


@pytest.mark.parametrize("data", ["auto", "mnist", "offline"])
@pytest.mark.parametrize("trained_on", ["mnist", "offline"])
def test_where_there_is_a_bound(data, trained_on, few_digits):
    untrained("x.pth", data=trained_on, timesteps=5)
    report, _ = evaluated(f"--data {data} --data-root there", small="--num-samples 20")
    bound = not (data == "offline" and trained_on == "mnist")
    assert ("bound" in report) == bound == (not report["digits_were_in_training"])
    assert few_digits[0] == ("train", data, Path("there"))
    assert all(root == Path("there") for _, source, root in few_digits if source == "mnist")


def test_what_is_printed():
    """The numbers of the report, side by side."""
    untrained("x.pth", timesteps=2, config={"num_labels": 10}, binarize="dynamic")
    report, out = evaluated("--binarizations 2 --trajectories 2")
    lines, tables = out.splitlines(), []
    for name, key in (("no labels", "bound"), ("with the label", "bound_with_labels")):
        gains = report[key]["importance_weighted"]["by_trajectories"]
        tables += [(f"bound, {name}", [report[key]]), (f"importance-weighted bound, {name}", gains)]
    names = "samples", "real_digits", "real_digits_of_these_classes"
    for title, columns in [*tables, ("quality", [report[name] for name in names])]:
        (start,) = (i for i, line in enumerate(lines) if line.startswith(title))
        shown = [key for key, value in columns[0].items() if not isinstance(value, dict)]
        for line, key in zip(lines[start + 1 :], shown, strict=False):
            values = [column[key] for column in columns if key in column]
            cells = [f"{v:.4g}" if isinstance(v, float) else str(v) for v in values]
            assert line.split() == [key, *cells]
    assert lines[-1].startswith("Wrote evaluation.json, bound_terms.png, gain.png, nearest.png in ")


# --------------------------------------------------------------------------------------------------
# Flags


def test_flags_of_the_samples():
    d = untrained("x.pth", timesteps=5, config={"num_labels": 10})
    y, digits = torch.arange(20) % 10, [digits_of("mnist", name) for name in ("test", "validation")]
    for flags, asked, how, request in (
        ("--guidance 2", y, {"guidance": 2.0}, {}),
        ("--no-labels", None, {}, {}),
        ("--timesteps 3", y, {"timesteps": 3}, {}),
        ("--last-step draw", y, {"last_step": "draw"}, {}),
        ("--seed 2 --num-samples 25", torch.arange(25) % 10, {}, {"n": 25, "seed": 2}),
    ):
        how = {"timesteps": 5, "guidance": 0.0, "last_step": "mode"} | how
        request = {"n": 20, "guidance": how["guidance"], "last_step": how["last_step"]} | request
        x = respaced(d, how["timesteps"]).sample(y=asked, **request)
        report, _ = evaluated(f"--images 2 --repeats 1 {flags}")
        expected = expected_samples(x, asked, *digits, digits_of("offline", "train"), how)
        for name in ("samples", "real_digits", "real_digits_of_these_classes"):
            assert close(report.get(name, {}), expected.get(name, {})), (flags, name)


def test_last_step_of_the_joint_form():
    untrained("x.pth", timesteps=4)
    state = torch.load("x.pth", weights_only=True)
    state["diffusion"]["reverse"] = "joint"
    torch.save(state, "x.pth")
    assert evaluated()[0]["samples"]["last_step"] == "draw"


def test_flags_of_the_bound():
    """How many digits, how many timesteps per digit, and of which chain."""
    d, test = untrained("x.pth", timesteps=5), digits_of("mnist", "test")
    for flags, chain, rows, num_t in (
        ("", d, 50, 4),
        ("--images 5", d, 5, 4),
        ("--images 500", d, 50, 4),
        ("--repeats 5", d, 50, 5),
        ("--exact", d, 50, None),
        ("--timesteps 2 --exact", respaced(d, 2), 50, None),
    ):
        report, _ = evaluated(flags, small="--num-samples 0")
        assert close(report["bound"], expected_bound(chain, test, rows, num_t)), flags
        assert report["timesteps"] == chain.timesteps


def test_weights(monkeypatch):
    """The gain on some of the digits, spread over the binarizations; also given the true labels,
    plus ln 10; and of the respaced chain."""
    d = respaced(untrained("x.pth", timesteps=6, config={"num_labels": 10}, binarize="dynamic"), 4)
    monkeypatch.setattr(evaluate, "save_figure", pictures.save_figure)
    flags = "--trajectories 3 --weighted-images 5 --binarizations 2 --timesteps 4"
    report, out = evaluated(flags)
    test, rows = digits_of("mnist", "test"), spread(spread(torch.arange(50), 12), 5)
    assert "4 of 6 timesteps" in out
    for name, labelled in (("bound", False), ("bound_with_labels", True)):
        parts = []
        for seed in range(2):
            x_0 = levels(test.images, seed, "dynamic")[rows[seed::2]]
            y = test.labels[rows[seed::2]] if labelled else None
            parts.append(log_weights(d, x_0, 3, seeded(seed), y))
        bound = report[name]
        y = spread(test.labels, 12) if labelled else None
        plain = expected_bound(d, test, 12, 2, "dynamic", 2, y)
        assert close(bound, plain | {"importance_weighted": bound["importance_weighted"]})
        assert close(bound["importance_weighted"], metrics.summarize_gain(torch.cat(parts), bound))
    assert bound["importance_weighted"]["by_trajectories"][2]["gain"] > 0.1
    for name in ("gain.png", "bound_terms.png"):
        Image.open(name).verify()


def test_weights_of_100_digits_by_default(monkeypatch):
    """The bound uses all digits, and the plot of the gain starts from it."""
    untrained("x.pth", timesteps=2)
    monkeypatch.setattr(evaluate, "load_dataset", load_dataset)
    plotted, plot = [], evaluate.plot_gains
    monkeypatch.setattr(evaluate, "plot_gains", lambda gains: plotted.append(gains) or plot(gains))
    flags = "--data offline --trajectories 1 --repeats 1 --num-samples 0"
    bound = evaluated(flags, small="")[0]["bound"]
    assert bound["images"] == 500 and bound["importance_weighted"]["images"] == 100
    assert plotted == [{"no labels": bound}]


def test_faster_networks(monkeypatch):
    """With --amp and --compile the report is of the accelerated network."""
    d, test = untrained("x.pth", timesteps=2), digits_of("mnist", "test")
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model, **_: compiled.append(model) or model)
    flags = "--exact --trajectories 2 --images 4"
    plain, half, both = (
        evaluated(f"{flags} {more}", small="--num-samples 20")[0]
        for more in ("--compile", "--amp", "--amp --compile")
    )
    assert [type(network) for network in compiled] == [type(d.model), Autocast]
    twin, train = d.around(Autocast(d.model)), digits_of("offline", "train")
    for report, chain in ((plain, d), (half, twin), (both, twin)):
        x_0 = spread(levels(test.images), 4)
        weighted = report["bound"].pop("importance_weighted")
        bound = expected_bound(chain, test, 4, None)
        assert close(report["bound"], bound)
        assert close(weighted, metrics.summarize_gain(log_weights(chain, x_0, 2, seeded(0)), bound))
        x, other = chain.sample(20, last_step="mode"), digits_of("mnist", "validation")
        expected = expected_samples(x, None, test, other, train, {"timesteps": 2})
        assert close(report["samples"], expected["samples"])
    assert half["bound"] != plain["bound"] and half["samples"] != plain["samples"]


def test_the_bound_alone_and_500_samples_by_default():
    untrained("x.pth", timesteps=1)
    before, _ = evaluated(small="--images 2")
    assert before["samples"]["images"] == 500
    report, out = evaluated("--num-samples 0", small="--images 2")
    assert report["bound"] == before["bound"] and not {"samples", "real_digits"} & report.keys()
    assert "nearest" not in out and files(Path()) == {"x.pth", "evaluation.json", "bound_terms.png"}


RUN = "run/checkpoints/x.pth"


@pytest.mark.parametrize(
    "path, out_dir", [(RUN, "run"), ("elsewhere/x.pth", "elsewhere"), ("link.pth", "run")]
)
def test_where_the_report_goes(path, out_dir):
    """To the real folder of the checkpoint's run, or to --out-dir, which is created."""
    untrained(path.replace("link.pth", RUN), timesteps=1)
    Path("link.pth").symlink_to(RUN)
    written = {"evaluation.json", "nearest.png", "bound_terms.png"}
    report, _ = evaluated(path=path, out_dir=out_dir)
    assert report["checkpoint"] == path and written <= files(Path(out_dir))
    evaluated("--out-dir new/place", path=path, out_dir="new/place")
    assert files(Path("new/place")) == written


def test_the_released_model_by_default(monkeypatch):
    """Its report stays out of the repository's own folder, however that is spelled."""
    assert evaluate.RELEASED == RELEASED
    Path("released").mkdir()
    untrained("released/x.pth", timesteps=2)
    monkeypatch.setattr(evaluate, "RELEASED", Path("released/x.pth").resolve())
    out, place = succeed("evaluate.py", *SMALL.split(), *CPU), Path("results_d3pm/evaluation")
    assert out.splitlines()[0] == f"Using the released model, {evaluate.RELEASED}"
    assert out.splitlines()[-1].endswith(f"in {place}")
    (place / "evaluation.json").unlink()
    _, out = evaluated(path="released/x.pth", out_dir=place)
    assert not out.startswith("Using") and files(Path("released")) == {"x.pth"}


def test_device(monkeypatch):
    untrained("x.pth", timesteps=2)
    asked, put, load, device = [], [], evaluate.load_classifier, torch.device("cpu")
    monkeypatch.setattr(cli, "pick_device", lambda name: asked.append(name) or device)
    monkeypatch.setattr(evaluate, "load_classifier", lambda to: put.append(to) or load(to))
    succeed("evaluate.py", "x.pth", *SMALL.split(), "--device", "tpu")
    succeed("evaluate.py", "x.pth", *SMALL.split(), "--overwrite")
    assert asked == ["tpu", "auto"] and put == [device] * 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu():
    """The same numbers as on the CPU, up to rounding."""
    untrained("x.pth", timesteps=8)
    gpu, cpu = (evaluated("--trajectories 2", device=device)[0] for device in ("cuda", "cpu"))
    weighted = [report["bound"].pop("importance_weighted") for report in (gpu, cpu)]
    assert gpu["bound"] == pytest.approx(cpu["bound"], rel=1e-3)
    gains = [report["by_trajectories"][1]["gain"] for report in weighted]
    assert gains[0] == pytest.approx(gains[1], rel=0.05)
    for key in ("frechet_distance", "ink"):
        assert gpu["samples"][key] == pytest.approx(cpu["samples"][key], rel=0.05)


@pytest.mark.parametrize("flags, place", [([], "results_d3pm"), (["--out-dir", "there"], "there")])
def test_training_of_the_classifier(flags, place, monkeypatch):
    """From the digits in --data-root to classifier.pth in --out-dir; other flags are refused."""
    asked = []

    def train(data_root, out):
        asked.append((data_root, out))
        out.parent.mkdir(parents=True)
        out.write_bytes(b"x" * 2400)

    monkeypatch.setattr(metrics, "train_classifier", train)
    out = succeed("evaluate.py", "--train-classifier", "--data-root", "root", *flags)
    assert asked == [(Path("root"), Path(place) / "classifier.pth")]
    assert out == f"Wrote {Path(place) / 'classifier.pth'} (2 kB)\n"
    for more in ("x.pth", "--exact", "--seed=1"):
        line = fail("evaluate.py", "--train-classifier", more)
        assert "does nothing here: --train-classifier" in line


# --------------------------------------------------------------------------------------------------
# Images of one's own


@pytest.fixture
def folders(monkeypatch):
    """The real `load_dataset` for folders."""
    few = evaluate.load_dataset

    def load(split, data="auto", data_root="data", **options):
        return load_dataset(split, data, **options) if options else few(split, data, data_root)

    monkeypatch.setattr(evaluate, "load_dataset", load)


@pytest.mark.parametrize("split", ["test", "validation"])
def test_every_figure_of_own_pictures(split, folders):
    """Bounds per real pixel, and nearest training pictures by the number of differing pixels."""
    d, folder = own_model(num_labels=2), own_folder()
    report, out = evaluated(f"--repeats 2 --trajectories 2 --split {split}", "own.pth", small="")
    data, train = (load_dataset(name, folder, size=SIZE, palette=True) for name in (split, "train"))
    n = len(data.images)
    assert report["digits"] == f"{folder}, {split} split" and report["binarization"] == "palette"
    assert report["not_judged"] == evaluate.NOT_JUDGED and evaluate.NOT_JUDGED in out
    assert "samples" not in report and report["digits_were_in_training"] is False
    for key, y, cost in (("bound", None, 0), ("bound_with_labels", data.labels, math.log(2))):
        terms = d.bound_terms(data.images, 2, seeded(0), y)
        nats = terms.total.mean().item() + cost
        assert report[key]["nats_per_image"] == pytest.approx(nats)
        assert report[key]["bits_per_dimension"] == pytest.approx(nats / 60 / math.log(2))
        log_w = log_weights(d, data.images, 2, seeded(0), y)
        gain = (metrics.importance_weighted(log_w) + log_w.mean(1)).mean().item()
        rows = report[key]["importance_weighted"]["by_trajectories"]
        assert report[key]["images"] == n and rows[1]["gain"] == pytest.approx(-gain)
    x = d.sample(8, 0, last_step="mode", y=torch.arange(8) % 2)
    distances = (x[:, None] != train.images[None]).sum((2, 3, 4)).amin(1)
    assert report["nearest_training_digit"]["least_distances"] == distances.tolist()
    rows, _ = nearest_digits(x, train.images, p=0)
    grid = image_grid(rows, 5, 8, [*data.palette], SIZE)
    assert np.array_equal(Image.open("nearest.png"), grid)


def test_own_pictures_elsewhere(folders, monkeypatch):
    """--data names another folder of similar pictures; a missing folder is an error."""
    monkeypatch.setattr("metrics.CLASSIFIER", Path("nowhere"))
    own_model(num_labels=2)
    Path("own").rename("moved")
    assert "own, is gone: give --data" in fail("evaluate.py", "own.pth", *CPU)
    assert "neither a folder" in fail("evaluate.py", "own.pth", "--data", "own", *CPU)
    report, _ = evaluated("--data moved", "own.pth", small="--num-samples 0")
    assert report["digits"] == "moved, test split" and "nearest_training_digit" not in report
    Path("moved/lake").rename("moved/sea")
    flags = "own.pth", "--data", "moved", "--overwrite", *CPU
    assert "moved differs in classes from the images of own.pth" in fail("evaluate.py", *flags)
    own_model("free.pth")
    shutil.rmtree("own")
    evaluated("--data moved", "free.pth", small="")  # it has no classes
    line = fail("evaluate.py", "free.pth", *flags[1:], "--num-samples", 20)
    assert "--num-samples does nothing here: the classifier that judges" in line


@pytest.mark.parametrize("trained_on, data", [("fashion", ""), ("mnist", "--data fashion")])
def test_fashion_is_not_judged(trained_on, data, monkeypatch):
    """By name, at 32x32 with 28x28 real pixels."""
    digits, calls = digits_of("mnist", "test"), []
    clothes = dataclasses.replace(digits, source="fashion", classes=CLASSES["fashion"])
    monkeypatch.setattr(evaluate, "load_dataset", lambda *how: calls.append(how) or clothes)
    known = clothes if trained_on == "fashion" else digits
    drawn, sample = [], DiscreteDiffusion.sample
    spy = lambda self, n, *how, **more: drawn.append(n) or sample(self, n, *how, **more)  # noqa: E731
    monkeypatch.setattr(DiscreteDiffusion, "sample", spy)
    d = untrained("x.pth", timesteps=3, dataset=known.description)
    report, _ = evaluated(f"--images 12 --repeats 2 {data}", small="")
    assert calls == [(split, "fashion", Path("data")) for split in ("test", "train")]
    assert close(report["bound"], expected_bound(d, clothes, 12, 2))
    assert drawn == [8] and report["digits"] == "fashion, test split" and "not_judged" in report
    assert Image.open("nearest.png").size == (2 * (2 + 8 * 34),) * 2


def test_one_picture_in_a_split(folders):
    """No standard errors. Pictures become grey and are resized to the model's size."""
    own_model(size=(8, 12), palette=False)
    shutil.rmtree("own")
    own_folder(4)
    report, _ = evaluated("--trajectories 1", "own.pth", small="")
    assert report["bound"]["images"] == 1 and report["bound"]["standard_error"] == "nan"
    assert Image.open("nearest.png").width == 2 * (2 + 3 * 14)


# --------------------------------------------------------------------------------------------------
# Errors: before the work, in one line, and nothing is half written


def no_work(monkeypatch):
    for name in ("sample", "bound_terms"):
        worked = lambda *_, **__: pytest.fail("worked for nothing")  # noqa: E731
        monkeypatch.setattr(DiscreteDiffusion, name, worked)


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--binarizations 2", "--binarizations does nothing here: x.pth was trained without"),
        ("--no-labels", "--no-labels does nothing here: x.pth was trained without classes"),
        ("--guidance 1", "--guidance does nothing here: x.pth was trained without classes"),
        ("--guidance 0", "--guidance does nothing here: x.pth was trained without classes"),
        ("--guidance 1 --no-labels", "--no-labels: not allowed with argument --guidance"),
        ("--exact --repeats 4", "--repeats: not allowed with argument --exact"),
        ("--weighted-images 4", "--weighted-images does nothing here: no --trajectories"),
        ("--num-samples 0 --seed 0", "--seed does nothing here: --num-samples 0"),
        ("--timesteps 11", "1..10"),
        ("--timesteps 0", "1..10"),
        ("--seed 5000000000", "at most 4294967295"),
        ("--num-samples 19", "at least 20"),
        ("--images 1", "at least 2"),
        ("--repeats 0", "at least 1"),
        ("--trajectories 0", "at least 1"),
        ("--binarizations 0", "at least 1"),
        ("--guidance -1", "at least 0"),
        ("--split train", "invalid choice"),
        ("--device nonsense", "can't be used"),
        ("--out-dir x.pth", "can't write"),
        ("--out-dir taken", "not a regular file"),
        ("--out-dir=", "is empty"),
    ],
)
def test_bad_input(flags, words, monkeypatch):
    untrained("x.pth", timesteps=10)
    Path("taken/nearest.png").mkdir(parents=True)
    no_work(monkeypatch)
    assert words in fail("evaluate.py", "x.pth", *CPU, *flags.split())


def test_bad_checkpoint():
    Path("folder").mkdir()
    for name in ("folder", "nowhere.pth"):
        assert name in fail("evaluate.py", name, *CPU)
    untrained("x.pth", timesteps=10)
    state = torch.load("x.pth", weights_only=True)
    state["averaged_weights"]["fold.bias"][0] = math.nan
    torch.save(state, "x.pth")
    assert "weights that are not finite" in fail("evaluate.py", "x.pth", "--out-dir", "out", *CPU)


def test_a_checkpoint_that_does_not_say_what_it_has_seen(monkeypatch):
    """The digits could be part of its training data."""
    no_work(monkeypatch)
    for data in (None, 3):
        untrained("x.pth", timesteps=10, data=data)
        line = fail("evaluate.py", "x.pth", *CPU)
        assert "x.pth does not say which images it was trained on" in line


def test_a_missing_or_damaged_classifier(monkeypatch, tmp_path):
    untrained("x.pth", timesteps=10)
    no_work(monkeypatch)
    monkeypatch.setattr("metrics.CLASSIFIER", tmp_path / "classifier.pth")
    assert "--train-classifier" in fail("evaluate.py", "x.pth", *CPU)
    (tmp_path / "classifier.pth").write_bytes(b"nonsense")
    assert "classifier.pth is damaged" in fail("evaluate.py", "x.pth", *CPU)


@pytest.mark.parametrize("name", ["evaluation.json", "gain.png", "nearest.png", "bound_terms.png"])
def test_an_earlier_evaluation_is_replaced_only_if_asked(name, monkeypatch):
    """Refused before the work, or fully replaced with --overwrite; never the checkpoint."""
    untrained("x.pth", timesteps=2)
    os.link("x.pth", name)
    with monkeypatch.context() as patch:
        no_work(patch)
        assert "the same file is read" in fail("evaluate.py", "x.pth", "--overwrite", *CPU)
        Path(name).unlink()
        Path(name).write_text("of an earlier evaluation")
        line = fail("evaluate.py", "x.pth", *CPU)
        assert f"{name} exists: give --overwrite, or another --out-dir" in line
    evaluated("--num-samples 0")
    assert files(Path()) == {"x.pth", "evaluation.json", "bound_terms.png"}
    assert b"of an earlier evaluation" not in b"".join(snapshot(Path()).values())


@pytest.mark.parametrize("where", ["nearest_digits", "json_bytes"])
def test_a_failed_evaluation_leaves_the_files_of_the_last_one(where, monkeypatch):
    untrained("x.pth", timesteps=10)
    evaluated()
    before = snapshot(Path())

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(evaluate.files if where == "json_bytes" else metrics, where, full)
    code, _, err = call("evaluate.py", "x.pth", *SMALL.split(), *CPU, "--seed", 1, "--overwrite")
    assert code == 1 and "No space left" in err.splitlines()[-1]
    assert snapshot(Path()) == before


@pytest.mark.parametrize("where", ["plot_terms", "save_figure"])
def test_a_failed_picture_is_a_warning(where, monkeypatch):
    """The numbers and other pictures are written, and the old picture is deleted."""
    untrained("x.pth", timesteps=10)
    Path("bound_terms.png").write_text("of an earlier evaluation")

    def broken(*_, **__):
        raise RuntimeError("latex could not be found\nand more")

    monkeypatch.setattr(evaluate, where, broken)
    code, out, err = call("evaluate.py", "x.pth", *SMALL.split(), *CPU, "--overwrite")
    assert code == 0 and out.splitlines()[-1].startswith("Wrote evaluation.json, nearest.png in")
    (line,) = [line for line in err.splitlines() if line.startswith("warning")]
    assert line.endswith("bound_terms.png was not written: latex could not be found")
    assert files(Path()) == {"x.pth", "evaluation.json", "nearest.png"}


def test_an_infinite_bound_is_valid_json(monkeypatch):
    untrained("x.pth", timesteps=10)
    infinite = lambda self, x_0: torch.full((len(x_0),), math.inf).double()  # noqa: E731
    monkeypatch.setattr(DiscreteDiffusion, "L_T", infinite)
    evaluated()

    def refuse(constant):
        pytest.fail(f"{constant} is not JSON")

    bound = json.loads(Path("evaluation.json").read_text(), parse_constant=refuse)["bound"]
    assert bound["nats_per_image"] == bound["L_T"] == "inf" and bound["standard_error"] == "nan"
