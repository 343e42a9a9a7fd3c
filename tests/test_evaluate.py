"""evaluate.py end to end: which digits a model is held against, each figure of the report, what is printed, written and
refused. What the figures mean is the subject of test_metrics.py."""

import hashlib
import json
import math
import os
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scripts import call, fail, files, snapshot, succeed, untrained

import evaluate
from checkpoint import RELEASED, load_checkpoint
from dataset import Digits, load_digits, take, to_levels
from diffusion import importance_weighted
from metrics import judge, load_classifier, nearest_digits, quality, rows_of_classes, spread
from model import Autocast
from pictures import image_grid

pytestmark = pytest.mark.usefixtures("fresh_directory", "few_digits")
FLAGS = ["--num-samples", 20, "--images", 12, "--repeats", 2, "--device", "cpu"]


@cache
def digits_of(source, split) -> Digits:
    """Small sets of genuine digits, no two of which have one in common; of MNIST a hundred, 60 and 50."""
    offline = load_digits("train", "offline")
    if source == "offline":
        return (
            take(offline, 80)
            if split == "train"
            else take(load_digits("validation", "offline"), 40)
        )
    first, last = {"train": (0, 100), "validation": (100, 160), "test": (160, 210)}[split]
    rows = torch.randperm(len(offline.images), generator=torch.Generator().manual_seed(0))[
        first:last
    ]
    return Digits(offline.images[rows], offline.labels[rows], "mnist")


@pytest.fixture
def few_digits(monkeypatch):
    """Those in place of all, and MNIST is at hand; the calls."""
    calls = []

    def load(split, data="auto", data_root="data"):
        calls.append((split, data, data_root))
        return digits_of("offline" if data == "offline" else "mnist", split)

    monkeypatch.setattr(evaluate, "load_digits", load)
    return calls


def report_of(*arguments, out_dir=".") -> dict:
    succeed("evaluate.py", *arguments, *FLAGS)
    return json.loads((Path(out_dir) / "evaluation.json").read_text())


def close(a, b) -> bool:
    """Whether two reports agree, number by number."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(close(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(close, a, b))
    return a == b if isinstance(a, str | bool) else a == pytest.approx(b, rel=1e-6, abs=1e-9)


def expected_bound(d, grey, protocol, num_t, binarizations=1, y=None) -> dict:
    """Mean and error over images, or over random binarizations, of the bound; its parts."""
    draws = []
    for seed in range(binarizations):
        x_0 = to_levels(grey, d.num_levels, protocol, torch.Generator().manual_seed(seed))
        draws.append(d.bound_terms(x_0, num_t, torch.Generator().manual_seed(seed), y))
    total = torch.stack([draw.L_T + draw.L_t_minus_1 + draw.L_0 for draw in draws])
    total = total if y is None else total + math.log(10)
    mean = total.mean(0)
    expected = {
        "nats_per_image": mean.mean().item(),
        "standard_error": mean.std().item() / math.sqrt(len(grey)),
        "bits_per_dimension": mean.mean().item() / 784 / math.log(2),
        "L_T": torch.stack([draw.L_T for draw in draws]).mean().item(),
        "sum_L_t_minus_1": torch.stack([draw.L_t_minus_1 for draw in draws]).mean().item(),
        "L_0": torch.stack([draw.L_0 for draw in draws]).mean().item(),
        "images": len(grey),
        "timesteps_per_image": draws[0].t.shape[1],
    }
    if y is not None:
        expected["label_cost"] = math.log(10)
    if binarizations > 1:
        error = total.mean(1).std().item() / math.sqrt(binarizations)
        expected |= {"binarizations": binarizations, "standard_error_over_binarizations": error}
    return expected


def expected_samples(x, asked, test, other, train, protocol, K=2) -> dict:
    """What the report says of samples x; real digits become levels by noise of seed 0 for test digits, 1 for others."""
    classifier = load_classifier()

    def levels(digits, seed):
        return to_levels(digits.images, K, protocol, torch.Generator().manual_seed(seed))

    reference, _ = judge(classifier, levels(test, 0), K)
    real = levels(other, 1)
    report = {"real_digits": quality(spread(real, len(x)), reference, classifier, K)}
    report["samples"] = quality(x, reference, classifier, K, asked)
    if asked is not None:
        rows = rows_of_classes(other.labels, asked.bincount(minlength=10))
        report["real_digits_of_these_classes"] = quality(real[rows], reference, classifier, K)
    distances = (x[:8, None].int() - levels(train, 1)[None].int()).abs().sum((2, 3, 4))
    report["nearest_training_digit"] = {"least_distances": distances.amin(1).tolist()}
    return report


# ---------------------------------------------------------------------------------------------------------------------
# The report


@pytest.mark.parametrize("trained_on, split", [("mnist", "test"), ("offline", "validation")])
def test_every_figure_of_the_report(trained_on, split):
    """A conditional model of thresholded digits, held against MNIST: bound and samples against the test split, real
    digits from the validation split beside them (or the other way round), nearest digits from those it has seen."""
    d = untrained("x.pth", config={"num_labels": 10}, data=trained_on)
    flags = [] if split == "test" else ["--split", "validation"]
    report = report_of("x.pth", *flags)
    test, other = (
        digits_of("mnist", split),
        digits_of("mnist", "validation" if split == "test" else "test"),
    )
    y = torch.arange(20) % 10
    x = d.respaced(30).sample(20, 0, y=y, last_step="mode")
    expected = expected_samples(x, y, test, other, digits_of(trained_on, "train"), "threshold")
    expected["samples"] = {
        "timesteps": 30,
        "guidance": 0.0,
        "last_step": "mode",
        "labels": True,
    } | expected["samples"]
    expected["bound"] = expected_bound(d, spread(test.images, 12), "threshold", 2)
    y = spread(test.labels, 12)
    expected["bound_with_labels"] = expected_bound(d, spread(test.images, 12), "threshold", 2, y=y)
    expected |= {
        "checkpoint": "x.pth", "sha256": hashlib.sha256(Path("x.pth").read_bytes()).hexdigest(),
        "digits": f"MNIST {split} split", "levels": 2, "binarization": "threshold", "timesteps": 60,
        "digits_were_in_training": False,
    }  # fmt: skip
    provenance = report.pop("provenance")
    assert provenance["torch"] == torch.__version__
    assert report.keys() == expected.keys()
    for key in expected:
        assert close(report[key], expected[key]), key
    rows, _ = nearest_digits(x[:8], to_levels(digits_of(trained_on, "train").images))
    with Image.open("nearest.png") as picture:
        assert np.array_equal(picture, image_grid(rows, columns=8))
    with Image.open("bound_terms.png") as picture:
        picture.verify()


def test_every_figure_of_an_unconditional_dynamic_report(monkeypatch):
    """Random binarizations: noise of seed 0, 1, ... for the bound, 0 for test digits, 1 for the others; no labels."""
    terms, plot = [], evaluate.plot_terms
    monkeypatch.setattr(evaluate, "plot_terms", lambda *args: terms.append(args) or plot(*args))
    d = untrained("x.pth", timesteps=20, binarize="dynamic")
    report = report_of("x.pth", "--binarizations", 3, "--data", "offline", "--seed", 4)
    validation, train = (digits_of("offline", split) for split in ("validation", "train"))
    expected = expected_samples(
        d.sample(20, 4, last_step="mode"), None, validation, train, train, "dynamic"
    )
    expected["samples"] = {
        "timesteps": 20,
        "guidance": 0.0,
        "last_step": "mode",
        "labels": False,
    } | expected["samples"]
    expected["bound"] = expected_bound(d, spread(validation.images, 12), "dynamic", 2, 3)
    for key in expected:
        assert close(report[key], expected[key]), key
    assert (
        "real_digits_of_these_classes" not in report and "label_accuracy" not in report["samples"]
    )
    assert report["digits"] == "offline validation digits (not the MNIST test split)"
    assert (report["binarization"], report["digits_were_in_training"], report["timesteps"]) == (
        "dynamic",
        False,
        20,
    )
    ((network_t, t, values),) = terms
    assert torch.equal(network_t, d.network_t) and t.shape == values.shape == (3 * 12 * 3,)
    first = d.bound_terms(to_levels(spread(validation.images, 12), 2, "dynamic", torch.Generator().manual_seed(0)), 2,
                          torch.Generator().manual_seed(0))  # fmt: skip
    assert torch.equal(t[:36], first.t.flatten()) and torch.allclose(
        values[:36], first.terms.flatten()
    )


def test_levels_of_grey():
    d = untrained("x.pth", timesteps=10, config={"num_levels": 4, "num_states": 4})
    report = report_of("x.pth")
    test, other, train = (digits_of("mnist", split) for split in ("test", "validation", "train"))
    x = d.sample(20, last_step="mode")
    expected = expected_samples(
        x, None, test, other, digits_of("offline", "train"), "threshold", K=4
    )
    assert report["levels"] == 4 and close(report["real_digits"], expected["real_digits"])
    rows, _ = nearest_digits(x[:8], to_levels(digits_of("offline", "train").images, 4))
    with Image.open("nearest.png") as picture:
        assert np.array_equal(picture, image_grid(rows, 4, columns=8))
    note = {"timesteps": 10, "guidance": 0.0, "last_step": "mode", "labels": False}
    assert close(report["samples"], note | expected["samples"])
    assert (
        close(report["nearest_training_digit"], expected["nearest_training_digit"])
        and len(train.images) == 100
    )
    assert "4 levels" in succeed("evaluate.py", "x.pth", *FLAGS)


def test_digits_that_were_in_training_are_no_judge():
    """All offline digits are from MNIST's training split: a model of that gets no bound on them, and is told why."""
    untrained("x.pth", data="mnist", timesteps=10)
    Path("bound_terms.png").write_text("of an older evaluation")
    out = succeed("evaluate.py", "x.pth", "--data", "offline", *FLAGS)
    assert (
        "No bound: the offline digits are part of MNIST's training split" in out
        and "nats" not in out
    )
    report = json.loads(Path("evaluation.json").read_text())
    assert report["digits_were_in_training"] is True and "bound" not in report
    assert report["samples"]["images"] == 20
    assert files(Path()) == {"x.pth", "evaluation.json", "nearest.png"}
    assert out.splitlines()[-1] == f"Wrote evaluation.json, nearest.png in {Path().resolve()}"


@pytest.mark.parametrize("data, trained_on, bound", [
    ("auto", "mnist", True), ("mnist", "mnist", True), ("auto", "offline", True), ("offline", "offline", True),
    ("offline", "mnist", False),
])  # fmt: skip
def test_where_there_is_a_bound(data, trained_on, bound, few_digits):
    untrained("x.pth", data=trained_on, timesteps=5)
    report = report_of("x.pth", "--data", data, "--data-root", "somewhere")
    assert ("bound" in report) == bound == (not report["digits_were_in_training"])
    assert few_digits[0] == ("train", data, Path("somewhere"))
    assert all(root == Path("somewhere") for _, source, root in few_digits if source == "mnist")


def test_what_is_printed():
    """The figures of the report, beside each other."""
    untrained("x.pth", config={"num_labels": 10}, binarize="dynamic")
    out = succeed("evaluate.py", "x.pth", "--binarizations", 2, *FLAGS)
    report = json.loads(Path("evaluation.json").read_text())
    bound = report["bound"]
    lines = out.splitlines()
    assert lines[:3] == [
        f"Bound, MNIST test split, dynamic binarization, 60 timesteps, no labels: {bound['nats_per_image']:.2f} +- "
        f"{bound['standard_error']:.2f} nats per image = {bound['bits_per_dimension']:.4f} bits per dimension",
        f"  L_T {bound['L_T']:.3f}, sum of L_(t-1) {bound['sum_L_t_minus_1']:.2f}, L_0 {bound['L_0']:.3f}",
        f"  mean of 2 binarizations, whose standard error is {bound['standard_error_over_binarizations']:.3f}",
    ]
    labelled = report["bound_with_labels"]
    assert "with the label" in lines[3] and f" {labelled['nats_per_image']:.2f} +- " in lines[3]
    assert lines[4].endswith(f"L_0 {labelled['L_0']:.3f}, the label {math.log(10):.3f}")
    del lines[3:6]
    columns = [report[name] for name in ("samples", "real_digits", "real_digits_of_these_classes")]
    assert lines[3].split("  ")[-1] and "of these classes" in lines[3]
    keys = ["frechet_distance", "precision", "recall", "mean_confidence", "isolated_white", "isolated_black",
            "ink_in_border", "ink"]  # fmt: skip
    for line, key in zip(lines[4:12], keys, strict=True):
        label, figures = line[:18].strip(), line[18:].split()
        assert label.replace(" ", "_") == key and figures == [
            f"{column[key]:.3f}" for column in columns
        ]
    assert lines[12].split() == ["label", "accuracy", f"{report['samples']['label_accuracy']:.3f}"]
    for line, column in zip(lines[13:15], columns, strict=False):
        assert line.split(": ")[1].split() == [
            f"{share:.2f}" for share in column["class_histogram"]
        ]
    assert lines[15:] == [
        f"Wrote evaluation.json, nearest.png, bound_terms.png in {Path().resolve()}"
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Flags


def test_flags_of_the_samples():
    d = untrained("x.pth", timesteps=8, config={"num_labels": 10})
    y, classifier = torch.arange(20) % 10, load_classifier()
    reference, _ = judge(classifier, to_levels(digits_of("mnist", "test").images), 2)
    usual = {"timesteps": 8, "guidance": 0.0, "last_step": "mode", "labels": True}
    for flags, asked, differs, how in (
        ("--guidance 2", y, {"guidance": 2.0}, {}),
        ("--no-labels", None, {"labels": False}, {}),
        ("--timesteps 3", y, {"timesteps": 3}, {}),
        ("--last-step draw", y, {"last_step": "draw"}, {}),
        ("--seed 2 --num-samples 25", torch.arange(25) % 10, {}, {"n": 25, "seed": 2}),
    ):
        note = usual | differs
        how = {"n": 20, "guidance": note["guidance"], "last_step": note["last_step"]} | how
        x = d.respaced(note["timesteps"]).sample(y=asked, **how)
        succeed("evaluate.py", "x.pth", *FLAGS, *flags.split())
        report = json.loads(Path("evaluation.json").read_text())
        assert close(report["samples"], note | quality(x, reference, classifier, 2, asked)), flags
        assert ("real_digits_of_these_classes" in report) == (asked is not None)


def test_flags_of_the_bound():
    """How many digits, how many timesteps of each, and of which chain."""
    d = untrained("x.pth", timesteps=8)
    grey = digits_of("mnist", "test").images
    for flags, chain, rows, num_t in (
        (["--images", 5], d, 5, 2),
        (["--images", 500], d, 50, 2),
        (["--repeats", 5], d, 12, 5),
        (["--exact"], d, 12, None),
        (["--timesteps", 4, "--exact"], d.respaced(4), 12, None),
    ):
        succeed("evaluate.py", "x.pth", *FLAGS, *flags)
        report = json.loads(Path("evaluation.json").read_text())
        assert close(
            report["bound"], expected_bound(chain, spread(grey, rows), "threshold", num_t)
        ), flags
        assert report["timesteps"] == chain.timesteps
    succeed("evaluate.py", "x.pth", "--num-samples", 20)
    report = json.loads(Path("evaluation.json").read_text())
    assert close(report["bound"], expected_bound(d, grey, "threshold", 4))


def test_faster_networks(monkeypatch):
    """--amp and --compile: the report is that of the network they make, which differs by bfloat16's rounding."""
    d = untrained("x.pth", timesteps=8)
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(model) or model)
    flags = ["--exact", "--trajectories", 2]
    plain, only_compiled, half, both = (
        report_of("x.pth", *flags, *more)
        for more in ([], ["--compile"], ["--amp"], ["--amp", "--compile"])
    )
    assert [type(network) for network in compiled] == [type(d.model), Autocast]
    twin, grey, classifier = (
        d.around(Autocast(d.model)),
        digits_of("mnist", "test").images,
        load_classifier(),
    )
    reference, _ = judge(classifier, to_levels(grey), 2)
    note = {"timesteps": 8, "guidance": 0.0, "last_step": "mode", "labels": False}
    for report, chain in ((plain, d), (only_compiled, d), (half, twin), (both, twin)):
        weighted = report["bound"].pop("importance_weighted")["by_trajectories"][-1]
        log_w = chain.log_weights(to_levels(spread(grey, 12)), 2, torch.Generator().manual_seed(0))
        gain = (-log_w.mean(1) - importance_weighted(log_w)).mean().item()
        assert weighted["gain"] == pytest.approx(gain, rel=1e-6)
        assert close(report["bound"], expected_bound(chain, grey, "threshold", None))
        assert close(
            report["samples"],
            note | quality(chain.sample(20, last_step="mode"), reference, classifier, 2),
        )
    assert half["bound"] != plain["bound"] and half["samples"] != plain["samples"]


def test_weights_of_100_digits_by_default(monkeypatch):
    """While the bound is of all; and the picture of the gain starts from that bound."""
    untrained("x.pth", timesteps=2)
    monkeypatch.setattr(evaluate, "load_digits", load_digits)
    plotted, plot = [], evaluate.plot_gains
    monkeypatch.setattr(evaluate, "plot_gains", lambda gains: plotted.append(gains) or plot(gains))
    succeed(
        "evaluate.py",
        "x.pth",
        "--data",
        "offline",
        "--trajectories",
        1,
        "--repeats",
        1,
        "--num-samples",
        20,
    )
    bound = json.loads(Path("evaluation.json").read_text())["bound"]
    weighted = bound["importance_weighted"]
    assert bound["images"] == 500 and weighted["images"] == 100
    assert plotted == [{"no labels": (bound["nats_per_image"], weighted["by_trajectories"])}]


def test_the_bound_alone():
    """No samples, nor a picture of them that an earlier evaluation may have left."""
    untrained("x.pth", timesteps=2)
    before = report_of("x.pth")
    out = succeed("evaluate.py", "x.pth", *FLAGS, "--num-samples", 0)
    report = json.loads(Path("evaluation.json").read_text())
    assert report["bound"] == before["bound"] and not {"samples", "real_digits"} & report.keys()
    assert (
        "nearest" not in out
        and not Path("nearest.png").exists()
        and Path("bound_terms.png").exists()
    )


def test_500_samples_by_default():
    untrained("x.pth", timesteps=2)
    succeed("evaluate.py", "x.pth", "--images", 2)
    assert json.loads(Path("evaluation.json").read_text())["samples"]["images"] == 500


@pytest.mark.parametrize("checkpoint, out_dir", [
    ("run/checkpoints/x.pth", "run"), ("elsewhere/x.pth", "elsewhere"), ("x.pth", "."), ("link.pth", "run"),
])  # fmt: skip
def test_where_the_report_goes(checkpoint, out_dir, tmp_path):
    """The folder of the run that the checkpoint is really of; or --out-dir, which is made."""
    for folder in ("run/checkpoints", "elsewhere"):
        Path(folder).mkdir(parents=True)
        untrained(f"{folder}/x.pth", timesteps=2)
    untrained("x.pth", timesteps=2)
    Path("link.pth").symlink_to("run/checkpoints/x.pth")
    written = {"evaluation.json", "nearest.png", "bound_terms.png"}
    report = report_of(checkpoint, out_dir=out_dir)
    assert report["checkpoint"] == checkpoint and written <= files(Path(out_dir))
    report_of(checkpoint, "--out-dir", "new/place", out_dir="new/place")
    assert files(Path("new/place")) == written


def test_the_released_model_by_default(monkeypatch):
    """Its report does not go into the repository's own folder, by whatever name it is called."""
    assert evaluate.RELEASED == RELEASED
    Path("released").mkdir()
    untrained("released/x.pth", timesteps=2)
    monkeypatch.setattr(evaluate, "RELEASED", Path("released/x.pth").resolve())
    out = succeed("evaluate.py", *FLAGS)
    assert out.splitlines()[0] == f"Using the released model, {evaluate.RELEASED}"
    assert out.splitlines()[-1].endswith(f"in {Path('results_d3pm/evaluation')}")
    assert Path("results_d3pm/evaluation/evaluation.json").exists()
    Path("results_d3pm/evaluation/evaluation.json").unlink()
    assert not succeed("evaluate.py", "released/x.pth", *FLAGS).startswith("Using")
    assert Path("results_d3pm/evaluation/evaluation.json").exists() and files(Path("released")) == {
        "x.pth"
    }


def test_device(monkeypatch):
    untrained("x.pth", timesteps=2)
    asked, put, load = [], [], evaluate.load_classifier
    monkeypatch.setattr(
        evaluate, "pick_device", lambda name: asked.append(name) or torch.device("cpu")
    )
    monkeypatch.setattr(
        evaluate, "load_classifier", lambda device: put.append(device) or load(device)
    )
    succeed("evaluate.py", "x.pth", *FLAGS, "--device", "tpu")
    succeed("evaluate.py", "x.pth", *FLAGS[:-2])
    assert asked == ["tpu", "auto"] and put == [torch.device("cpu")] * 2


@pytest.mark.parametrize("flags, place", [([], "results_d3pm"), (["--out-dir", "here"], "here")])
def test_training_of_the_classifier(flags, place, monkeypatch):
    """classifier.pth in --out-dir, from the digits under --data-root; no checkpoint is looked at."""
    asked = []

    def train(data_root, out):
        asked.append((data_root, out))
        out.parent.mkdir(parents=True)
        out.write_bytes(b"x" * 2400)

    monkeypatch.setattr(evaluate, "train_classifier", train)
    out = succeed("evaluate.py", "--train-classifier", "--data-root", "there", *flags)
    assert asked == [(Path("there"), Path(place) / "classifier.pth")]
    assert out == f"Wrote {Path(place) / 'classifier.pth'} (2 kB)\n"
    assert "give a checkpoint or" in fail("evaluate.py", "x.pth", "--train-classifier")


# ---------------------------------------------------------------------------------------------------------------------
# Errors: before the work, in one line, and nothing is half written


def no_work(monkeypatch):
    for name in ("sample", "bound_terms"):
        monkeypatch.setattr(
            f"diffusion.DiscreteDiffusion.{name}",
            lambda *_, **__: pytest.fail("worked for nothing"),
        )


@pytest.mark.parametrize("flags, words", [
    ("--binarizations 2", "--binarizations: x.pth was trained on digits that are not drawn at random"),
    ("--no-labels", "--no-labels: x.pth was trained without classes"),
    ("--guidance 1", "--guidance: x.pth was trained without classes"),
    ("--guidance 1 --no-labels", "--guidance needs labels"),
    ("--timesteps 11", "1..10"),
    ("--timesteps 0", "1..10"),
    ("--seed 5000000000", "at most 4294967295"),
    ("--num-samples 19", "at least 20"),
    ("--images 1", "at least 2"),
    ("--repeats 0", "at least 1"),
    ("--binarizations 0", "at least 1"),
    ("--guidance -1", "at least 0"),
    ("--split train", "invalid choice"),
    ("--device nonsense", "can't be used"),
    ("--out-dir x.pth", "can't write"),
    ("--out-dir taken", "not a regular file"),
    ("--out-dir=", "is empty"),
])  # fmt: skip
def test_bad_input(flags, words, monkeypatch):
    untrained("x.pth", timesteps=10)
    Path("taken/nearest.png").mkdir(parents=True)
    no_work(monkeypatch)
    assert words in fail("evaluate.py", "x.pth", *flags.split())


@pytest.mark.parametrize(
    "name",
    [
        "nowhere",
        "folder",
        "cut.pth",
        "noise.pth",
        "empty.pth",
        "other.pth",
        "tensor.pth",
        "misfit.pth",
    ],
)
def test_bad_checkpoint(name, bad_files):
    assert name in fail("evaluate.py", name)


@pytest.mark.parametrize("data", [None, "fashion", 3])
def test_a_checkpoint_that_does_not_say_what_it_has_seen(data, monkeypatch):
    """Then nobody knows whether the digits at hand are fair."""
    untrained("x.pth", timesteps=10, data=data)
    no_work(monkeypatch)
    assert "x.pth does not say which digits it was trained on" in fail("evaluate.py", "x.pth")


def test_a_checkpoint_of_weights_that_are_not_finite():
    untrained("x.pth", timesteps=10)
    state = torch.load("x.pth", weights_only=True)
    state["averaged_weights"]["fold.bias"][0] = math.nan
    torch.save(state, "x.pth")
    assert "weights that are not finite" in fail("evaluate.py", "x.pth", "--out-dir", "out")


def test_a_missing_or_damaged_classifier(monkeypatch, tmp_path):
    untrained("x.pth", timesteps=10)
    no_work(monkeypatch)
    monkeypatch.setattr("metrics.CLASSIFIER", tmp_path / "classifier.pth")
    assert "--train-classifier" in fail("evaluate.py", "x.pth")
    (tmp_path / "classifier.pth").write_bytes(b"nonsense")
    assert "classifier.pth is damaged" in fail("evaluate.py", "x.pth")


def test_the_checkpoint_is_not_overwritten(monkeypatch):
    untrained("x.pth", timesteps=10)
    os.link("x.pth", "evaluation.json")
    no_work(monkeypatch)
    assert "the same file is read" in fail("evaluate.py", "x.pth")


@pytest.mark.parametrize("where", ["nearest_digits", "save_figure", "json_bytes", "quality"])
def test_a_failed_evaluation_leaves_the_files_of_the_last_one(where, monkeypatch):
    """All three, as they were: none of them beside another's of another evaluation."""
    untrained("x.pth", timesteps=10)
    report_of("x.pth")
    before = snapshot(Path())

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(evaluate, where, full)
    code, _, err = call("evaluate.py", "x.pth", *FLAGS, "--seed", 1)
    assert code == 1 and "No space left" in err.splitlines()[-1]
    assert snapshot(Path()) == before


def test_an_infinite_bound_is_valid_json(monkeypatch):
    d = untrained("x.pth", timesteps=10)
    assert load_checkpoint("x.pth").timesteps == d.timesteps
    monkeypatch.setattr(
        "diffusion.DiscreteDiffusion.L_T",
        lambda self, x_0: torch.full((len(x_0),), math.inf).double(),
    )
    code, _, err = call("evaluate.py", "x.pth", *FLAGS)
    assert code == 0, err

    def refuse(constant):
        pytest.fail(f"{constant} is no JSON")

    bound = json.loads(Path("evaluation.json").read_text(), parse_constant=refuse)["bound"]
    assert bound["nats_per_image"] == bound["L_T"] == "inf" and bound["standard_error"] == "nan"
