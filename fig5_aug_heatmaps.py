"""Figure 5: CKA between all layers for two differently augmented copies of the test set, within one network.

    python fig5_aug_heatmaps.py --checkpoints checkpoints/paper

Left: supervised networks under ImageNet augmentations. Right: SimCLR networks, head included, under SimCLR's. Mean over
seeds. The diagonal at even layers is the middle of Figure 3. Look for: supervised similarity fading from the lower left,
SimCLR's appearing only in the last layers and the head. Writes fig5.*: `supervised` (32, 32), `simclr` (35, 35),
`layers_*`, `networks_*` (S, ...), `dominance_*` and the findings 5a-5c.
"""

import numpy as np

from common import (HEAD, LAYERS, NAMES, add_colorbar, cka_heatmap, figure_parser, finding, layer_names, measure,
                    network_source, new_figure, open_study, rank_correlation, report, user_errors)


def copies_cka(study, model, layers):
    """(L, L) CKA, rows the first copy's layers, columns the second's; dominance (L,), the larger of the two copies'."""
    names = [f"{name}, copy {copy}" for copy in (1, 2) for name in layer_names([model], layers)]
    cka, dominance = measure(study, [network_source(model, study.images, view) for view in (0, 1)], names)
    n = len(layers)
    return cka[:n, n:], dominance.reshape(2, n).max(0)


def findings(arrays):
    """Claims 5a-5c, each quantity per network."""
    diagonals = {m: arrays[f"networks_{m}"].diagonal(axis1=1, axis2=2) for m in NAMES}
    head, simclr = diagonals["simclr"][:, 32:].mean(1), diagonals["simclr"]
    return [
        finding("5a", "supervised invariance fades gradually from the first layers",
                ("rank correlation with depth, BG1-3", rank_correlation(diagonals["supervised"][:, :26]), -1, 0)),
        finding("5b", "SimCLR's head learns substantial but not total invariance",
                ("head", head, 1, 0.5), ("head", head, -1, 0.95)),
        finding("5c", "robustness is limited up to the last few layers",
                ("BG4 and head - BG1-3", simclr[:, 26:].mean(1) - simclr[:, :26].mean(1), 1, 0))]


def plot(arrays, debiased):
    """The two panels."""
    figure, axes = new_figure(2, widths=(32, 35))
    for ax, method, head in zip(axes, ("supervised", "simclr"), (0, 3)):
        image = cka_heatmap(ax, arrays[method], f"{NAMES[method]} (mean of {len(arrays[f'networks_{method}'])})",
                            "layer, second copy", "layer, first copy", per_block=2, head=head)
    add_colorbar(figure, image, axes, debiased)
    figure.suptitle("CKA between two augmented copies of the test set")
    return figure


def main():
    study = open_study(figure_parser(__doc__), ["supervised", "simclr"])
    arrays = {}
    for method, layers in (("supervised", LAYERS), ("simclr", LAYERS + HEAD)):
        matrices, dominance = zip(*[copies_cka(study, model, layers) for model in study.networks[method]])
        arrays |= {f"networks_{method}": np.stack(matrices), method: np.mean(matrices, 0),
                   f"dominance_{method}": np.stack(dominance), f"layers_{method}": np.array(layers)}
    report(study, "fig5", plot(arrays, study.args.debiased), arrays, findings(arrays))


if __name__ == "__main__":
    with user_errors():
        main()
