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
import io
import itertools
import json
import math
import operator
import os
import platform
import re
import shutil
import signal
import sys
import tempfile
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
        return
    except SystemExit as stop:
        code = stop.code
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:  # the reader of our output went away: nothing left to say
        sys.stderr.close()
        code = 1
    except Exception as error:
        code, reason = 2, None
        if isinstance(error, UserError):
            reason = str(error)
        elif is_out_of_memory(error):
            reason = "out of memory; lower --batch-size (in training --micro-batch), or --samples or --subset"
        elif isinstance(error, OSError):  # a folder taken away, say: the machine's trouble, not the code's
            reason = f"{error.filename or ''} {error.strerror or error}; what was saved before is kept"
        elif world_size() == 1:
            raise
        else:
            code = 1
            traceback.print_exc()
        if reason:
            print("error: " + " ".join(reason.split()), file=sys.stderr)
    if world_size() > 1:  # at once, as tidying up would wait for kernels that never finish
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

    UserError with the cause, a full disk say, if it cannot be written; the old file is kept then.
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
        raise UserError(f"{path}: cannot be written ({cause.strerror or cause}); what was there before is "
                        "kept") from None
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


def number(kind, low=0, above=None):
    """An argparse type: a finite int or float, at least `low` or, if that is given, above `above`."""
    name = {int: "a whole number", float: "a number"}[kind]
    limit = f"at least {low}" if above is None else f"above {above}"

    def parse(text):
        with contextlib.suppress(ValueError, OverflowError):
            value = kind(text)
            if math.isfinite(value) and (value >= low if above is None else value > above):
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not {name} {limit}")

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
        download = (download or os.path.abspath(folder) == os.path.abspath("data")) and names <= of_cifar
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
    first = _decode(files[0])
    images = first.new_empty(len(files), *first.shape)
    with ThreadPoolExecutor() as pool:
        for done, image in enumerate(pool.map(_decode, files), 1):
            if image.shape != first.shape:
                size, expected = (f"{some.shape[2]} x {some.shape[1]}" for some in (image, first))
                raise UserError(f"{files[done - 1]}: is {size} pixels, the first image {expected}; all must "
                                "have the same size")
            images[done - 1] = image
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


def imagenet_params(n, height, width, device, generator=None):
    """Crop boxes and flips for n images: {"box": int64 (n, 4) top, left, height, width, "flip": bool (n,)}.

    As torchvision's RandomResizedCrop: area uniform in 8 to 100 %, log aspect uniform between 3/4 and 4/3,
    the first of ten attempts that fits, else the largest centred box of such an aspect. Flip: p = 0.5.
    """
    def uniform(low, high):
        return low + (high - low) * torch.rand(n, 10, device=device, generator=generator)

    area = height * width * uniform(0.08, 1.0)
    aspect = torch.exp(uniform(math.log(3 / 4), math.log(4 / 3)))
    w, h = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (w >= 1) & (w <= width) & (h >= 1) & (h <= height)
    first = fits.int().argmax(1, keepdim=True)  # index of the first True, 0 if there is none
    w, h, fits = (t.gather(1, first).squeeze(1) for t in (w, h, fits))
    w = torch.where(fits, w, min(width, round(height * 4 / 3)))
    h = torch.where(fits, h, min(height, round(width * 4 / 3)))
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
    order = torch.rand(n, 4, device=device, generator=generator).argsort(1)
    jitter, gray, blur, sigma = torch.rand(4, n, device=device, generator=generator)
    return params | {"factors": factors, "order": order, "jitter": jitter < 0.8, "gray": gray < 0.2,
                     "blur": blur < 0.5, "sigma": 0.1 + 1.9 * sigma}


def slice_params(params, rows):
    """The parameters of some of the images."""
    return {name: value[rows] for name, value in params.items()}


def _resize_matrix(start, length, size_in, size_out, flip):
    """(n, size_out, size_in): bilinear weights that resize [start, start + length) to size_out pixels.

    Half-pixel centres, edges replicated, the triangle filter widened when it shrinks (antialias), mirrored
    where `flip` (n,): crop, resize and flip of one side are one matrix.
    """
    target = torch.arange(size_out, device=start.device, dtype=torch.float32)
    target = torch.where(flip[:, None], size_out - 1 - target, target)
    scale = (length / size_out)[:, None]
    centres = (start[:, None] + (target + 0.5) * scale)[:, :, None]  # (n, size_out, 1), in input pixels
    pixels = torch.arange(size_in, device=start.device, dtype=torch.float32) + 0.5
    weights = (1 - (pixels - centres).abs() / scale.clamp(min=1)[:, :, None]).clamp_(min=0)
    weights *= ((pixels > start[:, None]) & (pixels < (start + length)[:, None]))[:, None]
    return weights / weights.sum(2, keepdim=True)


def _separable(images, rows, columns):
    """images (n, 3, h, w), rows (n, H, h), columns (n, W, w) -> (n, 3, H, W): one matrix along each side."""
    n, c, h, w = images.shape
    images = torch.bmm(images.reshape(n, c * h, w), columns.transpose(1, 2))  # (n, 3h, W)
    return torch.matmul(rows.unsqueeze(1), images.view(n, c, h, columns.shape[1]))


def _crop_resize_flip(images, size, params):
    """uint8 (n, 3, h, w) -> float32 (n, 3, size, size) in [0, 1]: its box, resized, perhaps mirrored."""
    top, left, height, width = params["box"].unbind(1)
    rows = _resize_matrix(top, height, images.shape[2], size, torch.zeros_like(params["flip"]))
    columns = _resize_matrix(left, width, images.shape[3], size, params["flip"])
    return _separable(images.float().div_(255), rows, columns)


def _luma(x):
    """Gray value (n, 1, h, w) of (n, 3, h, w), with the weights torchvision uses (ITU-R 601)."""
    return (x[:, 0:1] * 0.2989).add_(x[:, 1:2], alpha=0.587).add_(x[:, 2:3], alpha=0.114)


def _blend_(x, operation, factor):
    """Blends images, in place, with black (operation 0: brightness), their mean gray (1: contrast) or their
    gray image (2: saturation), chosen per image; clipped to [0, 1]. Factor 1: no change."""
    gray, operation, factor = _luma(x), operation.view(-1, 1, 1, 1), factor.view(-1, 1, 1, 1)
    add = gray.mean((2, 3), keepdim=True) * ((1 - factor) * (operation == 1))
    add = torch.addcmul(add, gray, (1 - factor) * (operation == 2))
    return x.mul_(factor).add_(add).clamp_(0, 1)


def _shift_hue(x, turns):
    """Hue of x (n, 3, h, w) in [0, 1] shifted by `turns` (n,): through HSV, hue in sextants, no branches."""
    r, g, b = x.split(1, 1)
    top, bottom = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
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
    for i in range(3):
        x = _blend_(x, blends[:, i], torch.where(i < hue_position[:, 0], factor[:, i], 1.0))
    x = _shift_hue(x, torch.where(params["jitter"], factors[:, 3], 0.0))
    for i in range(3):
        x = _blend_(x, blends[:, i], torch.where(i >= hue_position[:, 0], factor[:, i], 1.0))
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


def simclr_augment(images, size, strength=1.0, blur=True, params=None, jitter=color_jitter):
    """SimCLR's training views: float32 (n, 3, size, size) in [0, 1] from uint8 (n, 3, h, w), same device.

    Crop, flip, colour jitter, gray and, if `blur`, Gaussian blur with a kernel of size // 10 pixels, made odd
    (SimCLR App. A), by torchvision's definitions without its rounding to uint8. Every image has its own
    parameters, by `simclr_params` unless given. `jitter`: what torch.compile made of `color_jitter`, say.
    """
    if params is None:
        params = simclr_params(len(images), *images.shape[2:], images.device, strength=strength)
    n = max(4, 2 ** 18 // (3 * size * size))
    if images.device.type == "cpu" and len(images) > n:  # twice as fast on pieces that fit a CPU's cache
        pieces = [slice(start, start + n) for start in range(0, len(images), n)]
        return torch.cat([simclr_augment(images[piece], size, strength, blur, slice_params(params, piece),
                                         jitter) for piece in pieces])
    x = jitter(_crop_resize_flip(images, size, params), params)
    x = torch.where(params["gray"].view(-1, 1, 1, 1), _luma(x), x)
    kernel_size = size // 10 // 2 * 2 + 1
    if blur and kernel_size > 1:
        matrix = _blur_matrix(size, kernel_size, params["sigma"], params["blur"])
        x = _separable(x, matrix, matrix)
    return x


def imagenet_augment(images, size, mean=CIFAR_MEAN, std=CIFAR_STD, params=None):
    """Supervised training images (footnote 3), crop, flip, standardisation: float32 (n, 3, size, size)."""
    if params is None:
        params = imagenet_params(len(images), *images.shape[2:], images.device)
    return _standardise(_crop_resize_flip(images, size, params), mean, std)


def simclr_test(images, size):
    """SimCLR's test images: the whole image resized; float32 (n, 3, size, size) in [0, 1]."""
    return F.interpolate(images.float().div_(255), (size, size), mode="bilinear", antialias=True)


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
    """SimCLR's head as the paper uses it (App. A: "a 3-layer MLP"), each layer as in SimCLR's code: a product
    without bias and a batch norm, the first two with a ReLU, the last norm without a shift."""

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
    weights depend on method and seed only; the last gamma of each block is 0 unless `zero_init` is False.
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
    ReLU (App. A.1); then `head.1` to `head.3`, the layers of a `ProjectionHead`. In the model's own mode.
    Flattened as (channel, height, width), or `any_order` of memory: quicker, and the same to linear CKA.
    TypeError for a network that is not torchvision's ResNet-50, or whose class changes what that computes.
    """
    return dict(stream_representations(model, images, any_order))


def stream_representations(model, images, any_order=False):
    """`representations` one at a time, (name, tensor) pairs, in memory for two blocks instead of sixteen.

    It keeps neither the images nor what was taken. Do not change the tensors: the network reads them later.
    """
    groups = [getattr(model, f"layer{g}", ()) for g in range(1, 5)]
    resnet, bottleneck = torchvision.models.ResNet, torchvision.models.resnet.Bottleneck
    steps = [(getattr(model, name, None), getattr(resnet, name)) for name in ("forward", "_forward_impl")]
    steps += [(block.forward, bottleneck.forward) for group in groups for block in group]
    own = any(getattr(step, "__func__", None) is not torchvisions for step, torchvisions in steps)
    if own or tuple(map(len, groups)) != BLOCK_GROUPS or model._forward_pre_hooks:
        raise TypeError(f"representations() needs torchvision's ResNet-50, not {type(model).__name__}: not "
                        "wrapped, with no forward of its own and no hook before it")

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


# ============================================================================================================
# 5. LARS and the learning-rate schedule
# ============================================================================================================
# The optimizer of both training scripts, and the factor of its rate as a function of the step.


class LARS(torch.optim.Optimizer):
    """SimCLR's LARS (google-research/simclr, lars_optimizer.py): the rate is inside the momentum buffer.

        g <- gradient + weight_decay w;   t = eta |w| / |g|, or 1 if either norm is 0
        v <- momentum v + (lr t) g;       w <- w - v

    1-d parameters (of batch norm, and biases) get neither weight decay nor adaptation (t = 1). List
    operations only; nothing waits for the device.
    """

    def __init__(self, params, lr, momentum=0.9, weight_decay=0.0, eta=0.001):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, eta=eta))

    @torch.no_grad()
    def step(self):
        """One update of all parameters that have a gradient."""
        for group in self.param_groups:
            for adapted in (True, False):
                weights = [p for p in group["params"] if p.grad is not None and (p.ndim > 1) == adapted]
                if not weights:
                    continue
                gradients = [p.grad for p in weights]
                for p in weights:
                    if not self.state[p]:
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


def warmup_cosine(step, total_steps, warmup_steps):
    """Factor of the rate in [0, 1]: linear from 0 to 1 at warmup_steps, then a cosine to 0 at total_steps."""
    if step < warmup_steps:
        return step / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * progress))


# ============================================================================================================
# 6. InfoNCE
# ============================================================================================================
# SimCLR's loss, which train_simclr.py minimises, among the views of all processes.


def info_nce_and_accuracy(z1, z2, temperature):
    """InfoNCE, Eq. (1), averaged over the 2N anchors, and the share of these whose partner is nearest.

    z1, z2 (N, d): row i of each is a view of image i. Both results are 0-d float32, the loss ln(2N - 1) for
    equal views. In one of several processes the rows are its share, all processes' views are compared with,
    and the mean over processes of loss and gradient is that of one process with the whole batch.
    """
    with torch.autocast(z1.device.type, enabled=False):
        n, everyone = len(z1), world_size() * len(z1)
        z1, z2 = F.normalize(z1.float(), dim=1), F.normalize(z2.float(), dim=1)
        views = torch.cat([_Gather.apply(z) if world_size() > 1 else z for z in (z1, z2)])  # (2N, d)
        logits = torch.cat([z1, z2]) @ views.T / temperature
        own = torch.arange(n, device=z1.device) + rank() * n
        own = torch.cat([own, own + everyone])  # the column of each row itself; its partner is N columns away
        logits = logits.scatter(1, own[:, None], -math.inf)
        partner = (own + everyone) % (2 * everyone)
        return F.cross_entropy(logits, partner), (logits.argmax(1) == partner).float().mean()


# ============================================================================================================
# 7. Distributed helpers
# ============================================================================================================
# What training and InfoNCE need to know of torchrun's processes, and how these work in step. Without
# torchrun there is one process, rank 0 of 1, and nothing here does anything.


def world_size():
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    """This process's number, 0 to world_size() - 1."""
    return dist.get_rank() if dist.is_initialized() else 0


def sum_over_ranks(x):
    """x, summed in place over the ranks."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def rank0_first(work):
    """`work()` by rank 0, then by the others; after a UserError of rank 0 all stop, and it alone says why."""
    result, error = None, None
    if rank() == 0:
        try:
            result = work()
        except UserError as caught:
            error = caught
    if sum_over_ranks(torch.tensor(int(error is not None))):  # on the CPU, so by gloo
        raise error or SystemExit(2)
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
        return sum_over_ranks(gradient).chunk(world_size())[rank()]


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
    dist.init_process_group(backend, timeout=timedelta(hours=2))  # rank 0 may download first
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
    parts = {"settings", "epoch", "step", "backbone", "head"}
    needed = {"method", "seed", "data", "classes", "stem", "image_size", "mean", "std", "strength", "blur"}
    if not isinstance(content, dict) or not parts <= content.keys():
        return False
    return isinstance(content["settings"], dict) and needed <= content["settings"].keys()


def load_weights(model, checkpoint, path, assign=False):
    """Copies (or with `assign` puts) a checkpoint's backbone and head into `model`, or raises UserError."""
    try:
        weights = checkpoint["backbone"] | {f"fc.{name}": value for name, value in checkpoint["head"].items()}
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
    if is_checkpoint(content):
        settings = content["settings"] | {"epoch": content["epoch"]}
    else:
        weights, start, left_out = find_backbone(content, path, prefix)
        content = {"backbone": weights, "head": {}}
        settings = foreign_settings(weights, method, image_size, mean, std, stem_padding)
        settings |= {"file": str(path), "prefix": start, "left_out": left_out,
                     "note": f"took the network at prefix '{start}'; {settings['note']}"}
    with torch.device("meta"):  # no time spent on initial weights
        model = build_model(settings["method"], settings["stem"], max(1, len(settings["classes"])),
                            stem_padding=settings.get("stem_padding", 1))
    if not content["head"]:
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
        note = (f"3 x 3 stem with stride 1, no max-pool and padding {stem_padding or 1} assumed "
                "(--stem-padding 2: as solo-learn's)")
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
    whole, faults, found = {}, [], []
    for where, tensors in _state_dicts(content):
        found += [where + name for name in tensors]
        for start, names in _resnets(tensors):
            weights = {name: tensors[old] for name, old in names.items()}
            wrong = _faults(weights)
            faults.append((len(wrong), f"the nearest, with prefix '{where}{start}': {first_names(wrong)}"))
            if not wrong:
                weights = {name: weights[name] for name in weights if name in _backbone_shapes()}
                left_out = sorted(tensors.keys() - {names[name] for name in weights})
                whole[where + start] = weights, where + start, left_out
    if not whole:
        what = min(faults)[1] if faults else f"found {first_names(found) or 'no tensors'}"
        raise UserError(f"{path}: expected the tensors of a whole torchvision ResNet-50; {what}")
    chosen = _preferred(list(whole))
    if prefix is not None:
        ends = [p for p in whole if f".{p}".endswith(f".{prefix.strip('.')}.")]
        chosen = [p for p in whole if p.strip(".") == prefix.strip(".")] or ends
    first, *others = [whole[p][0] for p in chosen] or [{}]
    if not chosen or any(not torch.equal(other[name], first[name]) for other in others for name in first):
        what = "several ResNet-50s" if chosen else f"no ResNet-50 at --prefix {prefix}"
        raise UserError(f"{path}: {what}; choose one by --prefix: {first_names([repr(p) for p in whole])}")
    return whole[chosen[0]]


@functools.cache
def _backbone_shapes():
    """{torchvision's name: shape} of a ResNet-50 without its classifier."""
    with torch.device("meta"):
        tensors = torchvision.models.resnet50().state_dict()
    return {name: tuple(tensor.shape) for name, tensor in tensors.items() if not name.startswith("fc.")}


def _state_dicts(value, where=""):
    """(the way to it, {name: tensor}) of every dict or list in a file, an outer one before what it holds."""
    if isinstance(value, (list, tuple)):
        value = dict(enumerate(value))
    if isinstance(value, dict):
        yield where, {str(key): item for key, item in value.items() if isinstance(item, torch.Tensor)}
        for key, item in value.items():
            yield from _state_dicts(item, f"{where}{key}.")


def _resnets(tensors):
    """(prefix, {torchvision's name: name}) of everything in a state dict that looks like a ResNet."""
    matches = [re.fullmatch(r"((?:.*\.)?)(layer1|[234])\.0\.conv1\.weight", name) for name in tensors]
    starts = [match.groups() for match in matches if match]
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
        yield start, names


def _faults(network):
    """What keeps {torchvision's name: tensor} from being a ResNet-50's backbone, in words."""
    wanted = _backbone_shapes()
    blocks = tuple(len({n.split(".")[1] for n in network if n.startswith(f"layer{g}.")}) for g in range(1, 5))
    missing = [n for n in wanted if n not in network and "num_batches" not in n]  # old files have no counts
    if missing and all(".running_" in name for name in missing):
        return ["no running statistics of the batch norms; save model.state_dict(), which has them"]
    faults = [f"{blocks} blocks instead of {BLOCK_GROUPS}"] if blocks != BLOCK_GROUPS else []
    faults += [f"no {name}" for name in missing]
    for name, tensor in network.items():
        shape, plain = tuple(tensor.shape), tensor.layout == torch.strided and not tensor.is_meta
        if name not in wanted:  # a head's tensors have other names and at most two dimensions
            if tensor.ndim > 2 or re.match(r"(conv1|bn1|layer\d+|stem)\.", name):
                faults.append(f"{name} besides")
        elif shape != wanted[name] and (name, shape) != ("conv1.weight", (64, 3, 3, 3)):
            faults.append(f"{name} {shape} instead of {wanted[name]}")
        elif "num_batches" not in name and not (plain and tensor.is_floating_point()):
            faults.append(f"{name} as {tensor.type()} instead of plain floating-point numbers")
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
# What the loops of both training scripts stand on: flags, the settings that a checkpoint keeps, batch norm
# that does not count, several processes, and `Run`, which resumes, counts, prints and saves. A script gets
# its run from `open_run`.


def training_arguments(doc, presets, argv=None):
    """The flags of a training script, the preset's values where not given; exits with 2 if impossible."""
    def add(flag, help, **options):
        if parser.get_default(flag[2:].replace("-", "_")) is not None:
            help += " (default: %(default)s)"
        metavar = {"metavar": "N"} if "type" in options else {}
        group.add_argument(flag, help=help, **metavar, **options)

    argv = sys.argv[1:] if argv is None else argv
    parser = Parser(doc, add_help=False)  # first finds the preset, whose values are the other flags' defaults
    parser.add_argument("--preset", choices=list(presets), default="paper",
                        help="where the other flags' defaults come from (default: %(default)s)")
    preset = parser.parse_known_args(argv)[0].preset
    parser.add_argument("-h", "--help", action="help", help="print this and exit")
    parser.set_defaults(**presets[preset], out=f"checkpoints/{preset}")
    count, positive = number(int, low=1), number(float, low=0)
    group = parser.add_argument_group("what is trained")
    add("--data", "folder of CIFAR-10 or of train/<class>/ and test/<class>/ images, or synthetic")
    add("--download", "fetch CIFAR-10 into --data, if that is empty or new", action="store_true")
    add("--seeds", "one network per seed, one after another (App. A: 3)", type=number(int, low=0), nargs="+")
    add("--epochs", "passes over the training images (App. A)", type=count)
    add("--lr", "learning rate per 256 images: the peak is lr * batch-size / 256", type=positive)
    add("--weight-decay", "L2 factor; batch norm and biases are exempt", type=positive)
    add("--warmup-epochs", "epochs of linear warmup (App. A)", type=positive)
    if parser.get_default("temperature"):
        add("--temperature", "tau of Eq. (1)", type=number(float, above=0))
    add("--stem", "7x7 stride 2 and max-pool, or 3x3 stride 1 (SimCLR B.9)", choices=("imagenet", "cifar"))
    group = parser.add_argument_group("size and memory")
    add("--image-size", "pixels, of training and test (footnote 3: 224; B.9: 32)", type=number(int, low=8))
    add("--subset", "training images used, a fixed random choice; without it all", type=count)
    add("--batch-size", "images per step, over all processes (App. A)", type=count)
    add("--micro-batch", "images per forward and backward, per process: lower it to save memory", type=count)
    add("--checkpoint-activations", "save memory by computing activations twice, the batch in one piece",
        action="store_true")
    group = parser.add_argument_group("where and how")
    add("--out", "folder for checkpoints and logs")
    add("--checkpoint-every", "epochs between checkpoints", type=count)
    add("--device", "cpu, cuda, cuda:N or mps; without it cuda, else mps, else cpu")
    add("--precision", "of products; without it bf16 where hardware has it", choices=("fp32", "bf16"))
    add("--compile", "torch.compile network and colour augmentation; pays on GPUs", action="store_true")
    args = parser.parse_args(argv)
    given = {word.split("=")[0] for word in argv}
    if args.warmup_epochs > args.epochs and "--warmup-epochs" not in given:
        args.warmup_epochs = args.epochs / 2  # the preset's warmup must leave room in a run made shorter
    if args.checkpoint_activations and "--micro-batch" not in given:
        args.micro_batch = args.batch_size  # the whole batch in one piece is what it is for
    return args


# The settings of a run: all that its result depends on, and what a figure needs to know.
SETTINGS = ("preset data epochs batch_size micro_batch checkpoint_activations image_size stem lr "
            "weight_decay warmup_epochs temperature strength blur subset precision").split()


def run_settings(args, method, seed, data, device):
    """The settings dict (plain types only) of a run; UserError for what data, device or processes forbid."""
    total, processes, batch_size = len(data.train_images), world_size(), args.batch_size
    n, local, micro_batch = args.subset or total, batch_size // processes, min(args.micro_batch, batch_size)
    views = 2 if method == "simclr" else 1
    fewest = views * min(local, micro_batch, local % micro_batch or micro_batch)
    no_bf16 = args.precision == "bf16" and device.type == "cuda" and not has_bf16(device)
    for wrong, what in (
            (not batch_size <= n <= total, f"--batch-size {batch_size}, --subset {n}: the batch must be at "
             f"most the subset, the subset at most the {total} training images"),
            (batch_size % processes or local < 2 or fewest < 2, f"--batch-size {batch_size}, --micro-batch "
             f"{micro_batch}: give {processes} processes equal shares, in pieces of 2 images for batch norm"),
            (args.warmup_epochs > args.epochs, f"--warmup-epochs {args.warmup_epochs}: more than --epochs"),
            (args.compile and (processes > 1 or args.checkpoint_activations),
             "--compile: works neither with several processes nor with --checkpoint-activations"),
            (no_bf16, f"--precision bf16: {device} has none (compute capability below 8.0); give fp32")):
        if wrong:
            raise UserError(what)
    settings = {name: getattr(args, name, None) for name in SETTINGS} | {"method": method, "seed": seed}
    if args.data != "synthetic":
        settings["data"] = str(Path(args.data).expanduser().absolute())
    settings["precision"] = args.precision or ("bf16" if has_bf16(device) else "fp32")
    mean, std = channel_statistics(data.train_images)
    return settings | {"micro_batch": micro_batch, "train_images": n, "classes": list(data.classes),
                       "mean": list(mean), "std": list(std)}


@contextlib.contextmanager
def not_counting(module):
    """Batch norm normalises as in training, but its running statistics and its count stay as they are.

    For passes that repeat another. Statistics are kept, by a momentum of 0: SyncBatchNorm fails in bf16
    without them.
    """
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, norm.num_batches_tracked.clone()
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before):
            norm.momentum, norm.num_batches_tracked = momentum, count


def checkpoint_blocks(model):
    """Makes each bottleneck keep only its input and compute its activations again in the backward pass."""
    for block in itertools.chain(model.layer1, model.layer2, model.layer3, model.layer4):
        contexts = functools.partial(lambda b: (contextlib.nullcontext(), not_counting(b)), block)
        block.forward = functools.partial(recompute_activations, block.forward, use_reentrant=False,
                                          context_fn=contexts, preserve_rng_state=False)


def for_all_ranks(model, device):
    """`model`, wrapped if several processes train it: then its backward pass averages gradients."""
    if world_size() == 1:
        model.no_sync = contextlib.nullcontext
        return model
    if device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(model)  # in place
    wrapped = nn.parallel.DistributedDataParallel(model)
    wrapped.broadcast_buffers = False  # each rank keeps its own running statistics between saves
    return wrapped


def average_statistics(model):
    """Batch norm's running statistics averaged over the ranks: every rank and checkpoint has the same."""
    for buffer in model.buffers():
        if buffer.is_floating_point():
            sum_over_ranks(buffer).div_(world_size())


def say(text, rewritten=False):
    """Rank 0 prints a line on stdout, or a `rewritten` one on stderr, if a terminal: the next replaces it."""
    if rank() == 0 and sys.stderr.isatty():
        width = shutil.get_terminal_size().columns - 1
        print(f"\r{text[:width] if rewritten else '':{width}}\r", end="", file=sys.stderr, flush=True)
    if rank() == 0 and not rewritten:
        print(text, flush=True)


def show_progress(run):
    """Says once, 5 s after its first step, where a run is and what is left; at a terminal every second."""
    if run.first is None:  # the first step loads libraries and compiles: no measure of the rest
        run.loss.item()  # waits for the device, as below, and nothing else does
        run.first = run.step, time.perf_counter()
    first, since = run.first
    pause = 5 if run.shown is None else 1 if sys.stderr.isatty() else math.inf
    if time.perf_counter() - (run.shown or since) < pause:
        return
    loss, now = run.loss.item(), time.perf_counter()
    pace = (now - since) / (run.step - first)  # seconds per step
    begin, end = run.ends[run.epoch:run.epoch + 2]
    left, in_all = (timedelta(seconds=round((last - run.step) * pace)) for last in (end, run.total_steps))
    say(f"epoch {run.epoch + 1}/{run.epochs} step {run.step - begin} of {end - begin}  loss {loss:.3f}  "
        f"{run.batch_size / pace:.0f} images/s  left {left}, in all {in_all}", run.shown is not None)
    run.shown = now


class Run:
    """One network in training, from outside its loop: where it is, its files, and what follows every step.

    The weights are a function of the settings alone: killed at any moment and started again on the same
    device, training ends in the same bits.
    """

    def __init__(self, args, settings, images, device):
        self.args, self.settings, self.device = args, settings, device
        self.name = f"{settings['method']}_seed{settings['seed']}"
        self.path = args.out / f"{self.name}.pt"
        self.n, self.batch_size, self.epochs = (settings[k] for k in ("train_images", "batch_size", "epochs"))
        subset = torch.randperm(images, generator=torch.Generator().manual_seed(0))[:self.n]
        self.subset = subset.sort().values
        # Steps until each epoch is complete. Batches cross ends of epochs, as in SimCLR.
        self.ends = [-(-epoch * self.n // self.batch_size) for epoch in range(self.epochs + 1)]
        self.total_steps = self.ends[-1]
        self.warmup_steps = int(settings["warmup_epochs"] * self.n // self.batch_size)
        local = self.batch_size // world_size()
        self.rows = slice(rank() * local, (rank() + 1) * local)  # this rank's part of each batch
        self.epoch = self.step = 0
        self.spent = 0.0  # seconds in the current epoch
        self.sums = torch.zeros(3, device=device)  # losses, accuracies, steps of the current epoch
        self.signals, self.stopped, self.first, self.shown = [], False, None, None

    def prepare(self, model, optimizer):
        """The network as a loop calls it: as in the checkpoint if there is one, wrapped as the flags ask."""
        self.model, self.optimizer, resumed = model.train(), optimizer, ""
        checkpoint = rank0_first(lambda: checkpoint_of_run(self.path, self.settings))
        if checkpoint:
            load_weights(model, checkpoint, self.path)
            optimizer.load_state_dict(checkpoint["optimizer"])
            self.sums, self.spent = checkpoint["sums"].to(self.device), checkpoint["spent"]
            self.epoch, self.step = checkpoint["epoch"], checkpoint["step"]
            resumed = f", resumed after epoch {self.epoch} and step {self.step}"
        if self.epoch >= self.epochs:
            say(f"{self.path}: finished, {self.epochs} epochs; skipped")
            return model
        drop_records(self.log, self.epoch)
        is_cuda = self.device.type == "cuda"
        device = f"{world_size()} x {torch.cuda.get_device_name(self.device) if is_cuda else self.device}"
        say(f"{self.path}: {self.settings['precision']} on {device}, {self.epochs} epochs, "
            f"{self.total_steps} steps of {self.batch_size} images{resumed}")
        if self.settings["checkpoint_activations"]:
            checkpoint_blocks(model)
        if self.args.compile:
            model.compile()  # in place: parameter names stay as they are
        return for_all_ranks(model, self.device)

    def images_of(self, step):
        """Indices (int64, on the device) of this rank's images in a step, from the epochs' joined orders."""
        first, last = step * self.batch_size, (step + 1) * self.batch_size - 1
        generators = [generator_for("cpu", "order", self.settings["seed"], epoch)
                      for epoch in range(first // self.n, last // self.n + 1)]
        stream = torch.cat([torch.randperm(self.n, generator=generator) for generator in generators])
        return self.subset[stream[first % self.n:][:self.batch_size][self.rows]].to(self.device)

    def steps(self):
        """The numbers of the epoch's remaining steps; between them it shows progress and heeds signals."""
        started, end = time.perf_counter() - self.spent, self.ends[self.epoch + 1]
        while self.step < end:
            yield self.step
            self.step += 1
            self.spent = time.perf_counter() - started
            show_progress(self)
            flag = torch.tensor([len(self.signals)])  # on the CPU: gloo, no wait for a GPU
            self.stopped = bool(sum_over_ranks(flag) > 0)  # every rank, once any got a signal
            if self.stopped and self.step < end:  # at its end the epoch is counted first
                self.save()

    def count(self, loss, accuracy):
        """Notes the loss and accuracy of a step, both 0-d on the device; nothing in it waits."""
        self.loss = loss.detach()
        self.sums += torch.stack([self.loss, accuracy, torch.ones_like(self.loss)])

    def end_epoch(self, **measured):
        """Logs and prints the epoch that the last step ended, and what was `measured`; saves when due."""
        loss, accuracy, steps = finite_sums(self).tolist()
        speed = steps / world_size() * self.batch_size / self.spent
        self.epoch += 1
        loss, accuracy, rate = loss / steps, accuracy / steps, self.optimizer.param_groups[0]["lr"]
        record = {"epoch": self.epoch, "loss": loss, "lr": rate, "images_per_second": speed,
                  "accuracy": accuracy, **measured}
        self.log.write((json.dumps(record) + "\n").encode())
        self.log.flush()
        left = timedelta(seconds=round((self.total_steps - self.step) * self.batch_size / speed))
        test = f"  test {measured['test_accuracy']:.3f}" if measured else ""
        say(f"{self.name}  epoch {self.epoch}/{self.epochs}  loss {loss:.4f}  accuracy {accuracy:.3f}{test}  "
            f"lr {rate:.3g}  {speed:.0f} images/s  {left} left")
        self.sums.zero_()
        self.spent = 0.0
        if self.stopped or self.epoch % self.args.checkpoint_every == 0 or self.epoch == self.epochs:
            self.save()

    def save(self):
        """Writes the checkpoint, or leaves the previous one as it was; exits if a signal was the reason."""
        self.sums = finite_sums(self) / world_size()  # the file must not depend on how many they are
        average_statistics(self.model)
        if rank() == 0:
            weights = self.model.state_dict()
            head = {name[3:]: value for name, value in weights.items() if name.startswith("fc.")}
            backbone = {name: value for name, value in weights.items() if not name.startswith("fc.")}
            save_atomically({"settings": self.settings, "epoch": self.epoch, "step": self.step,
                             "sums": self.sums, "spent": self.spent, "backbone": backbone, "head": head,
                             "optimizer": self.optimizer.state_dict()}, self.path)
        if self.stopped:
            say(f"{self.path}: stopped by a signal after step {self.step} of {self.total_steps} and saved; "
                "the same command resumes")
            sys.exit(128 + (self.signals or [signal.SIGTERM])[0])  # as without us; it may be another rank's


def finite_sums(run):
    """A run's `sums` over all ranks; UserError if they or a weight are not finite."""
    sums = sum_over_ranks(run.sums.clone())
    if not torch.stack([t.isfinite().all() for t in (sums, *run.model.parameters())]).all():
        raise UserError(f"{run.name}: the loss or a weight is not finite by step {run.step}; stopped, the "
                        "last good checkpoint is kept; lower --lr or raise --warmup-epochs")
    return sums


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


def open_log(path):
    """The log beside a checkpoint, a JSON line per epoch, of which rank 0 has the file.

    Locked until closed, where the system can: a second run of the same network is a UserError.
    """
    if rank() > 0:
        return io.BytesIO()
    file = open(path, "a+b")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise UserError(f"{path}: another process trains this network; wait, or give another --out") from None
    except (OSError, AttributeError):  # a file system, or a system, without such locks
        return file
    for leftover in path.parent.glob(f"{path.stem}.*.tmp"):  # of a process that was killed
        leftover.unlink(missing_ok=True)
    return file


def drop_records(log, epoch):
    """Removes the lines of epochs after `epoch`, which will be run again, and one that a kill cut short."""
    log.seek(0)
    lines = [line for line in log if line.endswith(b"\n")]
    log.truncate(0)
    log.writelines(line for line in lines if json.loads(line).get("epoch", 0) <= epoch)


@contextlib.contextmanager
def open_run(args, method, seed, data, device):
    """A `Run`. While it is open no other process trains its network; signals and lack of memory end it."""
    def restore(*caught):  # also the handler: a second signal ends the process as usual
        run.signals += caught[:1]
        for number, handler in handlers.items():
            signal.signal(number, handler)

    settings = rank0_first(lambda: run_settings(args, method, seed, data, device))
    run = Run(args, settings, len(data.train_images), device)
    run.log = rank0_first(lambda: open_log(run.path.with_suffix(".jsonl")))
    advice = (f"--micro-batch {settings['micro_batch']} --image-size {args.image_size}: lower the first, or "
              "give --checkpoint-activations, or use more processes")
    handlers = {number: signal.signal(number, restore) for number in (signal.SIGTERM, signal.SIGINT)}
    with run.log, out_of_memory_advice(advice):
        try:
            yield run
        finally:
            restore()
            say("", rewritten=True)  # clears what a failure leaves at a terminal


# ============================================================================================================
# 10. Linear CKA
# ============================================================================================================
# For the figures, and for other projects: what stands between the two "----" lines works alone when pasted.
# The order is: API, planner, features of the sources, tiles of Gram matrices, form for few features,
# statistics, switches, memory, progress.

# ---- copy from here ----
# Exact linear CKA (Kornblith et al. 2019; Eq. (2) of Grigg et al. 2021, arXiv 2110.00528) of all samples,
# between all layers of any number of networks, in bounded memory. Needs torch 2.1 or newer, nothing else.
#
# Two saved feature files, or any two arrays with a row per sample:
#
#     x, y = (torch.load(name, weights_only=True) for name in ("x.pt", "y.pt"))
#     value = linear_cka(x, y)
#
# All layers of networks: write a source, a function that returns the features of samples start to stop - 1,
# a tensor of stop - start rows per layer, in a list or dict, or from a generator, which needs less memory. It
# is called for any start and stop, first for a few samples, and must answer the same every time: network in
# eval mode, data in a fixed order. With hooks and a DataLoader:
#
#     def source(start, stop):
#         features = {}
#         def keep(name):  # clone: a ResNet of torchvision overwrites what its bn1 and bn3 return
#             return lambda module, inputs, output: features.update({name: output.clone()})
#         hooks = [module.register_forward_hook(keep(name)) for name, module in model.named_children()]
#         for images, _ in DataLoader(Subset(data, range(start, stop)), batch_size=stop - start):
#             model(images)
#         for hook in hooks:
#             hook.remove()
#         return features
#
#     model.eval()
#     matrix = cka_matrix([source], m=len(data))  # (layers, layers); [source, other] for two networks
import contextlib
import gc
import math
import os
import sys
import time
import types
import warnings
from typing import NamedTuple

import torch

SOURCE = ("a source is a function source(start, stop) returning the features of samples start to stop - 1: "
          "a tensor of stop - start rows per layer, for any start and stop, and the same every time")
TENTHS = 10  # groups of samples, each of which is left out once for the standard error
STRIP, BAND = 64, 256  # rows of a Gram matrix that are kept together, and that are multiplied at a time
ROWS = 2048  # samples that are added up in float32 at most


class GramStatistics(NamedTuple):
    """What one pass over the Gram matrices of L layers gives; all on the CPU, sums in float64."""

    cka: torch.Tensor  # (L, L) float64, Eq. (2) with the biased HSIC; NaN where a layer is constant
    debiased_cka: torch.Tensor  # (L, L) float64, unbiased HSIC of Song et al. 2012; NaN for under 4 samples
    dominance: torch.Tensor  # (L,) float64 in [0, 1]: share of HSIC(K, K) in the rows of its strongest 1 %
    dominant: torch.Tensor  # (L, ceil(m / 100)) int64: those samples, the strongest first
    constant: list  # indices of layers that are the same for every sample
    left_out: torch.Tensor  # (10, L, L) float64: `cka` without each tenth of the samples, chosen at random
    debiased_left_out: torch.Tensor  # (10, L, L) float64: `debiased_cka` likewise

    @property
    def standard_error(self):
        """(L, L) float64: standard error of `cka` over samples."""
        return jackknife(self.left_out)


def jackknife(values):
    """Standard error over samples of what follows from `left_out`: from ten values (10, ...) one (...)."""
    return ((values - values.mean(0)).square().sum(0) * (len(values) - 1) / len(values)).sqrt()


def linear_cka(x, y, debiased=False):
    """Linear CKA of two representations of the same m samples: 0-d float64 on x's device (MPS: float32).

    x (m, ...) and y (m, ...), tensors or numpy arrays of any trailing shape, are flattened per sample. The
    biased CKA, Eq. (2), lies in [0, 1]; the debiased one (Song et al. 2012; Nguyen et al. 2021) is at most 1
    and about 0 for unrelated representations. Products are float32, or float64 if an input is. ValueError for
    unequal m, fewer than 2 samples (debiased: 4), a representation that is constant over samples, NaN or
    infinite values.
    """
    x, y = torch.as_tensor(x), torch.as_tensor(y)
    if x.ndim == 0 or y.ndim == 0 or len(x) != len(y):
        shapes = f"{tuple(x.shape)} and {tuple(y.shape)}"
        raise ValueError(f"linear_cka compares the same samples: got shapes {shapes}")
    if len(x) < (4 if debiased else 2):
        raise ValueError(f"linear_cka needs at least {4 if debiased else 2} samples, got {len(x)}")
    sources = [lambda start, stop: [x[start:stop]], lambda start, stop: [y[start:stop]]]
    with warnings.catch_warnings(record=True) as caught:  # what is a warning for a matrix is an error here
        warnings.simplefilter("always")
        both = gram_statistics(sources, len(x), precision="float32", batch=ROWS, dominance=False)
    if both.constant:
        raise ValueError(f"{' and '.join('xy'[i] for i in both.constant)} is constant over samples: no CKA")
    value = (both.debiased_cka if debiased else both.cka)[0, 1]
    if value.isnan():
        raise ValueError(f"linear_cka: {caught[0].message}")
    return value.to(x.device, torch.float32 if x.device.type == "mps" else torch.float64)


def cka_matrix(sources, m, debiased=False, **options):
    """(L, L) float64 on the CPU: linear CKA between all layers of all sources; see `gram_statistics`."""
    statistics = gram_statistics(sources, m, **options)
    return statistics.debiased_cka if debiased else statistics.cka


@torch.no_grad()
def gram_statistics(sources, m, precision=None, memory=None, batch=128, dominance=True):
    """`GramStatistics` of all layers of all `sources`, over samples 0 to m - 1, exact for any m.

    sources: list of functions, one per network or view, as the comment at the top describes them. Layers may
        differ in number and shape. Tokens, channels and positions are flattened: pick or average them first.
    precision: of the Gram matrices' products: "float32"; "tf32" (CUDA); "float16" (CUDA) or "bfloat16":
        rounded inputs (on CPUs results too). None: the fastest with errors below 1e-4. Features are centred
        first, which is what makes rounding harmless. Float64 features keep float64 products.
    memory: bytes on the features' device to use beside one batch's forward pass; None: four fifths of what is
        free. The less, the more often a source is asked for the same samples: see `plan`.
    batch: samples per call of a source.
    dominance: False leaves it out, which saves two fifths of the products where features are few.

    How: with X centred, X Xt is already H K H, and HSIC(K, L) the sum over all entries of K' L'. Samples are
    cut into blocks. For a pair of blocks a tile of every layer's K' is formed, source by source and layer by
    layer; all pairs of layers' products are summed over it; the next tile takes its place. One block asks for
    every sample once. With more, the means take a pass of their own, so that nothing depends on the order
    of samples. Rows of K' sum to zero, so the debiased estimator needs K's diagonal besides, nothing else. If
    all layers together have fewer features than samples, HSIC(K, L) is the squared norm of Xt Y, exactly.

    ValueError for what is no source, for answers that change or are not finite, and for too little memory. A
    constant layer gets NaN and a warning; so does a debiased value that would be made of rounding errors.
    """
    if int(m) != m or m < 2:
        raise ValueError(f"CKA needs at least 2 samples, got m = {m}")
    with contextlib.ExitStack() as surroundings:  # of the caller: they must not change the numbers
        surroundings.enter_context(torch.inference_mode(False))
        for kind in ("cpu", "cuda", "mps"):
            with contextlib.suppress(RuntimeError):  # a torch whose autocast does not know this kind
                surroundings.enter_context(torch.autocast(kind, enabled=False))
        features = _Features(sources, int(m), precision, batch)
        memory = int(free_memory(features.device) * 0.8 if memory is None else memory)
        widths = [[len(layer.first) for layer in layers] for layers in features.known]
        blocks = plan(widths, features.m, memory, features.batch, features.held, features.dtype.itemsize,
                      features.product_dtype.itemsize)
        sums = _by_tiles(features, blocks) if blocks else _by_features(features, dominance)
        return _statistics(features, *sums)


def plan(widths, m, memory, batch=128, held=None, itemsize=4, product_itemsize=4):
    """Into how many blocks to cut the samples: the fewest for which everything fits into `memory` bytes.

    0 stands for the form for few features. widths: per source, its layers' numbers of features.
    held: per source, the bytes per sample that its suspended calls keep; None: its largest layer, as in a
    network that is computed layer by layer. A source is asked for every sample once if there is one block,
    else once per block and once more. ValueError with the bytes needed if not even blocks of 8 samples fit.
    """
    layers, features, largest = sum(map(len, widths)), sum(map(sum, widths)), max(map(max, widths))
    held = largest * itemsize if held is None else max(held)
    if features < m and itemsize * (features * (m + 3 * TENTHS * features) + 2 * m * largest) <= memory:
        return 0

    def needed(blocks):
        rows = -(-m // blocks)
        always = 2 * itemsize * (features + layers * m)  # of layers: first sample and mean; of rows: two sums
        if blocks == 1:  # a triangle; one layer, and once more if it is rounded; what its calls keep
            short = product_itemsize if product_itemsize < itemsize else 0
            triangle = layers * rows * (rows + STRIP) // 2
            return always + itemsize * triangle + rows * (largest * (itemsize + short) + held)
        return always + itemsize * layers * rows ** 2 + rows * (largest * product_itemsize + 2 * held)

    most = -(-m // min(batch, 8))
    blocks = next((blocks for blocks in range(1, most + 1) if needed(blocks) <= memory), None)
    if blocks is None:
        raise ValueError(f"memory={memory} bytes is too little: at least {needed(most)} are needed")
    return blocks


class _Features:
    """The features of all sources: asked for, checked, and centred over all samples, layer by layer."""

    def __init__(self, sources, m, precision, batch):
        if not isinstance(sources, (list, tuple)) or not sources:
            raise ValueError(f"expected a list of sources, got a {type(sources).__name__}; {SOURCE}")
        self.sources, self.m, self.batch = sources, m, max(1, min(m, batch))
        self.few, self.device, self.dtype = False, None, None  # known after the look at all sources
        self.known, self.held, self.copied = [[] for _ in sources], [0] * len(sources), [False] * len(sources)
        first = [_look(self, s) for s in range(len(sources))]  # sample 0 of all layers
        self.device = first[0][0].device
        self.dtype = max((x.dtype for layers in first for x in layers), key=lambda dtype: dtype.itemsize)
        self.precision = "float64" if self.dtype == torch.float64 else _precision(precision, self.device, m)
        short = {"float16": torch.float16, "bfloat16": torch.bfloat16}
        self.product_dtype = short.get(self.precision, self.dtype)
        self.known = [[_Layer(f"source {s}, layer {i}", x.to(self.device, self.dtype), m)
                       for i, x in enumerate(layers)] for s, layers in enumerate(first)]
        self.every = [layer for layers in self.known for layer in layers]
        # random tenths: no order of samples, sorted by class or class after class, makes one of them a class
        generator = torch.Generator("cpu").manual_seed(0)
        self.tenths = torch.randperm(m, generator=generator, device="cpu") % TENTHS

    def ask(self, s, start, stop, note=None):
        """Yields the layers of one call, checked, as floats (stop - start, p); holds on to none of them.

        `note` is called with every layer in the source's own memory.
        """
        try:
            layers, known, i = self.sources[s](start, stop), self.known[s], 0
        except (TypeError, AttributeError) as error:
            raise ValueError(f"source {s} failed when called ({error}); {SOURCE}") from error
        layers = layers.values() if isinstance(layers, dict) else layers
        if isinstance(layers, str) or hasattr(layers, "dtype") or not hasattr(layers, "__iter__"):
            raise ValueError(f"source {s} returned a {type(layers).__name__}; {SOURCE}")
        if self.copied[s]:
            layers = [torch.as_tensor(x).clone() for x in layers]
        for x in layers:
            x = _checked(x, stop - start, f"source {s}, layer {i}, samples {start} to {stop - 1}")
            if known and (i >= len(known) or len(known[i].first) != x.shape[1]):
                raise ValueError(f"source {s}, layer {i}: not there or of another size for the first samples")
            if note:
                note(x)
            passing = [x.to(self.device or x.device, self.dtype or _working_dtype(x))]
            del x
            i += 1
            yield passing.pop()
        if i != (len(known) or max(i, 1)):
            raise ValueError(f"source {s} returned {i} layers for samples {start} to {stop - 1}; {SOURCE}")

    def open(self, s, start, stop):
        """[(start, stop, layers)] of the calls, a batch each, that cover these samples; none runs yet."""
        edges = [(a, min(a + self.batch, stop)) for a in range(start, stop, self.batch)]
        return [(a, b, self.ask(s, a, b)) for a, b in edges]

    def layers(self, s, start, stop, place=None):
        """Yields the layers of source s, (stop - start, p), centred, each in the memory place(layer, dtype).

        The calls for all batches go on side by side, a layer at a time: a generator holds no more than it
        needs for the next. Means that are not known yet are found first: with a place from all samples, which
        come at once; without one, from block to block.
        """
        calls = self.open(s, start, stop)
        for layer in self.known[s]:
            if layer.scale is not None:
                whole = place(layer, self.product_dtype)
                for a, b, layers in calls:
                    whole[a - start:b - start] = layer.centred(next(layers) - layer.first)
            else:
                whole = place(layer, self.dtype) if place else None
                for a, b, layers in calls:
                    layer.count(torch.sub(next(layers), layer.first, out=whole[a:b] if place else None))
                if stop == self.m:
                    layer.settle()
                    whole = layer.centred(whole, out=whole).to(self.product_dtype) if place else None
            yield whole
        for _, _, layers in calls:
            next(layers, None)  # more layers than before are an error

    def refuse_infinite(self):
        """ValueError that names the first layer whose features are not all finite. Waits for the device."""
        for layer, finite in zip(self.every, torch.stack([x.size for x in self.every]).isfinite().tolist()):
            if not finite:
                raise ValueError(f"{layer.name}: features contain NaN or infinite values")


class _Layer:
    """What is known of one layer: its first sample; then, by differences from it, its mean and its size.

    Differences are exactly 0 for a constant layer, and accurate for any mean.
    """

    def __init__(self, name, first, m):
        self.name, self.first, self.m = name, first, m
        self.sum, self.size, self.shift, self.scale = 0.0, first.new_zeros(()), None, None

    def count(self, x):
        """Adds the differences x (n, p) of some samples."""
        self.sum = self.sum + x.sum(0).to(_wide(x.device))
        least, most = torch.aminmax(x)
        self.size = torch.maximum(self.size, torch.maximum(most, -least))

    def settle(self):
        """Ends the counting. The scale is a power of two that makes the largest difference about 1,000.

        So no product overflows, and float16 has room below.
        """
        limit = 1000 if self.first.dtype == torch.float64 else 120
        size = self.size.clamp(min=torch.finfo(self.first.dtype).tiny).log2().ceil()
        self.scale = torch.exp2((10 - size).clamp(-limit, limit))
        self.shift, self.sum = (self.sum / self.m).to(self.first.dtype) * -self.scale, None

    def centred(self, x, out=None):
        """Differences x (n, p) -> centred over all samples and scaled."""
        return torch.addcmul(self.shift, x, self.scale, out=out)


def _checked(x, rows, where):
    """A layer as a real tensor (rows, p); ValueError that says where if it is none."""
    try:
        x = torch.as_tensor(x).detach()
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{where}: a {type(x).__name__} in place of a tensor; {SOURCE}") from None
    if x.is_complex() or x.ndim == 0 or len(x) != rows or x.numel() == 0:
        shape = tuple(x.shape)
        raise ValueError(f"{where}: {x.dtype} of shape {shape}, expected {rows} rows of real numbers")
    return x.reshape(rows, -1)


def _working_dtype(x):
    """float64 for what float32 could not hold, else float32."""
    wide = x.dtype == torch.float64 or (x.dtype.itemsize > 2 and not x.dtype.is_floating_point)
    return torch.float64 if wide else torch.float32


def _look(features, s):
    """Sample 0 of all layers of source s, which is asked for a few, at once and by two calls side by side.

    Notes what a suspended call holds per sample. If the answers differ, but not where one call is over before
    the next begins, calls share state and will be copied. Otherwise the source is refused.
    """
    if not callable(features.sources[s]):
        raise ValueError(f"source {s} is a {type(features.sources[s]).__name__}, not a function; {SOURCE}")
    few, half, raw = min(features.m, 4), min(features.m, 4) // 2, []
    layers, held = _side_by_side(features, s, [(0, few)], raw.append)
    for i, x in enumerate(layers):
        if not x.isfinite().all():
            raise ValueError(f"source {s}, layer {i}: features contain NaN or infinite values")
    same = [(i, j) for j, y in enumerate(raw) for i, x in enumerate(raw[:j])
            if x.data_ptr() == y.data_ptr() and x.numel() == y.numel() and torch.equal(layers[i], layers[j])]
    if same:
        pair = f"layers {same[0][0]} and {same[0][1]}"
        warnings.warn(f"source {s}: {pair} are the same memory ({len(same)} such pairs): if a hook returned "
                      "one before the network overwrote it, clone it in the hook", stacklevel=5)
    raw.clear()
    halves = [(0, half), (half, few)]
    others, held_by_half = _side_by_side(features, s, halves)
    if _agree(layers, others):
        features.held[s] = max(0, *(a - b for a, b in zip(held, held_by_half))) // (few - half)
    else:
        features.copied[s], features.held[s] = True, sum(x[0].nbytes for x in layers)
        if not _agree(layers, _side_by_side(features, s, halves)[0]):
            raise ValueError(f"source {s} gives other features when asked again: dropout or batch norm in "
                             f"training mode, or samples in another order? {SOURCE}")
    return [x[0].clone() for x in layers]


def _side_by_side(features, s, edges, note=None):
    """Copies of the layers from calls that take turns, and the bytes that the first one holds after each."""
    calls = [features.ask(s, a, b, note) for a, b in edges]
    layers, held = [], []
    for parts in zip(*(map(torch.clone, call) for call in calls)):
        if len({x.shape[1:] for x in parts}) > 1:
            break  # so they do not agree
        layers.append(torch.cat(parts))
        held.append(_held_by(calls[0]))
    return layers, held


def _agree(layers, others):
    """True if two answers differ by no more than rounding, which may depend on the batch."""
    for x, y in zip(layers, others):
        unit = x.abs().max().clamp(min=torch.finfo(x.dtype).tiny)
        allowed = 0.1 * ((x - x.mean(0)) / unit).norm() + 1e-3 * (x / unit).norm()
        if x.shape != y.shape or not ((x - y) / unit).norm() <= allowed:
            return False
    return len(layers) == len(others)


def _held_by(call):
    """Bytes of the tensors that a suspended call keeps alive, in its frames or in containers there."""
    containers = (list, tuple, dict, set, types.FrameType, types.CellType)
    seen, storages, waiting = {}, {}, [call]
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen or isinstance(thing, dict) and "__builtins__" in thing:  # a module's names
            continue
        seen[id(thing)] = thing
        if isinstance(thing, torch.Tensor):
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
        elif hasattr(thing, "__next__") or isinstance(thing, containers):
            waiting.extend(gc.get_referents(thing))
    return sum(storages.values())


class _Strip(NamedTuple):
    """Some rows of every layer's Gram matrix; columns are sorted by the tenth that their samples are in."""

    row: int  # the sample of the first row
    column: int  # the sample of the first column before sorting
    order: torch.Tensor  # (n,) int64: where each column stood before sorting
    ends: list  # where the columns of each tenth end
    values: torch.Tensor  # (L, rows, n); 0 on and below the diagonal


def _by_tiles(features, blocks):
    """For `_statistics`: its four sums, tile by tile over all pairs of blocks of samples."""
    m, count, dtype, device = features.m, len(features.every), features.dtype, features.device
    size = -(-m // blocks)
    edges = [(a, min(a + size, m)) for a in range(0, m, size)]
    progress = _Progress("CKA", m * count * (len(edges) + 1 if len(edges) > 1 else 1))
    for rows in edges if len(edges) > 1 else ():  # the means first
        for s in range(len(features.sources)):
            for _ in features.layers(s, *rows):
                progress.add(rows[1] - rows[0])
    tenths = features.tenths.to(device)
    # sums over i < j: by the tenth of i, by that of j, where both are of the same
    pairs = torch.zeros(3, TENTHS, count, count, dtype=_wide(device), device=device)
    diagonal, row_sums = (torch.zeros(count, m, dtype=dtype, device=device) for _ in range(2))
    # all memory is used again and again: new memory is slow at first
    triangle = sum(min(STRIP, size - a) * (size - a) for a in range(0, size, STRIP))
    tile = torch.empty(count * (size ** 2 if len(edges) > 1 else triangle), dtype=dtype, device=device)
    largest = size * max(len(layer.first) for layer in features.every)
    layer = torch.empty(largest, dtype=features.product_dtype if len(edges) > 1 else dtype, device=device)
    for i, rows in enumerate(edges):
        for columns in edges[i:]:
            strips = _strips(tile, features.tenths, rows, columns, count)
            _fill(strips, features, rows, columns, layer, diagonal, progress)
            with _float32_products():
                for strip in strips:
                    _add(strip, tenths, pairs, row_sums)
    progress.close()
    features.refuse_infinite()
    pairs = pairs.cpu().double()
    return 2 * pairs[0].sum(0), 2 * (pairs[0] + pairs[1] - pairs[2]), diagonal, row_sums + diagonal.square()


def _strips(memory, tenths, rows, columns, count):
    """The strips of a tile, in `memory`: those of its upper triangle, or all its rows in one."""
    strips, used = [], 0
    height = STRIP if rows == columns else rows[1] - rows[0]
    for row in range(*rows, height):
        column = max(row, columns[0])
        among = tenths[column:columns[1]]
        ends = among.bincount(minlength=TENTHS).cumsum(0).tolist()
        shape = count, min(height, rows[1] - row), len(among)
        values = memory[used:used + math.prod(shape)].view(shape)
        strips.append(_Strip(row, column, among.argsort(stable=True).to(memory.device), ends, values))
        used += math.prod(shape)
    return strips


def _fill(strips, features, rows, columns, memory, diagonal, progress):
    """Forms every layer's Gram matrix in a tile's strips, and its diagonal if the tile is on it."""
    def own_memory(layer, dtype):
        shape = rows[1] - rows[0], len(layer.first)
        return memory[:math.prod(shape)].view(shape)

    places, index = strips[0].order.argsort(), 0  # where the columns go, if they are all in one strip
    for s, known in enumerate(features.known):
        others = features.open(s, *columns) if rows != columns else []
        for layer, x in zip(known, features.layers(s, *rows, own_memory)):
            if rows == columns:
                diagonal[index, rows[0]:rows[1]] = _fill_triangle(x, strips, index, features)
            for a, b, layers in others:
                y = layer.centred(next(layers) - layer.first).to(x.dtype)
                place = places[a - columns[0]:b - columns[0]]
                strips[0].values[index].index_copy_(1, place, _product(x, y, features))
            progress.add(rows[1] - rows[0] + sum(b - a for a, b, _ in others))
            index += 1
        for _, _, layers in others:
            next(layers, None)  # more layers than before are an error


def _fill_triangle(x, strips, index, features):
    """Writes the entries of x @ x.T above the diagonal into a layer's strips; returns the diagonal."""
    diagonal = x.new_empty(len(x), dtype=features.dtype)
    for top in range(0, len(x), BAND):
        end = min(top + BAND, len(x))
        right = _product(x[top:end], x[end:], features)
        for strip in strips[top // STRIP:-(-end // STRIP)]:
            a = strip.row - strips[0].row
            b = a + strip.values.shape[1]
            corner = _product(x[a:b], x[a:end], features)
            diagonal[a:b] = corner.diagonal()
            columns = torch.cat([corner.triu_(1), right[a - top:b - top]], 1)
            torch.index_select(columns, 1, strip.order, out=strip.values[index])
    return diagonal


def _product(x, y, features):
    """x @ y.T in the precision asked for, as float32 (float64 for float64 features)."""
    if len(y) == 0:
        return x.new_empty(len(x), 0, dtype=features.dtype)
    with _float32_products(tf32=features.precision == "tf32"):
        if x.dtype == features.dtype or x.device.type == "cpu":
            return (x @ y.mT).to(features.dtype)
        return torch.mm(x, y.mT, out_dtype=features.dtype)


def _add(strip, tenths, pairs, row_sums):
    """Adds a strip's entries, multiplied for all pairs of layers, to the sums; float32 for 2,048 at most."""
    samples = strip.column + strip.order
    for a in range(0, strip.values.shape[1], STRIP):
        part = strip.values[:, a:a + STRIP]
        rows = slice(strip.row + a, strip.row + a + part.shape[1])
        squares = torch.zeros_like(part[:, 0])
        for row in part.unbind(1):
            squares.addcmul_(row, row)
        row_sums.index_add_(1, samples, squares)
        start = 0
        for g, end in enumerate(strip.ends):
            for piece in part[:, :, start:end].split(2048, dim=2) if end > start else ():
                products = torch.bmm(piece.transpose(0, 1), piece.permute(1, 2, 0))  # (rows, L, L)
                row_sums[:, rows] += products.diagonal(dim1=1, dim2=2).T
                by_tenth = torch.zeros_like(pairs[0]).index_add_(0, tenths[rows], products.to(pairs.dtype))
                pairs[0] += by_tenth
                pairs[1, g] += by_tenth.sum(0)
                pairs[2, g] += by_tenth[g]
            start = end


def _by_features(features, dominance):
    """For `_statistics`: its sums where there are fewer features than samples, from HSIC(K, L) = |Xt Y|^2."""
    widths, m, device = [len(layer.first) for layer in features.every], features.m, features.device
    ends = torch.tensor([0, *widths], device="cpu").cumsum(0).tolist()
    columns = [slice(a, b) for a, b in zip(ends, ends[1:])]
    where = dict(zip(features.every, columns))
    every = torch.empty(m, ends[-1], dtype=features.dtype, device=device)  # all layers side by side
    features.product_dtype, features.few = features.dtype, True
    for s in range(len(features.sources)):
        for _ in features.layers(s, 0, m, lambda layer, dtype: every[:, where[layer]]):
            pass
    features.refuse_infinite()
    ones = [torch.ones(p, 1, dtype=_wide(device), device=device) for p in widths]
    owner = torch.block_diag(*ones)  # (P, L): which layer a feature is of
    products = [owner.new_zeros(ends[-1], ends[-1]) for _ in range(TENTHS)]
    with _float32_products():
        for g in range(TENTHS):
            for some in every[(features.tenths == g).nonzero().flatten().to(device)].split(ROWS):
                for own in columns:
                    products[g][own, own.start:] += some[:, own].T @ some[:, own.start:]
        whole = sum(products)
        rows = torch.full((len(widths), m), math.nan, dtype=every.dtype, device=device)
        for row, own in zip(rows, columns) if dominance else ():
            row.copy_((every[:, own] @ whole[own, own].to(every.dtype)).mul_(every[:, own]).sum(1))
    diagonal = torch.stack([every[:, own].square().sum(1) for own in columns])
    hsic = torch.stack([owner.T @ (whole - part).square() @ owner for part in (0, *products)]).triu()
    hsic = (hsic + hsic.triu(1).mT).cpu().double()
    squares = _squares(diagonal.cpu().double(), features.tenths)
    return hsic[0] - squares.sum(0), hsic[0] - hsic[1:] - squares, diagonal, rows


def _squares(diagonal, tenths):
    """(10, L, L): sums of K'_ii L'_ii over the samples of each tenth."""
    return torch.stack([diagonal * (tenths == g) @ diagonal.T for g in range(TENTHS)])


def _statistics(features, off, removed, diagonal, rows):
    """`GramStatistics` from sums over samples.

    off (L, L): K'_ij L'_ij over all i != j; removed (10, L, L): over those with i or j of a tenth; diagonal
    (L, m): K'_ii; rows (L, m): K'_ij^2 over j. Leaving out a tenth leaves the means as they are.
    """
    diagonal, rows = diagonal.cpu().double(), rows.cpu().double()
    squares = _squares(diagonal, features.tenths)
    out = torch.stack([features.tenths == g for g in range(-1, TENTHS)]).double()  # nothing, then each tenth
    off = torch.stack([off, *(off - removed)])
    squares = torch.stack([squares.sum(0), *(squares.sum(0) - squares)])
    hsic = off + squares
    for layer, finite in zip(features.every, hsic[0].diagonal().isfinite().tolist()):
        if not finite:
            raise ValueError(f"{layer.name}: its HSIC is not finite")
    n, traces = features.m - out.sum(1).view(-1, 1, 1), (1 - out) @ diagonal.T
    # Song et al. 2012, Eq. (5); with its diagonal removed, row i of K' sums to -K'_ii
    more, less = traces[:, :, None] * traces[:, None] / ((n - 1) * (n - 2)), squares * 2 / (n - 2)
    unbiased = torch.where(n > 3, off + more - less, math.nan)

    value, constant = unbiased[0].diagonal().clone(), hsic[0].diagonal() == 0
    if features.few:  # the diagonal was taken off what includes it
        more = more + hsic + squares
    noise = (more + less)[0].diagonal() * _rounding(features)
    lost = (value <= noise) & ~constant
    shaky = (noise > 1e-4 * value) & ~lost & ~constant
    unbiased[:, lost] = unbiased[:, :, lost] = math.nan
    _warn("constant over samples, so CKA is NaN", constant, features)
    _warn("so few samples matter that debiased HSIC is all rounding, so debiased CKA is NaN", lost, features)
    what = "few samples matter, or there is little structure, so debiased CKA may be off by more than 1e-4"
    what += f" ({features.precision} products)"
    _warn(what, shaky, features)
    top = rows.topk(-(-features.m // 100), dim=1)
    cka, debiased = _normalised(hsic), _normalised(unbiased)
    return GramStatistics(cka[0], debiased[0], top.values.sum(1) / rows.sum(1), top.indices,
                          constant.nonzero().flatten().tolist(), cka[1:], debiased[1:])


def _warn(text, which, features):
    """One warning about the layers that are True, if there are any."""
    names = [f"layer {i} ({features.every[i].name})" for i in which.nonzero().flatten().tolist()]
    if names:
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        warnings.warn(f"{text}: {', '.join(names[:5])}{more}", stacklevel=5)


def _normalised(hsic):
    norms = hsic.diagonal(dim1=1, dim2=2).sqrt()  # one by one: the product of two could overflow
    return hsic / norms[:, :, None] / norms[:, None]


def _rounding(features):
    """A bound of the relative rounding errors of what cancels, also of those that a whole row shares."""
    unit = torch.finfo(features.dtype).eps / 2
    if features.few:
        return unit * ROWS / 4
    inputs = {"bfloat16": 2.0 ** -8, "float16": 2.0 ** -11, "tf32": 2.0 ** -11}.get(features.precision, unit)
    return 4 * inputs + unit * (4 + max(len(layer.first) for layer in features.every) ** 0.5 / 2)


def _precision(wanted, device, m):
    """The precision of products: the one wanted, or a good one for m samples; ValueError if there is none."""
    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0
    # half-precision products with float32 results: torch 2.8, not on AMD
    short = "dtype" in torch.ops.aten.mm.overloads() and not torch.version.hip
    able = {"float16": short and major >= 7, "tf32": major >= 8, "float32": True,
            "bfloat16": short and major >= 8 or device.type == "cpu" and has_bf16(device)}
    names = [name for name in ("float16", "bfloat16", "tf32", "float32") if able[name]]
    if wanted is not None and wanted not in names:
        has = f"{device} with torch {torch.__version__} has {', '.join(names)}"
        raise ValueError(f"precision {wanted!r}: {has}")
    return wanted or (names[0] if m >= 512 else "float32")  # of fewer, rounding shows and saves little


@contextlib.contextmanager
def _float32_products(tf32=False):
    """Products of float32 matrices are float32 (or TF32), whatever was chosen, which is put back."""
    switches = []  # before torch 2.9 there is one function for all
    if hasattr(torch.backends.mkldnn, "matmul"):
        switches = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]
    before = [s.fp32_precision for s in switches] if switches else torch.get_float32_matmul_precision()
    try:
        if not switches:
            torch.set_float32_matmul_precision("high" if tf32 else "highest")
        for switch, wanted in zip(switches, ("tf32" if tf32 else "ieee", "ieee")):
            switch.fp32_precision = wanted
        yield
    finally:
        if not switches:
            torch.set_float32_matmul_precision(before)
        for switch, value in zip(switches, before):
            switch.fp32_precision = value


def has_bf16(device):
    """True if `device` multiplies bfloat16 in hardware, so that it is faster than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    capabilities = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


def free_memory(device):
    """Bytes free on a device: what its driver says, or what the kernel and the container's limit leave."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type == "mps" and hasattr(torch.mps, "recommended_max_memory"):
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    free = [4 << 30]  # where nobody says
    with contextlib.suppress(AttributeError, ValueError, OSError):  # not on Linux: half of what there is
        free = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2]
    with contextlib.suppress(OSError, StopIteration):
        with open("/proc/meminfo") as file:
            free = [int(next(line for line in file if line.startswith("MemAvailable")).split()[1]) << 10]
    for limit, used in (("memory.max", "memory.current"),
                        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")):
        with contextlib.suppress(OSError, ValueError):  # the container's; the word "max" where there is none
            with open(f"/sys/fs/cgroup/{limit}") as most, open(f"/sys/fs/cgroup/{used}") as now:
                free.append(int(most.read()) - int(now.read()))
    return max(min(free), 1 << 28)


def _wide(device):
    return torch.float32 if device.type == "mps" else torch.float64  # Metal has no float64


class _Progress:
    """How far, and the time left, on stderr: only on a terminal, and only after a few seconds."""

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
            text = f"\r{self.what} {self.done / self.total:4.0%}, {left:.0f} s left   "
            print(text, end="", file=sys.stderr)

    def close(self):
        """Clears the line, if one was shown."""
        if self.shown > self.start:
            print("\r" + " " * 60 + "\r", end="", file=sys.stderr)
# ---- to here ----


# ============================================================================================================
# 11. Figures
# ============================================================================================================
# What the figure scripts share, in the order of use: command line, networks and images, measuring, claims and
# their verdicts, files, drawing. In an .npz a plain key holds the biased value of Eq. (2), `<key>_debiased`
# the other, and `<key>_left_out` ten of them, each measured without one tenth of the images.

LAYERS = [f"BG{g}.{b}.{kind}" for g, count in enumerate(BLOCK_GROUPS, 1) for b in range(1, count + 1)
          for kind in ("odd", "even")]
HEAD = ["head.1", "head.2", "head.3"]
ODD, EVEN = slice(0, 32, 2), slice(1, 32, 2)  # of the 32 layers
GROUP = np.repeat([1, 2, 3, 4], BLOCK_GROUPS)  # block group of each of the 16 odd or even layers
SAME_GROUP = np.equal.outer(np.repeat(GROUP, 2), np.repeat(GROUP, 2))  # (32, 32)
NAMES = {"simclr": "SimCLR", "supervised": "Supervised"}
PAPER = "checkpoints/paper"  # where the training scripts put the networks of the full study
FOREIGN = {  # what a state dict does not say about itself: flags for both sides, or --simclr-* for one
    "image_size": {"type": number(int, low=8), "metavar": "N", "help": "pixels (default: 224; 3x3 stem: 32)"},
    "mean": {"type": number(float, low=0), "nargs": 3, "metavar": "X", "help": "(default: ImageNet's)"},
    "std": {"type": number(float, above=0), "nargs": 3, "metavar": "X", "help": "(default: ImageNet's)"},
    "prefix": {"metavar": "TEXT", "help": "before conv1.weight, where a file holds several networks"},
    "stem_padding": {"type": int, "choices": (1, 2), "help": "of a 3x3 stem (default: 1)"}}


def figure_parser(doc):
    """The flags that all figure scripts share."""
    parser = Parser(doc)
    add = parser.add_argument_group("networks").add_argument
    add("--checkpoints", type=os.path.expanduser,
        help=f"folder of *_seed*.pt files (default: {PAPER}, if no files)")
    for method, name in NAMES.items():
        add(f"--{method}", nargs="+", metavar="FILE", type=os.path.expanduser,
            help="in place of the folder's: checkpoints of this study, or state dicts of a ResNet-50")
        add(f"--{method}-label", metavar="TEXT", help=f"in figures (default: {name}, or the file's name)")
    add("--untrained", action="store_true", help="the same networks before training, standard initialisation")
    add = parser.add_argument_group("images and measuring").add_argument
    add("--data", type=os.path.expanduser,
        help="as in training (default: what the networks were trained on; for state dicts: data)")
    add("--download", action="store_true", help="fetch CIFAR-10 into a --data folder that is empty or new")
    add("--samples", type=number(int, low=8), help="test images, a fixed random choice (default: all)")
    add("--batch-size", type=number(int, low=1), default=256, help="images per forward pass (default: 256)")
    add("--device", help="cpu, cuda, cuda:N or mps (default: cuda, else mps, else cpu)")
    add("--precision", choices=("float32", "tf32", "float16", "bfloat16"),
        help="of the Gram matrices' products; tf32 and float16 on CUDA only (default: the fastest whose CKA "
             "error is below 1e-4; below 512 images float32)")
    add("--memory", type=number(float, above=0),
        help="GB on the device for CKA, beside a forward pass (default: four fifths of what is free)")
    add = parser.add_argument_group("what is written").add_argument
    add("--out", type=os.path.expanduser,
        help="folder for .png and .npz (default: figures/<name of the checkpoint folder or files>)")
    add("--debiased", action="store_true", help="draw, and judge first, debiased CKA instead of Eq. (2)")
    add("--replot", action="store_true", help="judge and draw again from the .npz in --out, without networks")
    group = parser.add_argument_group("state dicts, which do not say how they want their images")
    for name, options in FOREIGN.items():
        flag = name.replace("_", "-")
        group.add_argument(f"--{flag}", **options)
        for method in NAMES:
            group.add_argument(f"--{method}-{flag}", **options | {"help": None})
    return parser


def without_ending(path):
    """The name of a checkpoint file without .pt, .pth.tar and the like."""
    return re.sub(r"(\.(pt|pth|tar|ckpt|bin))+$", "", Path(path).name)


def side_label(args, method):
    """What a figure calls the networks of one side."""
    given, files = getattr(args, f"{method}_label"), getattr(args, method)
    if given or not files:
        return given or NAMES[method]
    return without_ending(files[0]) + (f" and {len(files) - 1} more" if files[1:] else "")


def figure_folder(args):
    """The folder of a figure's files; a default one has no spaces, commas or the like in its name."""
    if args.out:
        return Path(args.out)
    name = "-".join(side_label(args, method) for method in NAMES if getattr(args, method))
    name = name or Path(args.checkpoints or PAPER).resolve().name
    name = re.sub(r"[^\w.-]+", "_", name).strip("._-")[:100] or "figures"
    return Path("figures") / (name + ("-untrained" if args.untrained else ""))


class Study(NamedTuple):
    """What a figure is made from: networks per method in the order of their seeds, and the test images."""

    args: object
    networks: dict  # method -> list of models in eval mode, each with its `settings` and `name`
    data: Data
    data_path: str
    other_images: bool  # than those of the networks' training
    images: torch.Tensor  # uint8 (m, 3, h, w), the test images used
    labels: torch.Tensor  # (m,)


def open_study(args, methods):
    """`Study` of the networks of `methods`; UserError if anything is missing or does not fit together."""
    device = pick_device(args.device)
    missing = [method for method in methods if not (getattr(args, method) or args.checkpoints)]
    if len(missing) == 1 < len(methods):
        raise UserError(f"one side only: give --{missing[0]} FILE... too, or --checkpoints FOLDER; "
                        "to compare the networks of one side with each other, use fig1_internal.py")
    if len({side_label(args, method) for method in methods}) < len(methods):
        raise UserError(f"both sides are called {side_label(args, methods[0])}: tell them apart with "
                        "--simclr-label and --supervised-label")
    networks = {method: load_networks(args, method, device) for method in methods}
    together = [model for models in networks.values() for model in models]
    for side, models in [("", together), *networks.items()]:
        flags = [f"{side}_{name}".strip("_") for name in FOREIGN]
        given = [flag.replace("_", "-") for flag in flags if getattr(args, flag) is not None]
        if given and all("preset" in model.settings for model in models):
            raise UserError(f"--{given[0]} is for state dicts; leave it out, these checkpoints know theirs")
    settings = [model.settings for model in together]
    for name in ("stem", "image_size", "data"):
        values = sorted({str(s[name]) for s in settings if s[name]})
        if len(values) > 1:
            warn(f"networks differ in {name}: {', '.join(values)}")
    data, path, other_images = figure_data(args, settings, device)
    total = len(data.test_images)
    if args.samples and args.samples > total:
        raise UserError(f"--samples {args.samples}: the test set has {total} images")
    order = torch.randperm(total, generator=torch.Generator().manual_seed(0))
    chosen = order[:args.samples or total].sort().values.to(device)
    writable_folder(figure_folder(args))
    return Study(args, networks, data, path, other_images, data.test_images[chosen], data.test_labels[chosen])


def load_networks(args, method, device):
    """The networks of one side: its files in their order, or --checkpoints/<method>_seed*.pt by seed."""
    files, folder = getattr(args, method), Path(args.checkpoints or PAPER)
    paths = [Path(name) for name in files or []]
    if len({path.resolve() for path in paths}) < len(paths):
        raise UserError(f"--{method}: each file once")
    paths = paths or sorted(folder.glob(f"{method}_seed*.pt"), key=lambda path: (len(path.name), path.name))
    if not paths:
        raise UserError(f"--checkpoints {folder}: no {method}_seed*.pt there; train them with "
                        f"`python train_{method}.py --out {folder}`")
    options = {}
    for name in FOREIGN:
        own = getattr(args, f"{method}_{name}")
        options[name] = getattr(args, name) if own is None else own
    models = []
    for path in paths:
        model = load_model(path, device, method, **options)
        s = model.settings
        model.name = without_ending(path) if files else f"{side_label(args, method)} seed {s['seed']}"
        if s.get("epoch", 0) < s.get("epochs", 0):
            warn(f"{path}: not finished, epoch {s['epoch']} of {s['epochs']}")
        if s.get("left_out"):
            warn(f"{path}: not of the backbone and left out: {first_names(s['left_out'])}")
        if s.get("note"):
            print(f"{path}: {s['note']}")
        models.append(untrained(model, len(models), device) if args.untrained else model)
    held = {(model.settings["method"], model.settings["seed"]) for model in models}
    if not files and (len(held) < len(models) or {name for name, _ in held} != {method}):
        raise UserError(f"--checkpoints {folder}: {method}_seed*.pt are not {method} networks of different "
                        "seeds; move the others away")
    return models


def untrained(model, index, device):
    """`model` before training, but in the standard initialisation: with a gamma of 0 odd layers are constant.

    Its weights follow from its seed, or from its `index` among the files if it has none.
    """
    s = model.settings | {"epoch": 0, "untrained": True}
    s["seed"] = index if s["seed"] is None else s["seed"]
    fresh = build_model(s["method"], s["stem"], max(1, len(s["classes"])), s["seed"], zero_init=False,
                        stem_padding=s.get("stem_padding", 1))
    if isinstance(model.fc, nn.Identity):  # another project's, without head
        fresh.fc = model.fc
    fresh.settings, fresh.name = s, f"untrained {model.name}"
    return fresh.to(device, memory_format=torch.channels_last).eval()


def figure_data(args, settings, device):
    """(Data, its path, whether it is other data than the networks' training had).

    Other data would judge the claims on images that nobody chose: refused, unless --data asks for it.
    """
    trained = [s for s in settings if s["data"]]
    path = args.data or next((s["data"] for s in trained), "data")
    data = load_data(path, device, args.download)
    statistics = np.array(channel_statistics(data.train_images))
    for s in trained:
        theirs = np.array([s["mean"], s["std"]])
        if s["classes"] == data.classes and abs(theirs - statistics).max() < 1e-3:
            continue
        text = "other images than the training's"
        for where, classes, numbers in ((s["data"], s["classes"], theirs), (path, data.classes, statistics)):
            text += (f"; {where}: {len(classes)} classes ({first_names(classes, 3)}), mean and deviation of "
                     f"the channels {numbers.round(3).tolist()}")
        if not args.data:
            raise UserError(f"{text}. Give the right folder with --data, or --data {path} if you mean these")
        warn(f"{text}. The title says so")
        return data, path, True
    return data, path, False


def prepare(model, images, params=None):
    """uint8 images as the network sees them: through its test pipeline, or augmented by `params`."""
    s = model.settings
    standard = s["image_size"], s["mean"], s["std"]
    if s["method"] == "supervised":
        x = (imagenet_test(images, *standard) if params is None else
             imagenet_augment(images, *standard, params=params))
    else:
        x = (simclr_test(images, s["image_size"]) if params is None else
             simclr_augment(images, s["image_size"], s["strength"], s["blur"], params=params))
        x = _standardise(x, s["mean"], s["std"]) if s.get("standardise") else x  # ours see [0, 1]
    return x.contiguous(memory_format=torch.channels_last)


def common_layers(models):
    """Names of the representations that all of the networks have: 32, or 35 with projection heads."""
    return LAYERS + (HEAD if all(isinstance(model.fc, ProjectionHead) for model in models) else [])


def network_source(model, images, layers=LAYERS, params=None, note=""):
    """(names for warnings, source for `gram_statistics`) of the representations `layers` of a network.

    It sees `images`, or their copy augmented by `params`, which the names tell by `note`.
    """

    def source(start, stop):
        rows = slice(start, stop)
        inputs = prepare(model, images[rows], None if params is None else slice_params(params, rows))
        stream = stream_representations(model, inputs, any_order=True)
        del inputs  # no generator here: its frame would hold on to each layer
        return itertools.compress(map(operator.itemgetter(1), stream), (x in layers for x in LAYERS + HEAD))

    return [f"{model.name}{note} {layer}" for layer in layers], source


def copy_sources(model, images, layers):
    """`network_source` of two copies of images, augmented as in training, alike for a method's networks."""
    sources = []
    for view in (0, 1):
        generator = generator_for(images.device, "augmented copy", view)
        shape = len(images), *images.shape[2:], images.device, generator
        if model.settings["method"] == "simclr":
            params = simclr_params(*shape, strength=model.settings["strength"])
        else:
            params = imagenet_params(*shape)
        sources.append(network_source(model, images, layers, params, f", copy {view + 1}"))
    return sources


def measure(study, sources):
    """({ending: CKA}, dominance (L,)) as numpy arrays; says which layers are constant or rest on few images.

    CKA is (L, L) under the endings "" and "_debiased", (10, L, L) under "_left_out" and "_debiased_left_out".
    `sources`: as `network_source` gives them, whose names take the place of the engine's numbers. UserError
    for features that are not finite, too little memory and a precision that the device has not.
    """
    args, (names, functions) = study.args, zip(*sources)

    def named(message):
        return re.sub(r"(layer \d+ \()?source (\d+), layer (\d+)\)?",
                      lambda numbers: names[int(numbers[2])][int(numbers[3])], str(message))

    memory = int(args.memory * 1e9) if args.memory else None
    advice = f"--batch-size {args.batch_size}: lower it, or give --memory less than is free (GB)"
    with warnings.catch_warnings(record=True) as caught, out_of_memory_advice(advice):
        warnings.simplefilter("always")
        try:
            found = gram_statistics(functions, len(study.images), args.precision, memory, args.batch_size)
        except ValueError as error:
            raise UserError(named(error)) from None
    for warning in caught:
        warn(named(warning.message))
    dominance = found.dominance.numpy()
    few = [f"{name} ({share:.0%})" for name, share in zip(itertools.chain(*names), dominance) if share > 0.5]
    if few:
        warn(f"1 % of the images carry most of HSIC(K, K), so of the CKA, of {first_names(few)}")
    cka = {"": found.cka, "_debiased": found.debiased_cka,
           "_left_out": found.left_out.float(), "_debiased_left_out": found.debiased_left_out.float()}
    return {ending: values.numpy() for ending, values in cka.items()}, dominance


def seed_pairs(networks):
    """All pairs of a sequence of networks' indices; of a single one, with itself."""
    return list(itertools.combinations(networks, 2)) or [(networks[0], networks[0])]


def pair_matrices(cka, pairs):
    """CKA (..., 32 S, 32 S) as (..., P, 32, 32): of each pair, rows the first network, columns the second."""
    first, second = np.array(pairs).T
    count = cka.shape[-1] // 32
    blocks = cka.reshape(*cka.shape[:-2], count, 32, count, 32).swapaxes(-3, -2)
    return blocks[..., first, second, :, :]


def rank_correlation(values):
    """Spearman's correlation of values (..., n), along the last axis, with 1 to n; ties share a mean rank."""
    values = np.asarray(values, float)
    ranks = np.sign(values[..., :, None] - values[..., None, :]).sum(-1)  # twice the rank, from its mean
    depth = 2 * np.arange(values.shape[-1]) - (values.shape[-1] - 1)
    with np.errstate(invalid="ignore"):  # a constant profile has no correlation: NaN
        return (ranks * depth).sum(-1) / np.sqrt((ranks ** 2).sum(-1) * (depth ** 2).sum())


class Quantity(NamedTuple):
    """A number behind a claim, one value per pair or network; the claim needs it within the bounds."""

    label: str
    values: np.ndarray
    above: float = -math.inf
    below: float = math.inf  # without bounds it is only reported
    error: float = math.nan  # standard error over images of the values' mean; NaN: not known

    def __str__(self):
        error = "" if math.isnan(self.error) else f" [{self.error:.2g}]"
        return f"{self.label} {self.values.mean():.3f} +- {self.values.std():.3f}{error}"


class Claim(NamedTuple):
    """A claim of the paper and the quantities that decide it."""

    id: str
    text: str
    quantities: list

    def verdict(self):
        """ "holds", "does not hold" or "undecided"; of several quantities the least favourable decides.

        A quantity holds if its mean is within the bounds by more than the spread; with fewer than three
        values, if each is within, and the mean by more than two standard errors over images, where known.
        """
        signs = []
        for _, values, above, below, error in self.quantities:
            margin = np.minimum(values - above, below - values)
            if np.isinf(margin).all():
                continue
            mean, doubt = margin.mean(), margin.std()
            low, high = mean - doubt, mean + doubt
            if margin.size < 3:
                doubt = 2 * np.nan_to_num(error)
                low, high = min(margin.min(), mean - doubt), max(margin.max(), mean + doubt)
            signs.append(1 if low > 0 else -1 if high < 0 else 0)  # NaN: 0
        return {1: "holds", 0: "undecided", -1: "does not hold"}[min(signs)]


def one_estimator(arrays, debiased=False, tenth=None):
    """`arrays` with one estimator's values under the plain keys; with a `tenth` (0 to 9), those without it.

    What was not measured without that tenth of the images (probes, older files) is NaN then.
    """
    ending, chosen = "_debiased" if debiased else "", arrays | {"debiased": np.array(debiased)}
    for key, values in arrays.items():
        chosen[key] = arrays.get(key + ending, values)
        if tenth is not None and values.dtype.kind == "f":
            left_out = arrays.get(f"{key}{ending}_left_out")
            chosen[key] = np.full(values.shape, math.nan) if left_out is None else left_out[tenth]
    return chosen


def judge(claims, arrays, debiased=False):
    """`claims(arrays)` by one estimator: a list of `Claim`, standard errors over images filled in."""
    found = claims(one_estimator(arrays, debiased))
    tenths = [claims(one_estimator(arrays, debiased, tenth)) for tenth in range(10)]
    for i, claim in enumerate(found):
        for j, quantity in enumerate(claim.quantities):
            means = np.array([some[i].quantities[j].values.mean() for some in tenths])
            claim.quantities[j] = quantity._replace(error=jackknife(torch.from_numpy(means)).item())
    return found


def save_arrays(study, name, arrays):
    """Writes <out>/<name>.npz, `arrays` and what the figure is made from; returns all of it."""
    settings = {method: [m.settings for m in models] for method, models in study.networks.items()}
    described = {f"label_{method}": side_label(study.args, method) for method in settings}
    described |= {"samples": len(study.images), "data": study.data_path, "other_images": study.other_images,
                  "untrained": study.args.untrained, "settings": json.dumps(settings)}
    arrays = arrays | {key: np.array(value) for key, value in described.items()}
    path = figure_folder(study.args) / f"{name}.npz"
    write_atomically(path, lambda file: np.savez_compressed(file, **arrays))
    print(f"wrote {path}")
    return arrays


def report(args, name, arrays, claims, plot):
    """Prints `claims(arrays)` by both estimators and writes the figure `plot(arrays)`, <out>/<name>.png.

    Verdicts are for checkpoints of this study; networks of others get the same numbers under their labels.
    """
    settings = json.loads(str(arrays["settings"]))
    networks = [(method, s) for method, side in settings.items() for s in side]
    ours = all("preset" in s and s["method"] == method for method, s in networks)
    labels = {method: str(arrays[f"label_{method}"]) for method in settings}
    shown, rest = ("debiased", "biased") if args.debiased else ("biased", "debiased")
    print(f"{shown} CKA: mean +- spread over n pairs or networks [standard error over images, where known]")
    if ours and not labels.items() <= NAMES.items():
        print("in the claims, " + " and ".join(f"{NAMES[m]} is {label}" for m, label in labels.items()))
    means = []
    for claim, same in zip(judge(claims, arrays, args.debiased), judge(claims, arrays, not args.debiased)):
        numbers = f"{', '.join(map(str, claim.quantities))} (n = {claim.quantities[0].values.size})"
        means.append(" ".join([claim.id, *(f"{quantity.values.mean():.3f}" for quantity in same.quantities)]))
        if ours:
            print(f"{claim.id} {claim.text} | {numbers} | {claim.verdict()}")
            means[-1] += "" if same.verdict() == claim.verdict() else f" {same.verdict().upper()}"
        else:
            print(claim.id, re.sub("(?i)simclr|supervised", lambda word: labels[word[0].lower()], numbers))
    print(f"{rest} CKA: {', '.join(means)}")
    if ours and (arrays["data"] == "synthetic" or any(s["preset"] == "demo" for _, s in networks)):
        print("networks of the demo or synthetic images: the verdicts mean nothing")
    if arrays["samples"] < 500 and not args.debiased:
        key = next(key for key in arrays if f"{key}_debiased" in arrays)
        biased, debiased = arrays[key].mean(), arrays[f"{key}_debiased"].mean()
        warn(f"{arrays['samples']} images are few: biased CKA nears 1 whatever the networks, here "
             f"{biased:.2f} on average, debiased {debiased:.2f}; give --debiased, or more images")
    path = figure_folder(args) / f"{name}.png"
    with plt.rc_context({"text.parse_math": False}):  # a $ in a label is a $
        figure = plot(one_estimator(arrays, args.debiased))
        write_atomically(path, lambda file: figure.savefig(file, dpi=150, format="png", bbox_inches="tight"))
    plt.close(figure)
    print(f"drew {path} ({arrays['samples']} test images, {shown} CKA)")


def replot(args, name, claims, plot):
    """`report` of the .npz in --out; no network is needed."""
    path = figure_folder(args) / f"{name}.npz"
    if args.samples:
        raise UserError("--replot draws what the .npz holds; leave out --samples")
    try:
        with np.load(path, allow_pickle=False) as saved:
            arrays = dict(saved)
        report(args, name, arrays, claims, plot)
    except FileNotFoundError:
        raise UserError(f"--replot: no {path}; give the folder of {name}.npz with --out") from None
    except UserError:
        raise
    except Exception as error:  # damaged files fail in many ways
        reason = f"{type(error).__name__} {error}"[:120]
        raise UserError(f"--replot: {path} is damaged or of another version ({reason}); draw anew") from None


def new_figure(arrays, title, panels, widths=None):
    """A figure and its row of `panels` axes, of the size all figures share; the title names other images."""
    size = 4.6 * panels, 4.6
    figure, axes = plt.subplots(1, panels, figsize=size, layout="constrained", width_ratios=widths)
    images = f"; images of {Path(str(arrays['data'])).name}" if arrays["other_images"] else ""
    figure.suptitle(title + images)
    return figure, axes


def cka_heatmaps(axes, matrices, titles, xlabel, ylabel, debiased):
    """CKA matrices side by side, first layer at the lower left, colours from 0 to 1, one colour bar."""
    for ax, matrix, title in zip(axes, matrices, titles):
        image = ax.imshow(matrix, origin="lower", vmin=0, vmax=1, cmap="magma")
        ax.set(title=title, xlabel=xlabel, ylabel=ylabel)
        mark_block_groups(ax, len(matrix), both=True)
    label = "debiased linear CKA" if debiased else "linear CKA"
    ax.figure.colorbar(image, ax=axes, label=label, shrink=0.8, pad=0.01)


def depth_lines(ax, values, color, label, marker="o"):
    """Mean over networks or pairs of values (S, layers) against depth, in a band of one deviation."""
    mean, spread, depth = values.mean(0), values.std(0), np.arange(values.shape[1])
    ax.plot(depth, mean, color=color, label=label, marker=marker, markersize=3)
    ax.fill_between(depth, mean - spread, mean + spread, color=color, alpha=0.25, linewidth=0)


def mark_block_groups(ax, layers, both=False):
    """Ticks and lines for BG1 to BG4, and a head of 3, on x or both axes of 16, 19, 32 or 35 layers."""
    counts = [layers // 16 * blocks for blocks in BLOCK_GROUPS] + [3]
    ends = np.cumsum(counts)[:5 if layers % 16 else 4]
    centres = ends - np.array(counts[:len(ends)]) / 2 - 0.5
    labels = ["BG1", "BG2", "BG3", "BG4", "Head"][:len(ends)]
    ax.tick_params(length=0)
    for axis, line in ((ax.xaxis, ax.axvline), (ax.yaxis, ax.axhline))[:2 if both else 1]:
        axis.set_ticks(centres, labels)
        for end in ends[:-1]:
            line(end - 0.5, color="white" if both else "lightgray", linewidth=0.8, zorder=1)
