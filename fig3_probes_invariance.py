"""Figure 3: linear probes, augmentation invariance and alignment with the classes, layer by layer.

    python fig3_probes_invariance.py --checkpoints checkpoints/paper

Left: test accuracy of linear probes on the frozen, flattened representations. Middle: CKA of the same layer between two
copies of the test set, each image augmented as in that method's training. Right: CKA with the one-hot class matrix. Even
layers and SimCLR's head; mean and spread over seeds. Look for: accuracy rising all the way, SimCLR's invariance rising in
BG4 and the head, supervision bending towards the classes in BG4. Writes fig3.*: `probe_*`, `invariance_*`, `class_cka_*`
(S, 19) for simclr and (S, 16) for supervised, `dominance_*` and the findings 3a-3h; `other_*` are CKAs by the other
estimator, debiased or biased.
"""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from common import (COLORS, NAMES, UserError, depth_lines, figure_parser, finding, generator_for, layer_names, layers_of,
                    mark_block_groups, measure, network_source, new_figure, number, open_study, prepare, rank_correlation,
                    replot, report, representations, user_errors)

PROBE_BATCH, PROBE_RATE = 256, 1.0


def shown_layers(models):
    """Indices among the networks' representations of the even layers and the head's, and their names."""
    found = layers_of(models)
    indices = [i for i, name in enumerate(found) if not name.endswith("odd")]
    return indices, [found[i] for i in indices]


class Probe(nn.Module):
    """A linear classifier of p features, each standardised over the images seen, zero at the start.

    The division by sqrt(p) gives every layer inputs of norm about 1, so that one learning rate serves all of them.
    """

    def __init__(self, p, classes):
        super().__init__()
        self.standardise = nn.BatchNorm1d(p, affine=False, momentum=None)
        self.linear = nn.Linear(p, classes)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x):
        return self.linear(self.standardise(x) / x.shape[1] ** 0.5)


def probe_accuracies(study, model, layers):
    """(layers,) test accuracies of linear probes, all trained together: one pass of the frozen network per batch."""
    args, device, data = study.args, study.device, study.data
    total = len(data.train_images)
    chosen = torch.randperm(total, generator=torch.Generator().manual_seed(0))[:args.probe_images or total]
    batch = min(PROBE_BATCH, len(chosen))
    steps = args.probe_epochs * (len(chosen) // batch)

    def features(images):
        found = list(representations(model, prepare(model, images), any_order=True).values())
        return [found[i] for i in layers]

    widths = [x.shape[1] for x in features(data.train_images[:2])]
    probes = nn.ModuleList(Probe(p, len(data.classes)) for p in widths).to(device)
    optimizer = torch.optim.SGD(probes.parameters(), PROBE_RATE, momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
    for epoch in range(args.probe_epochs):
        order = chosen[torch.randperm(len(chosen), generator=generator_for("cpu", "probes", epoch))].to(device)
        for rows in order[:len(chosen) // batch * batch].split(batch):
            labels = data.train_labels[rows]
            loss = sum(F.cross_entropy(p(x), labels) for p, x in zip(probes, features(data.train_images[rows])))
            optimizer.zero_grad()
            loss.backward()  # into the probes only: representations() carry no graph
            optimizer.step()
            schedule.step()
    probes.eval()
    right = torch.zeros(len(layers), device=device)
    with torch.no_grad():
        for images, labels in zip(study.images.split(args.batch_size), study.labels.split(args.batch_size)):
            logits = torch.stack([p(x) for p, x in zip(probes, features(images))])
            right += (logits.argmax(2) == labels).sum(1)
    return right.cpu().numpy() / len(study.images)


def cka_profiles(study, model, layers, names):
    """CKA between two augmented copies and with the classes, (2, layers) each, by both estimators; dominance (layers,).

    All in one pass; dominance is that on the plain images.
    """
    one_hot = F.one_hot(study.labels, len(study.data.classes)).float()
    sources = [network_source(model, study.images, view, layers) for view in (0, 1, None)]
    labels = [name for copy in (", first copy", ", second copy", "") for name in layer_names([model], names, copy)]
    cka, dominance = measure(study, [*sources, lambda start, stop: [one_hot[start:stop]]], labels + ["the classes (one-hot)"])
    n = len(layers)
    return cka[:, :n, n:2 * n].diagonal(axis1=1, axis2=2), cka[:, 2 * n:3 * n, -1], dominance[2 * n:3 * n]


def falls(values, tolerance):
    """(S,): how often each row of values (S, layers) falls by more than `tolerance` from one layer to the next."""
    return np.where(np.isnan(values).any(1), np.nan, (np.diff(values, axis=1) < -tolerance).sum(1))


def findings(a):
    """Claims 3a-3h. Rows are networks; methods are compared seed by seed. Layers count from 1 in the claims, from 0 here."""
    seeds = min(len(a["probe_simclr"]), len(a["probe_supervised"]))
    simclr, supervised = a["invariance_simclr"], a["invariance_supervised"]
    classes = {m: a[f"class_cka_{m}"] for m in NAMES}
    gain = {m: classes[m][:seeds, 15] - classes[m][:seeds, 12] for m in NAMES}

    def rises(values, tolerance):
        backbone = {NAMES[m]: values[m][:, :16] for m in NAMES}
        return [number for name, v in backbone.items() for number in (
            (f"{name} falls", falls(v, tolerance), -1, 0.5), (f"{name} rank correlation", rank_correlation(v), 1, 0.9))]

    has_head = simclr.shape[1] > 16  # networks from other projects come without
    head = [("head.3 - supervised even 16", simclr[:seeds, 18] - supervised[:seeds, 15], 1, 0)] if has_head else []
    found = [
        finding("3a", "linear separability rises monotonically", *rises({m: a[f"probe_{m}"] for m in NAMES}, 0.005)),
        finding("3b", "SimCLR grows more invariant with depth, most in the last layers",
                ("rank correlation", rank_correlation(simclr), 1, 0),
                (f"BG4{' and head' if has_head else ''} - BG1-3", simclr[:, 13:].mean(1) - simclr[:, :13].mean(1), 1, 0)),
        finding("3c", "supervision starts similar under its weaker augmentations",
                ("supervised - SimCLR at even 1", supervised[:seeds, 0] - simclr[:seeds, 0], 1, 0)),
        finding("3d", "supervision then diverges until BG4, with a small increase there",
                ("even 1 - even 13", supervised[:, 0] - supervised[:, 12], 1, 0),
                ("even 16 - even 13", supervised[:, 15] - supervised[:, 12], 1, 0)),
        finding("3e", "SimCLR is the more invariant one at the end",
                ("even 16, SimCLR - supervised", simclr[:seeds, 15] - supervised[:seeds, 15], 1, 0), *head),
        finding("3f", "CKA with the classes rises monotonically", *rises(classes, 0.01)),
        finding("3g", "supervision accelerates towards the classes in BG4",
                ("gain even 13 to 16, supervised - SimCLR", gain["supervised"] - gain["simclr"], 1, 0))]
    if has_head:
        found.append(finding("3h", "class CKA decreases after the head's first layer",
                             ("head.1 - head.2", classes["simclr"][:, 16] - classes["simclr"][:, 17], 1, 0),
                             ("head.1 - head.3", classes["simclr"][:, 16] - classes["simclr"][:, 18], 1, 0)))
    return found


def plot(arrays):
    """The three panels, from what the .npz holds."""
    figure, axes = new_figure(3)
    estimator = "debiased CKA" if arrays["debiased"] else "CKA"
    panels = (("probe", "Linear probes", "test accuracy"),
              ("invariance", "Augmentation invariance", f"{estimator} between augmented copies"),
              ("class_cka", "Alignment with the classes", f"{estimator} with the classes"))
    width = max(arrays[f"probe_{method}"].shape[1] for method in NAMES)
    for ax, (key, title, label) in zip(axes, panels):
        lowest = min(0, *(np.nanmin(arrays[f"{key}_{method}"]) for method in NAMES))  # debiased CKA may be negative
        for method in NAMES:
            depth_lines(ax, arrays[f"{key}_{method}"], COLORS[method], str(arrays[f"name_{method}"]))
        mark_block_groups(ax, head=width - 16)
        ax.set(title=title, xlabel="even layer", ylabel=label, xlim=(-0.5, width - 0.5), ylim=(lowest, 1))
    axes[0].legend(loc="upper left")
    seeds = ", ".join(f"{arrays[f'name_{m}']} {len(arrays[f'probe_{m}'])}" for m in NAMES)
    figure.suptitle(f"Mean and standard deviation over {arrays['kind']}networks: {seeds}")
    return figure


def main():
    parser = figure_parser(__doc__)
    parser.add_argument("--probe-epochs", type=number(int, low=1), default=10, help="passes of the probes (default: 10)")
    parser.add_argument("--probe-images", type=number(int, low=2), help="training images for the probes (default: all)")
    args = parser.parse_args()
    if args.replot:
        return replot(args, "fig3", plot)
    study = open_study(args, ["simclr", "supervised"])
    if (args.probe_images or 0) > len(study.data.train_images):
        raise UserError(f"--probe-images {args.probe_images}: the training set has {len(study.data.train_images)} images")
    arrays, other = {}, {}
    for method, models in study.networks.items():
        layers, names = shown_layers(models)
        profiles = [cka_profiles(study, model, layers, names) for model in models]
        for key, rows in zip(("invariance", "class_cka"), zip(*profiles)):
            arrays[f"{key}_{method}"], other[f"{key}_{method}"] = np.stack(rows, 1)
        arrays[f"dominance_{method}"] = np.stack([dominance for _, _, dominance in profiles])
        arrays[f"probe_{method}"] = np.stack([probe_accuracies(study, model, layers) for model in models])
        arrays[f"layers_{method}"] = np.array(names)
    both = findings(arrays), findings(arrays | other)
    report(study, "fig3", plot, arrays | {f"other_{name}": values for name, values in other.items()}, *both)


if __name__ == "__main__":
    with user_errors():
        main()
