"""Make a folder to try `train.py --data FOLDER` on: the letters A to Z of all installed fonts.

    apt-cache search --names-only ^fonts- | cut -d' ' -f1 |
        grep -vE -- '-(web|otf|docs?|han)$|(loose|tight)$|awesome|cns|glyph|hanaz|icons|ipamj' |
        grep -vE -- 'kacst|klee|lxgw|mathj|migm|noto|shimen|symbol|-u(kai|mef|ming|nif)|wqy|yozv' |
        xargs apt-get install --yes --no-install-recommends
    python -m experiments.letters letters

The packages are all of Debian's fonts except symbols, Chinese, Japanese, and duplicates.
As in notMNIST, each letter is scaled to fit, white on black, 28x28, in a sub-folder of its name.
Skipped are fonts that lack a letter, symbol fonts, in which few letters look like those of other
fonts, and duplicate pictures.
"""

import shlex
from pathlib import Path
from string import ascii_uppercase as LETTERS

from cli import UserError, parser, path, run

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

SIZE, FIT = 28, 24  # of a picture, and of the letter in it, in pixels
MISSING = "\U0010fffe"  # no font has this code point: draws the missing glyph
LIKE_OTHERS = 8  # of 26 letters must look like the same letter in other fonts


def draw(font: ImageFont.FreeTypeFont, text: str) -> Image.Image | None:
    """The text, cropped; None if nothing is drawn."""
    sheet = Image.new("L", (400, 400))
    ImageDraw.Draw(sheet).text((200, 200), text, fill=255, font=font, anchor="mm")
    box = sheet.getbbox()
    return box and sheet.crop(box)


def letters_of(file: Path) -> np.ndarray | None:
    """The alphabet, uint8 [26, 28, 28]; None if the font lacks a letter or can't be read."""
    try:
        font = ImageFont.truetype(str(file), 128)  # Pillow 10.1 takes no Path
        missing, alphabet = draw(font, MISSING), [draw(font, letter) for letter in LETTERS]
        if any(letter is None or letter == missing for letter in alphabet):
            return None
        fit = {"method": Image.Resampling.BOX, "centering": (0.49, 0.49)}  # rounded down
        fitted = [ImageOps.pad(letter, (FIT, FIT), **fit) for letter in alphabet]
    except (OSError, ValueError):
        return None
    return np.stack([ImageOps.expand(letter, (SIZE - FIT) // 2) for letter in fitted])


def legible(fonts: np.ndarray) -> np.ndarray:
    """Which fonts, of [N, 26, 28, 28], have enough letters that look like that letter's mean.

    Judged in black and white, which breaks hairlines.
    """
    x = (fonts >= 128).reshape(len(fonts), 26, -1).astype(np.float32)
    x = x - x.mean(2, keepdims=True)
    x /= np.linalg.norm(x, axis=2, keepdims=True) + 1e-6
    nearest = np.einsum("nip,jp->nij", x, x.mean(0)).argmax(2)
    return (nearest == np.arange(26)).sum(1) >= LIKE_OTHERS


def main() -> None:
    p = parser(__doc__)
    p.add_argument("folder", type=path(), help="a new folder for the pictures")
    fonts = Path("/usr/share/fonts")
    p.add_argument("--fonts", type=path(), default=fonts, help=f"where fonts are (default {fonts})")
    args = p.parse_args()
    if args.folder.exists():
        raise UserError(f"{args.folder} exists: give a new folder")
    files = sorted(f for f in args.fonts.rglob("*") if f.suffix.lower() in (".ttf", ".otf"))
    found = {file: letters_of(file) for file in tqdm(files, disable=None)}
    found = {file: letters for file, letters in found.items() if letters is not None}
    if not found:
        raise UserError(f"no font under {args.fonts} has the letters A to Z")
    good = legible(np.stack(list(found.values())))
    families, seen = set(), set()
    for i, (file, letters) in enumerate(found.items()):
        for letter, pixels in zip(LETTERS, letters, strict=True):
            if good[i] and pixels.tobytes() not in seen:
                seen.add(pixels.tobytes())
                families.add(ImageFont.truetype(str(file)).getname()[0])
                (args.folder / letter).mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(args.folder / letter / f"{file.stem}-{i}.png")
    print(f"{len(seen):,} pictures of {len(families)} families, {good.sum()} of {len(files)} files")
    print(shlex.join(["python", "train.py", "--data", str(args.folder), "--conditional"]))


if __name__ == "__main__":
    run(main)
