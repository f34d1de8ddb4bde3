# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The demo: handwritten digits, split over parties that each see only half of the ten.

Each party clusters its own images with a Bayesian Gaussian mixture, fitted by SVI, and hands over
nothing but its posterior. The posteriors are fused: nobody says which component of one party is
which of another, nor how many there are in all.

What the parties have in common was agreed on beforehand: the model, and the principal components
that the images are reduced to. These come from 250 images that belong to no party.

Needs scikit-learn for the images and matplotlib for the picture; both are imported when used.
"""

from __future__ import annotations

import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal, init_to_value
from torch import Tensor
from tqdm import tqdm

from pyro_fusion.cli.digits import NUM_DIGITS, Digits, load
from pyro_fusion.errors import ParameterError
from pyro_fusion.families import Factor
from pyro_fusion.fusion.fuse import fuse
from pyro_fusion.fusion.result import Fusion
from pyro_fusion.posterior import Posterior, PosteriorGuide
from pyro_fusion.readers.pyro import from_guide

__all__ = ["DemoResult", "DemoRow", "Digits", "fit", "load", "main", "mixture"]

# The first one is drawn. The images of the parties are independent given the model's parameters,
# so that the product is Bayes' rule here.
_POOLINGS = ("product", "inclusive", "exclusive")


# -- what each party does ----------------------------------------------------------------------


def mixture(data: Tensor, num_components: int) -> None:
    """A Bayesian mixture of Gaussians with diagonal covariances, its assignments summed out.

    :param data: ``[N, D]``.
    """
    dim = data.shape[-1]
    weights = pyro.sample("weights", dist.Dirichlet(data.new_ones(num_components)))
    with pyro.plate("component", num_components):
        loc = pyro.sample("loc", dist.Normal(data.new_zeros(dim), 3.0).to_event(1))
        scale = pyro.sample("scale", dist.LogNormal(data.new_full((dim,), -1.0), 0.7).to_event(1))
    with pyro.plate("data", len(data)):
        component = dist.Normal(loc, scale).to_event(1)
        pyro.sample("x", dist.MixtureSameFamily(dist.Categorical(weights), component), obs=data)


def fit(
    data: Tensor,
    num_components: int,
    *,
    seed: int = 0,
    steps: int = 400,
    on_step: Callable[[], object] | None = None,
) -> Posterior:
    """Fit :func:`mixture` to ``data``, ``[N, D]``, by SVI with an ``AutoNormal`` that starts at
    k-means, and read its posterior. Leaves the global parameter store as it was."""
    guide = AutoNormal(
        mixture, init_loc_fn=init_to_value(values=_kmeans(data, num_components, seed))
    )
    optimizer = pyro.optim.ClippedAdam({"lr": 0.03, "lrd": 0.1 ** (1 / steps)})
    svi = SVI(mixture, guide, optimizer, Trace_ELBO())
    # All guides of one model share the names of their parameters, so each fit has its own store.
    with pyro.get_param_store().scope():
        for _ in range(steps):
            svi.step(data, num_components)
            if on_step is not None:
                on_step()
        # The plate "component" labels the axis of loc and scale; that of weights is an event axis.
        return from_guide(guide, axes={"weights": ("component",)})


def _kmeans(data: Tensor, num_components: int, seed: int) -> dict[str, Tensor]:
    from sklearn.cluster import KMeans

    labels = KMeans(num_components, n_init=10, random_state=seed).fit_predict(data.numpy())
    members = torch.nn.functional.one_hot(torch.as_tensor(labels).long(), num_components).to(data)
    count = members.sum(0)
    loc = members.T @ data / count[:, None]
    variance = members.T @ data.square() / count[:, None] - loc.square()
    return {
        "weights": (count + 1) / (count + 1).sum(),
        "loc": loc,
        "scale": (variance.clamp(min=0) + 0.01).sqrt(),
    }


# -- how good a posterior is -----------------------------------------------------------------------


def _log_joint(z: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """``log p(x_n, component k | z)``: ``[*sample_shape, N, K]``."""
    component = dist.Normal(z["loc"].unsqueeze(-3), z["scale"].unsqueeze(-3)).to_event(1)
    return component.log_prob(x.unsqueeze(-2)) + z["weights"].unsqueeze(-2).log()


def _log_density(draws: Mapping[str, Tensor], x: Tensor) -> float:
    """Mean over points of ``log (1/M) Σ_m p(x | z_m)``, in nats."""
    each = _log_joint(draws, x).logsumexp(-1)
    return float((each.logsumexp(0) - math.log(len(each))).mean())


def _clusters(posterior: Posterior, x: Tensor) -> Tensor:
    """The likeliest component of each point under the central parameters: ``[N]``."""
    return _log_joint(PosteriorGuide(posterior).median(), x).argmax(-1)


def _rand_index(labels: np.ndarray, clusters: Tensor) -> float:
    from sklearn.metrics import adjusted_rand_score

    return float(adjusted_rand_score(labels, clusters.numpy()))


def _side_by_side(posteriors: Sequence[Posterior]) -> Posterior:
    """The components of all parties side by side, none matched: the baseline without fusion."""
    first = posteriors[0]
    factors = {s: Factor.cat([p.decomposed[s] for p in posteriors]) for s in first.decomposed}
    return Posterior(factors, first.axes, plates=first.plates)


# -- the result ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DemoRow:
    """One line of the table.

    :ivar log_density: held-out log predictive density per image, nats.
    :ivar atoms: number of components.
    :ivar rand_index: adjusted Rand index between clusters and digits, on held-out images.
    :ivar seconds: to fit, or to fuse alone.
    """

    name: str
    log_density: float
    atoms: int
    rand_index: float
    seconds: float


@dataclass(frozen=True)
class DemoResult:
    """The result of :func:`main`; its ``str()`` is the table.

    :ivar parties: one row for each party.
    :ivar fused: pooling -> row.
    :ivar unmatched: the row of all parties' components side by side, before fusion.
    :ivar pooled: the row of one fit to the images of all parties.
    :ivar fusion: the fusion by ``product``.
    :ivar picture: the file with the atoms, or None.
    """

    parties: list[DemoRow]
    fused: dict[str, DemoRow]
    unmatched: DemoRow
    pooled: DemoRow
    fusion: Fusion
    picture: str | None

    @property
    def best_party(self) -> DemoRow:
        """The party with the highest held-out density."""
        return max(self.parties, key=lambda row: row.log_density)

    def __str__(self) -> str:
        header = f"{'':<28}{'log density':>12}{'atoms':>8}{'Rand index':>12}{'seconds':>9}"
        rule = "-" * len(header)
        lines = [header, rule]
        for block in (self.parties, [self.unmatched, *self.fused.values()], [self.pooled]):
            lines += [_line(row) for row in block]
            lines.append(rule)
        return "\n".join(lines)


def _line(row: DemoRow) -> str:
    return (
        f"{row.name:<28}{row.log_density:>12.2f}{row.atoms:>8d}"
        f"{row.rand_index:>12.2f}{row.seconds:>9.2f}"
    )


# -- the demo --------------------------------------------------------------------------------------


def main(
    output: str | os.PathLike[str] | None = "pyro_fusion_demo.png",
    seed: int = 0,
    *,
    parties: int = 6,
    steps: int = 400,
    draws: int = 100,
    progress: bool = True,
) -> DemoResult:
    """Run the demo, print its table and draw its atoms. About half a minute.

    :param output: file of the picture; None draws none, and needs no matplotlib.
    :param seed: of the split and of every fit. The global generator of torch is left as it was.
    :param parties: even, at least 4.
    :param steps: of SVI, per fit.
    :param draws: from a posterior, for its predictive density.
    :param progress: whether to show a progress bar on the terminal.
    :raises ImportError: if scikit-learn or matplotlib is missing, with what to install.
    :raises ParameterError: for a number of parties that does not split the digits, or a file that
        no picture can be written to.
    """
    _require("sklearn", *([] if output is None else ["matplotlib"]))
    if output is not None:
        _check_output(os.fspath(output))
    with torch.random.fork_rng(devices=[]), _one_thread():
        torch.manual_seed(seed)
        return _run(output, seed, parties, steps, draws, progress)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Run torch on one thread: tensors of this size are slower on several, six times if cores are
    busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _run(
    output: str | os.PathLike[str] | None,
    seed: int,
    parties: int,
    steps: int,
    draws: int,
    progress: bool,
) -> DemoResult:
    data = load(parties=parties, seed=seed)

    def row(name: str, posterior: Posterior, seconds: float) -> DemoRow:
        return DemoRow(
            name,
            _log_density(posterior.sample((draws,)), data.test),
            posterior.components("component"),
            _rand_index(data.labels, _clusters(posterior, data.test)),
            seconds,
        )

    total = (parties + 1) * steps + len(_POOLINGS)
    with tqdm(total=total, disable=not progress, leave=False, unit="step") as bar:

        def fitted(name: str, x: Tensor, num_components: int) -> tuple[Posterior, DemoRow]:
            bar.set_description(name)
            start = time.perf_counter()
            posterior = fit(x, num_components, seed=seed, steps=steps, on_step=bar.update)
            return posterior, row(name, posterior, time.perf_counter() - start)

        posteriors, party_rows = [], []
        for s, (x, seen) in enumerate(zip(data.parties, data.seen, strict=True)):
            name = f"party {s}, sees {_numbers(seen)}"
            posterior, party_row = fitted(name, x, len(seen))
            posteriors.append(posterior)
            party_rows.append(party_row)

        together = _side_by_side(posteriors)
        count = together.components("component")
        unmatched_row = row(f"all {count} side by side", together, 0.0)
        # The product divides out the prior that all parties share: that of their model.
        prior = partial(mixture, data.test, len(data.seen[0]))
        fusions, fused_rows = {}, {}
        for pooling in _POOLINGS:
            bar.set_description(f"fusing, {pooling}")
            start = time.perf_counter()
            with warnings.catch_warnings():  # the report says it, below the table
                warnings.filterwarnings("ignore", "the posteriors do not tell", UserWarning)
                fusion = fuse(posteriors, pooling=pooling, prior=prior, seed=seed)
            seconds = time.perf_counter() - start
            if fusion.interrupted:  # here not its best so far is wanted, but an end
                raise KeyboardInterrupt
            fusions[pooling] = fusion
            fused_rows[pooling] = row(f"fused, {pooling}", fusion.posterior, seconds)
            bar.update()

        _, pooled_row = fitted("one fit to all the data", torch.cat(data.parties), NUM_DIGITS)

    fusion = fusions[_POOLINGS[0]]
    if output is not None:
        _draw(output, data, posteriors, fusion)
    picture = None if output is None else os.fspath(output)
    result = DemoResult(party_rows, fused_rows, unmatched_row, pooled_row, fusion, picture)
    sys.stdout.write(_report(result, data))
    return result


def _report(result: DemoResult, data: Digits) -> str:
    lines = [
        f"{len(data.parties)} parties with "
        f"{min(map(len, data.parties))} to {max(map(len, data.parties))} images each, of 5 of the "
        f"10 digits; scored on {len(data.test)} held-out images of all ten.",
        "",
        str(result),
        "",
        "log density: of a held-out image, in nats, mean; higher is better.",
        "Rand index: agreement of clusters and digits, adjusted; 1 is perfect, 0 is chance.",
        "seconds: to fit one model; of a fused row, to fuse alone. Fusion is given the parties'",
        "posteriors and nothing else: no image, and no number of atoms.",
        *_doubt(result.fusion),
    ]
    if result.picture is not None:
        lines += ["", f"The atoms, and which party has which: {result.picture}"]
    return "\n".join(lines) + "\n"


def _doubt(fusion: Fusion) -> list[str]:
    """Lines that say that the number of atoms is not sure; none where it is."""
    path = fusion.dispersion_path
    if path is None or path.identified:
        return []
    first, last = path.plateaus[0], path.plateaus[-1]
    return [
        "",
        "NOT SURE: how many atoms there are. The posteriors do not tell how far apart two",
        "components may be and still be the same. That is the dispersion T: as it grows from",
        f"{first.low:.2g} to {last.high:.2g}, {first.num_atoms} atoms become {last.num_atoms} "
        f"without a stop. The first fusion took T = {path.estimate:.2g},",
        "by a rule of thumb. To look at it, in Python: plot_dispersion_path(demo.main().fusion)",
    ]


def _require(*modules: str) -> None:
    missing = [m for m in modules if find_spec(m) is None]
    if missing:
        raise ImportError(
            f"the demo needs {' and '.join(missing)}: pip install 'pyro-fusion[sklearn,plot]'"
        )


def _check_output(output: str) -> None:
    """Check before the work that the picture can be written."""
    from matplotlib.backend_bases import FigureCanvasBase

    folder, name = os.path.split(output)
    known = FigureCanvasBase.get_supported_filetypes()
    ending = os.path.splitext(name)[1].removeprefix(".").lower()
    if ending not in known:
        raise ParameterError(f"{output}: a picture ends in one of {', '.join(sorted(known))}")
    if os.path.isdir(output):
        raise ParameterError(f"{output} is a folder")
    if folder and not os.path.isdir(folder):
        raise ParameterError(f"no such folder: {folder}")


# -- the picture -----------------------------------------------------------------------------------


def _draw(
    output: str | os.PathLike[str], data: Digits, posteriors: Sequence[Posterior], fusion: Fusion
) -> None:
    """Draw the atoms in the order of the digit that each stands for, by the held-out images."""
    from pyro_fusion.plotting import plot_atoms

    clusters = _clusters(fusion.posterior, data.test).numpy()
    counts = np.zeros((fusion.num_atoms, NUM_DIGITS), dtype=int)
    np.add.at(counts, (clusters, data.labels), 1)
    digit, total = counts.argmax(1), counts.sum(1)
    share = [
        f"{100 * c.max() / n:.0f} %" if n else "none" for c, n in zip(counts, total, strict=True)
    ]
    figure = plot_atoms(
        fusion,
        data.decode(fusion.posterior.factors["loc"].mean),
        [data.decode(p.factors["loc"].mean) for p in posteriors],
        order=np.lexsort((-total, digit)).tolist(),
        titles=[f"{d}: {s}" for d, s in zip(digit, share, strict=True)],
        names=[f"party {s}\nsees {_numbers(seen)}" for s, seen in enumerate(data.seen)],
        limits=(0, 1),
    )
    figure.suptitle(
        f"{sum(map(len, fusion.assignment))} components of {len(posteriors)} parties, fused into "
        f"{fusion.num_atoms} atoms"
    )
    figure.supxlabel(
        "Above each atom: the digit that most of its held-out images show, and their share.",
        fontsize=9,
    )
    figure.savefig(output, dpi=150)


def _numbers(seen: Sequence[int]) -> str:
    return " ".join(map(str, seen))
