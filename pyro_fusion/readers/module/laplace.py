# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Trained networks: a Laplace approximation around their parameters, and the way back.

Parameters and buffers of a module:

===========================================  ======================================================
trainable parameters                         one site each, called like the parameter; none for
                                             those without elements
tied parameters                              one site, under the first of their names
frozen parameters (``requires_grad=False``)  no site: they count as known
buffers (running means of a batch            no site: they count as known, at the values that they
normalisation)                               have; the module is run in evaluation mode
===========================================  ======================================================
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any, Literal

import torch
from pyro.distributions import Normal
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from pyro_fusion.errors import ParameterError, StructureError
from pyro_fusion.posterior import Axes, Posterior
from pyro_fusion.readers.axes.modules import evaluating, module_axes, unchanged
from pyro_fusion.readers.module.curvature import Network, as_trained, diagonal
from pyro_fusion.readers.module.losses import CURVATURES, LOSSES, Loss, take

__all__ = ["from_module", "to_module", "with_values"]

_BATCH = 256


def from_module(
    module: nn.Module,
    data: Any,
    loss: str | Callable[[Any, Any], Tensor] = "cross_entropy",
    *,
    curvature: Literal["fisher", "empirical_fisher", "ggn"] = "fisher",
    prior_precision: float | Tensor | Mapping[str, float | Tensor] = 1.0,
    likelihood: Callable[[Any], Distribution] | None = None,
    parameters: Collection[str] | None = None,
    axes: Axes | Literal["auto"] | None = None,
    outgoing: Mapping[str, str] | None = None,
    floor: float = 0.0,
    num_samples: int | None = None,
    num_data: int | None = None,
    chunk_size: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Posterior:
    r"""The posterior of a trained network, by Laplace's method with the diagonal of a curvature:

    .. math:: q(\theta) = \prod_i N(\theta_i \mid \hat\theta_i, 1 / (N F_i + \delta_i))

    around its parameters :math:`\hat\theta`, F the mean curvature of an example's negative
    log-likelihood, N their number and δ the precision of a normal prior. The parameters are taken
    to be at the mode, and the module is left as it is.

    :param module: a torch module, whose first output axis is that of the examples, and in which no
        example has an effect on another's output.
    :param data: a tuple ``(inputs, targets)``, a ``DataLoader`` (or a list, or any iterable) of
        such batches, or a ``Dataset`` of such examples. Inputs are a tensor, a tuple of arguments
        of the module, or a mapping of keyword arguments, with the examples along first axes. Where
        no targets are needed, a batch that is no pair is inputs alone.
    :param loss: the negative log-likelihood that the module was trained with, summed over examples:
        ``"cross_entropy"`` (logits ``[B, C, ...]``, classes ``[B, ...]``),
        ``"binary_cross_entropy"`` (logits), ``"squared_error"`` (half the sum of squares: a Normal
        of scale one), or a function of the output and the target of a batch of one, as torch's
        losses are. Of a loss that was averaged over examples give that of one.
    :param curvature: ``"fisher"``: labels are from the module's own predictive distribution, in
        expectation where the loss is named, else by draws. ``"empirical_fisher"``: labels are those
        of the data. ``"ggn"``: the generalised Gauss-Newton matrix, which for the named losses is
        the Fisher matrix.
    :param prior_precision: δ, non-negative: a number, one for each parameter, or by name. Weight
        decay w of a loss averaged over N examples is ``N * w``.
    :param likelihood: a function from the output of a batch to the distribution of its targets, in
        place of ``loss``: ``lambda out: Normal(out, 0.1)``.
    :param parameters: the names of those that get a site, the others being known; by default all
        that are trained.
    :param axes: labels of the parameters' axes, as of :class:`~pyro_fusion.Posterior`; ``"auto"``
        finds those of hidden units, as :func:`~pyro_fusion.module_axes` does; not of units with
        running statistics, which a posterior does not hold.
    :param outgoing: as of :class:`~pyro_fusion.Posterior`; ``axes="auto"`` does not set it, so that
        units are averaged as they are.
    :param floor: no precision is below it: the Fisher floor of Matena & Raffel, 1e-6 of the mean
        over examples (``num_data=1``, ``prior_precision=0``).
    :param num_samples: how many labels to draw for each example, for ``"fisher"``. By default the
        expectation where the loss is named, which takes as many gradients as there are numbers in
        an output, and one label for a likelihood of one's own.
    :param num_data: N, by default the number of examples in ``data``; more, if that is a part of
        what the module was trained on; 1 for the mean curvature, so that in a merge a module counts
        alike whatever its number of examples.
    :param chunk_size: how many gradients of single examples are in memory at once; by default as
        many as take 16 MiB in float32, on a GPU 256 MiB. The outputs of a batch are, too.
    :param seed: of the labels that are drawn.
    :param progress: show a progress bar over the batches.
    :raises StructureError: for parameters or labels that the module does not have.
    :raises ParameterError: for complex parameters or such without a shape, a batch normalisation
        without running statistics, outputs that are random or depend on other examples, data that
        do not fit the module or the loss, arguments out of range, and precisions of zero or that
        are not finite.

    Source: Daxberger et al., *Laplace Redux* (NeurIPS 2021), sec. 2; Matena & Raffel, *Merging
    Models with Fisher-Weighted Averaging* (NeurIPS 2022), eq. 4. laplace-torch has more structures
    of curvature, but needs torchvision; the diagonals of curvlinops are estimates.

    Example::

        posterior = from_module(network, loader, "cross_entropy")
        to_module(posterior, network)  # a copy of the network at the posterior's mean
    """
    trained = _trained(module, parameters)
    how = _loss(loss, likelihood)
    _check_numbers(curvature, floor, num_samples, num_data, chunk_size)
    prior = _prior_precision(prior_precision, trained)
    count, first = 0, None
    with as_trained(), unchanged(module), evaluating([module]), torch.random.fork_rng():
        torch.manual_seed(seed)
        total = {k: p.new_zeros(p.shape, dtype=torch.float64) for k, p in trained.items()}
        network = Network(module, {k: p.detach() for k, p in trained.items()})
        place = next(iter(trained.values())).device
        for inputs, targets in _batches(data, place, progress):
            first = inputs if first is None else first
            found, size = diagonal(
                network, inputs, targets, how, curvature, num_samples, chunk_size
            )
            count += size
            for k, v in found.items():
                total[k] += v
    if not count:
        raise ParameterError("data has no examples")
    factor = 1.0 if num_data is None else num_data / count
    factors = {}
    for name, p in trained.items():
        precision = (factor * total[name] + prior[name]).clamp(min=floor)
        _check_precision(name, precision)
        scale = precision.rsqrt().to(p.dtype)
        factors[name] = Normal(p.detach(), scale).to_event(p.dim())
    if axes == "auto":
        args = first if isinstance(first, tuple) else (first,)
        if isinstance(first, Mapping):
            args = inspect.signature(module.forward).bind(**first).args
        axes = {k: v for k, v in module_axes(module, *args).axes.items() if k in factors}
    return Posterior(factors, axes, outgoing=outgoing)


def to_module(posterior: Posterior, module: nn.Module) -> nn.Module:
    """A copy of ``module`` with its parameters at central values of their sites, as read by
    :func:`from_module`; parameters that are no sites, and buffers, are as they were.

    :raises StructureError: for sites that the module has no parameters for, or of other shapes.
    """
    return with_values(module, {k: f.center() for k, f in posterior.decomposed.items()})


def with_values(module: nn.Module, values: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a module with some of its parameters and buffers at other values, in the dtype and
    on the device that they have there.

    :raises StructureError: for names that it does not have, or other shapes.
    """
    result = copy.deepcopy(module)
    own = {**dict(result.named_parameters()), **dict(result.named_buffers())}
    if unknown := sorted(set(values) - set(own)):
        raise StructureError(
            f"the {type(module).__name__} has no parameters {unknown[:10]}; it has {list(own)[:20]}"
        )
    with torch.no_grad():
        for name, value in values.items():
            if value.shape != own[name].shape:
                raise StructureError(
                    f"parameter '{name}' of the {type(module).__name__} has shape "
                    f"{tuple(own[name].shape)}, the value for it {tuple(value.shape)}"
                )
            own[name].copy_(value)
    return result


def _trained(module: nn.Module, names: Collection[str] | None) -> dict[str, nn.Parameter]:
    """The parameters that get a site, by name; of tied ones the first name."""
    if not isinstance(module, nn.Module):
        raise ParameterError(f"expected a torch module, got {type(module).__name__}")
    what = type(module).__name__
    every = dict(module.named_parameters())
    if isinstance(names, str) or (unknown := sorted(set(names or ()) - set(every))):
        unknown = [names] if isinstance(names, str) else unknown
        raise StructureError(f"the {what} has no parameters {unknown}; it has {list(every)[:20]}")
    frozen = sorted(k for k in names or () if not every[k].requires_grad)
    if frozen:
        raise StructureError(
            f"parameters {frozen} of the {what} are frozen, so they have no curvature"
        )
    result = {k: p for k, p in every.items() if p.requires_grad and (names is None or k in names)}
    if lazy := [k for k, p in result.items() if nn.parameter.is_lazy(p)]:
        raise ParameterError(f"parameters {lazy} have no shape yet: run the module once first")
    if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise ParameterError(f"the {what} spreads a module over devices: pass that, its .module")
    result = {k: p for k, p in result.items() if p.numel()}
    if strange := [f"{k} ({p.dtype})" for k, p in result.items() if not p.is_floating_point()]:
        raise ParameterError(
            f"parameters must be real floating-point numbers, got {', '.join(strange)}: write a "
            "complex one as its real and imaginary part"
        )
    if not result:
        raise ParameterError(f"the {what} has no parameter that is trained (requires_grad)")
    for k, m in module.named_modules():
        if isinstance(m, _BatchNorm) and m.running_mean is None:
            raise ParameterError(
                f"module '{k}': a {type(m).__name__} without running statistics ties the examples "
                "of a batch together, so none has a gradient of its own; set track_running_stats"
            )
    return result


def _loss(
    loss: str | Callable[[Any, Any], Tensor], likelihood: Callable[[Any], Distribution] | None
) -> Loss:
    if likelihood is not None:
        return Loss(getattr(likelihood, "__name__", "likelihood"), likelihood)
    if callable(loss):
        return Loss(getattr(loss, "__name__", type(loss).__name__), value=loss)
    if not isinstance(loss, str) or loss not in LOSSES:
        raise ParameterError(f"loss must be one of {sorted(LOSSES)} or a function, got {loss!r}")
    return LOSSES[loss]


def _check_numbers(curvature: str, floor: float, *counts: int | None) -> None:
    if curvature not in CURVATURES:
        raise ParameterError(f"curvature must be one of {list(CURVATURES)}, got {curvature!r}")
    if not 0 <= floor < float("inf"):
        raise ParameterError(f"floor must be non-negative and finite, got {floor}")
    for name, n in zip(("num_samples", "num_data", "chunk_size"), counts, strict=True):
        if n is not None and (isinstance(n, bool) or not isinstance(n, int) or n < 1):
            raise ParameterError(f"{name} must be a positive integer, got {n!r}")


def _prior_precision(
    given: float | Tensor | Mapping[str, float | Tensor], parameters: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The prior precisions by name, float64, each of the parameter's shape or one number."""
    named = given if isinstance(given, Mapping) else dict.fromkeys(parameters, given)
    if set(named) != set(parameters):
        raise ParameterError(
            f"prior_precision must name each of {sorted(parameters)}, got {sorted(named)}"
        )
    result = {}
    for name, p in parameters.items():
        try:
            value = torch.as_tensor(named[name], dtype=torch.float64, device=p.device)
        except (TypeError, ValueError, RuntimeError):
            value = torch.tensor(torch.nan)
        if not bool((value.isfinite() & (value >= 0)).all()):
            raise ParameterError(
                f"parameter '{name}': prior_precision must be non-negative and finite, got "
                f"{named[name]}"
            )
        try:
            result[name] = value.expand(p.shape)
        except RuntimeError as e:
            raise ParameterError(
                f"parameter '{name}': prior_precision of shape {tuple(value.shape)} does not "
                f"broadcast to {tuple(p.shape)}"
            ) from e
    return result


def _check_precision(name: str, precision: Tensor) -> None:
    if not bool(precision.isfinite().all()):
        raise ParameterError(f"parameter '{name}': its curvature must be finite, got NaN or inf")
    # In the dtype of the parameters the scale must be finite as well.
    zero = int((precision < 1e-38).sum())
    if zero:
        raise ParameterError(
            f"parameter '{name}': {zero} of {precision.numel()} numbers have no curvature, as "
            "those of units that are never active, and so no posterior: give a positive "
            "prior_precision, or floor=1e-6"
        )


def _batches(data: Any, device: torch.device, progress: bool) -> Iterator[tuple[Any, Any]]:
    """Pairs of inputs and targets, these None where there are none."""
    total = None
    batches: Iterable[Any]
    if isinstance(data, DataLoader | Dataset):
        batches = data if isinstance(data, DataLoader) else DataLoader(data, batch_size=_BATCH)
        with suppress(TypeError):  # an IterableDataset need not know its length
            total = len(batches)
    elif isinstance(data, Tensor | Mapping) or (isinstance(data, tuple) and len(data) == 2):
        size = _size(data)
        batches = (take(data, slice(i, i + _BATCH)) for i in range(0, size, _BATCH))
        total = -(-size // _BATCH)
    elif isinstance(data, Iterable):
        batches = data
    else:
        raise ParameterError(
            "data must be (inputs, targets), a DataLoader, a Dataset or an iterable of batches, "
            f"got {type(data).__name__}"
        )
    for batch in tqdm(batches, total=total, disable=not progress, desc="curvature"):
        pair = isinstance(batch, tuple | list) and len(batch) == 2
        inputs, targets = batch if pair else (batch, None)
        inputs = tuple(inputs) if isinstance(inputs, list) else inputs
        both = pytree.tree_map_only(Tensor, lambda t: t.to(device), (inputs, targets))
        if _size(both):
            yield both


def _size(batch: Any) -> int:
    """The number of examples.

    :raises ParameterError: if tensors differ in it.
    """
    sizes = {
        len(t) if t.dim() else None for t in pytree.tree_leaves(batch) if isinstance(t, Tensor)
    }
    if len(sizes) != 1 or None in sizes:
        found = f"first axes of {sorted(str(n) for n in sizes)}" if sizes else "no tensor"
        raise ParameterError(
            f"data must be torch tensors with one first axis for the examples, got {found}"
        )
    return sizes.pop() or 0
