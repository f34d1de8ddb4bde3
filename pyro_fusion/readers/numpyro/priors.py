# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The priors of the sites of NumPyro models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from numpyro import handlers

from pyro_fusion.errors import GuideError
from pyro_fusion.posterior import Axes, Posterior
from pyro_fusion.readers.numpyro.program import Program, arrays_of, read_program
from pyro_fusion.readers.projection import resolve
from pyro_fusion.readers.sites import Spread, check_num_samples, labels_of, posterior_of

__all__ = ["prior_from_numpyro"]


def prior_from_numpyro(
    model: Callable[..., Any],
    *args: Any,
    axes: Axes | None = None,
    sites: Sequence[str] | None = None,
    params: Mapping[str, Any] | None = None,
    num_samples: int = 1000,
    seed: int = 0,
    **kwargs: Any,
) -> Posterior:
    """Read the prior of a NumPyro model's latent sites; plates label their axes.
    Projections are those of :func:`pyro_fusion.readers.pyro.prior_from_model`.

    :param args: arguments of the model, as for inference: without data its observed sites count as
        latent.
    :param axes: site name -> labels, in place of those of the plates.
    :param sites: the sites to read; by default all.
    :param params: parameters of the model, if it has any.
    :raises GuideError: if the model fails with these arguments, or lacks one of ``sites``.
    """
    check_num_samples(num_samples)
    labels = labels_of(axes)
    program = Program(model, args, kwargs, arrays_of(params or {}), "model", seed)
    with handlers.block():
        there = set(program.run())
        missing = set(sites or ()) - there
        if missing:
            raise GuideError(
                f"the model has no latent sites {sorted(missing)}; its latent sites are "
                f"{sorted(there)}"
            )
        found = read_program(program, Spread(None))
        found = {k: v for k, v in found.items() if sites is None or k in sites}
        if not found:
            raise GuideError("the model has no latent site to read")
        read = resolve(found, program.run, program.what, num_samples)
    return posterior_of(read, labels)
