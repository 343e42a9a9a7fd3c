"""The flags of train.py: recipes, defaults, and which of them --resume may change."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import cli
from cli import UserError

from diffusion import LOSSES, REVERSES
from model import NETWORKS, OUTPUTS
from trainer import DECAYS, OPTIMIZERS
from transitions import FAMILIES, SCHEDULES

RECIPES = {
    "bound": "--loss variational --optimizer muon --lr 1e-3 --timesteps 1000 --channels 64 128 192",
    "paper": "--reverse joint --loss hybrid --hybrid-weight 0.001 --optimizer adam --lr 2e-4 "
    "--decay constant --timesteps 1000 --dropout 0.1 --batch-size 128 --augment 0",
}
OLD_NAMES = {"released": "bound"}  # of recipes
MANY = 20_000  # images; fewer are few steps per epoch and take a higher rate
HYBRID_WEIGHT = 0.005  # with T = 200, the sum of the bound and cross-entropy
FEW_PICTURES = "hybrid", 4e-3  # default loss and rate (of Muon) for two levels
LONG, AUGMENT = 75, 0.5  # epochs from which few pictures of two levels are augmented, and the share


def add_group(p: argparse.ArgumentParser, title: str, defaults: dict) -> Callable:
    """A function that adds an option to a new group, its default to the help and to `defaults`."""
    group = p.add_argument_group(title)

    def add(*flags, help, default=None, **options):
        help += " (default %(default)s)" if default and "default" not in help else ""
        action = group.add_argument(*flags, help=help, default=default, **options)
        defaults[action.dest] = default

    return add


def make_parser(description: str | None) -> tuple[argparse.ArgumentParser, dict, dict]:
    """The parser, and two dicts of defaults: those that --resume may change, and the others."""
    p, free, fixed = cli.parser(description), {}, {}
    count = cli.integer(1)
    file = {"type": cli.path(), "metavar": "CHECKPOINT"}
    add = add_group(p, "where a run starts", {})
    recipes = "; ".join(f"{name}: {flags}" for name, flags in RECIPES.items())
    words = f"several flags in one; a flag of your own wins; {recipes}"
    add("--recipe", type=lambda name: OLD_NAMES.get(name, name), choices=RECIPES, help=words)
    words = "start from the averaged weights of this model, to which --conditional may add classes"
    add("--init", **file, help=words)
    words = "continue from this checkpoint or the newest; a longer run restarts before the decay"
    add("--resume", **file, nargs="?", const=True, help=words)
    add("--overwrite", action="store_true", help="delete the run in --out-dir first")

    add = add_group(p, "how it runs", free)
    add("--epochs", type=count, default=50, help="passes over the training images")
    add("--steps", type=count, metavar="N", help="optimizer steps, in place of --epochs")
    cli.add_data(add)
    cli.add_device(add)
    cli.add_speed(add)
    add("--validate-every", type=count, default=1, metavar="N", help="epochs per validation")
    add("--out-dir", type=cli.path(), default=Path("results_d3pm"), help="for all that is written")

    add_training(add_group(p, "what is trained, which --resume does not change", fixed))
    return p, free, fixed


def add_training(add: Callable) -> None:
    """The options that make the model."""
    share, number, count = cli.number(0, 1), cli.number(0), cli.integer(1)
    add("--batch-size", type=count, default=128, help="images per step")
    add("--timesteps", type=count, default=200, help="T, the length of the chain")
    add("--transition", choices=FAMILIES, default="uniform", help="how noise acts")
    schedules = "; ".join(f"{name}: {', '.join(f.schedules)}" for name, f in FAMILIES.items())
    add("--schedule", choices=SCHEDULES, help=f"of the noise (default: the first of {schedules})")
    few = f"for two levels, below {MANY:,} images"
    words = f"objective (default cross_entropy; {few}, {FEW_PICTURES[0]})"
    add("--loss", choices=LOSSES, help=words)
    words = "the hybrid loss's lambda"
    add("--hybrid-weight", type=number, default=HYBRID_WEIGHT, metavar="W", help=words)
    words = "p(x_(t-1) | x_t) as the mixture of posteriors, or in the paper's joint form"
    add("--reverse", choices=REVERSES, default="mixture", help=words)
    words = """K grey levels: 2 for line art and masks, more for shades; or the palette itself, for
        a folder of pictures whose pixels are categories (label maps, game levels)"""
    add("--levels", type=levels, default=2, metavar="K|palette", help=words)
    words = """2 levels by a threshold, for what is black and white; or dynamic: every epoch draws
        each pixel anew from Bernoulli(grey level), for soft edges and published likelihoods"""
    add("--binarize", choices=["threshold", "dynamic"], default="threshold", help=words)
    words = f"""share of training pictures that go through a small random affine map, of which the
        network is told (default 0; {few}, seen {LONG} times or more, {AUGMENT})"""
    add("--augment", type=share, metavar="P", help=words)
    words = "stretch a folder's pictures to N x N, or for two numbers to height x width"
    add("--size", type=count, nargs="+", metavar="N", help=words)
    add("--conditional", action="store_true", default=False, help="give the network the class")
    words = "share of images whose class --conditional hides, to sample without one, too"
    add("--label-dropout", type=share, default=0.1, metavar="P", help=words)
    words = "Muon needs half the steps of the others"
    add("--optimizer", choices=OPTIMIZERS, default="muon", help=words)
    words = f"peak learning rate, after a warm-up (default 1e-4; below {MANY:,} images 2e-3, or"
    words += f" {FEW_PICTURES[1]:g} for Muon and two levels)"
    add("--lr", type=cli.number(0, above=True), help=words)
    add("--decay", choices=DECAYS, default="late", help="late: to 0 over the last 30 %% of steps")
    add("--weight-decay", type=number, default=0.01, metavar="W", help="of Muon and AdamW")
    add("--network", choices=NETWORKS, default="unet", help="from model.py")
    add("--output", choices=OUTPUTS, help="logistic: a mean and a scale, for many grey levels")
    add("--channels", type=count, nargs=3, metavar="C", help="widths, multiples of 8")
    add("--blocks", type=cli.integer(1, 16), help="residual blocks per resolution")
    add("--dropout", type=share, metavar="P", help="share of activations to drop")
    add("--limit", type=count, metavar="N", help="train on N images only")
    add("--seed", type=cli.SEED, default=0, help="of weights, batches and noise (default 0)")


def levels(text: str) -> int | str:
    """The type of --levels."""
    return text if text == "palette" else cli.integer(2, 256)(text)


def parse_arguments(description: str | None) -> tuple[argparse.Namespace, dict, dict]:
    """The flags, None where not given; and the two dicts of defaults of `make_parser`."""
    p, free, fixed = make_parser(description)

    def parse(flags: list[str]) -> argparse.Namespace:
        # argparse sets no default where the namespace already has a value, even None.
        return p.parse_args(flags, argparse.Namespace(**dict.fromkeys([*free, *fixed])))

    recipe = RECIPES.get(parse(sys.argv[1:]).recipe, "")
    args = parse([*recipe.split(), *sys.argv[1:]])
    if args.epochs and args.steps:
        p.error("--epochs and --steps exclude each other")
    if args.label_dropout is not None and not (args.conditional or args.resume):
        p.error("--label-dropout goes with --conditional")
    if args.weight_decay is not None and args.optimizer == "adam":
        p.error("--weight-decay goes with --optimizer muon or adamw")
    if args.binarize == "dynamic" and args.levels not in (None, 2):
        p.error(f"--binarize dynamic makes 2 levels, not --levels {args.levels}")
    if args.levels == "palette":
        args.binarize = "palette"  # which is then a setting of the run
    if args.size and len(args.size) == 1:
        args.size *= 2
    if args.resume and (args.overwrite or args.init):
        p.error(f"--resume and {'--overwrite' if args.overwrite else '--init'} exclude each other")
    return args, free, fixed


def merge_settings(
    args: argparse.Namespace, free: dict, fixed: dict, checkpoint: dict | None
) -> dict:
    """The settings of the run: flags first, then the checkpoint's, then the defaults."""
    given = {name: v for name in free | fixed if (v := getattr(args, name)) is not None}
    settings = free | fixed
    if checkpoint:
        settings |= {"optimizer": "adamw", "decay": "cosine", "augment": 0.0}  # of old runs
        settings |= {name: v for name, v in checkpoint["settings"].items() if name in settings}
        settings["out_dir"] = free["out_dir"]
        for name in fixed:
            if name in given and given[name] != settings[name]:
                flag = f"--{name.replace('_', '-')} {given[name]}"
                saved = "the default" if settings[name] is None else settings[name]
                raise UserError(f"{flag} disagrees with the run to resume: {saved}")
    if "epochs" in given:
        settings["steps"] = None
    return settings | given
