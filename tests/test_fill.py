"""Filling in: against conditional distributions, summed over all trajectories; the scripts."""

import itertools
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from chains import make, seeded
from enumeration import NAMES, Enumeration, fits, small_chain
from PIL import Image
from scripts import fail, succeed, untrained

from checkpoint import PARTICLES, load_checkpoint
from diffusion import DiscreteDiffusion
from pictures import image_grid, read_partial_digit
from trajectories import fill_in, filling_process, log_weights, walk

pytestmark = pytest.mark.filterwarnings("ignore:bar_Q")

CASES = [*((name, None, 0.0) for name in NAMES), ("labels", 1, 0.0), ("labels", 0, 1.0)]


def drawn(e, known, n, particles):
    """How often the sampler draws each state as x_0, [N]."""
    y = None if e.y is None else torch.full((n,), e.y)
    known = torch.tensor(known).view(1, 1, 1, -1)
    x = fill_in(e.d, n=n, batch_size=n, y=y, guidance=e.guidance, known=known, particles=particles)
    codes = (x[:, 0, 0].long() * e.d.num_states ** torch.arange(e.D - 1, -1, -1)).sum(1)
    return torch.bincount(codes, minlength=len(e.states)).numpy()


def conditional(e, known):
    """p(x_0) of the states, given the known pixels."""
    agrees = np.all((np.array(known) < 0) | (e.states == known), axis=1)
    law = e.law() * agrees
    return law / law.sum()


def law_of_two(e, known):
    """The law of x_0 from two walks, one chosen in proportion to its weight."""
    paths, q, w = e.walks(known)
    share = w[:, None] / (w[:, None] + w)
    # that a draw is this walk, as the first or as the second
    chance = 2 * (q[:, None] * q * share).sum(1)
    return np.bincount(paths[:, -1], chance, minlength=len(e.states))


@pytest.mark.parametrize("name, y, guidance", CASES)
def test_laws_of_one_two_and_many_walks(name, y, guidance):
    """N = 1 is overwriting, which is biased; N = 2 has its own law; N = 64 the conditional."""
    e, known = Enumeration(small_chain(name), y=y, guidance=guidance), [0, -1]
    exact, overwriting = conditional(e, known), drawn(e, known, 20_000, 1)
    assert fits(overwriting, e.law(known))
    assert not fits(overwriting, exact)
    assert fits(drawn(e, known, 300, 64), exact)
    known = [-1, 1]
    assert fits(drawn(e, known, 4000, 2), law_of_two(e, known))


def test_three_pixels():
    """The known pixel is between two that are drawn jointly."""
    e, known = Enumeration(small_chain("uniform-cosine", D=3), D=3), [-1, 0, -1]
    exact, counts = conditional(e, known), drawn(e, known, 20_000, 1)
    assert fits(counts, e.law(known))
    assert not fits(counts, exact)
    assert fits(drawn(e, known, 400, 64), exact)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_given_is_the_ordinary_sampler_and_all_given_the_input(name):
    d = small_chain(name)
    how = {"y": torch.arange(50) % 2, "guidance": 0.5} if d.num_labels else {}
    ordinary, nothing = d.sample(50, **how), torch.full((50, 1, 1, 2), -1)
    image = torch.randint(0, d.num_levels, (50, 1, 1, 2), generator=seeded())
    for known, expected in ((nothing, ordinary), (nothing[:1], ordinary), (image, image.byte())):
        assert torch.equal(fill_in(d, n=50, known=known, particles=3, **how), expected)
    mixed = torch.where(torch.arange(50).view(-1, 1, 1, 1) % 2 == 0, image, nothing)
    mixed[::4, ..., 0] = -1
    filled = fill_in(d, n=50, known=mixed, particles=3, **how)
    assert torch.equal(filled[1::2], ordinary[1::2])
    assert torch.equal(filled[mixed >= 0], image[mixed >= 0].byte())


class Smooth(torch.nn.Module):
    """Predicts the values of a pixel's neighbours."""

    def forward(self, x_t, t):
        white = torch.nn.functional.avg_pool2d((x_t == 1).float(), 3, 1, 1)
        return torch.cat([-white, white], dim=1)


@pytest.mark.parametrize("transition", ["uniform", "absorbing"])
def test_image_i_does_not_depend_on_the_call(transition):
    d = DiscreteDiffusion(Smooth(), timesteps=5, transition=transition, image_shape=(1, 8, 8))
    known = torch.randint(-1, 2, (7, 1, 8, 8), generator=seeded())
    draw = partial(fill_in, d, particles=4)
    sheet = draw(known, 7)
    assert torch.equal(draw(known, 7, batch_size=3), sheet)
    assert torch.equal(draw(known[4:6], 2, first=4), sheet[4:6])
    assert not torch.equal(draw(known, 7, seed=1), sheet)
    assert len(draw(known[:1], 20).flatten(1).unique(dim=0)) == 20
    chain = filling_process(d, known, 7, particles=4)
    assert chain.shape == (6, *known.shape) and torch.equal(chain[-1], sheet)
    # Known pixels start from noise, too.
    assert not torch.equal(chain[0][known >= 0], known[known >= 0])


def test_no_autograd_graph_is_kept():
    """Else each walk would keep the memory of every network pass until the end."""

    class Learnable(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.logits = torch.nn.Parameter(torch.zeros(1, 2, 1, 1))

        def forward(self, x_t, t):
            assert not torch.is_grad_enabled()
            return self.logits.expand(len(x_t), 2, *x_t.shape[2:])

    d = DiscreteDiffusion(Learnable(), timesteps=2, image_shape=(1, 1, 2))
    known = torch.tensor([1, -1]).view(1, 1, 1, 2)
    fill_in(d, n=2, known=known, particles=2)
    list(filling_process(d, n=2, known=known, particles=2))
    log_weights(d, known.abs(), 2)


def test_chains_of_many_levels():
    """With the mask there are 257 states, too many for a byte."""
    d = make(256, 2, transition="absorbing", image_shape=(1, 1, 2))
    x_2, _, x_0 = filling_process(d, torch.tensor([255, -1]).view(1, 1, 1, 2), 3)
    assert (x_2 == 256).all() and (x_0[..., 0] == 255).all()


def test_more_walks_extend_fewer():
    """The first N - 1 trajectories stay, so with equal weights (N - 1) / N of the images do."""
    d = make(2, 3, transition="absorbing", image_shape=(1, 5, 5))
    known = torch.full((1, 1, 5, 5), -1)
    known[..., 2, 2] = 1
    sheets = [fill_in(d, n=500, known=known, particles=N) for N in (1, 2, 3, 4)]
    same = ((a == b).flatten(1).all(1) for a, b in itertools.pairwise(sheets))
    stayed = [one.double().mean().item() for one in same]
    assert stayed == pytest.approx([1 / 2, 2 / 3, 3 / 4], abs=0.09)


def test_uniforms_of_exactly_zero():
    """One uniform in 2^24 is 0: a known pixel must not jump to an almost impossible state.

    Image b gets a zero in draw b.
    """
    d = make(16, 50, transition="gaussian", image_shape=(1, 1, 2))
    known = torch.tensor([15, -1]).view(1, 1, 1, 2).expand(51, -1, -1, -1)
    uniforms = iter(0.5 * (1 - torch.eye(51))[..., None, None, None].expand(-1, -1, 1, 1, 2))
    *_, (x_0, log_w) = walk(d, known, lambda: next(uniforms))
    assert (x_0[..., 0] == 15).all() and log_w.isfinite().all()


BAD = [torch.zeros(1, 1, 1, 3).long(), torch.zeros(2, 1, 1, 2).long(), torch.zeros(1, 1, 1, 2)]
BAD += [torch.full((1, 1, 1, 2), 2), torch.full((1, 1, 1, 2), -2)]
BAD = [*({"known": known} for known in BAD), {"particles": 0}, {"last_step": "best"}]


@pytest.mark.parametrize("changes", BAD, ids=str)
@pytest.mark.parametrize("function", [fill_in, filling_process])
def test_bad_arguments(function, changes):
    arguments = {"known": torch.zeros(1, 1, 1, 2, dtype=torch.long), "n": 3} | changes
    with pytest.raises(ValueError, match=r"known|particles|unknown last step"):
        function(small_chain("uniform-cosine"), **arguments)


# --------------------------------------------------------------------------------------------------
# Pictures and scripts


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    """Two checkpoints of untrained networks, without and with classes, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    untrained("plain.pth", 6)
    untrained("classes.pth", 6, {"num_labels": 10})
    return "plain.pth"


def picture_of(known, mode="RGBA", fill=77):
    """A PNG of two levels; unknown pixels are transparent over a colour."""
    known = np.array(known)
    grey = np.where(known < 0, fill, known * 200).astype(np.uint8)
    alpha = np.where(known < 0, 0, 255).astype(np.uint8)
    if mode == "P":
        picture = Image.fromarray(np.where(known < 0, 2, known).astype(np.uint8), "P")
        picture.putpalette([0, 0, 0, 255, 255, 255, fill, fill, fill])
        picture.save("part.png", transparency=2)
    elif mode == "L":  # one grey value means transparent
        Image.fromarray(grey, "L").save("part.png", transparency=fill)
    else:
        channels = [grey, alpha] if mode == "LA" else [grey, grey, grey, alpha]
        Image.fromarray(np.stack(channels, axis=2), mode).save("part.png")


def part_of_a_digit(side=32):
    known = np.random.default_rng(0).integers(0, 2, (side, side))
    known[side // 2 :] = -1
    return known


@pytest.mark.parametrize("side", [28, 32])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L"])
def test_picture_of_a_part(mode, side, checkpoint):
    """Every kind of transparency; the border around 28x28 is known and black."""
    known = part_of_a_digit(side)
    picture_of(known, mode)
    read = read_partial_digit("part.png")
    assert read.shape == (1, 1, 32, 32) and read.dtype == torch.int64
    assert np.array_equal(read[0, 0], np.pad(known, (32 - side) // 2))


def test_grey_becomes_levels_as_in_training(checkpoint):
    grey, alpha = torch.arange(256).repeat(4).view(32, 32), torch.full((32, 32), 128)
    alpha[0] = 127
    channels = torch.stack([grey, alpha], dim=2).byte().numpy()
    Image.fromarray(channels, "LA").save("part.png")
    for K in (2, 4, 256):
        read = read_partial_digit("part.png", K)[0, 0]
        assert (read[0] == -1).all() and torch.equal(read[1:], grey[1:] * K // 256)


def drawn_by_sample(checkpoint, flags):
    """The images of sample.py, which also writes the sheet x.png."""
    files = "--fill part.png --device cpu --out x.png --save-tensor x.pt"
    succeed("sample.py", checkpoint, *files.split(), *flags.split())
    return torch.load("x.pt", weights_only=True)


def test_sample_fills_in(checkpoint):
    """The sheet shows the part, unknown pixels grey, then completions that keep known pixels."""
    picture_of(part_of_a_digit())
    known, d = read_partial_digit("part.png"), load_checkpoint(checkpoint, timesteps=4)
    for flags, particles in (("", PARTICLES), ("--particles 3", 3)):
        images = drawn_by_sample(checkpoint, f"--n 5 --timesteps 4 {flags}")
        expected = fill_in(d, known, 5, particles=particles, last_step="mode")
        assert torch.equal(images, expected)
    assert (images[:, known[0] >= 0] == known[known >= 0]).all() and len(images.unique(dim=0)) == 5
    with Image.open("x.png") as sheet:
        assert np.array_equal(sheet, image_grid(torch.cat([known, images.long()])))
        assert sheet.getpixel((2 * (2 + 5), 2 * (2 + 20))) == 96


def test_classes_of_what_is_filled_in(checkpoint):
    """No class unless one is given; with all, each row starts with the part."""
    picture_of(part_of_a_digit())
    d, known = load_checkpoint("classes.pth", timesteps=2), read_partial_digit("part.png")
    draw = partial(fill_in, d, known, particles=2, last_step="mode")
    few = "--timesteps 2 --particles 2"
    images = drawn_by_sample("classes.pth", f"{few} --n 3")
    assert torch.equal(images, draw(3)) and not torch.equal(images, draw(3, y=torch.arange(3)))
    images = drawn_by_sample("classes.pth", f"{few} --n 2 --digit 0123456789 --guidance 1")
    assert torch.equal(images, draw(20, y=torch.arange(10).repeat_interleave(2), guidance=1.0))
    with Image.open("x.png") as sheet:
        rows = [known.expand(10, 1, -1, -1, -1), images.long().view(10, 2, 1, 32, 32)]
        assert np.array_equal(sheet, image_grid(torch.cat(rows, dim=1).flatten(0, 1), columns=3))


def test_gif_of_filling_in(checkpoint):
    """It ends in sample.py's images, and known pixels emerge from noise."""
    picture_of(part_of_a_digit())
    flags = "--fill part.png --particles 2 --timesteps 3 --n 4"
    succeed("visualize_denoising.py", "classes.pth", *flags.split())
    d, known = load_checkpoint("classes.pth", timesteps=3), read_partial_digit("part.png")
    with Image.open("denoising_process.gif") as gif:
        assert gif.n_frames == 4
        first = np.asarray(gif.convert("L"))[24:]
        gif.seek(3)
        last = np.asarray(gif.convert("L"))[24:]
    drawn = fill_in(d, known, 4, particles=2, last_step="mode")
    assert np.array_equal(last, image_grid(drawn))
    assert np.array_equal(first, image_grid(filling_process(d, known, 4, particles=2)[0]))


@pytest.mark.parametrize(
    "name, words",
    [
        ("nowhere.png", "nowhere.png"),
        ("folder.png", "folder.png"),
        ("large.png", "64x28 pixels: give 28x28 or 32x32"),
        ("opaque.png", "nothing to draw"),
        ("grey.png", "nothing to draw"),
        ("cut.png", "damaged or is not a PNG"),
        ("jpeg.png", "damaged or is not a PNG"),
        ("empty.png", "damaged or is not a PNG"),
        ("part.gif", "must end in .png"),
    ],
)
@pytest.mark.parametrize("script", ["sample.py", "visualize_denoising.py"])
def test_bad_pictures(script, name, words, checkpoint):
    picture_of(part_of_a_digit())
    content = Path("part.png").read_bytes()
    Path("cut.png").write_bytes(content[: len(content) // 2])
    Path("empty.png").touch()
    Path("folder.png").mkdir()
    Image.new("RGBA", (64, 28)).save("large.png")
    Image.new("RGBA", (28, 28), (0, 0, 0, 255)).save("opaque.png")
    Image.new("L", (28, 28)).save("grey.png")
    Image.new("L", (28, 28)).save("jpeg.png", format="jpeg")
    assert words in fail(script, checkpoint, "--fill", name)


@pytest.mark.parametrize(
    "script, flags, words",
    [
        ("sample.py", "--out part.png", "the same file is read"),
        ("sample.py", "--save-tensor part.png", "the same file is read"),
        ("visualize_denoising.py", "--out link.gif", "the same file is read"),
        ("sample.py", "--guidance 1", "needs a class"),
        ("sample.py", "--digit 3", "without classes"),
        ("sample.py", "--particles 0", "at least 1"),
        ("visualize_denoising.py", "--particles 0", "at least 1"),
    ],
)
def test_bad_flags(script, flags, words, checkpoint):
    picture_of(part_of_a_digit())
    Path("link.gif").symlink_to("part.png")
    assert words in fail(script, checkpoint, "--fill", "part.png", *flags.split())


@pytest.mark.parametrize("script", ["sample.py", "visualize_denoising.py"])
def test_particles_without_fill(script, checkpoint):
    assert "--fill" in fail(script, checkpoint, "--particles", 2)
