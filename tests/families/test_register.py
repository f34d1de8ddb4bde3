# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""A family of one's own, registered as a user would."""

import pyro.distributions as dist
import pytest
import torch
from torch.distributions import kl_divergence

from pyro_fusion.errors import UnsupportedFamilyError
from pyro_fusion.families import Factor, kl, pairwise_kl, register_family
from pyro_fusion.families import family as base
from pyro_fusion.posterior.posterior import Posterior
from tests.families.geometric import GeometricFamily


@pytest.fixture
def geometric(monkeypatch):
    """Registered for one test only."""
    monkeypatch.setattr(base, "_BY_TYPE", dict(base._BY_TYPE))

    return register_family(torch.distributions.Geometric)(GeometricFamily)


def make(*probs):
    return dist.Geometric(torch.tensor(probs, dtype=torch.float64))


def test_unregistered():
    with pytest.raises(UnsupportedFamilyError, match=r"@register_family\(Geometric\)"):
        Factor.of(make(0.5))


def test_pairwise_kl_is_that_of_torch(geometric):
    p, q = make(0.1, 0.5, 0.9), make(0.2, 0.5)
    truth = kl_divergence(make(0.1, 0.5, 0.9).expand([2, 3]), dist.Geometric(q.probs[:, None])).T
    torch.testing.assert_close(pairwise_kl(p, q), truth, rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(kl(p, make(0.2)), truth[:, 0], rtol=1e-9, atol=1e-14)


def test_conversions_and_wrappers(geometric):
    f = Factor.of(make(0.1, 0.5, 0.9).to_event(1))
    for back in (f.from_natural(f.natural), f.from_mean(f.mean)):
        torch.testing.assert_close(back.params["logits"], f.params["logits"])
    d = f.distribution()
    assert d.event_shape == (3,)
    value = torch.tensor([0.0, 3.0, 1.0])
    torch.testing.assert_close(d.log_prob(value), make(0.1, 0.5, 0.9).log_prob(value).sum())


def test_in_a_posterior_and_its_file(geometric, tmp_path):
    posterior = Posterior({"n": make(0.1, 0.5)}, {"n": "component"})
    posterior.save(tmp_path / "p")
    again = Posterior.load(tmp_path / "p")
    assert "Geometric" in repr(again)
    assert torch.equal(again.factors["n"].logits, posterior.factors["n"].logits)


def test_gone_again():
    with pytest.raises(UnsupportedFamilyError):
        Factor.of(make(0.5))
