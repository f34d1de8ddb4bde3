# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""A second round: the atoms of a fusion as priors for the parties, who fit once more.

The prior of a party knows what the others found, and the party's own data once more. Hence its
evidence is bounded: enough to say which component is which, too little to make a fit sure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_fusion.errors import ParameterError, StructureError, UnsupportedFamilyError, at
from pyro_fusion.families import Factor
from pyro_fusion.families.bounded import covariances, has_bound, limited, widened
from pyro_fusion.fusion.prior_exchange import Priors, exchange_prior
from pyro_fusion.fusion.roles import Roles, site_roles
from pyro_fusion.posterior import Posterior
from pyro_fusion.posterior.axes import as_index
from pyro_fusion.readers.pyro.replacing import PriorMessenger

__all__ = ["PartyPrior", "party_priors"]


@dataclass(frozen=True)
class PartyPrior:
    """The prior of one party for another fit: atoms of a fusion, their evidence bounded.

    :ivar party: the name of the party.
    :ivar posterior: its prior, as factors over the sites whose components were told apart, with
        the axes and plates of the party's own posterior.
    :ivar atoms: label -> the atom that each component is, LongTensor ``[L]``.
    """

    party: str
    posterior: Posterior
    atoms: Mapping[str, Tensor]

    @property
    def factors(self) -> Mapping[str, dist.TorchDistribution]:
        """Site name -> the prior, a Pyro distribution."""
        return self.posterior.factors

    def select(self, label: str, index: Sequence[int] | Tensor) -> PartyPrior:
        """The prior of the components ``index`` along ``label`` alone, in that order.

        :raises StructureError: for an unknown label, or an index out of range or empty.
        """
        with at(party=self.party):
            kept = self.posterior.select(label, index)
        atoms = {**self.atoms, label: self.atoms[label][as_index(index)]}
        return PartyPrior(self.party, kept, atoms)

    def to_pyro(self, model: Callable[..., Any]) -> Callable[..., Any]:
        """The Pyro model with this prior in place of its own: for guides, ``SVI``, ``MCMC``.

        :param model: samples the sites with the number of components that the prior has. Sites
            without a prior here keep theirs.
        :raises StructureError: when the model runs, if it lacks one of the sites, or a site has
            another shape or support.
        """
        wrapped: Callable[..., Any] = PriorMessenger(self.posterior.decomposed, self.party)(model)
        return wrapped

    def to_numpyro(self, model: Callable[..., Any]) -> Callable[..., Any]:
        """The NumPyro model with this prior in place of its own; otherwise as :meth:`to_pyro`.

        :raises UnsupportedFamilyError: for a prior that NumPyro has not, as NormalWishart.
        """
        from pyro_fusion.readers.numpyro.replacing import PriorMessenger as Messenger

        return Messenger(model, self.posterior.decomposed, self.party)

    def to_sklearn(self, **options: Any) -> Any:
        """An estimator of scikit-learn with this prior, which starts at it: call ``fit(X)``.

        NormalWisharts become a ``BayesianGaussianMixture`` of covariance type "full", NormalGammas
        one of "diag", Dirichlets a ``LatentDirichletAllocation``; each component has its own prior.
        Components keep their order, and ``from_sklearn`` reads the fit.

        :param options: further parameters of the estimator, ``weight_concentration_prior`` or
            ``doc_topic_prior`` say. By default weights have the prior ``Dirichlet(1, ..., 1)``.
        :raises StructureError: if the prior is that of no such estimator.
        :raises ImportError: without scikit-learn.
        """
        try:
            from pyro_fusion.readers.sklearn_estimators import estimator_under
        except ImportError as e:
            raise ImportError(
                "its estimators need scikit-learn: pip install 'pyro-fusion[sklearn]'"
            ) from e
        with at(party=self.party):
            return estimator_under(self.posterior, **options)

    def divided_out(self, posterior: Posterior, prior: Priors) -> Posterior:
        """The posterior of a fit under this prior as it would be under a common one, which
        ``product`` needs; see :func:`~pyro_fusion.fusion.prior_exchange.exchange_prior`.

        :param posterior: of the fit, with the components of this prior in its order.
        :param prior: the common prior of the sites.
        :raises StructureError: if they do not fit. A fit that has dropped components needs the
            prior of those that are left: ``prior.select(label, kept)``.
        :raises ParameterError: if the result is improper.
        """
        with at(party=self.party):
            return exchange_prior(posterior, self.posterior, prior)


def party_priors(
    posterior: Posterior,
    parties: Mapping[str, Posterior],
    assignments: Mapping[str, Sequence[Tensor]],
    dispersions: Mapping[str, float],
    strength: float,
    atoms: Literal["own", "all"],
    sites: Sequence[str] | None,
) -> dict[str, PartyPrior]:
    """The prior of each party; see :meth:`pyro_fusion.Fusion.as_prior`.

    :param posterior: the fused one.
    :param parties: name -> the local one.
    :param assignments: label -> of each party, the atom of each component.
    :param dispersions: label -> T.
    """
    if not (isinstance(strength, int | float) and 0 < strength < math.inf):
        raise ParameterError(f"strength must be a positive number of points, got {strength!r}")
    if atoms not in ("own", "all"):
        raise ParameterError(f"atoms must be 'own' or 'all', got {atoms!r}")
    first = next(iter(parties.values()))
    roles = site_roles(first)
    factors: dict[str, tuple[str, int, Factor]] = {}
    for site in _chosen(roles, first, sites):
        label, axis = next((x, s[site]) for x, s in roles.matched.items() if site in s)
        fused = posterior.decomposed[site].with_batch(axis)
        local = Factor.cat([p.decomposed[site].with_batch(axis) for p in parties.values()])
        groups = torch.cat(list(assignments[label]))
        with at(site=site):
            bounded = _bounded(fused, local, groups, strength, dispersions[label])
        factors[site] = (label, axis, bounded)
    result = {}
    for s, (name, p) in enumerate(parties.items()):
        index = {
            label: a[s].cpu() if atoms == "own" else torch.arange(posterior.components(label))
            for label, a in assignments.items()
        }
        own = {
            site: f.index_select(0, index[label])
            .like(first.decomposed[site].batch_dim, (axis,))
            .to(p.device, p.dtype)
            for site, (label, axis, f) in factors.items()
        }
        kept = {x: index[x] for x in {label for label, _, _ in factors.values()}}
        axes, plates = ({x: v[x] for x in own} for v in (p.axes, p.plates))
        result[name] = PartyPrior(name, Posterior(own, axes, plates=plates), kept)
    return result


def _chosen(roles: Roles, first: Posterior, sites: Sequence[str] | None) -> list[str]:
    able = [x for s in roles.matched.values() for x in s if x not in first.outgoing]
    chosen = able if sites is None else list(sites)
    for site in chosen:
        if site not in able:
            raise StructureError(
                f"no prior can be made of site '{site}': expected sites with one label, along "
                f"which they tell components apart, of which there are {able}",
                site=site,
            )
    if not chosen:
        raise StructureError(
            "no site tells components apart by itself, so there is no prior to make: give labels "
            "where the posteriors are made"
        )
    return chosen


def _bounded(
    fused: Factor, local: Factor, groups: Tensor, strength: float, dispersion: float
) -> Factor:
    """Atoms ``[K]`` with their evidence bounded, from components ``[N]`` that are ``groups``."""
    if not has_bound(fused):
        raise UnsupportedFamilyError(
            f"evidence of a {fused.family.name} cannot be bounded; leave the site out by `sites`"
        )
    if fused.family.scale is None:
        return limited(fused, strength)
    groups = groups.to(local.device)
    own = covariances(local)
    total = own.new_zeros((fused.base_shape[0], *own.shape[1:]))
    total.index_add_(0, groups, own)
    count = torch.bincount(groups, minlength=len(total)).to(total)
    mean = total / count.reshape(-1, *[1] * (own.dim() - 1))
    return widened(fused, max(dispersion, 1.0) * mean)
