# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The result of reading draws: a posterior, and how far to trust it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pyro_fusion.errors import warn_user
from pyro_fusion.posterior import Posterior

__all__ = ["DrawsReading", "warn_of"]

# A projection that loses more than this for each number is reported.
_NATS_PER_NUMBER = 0.1
# Relabelling is, if so large a share of the draws could as well have another order.
_MOST_AMBIGUOUS = 0.1


@dataclass(frozen=True, kw_only=True)
class DrawsReading:
    """A posterior that was read from draws, and how far to trust it.

    :ivar posterior: what :func:`from_draws` returns.
    :ivar num_chains: the number of chains.
    :ivar num_draws: the number of draws in each.
    :ivar ess: site -> effective sample size, the least of its numbers, after relabelling.
    :ivar rhat: site -> split R-hat, the largest of its numbers, after relabelling.
    :ivar lost: site -> an estimate of ``KL(draws ‖ factor)`` in nats, NaN for a family of which
        none is known, or with fewer than 20 effective draws; see
        ``projection_loss.py``.
    :ivar lost_between: nats of correlation between the sites, which no posterior has; NaN with
        fewer than 20 effective draws of a site.
    :ivar relabelled: label -> the share of draws whose components were in another order than in
        most; labels along which nothing switched have 0.
    :ivar ambiguous: label -> the share of draws in which two components could as well, at a tenth
        of the density or more, have changed places; 0 where nothing switched.
    :ivar divergences: the number of divergent transitions, or None if the draws do not tell.
    """

    posterior: Posterior
    num_chains: int
    num_draws: int
    ess: Mapping[str, float]
    rhat: Mapping[str, float]
    lost: Mapping[str, float]
    lost_between: float
    relabelled: Mapping[str, float]
    ambiguous: Mapping[str, float]
    divergences: int | None

    def summary(self) -> str:
        """A table with a row for each site."""
        rows = [("site", "ESS", "R-hat", "lost (nats)")]
        rows += [
            (site, f"{self.ess[site]:.0f}", f"{self.rhat[site]:.3f}", f"{self.lost[site]:.2f}")
            for site in self.lost
        ]
        widths = [max(len(r[i]) for r in rows) for i in range(4)]
        lines = []
        for site, *numbers in rows:
            cells = [c.rjust(w) for c, w in zip(numbers, widths[1:], strict=True)]
            lines.append("  ".join(["  " + site.ljust(widths[0]), *cells]))
        for label, share in self.relabelled.items():
            note = f", ambiguous in {self.ambiguous[label]:.0%}" if share else ""
            lines.append(f"  relabelled along '{label}': {share:.0%} of the draws{note}")
        return "\n".join([repr(self), *lines])

    def __repr__(self) -> str:
        diverged = f", {self.divergences} divergent" if self.divergences else ""
        return f"DrawsReading({self.num_chains} × {self.num_draws} draws{diverged})"

    def __str__(self) -> str:
        return self.summary()


def warn_of(reading: DrawsReading) -> None:
    """One warning of all that there is to warn of."""
    parts = []
    if reading.divergences:
        parts.append(
            f"{reading.divergences} transitions diverged, so parts of the posterior may not have "
            "been visited"
        )
    shapes = {k: f.shape.numel() for k, f in reading.posterior.decomposed.items()}
    much = [k for k, x in reading.lost.items() if x > _NATS_PER_NUMBER * shapes[k]]
    if much:
        told = ", ".join(f"{reading.lost[k]:.1f} nats of '{k}' ({shapes[k]} numbers)" for k in much)
        parts.append(
            f"the projection loses {told}: other families= may fit better (MultivariateNormal has "
            "correlations)"
        )
    if reading.lost_between > _NATS_PER_NUMBER * sum(shapes.values()):
        parts.append(
            f"sites depend on each other, and {reading.lost_between:.1f} nats of correlation "
            "between them are lost"
        )
    unsure = {k: x for k, x in reading.ambiguous.items() if x > _MOST_AMBIGUOUS}
    parts.extend(
        f"components along '{label}' overlap: in {share:.0%} of the draws their order is a "
        "toss-up, so there may be fewer of them, and each looks narrower than it is"
        for label, share in unsure.items()
    )
    if parts:
        warn_user("; ".join(parts))
