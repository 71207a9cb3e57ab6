"""Figure 1: CKA between the layers of SimCLR networks of different seeds; Figure 4: the same for supervision.

    python fig1_internal.py --checkpoints checkpoints/paper
    python fig1_internal.py --checkpoints checkpoints/paper --method supervised     # Figure 4, App. B

Panels: all 32 layers, the 16 odd (residual), the 16 even (post-residual); mean over all pairs of seeds.
Look for: even layers similar along a broad diagonal, odd ones to little but themselves, blocks within block
groups. Writes fig1.* or fig4.*: `cka` (32, 32), `pairs` (P, 32, 32), `layers`, `dominance` (S, 32),
`networks`; `<key>_debiased` by debiased CKA, `pairs*_left_out` (10, P, 32, 32) without each tenth of the
images. Judges claims 1a-1c or 4a-4c.
"""

import functools

import numpy as np

from common import (EVEN, LAYERS, NAMES, ODD, SAME_GROUP, UserError, cka_heatmaps, figure_parser, measure,
                    network_source, new_figure, open_study, pair_matrices, replot, report, user_errors)

NUMBERS = {"simclr": 1, "supervised": 4}  # of the figures


def compare_seeds(args, models, images):
    """The arrays of the figure: rows the layers of one seed, columns of another."""
    cka, dominance = measure(args, len(images), [network_source(model, images) for model in models])
    arrays = {"layers": np.array(LAYERS), "networks": np.array([model.name for model in models]),
              "dominance": dominance.reshape(-1, 32)}
    for ending, values in cka.items():
        arrays[f"pairs{ending}"] = pair_matrices(values, range(len(models)))
    for ending in ("", "_debiased"):
        arrays[f"cka{ending}"] = arrays[f"pairs{ending}"].mean(0)
    return arrays


def mean_over(matrices, mask):
    """Mean over the True cells of `mask` of each of matrices (P, n, n)."""
    return matrices[:, mask].mean(1)


def claims(method, arrays):
    """Claims 1a-1c or 4a-4c: {claim: {quantity: (a value per pair of networks, low, high)}}."""
    pairs, name, number = arrays["pairs"], NAMES[method], NUMBERS[method]
    odd, even = pairs[:, ODD, ODD], pairs[:, EVEN, EVEN]
    i, j = np.indices((16, 16))
    neighbours = mean_over(even, abs(i - j) == 1) - mean_over(odd, abs(i - j) == 1)
    itself = {kind: mean_over(m, i == j) - mean_over(m, i != j) for kind, m in (("odd", odd), ("even", even))}
    groups = mean_over(pairs, SAME_GROUP & ~np.eye(32, dtype=bool)) - mean_over(pairs, ~SAME_GROUP)
    return {
        f"{number}a {name}: neighbouring even layers are similar, odd ones are not": {
            "neighbours, even - odd": (neighbours, 0, np.inf)},
        f"{number}b {name}: odd layers are similar largely only to themselves": {
            "odd, diagonal - rest": (itself["odd"], 0, np.inf),
            "more than even by": (itself["odd"] - itself["even"], 0, np.inf)},
        f"{number}c {name}: similarity is higher within block groups than across": {
            "block groups, within - across": (groups, 0, np.inf)}}


def plot(method, arrays):
    """The three panels, from what the .npz holds."""
    mean, networks, label = arrays["pairs"].mean(0), arrays["networks"], arrays[f"label_{method}"]
    what = f"{label} networks: mean of {len(arrays['pairs'])} pairs"
    if len(networks) < 3:
        first, *second = (name.removeprefix("untrained ") for name in networks)
        what = f"{first} and {' '.join(second) or 'itself'}"
    title = f"CKA between layers of {arrays['kind']}{what}"
    figure, axes = new_figure(arrays, title, panels=3)
    titles = [f"{label}, {layers} layers" for layers in ("all", "odd", "even")]
    down, across = networks if len(networks) == 2 else (label, label)  # one pair: which is which
    cka_heatmaps(axes, [mean, mean[ODD, ODD], mean[EVEN, EVEN]], titles, f"{across} layer", f"{down} layer",
                 arrays["debiased"])
    return figure


def main():
    parser = figure_parser(__doc__)
    parser.add_argument("--method", choices=tuple(NAMES),
                        help="supervised: Figure 4 (default: simclr, or that of the files)")
    args = parser.parse_args()
    method = args.method or ("supervised" if args.supervised and not args.simclr else "simclr")
    other_method = "supervised" if method == "simclr" else "simclr"
    if getattr(args, other_method):
        raise UserError(f"--{other_method}: this figure is of {NAMES[method]} networks only; leave it out, "
                        f"or give --method {other_method}")
    figure = f"fig{NUMBERS[method]}", functools.partial(claims, method), functools.partial(plot, method)
    if args.replot:
        return replot(args, *figure)
    networks, data, about = open_study(args, [method])
    if len(networks[method]) == 1:
        print("only one network: this compares it with itself, which the paper avoids; train another seed")
    report(args, *figure, about | compare_seeds(args, networks[method], data.test_images))


if __name__ == "__main__":
    with user_errors():
        main()
