"""Figure 5: CKA between all layers for two differently augmented copies of the test set, within one network.

    python fig5_aug_heatmaps.py --checkpoints checkpoints/paper

Left: supervised networks under ImageNet augmentations. Right: SimCLR networks, head included, under
SimCLR's. Mean over seeds. The diagonal at even layers is the middle of Figure 3. Look for: supervised
similarity fading from the lower left, SimCLR's appearing only in the last layers and the head. Writes
fig5.*: `supervised` (32, 32), `simclr` (35, 35), `networks_*` (S, ...), `layers_*`, `dominance_*`;
`<key>_debiased` by debiased CKA, `networks_*_left_out` (10, S, ...) without each tenth of the images.
Judges claims 5a-5c.
"""

import numpy as np

from common import (cka_heatmaps, figure_parser, measure, network_source, new_figure, open_study,
                    rank_correlation, replot, report, user_errors)

METHODS = ["supervised", "simclr"]  # left and right panel


def compare_copies(args, models, images, method):
    """The arrays of one panel: rows the layers for the first copy of the images, columns for the second."""
    layers = min((model.layers for model in models), key=len)
    n, matrices, dominances = len(layers), {}, []
    for model in models:
        copies = [network_source(model, images, layers, view) for view in (0, 1)]
        cka, dominance = measure(args, len(images), copies)
        for ending, values in cka.items():
            matrices.setdefault(ending, []).append(values[..., :n, n:])
        dominances.append(dominance.reshape(2, n).max(0))
    arrays = {f"layers_{method}": np.array(layers), f"dominance_{method}": np.stack(dominances)}
    arrays |= {f"networks_{method}{ending}": np.stack(values, -3) for ending, values in matrices.items()}
    for ending in ("", "_debiased"):
        arrays[method + ending] = arrays[f"networks_{method}{ending}"].mean(0)
    return arrays


def claims(arrays):
    """Claims 5a-5c: {claim: {quantity: (a value per network, low, high)}}."""
    supervised, simclr = (arrays[f"networks_{m}"].diagonal(axis1=1, axis2=2) for m in METHODS)
    found = {"5a supervised invariance fades gradually from the first layers": {
        "supervised diagonal, rank correlation with depth, BG1-3": (
            rank_correlation(supervised[:, :26]), -np.inf, 0)}}
    if simclr.shape[1] > 32:  # networks from other projects come without a head
        found["5b SimCLR's head learns substantial but not total invariance"] = {
            "SimCLR diagonal, head": (simclr[:, 32:].mean(1), 0.5, 0.95)}
    found["5c robustness is limited up to the last few layers"] = {
        "SimCLR diagonal, BG4 and head - BG1-3": (
            simclr[:, 26:].mean(1) - simclr[:, :26].mean(1), 0, np.inf)}
    return found


def plot(arrays):
    """The two panels, from what the .npz holds."""
    figure, axes = new_figure(arrays, "CKA between two augmented copies of the test set", panels=2)
    counts = [len(arrays[f"networks_{method}"]) for method in METHODS]
    titles = [f"{arrays['kind']}{arrays[f'label_{method}']}{f', mean of {n} networks' if n > 1 else ''}"
              for method, n in zip(METHODS, counts)]
    cka_heatmaps(axes, [arrays[method] for method in METHODS], titles, "layer, second copy",
                 "layer, first copy", arrays["debiased"])
    return figure


def main():
    args = figure_parser(__doc__).parse_args()
    if args.replot:
        return replot(args, "fig5", claims, plot)
    networks, data, arrays = open_study(args, METHODS)
    for method, models in networks.items():
        arrays |= compare_copies(args, models, data.test_images, method)
    report(args, "fig5", claims, plot, arrays)


if __name__ == "__main__":
    with user_errors():
        main()
