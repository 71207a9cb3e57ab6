"""Figure 2: CKA between the layers of SimCLR and of supervised networks.

    python fig2_cross.py --checkpoints checkpoints/paper

Left, middle: odd and even layers, rows SimCLR, columns supervised; a white dot on the supervised layer most
similar to each SimCLR even layer. Right: that similarity (max) and the one to the corresponding layer
(diag). Means over all pairs of a SimCLR and a supervised network. Look for: a bright even diagonal over
dark odd layers, dots left of the diagonal where a block group begins, and the fall in BG4. Writes fig2.*:
`odd`, `even` (16, 16), `diag`, `max`, `argmax` (16,), `pairs` (P, 32, 32), `layers`, `dominance_*` (S, 32),
and for claim 4d `pairs_simclr`, `pairs_supervised` between seeds of one method; `<key>_debiased` by
debiased CKA, `pairs*_left_out` (10, P, 32, 32) without each tenth of the images. Judges claims 2a-2f and
4d.
"""

import numpy as np

from common import (EVEN, GROUP, LAYERS, ODD, SAME_GROUP, cka_heatmaps, depth_lines, figure_parser,
                    mark_block_groups, measure, network_source, new_figure, open_study, pair_matrices, replot,
                    report, user_errors)

METHODS = ["simclr", "supervised"]  # rows and columns


def compare_methods(args, networks, images):
    """The arrays of the figure: rows the layers of a SimCLR network, columns of a supervised one."""
    models = networks["simclr"] + networks["supervised"]
    cka, dominance = measure(args, len(images), [network_source(model, images) for model in models])
    split, dominance = len(networks["simclr"]), dominance.reshape(-1, 32)
    arrays = {"layers": np.array(LAYERS), "dominance_simclr": dominance[:split],
              "dominance_supervised": dominance[split:]}
    simclr, supervised = range(split), range(split, len(models))
    for ending, values in cka.items():
        arrays[f"pairs{ending}"] = pair_matrices(values, simclr, supervised)
        arrays[f"pairs_simclr{ending}"] = pair_matrices(values, simclr)
        arrays[f"pairs_supervised{ending}"] = pair_matrices(values, supervised)
    for ending in ("", "_debiased"):
        mean = arrays[f"pairs{ending}"].mean(0)
        odd, even = mean[ODD, ODD], mean[EVEN, EVEN]
        drawn = {"odd": odd, "even": even, "diag": even.diagonal(), "max": np.fmax.reduce(even, 1),
                 "argmax": most_similar(even)}
        arrays |= {key + ending: values for key, values in drawn.items()}
    return arrays


def most_similar(matrices):
    """(..., n): index along the last axis of the largest finite value of matrices (..., n, n).

    int64, or float64 with NaN for rows without any finite value, as those of a layer that is constant.
    """
    found = np.where(np.isnan(matrices), -np.inf, matrices).argmax(-1)
    undefined = np.isnan(matrices).all(-1)
    return np.where(undefined, np.nan, found) if undefined.any() else found


def claims(arrays):
    """Claims 2a-2f and 4d: {claim: {quantity: (a value per pair of networks, low, high)}}. Indices from 0."""
    pairs = arrays["pairs"]
    odd, even = pairs[:, ODD, ODD], pairs[:, EVEN, EVEN]
    diag_odd, diag_even = (m.diagonal(axis1=1, axis2=2) for m in (odd, even))
    early, later = diag_odd[:, GROUP == 1].mean(1), diag_odd[:, GROUP > 1].mean(1)
    similar = diag_even[:, GROUP < 4].mean(1) - diag_odd[:, (GROUP == 2) | (GROUP == 3)].mean(1)
    shift = most_similar(even) - np.arange(16)  # from the corresponding layer to the most similar one
    first, last = shift[:, [3, 7, 13]], shift[:, [6, 12, 15]]  # layers of BG2, BG3, BG4
    stalled = ((first < 0) & (first >= [-3, -4, -6])).sum(1)  # into the group just left, no further
    stalled = np.where(np.isnan(first).any(1), np.nan, stalled)
    fall3, fall4 = diag_even[:, 7] - diag_even[:, 12], diag_even[:, 12] - diag_even[:, 15]
    found = {
        "2a common primitives: odd layers are similar in BG1": {
            "odd diagonal, BG1 - BG2-4": (early - later, 0, np.inf)},
        "2b dissimilar residuals beyond BG1": {
            "odd diagonal, ratio BG2-4 / BG1": (later / early, -np.inf, 0.5),
            "BG2-4": (later, -np.inf, np.inf)},
        "2c even layers are similar along the diagonal": {
            "diagonal, even BG1-3 - odd BG2-3": (similar, 0, np.inf)},
        "2d stalling: entering a block group SimCLR stays with layers of the one just left": {
            "groups of 3 entered behind": (stalled, 1.5, np.inf)},
        "2e catching up later in the group": {
            "most similar layer towards the diagonal, BG2": ((last - first)[:, 0], 0, np.inf),
            "BG3": ((last - first)[:, 1], 0, np.inf)},
        "2f rapid divergence in the final block group": {
            "even diagonal, fall over BG4": (fall4, 0, np.inf),
            "more than over BG3 by": (fall4 - fall3, 0, np.inf)}}
    if min(len(arrays[f"dominance_{method}"]) for method in METHODS) > 1:  # else it is one with itself
        both = min(len(arrays[f"pairs_{method}"]) for method in METHODS)  # pairs of seeds that both have
        simclr, supervised = (arrays[f"pairs_{method}"][:both, ~SAME_GROUP].mean(1) for method in METHODS)
        found["4d SimCLR disagrees even more across block groups than supervision"] = {
            "across block groups, supervised - SimCLR": (supervised - simclr, 0, np.inf)}
    return found


def plot(arrays):
    """The three panels, from what the .npz holds."""
    pairs, rows, columns = arrays["pairs"], arrays["label_simclr"], arrays["label_supervised"]
    mean, even = pairs.mean(0), pairs[:, EVEN, EVEN]
    count = "one pair" if len(pairs) == 1 else f"mean of {len(pairs)} pairs"
    title = f"CKA between {rows} and {columns} layers: {count} of {arrays['kind']}networks"
    figure, axes = new_figure(arrays, title, panels=3)
    cka_heatmaps(axes[:2], [mean[ODD, ODD], mean[EVEN, EVEN]], ["odd layers", "even layers"],
                 f"{columns} layer", f"{rows} layer", arrays["debiased"])
    dots = most_similar(mean[EVEN, EVEN])
    axes[1].plot(dots, np.arange(16), "o", color="white", markeredgecolor="black", markersize=5)
    diagonal = even.diagonal(axis1=1, axis2=2)
    at_dots = even[:, np.arange(16), np.nan_to_num(dots).astype(int)]  # a row without a dot is NaN everywhere
    depth_lines(axes[2], diagonal, "tab:green", "diag: corresponding layer")
    depth_lines(axes[2], at_dots, "tab:red", "max: most similar layer", marker="s")
    mark_block_groups(axes[2], 16)
    axes[2].set(title=f"{rows} even layers", xlabel=f"{rows} layer", ylabel=f"CKA with {columns} layer",
                ylim=(min(0, axes[2].dataLim.y0), 1))  # debiased CKA may be negative
    axes[2].legend(loc="lower left")
    return figure


def main():
    args = figure_parser(__doc__).parse_args()
    if args.replot:
        return replot(args, "fig2", claims, plot)
    networks, data, about = open_study(args, METHODS)
    report(args, "fig2", claims, plot, about | compare_methods(args, networks, data.test_images))


if __name__ == "__main__":
    with user_errors():
        main()
