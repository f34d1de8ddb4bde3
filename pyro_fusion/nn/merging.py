# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

r"""Merging networks of one architecture into one: their posteriors are pooled parameter by
parameter, after their hidden units were put in one order.

With posteriors :math:`N(\theta_s, 1 / F_s)` and weights λ the ``exclusive`` pool is Fisher merging,

.. math:: \theta = \frac{\sum_s \lambda_s F_s \theta_s}{\sum_s \lambda_s F_s}

and with one precision for all parameters the average.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from pyro.distributions import Normal
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pyro_fusion.barycenter import Exclusive
from pyro_fusion.errors import ParameterError, StructureError
from pyro_fusion.families import Factor
from pyro_fusion.fuse import fuse
from pyro_fusion.parties import Parties
from pyro_fusion.posterior import Axes, Posterior
from pyro_fusion.priors import Parametric
from pyro_fusion.readers.laplace import to_module
from pyro_fusion.readers.modules import module_axes
from pyro_fusion.structure import check_weights

__all__ = ["align", "merge_modules", "pooled", "prepared"]

# More are hardly better, and each costs as much: units that fit together are found from any start.
_RESTARTS = 3


def merge_modules(
    modules: Sequence[nn.Module],
    posteriors: Sequence[Posterior] | None = None,
    *,
    weights: Sequence[float] | Tensor | None = None,
    axes: Axes | Literal["auto"] | None = None,
    inputs: tuple[Any, ...] = (),
    floor: float = 0.0,
    normalize: bool = False,
    seed: int = 0,
) -> nn.Module:
    r"""Merge networks of one architecture into one: a copy of the first module, with other
    parameters. None of them is changed.

    :param modules: of one architecture.
    :param posteriors: one for each module, whose sites are parameters, as
        :meth:`Posterior.from_module <pyro_fusion.Posterior.from_module>` reads them: Fisher
        merging. By default each parameter counts alike: the average. Parameters that are no sites,
        such as those of a head of its own, are the first module's.
    :param weights: λ, one non-negative weight for each module; equal by default.
        :func:`search_weights` finds them.
    :param axes: the hidden units of networks that did not begin alike are in different orders:
        ``"auto"`` finds their labels and puts the units of each network in the order in which they
        fit together best, before merging; or labels by parameter. By default units are merged with
        those of their own number.
    :param inputs: arguments of the modules, where ``axes="auto"`` cannot make them; see
        :func:`~pyro_fusion.module_axes`.
    :param floor: no precision is below it: the Fisher floor of Matena & Raffel.
    :param normalize: divide each module's Fisher information by its norm over all parameters, so
        that networks which are surer of themselves have no more say.
    :param seed: of the starts from which the order of the units is sought.
    :raises StructureError: for modules of different architectures (names, shapes, tied parameters),
        whose frozen parameters or buffers differ, or posteriors that do not fit them.
    :raises ParameterError: for weights or a floor out of range.

    Running means and variances of batch normalisations become those of the mixture with these
    weights. They are no longer those of the merged network's own activations:
    ``torch.optim.swa_utils.update_bn(loader, module)`` makes them so, if there are data.

    Source: Matena & Raffel, *Merging Models with Fisher-Weighted Averaging* (NeurIPS 2022), eq. 4;
    for the order of the units Ainsworth, Hayase & Srinivasa, *Git Re-Basin* (ICLR 2023), sec. 3.2,
    here with Fisher-weighted distances.

    Example::

        posteriors = [Posterior.from_module(m, d) for m, d in zip(modules, data)]
        merged = merge_modules(modules, posteriors, weights=[0.3, 0.7])
    """
    w = check_weights(weights, len(modules))
    ready = prepared(modules, posteriors, axes, inputs, floor, seed)
    return pooled(modules, ready, w, normalize)


def prepared(
    modules: Sequence[nn.Module],
    posteriors: Sequence[Posterior] | None,
    axes: Axes | Literal["auto"] | None,
    inputs: tuple[Any, ...],
    floor: float,
    seed: int,
) -> list[Posterior]:
    """One posterior for each module, checked, without labels, with the units in one order;
    arguments as of :func:`merge_modules`."""
    ready = _posteriors(modules, posteriors, floor)
    if axes is None:
        return ready
    found = module_axes(modules[0], *inputs, seed=seed).axes if axes == "auto" else axes
    return align(ready, found, seed=seed)


def pooled(
    modules: Sequence[nn.Module], posteriors: Sequence[Posterior], weights: Tensor, normalize: bool
) -> nn.Module:
    """Merge what :func:`prepared` has made."""
    scaled = weights
    if normalize:
        scaled = weights / torch.stack([_norm(p) for p in posteriors])
    # What `fuse` does with sites that have no label.
    parties = Parties.of(posteriors, Exclusive(), scaled, None, None)
    values = {site: parties.share(site)[0].center() for site in posteriors[0].axes}
    return to_module(modules[0], {**values, **_statistics(modules, weights / weights.sum())})


def _norm(posterior: Posterior) -> Tensor:
    return torch.stack([f.precision.norm() for f in posterior.decomposed.values()]).norm().cpu()


def align(posteriors: Sequence[Posterior], axes: Axes, *, seed: int = 0) -> list[Posterior]:
    """Networks' posteriors with their hidden units in one order: that of the atoms which they have
    in common, as many as each network has units.

    :param axes: site -> labels; sites that a posterior does not have are passed over.
    :return: permuted posteriors, without labels.
    """
    first = posteriors[0]
    known = {site: labels for site, labels in axes.items() if site in first.axes}
    labelled = [Posterior(p.decomposed, known) for p in posteriors]
    if not labelled[0].labels:
        raise StructureError(
            f"axes have no label for any of the sites {list(first.axes)[:20]}, so there is nothing "
            "to align"
        )
    priors = {label: Parametric(labelled[0].components(label)) for label in labelled[0].labels}
    fusion = fuse(labelled, prior=priors, dispersion=1.0, seed=seed, restarts=_RESTARTS)
    result = []
    for s, p in enumerate(labelled):
        for label, matching in fusion.matchings.items():
            p = p.permute(label, matching.assignment[s].argsort())
        result.append(Posterior(p.decomposed))
    return result


# -- what modules and posteriors must have in common -----------------------------------------------


def _posteriors(
    modules: Sequence[nn.Module], posteriors: Sequence[Posterior] | None, floor: float
) -> list[Posterior]:
    """One posterior for each module, without labels, in float64 and with no precision below the
    floor; checked against the modules."""
    _check_modules(modules)
    if not 0 <= floor < float("inf"):
        raise ParameterError(f"floor must be non-negative and finite, got {floor}")
    if posteriors is None:
        return [
            Posterior(
                {
                    k: Normal(p.detach().double(), 1.0).expand(p.shape).to_event(p.dim())
                    for k, p in m.named_parameters()
                    if p.requires_grad and p.is_floating_point()
                }
            )
            for m in modules
        ]
    if len(posteriors) != len(modules):
        raise StructureError(
            f"expected one posterior for each of {len(modules)} modules, got {len(posteriors)}"
        )
    own = dict(modules[0].named_parameters())
    result = []
    for s, p in enumerate(posteriors):
        if unknown := sorted(set(p.axes) - set(own)):
            raise StructureError(
                f"party {s}: the {type(modules[0]).__name__} has no parameters {unknown[:10]}; it "
                f"has {list(own)[:20]}"
            )
        for site, f in p.decomposed.items():
            if f.shape != own[site].shape or f.family.name != "Normal" or f.transforms:
                raise StructureError(
                    f"party {s}, site '{site}': expected a Normal of shape "
                    f"{tuple(own[site].shape)}, as the parameter has, got a {f.family.name} of "
                    f"shape {tuple(f.shape)}"
                )
        result.append(
            Posterior(
                {k: _floored(f, floor) for k, f in p.to(dtype=torch.float64).decomposed.items()}
            )
        )
    return result


def _floored(f: Factor, floor: float) -> Factor:
    largest = floor**-0.5 if floor else float("inf")
    return f.map(lambda v: v.clamp(max=largest) if v is f.params["scale"] else v)


def _check_modules(modules: Sequence[nn.Module]) -> None:
    if isinstance(modules, nn.Module) or not all(isinstance(m, nn.Module) for m in modules):
        raise ParameterError(f"expected a sequence of torch modules, got {modules!r:.200}")
    if not modules:
        raise StructureError("expected at least one module, got none")
    first = dict(_described(modules[0]))
    for s, m in enumerate(modules):
        other = dict(_described(m))
        for name in (*first, *other):
            if first.get(name) != other.get(name):
                raise StructureError(
                    f"modules of different architectures: party {s} has {name} "
                    f"{other.get(name, 'not at all')}, party 0 {first.get(name, 'not at all')}"
                )
    frozen = [k for k, p in modules[0].named_parameters() if not p.requires_grad]
    moments = set(_moments(modules[0]))
    fixed = [k for k, b in modules[0].named_buffers() if k not in moments and b.is_floating_point()]
    for s, m in enumerate(modules):
        mine, theirs = _tensors(modules[0]), _tensors(m)
        for kind, names in (("frozen parameter", frozen), ("buffer", fixed)):
            for name in names:
                if not torch.equal(mine[name].cpu(), theirs[name].cpu()):
                    raise StructureError(
                        f"{kind} '{name}' of party {s} differs from that of party 0: networks "
                        "around it cannot be merged. Train it, or make it the same for all"
                    )


def _tensors(m: nn.Module) -> dict[str, Tensor]:
    return {**dict(m.named_parameters()), **dict(m.named_buffers())}


def _described(m: nn.Module) -> Iterator[tuple[str, str]]:
    """What modules of one architecture have in common."""
    names: dict[int, str] = {}
    for name, p in m.named_parameters(remove_duplicate=False):
        tied = names.setdefault(id(p), name)
        frozen = "" if p.requires_grad else ", frozen"
        as_well = "" if tied == name else f", tied to '{tied}'"
        yield f"parameter '{name}'", f"of shape {tuple(p.shape)}{frozen}{as_well}"
    for name, b in m.named_buffers():
        yield f"buffer '{name}'", f"of shape {tuple(b.shape)}"


# -- batch normalisation ---------------------------------------------------------------------------


def _moments(module: nn.Module) -> dict[str, _BatchNorm]:
    """Names of running means and variances, with their modules."""
    return {
        f"{name}.{moment}".strip("."): m
        for name, m in module.named_modules()
        if isinstance(m, _BatchNorm) and m.running_mean is not None
        for moment in ("running_mean", "running_var")
    }


def _statistics(modules: Sequence[nn.Module], weights: Tensor) -> dict[str, Tensor]:
    """Running means and variances of the mixture of those of all modules."""
    result: dict[str, Tensor] = {}
    every = [dict(m.named_buffers()) for m in modules]
    for name in _moments(modules[0]):
        if not name.endswith("running_mean"):
            continue
        other = name.removesuffix("mean") + "var"
        mean = torch.stack([b[name].double().cpu() for b in every])
        var = torch.stack([b[other].double().cpu() for b in every])
        result[name] = torch.einsum("s,s...->...", weights, mean)
        deviation = (mean - result[name]).square()
        result[other] = torch.einsum("s,s...->...", weights, var + deviation)
    return result
