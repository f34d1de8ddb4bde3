# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

r"""Merging networks of one architecture into one: their posteriors are pooled parameter by
parameter, after their hidden units were put in one order.

With posteriors :math:`N(\theta_s, 1 / F_s)` and weights λ the ``exclusive`` pool is Fisher merging,

.. math:: \theta = \frac{\sum_s \lambda_s F_s \theta_s}{\sum_s \lambda_s F_s}

and with one precision for all parameters the average.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from pyro_fusion.errors import ParameterError, Party, StructureError
from pyro_fusion.families import Factor
from pyro_fusion.fusion.checks import check_weights
from pyro_fusion.fusion.parties import Parties
from pyro_fusion.nn.alignment import equally_sure, permuted, unit_orders
from pyro_fusion.pooling.kl import Exclusive
from pyro_fusion.posterior import Axes, Posterior
from pyro_fusion.readers.axes.modules import module_axes
from pyro_fusion.readers.module.laplace import with_values

__all__ = ["merge_modules", "pooled", "prepared"]


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
        :func:`~pyro_fusion.readers.module.laplace.from_module` reads them: Fisher merging. By
        default each parameter counts alike: the average. Parameters that are no sites, such as
        those of a head of its own, are the first module's.
    :param weights: λ, one non-negative weight for each module; equal by default.
        :func:`search_weights` finds them.
    :param axes: labels by parameter, for networks that did not begin alike, whose hidden units are
        in different orders: the units of each network are put in the order in which they fit
        together best, before merging. ``"auto"`` finds the labels of units between linear layers
        (not of channels of convolutions). Running statistics have the label of the weight beside
        them, unless one is given. By default units are merged with those of the same number.
    :param inputs: arguments of the modules, where ``axes="auto"`` cannot make them; see
        :func:`~pyro_fusion.module_axes`.
    :param floor: no precision is below it: the Fisher floor of Matena & Raffel.
    :param normalize: divide each module's Fisher information by its norm over all parameters, so
        that networks which are surer of themselves have no more weight.
    :param seed: of the random starts of the search for the order of the units.
    :raises StructureError: for modules of different architectures (names, shapes, tied parameters),
        whose frozen parameters or buffers differ, or posteriors that do not fit them.
    :raises ParameterError: for weights or a floor out of range.

    Running means and variances of batch normalisations become those of the mixture with these
    weights. They are no longer those of the merged network's own activations:
    ``torch.optim.swa_utils.update_bn(loader, module)`` makes them so, if there are data.

    Source: Matena & Raffel, *Merging Models with Fisher-Weighted Averaging* (NeurIPS 2022), eq. 4;
    for the order of the units see :func:`~pyro_fusion.nn.align`.

    Example::

        posteriors = [from_module(m, d) for m, d in zip(modules, data)]
        merged = merge_modules(modules, posteriors, weights=[0.3, 0.7])
    """
    w = check_weights(weights, [str(s) for s in range(len(modules))])
    ready = prepared(modules, posteriors, axes, inputs, floor, seed)
    return pooled(modules, ready, w, normalize)


@dataclass(frozen=True)
class Prepared:
    """A network that is ready to be merged.

    :ivar posterior: of its parameters, without labels, float64.
    :ivar statistics: its running means and variances by name, float64, on the CPU.
    """

    posterior: Posterior
    statistics: Mapping[str, Tensor]


def prepared(
    modules: Sequence[nn.Module],
    posteriors: Sequence[Posterior] | None,
    axes: Axes | Literal["auto"] | None,
    inputs: tuple[Any, ...],
    floor: float,
    seed: int,
) -> list[Prepared]:
    """The networks to merge, checked, with their units in one order; arguments as in
    :func:`merge_modules`."""
    ready = _posteriors(modules, posteriors, floor)
    statistics = [_statistics(m) for m in modules]
    if axes is not None:
        found = _axes(modules[0], inputs, seed) if axes == "auto" else axes
        orders = unit_orders(ready, found, seed)
        ready = [permuted(p, found, order) for p, order in zip(ready, orders, strict=True)]
        labels = {name: _label_of(name, found) for name in statistics[0]}
        statistics = [
            {k: v[order.get(labels[k], slice(None))] for k, v in values.items()}
            for values, order in zip(statistics, orders, strict=True)
        ]
    return [Prepared(p, v) for p, v in zip(ready, statistics, strict=True)]


def _label_of(statistic: str, axes: Axes) -> str:
    """The label of a running mean or variance, "" if there is none."""
    beside = f"{statistic.rpartition('.')[0]}.weight".strip(".")
    labels = axes.get(statistic, axes.get(beside, ()))
    return labels if isinstance(labels, str) else (*labels, None)[0] or ""


def _axes(module: nn.Module, inputs: tuple[Any, ...], seed: int) -> Axes:
    """Labels by parameter, found with running statistics, which tell units apart, at their initial
    values; statistics without a weight get one, so that there is a label beside them."""
    module = copy.deepcopy(module)
    for m in _normalised(module).values():
        m.reset_running_stats()
        if m.weight is None:
            m.weight = nn.Parameter(torch.ones_like(m.running_mean))
            m.bias = nn.Parameter(torch.zeros_like(m.running_mean))
    return module_axes(module, *inputs, seed=seed).axes


def pooled(
    modules: Sequence[nn.Module], ready: Sequence[Prepared], weights: Tensor, normalize: bool
) -> nn.Module:
    """The merged network of the result of :func:`prepared`."""
    posteriors, scaled = [one.posterior for one in ready], weights
    if normalize:
        scaled = weights / torch.stack([_norm(p) for p in posteriors])
    # As `fuse` pools sites that have no label.
    parties = Parties.of(posteriors, Exclusive(), scaled, None, None)
    everyone = torch.zeros(len(posteriors), dtype=torch.long)
    values = {}
    for site in posteriors[0].axes:
        atom = parties.shared(site).barycenter(everyone, 1)[site]
        values[site] = parties.unbatched(site, atom).center()
    mixed = _mixed([one.statistics for one in ready], weights / weights.sum())
    return with_values(modules[0], {**values, **mixed})


def _norm(posterior: Posterior) -> Tensor:
    return torch.stack([f.precision.norm() for f in posterior.decomposed.values()]).norm().cpu()


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
        return [_trained(m, s) for s, m in enumerate(modules)]
    if len(posteriors) != len(modules):
        raise StructureError(
            f"expected one posterior for each of {len(modules)} modules, got {len(posteriors)}"
        )
    own = dict(modules[0].named_parameters())
    result = []
    for s, p in enumerate(posteriors):
        if unknown := sorted(set(p.axes) - set(own)):
            raise StructureError(
                f"the {type(modules[0]).__name__} has no parameters {unknown[:10]}; it "
                f"has {list(own)[:20]}",
                party=s,
            )
        for site, f in p.decomposed.items():
            if f.shape != own[site].shape or f.family.name != "Normal" or f.transforms:
                behind = f" behind {type(f.transforms[-1]).__name__}" if f.transforms else ""
                raise StructureError(
                    f"expected a Normal of shape "
                    f"{tuple(own[site].shape)}, as the parameter has, got a {f.family.name} of "
                    f"shape {tuple(f.shape)}{behind}",
                    party=s,
                    site=site,
                )
        result.append(
            Posterior(
                {k: _floored(f, floor) for k, f in p.to(dtype=torch.float64).decomposed.items()}
            )
        )
    return result


def _trained(m: nn.Module, party: int) -> Posterior:
    """A posterior around all parameters that are trained, with one precision."""
    trained = {k: p.detach() for k, p in m.named_parameters() if p.requires_grad and p.numel()}
    what = f"the {type(m).__name__} has"
    if not trained:
        raise ParameterError(f"{what} no parameter that is trained (requires_grad)", party=party)
    for k, p in trained.items():
        if not p.is_floating_point():
            raise ParameterError(
                f"{what} the parameter '{k}' of {p.dtype}, expected a real one: write a complex "
                "one as its real and imaginary part",
                party=party,
            )
        if not bool(p.isfinite().all()):
            raise ParameterError(f"{what} NaN or inf in parameter '{k}'", party=party)
    return equally_sure({k: p.double() for k, p in trained.items()})


def _floored(f: Factor, floor: float) -> Factor:
    largest = floor**-0.5 if floor else float("inf")
    return f.map(lambda v: v.clamp(max=largest) if v is f.params["scale"] else v)


def _check_modules(modules: Sequence[nn.Module]) -> None:
    if isinstance(modules, nn.Module) or not all(isinstance(m, nn.Module) for m in modules):
        raise ParameterError(f"expected a sequence of torch modules, got {modules!r:.200}")
    if not modules:
        raise StructureError("expected at least one module, got none")
    for s, m in enumerate(modules):
        if lazy := [k for k, p in _tensors(m).items() if nn.parameter.is_lazy(p)]:
            raise ParameterError(
                f"parameters {lazy} have no shape yet: run the module once first", party=s
            )
    first = dict(_described(modules[0]))
    for s, m in enumerate(modules):
        other = dict(_described(m))
        for name in (*first, *other):
            if first.get(name) != other.get(name):
                raise StructureError(
                    [
                        "modules of different architectures: ",
                        Party(s),
                        f" has {name} {other.get(name, 'not at all')}, ",
                        Party(0),
                        f" {first.get(name, 'not at all')}",
                    ]
                )
    frozen = [k for k, p in modules[0].named_parameters() if not p.requires_grad]
    running = tuple(f"{k}.".lstrip(".") for k in _normalised(modules[0]))
    mixed = {f"{k}{x}" for k in running for x in (*_MOMENTS, "num_batches_tracked")}
    fixed = [k for k, _ in modules[0].named_buffers() if k not in mixed]
    for s, m in enumerate(modules):
        mine, theirs = _tensors(modules[0]), _tensors(m)
        for kind, names in (("frozen parameter", frozen), ("buffer", fixed)):
            for name in names:
                if not torch.equal(mine[name].cpu(), theirs[name].cpu()):
                    raise StructureError(
                        [
                            f"{kind} '{name}' of ",
                            Party(s),
                            " differs from that of ",
                            Party(0),
                            ": networks around it cannot be merged. Train it, or make it the same "
                            "for all",
                        ]
                    )


def _tensors(m: nn.Module) -> dict[str, Tensor]:
    return {**dict(m.named_parameters()), **dict(m.named_buffers())}


def _described(m: nn.Module) -> Iterator[tuple[str, str]]:
    """Each part of a module with its description, equal for modules of one architecture."""
    names: dict[int, str] = {}
    for name, p in m.named_parameters(remove_duplicate=False):
        tied = names.setdefault(id(p), name)
        frozen = "" if p.requires_grad else ", frozen"
        as_well = "" if tied == name else f", tied to '{tied}'"
        yield f"parameter '{name}'", f"of shape {tuple(p.shape)}{frozen}{as_well}"
    for name, b in m.named_buffers():
        yield f"buffer '{name}'", f"of shape {tuple(b.shape)}"
    for name, part in m.named_modules():
        yield f"module '{name}'", type(part).__name__


# -- batch normalisation ---------------------------------------------------------------------------

_MOMENTS = ("running_mean", "running_var")


def _normalised(module: nn.Module) -> dict[str, _NormBase]:
    """The modules with running means and variances, by name."""
    every = module.named_modules()
    return {k: m for k, m in every if isinstance(m, _NormBase) and m.running_mean is not None}


def _statistics(module: nn.Module) -> dict[str, Tensor]:
    """Running means and variances, float64, on the CPU."""
    return {
        f"{name}.{x}".strip("."): getattr(m, x).double().cpu()
        for name, m in _normalised(module).items()
        for x in _MOMENTS
    }


def _mixed(every: Sequence[Mapping[str, Tensor]], weights: Tensor) -> dict[str, Tensor]:
    """The running means and variances of the mixture of all modules' units."""
    result: dict[str, Tensor] = {}
    for name in every[0]:
        if not name.endswith("running_mean"):
            continue
        other = name.removesuffix("mean") + "var"
        mean = torch.stack([values[name] for values in every])
        var = torch.stack([values[other] for values in every])
        result[name] = torch.einsum("s,s...->...", weights, mean)
        deviation = (mean - result[name]).square()
        result[other] = torch.einsum("s,s...->...", weights, var + deviation)
    return result
