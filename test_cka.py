"""Checks of everything the study rests on, each against a slow literal reference or hand-computed values.

    python test_cka.py            # all checks, on a CPU in under two minutes; pytest runs the same functions
    python test_cka.py cka lars   # only checks whose name contains one of the words
    python test_cka.py --bench    # time against the floor, memory and error, on the fastest device there is

Inputs are new random numbers in every run; TEST_SEED=<the seed printed> repeats one.
"""

import argparse
import atexit
import contextlib
import copy
import errno
import fcntl
import functools
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import re
import runpy
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import types
import urllib.error
import warnings
import weakref
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torchvision
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torchvision.io import read_image, write_png
from torchvision.transforms.v2 import functional as TF

import common
import fig2_cross as fig2
import fig3_probes_invariance as fig3
import fig5_aug_heatmaps as fig5
import train_simclr
import train_supervised

THREADS = torch.get_num_threads()
torch.set_num_threads(1)  # tensors are tiny here: threads would wait for each other more than they work
HERE = Path(__file__).resolve().parent
SEED = int(os.environ.get("TEST_SEED") or int.from_bytes(os.urandom(3), "big"))
DEVICES = [torch.device("cpu")]
DEVICES += [torch.device("cuda")] * torch.cuda.is_available()
DEVICES += [torch.device("mps")] * torch.backends.mps.is_available()


def rng():
    """A generator with this run's seed, and a new start of torch's own: every check can be repeated alone."""
    if "pytest" in sys.modules:
        print(f"TEST_SEED={SEED}")  # pytest shows it beside a failure
    torch.manual_seed(SEED + 1)
    return torch.Generator().manual_seed(SEED)


def assert_close(got, want, tolerance, what="result"):
    """The largest absolute difference is at most `tolerance`; NaN never is."""
    got, want = (x.detach().cpu() if isinstance(x, torch.Tensor) else torch.from_numpy(np.array(x, float))
                 for x in (got, want))
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    error = (got.double() - want.double()).abs().max().item()
    assert error <= tolerance, f"{what} is off by {error:.2g}, allowed {tolerance:g}"


def assert_same_vector(got, want, tolerance, what="gradient"):
    """|got - want| / |want| of two lists of tensors, taken as long vectors, is at most `tolerance`."""
    got, want = (torch.cat([t.detach().cpu().double().flatten() for t in some]) for some in (got, want))
    error = ((got - want).norm() / want.norm()).item()
    assert error <= tolerance, f"{what} is off by {error:.2g} of its norm, allowed {tolerance:g}"


def assert_same_distribution(sample, reference, what):
    """Kolmogorov-Smirnov: two samples' distribution functions differ as by chance. Fails once in 1e6."""
    sample, reference = np.sort(sample), np.sort(reference)
    points = np.union1d(sample, reference)
    a, b = (np.searchsorted(x, points, side="right") / len(x) for x in (sample, reference))
    distance, chance = np.abs(a - b).max(), (1 / len(sample) + 1 / len(reference)) ** 0.5
    assert distance < 2.7 * chance, f"{what}: distributions differ by {distance:.3f}, by chance {chance:.3f}"


@contextlib.contextmanager
def raises(kind, *words, what="the block"):
    """The block raises `kind` with all `words` in its message."""
    try:
        yield
    except kind as error:
        missing = [word for word in words if word not in str(error)]
        assert not missing, f"{what}: {kind.__name__} does not mention {missing}: {error}"
        return
    raise AssertionError(f"{what} raised no {kind.__name__}")


@contextlib.contextmanager
def temporary_folder():
    """A Path that is removed afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def quietly(function, *args, **options):
    """The function's result, and the texts of its warnings."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        result = function(*args, **options)
    return result, [str(warning.message) for warning in seen]


def python(*arguments, folder=HERE, **environment):
    """Standard output of `python <arguments>`, one thread in a folder; it must end well."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run([sys.executable, *map(str, arguments)], cwd=folder, env=environment, text=True,
                          timeout=300, capture_output=True)
    assert done.returncode == 0, f"{arguments[-1]}: {done.stdout[-300:]} {done.stderr[-900:]}"
    return done.stdout


def peak_memory(device, work):
    """Most bytes in use while `work` runs, above those before: torch's on CUDA, the process's on Linux."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not reset.exists():
        return math.nan
    reset.write_text("5")  # the peak is now what is in use
    texts = [status.read_text()]
    work()
    texts.append(status.read_text())
    before, peak = (int(re.search(r"VmHWM:\s+(\d+)", text)[1]) for text in texts)
    return (peak - before) * 1024


# ============================================================================================================
# CKA
# ============================================================================================================


def hsic(k, l, unbiased):
    """HSIC of two float64 Gram matrices: Tr(KHLH) / (m - 1)^2, Eq. (2), or Song et al. 2012, Eq. (5)."""
    m = len(k)
    if not unbiased:
        h = torch.eye(m, dtype=k.dtype) - 1 / m
        return (k @ h @ l @ h).trace() / (m - 1) ** 2
    k, l, one = k - k.diag().diag(), l - l.diag().diag(), torch.ones(m, dtype=k.dtype)
    return ((k @ l).trace() + (one @ k @ one) * (one @ l @ one) / ((m - 1) * (m - 2))
            - 2 / (m - 2) * (one @ k @ l @ one)) / (m * (m - 3))


def literal_cka(layers, unbiased=False):
    """(L, L) CKA of layers (m, ...) by the definition, in float64."""
    layers = [x.cpu().double().flatten(1) for x in layers]
    grams = [x / x.abs().max() @ (x / x.abs().max()).T for x in layers]
    h = torch.tensor([[hsic(k, l, unbiased) for l in grams] for k in grams])
    return h / torch.outer(h.diag().sqrt(), h.diag().sqrt())


def literal_left_out(layers):
    """(10, L, L) CKA without each tenth of the samples, centred by the means of all of them."""
    tenths, matrices = torch.randperm(len(layers[0]), generator=torch.Generator().manual_seed(0)) % 10, []
    for tenth in range(10):
        kept = [(x - x.mean(0))[tenths != tenth] for x in (x.cpu().double().flatten(1) for x in layers)]
        grams = [(x @ x.T).flatten() for x in kept]
        matrices.append(torch.tensor([[k @ l / (k.norm() * l.norm()) for l in grams] for k in grams]))
    return torch.stack(matrices)


def random_layers(g, m, widths):
    """One float32 tensor (m, p) per width: a part that all share and a part of their own."""
    shared = torch.randn(m, 12, generator=g)
    mixed = [shared @ torch.randn(12, p, generator=g) / 12 ** 0.5 for p in widths]
    return [x + torch.randn(x.shape, generator=g) for x in mixed]


def source(layers, asked=None):
    """A source of these layers, which adds the number of samples of every call to `asked`."""
    def features(start, stop):
        if asked is not None:
            asked.append(stop - start)
        return [x[start:stop] for x in layers]
    return features


def precisions(device):
    """{precision: tolerance} of those that this device has; the others are refused by name."""
    found, x = {"float32": 2e-6}, torch.randn(8, 5, device=device)
    for name, tolerance in (("tf32", 1e-3), ("float16", 1e-3), ("bfloat16", 4e-3)):
        try:
            quietly(common.cka_matrix, [source([x])], 8, precision=name)
            found[name] = tolerance
        except ValueError as error:
            assert name in str(error) and "float32" in str(error), f"{name} is refused by: {error}"
    return found


def test_cka_literal():
    """All of `GramStatistics`, and linear_cka, are literal: on every device, in every precision and form."""
    g = rng()
    cases = ((6, 0, 900, None, 1), (150, 0, 15_000, None, 1), (150, 100, 15_000, None, 1),
             (250, 2, 90, None, 1), (250, 2, 400, 700_000, 4), (250, 2, 400, 350_000, 6),
             (512, 2, 800, None, 1))  # of fewer than 6, rounding shows in the debiased value now and then
    for device, (m, mean, width, memory, passes) in itertools.product(DEVICES, cases):
        layers, found = random_layers(g, m, (30, 3, width)), {}
        layers[2][torch.randperm(m, generator=g)[:m // 100]] *= 40
        layers = [(x + mean * (1 + torch.rand(x.shape[1], generator=g))).to(device) for x in layers]
        layers[2] = layers[2].view(m, 5, -1)
        constant = 1e3 * torch.rand(1, 9, generator=g).expand(m, 9).to(device)
        want, debiased, left_out = literal_cka(layers), literal_cka(layers, True), literal_left_out(layers)
        for name, tolerance in precisions(device).items() if m > 6 else [("float32", 2e-6)]:
            asked, what = [], f"{device} {name}, m = {m}, mean {mean}, width {width}, memory {memory}"
            sources = [source(layers[:2], asked), source([layers[2], constant])]
            got, seen = quietly(common.gram_statistics, sources, m, name, memory, batch=50)
            found[name], loose = got.cka[:3, :3], max(tolerance, 2e-5)
            assert got.cka.dtype == torch.float64 and got.cka.device.type == "cpu"
            assert sum(asked) <= passes * m + 15, f"{what}: asked for {sum(asked)} samples"
            assert_close(found[name], want, tolerance, what)
            assert_close(got.debiased_cka[:3, :3], debiased, loose, f"{what}, debiased")
            assert_close(got.left_out[:, :3, :3], left_out, tolerance, f"{what}, left out")
            for matrix in (got.cka, got.debiased_cka):
                assert matrix[3].isnan().all() and matrix[:, 3].isnan().all(), what
            assert got.constant == [3] and "constant over samples" in seen[0], seen
            assert seen[0].endswith("source 1, layer 1"), seen
            for x, dominant, dominance in zip(layers, got.dominant, got.dominance):
                x = x.cpu().double().flatten(1)
                rows = ((x - x.mean(0)) @ (x - x.mean(0)).T).square().sum(1)
                rows /= rows.sum()
                strongest = rows.topk(-(-m // 100)).values
                assert_close(rows[dominant], strongest, loose, f"{what}, strength")
                assert_close(dominance, strongest.sum(), loose, f"{what}, dominance")
        if width > m > 6:
            fastest_first = ("float16", "bfloat16", "tf32", "float32") if m >= 512 else ("float32",)
            best = next(name for name in fastest_first if name in found)
            default, _ = quietly(common.cka_matrix, sources, m, memory=memory, batch=50)
            same = [name for name in found if torch.equal(found[name], default[:3, :3])]
            assert same == [best], f"{device}, m = {m}: the default is {same}, the best is {best}"
        for (i, j), is_debiased in itertools.product(((0, 1), (2, 0)), (False, True)):
            x, y = layers[i], layers[j] if device.type != "cpu" else layers[j].numpy()
            got, value = quietly(common.linear_cka, x, y, is_debiased)[0], (want, debiased)[is_debiased][i, j]
            assert_close(got, value, 2e-5, f"linear_cka, {what}, debiased {is_debiased}")
    with mock.patch.object(torch.cpu, "get_capabilities", dict, create=True):
        assert list(precisions(torch.device("cpu"))) == ["float32"], "CPUs have no other fast products"


def test_cka_dtypes():
    """Float64 keeps its accuracy at any size, float32 far beyond its squares; other types are features."""
    x, *others = random_layers(rng(), 140, (30, 8, 500))  # with the 8, fewer features than samples
    wide, integers = x.double(), (x * 100).long()
    cases = [(wide + 1e4, wide, 1e-10), (wide * 1e160, wide, 1e-10), (wide * 1e-160, wide, 1e-10),
             (wide * 1e-320 ** 0.5, wide, 1e-3), (integers + 2 ** 30, integers, 1e-10),
             (x * 1e25, x, 2e-5), (x * 1e-25, x, 2e-5)]
    cases += [(z, z, 2e-5) for z in (x.half(), x.bfloat16(), x > 0, (x * 20).to(torch.uint8))]
    beside = itertools.product(others, (1e-25, 1, 1e25), (False, True))
    for (given, like, tolerance), (y, factor, debiased) in itertools.product(cases, beside):
        got, _ = quietly(common.linear_cka, given, y * factor, debiased)
        what = f"{given.dtype} {given.max():g}, beside features times {factor:g}, debiased {debiased}"
        assert_close(got, literal_cka([like, y * factor], debiased)[0, 1], tolerance, what)


def test_cka_readme_examples():
    """README's examples for the CKA code run as printed, beside nothing but the block and torch."""
    block = (HERE / "common.py").read_text().split("# ---- copy from here ----\n")[1]
    block = block.split("# ---- to here ----")[0]
    section = (HERE / "README.md").read_text().split("## Use the CKA code in your own project\n")[1]
    examples = [part.split("```")[0] for part in section.split("\n## ")[0].split("```python\n")[1:]]
    assert len(examples) >= 3
    imported = set(re.findall(r"^(?:import|from) (\w+)", block, re.MULTILINE))
    assert imported <= sys.stdlib_module_names | {"torch"}, f"the block imports {imported}"
    with temporary_folder() as folder:
        (folder / "cka.py").write_text(block)
        for number, example in enumerate(examples):
            (folder / f"example_{number}.py").write_text(example)
            python("-W", "error::UserWarning", f"example_{number}.py", folder=folder)


def ways_to_answer(g, inputs):
    """(layers, {way: source}) of a network whose features are also kept in one dictionary, as hooks do."""
    features, weights = {}, torch.randn(5, 300, 300, generator=g) / 300 ** 0.5

    def lazily(start, stop):
        x = inputs[start:stop]
        for w in weights:
            x = torch.tanh(x @ w)
            yield x

    def run(start, stop):
        features.update(enumerate(lazily(start, stop)))
        return features

    def buffered(start, stop):
        return (b[:stop - start].copy_(x) for b, x in zip(buffers, list(run(start, stop).values())))

    def in_inference_mode(start, stop):
        with torch.inference_mode():
            before = torch.zeros(1)
            for x in lazily(start, stop):
                before.mul_(1)  # in place, as a network does
                before = x
                yield x

    def by_gradients(start, stop):
        with torch.enable_grad():
            for x in lazily(start, stop):
                x = x.clone().requires_grad_()
                yield torch.autograd.grad(x.square().sum() / 2, x)[0]

    layers = [x.clone() for x in run(0, len(inputs)).values()]
    buffers = [torch.empty_like(x) for x in layers]
    return layers, {
        "dict": run, "lazy": lazily, "views": source(layers), "a yield in inference mode": in_inference_mode,
        "a yield with gradients on": by_gradients,
        "dict in another order later": lambda a, b: dict(sorted(run(a, b).items(), reverse=a > 20)),
        "map": lambda a, b: map(torch.clone, lazily(a, b)),
        "list": lambda a, b: list(run(a, b).values()),
        "values": lambda a, b: run(a, b).values(),
        "numpy": lambda a, b: tuple(x.numpy() for x in run(a, b).values()),
        "eager generator": lambda a, b: (x for x in list(run(a, b).values())),
        "inference mode": torch.inference_mode()(lambda a, b: list(run(a, b).values())),
        "with gradients": lambda a, b: [x[a:b].requires_grad_() for x in layers],
        "refused: dictionary of all calls": lambda a, b: (features[name] for name in run(a, b)),
        "refused: list of buffers": lambda a, b: list(buffered(a, b)),
        "refused: buffers all filled": lambda a, b: iter(list(buffered(a, b))),
        "refused: buffers": buffered,
        "refused: one buffer": lambda a, b: (buffers[0][:b - a].copy_(x) for x in list(run(a, b).values()))}


def test_cka_sources():
    """Any way to return features gives the literal value, in any memory and batch, or is refused by name."""
    g = rng()
    inputs = torch.randn(90, 300, generator=g)
    (one, ways), (two, others) = (ways_to_answer(g, inputs) for _ in range(2))
    want, sizes = literal_cka(one + two), ((None, 7), (900_000, 30), (500_000, 7), (500_000, 200))
    for way, (memory, batch) in itertools.product(ways, sizes):
        options = {"precision": "float32", "memory": memory, "batch": batch}
        if way.startswith("refused"):
            with raises(ValueError, "source 0", "share memory", "list of clones", what=way):
                common.cka_matrix([ways[way], others[way]], 90, **options)
        else:
            got = common.cka_matrix([ways[way], others[way]], 90, **options)
            assert not got.is_inference() and not torch.is_inference_mode_enabled(), way
            assert_close(got, want, 1e-5, f"{way}, memory {memory}, batch {batch}")


def test_cka_refused():
    """What is no source, or changes its answers, is a ValueError that names it and says what a source is."""
    g, m = rng(), 40
    x, y = random_layers(g, m, (6, 9))
    noisy = nn.Sequential(nn.Linear(6, 30), nn.BatchNorm1d(30), nn.ReLU(), nn.Dropout(0.5)).train()
    broken, good = y.clone(), source([x])
    broken[33, 4] = math.nan

    def in_autocast(start, stop):
        with torch.autocast("cpu", torch.bfloat16):
            yield x[start:stop] @ x[:6]

    cases = {
        "a source not in a list": (good, ["list of sources", "function"]),
        "no source": ([], ["list of sources"]),
        "None": ([None], ["source 0", "NoneType"]),
        "a DataLoader": ([torch.utils.data.DataLoader(x)], ["source 0", "DataLoader", "start, stop"]),
        "a network": ([good, nn.Linear(6, 2)], ["source 1", "start, stop"]),
        "one tensor": ([good, lambda a, b: y[a:b]], ["source 1", "Tensor", "per layer"]),
        "nothing": ([good, lambda a, b: None], ["source 1", "NoneType"]),
        "one string": ([lambda a, b: "features"], ["source 0", "layer 0", "returned a str"]),
        "no layers": ([good, lambda a, b: []], ["source 1", "0 layers"]),
        "a layer that is None": ([good, lambda a, b: [x[a:b], None]], ["source 1", "layer 1", "NoneType"]),
        "an array of strings": ([lambda a, b: [np.full((b - a, 3), "1")]], ["layer 0", "ndarray"]),
        "complex": ([lambda a, b: [x[a:b], y[a:b] * 1j]], ["source 0", "layer 1", "complex"]),
        "no features": ([lambda a, b: [x[a:b, :0]]], ["source 0", "layer 0"]),
        "too many rows": ([good, lambda a, b: [x[a:b + 1]]], ["source 1", "layer 0", "rows"]),
        "another width later": ([lambda a, b: [(x if a < 20 else y)[a:b]]], ["source 0", "unlike"]),
        "another width at once": ([lambda a, b: [(x if a < 2 else y)[a:b]]], ["source 0", "unlike"]),
        "fewer layers": ([lambda a, b: [x[a:b], y[a:b]][:1 + (a < 20)]], ["source 0", "1 layers"]),
        "fewer at once": ([lambda a, b: [x[a:b], y[a:b]][:1 + (a < 2)]], ["source 0", "layers"]),
        "more layers": ([lambda a, b: (z[a:b] for z in [x, y][:1 + (a > 20)])], ["source 0", "layer 1"]),
        "the first rows always": ([lambda a, b: [x[:b - a]]], ["source 0", "again"]),
        "a yield inside autocast": ([good, in_autocast], ["source 1", "autocast", "end it before"]),
        "training mode": ([good, lambda a, b: [noisy(x[a:b])]], ["source 1", "training mode"]),
        "the same, large": ([good, lambda a, b: [noisy(x[a:b]) * 1e30]], ["source 1", "training mode"]),
        "more later": ([lambda a, b: {k: x[a:b] for k in "xy"[:1 + (a > 20)]}], ["source 0", "unlike"]),
        "the mean of a call": ([good, lambda a, b: [x[a:b] / (b - a)]], ["source 1", "again"]),
        "another dict later": ([lambda a, b: {"x" if a < 20 else "y": x[a:b]}], ["source 0", "unlike"]),
        "not finite, first samples": ([lambda a, b: [x[a:b] / 0]], ["source 0", "layer 0", "NaN"]),
        "not finite, later": ([good, source([x, broken])], ["source 1", "layer 1", "NaN"]),
        "little memory": ([good], ["memory=500", "needed"])}
    for case, (sources, words) in cases.items():
        for memory in (500,) if "memory" in case else (None, 90_000):
            with raises(ValueError, *words, what=f"{case}, memory {memory}"):
                common.cka_matrix(sources, m, memory=memory, batch=10)
    for arguments, word in (((x, y[:39]), "39"), ((x[:1], y[:1]), "at least 2"),
                            ((x[:3], y[:3], True), "at least 4"), ((y * 0 + 1, y), "x is constant"),
                            ((x, y * 0), "y is constant")):
        with raises(ValueError, word):
            common.linear_cka(*arguments)
    for count in (1, 2.5):
        with raises(ValueError, "at least 2"):
            common.cka_matrix([good], count)
    with mock.patch.object(common, "free_memory", lambda device: 625), raises(ValueError, "memory=500"):
        common.cka_matrix([good], m)
    for count in (3, 4):
        got, _ = quietly(common.cka_matrix, [good], count, debiased=True)
        assert got.isnan().all() == (count < 4), f"debiased CKA of {count} samples: {got}"


def test_cka_same_memory():
    """A layer that the network overwrites afterwards, as torchvision's ResNets do, is named with its twin."""
    images = torch.randn(6, 9, generator=rng())

    def features(dtype, start, stop):
        x = images[start:stop].to(dtype, copy=True)
        return [x.clone(), x, x.relu_(), x[:, :4]]

    for dtype in (torch.float32, torch.float16):
        _, warned = quietly(common.cka_matrix, [functools.partial(features, dtype)], 6)
        assert len(warned) == 1 and "source 0: layers 1 and 2 " in warned[0] and "clone" in warned[0], warned
    _, warned = quietly(common.cka_matrix, [lambda a, b: (images[a:b].relu() for _ in range(6))], 6)
    assert not any("same memory" in text for text in warned), f"equal, one after another: {warned}"


def test_cka_planner():
    """Passes over the samples at the paper's numbers, and the bytes that they need, worked out by hand."""
    large = [802_816] + [(11_040_000 - 802_816) // 31] * 31  # Figure 2 at 224 px: six networks
    small = [16_384] * 6 + [8192] * 8 + [4096] * 12 + [2048] * 6  # 32 px: two
    for widths, networks, m, batch, memory, most in (
            (large, 6, 10_000, 128, 64e9, 4), (large, 6, 10_000, 128, 20e9, 8), (small, 2, 320, 16, 56e6, 3),
            (small, 2, 320, 16, 17.5e6, 6), ([300, 400], 1, 1000, 128, 1e9, 0)):
        blocks = common.plan([widths] * networks, m, memory, batch)
        assert blocks + (blocks > 1) <= most, f"{memory:g} bytes: {blocks} blocks"
    # by hand: first sample, mean and sums; tiles, and three more to sort one; a layer; what calls keep
    always = 8 * 12 * (5000 + 400)
    for blocks, needed in ((1, 4 * 15 * 400 * 464 // 2 + 400 * 5000 * (4 + 2) + 400 * 20_000),
                           (2, 4 * 15 * 200 * 200 + 200 * 5000 * 2 + 200 * 2 * 20_000)):
        plan = functools.partial(common.plan, [[5000] * 12], 400, product_itemsize=2)
        planned = [plan(memory=always + needed - 1), plan(memory=always + needed)]
        assert planned == [blocks + 1, blocks], f"{always + needed} bytes: {planned} blocks"


def check_memory():
    """Asserts the peak of memory for a generator that computes and for a list, in a new process."""
    x, weights = torch.randn(400, 8), torch.randn(12, 8, 5000)

    def generator(start, stop):
        for w in weights:
            yield x[start:stop] @ w

    for features in (generator, lambda start, stop: list(x[start:stop] @ weights)):
        common.cka_matrix([features], 50)  # the first products take memory for themselves
        for budget in (15e6, 60e6):
            options = {"precision": "float32", "memory": budget, "batch": 25}
            used = peak_memory(DEVICES[0], functools.partial(common.cka_matrix, [features], 400, **options))
            allowed = 1.2 * budget + 25 * 12 * 5000 * 4
            assert not used > allowed, f"{used / 1e6:.0f} MB in use, allowed {allowed / 1e6:.0f}"


def test_cka_memory():
    """The memory in use stays within 1.2 times the budget and one batch."""
    exactly = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}  # glibc keeps no reserve
    python("-c", "import test_cka; test_cka.check_memory()", **exactly)


def test_cka_progress():
    """At a terminal a line says the share done and the time left, and is wiped at the end; else nothing."""
    x = torch.randn(60, 90, generator=rng())
    with mock.patch.object(sys, "stderr", None):  # as in some services
        common.cka_matrix([source([x, x * x])], 60)
    for terminal, memory in itertools.product((True, False), (None, 20_000)):
        err, clock = io.StringIO(), itertools.count(step=4.0)
        err.isatty = lambda: terminal
        with contextlib.redirect_stderr(err), mock.patch.object(time, "monotonic", lambda: next(clock)):
            common.cka_matrix([source([x, x * x])], 60, memory=memory, batch=20)
        *lines, last = err.getvalue().split("\r")[1::2] or [""]
        assert bool(lines) == terminal and not last.strip(), err.getvalue()
        assert all(re.fullmatch(r"CKA +\d+%, \d+ s left +", text) for text in lines), lines


def test_cka_surroundings():
    """Autocast, inference mode, default dtype and switches change no number, and are left as they were."""
    layers = [x + 3 for x in random_layers(rng(), 70, (5, 900))]
    inside = []

    def watching(start, stop):
        for x in layers:
            inside.append(switches()[0])
            yield x[start:stop]

    def switches():
        products = [getattr(getattr(backend, "matmul", None), "fp32_precision", None)
                    for backend in (torch.backends.cuda, torch.backends.mkldnn)]
        return (products if None not in products else torch.get_float32_matmul_precision(),
                torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled())

    class WatchProducts(torch.overrides.TorchFunctionMode):
        """Sees that CUDA would not round a product's inputs, which a CPU does not show in the numbers."""

        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function.__name__ in ("mm", "bmm", "matmul") and args[0].dtype == torch.float32:
                assert switches()[0] in (["ieee", "ieee"], "highest"), f"{function.__name__} in {switches()}"
                assert not torch.is_grad_enabled(), "sources would keep graphs"
            return function(*args, **(kwargs or {}))

    sources = [watching, lambda a, b: (x[a:b] * 2 for x in layers)]

    def numbers():
        with raises(ValueError, "source 0"):
            common.cka_matrix([lambda a, b: [layers[0][a:b], None]], 70)
        with WatchProducts():
            found = common.gram_statistics(sources, 70, precision="float32", memory=1_500_000, batch=16)
            few = common.linear_cka(layers[0], layers[0].square())
        assert not found.cka.is_inference()
        return torch.cat([found.cka, found.debiased_cka, few.expand(1, 4)])

    want = numbers()
    for grad_mode, rounded, default in ((torch.inference_mode, torch.float16, torch.float64),
                                        (torch.enable_grad, torch.bfloat16, torch.bfloat16)):
        with contextlib.ExitStack() as afterwards, grad_mode(), torch.autocast("cpu", rounded):
            for put, value, usual in ((torch.set_default_dtype, default, torch.float32),
                                      (torch.use_deterministic_algorithms, True, False),
                                      (torch.set_float32_matmul_precision, "medium", "highest")):
                afterwards.callback(put, usual)
                put(value)
            afterwards.enter_context(torch.device("meta"))  # as the default
            before = switches()
            inside.clear()
            assert torch.equal(numbers(), want), f"{grad_mode}, autocast {rounded} or {before} matters"
            assert switches() == before, f"{before} became {switches()}"
            assert all(found == before[0] for found in inside), f"products of a source: {inside}"


def test_cka_errors_close_sources():
    """A generator that an error keeps open does not turn the caller's gradients off when it is closed."""
    layers = random_layers(rng(), 70, (5, 900))

    def failing(start, stop):
        with torch.no_grad():
            yield layers[0][start:stop]
            yield layers[1][start:stop, start // 50:]

    def holding(start, stop):
        held = failing(start, stop)
        yield next(held)
        raise ValueError("its own")

    for broken in (failing, holding):
        with raises(ValueError, "source 0, layer 1"):
            common.cka_matrix([broken], 70, batch=10)
        assert torch.is_grad_enabled(), broken.__name__


def test_cka_noise():
    """One active sample leaves no debiased CKA, a constant layer no CKA at all; a large sample is told of."""
    g = rng()
    for device, (m, p) in itertools.product(DEVICES, ((4, 30), (10, 30), (64, 300), (200, 3000), (1000, 30))):
        one, y, two = torch.zeros(m, p), torch.randn(m, 2 * p, generator=g), torch.zeros(m, p)
        one[m // 2], two[1:3] = torch.rand(p, generator=g), torch.rand(2, p, generator=g)
        for name in precisions(device):
            sources = [source([x.to(device) for x in (one, y, two)])]
            found, seen = quietly(common.gram_statistics, sources, m, precision=name)
            what = f"{device} {name}, m = {m}, p = {p}: {found.debiased_cka}, {seen}"
            assert found.debiased_cka[0].isnan().all() and found.debiased_cka[:, 0].isnan().all(), what
            assert any("debiased CKA is NaN" in text and "layer 0" in text for text in seen), what
            assert not found.cka.isnan().any(), what
        with raises(ValueError, "debiased"):
            quietly(common.linear_cka, one, y, debiased=True)
    for (m, p), size in itertools.product(((60, 5), (200, 400), (500, 40)), (1, 10, 100, 1000)):
        x, y = random_layers(g, m, (p, p))
        x[7] *= size
        got, seen = quietly(common.cka_matrix, [source([x, y])], m, True, precision="float32")
        error = (got - literal_cka([x, y], True)).abs().max()
        warned = any("few samples matter" in text for text in seen)
        assert (error < 1e-4 or warned) and not (warned and size == 1), f"{m}, {p}, {size}: {error}, {seen}"


def test_cka_standard_error():
    """The jackknife's error is the spread of CKA over fresh data sets, also for samples sorted by class."""
    g, m = rng(), 200
    fixed = torch.Generator().manual_seed(0)  # what sets share: some draws give a CKA near 1, far from normal
    for p, is_sorted in ((120, True), (20, False)):  # the last: fewer features than samples
        maps, centres = torch.randn(2, 6, p, generator=fixed), torch.randn(10, 6, generator=fixed)
        found = []
        for _ in range(200):
            labels = torch.randint(10, (m,), generator=g)
            latent = centres[labels.sort().values if is_sorted else labels] + torch.randn(m, 6, generator=g)
            noise = 4 * torch.randn(2, m, p, generator=g)
            layers = [latent @ maps[0] + noise[0], torch.relu(latent @ maps[1]) + noise[1]]
            got = common.gram_statistics([source(layers)], m, precision="float32")
            found.append(torch.stack([got.cka, got.standard_error])[:, 0, 1])
            assert_close(got.standard_error, 3 * got.left_out.std(0, correction=0), 1e-12, "the jackknife")
        values, errors = torch.stack(found).T
        ratio = errors.mean() / values.std()
        assert abs(ratio - 1) < 0.25, f"p = {p}: error / spread {ratio}"


def test_device_purity():
    """With (fake) CUDA inputs, every output is on CUDA: no part builds a tensor on the CPU."""
    try:
        with FakeTensorMode():
            torch.rand(4, 4, device="cuda")[:, :3].mul_(2)
    except RuntimeError:
        return print("skipped: this torch's fake CUDA tensors need CUDA")
    results = {}
    with FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # autocast says that there is no CUDA here
        images = torch.zeros(6, 3, 40, 24, dtype=torch.uint8, device="cuda")
        z, inputs = torch.zeros(4, 8, device="cuda"), torch.zeros(2, 3, 32, 32, device="cuda")
        params = common.draw_params(6, 40, 24, "cuda")
        results["params"] = params.values()
        results["imagenet_augment"] = [common.imagenet_augment(images, 32, params)]
        results["simclr_augment"] = [common.simclr_augment(images, 32, params, blur)
                                     for blur in (True, False)]
        results["standardise"] = [common.standardise(common.resize(images, 32), MEAN, STD)]
        with torch.device("cuda"):
            model = common.build_model("simclr", "imagenet").eval()
        results["representations"] = common.representations(model, inputs).values()
        results["info_nce"] = common.info_nce_and_accuracy(z, z, 0.5)
        optimizer = common.LARS(model.parameters(), 0.1, weight_decay=0.1)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        results["LARS"] = [state["momentum_buffer"] for state in optimizer.state.values()]
    assert len(results["LARS"]) > 160
    for name, tensors in results.items():
        assert all(t.device.type == "cuda" for t in tensors), f"{name} left the device"


def test_device_purity_cka():
    """Features on a device without values (meta) stay there: only the last sums are moved to the CPU."""
    moved, real = [], {name: getattr(torch.Tensor, name) for name in ("tolist", "__bool__")}

    def cpu(x):
        moved.append(x.device.type)
        return torch.ones(x.shape, dtype=x.dtype)

    stand_ins = {"cpu": cpu, "data_ptr": lambda x: id(x),
                 "tolist": lambda x: [True] * len(x) if x.device.type == "meta" else real["tolist"](x),
                 "__bool__": lambda x: x.device.type != "meta" and real["__bool__"](x)}
    with mock.patch.multiple(torch.Tensor, **stand_ins):
        for width, memory in ((700, 1e9), (700, 2e6), (70, 1e9)):
            layers = [torch.zeros(300, p, device="meta") for p in (5, width)]
            sources = [source(layers), lambda a, b: (x[a:b] for x in layers)]
            quietly(common.gram_statistics, sources, 300, precision="float32", memory=memory, batch=70)
            assert len(moved) >= 3 and set(moved) == {"meta"}, f"{width}, {memory}: {moved}"
            moved.clear()


# ============================================================================================================
# Network
# ============================================================================================================

BACKBONE_LAYERS = [f"BG{group}.{block + 1}.{kind}" for group, count in ((1, 3), (2, 4), (3, 6), (4, 3))
                   for block in range(count) for kind in ("odd", "even")]


@torch.no_grad()
def blocks_by_hand(model, images):
    """The odd and even representations of a torchvision ResNet-50 in eval mode, every step out of place."""
    x, found = model.maxpool(model.bn1(model.conv1(images)).relu()), []
    for block in itertools.chain(model.layer1, model.layer2, model.layer3, model.layer4):
        y = block.bn1(block.conv1(x)).relu()
        y = block.bn2(block.conv2(y)).relu()
        y = block.bn3(block.conv3(y))
        x = ((block.downsample(x) if block.downsample else x) + y).relu()
        found += [y.flatten(1), x.flatten(1)]
    return found


def test_representations_by_hand():
    """Names, depth order and values of all 32 on torchvision's ResNet-50, in both memory formats."""
    model, images = torchvision.models.resnet50().eval(), torch.rand(2, 3, 40, 40, generator=rng())
    want = blocks_by_hand(model, images)
    for device, memory_format in itertools.product(DEVICES, (torch.contiguous_format, torch.channels_last)):
        model.to(device, memory_format=memory_format)
        inputs = images.to(device).contiguous(memory_format=memory_format)
        found = common.representations(model, inputs)
        streamed = dict(common.stream_representations(model, inputs))
        assert list(found) == BACKBONE_LAYERS
        for name, hand in zip(BACKBONE_LAYERS, want):
            what = f"{device} float32 {memory_format}, {name}"
            allowed = (1e-4 if device.type == "cpu" else 5e-3) * hand.abs().max().item()  # TF32
            assert found[name].device.type == device.type and not found[name].requires_grad, what
            assert_close(found[name], hand, allowed, what)
            assert_close(streamed[name].flatten(1), hand, allowed, f"{what}, streamed")


def test_representations_head_and_stems():
    """35 with a projection head, by hand; shapes by stem and padding; weights by method and seed alone."""
    images = torch.rand(2, 3, 16, 16, generator=rng())
    model = common.build_model("simclr", "cifar", zero_init=False).eval()
    found = common.representations(model, images)
    assert list(found) == BACKBONE_LAYERS + ["head.1", "head.2", "head.3"]
    x = found["BG4.3.even"].view(2, 2048, 2 * 2).mean(2)
    for i, layer in enumerate(model.fc.layers, 1):
        x = x @ layer[0].weight.T / math.sqrt(1 + 1e-5)  # fresh running statistics: mean 0, variance 1
        x = x.relu() if i < 3 else x
        assert_close(found[f"head.{i}"], x, 1e-4 * x.abs().max().item(), f"head.{i}")
    plain = common.build_model("supervised", "imagenet", classes=7)
    assert x.shape == (2, 128) and plain.fc.out_features == 7 and not plain.layer2[1].bn3.weight.any()
    padded = common.build_model("simclr", "cifar", stem_padding=2)
    for network, side in ((plain, 4), (model, 16), (padded, 18)):
        _, found = next(common.stream_representations(network.eval(), images))
        assert found.shape == (2, 256, side, side)
    state = torch.random.get_rng_state()
    a, again, *others = (
        common.build_model(method, "imagenet", seed=seed).layer1[0].conv1.weight
        for method, seed in (("supervised", 4), ("supervised", 4), ("supervised", 5), ("simclr", 4)))
    assert torch.equal(a, again) and not any(torch.equal(a, other) for other in others)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_representations_lets_go():
    """Of the images after the first layer, of odd copies, of hooks even after an error; grad mode stays."""
    model, images = torchvision.models.resnet50().eval(), torch.rand(1, 3, 32, 32)
    kept, stream = weakref.ref(images), common.stream_representations(model, images)
    del images
    _, odd = next(stream)
    assert kept() is None and torch.is_grad_enabled(), "the images are kept, or the caller's mode is changed"
    kept = weakref.ref(odd)
    del odd
    assert kept() is None, "an odd copy is kept"
    with mock.patch.object(model.layer4[2].conv3, "forward", side_effect=KeyError), raises(KeyError):
        list(stream)
    assert not any(module._forward_hooks for module in model.modules()), "a hook is left after an exception"


def test_representations_refuses():
    """TypeError for networks that do something else than torchvision's ResNet-50 outside of what we call."""
    class Padded(torchvision.models.ResNet):
        def forward(self, x):
            return super().forward(F.pad(x, (1, 1, 1, 1)))

    class Unrectified(torchvision.models.resnet.Bottleneck):
        def forward(self, x):
            return self.bn3(self.conv3(x))

    class Doubled(nn.Sequential):
        def forward(self, x):
            return super().forward(x) * 2

    models = torchvision.models
    with torch.device("meta"):
        patched, hooked, staged = (models.resnet50() for _ in range(3))
        patched._forward_impl = lambda x: x
        staged.layer3 = Doubled(*staged.layer3)
        hooked.register_forward_pre_hook(lambda module, inputs: None)
        bent = [kind(block, [3, 4, 6, 3]) for kind, block in (
            (Padded, models.resnet.Bottleneck), (models.ResNet, Unrectified))]
        averaged = torch.optim.swa_utils.AveragedModel(models.resnet50())
        for network in (*bent, patched, hooked, staged, averaged, models.resnet101()):
            with raises(TypeError, "ResNet-50"):
                common.representations(network, torch.rand(1, 3, 32, 32))


# ============================================================================================================
# Loss, optimizer, schedule
# ============================================================================================================


def literal_info_nce(z1, z2, temperature):
    """Eq. (1) as a double loop over anchors and candidates, in float64, over the 2N anchors; and accuracy."""
    views = torch.cat([z1, z2]).double()
    n, losses, right = len(z1), [], 0
    for i in range(2 * n):
        s = [torch.dot(views[i], views[k]) / (views[i].norm() * views[k].norm()) for k in range(2 * n)]
        partner = (i + n) % (2 * n)
        denominator = sum(torch.exp(s[k] / temperature) for k in range(2 * n) if k != i)
        losses.append(-torch.log(torch.exp(s[partner] / temperature) / denominator))
        right += all(s[k] <= s[partner] for k in range(2 * n) if k != i)
    return sum(losses) / (2 * n), right / (2 * n)


def test_info_nce_literal():
    """Value, gradient and accuracy of the double loop, on every device, float32 whatever comes in."""
    g = rng()
    for device, (n, d, t) in itertools.product(DEVICES, ((7, 5, 0.5), (9, 4, 0.1), (2, 3, 1.0), (1, 4, 0.5))):
        what, base = f"{device} float32, N = {n}: ", torch.randn(n, d, generator=g)
        views = [(3 * base + 2 * torch.randn(n, d, generator=g)).requires_grad_() for _ in range(2)]
        want, right = literal_info_nce(*views, t)
        moved = [view.detach().to(device).requires_grad_() for view in views]
        loss, accuracy = common.info_nce_and_accuracy(*moved, t)
        assert_close(loss, want, 3e-6, what + "loss")
        assert_close(accuracy, right, 1e-6, what + "accuracy")
        if n > 1:
            gradients = torch.autograd.grad(loss, moved)
            assert_same_vector(gradients, torch.autograd.grad(want, views), 1e-5, what + "gradient")
        half, _ = common.info_nce_and_accuracy(*(view.bfloat16() for view in moved), t)
        assert half.dtype == loss.dtype == torch.float32


def literal_lars(weights, gradients, rates, weight_decay, momentum=0.9, eta=0.001):
    """The last weights of SimCLR's rule for one tensor in float64, the rate inside the buffer."""
    w, v = weights.double(), torch.zeros_like(weights.double())
    for gradient, rate in zip(gradients, rates):
        g = gradient.double() + (weight_decay * w if w.ndim > 1 else 0)
        is_adapted = w.ndim > 1 and w.norm() > 0 and g.norm() > 0
        v = momentum * v + rate * (eta * w.norm() / g.norm() if is_adapted else 1) * g
        w = w - v
    return w


def test_lars_sequence():
    """Six steps at a changing rate equal the rule written out, for tensors of every kind."""
    g, rates = rng(), [0.0, 3.0, 8.0, 5.0, 1.0, 0.2]
    for device, decay in itertools.product(DEVICES, (0.0, 0.3)):
        start = [torch.randn(shape, generator=g) for shape in ((6, 5), (4, 3, 2, 2), (7,), (3, 3))]
        start.append(torch.zeros(3, 4))
        gradients = [[torch.randn(w.shape, generator=g) for _ in rates] for w in start]
        gradients[3] = [torch.zeros(3, 3) for _ in rates]
        params = [nn.Parameter(w.to(device, copy=True)) for w in start]
        unused = nn.Parameter(torch.ones(2, device=device))
        optimizer = common.LARS([*params, unused], lr=1.0, weight_decay=decay)
        for step, rate in enumerate(rates):
            optimizer.param_groups[0]["lr"] = rate
            for p, some in zip(params, gradients):
                p.grad = some[step].to(device, copy=True)
            optimizer.step()
        for p, w, some in zip(params, start, gradients):
            want = literal_lars(w, some, rates, decay)
            what = f"{device} float32 {tuple(w.shape)}, decay {decay}"
            assert_close(p, want, 2e-6 * max(1, want.abs().max().item()), what)
        assert unused.tolist() == [1, 1], f"{device}: a parameter without gradient moves"


# ============================================================================================================
# Augmentation
# ============================================================================================================

MEAN, STD = (0.3, 0.5, 0.6), (0.2, 0.3, 0.25)


def torchvision_view(image, size, p, blur):
    """simclr_augment of one image by torchvision's functional operations; p holds this image's parameters."""
    top, left, height, width = p["box"].tolist()
    x = TF.resized_crop(image.float() / 255, top, left, height, width, [size, size],
                        torchvision.transforms.InterpolationMode.BILINEAR, antialias=True)
    x = TF.horizontal_flip(x) if p["flip"] else x
    if "factors" not in p:
        return TF.normalize(x, MEAN, STD)
    adjust = TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue
    for operation in p["order"].tolist() if p["jitter"] else []:
        x = adjust[operation](x, p["factors"][operation].item())
    x = TF.rgb_to_grayscale(x, 3) if p["gray"] else x
    kernel = max(k for k in range(1, size // 10 + 2) if k % 2)
    if blur and p["blur"] and kernel > 1:
        x = TF.gaussian_blur(x, [kernel, kernel], [p["sigma"].item()] * 2)
    return x


def some_images(g, n, height, width):
    """uint8 images: half of them noise, half smooth with saturated and gray parts."""
    noise = torch.rand(n, 3, height, width, generator=g)
    coarse = 2 * torch.rand(n, 3, 4, 4, generator=g) - 0.5
    smooth = F.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)
    smooth[:, :, :3] = smooth[:, :1, :3]
    images = torch.where(torch.arange(n).view(-1, 1, 1, 1) % 2 == 0, noise, smooth)
    return (images * 255).round().to(torch.uint8)


def test_augment_values():
    """Image by image equal to torchvision's functional operations with the same parameters, by device."""
    g = rng()
    cases = (32, 32, 32, 0.5, False), (32, 32, 48, 1, True), (40, 24, 16, 1, True), (48, 64, 30, 1, True)
    for (height, width, size, strength, blur), device in itertools.product(
            (*cases, (20, 30, 40, 1, False)), DEVICES):
        images = some_images(g, 16, height, width)
        params = common.draw_params(16, height, width, "cpu", g, strength)
        boxes = {name: params[name] for name in ("box", "flip")}
        whole = TF.resize(images.float() / 255, [size, size], antialias=True)
        standard = TF.normalize(whole, MEAN, STD)
        views, crops = (torch.stack([torchvision_view(image, size, common.slice_params(p, i), blur)
                                     for i, image in enumerate(images)]) for p in (params, boxes))
        there, moved = {name: value.to(device) for name, value in params.items()}, images.to(device)
        cropped = common.imagenet_augment(moved, size, there)
        for name, got, want in (
                ("simclr_augment", common.simclr_augment(moved, size, there, blur), views),
                ("imagenet_augment", common.standardise(cropped, MEAN, STD), crops),
                ("resize", common.resize(moved, size), whole),
                ("standardise", common.standardise(common.resize(moved, size), MEAN, STD), standard)):
            what = f"{device} float32, {name}, {height} x {width} -> {size}, blur {blur}"
            assert got.dtype == torch.float32 and got.device.type == device.type, what
            assert_close(got, want, 1e-3, what)


def test_augment_distribution():
    """Crops and flips follow torchvision's RandomResizedCrop, colours the ranges of SimCLR's App. A."""
    g, uniform = rng(), np.linspace(0, 1, 100_000)
    orders, digits = torch.tensor([*itertools.permutations(range(4))]), torch.tensor([64, 16, 4, 1])
    measures = {"top": lambda t, l, h, w: t, "left": lambda t, l, h, w: l, "bottom": lambda t, l, h, w: t + h,
                "area": lambda t, l, h, w: h * w, "aspect": lambda t, l, h, w: np.log(w / h)}
    for height, width, draws in ((32, 32, 6000), (64, 24, 2000), (200, 10, 500)):
        image, crop = torch.zeros(3, height, width), torchvision.transforms.RandomResizedCrop
        reference = [crop.get_params(image, (0.08, 1), (3 / 4, 4 / 3)) for _ in range(draws)]
        params = common.draw_params(40000, height, width, "cpu", g)
        boxes = params["box"].numpy().astype(float)
        assert (boxes[:, 0] + boxes[:, 2] <= height).all() and (boxes[:, 1] + boxes[:, 3] <= width).all()
        for name, measure in measures.items():
            got, want = (measure(*np.array(rows, float).T) for rows in (boxes, reference))
            assert_same_distribution(got, want, f"{name} of {height} x {width}")
    for strength in (0.5, 1.0, 1.5):
        p = common.draw_params(50_000, 32, 32, "cpu", g, strength)
        ranges = [(max(0.0, 1 - 0.8 * strength), 1 + 0.8 * strength)] * 3
        ranges += [(-0.2 * strength, 0.2 * strength), (0.1, 2.0)]
        for i, (low, high) in enumerate(ranges):
            values = p["factors"][:, i] if i < 4 else p["sigma"]
            assert values.min() >= low and values.max() <= high
            assert_same_distribution(values, low + (high - low) * uniform, f"factor {i} at {strength}")
        for name, rate in (("flip", 0.5), ("jitter", 0.8), ("gray", 0.2), ("blur", 0.5)):
            assert_same_distribution(p[name], uniform < rate, name)
        assert_same_distribution(p["order"] @ digits, (orders @ digits).repeat(5000), "order")


# ============================================================================================================
# Data
# ============================================================================================================


def write_images(folder, g, classes=("ant", "bee", "cat", "dog"), train=10, test=7, size=16):
    """A data set of noise images, a colour per class, as train/<class>/<i>.png and test/<class>/<i>.png."""
    for part, count in (("train", train), ("test", test)):
        for label, name in enumerate(classes):
            (folder / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = torch.rand(3, size, size, generator=g) * 0.7
                pixels[label % 3] += 0.3 * (label > 0)
                write_png((pixels * 255).byte(), str(folder / part / name / f"{i}.png"))
    return folder


def test_data_synthetic():
    """Disjoint, by the seed, with colours that give nothing away; means and deviations equal numpy's."""
    data = common.load_data("synthetic", DEVICES[-1])
    assert {t.device.type for t in data[:4]} == {DEVICES[-1].type} and len(data.classes) == 10
    data = [t.cpu() for t in data[:4]]
    for images, labels, n, seed in (data[:2] + [4000, 1], data[2:] + [500, 2]):
        assert images.dtype == torch.uint8 and torch.equal(images, common.synthetic_images(n, seed)[0])
        assert labels.dtype == torch.int64 and labels.unique().tolist() == list(range(10))
    assert len({x.tobytes() for x in torch.cat(data[::2]).numpy()}) == 4500
    train, test = (part.double().mean((2, 3)) for part in data[::2])
    means = torch.stack([train[data[1] == label].mean(0) for label in range(10)])
    guess = torch.cdist(test, means).argmin(1)
    assert (guess == data[3]).double().mean() < 0.2, "the mean colour gives the class away"
    flat_images = some_images(rng(), 20, 15, 9)
    flat_images[:, 2] = 77
    pixels = flat_images.numpy().astype(np.float64) / 255
    for device in DEVICES:
        mean, std = common.channel_statistics(flat_images.to(device))
        assert_close(mean, pixels.mean((0, 2, 3)), 1e-12, f"{device}, mean")
        assert_close(std[:2], pixels.std((0, 2, 3))[:2], 1e-12, f"{device}, deviation")
        assert std[2] > 0


def test_data_image_folder():
    """Labels in sorted class order, pixels as stored; hidden things and links that lead back add nothing."""
    with temporary_folder() as home, mock.patch.dict(os.environ, HOME=str(home)):
        folder = write_images(home / "data", rng(), classes=("cow", "ape", "bat"), train=3, test=2)
        (folder / "train/bat/inner").mkdir()
        (folder / "train/bat/2.png").rename(folder / "train/bat/inner/2.png")
        want = [read_image(str(path)) for path in sorted(folder.glob("t*/*/**/*.png"))]
        for hidden in ("train/.ipynb_checkpoints/0.png", "train/__MACOSX/0.png", "test/ape/.hidden/0.png",
                       "test/ape/._0.png", "train/notes.txt", "train/bat/labels.txt"):
            (folder / hidden).parent.mkdir(exist_ok=True)
            (folder / hidden).write_bytes(b"no image")
        (folder / "train/bat/empty.png").mkdir()
        (home / "more").mkdir()  # links to elsewhere are followed, once
        (folder / "test/cow/1.png").rename(home / "more/1.png")
        (folder / "test/cow/0.png").rename(home / "0.png")
        links = {"train/ape/loop": "..", "train/bat/inner/up": "../../../..", "test/x": "../train",
                 "test/cow/other": "../ape", "test/cow/more": home / "more", "../more/again": ".",
                 "test/cow/0.png": home / "0.png", "test/bat/leak.png": "../../train/bat/0.png"}
        for link, target in links.items():
            (folder / link).symlink_to(target)
        with contextlib.redirect_stderr(io.StringIO()) as err:
            data = common.load_data("~/data", torch.device("cpu"))
        assert "warning: --data" in err.getvalue() and "2 files left out" in err.getvalue(), err.getvalue()
        single = common.load_data(write_images(home / "one", rng(), ("ant",), 1, 1), torch.device("cpu"))
    assert data.classes == ["ape", "bat", "cow"] and single.test_images.shape == (1, 3, 16, 16)
    assert data.train_labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    assert data.test_labels.tolist() == [0] * 2 + [1] * 2 + [2] * 2
    assert torch.equal(torch.cat([data.test_images, data.train_images]), torch.stack(want))


def test_data_cifar():
    """CIFAR-10's archive, six images a file: pixels, labels, class names; refused once a file is altered."""
    cifar, g = torchvision.datasets.CIFAR10, rng()
    images, labels = some_images(g, 36, 32, 32), torch.randint(10, (36,), generator=g).tolist()
    files = {"batches.meta": {"label_names": [f"class {i}" for i in range(10)]}}
    for i, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        part = slice(6 * i, 6 * i + 6)
        files[name] = {"data": images[part].flatten(1).numpy(), "labels": labels[part]}
    files = {name: pickle.dumps(content) for name, content in files.items()}
    md5 = [[name, hashlib.md5(content).hexdigest()] for name, content in files.items()]
    with temporary_folder() as folder, mock.patch.multiple(
            cifar, meta=cifar.meta | {"md5": md5[0][1]}, train_list=md5[1:6], test_list=md5[6:]):
        (folder / "cifar-10-batches-py").mkdir()
        for name, content in files.items():
            (folder / "cifar-10-batches-py" / name).write_bytes(content)
        shutil.make_archive(folder / "cifar-10-python", "gztar", folder, "cifar-10-batches-py")
        shutil.rmtree(folder / "cifar-10-batches-py")
        archive = folder / "cifar-10-python.tar.gz"
        with mock.patch.object(cifar, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest()):
            data = common.load_data(folder, torch.device("cpu"))
        archive.unlink()
        (folder / "cifar-10-batches-py" / "test_batch").write_bytes(b"altered")
        with raises(common.UserError, "corrupted", "synthetic"):
            common.load_data(folder, torch.device("cpu"))
    assert torch.equal(torch.cat([data.train_images, data.test_images]), images)
    assert data.train_labels.tolist() + data.test_labels.tolist() == labels and data.classes[3] == "class 3"


def offline():
    """torchvision's downloads fail at once, as without a network; gives the mock that takes their place."""
    failing = mock.Mock(side_effect=urllib.error.URLError("no network in tests"))
    return mock.patch.object(torchvision.datasets.cifar, "download_and_extract_archive", failing)


def test_data_refused():
    """Other layouts and pixels are refused by name; CIFAR-10 is fetched only where nothing else lies."""
    table = {"missing": ([], "no such folder"), "file": ([], "Not a directory"),
             "capital": (["Train/ant/0.png", "Test/ant/0.png"], "found Test, Train"),
             "flat": (["0.png", "2.txt"], "found 0.png, 2.txt"), "data": (["ant/0.png"], "found ant"),
             "half": (["train/ant/0.png"], "found train"),
             "archive": (["cifar-10-python.tar.gz"], "corrupted"),
             "classes": (["train/ant/0.png", "train/bee/0.png", "test/ant/0.png"], "none of bee"),
             "gif": (["train/ant/0.gif", "test/ant/0.gif"], "2 files left out, in no class or named"),
             "none": (["train/0.png", "test/0.png"], "none of any"),
             "vanished": (["train/ant/0.png", "test/ant/0.png", "train/bee/.0.png"], "none of bee"),
             "empty": (["train/ant/0.png", "train/bee/0.txt", "test/ant/0.png", "test/bee/0.txt"], "of bee"),
             "damaged": (["train/ant/0.png", "test/ant/text.png"], "text.png: cannot identify"),
             "size": (["train/ant/0.png", "test/ant/wide.png"], "wide.png: height and width (8, 9)"),
             "short": (["train/ant/0.png", "test/ant/<u2.tif"], "<u2.tif: more than 8 bits"),
             "float": (["train/ant/0.png", "test/ant/<f4.tif"], "mode F)")}
    picture = torchvision.datasets.folder.Image  # Pillow, which torchvision needs
    with temporary_folder() as folder, offline() as fetch, contextlib.ExitStack() as afterwards:
        afterwards.callback(os.chdir, os.getcwd())
        os.chdir(folder)  # where no data/ of the user's lies
        (folder / "file").write_text("x")
        for name, (files, word) in table.items():
            for path in (folder / name / file for file in files):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(b"no picture")
                if path.name in ("0.png", "wide.png"):
                    write_png(torch.zeros(3, 8, 8 + ("wide" in path.name)).byte(), str(path))
                elif path.suffix == ".tif":
                    picture.fromarray(np.zeros((8, 8), path.stem)).save(path)
            for download in (False, True):
                fetch.reset_mock()
                fetched = download and name in ("missing", "archive")
                with raises(common.UserError, str(folder / name), "no network" if fetched else word):
                    common.load_data(folder / name, torch.device("cpu"), download)
                assert fetch.called == fetched, f"{name} is not to be fetched, or is"
        shutil.rmtree(folder / "data")
        with raises(common.UserError, "no network", "train/<class>/", "synthetic"):
            common.load_data("data", torch.device("cpu"))


# ============================================================================================================
# The training loops, with a small network in the place of the ResNet-50
# ============================================================================================================

TOTAL, SUBSET, BATCH, SIZE, SEED_OF_RUN = 30, 25, 10, 16, 3  # of 2 epochs: 5 steps, 3 in the first
METHODS, SCRIPTS = ("simclr", "supervised"), (train_simclr, train_supervised)


def small_network(norm=functools.partial(nn.GroupNorm, 4)):
    """A small convolutional net, whose embeddings point in all directions; its weights: from the seed.

    A group norm, unlike batch norm, does not depend on how a batch is cut.
    """
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), norm(8), nn.ReLU(), nn.Conv2d(8, 12, 3), norm(12),
                             nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 6, bias=False))


def small_data(device):
    """Random images of 6 classes; fewer test images than a batch has."""
    g = rng()
    labels = [torch.randint(6, (n,), generator=g).to(device) for n in (TOTAL, 7)]
    images = [some_images(g, len(part), 20, 20).to(device) for part in labels]
    return common.Data(images[0], labels[0], images[1], labels[1], list("abcdef"))


def recorded_run(script, device, folder, micro_batch, model):
    """Trains a small network by a script's `main`; returns its steps, epochs' records and exchanges.

    A step is (weights before, gradients, rate); an exchange is True for a backward pass under no_sync.
    """
    steps, silent, exchanges = [], [], []

    class Recorder(common.LARS):
        def step(self):
            group = self.param_groups[0]
            weights = [p.detach().cpu().clone() for p in group["params"]]
            assert group["weight_decay"] == (1e-6 if script is train_simclr else 1e-4)
            steps.append((weights, [p.grad.cpu().clone() for p in group["params"]], group["lr"]))
            super().step()

    @contextlib.contextmanager
    def no_sync():
        silent.append(True)
        yield
        silent.pop()

    model.no_sync = no_sync
    model[7].weight.register_post_accumulate_grad_hook(lambda _: exchanges.append(bool(silent)))
    argv = [script.__name__, "--preset", "demo", "--data", "unread", "--out", folder, "--seeds", SEED_OF_RUN,
            "--subset", SUBSET, "--batch-size", BATCH, "--epochs", 2, "--image-size", SIZE, "--lr", 6,
            "--precision", "float32", "--device", device, "--micro-batch", micro_batch, "--warmup-epochs", 1]
    stand_ins = {"build_model": lambda *_, **__: model, "load_data": lambda *_: small_data(device)}
    with mock.patch.multiple(script, LARS=Recorder, **stand_ins), \
            mock.patch.object(sys, "argv", [*map(str, argv)]), \
            mock.patch.object(common, "for_all_ranks", lambda network, _: network), \
            contextlib.redirect_stdout(io.StringIO()), \
            torch.backends.cudnn.flags(deterministic=True, allow_tf32=False):
        script.main()
    return steps, log_of(next(Path(folder).glob(f"{script.__name__[6:]}_*.pt"))), exchanges


def literal_step(method, weights, step, device):
    """(loss, accuracy, gradients) of a step by the letter: images, augmentation, then all in float64."""
    data, network, seed = small_data(device), small_network().double(), SEED_OF_RUN
    for p, w in zip(network.parameters(), weights):
        p.data.copy_(w)
    subset = torch.randperm(TOTAL, generator=torch.Generator().manual_seed(0))[:SUBSET].sort().values
    generators = [common.generator_for("cpu", "order", seed, epoch) for epoch in range(2)]
    stream = torch.cat([subset[torch.randperm(SUBSET, generator=g)] for g in generators])
    rows = stream[step * BATCH:(step + 1) * BATCH].to(device)
    images, labels = data.train_images[rows], data.train_labels[rows].cpu()
    keys = [common.generator_for(device, "augmentation", seed, step, view) for view in (0, 1)]
    if method == "simclr":
        params = [common.draw_params(BATCH, 20, 20, device, key, 0.5) for key in keys]
        views = [common.simclr_augment(images, SIZE, p, False).cpu().double() for p in params]
        loss, accuracy = literal_info_nce(*(network(view) for view in views), 0.5)
    else:
        mean, std = common.channel_statistics(data.train_images)
        params = common.draw_params(BATCH, 20, 20, device, keys[0])
        inputs = common.standardise(common.imagenet_augment(images, SIZE, params), mean, std)
        logits = network(inputs.cpu().double())
        loss = -sum(row.log_softmax(0)[label] for row, label in zip(logits, labels)) / BATCH
        accuracy = (logits.argmax(1) == labels).double().mean().item()
    return loss.item(), accuracy, torch.autograd.grad(loss, list(network.parameters()))


def test_loops_literal():
    """Images, labels, augmentation, rate, loss and gradient of all steps, on any device, by micro-batches."""
    for device, method, micro_batch in itertools.product(DEVICES, METHODS, (10, 5, 4)):
        script, model = SCRIPTS[METHODS.index(method)], small_network()
        what = f"{device} float32, {method}, micro-batch {micro_batch}: "
        with temporary_folder() as folder:
            steps, records, exchanges = recorded_run(script, device, folder, micro_batch, model)
        literal = [literal_step(method, weights, i, device) for i, (weights, *_) in enumerate(steps)]
        for step, ((_, gradients, rate), (*_, want)) in enumerate(zip(steps, literal)):
            factor = step / 2 if step < 2 else 0.5 * (1 + math.cos(math.pi * (step - 2) / 3))  # 2 to warm up
            assert_close(rate, 6 * BATCH / 256 * factor, 1e-9, what + f"rate of step {step}")
            assert_same_vector(gradients, want, 1e-2, what + f"gradient of step {step}")  # ReLUs may flip
        for record, epoch in zip(records, (literal[:3], literal[3:])):
            assert_close(record["loss"], np.mean([loss for loss, *_ in epoch]), 5e-6, what + "loss")
            assert_close(record["accuracy"], np.mean([a for _, a, _ in epoch]), 1e-6, what + "accuracy")
        pieces = -(-BATCH // micro_batch)
        assert exchanges == ([True] * (pieces - 1) + [False]) * 5, what + "one exchange of gradients a step"
        if method == "supervised":
            data = small_data("cpu")
            statistics = common.channel_statistics(data.train_images)
            inputs = common.standardise(common.resize(data.test_images, SIZE), *statistics)
            right = (model.cpu()(inputs).argmax(1) == data.test_labels).double().mean()
            assert_close(records[-1]["test_accuracy"], right, 1e-6, what + "test accuracy")


def watched_batch_norm(*args, real=F.batch_norm, **kwargs):
    """torch's batch norm; in training it must have running statistics, or SyncBatchNorm fails in bf16."""
    assert args[1] is not None or not args[5], "batch norm in training without running statistics"
    return real(*args, **kwargs)


@mock.patch.object(F, "batch_norm", watched_batch_norm)
def test_micro_batch_statistics():
    """Batch norm counts each chunk of a micro-batched step once, and always has running statistics."""
    g, model = rng(), small_network(nn.BatchNorm2d).train()
    chunks = [torch.rand(n, 3, 16, 16, generator=g) for n in (8, 8, 4)]
    mean, var = torch.zeros(8), torch.ones(8)
    for chunk in chunks:
        x = model[0](chunk).detach().transpose(0, 1).flatten(1)  # (channels, all places)
        mean, var = 0.9 * mean + 0.1 * x.mean(1), 0.9 * var + 0.1 * x.var(1)
    train_simclr.cached_gradients(model, chunks, 0.5, model, contextlib.nullcontext)
    assert_close(model[1].running_mean, mean, 1e-5, "running mean")
    assert_close(model[1].running_var, var, 1e-5, "running variance")
    assert model[1].num_batches_tracked == 3


@mock.patch.object(F, "batch_norm", watched_batch_norm)
def test_checkpoint_activations():
    """Computing activations twice changes neither gradient nor running statistics, and does happen twice."""
    images, gradients = torch.rand(4, 3, 32, 32, generator=rng()), []
    plain = torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [2, 1, 1, 1])
    twice, forwards = copy.deepcopy(plain), mock.Mock(return_value=None)
    common.checkpoint_blocks(twice)
    twice.layer3[0].conv2.register_forward_hook(forwards)
    for model in (plain, twice):
        model(images).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert forwards.call_count == 2
    assert_same_vector(*gradients, 1e-6)
    assert all(torch.equal(*pair) for pair in zip(plain.buffers(), twice.buffers()))


# ============================================================================================================
# The scripts at tiny size, in this process, which has torch loaded already, unless they must be killed
# ============================================================================================================


def run_script(script, *flags):
    """Runs a script as `python <script> <flags>` would; returns (exit code, output, errors)."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        with mock.patch.object(sys, "argv", [script, *map(str, flags)]):
            try:
                runpy.run_path(str(HERE / script), run_name="__main__")
            except SystemExit as stop:
                code = stop.code or 0
    return code, out.getvalue(), err.getvalue()


def assert_refused(script, *flags, words=()):
    """The script ends with exit code 2 and exactly one line on stderr, which contains the words."""
    code, out, err = run_script(script, *flags)
    what = f"{' '.join(map(str, flags[-4:]))}: exit code {code}, {out[-200:]}{err[-300:]}"
    assert code == 2 and err.count("\n") == 1 and err.startswith("error: "), what
    assert all(word in err for word in words), what


def flags_for(method, out, *more):
    """Flags of a run of 3 steps, of which 2 are the first of 2 epochs; SimCLR's in 2 micro-batches each."""
    micro_batch = ["--micro-batch", 8] if method == "simclr" else []
    return ["--preset", "demo", "--data", tiny_data(), "--out", out, "--subset", 24, "--batch-size", 16,
            "--epochs", 2, "--image-size", 16, "--device", "cpu", "--precision", "float32",
            *micro_batch, *more]


@functools.cache
def shared_folder():
    """A folder for what several checks use, removed at the end."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def tiny_data():
    """A folder of images, 40 to train and 24 to test."""
    return write_images(shared_folder() / "data", rng(), train=10, test=6)


@functools.cache
def tiny_checkpoints():
    """A folder of two networks of each method, trained by the real scripts without interruption."""
    folder = shared_folder() / "checkpoints"
    for method in METHODS:
        flags = flags_for(method, folder, "--seeds", 0, 1, "--checkpoint-every", 2)
        code, out, err = run_script(f"train_{method}.py", *flags)
        assert code == 0 and out.count(" epoch 2/2") == 2, f"train_{method}.py: exit code {code}, {out} {err}"
        assert err == "" and "float32 on 1 x cpu, 2 epochs, 3 steps of 16 images" in out, f"{out} {err}"
    return folder


def entries_of_checkpoint(path):
    """All that a checkpoint holds, line by line; tensors by their hashes."""
    def digest(tensor):
        return hashlib.md5(tensor.contiguous().numpy()).hexdigest()

    content = torch.load(path, weights_only=True)
    return json.dumps(content, indent=0, default=digest).splitlines()


def log_of(path):
    """The records of a checkpoint's log, an epoch each."""
    epochs = [json.loads(line) for line in path.with_suffix(".jsonl").read_text().splitlines()]
    wanted = {"loss", "lr", "images_per_second", "test_accuracy" if "super" in path.name else "accuracy"}
    assert all(wanted <= record.keys() and math.isfinite(record["loss"]) for record in epochs)
    assert [record["epoch"] for record in epochs] == [1, 2]
    return epochs


def test_scripts_checkpoint():
    """A checkpoint loads with weights_only; torchvision's ResNet-50 takes the backbone, load_model too."""
    images = torch.rand(4, 3, 32, 32, generator=rng())
    for method in METHODS:
        path = tiny_checkpoints() / f"{method}_seed1.pt"
        saved, network = torch.load(path, weights_only=True), torchvision.models.resnet50()
        want = {"seed": 1, "method": method, "classes": ["ant", "bee", "cat", "dog"], "image_size": 16,
                "data": str(tiny_data().absolute()), "checkpoint_activations": False}
        assert saved["epoch"] == 2 and saved["settings"] | want == saved["settings"] and log_of(path)
        keys = network.load_state_dict(saved["backbone"], strict=False)
        assert set(keys.missing_keys) == {"fc.weight", "fc.bias"} and not keys.unexpected_keys
        network.fc = nn.Linear(2048, 4) if method == "supervised" else common.ProjectionHead()
        network.fc.load_state_dict(saved["head"])
        want, model = network.eval()(images), common.load_model(path)
        assert_close(model(images), want, 1e-4 * want.abs().max().item(), method)
        assert not model.training and model.settings["method"] == method


def test_checkpoint_bad_files():
    """Each kind of bad file is a UserError that says which; nothing in a file is executed or overwritten."""
    class Payload:
        def __reduce__(self):
            return os.system, (f"touch {marker}",)

    good = (tiny_checkpoints() / "supervised_seed0.pt").read_bytes()
    keys = dict.fromkeys(("settings", "epoch", "step", "backbone", "head"), {})
    with temporary_folder() as folder:
        marker, path = folder / "executed", folder / "supervised_seed0.pt"
        header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
        contents = [(struct.pack("<Q", len(header)) + header + bytes(4), "safetensors.torch.load_file")]
        middle = slice(len(good) // 2, len(good) // 2 + 99)
        damaged = b"", b"hello", good[:middle.start], pickle.dumps(Payload()), bytearray(good)
        damaged[-1][middle] = bytes(99)
        contents += zip(damaged, ["damaged or not by torch.save"] * 5)
        for value, word in ((Payload(), "system"), (keys | {"backbone": Payload()}, "system"),
                            ({"args": argparse.Namespace(lr=1)}, "argparse.Namespace"),
                            ({"best": np.float64(71)}, "numpy"), (nn.Linear(2, 2), "Linear"),
                            (keys, "lacks some"), ([1, 2], "no tensors")):
            for zipped in (True, False):
                buffer = io.BytesIO()
                torch.save(value, buffer, _use_new_zipfile_serialization=zipped)
                contents.append((buffer.getvalue(), word))
        buffer = io.BytesIO()
        torch.save([1, 2], buffer, pickle_protocol=4)
        contents.append((buffer.getvalue(), "usual pickle_protocol"))
        for content, word in contents:
            path.write_bytes(content)
            with raises(common.UserError, str(path), word):
                common.load_model(path)
            with raises(common.UserError, str(path)):
                common.checkpoint_of_run(path, {})
        assert_refused("train_supervised.py", *flags_for("supervised", folder, "--seeds", 0))
        assert path.read_bytes() == content and not marker.exists(), "a file was overwritten or executed"
        for place, word in ((folder / "none", "No such file"), (folder, "Is a directory")):
            with raises(common.UserError, str(place), word):
                common.load_model(place)


def state_dict(prefix="", shift=0.0, layer1=None, network=torchvision.models.resnet50):
    """A small file's worth of a network: entry i is all i + shift; `layer1`: named as in nn.Sequential."""
    tops = {"conv1": 0, "bn1": 1} | {f"layer{g}": layer1 + g - 1 for g in range(1, 5)} if layer1 else {}
    with torch.device("meta"):
        tensors = network().state_dict().items()
    weights = {}
    for i, (name, tensor) in enumerate(tensors):
        top, rest = name.split(".", 1)
        if top != "fc":
            value = torch.full((), i + shift, dtype=tensor.dtype).expand(tensor.shape)
            weights[f"{prefix}{tops.get(top, top)}.{rest}"] = value
    return weights


def test_checkpoint_backbone_found():
    """A ResNet-50 is found after any prefix in any nesting, of several the one that projects publish."""
    plain, fc, queue = state_dict(), {"fc.weight": torch.ones(10, 2048)}, {"queue": torch.ones(3, 4)}
    uncounted = {name: value for name, value in state_dict("b.").items() if "num_batches" not in name}
    layouts = [  # content, prefix of what is taken, names left out or how many
        (plain | fc, "", ["fc.weight"]), ({"model_state_dict": plain, "epoch": 3}, "model_state_dict.", 0),
        ({name: value for name, value in plain.items() if "num_batches" not in name}, "", 0),
        ({"a": [{"model": state_dict("_orig_mod.")}]}, "a.0.model._orig_mod.", 0),
        (state_dict("", layer1=3) | {"7.1.weight": queue["queue"]}, "", ["7.1.weight"]),
        (state_dict("f.", layer1=4) | queue, "f.", ["queue"]),
        ({re.sub(r"layer(\d)\.", r"layer\1._orig_mod.", n): value for n, value in plain.items()}, "", 0),
        (plain | {"layer1.total_ops": torch.ones(1)}, "", ["layer1.total_ops"]),
        ({n.replace("downsample", "shortcut"): value for n, value in state_dict("net.").items()}, "net.", 0),
        (state_dict("b.") | state_dict("c.d."), "b.", 318), (state_dict("a.") | uncounted, "a.", 265)]
    for name in ("encoder_k", "student", "target", "key_encoder", "momentum_backbone", "ema"):
        beside = {"state_dict": state_dict(f"module.{name}.", 0.5) | state_dict("module.teacher.") | queue}
        layouts.append((beside, "state_dict.module.teacher.", 319))
    for content, prefix, left_out in layouts:
        weights, found, beside = common.find_backbone(content, "net.pt")
        assert found == prefix and left_out in (beside, len(beside)), f"took {found}, left out {len(beside)}"
        assert all(torch.equal(weights[n], value) for n, value in plain.items() if n in weights), prefix
        assert len(weights) in (265, 318)  # without and with the counts of batches
    two = {"model": state_dict("a.") | state_dict("b.", 0.5)}
    refused = [
        ({n: v for n, v in plain.items() if n != "layer3.2.bn1.bias"}, ["many: layer3.2.bn1.bias"]),
        (plain | {"layer5.0.conv1.weight": torch.ones(1)}, ["many: layer5.0.conv1.weight"]),
        (plain | {"stem.conv1.weight": torch.ones(64, 3, 7, 7)}, ["many: stem.conv1.weight"]),
        (plain | {"conv1.weight": torch.ones(64, 1, 7, 7)}, ["many: conv1.weight"]),
        ({n: v for n, v in plain.items() if "running" not in n}, ["bn1.running_mean"]),
        (state_dict(layer1=4, network=torchvision.models.resnet101), ["6.6.conv1.weight"]),
        (state_dict("x.", network=torchvision.models.wide_resnet50_2), ["layer1.0.conv1.weight"]),
        ({"a": {"weights": torch.ones(3)}}, ["found a.weights"]), ({"epoch": 3}, ["no tensors"]),
        (two, ["--prefix", "'model.a.'", "'model.b.'"])]
    for content, words in refused:
        with raises(common.UserError, "net.pt", *words):
            common.find_backbone(content, "net.pt")
    for prefix in ("model.a", "model.b."):
        assert common.find_backbone(two, "net.pt", prefix)[1].strip(".") == prefix.strip(".")
    with raises(common.UserError, "--prefix", "'model.a.'"):
        common.find_backbone(two, "net.pt", "c")


def test_checkpoint_other_projects():
    """A foreign network is in float32 and eval mode; its settings say how it is used and what was assumed."""
    plain, stem = state_dict("net."), {"net.conv1.weight": torch.zeros(64, 3, 3, 3)}
    half = {name: value.half() for name, value in plain.items()}
    ours = {"stem_padding": 2, "mean": (0, 0, 0), "std": (1, 1, 1), "image_size": 48, "method": "simclr"}
    cases = [  # content, arguments; stem, padding, image size, mean; words of the note
        (half, {}, ["imagenet", 3, 224, [0.485, 0.456, 0.406]], ["'net.'", "7 x 7", "assumed", "--mean"]),
        (plain | stem, {}, ["cifar", 1, 32, [0.485, 0.456, 0.406]], ["3 x 3", "--stem-padding 1"]),
        (plain | stem, ours, ["cifar", 2, 48, [0, 0, 0]], ["3 x 3", "padding 2"])]
    with temporary_folder() as folder:
        for content, arguments, want, words in cases:
            torch.save(content, folder / "net.pt")
            model = common.load_model(folder / "net.pt", **arguments)
            s, last = model.settings, model.layer4[2].conv3.weight
            assert [s["stem"], model.conv1.padding[0], s["image_size"], s["mean"]] == want
            assert s["method"] == arguments.get("method", "supervised") and not model.training
            assert s["prefix"] == "net." and all(word in s["note"] for word in words), s["note"]
            assert last.dtype == torch.float32 and torch.equal(last, plain["net.layer4.2.conv3.weight"])
        mean = torch.ones(64)
        for bad, words in ((mean * math.nan, ["NaN", "bn1.running_mean"]), (mean.to_sparse(), ["parse"]),
                           (mean.long(), ["integers", "bn1.running_mean"]), (mean.to("meta"), ["meta"])):
            torch.save(plain | {"net.bn1.running_mean": bad}, folder / "net.pt")
            with raises(common.UserError, "net.pt", *words):
                common.load_model(folder / "net.pt")
    own = common.load_any_model(tiny_checkpoints() / "simclr_seed0.pt", "supervised").settings
    assert own["method"] == "simclr" and "note" not in own


def test_write_atomically():
    """A save that fails, while pickling or at the disk, leaves the old file and no temporary one."""
    def save(content):
        common.write_atomically(path, functools.partial(torch.save, content))

    full = OSError(errno.ENOSPC, "No space left on device")
    with temporary_folder() as folder:
        path = folder / "x.pt"
        save({"a": torch.ones(3)})
        with raises(Exception, "pickle"):
            save({"a": lambda: 0})
        for function in ("fsync", "replace"):
            with mock.patch.object(os, function, side_effect=full):
                with raises(common.UserError, str(path), "No space left", "kept"):
                    save({"a": torch.zeros(3)})
        assert torch.load(path, weights_only=True)["a"].tolist() == [1, 1, 1]
        assert os.listdir(folder) == ["x.pt"]


def test_scripts_resumed():
    """Signals and a crash, in an epoch and at its end: the same command goes on and ends in the same bits.

    On the way the checkpoint becomes one of an older version, its log is cut short and a file is left over.
    """
    def stopped(run, *results, count=common.Run.count):
        if run.step == at and number == 0:
            raise SystemExit(128)  # a crash: nothing is saved
        if run.step == at:
            os.kill(os.getpid(), number)
        count(run, *results)

    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    for method, stops in (("simclr", ((0, signal.SIGINT, "step 1 of 3"), (2, 0, "epoch 1/2"))),
                          ("supervised", ((1, signal.SIGTERM, "step 2 of 3"),))):
        with temporary_folder() as folder:
            path, script = folder / f"{method}_seed0.pt", f"train_{method}.py"
            flags = flags_for(method, folder, "--seeds", 0)
            for at, number, words in stops:
                with mock.patch.object(common.Run, "count", stopped):
                    code, out, err = run_script(script, *flags)
                assert code == 128 + number and words in out, f"exit code {code}: {out[-300:]} {err[-300:]}"
                older = torch.load(path, weights_only=True)
                assert older["step"] == at + (number > 0)
            states = older["optimizer"]["state"]
            for state in ({}, states | {0: {"momentum_buffer": torch.zeros(3)}}):
                torch.save(older | {"optimizer": older["optimizer"] | {"state": state}}, path)
                assert_refused(script, *flags, words=[str(path), "optimizer state", "is damaged"])
            older["settings"] |= {"data": "data", "precision": "fp32"}
            del older["settings"]["train_images"]
            torch.save(older, path)
            path.with_name(f"{path.name}.elsewhere-1.tmp").write_bytes(b"left over")
            log = path.with_suffix(".jsonl")
            damaged = b'{"epoch": 2, "loss": 1.0}\n{"epoch": 3, "lo', b"3\n\n\0\n"
            log.write_bytes(damaged[1] + log.read_bytes() + damaged[method == "supervised"])
            code, out, err = run_script(script, *flags)
            assert code == 0 and "resumed after epoch 1" in out, f"{out[-300:]} {err[-300:]}"
            both = path, tiny_checkpoints() / path.name
            found, want = map(entries_of_checkpoint, both)
            differ = [f"{x} for {y}" for x, y in zip(found, want) if x != y]
            assert len(found) == len(want) > 400 and not differ, f"{len(differ)} differ: {differ[:3]}"
            losses, wanted = ([record["loss"] for record in log_of(p)] for p in both)
            assert losses == wanted, f"logged: {losses}, without interruption {wanted}"
            assert not list(folder.glob("*.tmp")), "the left-over file is still there"
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


def test_scripts_again():
    """A finished network is skipped; other settings and a network in training are refused; all stays."""
    def interrupted(path, read=common.read_file):
        os.kill(os.getpid(), signal.SIGTERM)
        return read(path)

    for method in METHODS:
        path, script = tiny_checkpoints() / f"{method}_seed0.pt", f"train_{method}.py"
        flags = flags_for(method, path.parent, "--seeds", 0)
        before = path.stat().st_mtime_ns, path.with_suffix(".jsonl").read_bytes()
        code, out, _ = run_script(script, *flags)
        assert code == 0 and "skipped" in out
        with mock.patch.object(common, "read_file", interrupted):
            code, out, _ = run_script(script, *flags, "--seeds", 0, 1)
        assert code == 128 + signal.SIGTERM and out.count("skipped") == 1, "the signal is lost"
        assert_refused(script, *flags, "--lr", 0.7, "--stem", "cifar", words=["lr", "0.7", "stem", "cifar"])
        with open(path.with_suffix(".jsonl"), "ab") as log:
            fcntl.flock(log, fcntl.LOCK_EX)
            assert_refused(script, *flags, words=[f"{method}_seed0.jsonl", "another process"])
        assert before == (path.stat().st_mtime_ns, path.with_suffix(".jsonl").read_bytes())


def test_scripts_refused():
    """Impossible flags, an infinite loss, too little memory: one line, exit code 2, nothing written."""
    for preset, epochs in (("paper", 1300), ("small", 20)):
        code, out, _ = run_script("train_simclr.py", "--help", f"--preset={preset}")
        assert code == 0 and f"(default: {epochs})" in " ".join(out.split()) and "size and memory" in out
    args = common.training_arguments("", train_simclr.PRESETS, ["--epochs=1", "--checkpoint-activations"])
    assert args.warmup_epochs == 0.5 and args.micro_batch == 4096
    with temporary_folder() as folder, offline():
        file, out = folder / "file", folder / "out"
        file.write_text("kept")
        small = flags_for("simclr", out, "--precision", "bfloat16")
        assert_refused("train_simclr.py", *small, words=["--image-size 16", "below 17 px"])
        both = {"--batch-size": (0, 1, 25), "--micro-batch": (0,), "--subset": (0, 41), "--other": (1,),
                "--epochs": (0, 1.5, 10 ** 9), "--lr": ("nan", "inf", -1, 1e300), "--weight-decay": (-1,),
                "--image-size": (0, 10 ** 9),
                "--warmup-epochs": (-1, 5), "--checkpoint-every": (0,), "--seeds": (-1, "x"),
                "--stem": ("huge",), "--precision": ("fp8",), "--preset": ("none",), "--device": ("meta",),
                "--out": (file, file / "below"), "--data": (file, folder / "nothing")}
        cases = [("simclr", "--temperature", 0), ("simclr", "--temperature", "nan"),
                 ("simclr", "--compile", "--checkpoint-activations"), ("supervised", "--micro-batch", 1),
                 ("supervised", "--micro-batch", 15)]
        cases += [(method, flag, value) for method in METHODS for flag in both for value in both[flag]]
        for method, flag, value in cases:
            assert_refused(f"train_{method}.py", *flags_for(method, out, flag, value), words=[flag])
        assert file.read_text() == "kept" and not list(out.glob("*"))
        flags = flags_for("supervised", out, "--seeds", 0, "--lr", 1e30, "--warmup-epochs", 0)
        assert_refused("train_supervised.py", *flags, words=["step 2", "finite"])
        error = RuntimeError("could not create a primitive")
        with mock.patch.object(common, "info_nce_and_accuracy", side_effect=error):
            assert_refused("train_simclr.py", *flags_for("simclr", out, "--seeds", 0),
                           words=["out of memory", "--micro-batch 8", "--checkpoint-activations"])
        assert not list(out.glob("*.pt*"))


def test_errors_out_of_memory():
    """Memory that runs out, wherever: one line, exit code 2. A fault of the program stays a traceback."""
    texts = ("std::bad_alloc", "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried",
             "could not create a primitive", "not enough memory: you tried", "can't start new thread")
    for error in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried"),
                  OSError(errno.ENOMEM, "Cannot allocate memory"), *map(RuntimeError, texts)):
        err = io.StringIO()
        with raises(SystemExit, "2"), contextlib.redirect_stderr(err), common.user_errors():
            raise error
        line = err.getvalue()
        assert line.startswith("error: out of memory with ") and line.count("\n") == 1, repr(error)
        with raises(common.UserError, "out of memory with less"), common.explained("more", Exception):
            with common.explained("less", Exception):
                raise error
    for advice in (contextlib.nullcontext(), common.explained("less", OSError)):
        with raises(RuntimeError, "shapes"), common.user_errors(), advice:
            raise RuntimeError("shapes do not fit")


def test_progress():
    """At a terminal a line is rewritten, once a second; once the time that the run takes is said."""
    out, err, now = io.StringIO(), io.StringIO(), itertools.count(step=0.1)
    err.isatty = lambda: True
    settings = {"method": "simclr", "seed": 0, "train_images": 1000, "batch_size": 10, "epochs": 2,
                "warmup_epochs": 1}
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), \
            mock.patch.object(time, "perf_counter", lambda: next(now)):
        run = common.Run(types.SimpleNamespace(out=Path()), settings, 1000, torch.device("cpu"))
        for step in run.steps():
            run.count(torch.tensor(2.5 + step), torch.tensor(0.5))
    lines = [line.strip() for line in err.getvalue().split("\r") if line.strip()]
    lines.insert(0, out.getvalue().strip())  # the first is a line of its own
    found = [int(line.split(" of 100  ")[0].removeprefix("epoch 1/2 step ")) for line in lines]
    assert 5 < len(found) < 30 and sorted(set(found)) == found, lines
    for step, line in zip(found, lines):
        assert f"loss {step + 1.5:.3f}" in line and "images/s" in line, line
        assert "left 0:00:" in line and "in all 0:00:" in line, line


# ============================================================================================================
# Several processes, GPUs of any age
# ============================================================================================================


def test_processes_refused():
    """What processes and GPUs cannot do is one line; after a failure nobody waits for the other processes."""
    for device, processes, flags, words in (
            ("cuda", 1, ["--precision", "bfloat16"], ["--precision bfloat16", "8.0", "float32"]),
            ("cpu", 2, ["--compile"], ["--compile", "processes"]),
            ("cpu", 3, [], ["--batch-size 10", "3"]), ("cpu", 10, [], ["--batch-size 10", "2 images"])):
        flags = ["--preset", "demo", "--batch-size", "10", "--subset", "20", *flags]
        args = common.training_arguments("", train_simclr.PRESETS, flags)
        with mock.patch.object(common, "world_size", return_value=processes), \
                mock.patch.object(common, "has_bf16", return_value=False), raises(common.UserError, *words):
            common.run_settings(args, "simclr", 0, small_data("cpu"), torch.device(device))
    with mock.patch.dict(os.environ, LOCAL_RANK="3"), common.distributed("cpu") as device:
        assert device.type == "cpu" and common.world_size() == 1
    variables = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    dist, err = torch.distributed, io.StringIO()
    with mock.patch.dict(os.environ, variables), mock.patch.object(dist, "init_process_group"), \
            mock.patch.object(dist, "destroy_process_group") as destroy:
        with raises(RuntimeError, "of memory"), common.distributed("cpu"):
            raise RuntimeError("CUDA out of memory")
        assert not destroy.called
        with common.distributed("cpu"):
            pass
        assert destroy.called
    with mock.patch.object(common, "world_size", return_value=2), contextlib.redirect_stderr(err), \
            mock.patch.object(os, "_exit", side_effect=SystemExit) as leave, raises(SystemExit):
        with common.user_errors():
            raise RuntimeError("CUDA out of memory")
    assert leave.call_args.args == (2,) and err.getvalue().startswith("error: out of memory")


def test_ranks():
    """Two processes of torchrun end where one ends whose micro-batches are their shares, up to rounding."""
    folders = shared_folder() / "ranks", tiny_checkpoints()
    flags = flags_for("simclr", folders[0], "--seeds", 0, "--micro-batch", 16)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    out = python(*torchrun, "train_simclr.py", *flags)
    assert out.count("epoch 1/2  loss") == 1, out
    for record, want in zip(*(log_of(folder / "simclr_seed0.pt") for folder in folders)):
        for name in ("loss", "accuracy"):
            assert_close(record[name], want[name], 1e-3, name)
    ranks, one = (torch.load(folder / "simclr_seed0.pt", weights_only=True) for folder in folders)
    buffers = [[s["momentum_buffer"] for s in c["optimizer"]["state"].values()] for c in (ranks, one)]
    assert_same_vector(*buffers, 3e-2, "momentum")
    weights = [[v for k, v in c["backbone"].items() if k.endswith(("weight", "bias"))] for c in (ranks, one)]
    assert_same_vector(*weights, 1e-4, "weights")
    assert ranks["backbone"].keys() == one["backbone"].keys() and ranks["step"] == 3


# ============================================================================================================
# Figures
# ============================================================================================================

FIGURES = {"fig1": ("fig1_internal.py", "1a 1b 1c"), "fig5": ("fig5_aug_heatmaps.py", "5a 5b 5c"),
           "fig4": ("fig1_internal.py --method supervised", "4a 4b 4c"),
           "fig2": ("fig2_cross.py", "2a 2b 2c 2d 2e 2f 4d"),
           "fig3": ("fig3_probes_invariance.py --probe-epochs 2", "3a 3b 3c 3d 3e 3f 3g 3h")}


def draw(name, folder, *flags):
    """Runs a figure's script with `folder` as --out; returns (arrays, standard output, standard error)."""
    script, *more = FIGURES[name][0].split()
    flags = *more, "--out", folder, "--device", "cpu", "--precision", "float32", *flags
    code, out, err = run_script(script, *flags)
    assert code == 0, f"{name}: exit code {code}, {out[-300:]} {err[-300:]}"
    assert torchvision.io.decode_png(torchvision.io.read_file(str(folder / f"{name}.png"))).shape[2] > 800
    with np.load(folder / f"{name}.npz", allow_pickle=False) as saved:
        return dict(saved), out, err


@functools.cache
def tiny_figures():
    """(folder, name -> arrays) of every figure of the tiny networks on all 24 test images."""
    folder, arrays = shared_folder() / "figures", {}
    with mock.patch.object(common, "load_model", functools.cache(common.load_model)):  # it takes longest
        for name, (_, identities) in FIGURES.items():
            arrays[name], out, err = draw(name, folder, "--checkpoints", tiny_checkpoints())
            claims = [line[:2] for line in out.splitlines() if " | " in line]
            assert claims == identities.split(), f"{name} prints {out}"
            assert "mean nothing" in out and "--debiased" in err, "neither the demo nor few images mentioned"
    return folder, arrays


def test_figures_values():
    """CKA in all figures is that by definition, by both estimators, and so is that without tenths."""
    images, layers, figures = common.load_data(tiny_data(), "cpu").test_images / 255, [], tiny_figures()[1]
    for path in sorted(tiny_checkpoints().glob("*.pt")):  # 35, 35, 32 and 32 layers, and then the classes
        model = common.load_model(path)
        mean, std = (torch.tensor(model.settings[name]).view(3, 1, 1) for name in ("mean", "std"))
        x = (images - mean) / std if "supervised" in path.name else images
        layers += common.representations(model, x).values()
    layers.append(torch.eye(4).repeat_interleave(6, 0))
    cka = {"": literal_cka(layers), "_debiased": literal_cka(layers, unbiased=True),
           "_left_out": literal_left_out(layers)}
    for ending, every in cka.items():
        a, b, c, d = (slice(start, start + 32) for start in (0, 35, 70, 102))
        cross = torch.stack([every[..., rows, columns] for rows in (a, b) for columns in (c, d)], -3)
        simclr, supervised = every[..., None, a, b], every[..., None, c, d]
        want = {"fig1 pairs": simclr, "fig2 pairs_simclr": simclr, "fig4 pairs": supervised,
                "fig2 pairs_supervised": supervised, "fig2 pairs": cross}
        for method, starts, count in (("simclr", (0, 35), 35), ("supervised", (70, 102), 32)):
            shown = torch.tensor([*range(1, 32, 2), *range(32, count)])
            diagonals = figures["fig5"][f"networks_{method}{ending}"].diagonal(axis1=-2, axis2=-1)
            assert diagonals.shape[-2:] == (2, count) and diagonals.min() < 0.999, "both copies are the same"
            want[f"fig3 invariance_{method}"] = diagonals[..., shown]
            want[f"fig3 class_cka_{method}"] = torch.stack([every[..., -1, i + shown] for i in starts], -2)
        if ending != "_left_out":
            odd, even = cross.mean(0)[0::2, 0::2], cross.mean(0)[1::2, 1::2]
            want |= {"fig1 cka": every[a, b], "fig2 odd": odd, "fig2 even": even,
                     "fig2 diag": even.diagonal(), "fig2 max": even.amax(1)}
        for name, values in want.items():
            figure, key = name.split()
            assert_close(figures[figure][key + ending], values, 1e-4, name + ending)
            where = figures[figure]["data"], figures[figure]["settings"]
            assert str(tiny_data().parent) not in str(where), f"{figure} tells where its data lies"
    assert figures["fig2"]["argmax"].tolist() == figures["fig2"]["even"].argmax(1).tolist()


def test_figures_untrained():
    """--untrained compares the same networks before training: others, and the same ones every time."""
    with temporary_folder() as folder:
        flags = ["--checkpoints", tiny_checkpoints(), "--untrained"]
        first, second = (draw("fig1", folder, *flags)[0] for _ in range(2))
    assert first["untrained"] and '"epoch": 0' in str(first["settings"])
    assert (first["pairs"] == second["pairs"]).all()
    assert abs(first["pairs"] - tiny_figures()[1]["fig1"]["pairs"]).max() > 0.01


def test_figures_replot():
    """--replot gives the same again, with --debiased by the other estimator; a damaged file is refused."""
    with temporary_folder() as folder:
        shutil.copytree(tiny_figures()[0], folder, dirs_exist_ok=True)
        for name in FIGURES:
            files = [folder / f"{name}.npz", folder / f"{name}.png"]
            before = [file.read_bytes() for file in files]
            biased = draw(name, folder, "--replot")[1]
            assert [file.read_bytes() for file in files] == before, f"{name} changes"
            debiased = draw(name, folder, "--replot", "--debiased")[1]
            judged = [re.findall(r" \| (.*) \| ", text) for text in (biased, debiased)]
            assert judged[0] and judged[0] != judged[1], f"{name} judges the same values: {judged}"
            assert [file.read_bytes() == old for file, old in zip(files, before)] == [True, False], name
            for line in (line for line in debiased.splitlines() if " | " in line):
                value = re.split(r" \+- | \[", line)[0].split()[-1]
                assert f" {line[:2]} {value}" in biased, f"{name}: {line[:2]} {value} is not in {biased}"
        (folder / "fig2.npz").write_bytes(before[0][:4000])
        assert_refused("fig2_cross.py", "--replot", "--out", folder, words=["fig2.npz", "damaged", "--out"])


def test_figures_of_files():
    """State dicts give what their checkpoints give, each side by its own flags, and get no verdicts."""
    found, want = {}, tiny_figures()[1]
    with temporary_folder() as folder:
        flags = ["--data", tiny_data(), "--image-size", 16, "--simclr-label", r"A$\q", "--batch-size", 16,
                 "--mean", 0, 0, 0, "--std", 1, 1, 1]
        for seed, side in enumerate(METHODS):  # two supervised networks, which want to see other numbers
            checkpoint = torch.load(tiny_checkpoints() / f"supervised_seed{seed}.pt", weights_only=True)
            file, settings = folder / f"{side} $1, b.pth.tar", checkpoint["settings"]
            torch.save({"state_dict": checkpoint["backbone"]}, file)
            flags += [f"--{side}", file, f"--{side}-mean", *settings["mean"]]
            flags += [f"--{side}-std", *settings["std"]]
        for name in ("fig2", "fig3"):
            found[name], out, _ = draw(name, folder, *flags)
            assert "holds" not in out and "SimCLR" not in out and "4d" not in out, f"{name} prints {out}"
        assert r"A$\q" in out, out
    assert [found["fig2"][f"label_{method}"] for method in METHODS] == [r"A$\q", "supervised $1, b"]
    assert_close(found["fig2"]["pairs"], want["fig4"]["pairs"], 1e-5, "Figure 2")
    for key in ("probe", "class_cka"):
        value = want["fig3"][f"{key}_supervised"][:1]
        assert_close(found["fig3"][f"{key}_simclr"], value, 1e-5, f"Figure 3, {key}")
    args = common.figure_parser("").parse_args(["--simclr", "a/x, $1.pth.tar", "b.pt"])
    assert str(common.figure_folder(args)) == str(Path("figures", "x_1_and_1_more"))


def test_figures_refused():
    """What does not fit is one line that says what to do; other images than training's only on purpose."""
    ours, theirs = (tiny_checkpoints() / f"{method}_seed0.pt" for method in METHODS)
    with temporary_folder() as folder, mock.patch.object(common, "PAPER", tiny_checkpoints()):
        other, moved = write_images(folder / "other", rng(), train=6, test=6), folder / "moved.pt"
        write_png(torch.zeros(3, 16, 16).byte(), str(other / "train/ant/0.png"))  # another mean, by far
        content = torch.load(ours, weights_only=True)
        content["settings"]["data"] = str(other)
        torch.save(content, moved)
        for script, flags, words in (
                ("fig2_cross.py", ["--checkpoints", folder], ["train_simclr.py"]),
                ("fig2_cross.py", ["--simclr", ours, theirs], ["--supervised", "fig1_internal.py"]),
                ("fig1_internal.py", ["--supervised", ours, "--method", "simclr"], ["--supervised"]),
                ("fig1_internal.py", ["--simclr", ours, ours], ["the same network"]),
                ("fig1_internal.py", ["--simclr", ours, moved, "--untrained"], ["the same network"]),
                ("fig1_internal.py", ["--simclr", ours, "--samples", 999], ["--samples 999", "test set"]),
                ("fig1_internal.py", ["--simclr", ours, "--image-size", 16], ["--image-size", str(ours)]),
                ("fig1_internal.py", ["--simclr", ours, "--simclr-mean", 0, 0, 0], ["--mean", "state dict"]),
                ("fig1_internal.py", ["--simclr", moved], ["other images", str(other), "--data", "mean"])):
            assert_refused(script, *flags, "--out", folder / "out", "--device", "cpu", words=words)
        found, out, err = draw("fig1", folder, "--simclr", ours, "--data", other, "--samples", 20)
    assert found["other_images"] and found["data"] == other.name and "other images" in err
    assert found["samples"] == 20 and "20 test images" in out
    assert "itself" in out and abs(found["cka"].diagonal() - 1).max() < 1e-6


def test_figures_probes():
    """A probe is batch norm, division by sqrt(p), a linear layer; pieces give the batch's statistics."""
    batches, new = torch.randn(3, 20, 7, generator=rng()) * 3 + 5, torch.rand(5, 7, generator=rng())
    probe, norm, linear = fig3.Probe(7, 4), nn.BatchNorm1d(7, affine=False, momentum=None), nn.Linear(7, 4)
    probe.load_state_dict(linear.state_dict(), strict=False)
    for x in batches:
        [(mean, variance)] = fig3.batch_statistics((len(piece), [piece]) for piece in x.split(8))
        probe.count(mean, variance, len(x))
        assert_close(probe(x, mean, variance), linear(norm(x) / 7 ** 0.5), 1e-5, "in training")
    assert_close(probe(new), linear(norm.eval()(new) / 7 ** 0.5), 1e-5, "after training")


def test_figures_verdicts():
    """A claim holds by more than the spread; of fewer than three values for each, by two standard errors."""
    def claims(arrays):
        x, inf = arrays["x"], math.inf
        return {"1a": {"x": (x, 0, inf), "only reported": (x, -inf, inf)}, "1b": {"-x": (-x, -inf, 0)},
                "1c": {"x": (x, 0, inf), "bad": (np.ones(1), 2, inf)}}

    nan, signs = math.nan, np.array([1, -1] * 5)[:, None]
    for values, error, verdict in (
            ([0.3, 0.2], nan, "holds"), ([0.3, -0.1], nan, "undecided"), ([-0.3, -0.1], nan, "does not hold"),
            ([0.3, 0.2], 0.12, "holds"), ([0.3, 0.2], 0.13, "undecided"), ([-0.3, -0.2], 0.13, "undecided"),
            ([0.5, 0.1, 0.4], 9, "holds"), ([0.5, -0.2, 0.1], nan, "undecided"), ([nan, 1], 0, "undecided"),
            ([0.3], 0.14, "holds"), ([0.3], 0.16, "undecided")):
        x = np.array(values)
        judged = common.judge(claims, {"x": x, "x_left_out": x + signs * error / 3})  # so: `error`
        assert [found for found, *_ in judged.values()] == [verdict, verdict, "does not hold"], judged
        known = f" [{error:.2g}]" if math.isfinite(error + x.sum()) else ""
        spread = f" +- {x.std():.2g}" if len(x) > 1 else ""
        assert f"x {x.mean():.3g}{spread}{known}, " in judged["1a"][1], judged
    ranks = fig5.rank_correlation(np.array([[1.0, 2, 9, 4], [4.0, 3, 2, 1], [1.0, nan, 3, 4]]))
    assert np.allclose(ranks, [0.8, -1, nan], equal_nan=True), ranks


def test_figures_stalling():
    """Claim 2d counts dots in the block group just left; a constant layer catches no dots."""
    arrays = {f"pairs_{method}": np.ones((1, 32, 32)) for method in METHODS}
    arrays |= {f"dominance_{method}": np.ones((1, 32)) for method in METHODS}
    for dots, count in (([0] * 16, 1), ([2] * 7 + [6] * 6 + [12] * 3, 3), (list(range(16)), 0)):
        matrix = np.full((1, 32, 32), 0.2)
        matrix[0, 1::2, 1::2][np.arange(16), dots] = 0.9
        matrix[:, :, 11] = matrix[:, 11] = math.nan  # even layer 6 is constant, in both networks
        claims = fig2.claims(arrays | {"pairs": matrix})
        assert not any(claim[:2] == "4d" for claim in claims), "one network cannot be compared with another"
        [found] = [list(quantities.values()) for claim, quantities in claims.items() if claim[:2] == "2d"]
        assert found[0][0] == [count], f"2d is {found} with dots at {dots}"
        nearest = fig2.most_similar(matrix[0, 1::2, 1::2])
        assert np.isnan(nearest[5]) and np.isnan(nearest).sum() == 1 and nearest[15] == dots[15], nearest


# ============================================================================================================
# Measurements (--bench): every ratio is of times taken in this run, on this device
# ============================================================================================================


def bench(checkpoint=None):
    """Prints all tables; in CKA's, the network of this checkpoint stands in for one of two untrained ones."""
    torch.set_num_threads(THREADS)
    device = common.pick_device()
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    bench_cka(device, checkpoint)
    bench_few_features(device)
    bench_training(device)
    bench_augmentation()


def least_times(device, rounds, *works):
    """The least seconds of each of `works`, in turn, so that what else the machine does slows all alike."""
    synchronise = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times = [[] for _ in works]
    for _, (work, taken) in itertools.product(range(rounds), list(zip(works, times))):
        synchronise()
        start = time.perf_counter()
        work()
        synchronise()
        taken.append(time.perf_counter() - start)
    return [min(taken) for taken in times]


ROWS = ((320, 16, 17.5e6, 1), (320, 16, 56e6, 1), (320, 16, None, 1), (512, 256, None, 1),
        (1024, 256, None, 1), (1024, 256, None, 100), (2048, 256, None, 1), (4096, 256, None, 1))


@torch.no_grad()
def bench_cka(device, checkpoint=None, rows=ROWS):
    """CKA of two ResNet-50s, 32 px, 32 layers each; rows: images, batch, memory, factor of the first image.

    Time over the floor, which is bare forward passes, and half of every m x m x p product at the rate of
    X @ X.T, in float32; peak memory; calls per image and network; largest difference from float32's values.
    """
    networks = [common.build_model("supervised", "imagenet", seed=seed, zero_init=False) for seed in (0, 1)]
    networks[0] = common.load_model(checkpoint, device) if checkpoint else networks[0]
    networks = [network.to(device, memory_format=torch.channels_last).eval() for network in networks]
    matrix = torch.randn(2048, 8192, device=device)
    products = functools.partial(torch.mm, matrix, matrix.T)
    print("     m batch  budget MB  image 0  precision   time s  over floor  peak MB  passes  off float32 by")
    for m, batch, memory, factor in rows:
        images = common.resize(common.synthetic_images(m, seed=0)[0].to(device), 32)
        images = common.standardise(images, MEAN, STD)
        images = images.contiguous(memory_format=torch.channels_last)
        images[0] *= factor  # heavy tails
        asked, found, passes = [], {}, {}

        def features(network, start, stop):
            asked.append(stop - start)
            stream = common.stream_representations(network, images[start:stop])
            return map(lambda named: named[1].movedim(1, -1).flatten(1), stream)  # holds on to nothing

        def forward_passes():
            for network, part in itertools.product(networks, images.split(256)):
                network(part)

        def cka(name):
            asked.clear()
            options = {"precision": name, "memory": memory, "batch": batch}
            found[name], _ = quietly(common.cka_matrix, sources, m, **options)
            passes[name] = sum(asked) / (2 * m)

        sources = [functools.partial(features, network) for network in networks]
        calls = [functools.partial(cka, name) for name in precisions(device)]
        peaks = [peak_memory(device, call) / 1e6 for call in calls]
        forward, product, *times = least_times(device, 3, forward_passes, products, *calls)
        p = sum(x.shape[1] for network in networks for x in features(network, 0, 1))
        floor = forward + product * m * m * p / (2 * 2048 ** 2 * 8192)
        budget = f"{memory / 1e6:.1f}" if memory else "all"
        for name, seconds, peak in zip(found, times, peaks):
            error = (found[name] - found["float32"]).abs().max()
            print(f"{m:6} {batch:5} {budget:>10} {factor:8} {name:>10} {seconds:8.2f} "
                  f"{seconds / floor:11.2f} {peak:8.0f} {passes[name]:7.2f} {error:15.1e}", flush=True)


def bench_few_features(device, m=50_000, p=512):
    """Time of linear_cka and cka_matrix of two tensors with few features over the textbook's form."""
    x, y = (torch.randn(m, p, device=device) for _ in range(2))

    def textbook():
        a, b = x - x.mean(0), y - y.mean(0)
        return (b.T @ a).norm() ** 2 / ((a.T @ a).norm() * (b.T @ b).norm())

    matrix = functools.partial(common.cka_matrix, [source([x]), source([y])], m, precision="float32")
    usual, one, two = least_times(device, 5, textbook, functools.partial(common.linear_cka, x, y), matrix)
    print(f"two ({m}, {p}): textbook {usual:.3f} s, linear_cka {one / usual:.2f} times that, cka_matrix "
          f"{two / usual:.2f}")


def bench_training(device, images=1280, batch=128):
    """Time of a training step over the bare forward and backward of its network, and of LARS over SGD."""
    def count_and_wait(run, loss, accuracy, count=common.Run.count):
        count(run, loss, accuracy)
        loss.item()
        moments.append(time.perf_counter())

    for method, views in (("supervised", 1), ("simclr", 2)):
        moments = []
        with temporary_folder() as folder, mock.patch.object(common.Run, "count", count_and_wait):
            run_script(f"train_{method}.py", "--preset", "demo", "--seeds", 0, "--subset", images,
                       "--epochs", 1, "--batch-size", batch, "--micro-batch", batch, "--out", folder)
            model = common.load_model(folder / f"{method}_seed0.pt", device).train().requires_grad_(True)
        inputs = torch.rand(batch * views, 3, 32, 32, device=device).to(memory_format=torch.channels_last)

        def bare():
            rounded = model.settings["precision"] == "bfloat16"
            with torch.autocast(device.type, torch.bfloat16, enabled=rounded):
                out = model(inputs)
            out.float().square().mean().backward()
            model.zero_grad()

        [bare_s], step_s = least_times(device, 10, bare), min(np.diff(moments))
        print(f"train_{method}, 32 px, batch {batch}: forward and backward {bare_s:.2f} s, "
              f"step {step_s:.2f} s, ratio {step_s / bare_s:.2f}", flush=True)
    trained = list(model.parameters())
    for p in trained:
        p.grad = torch.randn_like(p)
    sgd = torch.optim.SGD(trained, 1e-9, momentum=0.9, weight_decay=1e-6, foreach=True)
    lars = common.LARS(trained, 1e-9, weight_decay=1e-6)
    sgd_s, lars_s = least_times(device, 10, sgd.step, lars.step)
    print(f"LARS {lars_s * 1e3:.1f} ms, SGD {sgd_s * 1e3:.1f} ms, ratio {lars_s / sgd_s:.2f}")


def bench_augmentation(size=32, n=512):
    """Time of torchvision's per-image pipeline over that of simclr_augment, both on one core."""
    torch.set_num_threads(1)
    images, transforms = common.synthetic_images(n, seed=0)[0], torchvision.transforms
    pipeline = transforms.Compose([
        transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip(),
        transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8),
        transforms.RandomGrayscale(0.2), transforms.ToTensor()])
    pictures = [transforms.functional.to_pil_image(image) for image in images]
    usual, ours = least_times(torch.device("cpu"), 4, lambda: torch.stack([*map(pipeline, pictures)]),
                              lambda: common.simclr_augment(images, size, common.draw_params(
                                  n, 32, 32, "cpu", strength=0.5), blur=False))
    print(f"augmentation, {size} px: {n / ours:.0f} images/s, {usual / ours:.1f} times torchvision's")


def run_checks(names):
    """Runs checks, prints a line for each and returns how many failed."""
    failed = 0
    for name in names:
        started, outcome = time.perf_counter(), "ok"
        try:
            globals()[f"test_{name}"]()
        except Exception:
            failed, outcome = failed + 1, "FAILED"
            traceback.print_exc()
        print(f"{name:34s} {time.perf_counter() - started:6.1f} s  {outcome}", flush=True)
    return failed


def main():
    """Runs the checks named on the command line, or all, in two processes; exit code 1 if one fails."""
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("names", nargs="*", help="run only checks whose name contains one of these words")
    parser.add_argument("--bench", nargs="?", const="", metavar="CHECKPOINT",
                        help="measure speed, memory and error instead (some 15 minutes on 2 CPU cores)")
    args = parser.parse_args()
    if args.bench is not None:
        return bench(args.bench)
    names = [name[5:] for name in globals() if name.startswith("test_")]
    chosen = [name for name in names if not args.names or any(word in name for word in args.names)]
    print(f"seed {SEED}, devices {', '.join(map(str, DEVICES))}", flush=True)
    os.environ["TEST_SEED"] = str(SEED)  # for both processes
    scripts = [n for n in chosen if n.startswith(("scripts", "checkpoint", "figures"))]  # they share files
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        failed = sum(pool.map(run_checks, (scripts, [n for n in chosen if n not in scripts])))
    print(f"{len(chosen) - failed} passed, {failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
