"""Shared parts of the study, in this order:

1. Errors, files, device, command line
2. Data: CIFAR-10, image folders, a synthetic set; all images uint8 on the device
3. Augmentation on the device: every image with its own random parameters
4. ResNet-50, its 32 representations, the projection head
5. LARS, InfoNCE, several processes
6. Checkpoints
7. Training: what the scripts have around their loops
8. Linear CKA (a block to copy into other projects)
9. Figures: command line, sources, findings, drawing

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
import zipfile
from collections import namedtuple
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
import torch.distributed as dist
import torchvision
from matplotlib.figure import Figure
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as recompute_activations

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
    code = 2
    with contextlib.suppress(AttributeError):  # a stdout that is no file
        sys.stdout.reconfigure(errors="backslashreplace")  # so that any file's name can be printed
    try:
        with explained("these flags: lower --batch-size (in training --micro-batch), --samples or --subset"):
            yield
        print(end="", flush=True)
        return
    except SystemExit as stop:
        code = stop.code
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:  # the reader of our output went away: nothing left to say
        code = 1
    except (UserError, OSError) as error:  # a folder taken away, say: the machine's trouble, not the code's
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
    except Exception:
        if world_size() == 1:
            raise
        traceback.print_exc()
    try:
        print(end="", flush=True)
    except OSError:  # nor must what could not be written be written again on leaving
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if world_size() > 1:  # at once, as tidying up would wait for kernels that never finish
        os._exit(code)
    sys.exit(code)


@contextlib.contextmanager
def explained(what, *kinds):
    """Errors of the `kinds` become UserError "what: reason", and a lack of memory one that names `what`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # below are the words of Python, the system, a GPU and oneDNN
        if re.search("(?i)memoryerror|(out of|not enough|allocate|create a) memory|cpuallocator|bad_alloc|"
                     "create a primitive|alloc_failed|new thread", repr(error)):
            raise UserError(f"out of memory with {what}") from None
        if not isinstance(error, kinds):
            raise
        raise UserError(f"{what}: {str(error).split('. ')[0][:250]}") from None


def warn(text):
    """One line on stderr."""
    print("warning: " + text, file=sys.stderr)


def write_atomically(path, write):
    """What `write(file)` writes becomes the file `path`: the old or the new is there, never half."""
    buffer = io.BytesIO()  # writing to the disk itself, torch.save would hide that it is full
    write(buffer)
    temporary = Path(f"{path}.{platform.node()}-{os.getpid()}.tmp")  # two processes must not share one
    try:
        with explained(f"{path} is not written, what was there before is kept", OSError):
            with open(temporary, "wb") as file:
                file.write(buffer.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class Parser(argparse.ArgumentParser):
    """argparse with errors on one line and the module docstring kept as written."""

    def __init__(self, doc, **options):
        super().__init__(description=doc, usage="%(prog)s [flags]", allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message):
        raise UserError(f"{message} (see {self.prog} --help)")


def number(kind, low=0, above=-math.inf, most=1e30):
    """An argparse type: an int or float, at least `low`, above `above` and at most `most`."""
    def parse(text):
        with contextlib.suppress(ValueError):
            value = kind(text)
            if low <= value <= most and value > above:
                return value
        what = "a whole number" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"{text} is not {what} {'above' if above == low else 'from'} {low}"
                                         f"{f' to {most:,}' if most < 1e30 else ' on'}")

    return parse


def pick_device(name=None):
    """torch.device for a name such as "cpu" or "cuda:1"; None: cuda, else mps, else cpu. Raises UserError."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    with explained(f"--device {name}, where cpu, cuda, cuda:N or mps is expected", Exception):
        device = torch.device(name)
        torch.empty(1, device=device).add_(1).item()
    torch.set_flush_denormal(True)  # denormal gradients behind a zero gamma slow some CPUs by a fifth
    return device


def generator_for(device, *key):
    """torch.Generator on `device`, seeded by the key alone (numbers, strings), never by what ran before."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "big") >> 1)


def writable_folder(folder):
    """Path of `folder`, `~` expanded, created if needed; UserError if nothing can be written there."""
    folder = Path(os.path.expanduser(folder))
    with explained(f"--out {folder}", OSError):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    return folder


# ============================================================================================================
# 2. Data
# ============================================================================================================
# What every script reads: `load_data` gives the training and test images of CIFAR-10, of a folder or of a
# synthetic set, whole and on the device. Nothing is guessed: a folder laid out in another way is refused.

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # what published ResNet-50s expect
LAYOUT = ("expected train/<class>/ and test/<class>/ with images; or cifar-10-python.tar.gz, which "
          "--download fetches into an empty or new folder; or --data synthetic")
SYNTHETIC_CLASSES = [f"{texture} {shape}" for shape in ("disc", "flower")
                     for texture in ("plain", "upright striped", "level striped", "checked", "ringed")]
# Images uint8 (n, 3, h, w) and labels int64 (n,), all on one device; class names in the order of the labels.
Data = namedtuple("Data", "train_images train_labels test_images test_labels classes")


def load_data(path, device, download=False):
    """`Data` of a folder with CIFAR-10 or `train/<class>/` and `test/<class>/` images, or of "synthetic".

    CIFAR-10 is unpacked and checked, and fetched into the folder `data` and, with `download`, into any other,
    but only where nothing else lies. UserError for what is missing, unreadable or laid out in another way.
    """
    folder, cifar = Path(os.path.expanduser(path)), torchvision.datasets.CIFAR10
    with explained(f"--data {path} (for memory: fewer or smaller images, or --device cpu)", OSError):
        synthetic = str(path) == "synthetic"
        found = [] if synthetic or not folder.exists() else sorted(os.listdir(folder))
        found = [name for name in found if name[0] != "."]
        if synthetic:
            data = *synthetic_images(4000, seed=1), *synthetic_images(500, seed=2), SYNTHETIC_CLASSES
        elif {"train", "test"} <= set(found):
            data = _load_image_folder(folder)
        else:
            wanted = download or os.path.abspath(folder) == os.path.abspath("data")
            fetch = wanted and set(found) <= {cifar.base_folder, cifar.filename}
            unpack = torchvision.datasets.utils.check_integrity(folder / cifar.filename, cifar.tgz_md5)
            there = f"found {first_names(found) or 'nothing'}" if folder.exists() else "no such folder"
            with explained(f"--data {path}: {there}; {LAYOUT}", Exception):
                sets = [cifar(folder, train=train, download=fetch or unpack) for train in (True, False)]
            images = [torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous() for part in sets]
            labels = [torch.tensor(part.targets) for part in sets]
            data = images[0], labels[0], images[1], labels[1], sets[0].classes
        return Data(*(t.to(device) for t in data[:4]), data[4])


def channel_statistics(images):
    """Mean and standard deviation per channel (two tuples of 3 floats) of uint8 (n, 3, h, w), in [0, 1]."""
    counts = [torch.bincount(c.flatten(), minlength=256).cpu().double() for c in images.unbind(1)]
    levels = torch.arange(256, dtype=torch.float64) / 255
    means = [float((c * levels).sum() / c.sum()) for c in counts]
    stds = [float(((c * (levels - m) ** 2).sum() / c.sum()).sqrt()) for c, m in zip(counts, means)]
    return tuple(means), tuple(max(s, 1e-6) for s in stds)  # a channel of one value must not divide by zero


def _load_image_folder(folder):
    """What `Data` holds, of `train/<class>/*` and `test/<class>/*`; labels number the sorted class names."""
    parts, class_of = [(folder / part).resolve() for part in ("train", "test")], {}
    for entry in (entry for part in parts for entry in sorted(part.iterdir())):
        class_of |= dict.fromkeys(_files_below(entry, parts), entry.name if entry.is_dir() else "")
    classes, endings = sorted({*class_of.values()} - {""}), torchvision.datasets.folder.IMG_EXTENSIONS
    files = [f for f in class_of if class_of[f] and f.suffix.lower() in endings and not f.is_dir()]
    left_out = [str(file) for file in class_of.keys() - files if not file.is_dir()]
    about = f"; {len(left_out)} files left out, in no class or named otherwise than {' '.join(endings)}: "
    about = f"--data {folder}" + (about + first_names(sorted(left_out), most=1) if left_out else "")
    n = sum(file.is_relative_to(parts[0]) for file in files)
    for part in (files[:n], files[n:]):
        missing = set(classes) - {class_of[file] for file in part}
        if missing or not part:
            raise UserError(f"{about}; train and test need images of each class, one has none of "
                            f"{first_names(sorted(missing)) or 'any'}; {LAYOUT}")
    if left_out:
        warn(about)
    labels = torch.tensor([classes.index(class_of[file]) for file in files])
    images = torch.empty(len(files), *_decode(files[0]).shape, dtype=torch.uint8)
    for i, image in enumerate(map(_decode, files)):  # one by one: Pillow's threads only wait for each other
        if image.shape != images.shape[1:]:
            raise UserError(f"{files[i]}: height and width {tuple(image.shape[1:])}, others "
                            f"{tuple(images.shape[2:])}; all must have the same size")
        images[i] = image
        if i % 500 == 0:
            say(f"reading image {i:,} of {len(files):,}", rewritten=True)
    return images[:n], labels[:n], images[n:], labels[n:], classes


def _files_below(path, known):
    """Files and empty folders at or below a path, sorted; not what is hidden or links to `known` folders."""
    if path.name.startswith(".") or path.name == "__MACOSX":
        return []
    real = path.resolve()  # a link must not lead into or around what is being read
    if path.is_symlink() and any(real.is_relative_to(k) or k.is_relative_to(real) for k in known):
        return []
    if not path.is_dir():
        return [path]
    below = [file for entry in sorted(path.iterdir()) for file in _files_below(entry, [*known, real])]
    return below or [path]


def _decode(file):
    """uint8 (3, h, w) of an image file as Pillow converts it: not turned by EXIF, the first of its pages.

    UserError for gray of more than 8 bits and floating-point pixels, which Pillow would clip.
    """
    with explained(f"image {file}", Exception):
        with torchvision.datasets.folder.Image.open(file) as image:  # Pillow, which torchvision needs
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"more than 8 bits (Pillow's mode {image.mode}); save it with 8")
            return torchvision.transforms.functional.pil_to_tensor(image.convert("RGB"))


def synthetic_images(n, seed):
    """Images uint8 (n, 3, 32, 32), labels int64 (n,) of `SYNTHETIC_CLASSES`: textures of random colours."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (n,), generator=g)
    left, top, radius, turn = torch.rand(4, n, 1, 1, generator=g)
    x, y = torch.arange(32.0) - 12 - 8 * left, torch.arange(32.0).view(32, 1) - 12 - 8 * top
    x, y = torch.broadcast_tensors(x, y)  # (n, 32, 32): from the centre of the shape, in pixels
    distance, petals = torch.hypot(x, y), torch.cos(4 * torch.atan2(y, x) + 2 * math.pi * turn)
    edge = (9 + 4 * radius) * (1 + 0.4 * petals * (labels >= 5).view(n, 1, 1))
    upright, level, ringed = (w % 6 < 3 for w in (x, y, distance))
    textures = torch.stack([torch.zeros_like(ringed), upright, level, upright ^ level, ringed], 1)
    dark = textures[torch.arange(n), labels % 5]
    back, front = torch.rand(2, n, 3, 1, 1, generator=g)
    shape = torch.where(dark[:, None], 1 - front, front)
    images = torch.lerp(back, shape, (edge - distance).clamp(0, 1)[:, None])
    images += 0.06 * torch.randn(n, 3, 32, 32, generator=g)
    return (images.clamp(0, 1) * 255).round().to(torch.uint8), labels


# ============================================================================================================
# 3. Augmentation on the device
# ============================================================================================================
# What training and Figures 3 and 5 do to images, each with its own random parameters. These are drawn for a
# whole batch (dicts of tensors whose first dimension is the image) and can be sliced, so that micro-batches
# and ranks see what one process with one batch would see.


def draw_params(n, height, width, device, generator=None, strength=1.0):
    """What is random in the augmentation of n images; `imagenet_augment` uses "box" and "flip" only.

    "box": int64 (n, 4) top, left, height, width, as torchvision's RandomResizedCrop: area uniform in 8 to
    100 %, log aspect uniform between 3/4 and 4/3, the first of ten attempts that fits, else the largest
    centred box of such an aspect. "factors" (n, 4): brightness, contrast, saturation in 1 +- 0.8 strength,
    hue in +- 0.2 strength (turns); "order" (n, 4) of these four; "sigma" (n,) of the blur: uniform in
    [0.1, 2] pixels (SimCLR App. A). "flip", "jitter", "gray", "blur": bool (n,), p = 0.5, 0.8, 0.2, 0.5.
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
    factors = torch.rand(n, 4, device=device, generator=generator)
    low, high = max(0.0, 1 - 0.8 * strength), 1 + 0.8 * strength
    factors[:, :3].mul_(high - low).add_(low)
    factors[:, 3].mul_(0.4 * strength).sub_(0.2 * strength)
    order = torch.rand(n, 4, device=device, generator=generator).argsort(1)
    jitter, gray, blur, sigma = torch.rand(4, n, device=device, generator=generator)
    return {"box": torch.stack([top, left, h, w], 1).long(), "flip": flip < 0.5, "factors": factors,
            "order": order, "jitter": jitter < 0.8, "gray": gray < 0.2, "blur": blur < 0.5,
            "sigma": 0.1 + 1.9 * sigma}


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


def imagenet_augment(images, size, params):
    """Crop, resize and flip (footnote 3): uint8 (n, 3, h, w) -> float32 (n, 3, size, size) in [0, 1]."""
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


def simclr_augment(images, size, params, blur=True, jitter=color_jitter):
    """SimCLR's training views: uint8 (n, 3, h, w) -> float32 (n, 3, size, size) in [0, 1].

    Crop, flip, colour jitter, gray and, if `blur`, Gaussian blur with a kernel of size // 10 pixels, made odd
    (SimCLR App. A), by torchvision's definitions without its rounding to uint8. `jitter`: what torch.compile
    made of `color_jitter`, say.
    """
    n = max(4, 2 ** 18 // (3 * size * size))
    if images.device.type == "cpu" and len(images) > n:  # twice as fast on pieces that fit a CPU's cache
        pieces = [slice(start, start + n) for start in range(0, len(images), n)]
        return torch.cat([simclr_augment(images[piece], size, slice_params(params, piece), blur, jitter)
                          for piece in pieces])
    x = jitter(imagenet_augment(images, size, params), params)
    x = torch.where(params["gray"].view(-1, 1, 1, 1), _luma(x), x)
    kernel_size = size // 10 // 2 * 2 + 1
    if blur and kernel_size > 1:
        matrix = _blur_matrix(size, kernel_size, params["sigma"], params["blur"])
        x = _separable(x, matrix, matrix)
    return x


def resize(images, size):
    """Test images, whole: uint8 (n, 3, h, w) -> float32 (n, 3, size, size) in [0, 1]."""
    return F.interpolate(images.float().div_(255), (size, size), mode="bilinear", antialias=True)


def standardise(x, mean, std):
    """Each channel of x minus its mean, over its deviation, in place: what supervised networks see."""
    for channel, (m, s) in enumerate(zip(mean, std)):  # plain numbers: a tensor of them would wait
        x[:, channel].sub_(m).div_(s)
    return x


# ============================================================================================================
# 4. ResNet-50, its representations, the projection head
# ============================================================================================================
# `build_model` makes the networks that the training scripts train and the checkpoints fill; the figures read
# every layer through `stream_representations`, one at a time, and other projects through `representations`.

BLOCK_GROUPS = (3, 4, 6, 3)  # bottlenecks per block group, Table 1
LAYERS = [f"BG{g}.{b}.{kind}" for g, count in enumerate(BLOCK_GROUPS, 1) for b in range(1, count + 1)
          for kind in ("odd", "even")]
HEAD = ["head.1", "head.2", "head.3"]


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


def representations(model, images):
    """Every representation of `images` (n, 3, h, w): a dict in depth order, from layer name to (n, p) tensor.

    `LAYERS`, odd ones after bn3 before the addition, even ones after the block's last ReLU (App. A.1); then
    `HEAD`, the layers of a `ProjectionHead`. In the model's own mode.
    TypeError for a network that is not torchvision's ResNet-50, or whose class changes what that computes.
    """
    return {name: x.flatten(1) for name, x in stream_representations(model, images)}


def stream_representations(model, images):
    """`representations` one by one, not flattened: (name, tensor) pairs, in memory for two blocks, not 16.

    It keeps neither the images nor what was taken. Do not change the tensors: the network reads them later.
    """
    groups = [getattr(model, f"layer{g}", None) for g in range(1, 5)]
    blocks = [block for group in groups if isinstance(group, nn.Sequential) for block in group]
    resnet, bottleneck = torchvision.models.ResNet, torchvision.models.resnet.Bottleneck
    steps = [(model, getattr(resnet, name)) for name in ("forward", "_forward_impl")]
    steps += [(group, nn.Sequential.forward) for group in groups]
    steps += [(block, bottleneck.forward) for block in blocks]
    own = any(getattr(getattr(module, step.__name__, None), "__func__", None) is not step
              for module, step in steps)
    if own or tuple(map(len, groups)) != BLOCK_GROUPS or model._forward_pre_hooks:
        raise TypeError(f"representations() needs torchvision's ResNet-50, not {type(model).__name__}: not "
                        "wrapped, with no forward of its own and no hook before it")

    def keep_odd(module, inputs, output):  # a copy: torchvision adds the identity to it afterwards
        odd.append(output.clone())

    odd, names = [], iter(LAYERS + HEAD)
    with torch.no_grad():  # never around a yield: the caller would compute without gradients too
        x = model.maxpool(model.relu(model.bn1(model.conv1(images))))
    del images
    for block in blocks:
        with torch.no_grad(), block.bn3.register_forward_hook(keep_odd):
            x = block(x)
        yield next(names), odd.pop()
        yield next(names), x
    if isinstance(model.fc, ProjectionHead):
        x = model.avgpool(x).flatten(1)
        for layer in model.fc.layers:
            with torch.no_grad():
                x = layer(x)
            yield next(names), x


# ============================================================================================================
# 5. LARS, InfoNCE, several processes
# ============================================================================================================
# What a training step needs beside the network: the optimizer of both scripts and the factor of its rate;
# SimCLR's loss, among the views of all processes; what these know of one another and do in step. Without
# torchrun there is one process, rank 0 of 1.


class LARS(torch.optim.Optimizer):
    """SimCLR's LARS (google-research/simclr, lars_optimizer.py): the rate is inside the momentum buffer.

        g <- gradient + weight_decay w;   t = eta |w| / |g|, or 1 if either norm is 0
        v <- momentum v + (lr t) g;       w <- w - v

    1-d parameters (of batch norm, and biases) get neither weight decay nor adaptation (t = 1).
    """

    def __init__(self, params, lr, momentum=0.9, weight_decay=0.0, eta=0.001):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, eta=eta))

    def add_param_group(self, param_group):
        """Adds parameters, with momenta of zero; `__init__` calls it too."""
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            self.state[p]["momentum_buffer"] = torch.zeros_like(p)

    @torch.no_grad()
    def step(self):
        """One update of all parameters that have a gradient, by list operations, without waiting."""
        for group in self.param_groups:
            for adapted in (True, False):
                weights = [p for p in group["params"] if p.grad is not None and (p.ndim > 1) == adapted]
                if not weights:  # which list operations refuse
                    continue
                gradients = [p.grad for p in weights]
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


def info_nce_and_accuracy(z1, z2, temperature):
    """InfoNCE, Eq. (1), averaged over the 2N anchors, and the share of these whose partner is nearest.

    z1, z2 (N, d): row i of each is a view of image i. Both results are 0-d float32, the loss ln(2N - 1) for
    equal views. One of several processes gives its share of the rows, and gets the loss of all; the mean over
    the processes of their gradients is that of one process with the whole batch.
    """
    with torch.autocast(z1.device.type, enabled=False):
        views = torch.cat([_gather(F.normalize(z.float(), dim=1)) for z in (z1, z2)])  # (2N, d)
        logits = (views @ views.T / temperature).fill_diagonal_(-math.inf)
        partner = torch.arange(len(views), device=views.device).roll(len(views) // 2)
        loss = F.cross_entropy(logits, partner)
        # Each process has the gradient of its own rows only: times their number, to make up for the mean.
        loss = loss + (world_size() - 1) * (loss - loss.detach())
        return loss, (logits.argmax(1) == partner).float().mean()


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
    error = None
    if rank() == 0:
        try:
            result = work()
        except UserError as caught:
            error = caught
    if sum_over_ranks(torch.tensor(int(error is not None))):  # on the CPU, so by gloo
        raise error or SystemExit(2)
    return result if rank() == 0 else work()


def _gather(rows):
    """The rows of all processes, of which this one's have a gradient."""
    if world_size() == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(world_size())]
    dist.all_gather(parts, rows.detach().contiguous())
    parts[rank()] = rows
    return torch.cat(parts)


@contextlib.contextmanager
def distributed(device_name):
    """Joins the processes that torchrun started, if it did; yields this process's device."""
    if not {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        yield pick_device(device_name)  # a LOCAL_RANK alone is some other program's leftover
        return
    if device_name in (None, "cuda") and torch.cuda.is_available():
        device_name = f"cuda:{os.environ['LOCAL_RANK']}"
    device = pick_device(device_name or "cpu")  # not mps, where processes cannot talk
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    with explained("cannot join torchrun's processes; if there are none, unset RANK", Exception):
        dist.init_process_group(backend, timeout=timedelta(hours=2))  # rank 0 may download first
    yield device
    dist.destroy_process_group()  # after success only: without a lost rank, kernels never finish


# ============================================================================================================
# 6. Checkpoints
# ============================================================================================================
# The training scripts write and resume from their own files; the figures read those and other projects'. All
# are read with weights_only: they can hold tensors, numbers, texts, lists and dicts, and nothing is run.


def read_file(path):
    """What torch.save wrote into a file of plain values; nothing in it is executed. UserError for others."""
    try:
        with explained(path, OSError), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about what a foreign file is; the error below says it
            content = torch.load(path, map_location="cpu", weights_only=True)
            if zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip():  # which torch.load does not ask
                raise ValueError("checksum")
            return content
    except UserError:
        raise
    except Exception as error:  # damaged files fail in many ways
        code = re.search(r"GLOBAL ([\w.]+)|(TorchScript)", str(error))
        what = f"{code[1] or code[2]} in it could run code" if code else "damaged or not by torch.save"
        if "Unsupported operand" in str(error):
            what += " with the usual pickle_protocol"
        raise UserError(f'{path}: {what}; expected: torch.save(model.state_dict(), "weights.pt"), or from '
                        'safetensors torch.save(safetensors.torch.load_file(FILE), "weights.pt")') from None


def is_checkpoint(content):
    """True for what the training scripts write, in this version or an earlier one."""
    parts = {"settings", "epoch", "step", "backbone", "head"}
    needed = {"method", "seed", "data", "classes", "stem", "image_size", "mean", "std", "precision"}
    settings = isinstance(content, dict) and parts <= content.keys() and content["settings"]
    return isinstance(settings, dict) and needed <= settings.keys()


def load_weights(model, checkpoint, path, assign=False):
    """Copies (or with `assign` puts) a checkpoint's backbone and head into `model`, or raises UserError."""
    with explained(f"{path}: its weights do not fit", RuntimeError, AttributeError, TypeError):
        weights = checkpoint["backbone"] | {f"fc.{name}": value for name, value in checkpoint["head"].items()}
        model.load_state_dict(weights, assign=assign)


def load_model(path, device="cpu", method=None, image_size=None, mean=None, std=None, prefix=None,
               stem_padding=None):
    """The network in a checkpoint of ours or in another project's file, in float32 and eval mode on `device`.

    `model.settings` is the dict of its settings, and "epoch" the epochs behind it. For another project's file
    they follow from the arguments: `method`, whose augmentation it gets in Figures 3 and 5 ("supervised"),
    `image_size` (224, or 32 for a 3 x 3 stem), `mean` and `std` (ImageNet's), `stem_padding` (1), `prefix` as
    `find_backbone` says. UserError for a file that does not fit or holds values that are not finite.
    """
    content = read_file(path)
    if is_checkpoint(content):
        settings = content["settings"] | {"epoch": content["epoch"]}
    elif isinstance(content, dict) and {"backbone", "settings"} <= content.keys():
        raise UserError(f"{path}: a checkpoint that lacks some of its settings; torch.save its \"backbone\" "
                        "alone to use it as a state dict")
    else:
        weights, prefix, left_out = find_backbone(content, path, prefix)
        content = {"backbone": weights, "head": {}}
        small, padding = weights["conv1.weight"].shape[-1] == 3, stem_padding or 1
        settings = {
            "method": method or "supervised", "seed": None, "data": None, "classes": [],
            "stem": "cifar" if small else "imagenet", "stem_padding": padding, "standardise": True,
            "image_size": image_size or (32 if small else 224), "mean": list(mean or IMAGENET_MEAN),
            "std": list(std or IMAGENET_STD), "strength": 0.5 if small else 1.0, "blur": not small,
            "file": Path(path).name, "prefix": prefix, "left_out": left_out}
        stem = f"3 x 3, --stem-padding {padding}, no max-pool" if small else "7 x 7, padding 3, max-pool"
        settings["note"] = (f"took the network at prefix '{prefix}'; assumed: stem {stem}, "
                            f"--mean {settings['mean']}, --std {settings['std']}")
    with torch.device("meta"):  # no time spent on initial weights
        model = build_model(settings["method"], settings["stem"], max(1, len(settings["classes"])),
                            stem_padding=settings.get("stem_padding", 1))
    if not content["head"]:
        model.fc = nn.Identity()
    with explained(path, RuntimeError, NotImplementedError):  # sparse tensors, say
        load_weights(model, content, path, assign=True)
        model.to(torch.float32, memory_format=torch.channels_last).eval()
        broken = [name for name, value in model.state_dict().items() if "num_batches" not in name
                  and not (value.is_floating_point() and value.isfinite().all())]
        if broken:
            raise UserError(f"{path}: integers, NaN or infinity in {first_names(broken)}; take another file")
        model.settings = settings
        return model.to(device)


def load_any_model(path, method, device="cpu", image_size=None, mean=None, std=None):
    """`load_model` with the arguments that a file of another project needs first, for use in other code."""
    return load_model(path, device, method, image_size, mean, std)


def find_backbone(content, path, prefix=None):
    """({torchvision's name: tensor}, prefix, names left out) of the one ResNet-50 in what a file holds.

    Its names may follow any prefix, in dicts in dicts, and be numbered by nn.Sequential. Of several that
    differ the one at `prefix` is taken, or the only one that is not of second choice: what stands beside a
    teacher, a query encoder, an online network. UserError if none is whole, with what the nearest lacks or
    has besides, and if several are left.
    """
    wrappers = r"(?<=layer\d)\._\w+|(?<=layer\d\.\d)\._\w+"  # layer1._orig_mod.0, of torch.compile
    tensors, whole = {re.sub(wrappers, "", name): tensor for name, tensor in _tensors(content)}, {}
    faults = [(math.inf, f"found {first_names(list(tensors)) or 'no tensors'}")]
    with torch.device("meta"):
        wanted = dict(list(torchvision.models.resnet50().state_dict().items())[:-2])  # the last two are fc's
    pattern = r"^((?:.*\.)?)(?:layer1|([234]))\.0\.conv1\.weight$"  # a number if names are nn.Sequential's
    for start, layer1 in re.findall(pattern, "\n".join(tensors), re.MULTILINE):
        numbers = {"conv1": "0", "bn1": "1"} | {f"layer{g + 1}": str(int(layer1 or 0) + g) for g in range(4)}
        network, others = {}, dict(tensors)
        for name in wanted:
            top, rest = name.split(".", 1)
            there = f"{start}{numbers[top] if layer1 else top}.{rest}"
            if there not in tensors:
                there = there.replace("downsample", "shortcut")
            if there in tensors:
                network[name] = others.pop(there)
        wrong = [name for name, tensor in wanted.items() if "num_batches" not in name
                 and getattr(network.get(name), "shape", None) not in (tensor.shape, (64, 3, 3, 3))]
        besides = rf"{re.escape(start)}(conv\d|bn\d|layer\d|stem|[2-{int(layer1 or 4) + 3}]\.\d)"
        wrong += [name for name in others if re.match(besides, name)  # the rest is a head, and thop's counts
                  and not name.endswith(("total_ops", "total_params"))]
        faults.append((len(wrong), f"missing, of another shape or too many: {first_names(wrong)}"))
        if not wrong:
            whole[start] = network, start, list(others)
    if not whole:
        raise UserError(f"{path}: expected the tensors of a whole torchvision ResNet-50; {min(faults)[1]}")
    second_choice = {"student", "k", "key", "target", "momentum", "ema"}
    chosen = [p for p in whole if not second_choice & set(re.split(r"[._]", p.lower()))] or list(whole)
    if prefix is not None:
        chosen = [p for p in whole if p.strip(".") == prefix.strip(".")]
    first, *rest = [whole[p][0] for p in chosen] or [{}]
    if not chosen or any(not torch.equal(first[n], other[n]) for other in rest for n in first.keys() & other):
        raise UserError(f"{path}: choose a ResNet-50 with --prefix: {first_names([repr(p) for p in whole])}")
    return whole[chosen[0]]


def _tensors(value, where=""):
    """(name, tensor) of every tensor in dicts and lists in one another; a name is all keys on the way."""
    if isinstance(value, torch.Tensor):
        yield where[1:], value
    elif isinstance(value, (dict, list, tuple)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _tensors(item, f"{where}.{key}")


def first_names(names, most=5):
    """The first names of a list, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


# ============================================================================================================
# 7. Training
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
    count, positive, side = number(int, low=1), number(float), number(int, low=8, most=4096)
    group = parser.add_argument_group("what is trained")
    add("--data", "folder of CIFAR-10, which is fetched into the folder data if missing, or of "
        "train/<class>/ and test/<class>/ images, or synthetic")
    add("--download", "fetch CIFAR-10 into --data, if that is empty or new", action="store_true")
    seed = number(int, most=2 ** 64)
    add("--seeds", "one network per seed, one after another (App. A: 3)", type=seed, nargs="+")
    add("--epochs", "passes over the training images (App. A)", type=number(int, low=1, most=10 ** 6))
    add("--lr", "learning rate per 256 images: the peak is lr * batch-size / 256", type=positive)
    add("--weight-decay", "L2 factor; batch norm and biases are exempt", type=positive)
    add("--warmup-epochs", "epochs of linear warmup (App. A); of a preset's at most half the --epochs",
        type=positive)
    if parser.get_default("temperature"):
        add("--temperature", "tau of Eq. (1)", type=number(float, above=0))
    add("--stem", "7x7 stride 2 and max-pool, or 3x3 stride 1 (SimCLR B.9)", choices=("imagenet", "cifar"))
    group = parser.add_argument_group("size and memory")
    add("--image-size", "pixels, of training and test (footnote 3: 224; B.9: 32)", type=side)
    add("--subset", "training images used, a fixed random choice; without it all", type=count)
    add("--batch-size", "images per step, over all processes (App. A)", type=count)
    add("--micro-batch", "images per forward and backward, per process: lower it to save memory", type=count)
    add("--checkpoint-activations", "save memory by computing activations twice, the batch in one piece",
        action="store_true")
    group = parser.add_argument_group("where and how")
    add("--out", "folder for checkpoints and logs")
    add("--checkpoint-every", "epochs between checkpoints", type=count)
    add("--device", "cpu, cuda, cuda:N or mps; without it cuda, else mps, else cpu")
    add("--precision", "of products; without it bfloat16 where hardware has it",
        choices=("float32", "bfloat16"))
    add("--compile", "torch.compile network and colour augmentation; not tried on a GPU", action="store_true")
    args = parser.parse_args(argv)
    given = {word.split("=")[0] for word in argv}
    if args.warmup_epochs > args.epochs and "--warmup-epochs" not in given:
        args.warmup_epochs = args.epochs / 2  # the preset's warmup must leave room in a run made shorter
    if args.checkpoint_activations and "--micro-batch" not in given:
        args.micro_batch = args.batch_size  # the whole batch in one piece is what it is for
    return args


def has_bf16(device):
    """True if `device` multiplies bfloat16 in hardware, so that it is faster than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return "bfloat16" in precisions(device)


def run_settings(args, method, seed, data, device):
    """A dict of plain types: all that a run's result depends on. UserError for what cannot be trained."""
    total, processes, batch_size = len(data.train_images), world_size(), args.batch_size
    n, local, micro_batch = args.subset or total, batch_size // processes, min(args.micro_batch, batch_size)
    last = (local % micro_batch or micro_batch) * (2 if method == "simclr" else 1)
    precision = args.precision or ("bfloat16" if has_bf16(device) else "float32")
    no_bf16 = precision == "bfloat16" and device.type == "cuda" and not has_bf16(device)
    # Seen with torch 2.14.1: gradients of BG4's first 3x3 product, with stride 2 on one pixel, are not set.
    one_pixel = (precision, args.stem, device.type) == ("bfloat16", "imagenet", "cpu")
    for wrong, what in (
            (n > total, f"--subset {n}: there are {total} training images; give at most as many"),
            (batch_size > n, f"--batch-size {batch_size}: {n} images are trained on; give at most as many"),
            (batch_size % processes or local < 2 or last < 2, f"--batch-size {batch_size}, --micro-batch "
             f"{micro_batch}: give {processes} processes equal shares, in pieces of 2 images for batch norm"),
            (args.warmup_epochs > args.epochs, f"--warmup-epochs {args.warmup_epochs}: more than --epochs"),
            (args.compile and (processes > 1 or args.checkpoint_activations),
             "--compile: works neither with several processes nor with --checkpoint-activations"),
            (one_pixel and args.image_size < 17, f"--image-size {args.image_size}: on CPUs in bfloat16 "
             "gradients are wrong below 17 px, with the 7x7 stem; give 17 or more, or --precision float32"),
            (no_bf16, f"--precision bfloat16: {device} has none (capability below 8.0); give float32")):
        if wrong:
            raise UserError(what)
    others = {"seeds", "download", "out", "checkpoint_every", "device", "compile"}  # which do not change it
    settings = {name: value for name, value in vars(args).items() if name not in others}
    if args.data != "synthetic":
        settings["data"] = os.path.abspath(os.path.expanduser(args.data))
    mean, std = channel_statistics(data.train_images)
    return settings | {"method": method, "seed": seed, "precision": precision, "micro_batch": micro_batch,
                       "train_images": n, "classes": data.classes, "mean": list(mean), "std": list(std)}


@contextlib.contextmanager
def not_counting(module):
    """For passes that repeat another: batch norm as in training, but its statistics and count stay."""
    before = [(norm, norm.momentum, norm.num_batches_tracked) for norm in module.modules()
              if isinstance(norm, nn.modules.batchnorm._BatchNorm)]
    for norm, _, count in before:
        # not without running statistics, where SyncBatchNorm fails in bf16
        norm.momentum, norm.num_batches_tracked = 0.0, count.clone()
    try:
        yield
    finally:
        for norm, momentum, count in before:
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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch 2.14 has another name for what older ones call so
        # each rank keeps its own running statistics between saves
        return nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)


def average_statistics(model):
    """Batch norm's running statistics averaged over the ranks: every rank and checkpoint has the same."""
    for buffer in model.buffers():
        if buffer.is_floating_point():
            sum_over_ranks(buffer).div_(world_size())


def at_terminal():
    """True if somebody watches stderr; some services have none."""
    return sys.stderr is not None and sys.stderr.isatty()


def say(text, rewritten=False):
    """Rank 0 prints a line on stdout, or a `rewritten` one on stderr, if a terminal: the next replaces it."""
    if rank() == 0 and at_terminal():
        width = min(shutil.get_terminal_size().columns - 1, 300)
        print(f"\r{text[:width] if rewritten else '':{width}}\r", end="", file=sys.stderr, flush=True)
    if rank() == 0 and not rewritten:
        print(text, flush=True)


def show_progress(run):
    """Says once where a run is and what is left, at a terminal every second, by the pace of this epoch."""
    loss, (begin, end) = run.loss.item(), run.ends[run.epoch:run.epoch + 2]
    left, in_all = (timedelta(seconds=round((last - run.step) * run.pace)) for last in (end, run.total_steps))
    say(f"epoch {run.epoch + 1}/{run.epochs} step {run.step - begin} of {end - begin}  loss {loss:.3f}  "
        f"{run.batch_size / run.pace:.0f} images/s  left {left}, in all {in_all}", rewritten=run.shown)
    run.shown, run.due = True, time.perf_counter() + (1 if at_terminal() else math.inf)


class Run:
    """One network in training, from outside its loop: where it is, its files, and what follows every step.

    Killed at any moment and started again on the same device, one process ends in the same bits.
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
        self.sums = torch.zeros(3, device=device)  # losses, accuracies, steps of the current epoch
        self.signals, self.stopped, self.shown, self.due = [], False, False, None

    def prepare(self, model, optimizer):
        """The network as a loop calls it: as in the checkpoint if there is one, wrapped as the flags ask."""
        self.model, self.optimizer, resumed = model.train(), optimizer, ""
        checkpoint = rank0_first(lambda: checkpoint_of_run(self.path, self.settings))
        if checkpoint:
            load_weights(model, checkpoint, self.path)
            damaged = f"{self.path}: its optimizer state or its step is damaged"
            with explained(damaged, LookupError, ValueError, TypeError, AttributeError, RuntimeError):
                optimizer.load_state_dict(checkpoint["optimizer"])
                for p in optimizer.param_groups[0]["params"]:
                    if optimizer.state[p]["momentum_buffer"].shape != p.shape:
                        raise ValueError("a momentum has another shape than its weight")
                self.sums = checkpoint["sums"].to(self.device).view(3)
                self.epoch, self.step = int(checkpoint["epoch"]), int(checkpoint["step"])
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
        chosen = self.subset[stream[first % self.n:][:self.batch_size][self.rows]]
        return chosen.to(self.device, non_blocking=self.device.type == "cuda")  # which copies it first

    def steps(self):
        """The numbers of the epoch's remaining steps; between them it shows progress and heeds signals."""
        first, since, end = self.step, time.perf_counter(), self.ends[self.epoch + 1]
        while self.step < end:
            yield self.step
            self.step += 1
            if self.due is None or self.step == end or time.perf_counter() > self.due:
                self.loss.item()  # waits for the device
            now = time.perf_counter()
            self.pace = (now - since) / (self.step - first)  # seconds per step
            if self.due is None:  # a run's first step loads libraries and compiles: no measure of the rest
                first, since, self.due = self.step, now, now + 5
            elif self.step < end and now > self.due:  # an epoch's end has a line of its own
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
        loss, accuracy, rate = loss / steps, accuracy / steps, self.optimizer.param_groups[0]["lr"]
        self.epoch += 1
        record = {"epoch": self.epoch, "loss": loss, "lr": rate,
                  "images_per_second": self.batch_size / self.pace, "accuracy": accuracy, **measured}
        with explained(f"{self.path.with_suffix('.jsonl')} is not written", OSError):
            self.log.write((json.dumps(record) + "\n").encode())
            self.log.flush()
        left = timedelta(seconds=round((self.total_steps - self.step) * self.pace))
        test = f"  test {measured['test_accuracy']:.3f}" if measured else ""
        say(f"{self.name}  epoch {self.epoch}/{self.epochs}  loss {loss:.4f}  accuracy {accuracy:.3f}{test}  "
            f"lr {rate:.3g}  {self.batch_size / self.pace:.0f} images/s  {left} left")
        self.sums.zero_()
        if self.stopped or self.epoch % self.args.checkpoint_every == 0 or self.epoch == self.epochs:
            self.save()

    def save(self):
        """Writes the checkpoint, or leaves the previous one as it was; exits if a signal was the reason."""
        self.sums = finite_sums(self)  # the file must not depend on how many ranks there are
        average_statistics(self.model)
        if rank() == 0:
            weights = self.model.state_dict()
            head = {name[3:]: value for name, value in weights.items() if name.startswith("fc.")}
            backbone = {name: value for name, value in weights.items() if not name.startswith("fc.")}
            content = {"settings": self.settings, "epoch": self.epoch, "step": self.step, "sums": self.sums,
                       "backbone": backbone, "head": head, "optimizer": self.optimizer.state_dict()}
            write_atomically(self.path, functools.partial(torch.save, content))
        if self.stopped:
            sum_over_ranks(torch.zeros(1))  # all wait for rank 0: torchrun kills it once another has ended
            say(f"{self.path}: stopped by a signal after step {self.step} of {self.total_steps} and saved; "
                "the same command resumes")
            leave(self)


def leave(run):
    """Exits as a process does that a signal ends; it may be another rank that got it."""
    sys.exit(128 + (run.signals or [signal.SIGTERM])[0])


def finite_sums(run):
    """A run's `sums`, averaged over the ranks; UserError if they or a weight are not finite."""
    sums = sum_over_ranks(run.sums.clone()) / world_size()
    if not torch.stack([t.isfinite().all() for t in (sums, *run.model.parameters())]).all():
        raise UserError(f"{run.name}: the loss or a weight is not finite by step {run.step}; stopped, the "
                        "last good checkpoint is kept; lower --lr or raise --warmup-epochs")
    return sums


def checkpoint_of_run(path, settings):
    """A run's checkpoint, None if there is none yet; UserError if it was trained with other settings."""
    if not path.exists():
        return None
    checkpoint = read_file(path)
    if not is_checkpoint(checkpoint):
        raise UserError(f"{path}: not a checkpoint of train_simclr.py or train_supervised.py")
    saved, renamed = dict(checkpoint["settings"]), {"fp32": "float32", "bf16": "bfloat16"}
    saved["precision"] = renamed.get(saved["precision"], saved["precision"])
    relevant = settings.keys() & saved.keys() - {"preset", "data"}  # names; the data itself shows in its mean
    differ = [f"{k} {saved[k]} -> {settings[k]}" for k in sorted(relevant) if saved[k] != settings[k]]
    if differ:
        raise UserError(f"{path} was trained with other settings ({'; '.join(differ)[:300]}); give the same "
                        "flags to resume, or another --out")
    return checkpoint


def open_log(path):
    """Rank 0's file for a JSON line per epoch, locked until closed: a second such run is a UserError."""
    if rank() > 0:
        return io.BytesIO()
    file = open(path, "a+b")
    locked = f"{path}: another process trains this network; wait, or give another --out"
    with contextlib.suppress(ImportError, OSError), explained(locked, BlockingIOError):
        import fcntl  # which Windows lacks; some file systems have no locks
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for leftover in path.parent.glob(f"{path.stem}.*.tmp"):  # of a process that was killed
            leftover.unlink(missing_ok=True)
    return file


def drop_records(log, epoch):
    """Removes the lines of epochs after `epoch`, which will be run again, and those that are no records."""
    def is_kept(line):
        with contextlib.suppress(ValueError, AttributeError, TypeError, RecursionError):
            return line.endswith(b"\n") and json.loads(line).get("epoch", 0) <= epoch
        return False

    log.seek(0)
    kept = list(filter(is_kept, log))
    if log.tell() > sum(map(len, kept)):
        log.truncate(0)
        log.writelines(kept)


@contextlib.contextmanager
def open_run(args, method, seed, data, device):
    """A `Run`. While it is open no other process trains its network; signals and lack of memory end it."""
    def restore(*caught):  # also the handler: a second signal ends the process as usual
        run.signals += caught[:1]
        if caught and world_size() > 1:  # but torchrun passes on the one that all have got already
            return
        for number, handler in handlers.items():
            signal.signal(number, handler)

    settings = rank0_first(lambda: run_settings(args, method, seed, data, device))
    run = Run(args, settings, len(data.train_images), device)
    run.log = rank0_first(lambda: open_log(run.path.with_suffix(".jsonl")))
    advice = (f"--micro-batch {settings['micro_batch']} --image-size {args.image_size}: lower the first, or "
              "give --checkpoint-activations, or use more processes")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number in handlers:  # not in the line above: a signal between the two would find no handlers
        signal.signal(number, restore)
    with run.log, explained(advice):
        try:
            yield run
            if run.signals:  # since the last step: it must not be lost
                leave(run)
        finally:
            restore()
            say("", rewritten=True)  # clears what a failure leaves at a terminal


# ============================================================================================================
# 8. Linear CKA
# ============================================================================================================
# For the figures, and for other projects: what stands between the two "----" lines works alone when pasted.
# The order is: API, planner, features of the sources, tiles of Gram matrices, form for few features,
# statistics, precisions, modes and switches, memory, progress.

# ---- copy from here ----
# Exact linear CKA (Kornblith et al. 2019; Eq. (2) of Grigg et al. 2021, arXiv 2110.00528) over all samples,
# between all layers of any networks, in bounded memory. Needs torch 2.1 or newer. Two saved feature files:
#     value = linear_cka(*(torch.load(name, weights_only=True) for name in ("x.pt", "y.pt")))
# For layers of networks write a source, a function that returns the features of samples start to stop - 1, a
# tensor of stop - start rows per layer: a list, a dict or, which needs less memory, a generator. It is called
# for any start and stop, first for a few samples, and answers the same every time: network in eval mode, data
# in a fixed order, no memory that two calls share. With hooks and a DataLoader:
#     features = {}
#     for name, module in model.eval().named_children():  # clone: a ResNet overwrites what bn1 and bn3 return
#         module.register_forward_hook(lambda m, x, out, name=name: features.update({name: out.clone()}))
#     def source(start, stop):
#         for images, _ in DataLoader(Subset(data, range(start, stop)), batch_size=stop - start):
#             model(images)
#         return dict(features)
#     matrix = cka_matrix([source], m=len(data))  # (layers, layers); [source, other] for two networks
import contextlib
import itertools
import sys
import time
import traceback
import types
import warnings
import weakref
from typing import NamedTuple

import torch

SOURCE = ("a source is a function source(start, stop) returning the features of samples start to stop - 1: "
          "a tensor of stop - start rows per layer, for any start and stop, and the same every time: not in "
          "training mode, in one order, and where calls share memory a list of clones, no generator")
LEAST = 64  # samples at most of the smallest squares on a Gram matrix's diagonal, which are multiplied whole
TERMS = 2048  # numbers whose products are added up in float32 at most


class GramStatistics(NamedTuple):
    """What one pass over the Gram matrices of L layers gives; all on the CPU, sums in float64."""

    cka: torch.Tensor  # (L, L) float64, Eq. (2) with the biased HSIC; NaN where a layer is constant
    debiased_cka: torch.Tensor  # (L, L) float64, unbiased HSIC of Song et al. 2012; NaN for under 4 samples
    dominance: torch.Tensor  # (L,) float64 in [0, 1]: share of HSIC(K, K) in the rows of its strongest 1 %
    dominant: torch.Tensor  # (L, ceil(m / 100)) int64: those samples, the strongest first
    constant: list  # indices of layers that are the same for every sample
    left_out: torch.Tensor  # (10, L, L) float64: `cka` without each tenth of the samples, chosen at random

    @property
    def standard_error(self):
        """(L, L) float64: standard error of `cka` over samples."""
        return jackknife(self.left_out)


def jackknife(values):
    """Standard error over samples of what follows from `left_out`: from ten values (10, ...) one (...)."""
    return ((values - values.mean(0)).square().sum(0) * (len(values) - 1) / len(values)).sqrt()


def linear_cka(x, y, debiased=False):
    """Linear CKA of features x, y (m, ...) of the same samples: 0-d float64 on x's device (MPS: float32).

    ValueError for other shapes, constant x or y, NaN or infinite values, fewer than 2 samples (debiased: 4).
    """
    x, y = (z if isinstance(z, torch.Tensor) else torch.as_tensor(z, device="cpu") for z in (x, y))
    if x.ndim == 0 or x.shape[:1] != y.shape[:1]:
        raise ValueError(f"linear_cka needs the same samples, got {tuple(x.shape)} and {tuple(y.shape)}")
    sources = [lambda start, stop: [x[start:stop]], lambda start, stop: [y[start:stop]]]
    with warnings.catch_warnings():
        if not debiased:  # which they are about
            warnings.simplefilter("ignore")
        found = gram_statistics(sources, len(x), "float32", batch=1024, dominance=False)
    value = (found.debiased_cka if debiased else found.cka)[0, 1]
    if value.isnan():
        why = " and ".join(f"{'xy'[i]} is constant" for i in found.constant)
        raise ValueError(f"linear_cka: {why or 'debiased, at least 4 samples must matter beyond rounding'}")
    return value.to(x.device, torch.float32 if x.device.type == "mps" else torch.float64)


def cka_matrix(sources, m, debiased=False, **options):
    """(L, L) float64 on the CPU: linear CKA between all layers of all sources; see `gram_statistics`."""
    found = gram_statistics(sources, m, **options)
    return found.debiased_cka if debiased else found.cka


def gram_statistics(sources, m, precision=None, memory=None, batch=128, dominance=True):
    """`GramStatistics` of all layers of all `sources`, over samples 0 to m - 1, exact for any m.

    sources: list of functions as above. Features of any shape are flattened: pick or average tokens first.
    precision: of the Gram matrices' products: "float32", "tf32" (CUDA), "float16" (CUDA) or "bfloat16", which
        round inputs (on CPUs results too). None: the fastest with errors below 1e-4 for features of networks;
        for those with few distinct values give "float32". Float64 features keep float64 products.
    memory: bytes on the features' device beside one batch's forward pass; None: four fifths of what is free.
    batch: samples per call. dominance: False leaves it out, which is quicker where features are few.
    ValueError for what is no source, answers that change or are not finite, too little memory. NaN and a
    warning for constant layers, and for debiased values that are noise.
    """
    if int(m) != m or m < 2:
        raise ValueError(f"CKA needs at least 2 samples, got m = {m}")
    with _own_modes():
        features = _Features(sources, int(m), precision, memory, batch)
        sums = _by_tiles(features) if features.blocks else _by_features(features, dominance)
        return _statistics(features, *sums)


def plan(widths, m, memory, batch=128, held=0, itemsize=4, product_itemsize=4):
    """Into how many blocks to cut the samples: the fewest for which everything fits into `memory` bytes.

    0 stands for the form for few features. widths: per source, its layers' numbers of features. held: bytes
    per sample that a suspended call keeps, at least a layer. One block asks a source for every sample once,
    more of them once each and once before. ValueError with the bytes that blocks of 8 samples need.
    """
    layers, features, largest = sum(map(len, widths)), sum(map(sum, widths)), max(map(max, widths))
    if features < m and itemsize * (features * (m + 30 * features) + m * (largest + 6 * layers)) <= memory:
        return 0
    for blocks in range(1, -(-m // min(batch, 8)) + 1):
        rows, one = -(-m // blocks), blocks == 1  # one: a triangle; its layer also before it is rounded
        tile = rows * (rows + LEAST) // 2 if one else rows ** 2
        layer = itemsize + product_itemsize % itemsize if one else product_itemsize
        kept = max(held, largest * itemsize) * (2 - one)
        # of layers: first sample and mean; of rows: two sums; three tiles more: the order, and one being made
        always = 2 * (features + layers * m)
        needed = itemsize * (always + (layers + 3) * tile) + rows * (largest * layer + kept)
        if needed <= memory:
            return blocks
    raise ValueError(f"memory={memory} bytes is too little: at least {needed} are needed")


def _cut(samples, size):
    """Slices of `size` samples, the last may have fewer, of a slice of samples."""
    return [slice(i, min(i + size, samples.stop)) for i in range(samples.start, samples.stop, size)]


class _Features:
    """The features of all sources: asked for, checked, and centred over all samples, layer by layer."""

    def __init__(self, sources, m, precision, memory, batch):
        if not isinstance(sources, (list, tuple)) or not sources:
            raise ValueError(f"expected a list of sources, got a {type(sources).__name__}; {SOURCE}")
        self.sources, self.m, self.batch, self.device = sources, m, max(1, min(m, batch)), None
        self.widths, self.names, self.held = [[] for _ in sources], {}, 0
        with _own_modes():  # what a source leaves switched on ends here
            self.known = list(map(self.look, range(len(sources))))
        self.every = sum(self.known, [])  # layers of all sources
        wide = any(layer.first.dtype == torch.float64 for layer in self.every)
        self.device, self.dtype = self.every[0].first.device, torch.float64 if wide else torch.float32
        for layer in self.every:
            layer.first = layer.first.to(self.device, self.dtype)
        self.sum_dtype = torch.float32 if self.device.type == "mps" else torch.float64  # all that Metal has
        able = precisions(self.device)
        if precision not in (None, *able):
            raise ValueError(f"precision {precision!r}: {self.device}, torch {torch.__version__} has {able}")
        self.precision = "float64" if wide else precision or able[0 if m >= 512 else -1]  # few: it would show
        self.product_dtype = getattr(torch, self.precision.replace("tf32", "float32"))
        memory = free_memory(self.device) * 0.8 if memory is None else memory
        blocks = plan(self.widths, m, memory, self.batch, self.held, self.dtype.itemsize,
                      self.product_dtype.itemsize)
        rows = -(-m // max(blocks, 1))
        self.levels = (-(-rows // LEAST) - 1).bit_length()  # how often a block is cut into halves
        self.size = -(-rows // 2 ** self.levels) << self.levels
        self.blocks = _cut(slice(0, m), self.size) if blocks else []  # none: the form for few features
        tenths = torch.randperm(m, generator=torch.Generator("cpu").manual_seed(0), device="cpu") % 10
        self.members = [(tenths == g).nonzero()[:, 0].to(self.device) for g in range(10)]
        self.tenths = torch.nn.functional.pad(tenths.byte(), (0, self.size))  # for what fills the last block
        passes = len(self.blocks) + (len(self.blocks) > 1) or 1
        self.done, self.total = 0, m * len(self.every) * passes
        self.shown = self.start = time.monotonic()

    def look(self, s):
        """The layers of source s, on which two calls in turn must agree; notes what a suspended one keeps."""
        few, given, alive, found = slice(0, min(self.m, 9)), [], [], []
        some = slice(max(1, few.stop // 3), few.stop)
        for x, y in zip(self.ask(s, few, lambda layer, x: given.append(x)),
                        self.ask(s, some, lambda layer, x: alive.append(weakref.ref(layer)))):
            a, b = (z.cpu().double() for z in (x, y))  # whose norms do not overflow
            if (a[some] - b).norm() > 0.05 * (a - a.mean(0)).norm() + 1e-3 * a.norm():
                raise ValueError(f"source {s} gives other features when asked again; {SOURCE}")
            one = x.new_ones(1, 1, dtype=torch.float32)
            if torch.nn.functional.linear(one, one).dtype != one.dtype:  # which would reach its other calls
                raise ValueError(f"source {s} yields inside autocast: end it before each yield")
            for i, z in enumerate(found):
                if given[i].data_ptr() == given[-1].data_ptr() and torch.equal(x, z):
                    warnings.warn(f"source {s}: layers {i} and {len(found)} are the same memory: if a hook "
                                  "gave one before the network overwrote it, clone it there", stacklevel=4)
            found.append(x.clone())
            self.held = max(self.held, sum(ref().nbytes for ref in alive if ref() is not None) // len(y))
        return [types.SimpleNamespace(name=f"source {s}, layer {i}", first=x[0].clone(), unseen=self.m, sum=0,
                                      size=0) for i, x in enumerate(found)]

    def ask(self, s, some, note=lambda layer, x: None):
        """Yields the layers of one call for `some` samples, a slice, checked, (n, p); holds on to none."""
        widths, found, rows = self.widths[s], [], some.stop - some.start

        def checked(layer):
            x = layer if hasattr(layer, "shape") else ()
            x = x.detach() if isinstance(x, torch.Tensor) else torch.as_tensor(x, device="cpu")
            width = x.numel() // rows
            if self.device is None and len(found) == len(widths):  # the first look
                widths.append(width)
            if [width] != widths[len(found):][:1] or not width or x.shape[:1] != (rows,) or x.is_complex():
                what = f"{type(layer).__name__} {tuple(x.shape)} {x.dtype}"
                raise TypeError(f"returned a {what}, not {rows} rows of numbers, or unlike other calls")
            found.append(width)
            note(layer, x)
            wide = x.dtype.itemsize > 2 and x.dtype != torch.float32
            return x.reshape(rows, -1).to(self.device or x.device, torch.float64 if wide else torch.float32)

        try:
            layers = self.sources[s](some.start, some.stop)
            if isinstance(layers, dict):  # its values, in the order of the first call
                layers = {**dict.fromkeys(self.names.setdefault(s, list(layers))), **layers}.values()
            # a list as it is now, before another call changes what is in it
            yield from map(checked, layers if hasattr(layers, "__next__") else list(layers))
            if len(found) < max(1, len(widths)):
                raise TypeError(f"returned {len(found)} layers")
        except (TypeError, ValueError) as error:
            traceback.clear_frames(error.__traceback__)  # closes what it would keep suspended
            where = f"source {s}, layer {len(found)}, samples {some.start} to {some.stop - 1}"
            raise ValueError(f"{where}: {error}; {SOURCE}") from error

    def take(self, layer, x, out=None):
        """Features x (n, p) less the first sample, in `out`; once m were counted, centred and up to 2000."""
        _progress(self, len(x))
        if not layer.unseen:
            return torch.addcmul(layer.shift, x - layer.first, layer.scale)
        x = torch.sub(x, layer.first, out=out)
        layer.sum = layer.sum + x.sum(0).to(self.sum_dtype)
        layer.size = torch.stack(torch.aminmax(x)).abs().amax().clamp(min=layer.size)
        layer.unseen -= len(x)
        if not layer.unseen:
            layer.scale = (1000 / layer.size).clamp(max=torch.finfo(x.dtype).max)
            layer.shift = (layer.sum / self.m).to(x.dtype) * -layer.scale
        return x


def _pairs(x, levels):
    """Pairs of views (b, n, ...) of x (size, ...) that make up all i <= j: small squares, then halves."""
    small = x.view(2 ** levels, -1, *x.shape[1:])
    cut = [x.view(2 ** level, 2, -1, *x.shape[1:]) for level in range(levels)]
    return [(small, small), *((halves[:, 0], halves[:, 1]) for halves in cut)]


def _layers(features, own, others=slice(0, 0)):
    """Yields (x, operands) of each layer: x (n, p) of block `own`, and the pairs (b, n, p) to multiply.

    Those are `_pairs` of x, or x and each batch of block `others`. Calls take turns, a layer at a time; x is
    in the same memory for all layers, and centred if means are known.
    """
    dtype = features.dtype if len(features.blocks) < 2 else features.product_dtype
    n, same = own.stop - own.start, own == others
    size = features.size if same else n  # what fills up the last block is 0
    memory = torch.empty(size * max(map(max, features.widths)), dtype=dtype, device=features.device)
    for s, known in enumerate(features.known):
        with _own_modes():
            calls = [features.ask(s, some) for some in _cut(own, features.batch)]
            more = [] if same else [features.ask(s, some) for some in _cut(others, features.batch)]
            for layer in known:
                x, new = memory[:size * len(layer.first)].view(size, -1), layer.unseen
                for part, call in zip(x[:n].split(features.batch), calls):
                    part.copy_(features.take(layer, next(call), part if dtype == features.dtype else None))
                if new and features.blocks == [own]:
                    torch.addcmul(layer.shift, x, layer.scale, out=x)
                x[n:] = 0
                y = x.to(features.product_dtype)
                batches = ((y[None], features.take(layer, next(call)).to(y.dtype)[None]) for call in more)
                yield x, _pairs(y, features.levels) if same else batches
            for call in calls + more:
                next(call, None)  # more layers than before are an error


def _by_tiles(features):
    """HSICs of all samples and without each tenth, K'_ii, and sums of K'_ij^2 over j, from tiles of K'.

    With X centred, K' = X Xt is already H K H, and HSIC(K, L) the sum over all entries of K' L'.
    """
    m, count = features.m, len(features.every)
    for some in _cut(slice(0, m), features.batch) if len(features.blocks) > 1 else ():  # for the means
        list(_layers(features, some))
    sums = torch.zeros(11, count, count, dtype=features.sum_dtype, device=features.device)
    diagonal, rows = sums.new_zeros(2, count, len(features.blocks) * features.size, dtype=features.dtype)
    for own, others in itertools.combinations_with_replacement(features.blocks, 2):
        _tile(features, own, others, sums, diagonal, rows)
    diagonal, rows = diagonal[:, :m], rows[:, :m]
    tenths = (diagonal.index_select(1, tenth).to(sums.dtype) for tenth in features.members)
    squares = torch.stack([own @ own.T / 2 for own in tenths])  # half, as the rest is symmetric
    sums += torch.cat([squares, squares.sum(0, keepdim=True)])  # i or j in each tenth; all
    return 2 * torch.cat([sums[10:], sums[10] - sums[:10]]), diagonal, rows + diagonal.square()


def _tile(features, own, others, sums, diagonal, rows):
    """Adds up products of all layers' K'_ij, i in block `own` and j in `others`, i < j; fills the rest."""
    def views(x):  # of what samples have, as of their features
        left, right = x[own.start:own.start + features.size], x[others].split(features.batch)
        return _pairs(left, features.levels) if own == others else [(left[None], y[None]) for y in right]

    keys = [(x[:, :, None] * 10 + y[:, None]).flatten() for x, y in views(features.tenths)]
    joined = torch.cat(keys)
    counts, order = joined.bincount(minlength=100).tolist(), joined.argsort()
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device="cpu"))
    places = place.to(diagonal.device).split([len(key) for key in keys])
    tile = diagonal.new_empty(len(diagonal), len(order))
    for index, (_, operands) in enumerate(_layers(features, own, others)):
        norms = zip(places, views(rows[index]), views(diagonal[index]))
        for (x, y), (place, (a, b), (d, _)) in zip(operands, norms):
            with _float32_products(features.precision == "tf32"):
                k = _products(x, y, tile.dtype)
            if x is y:  # the squares on the diagonal
                d.copy_(k.diagonal(dim1=1, dim2=2))
                k.triu_(1)
            squares = k.square()
            a.add_(squares.sum(2))
            b.add_(squares.sum(1))
            tile[index].index_copy_(0, place, k.flatten())
    with _float32_products():
        for key, entries in enumerate(tile.split(counts, 1)):
            for some in entries.split(TERMS, 1):
                product = some @ some.T
                for which in {key // 10, key % 10, 10}:
                    sums[which].add_(product)


def _products(x, y, dtype):
    """x @ y.T of matrices (b, n, p) and (b, k, p), in half precision perhaps: (b, n, k) of this dtype."""
    if x.dtype == dtype:
        return torch.bmm(x, y.mT)
    if x.is_cuda:
        return torch.bmm(x, y.mT, out_dtype=dtype)
    return torch.stack([torch.mm(a, b.mT) for a, b in zip(x, y)]).to(dtype)  # bmm of bfloat16 is slow there


def _by_features(features, dominance):
    """As `_by_tiles`, where there are fewer features than samples: HSIC(K, L) is the squared norm of Xt Y."""
    widths = [len(layer.first) for layer in features.every]
    every = torch.empty(features.m, sum(widths), dtype=features.dtype, device=features.device)
    layers = every.split(widths, 1)
    for some in _cut(slice(0, features.m), features.batch):  # one by one: in turn they would hold more
        for (x, _), own in zip(_layers(features, some), layers):
            own[some] = x
    for layer, own in zip(features.every, layers):
        torch.addcmul(layer.shift, own, layer.scale, out=own)
    products = every.new_zeros(10, sum(widths), sum(widths), dtype=features.sum_dtype)
    diagonal = torch.stack([x.square().sum(1) for x in layers])
    rows = diagonal * torch.nan
    with _float32_products():
        for product, tenth in zip(products, features.members):
            for samples in tenth.split(TERMS):
                some = every.index_select(0, samples)
                for end, x in zip(itertools.accumulate(widths), some.split(widths, 1)):  # up to the diagonal
                    product[end - x.shape[1]:end, :end].add_(x.T @ some[:, :end])
        whole = products.sum(0)
        for i, own in enumerate(whole.to(every.dtype).split(widths) if dominance else ()):
            rows[i] = (layers[i] @ own.split(widths, 1)[i]).mul_(layers[i]).sum(1)
    owner = torch.block_diag(*[whole.new_ones(width, 1) for width in widths])  # (features, L)
    hsic = torch.stack([owner.T @ (whole - part).square() @ owner for part in (0, *products)])
    return hsic + hsic.tril(-1).mT, diagonal, rows


def _statistics(features, hsic, diagonal, rows):
    """`GramStatistics` from what `_by_tiles` or `_by_features` returns."""
    hsic, diagonal, rows = (x.cpu().double() for x in (hsic, diagonal, rows))
    m, few, traces, squares = features.m, not features.blocks, diagonal.sum(1), diagonal @ diagonal.T
    for layer, value in zip(features.every * 2, [*traces, *hsic[0].diagonal()]):
        if not value.isfinite():
            raise ValueError(f"{layer.name}: NaN or infinite values in its features, or HSIC")
    # Song et al. 2012, Eq. (5); without its diagonal, row i of K' sums to -K'_ii
    n = m if m > 3 else torch.nan
    more, less = traces.outer(traces) / ((n - 1) * (n - 2)), squares * 2 / (n - 2)
    unbiased = hsic[0] - squares + more - less
    value, constant = unbiased.diagonal().clone(), hsic[0].diagonal() == 0
    # what cancels there, and a bound of its relative rounding errors, also of those that a whole row shares
    unit, widest = torch.finfo(features.dtype).eps / 2, max(map(max, features.widths))
    inputs = 2.0 ** -11 if features.precision == "tf32" else torch.finfo(features.product_dtype).eps / 2
    relative = unit * TERMS / 4 if few else 4 * inputs + unit * (4 + widest ** 0.5 / 2)
    noise = relative * (more + less + (hsic[0] + squares if few else 0)).diagonal()
    lost = (value <= noise) & ~constant
    unbiased[lost] = unbiased[:, lost] = torch.nan
    for which, text in ((constant, "constant over samples, so CKA is NaN"),
                        (lost, "too few samples matter beyond rounding errors: debiased CKA is NaN"),
                        ((noise > 1e-4 * value) & ~lost & ~constant,
                         f"few samples matter, or there is little structure, for {features.precision} "
                         "products: debiased CKA may be off by more than 1e-4")):
        names = [layer.name for layer, found in zip(features.every, which) if found]
        if names:
            warnings.warn(f"{text}: {'; '.join(names[:5])}{'; ...' * (len(names) > 5)}", stacklevel=3)
    every, top = torch.cat([hsic, unbiased[None]]), rows.topk(-(-m // 100), dim=1)
    norms = every.diagonal(dim1=1, dim2=2).sqrt()
    cka = every / norms[:, :, None] / norms[:, None]  # one by one: the product of two could overflow
    return GramStatistics(cka[0], cka[-1], top.values.sum(1) / rows.sum(1), top.indices,
                          constant.nonzero().flatten().tolist(), cka[1:-1])


def precisions(device):
    """Names of the precisions in which `device` forms products of matrices, the fastest first."""
    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0
    short = "dtype" in torch.ops.aten.mm.overloads() and not torch.version.hip  # torch 2.8, not on AMD
    units = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
    able = {"float16": short and major >= 7,
            "bfloat16": short and major >= 8 or units.get("amx_bf16") or units.get("avx512_bf16"),
            "tf32": major >= 8, "float32": True}
    return [name for name in able if able[name]]


@contextlib.contextmanager
def _own_modes():
    """No gradients, inference mode or autocast, whatever the caller or a source switched on."""
    with contextlib.ExitStack() as stack, torch.inference_mode(False), torch.no_grad():
        for kind in ("cpu", "cuda", "mps"):
            with contextlib.suppress(RuntimeError):  # a torch whose autocast does not know this kind
                stack.enter_context(torch.autocast(kind, enabled=False))
        try:
            yield
        except BaseException as error:  # whose traceback would keep sources open, in modes of their own
            traceback.clear_frames(error.__traceback__)
            raise


@contextlib.contextmanager
def _float32_products(tf32=False):
    """Products of float32 matrices are float32 (or TF32), whatever was chosen, which is put back."""
    with contextlib.ExitStack() as stack:
        parts = [backend.matmul for backend in (torch.backends.cuda, torch.backends.mkldnn)
                 if hasattr(torch.backends.mkldnn, "matmul")]  # from torch 2.9 on
        for part in parts:
            stack.callback(setattr, part, "fp32_precision", part.fp32_precision)
            part.fp32_precision = "tf32" if tf32 and part is parts[0] else "ieee"
        if not parts:
            stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            torch.set_float32_matmul_precision("high" if tf32 else "highest")
        yield


def free_memory(device):
    """Bytes free on a device: what its driver says, or what the system and the container's limit leave."""
    if device.type == "cuda":
        return (torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
                - torch.cuda.memory_allocated(device))
    if device.type == "mps" and hasattr(torch.mps, "recommended_max_memory"):
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    free = [4 << 30]  # where nobody says
    with contextlib.suppress(OSError, StopIteration), open("/proc/meminfo") as file:  # Linux
        free = [int(next(line for line in file if line.startswith("MemAvailable")).split()[1]) << 10]
    root = "/sys/fs/cgroup/memory"  # a container's, of version 2 or 1; the word "max" where there is no limit
    for limit, used in ((".max", ".current"), ("/memory.limit_in_bytes", "/memory.usage_in_bytes")):
        with contextlib.suppress(OSError, ValueError), open(root + limit) as most, open(root + used) as now:
            free.append(int(most.read()) - int(now.read()))
    return max(min(free), 1 << 28)


def _progress(state, more):
    """On a terminal, after 3 s, shows the share that is done and the time left, and wipes them at the end."""
    state.done += more
    now, left = time.monotonic(), state.total - state.done
    if (now - state.start > 3 and (now - state.shown > 0.5 or not left)
            and getattr(sys.stderr, "isatty", bool)()):
        text = f"CKA {state.done / state.total:4.0%}, {(now - state.start) * left / state.done:.0f} s left   "
        print(f"\r{text if left else ' ' * len(text)}\r", end="", file=sys.stderr, flush=True)
        state.shown = now
# ---- to here ----


# ============================================================================================================
# 9. Figures
# ============================================================================================================
# What the figure scripts share, in the order of use: command line, networks and images, measuring, claims and
# their verdicts, files, drawing. In an .npz a plain key holds the biased value of Eq. (2), `<key>_debiased`
# the other, and `<key>_left_out` ten of the biased one, each measured without one tenth of the images.

ODD, EVEN = slice(0, 32, 2), slice(1, 32, 2)  # of the 32 layers
GROUP = np.repeat([1, 2, 3, 4], BLOCK_GROUPS)  # block group of each of the 16 odd or even layers
SAME_GROUP = np.equal.outer(np.repeat(GROUP, 2), np.repeat(GROUP, 2))  # (32, 32)
NAMES = {"simclr": "SimCLR", "supervised": "Supervised"}
PAPER = "checkpoints/paper"  # where the training scripts put the networks of the full study
FOREIGN = {  # what a state dict does not say about itself: flags for both sides, or --simclr-* for one
    "image_size": {"type": number(int, low=8, most=4096), "metavar": "N",
                   "help": "pixels (default: 224; 3x3 stem: 32)"},
    "mean": {"type": number(float, low=0), "nargs": 3, "metavar": "X", "help": "(default: ImageNet's)"},
    "std": {"type": number(float, above=0), "nargs": 3, "metavar": "X", "help": "(default: ImageNet's)"},
    "prefix": {"metavar": "TEXT", "help": "before conv1.weight, where a file holds several networks"},
    "stem_padding": {"type": int, "choices": (1, 2), "help": "of a 3x3 stem (default: 1)"}}


def figure_parser(doc):
    """The flags that all figure scripts share."""
    parser, path = Parser(doc), {"type": os.path.expanduser}
    add = parser.add_argument_group("networks").add_argument
    add("--checkpoints", **path, help=f"folder of *_seed*.pt files (default: {PAPER}, if no files)")
    for method, name in NAMES.items():
        add(f"--{method}", nargs="+", metavar="FILE", **path,
            help="in place of the folder's: checkpoints of this study, or state dicts of a ResNet-50")
        add(f"--{method}-label", metavar="TEXT", help=f"in figures (default: {name}, or the file's name)")
    add("--untrained", action="store_true", help="the same networks before training, standard initialisation")
    add = parser.add_argument_group("images and measuring").add_argument
    add("--data", **path, help="as in training (default: that of the networks; for state dicts data, "
        "where CIFAR-10 is fetched if it is missing)")
    add("--download", action="store_true", help="fetch CIFAR-10 into a --data folder that is empty or new")
    add("--samples", type=number(int, low=8), metavar="N",
        help="test images, a fixed random choice (default: all)")
    add("--batch-size", type=number(int, low=1), metavar="N", default=256,
        help="images per forward pass (default: 256)")
    add("--device", help="cpu, cuda, cuda:N or mps (default: cuda, else mps, else cpu)")
    add("--precision", choices=("float32", "tf32", "float16", "bfloat16"), help="of the Gram matrices' "
        "products; tf32 and float16 on CUDA only (default: the fastest whose error is below 1e-4; below 512 "
        "images float32)")
    add("--memory", type=number(float, above=0), metavar="GB",
        help="for CKA (default: four fifths of what is free)")
    add = parser.add_argument_group("what is written").add_argument
    add("--out", **path, help="folder for .png and .npz (default: figures/<name of the folder or files>)")
    add("--debiased", action="store_true", help="draw, and judge first, debiased CKA instead of Eq. (2)")
    add("--replot", action="store_true", help="judge and draw again from the .npz in --out, without networks")
    add = parser.add_argument_group("state dicts, which do not say how they want their images").add_argument
    for name, options in FOREIGN.items():
        for side in ("", "simclr-", "supervised-"):
            add(f"--{side}{name.replace('_', '-')}", **options)
    return parser


def side_label(args, method):
    """What a figure calls the networks of one side."""
    files = [Path(file).stem.removesuffix(".pth") for file in getattr(args, method) or []]
    return getattr(args, f"{method}_label") or first_names(files, most=1) or NAMES[method]


def figure_folder(args):
    """The folder of a figure's files; a default one has no spaces, commas or the like in its name."""
    sides = [side_label(args, method) for method in NAMES if getattr(args, method)]
    name = "-".join(sides) or Path(args.checkpoints or PAPER).resolve().name
    name = re.sub(r"[^\w.-]+", "_", name).strip("._-")[:100] or "figures"
    return Path(args.out or Path("figures", name + ("-untrained" if args.untrained else "")))


def open_study(args, methods):
    """({method: networks}, `Data` with the test images chosen, arrays that say what a figure is made from).

    Networks are in eval mode and have `settings`, `name` and `layers`. UserError if something does not fit.
    """
    device = pick_device(args.device)
    writable_folder(figure_folder(args))
    networks = {method: load_networks(args, method, device) for method in methods}
    settings = {method: [model.settings for model in models] for method, models in networks.items()}
    every = [s for side in settings.values() for s in side]
    for name in ("stem", "image_size"):
        if len({s[name] for s in every}) > 1:
            warn(f"networks differ in {name}: {', '.join(sorted({str(s[name]) for s in every}))}")
    trained = [s for s in every if s["data"]]
    path = args.data or (trained[0]["data"] if trained else "data")
    data = load_data(path, device, args.download)
    numbers = np.array(channel_statistics(data.train_images))
    differ = [s for s in trained if s["classes"] != data.classes
              or abs(numbers - [s["mean"], s["std"]]).max() > 1e-3]
    for s in differ[:1]:  # these would judge the claims on images that nobody chose
        text = (f"other images than the training's: {path} has classes {first_names(data.classes, 3)}, mean "
                f"and deviation of the channels {numbers.round(3).tolist()}; {s['data']} had the classes "
                f"{first_names(s['classes'], 3)} and {np.round([s['mean'], s['std']], 3).tolist()}")
        if not args.data:
            raise UserError(f"{text}. Give the right folder with --data, or --data {path} if you mean these")
        warn(f"{text}. The title says so")
    if (args.samples or 0) > len(data.test_images):
        raise UserError(f"--samples {args.samples}: the test set has {len(data.test_images)} images")
    order = torch.randperm(len(data.test_images), generator=torch.Generator().manual_seed(0))
    chosen = order[:args.samples].sort().values.to(device)
    data = data._replace(test_images=data.test_images[chosen], test_labels=data.test_labels[chosen])
    about = {f"label_{method}": side_label(args, method) for method in methods}
    # A figure's file may go to others: it has the folders' names, not where they lie.
    settings = {method: [s | {"data": s["data"] and Path(s["data"]).name} for s in side]
                for method, side in settings.items()}
    about |= {"samples": len(chosen), "data": Path(path).name, "other_images": bool(differ),
              "untrained": args.untrained, "settings": json.dumps(settings)}
    return networks, data, {key: np.array(value) for key, value in about.items()}


def load_networks(args, method, device):
    """The networks of one side: its files in their order, or --checkpoints/<method>_seed*.pt by seed."""
    files = getattr(args, method)
    folder = args.checkpoints or (None if args.simclr or args.supervised else PAPER)
    paths = [Path(file) for file in files or []]
    if folder and not files:
        found = [path for path in Path(folder).glob("*.pt") if re.fullmatch(rf"{method}_seed\d+", path.stem)]
        paths = sorted(found, key=lambda path: (len(path.name), path.name))
    if not paths:
        where = f"no {method}_seed*.pt, which train_{method}.py writes, in --checkpoints {folder}"
        alone = "no files; one side alone is for fig1_internal.py"
        raise UserError(f"--{method}: {where if folder else alone}")
    own = {name: getattr(args, f"{method}_{name}") for name in FOREIGN}
    options = {name: getattr(args, name) if value is None else value for name, value in own.items()}
    given = [name.replace("_", "-") for name, value in options.items() if value is not None]
    models = []
    for path in paths:
        model = load_model(path, device, method, **options)
        s = model.settings
        if given and "preset" in s:
            raise UserError(f"--{given[0]} is for state dicts, and {path} knows its own; for the other side "
                            f"alone there are --simclr-{given[0]} and --supervised-{given[0]}")
        if s.get("epoch", 0) < s.get("epochs", 0):
            warn(f"{path}: not finished, epoch {s['epoch']} of {s['epochs']}")
        if "note" in s:
            print(f"{path}: {s['note']}; left out: {first_names(s['left_out']) or 'nothing'}")
        model.name = path.stem if files else f"{side_label(args, method)} seed {s['seed']}"
        if args.untrained:  # in the standard initialisation: with a gamma of 0 odd layers would be constant
            model.name, seed = f"untrained {model.name}", len(models) if s["seed"] is None else s["seed"]
            s |= {"epoch": 0, "untrained": True, "seed": seed}
            fresh = build_model(s["method"], s["stem"], max(1, len(s["classes"])), seed, zero_init=False)
            model.load_state_dict(fresh.state_dict(), strict=False)  # a state dict's network has no head
        for other in models:  # a copy would pass for another seed
            if all(map(torch.equal, model.parameters(), other.parameters())):
                raise UserError(f"{path}: the same network as {other.name}; give each once")
        model.layers = LAYERS + (HEAD if isinstance(model.fc, ProjectionHead) else [])
        models.append(model)
    return models


def network_source(model, images, layers=LAYERS, view=None):
    """(names for messages, source for `gram_statistics`) of the representations `layers` of a network.

    It sees `images`, or for `view` 0 or 1 a copy augmented as in training, alike for all of a method.
    """
    s, size, copy = model.settings, model.settings["image_size"], ""
    if view is not None:
        generator, strength = generator_for(images.device, "augmented copy", view), s.get("strength") or 0
        drawn = draw_params(len(images), *images.shape[2:], images.device, generator, strength)
        copy = f", copy {view + 1}"

    def source(start, stop):
        some, rows = images[start:stop], slice(start, stop)
        if view is None:
            x = resize(some, size)
        elif s["method"] == "simclr":
            x = simclr_augment(some, size, slice_params(drawn, rows), s["blur"])
        else:
            x = imagenet_augment(some, size, slice_params(drawn, rows))
        if s["method"] == "supervised" or s.get("standardise"):  # our SimCLR networks see [0, 1]
            x = standardise(x, s["mean"], s["std"])
        x = x.contiguous(memory_format=torch.channels_last)
        chosen = filter(lambda named: named[0] in layers, stream_representations(model, x))
        del x  # below: features in the order of memory; a generator's frame would hold on to each layer
        return map(lambda named: named[1].movedim(1, -1).flatten(1), chosen)

    return [f"{model.name}{copy} {layer}" for layer in layers], source


def measure(args, m, sources):
    """({ending of keys: CKA of all layers}, dominance) over m images. Errors and warnings name the layers."""
    names, functions = zip(*sources)
    named = functools.partial(re.sub, r"source (\d+), layer (\d+)", lambda at: names[int(at[1])][int(at[2])])
    memory = int(args.memory * 1e9) if args.memory else None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found = gram_statistics(functions, m, args.precision, memory, args.batch_size)
        except ValueError as error:
            raise UserError(named(str(error))) from None
    for warning in caught:
        warn(named(str(warning.message)))
    cka = {"": found.cka, "_debiased": found.debiased_cka, "_left_out": found.left_out.float()}
    return {ending: values.numpy() for ending, values in cka.items()}, found.dominance.numpy()


def pair_matrices(cka, rows, columns=None):
    """(..., P, 32, 32) of CKA (..., 32 S, 32 S): networks `rows` with `columns`, or all pairs of `rows`."""
    pairs = list(itertools.product(rows, columns) if columns else itertools.combinations(rows, 2))
    pairs = pairs or [(rows[0], rows[0])]  # a single one with itself
    return np.stack([cka[..., 32 * i:32 * i + 32, 32 * j:32 * j + 32] for i, j in pairs], -3)


def rank_correlation(values):
    """Spearman's correlation of values (..., n), along the last axis, with 1 to n; ties share a mean rank."""
    ranks = np.sign(values[..., :, None] - values[..., None, :]).sum(-1)  # twice the rank, from its mean
    depth = np.arange(values.shape[-1]) - (values.shape[-1] - 1) / 2
    with np.errstate(invalid="ignore"):  # a constant profile has no correlation: NaN
        return ranks @ depth / np.sqrt((ranks ** 2).sum(-1) * (depth ** 2).sum())


def judge(claims, arrays):
    """{claim: (verdict, its numbers in words, its means)} from the values under the plain keys.

    `claims(arrays)`: {claim: {quantity: (values, low, high)}}, a value per pair or network. A quantity holds
    if its mean is between low and high by more than the spread; of fewer than three values, if each is, and
    the mean by two standard errors over images, where known. The least favourable quantity decides.
    """
    # The errors are those of biased CKA for both estimators: only this is measured without each tenth.
    left_out = [key for key in arrays if f"{key}_left_out" in arrays]
    unknown = {key: values + math.nan for key, values in arrays.items() if values.dtype.kind == "f"}
    tenths = [claims(arrays | unknown | {key: arrays[f"{key}_left_out"][i] for key in left_out})
              for i in range(10)]
    judged = {}
    for claim, quantities in claims(arrays).items():
        texts, means, signs = [], [], []
        for quantity, (values, low, high) in quantities.items():
            ten = torch.tensor([some[claim][quantity][0].mean() for some in tenths], dtype=torch.float64)
            error = jackknife(ten).item()
            known = "" if math.isnan(error) else f" [{error:.2g}]"
            spread = f" +- {values.std():.2g}" if len(values) > 1 else ""
            texts.append(f"{quantity} {values.mean():.3g}{spread}{known}")
            means.append(f"{values.mean():.3g}")
            margin, few = np.minimum(values - low, high - values), len(values) < 3
            if not np.isinf(margin).all():  # one without bounds is only reported
                doubt = 2 * np.nan_to_num(error) if few else margin.std()
                likely = [margin.mean() - doubt, margin.mean() + doubt, *(margin if few else ())]
                signs.append(int(np.min(likely) > 0) - int(np.max(likely) < 0))  # of NaN neither
        verdict = ("does not hold", "undecided", "holds")[min(signs) + 1]
        counts = dict.fromkeys(str(len(values)) for values, *_ in quantities.values())
        judged[claim] = verdict, f"{', '.join(texts)} (n = {' and '.join(counts)})", " ".join(means)
    return judged


def replot(args, name, claims, plot):
    """`report` of the .npz in --out; no network is needed."""
    path = figure_folder(args) / f"{name}.npz"
    fault = f"--replot: {path} is missing, damaged or of another version; give --out its folder, or draw anew"
    with explained(fault, Exception), np.load(path, allow_pickle=False) as saved:
        report(args, name, claims, plot, dict(saved))


def report(args, name, claims, plot, arrays):
    """Writes <out>/<name>.npz, prints `claims(arrays)` by both estimators, draws `plot(arrays)`: <name>.png.

    Verdicts are for checkpoints of this study; networks of others get the same numbers under their labels.
    """
    path, settings = figure_folder(args) / name, json.loads(str(arrays["settings"]))
    if not args.replot:
        write_atomically(f"{path}.npz", lambda file: np.savez_compressed(file, **arrays))
        print(f"wrote {path}.npz")
    labels = {method: str(arrays[f"label_{method}"]) for method in settings}
    networks = [(method, s) for method, side in settings.items() for s in side]
    ours = all("preset" in s and s["method"] == method for method, s in networks)
    debiased = {key: arrays[f"{key}_debiased"] for key in arrays if f"{key}_debiased" in arrays}
    estimators = {"biased": arrays, "debiased": arrays | debiased}
    shown, rest = ("debiased", "biased") if args.debiased else ("biased", "debiased")
    print(f"{shown} CKA: mean +- spread over n pairs or networks [standard error over images, where known]")
    others, by_other = [], judge(claims, estimators[rest])
    for claim, (verdict, numbers, _) in judge(claims, estimators[shown]).items():
        other_verdict, _, means = by_other[claim]
        others.append(f"{claim[:2]} {means}")
        if ours:
            print(f"{claim} | {numbers} | {verdict}")
            others[-1] += "" if verdict == other_verdict else f" {other_verdict.upper()}"
        else:
            print(claim[:2], re.sub("(?i)simclr|supervised", lambda word: labels[word[0].lower()], numbers))
    print(f"{rest} CKA: {', '.join(others)}")
    demo = ours and (arrays["data"] == "synthetic" or any(s["preset"] == "demo" for _, s in networks))
    if demo:
        print("networks of the demo or synthetic images: the verdicts mean nothing")
    if arrays["samples"] < 500 and not args.debiased:
        key = next(iter(debiased))
        warn(f"{arrays['samples']} images are few, which raises biased CKA whatever the networks: here it is "
             f"{arrays[key].mean():.2f} on average, debiased {debiased[key].mean():.2f}; give --debiased, or "
             "more images")
    with matplotlib.rc_context({"text.parse_math": False}):  # a $ in a label is a $
        kind = "untrained " if arrays["untrained"] else "demo " if demo else ""
        figure = plot(estimators[shown] | {"debiased": args.debiased, "kind": kind})
        save = functools.partial(figure.savefig, dpi=150, format="png", bbox_inches="tight")
        write_atomically(f"{path}.png", save)
    print(f"drew {path}.png ({arrays['samples']} test images, {shown} CKA)")


def new_figure(arrays, title, panels):
    """A figure and its row of axes, of the size all figures share; the title names other images."""
    figure = Figure((4.6 * panels, 4.6), layout="constrained")
    figure.suptitle(title + (f"; images of {arrays['data']}" if arrays["other_images"] else ""))
    return figure, figure.subplots(1, panels)


def cka_heatmaps(axes, matrices, titles, xlabel, ylabel, debiased):
    """CKA matrices side by side, first layer at the lower left, colours from 0 to 1, one colour bar."""
    for ax, matrix, title in zip(axes, matrices, titles):
        image = ax.imshow(matrix, origin="lower", vmin=0, vmax=1, cmap="magma")
        ax.set(title=title, xlabel=xlabel, ylabel=ylabel)
        mark_block_groups(ax, len(matrix), both=True)
    label = ("debiased " if debiased else "") + "linear CKA"
    ax.figure.colorbar(image, ax=axes, label=label, shrink=0.8, pad=0.01)


def depth_lines(ax, values, color, label, marker="o"):
    """Mean over networks or pairs of values (S, layers) against depth, in a band of one deviation."""
    mean, spread, depth = values.mean(0), values.std(0), np.arange(values.shape[1])
    ax.plot(depth, mean, color=color, label=label, marker=marker, markersize=3)
    ax.fill_between(depth, mean - spread, mean + spread, color=color, alpha=0.25, linewidth=0)


def mark_block_groups(ax, layers, both=False):
    """Ticks and lines for BG1 to BG4, and a head of 3, on x or both axes of 16, 19, 32 or 35 layers."""
    counts = [layers // 16 * blocks for blocks in BLOCK_GROUPS] + ([3] if layers % 16 else [])
    ends = np.cumsum(counts)
    ax.tick_params(length=0)
    for axis, line in ((ax.xaxis, ax.axvline), (ax.yaxis, ax.axhline))[:2 if both else 1]:
        axis.set_ticks(ends - np.array(counts) / 2 - 0.5, ["BG1", "BG2", "BG3", "BG4", "Head"][:len(ends)])
        for end in ends[:-1]:
            line(end - 0.5, color="white" if both else "lightgray", linewidth=0.8, zorder=1)
