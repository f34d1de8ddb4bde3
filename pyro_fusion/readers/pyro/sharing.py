# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The check that no two guides share a parameter, as guides of one parameter store may."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from pyro_fusion.errors import FusionError, GuideError, Party, at
from pyro_fusion.posterior import Posterior
from pyro_fusion.readers.pyro.guides import check_is_pyro
from pyro_fusion.readers.pyro.program import Program, isolated, peel

__all__ = ["check_not_shared"]


def check_not_shared(
    guides: Sequence[Callable[..., Any] | Posterior | None], *args: Any, **kwargs: Any
) -> None:
    """Refuse guides that have a parameter in common: fitting one has moved the other.

    Two AutoNormals fitted one after the other in one process do, because Pyro's parameter store
    knows parameters by name. Tensors are compared, not names.
    A function that cannot be run with ``args`` and ``kwargs`` is not checked.

    :param guides: one guide a party; a :class:`~pyro_fusion.Posterior` among them holds copies,
        and is passed over, as None is, for a party that handed over something else.
    :raises GuideError: naming the two parties, the parameter and what to do.
    """
    owners: dict[tuple[Any, ...], tuple[int, str]] = {}
    for party, guide in enumerate(guides):
        if guide is None or isinstance(guide, Posterior):
            continue
        with at(party=party):
            check_is_pyro(guide)
        for earlier in range(party):
            if guides[earlier] is guide:
                raise GuideError(
                    [
                        Party(earlier),
                        " and ",
                        Party(party),
                        " are the same guide. If it was fitted twice, read its posterior after "
                        "each fit: from_guide(guide)",
                    ]
                )
        for key, name in _parameters(guide, args, kwargs).items():
            owner, _ = owners.setdefault(key, (party, name))
            if owner != party:
                raise GuideError(
                    [
                        Party(owner),
                        " and ",
                        Party(party),
                        f" share the parameter '{name}': their guides were fitted in one parameter "
                        "store, so fitting the second moved the first. Read each posterior right "
                        "after its fit, from_guide(guide), and call pyro.clear_param_store() "
                        "before the next; or fit each under `with "
                        "pyro.get_param_store().scope():`, or set "
                        "pyro.settings.set(module_local_params=True) before making the guides",
                    ]
                )


def _parameters(
    guide: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[tuple[Any, ...], str]:
    """The parameters of a guide: place in memory -> name."""
    result: dict[tuple[Any, ...], str] = {}

    def add(name: str, value: Tensor) -> None:
        if value.numel():
            storage = value.untyped_storage().data_ptr()
            result.setdefault((value.device, storage, value.storage_offset()), name)

    inner = peel(guide)[1]
    if isinstance(inner, nn.Module):
        prefix = getattr(inner, "_pyro_name", "") or type(inner).__name__
        for name, value in inner.named_parameters():
            if value.requires_grad:  # nobody moved the others
                add(f"{prefix}.{name.removesuffix('_unconstrained')}", value)
        return result
    with isolated(guide, 0):
        try:
            trace = Program(guide, args, kwargs).trace()
        except FusionError:
            return result
        for name in trace.param_nodes:
            node: Any = trace.nodes[name]
            add(name, node["value"].unconstrained())
    return result
