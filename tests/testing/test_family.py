# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The contract of a family: a right one passes, and one that is wrong in one place does not. That
ours pass is in tests/families/test_contract.py."""

import math

import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from torch.distributions import kl_divergence

from pyro_fusion.families import Family, family, register_family
from pyro_fusion.testing import check_family
from tests.families.geometric import GeometricFamily as Right
from tests.families.members import BARE

LOGITS = torch.tensor([-1.0, 0.3, 1.5], dtype=torch.float64)
OTHERS = torch.tensor([0.0, -0.7], dtype=torch.float64)


class WrongMean(Right):
    """The mean of a distribution that counts from one."""

    def mean(self, params):
        return 1 + torch.exp(-params["logits"]).unsqueeze(-1)

    def from_mean(self, mu, event_shape):
        return {"logits": -(mu[..., 0] - 1).log()}


class WrongNormalizer(Right):
    def log_normalizer(self, params):
        return -2 * F.logsigmoid(params["logits"])


class WrongWayBack(Right):
    def from_mean(self, mu, event_shape):
        return {"logits": mu[..., 0].log()}


class WrongFromNatural(Right):
    def from_natural(self, eta, event_shape):
        return {"logits": eta[..., 0]}


class WrongStatistics(Right):
    def statistics(self, value):
        return 1 + value.unsqueeze(-1) ** 2


class WrongShape(Right):
    def natural(self, params):
        return F.logsigmoid(-params["logits"]).unsqueeze(-1).repeat_interleave(2, -1)


class WrongDivergence(Right):
    def kl(self, p, q):
        return 1.5 * super().kl(p, q)


class NoLocation(Right):
    """Logits do not move with the value."""

    location = "logits"


class NoParameter(Right):
    location = "loc"


class ScaleAlone(Right):
    scale = "logits"


class Unchecked(Right):
    """Takes what is no number."""

    def build(self, params, validate_args=None):
        return super().build(params, validate_args=False)

    def params(self, d):
        return {"logits": d.logits.nan_to_num(0.0)}


@pytest.fixture(autouse=True)
def _registry(monkeypatch):
    monkeypatch.setattr(family, "_BY_TYPE", dict(family._BY_TYPE))


def members():
    return dist.Geometric(logits=LOGITS), dist.Geometric(logits=OTHERS)


def truth():
    return kl_divergence(dist.Geometric(logits=LOGITS[:, None]), dist.Geometric(logits=OTHERS))


@pytest.mark.parametrize("given", [True, False])
def test_a_right_one(given):
    register_family(torch.distributions.Geometric)(Right)
    check_family(*members(), divergence=truth() if given else None)


@pytest.mark.parametrize("name", sorted(BARE))
def test_without_given_divergences(name):
    make = BARE[name][0]
    statistics = None
    if name == "Categorical":
        statistics = lambda value: F.one_hot(value.long(), 4).double()  # noqa: E731
    check_family(make(torch.arange(3)), make(torch.arange(10, 12)), statistics=statistics)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (WrongMean, "mean against the gradient of the log-normaliser"),
        (WrongNormalizer, "against log p"),
        (WrongWayBack, r"from_mean\(mean\), logits"),
        (WrongFromNatural, r"from_natural\(natural\), logits"),
        (WrongStatistics, "against log p"),
        (WrongShape, "expected as many natural as mean parameters, got 2 and 1"),
        (WrongDivergence, "kl, one by one"),
        (NoLocation, "location 'logits': KL of members moved"),
        (NoParameter, r"location: expected one of \['logits'\] or None, got 'loc'"),
        (ScaleAlone, "scale 'logits': expected a location too"),
    ],
)
def test_a_wrong_one(wrong, message):
    register_family(torch.distributions.Geometric)(wrong)
    with pytest.raises(AssertionError, match=message):
        check_family(*members(), divergence=truth())


class VonMises(Family):
    """T(x) = (cos x, sin x), η = κ (cos μ, sin μ), A(η) = log I_0(κ)."""

    distribution = dist.VonMises
    event_dim = 0
    parameters = {"loc": 0, "concentration": 0}
    location = "loc"

    def event_shape(self, params):
        return torch.Size()

    def statistics(self, value):
        return torch.stack([value.cos(), value.sin()], -1)

    def natural(self, params):
        return params["concentration"].unsqueeze(-1) * self.statistics(params["loc"])

    def mean(self, params):
        return _length(params["concentration"]).unsqueeze(-1) * self.statistics(params["loc"])

    def log_normalizer(self, params):
        return torch.special.i0e(params["concentration"]).log() + params["concentration"]

    def from_natural(self, eta, event_shape):
        return {"loc": torch.atan2(eta[..., 1], eta[..., 0]), "concentration": eta.norm(dim=-1)}

    def from_mean(self, mu, event_shape):
        r = mu.norm(dim=-1)
        k = r * (2 - r**2) / (1 - r**2)
        for _ in range(20):
            a = _length(k)
            k = k - (a - r) / (1 - a / k - a**2)
        return {"loc": torch.atan2(mu[..., 1], mu[..., 0]), "concentration": k}


def _length(concentration):
    return torch.special.i1e(concentration) / torch.special.i0e(concentration)


class NoScale(VonMises):
    """A von Mises distribution is on a circle: a multiple of one is none."""

    scale = "concentration"


def test_a_log_prob_that_is_an_approximation():
    p = dist.VonMises(LOGITS, torch.tensor([1.0, 5.0, 20.0]).double())
    q = dist.VonMises(OTHERS, torch.tensor([3.0, 0.5]).double())
    register_family(torch.distributions.VonMises)(VonMises)
    with pytest.raises(AssertionError, match="against log p"):
        check_family(p, q)
    check_family(p, q, rtol=1e-6)
    register_family(torch.distributions.VonMises)(NoScale)
    with pytest.raises(AssertionError, match="scale 'concentration': KL of members times 2"):
        check_family(p, q, rtol=1e-6)


def test_wrong_divergences():
    with pytest.raises(AssertionError, match="pairwise_kl against the given divergences"):
        p, q = (dist.Normal(x, 1.0) for x in (LOGITS, OTHERS))
        check_family(p, q, divergence=torch.zeros(3, 2).double())


def test_a_name_that_another_family_has():
    register_family(torch.distributions.Geometric)(Right)

    class Geometric(dist.Geometric):
        pass

    class Twin(Right):
        distribution = Geometric

    register_family()(Twin)
    with pytest.raises(AssertionError, match="one family called Geometric, by which files know"):
        check_family(Geometric(logits=LOGITS), Geometric(logits=OTHERS))


@pytest.mark.parametrize(
    ("p", "q", "message"),
    [
        (dist.Normal(LOGITS[0], 1.0), dist.Normal(OTHERS, 1.0), "p: expected one batch axis of at"),
        (dist.Normal(LOGITS, 1.0), dist.Normal(OTHERS[:1], 1.0), "q: expected one batch axis of"),
        (dist.Normal(LOGITS.float(), 1.0), dist.Normal(OTHERS, 1.0), "float64, got torch.float32"),
        (dist.Normal(LOGITS, 1.0), dist.LogNormal(OTHERS, 1.0), "of one structure"),
        (dist.Normal(LOGITS * 0, 1.0), dist.Normal(OTHERS, 1.0), "expected members that differ"),
    ],
)
def test_members_that_are_no_test(p, q, message):
    with pytest.raises(AssertionError, match=message):
        check_family(p, q)


def test_no_generator_is_left_changed():
    before = torch.get_rng_state()
    check_family(dist.Normal(LOGITS, 1.0), dist.Normal(OTHERS, math.e))
    assert torch.equal(before, torch.get_rng_state())
