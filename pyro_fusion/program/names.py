# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The names that the program of a fusion uses itself."""

from __future__ import annotations

from collections.abc import Iterable

from pyro_fusion.errors import Site, StructureError
from pyro_fusion.fusion.roles import Roles

__all__ = ["check_names"]


def check_names(roles: Roles, sites: Iterable[str], product: bool) -> None:
    """:raises StructureError: if the program of a fusion has another use for a name."""
    sites, labels = set(sites), roles.matched
    taken = {name for x in labels for name in (f"{x}_assignment", f"local_{x}")}
    plates = {"party"} if roles.shared else set()
    if product:
        taken |= {f"{site}_message" for site in sites}
        plates |= {"shared"} if roles.shared else set()
        if clash := sorted(plates & set(labels)):
            raise StructureError(
                f"label '{clash[0]}' has a name that the program of a fusion uses itself for sites "
                "without a label: give it another"
            )
        plates |= set(labels)
    taken |= {f"local_{site}" for site in roles.linked}
    own = {name for site in roles.linked for name in (site, f"{site}_atoms")}
    if clash := sorted(own & set(labels)):
        raise StructureError(
            f"label '{clash[0]}' has the name of a site with several labels, or one that the "
            "program of a fusion uses for it: give it another"
        )
    if product:
        plates |= {f"{site}_atoms" for site in roles.linked}
    if clash := sorted(sites & (taken | plates)):
        raise StructureError(
            [
                Site(clash[0]),
                f" has a name that the program of a fusion uses itself; those are "
                f"{sorted(taken | plates)}: give the site another",
            ]
        )
