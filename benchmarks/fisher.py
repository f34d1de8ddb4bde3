# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Fisher merging of networks: three experiments on images of digits.

1. *Different tasks*: one network, trained a little on all ten digits, is trained further by parties
   with tasks of their own: to tell five digits apart, or two; to tell primes, or digits of at least
   five. Each has a head of its own, and the rest is merged, as in the paper (a to c); or one head
   is for all ten digits, of which each party has seen five (d).
2. *Different initialisations*: two parties train networks of their own, each on half of the images;
   their hidden units are in different orders.
3. *Robust fine-tuning*: a network that has seen images of all kinds is trained further on images of
   one kind, and merged with what it was. Here no λ is chosen on validation images: rows are at
   fixed ones, and "best sum" is at that which is best on the test images, for each method.

Run ``python benchmarks/fisher.py``, on scikit-learn's digits, or ``--data FOLDER``, where FOLDER
has ``mnist.npz`` (arrays ``x_train``, ``y_train``, ``x_test``, ``y_test``). ``--out FOLDER`` draws
the curves along λ.

Source: Matena & Raffel, *Merging Models with Fisher-Weighted Averaging* (NeurIPS 2022), sec. 4;
for the third experiment also Wortsman et al., *Robust fine-tuning of zero-shot models* (CVPR 2022),
whose WiSE-FT is the row "average"; for the second Ainsworth, Hayase & Srinivasa, *Git Re-Basin*
(ICLR 2023).
"""

from __future__ import annotations

import argparse
import copy
import itertools
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from networks import Images, show
from networks import load as load_mnist
from sklearn.datasets import load_digits
from torch import Tensor, nn

import pyro_fusion
from pyro_fusion import (
    Posterior,
    from_module,
    merge_modules,
    search_weights,
)

# The paper's floor of the Fisher information of one example, to which `num_data=1` scales it.
FLOOR = 1e-6
GRID = 21  # weights that are tried for two networks
SIMPLEX = 60  # and for more
SHIFTS = ("rotated", "moved", "noisy", "blurred", "faint")


@dataclass(frozen=True)
class Setting:
    """What is trained, and for how long.

    :ivar layers: hidden units. :ivar common: images in the first training, of the first and the
        third experiment. :ivar validation: images that choose λ.
    :ivar epochs: of the first training, and of a party's.
    :ivar fisher: images that a party's Fisher information is from, at most.
    """

    layers: tuple[int, ...]
    common: int
    validation: int
    epochs: tuple[int, int]
    batch: int
    fisher: int


@dataclass(frozen=True)
class Data:
    """The images of one seed."""

    common: Images
    train: Images
    validation: Images
    test: Images


def network(setting: Setting, side: int) -> nn.Module:
    """A perceptron."""
    sizes = (side**2, *setting.layers, 10)
    layers: list[nn.Module] = [nn.Flatten()]
    for n, m in itertools.pairwise(sizes):
        layers += [nn.Linear(n, m), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def train(
    module: nn.Module,
    images: Images,
    setting: Setting,
    epochs: int,
    seed: int,
    change: Callable[[Tensor], Tensor] | None = None,
    rate: float = 1e-3,
) -> nn.Module:
    """A copy of a module, trained further."""
    torch.manual_seed(seed)
    module = copy.deepcopy(module)
    optimiser = torch.optim.Adam(module.parameters(), rate)
    for _ in range(epochs):
        for index in torch.randperm(len(images.y)).split(setting.batch):
            x = images.x[index] if change is None else change(images.x[index])
            optimiser.zero_grad()
            F.cross_entropy(module(x), images.y[index]).backward()
            optimiser.step()
    return module


@torch.no_grad()
def accuracy(module: nn.Module | Sequence[nn.Module], images: Images) -> float:
    """In percent; of several modules that of their mean prediction."""
    modules = module if isinstance(module, Sequence) else [module]
    p = sum(m(images.x).softmax(-1) for m in modules)
    return 100 * float((p.argmax(-1) == images.y).float().mean())


def read(
    modules: Sequence[nn.Module],
    parts: Sequence[Images],
    setting: Setting,
    kind: str = "fisher",
    names: Sequence[str] | None = None,
) -> list[Posterior]:
    """The parties' posteriors. ``"fisher"`` and ``"empirical_fisher"`` are as the paper has them:
    the mean over examples, with its floor; ``"laplace"`` is what ``from_module`` does by default:
    the sum over all images, with a prior precision of one."""
    result = []
    for module, part in zip(modules, parts, strict=True):
        some = part.take(slice(0, setting.fisher))
        options: dict[str, Any] = {"num_data": len(part.y)}
        if kind != "laplace":
            options = {"curvature": kind, "prior_precision": 0.0, "floor": FLOOR, "num_data": 1}
        posterior = from_module(
            module, (some.x, some.y), "cross_entropy", parameters=names, **options
        )
        result.append(posterior)
    return result


# -- the methods -----------------------------------------------------------------------------------

Row = dict[str, float]
Measure = Callable[[nn.Module, str], Row]  # of a merged network, on "validation" or "test" images


@dataclass(frozen=True)
class Merge:
    """A way to merge: arguments of ``merge_modules``."""

    posteriors: Sequence[Posterior] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


def merges(
    modules: Sequence[nn.Module], parts: Sequence[Images], setting: Setting, names: Sequence[str]
) -> dict[str, Merge]:
    """The average, which takes all parameters for equally sure, and Fisher merging."""
    fisher, empirical, laplace = (
        read(modules, parts, setting, kind, names)
        for kind in ("fisher", "empirical_fisher", "laplace")
    )
    return {
        "average": Merge(),
        "Fisher": Merge(fisher),
        "Fisher, normalised": Merge(fisher, {"normalize": True}),
        "empirical Fisher": Merge(empirical),
        "Laplace": Merge(laplace),
    }


def merged_rows(
    modules: Sequence[nn.Module], ways: Mapping[str, Merge], measure: Measure, seed: int
) -> tuple[dict[str, Row], dict[str, np.ndarray]]:
    """Each way with equal weights and with those that are best on validation images; and, of two
    networks, the accuracy on test images along λ."""
    rows, curves = {}, {}
    number = GRID if len(modules) == 2 else SIMPLEX
    for name, way in ways.items():
        rows[name] = measure(merge_modules(modules, way.posteriors, **way.options), "test")
        tried: list[float] = []

        def score(module: nn.Module, tried: list[float] = tried) -> float:
            tried.append(measure(module, "test")["all"])
            return measure(module, "validation")["all"]

        found = search_weights(
            modules, score, way.posteriors, num_evaluations=number, seed=seed, **way.options
        )
        rows[f"{name}, best λ"] = measure(found.module, "test")
        if len(modules) == 2:
            curves[name] = np.array(tried)
    return rows, curves


# -- 1. different tasks ----------------------------------------------------------------------------


def split(parties: int, seed: int) -> list[Tensor]:
    """Tasks: some digits for each. For each digit its class in the task, or -1."""
    digits = np.random.default_rng(seed).permutation(10).reshape(parties, -1)
    tasks = torch.full((parties, 10), -1)
    for task, own in zip(tasks, digits, strict=True):
        task[own] = torch.arange(len(own))
    return list(tasks)


def questions(seed: int) -> list[Tensor]:
    """Tasks: is it prime, is it at least five. All digits are in both."""
    prime = torch.isin(torch.arange(10), torch.tensor([2, 3, 5, 7]))
    return [prime.long(), (torch.arange(10) >= 5).long()]


def of_task(images: Images, task: Tensor, own_head: bool) -> Images:
    """The images of a task, with their classes there, or with their digits."""
    part = images.take(task[images.y] >= 0)
    return Images(part.x, task[part.y]) if own_head else part


def tasks(
    data: Data, setting: Setting, task: Sequence[Tensor], own_heads: bool, seed: int
) -> tuple[dict[str, Row], dict[str, np.ndarray]]:
    """Parties that train one network further, each on its task. With heads of their own what is
    merged is the rest, as in the paper, and each task is measured with its head."""
    side = data.test.x.shape[-1]
    torch.manual_seed(seed)
    start = train(network(setting, side), data.common, setting, setting.epochs[0], seed)
    parts = [of_task(data.train, t, own_heads) for t in task]
    modules: list[nn.Module] = []
    for s, part in enumerate(parts):
        module = copy.deepcopy(start)
        if own_heads:
            module = with_head(module, part, setting, seed + s)
        modules.append(train(module, part, setting, setting.epochs[1], seed + s))
    shared = [m[:-1] if own_heads else m for m in modules]  # type: ignore[index]
    tests = {
        "validation": [of_task(data.validation, t, own_heads) for t in task],
        "test": [of_task(data.test, t, own_heads) for t in task],
    }

    def measure(module: nn.Module, where: str) -> Row:
        heads = [m[-1:] if own_heads else nn.Identity() for m in modules]  # type: ignore[index]
        each = [
            accuracy(nn.Sequential(module, head), t)
            for head, t in zip(heads, tests[where], strict=True)
        ]
        counts = [len(t.y) for t in tests[where]]
        mean = float(np.average(each, weights=None if own_heads else counts))
        return {"all": mean, "worst task": min(each), "best task": max(each)}

    rows = {"start": measure(start[:-1] if own_heads else start, "test")}  # type: ignore[index]
    if own_heads:
        each = [accuracy(m, t) for m, t in zip(modules, tests["test"], strict=True)]
        rows["each for its task"] = {
            "all": float(np.mean(each)), "worst task": min(each), "best task": max(each)
        }  # fmt: skip
    else:
        alone = [measure(m, "test") for m in modules]
        rows["parties, mean"] = {k: float(np.mean([r[k] for r in alone])) for k in alone[0]}
        rows["one party with all data"] = measure(
            train(start, data.train, setting, setting.epochs[1], seed), "test"
        )
    names = [k for k, _ in shared[0].named_parameters()]
    ways = merges(modules, parts, setting, names)
    more, curves = merged_rows(shared, ways, measure, seed)
    return rows | more, curves


def with_head(module: nn.Module, part: Images, setting: Setting, seed: int) -> nn.Module:
    """With another head, which alone is trained at first."""
    torch.manual_seed(seed)
    module[-1] = nn.Linear(setting.layers[-1], int(part.y.max()) + 1)  # type: ignore[index,operator]
    module[:-1].requires_grad_(False)  # type: ignore[index]
    return train(module, part, setting, setting.epochs[1], seed).requires_grad_()


# -- 2. different initialisations ------------------------------------------------------------------


def initialisations(
    data: Data, setting: Setting, seed: int
) -> tuple[dict[str, Row], dict[str, np.ndarray]]:
    """Two networks that have nothing in common but their architecture."""
    side, half = data.test.x.shape[-1], len(data.train.y) // 2
    parts = [data.train.take(slice(0, half)), data.train.take(slice(half, None))]
    modules = []
    for s, part in enumerate(parts):
        torch.manual_seed(1000 * seed + s)
        modules.append(
            train(network(setting, side), part, setting, sum(setting.epochs), 1000 * seed + s)
        )

    images = {"validation": data.validation, "test": data.test}

    def measure(module: Any, where: str) -> Row:
        return {"all": accuracy(module, images[where])}

    alone = [measure(m, "test") for m in modules]
    rows = {"parties, mean": {k: float(np.mean([r[k] for r in alone])) for k in alone[0]}}
    rows["ensemble"] = measure(modules, "test")
    ways = {}
    for name, posteriors in (
        ("average", None),
        ("Fisher", read(modules, parts, setting)),
        ("Laplace", read(modules, parts, setting, "laplace")),
    ):
        ways[name] = Merge(posteriors)
        ways[f"{name}, aligned"] = Merge(posteriors, {"axes": "auto"})
    more, curves = merged_rows(modules, ways, measure, seed)
    return rows | more, curves


# -- 3. robust fine-tuning -------------------------------------------------------------------------


def shifted(x: Tensor, shift: str, generator: torch.Generator) -> Tensor:
    """Images of another kind, each by an amount of its own."""
    n, side = len(x), x.shape[-1]
    sign = torch.randint(2, (n,), generator=generator) * 2.0 - 1
    if shift in ("rotated", "moved"):
        angle = sign * (0.5 if shift == "rotated" else 0.0)
        move = sign * (0.3 if shift == "moved" else 0.0)
        cos, sin = angle.cos(), angle.sin()
        matrix = torch.stack([cos, -sin, move, sin, cos, -move], 1).reshape(n, 2, 3)
        grid = F.affine_grid(matrix, [n, 1, side, side], align_corners=False)
        return F.grid_sample(x, grid, align_corners=False)
    if shift == "noisy":
        return x + 0.4 * torch.randn(x.shape, generator=generator)
    if shift == "blurred":
        width = max(3, side // 9 * 2 + 1)
        return F.avg_pool2d(x, width, 1, width // 2, count_include_pad=False)
    return 0.35 * x  # faint


def all_kinds(x: Tensor) -> Tensor:
    """A batch of as many kinds as there are shifts, and plain images."""
    generator = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
    kind = torch.randint(len(SHIFTS) + 1, (len(x),), generator=generator)
    every = torch.stack([*(shifted(x, shift, generator) for shift in SHIFTS), x])
    return every[kind, torch.arange(len(x))]


def robustness(
    data: Data, setting: Setting, seed: int
) -> tuple[dict[str, Row], dict[str, np.ndarray]]:
    """Along λ: in-distribution and shifted accuracy."""
    side = data.test.x.shape[-1]
    torch.manual_seed(seed)
    start = train(
        network(setting, side), data.common, setting, 2 * setting.epochs[0], seed, all_kinds
    )
    tuned = train(start, data.train, setting, setting.epochs[1], seed)
    generator = torch.Generator().manual_seed(seed)
    tests = {"in": data.test}
    for shift in SHIFTS:
        tests[shift] = Images(shifted(data.test.x, shift, generator), data.test.y)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        broad = Images(all_kinds(data.common.x), data.common.y)
    modules, parts = [start, tuned], [broad, data.train]
    fisher, laplace = (read(modules, parts, setting, kind) for kind in ("fisher", "laplace"))

    def row(module: Any) -> Row:
        result = {k: accuracy(module, t) for k, t in tests.items()}
        result["shifted"] = float(np.mean([result[k] for k in SHIFTS]))
        return result

    rows, curves = {"pre-trained (λ = 0)": row(start), "fine-tuned (λ = 1)": row(tuned)}, {}
    for name, given in (("average", None), ("Fisher", fisher), ("Laplace", laplace)):
        along = []
        for x in np.linspace(0, 1, GRID):
            merged = merge_modules(modules, given, weights=[1 - x, x], normalize=bool(given))
            along.append(row(merged))
            if round(10 * x, 6) in (2, 4, 5, 6, 8):
                rows[f"{name}, λ = {x:.1f}"] = along[-1]
        curves[name] = np.array([[r["in"], r["shifted"]] for r in along])
        # The most that is to be had at the shifts, by what it costs in distribution. The λ is the
        # best one on the test images, so a bound for all three, and no choice one could have made.
        best = max(range(GRID), key=lambda i, a=along: a[i]["in"] + a[i]["shifted"])  # type: ignore[misc]
        rows[f"{name}, best sum"] = along[best]
    return rows, curves


# -- the program -----------------------------------------------------------------------------------


def load(folder: Path | None) -> tuple[Images, Images | None]:
    """Training images and test images, ``[N, 1, side, side]``, or all images and None."""
    if folder is None:
        digits = load_digits()
        return Images(
            torch.tensor(digits.images / 16, dtype=torch.float32).unsqueeze(1),
            torch.tensor(digits.target),
        ), None
    train, test = (Images(i.x.unflatten(1, (1, 28, 28)), i.y) for i in load_mnist(folder))
    return train, test


def deal(images: Images, test: Images | None, setting: Setting, seed: int) -> Data:
    """The images of one seed."""
    order = np.random.default_rng(seed).permutation(len(images.y))
    if test is None:
        test, order = images.take(order[:400]), order[400:]
    common, validation, rest = np.split(
        order, [setting.common, setting.common + setting.validation]
    )
    return Data(images.take(common), images.take(rest), images.take(validation), test)


def print_table(title: str, table: Mapping[str, Sequence[Row]]) -> None:
    """One experiment, accuracies in percent."""
    columns = list(next(iter(table.values()))[0])
    wide = max(len(name) for name in table) + 2
    print(f"\n{title}\n{'':{wide}}{''.join(c.rjust(15) for c in columns)}")
    for name, rows in table.items():
        cells = [show([r[c] for r in rows], 2).rjust(15) for c in columns]
        print(f"{name:{wide}}{''.join(cells)}")


def compare(table: Mapping[str, Sequence[Row]], better: str, worse: str, column: str) -> None:
    """The difference of two rows, seed by seed."""
    d = np.array([a[column] - b[column] for a, b in zip(table[better], table[worse], strict=True)])
    error = f" ± {d.std(ddof=1) / len(d) ** 0.5:.2f} (standard error)" if len(d) > 1 else ""
    print(
        f"{better} - {worse}, {column}: {d.mean():+.2f}{error}, better in {int((d > 0).sum())} of "
        f"{len(d)} seeds"
    )


def draw_picture(path: Path, curves: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    """Accuracy along λ; of the third experiment, shifted against in-distribution accuracy."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    columns = min(3, len(curves))
    rows = -(-len(curves) // columns)
    figure, panels = plt.subplots(rows, columns, figsize=(4.6 * columns, 4 * rows), squeeze=False)
    for ax in panels.flat[len(curves) :]:
        ax.set_visible(False)
    styles = {
        "average": "0.4",
        "Fisher": "#0072B2",
        "empirical Fisher": "#009E73",
        "Laplace": "#D55E00",
    }
    for ax, (title, lines) in zip(panels.flat, curves.items(), strict=False):
        for name, line in lines.items():
            first, _, how = name.partition(", ")
            style = {"color": styles[first], "ls": "--" if how == "normalised" else "-"}
            style["lw"] = 2.5 if how == "aligned" else 1.5
            mean, sd = line.mean(0), line.std(0)
            if mean.ndim == 2:
                ax.plot(mean[:, 0], mean[:, 1], marker=".", label=name, **style)
                for i in (0, GRID - 1):
                    ax.annotate(f"λ = {i // (GRID - 1)}", mean[i], fontsize=8)
                continue
            x = np.linspace(0, 1, GRID)
            ax.plot(x, mean, label=name, **style)
            ax.fill_between(x, mean - sd, mean + sd, color=style["color"], alpha=0.12, lw=0)
        ax.set_title(title, fontsize=10)
        two = next(iter(lines.values())).ndim == 3
        ax.set_xlabel("in-distribution accuracy, %" if two else "λ, weight of the second network")
        ax.set_ylabel("mean accuracy under shifts, %" if two else "mean accuracy, %")
        ax.legend(fontsize=8, frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(arguments)
    torch.set_num_threads(args.threads)
    images, test = load(args.data)
    if args.data is not None:
        setting = Setting((100, 100), 500, 2000, (20, 5), 64, 1000)
    else:
        setting = Setting((64, 64), 100, 200, (100, 30), 32, 500)
    if args.small:
        setting = Setting((16, 16), 100, 200, (30, 5), 32, 100)
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    print(f"pyro_fusion {pyro_fusion.__version__}, Python {platform.python_version()}", end="")
    for package in ("torch", "scikit-learn", "numpy"):
        print(f", {package} {version(package)}", end="")
    name = "scikit-learn's digits" if args.data is None else "MNIST"
    print(f"; seeds {seeds[0]} to {seeds[-1]}; {name}, {setting}")

    experiments: dict[str, Callable[[Data, int], Any]] = {
        "1a. two tasks: five digits each": lambda d, s: tasks(d, setting, split(2, s), True, s),
        "1b. five tasks: two digits each": lambda d, s: tasks(d, setting, split(5, s), True, s),
        "1c. two tasks: prime, at least 5": lambda d, s: tasks(d, setting, questions(s), True, s),
        "1d. five digits each, one head": lambda d, s: tasks(d, setting, split(2, s), False, s),
        "2. different initialisations": lambda d, s: initialisations(d, setting, s),
        "3. robust fine-tuning": lambda d, s: robustness(d, setting, s),
    }
    experiments = {k: v for k, v in experiments.items() if k.startswith(tuple(args.only))}
    curves: dict[str, dict[str, np.ndarray]] = {}
    for title, experiment in experiments.items():
        table: dict[str, list[Row]] = {}
        lines: dict[str, list[np.ndarray]] = {}
        began = time.perf_counter()
        for seed in seeds:
            rows, found = experiment(deal(images, test, setting, seed), seed)
            for key, row in rows.items():
                table.setdefault(key, []).append(row)
            for key, line in found.items():
                lines.setdefault(key, []).append(line)
            print(title, seed, f"{time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
        print_table(title, table)
        if title.startswith("1"):
            compare(table, "Fisher", "average", "all")
            compare(table, "Fisher, best λ", "average, best λ", "all")
        elif title.startswith("2"):
            compare(table, "average, aligned", "average", "all")
            compare(table, "Fisher, aligned", "Fisher", "all")
        else:
            compare(table, "Fisher, best sum", "average, best sum", "in")
            compare(table, "Fisher, best sum", "average, best sum", "shifted")
        if lines:
            curves[title] = {k: np.stack(v) for k, v in lines.items()}
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        draw_picture(args.out / "fisher.png", curves)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Fisher merging; see the top of this file.")
    parser.add_argument("--data", type=Path, help="folder with mnist.npz; else the digits")
    parser.add_argument("--out", type=Path, help="folder for the picture, fisher.png")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", default=["1", "2", "3"], help="as 1a 2")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--small", action="store_true", help="smaller networks, trained shortly")
    return parser


if __name__ == "__main__":
    main()
