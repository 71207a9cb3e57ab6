"""Checks of everything the study rests on, each against a slow literal reference or hand-computed values.

    python test_cka.py            # all checks, on a CPU in under two minutes; pytest runs the same functions
    python test_cka.py cka lars   # only checks whose name contains one of the words
    python test_cka.py --bench    # time against the floor, memory and error, on the fastest device there is

Inputs are new random numbers in every run; TEST_SEED=<the seed printed> repeats one.
"""

import argparse
import atexit
import builtins
import contextlib
import functools
import io
import itertools
import json
import math
import os
import pickle
import resource
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
import urllib.error
import warnings
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
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
CHILD = {"cwd": HERE, "env": os.environ | {"OMP_NUM_THREADS": "1"}}  # of other processes
SEED = int(os.environ.get("TEST_SEED") or int.from_bytes(os.urandom(3), "big"))


def rng():
    """A generator with this run's seed; every check starts its own, so that it can be repeated alone."""
    if "pytest" in sys.modules:
        print(f"TEST_SEED={SEED}")  # pytest shows it beside a failure
    return torch.Generator().manual_seed(SEED)


def assert_close(got, want, tolerance, what="result"):
    """The largest absolute difference is at most `tolerance`; NaN never is."""
    got, want = (t.detach().double() if isinstance(t, torch.Tensor) else torch.from_numpy(np.array(t, float))
                 for t in (got, want))
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    error = (got - want).abs().max().item()
    assert error <= tolerance, f"{what} is off by {error:.2g}, allowed {tolerance:g}"


def assert_same_direction_and_size(got, want, tolerance, what="gradient"):
    """|got - want| / |want| of two lists of tensors, taken as long vectors, is at most `tolerance`."""
    got, want = (torch.cat([t.detach().double().flatten() for t in tensors]) for tensors in (got, want))
    error = ((got - want).norm() / want.norm()).item()
    assert error <= tolerance, f"{what} is off by {error:.2g} of its norm, allowed {tolerance:g}"


def assert_same_distribution(sample, reference, what):
    """Kolmogorov-Smirnov: a sample against another, or against the distribution function given. Fails 1 time in 1e6."""
    sample = np.sort(np.asarray(sample, float))
    if callable(reference):
        theory, n = reference(sample), len(sample)
        distance = max(np.abs(theory - np.arange(n) / n).max(), np.abs(theory - np.arange(1, n + 1) / n).max())
        scale = n ** -0.5
    else:
        reference = np.sort(np.asarray(reference, float))
        points = np.union1d(sample, reference)
        share = [np.searchsorted(s, points, side="right") / len(s) for s in (sample, reference)]
        distance, scale = np.abs(share[0] - share[1]).max(), (1 / len(sample) + 1 / len(reference)) ** 0.5
    assert distance < 2.7 * scale, f"{what}: distribution functions differ by {distance:.3f}, chance gives {scale:.3f}"


def assert_rate(events, rate, what):
    """The share of True is within five standard deviations of `rate`."""
    share, spread = events.double().mean().item(), math.sqrt(rate * (1 - rate) / len(events))
    assert abs(share - rate) < 5 * spread, f"{what}: rate {share:.3f}, expected {rate}"


@contextlib.contextmanager
def raises(kind, *words):
    """The block raises `kind` with all `words` in its message."""
    try:
        yield
    except kind as error:
        missing = [word for word in words if word not in str(error)]
        assert not missing, f"{kind.__name__} does not mention {missing}: {error}"
        return
    raise AssertionError(f"no {kind.__name__} was raised")


@contextlib.contextmanager
def temporary_folder():
    """A Path that is removed afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def gradients_of(model):
    """The gradients of all parameters, which are cleared."""
    gradients = [p.grad for p in model.parameters()]
    model.zero_grad()
    return gradients


# ======================================================================================================================
# CKA
# ======================================================================================================================


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
    grams = [x.double().flatten(1) @ x.double().flatten(1).T for x in layers]
    h = torch.tensor([[hsic(k, l, unbiased) for l in grams] for k in grams])
    return h / torch.outer(h.diag().sqrt(), h.diag().sqrt())


def random_layers(g, m, shapes, mean=0.0):
    """One float32 tensor (m, *shape) per shape: a part that all share, a part of their own, and a mean."""
    shared, layers = torch.randn(m, 12, generator=g), []
    for shape in shapes:
        p = math.prod(shape)
        x = shared @ torch.randn(12, p, generator=g) / 12 ** 0.5 + torch.randn(m, p, generator=g)
        layers.append((x + mean * (1 + torch.rand(p, generator=g))).view(m, *shape))
    return layers


def source(layers, asked=None):
    """A source of these layers, which adds every (start, stop) that it is asked for to `asked`."""
    def features(start, stop):
        if asked is not None:
            asked.append((start, stop))
        return [x[start:stop] for x in layers]
    return features


def test_cka_literal():
    """linear_cka and cka_matrix equal Tr(KHLH) and Song's estimator in float64: p from 1 to 100 m, two sources."""
    g, m = rng(), 150  # 150 is no multiple of the batch, nor of the 64 rows below which Grams are not halved
    for mean, tolerance in ((0.0, 2e-5), (100.0, 2e-4)):
        layers = random_layers(g, m, [(1,), (7,), (5, 6, 5), (15000,)], mean)
        for debiased in (False, True):
            want = literal_cka(layers, debiased)
            sources = [source(layers[:1]), source(layers[1:])]
            got = common.cka_matrix(sources, m, debiased, precision="float32", batch=64)
            assert got.dtype == torch.float64
            assert_close(got, want, tolerance, f"cka_matrix, mean {mean}, debiased {debiased}")
            assert_close(got.diagonal(), torch.ones(4), 1e-6, "CKA of a layer with itself")
            assert_close(got, got.T, 1e-9, "CKA(X, Y) against CKA(Y, X)")
            for i, j in ((0, 1), (1, 2), (3, 2)):
                assert_close(common.linear_cka(layers[i], layers[j], debiased), want[i, j], tolerance, "linear_cka")


def test_cka_many_samples():
    """More samples than one block of rows, one piece of a sum or half a Gram: still the literal value."""
    m = 1100
    layers = random_layers(rng(), m, [(3,), (40,)])
    asked = []
    got = common.gram_statistics([source(layers, asked)], m, precision="float32", batch=128)
    assert_close(got.cka, literal_cka(layers), 2e-6, "biased")
    assert_close(got.debiased_cka, literal_cka(layers, True), 2e-6, "debiased")
    assert asked == [(0, 1)] + [(a, min(a + 128, m)) for a in range(0, m, 128)], "asked more than once per sample"


def test_cka_feature_form():
    """Equal to ||Y'X||^2 / (||X'X|| ||Y'Y||) of centred features."""
    x, y = random_layers(rng(), 90, [(20,), (300,)])
    a, b = (t.double() - t.double().mean(0) for t in (x, y))
    want = (b.T @ a).norm() ** 2 / ((a.T @ a).norm() * (b.T @ b).norm())
    assert_close(common.linear_cka(x, y), want, 2e-6)


def test_cka_small_m():
    """The smallest m that each estimator allows, where every 1 / m counts; 3 samples have no debiased CKA."""
    x, y = random_layers(rng(), 9, [(3,), (5,)])
    for m, debiased in ((2, False), (3, False), (4, True), (5, False), (9, True)):
        want = literal_cka([x[:m], y[:m]], debiased)[0, 1]
        assert_close(common.linear_cka(x[:m], y[:m], debiased), want, 1e-4, f"m = {m}")
    three = common.gram_statistics([source([x[:3], y[:3]])], 3)
    assert three.debiased_cka.isnan().all() and not three.cka.isnan().any()


def test_cka_double():
    """Float64 features keep float64 accuracy, also far from 0."""
    x, y = random_layers(rng(), 140, [(9,), (2000,)])
    for debiased in (False, True):
        want = literal_cka([x, y], debiased)
        far = [x.double() + 1e4, y.double() - 1e4]  # no change in CKA
        assert_close(common.linear_cka(*far, debiased), want[0, 1], 1e-10, "linear_cka")
        assert_close(common.cka_matrix([source(far)], 140, debiased, precision="float32"), want, 1e-10, "cka_matrix")
        for memory in (None, 500_000):
            mixed = common.cka_matrix([source([far[0], y])], 140, debiased, precision="float32", memory=memory)
            assert_close(mixed, want, 2e-6, f"float64 beside float32, memory {memory}")


def test_cka_tiny_and_huge():
    """Features of size 1e-25 and 1e25, whose squares and fourth powers float32 cannot hold."""
    x, y = random_layers(rng(), 60, [(30,), (8,)])
    for a, b in itertools.product((1e-25, 1.0, 1e25), repeat=2):
        want = literal_cka([x * a, y * b])[0, 1]
        assert_close(common.linear_cka(x * a, y * b), want, 2e-6, f"scales {a:g} and {b:g}")


def test_cka_batch_and_memory():
    """Batch and memory change nothing; too little memory to keep the features computes them again."""
    g, m = rng(), 157
    layers, others = random_layers(g, m, [(4, 5), (600,), (90,)]), random_layers(g, m, [(700,), (3,)])
    want = common.gram_statistics([source(layers), source(others)], m, precision="float32")
    for batch, memory in ((1, None), (7, None), (1000, None), (128, 1_500_000), (128, 700_000), (11, 300_000),
                          (128, 300_000)):  # the last: less room than a batch needs
        asked = []
        got = common.gram_statistics([source(layers, asked), source(others)], m, precision="float32", batch=batch,
                                     memory=memory)
        times = sum(stop - start for start, stop in asked[1:]) / m  # the first call only asks for shapes
        assert times == 1 if memory in (None, 1_500_000) else times > 2, f"each sample was asked for {times} times"
        for name in ("cka", "debiased_cka", "dominance"):
            assert_close(getattr(got, name), getattr(want, name), 1e-6, f"{name}, batch {batch}, memory {memory}")


def test_cka_layers_in_turn():
    """Where all Grams take less memory than all features, batches go on side by side, a layer at a time: exact as ever."""
    g, m = rng(), 130
    layers, others = random_layers(g, m, [(900 + i,) for i in range(9)], 5), random_layers(g, m, [(800 + i,) for i in range(6)])
    constant = torch.ones(m, 4)
    order = []

    def lazily(layers):
        def features(start, stop):
            for i, x in enumerate(layers):
                order.append((start, stop, i))
                yield x[start:stop]
        return features

    want = {debiased: literal_cka(layers + others, debiased) for debiased in (False, True)}
    for make in (lazily, source):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            got = common.gram_statistics([make(layers), make(others + [constant])], m, precision="float32", batch=25,
                                         memory=8_000_000)
        assert got.constant == [15] and len(seen) == 1
        assert_close(got.cka[:15, :15], want[False], 2e-5, "biased")
        assert_close(got.debiased_cka[:15, :15], want[True], 2e-5, "debiased")
    asked = [o for o in order if o[1] > 1][:6 * 9]
    starts = [(a, min(a + 25, m)) for a in range(0, m, 25)]
    assert asked == [(a, b, i) for i in range(9) for a, b in starts], "not layer after layer, or asked for twice"
    broken = layers[:3] + [layers[3].index_fill(0, torch.tensor([77]), math.nan)] + layers[4:]
    with raises(ValueError, "source 0", "layer 3"):
        common.cka_matrix([lazily(broken), lazily(others)], m, memory=8_000_000)
    for changed, words in ((layers[:5], "returned 5 layers"), (layers + others[1:], "source 0")):
        with raises(ValueError, words):
            common.cka_matrix([lambda a, b: (x[a:b] for x in (changed if b > 1 else layers))], m, memory=8_000_000)


def test_cka_bfloat16():
    """Reduced precision is near the truth, is really another computation, and is never the explicit float32."""
    m = 200
    layers = random_layers(rng(), m, [(50,), (800,), (3000,)], mean=10)
    want, exact = literal_cka(layers), common.cka_matrix([source(layers)], m, precision="float32")
    rounded = common.cka_matrix([source(layers)], m, precision="bfloat16")
    assert_close(rounded, want, 1e-3)
    assert not torch.equal(rounded, exact), "bfloat16 gave float32's bits"
    fastest = rounded if common.has_bf16(torch.device("cpu")) else exact
    assert torch.equal(common.cka_matrix([source(layers)], m), fastest), "the default precision"
    with raises(ValueError, "float16"):
        common.cka_matrix([source(layers)], m, precision="float16")


def test_cka_invariances():
    """Rotation, isotropic scale and shift change nothing; a general linear map does."""
    g = rng()
    x, y = random_layers(g, 80, [(25,), (12,)])
    rotation = torch.linalg.qr(torch.randn(25, 25, generator=g)).Q
    want = common.linear_cka(x, y)
    for name, changed in (("rotation", x @ rotation), ("scale", x * -7.3), ("shift", x + torch.randn(25, generator=g))):
        assert_close(common.linear_cka(changed, y), want, 5e-6, name)
    stretched = common.linear_cka(x * torch.logspace(-2, 2, 25), y)
    assert abs(stretched - want) > 0.01, "a general linear map left CKA as it was"


def test_cka_errors():
    """ValueError for unequal or too few samples, constant or non-finite features, other row counts, little memory."""
    g = rng()
    x, y, z = random_layers(g, 40, [(6,), (9,), (2,)])
    constant = torch.randn(6, generator=g).expand(40, 6)
    for bad, words in (((x, y[:39]), ["40", "39"]), ((x[:1], y[:1]), ["at least 2"]),
                       ((x[:3], y[:3], True), ["at least 4"]),
                       ((constant, y), ["x", "constant"]), ((x, constant), ["y", "constant"])):
        with raises(ValueError, *words):
            common.linear_cka(*bad)
    for value in (math.nan, math.inf, -math.inf):
        broken = y.clone()
        broken[33, 4] = value
        with raises(ValueError, "source 1", "layer 2"):
            common.cka_matrix([source([x]), source([z, x, broken])], 40, batch=10)
    with raises(ValueError, "source 0", "rows"):
        common.cka_matrix([lambda a, b: [x[a:b + 1]]], 39, batch=13)
    with raises(ValueError, "source 1"):
        common.cka_matrix([source([x]), lambda a, b: [(x if a else y)[a:b]]], 40, batch=20)
    with raises(ValueError, "memory=1000"):
        common.cka_matrix([source([x, y])], 40, memory=1000)
    with raises(ValueError, "at least 2"):
        common.cka_matrix([source([x])], 1)


def test_cka_constant_layer():
    """A constant layer gets NaN in its row and column and a warning with its index; the others keep their values."""
    g = rng()
    x, y, z = random_layers(g, 50, [(6,), (9,), (200,)])
    constant = (1e3 * torch.randn(11, generator=g)).expand(50, 11)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        got = common.gram_statistics([source([x, y]), source([constant, z])], 50, precision="float32")
    assert len(seen) == 1 and "layer 2" in str(seen[0].message) and got.constant == [2]
    others = [0, 1, 3]
    for matrix, debiased in ((got.cka, False), (got.debiased_cka, True)):
        assert matrix[2].isnan().all() and matrix[:, 2].isnan().all()
        assert_close(matrix[others][:, others], literal_cka([x, y, z], debiased), 2e-5, "other layers")


def test_cka_dominance():
    """The share of sum_ij K'_ij^2 in the rows of the 1 % strongest samples; planted outliers are those samples."""
    g, m = rng(), 250
    plain, planted = random_layers(g, m, [(30,), (400,)])
    outliers = torch.randperm(m, generator=g)[:3]
    planted[outliers] *= torch.tensor([40.0, 30.0, 20.0])[:, None]
    got = common.gram_statistics([source([plain, planted])], m, precision="float32", memory=300_000)
    for i, x in enumerate((plain, planted)):
        x = x.double() - x.double().mean(0)
        rows = ((x @ x.T) ** 2).sum(1)
        strongest = rows.argsort(descending=True)[:3]  # ceil(250 / 100)
        assert_close(rows[got.dominant[i]] / rows.max(), rows[strongest] / rows.max(), 1e-5, "the samples' strength")
        assert_close(got.dominance[i], rows[strongest].sum() / rows.sum(), 1e-6, "dominance")
    assert set(got.dominant[1].tolist()) == set(outliers.tolist()) and got.dominance[1] > 0.5 > got.dominance[0]


def test_cka_restores_switches():
    """torch's switches for products are set while multiplying, and put back afterwards, also after an exception."""
    switches = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before, x, multiply = [s.fp32_precision for s in switches], torch.randn(20, 4, generator=rng()), common._multiply
    try:
        switches[0].fp32_precision, switches[1].fp32_precision = "tf32", "bf16"
        for precision, *inside in (("float32", "ieee", "ieee"), ("tf32", "tf32", "ieee"), ("bfloat16", "ieee", "bf16")):
            seen = []

            def noting(*args, fail):
                seen.append([s.fp32_precision for s in switches])
                if fail:
                    raise RuntimeError("planted")
                multiply(*args)

            for fail in (False, True):
                with mock.patch.object(common, "_multiply", functools.partial(noting, fail=fail)):
                    with raises(RuntimeError, "planted") if fail else contextlib.nullcontext():
                        common.cka_matrix([source([x])], 20, precision=precision)
                assert [s.fp32_precision for s in switches] == ["tf32", "bf16"], "switches were not restored"
            assert seen and all(s == inside for s in seen), f"{precision}: switches were {seen[0]}"
    finally:
        switches[0].fp32_precision, switches[1].fp32_precision = before


def test_cka_block_stands_alone():
    """The block of common.py made for copying runs in an empty module, with torch and the standard library only."""
    text = (HERE / "common.py").read_text()
    block = text.split("# ---- copy from here ----\n")[1].split("# ---- to here ----")[0]
    real_import = builtins.__import__

    def guarded(name, *args):
        assert name.split(".")[0] in sys.stdlib_module_names | {"torch"}, f"the block imports {name}"
        return real_import(name, *args)

    pasted = {"__name__": "pasted", "__builtins__": vars(builtins) | {"__import__": guarded}}
    exec(compile(block, "pasted.py", "exec"), pasted)
    x, y = random_layers(rng(), 70, [(6,), (90,)])
    want = literal_cka([x, y])
    assert_close(pasted["linear_cka"](x, y), want[0, 1], 2e-5)
    assert_close(pasted["cka_matrix"]([source([x, y])], 70, precision="float32", memory=100_000), want, 2e-5)


def test_cka_memory():
    """At m = 4,000, 16 Grams are 1 GB; with 64 MiB to use, the process grows by a tenth of that from m = 1,000 on.

    Then features of 300 MB that are computed when asked for, in 256 MiB.
    """
    program = """
import resource, sys, torch, common
for m in 1000, 4000:
    layers = [torch.randn(m, 8) for _ in range(16)]
    common.cka_matrix([lambda a, b: [x[a:b] for x in layers]], m, precision="float32", memory=64 << 20)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))
x, w = torch.randn(3000, 8), torch.randn(64, 8, 400)
common.cka_matrix([lambda a, b: list(x[a:b] @ w)], 3000, precision="float32", memory=256 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))
"""
    done = subprocess.run([sys.executable, "-c", program], **CHILD, capture_output=True, text=True, check=True)
    small, large, computed = map(int, done.stdout.split())
    assert large - small < 100e6, f"grew by {(large - small) / 1e6:.0f} MB"
    assert computed - large < 1.1 * (256 << 20), f"grew by {(computed - large) / 1e6:.0f} MB"
    assert done.stderr == "", "progress was shown although stderr is no terminal"


# ======================================================================================================================
# Device
# ======================================================================================================================


def test_device_purity():
    """With (fake) CUDA inputs, every output is on CUDA: no part builds a tensor on the CPU."""
    results = {}
    with FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # autocast says that there is no CUDA here
        images = torch.zeros(6, 3, 40, 24, dtype=torch.uint8, device="cuda")
        for blur in (True, False):
            results[f"simclr_augment {blur}"] = [common.simclr_augment(images, 32, blur=blur)]
        results["imagenet_augment"] = [common.imagenet_augment(images, 32)]
        results["tests"] = [common.simclr_test(images, 32), common.imagenet_test(images, 32)]
        for make in (common.simclr_params, common.imagenet_params):
            results[make.__name__] = make(4, 32, 32, "cuda").values()
        with torch.device("cuda"):
            model = common.build_model("simclr", "imagenet").eval()
        inputs = torch.zeros(2, 3, 32, 32, device="cuda")
        results["representations"] = common.representations(model, inputs).values()
        z = torch.zeros(4, 8, device="cuda")
        results["info_nce"] = common.info_nce_and_accuracy(z, z, 0.5)
        optimizer = common.LARS(model.parameters(), 0.1, weight_decay=0.1)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        results["LARS"] = [state["momentum_buffer"] for state in optimizer.state.values()]
        for precision, kept in itertools.product(("float32", "tf32", "bfloat16"), (True, False)):
            features = _fake_features(precision, kept)
            results[f"CKA {precision} {kept}"] = common._sum_over_pairs(features, features.m)
    assert len(results["LARS"]) > 160
    for name, tensors in results.items():
        assert all(t.device.type == "cuda" for t in tensors), f"{name} left the device"


def _fake_features(precision, kept):
    """The object that the CKA's second pass reads, without its first pass, which needs values."""
    layers = [torch.zeros(300, p, device="cuda") for p in (5, 700)]
    features = common._CentredFeatures.__new__(common._CentredFeatures)
    vars(features).update(m=300, batch=70, precision=precision, memory=2 << 20, device=layers[0].device,
                          dtype=torch.float32, sizes=[2], bytes=[705 * 4], sources=[source(layers)],
                          first=[[x[0] for x in layers]], shift=[[x.mean(0) for x in layers]],
                          scale=[[1.0, 1.0]], kept=None, buffer=None, generators=False)
    if kept:
        features.kept = [[features._centred(x - x[0], 0, i) for i, x in enumerate(layers)]]
    return features


# ======================================================================================================================
# Network
# ======================================================================================================================

BLOCKS = [(group, block) for group, blocks in ((1, 3), (2, 4), (3, 6), (4, 3)) for block in range(1, blocks + 1)]
BACKBONE_LAYERS = [f"BG{group}.{block}.{kind}" for group, block in BLOCKS for kind in ("odd", "even")]


def randomised_resnet(g, model):
    """The model in eval mode, its batch norms' weights and statistics made random so that no part of one is idle."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in ((module.weight, 0.5, 1), (module.bias, -0.3, 0.3),
                                      (module.running_mean, -0.1, 0.1), (module.running_var, 0.5, 2)):
                tensor.data.copy_(low + (high - low) * torch.rand(tensor.shape, generator=g))
    return model.eval()


@torch.no_grad()
def blocks_by_hand(model, images):
    """The odd and even representations of a torchvision ResNet-50, computed from its parameters, out of place."""
    def norm(x, bn):
        view = (1, -1, 1, 1)
        x = (x - bn.running_mean.view(view)) / (bn.running_var.view(view) + bn.eps).sqrt()
        return x * bn.weight.view(view) + bn.bias.view(view)

    x = F.max_pool2d(norm(F.conv2d(images, model.conv1.weight, stride=2, padding=3), model.bn1).relu(), 3, 2, 1)
    found = []
    for g, b in BLOCKS:
        block = getattr(model, f"layer{g}")[b - 1]
        stride = 2 if g > 1 and b == 1 else 1
        y = norm(F.conv2d(x, block.conv1.weight), block.bn1).relu()
        y = norm(F.conv2d(y, block.conv2.weight, stride=stride, padding=1), block.bn2).relu()
        y = norm(F.conv2d(y, block.conv3.weight), block.bn3)
        if b == 1:
            x = norm(F.conv2d(x, block.downsample[0].weight, stride=stride), block.downsample[1])
        x = (x + y).relu()
        found += [y.flatten(1), x.flatten(1)]
    return found


def count_hooks(model):
    """Forward hooks registered anywhere in the model."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_representations_by_hand():
    """Names, depth order and values of all 32 on torchvision's ResNet-50, in both memory formats; no hook stays."""
    g = rng()
    model, images = randomised_resnet(g, torchvision.models.resnet50()), torch.rand(2, 3, 40, 40, generator=g)
    found, want = common.representations(model, images), blocks_by_hand(model, images)
    last = common.representations(model.to(memory_format=torch.channels_last),
                                  images.contiguous(memory_format=torch.channels_last))
    shuffled = common.representations(model, images.contiguous(memory_format=torch.channels_last), any_order=True)
    assert list(found) == list(last) == BACKBONE_LAYERS
    for name, hand in zip(BACKBONE_LAYERS, want):
        scale = hand.abs().max().item()
        assert_close(found[name], hand, 1e-4 * scale, name)
        assert_close(last[name], hand, 1e-4 * scale, f"{name}, channels_last")
        assert_close(shuffled[name].sort().values, last[name].sort().values, 0, f"{name}, any order")
        assert (found[name].min() < 0) == name.endswith("odd"), f"{name}: sign"
    assert count_hooks(model) == 0 and not any(t.requires_grad for t in found.values())
    with raises(RuntimeError):  # an image with one channel: conv1 raises
        common.representations(model, images[:, :1])
    with mock.patch.object(model.layer4[2], "forward", side_effect=KeyError("planted")), raises(KeyError):
        common.representations(model, images)
    assert count_hooks(model) == 0, "a hook is left after an exception"


def test_representations_head_and_stems():
    """35 with a projection head, recomputed by hand; the two stems' shapes; TypeError for a ResNet-18."""
    images = torch.rand(2, 3, 16, 16, generator=rng())
    model = common.build_model("simclr", "cifar", zero_init=False).eval()
    found = common.representations(model, images)
    assert list(found) == BACKBONE_LAYERS + ["head.1", "head.2", "head.3"]
    assert found["BG1.1.odd"].shape == (2, 256 * 16 * 16) and found["BG4.3.even"].shape == (2, 2048 * 2 * 2)
    x = found["BG4.3.even"].view(2, 2048, -1).mean(2)
    for i, layer in enumerate(model.fc.layers, 1):
        x = x @ layer[0].weight.T / math.sqrt(1 + 1e-5)  # fresh running statistics: mean 0, variance 1
        x = x.relu() if i < 3 else x
        assert_close(found[f"head.{i}"], x, 1e-4 * x.abs().max().item(), f"head.{i}")
    assert x.shape == (2, 128)
    plain = common.build_model("supervised", "imagenet", classes=7).eval()
    assert common.representations(plain, images)["BG1.1.even"].shape == (2, 256 * 4 * 4) and plain.fc.out_features == 7
    assert all((block.bn3.weight == 0).all() for block in plain.layer2), "the last gamma is not zero"
    with raises(TypeError, "ResNet-50"):
        common.representations(torchvision.models.resnet18(), images)


def test_model_seed():
    """Weights are a function of method and seed alone, and leave torch's own random state as it was."""
    torch.manual_seed(SEED)
    expected = torch.rand(3)
    torch.manual_seed(SEED)
    a = common.build_model("supervised", "imagenet", seed=4).layer1[0].conv1.weight
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(a, common.build_model("supervised", "imagenet", seed=4).layer1[0].conv1.weight)
    for method, seed in (("supervised", 5), ("simclr", 4)):
        assert not torch.equal(a, common.build_model(method, "imagenet", seed=seed).layer1[0].conv1.weight)


# ======================================================================================================================
# Loss, optimizer, schedule
# ======================================================================================================================


def literal_info_nce(z1, z2, temperature):
    """Eq. (1) as a double loop over anchors and candidates, in float64, averaged over the 2N anchors; and accuracy."""
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
    """Value, gradient and accuracy of the double loop; ln(2N - 1) for identical views."""
    g = rng()
    for n, d, temperature in ((7, 5, 0.5), (9, 4, 0.1), (2, 3, 1.0), (1, 4, 0.5)):
        base = torch.randn(n, d, generator=g)
        z1, z2 = (base + 0.7 * torch.randn(n, d, generator=g) for _ in range(2))
        z1, z2 = z1.mul(3).requires_grad_(), z2.requires_grad_()
        want, right = literal_info_nce(z1, z2, temperature)
        want_gradients = torch.autograd.grad(want, (z1, z2))
        loss, accuracy = common.info_nce_and_accuracy(z1, z2, temperature)
        assert loss.dtype == torch.float32 and loss.shape == ()
        assert_close(loss, want, 3e-6, f"loss, N = {n}")
        assert_close(common.info_nce(z1, z2, temperature), want, 3e-6, "info_nce")
        assert_close(accuracy, right, 1e-6, "accuracy")
        if n > 1:
            assert_same_direction_and_size(torch.autograd.grad(loss, (z1, z2)), want_gradients, 1e-5)
    same = torch.randn(1, 6, generator=g).expand(5, 6)
    assert_close(common.info_nce(same, same * 2, 0.1), math.log(9), 1e-5, "ln(2N - 1)")
    low = common.info_nce(z1.detach().bfloat16(), z2.detach().bfloat16(), 0.5)
    assert low.dtype == torch.float32


def test_info_nce_errors():
    """ValueError for unequal shapes, other ranks of tensors, and temperatures that are not above 0."""
    z = torch.randn(4, 3, generator=rng())
    for bad in ((z, z[:3], 0.5), (z[0], z[0], 0.5), (z, z, 0.0), (z, z, -1.0), (z, z, math.nan)):
        with raises(ValueError):
            common.info_nce(*bad)


def literal_lars(weights, gradients, rates, weight_decay, momentum=0.9, eta=0.001, rate_inside=True):
    """SimCLR's rule for one tensor in float64, step after step; returns the last weights."""
    w, v = weights.double(), torch.zeros_like(weights.double())
    for gradient, rate in zip(gradients, rates):
        g, t = gradient.double(), 1.0
        if w.ndim > 1:
            g = g + weight_decay * w
            if w.norm() > 0 and g.norm() > 0:
                t = eta * w.norm() / g.norm()
        v = momentum * v + (rate if rate_inside else 1) * t * g
        w = w - (1 if rate_inside else rate) * v
    return w


def test_lars_sequence():
    """Six steps at a changing rate equal the rule written out; the variant with the rate outside is something else."""
    g, rates = rng(), [0.0, 3.0, 8.0, 5.0, 1.0, 0.2]
    shapes = {"matrix": (6, 5), "filter": (4, 3, 2, 2), "vector": (7,), "zero": (3, 4), "no gradient": (3, 3)}
    for decay in (0.0, 0.3):
        params = {name: nn.Parameter(torch.randn(shape, generator=g)) for name, shape in shapes.items()}
        params["zero"].data.zero_()
        start = {name: p.detach().clone() for name, p in params.items()}
        gradients = {name: [torch.randn(p.shape, generator=g) for _ in rates] for name, p in params.items()}
        gradients["no gradient"] = [torch.zeros(3, 3) for _ in rates]
        unused = nn.Parameter(torch.ones(2))
        optimizer = common.LARS([*params.values(), unused], lr=1.0, weight_decay=decay)
        for step, rate in enumerate(rates):
            optimizer.param_groups[0]["lr"] = rate
            for name, p in params.items():
                p.grad = gradients[name][step].clone()
            optimizer.step()
        for name, p in params.items():
            want = literal_lars(start[name], gradients[name], rates, decay)
            assert_close(p, want, 2e-6 * max(1, want.abs().max().item()), f"{name}, decay {decay}")
        outside = literal_lars(start["vector"], gradients["vector"], rates, decay, rate_inside=False)
        assert (params["vector"] - outside).abs().max() > 0.1
        assert unused.tolist() == [1, 1] and params["zero"].abs().max() > 0


def test_lars_zero_gradient():
    """A zero gradient or weight has t = 1: nothing becomes NaN, and a zero weight takes the plain step."""
    p, q = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.zeros(2, 2))
    p.grad, q.grad = torch.zeros(2, 2), torch.full((2, 2), 2.0)
    common.LARS([p, q], lr=0.5).step()
    assert p.tolist() == [[1, 1], [1, 1]] and q.tolist() == [[-1, -1], [-1, -1]]


def test_lars_errors():
    """ValueError for settings that are negative or not finite; a closure's loss is returned."""
    p = nn.Parameter(torch.ones(2))
    for name, value in (("lr", -1), ("lr", math.nan), ("lr", math.inf), ("momentum", -1), ("weight_decay", -1)):
        with raises(ValueError, name):
            common.LARS([p], **{"lr": 1} | {name: value})
    assert common.LARS([p], lr=1).step(lambda: 5) == 5


def test_warmup_cosine():
    """0, 1 and 0 at the ends, linear then cosine in between, 1 at once without warmup, 0 beyond the end."""
    f = [common.warmup_cosine(step, 50, 10) for step in range(51)]
    assert f[0] == 0 and f[10] == 1 and abs(f[50]) < 1e-12 and common.warmup_cosine(60, 50, 10) == 0
    for step in range(51):
        want = step / 10 if step <= 10 else 0.5 * (1 + math.cos(math.pi * (step - 10) / 40))
        assert abs(f[step] - want) < 1e-12, f"step {step}"
    assert all(a < b for a, b in zip(f[:10], f[1:11])) and all(a > b for a, b in zip(f[10:], f[11:]))
    assert common.warmup_cosine(0, 20, 0) == 1 and common.warmup_cosine(3, 3, 3) == 1


# ======================================================================================================================
# Augmentation
# ======================================================================================================================

MEAN, STD = (0.3, 0.5, 0.6), (0.2, 0.3, 0.25)


def sliced(params, rows):
    """The augmentation parameters of some images."""
    return {name: value[rows] for name, value in params.items()}


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
    smooth = F.interpolate(2 * torch.rand(n, 3, 4, 4, generator=g) - 0.5, (height, width), mode="bicubic").clamp(0, 1)
    smooth[:, :, :3] = smooth[:, :1, :3]
    images = torch.where(torch.arange(n).view(-1, 1, 1, 1) % 2 == 0, noise, smooth)
    return (images * 255).round().to(torch.uint8)


def test_augment_values():
    """Image by image equal to torchvision's functional operations with the same parameters: enlarging and shrinking."""
    g = rng()
    for height, width, size, strength, blur in ((32, 32, 32, 0.5, False), (32, 32, 48, 1, True), (40, 24, 16, 1, True),
                                                (48, 64, 30, 1, True), (20, 30, 40, 1, False)):
        images = some_images(g, 16, height, width)
        params = common.simclr_params(16, height, width, "cpu", g, strength)
        boxes = {name: params[name] for name in ("box", "flip")}
        views = common.simclr_augment(images, size, strength, blur, params=params)
        crops = common.imagenet_augment(images, size, MEAN, STD, params=boxes)
        assert views.dtype == torch.float32 and views.shape == (16, 3, size, size)
        for i in range(16):
            for got, p in ((views, params), (crops, boxes)):
                want = torchvision_view(images[i], size, sliced(p, i), blur)
                assert_close(got[i], want, 1e-3, f"{height} x {width} -> {size}, blur {blur}")
        whole = TF.resize(images.float() / 255, [size, size], antialias=True)
        assert_close(common.simclr_test(images, size), whole, 1e-4, "simclr_test")
        want = (whole - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
        assert_close(common.imagenet_test(images, size, MEAN, STD), want, 1e-3, "imagenet_test")


def test_augment_batching():
    """A batch equals its slices with sliced parameters; a seed gives one result; every image has its own parameters."""
    g = rng()
    images = some_images(g, 1, 32, 32).expand(120, 3, 32, 32)
    params = common.simclr_params(120, 32, 32, "cpu", g)
    whole = common.simclr_augment(images, 48, params=params)
    for rows in (slice(0, 50), slice(50, 53), slice(53, 120)):
        part = common.simclr_augment(images[rows], 48, params=sliced(params, rows))
        assert_close(part, whole[rows], 1e-6, "slice")
    for augment in (common.simclr_augment, common.imagenet_augment):
        first, again, other = (augment(images, 16, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
        assert torch.equal(first, again) and not torch.equal(first, other)
        assert len({x.numpy().tobytes() for x in first}) > 100, "images share their parameters"


def test_augment_boxes_distribution():
    """Crop area, aspect and position and the flip follow torchvision's RandomResizedCrop, square and narrow images."""
    torch.manual_seed(SEED)
    for height, width, draws in ((32, 32, 6000), (64, 24, 2000), (200, 10, 500)):
        image = torch.zeros(3, height, width)
        crop = torchvision.transforms.RandomResizedCrop
        reference = np.array([crop.get_params(image, (0.08, 1), (3 / 4, 4 / 3)) for _ in range(draws)], float)
        params = common.imagenet_params(40000, height, width, "cpu", rng())
        boxes = params["box"].numpy().astype(float)
        assert (boxes[:, 0] + boxes[:, 2] <= height).all() and (boxes[:, 1] + boxes[:, 3] <= width).all()
        for name, measure in (("top", lambda t, l, h, w: t), ("left", lambda t, l, h, w: l),
                              ("area", lambda t, l, h, w: h * w), ("aspect", lambda t, l, h, w: np.log(w / h)),
                              ("bottom", lambda t, l, h, w: t + h)):
            assert_same_distribution(measure(*boxes.T), measure(*reference.T), f"{name} of {height} x {width}")
        assert_rate(params["flip"], 0.5, "flip")


def test_augment_colour_distribution():
    """Jitter factors, order and the rates and ranges of App. A of SimCLR."""
    n = 20000
    for strength in (0.5, 1.0, 1.5):
        p = common.simclr_params(n, 32, 32, "cpu", rng(), strength)
        ranges = [(max(0.0, 1 - 0.8 * strength), 1 + 0.8 * strength)] * 3 + [(-0.2 * strength, 0.2 * strength)]
        uniform = [(p["factors"][:, i], *r) for i, r in enumerate(ranges)] + [(p["sigma"], 0.1, 2.0)]
        for i, (values, low, high) in enumerate(uniform):
            assert values.min() >= low and values.max() <= high
            assert_same_distribution(values, lambda x: (x - low) / (high - low), f"factor {i}, strength {strength}")
        for name, rate in (("jitter", 0.8), ("gray", 0.2), ("blur", 0.5)):
            assert_rate(p[name], rate, name)
        orders = [tuple(order) for order in p["order"].tolist()]
        for order in itertools.permutations(range(4)):
            assert_rate(torch.tensor([o == order for o in orders]), 1 / 24, f"order {order}")


# ======================================================================================================================
# Data
# ======================================================================================================================


def write_images(folder, g, classes=("ant", "bee", "cat", "dog"), train=10, test=7, size=16):
    """A data set of noise images, a colour per class, as train/<class>/<i>.png and test/<class>/<i>.png."""
    for part, count in (("train", train), ("test", test)):
        for label, name in enumerate(classes):
            (folder / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = torch.rand(size, size, 3, generator=g) * 0.7
                pixels[:, :, label % 3] += 0.3 * (label > 0)
                Image.fromarray((pixels * 255).byte().numpy()).save(folder / part / name / f"{i}.png")
    return folder


def test_data_synthetic():
    """The same for the same seed, all classes, train and test disjoint; colour alone does not give the class away."""
    images, labels = common.synthetic_images(50, seed=3)
    again, _ = common.synthetic_images(50, seed=3)
    assert torch.equal(images, again) and not torch.equal(images, common.synthetic_images(50, seed=4)[0])
    data = common.load_data("synthetic", torch.device("cpu"))
    for images, labels, n in (data[:2] + (4000,), data[2:4] + (500,)):
        assert images.shape == (n, 3, 32, 32) and images.dtype == torch.uint8
        assert labels.dtype == torch.int64 and labels.unique().tolist() == list(range(10))
    assert len(data.classes) == 10
    seen = [{x.tobytes() for x in part.numpy()} for part in (data.train_images, data.test_images)]
    assert len(seen[0]) == 4000 and len(seen[1]) == 500 and not seen[0] & seen[1]
    train, test = (part.double().mean((2, 3)) for part in (data.train_images, data.test_images))
    means = torch.stack([train[data.train_labels == label].mean(0) for label in range(10)])
    guess = torch.cdist(test, means).argmin(1)
    assert (guess == data.test_labels).double().mean() < 0.2, "the mean colour gives the class away"


def test_data_channel_statistics():
    """Mean and standard deviation per channel equal numpy's in float64; a flat channel does not divide by zero."""
    images = some_images(rng(), 20, 15, 9)
    images[:, 2] = 77
    mean, std = common.channel_statistics(images)
    pixels = images.numpy().astype(np.float64) / 255
    assert_close(mean, torch.from_numpy(pixels.mean((0, 2, 3))), 1e-12, "mean")
    assert_close(std[:2], torch.from_numpy(pixels.std((0, 2, 3)))[:2], 1e-12, "standard deviation")
    assert std[2] > 0


def test_data_image_folder():
    """Labels in sorted class order, pixels as stored; the second start decodes nothing, a changed file is noticed."""
    with temporary_folder() as folder, mock.patch.dict(os.environ, XDG_CACHE_HOME=str(folder / "cache")):
        write_images(folder, rng(), classes=("cow", "ape", "bat"), train=3, test=2)
        decode = mock.Mock(side_effect=common._decode)
        with mock.patch.object(common, "_decode", decode):
            data = common.load_data(folder, torch.device("cpu"))
            again = common.load_data(folder, torch.device("cpu"))
            assert decode.call_count == 15, "the second start decoded images again"
            assert data.classes == again.classes == ["ape", "bat", "cow"]
            assert all(torch.equal(a, b) for a, b in zip(data[:4], again[:4]))
            assert data.train_labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3
            assert data.test_labels.tolist() == [0] * 2 + [1] * 2 + [2] * 2
            changed = folder / "train" / "bat" / "1.png"
            pixels = 255 - np.array(Image.open(changed))
            Image.fromarray(pixels).save(changed)
            data = common.load_data(folder, torch.device("cpu"))
            assert decode.call_count == 30, "a changed file was not noticed"
        assert (data.train_images[4].permute(1, 2, 0).numpy() == pixels).all()
        with mock.patch.object(common, "_decode", decode):
            (folder / ".images.cache.pt").write_bytes(b"damaged")
            assert torch.equal(common.load_data(folder, torch.device("cpu")).train_images, data.train_images)


def broken_folders(folder, g):
    """Yields (path, words that the error must contain) of data that cannot be used."""
    file = folder / "file"
    file.write_text("x")
    yield file, ["file"]
    for name in ("size", "corrupt", "no test", "classes", "empty"):
        write_images(folder / name, g, train=2, test=1, size=8)
    Image.new("RGB", (9, 8)).save(folder / "size" / "test" / "bee" / "0.png")
    yield folder / "size", ["0.png", "9 x 8", "8 x 8"]
    broken = folder / "corrupt" / "train" / "cat" / "1.png"
    broken.write_bytes(broken.read_bytes()[:60])
    yield folder / "corrupt", [str(broken)]
    shutil.rmtree(folder / "no test" / "test")
    yield folder / "no test", ["test/<class>"]
    (folder / "classes" / "test" / "ant").rename(folder / "classes" / "test" / "fly")
    yield folder / "classes", ["ant", "fly"]
    for image in (folder / "empty" / "train" / "dog").iterdir():
        image.unlink()
    yield folder / "empty", ["dog"]
    (folder / "cifar").mkdir()
    (folder / "cifar" / "cifar-10-python.tar.gz").write_bytes(b"half an archive")
    yield folder / "cifar", ["cifar-10-python.tar.gz", "md5", "synthetic"]
    yield folder / "missing", ["cifar-10-python.tar.gz", "train/<class>/", "synthetic"]


@contextlib.contextmanager
def offline():
    """torchvision's downloads fail at once, as without a network."""
    failing = mock.Mock(side_effect=urllib.error.URLError("no network in tests"))
    with mock.patch.object(torchvision.datasets.cifar, "download_and_extract_archive", failing):
        yield


def test_data_errors():
    """UserError that says what is wrong: unequal sizes, damaged files, missing parts, altered archives, no network."""
    with temporary_folder() as folder, offline(), mock.patch.dict(os.environ, XDG_CACHE_HOME=str(folder / "cache")):
        for path, words in broken_folders(folder, rng()):
            with raises(common.UserError, *words):
                common.load_data(path, torch.device("cpu"))


# ======================================================================================================================
# Order of the images, exact large batches
# ======================================================================================================================


def test_order():
    """The stream is one permutation of the subset per epoch, whatever the batch, and depends on seed and epoch only."""
    n, total, batch = 23, 60, 9
    orders = [common.Order(seed, n, total, torch.device("cpu")) for seed in (0, 0, 1)]
    stream = torch.cat([orders[0][i:i + batch] for i in range(0, 5 * n, batch)])[:5 * n].view(5, n)
    assert len({tuple(sorted(epoch)) for epoch in stream.tolist()}) == 1, "an epoch is no permutation of the subset"
    assert len(set(stream[0].tolist())) == n and len({tuple(epoch) for epoch in stream.tolist()}) == 5
    assert torch.equal(orders[1][3 * n:4 * n], stream[3]), "an epoch's order depends on what was asked before"
    assert torch.equal(orders[1][n - 3:3 * n + 2], stream.flatten()[n - 3:3 * n + 2]), "a batch of several epochs"
    other = orders[2][0:n]
    assert not torch.equal(other, stream[0]) and torch.equal(other.sort().values, stream[0].sort().values)


def test_steps():
    """Steps until an epoch's last image is used: the paper's totals, and a count by hand."""
    assert common.steps_until(1300, 50000, 4096) == 15870 and common.steps_until(300, 50000, 8192) == 1832
    for epoch in range(1, 8):
        assert common.steps_until(epoch, 23, 9) == next(s for s in range(99) if 9 * s >= 23 * epoch)


def stand_in(model, images, labels, micro_batch):
    """What the gradient functions use of a Run, and a Batch; augmentation parameters depend on the view only."""
    settings = {"micro_batch": micro_batch, "image_size": 16, "strength": 0.5, "blur": False, "temperature": 0.5,
                "mean": MEAN, "std": STD}
    run = types.SimpleNamespace(settings=settings, model=model, network=model, device=torch.device("cpu"),
                                autocast=contextlib.nullcontext, no_sync=contextlib.nullcontext)

    def draw(make, view, options):
        return make(len(images), *images.shape[2:], "cpu", torch.Generator().manual_seed(SEED + view), **options)

    return run, common.Batch(images, labels, draw)


def test_micro_batches_exchange_once():
    """Several processes exchange gradients in the last chunk's backward pass only: all others run under no_sync."""
    g, silent, passes = rng(), [], []

    @contextlib.contextmanager
    def no_sync():
        silent.append(True)
        yield
        silent.pop()

    model = small_network(group_norm)
    model[7].weight.register_post_accumulate_grad_hook(lambda _: passes.append(bool(silent)))
    for gradients in (train_simclr.contrastive_gradients, train_supervised.supervised_gradients):
        run, batch = stand_in(model, some_images(g, 10, 20, 20), torch.randint(6, (10,), generator=g), 3)
        run.no_sync = no_sync
        passes.clear()
        gradients(run, batch)
        assert passes == [True, True, True, False], f"{gradients.__name__}: {passes}"


def views_of(batch, rows):
    """Both augmented views of some of the batch's images."""
    params = [batch.params(common.simclr_params, view, strength=0.5) for view in (0, 1)]
    return [common.simclr_augment(batch.images[rows], 16, 0.5, False, params=sliced(p, rows)) for p in params]


def small_network(norm):
    """A small convolutional net, whose embeddings point in all directions."""
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), norm(8), nn.ReLU(), nn.Conv2d(8, 12, 3), norm(12),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 6, bias=False))


def group_norm(channels):
    """A norm that, unlike batch norm, does not depend on how a batch is cut: in 4 groups of the channels."""
    return nn.GroupNorm(4, channels)


def test_micro_batches():
    """Whatever the micro-batch, both gradients are those of the whole batch's loss, written out in float64."""
    g = rng()
    images, labels = some_images(g, 10, 20, 20), torch.randint(6, (10,), generator=g)
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        model = small_network(group_norm)
    exact = small_network(group_norm).double()
    exact.load_state_dict(model.state_dict())
    _, batch = stand_in(model, images, labels, 10)
    views = [exact(view.double()) for view in views_of(batch, slice(None))]
    loss, accuracy = literal_info_nce(*views, 0.5)
    loss.backward()
    references = [(train_simclr.contrastive_gradients, loss.item(), accuracy, gradients_of(exact))]
    logits = exact(common.imagenet_augment(images, 16, MEAN, STD, params=batch.params(common.imagenet_params)).double())
    loss = -sum(row.log_softmax(0)[label] for row, label in zip(logits, labels)) / 10
    loss.backward()
    accuracy = (logits.argmax(1) == labels).double().mean()
    references.append((train_supervised.supervised_gradients, loss.item(), accuracy, gradients_of(exact)))
    for gradients, loss, accuracy, want in references:
        for micro_batch in (10, 5, 3, 1):
            got_loss, got_accuracy = gradients(*stand_in(model, images, labels, micro_batch))
            assert_close(got_loss, loss, 2e-6, "loss")
            assert_close(got_accuracy, accuracy, 1e-6, "accuracy")
            assert not got_loss.requires_grad
            got, name = gradients_of(model), f"{gradients.__name__}, micro-batch {micro_batch}: gradient"
            assert_same_direction_and_size(got, want, 1e-4, name)
            whole = got if micro_batch == 10 else whole  # shares the rounding of float32, unlike the reference
            assert_same_direction_and_size(got, whole, 1e-5, name)


def test_micro_batch_statistics():
    """Batch norm counts each chunk of a micro-batched SimCLR step exactly once."""
    g = rng()
    images = some_images(g, 10, 20, 20)
    model = small_network(nn.BatchNorm2d).train()
    run, batch = stand_in(model, images, None, 4)
    mean, var = torch.zeros(8), torch.ones(8)
    for rows in (slice(0, 4), slice(4, 8), slice(8, 10)):
        x = model[0](torch.cat(views_of(batch, rows))).detach().transpose(0, 1).flatten(1)  # (channels, all places)
        mean, var = 0.9 * mean + 0.1 * x.mean(1), 0.9 * var + 0.1 * x.var(1)
    train_simclr.contrastive_gradients(run, batch)
    assert_close(model[1].running_mean, mean, 1e-5, "running mean")
    assert_close(model[1].running_var, var, 1e-5, "running variance")
    assert model[1].num_batches_tracked == model[4].num_batches_tracked == 3
    assert all(m.track_running_stats for m in (model[1], model[4]))


def test_checkpoint_activations():
    """Computing activations twice changes neither gradient nor running statistics, and does happen twice."""
    g = rng()
    images = torch.rand(4, 3, 32, 32, generator=g)
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        plain, twice = (torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [2, 1, 1, 1]) for _ in range(2))
    twice.load_state_dict(plain.state_dict())
    names = list(plain.state_dict())
    common.checkpoint_blocks(twice)
    forwards = mock.Mock(side_effect=lambda *_: None)
    twice.layer3[0].conv2.register_forward_hook(forwards)
    for model in (plain, twice):
        model(images).square().sum().backward()
    assert forwards.call_count == 2
    assert_same_direction_and_size(gradients_of(twice), gradients_of(plain), 1e-6)
    assert list(twice.state_dict()) == names
    for (name, a), b in zip(twice.state_dict().items(), plain.state_dict().values()):
        assert torch.equal(a, b), f"{name} differs"


# ======================================================================================================================
# The scripts at tiny size. They run inside this process, which has torch loaded already, unless they must be killed
# ======================================================================================================================

METHODS = "simclr", "supervised"


def run_script(script, *flags):
    """Runs a script as `python <script> <flags>` would; returns (exit code, standard output, standard error)."""
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
    what = " ".join(map(str, flags[-4:]))
    assert code == 2, f"exit code {code} for {what}: {out[-200:]}{err[-200:]}"
    assert err.count("\n") == 1 and err.startswith("error: "), f"not one line for {what}: {err[:300]}"
    assert all(word in err for word in words), f"{what}: {err}"


def flags_for(method, out, *more):
    """Flags of a run of 3 steps, the second of which ends the first of 2 epochs; SimCLR's are 2 micro-batches each."""
    micro_batch = ["--micro-batch", 8] if method == "simclr" else []
    return ["--preset", "demo", "--data", tiny_data(), "--out", out, "--subset", 24, "--batch-size", 16, "--epochs", 2,
            "--image-size", 16, "--precision", "fp32", "--device", "cpu", *micro_batch, *more]


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
        assert code == 0 and out.count("epoch 2/2") == 2, f"train_{method}.py: exit code {code}, {out} {err}"
    return folder


def tensors_of(content, name=""):
    """(name, value) of everything in a checkpoint but the time it took."""
    if isinstance(content, (dict, list)):
        for key, value in content.items() if isinstance(content, dict) else enumerate(content):
            if key != "spent":
                yield from tensors_of(value, f"{name}/{key}")
    else:
        yield name, content


def assert_identical(path, other):
    """Two checkpoints hold the same, bit for bit."""
    a, b = (dict(tensors_of(torch.load(p, weights_only=True))) for p in (path, other))
    differ = set(a) ^ set(b) | {k for k in set(a) & set(b) if not (
        torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k])}
    assert len(a) > 400 and not differ, f"{len(differ)} of {len(a)} entries differ, such as {sorted(differ)[:3]}"


def log_of(path):
    """The records of a JSON-lines log."""
    return [json.loads(line) for line in path.with_suffix(".jsonl").read_text().splitlines()]


def assert_log(path):
    """The log's first record describes the run, and every epoch has one record."""
    first, *rest = log_of(path)
    assert {"settings", "commit", "torch", "torchvision", "device"} <= first.keys()
    epochs = [r for r in rest if "epoch" in r]
    assert [r["epoch"] for r in epochs] == [1, 2]
    wanted = {"loss", "lr", "images_per_second", "accuracy"} | ({"test_accuracy"} if "super" in path.name else set())
    assert all(wanted <= r.keys() and math.isfinite(r["loss"]) for r in epochs)


def test_scripts_checkpoint():
    """A checkpoint loads with weights_only; torchvision's ResNet-50 takes the backbone; load_model gives the same."""
    images = torch.rand(4, 3, 32, 32, generator=rng())
    for method in METHODS:
        path = tiny_checkpoints() / f"{method}_seed1.pt"
        saved = torch.load(path, weights_only=True)
        assert saved["epoch"] == 2 and saved["settings"]["seed"] == 1
        assert saved["settings"]["classes"] == ["ant", "bee", "cat", "dog"]
        network = torchvision.models.resnet50()
        keys = network.load_state_dict(saved["backbone"], strict=False)
        assert set(keys.missing_keys) == {"fc.weight", "fc.bias"} and not keys.unexpected_keys
        network.fc = nn.Identity()
        features = network.eval()(images).detach()
        model = common.load_model(path)
        assert not model.training and model.settings["method"] == method and model.settings["image_size"] == 16
        if method == "supervised":
            want = features @ saved["head"]["weight"].T + saved["head"]["bias"]
            assert_close(model(images), want, 1e-4 * want.abs().max().item(), "logits")
        found = common.representations(model, images)["BG4.3.even"].view(4, 2048, -1).mean(2)
        assert_close(found, features, 1e-4 * features.abs().max().item(), "pooled features")
        assert_log(path)
        assert not list(tiny_checkpoints().glob("*.tmp"))


class Payload:
    """Unpickling this runs a command."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_checkpoint_bad_files():
    """Missing, empty, truncated, foreign and malicious files: UserError, and nothing in them is executed."""
    good = (tiny_checkpoints() / "supervised_seed0.pt").read_bytes()
    with temporary_folder() as folder:
        marker, path = folder / "executed", folder / "supervised_seed0.pt"
        with raises(common.UserError, str(path)):
            common.load_model(path)
        keys = dict.fromkeys(("settings", "epoch", "step", "backbone", "head"), {})
        contents = {"empty": b"", "truncated": good[:len(good) // 2], "text": b"hello",
                    "pickle": pickle.dumps(Payload(marker))}
        for name, value in (("object", Payload(marker)), ("inside", keys | {"backbone": Payload(marker)}),
                            ("tensor", torch.ones(3)), ("keys", keys), ("foreign", {"model": torch.ones(3)})):
            buffer = io.BytesIO()
            torch.save(value, buffer)
            contents[name] = buffer.getvalue()
        for name, content in contents.items():
            path.write_bytes(content)
            if name in ("truncated", "pickle", "inside"):  # no reason to start again
                assert_refused("train_supervised.py", *flags_for("supervised", folder, "--seeds", 0))
                assert path.read_bytes() == content
            with raises(common.UserError, str(path)):
                common.load_model(path)
        assert not marker.exists(), "a file was executed"


def test_checkpoint_other_projects():
    """State dicts in every recognised layout load as they are; anything that does not fit is refused by name."""
    names = [(n, t) for n, t in torchvision.models.resnet50().state_dict().items() if not n.startswith("fc.")]
    saved = {name: torch.full((), i, dtype=t.dtype).expand(t.shape) for i, (name, t) in enumerate(names)}  # small files
    counts = [name for name in saved if name.endswith("num_batches_tracked")]
    small = {name: value for name, value in saved.items() if name not in counts}  # as old files are

    def under(prefix, **more):
        return {prefix + name: value for name, value in saved.items()} | more

    fc, queue = {"fc.weight": torch.ones(10, 2048)}, {"queue": torch.ones(3)}
    layouts = {"plain": (under("") | fc, ["fc.weight"]), "old": (small, []),
               "module": ({"state_dict": under("module."), "epoch": 3}, []), "model": ({"model": under("backbone.")}, []),
               "moco": ({"state_dict": under("module.encoder_q.") | {"module.encoder_k.conv1.weight": torch.ones(1)} | queue},
                        ["module.encoder_k.conv1.weight", "queue"]),
               "encoder": (under("encoder.") | {"head.0.weight": torch.ones(2)}, ["head.0.weight"]),
               "deep": ({"state_dict": {"model": under("model.")}}, []),
               "projector": (under("") | {"projector.0.weight": torch.ones(2)}, ["projector.0.weight"])}
    refused = {"missing": ({n: v for n, v in saved.items() if n != "layer3.2.bn1.bias"}, "layer3.2.bn1.bias"),
               "unexpected": (under("", **{"layer5.0.conv1.weight": torch.ones(1)}), "layer5.0.conv1.weight"),
               "shape": (under("") | {"layer1.0.conv2.weight": torch.ones(3)}, "layer1.0.conv2.weight"),
               "two": (under("backbone.") | under("encoder."), "encoder."),
               "stem": (under("") | {"conv1.weight": torch.ones(64, 3, 5, 5)}, "(5, 5)"),
               "integers": ({name: value.to(torch.int64) for name, value in saved.items()}, "fit"),
               "nothing": ({"weights": torch.ones(3)}, "conv1.weight"), "list": ([torch.ones(3)], "conv1.weight"),
               "small": (torchvision.models.resnet18().state_dict(), "layer1.0.conv3.weight")}
    with temporary_folder() as folder:
        path = folder / "net.pt"
        for name, (content, left_out) in layouts.items():
            torch.save(content, path)
            model = common.load_any_model(path, "simclr", image_size=16)
            assert model.settings["left_out"] == left_out and model.settings["stem"] == "imagenet" and not model.training, name
            assert all(torch.equal(value, saved[n]) for n, value in model.state_dict().items() if n not in counts), name
        for name, (content, word) in refused.items():
            torch.save(content, path)
            with raises(common.UserError, str(path), word):
                common.load_any_model(path, "simclr")
        torch.save(common.build_model("simclr", "cifar").state_dict(), path)
        settings = common.load_any_model(path, "supervised").settings
        assert (settings["stem"], settings["image_size"]) == ("cifar", 32)
        assert len(settings["left_out"]) == 18 and all(name.startswith("fc.layers.") for name in settings["left_out"])


def test_save_atomically():
    """A save that fails, while pickling or at the disk, leaves the old file and no temporary one."""
    with temporary_folder() as folder:
        path = folder / "x.pt"
        common.save_atomically({"a": torch.ones(3)}, path)
        with raises(Exception):
            common.save_atomically({"a": lambda: 0}, path)
        with mock.patch.object(os, "fsync", side_effect=OSError(28, "No space left on device")), raises(OSError):
            common.save_atomically({"a": torch.zeros(3)}, path)
        assert torch.load(path, weights_only=True)["a"].tolist() == [1, 1, 1] and os.listdir(folder) == ["x.pt"]


def test_scripts_killed():
    """SIGKILL after the first checkpoint: the same command resumes, and ends in the uninterrupted run's bits."""
    tiny_checkpoints()
    with temporary_folder() as folder:
        path, flags = folder / "simclr_seed0.pt", flags_for("simclr", folder, "--seeds", 0)
        process = subprocess.Popen([sys.executable, "train_simclr.py", *map(str, flags)], **CHILD,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        while not path.exists() and process.poll() is None:
            time.sleep(0.005)
        process.kill()
        _, err = process.communicate()
        assert process.returncode == -signal.SIGKILL, f"ended by itself with {process.returncode}: {err[-300:]}"
        (folder / "simclr_seed0.pt.tmp").write_bytes(b"left over")
        code, out, err = run_script("train_simclr.py", *flags)
        assert code == 0 and "resumed after epoch 1" in out, f"{out[-300:]} {err[-300:]}"
        assert_identical(path, tiny_checkpoints() / path.name)
        assert_log(path)
        assert not list(folder.glob("*.tmp")), "the leftover temporary file is still there"


def interrupted(script, flags, at, number):
    """run_script, with a signal sent to this process during the step with number `at`."""
    take_step = common.Run.take_step

    def signalled(run, gradients):
        if run.step == at:
            os.kill(os.getpid(), number)
        take_step(run, gradients)

    with mock.patch.object(common.Run, "take_step", signalled):
        return run_script(script, *flags)


def test_scripts_signals():
    """SIGINT inside an epoch and SIGTERM at its end save and exit within the step; resumed, the bits are the same."""
    with temporary_folder() as folder:
        path, flags = folder / "supervised_seed0.pt", flags_for("supervised", folder, "--seeds", 0)
        for at, number, words in ((0, signal.SIGINT, "after step 1 of 3"), (1, signal.SIGTERM, "after step 2 of 3")):
            handler = signal.getsignal(number)
            code, out, err = interrupted("train_supervised.py", flags, at, number)
            assert code == 128 + number and words in out, f"exit code {code}: {out[-300:]} {err[-300:]}"
            assert signal.getsignal(number) == handler and torch.load(path, weights_only=True)["step"] == at + 1
        code, out, _ = run_script("train_supervised.py", *flags)
        assert code == 0 and "resumed after epoch 1" in out
        assert_identical(path, tiny_checkpoints() / path.name)
        assert_log(path)


def test_scripts_again():
    """A finished network is skipped and not written again; other settings are refused by name, nothing is changed."""
    for method in METHODS:
        path = tiny_checkpoints() / f"{method}_seed0.pt"
        before = path.stat().st_mtime_ns, path.with_suffix(".jsonl").read_bytes()
        code, out, _ = run_script(f"train_{method}.py", *flags_for(method, path.parent, "--seeds", 0))
        assert code == 0 and "skipped" in out
        other = flags_for(method, path.parent, "--seeds", 0, "--lr", 0.7, "--stem", "cifar")
        assert_refused(f"train_{method}.py", *other, words=["lr", "0.7", "stem", "cifar"])
        assert before == (path.stat().st_mtime_ns, path.with_suffix(".jsonl").read_bytes())


def test_scripts_bad_flags():
    """Impossible flags: one line, exit code 2, no traceback, nothing written."""
    with temporary_folder() as folder, offline():
        file, out = folder / "file", folder / "out"
        file.write_text("kept")
        bad = {"--batch-size": (0, 1, 25), "--micro-batch": (0,), "--subset": (0, 41), "--image-size": (0,),
               "--epochs": (0, 1.5), "--lr": ("nan", "inf", -1), "--weight-decay": (-1,), "--warmup-epochs": (-1, 5),
               "--checkpoint-every": (0,), "--seeds": (-1, "x"), "--stem": ("huge",), "--precision": ("fp8",),
               "--preset": ("none",), "--device": ("nosuch", "meta"), "--out": (file, file / "below"), "--other": (1,)}
        for method in METHODS:
            for flag, values in (bad | {"--temperature": (0, "nan")} if method == "simclr" else bad).items():
                for value in values:
                    assert_refused(f"train_{method}.py", *flags_for(method, out, flag, value), words=[flag])
            for path in (folder / "nothing", file):
                assert_refused(f"train_{method}.py", *flags_for(method, out, "--data", path), words=[str(path)])
        assert file.read_text() == "kept" and not list(out.glob("*"))


def test_scripts_not_finite():
    """A loss that is no longer finite stops the run, names the step, and leaves no checkpoint of it."""
    with temporary_folder() as folder:
        flags = flags_for("supervised", folder, "--seeds", 0, "--lr", 1e30, "--warmup-epochs", 0)
        assert_refused("train_supervised.py", *flags, words=["step 1", "finite"])
        assert not list(folder.glob("*.pt*"))


# ======================================================================================================================
# Several processes
# ======================================================================================================================


def start_ranks(job, world):
    """Forks `world` processes that run `job` as torchrun would; call it where torch has done no work yet."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.start_processes(_one_rank, (job, world, port), nprocs=world, start_method="fork")


def _one_rank(number, job, world, port):
    os.environ.update(RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))
    job()


def shared_embedding():
    """Two views of 12 inputs and the weight that embeds them."""
    g = rng()
    return torch.randn(2, 12, 5, generator=g), torch.randn(5, 4, generator=g).requires_grad_()


def info_nce_on_ranks(path):
    """Every rank's rows through info_nce; rank 0 saves the ranks' mean loss and mean gradient."""
    with common.distributed("cpu"):
        (x, y), weight = shared_embedding()
        rows = torch.arange(12).chunk(common.world_size())[common.rank()]
        loss, accuracy = common.info_nce_and_accuracy(x[rows] @ weight, y[rows] @ weight, 0.5)
        loss.backward()
        mean = torch.cat([loss.detach().view(1), accuracy.view(1), weight.grad.flatten()])
        torch.distributed.all_reduce(mean)
        if common.rank() == 0:
            torch.save(mean / common.world_size(), path)


def train_on_ranks(folder, data):
    """train_simclr.py on every rank, the whole share of the batch in one piece; only rank 0 speaks."""
    with mock.patch(f"{__name__}.tiny_data", return_value=data):
        flags = flags_for("simclr", folder, "--seeds", 0, "--micro-batch", 16)
    code, out, err = run_script("train_simclr.py", *flags)
    assert code == 0 and (out != "") == (os.environ["RANK"] == "0"), f"exit code {code}: {out} {err[-500:]}"


@functools.cache
def ranks_folder():
    """Results of 2 and 4 processes: one fresh interpreter, which forks them all."""
    folder = shared_folder() / "ranks"
    folder.mkdir()
    program = f"""
import functools, pathlib, test_cka as t
t.SEED, folder = {SEED}, pathlib.Path({str(folder)!r})
for world in 2, 4:
    t.start_ranks(functools.partial(t.info_nce_on_ranks, folder / f"{{world}}.pt"), world)
t.start_ranks(functools.partial(t.train_on_ranks, folder, {str(tiny_data())!r}), 2)
"""
    done = subprocess.run([sys.executable, "-c", program], **CHILD, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-600:]
    return folder


def test_ranks_info_nce():
    """Averaged over 2 and 4 processes, loss, accuracy and gradient are one process's: nothing is scaled or lost."""
    (x, y), weight = shared_embedding()
    loss, accuracy = literal_info_nce(x.double() @ weight.double(), y.double() @ weight.double(), 0.5)
    loss.backward()
    for world in (2, 4):
        got = torch.load(ranks_folder() / f"{world}.pt", weights_only=True)
        assert_close(got[:2], [loss.item(), accuracy], 3e-6, f"{world} ranks: loss and accuracy")
        assert_same_direction_and_size([got[2:]], [weight.grad], 1e-5, f"{world} ranks: gradient")


def test_ranks_script():
    """Two processes end where one ends whose micro-batches are their shares, up to rounding."""
    ranks, one = (torch.load(f / "simclr_seed0.pt", weights_only=True) for f in (ranks_folder(), tiny_checkpoints()))
    buffers = [[s["momentum_buffer"] for s in c["optimizer"]["state"].values()] for c in (ranks, one)]
    assert_same_direction_and_size(*buffers, 1e-2, "momentum")
    weights = [[v for k, v in c["backbone"].items() if k.endswith(("weight", "bias"))] for c in (ranks, one)]
    assert_same_direction_and_size(*weights, 1e-4, "weights")
    assert ranks["backbone"].keys() == one["backbone"].keys() and ranks["step"] == 3
    assert_log(ranks_folder() / "simclr_seed0.pt")


# ============================================================================================================
# Figures
# ============================================================================================================

FIGURES = {"fig1": ("fig1_internal.py", "1a 1b 1c"), "fig4": ("fig1_internal.py", "4a 4b 4c"),
           "fig2": ("fig2_cross.py", "2a 2b 2c 2d 2e 2f 4d"), "fig5": ("fig5_aug_heatmaps.py", "5a 5b 5c"),
           "fig3": ("fig3_probes_invariance.py", "3a 3b 3c 3d 3e 3f 3g 3h")}
ENDINGS = "", "_debiased", "_left_out", "_debiased_left_out"


def draw(name, folder, *flags):
    """Runs a figure's script with `folder` as --out; returns (arrays, standard output, standard error)."""
    more = {"fig3": ["--probe-epochs", 2], "fig4": ["--method", "supervised"]}.get(name, [])
    code, out, err = run_script(FIGURES[name][0], *more, "--out", folder, "--device", "cpu",
                                "--precision", "float32", *flags)
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
            lines = [line.split(" | ") for line in out.splitlines() if " | " in line]
            assert [line[0][:2] for line in lines] == identities.split(), f"{name} prints {out}"
            assert all(line[2] in ("holds", "does not hold", "undecided") for line in lines)
            assert "mean nothing" in out and "--debiased" in err, "neither the demo nor few images mentioned"
    return folder, arrays


def literal_features(method, seed):
    """The 32 (and head) representations of the test images by a tiny network, through its test pipeline."""
    model = common.load_model(tiny_checkpoints() / f"{method}_seed{seed}.pt")
    images = [torchvision.io.read_image(str(path)) for path in sorted((tiny_data() / "test").glob("*/*"))]
    x = torch.stack(images).float() / 255
    if method == "supervised":
        mean, std = (torch.tensor(model.settings[name]).view(3, 1, 1) for name in ("mean", "std"))
        x = (x - mean) / std
    return list(common.representations(model, x).values())


def test_figures_values():
    """CKA of Figures 1 to 4 is that by definition, by both estimators, and so is that without tenths."""
    figures = tiny_figures()[1]
    one, two, three, four = (figures[name] for name in ("fig1", "fig2", "fig3", "fig4"))
    features = [literal_features(method, seed) for method in METHODS for seed in (0, 1)]
    layers = [x for network in features for x in network[:32]]
    tenths = common.gram_statistics([source(layers)], 24, precision="float32")
    a, b, c, d = (slice(32 * i, 32 * i + 32) for i in range(4))
    for ending, want in zip(ENDINGS, (literal_cka(layers), literal_cka(layers, unbiased=True),
                                      tenths.left_out, tenths.debiased_left_out)):
        cross = torch.stack([want[..., rows, columns] for rows in (a, b) for columns in (c, d)], -3)
        assert_close(two[f"pairs{ending}"], cross, 1e-4, f"Figure 2, pairs{ending}")
        for method, arrays, within in (("simclr", one, want[..., None, a, b]),
                                       ("supervised", four, want[..., None, c, d])):
            assert_close(arrays[f"pairs{ending}"], within, 1e-4, f"pairs{ending} of {method}")
            assert_close(two[f"pairs_{method}{ending}"], within, 1e-4, f"Figure 2, pairs_{method}{ending}")
        if ending in ("", "_debiased"):
            odd, even = cross.mean(0)[0::2, 0::2], cross.mean(0)[1::2, 1::2]
            drawn = {"odd": odd, "even": even, "diag": even.diagonal(), "max": even.amax(1)}
            for key, values in drawn.items():
                assert_close(two[key + ending], values, 1e-4, f"Figure 2, {key}{ending}")
            assert (two[f"even{ending}"][range(16), two[f"argmax{ending}"]] == two[f"max{ending}"]).all()
            assert_close(one[f"cka{ending}"], want[a, b], 1e-4, f"Figure 1, cka{ending}")
            for i, network in enumerate(features):
                shown = [x for j, x in enumerate(network) if j % 2 or j > 31]
                classes = torch.eye(4).repeat_interleave(6, 0)
                wanted = literal_cka([*shown, classes], ending == "_debiased")[-1, :-1]
                got = three[f"class_cka_{METHODS[i // 2]}{ending}"][i % 2]
                assert_close(got, wanted, 1e-4, f"class CKA{ending}, network {i}")
    assert one["layers"].tolist() == BACKBONE_LAYERS


def test_figures_shapes():
    """Figure 3 has a row per seed and a column per layer; its invariance is the even diagonal of Figure 5."""
    three, five = (tiny_figures()[1][name] for name in ("fig3", "fig5"))
    for method, layers in (("simclr", 35), ("supervised", 32)):
        shown = [i for i in range(layers) if i % 2 or i > 31]
        for key in ("probe", "invariance", "class_cka"):
            values = three[f"{key}_{method}"]
            assert values.shape == (2, len(shown)) and values.min() >= 0 and values.max() <= 1 + 1e-6, key
        assert five[method].shape == (layers, layers) and len(five[f"layers_{method}"]) == layers
        for ending in ENDINGS:
            diagonals = five[f"networks_{method}{ending}"].diagonal(axis1=-2, axis2=-1)[..., shown]
            assert_close(three[f"invariance_{method}{ending}"], diagonals, 1e-4, method + ending)
        assert five[method].diagonal().min() < 0.999, "the two copies are the same images"


def test_figures_replot():
    """--replot gives the same again, with --debiased by the other estimator; damaged files are refused."""
    with temporary_folder() as folder:
        shutil.copytree(tiny_figures()[0], folder, dirs_exist_ok=True)
        for name in FIGURES:
            files = [folder / f"{name}.npz", folder / f"{name}.png"]
            before = [file.read_bytes() for file in files]
            with mock.patch.object(common, "build_model", side_effect=AssertionError("a network was made")):
                biased = draw(name, folder, "--replot")[1]
                assert [file.read_bytes() for file in files] == before, f"{name} changes"
                debiased = draw(name, folder, "--replot", "--debiased")[1]
            assert [file.read_bytes() == old for file, old in zip(files, before)] == [True, False], name
            summary = next(line for line in biased.splitlines() if line.startswith("debiased CKA: "))
            for line in (line for line in debiased.splitlines() if " | " in line):
                first = f"{line[:2]} {line.split(' +- ')[0].split()[-1]}"
                assert first in summary, f"{name}: {first} is not in {summary}"
        damaged = (folder / "fig5.npz").read_bytes()
        (folder / "fig5.npz").write_bytes(damaged[:60] + bytes(3940) + damaged[4000:])
        (folder / "fig1.npz").unlink()
        for name, word in (("fig1", "--out"), ("fig5", "damaged")):
            assert_refused(FIGURES[name][0], "--replot", "--out", folder, words=[f"{name}.npz", word])


def test_figures_of_files():
    """State dicts give what their checkpoints give, each side by its own flags, and get no verdicts."""
    with temporary_folder() as folder:
        flags = ["--data", tiny_data(), "--image-size", 16, "--simclr-label", "A$", "--batch-size", 16]
        for method in METHODS:
            checkpoint = torch.load(tiny_checkpoints() / f"{method}_seed1.pt", weights_only=True)
            file, settings = folder / f"{method} $1, b.pth.tar", checkpoint["settings"]
            torch.save({"state_dict": checkpoint["backbone"]}, file)
            mean, std = ([0] * 3, [1] * 3) if method == "simclr" else (settings["mean"], settings["std"])
            flags += [f"--{method}", file, f"--{method}-mean", *mean, f"--{method}-std", *std]
        found, want = {}, tiny_figures()[1]
        for name in ("fig2", "fig3", "fig5"):
            found[name], out, _ = draw(name, folder, *flags)
            assert "holds" not in out and "SimCLR" not in out and "A$" in out, f"{name} prints {out}"
        assert [found["fig2"][f"label_{method}"] for method in METHODS] == ["A$", "supervised $1, b"]
        assert_close(found["fig2"]["pairs"], want["fig2"]["pairs"][3:], 1e-5, "Figure 2, seed 1")
        for key in ("probe", "class_cka"):  # not invariance: a state dict's augmentation is ImageNet's
            assert_close(found["fig3"][f"{key}_simclr"], want["fig3"][f"{key}_simclr"][1:, :16], 1e-5, key)
        assert_close(found["fig5"]["supervised"], want["fig5"]["networks_supervised"][1], 1e-5, "Figure 5")
        assert found["fig5"]["simclr"].shape == (32, 32)
    args = common.figure_parser("").parse_args(["--simclr", "a/x, $1.pth.tar", "b.pt"])
    assert str(common.figure_folder(args)) == str(Path("figures", "x_1_and_1_more"))


def test_figures_refused():
    """What does not fit is one line that says what to do; other images than training's only on purpose."""
    ours, theirs = (tiny_checkpoints() / f"{method}_seed0.pt" for method in METHODS)
    with temporary_folder() as folder:
        other, moved = write_images(folder / "other", rng(), train=6, test=6), folder / "moved.pt"
        content = torch.load(ours, weights_only=True)
        content["settings"]["data"] = str(other)
        torch.save(content, moved)
        for script, flags, words in (
                ("fig2_cross.py", ["--checkpoints", folder], ["train_simclr.py"]),
                ("fig2_cross.py", ["--simclr", ours, theirs], ["--supervised", "fig1_internal.py"]),
                ("fig2_cross.py", ["--simclr", ours, ours, "--supervised", theirs], ["--simclr", "once"]),
                ("fig2_cross.py", ["--simclr", ours, "--supervised", ours], ["seed0", "--simclr-label"]),
                ("fig1_internal.py", ["--supervised", ours, "--method", "simclr"], ["--supervised"]),
                ("fig1_internal.py", ["--simclr", ours, "--image-size", 16], ["--image-size"]),
                ("fig1_internal.py", ["--simclr", ours, "--simclr-mean", 0, 0, 0], ["--simclr-mean"]),
                ("fig1_internal.py", ["--simclr", folder / "none.pt"], ["none.pt"]),
                ("fig1_internal.py", ["--simclr", ours, "--samples", 25], ["--samples", "24"]),
                ("fig1_internal.py", ["--simclr", moved], ["other images", str(other), "--data", "mean"])):
            assert_refused(script, *flags, "--out", folder / "out", "--device", "cpu", words=words)
        found, out, err = draw("fig1", folder, "--simclr", ours, "--data", other)
        assert found["other_images"] and found["data"] == str(other) and "other images" in err
        assert "itself" in out
        assert_close(found["cka"].diagonal(), torch.ones(32), 1e-6, "CKA of a layer with itself")


def test_figures_untrained():
    """--untrained: other weights than the checkpoints', the same at every call, no layer constant."""
    with temporary_folder() as folder:
        flags = ["--checkpoints", tiny_checkpoints(), "--untrained"]
        (first, _, err), (second, _, _) = (draw("fig1", folder, *flags) for _ in range(2))
        assert "constant" not in err and first["untrained"] and '"epoch": 0' in str(first["settings"])
        assert np.isfinite(first["pairs"]).all() and (first["pairs"] == second["pairs"]).all()
        assert abs(first["pairs"] - tiny_figures()[1]["fig1"]["pairs"]).max() > 0.01


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
    nan = math.nan
    for values, error, verdict in (
            ([0.3, 0.2], nan, "holds"), ([0.3, -0.1], nan, "undecided"), ([-0.3, -0.1], nan, "does not hold"),
            ([0.3, 0.2], 0.12, "holds"), ([0.3, 0.2], 0.13, "undecided"), ([-0.3, -0.2], 0.13, "undecided"),
            ([0.5, 0.1, 0.4], 9, "holds"), ([0.5, -0.2, 0.1], nan, "undecided"), ([nan, 1], 0, "undecided")):
        for sign, bound in ((1, "above"), (-1, "below")):
            some = common.Quantity("x", sign * np.array(values), **{bound: 0}, error=error)
            assert common.Claim("x", "", [some]).verdict() == verdict, f"{values}, {error}, {bound}"
            bad = common.Quantity("x", np.ones(1), above=2)
            assert common.Claim("x", "", [some, bad]).verdict() == "does not hold"
    got = fig5.rank_correlation(np.array([[1.0, 2.0, 9.0, 4.0], [4.0, 3.0, 2.0, 1.0], [1.0, nan, 3.0, 4.0]]))
    assert_close(got[:2], [0.8, -1.0], 1e-12, "rank correlation")
    assert np.isnan(got[2])


def test_figures_claims():
    """Standard errors over images; claim 2d by the strict test; a constant layer catches no dots."""
    ten = torch.rand(10, 1, 32, 32, generator=rng(), dtype=torch.float64).numpy()
    arrays = {key: ten[0] for key in ("pairs", "pairs_simclr", "pairs_supervised")}
    both = arrays | {"pairs_debiased": 2 * ten[0], "pairs_left_out": ten, "pairs_debiased_left_out": 2 * ten}
    diagonals = ten[:, 0, 0::2, 0::2].diagonal(axis1=1, axis2=2)
    early_less_late = diagonals[:, :3].mean(1) - diagonals[:, 3:].mean(1)
    for factor in (1, 2):
        claims = common.judge(fig2.claims, both, debiased=factor == 2)
        found = claims[0].quantities[0]
        assert_close(found.values, factor * early_less_late[:1], 1e-9, "2a")
        assert_close(found.error, factor * 3 * early_less_late.std(), 1e-9, "error")  # sqrt(9/10 * 10) = 3
        assert math.isnan(claims[-1].quantities[0].error), "4d has no ten"
    for dots, count in (([0] * 16, 1), ([2] * 7 + [6] * 6 + [12] * 3, 3), (list(range(16)), 0)):
        matrix = np.full((1, 32, 32), 0.2)
        matrix[0, 1::2, 1::2][np.arange(16), dots] = 0.9
        matrix[:, :, 11] = math.nan  # even layer 6 of supervision is constant
        matrix[:, 11] = math.nan  # and SimCLR's
        found = {claim.id: claim.quantities[0].values for claim in fig2.claims(arrays | {"pairs": matrix})}
        assert found["2d"] == [count], f"2d is {found['2d']} with dots at {dots}"
        nearest = fig2.most_similar(matrix[0, 1::2, 1::2])
        assert np.isnan(nearest[5]) and np.isnan(nearest).sum() == 1 and nearest[15] == dots[15], nearest


def bench():
    """Prints the measurements that the README quotes; every ratio is of times taken in this run, on this device."""
    torch.set_num_threads(THREADS)
    bench_cka()
    bench_training()
    bench_augmentation()


def bench_cka():
    """A table of time against the floor, peak memory and error of CKA between two ResNet-50s, all 32 layers each.

    The floor, measured here: one bare forward pass per network, and half of every m x m x p product at the rate of
    torch's float32 X @ X.T. Every time is the least of three.
    """
    device = common.pick_device()
    models = [common.build_model("supervised", "imagenet", seed=s, zero_init=False) for s in (0, 1)]
    models = [m.to(device, memory_format=torch.channels_last).eval() for m in models]
    x = torch.randn(2048, 8192, device=device)
    gram = x @ x.T

    def eight_products():  # for some seconds, as noise lasts
        for _ in range(8):
            torch.mm(x, x.T, out=gram)

    print(f"CKA of two ResNet-50s, 32 px, 32 layers each; {device}, {torch.get_num_threads()} threads\n"
          "     m  precision  GFLOP/s  floor s   time s  ratio  peak MB  largest error")
    for m in (512, 1024, 2048, 4096):
        images = common.synthetic_images(m, seed=0)[0].to(device)
        inputs = common.imagenet_test(images, 32).contiguous(memory_format=torch.channels_last)
        sources = [lambda a, b, n=n: (x for _, x in common.stream_representations(n, inputs[a:b], any_order=True))
                   for n in models]

        @torch.no_grad()
        def forward_passes():
            for part in inputs.split(256):
                models[0](part), models[1](part)

        p = sum(f[0].numel() for source in sources for f in source(0, 1))
        reference = double_cka([f for source in sources for f in source(0, m)]) if m <= 1024 else None
        emulated = m > 1024 and not common.has_bf16(device)  # bfloat16 without hardware: only its error is of interest
        calls, peaks, found = {}, {}, {}
        for precision in ("float32",) + ("bfloat16",) * (not emulated) + ("tf32",) * (device.type == "cuda"):
            calls[precision] = functools.partial(common.cka_matrix, sources, m, precision=precision, batch=256)
            with PeakMemory(device) as memory:
                found[precision] = calls[precision]()
            peaks[precision] = memory.peak
        *times, forward, products = least_times(device, 3, *calls.values(), forward_passes, eight_products)
        rate = 8 * 2 * 2048 ** 2 * 8192 / products
        floor = forward + m * m * p / rate
        for (precision, result), time_s in zip(found.items(), times):
            error = "-" if reference is None else f"{(result - reference).abs().max():.1e}"
            print(f"{m:6}  {precision:9} {rate / 1e9:8.0f} {floor:8.2f} {time_s:8.2f} {time_s / floor:6.2f} "
                  f"{peaks[precision] / 1e6:8.0f}  {error}", flush=True)


def least_times(device, rounds, *works):
    """The least seconds that each of `works` took, taken in turn so that what else the machine does slows all alike."""
    synchronise = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times = [[] for _ in works]
    for _ in range(rounds):
        for work, taken in zip(works, times):
            synchronise()
            start = time.perf_counter()
            work()
            synchronise()
            taken.append(time.perf_counter() - start)
    return [min(taken) for taken in times]


class PeakMemory:
    """The most memory in use inside the block, above what was in use before: by torch on CUDA, else by the process."""

    def __init__(self, device):
        self.device, self.peak = device, 0

    def __enter__(self):
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
        else:
            self.before, self.done = self._resident(), threading.Event()
            self.watcher = threading.Thread(target=self._watch)
            self.watcher.start()
        return self

    def __exit__(self, *_):
        if self.device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated(self.device) - self.before
        else:
            self.done.set()
            self.watcher.join()

    def _watch(self):
        while not self.done.wait(0.02):
            self.peak = max(self.peak, self._resident() - self.before)

    @staticmethod
    def _resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()


def double_cka(features):
    """(L, L) float64: Eq. (2) with every Gram matrix centred by H on both sides, once."""
    m = len(features[0])
    h = torch.eye(m, dtype=torch.float64, device=features[0].device) - 1 / m
    grams = torch.stack([h @ (x.double() @ x.double().T) @ h for x in features]).flatten(1).cpu()
    hsic = grams @ grams.T
    return hsic / hsic.diagonal().sqrt().outer(hsic.diagonal().sqrt())


def bench_augmentation():
    """Images per second of simclr_augment and of torchvision's per-image PIL pipeline, both on one core."""
    transforms, threads = torchvision.transforms, torch.get_num_threads()
    torch.set_num_threads(1)
    images = common.synthetic_images(512, seed=0)[0]
    print("augmentation, one core: pixels  per-image PIL  batched  ratio   (images/s)")
    for size, strength, blur, n in ((32, 0.5, False, 512), (224, 1.0, True, 64)):
        jitter = transforms.ColorJitter(0.8 * strength, 0.8 * strength, 0.8 * strength, 0.2 * strength)
        steps = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip(),
                 transforms.RandomApply([jitter], 0.8), transforms.RandomGrayscale(0.2)]
        if blur:
            steps.append(transforms.RandomApply([transforms.GaussianBlur(size // 10 // 2 * 2 + 1, (0.1, 2.0))], 0.5))
        pipeline = transforms.Compose([*steps, transforms.ToTensor()])
        pictures = [transforms.functional.to_pil_image(image) for image in images[:n]]
        usual, ours = least_times(torch.device("cpu"), 4, lambda: torch.stack([pipeline(p) for p in pictures]),
                                  lambda: common.simclr_augment(images[:n], size, strength, blur))
        print(f"{'':24}{size:6} {n / usual:14.0f} {n / ours:8.0f} {usual / ours:6.1f}")
    torch.set_num_threads(threads)


def bench_training():
    """Time of a whole training step over the bare forward and backward of its network, and of LARS over SGD."""
    device = common.pick_device()
    print("training step over the bare forward and backward, 32 px, 7x7 stem: method  batch  bare s  step s  ratio")
    for method, script in (("supervised", train_supervised), ("simclr", train_simclr)):
        argv = ["--preset", "demo", "--batch-size", "128", "--micro-batch", "128"]
        args = common.training_arguments("", script.PRESETS, argv)
        data = common.load_data("synthetic", device)
        run = common.Run(args, common.run_settings(args, method, 0, data, device), data, device)
        run.build(None)
        gradients = script.supervised_gradients if method == "supervised" else script.contrastive_gradients
        inputs = torch.rand(128 if method == "supervised" else 256, 3, 32, 32, device=device)
        inputs = inputs.contiguous(memory_format=torch.channels_last)

        def bare():
            with run.autocast():
                out = run.model(inputs)
            out.float().square().mean().backward()
            run.model.zero_grad()

        bare_s, step_s = least_times(device, 10, bare, lambda: run.take_step(gradients))
        print(f"{'':66} {method:10} {128:6} {bare_s:7.2f} {step_s:7.2f} {step_s / bare_s:6.2f}")
    for p in run.model.parameters():
        p.grad = torch.randn_like(p)
    trained = [p for p in run.model.parameters() if p.requires_grad]
    sgd = torch.optim.SGD(trained, 1e-9, momentum=0.9, weight_decay=1e-6, foreach=True)
    lars = common.LARS(trained, 1e-9, weight_decay=1e-6)
    sgd_s, lars_s = least_times(device, 10, sgd.step, lars.step)
    print(f"LARS {lars_s * 1e3:.1f} ms, SGD(foreach=True) {sgd_s * 1e3:.1f} ms, ratio {lars_s / sgd_s:.2f}, "
          f"{len(trained)} tensors")


def main():
    """Runs the checks named on the command line, or all; exit code 1 if one fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="run only checks whose name contains one of these words")
    parser.add_argument("--bench", action="store_true",
                        help="measure speed, memory and error instead (some 15 minutes on 2 CPU cores)")
    args = parser.parse_args()
    if args.bench:
        return bench()
    checks = {name[5:]: check for name, check in globals().items() if name.startswith("test_")}
    chosen = {n: c for n, c in checks.items() if not args.names or any(word in n for word in args.names)}
    print(f"seed {SEED}", flush=True)
    failed = 0
    for name, check in chosen.items():
        started = time.perf_counter()
        try:
            check()
            outcome = "ok"
        except Exception as error:
            failed += 1
            line = next(f.lineno for f in reversed(traceback.extract_tb(error.__traceback__)) if f.filename == __file__)
            reason = " ".join(str(error).split())[:200] or "assertion failed"
            outcome = f"FAILED in line {line}: {type(error).__name__}: {reason}"
        print(f"{name:34s} {time.perf_counter() - started:6.1f} s  {outcome}", flush=True)
    print(f"{len(chosen) - failed} passed, {failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
