# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The contract of an exponential family, and the registry from distribution types to families.

A family is pure tensor mathematics on a dictionary of distribution parameters. Everything that
depends on how a distribution is wrapped (``Independent``, transforms, masks) is in ``factor.py``.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_fusion.errors import StructureError, UnsupportedFamilyError

__all__ = ["Family", "Params", "family_of", "family_named", "register_family"]

Params = dict[str, Tensor]


class Family(ABC):
    r"""An exponential family

    .. math:: p(x \mid \eta) = h(x) \exp(\langle \eta, T(x) \rangle - A(\eta)),
              \qquad \mu = E[T(x)] = \nabla A(\eta).

    Natural parameters :math:`\eta` and mean parameters :math:`\mu` are flat vectors of one length
    ``P``, so that inner products over any batch are matrix products. All methods take and return
    tensors of the parameters' dtype; callers work in float64.

    To add a family, subclass, fill in the attributes and the seven methods, and decorate the class
    with :func:`register_family`.

    Source: Wainwright & Jordan, *Graphical Models, Exponential Families, and Variational
    Inference* (2008), section 3.
    """

    distribution: ClassVar[type[Distribution]]
    """The (Pyro) distribution that :meth:`build` returns."""
    event_dim: ClassVar[int]
    """Number of event dimensions of the distribution."""
    parameters: ClassVar[Mapping[str, int]]
    """Constructor argument -> number of its dimensions that belong to the event."""
    location: ClassVar[str | None] = None
    """The parameter that moves with the value, ``x + c ~ p(loc + c)``, if there is one. KL is
    unchanged by a common shift, so it is centred away before statistics are computed."""
    scale: ClassVar[str | None] = None
    """The parameter that scales with the value, as the location does, ``c x ~ p(c loc, c scale)``,
    if there is one: standard deviations, or a factor of the covariance matrix."""

    @property
    def name(self) -> str:
        """The name of the distribution's class; files and messages use it."""
        return self.distribution.__name__

    def params(self, d: Distribution) -> Params:
        """The parameters of ``d``, each of shape ``batch_shape + event part``."""
        result = {}
        for name, event_dim in self.parameters.items():
            value = torch.as_tensor(getattr(d, name))
            event = value.shape[value.dim() - event_dim :]
            result[name] = value.expand(d.batch_shape + event)
        return result

    def build(self, params: Params, validate_args: bool | None = None) -> Distribution:
        """The distribution with these parameters; the inverse of :meth:`params`."""
        make: Callable[..., Distribution] = self.distribution
        return make(**params, validate_args=validate_args)

    def batch_shape(self, params: Params) -> torch.Size:
        """The batch shape shared by ``params``."""
        name, event_dim = next(iter(self.parameters.items()))
        shape = params[name].shape
        return shape[: len(shape) - event_dim]

    @abstractmethod
    def event_shape(self, params: Params) -> torch.Size:
        """The event shape of the distribution with these parameters."""

    @abstractmethod
    def statistics(self, value: Tensor) -> Tensor:
        """The sufficient statistics ``T(x)``: ``[..., *event_shape] -> [..., P]``."""

    @abstractmethod
    def natural(self, params: Params) -> Tensor:
        """Natural parameters: ``-> [*batch_shape, P]``."""

    @abstractmethod
    def mean(self, params: Params) -> Tensor:
        """Mean parameters ``E[T(x)]``: ``-> [*batch_shape, P]``."""

    @abstractmethod
    def log_normalizer(self, params: Params) -> Tensor:
        """Log-normaliser ``A(η)``: ``-> [*batch_shape]``."""

    @abstractmethod
    def from_natural(self, eta: Tensor, event_shape: torch.Size) -> Params:
        """Inverse of :meth:`natural`: ``[*batch_shape, P] ->`` parameters."""

    @abstractmethod
    def from_mean(self, mu: Tensor, event_shape: torch.Size) -> Params:
        """Inverse of :meth:`mean`: ``[*batch_shape, P] ->`` parameters."""

    def kl(self, p: Params, q: Params) -> Tensor:
        """``KL(p ‖ q)`` of equal batch shapes: ``-> [*batch_shape]``.

        The Bregman divergence of ``A``. Families whose log-normaliser is large where divergences
        are small (concentrations of 1e8, say) override it with a form in which nothing cancels.
        """
        inner = ((self.natural(q) - self.natural(p)) * self.mean(p)).sum(-1)
        return self.log_normalizer(q) - self.log_normalizer(p) - inner

    def center(self, params: Params) -> Tensor:
        """A central value, ``[*batch_shape, *event_shape]``: the location if it has the shape of
        a value, else the mode of a discrete family, else the mean."""
        d = self.build(params, validate_args=False)
        location = None if self.location is None else params[self.location]
        if location is not None and location.shape == d.batch_shape + d.event_shape:
            return location
        return d.mode if getattr(d.support, "is_discrete", False) else d.mean

    def index_event(self, params: Params, axis: int, index: Tensor) -> Params:
        """The marginal (or restriction) to ``index`` along event axis ``axis`` (negative)."""
        raise StructureError(
            f"the event axes of {self.name} cannot be labelled: its components are not separable"
        )

    def pad_event(
        self, params: Params, axis: int, index: Tensor, size: int, fill: Tensor | None
    ) -> Params:
        """Scatter the parameters along event axis ``axis`` (negative) to the places ``index`` of
        ``size``. The other places get ``fill``, by default the family's value for no data."""
        raise StructureError(
            f"a {self.name} factor with a labelled event axis cannot be carried along: parties "
            "that lack a component have no natural value there. Use a Dirichlet, or a batch axis"
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


_BY_TYPE: dict[type, Family] = {}


def register_family(*types: type) -> Callable[[type[Family]], type[Family]]:
    """Class decorator: use the decorated :class:`Family` for distributions of these types.

    Look-up follows the method resolution order, as ``torch.distributions.register_kl`` does, so
    registering a ``torch.distributions`` class also covers Pyro's subclass of it.
    """

    def decorate(cls: type[Family]) -> type[Family]:
        family = cls()
        for t in (*types, cls.distribution):
            _BY_TYPE[t] = family
        return cls

    return decorate


def family_of(d: Distribution) -> Family:
    """The family registered for the type of ``d``.

    :raises UnsupportedFamilyError: when there is none; the message says how to register one.
    """
    for base in type(d).__mro__:
        if base in _BY_TYPE:
            return _BY_TYPE[base]
    raise UnsupportedFamilyError(
        f"no exponential family is registered for {type(d).__name__}. Known: "
        f"{', '.join(family_names())}. Decorate a pyro_fusion.families.Family with "
        f"@register_family({type(d).__name__}), or project onto a known family first"
    )


def family_named(name: str) -> Family:
    """The family whose distribution class is called ``name``.

    :raises UnsupportedFamilyError: when there is none.
    """
    for family in _BY_TYPE.values():
        if family.name == name:
            return family
    raise UnsupportedFamilyError(
        f"no family called {name!r} is registered. Known: {', '.join(family_names())}"
    )


def family_names() -> list[str]:
    """The names of all registered families, sorted."""
    return sorted({family.name for family in _BY_TYPE.values()})
