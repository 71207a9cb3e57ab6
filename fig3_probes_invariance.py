"""Figure 3: linear probes, augmentation invariance and alignment with the classes, layer by layer.

    python fig3_probes_invariance.py --checkpoints checkpoints/paper

Left: test accuracy of linear probes on the frozen, flattened representations. Middle: CKA of the same layer
between two copies of the test set, each image augmented as in that method's training. Right: CKA with the
one-hot class matrix. Even layers and SimCLR's head; mean and spread over seeds. Look for: accuracy rising
all the way, SimCLR's invariance rising in BG4 and the head, supervision bending towards the classes in BG4.
Writes fig3.*: `probe_*`, `invariance_*`, `class_cka_*` (S, 19) for simclr and (S, 16) for supervised,
`layers_*`, `dominance_*`; `<key>_debiased` by debiased CKA, `<key>_left_out` (10, S, ...) without each
tenth of the images. Judges claims 3a-3h.
"""

import collections

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from common import (NAMES, UserError, depth_lines, figure_parser, generator_for, mark_block_groups, measure,
                    network_source, new_figure, number, open_study, rank_correlation, replot, report,
                    user_errors)

PROBE_BATCH, PROBE_RATE = 256, 1.0


class Probe(nn.Module):
    """A linear classifier of p features, standardised: by the batch in training, by all batches after it.

    It starts at zero. Division by sqrt(p) gives every layer inputs of norm about 1: one rate serves all.
    """

    def __init__(self, p, classes):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(classes, p))
        self.bias = nn.Parameter(torch.zeros(classes))
        self.register_buffer("sums", torch.zeros(2, p))  # of the batches' means and variances
        self.batches = 0

    def count(self, mean, variance, n):
        """Adds the statistics of a batch of n images to those that are used after training."""
        self.sums += torch.stack([mean, variance * (n / (n - 1))])
        self.batches += 1

    def forward(self, x, mean=None, variance=None):
        """Logits of x (n, p); without mean and variance (p,), by the batches counted."""
        if mean is None:
            mean, variance = self.sums / self.batches
        # Standardising the weights instead of the features, which are far larger, spares a copy of these.
        weight = self.weight / (variance + 1e-5).sqrt() / x.shape[1] ** 0.5
        return F.linear(x, weight, self.bias - weight @ mean)


def batch_statistics(pieces):
    """[(mean, variance)] (p,) per layer over a batch; pieces: size and generator of layers, of each."""
    found, seen = collections.defaultdict(lambda: (0.0, 0.0)), 0
    for n, layers in pieces:
        share = n / (seen + n)
        for i, x in enumerate(layers):
            variance, mean = torch.var_mean(x, 0, correction=0)
            old_mean, old_variance = found[i]
            step = mean - old_mean
            found[i] = (old_mean + share * step, old_variance + share * (variance - old_variance)
                        + share * (1 - share) * step ** 2)
        seen += n
    return list(found.values())


def probe_accuracies(args, data, model, layers):
    """(layers,) test accuracies of linear probes, all trained together on one frozen network.

    A batch larger than --batch-size comes in pieces, and twice: first for its statistics, then for the
    gradient, which is the whole batch's.
    """
    device = data.test_images.device
    images = torch.randperm(len(data.train_images), generator=torch.Generator().manual_seed(0))
    images = images[:args.probe_images]
    batch = min(PROBE_BATCH, len(images))
    steps = len(images) // batch

    def features(some_images):  # computed, used and let go layer by layer
        return network_source(model, some_images, layers)[1](0, len(some_images))

    probes = nn.ModuleList(Probe(x.shape[1], len(data.classes)) for x in features(data.train_images[:1]))
    probes.to(device)
    optimizer = torch.optim.SGD(probes.parameters(), PROBE_RATE, momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.probe_epochs * steps)
    for epoch in range(args.probe_epochs):
        order = torch.randperm(len(images), generator=generator_for("cpu", "probes", epoch))
        for rows in images[order][:steps * batch].to(device).split(batch):
            pieces, whole = rows.split(args.batch_size), None
            if len(pieces) > 1:
                whole = batch_statistics((len(some), features(data.train_images[some])) for some in pieces)
            for some in pieces:
                for i, x in enumerate(features(data.train_images[some])):
                    mean, variance = whole[i] if whole else batch_statistics([(batch, [x])])[0]
                    logits = probes[i](x, mean, variance)
                    loss = F.cross_entropy(logits, data.train_labels[some], reduction="sum") / batch
                    loss.backward()  # into this probe only: representations carry no graph
                    if some is pieces[-1]:
                        probes[i].count(mean, variance, batch)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    right = torch.zeros(len(layers), device=device)
    for rows in torch.arange(len(data.test_images), device=device).split(args.batch_size):
        for i, x in enumerate(features(data.test_images[rows])):
            right[i] += (probes[i](x).argmax(1) == data.test_labels[rows]).sum()
    return right.cpu().numpy() / len(data.test_images)


def measure_method(args, models, data, method):
    """The arrays of one method's networks: invariance of two augmented copies, the rest of plain images."""
    layers = [name for name in min((m.layers for m in models), key=len) if not name.endswith("odd")]
    one_hot = F.one_hot(data.test_labels, len(data.classes)).float()
    classes = ["the classes (one-hot)"], lambda start, stop: [one_hot[start:stop]]
    n, found = len(layers), collections.defaultdict(list)
    for model in models:
        views = [network_source(model, data.test_images, layers, view) for view in (0, 1, None)]
        cka, dominance = measure(args, len(one_hot), [*views, classes])
        for ending, values in cka.items():
            invariance = values[..., :n, n:2 * n].diagonal(axis1=-2, axis2=-1)
            found[f"invariance_{method}{ending}"].append(invariance)
            found[f"class_cka_{method}{ending}"].append(values[..., 2 * n:3 * n, -1])
        found[f"dominance_{method}"].append(dominance[2 * n:3 * n])
        found[f"probe_{method}"].append(probe_accuracies(args, data, model, layers))
    arrays = {key: np.stack(values, -2) for key, values in found.items()}
    return arrays | {f"layers_{method}": np.array(layers)}


def rises(arrays, key, tolerance):
    """The quantities of the claim that values of both methods rise monotonically through the backbone."""
    found = {}
    for method, name in NAMES.items():
        values = arrays[f"{key}_{method}"][:, :16]
        falls = np.where(np.isnan(values).any(1), np.nan, (np.diff(values, axis=1) < -tolerance).sum(1))
        found[f"{name} falls"] = falls, -np.inf, 0.5
        found[f"{name} rank correlation"] = rank_correlation(values), 0.9, np.inf
    return found


def claims(arrays):
    """Claims 3a-3h: {claim: {quantity: (a value per network, low, high)}}; methods compared seed by seed."""
    simclr, supervised = arrays["invariance_simclr"], arrays["invariance_supervised"]
    seeds, head = min(len(simclr), len(supervised)), arrays["class_cka_simclr"][:, 16:]
    ahead = simclr[:seeds, :16] - supervised[:seeds, :16]  # of SimCLR in invariance
    classes = arrays["class_cka_supervised"][:seeds, :16] - arrays["class_cka_simclr"][:seeds, :16]
    end = {"invariance at even 16, SimCLR - supervised": (ahead[:, 15], 0, np.inf)}
    found = {
        "3a linear separability rises monotonically": rises(arrays, "probe", 0.005),
        "3b SimCLR grows more invariant with depth, most in the last layers": {
            "SimCLR invariance, rank correlation": (rank_correlation(simclr), 0, np.inf),
            "BG4 and head - BG1-3": (simclr[:, 13:].mean(1) - simclr[:, :13].mean(1), 0, np.inf)},
        "3c supervision starts similar under its weaker augmentations": {
            "invariance at even 1, supervised - SimCLR": (-ahead[:, 0], 0, np.inf)},
        "3d supervision then diverges until BG4, with a small increase there": {
            "supervised invariance, even 1 - 13": (supervised[:, 0] - supervised[:, 12], 0, np.inf),
            "even 16 - 13": (supervised[:, 15] - supervised[:, 12], 0, np.inf)},
        "3e SimCLR is the more invariant one at the end": end,
        "3f CKA with the classes rises monotonically": rises(arrays, "class_cka", 0.01),
        "3g supervision accelerates towards the classes in BG4": {
            "gain in class CKA from even 13 to 16, supervised - SimCLR": (classes[:, 15] - classes[:, 12], 0,
                                                                          np.inf)}}
    if head.shape[1]:  # networks from other projects come without
        last = simclr[:seeds, 18] - supervised[:seeds, 15]
        end["at head.3, SimCLR - supervised even 16"] = last, 0, np.inf
        found["3h class CKA decreases after the head's first layer"] = {
            "SimCLR class CKA, head.1 - 2": (head[:, 0] - head[:, 1], 0, np.inf),
            "head.1 - 3": (head[:, 0] - head[:, 2], 0, np.inf)}
    return found


def plot(arrays):
    """The three panels, from what the .npz holds."""
    sides = [f"{len(arrays[f'probe_{method}'])} {arrays[f'label_{method}']}" for method in NAMES]
    title = f"Mean and standard deviation over {arrays['kind']}networks ({', '.join(sides)})"
    figure, axes = new_figure(arrays, title, panels=3)
    cka = "debiased CKA" if arrays["debiased"] else "CKA"
    panels = (("probe", "Linear probes", "test accuracy"),
              ("invariance", "Augmentation invariance", f"{cka} between augmented copies"),
              ("class_cka", "Alignment with the classes", f"{cka} with the classes"))
    width = max(arrays[f"probe_{method}"].shape[1] for method in NAMES)
    for ax, (key, title, label) in zip(axes, panels):
        for method, color in zip(NAMES, ("tab:blue", "tab:orange")):
            depth_lines(ax, arrays[f"{key}_{method}"], color, str(arrays[f"label_{method}"]))
        mark_block_groups(ax, width)
        ax.set(title=title, xlabel="even layer", ylabel=label, xlim=(-0.5, width - 0.5),
               ylim=(min(0, ax.dataLim.y0), 1.02))  # debiased CKA may be negative
    axes[0].legend(loc="upper left")
    return figure


def main():
    parser = figure_parser(__doc__)
    add = parser.add_argument_group("probes").add_argument
    add("--probe-epochs", type=number(int, low=1), metavar="N", default=10,
        help="passes over the training images (default: 10)")
    add("--probe-images", type=number(int, low=2), metavar="N",
        help="training images for the probes (default: all)")
    args = parser.parse_args()
    if args.replot:
        return replot(args, "fig3", claims, plot)
    networks, data, arrays = open_study(args, list(NAMES))
    if len(data.train_images) < (args.probe_images or 2):
        raise UserError(f"--probe-images {args.probe_images or 2}: the training set has fewer images")
    for method, models in networks.items():
        arrays |= measure_method(args, models, data, method)
    report(args, "fig3", claims, plot, arrays)


if __name__ == "__main__":
    with user_errors():
        main()
