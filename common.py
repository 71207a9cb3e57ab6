"""Shared parts of the study, in this order:

1. Errors, files, device, command line
2. Data: CIFAR-10, image folders, a synthetic set; all images uint8 on the device
3. Augmentation on the device: every image with its own random parameters
4. ResNet-50, its 32 representations, the projection head
5. LARS and the learning-rate schedule
6. InfoNCE
7. Distributed helpers
8. Checkpoints
9. Training: what the scripts have around their loops
10. Linear CKA (a block to copy into other projects)
11. Figures: command line, sources, findings, drawing

"The paper" is Grigg, Busbridge, Ramapuram and Webb 2021, arXiv 2110.00528; "SimCLR" is Chen et al. 2020,
arXiv 2002.05709. Importing this file prints, seeds and downloads nothing.
"""

import argparse
import contextlib
import functools
import hashlib
import inspect
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
import torch.distributed as dist
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as recompute_activations

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

matplotlib.use("Agg")  # figures are written to files; no display is needed
from matplotlib import pyplot as plt  # noqa: E402

# ============================================================================================================
# 1. Errors, files, device, command line
# ============================================================================================================
# What every script uses: one line instead of a traceback for all that a user can mend, files that are whole
# or not there, the device, random generators that depend on a key alone, and argparse with plain errors.


class UserError(Exception):
    """Something the person at the command line can put right: printed as one line, exit code 2."""


@contextlib.contextmanager
def user_errors():
    """Turns what a user can mend into one line on stderr and exit code 2; wraps each script's `main()`."""
    try:
        yield
    except SystemExit as stop:
        _leave(stop.code)
    except KeyboardInterrupt:
        _leave(130)
    except BrokenPipeError:  # the reader of our output went away: nothing left to say
        sys.stderr.close()
        _leave(1)
    except Exception as error:
        if isinstance(error, UserError):
            reason = str(error)
        elif is_out_of_memory(error):
            reason = "out of memory; lower --batch-size (in training --micro-batch), or --samples or --subset"
        elif isinstance(error, OSError):  # a folder taken away, say: the machine's trouble, not the code's
            reason = f"{error.filename or ''} {error.strerror or error}; what was saved before is kept"
        elif world_size() == 1:
            raise
        else:
            traceback.print_exc()
            _leave(1)
        print("error: " + " ".join(reason.split()), file=sys.stderr)
        _leave(2)


def _leave(code):
    """Ends the process; one of several at once, as tidying up would wait for kernels that never finish."""
    if world_size() > 1:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def warn(text):
    """One line on stderr."""
    print("warning: " + text, file=sys.stderr)


OUT_OF_MEMORY = ("out of memory", "not enough memory", "allocate memory", "defaultcpuallocator", "bad_alloc",
                 "could not create a primitive", "could not create a memory", "alloc_failed", "new thread")


def is_out_of_memory(error):
    """True if an exception means that memory ran out: a GPU's, the system's, or what oneDNN asked for."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error).lower() if isinstance(error, (RuntimeError, OSError)) else ""
    return any(words in text for words in OUT_OF_MEMORY)


@contextlib.contextmanager
def out_of_memory_advice(advice):
    """Turns running out of memory into a UserError with `advice`: sizes in use and flags that help."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"out of memory with {advice}") from None


def write_atomically(path, write):
    """`write(file)` fills a temporary binary file, which then becomes `path`: the old or the new, never half.

    UserError with the cause, a full disk say, if it cannot be written; the old file is then still there.
    """
    path = Path(path)
    process = f"{platform.node()}-{os.getpid()}"  # two that write one file must not share a temporary one
    temporary = path.with_name(f"{path.name}.{process}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save hides a full disk
        if not isinstance(cause, OSError):
            raise
        kept = "the previous file is kept" if path.exists() else "there is no earlier one"
        raise UserError(f"{path}: cannot be written ({cause.strerror or cause}); {kept}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # the new name too on the disk; Windows and some network drives cannot
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


class Parser(argparse.ArgumentParser):
    """argparse with errors on one line and the module docstring kept as written."""

    def __init__(self, doc, **options):
        super().__init__(description=doc, usage="%(prog)s [flags]", allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message):
        print(f"error: {message} (see {self.prog} --help)", file=sys.stderr)
        sys.exit(2)


def number(kind, low=-math.inf, high=math.inf, above=-math.inf):
    """An argparse type: a finite int or float, low <= value <= high, value > above."""
    limits = {"at least": low, "above": above, "at most": high}
    expected = " and ".join(f"{word} {limit}" for word, limit in limits.items() if math.isfinite(limit))

    def parse(text):
        try:
            value = kind(text)
            fits = math.isfinite(value) and low <= value <= high and value > above
        except (ValueError, OverflowError):
            fits = False
        if not fits:
            name = {int: "a whole number", float: "a number"}[kind]
            raise argparse.ArgumentTypeError(f"{text!r} is not {name} {expected}".rstrip())
        return value

    return parse


def pick_device(name=None):
    """torch.device for a name such as "cpu" or "cuda:1"; None: cuda, else mps, else cpu. Raises UserError."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device).add_(1).item()
    except (RuntimeError, AssertionError, NotImplementedError, ValueError) as error:
        reason = str(error).split("\n")[0][:120]
        raise UserError(f"--device {name}: unusable ({reason}); expected cpu, cuda, cuda:N or mps") from None
    if device.type == "cpu":
        torch.set_flush_denormal(True)  # denormal gradients behind a zero gamma slow some CPUs by a fifth
    return device


def generator_for(device, *key):
    """torch.Generator on `device`, seeded by the key alone (numbers, strings), never by what ran before."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "big") >> 1)


def writable_folder(folder):
    """Path of `folder`, `~` expanded, created if needed; UserError if nothing can be written there."""
    try:
        folder = Path(folder).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except (OSError, RuntimeError) as error:  # RuntimeError: nobody knows what ~ is
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--out {folder}: cannot write there ({reason}); give one you may write to") from None


# ============================================================================================================
# 2. Data
# ============================================================================================================
# What every script reads: `load_data` gives the training and test images of CIFAR-10, of a folder or of a
# synthetic set, whole and on the device. Nothing is guessed: a folder laid out in another way is refused.

CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # its training images, in [0, 1]
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # what published ResNet-50s expect
LAYOUT = ("expected train/<class>/ and test/<class>/ with images; or cifar-10-python.tar.gz, which "
          "--download fetches into an empty or new folder; or --data synthetic")
IMAGE_ENDINGS = torchvision.datasets.folder.IMG_EXTENSIONS


class Data(NamedTuple):
    """Images uint8 (n, 3, h, w) and labels int64 (n,), all on one device; class names in label order."""

    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor
    classes: list


def load_data(path, device, download=False):
    """Data of a folder with CIFAR-10, or with `train/<class>/` and `test/<class>/` images, or of "synthetic".

    CIFAR-10 is fetched into the folder `data` and, with `download`, into any other, but only where nothing
    else lies. UserError for what is missing, unreadable, of unequal size or laid out in another way, by name.
    """
    with out_of_memory_advice(f"the images of --data {path}: give fewer or smaller ones, or --device cpu"):
        if str(path) == "synthetic":
            data = Data(*synthetic_images(4000, seed=1), *synthetic_images(500, seed=2), SYNTHETIC_CLASSES)
        else:
            data = _load_folder(Path(os.path.expanduser(path)), download)
        return Data(*(t.to(device) for t in data[:4]), data.classes)


def channel_statistics(images):
    """Mean and standard deviation per channel (two tuples of 3 floats) of uint8 (n, 3, h, w), in [0, 1]."""
    counts = [torch.bincount(c.flatten(), minlength=256).cpu().double() for c in images.unbind(1)]
    levels = torch.arange(256, dtype=torch.float64) / 255
    means = [float((c * levels).sum() / c.sum()) for c in counts]
    stds = [float(((c * (levels - m) ** 2).sum() / c.sum()).sqrt()) for c, m in zip(counts, means)]
    return tuple(means), tuple(max(s, 1e-6) for s in stds)  # a channel of one value must not divide by zero


def _load_folder(folder, download):
    """The data in a folder, by what lies in it; UserError that names it if that is neither layout."""
    cifar = torchvision.datasets.CIFAR10
    try:
        entries = _visible(folder, []) if folder.exists() else []
        names, of_cifar = {entry.name for entry in entries}, {cifar.base_folder, cifar.filename}
        if {"train", "test"} <= names:
            return _load_image_folder(folder)
        download = download or os.path.abspath(folder) == os.path.abspath("data")
        download = download and names <= of_cifar
        if download or names & of_cifar:
            return _load_cifar10(folder, download)
    except OSError as error:
        raise UserError(f"--data {error.filename or folder}: {error.strerror}; {LAYOUT}") from None
    folders = [entry.name for entry in entries if entry.is_dir()]
    images = sum(name.lower().endswith(IMAGE_ENDINGS) for name in names)
    found = f"found folders {first_names(folders)}" if folders else f"found {images} images and no folders"
    raise UserError(f"--data {folder}: {found if folder.exists() else 'no such folder'}; {LAYOUT}")


def _load_cifar10(folder, download):
    """CIFAR-10 through torchvision, which checks every md5, unpacks the archive and, if told, fetches it."""
    cifar = torchvision.datasets.CIFAR10
    unpack = torchvision.datasets.utils.check_integrity(folder / cifar.filename, cifar.tgz_md5)
    try:
        sets = [cifar(folder, train=train, download=download or unpack) for train in (True, False)]
    except Exception as error:  # network, disk, archive and pickles fail in many ways
        if is_out_of_memory(error):
            raise
        reason = str(error).split(". ")[0][:120]
        raise UserError(f"--data {folder}: no whole CIFAR-10 there or to be had ({reason}); put "
                        f"{cifar.filename} (md5 {cifar.tgz_md5}) into it; {LAYOUT}") from None
    parts = []
    for part in sets:
        parts += [torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets)]
    return Data(*parts, sets[0].classes)


def _load_image_folder(folder):
    """`train/<class>/*` and `test/<class>/*`; labels number the classes in the order of their names."""
    known = [(folder / part).resolve() for part in ("train", "test")]
    train, test = ({entry.name: _images_below(entry.path, known) for entry in _visible(part, known)
                    if entry.is_dir()} for part in known)
    classes, files, labels = list(train), [], []
    if train.keys() != test.keys() or not classes:
        differ = first_names(sorted(train.keys() ^ test.keys())) or "none in either"
        raise UserError(f"--data {folder}: train and test must have the same classes: {differ}; {LAYOUT}")
    for part in (train, test):
        for label, name in enumerate(classes):
            if not part[name]:
                raise UserError(f"--data {folder}: no images of class {name} in train or test; {LAYOUT}")
            files += part[name]
            labels += [label] * len(part[name])
    images, labels, n = _read_images(files), torch.tensor(labels), sum(map(len, train.values()))
    return Data(images[:n], labels[:n], images[n:], labels[n:], classes)


def _visible(folder, known):
    """What lies in a folder, sorted, without hidden things and links into or around `known` folders."""
    found = []
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        hidden = entry.name.startswith(".") or entry.name in ("__MACOSX", "@eaDir", "$RECYCLE.BIN")
        if entry.is_symlink() and entry.is_dir():
            target = Path(entry.path).resolve()
            hidden = hidden or any(target.is_relative_to(k) or k.is_relative_to(target) for k in known)
        if not hidden:
            found.append(entry)
    return found


def _images_below(folder, known):
    """Paths of the images below a folder; no link may lead back to `known` folders or those on the way."""
    images, known = [], known + [Path(folder).resolve()]
    for entry in _visible(folder, known):
        if entry.is_dir():
            images += _images_below(entry.path, known)
        elif entry.name.lower().endswith(IMAGE_ENDINGS):
            images.append(entry.path)
    return images


def _read_images(files):
    """uint8 (n, 3, h, w) of image files of one size, read by threads; says on a terminal how far it is."""
    shape = _decode(files[0]).shape
    images = torch.empty(len(files), *shape, dtype=torch.uint8)

    def read(i):
        image = _decode(files[i])
        if image.shape != shape:
            raise UserError(f"{files[i]}: is {image.shape[2]} x {image.shape[1]} pixels, the first image "
                            f"{shape[2]} x {shape[1]}; all images must have the same size")
        images[i] = image

    with ThreadPoolExecutor() as pool:
        for done, _ in enumerate(pool.map(read, range(len(files))), 1):
            if sys.stderr.isatty() and (done % 500 == 0 or done == len(files)):
                end = "\n" if done == len(files) else ""
                print(f"\rread {done:,} of {len(files):,} images", end=end, file=sys.stderr, flush=True)
    return images


def _decode(file):
    """uint8 (3, h, w) of an image file, as stored: not turned by EXIF (nor does ImageFolder), alpha dropped.

    16-bit gray is divided by 257, which takes 65,535 to 255; of 16-bit colour Pillow keeps the high byte;
    palettes, CMYK and the like are converted by Pillow. UserError for 32-bit and floating-point pixels, whose
    range nobody states, for several pages and for what cannot be read.
    """
    try:
        with torchvision.datasets.folder.Image.open(file) as image:  # Pillow, which torchvision needs
            if image.format == "TIFF" and image.n_frames > 1:
                raise ValueError(f"{image.n_frames} pages: save each as a file")
            if image.mode.startswith("I;16") or image.mode == "I" and image.format in ("PNG", "PPM"):
                gray = torch.from_numpy(np.array(image).astype(np.int32))
                return ((gray + 128) // 257).to(torch.uint8).expand(3, -1, -1)
            if image.mode in ("I", "F"):
                raise ValueError(f"32-bit pixels, Pillow's mode {image.mode}: save it with 8 or 16 bits")
            return torchvision.transforms.functional.pil_to_tensor(image.convert("RGB"))
    except Exception as error:  # damaged files fail in many ways
        if is_out_of_memory(error):
            raise
        reason = getattr(error, "strerror", None) or str(error)[:120]
        raise UserError(f"{file}: not usable as an image ({reason}); replace or remove it") from None


SYNTHETIC_CLASSES = [f"{texture} {shape}" for shape in ("disc", "cross")
                     for texture in ("plain", "upright striped", "level striped", "checked", "ringed")]


def synthetic_images(n, seed):
    """Images uint8 (n, 3, 32, 32), labels int64 (n,) of `SYNTHETIC_CLASSES`, on the CPU, from the seed alone.

    A class is a shape and a texture. Position, size, tilt, both colours, the texture's phase and the
    background's shading and noise do not depend on it, so colour alone does not give the class away.
    """
    g = torch.Generator().manual_seed(seed)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(n, *shape, generator=g)

    labels = torch.randint(10, (n,), generator=g)
    axis = torch.arange(32.0)
    x, y = axis.view(1, 1, 32) - uniform(12, 20, 1, 1), axis.view(1, 32, 1) - uniform(12, 20, 1, 1)
    tilt, radius = uniform(-0.2, 0.2, 1, 1), uniform(9, 14, 1, 1)
    u = x * tilt.cos() + y * tilt.sin()  # pixels from the centre, along the shape's own axes
    v = y * tilt.cos() - x * tilt.sin()
    rho, a, b = torch.hypot(u, v), u.abs() / radius, v.abs() / radius
    cross = torch.minimum(torch.maximum(a / 0.4, b), torch.maximum(a, b / 0.4))
    size = torch.where((labels >= 5).view(n, 1, 1), cross, rho / radius)  # below 1 inside the shape
    inside = (0.5 + (1 - size) * radius).clamp(0, 1)  # one pixel wide edge
    phase = uniform(0, 2 * math.pi, 1, 1)
    waves = [(w * (2 * math.pi / 6) + phase).sin() for w in (u, v, rho)]  # six pixels a period
    textures = torch.stack([torch.ones(n, 32, 32), waves[0], waves[1], waves[0] * waves[1], waves[2]], 1)
    dark = textures.gather(1, (labels % 5).view(n, 1, 1, 1).expand(n, 1, 32, 32)) < 0
    back, front = torch.rand(n, 3, 1, 1, generator=g), torch.rand(n, 3, 1, 1, generator=g)
    near = (front - back).abs().amax(1, keepdim=True) < 0.4  # too little contrast: move half the range away
    front = torch.where(near, (back + 0.5) % 1, front)
    shading = F.interpolate(uniform(-0.15, 0.15, 3, 4, 4), size=32, mode="bilinear", align_corners=False)
    ink = torch.where(dark, 1 - front, front)
    images = torch.lerp(back + shading, ink, inside.unsqueeze(1))
    images = images + 0.06 * torch.randn(n, 3, 32, 32, generator=g)
    return (images.clamp(0, 1) * 255).round().to(torch.uint8), labels


# ============================================================================================================
# 3. Augmentation on the device
# ============================================================================================================
# What training and Figures 3 and 5 do to images, each with its own random parameters. These are drawn for a
# whole batch (dicts of tensors whose first dimension is the image) and can be sliced, so that micro-batches
# and ranks see what one process with one batch would see.


def imagenet_params(n, height, width, device, generator=None, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3)):
    """Crop boxes and flips for n images: {"box": int64 (n, 4) top, left, height, width, "flip": bool (n,)}.

    The distribution of torchvision's RandomResizedCrop: area uniform in `scale`, log aspect uniform in
    `ratio`, the first of ten attempts that fits, else the largest centred box whose aspect lies in `ratio`.
    Flip: p = 0.5.
    """
    def uniform(low, high):
        return low + (high - low) * torch.rand(n, 10, device=device, generator=generator)

    area = height * width * uniform(*scale)
    aspect = torch.exp(uniform(math.log(ratio[0]), math.log(ratio[1])))
    w, h = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (w >= 1) & (w <= width) & (h >= 1) & (h <= height)
    first = fits.int().argmax(1, keepdim=True)  # index of the first True, 0 if there is none
    w, h, fits = (t.gather(1, first).squeeze(1) for t in (w, h, fits))
    fallback_w, fallback_h = width, height
    if width / height < ratio[0]:
        fallback_h = round(width / ratio[0])
    elif width / height > ratio[1]:
        fallback_w = round(height * ratio[1])
    w, h = torch.where(fits, w, fallback_w), torch.where(fits, h, fallback_h)
    top, left, flip = torch.rand(3, n, device=device, generator=generator)
    top = torch.where(fits, (top * (height - h + 1)).floor(), (height - h) // 2)
    left = torch.where(fits, (left * (width - w + 1)).floor(), (width - w) // 2)
    return {"box": torch.stack([top, left, h, w], 1).long(), "flip": flip < 0.5}


def simclr_params(n, height, width, device, generator=None, strength=1.0):
    """`imagenet_params` and SimCLR's colour distortion and blur (SimCLR App. A) for n images.

    "factors" (n, 4): brightness, contrast, saturation in 1 +- 0.8 strength, hue in +- 0.2 strength (turns);
    "order" (n, 4): the operations in the order they are applied; "jitter", "gray", "blur": bool (n,), with
    p = 0.8, 0.2, 0.5; "sigma" (n,): uniform in [0.1, 2] pixels.
    """
    params = imagenet_params(n, height, width, device, generator)
    factors = torch.rand(n, 4, device=device, generator=generator)
    low, high = max(0.0, 1 - 0.8 * strength), 1 + 0.8 * strength
    factors[:, :3].mul_(high - low).add_(low)
    factors[:, 3].mul_(0.4 * strength).sub_(0.2 * strength)
    params["factors"] = factors
    params["order"] = torch.rand(n, 4, device=device, generator=generator).argsort(1)
    jitter, gray, blur, sigma = torch.rand(4, n, device=device, generator=generator)
    params |= {"jitter": jitter < 0.8, "gray": gray < 0.2, "blur": blur < 0.5, "sigma": 0.1 + 1.9 * sigma}
    return params


def slice_params(params, rows):
    """The parameters of some of the images."""
    return {name: value[rows] for name, value in params.items()}


def _resize_matrix(start, length, size_in, size_out, flip=None):
    """(n, size_out, size_in): bilinear weights that resize [start, start + length) to size_out pixels.

    Half-pixel centres (align_corners=False), edges of the interval replicated, triangle filter widened when
    it shrinks (antialias); `flip` (n,) mirrors the result. One side of crop, resize and flip is one matrix.
    """
    target = torch.arange(size_out, device=start.device, dtype=torch.float32).expand(len(start), -1)
    if flip is not None:
        target = torch.where(flip[:, None], size_out - 1 - target, target)
    scale = (length / size_out)[:, None]
    centres = (start[:, None] + (target + 0.5) * scale)[:, :, None]  # (n, size_out, 1), in input pixels
    pixels = torch.arange(size_in, device=start.device, dtype=torch.float32) + 0.5
    weights = (1 - (pixels - centres).abs() / scale.clamp(min=1)[:, :, None]).clamp_(min=0)
    inside = (pixels > start[:, None]) & (pixels < (start + length)[:, None])
    weights *= inside[:, None]
    return weights / weights.sum(2, keepdim=True)


def _separable(images, rows, columns):
    """images (n, 3, h, w), rows (n, H, h), columns (n, W, w) -> (n, 3, H, W): one matrix along each side."""
    n, c, h, w = images.shape
    images = torch.bmm(images.reshape(n, c * h, w), columns.transpose(1, 2))  # (n, 3h, W)
    return torch.matmul(rows.unsqueeze(1), images.view(n, c, h, columns.shape[1]))


def _crop_resize_flip(images, size, params):
    """uint8 (n, 3, h, w) -> float32 (n, 3, size, size) in [0, 1]: its box, resized, perhaps mirrored."""
    top, left, height, width = params["box"].unbind(1)
    rows = _resize_matrix(top, height, images.shape[2], size)
    columns = _resize_matrix(left, width, images.shape[3], size, params["flip"])
    return _separable(images.float().div_(255), rows, columns)


def _luma(x):
    """Gray value (n, 1, h, w) of (n, 3, h, w), with the weights torchvision uses (ITU-R 601)."""
    return (x[:, 0:1] * 0.2989).add_(x[:, 1:2], alpha=0.587).add_(x[:, 2:3], alpha=0.114)


def _blend_(x, operation, factor):
    """Brightness (0), contrast (1) or saturation (2), chosen per image, in place; then clipped to [0, 1].

    All three blend the image with something: black, its mean gray value, its gray image. Factor 1: no change.
    """
    view = (-1, 1, 1, 1)
    gray, rest = _luma(x), 1 - factor
    add = gray.mean((2, 3), keepdim=True) * (rest * (operation == 1)).view(view)
    add = torch.addcmul(add, gray, (rest * (operation == 2)).view(view))
    return x.mul_(factor.view(view)).add_(add).clamp_(0, 1)


def _shift_hue(x, turns):
    """Hue of x (n, 3, h, w) in [0, 1] shifted by `turns` (n,): through HSV, hue in sextants, no branches."""
    r, g, b = x.split(1, 1)
    top, bottom = torch.maximum(torch.maximum(r, g), b), torch.minimum(torch.minimum(r, g), b)
    chroma = top - bottom
    hue = torch.where(top == g, (b - r).add_(chroma, alpha=2), (r - g).add_(chroma, alpha=4))
    hue = torch.where(top == r, g - b, hue)
    hue.div_(chroma.clamp(min=1e-12)).add_(6 * turns.view(-1, 1, 1, 1))
    hue.sub_((hue / 6).floor_(), alpha=6)  # back to [0, 6)
    out = torch.empty_like(x)
    for channel, (centre, sign, offset) in enumerate(((3, 1, -1), (2, -1, 2), (4, -1, 2))):
        share = (hue - centre).abs_().mul_(sign).add_(offset).clamp_(0, 1)  # of the chroma, above `bottom`
        torch.addcmul(bottom, chroma, share, out=out[:, channel:channel + 1])
    return out


def color_jitter(x, params):
    """SimCLR's brightness, contrast, saturation and hue, in each image's own order, clipped after each.

    Every image takes the same path: its three blends in its order, each either before or after the hue, with
    factor 1 standing in on the other side. So no image is looked at alone and nothing waits for the device.
    """
    order, factors = params["order"], params["factors"]
    hue_position = (order == 3).int().argmax(1, keepdim=True)
    positions = torch.arange(3, device=x.device)
    blends = order.gather(1, positions + (positions >= hue_position))  # (n, 3): the order without the hue
    factor = torch.where(params["jitter"][:, None], factors.gather(1, blends), 1.0)
    before = torch.where(positions < hue_position, factor, 1.0)
    after = torch.where(positions >= hue_position, factor, 1.0)
    for i in range(3):
        x = _blend_(x, blends[:, i], before[:, i])
    x = _shift_hue(x, torch.where(params["jitter"], factors[:, 3], 0.0))
    for i in range(3):
        x = _blend_(x, blends[:, i], after[:, i])
    return x


def _blur_matrix(size, kernel_size, sigma, active):
    """(n, size, size): Gaussian blur along one side with reflected edges; the identity where not `active`."""
    taps = torch.arange(kernel_size, device=sigma.device) - kernel_size // 2
    weights = torch.exp(-0.5 * (taps / sigma[:, None]) ** 2)
    weights = torch.where(active[:, None], weights / weights.sum(1, keepdim=True), (taps == 0).float())
    source = (torch.arange(size, device=sigma.device)[:, None] + taps).abs()  # (size, kernel_size)
    source = torch.where(source >= size, 2 * (size - 1) - source, source).expand(len(sigma), -1, -1)
    matrix = torch.zeros(len(sigma), size, size, device=sigma.device)
    return matrix.scatter_add_(2, source, weights[:, None].expand(-1, size, -1))


def simclr_augment(images, size, strength=1.0, blur=True, generator=None, params=None, jitter=color_jitter):
    """SimCLR's training views: float32 (n, 3, size, size) in [0, 1] from uint8 (n, 3, h, w), same device.

    Crop, flip, colour jitter of `strength`, gray, and (if `blur`) Gaussian blur with a kernel of size // 10
    pixels, made odd (SimCLR App. A; its CIFAR-10 setting is strength 0.5 without blur). Every image has its
    own parameters, drawn by `simclr_params` from `generator` unless given. Equal to torchvision's functional
    operations with the same parameters, without rounding to uint8 in between. `jitter`: `color_jitter`, or
    what torch.compile made of it.
    """
    if params is None:
        params = simclr_params(len(images), *images.shape[2:], images.device, generator, strength)
    piece = max(4, 2 ** 18 // (3 * size * size))
    if images.device.type == "cpu" and len(images) > piece:  # twice as fast on pieces that fit a CPU's cache
        pieces = [slice(start, start + piece) for start in range(0, len(images), piece)]
        options = dict(size=size, strength=strength, blur=blur, jitter=jitter)
        return torch.cat([simclr_augment(images[rows], params=slice_params(params, rows), **options)
                          for rows in pieces])
    x = jitter(_crop_resize_flip(images, size, params), params)
    x = torch.where(params["gray"].view(-1, 1, 1, 1), _luma(x), x)
    kernel_size = size // 10 // 2 * 2 + 1
    if blur and kernel_size > 1:
        rows = slice(None)  # all, as a GPU would have to wait for the choice
        if x.device.type == "cpu":
            rows = params["blur"].nonzero().squeeze(1)
        matrix = _blur_matrix(size, kernel_size, params["sigma"][rows], params["blur"][rows])
        x[rows] = _separable(x[rows], matrix, matrix)
    return x


def imagenet_augment(images, size, mean=CIFAR_MEAN, std=CIFAR_STD, generator=None, params=None):
    """The supervised training images of the paper (footnote 3): crop, flip, channel-wise standardisation.

    uint8 (n, 3, h, w) -> float32 (n, 3, size, size) on the same device; parameters from `imagenet_params`.
    """
    if params is None:
        params = imagenet_params(len(images), *images.shape[2:], images.device, generator)
    return _standardise(_crop_resize_flip(images, size, params), mean, std)


def simclr_test(images, size):
    """SimCLR's test images: the whole image resized; float32 (n, 3, size, size) in [0, 1]."""
    n, _, height, width = images.shape
    box = torch.zeros(n, 4, dtype=torch.int64, device=images.device)
    box[:, 2], box[:, 3] = height, width
    unflipped = torch.zeros_like(box[:, 0], dtype=torch.bool)
    return _crop_resize_flip(images, size, {"box": box, "flip": unflipped})


def imagenet_test(images, size, mean=CIFAR_MEAN, std=CIFAR_STD):
    """The supervised test images: the whole image resized and standardised; float32 (n, 3, size, size)."""
    return _standardise(simclr_test(images, size), mean, std)


def _standardise(x, mean, std):
    for channel, (m, s) in enumerate(zip(mean, std)):  # plain numbers: a tensor of them would wait
        x[:, channel].sub_(m).div_(s)
    return x


# ============================================================================================================
# 4. ResNet-50, its representations, the projection head
# ============================================================================================================
# `build_model` makes the networks that the training scripts train and the checkpoints fill; the figures read
# every layer through `stream_representations`, one at a time, and other projects through `representations`.

BLOCK_GROUPS = (3, 4, 6, 3)  # bottlenecks per block group, Table 1


class ProjectionHead(nn.Module):
    """SimCLR's non-linear head as the paper uses it (App. A: "a 3-layer MLP"): 2048 -> 2048 -> 2048 -> 128.

    As in SimCLR's code each layer is a product without bias and a batch norm, the first two with a ReLU, the
    last norm without a shift. `head.1` to `head.3` are the outputs of the layers.
    """

    def __init__(self, width=2048, out=128):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Sequential(nn.Linear(width, width, bias=False), nn.BatchNorm1d(width), nn.ReLU()),
            nn.Sequential(nn.Linear(width, width, bias=False), nn.BatchNorm1d(width), nn.ReLU()),
            nn.Sequential(nn.Linear(width, out, bias=False), nn.BatchNorm1d(out)))
        for layer in self.layers:
            nn.init.normal_(layer[0].weight, std=0.01)  # model_util.py:134 of google-research/simclr
        self.layers[2][1].bias.requires_grad_(False)

    def forward(self, x):
        return self.layers(x)


def build_model(method, stem, classes=10, seed=0, zero_init=True, stem_padding=1):
    """A torchvision ResNet-50 whose `fc` is the projection head ("simclr") or the classifier ("supervised").

    stem "imagenet": 7 x 7 stride 2 and max-pool; "cifar": 3 x 3 stride 1, no pool (SimCLR App. B.9). The
    weights depend on method and seed only; the last gamma of each block is 0 unless `zero_init` is False. In
    train mode, on the CPU.
    """
    digest = hashlib.blake2b(f"weights {method} {seed}".encode(), digest_size=7).digest()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int.from_bytes(digest, "big"))
        model = torchvision.models.resnet50(zero_init_residual=zero_init)
        if stem == "cifar":
            model.conv1 = nn.Conv2d(3, 64, 3, padding=stem_padding, bias=False)
            nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
            model.maxpool = nn.Identity()
        if method == "simclr":
            model.fc = ProjectionHead()
        else:
            model.fc = nn.Linear(2048, classes)
            nn.init.normal_(model.fc.weight, std=0.01)
            nn.init.zeros_(model.fc.bias)
    return model


def representations(model, images, any_order=False):
    """Every representation of `images` (n, 3, h, w): a dict in depth order, from layer name to (n, p) tensor.

    `BG1.1.odd`, `BG1.1.even`, ..., `BG4.3.even`: after bn3 before the addition, and after the block's last
    ReLU (App. A.1); then `head.1` to `head.3` if the model's `fc` is a `ProjectionHead`. The model stays in
    the mode it is in (use eval for figures); no hook is left behind, even after an exception. TypeError for a
    network that is not torchvision's ResNet of 16 bottlenecks, or whose class changes what that computes.

    Features are in the order of flattened (channel, height, width); with `any_order` in that of memory, which
    for a channels_last network saves a transposition. Linear CKA is the same for any order.
    """
    return dict(stream_representations(model, images, any_order))


def stream_representations(model, images, any_order=False):
    """`representations` one at a time, (name, tensor) pairs, in memory for two blocks instead of sixteen.

    It holds neither the images nor what was taken: let go of both. The tensors must not be changed, the
    network reads them afterwards.
    """
    groups = [getattr(model, f"layer{g}", ()) for g in range(1, 5)]
    _refuse_other_networks(model, groups)

    def flat(x):
        last = any_order and x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
        return (x.permute(0, 2, 3, 1) if last else x).flatten(1)

    def keep_odd(module, inputs, output):  # a copy: torchvision adds the identity to it afterwards
        odd.append(flat(output).clone())

    odd = []
    with torch.no_grad():  # never around a yield: the caller would compute without gradients too
        x = model.maxpool(model.relu(model.bn1(model.conv1(images))))
    del images
    for g, group in enumerate(groups, 1):
        for b, block in enumerate(group, 1):
            handle = block.bn3.register_forward_hook(keep_odd)
            try:
                with torch.no_grad():
                    x = block(x)
            finally:
                handle.remove()
            yield f"BG{g}.{b}.odd", odd.pop()
            yield f"BG{g}.{b}.even", flat(x)
    if isinstance(model.fc, ProjectionHead):
        x = model.avgpool(x).flatten(1)
        for i, layer in enumerate(model.fc.layers, 1):
            with torch.no_grad():
                x = layer(x)
            yield f"head.{i}", x


=======
def _refuse_other_networks(model, groups):
    """TypeError unless the network computes what torchvision's ResNet does, whose forward we take apart."""
    resnet, bottleneck = torchvision.models.ResNet, torchvision.models.resnet.Bottleneck
    steps = [(model, "forward", resnet.forward), (model, "_forward_impl", resnet._forward_impl)]
    steps += [(block, "forward", bottleneck.forward) for group in groups for block in group]
    other = [type(module).__name__ for module, name, torchvisions in steps
             if getattr(getattr(module, name, None), "__func__", None) is not torchvisions]
    if other or tuple(map(len, groups)) != BLOCK_GROUPS or model._forward_pre_hooks:
        raise TypeError(f"representations() needs a torchvision ResNet-50 (bottlenecks {BLOCK_GROUPS}), not "
                        "wrapped, with no forward of its own and no hook before it; got "
                        f"{other[0] if other else type(model).__name__}")


# ============================================================================================================
# 5. LARS and the learning-rate schedule
# ============================================================================================================
# The optimizer of both training scripts and its rate as a function of the step.


class LARS(torch.optim.Optimizer):
    """SimCLR's LARS (google-research/simclr, lars_optimizer.py): the rate is inside the momentum buffer.

        g <- gradient + weight_decay w;   t = eta |w| / |g|, or 1 if either norm is 0
        v <- momentum v + (lr t) g;       w <- w - v

    1-d parameters (of batch norm, and biases) get neither weight decay nor adaptation (t = 1). `lr` is
    the rate of a step, scaled for the batch already. List operations only; nothing waits for the device.
    """

    def __init__(self, params, lr, momentum=0.9, weight_decay=0.0, eta=0.001):
        options = dict(lr=lr, momentum=momentum, weight_decay=weight_decay, eta=eta)
        for name, value in options.items():
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"LARS: {name} is {value}; expected a finite number, at least 0")
        super().__init__(params, options)

    @torch.no_grad()
    def step(self, closure=None):
        """One update; returns the closure's loss, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for adapted in (True, False):
                weights = [p for p in params if (p.ndim > 1) == adapted]
                if not weights:
                    continue
                gradients = [p.grad for p in weights]
                for p in weights:
                    if "momentum_buffer" not in self.state[p]:
                        self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                buffers = [self.state[p]["momentum_buffer"] for p in weights]
                torch._foreach_mul_(buffers, group["momentum"])
                if adapted:
                    gradients = torch._foreach_add(gradients, weights, alpha=group["weight_decay"])
                    w_norm = torch.stack(torch._foreach_norm(weights))
                    g_norm = torch.stack(torch._foreach_norm(gradients))
                    t = torch.where((w_norm > 0) & (g_norm > 0), group["eta"] * w_norm / g_norm, 1.0)
                    torch._foreach_mul_(gradients, list((group["lr"] * t).unbind()))
                    torch._foreach_add_(buffers, gradients)
                else:
                    torch._foreach_add_(buffers, gradients, alpha=group["lr"])
                torch._foreach_sub_(weights, buffers)
        return loss


def warmup_cosine(step, total_steps, warmup_steps):
    """Factor of the rate in [0, 1]: linear from 0 to 1 at warmup_steps, then a cosine to 0 at total_steps."""
    if step < warmup_steps:
        return step / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return 0.5 * (1 + math.cos(math.pi * progress))


# ============================================================================================================
# 6. InfoNCE
# ============================================================================================================
# SimCLR's loss, Eq. (1), for one process or several.


def info_nce(z1, z2, temperature):
    """InfoNCE, Eq. (1), averaged over the 2N anchors: a 0-d float32 tensor, ln(2N - 1) for equal views.

    z1, z2 (N, d): row i of each is a view of image i; computed in float32 whatever their dtype. In one of
    several processes the rows are its share, all processes' views are compared with, and the mean over
    processes of the result (and of its gradient, as DistributedDataParallel takes it) is that of one process
    with the whole batch. ValueError for unequal shapes or a temperature that is not above 0.
    """
    return info_nce_and_accuracy(z1, z2, temperature)[0]


def info_nce_and_accuracy(z1, z2, temperature):
    """`info_nce`, and the share of anchors (0-d in [0, 1]) whose partner is nearest of all 2N - 1 views."""
    if z1.shape != z2.shape or z1.ndim != 2:
        raise ValueError(f"info_nce needs two (N, d) tensors, got {tuple(z1.shape)} and {tuple(z2.shape)}")
    if not temperature > 0:
        raise ValueError(f"info_nce: temperature is {temperature}; expected a number above 0")
    with torch.autocast(z1.device.type, enabled=False):
        n, everyone = len(z1), world_size() * len(z1)
        z1, z2 = F.normalize(z1.float(), dim=1), F.normalize(z2.float(), dim=1)
        logits = torch.cat([z1, z2]) @ torch.cat([gather(z1), gather(z2)]).T / temperature  # (2n, 2N)
        own = torch.arange(n, device=z1.device) + rank() * n
        own = torch.cat([own, own + everyone])  # the column of each row itself; its partner is N columns away
        logits = logits.scatter(1, own[:, None], -math.inf)
        partner = (own + everyone) % (2 * everyone)
        return F.cross_entropy(logits, partner), (logits.argmax(1) == partner).float().mean()


# ============================================================================================================
# 7. Distributed helpers
# ============================================================================================================
# What training and InfoNCE need to know of torchrun's processes; without it, one process with rank 0 of 1.


def world_size():
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank():
    """This process's number, 0 to world_size() - 1."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def print0(*values):
    """print, by rank 0 only, at once."""
    if rank() == 0:
        print(*values, flush=True)


def rank0_first(work):
    """`work()` by rank 0, then by the others; after a UserError of rank 0 all stop, and it alone says why."""
    result, error = None, None
    if rank() == 0:
        try:
            result = work()
        except UserError as caught:
            error = caught
    if world_size() > 1:
        failed = [error is not None]
        dist.broadcast_object_list(failed, src=0)
        if rank() > 0 and failed[0]:
            sys.exit(2)
    if error:
        raise error
    return result if rank() == 0 else work()


class _Gather(torch.autograd.Function):
    """all_gather whose gradient sums what every rank's loss says about this rank's rows.

    torch.distributed.nn.functional.all_gather is the same but deprecated, and its successor is private.
    """

    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x) for _ in range(world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone(memory_format=torch.contiguous_format)  # it may be shared
        dist.all_reduce(gradient)
        return gradient.chunk(world_size())[rank()]


def gather(x):
    """Every rank's rows of x (n, d), in rank order: (world_size n, d), with a gradient; alone, x itself."""
    return _Gather.apply(x) if world_size() > 1 else x


@contextlib.contextmanager
def distributed(device_name):
    """Joins the processes that torchrun started, if it did; yields this process's device."""
    if not {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        yield pick_device(device_name)  # a LOCAL_RANK alone is some other program's leftover
        return
    if device_name in (None, "cuda") and torch.cuda.is_available():
        device_name = f"cuda:{os.environ['LOCAL_RANK']}"
    device = pick_device(device_name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, timeout=timedelta(hours=2))  # rank 0 may download first
    except (RuntimeError, ValueError) as error:
        reason = str(error).split("\n")[0][:160]
        raise UserError(f"cannot join torchrun's processes ({reason}); if there are none, unset RANK")
    yield device
    dist.destroy_process_group()  # after success only: without a lost rank, kernels never finish


# ============================================================================================================
# 8. Checkpoints
# ============================================================================================================
# The training scripts write and resume from their own files; the figures read those and other projects'. All
# are read with weights_only: they can hold tensors, numbers, texts, lists and dicts, and nothing is run.


def save_atomically(content, path):
    """torch.save through `write_atomically`: `path` is the old or the new file, never half of one."""
    write_atomically(path, lambda file: torch.save(content, file))


def read_file(path, device, advice):
    """What torch.save wrote into a file of plain values; nothing in it is executed. UserError otherwise."""
    try:
        with open(path, "rb") as file:
            beginning = file.read(9)
        with warnings.catch_warnings(), out_of_memory_advice(f"the file {path}: it needs a larger machine"):
            warnings.simplefilter("ignore")  # about what a foreign file is; the errors below say it
            return torch.load(path, map_location=device, weights_only=True)
    except OSError as error:  # missing, a folder, no permission, a bad disk
        raise UserError(f"{path}: {error.strerror or error}; {advice}") from None
    except Exception as error:  # damaged files fail in many ways
        if isinstance(error, UserError) or is_out_of_memory(error):
            raise
        refused = re.search(r"GLOBAL ([\w.]+)|(TorchScript)", str(error))
        what = "truncated, damaged or not written by torch.save"
        if beginning.endswith(b"{"):  # eight bytes of length, then JSON
            what = 'safetensors; convert it: torch.save(safetensors.torch.load_file(FILE), "weights.pt")'
        elif refused:
            what = (f"holds {refused[1] or refused[2]}, which is not loaded since it could run code; where "
                    'you trust it, save the state dict alone: torch.save(model.state_dict(), "weights.pt")')
        raise UserError(f"{path}: {what}; {advice}") from None


def read_checkpoint(path, device="cpu"):
    """The dict in a checkpoint of ours; nothing in the file is executed. UserError if it is not one."""
    advice = "expected a file written by train_simclr.py or train_supervised.py"
    content = read_file(path, device, advice)
    if not is_checkpoint(content):
        raise UserError(f"{path}: is no checkpoint of this study; {advice}")
    return content


def is_checkpoint(content):
    """True for what the training scripts write, in this version or an earlier one."""
    expected = {"settings": dict, "epoch": int, "step": int, "backbone": dict, "head": dict}
    if not isinstance(content, dict) or not all(isinstance(content.get(k), t) for k, t in expected.items()):
        return False
    needed = {"method", "seed", "data", "classes", "stem", "image_size", "mean", "std", "strength", "blur"}
    return needed <= content["settings"].keys()


def load_weights(model, checkpoint, path, assign=False):
    """Copies (or with `assign` puts) a checkpoint's backbone and head into `model`, or raises UserError."""
    weights = checkpoint["backbone"] | {f"fc.{name}": value for name, value in checkpoint["head"].items()}
    try:
        model.load_state_dict(weights, strict=True, assign=assign)
    except (RuntimeError, AttributeError, TypeError) as error:
        raise UserError(f"{path}: its weights do not fit ({str(error)[:300]})") from None


def load_model(path, device="cpu", method=None, image_size=None, mean=None, std=None, prefix=None,
               stem_padding=None):
    """The network in a checkpoint of ours or in another project's file, on `device`, in eval mode.

    `model.settings` is the dict of settings it was trained with, and "epoch" the epochs behind it. The other
    arguments are for other projects' files: see `find_backbone` and `foreign_settings`. UserError for a file
    that is neither, does not fit, or holds values that are not finite.
    """
    content = read_file(path, "cpu", "expected a checkpoint of this study or a ResNet-50's state dict")
    ours = is_checkpoint(content)
    if ours:
        settings = content["settings"] | {"epoch": content["epoch"]}
    else:
        weights, start, left_out = find_backbone(content, path, prefix)
        settings = foreign_settings(weights, method, image_size, mean, std, stem_padding)
        settings["note"] = f"took the network at prefix '{start}'; {settings['note']}"
        settings |= {"file": str(path), "prefix": start, "left_out": left_out}
        content = {"backbone": weights, "head": {}}
    with torch.device("meta"):  # no time spent on initial weights
        model = build_model(settings["method"], settings["stem"], max(1, len(settings["classes"])),
                            stem_padding=settings.get("stem_padding", 1))
    if not ours:
        model.fc = nn.Identity()
    load_weights(model, content, path, assign=True)
    model.to(torch.float32, memory_format=torch.channels_last).eval()
    broken = [name for name, value in model.state_dict().items() if not value.isfinite().all()]
    if broken:
        raise UserError(f"{path}: NaN or infinity in {first_names(broken)}; take a file from before that")
    model.settings = settings
    return model.to(device)


def load_any_model(path, method, device="cpu", image_size=None, mean=None, std=None):
    """`load_model` with its most used arguments, in another order."""
    return load_model(path, device, method, image_size, mean, std)


def foreign_settings(weights, method, image_size, mean, std, stem_padding):
    """How images reach another project's backbone; "note" says what was assumed that weights do not show.

    `method` ("simclr" or "supervised", the default) is the one whose augmentation it gets in Figures 3 and 5.
    Images are resized to `image_size` (default: 224, or 32 for a 3 x 3 stem) and standardised by `mean` and
    `std` (default: ImageNet's).
    """
    small = weights["conv1.weight"].shape[-1] == 3
    note = "7 x 7 stem with stride 2, padding 3 and max-pool assumed"
    if small:
        note = f"3 x 3 stem with stride 1, padding {stem_padding or 1} and no max-pool assumed"
        note += "" if stem_padding else " (--stem-padding 2: as solo-learn's)"
    if not (mean and std):
        note += ", images standardised for ImageNet (--mean, --std)"
    return {"method": method or "supervised", "seed": None, "data": None, "classes": [],
            "stem": "cifar" if small else "imagenet", "stem_padding": stem_padding or 1,
            "image_size": image_size or (32 if small else 224), "standardise": True,
            "mean": list(mean or IMAGENET_MEAN), "std": list(std or IMAGENET_STD),
            "strength": 0.5 if small else 1.0, "blur": not small, "note": note}


def find_backbone(content, path, prefix=None):
    """({torchvision's name: tensor}, prefix, names left out) of the one ResNet-50 in what a file holds.

    Its names may follow any prefix, in dicts in dicts, and be numbered by nn.Sequential. UserError if none is
    whole, with what the nearest lacks, and if several are that differ, of which neither `_preferred` nor
    `prefix` (its end is enough) picks one. Left out are the other tensors of the same dict.
    """
    wanted, whole, faults, found = _backbone_shapes(), {}, [], []
    for where, tensors in _state_dicts(content):
        found += [where + name for name in tensors]
        for start, names in _resnets(tensors):
            wrong = _faults({name: tensors[old] for name, old in names.items()}, wanted)
            faults.append((len(wrong), f"the nearest, with prefix '{where}{start}': {first_names(wrong)}"))
            if not wrong:
                names = {name: old for name, old in names.items() if name in wanted}
                weights = {name: tensors[old] for name, old in names.items()}
                whole[where + start] = weights, where + start, sorted(tensors.keys() - set(names.values()))
    if not whole:
        what = min(faults)[1] if faults else f"found {first_names(found) or 'no tensors'}"
        raise UserError(f"{path}: expected the tensors of a whole torchvision ResNet-50; {what}")
    chosen = _preferred(list(whole))
    if prefix is not None:
        ends = [p for p in whole if f".{p}".endswith(f".{prefix.strip('.')}.")]
        chosen = [p for p in whole if p.strip(".") == prefix.strip(".")] or ends
    first, *others = [whole[p][0] for p in chosen] or [{}]
    if not chosen or any(not torch.equal(other[name], first[name]) for other in others for name in first):
        what = f"no ResNet-50 at --prefix {prefix}" if not chosen else "several ResNet-50s"
        raise UserError(f"{path}: {what}; choose one by --prefix: {first_names([repr(p) for p in whole])}")
    return whole[chosen[0]]


@functools.cache
def _backbone_shapes():
    """{torchvision's name: shape} of a ResNet-50 without its classifier."""
    with torch.device("meta"):
        tensors = torchvision.models.resnet50().state_dict()
    return {name: tuple(tensor.shape) for name, tensor in tensors.items() if not name.startswith("fc.")}


def _state_dicts(content):
    """(the way to it, {name: tensor}) of every dict or list in a file, from the outside in, each once."""
    found, waiting, seen = [], [("", content)], set()
    for where, value in waiting:  # grows on the way
        if isinstance(value, (dict, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            items = list(value.items() if isinstance(value, dict) else enumerate(value))
            found.append((where, {str(key): item for key, item in items if isinstance(item, torch.Tensor)}))
            waiting += [(f"{where}{key}.", item) for key, item in items]
    return found


def _resnets(tensors):
    """(prefix, {torchvision's name: name}) of everything in a state dict that looks like a ResNet."""
    starts = [re.fullmatch(r"((?:.*\.)?)(layer1|[234])\.0\.conv1\.weight", name) for name in tensors]
    starts, found = [match.groups() for match in starts if match], []
    for start, layer1 in starts:
        tops = {}
        if layer1 != "layer1":  # nn.Sequential(*children): 4, or less without ReLU and max-pool before it
            tops = {"0": "conv1", "1": "bn1"} | {str(int(layer1) + g): f"layer{g + 1}" for g in range(4)}
        inner = tuple(other for other, _ in starts if len(other) > len(start))
        names = {}
        for name in tensors:
            if name.startswith(start) and not name.startswith(inner):
                top, dot, rest = name[len(start):].partition(".")
                names[tops.get(top, top) + dot + rest.replace("shortcut.", "downsample.")] = name
        found.append((start, names))
    return found


def _faults(network, wanted):
    """What keeps {torchvision's name: tensor} from being a ResNet-50's backbone, in words."""
    blocks = tuple(len({n.split(".")[1] for n in network if n.startswith(f"layer{g}.")}) for g in range(1, 5))
    faults = [f"{blocks} blocks instead of {BLOCK_GROUPS}"] if blocks != BLOCK_GROUPS else []
    missing = [n for n in wanted if n not in network and "num_batches" not in n]  # old files have no counts
    if missing and all(".running_" in name for name in missing):
        return ["no running statistics of the batch norms; save model.state_dict(), which has them"]
    faults += [f"no {name}" for name in missing]
    for name, tensor in network.items():
        shape, small = tuple(tensor.shape), name == "conv1.weight" and tensor.shape == (64, 3, 3, 3)
        numbers = tensor.is_floating_point() and tensor.layout == torch.strided and not tensor.is_meta
        if name in wanted and shape != wanted[name] and not small:
            faults.append(f"{name} {shape} instead of {wanted[name]}")
        elif name in wanted and "num_batches" not in name and not numbers:
            faults.append(f"{name} as {tensor.type()} instead of plain floating-point numbers")
        elif name not in wanted and (tensor.ndim > 2 or re.match(r"(conv1|bn1|layer\d+|stem)\.", name)):
            faults.append(f"{name} besides")  # a head's tensors have other names and at most two dimensions
    return faults


def _preferred(prefixes):
    """Those of several networks' prefixes that are meant where nobody chooses.

    The teacher instead of the student, as DINO publishes; then anything instead of key encoders, targets,
    momentum and EMA copies.
    """
    words = {prefix: set(re.split(r"[._]", prefix.lower())) for prefix in prefixes}
    if any("teacher" in words[p] for p in prefixes):
        prefixes = [p for p in prefixes if "student" not in words[p]]
    return [p for p in prefixes if not words[p] & {"k", "key", "target", "momentum", "ema"}] or prefixes


def first_names(names, most=5):
    """The first names of a list, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


# ============================================================================================================
# 9. Training
# ============================================================================================================
# What both training scripts use around their loops: flags, the settings that a checkpoint keeps, the order of
# the images, batch norm that does not count, and `Run`, which resumes, logs, saves and heeds signals.


def training_arguments(doc, presets, argv=None):
    """The flags of a training script, the preset's values where not given; exits with 2 if impossible."""
    argv = sys.argv[1:] if argv is None else argv
    first = Parser(doc, add_help=False)  # finds the preset, whose values are the other flags' defaults
    first.add_argument("--preset", choices=list(presets), default="paper",
                       help="where the other flags' defaults come from (default: %(default)s)")
    preset = presets[first.parse_known_args(argv)[0].preset]
    parser = Parser(doc, parents=[first])
    add_training_flags(parser, "temperature" in preset)
    parser.set_defaults(**preset)
    args = parser.parse_args(argv)
    given = {word.split("=")[0] for word in argv}
    if args.warmup_epochs > args.epochs:
        if "--warmup-epochs" in given:
            parser.error(f"--warmup-epochs {args.warmup_epochs}: more than --epochs {args.epochs}")
        args.warmup_epochs = args.epochs / 2  # the preset's warmup must leave room in a run made shorter
    if args.checkpoint_activations and args.compile:
        parser.error("--compile: torch cannot compile what --checkpoint-activations does; give one of them")
    if args.checkpoint_activations and "--micro-batch" not in given:
        args.micro_batch = args.batch_size  # the whole batch in one piece is what it is for
    if len(set(args.seeds)) != len(args.seeds):
        parser.error(f"--seeds {args.seeds}: each seed once")
    args.out = args.out or f"checkpoints/{args.preset}"
    return args


def add_training_flags(parser, contrastive):
    """The flags of both training scripts, in three groups."""
    count, positive = number(int, low=1), number(float, low=0)

    def group(title):
        titled = parser.add_argument_group(title)

        def add(flag, help, **options):
            if "(default" not in help and "action" not in options:
                help += " (default: %(default)s)"
            if "type" in options:
                options["metavar"] = "N"
            titled.add_argument(flag, help=help, **options)

        return add

    add = group("what is trained")
    add("--data", "folder of CIFAR-10 or of train/<class>/ and test/<class>/ images, or synthetic")
    add("--download", "fetch CIFAR-10 into --data, if that is empty or new", action="store_true")
    add("--seeds", "one network per seed, one after another (App. A: 3)", type=number(int, low=0), nargs="+")
    add("--epochs", "passes over the training images (App. A)", type=count)
    add("--lr", "learning rate per 256 images: the peak is lr * batch-size / 256", type=positive)
    add("--weight-decay", "L2 factor; batch norm and biases are exempt", type=positive)
    add("--warmup-epochs", "epochs of linear warmup (App. A)", type=positive)
    if contrastive:
        add("--temperature", "tau of Eq. (1)", type=number(float, above=0))
    add("--stem", "7x7 stride 2 and max-pool, or 3x3 stride 1 (SimCLR B.9)", choices=("imagenet", "cifar"))
    add = group("size and memory")
    add("--image-size", "pixels, of training and test (footnote 3: 224; B.9: 32)", type=number(int, low=8))
    add("--subset", "training images used, a fixed random choice (default: all)", type=count)
    add("--batch-size", "images per step, over all processes (App. A)", type=count)
    add("--micro-batch", "images per forward and backward, per process: lower it to save memory", type=count)
    add("--checkpoint-activations", action="store_true",
        help="save memory by computing activations twice, the batch in one piece: exact, batch norm included")
    add = group("where and how")
    add("--out", "folder for checkpoints and logs (default: checkpoints/<preset>)")
    add("--checkpoint-every", "epochs between checkpoints", type=count)
    add("--device", "cpu, cuda, cuda:N or mps (default: cuda, else mps, else cpu)")
    add("--precision", "of products (default: bf16 where hardware has it)", choices=("fp32", "bf16"))
    add("--compile", "torch.compile network and colour augmentation; pays on GPUs", action="store_true")


# The settings of a run: all that its result depends on, and what a figure needs to know.
SETTINGS = ("preset data epochs batch_size micro_batch checkpoint_activations image_size stem lr "
            "weight_decay warmup_epochs temperature strength blur subset precision").split()


def run_settings(args, method, seed, data, device):
    """The settings dict (plain types only) of a run; UserError for what data, device or processes forbid."""
    total, processes = len(data.train_images), world_size()
    n = args.subset or total
    local, micro_batch = args.batch_size // processes, min(args.micro_batch, args.batch_size)
    no_bf16 = args.precision == "bf16" and device.type == "cuda" and not has_bf16(device)
    one_image = method == "supervised" and 1 in (local % micro_batch, min(local, micro_batch))
    for wrong, what in (
            (n > total, f"--subset {n}: the training set has {total} images"),
            (args.batch_size > n, f"--batch-size {args.batch_size}: more than the run's {n} training images"),
            (args.batch_size % processes, f"--batch-size {args.batch_size}: no multiple of {processes}"),
            (local < 2, f"--batch-size {args.batch_size}: batch norm needs at least 2 images per process"),
            (one_image, f"--micro-batch {micro_batch}: leaves a piece of 1 image, too few for batch norm"),
            (args.compile and processes > 1, f"--compile: does not work with {processes} processes"),
            (no_bf16, f"--precision bf16: {device} has none (compute capability below 8.0); give fp32")):
        if wrong:
            raise UserError(what)
    settings = {name: getattr(args, name, None) for name in SETTINGS}
    if args.data != "synthetic":
        settings["data"] = str(Path(args.data).expanduser().absolute())
    settings["precision"] = args.precision or ("bf16" if has_bf16(device) else "fp32")
    settings["micro_batch"] = micro_batch
    mean, std = channel_statistics(data.train_images)
    return settings | {"method": method, "seed": seed, "train_images": n, "classes": list(data.classes),
                       "mean": list(mean), "std": list(std)}


def steps_until(epoch, n, batch_size):
    """Steps until `epoch` passes over n images are complete. Batches cross ends of epochs, as in SimCLR."""
    return -(-epoch * n // batch_size)


@functools.lru_cache(maxsize=2)
def epoch_order(seed, epoch, n, total, device):
    """Indices (n,) int64 on `device` of an epoch's images, `n` of `total`; from seed and epoch only."""
    chosen = torch.randperm(total, generator=torch.Generator().manual_seed(0))[:n].sort().values  # --subset
    return chosen[torch.randperm(n, generator=generator_for("cpu", "order", seed, epoch))].to(device)


@contextlib.contextmanager
def not_counting(module):
    """Batch norm normalises as in training, but its running statistics and its count stay as they are.

    For passes that repeat another. By a momentum of 0: without running statistics SyncBatchNorm would count
    in the dtype of its input, and fail in bf16.
    """
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    norms = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms if norm.track_running_stats]
    for norm, _, count in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, count.clone()
    try:
        yield
    finally:
        for norm, momentum, count in norms:
            norm.momentum, norm.num_batches_tracked = momentum, count


def checkpoint_blocks(model):
    """Makes each bottleneck keep only its input and compute its activations again in the backward pass."""
    for layer in (model.layer1, model.layer2, model.layer3, model.layer4):
        for block in layer:
            contexts = functools.partial(lambda b: (contextlib.nullcontext(), not_counting(b)), block)
            block.forward = functools.partial(recompute_activations, block.forward, use_reentrant=False,
                                              context_fn=contexts, preserve_rng_state=False)


@contextlib.contextmanager
def caught_signals():
    """A list to which SIGTERM and SIGINT add their numbers; a second one ends the process as usual."""
    caught, previous = [], {}

    def note(signum, _):
        caught.append(signum)
        signal.signal(signum, previous[signum])

    for signum in (signal.SIGTERM, signal.SIGINT):
        previous[signum] = signal.signal(signum, note)
    try:
        yield caught
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


class Log:
    """The JSON-lines file beside a checkpoint, written by rank 0: a record of the run, then one per epoch.

    Locked while open, where the system can: a second run of the same network is a UserError.
    """

    def __init__(self, path):
        self.path, self.file, self.locked = path, None, False
        if rank() > 0:
            return
        self.file = open(path, "a+b")
        try:
            if fcntl:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self.locked = True
        except BlockingIOError:
            self.file.close()
            raise UserError(f"{path}: another process trains this network; wait for it, stop it, or give "
                            "another --out") from None
        except OSError:  # a file system without locks
            pass

    def start(self, epoch, record):
        """Drops what follows `epoch` (-1: everything), which will be run again; appends the run's record."""
        if self.file:
            kept = 0
            self.file.seek(0)
            for line in self.file:
                with contextlib.suppress(ValueError, AttributeError):  # a damaged line belongs to no epoch
                    if not line.endswith(b"\n") or json.loads(line).get("epoch", 0) > epoch:
                        break  # also before a line cut short by a kill
                kept += len(line)
            self.file.truncate(kept)
        self.write(record)

    def write(self, record):
        """Appends one record."""
        if self.file:
            self.file.write((json.dumps(record) + "\n").encode())
            self.file.flush()

    def close(self):
        """Closes the file and so unlocks it."""
        if self.file:
            self.file.close()


def run_record(device):
    """What a log says of a run's surroundings: time, git commit, versions, device."""
    git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True,
                         cwd=Path(__file__).parent) if shutil.which("git") else None
    return {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "commit": git.stdout.strip() or None if git else None, "torch": torch.__version__,
            "torchvision": torchvision.__version__, "python": platform.python_version(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
            "world_size": world_size(), "threads": torch.get_num_threads()}


def duration(seconds):
    """ "0:12:45" or "3 days, 4:05:06"."""
    return str(timedelta(seconds=round(seconds)))


class Progress:
    """Rank 0's word on how fast a run is: once for all of it, and at a terminal one line, rewritten."""

    def __init__(self, run):
        self.run, self.since, self.told, self.shown = run, None, False, 0.0
        self.terminal = sys.stderr.isatty() and rank() == 0
        self.timer = threading.Timer(30, self._tell, ["more than", 30])  # if the first step takes long
        self.timer.daemon = True
        if not run.args.compile:  # which makes the first step long, and only that
            self.timer.start()

    def after_step(self):
        """Says what is due. It waits for the device twice in a run, and at a terminal once a second."""
        run, now = self.run, time.perf_counter()
        self.timer.cancel()
        if self.since is None:  # the first step loads libraries and compiles: no measure of the rest
            run.loss.item()
            self.since = time.perf_counter(), run.step
        elif not self.told and now - self.since[0] > 5:
            run.loss.item()
            self.told = True
            self._tell("about", (time.perf_counter() - self.since[0]) / (run.step - self.since[1]))
        if self.terminal and now - self.shown > 1:
            begin, end = run.end_of(run.epoch), run.end_of(run.epoch + 1)
            pace = run.spent / (run.step - begin)  # seconds per step
            epoch_left, run_left = (duration((last - run.step) * pace) for last in (end, run.total_steps))
            self.rewrite(f"epoch {run.epoch + 1}/{run.epochs} step {run.step - begin} of {end - begin}  "
                         f"loss {run.loss.item():.3f}  {run.batch_size / pace:.0f} images/s  "
                         f"left {epoch_left}, in all {run_left}")
            self.shown = time.perf_counter()

    def _tell(self, how_long, pace):
        rest = self.run.total_steps - self.run.step
        self.rewrite("")
        print0(f"{self.run.name}: {how_long} {duration(rest * pace)} for {rest} steps")

    def rewrite(self, text):
        """Puts `text` where the line was, for the next to replace."""
        if self.terminal:
            width = shutil.get_terminal_size().columns - 1
            print(f"\r{text[:width]:{width}}\r", end="", file=sys.stderr, flush=True)


class Run:
    """One network in training, from outside its loop: where it is, its files, and what follows every step.

    A script calls `prepare`, loops `for epoch in range(run.epoch, run.epochs)` and `for step in run.steps()`,
    gives each step's result to `count` and ends an epoch with `end_epoch`. The weights are a function of the
    settings alone: killed at any moment and started again on the same device, training ends in the same bits.
    """

    def __init__(self, args, settings, data, device, log):
        self.args, self.settings, self.device, self.log, self.signals = args, settings, device, log, []
        self.path, self.name = log.path.with_suffix(".pt"), log.path.stem
        self.n, self.batch_size, self.epochs = (settings[k] for k in ("train_images", "batch_size", "epochs"))
        self.order_of = self.n, len(data.train_images), device
        self.total_steps = self.end_of(self.epochs)
        self.warmup_steps = int(settings["warmup_epochs"] * self.n // self.batch_size)
        local = self.batch_size // world_size()
        self.rows = slice(rank() * local, (rank() + 1) * local)  # this rank's part of each batch
        self.epoch = self.step = 0
        self.spent = 0.0  # seconds in the current epoch
        self.sums = torch.zeros(3, device=device)  # losses, accuracies, steps of the current epoch
        self.bad_step = torch.full((), -1, device=device)  # first step whose loss was not finite
        self.stopped, self.progress = False, None

    def end_of(self, epoch):
        """Steps until `epoch` epochs are over."""
        return steps_until(epoch, self.n, self.batch_size)

    def prepare(self, model, optimizer):
        """The network as a loop calls it: as in the checkpoint if there is one, wrapped as the flags ask."""
        self.model, self.optimizer = model.train(), optimizer
        checkpoint = rank0_first(lambda: checkpoint_of_run(self.path, self.settings))
        if checkpoint and checkpoint["epoch"] >= self.epochs:
            self.epoch = checkpoint["epoch"]
            print0(f"{self.path}: finished, {self.epochs} epochs; skipped")
            return model
        record, resumed = run_record(self.device), ""
        if checkpoint:
            load_weights(model, checkpoint, self.path)
            try:
                optimizer.load_state_dict(checkpoint["optimizer"])
                self.sums, self.spent = checkpoint["sums"].to(self.device), checkpoint["spent"]
            except (KeyError, ValueError, AttributeError) as error:
                raise UserError(f"{self.path}: its optimizer state is damaged ({error}); move it away to "
                                "begin again") from None
            self.epoch, self.step = checkpoint["epoch"], checkpoint["step"]
            resumed = f", resumed after epoch {self.epoch} and step {self.step}"
        self.log.start(self.epoch if checkpoint else -1, record | (
            {"resumed_after_epoch": self.epoch} if checkpoint else {"settings": self.settings}))
        print0(f"{self.path}: {self.settings['precision']} on {record['device']}, {world_size()} process"
               f"{'es' * (world_size() > 1)}, {self.epochs} epochs, {self.total_steps} steps of "
               f"{self.batch_size} images{resumed}")
        if self.settings["checkpoint_activations"]:
            checkpoint_blocks(model)
        if self.args.compile:
            model.compile()  # in place: parameter names stay as they are
        return for_all_ranks(model, self.device)

    def images_of(self, step):
        """Indices (int64, on the device) of this rank's images in a step, from the epochs' joined orders."""
        first, last = step * self.batch_size, (step + 1) * self.batch_size - 1
        epochs = range(first // self.n, last // self.n + 1)
        stream = torch.cat([epoch_order(self.settings["seed"], epoch, *self.order_of) for epoch in epochs])
        return stream[first % self.n:][:self.batch_size][self.rows]

    def steps(self):
        """The numbers of the epoch's remaining steps; between them it shows progress and heeds signals."""
        self.progress = self.progress or Progress(self)
        started, end = time.perf_counter() - self.spent, self.end_of(self.epoch + 1)
        while self.step < end:
            yield self.step
            self.step += 1
            self.spent = time.perf_counter() - started
            self.progress.after_step()
            flag = torch.tensor([len(self.signals)])  # on the CPU: gloo, no wait for a GPU
            self.stopped = bool(sum_over_ranks(flag) > 0)  # every rank, once any got a signal
            if self.stopped and self.step < end:  # at its end the epoch is counted first
                self.save()

    def count(self, loss, accuracy):
        """Notes the loss and accuracy of a step, both 0-d on the device; nothing in it waits."""
        self.loss = loss.detach()
        self.bad_step = torch.where((self.bad_step < 0) & ~self.loss.isfinite(), self.step, self.bad_step)
        self.sums += torch.stack([self.loss, accuracy, torch.ones_like(self.loss)])

    def end_epoch(self, **measured):
        """Logs and prints the epoch that the last step ended, and what was `measured`; saves when due."""
        refuse_if_not_finite(self)
        loss, accuracy, steps = sum_over_ranks(self.sums.clone()).tolist()  # the wait that ends an epoch
        speed = round(steps) // world_size() * self.batch_size / self.spent
        self.epoch += 1
        record = {"epoch": self.epoch, "loss": loss / steps, "lr": self.optimizer.param_groups[0]["lr"],
                  "images_per_second": speed, "accuracy": accuracy / steps} | measured
        self.log.write(record)
        self.progress.rewrite("")
        rest = duration((self.total_steps - self.step) * self.batch_size / speed)
        more = "".join(f"  {name.split('_')[0]} {value:.3f}" for name, value in measured.items())
        print0(f"{self.name}  epoch {self.epoch:>{len(str(self.epochs))}}/{self.epochs}  "
               f"loss {loss / steps:.4f}  accuracy {accuracy / steps:.3f}{more}  lr {record['lr']:.3g}  "
               f"{speed:.0f} images/s  {rest} left")
        self.sums.zero_()
        self.spent = 0.0
        if self.stopped or self.epoch % self.args.checkpoint_every == 0 or self.epoch == self.epochs:
            self.save()

    def save(self):
        """Writes the checkpoint, or leaves the previous one as it was; exits if a signal was the reason."""
        refuse_if_not_finite(self)
        average_statistics(self.model)
        self.sums = sum_over_ranks(self.sums) / world_size()  # the file must not depend on how many they are
        if rank() == 0:
            weights = self.model.state_dict()
            head = {name[3:]: value for name, value in weights.items() if name.startswith("fc.")}
            backbone = {name: value for name, value in weights.items() if not name.startswith("fc.")}
            save_atomically({"settings": self.settings, "epoch": self.epoch, "step": self.step,
                             "sums": self.sums, "spent": self.spent, "backbone": backbone, "head": head,
                             "optimizer": self.optimizer.state_dict()}, self.path)
        if self.stopped:
            exit_after_signal(self)


def exit_after_signal(run):
    """Ends the process as its signal would have, once the run is saved."""
    run.progress.rewrite("")
    print0(f"{run.path}: stopped by a signal after step {run.step} of {run.total_steps} and saved; the same "
           "command resumes")
    sys.exit(128 + (run.signals[0] if run.signals else signal.SIGTERM))


def checkpoint_of_run(path, settings):
    """A run's checkpoint, None if there is none yet; UserError if it was trained with other settings."""
    if not path.exists():
        return None
    checkpoint = read_checkpoint(path, "cpu")
    saved = checkpoint["settings"]
    relevant = settings.keys() & saved.keys() - {"preset", "data"}  # names; the data itself shows in its mean
    differ = [f"{k} {saved[k]} -> {settings[k]}" for k in sorted(relevant) if saved[k] != settings[k]]
    if differ:
        raise UserError(f"{path} was trained with other settings ({'; '.join(differ)[:300]}); give the same "
                        "flags to resume, or another --out")
    return checkpoint


def for_all_ranks(model, device):
    """`model`, wrapped if several processes train it: then its backward pass averages gradients."""
    if world_size() == 1:
        model.no_sync = contextlib.nullcontext
        return model
    if device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(model)  # in place
    parallel = nn.parallel.DistributedDataParallel  # each rank keeps its own running statistics between saves
    new = "forward_sync_buffers" in inspect.signature(parallel).parameters  # its name from torch 2.14 on
    return parallel(model, **{"forward_sync_buffers" if new else "broadcast_buffers": False})


def sum_over_ranks(x):
    """x, summed in place over the ranks."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def refuse_if_not_finite(run):
    """UserError naming the first step whose loss was not finite, or if a weight is not; on all ranks."""
    finite = torch.stack([p.isfinite().all() for p in run.model.parameters()]).all()
    bad = torch.stack([run.bad_step, torch.where(finite, -1, run.step)])
    if world_size() > 1:
        dist.all_reduce(bad, dist.ReduceOp.MAX)
    loss_step, weight_step = bad.tolist()
    if loss_step >= 0 or weight_step >= 0:
        what = f"the loss of step {loss_step}" if loss_step >= 0 else f"a weight after step {weight_step}"
        raise UserError(f"{run.name}: {what} (of {run.total_steps}) is not finite; stopped, the last good "
                        "checkpoint is kept; lower --lr or raise --warmup-epochs")


def average_statistics(model):
    """Batch norm's running statistics averaged over the ranks: every rank and checkpoint has the same."""
    if world_size() > 1:
        buffers = [b for b in model.buffers() if b.is_floating_point()]
        flat = sum_over_ranks(torch.cat([b.flatten() for b in buffers])) / world_size()
        for buffer, mean in zip(buffers, flat.split([b.numel() for b in buffers])):
            buffer.copy_(mean.view_as(buffer))


@contextlib.contextmanager
def open_run(args, method, seed, data, device):
    """A `Run`. While it is open no other process trains its network; signals and lack of memory end it."""
    settings = rank0_first(lambda: run_settings(args, method, seed, data, device))
    name = f"{method}_seed{seed}"
    log = rank0_first(lambda: Log(Path(args.out) / f"{name}.jsonl"))
    for leftover in Path(args.out).glob(f"{name}.*.tmp") if log.locked else ():  # of a killed process
        leftover.unlink(missing_ok=True)
    bf16 = " or --precision bf16" if settings["precision"] == "fp32" and has_bf16(device) else ""
    advice = (f"--batch-size {args.batch_size} --micro-batch {settings['micro_batch']} --image-size "
              f"{args.image_size} --precision {settings['precision']}: lower --micro-batch, or give "
              f"--checkpoint-activations{bf16}, or use more processes")
    run = Run(args, settings, data, device, log)
    try:
        with caught_signals() as run.signals, out_of_memory_advice(advice):
            yield run
    finally:
        if run.progress:
            run.progress.timer.cancel()
            run.progress.rewrite("")
        log.close()


# ======================================================================================================================
# 10. Linear CKA: everything between the two "----" lines works alone, with torch (2.9 or newer)
# ======================================================================================================================

# ---- copy from here ----
# Exact linear CKA (Kornblith et al. 2019; Eq. (2) of Grigg et al. 2021, arXiv 2110.00528) of all samples, between all
# layers of any number of networks, in bounded memory. The normalisation of HSIC (m^2 - 1 or (m - 1)^2) cancels.
import contextlib
import inspect
import math
import os
import sys
import time
import warnings
from typing import NamedTuple

import torch


class GramStatistics(NamedTuple):
    """What one pass over the Gram matrices of L layers gives; all on the CPU, reductions in float64."""

    cka: torch.Tensor  # (L, L) float64, Eq. (2) with the biased HSIC; NaN where a layer is constant
    debiased_cka: torch.Tensor  # (L, L) float64, with the unbiased HSIC of Song et al. 2012; NaN for fewer than 4 samples
    dominance: torch.Tensor  # (L,) float64 in [0, 1]: share of HSIC(K, K) in the rows of the 1 % of samples with most
    dominant: torch.Tensor  # (L, ceil(m / 100)) int64: those samples, the strongest first
    constant: list  # indices of layers that are the same for every sample


def linear_cka(x, y, debiased=False):
    """Linear CKA of two representations of the same m samples: a 0-d float64 tensor (float32 on MPS) on x's device.

    x (m, ...) and y (m, ...) of any trailing shape are flattened per sample. The biased CKA, Eq. (2), lies in [0, 1];
    the debiased one (Song et al. 2012; Nguyen et al. 2021) is at most 1 and about 0 for unrelated representations.
    Products in float32, or float64 if the inputs are. ValueError for unequal m, fewer than 2 samples (debiased: 4), a
    representation that is constant over samples, or NaN or infinite values.
    """
    if x.ndim == 0 or y.ndim == 0 or len(x) != len(y):
        raise ValueError(f"linear_cka compares the same samples: got shapes {tuple(x.shape)} and {tuple(y.shape)}")
    if len(x) < (4 if debiased else 2):
        raise ValueError(f"linear_cka needs at least {4 if debiased else 2} samples, got {len(x)}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a constant layer is an error here
        both = gram_statistics([lambda a, b: [x[a:b]], lambda a, b: [y[a:b]]], len(x), precision="float32", batch=1024)
    if both.constant:
        raise ValueError(f"{' and '.join('xy'[i] for i in both.constant)} is constant over samples: CKA is undefined")
    value = (both.debiased_cka if debiased else both.cka)[0, 1]
    if value.isnan():
        raise ValueError("linear_cka: the debiased HSIC of x or y with itself is 0: too few samples differ")
    return value.to(x.device, torch.float32 if x.device.type == "mps" else torch.float64)


def cka_matrix(sources, m, debiased=False, **options):
    """(L, L) float64 tensor on the CPU: linear CKA between all layers of all sources; see `gram_statistics`."""
    statistics = gram_statistics(sources, m, **options)
    return statistics.debiased_cka if debiased else statistics.cka


@torch.no_grad()
def gram_statistics(sources, m, precision=None, memory=None, batch=128):
    """`GramStatistics` of all layers of all `sources`, over samples 0 to m - 1, exact for any m.

    sources: list of callables, one per network or view; source(start, stop) returns that network's features (stop - start,
        ...) of those samples, a list or a generator over its layers, the same every time it is asked. A generator that
        computes a layer when it is asked for needs less memory, and is faster where new memory is slow.
    precision: of the Gram matrices' products. "float32"; "tf32" (CUDA); "bfloat16": inputs rounded to bfloat16, float32
        results. None: the fastest of them on this device (bfloat16 where there is hardware for it, else float32).
        Features are centred first, which is what makes rounding harmless. Float64 features keep float64 products,
        except in "bfloat16".
    memory: bytes for features and Gram tiles; None: half of what is free on the features' device. If three quarters hold
        all features, or all Grams and one layer's features (of lists: one source's), each source is asked once per
        sample; else features are computed again, the less memory the more often.
    batch: samples per call of a source.

    How: with X centred, X Xt is already H K H, and HSIC(K, L) the sum over all entries of K' L'. Pass one finds each
    feature's mean. Pass two takes a block of rows at a time: the upper triangle's part of every layer's K' in these rows,
    then all pairs of layers' products summed over it; the next block overwrites these tiles. Where all Grams fit, there is
    one block, and both passes are one. Rows of K' sum to zero, so the debiased estimator needs K's diagonal besides, nothing
    else.

    ValueError for features that are not finite, or a source that changes its mind about shapes. Layers that are constant
    over samples get NaN and a warning.
    """
    if m < 2:
        raise ValueError(f"CKA needs at least 2 samples, got m = {m}")
    if precision not in (None, "float32", "tf32", "bfloat16"):
        raise ValueError(f"precision {precision!r}: expected float32, tf32, bfloat16 or None")
    features = _CentredFeatures(sources, m, precision, memory, batch)
    pairs, diagonal, rows = _sum_over_pairs(features, m)
    pairs, diagonal, rows = (t.cpu().double() for t in (pairs, diagonal, rows))

    off = 2 * pairs  # both triangles
    squares, traces = diagonal @ diagonal.T, diagonal.sum(1)  # sums over i of K'_ii L'_ii, and of K'_ii
    hsic = off + squares
    unbiased = torch.full_like(hsic, math.nan)
    if m > 3:  # Song et al. 2012, Eq. (5); with its diagonal removed, row i of K' sums to -K'_ii
        unbiased = off + torch.outer(traces, traces) / ((m - 1) * (m - 2)) - squares * (2 / (m - 2))
    carried = rows + diagonal ** 2  # (L, m): what each sample's row adds to HSIC(K, K)
    top = carried.topk(-(-m // 100), dim=1)
    constant = (hsic.diagonal() == 0).nonzero().flatten().tolist()
    for layer in constant:
        warnings.warn(f"layer {layer} ({features.name(layer)}) is constant over samples: its CKA is NaN", stacklevel=2)
    return GramStatistics(_normalise(hsic), _normalise(unbiased), top.values.sum(1) / carried.sum(1), top.indices, constant)


def _normalise(hsic):
    norms = hsic.diagonal().sqrt()  # one by one: the product of two could overflow
    return hsic / norms[:, None] / norms[None, :]


class _Moments:
    """Sum and range of one layer's features, added batch by batch.

    They come as differences from the first sample: exactly zero for a constant, and accurate for any mean.
    """

    def __init__(self, first):
        self.sums, self.low, self.high = 0.0, first.new_zeros(()), first.new_zeros(())

    def add(self, x):
        """Counts the samples x (n, p)."""
        self.sums = self.sums + x.sum(0).to(_wide(x.device))
        least, most = torch.aminmax(x)
        self.low, self.high = torch.minimum(self.low, least), torch.maximum(self.high, most)


class _CentredFeatures:
    """The features of all sources, centred over all samples and scaled per layer; kept, or computed when asked for."""

    def __init__(self, sources, m, precision, memory, batch):
        self.sources, self.m, self.first, self.generators = sources, m, [], True
        for s in range(len(sources)):
            self.first.append([x[0].clone() for x in self._ask(s, 0, 1)])  # sample 0 of every layer
        self.sizes = [len(layers) for layers in self.first]
        everything = [x for layers in self.first for x in layers]
        self.device = everything[0].device
        self.dtype = max((x.dtype for x in everything), key=lambda dtype: dtype.itemsize)
        self.precision = precision or ("bfloat16" if has_bf16(self.device) else "float32")
        self.memory = free_memory(self.device) // 2 if memory is None else int(memory)
        self.bytes = [sum(x.nbytes for x in layers) for layers in self.first]  # of one sample, per source
        self.batch = max(1, min(batch, self.memory // 8 // max(self.bytes)))
        self.shift, self.scale = ([[] for _ in sources] for _ in range(2))  # per source, lists over layers
        self.kept = self.buffer = None
        everything, layer = m * sum(self.bytes), m * max(x.nbytes for x in everything)
        one = layer + (2 * layer if self.generators else m * max(self.bytes))  # what `in_turn` needs
        grams = self.dtype.itemsize * m * m * sum(self.sizes)
        if one + grams / 2 < everything and one + grams <= 0.75 * self.memory:
            self.buffer = torch.empty(layer, dtype=torch.uint8, device=self.device)
        elif everything <= 0.75 * self.memory:
            self.kept = [[x.new_empty(m, len(x)) for x in layers] for layers in self.first]
        if self.buffer is None:
            for s in range(len(sources)):
                self._measure(s)
        for s, layers in enumerate(self.kept or []):
            for i, x in enumerate(layers):
                layers[i] = self._centred(x, s, i)

    def _measure(self, s):
        """Pass one over source s: each layer's `shift` and `scale`; stores the features if they are kept."""
        first, progress = self.first[s], _Progress(f"CKA: features of source {s}", self.m)
        moments = [_Moments(x) for x in first]
        for a, b in self._chunks(0, self.m):
            for i, x in enumerate(self._ask(s, a, b)):
                moments[i].add(torch.sub(x, first[i], out=self.kept[s][i][a:b] if self.kept else None))
            progress.add(b - a)
        progress.close()
        for i in range(len(first)):
            self._settle(s, i, moments[i])

    def in_turn(self, s):
        """Yields all samples of source s, (m, p) and centred, one layer after another, always in the same memory.

        The source's calls for all batches go on side by side, each asked for one layer at a time: a generator holds no more
        than it needs to compute the next.
        """
        asked = [(a, b, self._ask(s, a, b)) for a, b in self._chunks(0, self.m)]
        for i, first in enumerate(self.first[s]):
            whole, moments = self.buffer[:self.m * first.nbytes].view(first.dtype).view(self.m, len(first)), _Moments(first)
            for a, b, layers in asked:
                moments.add(torch.sub(next(layers), first, out=whole[a:b]))
            self._settle(s, i, moments)
            yield self._centred(whole, s, i)
        for _, _, layers in asked:
            next(layers, None)  # more layers than before are an error

    def _settle(self, s, i, moments):
        """Appends layer i's `shift`, its mean from the first sample on, and its `scale`, to those of source s."""
        spread = moments.high.cpu().double() - moments.low.cpu().double()
        if not spread.isfinite():
            raise ValueError(f"source {s}, layer {i}: features contain NaN or infinite values")
        self.shift[s].append((moments.sums / self.m).to(self.first[s][i].dtype))
        # a power of two that brings the features to about 1: exact, and no product can overflow or vanish
        self.scale[s].append(2.0 ** -torch.frexp(spread).exponent.clamp(-120, 120).item())

    def _ask(self, s, a, b):
        """Yields the source's features of samples a to b - 1, layer after layer, each (b - a, p) float32 or float64."""
        known, i = self.first[s] if len(self.first) > s else None, -1
        features = self.sources[s](a, b)
        self.generators = self.generators and inspect.isgenerator(features)
        for i, x in enumerate(features):
            x = torch.as_tensor(x)
            if x.ndim == 0 or len(x) != b - a:
                raise ValueError(f"source {s} must return tensors of {b - a} rows for samples {a} to {b - 1}, got one of "
                                 f"shape {tuple(x.shape)}")
            x = x.reshape(b - a, x.numel() // (b - a))
            if x.shape[1] == 0 or (known and (i >= len(known) or x.shape[1:] != known[i].shape)):
                raise ValueError(f"source {s} returned features of size 0, or of other sizes than for sample 0")
            yield x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
        if i + 1 != (len(known) if known else max(1, i + 1)):
            raise ValueError(f"source {s} returned {i + 1} layers for samples {a} to {b - 1}, expected "
                             f"{len(known) if known else 'one at least'}")

    def _centred(self, x, s, i):
        """x - first sample (overwritten) -> centred and scaled, in the type that is multiplied."""
        scale = self.scale[s][i]
        torch.addcmul(self.shift[s][i] * -scale, x, x.new_full((), scale), out=x)  # (x - shift) scale, in one go
        if self.precision == "bfloat16" and x.device.type == "cuda":
            return x.bfloat16()
        if self.precision == "bfloat16" and (x.dtype == torch.float64 or not has_bf16(x.device)):
            x.copy_(x.bfloat16())  # what torch's bf16 mode does to float32 inputs where there is hardware for it
        return x

    def _chunks(self, a, b):
        for c in range(a, b, self.batch):
            yield c, min(c + self.batch, b)

    def pieces(self, s, a, b):
        """Yields (layer, start, stop, (stop - start, p)) that cover samples a to b - 1 of source s, all its layers."""
        if self.kept is not None and a < b:
            for i, x in enumerate(self.kept[s]):
                yield i, a, b, x[a:b]
            return
        for c, d in self._chunks(a, b):
            for i, x in enumerate(self._ask(s, c, d)):
                yield i, c, d, self._centred(x - self.first[s][i], s, i)

    def rows(self, s, a, b):
        """The list of (b - a, p) of source s."""
        if self.kept is not None:
            return [x[a:b] for x in self.kept[s]]
        whole = [None] * self.sizes[s]
        for i, c, d, x in self.pieces(s, a, b):
            if whole[i] is None:
                whole[i] = x.new_empty(b - a, x.shape[1])
            whole[i][c - a:d - a] = x
        return whole

    def rows_that_fit(self, a):
        """How many rows, from row a, the memory has room for with all their tiles (and, if not kept, their features)."""
        if self.buffer is not None:
            return self.m
        width, layers = self.m - a, sum(self.sizes)
        tile = self.dtype.itemsize * width * (layers + 2)  # one row of every layer's tile; two for temporaries
        if self.kept is not None:
            used, row, most = sum(x.nbytes for layers in self.kept for x in layers), tile, 1024
        else:
            passing = 3 * self.batch * max(self.bytes)  # a batch on its way: asked for, centred, and the one before
            used, row, most = passing + 2 * sum(self.bytes), tile + max(self.bytes), width
        fits = (self.memory - used) // row
        if fits < 1:
            raise ValueError(f"memory={self.memory} bytes is too little: one row of tiles and one batch of features need "
                             f"{used + row}")
        return int(min(width, most, fits))

    def name(self, layer):
        """ "source s, layer i" of a layer's number among all."""
        for s, size in enumerate(self.sizes):
            if layer < size:
                return f"source {s}, layer {layer}"
            layer -= size


def _sum_over_pairs(features, m):
    """Pass two: sums over i < j of K'_ij L'_ij (L, L) in float64, diagonals K'_ii (L, m), row sums of squares (L, m)."""
    count = sum(features.sizes)
    pairs = torch.zeros(count, count, dtype=_wide(features.device), device=features.device)
    diagonal, rows = (torch.zeros(count, m, dtype=features.dtype, device=features.device) for _ in range(2))
    progress = _Progress("CKA: Gram matrices", m * m * len(features.sizes) // 2)
    a, memory = 0, None
    while a < m:
        b = a + features.rows_that_fit(a)
        if memory is None or features.kept is None:  # else in the memory of the last block's: new memory is slow at first
            tiles = memory = None  # both let go of the old block's first
            memory = torch.empty(count * (b - a) * (m - a), dtype=features.dtype, device=features.device)
        b = min(b, a + len(memory) // (count * (m - a)))
        tiles = memory[:count * (b - a) * (m - a)].view(count, b - a, m - a)
        _add_block(features, a, b, m, tiles, pairs, diagonal, rows, progress)
        a = b
    progress.close()
    return pairs, diagonal, rows


def _add_block(features, a, b, m, tiles, pairs, diagonal, rows, progress):
    """Adds rows a to b - 1 of every layer's upper triangle, formed in `tiles`, to the sums of `_sum_over_pairs`.

    Float32 sums are over 2,048 numbers at most.
    """
    layer = 0
    for s, size in enumerate(features.sizes):
        _fill_tiles(features, s, a, b, m, tiles[layer:layer + size], progress)
        layer += size
    with _matmul_precision("float32"):
        for r in range(a, b, 64):
            strip = tiles[:, r - a:r - a + 64, r - a:]
            end = r + strip.shape[1]
            corner = strip[:, :, :end - r]
            diagonal[:, r:end] = corner.diagonal(dim1=1, dim2=2)
            corner.triu_(1)
            columns = torch.zeros_like(strip[:, 0])  # of their own: float32 sums stay short
            for row in strip.unbind(1):
                columns.addcmul_(row, row)
            rows[:, r:] += columns
            for part in strip.transpose(0, 1).split(2048, dim=2):
                products = torch.bmm(part, part.transpose(1, 2))  # of all pairs of layers, in each of the strip's rows
                rows[:, r:end] += products.diagonal(dim1=1, dim2=2).T
                pairs += products.to(pairs.dtype).sum(0)


def _fill_tiles(features, s, a, b, m, tiles, progress):
    """tiles (layers of source s, b - a, m - a) = rows a to b - 1 of its Gram matrices from column a on, upper triangle."""
    if features.buffer is not None:  # a and b are 0 and m
        for x, tile in zip(features.in_turn(s), tiles, strict=True):  # strict: to the end of every source
            with _matmul_precision(features.precision):
                _upper_triangle(x, tile)
            progress.add(m * m // 2 // len(tiles))
        return
    own = features.rows(s, a, b)
    with _matmul_precision(features.precision):
        for x, tile in zip(own, tiles):
            _upper_triangle(x, tile[:, :b - a])
    progress.add((b - a) ** 2 // 2)
    for i, c, d, x in features.pieces(s, b, m):
        with _matmul_precision(features.precision):
            _multiply(own[i], x, tiles[i, :, c - a:d - a])
        if i == len(tiles) - 1:
            progress.add((b - a) * (d - c))


def _multiply(x, y, out):
    """out = x @ y.mT, of matrices or batches of them, with float32 results (float64 for float64 inputs)."""
    if x.dtype == torch.bfloat16:
        product = torch.mm if x.ndim == 2 else torch.bmm
        out.copy_(product(x, y.mT, out_dtype=torch.float32))
    elif (torch.backends.mkldnn.matmul.fp32_precision == "bf16" and x.ndim == 3
          and x.stride(0) != x.shape[1] * x.shape[2]):  # oneDNN copies what does not lie side by side, MKL does not
        for matrices in zip(x, y, out):
            _multiply(*matrices)
    elif x.ndim == 2 and x.dtype == out.dtype and x.device.type != "cpu":
        torch.mm(x, y.mT, out=out)
    else:  # a CPU's product into a part of a larger matrix can take a third longer than a copy does
        out.copy_(x @ y.mT)


def _upper_triangle(x, out):
    """The blocks of x @ x.T on and above the diagonal, by halves, so that little below it is computed.

    Blocks of one size lie along the diagonal and are multiplied as one batch: small products one by one are slow.
    """
    levels = max(0, (len(x) // 64).bit_length() - 1)
    size, whole = len(x) >> levels, len(x) >> levels << levels  # of the smallest blocks; what they cover

    def blocks(count, size, column):  # of `out`: the first one starts in this column of row 0
        step = whole // count * (out.stride(0) + 1)
        return out.as_strided((count, size, size), (step, out.stride(0), 1), out.storage_offset() + column)

    parts = x[:whole].view(-1, size, x.shape[1])
    _multiply(parts, parts, blocks(len(parts), size, 0))
    while size < whole:
        parts = x[:whole].view(-1, 2, size, x.shape[1])
        _multiply(parts[:, 0], parts[:, 1], blocks(len(parts), size, size))
        size *= 2
    if whole < len(x):
        _multiply(x, x[whole:], out[:, whole:])


@contextlib.contextmanager
def _matmul_precision(precision):
    """torch's own switches for float32 products, set for a while."""
    wanted = {torch.backends.cuda.matmul: "tf32" if precision == "tf32" else "ieee",
              torch.backends.mkldnn.matmul: "bf16" if precision == "bfloat16" else "ieee"}
    before = {backend: backend.fp32_precision for backend in wanted}
    try:
        for backend, value in wanted.items():
            backend.fp32_precision = value
        yield
    finally:
        for backend, value in before.items():
            backend.fp32_precision = value


def has_bf16(device):
    """True if `device` multiplies bfloat16 in hardware, so that it is faster than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


def free_memory(device):
    """Bytes free on a device: what the driver says, or what the kernel and the container's limit leave."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    free = [4 << 30]  # where nobody says
    with contextlib.suppress(OSError, ValueError, StopIteration):
        with open("/proc/meminfo") as file:
            free = [int(next(line for line in file if line.startswith("MemAvailable")).split()[1]) << 10]
    with contextlib.suppress(OSError, ValueError):  # the limit is the word "max" where there is none
        with open("/sys/fs/cgroup/memory.max") as limit, open("/sys/fs/cgroup/memory.current") as used:
            free.append(int(limit.read()) - int(used.read()))
    return max(min(free), 1 << 28)


def _wide(device):
    return torch.float32 if device.type == "mps" else torch.float64  # Metal has no float64


class _Progress:
    """How far, and the time left, on stderr: only on a terminal, and only for what takes more than a few seconds."""

    def __init__(self, what, total):
        self.what, self.total, self.done = what, max(1, total), 0
        self.start = self.shown = time.monotonic()

    def add(self, amount):
        """Counts `amount` more of the total as done."""
        self.done += amount
        now = time.monotonic()
        if sys.stderr.isatty() and now - self.start > 3 and now - self.shown > 0.5:
            self.shown = now
            left = (now - self.start) * (self.total / max(1, self.done) - 1)
            print(f"\r{self.what} {min(1, self.done / self.total):4.0%}, {left:.0f} s left   ", end="", file=sys.stderr)

    def close(self):
        """Clears the line, if one was shown."""
        if self.shown > self.start:
            print("\r" + " " * 60 + "\r", end="", file=sys.stderr)
# ---- to here ----


# ======================================================================================================================
# 11. Figures: command line, networks, sources, findings, drawing
# ======================================================================================================================

LAYERS = [f"BG{g}.{b}.{kind}" for g, count in enumerate(BLOCK_GROUPS, 1) for b in range(1, count + 1)
          for kind in ("odd", "even")]
HEAD = ["head.1", "head.2", "head.3"]
ODD, EVEN = slice(0, 32, 2), slice(1, 32, 2)  # of the 32 layers
GROUP = np.repeat([1, 2, 3, 4], BLOCK_GROUPS)  # block group of each of the 16 odd or even layers
NAMES, COLORS = {"simclr": "SimCLR", "supervised": "Supervised"}, {"simclr": "tab:blue", "supervised": "tab:orange"}


def figure_parser(doc):
    """The flags that all figure scripts share."""
    parser = Parser(doc)
    add = parser.add_argument
    add("--checkpoints", default="checkpoints/paper", help="folder of *_seed*.pt files (default: checkpoints/paper)")
    for method in NAMES:
        add(f"--{method}", nargs="+", metavar="FILE", help=f"networks in place of the folder's {method} ones: checkpoints of "
            "this study, or state dicts of any torchvision ResNet-50")
    add("--image-size", type=number(int, low=8), help="pixels for state dicts (default: 224, or 32 with a 3x3 stem)")
    add("--mean", type=number(float, low=0), nargs=3, help="of the channels, for state dicts (default: ImageNet's)")
    add("--std", type=number(float, above=0), nargs=3, help="of the channels, for state dicts (default: ImageNet's)")
    add("--untrained", action="store_true", help="the same networks before training, in torchvision's standard initialisation")
    add("--replot", action="store_true", help="draw again from the .npz in --out, without networks")
    add("--out", help="folder for the .png and .npz (default: figures/<name of the checkpoint folder or of the files>)")
    add("--data", help="as in training (default: what the networks were trained on; for state dicts: data)")
    add("--samples", type=number(int, low=8), help="test images, a fixed random choice (default: all)")
    add("--debiased", action="store_true", help="debiased CKA instead of the biased one of Eq. (2)")
    add("--batch-size", type=number(int, low=1), default=256, help="images per forward pass (default: 256)")
    add("--device", help="cpu, cuda, cuda:N or mps (default: cuda, else mps, else cpu)")
    add("--precision", choices=("float32", "tf32", "bfloat16"),
        help="of the Gram matrices' products (default: the fastest whose CKA error is below 1e-4)")
    add("--memory", type=number(float, above=0), help="GB for CKA (default: half of what is free)")
    return parser


class Study(NamedTuple):
    """What a figure is made from: networks per method in the order of their seeds, and the test images."""

    args: object
    device: torch.device
    out: Path
    networks: dict  # method -> list of models in eval mode, each with its `settings` and `name`
    names: dict  # method -> what labels call it
    data: Data
    images: torch.Tensor  # uint8 (m, 3, h, w), the test images used
    labels: torch.Tensor  # (m,)


def open_study(args, methods):
    """`Study` of the networks of `methods`, from files or --checkpoints, after checking that everything needed is there."""
    device, networks = pick_device(args.device), {}
    names = {method: called for method, called in (NAMES | names_of_files(args)).items() if method in methods}
    for method in methods:
        files = getattr(args, method)
        networks[method] = networks_in_files(args, method, device) if files else networks_in_folder(args, method, device)
        if args.untrained:
            networks[method] = [untrained(model, place, device) for place, model in enumerate(networks[method])]
    settings = [model.settings for models in networks.values() for model in models]
    if (args.image_size or args.mean or args.std) and not any("standardise" in s for s in settings):
        raise UserError("--image-size, --mean and --std are for state dicts; checkpoints of this study know theirs: leave "
                        "them out")
    for name in ("stem", "image_size", "data"):
        values = sorted({str(s[name]) for s in settings if s[name]})
        if len(values) > 1:
            warn(f"networks differ in {name}: {', '.join(values)}")
    args.data = args.data or next((s["data"] for s in settings if s["data"]), "data")
    data = load_data(args.data, device)
    total = len(data.test_images)
    if args.samples and args.samples > total:
        raise UserError(f"--samples {args.samples}: the test set has {total} images")
    m = args.samples or total
    chosen = torch.randperm(total, generator=torch.Generator().manual_seed(0))[:m].sort().values.to(device)
    out = writable_folder(figure_folder(args))
    return Study(args, device, out, networks, names, data, data.test_images[chosen], data.test_labels[chosen])


def networks_in_folder(args, method, device):
    """The networks of --checkpoints/<method>_seed*.pt, in the order of their seeds."""
    folder = Path(args.checkpoints)
    paths = sorted(folder.glob(f"{method}_seed*.pt"), key=lambda p: (len(p.name), p.name))
    if not paths:
        raise UserError(f"--checkpoints {folder}: no {method}_seed*.pt there; train them with "
                        f"`python train_{method}.py --out {folder}`")
    models = [load_model(path, device) for path in paths]
    seeds = [(m.settings["method"], m.settings["seed"]) for m in models]
    if len(set(seeds)) < len(seeds) or {m for m, _ in seeds} != {method}:
        raise UserError(f"--checkpoints {folder}: {method}_seed*.pt hold {seeds}; expected {method} networks of different "
                        "seeds; move the others away")
    for path, model in zip(paths, models):
        model.name = f"{NAMES[method]} seed {model.settings['seed']}"
        warn_if_unfinished(path, model)
    return models


def warn_if_unfinished(path, model):
    """A line on stderr if a checkpoint of ours is not from the end of its training."""
    if model.settings.get("epoch", 0) < model.settings.get("epochs", 0):
        warn(f"{path}: not finished, epoch {model.settings['epoch']} of {model.settings['epochs']}")


def networks_in_files(args, method, device):
    """The networks of the files given by --simclr or --supervised, in their order."""
    paths = [Path(name) for name in getattr(args, method)]
    if len({p.resolve() for p in paths}) < len(paths):
        raise UserError(f"--{method}: each file once")
    models = []
    for path in paths:
        model = load_any_model(path, method, device, args.image_size, args.mean or IMAGENET_MEAN, args.std or IMAGENET_STD)
        model.name = without_ending(path)
        warn_if_unfinished(path, model)
        if model.settings.get("left_out"):
            warn(f"{path}: not of the backbone and left out: {some_of(model.settings['left_out'])}")
        models.append(model)
    return models


def without_ending(path):
    """The name of a checkpoint file without .pt, .pth.tar and the like."""
    return re.sub(r"(\.(pt|pth|tar|ckpt|bin))+$", "", Path(path).name)


def names_of_files(args):
    """What labels call the methods whose files are given: the files' names without ending and seed."""
    names = {}
    for with_folder in (False, True):  # the folder too, if the names alone do not tell the methods apart
        for method in NAMES:
            paths = [Path(name) for name in getattr(args, method) or []]
            short = [re.sub(r"[-_.]?seed[-_]?[0-9]+$", "", without_ending(p)) or p.name for p in paths]
            short = [f"{p.resolve().parent.name} {name}" if with_folder else name for p, name in zip(paths, short)]
            if short:
                names[method] = some_of(list(dict.fromkeys(short)), 2)
        if len(set(names.values())) == len(names):
            break
    return names


def untrained(model, place, device):
    """`model` as before training, but in the standard initialisation: with a gamma of 0 odd layers would be constant.

    Its weights follow from its seed, or from its `place` among the files if it has none.
    """
    s = model.settings
    seed = place if s["seed"] is None else s["seed"]
    fresh = build_model(s["method"], s["stem"], max(1, len(s["classes"])), seed, zero_init=False)
    if not isinstance(model.fc, ProjectionHead):
        fresh.fc = nn.Identity()
    fresh.settings = s | {"seed": seed, "epoch": 0, "untrained": True}
    fresh.name = f"untrained {model.name}"
    return fresh.to(device, memory_format=torch.channels_last).eval()


def figure_folder(args):
    """The folder of a figure's files."""
    name = "-".join(names_of_files(args).values()).replace(" ", "_") or Path(args.checkpoints).resolve().name or "figures"
    return Path(args.out or Path("figures") / (name + ("-untrained" if args.untrained else "")))


def layers_of(models):
    """Names of the representations that all of a method's networks have: 32, or 35 with projection heads."""
    return LAYERS + (HEAD if all(isinstance(m.fc, ProjectionHead) for m in models) else [])


def prepare(model, images, params=None):
    """uint8 images as the network sees them: under its test pipeline, or augmented as in its training by `params`."""
    s = model.settings
    if s["method"] == "simclr":
        x = (simclr_test(images, s["image_size"]) if params is None else
             simclr_augment(images, s["image_size"], s["strength"], s["blur"], params=params))
        x = _standardise(x, s["mean"], s["std"]) if s.get("standardise") else x  # ours see [0, 1]
    else:
        standard = s["image_size"], s["mean"], s["std"]
        x = imagenet_test(images, *standard) if params is None else imagenet_augment(images, *standard, params=params)
    return x.contiguous(memory_format=torch.channels_last)


def copy_params(model, images, view):
    """Training augmentation parameters for copy `view` (0 or 1) of a test set; the same for every network of a method."""
    generator = generator_for(images.device, "augmented copy", view)
    shape = len(images), *images.shape[2:], images.device, generator
    if model.settings["method"] == "simclr":
        return simclr_params(*shape, strength=model.settings["strength"])
    return imagenet_params(*shape)


def network_source(model, images, view=None, layers=slice(None)):
    """A source for `gram_statistics`: the representations of images, or of their augmented copy `view`.

    `layers`, a slice or indices in rising order, picks among the network's 32 or (with a head) 35 representations.
    """
    wanted = set(range(35)[layers] if isinstance(layers, slice) else layers)
    params = None if view is None else copy_params(model, images, view)

    def source(start, stop):
        rows = slice(start, stop)
        inputs = prepare(model, images[rows], None if params is None else slice_params(params, rows))
        for i, (_, x) in enumerate(stream_representations(model, inputs, any_order=True)):
            if i in wanted:
                yield x

    return source


def measure(study, sources, names):
    """(CKA (2, L, L), dominance (L,)) as numpy arrays; says which layers rest on few images.

    The first CKA is the one that the flags ask for, the second that of the other estimator, biased or debiased.

    `names`: one per layer of all sources, for the warnings.
    """
    args = study.args
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with out_of_memory_advice(f"--batch-size {args.batch_size}: lower it, or give --memory less than is free (GB)"):
            try:
                found = gram_statistics(sources, len(study.images), precision=args.precision, batch=args.batch_size,
                                        memory=int(args.memory * 1e9) if args.memory else None)
            except ValueError as error:
                raise UserError(f"{error} (sources: {', '.join(dict.fromkeys(n.rsplit(' ', 1)[0] for n in names))})") from None
    for layer in found.constant:
        warn(f"{names[layer]} is constant over the images: its CKA is undefined (NaN)")
    for other in caught:
        if "is constant" not in str(other.message):
            warn(str(other.message))
    dominance = found.dominance.numpy()
    for layer in np.flatnonzero(dominance > 0.5):
        warn(f"{names[layer]}: 1 % of the images carry {dominance[layer]:.0%} of HSIC(K, K); its CKA rests on them")
    both = torch.stack([found.cka, found.debiased_cka]).numpy()
    return both[::-1] if args.debiased else both, dominance


def layer_names(models, layers, note=""):
    """ "<network><note> <layer>" for each layer of each model, in the order of their sources."""
    return [f"{m.name}{note} {layer}" for m in models for layer in layers]


def finding(identity, claim, *numbers):
    """One claim of the paper, judged: a dict for `report`.

    numbers: (label, values over pairs or networks, sign, threshold): the claim needs sign * values > sign * threshold.
    It holds if that is true of the mean by more than the spread (with fewer than three values: of each), does not hold
    if the opposite is, else is undecided; of several numbers the least favourable decides. Sign 0: only reported.
    """
    verdicts = []
    for _, values, sign, threshold in numbers:
        if sign == 0:
            continue
        margin = sign * (np.asarray(values, float) - threshold)
        few = margin.size < 3
        low, high = (margin.min(), margin.max()) if few else (margin.mean() - margin.std(), margin.mean() + margin.std())
        verdicts.append("holds" if low > 0 else "does not hold" if high < 0 else "undecided")
    verdict = next(v for v in ("does not hold", "undecided", "holds") if v in verdicts)
    return {"id": identity, "claim": claim, "verdict": verdict,
            "numbers": [(label, np.atleast_1d(np.asarray(values, float))) for label, values, _, _ in numbers]}


def rank_correlation(values):
    """Spearman's correlation of values (..., n), along the last dimension, with 1 to n; ties share their mean rank."""
    values = np.asarray(values, float)
    below = values[..., :, None] > values[..., None, :]
    ranks = below.sum(-1) - below.sum(-2)  # twice the rank, from its mean
    depth = 2 * np.arange(values.shape[-1]) - (values.shape[-1] - 1)
    with np.errstate(invalid="ignore"):  # a constant profile has no correlation: NaN
        found = (ranks * depth).sum(-1) / np.sqrt((ranks ** 2).sum(-1) * (depth ** 2).sum())
    return np.where(np.isnan(values).any(-1), np.nan, found)


def report(study, name, plot, arrays, findings, others):
    """Prints the findings, one line each, and writes <out>/<name>.npz (arrays, findings, settings) and .png, `plot(arrays)`.

    `others`: the same findings by the other estimator; their means and every verdict that changes are one more line.
    """
    lines = [] if study.names.items() <= NAMES.items() else ["in the claims, " + " and ".join(
        f"{NAMES[method]} is {called}" for method, called in study.names.items())]
    rest = []
    for f, other in zip(findings, others):
        numbers = ", ".join(f"{label} {v.mean():.3f} +- {v.std():.3f}" for label, v in dict(f["numbers"]).items())
        count = f["numbers"][0][1].size
        lines.append(f"{f['id']} {f['claim']} | {numbers} (n = {count}) | {f['verdict']}")
        means = " ".join(f"{v.mean():.3f}" for v in dict(other["numbers"]).values())
        rest.append(f"{f['id']} {means}" + ("" if f["verdict"] == other["verdict"] else f" {other['verdict'].upper()}"))
    lines.append(f"by {'biased' if study.args.debiased else 'debiased'} CKA: {', '.join(rest)}")
    print("\n".join(lines))
    settings = {method: [m.settings for m in models] for method, models in study.networks.items()}
    for kind, some in (("finding", findings), ("other", others)):
        arrays = arrays | {f"{kind}_{f['id']}_{i}": v for f in some for i, (_, v) in enumerate(f["numbers"])}
    arrays |= {"other_verdicts": np.array([f["verdict"] for f in others])}
    arrays |= {f"name_{method}": np.array(called) for method, called in study.names.items()}
    arrays |= {"finding_ids": np.array([f["id"] for f in findings]), "verdicts": np.array([f["verdict"] for f in findings]),
               "findings": np.array(lines), "samples": np.array(len(study.images)),
               "debiased": np.array(study.args.debiased), "data": np.array(study.args.data),
               "kind": np.array(kind_of(study.args)), "settings": np.array(json.dumps(settings))}
    write_atomically(study.out / f"{name}.npz", lambda file: np.savez_compressed(file, **arrays))
    draw(study.out / f"{name}.png", plot, arrays)
    print(f"wrote {study.out / name}.png and {name}.npz ({len(study.images)} test images, "
          f"{'debiased' if study.args.debiased else 'biased'} CKA)")


def kind_of(args):
    """What titles say of the networks: "untrained " or nothing."""
    return "untrained " if args.untrained else ""


def replot(args, name, plot):
    """Writes <out>/<name>.png again from the .npz beside it and prints the findings in it; no network is needed."""
    path = figure_folder(args) / f"{name}.npz"
    if args.debiased or args.samples:
        raise UserError("--replot draws what the .npz holds; leave out --debiased and --samples")
    try:
        with np.load(path, allow_pickle=False) as saved:
            arrays = dict(saved)
        print("\n".join(arrays["findings"]))
        draw(path.with_suffix(".png"), plot, arrays)
    except FileNotFoundError:
        raise UserError(f"--replot: no {path}; give the folder of {name}.npz with --out") from None
    except UserError:
        raise
    except Exception as error:  # damaged files fail in many ways
        reason = f"{type(error).__name__} {error}"[:120]
        raise UserError(f"--replot: {path} is damaged or not written by this script ({reason}); draw it anew") from None
    print(f"drew {path.with_suffix('.png')} again ({arrays['samples']} test images)")


def draw(path, plot, arrays):
    """Writes the figure `plot(arrays)` to `path`, a .png."""
    figure = plot(arrays)
    write_atomically(path, lambda file: figure.savefig(file, dpi=150, format="png", bbox_inches="tight"))
    plt.close(figure)


def new_figure(panels, widths=None):
    """A figure and its row of `panels` axes, of the size all figures share."""
    figure, axes = plt.subplots(1, panels, figsize=(4.6 * panels, 4.6), layout="constrained", width_ratios=widths)
    return figure, axes


def mark_block_groups(ax, per_block=1, head=0, both=False):
    """Ticks and thin lines for BG1 to BG4 (and the head): `per_block` layers per bottleneck, on x, or on both axes."""
    counts = [per_block * b for b in BLOCK_GROUPS] + ([head] if head else [])
    ends = np.cumsum(counts)
    centres, labels = ends - np.array(counts) / 2 - 0.5, ["BG1", "BG2", "BG3", "BG4", "Head"][:len(counts)]
    ax.set_xticks(centres, labels)
    ax.tick_params(length=0)
    for end in ends[:-1]:
        ax.axvline(end - 0.5, color="white" if both else "lightgray", linewidth=0.8, zorder=1)
    if both:
        ax.set_yticks(centres, labels)
        for end in ends[:-1]:
            ax.axhline(end - 0.5, color="white", linewidth=0.8)


def cka_heatmap(ax, matrix, title, xlabel, ylabel, per_block=1, head=0):
    """A CKA matrix with the first layer at the lower left, colours from 0 to 1, block groups marked; the image."""
    image = ax.imshow(matrix, origin="lower", vmin=0, vmax=1, cmap="magma")
    ax.set(title=title, xlabel=xlabel, ylabel=ylabel)
    mark_block_groups(ax, per_block, head, both=True)
    return image


def depth_lines(ax, values, color, label, marker="o"):
    """Mean over networks or pairs of values (S, layers) against depth, with a band of one standard deviation."""
    mean, spread, depth = values.mean(0), values.std(0), np.arange(values.shape[1])
    ax.plot(depth, mean, color=color, label=label, marker=marker, markersize=3)
    ax.fill_between(depth, mean - spread, mean + spread, color=color, alpha=0.25, linewidth=0)


def add_colorbar(figure, image, axes, debiased):
    """One bar for all heatmaps of a figure."""
    figure.colorbar(image, ax=axes, label="debiased linear CKA" if debiased else "linear CKA", shrink=0.8, pad=0.01)


def plural(count, noun):
    """ "1 pair", "3 pairs"."""
    return f"{count} {noun}" + ("" if count == 1 else "s")
