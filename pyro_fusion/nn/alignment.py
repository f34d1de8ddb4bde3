# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Alignment: the hidden units of several networks in one order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from pyro.distributions import Normal
from torch import Tensor

from pyro_fusion.assignment.priors import FixedAtoms
from pyro_fusion.errors import StructureError
from pyro_fusion.fusion.fuse import fuse
from pyro_fusion.posterior import Axes, Posterior

__all__ = ["align", "equally_sure", "permuted", "unit_orders"]

# More starts cost time and hardly help: units that fit together are found from any start.
_RESTARTS = 3


def align(posteriors: Sequence[Posterior], axes: Axes, *, seed: int = 0) -> list[Posterior]:
    r"""Networks' posteriors with their hidden units in one order, in which their means are nearest:

    .. math:: \min_{\pi, a} \sum_s \| \pi_s(\theta_s) - a \|^2

    over a permutation of each network's units for each label. It is fusion with as many atoms as
    each network has units, of Normals of one width. The widths of the posteriors themselves are not
    used: they say how little the data tell of a parameter, not which unit it belongs to, and gave
    worse orders in ``benchmarks/fisher.py``. ``to_module(posterior, network)`` makes an aligned
    posterior a network::

        axes = module_axes(networks[0]).axes
        aligned = align(posteriors, axes)
        networks = [to_module(p, n) for p, n in zip(aligned, networks)]

    :param axes: site -> labels; sites that a posterior does not have are ignored.
    :param seed: of the random starts.
    :return: permuted posteriors, without labels.
    :raises StructureError: if no site has a label.

    Source: Ainsworth, Hayase & Srinivasa, *Git Re-Basin* (ICLR 2023), sec. 3.2, extended to any
    number of networks.
    """
    every = zip(posteriors, unit_orders(posteriors, axes, seed), strict=True)
    return [permuted(p, axes, orders) for p, orders in every]


def unit_orders(posteriors: Sequence[Posterior], axes: Axes, seed: int) -> list[dict[str, Tensor]]:
    """The component of each atom, for each posterior: label -> LongTensor ``[L]``."""
    means = [
        _labelled(equally_sure({k: f.center() for k, f in p.decomposed.items()}), axes)
        for p in posteriors
    ]
    first = means[0]
    if not first.labels:
        raise StructureError(
            f"axes have no label for any of the sites {list(first.axes)[:20]}, so there is nothing "
            "to align"
        )
    priors = {label: FixedAtoms(first.components(label)) for label in first.labels}
    fusion = fuse(means, assignment_prior=priors, dispersion=1.0, seed=seed, restarts=_RESTARTS)
    if fusion.interrupted:  # networks that are half aligned are not to be merged
        raise KeyboardInterrupt
    return [
        {label: found.assignment[s].argsort().cpu() for label, found in fusion.labels.items()}
        for s in range(len(posteriors))
    ]


def permuted(posterior: Posterior, axes: Axes, orders: Mapping[str, Tensor]) -> Posterior:
    """The posterior with its components in these orders, without labels."""
    result = _labelled(posterior, axes)
    for label, order in orders.items():
        result = result.permute(label, order)
    return Posterior(result.decomposed)


def equally_sure(means: Mapping[str, Tensor]) -> Posterior:
    """A posterior of Normals of one width around the ``means`` of each site."""
    return Posterior({k: Normal(x, torch.ones_like(x)).to_event(x.dim()) for k, x in means.items()})


def _labelled(posterior: Posterior, axes: Axes) -> Posterior:
    known = {site: labels for site, labels in axes.items() if site in posterior.axes}
    return Posterior(posterior.decomposed, known)
