# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""``Posterior``: named factors with labelled axes, which a party hands over and which fusion
returns. Files are in ``files.py``, guides as results in ``guide.py``, readers in ``readers/``."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_fusion.errors import FileFormatError, FusionError, Site, StructureError
from pyro_fusion.families import Factor
from pyro_fusion.families.projection import to_marginals
from pyro_fusion.posterior.axes import (
    as_index,
    describe,
    describe_axes,
    labelled,
    names_of,
)
from pyro_fusion.posterior.files import read, write

__all__ = ["Axes", "Posterior"]

Axes = Mapping[str, Sequence[str | None] | str]


class Posterior:
    """A product of named factors, ``q(z) = Π_site q_site(z_site)``.

    :param factors: site name -> distribution: an exponential family, perhaps behind a bijection,
        :class:`~torch.distributions.Independent`, or expanded. Values are copied.
    :param axes: site name -> a label or None for each axis of ``batch_shape + event_shape``;
        missing trailing entries are None. Axes of one label index the same components, which
        have no order; sites without a label are shared.
    :param plates: site name -> the names of the plates of its batch axes, for the
        :class:`~pyro_fusion.PosteriorGuide` of it. By default a batch axis' plate is named like
        its label.
    :param outgoing: site name -> the one of its labels whose components add up their effects on
        the rest of the model through this site, as hidden units do through their outgoing weights:
        a component whose values here are zero has no effect. A party that lacks a component then
        counts as one where it has no effect, and fusion averages effects (but for ``product``,
        which adds up evidence); see :func:`~pyro_fusion.fuse`. Such a site must be Normal or
        MultivariateNormal.
    :raises StructureError: for a label of a site that is not there, too many labels, one label
        with two sizes, or an axis whose components cannot be told apart.
    :raises ParameterError: for NaN, infinite or out-of-range parameters.
    :raises UnsupportedFamilyError: for a distribution of no registered family.

    A labelled axis must index separable components. Where it does not, the factor is projected by
    moment matching: a stick-breaking simplex onto a Dirichlet, a MultivariateNormal whose event
    axis is labelled onto its marginals.

    Example::

        Posterior(
            {"loc": Normal(loc, scale).to_event(1), "weights": Dirichlet(alpha)},
            axes={"loc": ("component", None), "weights": ("component",)},
        )
    """

    def __init__(
        self,
        factors: Mapping[str, Distribution | Factor],
        axes: Axes | None = None,
        *,
        plates: Mapping[str, Sequence[str | None]] | None = None,
        outgoing: Mapping[str, str] | None = None,
    ) -> None:
        for site in factors:
            if not isinstance(site, str) or not site:
                raise StructureError(f"a site needs a name, got {site!r}")
        if not factors:
            raise StructureError("a posterior needs at least one factor, got none")
        for what, mapping in (("axes", axes), ("plates", plates), ("outgoing", outgoing)):
            unknown = set(mapping or {}) - set(factors)
            if unknown:
                raise StructureError(
                    f"{what} names sites {sorted(unknown)} that the posterior does not have; "
                    f"its sites are {sorted(factors)}"
                )
        self._factors: dict[str, Factor] = {}
        self._axes: dict[str, tuple[str | None, ...]] = {}
        for site, d in factors.items():
            self._factors[site], self._axes[site] = labelled(site, d, (axes or {}).get(site, ()))
        self._plates: dict[str, tuple[str | None, ...]] = {}
        for site, f in self._factors.items():
            names = names_of(site, (plates or {}).get(site, self._axes[site][: f.batch_dim]))
            if len(names) != f.batch_dim:
                raise StructureError(
                    f"{len(names)} plates {names} for batch shape {tuple(f.batch_shape)}", site=site
                )
            self._plates[site] = names
        self._sizes = self._check_sizes("label", self._axes)
        self._check_sizes("plate", self._plates)
        self._outgoing = dict(outgoing or {})
        for site, label in self._outgoing.items():
            known = isinstance(label, str) and self._axes[site].count(label) == 1
            if not known or not self._factors[site].scales:
                found = f"{describe(self._factors[site])} with {describe_axes(self._axes[site])}"
                raise StructureError(
                    f"expected a Normal or MultivariateNormal with the label "
                    f"{ascii(label)[:100]} on one axis to be outgoing, got {found}",
                    site=site,
                )

    def _check_sizes(
        self, what: str, names: Mapping[str, tuple[str | None, ...]]
    ) -> dict[str, int]:
        seen: dict[str, tuple[str, int]] = {}
        for site, f in self._factors.items():
            for name, size in zip(names[site], f.shape, strict=False):
                if name is None:
                    continue
                other, expected = seen.setdefault(name, (site, size))
                if size != expected:
                    raise StructureError(
                        [
                            f"{what} '{name}' has size {size} at ",
                            Site(site),
                            f" (shape {tuple(f.shape)}) but size {expected} at ",
                            Site(other),
                            f" (shape {tuple(self._factors[other].shape)})",
                        ]
                    )
        return {name: size for name, (_, size) in seen.items()}

    @property
    def factors(self) -> Mapping[str, dist.TorchDistribution]:
        """Site name -> Pyro distribution (copies: changing one changes nothing here)."""
        return MappingProxyType(
            {k: f.map(torch.clone).distribution() for k, f in self._factors.items()}
        )

    @property
    def decomposed(self) -> Mapping[str, Factor]:
        """Site name -> the factor taken apart into family, parameters and transforms."""
        return MappingProxyType(self._factors)

    @property
    def axes(self) -> Mapping[str, tuple[str | None, ...]]:
        """Site name -> one label or None for each axis of ``batch_shape + event_shape``."""
        return MappingProxyType(self._axes)

    @property
    def plates(self) -> Mapping[str, tuple[str | None, ...]]:
        """Site name -> one plate name or None for each batch axis."""
        return MappingProxyType(self._plates)

    @property
    def outgoing(self) -> Mapping[str, str]:
        """Site name -> the label whose components add up their effects through this site."""
        return MappingProxyType(self._outgoing)

    @property
    def labels(self) -> tuple[str, ...]:
        """All labels, in order of first appearance."""
        return tuple(self._sizes)

    def components(self, label: str) -> int:
        """The number of components along ``label``.

        :raises StructureError: if no site has that label.
        """
        if label not in self._sizes:
            raise StructureError(
                f"no site has the label '{label}'; the labels are {sorted(self._sizes)}"
            )
        return self._sizes[label]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first factor's parameters."""
        return next(iter(self._factors.values())).dtype

    @property
    def device(self) -> torch.device:
        """The device of the first factor's parameters."""
        return next(iter(self._factors.values())).device

    # -- transforming --------------------------------------------------------------------------

    def _replace(self, factors: Mapping[str, Factor]) -> Posterior:
        return Posterior(factors, self._axes, plates=self._plates, outgoing=self._outgoing)

    def select(self, label: str, index: Sequence[int] | Tensor) -> Posterior:
        """Keep the components ``index`` along ``label``, in that order.

        :raises StructureError: for an unknown label, or an index out of range or empty.
        """
        size = self.components(label)
        chosen = as_index(index)
        if len(chosen) == 0 or int(chosen.min()) < 0 or int(chosen.max()) >= size:
            raise StructureError(
                f"label '{label}' has components 0 to {size - 1}, got index {chosen.tolist()}"
            )
        result = {}
        for site, f in self._factors.items():
            for axis, other in enumerate(self._axes[site]):
                if other == label:
                    f = f.index_select(axis, chosen)
            result[site] = f
        return self._replace(result)

    def permute(self, label: str, permutation: Sequence[int] | Tensor) -> Posterior:
        """Reorder the components along ``label``: component ``i`` of the result was component
        ``permutation[i]``.

        :raises StructureError: if that is no permutation.
        """
        size = self.components(label)
        order = as_index(permutation)
        if order.sort().values.tolist() != list(range(size)):
            raise StructureError(
                f"expected a permutation of the {size} components of '{label}', "
                f"got {order.tolist()}"
            )
        return self.select(label, order)

    def mean_field(self) -> Posterior:
        """The posterior with independent Normals for each MultivariateNormal, behind the same
        bijections: means and variances are kept, correlations are given up. So a party with an
        ``AutoMultivariateNormal`` or a Laplace approximation can be fused with those that have an
        ``AutoNormal``."""
        return self._replace(
            {
                k: to_marginals(f)[0] if f.family.name == "MultivariateNormal" else f
                for k, f in self._factors.items()
            }
        )

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Posterior:
        """Move to a device, cast to a dtype, or both."""
        return self._replace({k: f.to(device, dtype) for k, f in self._factors.items()})

    # -- as a distribution ---------------------------------------------------------------------

    def sample(self, sample_shape: int | Sequence[int] = ()) -> dict[str, Tensor]:
        """Draw every site, ``sample_shape + batch_shape + event_shape`` each. An integer stands for
        a sample shape of one axis."""
        shape = torch.Size([sample_shape] if isinstance(sample_shape, int) else sample_shape)
        with torch.no_grad():
            return {k: d.sample(shape) for k, d in self.factors.items()}

    def log_prob(self, values: Mapping[str, Tensor]) -> Tensor:
        """The joint log-density of ``values``, each ``sample_shape + batch_shape + event_shape``;
        the result has shape ``sample_shape``.

        :raises StructureError: if a site is missing or unknown.
        """
        if set(values) != set(self._factors):
            raise StructureError(
                f"expected a value for each of {sorted(self._factors)}, got {sorted(values)}"
            )
        total: Tensor | None = None
        for site, d in self.factors.items():
            term = d.log_prob(values[site])
            n = len(d.batch_shape)
            term = term.flatten(term.dim() - n).sum(-1) if n else term
            total = term if total is None else total + term
        assert total is not None
        return total

    # -- files -----------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file; never pickled. An existing file is replaced at once or not
        at all."""
        write(path, self._factors, self._axes, self._plates, self._outgoing)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Posterior:
        """Read a file that :meth:`save` wrote. Nothing in it is executed.

        :raises FileFormatError: if the file is damaged, of another format or version, or holds
            anything that is no valid posterior.
        """
        factors, axes, plates, outgoing = read(path)
        try:
            return cls(factors, axes, plates=plates, outgoing=outgoing)
        except FusionError as e:
            raise FileFormatError([f"{os.fspath(path)}: ", *e.pieces]) from e

    # -- printing --------------------------------------------------------------------------------

    def __repr__(self) -> str:
        counts = ", ".join(f"{n} × {label}" for label, n in self._sizes.items())
        head = f"Posterior({counts})" if counts else "Posterior"
        rows = [
            (site, describe(f), str(list(f.shape)), describe_axes(self._axes[site]))
            for site, f in self._factors.items()
        ]
        widths = [max(len(r[i]) for r in rows) for i in range(4)]
        lines = ["  " + "  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) for r in rows]
        return "\n".join([head, *(line.rstrip() for line in lines)])
