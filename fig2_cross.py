"""Figure 2: CKA between the layers of SimCLR and of supervised networks.

    python fig2_cross.py --checkpoints checkpoints/paper

Left, middle: odd and even layers, rows SimCLR, columns supervised; a white dot on the supervised layer most similar to
each SimCLR even layer. Right: that similarity (max) and the one to the corresponding layer (diag). Means over all pairs
of a SimCLR and a supervised network. Look for: a bright even diagonal over dark odd layers, dots left of the diagonal
where a block group begins, and the fall in BG4. Writes fig2.*: `odd`, `even` (16, 16), `diag`, `max`, `argmax` (16,),
`pairs` (P, 32, 32), `dominance_simclr`, `dominance_supervised` (S, 32) and the findings 2a-2f; `pairs_other` are those of
the other estimator, debiased or biased.
"""

import numpy as np

from common import (EVEN, GROUP, LAYERS, ODD, add_colorbar, cka_heatmap, depth_lines, figure_parser, finding, layer_names,
                    mark_block_groups, measure, network_source, new_figure, open_study, plural, replot, report,
                    user_errors)


def compare_methods(study):
    """pairs (2, P, 32, 32), rows SimCLR and columns supervised, by both estimators; each method's dominance (S, 32)."""
    models = study.networks["simclr"] + study.networks["supervised"]
    cka, dominance = measure(study, [network_source(m, study.images, layers=slice(0, 32)) for m in models],
                             layer_names(models, LAYERS))
    count, split = len(models), len(study.networks["simclr"])
    blocks = cka.reshape(2, count, 32, count, 32).swapaxes(2, 3)  # (2, S, S, 32, 32)
    dominance = dominance.reshape(count, 32)
    return blocks[:, :split, split:].reshape(2, -1, 32, 32), dominance[:split], dominance[split:]


def findings(pairs):
    """Claims 2a-2f, each quantity per pair of networks. Layers count from 1 in the claims, from 0 here."""
    odd, even = pairs[:, ODD, ODD], pairs[:, EVEN, EVEN]
    diag_odd, diag_even = (m.diagonal(axis1=1, axis2=2) for m in (odd, even))
    early, later = diag_odd[:, GROUP == 1].mean(1), diag_odd[:, GROUP > 1].mean(1)
    shift = np.where(np.isnan(even).any(2), np.nan, even.argmax(2) - np.arange(16))  # most similar supervised layer - own
    entry, exit_ = shift[:, [3, 7, 13]], shift[:, [6, 12, 15]]
    fall = {3: diag_even[:, 7] - diag_even[:, 12], 4: diag_even[:, 12] - diag_even[:, 15]}
    similar = diag_even[:, GROUP < 4].mean(1) - diag_odd[:, (GROUP == 2) | (GROUP == 3)].mean(1)
    return [
        finding("2a", "common primitives: odd layers are similar in BG1", ("BG1 - BG2-4", early - later, 1, 0)),
        finding("2b", "dissimilar residuals beyond BG1", ("ratio BG2-4 / BG1", later / early, -1, 0.5), ("BG2-4", later, 0, 0)),
        finding("2c", "even layers are similar along the diagonal", ("even BG1-3 - odd BG2-3", similar, 1, 0)),
        finding("2d", "stalling: entering a block group SimCLR stays with earlier supervised layers",
                ("groups of 3 entered behind", np.where(np.isnan(entry).any(1), np.nan, (entry < 0).sum(1)), 1, 1.5)),
        finding("2e", "catching up later in the group", *[(f"BG{g}", (exit_ - entry)[:, g - 2], 1, 0) for g in (2, 3)]),
        finding("2f", "rapid divergence in the final block group", ("fall over BG4", fall[4], 1, 0),
                ("more than over BG3 by", fall[4] - fall[3], 1, 0))]


def plot(arrays):
    """The three panels, from what the .npz holds."""
    figure, axes = new_figure(3)
    pairs, rows, columns = arrays["pairs"], arrays["name_simclr"], arrays["name_supervised"]
    mean = pairs.mean(0)
    for ax, kind, name in zip(axes, (ODD, EVEN), ("odd", "even")):
        image = cka_heatmap(ax, mean[kind, kind], f"{name} layers", f"{columns} layer", f"{rows} layer")
    axes[1].plot(mean[EVEN, EVEN].argmax(1), np.arange(16), "o", color="white", markeredgecolor="black", markersize=5)
    add_colorbar(figure, image, axes[:2], arrays["debiased"])
    even = pairs[:, EVEN, EVEN]
    depth_lines(axes[2], even.diagonal(axis1=1, axis2=2), "tab:green", "diag")
    most_similar = mean[EVEN, EVEN].argmax(1)  # the dots; their mean over pairs is the stored `max`
    depth_lines(axes[2], even[:, np.arange(16), most_similar], "tab:red", "max", marker="s")
    mark_block_groups(axes[2])
    axes[2].set(title=f"{rows} even layers", xlabel=f"{rows} layer", ylabel=f"CKA with {columns} layer",
                ylim=(min(0, np.nanmin(even.diagonal(axis1=1, axis2=2))), 1))  # debiased CKA may be negative
    axes[2].legend(loc="lower left")
    count = f"mean of {plural(len(pairs), 'pair')} of {arrays['kind']}networks"
    figure.suptitle(f"CKA between {rows} and {columns} layers: {count}")
    return figure


def main():
    args = figure_parser(__doc__).parse_args()
    if args.replot:
        return replot(args, "fig2", plot)
    study = open_study(args, ["simclr", "supervised"])
    both, dominance_simclr, dominance_supervised = compare_methods(study)
    pairs, other = both
    even = pairs.mean(0)[EVEN, EVEN]
    arrays = {"odd": pairs.mean(0)[ODD, ODD], "even": even, "diag": even.diagonal(), "max": even.max(1),
              "argmax": even.argmax(1), "pairs": pairs, "pairs_other": other, "layers": np.array(LAYERS),
              "dominance_simclr": dominance_simclr, "dominance_supervised": dominance_supervised}
    report(study, "fig2", plot, arrays, findings(pairs), findings(other))


if __name__ == "__main__":
    with user_errors():
        main()
