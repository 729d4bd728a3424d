"""Pictures and their classes out of files, brought to one size and kept in the cache as bytes."""

# N images, H height, W width, C channels.

from __future__ import annotations

import collections
import hashlib
import importlib.util
import json
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lmjax.data.cache import cache_folder, is_sealed, seal_folder, write_atomically
from lmjax.errors import UserError, did_you_mean

log = logging.getLogger("lmjax")

DIGITS = "digits"  # 1,797 of 8 x 8 pixels, inside the PyPI package scikit-learn
GLYPHS = "glyphs"  # ten digits drawn by code, for where that package is not
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"})


@dataclass(frozen=True)
class Pictures:
    """What was read.

    Args:
      pixels: uint8 [N, H, W, C], mapped from a file.
      labels: int32 [N], numbers of `classes`; -1 of what has none of them.
      draws: float64 [N] in [0, 1): of the sha256 of each picture, so that copies draw alike; NaN of
        what has none of the classes.
      classes: their names, in order.
      sha256: of all of this.
    """

    pixels: np.ndarray
    labels: np.ndarray
    draws: np.ndarray
    classes: tuple[str, ...]
    sha256: str


def read_pictures(path: str, *, size: int, channels: int, labels: tuple[str, ...]) -> Pictures:
    """Reads every picture once; later calls open what the cache holds of them.

    A file that is no picture, or a broken one, is left out: how many is logged, and which they are
    and why is written beside the cached pixels, in left_out.txt.

    Args:
      path: a folder with a folder for each class, whose pictures may lie deeper (Pillow reads
        them); a file .npz with `images` (uint8 [N, H, W] or [N, H, W, C]) and `labels` (integers or
        names); "digits" for scikit-learn's; "glyphs" for digits that are drawn by code.
      size: height and width. Of another shape, the middle square is brought to it (bilinear).
      channels: 3 for colours, 1 for grey.
      labels: the classes in their order; () for those that there are, sorted.

    Raises UserError for a path that holds no pictures, and for a class in `labels` without any.
    """
    if path in (DIGITS, GLYPHS):
        images, names = _digits() if path == DIGITS else _glyphs()
        named = hashlib.sha256(images.tobytes()).hexdigest()
        found = zip(images, names, strict=True)
        return _kept(named, lambda: found, size, channels, labels, path)
    file = Path(path).expanduser()
    if file.is_dir():
        listed = _listed(file)
        about = [(str(p.relative_to(file)), p.stat().st_size, p.stat().st_mtime_ns) for p in listed]
        named = hashlib.sha256(repr((str(file.resolve()), about)).encode()).hexdigest()
        return _kept(named, lambda: _read_folder(file, listed, size), size, channels, labels, path)
    if not file.exists():
        raise UserError(
            f"no pictures at {path}: give a folder with a folder for each class, an .npz, or "
            f"{DIGITS!r}."
        )
    if file.suffix != ".npz":
        raise UserError(f"{path} is neither a folder nor an .npz.")
    named = hashlib.sha256(file.read_bytes()).hexdigest()
    return _kept(named, lambda: _read_npz(file), size, channels, labels, path)


def grid(images_NHWC: np.ndarray, *, columns: int, scale: int = 1) -> bytes:
    """A PNG of images side by side, each pixel `scale` wide; black is 0 and white 1."""
    import io

    from PIL import Image

    N, H, W, C = images_NHWC.shape
    rows = -(-N // columns)
    canvas = np.full((rows, columns, H + 2, W + 2, C), 255, np.uint8)
    pixels = np.clip(np.rint(images_NHWC * 255), 0, 255).astype(np.uint8)
    for i, picture in enumerate(pixels):
        canvas[i // columns, i % columns, 1:-1, 1:-1] = picture
    whole = canvas.transpose(0, 2, 1, 3, 4).reshape(rows * (H + 2), columns * (W + 2), C)
    whole = whole.repeat(scale, 0).repeat(scale, 1)
    out = io.BytesIO()
    Image.fromarray(whole[..., 0] if C == 1 else whole).save(out, "png")
    return out.getvalue()


# (a picture, its class), or (None, "FILE: why there is none")
Read = Iterable[tuple[np.ndarray | None, str]]


def _kept(
    named: str,
    read: Callable[[], Read],
    size: int,
    channels: int,
    labels: tuple[str, ...],
    path: str,
) -> Pictures:
    """The pictures of the cache, which `read` fills where it has none of this name."""
    key = hashlib.sha256(repr((1, named, size, channels)).encode()).hexdigest()
    folder = cache_folder() / "images" / key

    def write(made: Path) -> None:
        made.mkdir(parents=True)
        names: list[str] = []
        bad: list[str] = []
        draws: list[float] = []
        with (made / "pixels").open("wb") as out:
            for image, text in read():
                if image is None:
                    bad.append(text)
                    continue
                data = _fitted(image, size, channels).tobytes()
                out.write(data)
                names.append(text)
                draws.append(int.from_bytes(hashlib.sha256(data).digest()[:8], "big") / 2**64)
        if not names:
            some = "".join(f"; {text}" for text in bad[:3])
            raise UserError(f"{path} holds no picture that can be read{some}.")
        np.save(made / "draws.npy", np.array(draws))
        (made / "names.json").write_text(json.dumps(names, ensure_ascii=False))
        (made / "left_out.txt").write_text("".join(f"{text}\n" for text in bad))
        seal_folder(made)

    if not is_sealed(folder):
        write_atomically(folder, write)
    left_out = folder / "left_out.txt"
    if bad := left_out.read_text().splitlines():
        log.warning("%s: %d files are left out, listed in %s", path, len(bad), left_out)
    names = json.loads((folder / "names.json").read_text())
    shape = (len(names), size, size, channels)
    pixels = np.memmap(folder / "pixels", np.uint8, "r", shape=shape)
    key = hashlib.sha256(repr((folder.name, labels)).encode()).hexdigest()
    return _labelled(pixels, np.load(folder / "draws.npy"), names, labels, path, key)


def _labelled(
    pixels: np.ndarray,
    draws: np.ndarray,
    names: list[str],
    labels: tuple[str, ...],
    path: str,
    sha256: str,
) -> Pictures:
    there = collections.Counter(names)
    classes = labels or tuple(sorted(there))
    for name in classes:
        if name not in there:
            raise UserError(f"{path} has no picture of {name!r}." + did_you_mean(name, there))
    number = {name: i for i, name in enumerate(classes)}
    values = np.array([number.get(name, -1) for name in names], np.int32)
    if others := sorted(set(there) - set(classes)):
        log.warning("%s: left out, as `labels` does not name them: %s", path, ", ".join(others))
        draws = np.where(values < 0, np.nan, draws)  # in neither split
    return Pictures(pixels, values, draws, classes, sha256)


def _listed(folder: Path) -> list[Path]:
    """All files below the folders of the classes, sorted by name; hidden ones left out."""
    found = [
        file
        for name in sorted(os.listdir(folder))
        if (folder / name).is_dir() and not name.startswith(".")
        for file in sorted((folder / name).rglob("*"))
        if file.is_file() and not file.name.startswith(".")
    ]
    if not found:
        raise UserError(
            f"{folder} has no folder with files: put the pictures of each class in one of its own, "
            "named by the class."
        )
    return found


def _read_folder(folder: Path, files: Sequence[Path], size: int) -> Read:
    try:
        from PIL import Image
    except ImportError as error:
        raise UserError("pictures in files are read by Pillow: pip install pillow.") from error
    for file in files:
        if file.suffix.lower() not in SUFFIXES:
            yield None, f"{file}: no picture, by its name"
            continue
        try:
            with Image.open(file) as picture:
                picture.draft("RGB", (2 * size, 2 * size))  # of a JPEG: no more than is needed
                image = np.asarray(_square(picture.convert("RGB"), size))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            yield None, f"{file}: cannot be decoded: {error}"
            continue
        yield image, file.relative_to(folder).parts[0]


def _read_npz(file: Path) -> Read:
    try:
        with np.load(file, allow_pickle=False) as held:
            images, labels = held["images"], held["labels"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{file} cannot be read: {error}. It needs the arrays `images` and `labels`."
        ) from error
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or len(images) != len(labels):
        raise UserError(
            f"{file}: images is {images.dtype} {list(images.shape)} with {len(labels)} labels: "
            "give uint8 [N, H, W] or [N, H, W, C], and a label for each."
        )
    return zip(images, map(str, labels), strict=True)


def _fitted(image: np.ndarray, size: int, channels: int) -> np.ndarray:
    """uint8 [size, size, channels] of uint8 [H, W] or [H, W, C]."""
    image = image[..., None] if image.ndim == 2 else image
    if image.shape[:2] != (size, size):
        from PIL import Image

        picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image[..., :3])
        image = np.asarray(_square(picture, size))
        image = image[..., None] if image.ndim == 2 else image
    if channels == 1 and image.shape[-1] != 1:
        grey = image[..., :3].astype(np.float64) @ np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
        image = np.rint(grey).astype(np.uint8)[..., None]
    return np.broadcast_to(image[..., :channels], (size, size, channels))


def _square(picture: Any, size: int) -> Any:
    """The middle square of a Pillow image, at this size."""
    side = min(picture.size)
    left, top = ((n - side) // 2 for n in picture.size)
    box = (left, top, left + side, top + side)
    return picture.resize((size, size), resample=2, box=box)


def _digits() -> tuple[np.ndarray, list[str]]:
    """Alpaydin & Kaynak, "Optical Recognition of Handwritten Digits", UCI: 8 x 8, from 0 to 16."""
    spec = importlib.util.find_spec("sklearn")  # found, never imported
    root = next(iter(spec.submodule_search_locations or []), None) if spec else None
    file = Path(root or "", "datasets", "data", "digits.csv.gz")
    if not file.is_file():
        raise UserError(
            "the digits lie in scikit-learn, which is not installed: pip install --no-deps "
            f"scikit-learn, or set the data's path to {GLYPHS!r} or to pictures of your own."
        )
    rows = np.loadtxt(file, delimiter=",")
    pixels = np.rint(rows[:, :64] * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)
    return pixels, [str(int(label)) for label in rows[:, 64]]


_FONT = (  # 3 x 5 pixels a digit, a line each
    "111 101 101 101 111",
    "010 110 010 010 111",
    "111 001 111 100 111",
    "111 001 111 001 111",
    "101 101 111 001 001",
    "111 100 111 001 111",
    "111 100 111 101 111",
    "111 001 010 010 010",
    "111 101 111 101 111",
    "111 101 111 001 111",
)


def _glyphs() -> tuple[np.ndarray, list[str]]:
    """600 digits of 8 x 8 pixels: a 3 x 5 font, moved about, of any brightness, with noise."""
    random = np.random.default_rng(0)
    pixels = random.uniform(0, 60, (600, 8, 8))
    for i in range(len(pixels)):
        shape = np.array([[int(c) for c in row] for row in _FONT[i % 10].split()], float)
        top, left = random.integers(0, 4), random.integers(0, 6)
        pixels[i, top : top + 5, left : left + 3] += shape * random.uniform(120, 195)
    return pixels.astype(np.uint8), [str(i % 10) for i in range(len(pixels))]
