# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Effect handlers: sites held at values, data drawn evenly, and sites integrated over."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

__all__ = ["Cloud", "EvenDraws", "Held", "Integrated"]

# So many draws stand for a continuous distribution.
_DRAWS = 128


class Held(Messenger):
    """Holds sites at values, as observations.

    :param values: site -> value. These have no density: their priors are in :attr:`prior`.
    :param scored: site -> value. These keep their density, as data have.
    :ivar prior: site -> the log-density of its value under the model, once it has run.
    """

    def __init__(self, values: Mapping[str, Tensor], scored: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values, self.scored = values, scored
        self.prior: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if name in self.values:
            value = self.values[name]
            self.prior[name] = msg["fn"].log_prob(value).sum()
            msg["fn"] = dist.Delta(value, event_dim=msg["fn"].event_dim)
        elif name in self.scored:
            value = self.scored[name]
        else:
            return
        msg["value"], msg["is_observed"] = value, True


class EvenDraws(Messenger):
    """Draws Categorical, Normal and MultivariateNormal sites from a scrambled Sobol sequence, one
    point for each datum, so that data are evenly spread; others are drawn as ever.

    :param dim: the dimension of the plate of data, negative.
    :param width: how many numbers a datum takes. With none, nothing is drawn, but the run of the
        model counts them: :attr:`needed`.
    :param size: the number of data.
    :param seed: of the scrambling.
    """

    def __init__(self, dim: int, size: int, width: int, seed: int) -> None:
        super().__init__()
        self.dim, self.size, self.needed = dim, size, 0
        self._points: Tensor | None = None
        if 0 < width <= torch.quasirandom.SobolEngine.MAXDIM:
            engine = torch.quasirandom.SobolEngine(width, scramble=True, seed=seed)
            self._points = engine.draw(size, dtype=torch.float64)

    def _pyro_sample(self, msg: Any) -> None:
        if msg["value"] is not None or msg["is_observed"] or msg["done"]:
            return
        fn = inner = msg["fn"]
        while isinstance(inner, torch.distributions.Independent):
            inner = inner.base_dist
        if type(inner) not in (dist.Categorical, dist.Normal, dist.MultivariateNormal):
            return
        batch = fn.batch_shape
        if len(batch) < -self.dim or batch[self.dim] != self.size or not self.size:
            return
        width = fn.shape().numel() // self.size
        first, self.needed = self.needed, self.needed + width
        if self._points is None:
            return
        axis = len(batch) + self.dim
        shape = list(fn.shape())
        del shape[axis]
        u = self._points[:, first : first + width].reshape(self.size, *shape).movedim(0, axis)
        msg["value"], msg["done"] = _quantile(inner, u), True


@dataclass(frozen=True)
class Cloud:
    """Draws that stand for a continuous distribution in sums.

    :ivar values: ``[M, *batch_shape, *event_shape]``.
    :ivar log_prob: their density where they were drawn, ``[M, *batch_shape]``.
    """

    values: Tensor
    log_prob: Tensor

    @classmethod
    def of(cls, d: Any) -> Cloud:
        """Draws from a distribution."""
        with torch.no_grad():
            values = d.sample((_DRAWS,))
            return cls(values, d.log_prob(values))


class Integrated(Messenger):
    """Integrates over continuous sites: each takes the values of a cloud, weighted by its density
    there over that of the draws, and enumerated.

    :param clouds: site -> its cloud.
    """

    def __init__(self, clouds: Mapping[str, Cloud]) -> None:
        super().__init__()
        self.clouds = clouds

    def _pyro_sample(self, msg: Any) -> None:
        cloud = self.clouds.get(msg["name"])
        if cloud is None:
            return
        fn = msg["fn"]
        ratio = (fn.log_prob(cloud.values) - cloud.log_prob).movedim(0, -1)
        index = pyro.sample(f"_draw_of_{msg['name']}", dist.Categorical(logits=ratio))
        # The draws lie along the axis over which the index is enumerated.
        between = (1,) * (index.dim() - cloud.log_prob.dim())
        shape = (len(cloud.values), *between, *cloud.values.shape[1:])
        value = cloud.values.reshape(shape)
        msg["fn"] = dist.Delta(value, event_dim=fn.event_dim)
        msg["value"], msg["is_observed"] = value, True


def _quantile(d: Any, u: Tensor) -> Tensor:
    """The image under ``d`` of numbers that are uniform on the unit interval."""
    if isinstance(d, dist.Categorical):
        below = d.probs.cumsum(-1)[..., :-1].contiguous()
        return torch.searchsorted(below, u.to(below).unsqueeze(-1).contiguous()).squeeze(-1)
    u = u.clamp(1e-9, 1 - 1e-9)
    noise = torch.special.ndtri(u)
    if isinstance(d, dist.Normal):
        return d.loc + d.scale * noise.to(d.scale)
    tril = d._unbroadcasted_scale_tril
    return d.loc + (tril @ noise.to(tril).unsqueeze(-1)).squeeze(-1)
