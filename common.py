"""Shared parts of the study, in this order:

1. Errors, device, command line
2. Data: CIFAR-10, image folders, a synthetic set; all images uint8 on the device
3. Augmentation on the device: every image with its own random parameters
4. ResNet-50, its 32 representations, the projection head
5. LARS and the learning-rate schedule
6. InfoNCE
7. Distributed helpers
8. Checkpoints
9. Training loop
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
import pickle
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
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

matplotlib.use("Agg")  # figures are written to files; no display is needed
from matplotlib import pyplot as plt  # noqa: E402

# ======================================================================================================================
# 1. Errors, device, command line
# ======================================================================================================================


class UserError(Exception):
    """Something the person at the command line can put right: printed as one line, exit code 2."""


@contextlib.contextmanager
def user_errors():
    """Turns `UserError` into one line on stderr and exit code 2; wraps each script's `main()`."""
    try:
        yield
    except UserError as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # the reader of our output went away: nothing left to say
        sys.stderr.close()
        sys.exit(1)
    except OSError as error:  # a full disk, a folder taken away: the machine's trouble, not the code's
        print("error: " + " ".join(f"{error.filename or ''} {error.strerror or error}".split()), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


class Parser(argparse.ArgumentParser):
    """argparse with errors on one line and the module docstring kept as written."""

    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)

    def error(self, message):
        print(f"error: {message} (see {self.prog} --help)", file=sys.stderr)
        sys.exit(2)


def number(kind, low=None, high=None, above=None):
    """An argparse type: a finite int or float, low <= value <= high, value > above."""

    def parse(text):
        try:
            value = kind(text)
            fits = math.isfinite(value) and (low is None or value >= low) and (above is None or value > above)
        except (ValueError, OverflowError):
            fits = False
        bounds = [f"at least {low}" if low is not None else "", f"above {above}" if above is not None else ""]
        bounds += [f"at most {high}" if high is not None else ""]
        expected = " and ".join(b for b in bounds if b)
        if not fits or (high is not None and value > high):
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
        torch.empty(1, device=device).add_(1)
    except (RuntimeError, AssertionError, NotImplementedError, ValueError) as error:
        reason = str(error).split("\n")[0][:120]
        raise UserError(f"--device {name}: not usable here ({reason}); expected cpu, cuda, cuda:N or mps") from None
    if device.type == "meta":
        raise UserError("--device meta: holds no values; expected cpu, cuda, cuda:N or mps")
    if device.type == "cpu":
        torch.set_flush_denormal(True)  # denormal gradients behind a zero gamma slow some CPUs by a fifth
    return device


def generator_for(device, *key):
    """torch.Generator on `device`, seeded by the key alone (numbers and strings), never by what ran before."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "big") >> 1)


def writable_folder(folder):
    """Path of `folder`, created if needed; UserError if nothing can be written there."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise UserError(f"--out {folder}: cannot write there ({error.strerror}); give a folder you may write to") from None


# ======================================================================================================================
# 2. Data
# ======================================================================================================================

CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # of CIFAR-10's training images in [0, 1]
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # what published ResNet-50s expect


class Data(NamedTuple):
    """Images uint8 (n, 3, h, w) and labels int64 (n,), all on one device; class names in label order."""

    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor
    classes: list


def load_data(path, device):
    """Data from a CIFAR-10 folder, from `train/<class>/*` and `test/<class>/*` images, or "synthetic".

    Raises UserError, one line, for anything missing, unreadable or of unequal size.
    """
    if path == "synthetic":
        data = Data(*synthetic_images(4000, seed=1), *synthetic_images(500, seed=2), SYNTHETIC_CLASSES)
    elif Path(path).exists() and not Path(path).is_dir():
        raise UserError(f"--data {path}: is a file; expected a folder, or the word synthetic")
    elif (Path(path) / "train").is_dir() or (Path(path) / "test").is_dir():
        data = _load_image_folder(Path(path))
    else:
        data = _load_cifar10(Path(path))
    return Data(*(t.to(device) for t in data[:4]), data.classes)


def channel_statistics(images):
    """Per-channel mean and standard deviation (two tuples of 3 floats) of uint8 images (n, 3, h, w), in [0, 1]."""
    counts = [torch.bincount(c.flatten(), minlength=256).cpu().double() for c in images.unbind(1)]
    levels = torch.arange(256, dtype=torch.float64) / 255
    means = [float((c * levels).sum() / c.sum()) for c in counts]
    stds = [float(((c * (levels - m) ** 2).sum() / c.sum()).sqrt()) for c, m in zip(counts, means)]
    return tuple(means), tuple(max(s, 1e-6) for s in stds)  # a channel of one value must not divide by zero


def _load_cifar10(folder):
    """CIFAR-10 through torchvision, which checks every file's md5 before reading it; downloads it if absent."""
    cifar = torchvision.datasets.CIFAR10
    archive = folder / cifar.filename
    advice = (f"put {cifar.filename} (md5 {cifar.tgz_md5}) into {folder}, or use --data FOLDER with train/<class>/ and "
              "test/<class>/ images, or --data synthetic")
    try:
        sets = [cifar(folder, train=train) for train in (True, False)]
    except RuntimeError:  # not there, or not what its md5 says
        if archive.exists() and not torchvision.datasets.utils.check_integrity(archive, cifar.tgz_md5):
            raise UserError(f"{archive}: truncated or altered (its md5 differs); {advice}") from None
        try:
            sets = [cifar(folder, train=train, download=True) for train in (True, False)]
        except (OSError, RuntimeError) as error:
            reason = str(error).split("\n")[0][:120]
            raise UserError(f"no CIFAR-10 in {folder} and it cannot be downloaded ({reason}): {advice}") from None
    except (OSError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"{folder}: cannot read CIFAR-10 ({error}); {advice}") from None
    parts = []
    for part in sets:
        parts += [torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets)]
    return Data(*parts, sets[0].classes)


def _load_image_folder(folder):
    """`train/<class>/*`, `test/<class>/*`: decoded once, then read from a cache while names, sizes and dates match."""
    sets = {}
    for part in ("train", "test"):
        try:
            sets[part] = torchvision.datasets.ImageFolder(folder / part)
        except (OSError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:160]
            raise UserError(f"--data {folder}: {reason}; expected images in {folder}/train/<class>/ and "
                            f"{folder}/test/<class>/") from None
    if sets["train"].classes != sets["test"].classes:
        differ = sorted(set(sets["train"].classes) ^ set(sets["test"].classes))
        raise UserError(f"--data {folder}: train and test must have the same class folders; only in one: {differ[:5]}")

    stamp = hashlib.blake2b()
    for part in sets.values():
        for name, _ in part.samples:
            status = os.stat(name)
            stamp.update(f"{os.path.relpath(name, folder)} {status.st_size} {status.st_mtime_ns}\n".encode())
    stamp = stamp.hexdigest()
    user_cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "similar-representations"
    caches = [folder / ".images.cache.pt", user_cache / f"{stamp[:32]}.pt"]  # the second: for read-only data folders
    for cache in caches:
        with contextlib.suppress(Exception):  # a missing, damaged or foreign cache is only a reason to decode again
            saved = torch.load(cache, weights_only=True)
            if saved["stamp"] == stamp:
                return Data(*saved["tensors"], sets["train"].classes)

    parts, size = [], None
    for part in sets.values():
        with ThreadPoolExecutor() as pool:
            images = list(pool.map(_decode, (name for name, _ in part.samples)))
        size = size or images[0].shape
        for (name, _), image in zip(part.samples, images):
            if image.shape != size:
                raise UserError(f"{name}: is {image.shape[2]} x {image.shape[1]} pixels, the first image "
                                f"{size[2]} x {size[1]}; all images must have the same size")
        parts += [torch.stack(images), torch.tensor(part.targets)]
    for cache in caches:
        try:
            cache.parent.mkdir(parents=True, exist_ok=True)
            save_atomically({"stamp": stamp, "tensors": parts}, cache)
            break
        except (OSError, RuntimeError):
            continue
    return Data(*parts, sets["train"].classes)


def _decode(name):
    try:
        return torchvision.transforms.functional.pil_to_tensor(torchvision.datasets.folder.default_loader(name))
    except Exception as error:  # damaged files fail in many ways
        raise UserError(f"{name}: not a readable image ({' '.join(str(error).split())[:120]}); replace or remove it") from None


SYNTHETIC_CLASSES = [f"{texture} {shape}" for shape in ("disc", "cross")
                     for texture in ("plain", "upright striped", "level striped", "checked", "ringed")]


def synthetic_images(n, seed):
    """n images uint8 (n, 3, 32, 32) and labels int64 (n,) of `SYNTHETIC_CLASSES`, on the CPU; the same for the same seed.

    A class is a shape and a texture. Position, size, tilt, both colours, the texture's phase and the background's
    shading and noise are drawn independently of it, so colour alone does not give the class away.
    """
    g = torch.Generator().manual_seed(seed)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(n, *shape, generator=g)

    labels = torch.randint(10, (n,), generator=g)
    axis = torch.arange(32.0)
    x, y = axis.view(1, 1, 32) - uniform(12, 20, 1, 1), axis.view(1, 32, 1) - uniform(12, 20, 1, 1)
    tilt, radius = uniform(-0.2, 0.2, 1, 1), uniform(9, 14, 1, 1)
    u, v = x * tilt.cos() + y * tilt.sin(), y * tilt.cos() - x * tilt.sin()  # pixels from the centre, along its axes
    rho, a, b = torch.hypot(u, v), u.abs() / radius, v.abs() / radius
    cross = torch.minimum(torch.maximum(a / 0.4, b), torch.maximum(a, b / 0.4))
    size = torch.where((labels >= 5).view(n, 1, 1), cross, rho / radius)  # below 1 inside the shape
    inside = (0.5 + (1 - size) * radius).clamp(0, 1)  # one pixel wide edge
    phase = uniform(0, 2 * math.pi, 1, 1)
    waves = [(w * (2 * math.pi / 6) + phase).sin() for w in (u, v, rho)]  # six pixels a period
    textures = torch.stack([torch.ones(n, 32, 32), waves[0], waves[1], waves[0] * waves[1], waves[2]], 1)
    dark = textures.gather(1, (labels % 5).view(n, 1, 1, 1).expand(n, 1, 32, 32)) < 0
    back, front = torch.rand(n, 3, 1, 1, generator=g), torch.rand(n, 3, 1, 1, generator=g)
    near = (front - back).abs().amax(1, keepdim=True) < 0.4  # too little contrast: move the shape half the range away
    front = torch.where(near, (back + 0.5) % 1, front)
    shading = F.interpolate(uniform(-0.15, 0.15, 3, 4, 4), size=32, mode="bilinear", align_corners=False)
    ink = torch.where(dark, 1 - front, front)
    images = torch.lerp(back + shading, ink, inside.unsqueeze(1)) + 0.06 * torch.randn(n, 3, 32, 32, generator=g)
    return (images.clamp(0, 1) * 255).round().to(torch.uint8), labels


# ======================================================================================================================
# 3. Augmentation on the device
# ======================================================================================================================
# Parameters are drawn for a whole batch (`simclr_params`, `imagenet_params`: dicts of tensors whose first dimension is
# the image) and can be sliced, so micro-batches and ranks see what one process with one batch would see.


def imagenet_params(n, height, width, device, generator=None, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3)):
    """Crop boxes and flips for n images: {"box": int64 (n, 4) top, left, height, width, "flip": bool (n,)}.

    The distribution of torchvision's RandomResizedCrop: area uniform in `scale`, log aspect uniform in `ratio`, the
    first of ten attempts that fits, else the largest centred box whose aspect lies in `ratio`. Flip with p = 0.5.
    """
    def uniform(low, high):
        return low + (high - low) * torch.rand(n, 10, device=device, generator=generator)

    area, aspect = height * width * uniform(*scale), torch.exp(uniform(math.log(ratio[0]), math.log(ratio[1])))
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
    return params | {"jitter": jitter < 0.8, "gray": gray < 0.2, "blur": blur < 0.5, "sigma": 0.1 + 1.9 * sigma}


def slice_params(params, rows):
    """The parameters of some of the images."""
    return {name: value[rows] for name, value in params.items()}


def _resize_matrix(start, length, size_in, size_out, flip=None):
    """(n, size_out, size_in): bilinear weights that resize [start, start + length) to size_out pixels.

    Half-pixel centres (align_corners=False), edges of the interval replicated, triangle filter widened when it shrinks
    (antialias); `flip` (n,) mirrors the result. One dimension of crop, resize and flip is one matrix.
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
    """uint8 (n, 3, h, w) -> float32 (n, 3, size, size) in [0, 1]: each image's own box, resized, perhaps mirrored."""
    top, left, height, width = params["box"].unbind(1)
    rows = _resize_matrix(top, height, images.shape[2], size)
    columns = _resize_matrix(left, width, images.shape[3], size, params["flip"])
    return _separable(images.float().div_(255), rows, columns)


def _luma(x):
    """Gray value (n, 1, h, w) of (n, 3, h, w), with the weights torchvision uses (ITU-R 601)."""
    return (x[:, 0:1] * 0.2989).add_(x[:, 1:2], alpha=0.587).add_(x[:, 2:3], alpha=0.114)


def _blend_(x, operation, factor):
    """Brightness (0), contrast (1) or saturation (2), chosen per image, in place; then clipped to [0, 1].

    All three blend the image with something: black, its mean gray value, its gray image. Factor 1 changes nothing.
    """
    view = (-1, 1, 1, 1)
    gray, rest = _luma(x), 1 - factor
    add = gray.mean((2, 3), keepdim=True) * (rest * (operation == 1)).view(view)
    add = torch.addcmul(add, gray, (rest * (operation == 2)).view(view))
    return x.mul_(factor.view(view)).add_(add).clamp_(0, 1)


def _shift_hue(x, turns):
    """Hue of x (n, 3, h, w) in [0, 1] shifted by `turns` (n,), through HSV with the hue in sextants, without branches."""
    r, g, b = x.split(1, 1)
    top, bottom = torch.maximum(torch.maximum(r, g), b), torch.minimum(torch.minimum(r, g), b)
    chroma = top - bottom
    hue = torch.where(top == r, g - b, torch.where(top == g, (b - r).add_(chroma, alpha=2), (r - g).add_(chroma, alpha=4)))
    hue.div_(chroma.clamp(min=1e-12)).add_(6 * turns.view(-1, 1, 1, 1))
    hue.sub_((hue / 6).floor_(), alpha=6)  # back to [0, 6)
    out = torch.empty_like(x)
    for channel, (centre, sign, offset) in enumerate(((3, 1, -1), (2, -1, 2), (4, -1, 2))):
        share = (hue - centre).abs_().mul_(sign).add_(offset).clamp_(0, 1)  # of the chroma, above the smallest channel
        torch.addcmul(bottom, chroma, share, out=out[:, channel:channel + 1])
    return out


def _color_jitter(x, params):
    """SimCLR's brightness, contrast, saturation and hue, in each image's own order, clipped after each.

    Every image takes the same path: its three blends in its order, each either before or after the hue, with factor 1
    standing in on the other side. So no image is looked at alone and nothing waits for the device.
    """
    order, factors = params["order"], params["factors"]
    hue_place = (order == 3).int().argmax(1, keepdim=True)
    places = torch.arange(3, device=x.device)
    blends = order.gather(1, places + (places >= hue_place))  # (n, 3): the order without the hue
    factor = torch.where(params["jitter"][:, None], factors.gather(1, blends), 1.0)
    before = torch.where(places < hue_place, factor, 1.0)
    after = torch.where(places >= hue_place, factor, 1.0)
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
    source = (torch.arange(size, device=sigma.device)[:, None] + taps).abs()  # (size, kernel_size), reflected at 0
    source = torch.where(source >= size, 2 * (size - 1) - source, source).expand(len(sigma), -1, -1)
    matrix = torch.zeros(len(sigma), size, size, device=sigma.device)
    return matrix.scatter_add_(2, source, weights[:, None].expand(-1, size, -1))


def simclr_augment(images, size, strength=1.0, blur=True, generator=None, params=None):
    """SimCLR's training views: float32 (n, 3, size, size) in [0, 1] from uint8 (n, 3, h, w), on the same device.

    Crop, flip, colour jitter of `strength`, gray, and (if `blur`) Gaussian blur with a kernel of size // 10 pixels,
    made odd (SimCLR App. A; its CIFAR-10 setting is strength 0.5 without blur). Every image has its own parameters,
    drawn by `simclr_params` from `generator` unless given. Equal to torchvision's functional operations with the same
    parameters, without rounding to uint8 in between.
    """
    if params is None:
        params = simclr_params(len(images), *images.shape[2:], images.device, generator, strength)
    piece = max(4, 2 ** 18 // (3 * size * size))
    if images.device.type == "cpu" and len(images) > piece:  # a CPU is twice as fast on pieces that fit its cache
        pieces = [slice(start, start + piece) for start in range(0, len(images), piece)]
        return torch.cat([simclr_augment(images[p], size, strength, blur, params=slice_params(params, p)) for p in pieces])
    x = _color_jitter(_crop_resize_flip(images, size, params), params)
    x = torch.where(params["gray"].view(-1, 1, 1, 1), _luma(x), x)
    kernel_size = size // 10 // 2 * 2 + 1
    if blur and kernel_size > 1:
        rows = params["blur"].nonzero().squeeze(1) if x.device.type == "cpu" else slice(None)  # a GPU would have to wait
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
    return _crop_resize_flip(images, size, {"box": box, "flip": torch.zeros_like(box[:, 0], dtype=torch.bool)})


def imagenet_test(images, size, mean=CIFAR_MEAN, std=CIFAR_STD):
    """The supervised test images: the whole image resized and standardised; float32 (n, 3, size, size)."""
    return _standardise(simclr_test(images, size), mean, std)


def _standardise(x, mean, std):
    for channel, (m, s) in enumerate(zip(mean, std)):  # plain numbers: a tensor of them would wait for the device
        x[:, channel].sub_(m).div_(s)
    return x


# ======================================================================================================================
# 4. ResNet-50, its representations, the projection head
# ======================================================================================================================

BLOCK_GROUPS = (3, 4, 6, 3)  # bottlenecks per block group, Table 1


class ProjectionHead(nn.Module):
    """SimCLR's non-linear head as the paper uses it (App. A: "a 3-layer MLP"): 2048 -> 2048 -> 2048 -> 128.

    As in SimCLR's code each layer is a product without bias and a batch norm, the first two with a ReLU, the last norm
    without a shift. `head.1` to `head.3` are the outputs of the layers.
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


def build_model(method, stem, classes=10, seed=0, zero_init=True):
    """A torchvision ResNet-50 whose `fc` is the projection head ("simclr") or the classifier ("supervised").

    stem "imagenet": 7 x 7 stride 2 and max-pool; "cifar": 3 x 3 stride 1, no pool (SimCLR App. B.9). The weights depend
    on method and seed only; the last gamma of each block is 0 unless `zero_init` is False. In train mode, on the CPU.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int.from_bytes(hashlib.blake2b(f"weights {method} {seed}".encode(), digest_size=7).digest(), "big"))
        model = torchvision.models.resnet50(zero_init_residual=zero_init)
        if stem == "cifar":
            model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
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
    """Every representation of `images` (n, 3, h, w): a dict, in depth order, from layer name to an (n, p) tensor.

    `BG1.1.odd`, `BG1.1.even`, ..., `BG4.3.even`: after bn3 before the addition, and after the block's last ReLU (App.
    A.1); then `head.1` to `head.3` if the model's `fc` is a `ProjectionHead`. Works on any torchvision ResNet-50. The
    model stays in the mode it is in (use eval for figures); no hook is left behind, even after an exception. TypeError
    for a network without the 16 bottlenecks.

    Features are in the order of flattened (channel, height, width); with `any_order` in that of memory, which for a
    channels_last network saves a transposition. Linear CKA is the same for any order.
    """
    return dict(stream_representations(model, images, any_order))


@torch.no_grad()
def stream_representations(model, images, any_order=False):
    """`representations` one at a time: yields (name, tensor) as soon as the network has computed it.

    Whoever lets go of each tensor before taking the next needs memory for two blocks instead of sixteen. The tensors must
    not be changed: the network reads them afterwards.
    """
    groups = [getattr(model, f"layer{g}", ()) for g in range(1, 5)]
    if tuple(len(g) for g in groups) != BLOCK_GROUPS or not all(hasattr(b, "bn3") for g in groups for b in g):
        raise TypeError(f"representations() needs a torchvision ResNet-50 (bottlenecks {BLOCK_GROUPS}), "
                        f"got {type(model).__name__}")

    def flat(x):
        last = any_order and x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
        return (x.permute(0, 2, 3, 1) if last else x).flatten(1)

    def keep_odd(module, inputs, output):  # a copy: torchvision adds the identity to this very tensor afterwards
        odd.append(flat(output).clone())

    x = model.maxpool(model.relu(model.bn1(model.conv1(images))))
    for g, group in enumerate(groups, 1):
        for b, block in enumerate(group, 1):
            odd = []
            handle = block.bn3.register_forward_hook(keep_odd)
            try:
                x = block(x)
            finally:
                handle.remove()
            yield f"BG{g}.{b}.odd", odd.pop()
            yield f"BG{g}.{b}.even", flat(x)
    if isinstance(model.fc, ProjectionHead):
        x = model.avgpool(x).flatten(1)
        for i, layer in enumerate(model.fc.layers, 1):
            x = layer(x)
            yield f"head.{i}", x


# ======================================================================================================================
# 5. LARS and the learning-rate schedule
# ======================================================================================================================


class LARS(torch.optim.Optimizer):
    """SimCLR's LARS (google-research/simclr, lars_optimizer.py): the rate is inside the momentum buffer.

        g <- gradient + weight_decay w;   t = eta |w| / |g|, or 1 if either norm is 0
        v <- momentum v + (lr t) g;       w <- w - v

    1-d parameters (batch-norm gamma and beta, biases) get neither weight decay nor adaptation (t = 1). `lr` is the rate
    of a step, already scaled for the batch. List operations only; nothing waits for the device.
    """

    def __init__(self, params, lr, momentum=0.9, weight_decay=0.0, eta=0.001):
        for name, value in (("lr", lr), ("momentum", momentum), ("weight_decay", weight_decay), ("eta", eta)):
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"LARS: {name} is {value}; expected a finite number, at least 0")
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, eta=eta))

    @torch.no_grad()
    def step(self, closure=None):
        """One update; returns the closure's loss, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            for adapted in (True, False):
                some = [p for p in params if (p.ndim > 1) == adapted]
                if some:
                    self._update(some, [self.state[p]["momentum_buffer"] for p in some], adapted, group)
        return loss

    @staticmethod
    def _update(params, buffers, adapted, group):
        gradients = [p.grad for p in params]
        torch._foreach_mul_(buffers, group["momentum"])
        if adapted:
            gradients = torch._foreach_add(gradients, params, alpha=group["weight_decay"])
            w_norm = torch.stack(torch._foreach_norm(params))
            g_norm = torch.stack(torch._foreach_norm(gradients))
            t = torch.where((w_norm > 0) & (g_norm > 0), group["eta"] * w_norm / g_norm, 1.0)
            torch._foreach_mul_(gradients, list((group["lr"] * t).unbind()))
            torch._foreach_add_(buffers, gradients)
        else:
            torch._foreach_add_(buffers, gradients, alpha=group["lr"])
        torch._foreach_sub_(params, buffers)


def warmup_cosine(step, total_steps, warmup_steps):
    """Learning-rate factor in [0, 1]: linear from 0 at step 0 to 1 at warmup_steps, cosine to 0 at total_steps."""
    if step < warmup_steps:
        return step / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))))


# ======================================================================================================================
# 6. InfoNCE
# ======================================================================================================================


def info_nce(z1, z2, temperature):
    """InfoNCE, Eq. (1), averaged over the 2N anchors: a 0-d float32 tensor, ln(2N - 1) for indistinguishable views.

    z1, z2 (N, d): row i of each is a view of image i; computed in float32 whatever their dtype. With torch.distributed
    initialised the rows are this rank's share, every rank's views are compared with, and the mean over ranks of the
    result (and of its gradient, as DistributedDataParallel takes it) is that of one process with the whole batch.
    ValueError for unequal shapes or a temperature that is not above 0.
    """
    return info_nce_and_accuracy(z1, z2, temperature)[0]


def info_nce_and_accuracy(z1, z2, temperature):
    """`info_nce` and the share of anchors, 0-d in [0, 1], whose own partner is the most similar of all 2N - 1 views."""
    if z1.shape != z2.shape or z1.ndim != 2:
        raise ValueError(f"info_nce needs two (N, d) tensors of the same shape, got {tuple(z1.shape)}, {tuple(z2.shape)}")
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


# ======================================================================================================================
# 7. Distributed helpers: without torchrun, one process with rank 0 of 1
# ======================================================================================================================


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


class _Gather(torch.autograd.Function):
    """all_gather whose gradient sums what every rank's loss says about this rank's rows."""

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
    """Every rank's rows of x (n, d), in rank order: (world_size n, d), with a gradient; x itself in one process."""
    return _Gather.apply(x) if world_size() > 1 else x


@contextlib.contextmanager
def distributed(device_name):
    """Joins the processes that torchrun started, if it did; yields this process's device."""
    if "LOCAL_RANK" not in os.environ:
        yield pick_device(device_name)
        return
    if device_name in (None, "cuda") and torch.cuda.is_available():
        device_name = f"cuda:{os.environ['LOCAL_RANK']}"
    device = pick_device(device_name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(hours=2))  # rank 0 may download first
    try:
        yield device
    finally:
        dist.destroy_process_group()


# ======================================================================================================================
# 8. Checkpoints
# ======================================================================================================================


def save_atomically(content, path):
    """torch.save to a temporary file, flushed to the disk, then renamed: `path` is the old or the new file, never half."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)


def read_file(path, device, advice):
    """What torch.save wrote into a file of plain values; nothing in it is executed. UserError if it is not one."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about what a foreign file is; the error below says it
            return torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {advice}") from None
    except Exception as error:  # damaged files fail in many ways, all of them meaning the same
        raise UserError(f"{path}: truncated, damaged or not a plain checkpoint ({str(error).split(chr(10))[0][:100]}); "
                        f"{advice}") from None


def read_checkpoint(path, device="cpu"):
    """The dict in a checkpoint of ours; nothing in the file is executed. UserError if it is not one."""
    advice = "expected a file written by train_simclr.py or train_supervised.py"
    content = read_file(path, device, advice)
    if not is_checkpoint(content):
        raise UserError(f"{path}: is no checkpoint of this study; {advice}")
    return content


def is_checkpoint(content):
    """True for what `Run.save` writes."""
    expected = {"settings": dict, "epoch": int, "step": int, "backbone": dict, "head": dict}
    known = isinstance(content, dict) and all(isinstance(content.get(name), kind) for name, kind in expected.items())
    return known and {"method", "seed", "classes", "mean", "std", *SETTINGS} <= content["settings"].keys()


def load_weights(model, checkpoint, path, assign=False):
    """Copies (or with `assign` puts) a checkpoint's backbone and head into `model`; UserError naming what does not fit."""
    weights = checkpoint["backbone"] | {f"fc.{name}": value for name, value in checkpoint["head"].items()}
    try:
        model.load_state_dict(weights, strict=True, assign=assign)
    except (RuntimeError, AttributeError, TypeError) as error:
        raise UserError(f"{path}: its weights do not fit a ResNet-50 with this stem and head ({str(error)[:300]})") from None


def load_model(path, device="cpu"):
    """The network of a checkpoint on `device`, in eval mode, ready for `representations`.

    `model.settings` is the dict of settings it was trained with, and "epoch" the epochs it has behind it. UserError if
    the file is missing, damaged or does not fit.
    """
    return model_of(read_checkpoint(path, device), path, device)


def model_of(checkpoint, path, device):
    """`load_model` of what `read_checkpoint` returned."""
    settings = checkpoint["settings"]
    with torch.device("meta"):  # no time spent on initial weights
        model = build_model(settings["method"], settings["stem"], len(settings["classes"]))
    load_weights(model, checkpoint, path, assign=True)
    model.settings = settings | {"epoch": checkpoint["epoch"]}
    return model.to(device, torch.float32, memory_format=torch.channels_last).eval()


def load_any_model(path, method, device="cpu", image_size=None, mean=IMAGENET_MEAN, std=IMAGENET_STD):
    """The network in a checkpoint of ours, or in a plain state dict of a torchvision ResNet-50, in eval mode.

    For a state dict, `method` ("simclr" or "supervised") is the one whose augmentations it gets in Figures 3 and 5, its
    images are resized to `image_size` (default: 224, or 32 for a 3 x 3 stem) and standardised by `mean` and `std`; all
    of it is in `model.settings`, "left_out" being the names of the file's tensors that are not the backbone's. UserError
    if the file is neither, or does not fit to the last tensor.
    """
    content = read_file(path, device, "expected a checkpoint of this study or a state dict of a torchvision ResNet-50")
    if is_checkpoint(content):
        return model_of(content, path, device)
    weights, left_out = find_backbone(content, path)
    kernel = tuple(weights["conv1.weight"].shape[2:])
    if kernel not in ((7, 7), (3, 3)):
        raise UserError(f"{path}: its conv1 is {kernel}; expected a 7 x 7 (ImageNet) or 3 x 3 (CIFAR-10) stem")
    stem = "imagenet" if kernel == (7, 7) else "cifar"
    with torch.device("meta"):
        model = build_model("supervised", stem)
    model.fc = nn.Identity()
    wanted = model.state_dict()
    counts = {name: torch.zeros((), dtype=torch.int64) for name in wanted if name.endswith("num_batches_tracked")}
    weights = counts | weights  # old files have no counts, and nothing here uses them
    other_shape = {name for name in wanted.keys() & weights.keys() if wanted[name].shape != weights[name].shape}
    faults = {"missing": wanted.keys() - weights.keys(), "unexpected": weights.keys() - wanted.keys(),
              "of another shape": other_shape}
    if any(faults.values()):
        what = "; ".join(f"{fault}: {some_of(sorted(names))}" for fault, names in faults.items() if names)
        raise UserError(f"{path}: does not fit a torchvision ResNet-50; {what}")
    load_weights(model, {"backbone": weights, "head": {}}, path, assign=True)
    model.settings = {
        "file": str(path), "left_out": left_out, "method": method, "seed": None, "data": None, "classes": [], "stem": stem,
        "image_size": image_size or {"imagenet": 224, "cifar": 32}[stem], "standardise": True, "mean": list(mean),
        "std": list(std), "strength": {"imagenet": 1.0, "cifar": 0.5}[stem], "blur": stem == "imagenet"}
    return model.to(device, torch.float32, memory_format=torch.channels_last).eval()


def find_backbone(content, path):
    """({torchvision's name: tensor} of a ResNet's backbone, names of the tensors left out) in a loaded file."""
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    content = content if isinstance(content, dict) else {}
    tensors = {str(name): value for name, value in content.items() if isinstance(value, torch.Tensor)}
    first = [re.fullmatch(r"((?:module\.|backbone\.|encoder\.|encoder_q\.|model\.)*)conv1\.weight", name) for name in tensors]
    prefixes = [match[1] for match in first if match]
    if len(prefixes) != 1:
        found = f"{len(prefixes)} of them, {prefixes}" if prefixes else some_of(sorted(tensors)) or "no tensors"
        raise UserError(f"{path}: expected the names of one torchvision ResNet-50, conv1.weight and so on, perhaps after "
                        f"module. backbone. encoder. encoder_q. or model.; found {found}")
    inside = {name.removeprefix(prefixes[0]): value for name, value in tensors.items() if name.startswith(prefixes[0])}
    heads = ("fc.", "head.", "heads.", "projector.", "projection_head.", "predictor.", "prototypes.", "classifier.", "linear.")
    weights = {name: value for name, value in inside.items() if not name.startswith(heads)}
    return weights, sorted(tensors.keys() - {prefixes[0] + name for name in weights})


def some_of(names, most=5):
    """The first names of a list, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


# ======================================================================================================================
# 9. Training
# ======================================================================================================================


def training_arguments(doc, presets, argv=None):
    """Parsed flags of a training script: the preset's values wherever a flag is not given. Exits with 2 if impossible."""
    parser = Parser(doc)
    add = parser.add_argument
    count = number(int, low=1)
    add("--preset", choices=list(presets), default="paper", help="values of all flags not given (default: paper)")
    add("--data", help="CIFAR-10 folder, folder with train/<class>/ and test/<class>/ images, or synthetic (default: data)")
    add("--out", help="folder for checkpoints and logs (default: checkpoints/<preset>)")
    add("--seeds", type=number(int, low=0), nargs="+", help="one network per seed, trained one after another (App. A: 3)")
    add("--epochs", type=count, help="passes over the training images (App. A)")
    add("--batch-size", type=count, help="images per step, over all processes (App. A)")
    add("--micro-batch", type=count, help="images per forward and backward, per process: lower it to save memory")
    add("--checkpoint-activations", action="store_true",
        help="save memory by computing activations twice, the batch in one piece: exact, batch norm included")
    add("--image-size", type=number(int, low=8), help="pixels, training and test (footnote 3: 224; SimCLR B.9: 32)")
    add("--stem", choices=("imagenet", "cifar"), help="7x7 stride 2 and max-pool, or 3x3 stride 1 (SimCLR B.9)")
    add("--lr", type=number(float, low=0), help="learning rate per 256 images: the peak is lr * batch-size / 256")
    add("--weight-decay", type=number(float, low=0), help="L2 factor; batch norm and biases are exempt")
    add("--warmup-epochs", type=number(float, low=0), help="epochs of linear warmup (App. A)")
    if "temperature" in presets["paper"]:
        add("--temperature", type=number(float, above=0), help="tau of Eq. (1)")
    add("--subset", type=count, help="training images used, a fixed random choice (default: all)")
    add("--checkpoint-every", type=count, help="epochs between checkpoints")
    add("--device", help="cpu, cuda, cuda:N or mps (default: cuda, else mps, else cpu)")
    add("--precision", choices=("fp32", "bf16"), help="of products in training (default: bf16 where hardware has it)")
    add("--compile", action="store_true", help="torch.compile the network; pays on GPUs")
    args = parser.parse_args(argv)
    given = {name for name, value in vars(args).items() if value is not None}
    for name, value in presets[args.preset].items():
        if name not in given:
            setattr(args, name, value)
    if args.warmup_epochs > args.epochs:
        if "warmup_epochs" in given:
            parser.error(f"--warmup-epochs {args.warmup_epochs}: more than --epochs {args.epochs}")
        args.warmup_epochs = args.epochs / 2  # a short run by flags alone: the preset's warmup must leave room
    if args.checkpoint_activations and args.compile:
        parser.error("--compile: torch cannot compile what --checkpoint-activations does; give one of them")
    if args.checkpoint_activations and "micro_batch" not in given:
        args.micro_batch = args.batch_size  # the whole batch in one piece is what it is for
    if len(set(args.seeds)) != len(args.seeds):
        parser.error(f"--seeds {args.seeds}: each seed once")
    args.out = args.out or f"checkpoints/{args.preset}"
    return args


# The settings of a run: all that its result depends on, and what a figure needs to know.
SETTINGS = ("preset data epochs batch_size micro_batch checkpoint_activations image_size stem lr weight_decay "
            "warmup_epochs temperature strength blur subset precision").split()


def run_settings(args, method, seed, data, device):
    """The settings dict (plain types only) of one run; UserError if the batch does not fit the data or the ranks."""
    n = len(data.train_images)
    if args.subset and args.subset > n:
        raise UserError(f"--subset {args.subset}: the training set has {n} images")
    n = args.subset or n
    if args.batch_size > n:
        raise UserError(f"--batch-size {args.batch_size}: the run uses {n} training images; give at most that")
    if args.batch_size % world_size():
        raise UserError(f"--batch-size {args.batch_size}: must be divisible by the {world_size()} processes")
    if args.batch_size // world_size() < 2:
        raise UserError(f"--batch-size {args.batch_size}: batch norm needs at least 2 images per process")
    settings = {name: getattr(args, name, None) for name in SETTINGS}
    settings["precision"] = args.precision or ("bf16" if has_bf16(device) else "fp32")
    settings["micro_batch"] = min(args.micro_batch, args.batch_size)
    local = args.batch_size // world_size()
    if method == "supervised" and 1 in (local % settings["micro_batch"], min(local, settings["micro_batch"])):
        raise UserError(f"--micro-batch {settings['micro_batch']}: leaves a piece of 1 image, too few for batch norm")
    mean, std = channel_statistics(data.train_images)
    return settings | {"method": method, "seed": seed, "train_images": n, "classes": list(data.classes),
                       "mean": list(mean), "std": list(std)}


def steps_until(epoch, n, batch_size):
    """Steps after which `epoch` passes over n images are complete. Batches cross the ends of epochs, as in SimCLR."""
    return -(-epoch * n // batch_size)


class Order:
    """The endless stream of training images: one permutation after another, each a function of seed and epoch only."""

    def __init__(self, seed, n, total, device):
        self.seed, self.n, self.device, self.known = seed, n, device, {}
        chosen = torch.randperm(total, generator=torch.Generator().manual_seed(0))[:n]  # --subset: same for every seed
        self.chosen = chosen.sort().values.to(device)

    def __getitem__(self, stream):
        """Indices (int64, on the device) of the images at positions stream.start to stream.stop - 1."""
        first, last = stream.start // self.n, (stream.stop - 1) // self.n
        epochs = range(first, last + 1)
        self.known = {e: self.known[e] if e in self.known else self._permutation(e) for e in epochs}
        joined = torch.cat([self.known[e] for e in epochs])
        return joined[stream.start - first * self.n:stream.stop - first * self.n]

    def _permutation(self, epoch):
        return self.chosen[torch.randperm(self.n, generator=generator_for("cpu", "order", self.seed, epoch)).to(self.device)]


@contextlib.contextmanager
def frozen_statistics(model):
    """Batch norm normalises with the batch's statistics as in training, but leaves its running statistics alone."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


@contextlib.contextmanager
def recomputing(block):
    """Batch norm computes again what it computed before, all the same, but counts nothing."""
    norms = [m for m in block.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, norm.num_batches_tracked.clone()
    try:
        yield
    finally:
        for norm, momentum, count in before:
            norm.momentum, norm.num_batches_tracked = momentum, count


def checkpoint_blocks(model):
    """Makes each bottleneck keep only its input and compute its activations again in the backward pass."""
    for layer in (model.layer1, model.layer2, model.layer3, model.layer4):
        for block in layer:
            contexts = functools.partial(lambda b: (contextlib.nullcontext(), recomputing(b)), block)
            block.forward = functools.partial(recompute_activations, block.forward, use_reentrant=False,
                                              context_fn=contexts, preserve_rng_state=False)


class Stop:
    """Turns SIGTERM and SIGINT into a question asked once per step; a second signal ends the process as usual."""

    def __init__(self):
        self.signal, self.previous = None, {}

    def __enter__(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            self.previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_):
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _note(self, number, _):
        self.signal = number
        signal.signal(number, self.previous[number])

    def asked(self):
        """True on every rank once any rank got a signal."""
        if world_size() == 1:
            return self.signal is not None
        flag = torch.tensor([float(self.signal is not None)])  # on the CPU: gloo, no wait for the GPU
        dist.all_reduce(flag)
        return bool(flag > 0)


class Log:
    """The JSON-lines file beside a checkpoint: one record for the run, one per epoch. Only rank 0 writes."""

    def __init__(self, path):
        self.path = path

    def start(self, settings, device):
        """A new file with the run's record: settings, git commit, versions, device."""
        self._replace([self._run_record(device) | {"settings": settings}])

    def resume(self, epoch, device):
        """Drops records of epochs after `epoch`, which will be run again, and notes where the run goes on."""
        records = []
        if self.path.exists():
            for line in self.path.read_text().splitlines():
                with contextlib.suppress(ValueError, TypeError):  # a line cut short by a kill
                    records.append(dict(json.loads(line)))
        records = [r for r in records if r.get("epoch", 0) <= epoch]
        self._replace(records + [{"resumed_after_epoch": epoch} | self._run_record(device)])

    def write(self, record):
        """Appends one record."""
        if rank() == 0:
            with open(self.path, "a") as file:
                file.write(json.dumps(record) + "\n")

    def _replace(self, records):
        if rank() == 0:
            temporary = self.path.with_name(self.path.name + ".tmp")
            temporary.write_text("".join(json.dumps(r) + "\n" for r in records))
            os.replace(temporary, self.path)

    @staticmethod
    def _run_record(device):
        git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True,
                             cwd=Path(__file__).parent) if shutil.which("git") else None
        return {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "commit": git.stdout.strip() or None if git else None,
                "torch": torch.__version__, "torchvision": torchvision.__version__, "python": platform.python_version(),
                "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
                "world_size": world_size(), "threads": torch.get_num_threads()}


class Batch(NamedTuple):
    """This rank's share of one step: images uint8 (n, 3, h, w), labels (n,), and how to draw augmentation parameters."""

    images: torch.Tensor
    labels: torch.Tensor
    draw: object

    def params(self, make, view=0, **options):
        """`make`'s parameters for these images: drawn for the whole batch from (seed, step, view), then this rank's rows."""
        return self.draw(make, view, options)


class Run:
    """One network in training: everything that a checkpoint holds, and the step, epoch and file operations on it."""

    def __init__(self, args, settings, data, device):
        self.settings, self.data, self.device, self.args = settings, data, device, args
        self.name = f"{settings['method']}_seed{settings['seed']}"
        self.path = Path(args.out) / f"{self.name}.pt"
        self.log = Log(self.path.with_suffix(".jsonl"))
        self.n, self.batch, self.epochs = settings["train_images"], settings["batch_size"], settings["epochs"]
        self.total = steps_until(self.epochs, self.n, self.batch)
        self.warmup = int(settings["warmup_epochs"] * self.n // self.batch)
        self.peak = settings["lr"] * self.batch / 256
        self.order = Order(settings["seed"], self.n, len(data.train_images), device)
        local = self.batch // world_size()
        self.rows = slice(rank() * local, (rank() + 1) * local)  # this rank's part of each batch
        self.epoch = self.step = 0
        self.spent = 0.0  # seconds in the current epoch
        self.sums = torch.zeros(3, device=device)  # losses, accuracies, steps of the current epoch
        self.bad_step = torch.full((), -1, device=device)  # first step whose loss was not finite

    def build(self, checkpoint):
        """The network and optimizer, new or from `checkpoint`, and the wrappers that the flags ask for."""
        s = self.settings
        self.model = build_model(s["method"], s["stem"], len(s["classes"]), s["seed"])
        if checkpoint:
            load_weights(self.model, checkpoint, self.path)
        if world_size() > 1 and self.device.type == "cuda":
            self.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        self.model = self.model.to(self.device, memory_format=torch.channels_last).train()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = LARS(trained, self.peak, weight_decay=s["weight_decay"])
        if checkpoint:
            try:
                self.optimizer.load_state_dict(checkpoint["optimizer"])
                self.sums, self.spent = checkpoint["sums"].to(self.device), checkpoint["spent"]
            except (KeyError, ValueError, AttributeError) as error:
                raise UserError(f"{self.path}: its optimizer state is damaged ({error}); move it away to start again") from None
            self.epoch, self.step = checkpoint["epoch"], checkpoint["step"]
        if s["checkpoint_activations"]:
            checkpoint_blocks(self.model)
        if self.args.compile:
            self.model.compile()  # in place: parameter names stay as they are
        self.network, self.no_sync = self.model, contextlib.nullcontext
        if world_size() > 1:
            parallel = nn.parallel.DistributedDataParallel  # each rank keeps its own running statistics between saves
            new = "forward_sync_buffers" in inspect.signature(parallel).parameters  # its name from torch 2.14 on
            self.network = parallel(self.model, **{"forward_sync_buffers" if new else "broadcast_buffers": False})
            self.no_sync = self.network.no_sync

    def autocast(self):
        """The context of the network's forward pass: bf16 products if the settings say so."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings["precision"] == "bf16")

    def next_batch(self):
        """The next step's `Batch`; a function of seed and step only."""
        images, step, seed = self.data.train_images, self.step, self.settings["seed"]
        chosen = self.order[step * self.batch:(step + 1) * self.batch][self.rows]

        def draw(make, view, options):
            generator = generator_for(self.device, "augmentation", seed, step, view)
            return slice_params(make(self.batch, *images.shape[2:], self.device, generator, **options), self.rows)

        return Batch(images[chosen], self.data.train_labels[chosen], draw)

    def take_step(self, gradients):
        """One optimizer step. Nothing in it waits for the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.peak * warmup_cosine(self.step, self.total, self.warmup)
        loss, accuracy = gradients(self, self.next_batch())
        self.bad_step = torch.where((self.bad_step < 0) & ~loss.isfinite(), self.step, self.bad_step)
        self.sums += torch.stack([loss, accuracy, torch.ones_like(loss)])
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1

    def refuse_if_not_finite(self):
        """UserError naming the first step whose loss was not finite, or if a weight is not; on every rank alike."""
        finite = torch.stack([p.isfinite().all() for p in self.model.parameters()]).all()
        bad = torch.stack([self.bad_step, torch.where(finite, -1, self.step)])
        if world_size() > 1:
            dist.all_reduce(bad, dist.ReduceOp.MAX)
        loss_step, weight_step = bad.tolist()
        if loss_step >= 0 or weight_step >= 0:
            what = f"the loss of step {loss_step}" if loss_step >= 0 else f"a weight after step {weight_step}"
            raise UserError(f"{self.name}: {what} (of {self.total}) is not finite; stopped, the last good checkpoint is "
                            "kept; lower --lr or raise --warmup-epochs")

    def save(self):
        """Writes the checkpoint; a file that cannot be written leaves the previous one as it was."""
        self.refuse_if_not_finite()
        average_statistics(self.model)
        if world_size() > 1:  # the file must not depend on how many ranks there are
            dist.all_reduce(self.sums)
            self.sums /= world_size()
        if rank() == 0:
            weights = self.model.state_dict()
            try:
                save_atomically({
                    "settings": self.settings, "epoch": self.epoch, "step": self.step, "sums": self.sums, "spent": self.spent,
                    "backbone": {name: value for name, value in weights.items() if not name.startswith("fc.")},
                    "head": {name[3:]: value for name, value in weights.items() if name.startswith("fc.")},
                    "optimizer": self.optimizer.state_dict()}, self.path)
            except (OSError, RuntimeError) as error:
                raise UserError(f"{self.path}: cannot be written ({error}); the previous checkpoint is kept") from None

    def end_epoch(self):
        """Counts, logs and prints the epoch that the last step completed."""
        self.refuse_if_not_finite()
        sums = self.sums.clone()
        if world_size() > 1:
            dist.all_reduce(sums)
        loss, accuracy, steps = sums.tolist()  # the wait for the device that ends an epoch
        self.epoch += 1
        images = round(steps) // world_size() * self.batch
        record = {"epoch": self.epoch, "loss": loss / steps, "lr": self.optimizer.param_groups[0]["lr"],
                  "images_per_second": images / self.spent, "accuracy": accuracy / steps}
        if self.settings["method"] == "supervised":
            record["test_accuracy"] = self.test_accuracy()
        self.log.write(record)
        rest = (self.total - self.step) * self.batch / record["images_per_second"] / 60
        test = f"  test {record['test_accuracy']:.3f}" if "test_accuracy" in record else ""
        print0(f"{self.name}  epoch {self.epoch:>{len(str(self.epochs))}}/{self.epochs}  loss {record['loss']:.4f}  "
               f"accuracy {record['accuracy']:.3f}{test}  lr {record['lr']:.3g}  "
               f"{record['images_per_second']:.0f} images/s  {rest:.0f} min left")
        self.sums.zero_()
        self.spent = 0.0

    @torch.no_grad()
    def test_accuracy(self):
        """Share of test images classified correctly, by the network in eval mode; the ranks share the work."""
        average_statistics(self.model)
        self.model.eval()
        s, images, labels = self.settings, self.data.test_images, self.data.test_labels
        right = torch.zeros((), device=self.device)
        for start in range(rank() * 256, len(images), world_size() * 256):
            inputs = imagenet_test(images[start:start + 256], s["image_size"], s["mean"], s["std"])
            with self.autocast():
                logits = self.model(inputs.contiguous(memory_format=torch.channels_last))
            right += (logits.argmax(1) == labels[start:start + 256]).sum()
        if world_size() > 1:
            dist.all_reduce(right)
        self.model.train()
        return right.item() / len(images)


def average_statistics(model):
    """Batch norm's running statistics averaged over the ranks, so that every rank and every checkpoint has the same."""
    if world_size() > 1:
        buffers = [b for b in model.buffers() if b.is_floating_point()]
        flat = torch.cat([b.flatten() for b in buffers])
        dist.all_reduce(flat)
        for buffer, mean in zip(buffers, (flat / world_size()).split([b.numel() for b in buffers])):
            buffer.copy_(mean.view_as(buffer))


def refuse_other_settings(path, saved, wanted):
    """UserError naming every setting on which the result depends that differs from the checkpoint's."""
    relevant = wanted.keys() - {"preset", "data"}  # names; the data itself shows in its statistics
    differ = [f"{name} {saved.get(name)} -> {wanted[name]}" for name in sorted(relevant) if saved.get(name) != wanted[name]]
    if differ:
        raise UserError(f"{path} was trained with other settings ({'; '.join(differ)[:300]}); give the same flags to resume, "
                        "or another --out")


def train(args, settings, data, device, gradients):
    """Trains the network of `settings`, writing `<out>/<method>_seed<seed>.pt` and `.jsonl`; resumes by itself.

    `gradients(run, batch)` adds the gradient of the mean loss over the rank's `Batch` to the parameters and returns
    (loss, accuracy), 0-d and detached. The result is a function of the settings alone: killed at any moment and started
    again on the same device, training ends in the same weights, bit for bit.
    """
    run = Run(args, settings, data, device)
    if rank() == 0:
        for leftover in (run.path, run.log.path):
            leftover.with_name(leftover.name + ".tmp").unlink(missing_ok=True)
    checkpoint = read_checkpoint(run.path, "cpu") if run.path.exists() else None
    if checkpoint:
        refuse_other_settings(run.path, checkpoint["settings"], settings)
        if checkpoint["epoch"] >= run.epochs:
            print0(f"{run.path}: finished, {run.epochs} epochs; skipped")
            return
    advice = (f"--batch-size {run.batch} --micro-batch {settings['micro_batch']} --image-size {settings['image_size']} "
              f"--precision {settings['precision']}: lower --micro-batch, or give --checkpoint-activations or --precision "
              "bf16, or use more processes")
    run.build(checkpoint)
    if checkpoint:
        print0(f"{run.path}: resumed after epoch {run.epoch} of {run.epochs}, step {run.step} of {run.total}")
        run.log.resume(run.epoch, device)
    else:
        run.log.start(settings, device)

    with Stop() as stop, out_of_memory_advice(advice):
        while run.epoch < run.epochs:
            started, end, stopped = time.perf_counter() - run.spent, steps_until(run.epoch + 1, run.n, run.batch), False
            while run.step < end and not stopped:
                run.take_step(gradients)
                stopped = stop.asked()
            run.spent = time.perf_counter() - started
            if run.step == end:
                run.end_epoch()
            if stopped or run.epoch % args.checkpoint_every == 0 or run.epoch == run.epochs:
                run.save()
            if stopped:
                print0(f"{run.path}: stopped by a signal after step {run.step} of {run.total} and saved; "
                       "the same command resumes")
                sys.exit(128 + (stop.signal or signal.SIGTERM))


@contextlib.contextmanager
def out_of_memory_advice(advice):
    """Turns running out of memory into a UserError with `advice`: the sizes in use and the flags that help."""
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one; other allocators raise plain ones
        if "out of memory" not in str(error) and "not enough memory" not in str(error):
            raise
        raise UserError(f"out of memory with {advice}") from None


def load_data_once(path, device):
    """`load_data` by rank 0 first, which downloads or decodes, then by the others; if it fails, all of them stop."""
    data, error = None, None
    if rank() == 0:
        try:
            data = load_data(path, device)
        except UserError as caught:
            error = caught
    if world_size() > 1:
        fine = [error is None]
        dist.broadcast_object_list(fine, src=0)
        if rank() > 0 and not fine[0]:
            sys.exit(2)  # rank 0 says why
    if error:
        raise error
    return data or load_data(path, device)


def train_all(doc, method, presets, gradients):
    """The `main` of a training script: flags, data, then one network after another, a seed each."""
    args = training_arguments(doc, presets)
    torch.backends.cudnn.deterministic = True  # a resumed run must end in the same weights
    with distributed(args.device) as device:
        writable_folder(args.out)
        data = load_data_once(args.data, device)
        for seed in args.seeds:
            train(args, run_settings(args, method, seed, data, device), data, device, gradients)


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


# ============================================================================================================
# 11. Figures
# ============================================================================================================
# What the four figure scripts share, in the order of use: command line, networks and images, measuring,
# claims and their verdicts, files, drawing. In an .npz a plain key holds the biased value of Eq. (2),
# `<key>_debiased` the other, and `<key>_left_out` ten of them, each measured without one tenth of the images.

LAYERS = [f"BG{g}.{b}.{kind}" for g, count in enumerate(BLOCK_GROUPS, 1) for b in range(1, count + 1)
          for kind in ("odd", "even")]
HEAD = ["head.1", "head.2", "head.3"]
ODD, EVEN = slice(0, 32, 2), slice(1, 32, 2)  # of the 32 layers
GROUP = np.repeat([1, 2, 3, 4], BLOCK_GROUPS)  # block group of each of the 16 odd or even layers
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
    add("--checkpoints", type=os.path.expanduser, help="folder of "
        f"*_seed*.pt files (default: {PAPER}, if no files)")
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
        help="of the Gram matrices' products (default: the fastest whose CKA error is below 1e-4)")
    add("--memory", type=number(float, above=0), help="GB for CKA (default: 80 %% of what is free)")
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


def foreign_options(args, method=None):
    """The flags given for state dicts of both sides, or of one `method`'s alone, by `load_model`'s names."""
    given = {name: getattr(args, f"{method}_{name}" if method else name) for name in FOREIGN}
    return {name: value for name, value in given.items() if value is not None}


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
    settings = [model.settings for models in networks.values() for model in models]
    both = foreign_options(args)
    if both and all("preset" in s for s in settings):
        flag = [*both][0].replace("_", "-")
        raise UserError(f"--{flag} is for state dicts; checkpoints of this study know theirs: leave it out")
    for name in ("stem", "image_size", "data"):
        values = sorted({str(s[name]) for s in settings if s[name]})
        if len(values) > 1:
            warn(f"networks differ in {name}: {', '.join(values)}")
    if args.untrained:
        networks = {m: [untrained(model, i, device) for i, model in enumerate(networks[m])] for m in methods}
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
    own = foreign_options(args, method)
    models = [load_model(path, device, method, **foreign_options(args) | own) for path in paths]
    if own and all("preset" in model.settings for model in models):
        flag = [*own][0].replace("_", "-")
        raise UserError(f"--{method}-{flag} is for state dicts; these checkpoints know theirs: leave it out")
    for path, model in zip(paths, models):
        s = model.settings
        model.name = without_ending(path) if files else f"{side_label(args, method)} seed {s['seed']}"
        if s.get("epoch", 0) < s.get("epochs", 0):
            warn(f"{path}: not finished, epoch {s['epoch']} of {s['epochs']}")
        if s.get("left_out"):
            warn(f"{path}: not of the backbone and left out: {first_names(s['left_out'])}")
        if s.get("note"):
            print(f"{path}: {s['note']}")
    seeds = [(model.settings["method"], model.settings["seed"]) for model in models]
    if not files and (len(set(seeds)) < len(seeds) or {name for name, _ in seeds} != {method}):
        raise UserError(f"--checkpoints {folder}: {method}_seed*.pt hold {seeds}; expected {method} networks "
                        "of different seeds; move the others away")
    return models


def untrained(model, index, device):
    """`model` before training, but in the standard initialisation: with a gamma of 0 odd layers are constant.

    Its weights follow from its seed, or from its `index` among the files if it has none.
    """
    s = model.settings
    seed = index if s["seed"] is None else s["seed"]
    fresh = build_model(s["method"], s["stem"], max(1, len(s["classes"])), seed, zero_init=False,
                        stem_padding=s.get("stem_padding", 1))
    if not isinstance(model.fc, ProjectionHead):
        fresh.fc = nn.Identity()
    fresh.settings = s | {"seed": seed, "epoch": 0, "untrained": True}
    fresh.name = f"untrained {model.name}"
    return fresh.to(device, memory_format=torch.channels_last).eval()


def figure_data(args, settings, device):
    """(Data, its path, whether it is other data than the networks' training had).

    Other data would judge the claims on images that nobody chose: refused, unless --data asks for it.
    """
    trained = [s for s in settings if s["data"]]
    path = args.data or next((s["data"] for s in trained), "data")
    data = load_data(path, device, download=args.download)
    classes, statistics = data.classes, np.array(channel_statistics(data.train_images))
    for s in trained:
        theirs = np.array([s["mean"], s["std"]])
        if s["classes"] == classes and abs(theirs - statistics).max() < 1e-3:
            continue
        text = "; ".join(f"{where}: {len(names)} classes ({first_names(names, 3)}), mean and deviation of "
                         f"the channels {numbers.round(3).tolist()}" for where, names, numbers in (
                             (f"trained on {s['data']}", s["classes"], theirs), (path, classes, statistics)))
        if not args.data:
            raise UserError(f"other images than the training's. {text}. Give the right folder with --data, "
                            f"or --data {path} if you mean these")
        warn(f"other images than the training's, and the title says so. {text}")
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


def network_source(model, images, layers=range(32), params=None):
    """A source for `gram_statistics`: the representations of images, or of their copy augmented by `params`.

    `layers`, in rising order, are indices among the network's 32 or (with a head) 35.
    """

    def source(start, stop):
        rows = slice(start, stop)
        inputs = prepare(model, images[rows], None if params is None else slice_params(params, rows))
        for i, (_, x) in enumerate(stream_representations(model, inputs, any_order=True)):
            if i in layers:
                yield x

    return source


def layer_names(models, layers, note=""):
    """ "<network><note> <layer>" for each layer of each model, in the order of their sources."""
    return [f"{m.name}{note} {layer}" for m in models for layer in layers]


def measure(study, sources, names):
    """({ending: CKA}, dominance (L,)) as numpy arrays; says which layers are constant or rest on few images.

    CKA is (L, L) under the endings "" and "_debiased", (10, L, L) under "_left_out" and "_debiased_left_out".
    `names`: one per layer of all sources, for the warnings. UserError for features that are not finite.
    """
    args = study.args
    options = {"precision": args.precision, "memory": int(args.memory * 1e9) if args.memory else None}
    advice = f"--batch-size {args.batch_size}: lower it, or give --memory less than is free (GB)"
    with warnings.catch_warnings(record=True) as caught, out_of_memory_advice(advice):
        warnings.simplefilter("always")
        try:
            found = gram_statistics(sources, len(study.images), batch=args.batch_size, **options)
        except ValueError as error:
            asked = dict.fromkeys(name.rsplit(" ", 1)[0] for name in names)
            raise UserError(f"{error} (sources: {', '.join(asked)})") from None
    for layer in found.constant:
        warn(f"{names[layer]} is constant over the images: its CKA is undefined (NaN)")
    for warning in caught:
        if "is constant" not in str(warning.message):
            warn(str(warning.message))
    dominance = found.dominance.numpy()
    for layer in np.flatnonzero(dominance > 0.5):
        warn(f"{names[layer]}: 1 % of the images carry {dominance[layer]:.0%} of HSIC(K, K), so of its CKA")
    cka = {"": found.cka, "_debiased": found.debiased_cka,
           "_left_out": found.left_out.float(), "_debiased_left_out": found.debiased_left_out.float()}
    return {ending: values.numpy() for ending, values in cka.items()}, dominance


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
            least, most, doubt = margin.mean(), margin.mean(), margin.std()
            if margin.size < 3:
                least, most, doubt = margin.min(), margin.max(), 2 * np.nan_to_num(error)
            low, high = min(least, margin.mean() - doubt), max(most, margin.mean() + doubt)
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
        key = next(key for key in ("pairs", "invariance_simclr", "networks_simclr") if key in arrays)
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


def mark_block_groups(ax, per_block=1, head=0, both=False):
    """Ticks and lines for BG1 to BG4 (and the head), `per_block` layers per bottleneck; on x or both axes."""
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


def warn(text):
    """One line on stderr."""
    print("warning: " + text, file=sys.stderr)


def write_atomically(path, write):
    """`write(file)` into a temporary file, then renamed to `path`; UserError if it cannot be written."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None
    finally:
        temporary.unlink(missing_ok=True)
