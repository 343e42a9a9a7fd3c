"""A folder of small pictures with five colours and two classes, and a model of them."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scripts import untrained

from checkpoint import load_checkpoint
from dataset import load_dataset
from diffusion import DiscreteDiffusion

COLOURS = [[0, 0, 90], [200, 0, 0], [0, 200, 0], [250, 250, 0], [255, 255, 255]]
SIZE = (10, 6)  # padded to 16x8


def palette_image(states: np.ndarray) -> Image.Image:
    """A picture from uint8 [h, w], indices into COLOURS."""
    picture = Image.fromarray(states.astype(np.uint8), "P")
    picture.putpalette([value for colour in COLOURS for value in colour])
    return picture


def own_folder(n: int = 60) -> Path:
    """Write n pictures to the folder `own`, with the sub-folders "hill" and "lake"."""
    generator = np.random.default_rng(0)
    for i in range(n):
        file = Path("own", ("hill", "lake")[i % 2], f"{i}.png")
        file.parent.mkdir(parents=True, exist_ok=True)
        palette_image(generator.integers(0, 5, SIZE)).save(file)
    return Path("own").resolve()


def own_model(path: str = "own.pth", num_labels: int = 0, **options) -> DiscreteDiffusion:
    """Write a checkpoint with random weights for the pictures of `own_folder`."""
    options = {"size": SIZE, "palette": True} | options
    data = load_dataset("test", own_folder(), **options)
    levels = len(data.palette) if data.palette else 2
    network = {"num_levels": levels, "num_states": levels, "num_labels": num_labels}
    protocol = "palette" if data.palette else "threshold"
    untrained(path, 4, network, dataset=data.description, binarize=protocol)
    state = torch.load(path, weights_only=True)
    state["diffusion"]["image_shape"] = [1, *data.images.shape[2:]]
    torch.save(state, path)
    return load_checkpoint(path)
