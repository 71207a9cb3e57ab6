"""Figure 1: CKA between the layers of SimCLR networks of different initialisation; Figure 4: the same for supervision.

    python fig1_internal.py --checkpoints checkpoints/paper
    python fig1_internal.py --checkpoints checkpoints/paper --method supervised     # Figure 4, App. B

Panels: all 32 layers, the 16 odd (residual), the 16 even (post-residual); mean over all pairs of seeds. Look for: even
layers similar along a broad diagonal, odd ones to little but themselves, blocks within block groups. Writes fig1.* or
fig4.*: `cka` (32, 32), `layers`, `pairs` (P, 32, 32), `dominance` (S, 32) and the findings 1a-1c or 4a-4d; `pairs_other` are
those of the other estimator, debiased or biased.
"""

import itertools

import numpy as np

from common import (EVEN, GROUP, LAYERS, NAMES, ODD, UserError, add_colorbar, cka_heatmap, figure_parser, finding,
                    kind_of, layer_names, measure, network_source, new_figure, open_study, plural, replot, report,
                    user_errors, warn)

NUMBERS = {"simclr": 1, "supervised": 4}  # of the figures
RIVAL = {"simclr": "supervised", "supervised": "simclr"}


def compare_seeds(study, models):
    """pairs (2, P, 32, 32): rows the layers of one seed, columns of another, by both estimators; and dominance (S, 32).

    One seed: with itself.
    """
    cka, dominance = measure(study, [network_source(m, study.images, layers=slice(0, 32)) for m in models],
                             layer_names(models, LAYERS))
    count = len(models)
    blocks = cka.reshape(2, count, 32, count, 32).swapaxes(2, 3)  # (2, S, S, 32, 32)
    pairs = list(itertools.combinations(range(count), 2)) or [(0, 0)]
    return np.stack([blocks[:, i, j] for i, j in pairs], 1), dominance.reshape(count, 32)


def mean_over(matrices, mask):
    """Mean over the True cells of `mask` of each of matrices (P, n, n)."""
    return matrices[:, mask].mean(1)


def structure(pairs):
    """The quantities of claims a to c, each (P,), and the mean similarity across block groups."""
    odd, even = pairs[:, ODD, ODD], pairs[:, EVEN, EVEN]
    i, j = np.indices((16, 16))
    neighbours, itself, others = abs(i - j) == 1, i == j, i != j
    group = np.repeat(GROUP, 2)
    same, own = group[:, None] == group, np.eye(32, dtype=bool)
    contrast = {name: mean_over(m, itself) - mean_over(m, others) for name, m in (("odd", odd), ("even", even))}
    across = mean_over(pairs, ~same)
    return {"a": mean_over(even, neighbours) - mean_over(odd, neighbours), "b": contrast["odd"],
            "b_even": contrast["odd"] - contrast["even"], "c": mean_over(pairs, same & ~own) - across, "across": across}


def findings(method, pairs, rival=None):
    """Claims 1a-1c (or 4a-4c); with the `pairs` of the other method, `rival`, also 4d."""
    s, name, number = structure(pairs), NAMES[method], NUMBERS[method]
    found = [finding(f"{number}a", f"{name}: neighbouring even layers are similar, odd ones are not",
                    ("even - odd", s["a"], 1, 0)),
            finding(f"{number}b", f"{name}: odd layers are similar largely only to themselves",
                    ("diagonal - rest, odd", s["b"], 1, 0), ("more than even by", s["b_even"], 1, 0)),
            finding(f"{number}c", f"{name}: similarity is higher within block groups than across",
                    ("within - across", s["c"], 1, 0))]
    if rival is not None:
        count = min(len(pairs), len(rival))  # pairs of seeds that both methods have
        across = {method: s["across"][:count]}
        across = {m: across.get(m, structure(rival)["across"][:count]) for m in NAMES}
        found.append(finding("4d", "SimCLR disagrees even more across block groups than supervision",
                             ("supervised - SimCLR, across", across["supervised"] - across["simclr"], 1, 0)))
    return found


def other_method(study, method):
    """(2, P, 32, 32) of the other method's figure in the same folder, for claim 4d; Nones if not there or not comparable."""
    path = study.out / f"fig{NUMBERS[RIVAL[method]]}.npz"
    if not path.exists():
        return None, None
    try:
        with np.load(path, allow_pickle=False) as saved:
            made = int(saved["samples"]), bool(saved["debiased"]), str(saved["data"]), str(saved["kind"])
            same = made == (len(study.images), study.args.debiased, study.args.data, kind_of(study.args))
            same = same and str(saved[f"name_{RIVAL[method]}"]) == NAMES[RIVAL[method]] and study.names[method] == NAMES[method]
            both = np.stack([saved["pairs"], saved["pairs_other"]])
            return both if same and both.shape[2:] == (32, 32) else (None, None)
    except Exception as error:  # a damaged file must not cost this figure
        warn(f"{path}: not readable ({error}); claim 4d is left out")
        return None, None


def plot(arrays):
    """The three panels, from what the .npz holds."""
    figure, axes = new_figure(3)
    pairs, networks = arrays["pairs"], arrays["networks"]
    mean, name = pairs.mean(0), next(str(arrays[key]) for key in ("name_simclr", "name_supervised") if key in arrays)
    what = f"{networks[0]} with itself" if len(networks) == 1 else f"mean of {plural(len(pairs), 'pair')}"
    for ax, matrix, layers, per_block in zip(axes, (mean, mean[ODD, ODD], mean[EVEN, EVEN]), ("all", "odd", "even"), (2, 1, 1)):
        image = cka_heatmap(ax, matrix, f"{name}, {layers} layers", f"{name} layer", f"{name} layer", per_block)
    figure.suptitle(f"CKA between layers of {arrays['kind']}{name} networks: {what}")
    add_colorbar(figure, image, axes, arrays["debiased"])
    return figure


def main():
    parser = figure_parser(__doc__)
    parser.add_argument("--method", choices=tuple(NAMES), help="supervised: Figure 4 (default: simclr, or that of the files)")
    args = parser.parse_args()
    method = args.method or ("supervised" if args.supervised and not args.simclr else "simclr")
    name, rival = f"fig{NUMBERS[method]}", RIVAL[method]
    if getattr(args, rival):
        raise UserError(f"--{rival}: this figure is of {NAMES[method]} networks only; leave it out, or give --method {rival}")
    if args.replot:
        return replot(args, name, plot)
    study = open_study(args, [method])
    models = study.networks[method]
    if len(models) == 1:
        print("only one network: this compares it with itself, which the paper avoids; train another seed")
    both, dominance = compare_seeds(study, models)
    pairs, other = both
    claims, others = (findings(method, p, rival) for p, rival in zip(both, other_method(study, method)))
    arrays = {"cka": pairs.mean(0), "pairs": pairs, "pairs_other": other, "layers": np.array(LAYERS), "dominance": dominance,
              "networks": np.array([m.name for m in models])}
    report(study, name, plot, arrays, claims, others)


if __name__ == "__main__":
    with user_errors():
        main()
