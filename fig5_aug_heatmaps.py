"""Figure 5: CKA between all layers for two differently augmented copies of the test set, within one network.

    python fig5_aug_heatmaps.py --checkpoints checkpoints/paper

Left: supervised networks under ImageNet augmentations. Right: SimCLR networks, head included, under SimCLR's. Mean over
seeds. The diagonal at even layers is the middle of Figure 3. Look for: supervised similarity fading from the lower left,
SimCLR's appearing only in the last layers and the head. Writes fig5.*: `supervised` (32, 32), `simclr` (35, 35),
`layers_*`, `networks_*` (S, ...), `dominance_*` and the findings 5a-5c; `other_*` are the networks' matrices by the other
estimator, debiased or biased.
"""

import numpy as np

from common import (NAMES, add_colorbar, cka_heatmap, figure_parser, finding, layer_names, layers_of, measure,
                    network_source, new_figure, open_study, rank_correlation, replot, report, user_errors)

METHODS = ["supervised", "simclr"]  # left and right panel


def copies_cka(study, model, layers):
    """(2, L, L) CKA by both estimators, rows the first copy's layers, columns the second's; dominance (L,), the larger."""
    names = [name for copy in (1, 2) for name in layer_names([model], layers, f", copy {copy}")]
    n = len(layers)
    cka, dominance = measure(study, [network_source(model, study.images, view, slice(0, n)) for view in (0, 1)], names)
    return cka[:, :n, n:], dominance.reshape(2, n).max(0)


def findings(arrays, key="networks"):
    """Claims 5a-5c, each quantity per network."""
    diagonals = {m: arrays[f"{key}_{m}"].diagonal(axis1=1, axis2=2) for m in NAMES}
    simclr = diagonals["simclr"]
    has_head = simclr.shape[1] > 32  # networks from other projects come without
    found = [
        finding("5a", "supervised invariance fades gradually from the first layers",
                ("rank correlation with depth, BG1-3", rank_correlation(diagonals["supervised"][:, :26]), -1, 0)),
        finding("5c", "robustness is limited up to the last few layers",
                (f"BG4{' and head' if has_head else ''} - BG1-3", simclr[:, 26:].mean(1) - simclr[:, :26].mean(1), 1, 0))]
    if has_head:
        head = simclr[:, 32:].mean(1)
        found.insert(1, finding("5b", "SimCLR's head learns substantial but not total invariance",
                                ("head", head, 1, 0.5), ("head", head, -1, 0.95)))
    return found


def plot(arrays):
    """The two panels, from what the .npz holds."""
    figure, axes = new_figure(2, widths=[arrays[method].shape[0] for method in METHODS])
    for ax, method in zip(axes, METHODS):
        title = f"{arrays['kind']}{arrays[f'name_{method}']} (mean of {len(arrays[f'networks_{method}'])})"
        image = cka_heatmap(ax, arrays[method], title, "layer, second copy", "layer, first copy", per_block=2,
                            head=arrays[method].shape[0] - 32)
    add_colorbar(figure, image, axes, arrays["debiased"])
    figure.suptitle("CKA between two augmented copies of the test set")
    return figure


def main():
    args = figure_parser(__doc__).parse_args()
    if args.replot:
        return replot(args, "fig5", plot)
    study = open_study(args, METHODS)
    arrays = {}
    for method, models in study.networks.items():
        layers = layers_of(models)
        matrices, dominance = zip(*[copies_cka(study, model, layers) for model in models])
        networks, other = np.stack(matrices, 1)
        arrays |= {f"networks_{method}": networks, method: networks.mean(0), f"other_{method}": other,
                   f"dominance_{method}": np.stack(dominance), f"layers_{method}": np.array(layers)}
    report(study, "fig5", plot, arrays, findings(arrays), findings(arrays, "other"))


if __name__ == "__main__":
    with user_errors():
        main()
