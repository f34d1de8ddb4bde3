# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Everything runs where the posteriors are, and the host waits for that device only where it must:
on a device that is not there (``device.py``), and on a GPU."""

import warnings
from collections import Counter

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from torch.nn.functional import one_hot

from pyro_fusion import (
    FusionEM,
    FusionGibbs,
    FusionGuide,
    FusionModel,
    GroupNormPrior,
    IndianBuffetPrior,
    Posterior,
    PosteriorGuide,
    fuse,
)
from pyro_fusion.assignment import Matching, RelaxedMatching, relaxed, sinkhorn
from tests.device import DEVICE, elsewhere
from tests.fusion.networks import OUTGOING
from tests.fusion.networks import parties as networks
from tests.fusion.networks import settings_of as settings_of_networks

POOLINGS = ["exclusive", "inclusive", "product"]
SIZES = (3, 2, 4, 3)


def owners(sizes=SIZES):
    """The true atom of each component, per party."""
    g = torch.Generator().manual_seed(3)
    return [torch.randperm(max(sizes) + 1, generator=g)[:size] for size in sizes]


# Of networks: units of either layer.
SMALL = ((3, 2), (2, 3), (3, 3))


def posteriors(sizes=SIZES, dim=3):
    """Components of a labelled normal and gamma site, weights that are carried, a shared site."""
    g = torch.Generator().manual_seed(3)
    every = 5 * torch.randn(max(sizes) + 1, dim, generator=g, dtype=torch.float64)
    result = []
    for s, (size, own) in enumerate(zip(sizes, owners(sizes), strict=True)):
        loc = every[own] + 0.2 * torch.randn(size, dim, generator=g, dtype=torch.float64)
        result.append(
            Posterior(
                {
                    "loc": dist.Normal(loc, torch.full_like(loc, 0.3 + 0.1 * s)).to_event(1),
                    "rate": dist.Gamma(9.0 + own.double(), torch.full((size,), 2.0 + s).double()),
                    "weights": dist.Dirichlet(1 + own.double()),
                    "noise": dist.LogNormal(torch.tensor(0.1 * s).double(), 0.2),
                },
                {"loc": ("atom",), "rate": ("atom",), "weights": ("atom",)},
            )
        )
    return result


def base(pooling, dim=3):
    if pooling != "product":
        return None
    one = torch.ones((), dtype=torch.float64)
    return {
        "loc": dist.Normal(torch.zeros(dim).double(), 20.0).to_event(1),
        "rate": dist.Gamma(one, 0.01 * one),
        "weights": dist.Dirichlet(torch.ones(2).double()),
        "noise": dist.LogNormal(0 * one, 3.0),
    }


def settings_of(pooling, solver):
    """Of ``fuse``."""
    if solver == "relaxed" and pooling == "product":
        pytest.skip("the relaxed solver is for the KL poolings")
    prior = GroupNormPrior() if solver == "relaxed" else None
    return {"prior": base(pooling), "assignment_prior": prior, "solver": solver, "restarts": 0}


def there(parties):
    return [p.to(device=DEVICE) for p in parties]


def count(reads):
    """How often each file reads."""
    return Counter(place.split(": ")[1].split(":")[0] for place in reads)


@pytest.fixture
def _no_validation():
    """Which reads every argument and value."""
    with pyro.validation_enabled(False):
        yield
    torch.distributions.Distribution.set_default_validate_args(True)


class TestTheDevice:
    def test_tensors_of_two_devices_do_not_mix(self):
        with elsewhere() as reads:
            x = torch.ones(2, device=DEVICE)
            assert x.device == DEVICE and (x + 1).device == DEVICE
            with pytest.raises(RuntimeError, match="expected all tensors on one device"):
                x + torch.ones(2)
            assert (x + torch.tensor(1.0)).device == DEVICE  # a number
            with pytest.raises(RuntimeError, match="expected all tensors on one device"):
                torch.ones(2)[torch.zeros(1, dtype=torch.long).to(DEVICE)]
            reads.clear()
            assert not reads

    def test_reads_are_noted(self):
        with elsewhere() as reads:
            x = torch.randn(3, 3).to(DEVICE, non_blocking=True).square() + 1
            index = torch.tensor([1]).to(DEVICE, non_blocking=True)
            quiet = x[index].sum() + torch.linalg.cholesky_ex(x).L.sum() + x.argmax()
            quiet = quiet * torch.segment_reduce(x[0], "sum", lengths=index * 3, unsafe=True)
            assert not reads
            waits = [
                lambda: float(quiet),
                lambda: bool((x > 0).all()),
                lambda: x.cpu(),
                lambda: x.tolist(),
                lambda: x[x > 0],
                lambda: x[torch.tensor([1])],
                lambda: (x > 0).nonzero(),
                lambda: torch.tensor([1.0], device=DEVICE),
                lambda: torch.linalg.cholesky(x @ x.mT + torch.eye(3, device=DEVICE)),
                lambda: torch.segment_reduce(x[0], "sum", lengths=index * 3),
                lambda: torch.zeros(3).to(DEVICE),
            ]
            for wait in waits:
                before = len(reads)
                wait()
                assert len(reads) > before, reads
            assert set(count(reads)) == {"test_device.py"}

    def test_values_and_gradients_are_right(self):
        x = torch.randn(4, 4, dtype=torch.float64)
        w = torch.randn(4, requires_grad=True, dtype=torch.float64)
        (x @ w).square().sum().backward()
        with elsewhere():
            v = w.detach().to(DEVICE).requires_grad_()
            (x.to(DEVICE) @ v).square().sum().backward()
            assert v.grad.device == DEVICE
            torch.testing.assert_close(v.grad.cpu(), w.grad)


@pytest.mark.parametrize("pooling", POOLINGS)
class TestFusion:
    @pytest.mark.parametrize("solver", ["coordinate", "relaxed", "sinkhorn"])
    def test_fuse(self, pooling, solver):
        settings = settings_of(pooling, solver)
        here = fuse(posteriors(), pooling, **settings)
        with elsewhere():
            far = fuse(there(posteriors()), pooling, **settings)
            assert far.posterior.device == DEVICE
            assert far.objective == pytest.approx(here.objective, rel=1e-9)
            for a, b in zip(far.assignment, here.assignment, strict=True):
                assert torch.equal(a, b)
            for site, f in far.posterior.to(device="cpu").factors.items():
                torch.testing.assert_close(f.mean, here.posterior.factors[site].mean)
            assert all(v.device == DEVICE for v in PosteriorGuide(far.posterior)().values())

    def test_fuse_along_labels_that_share_sites(self, pooling):
        local = [Posterior(p.factors, p.axes, outgoing=OUTGOING) for p in networks(sizes=SMALL)[0]]
        expected = fuse(local, restarts=0, **settings_of_networks(pooling))
        with elsewhere():
            fusion = fuse(there(local), restarts=0, **settings_of_networks(pooling))
            assert fusion.posterior.device == DEVICE
            assert fusion.objective == pytest.approx(expected.objective)
            found = fusion.posterior.to(device="cpu")
        for site, f in expected.posterior.decomposed.items():
            for name, value in f.params.items():
                torch.testing.assert_close(found.decomposed[site].params[name], value)

    @pytest.mark.parametrize("solver", ["coordinate", "relaxed", "sinkhorn"])
    def test_a_step_reads_no_more_of_a_larger_problem(self, pooling, solver, _no_validation):
        prior = settings_of(pooling, solver)["assignment_prior"] or IndianBuffetPrior()
        reads_of = []
        for sizes in ((2, 2, 2, 2), (5, 6, 6, 4, 6, 6)):
            with elsewhere() as reads:
                normal = [
                    Posterior({"loc": p.factors["loc"]}, {"loc": ("atom",)})
                    for p in there(posteriors(sizes))
                ]
                # One party has its components in another order than all others.
                own = torch.cat([o for o in owners(sizes)[1:]])
                wrong = torch.cat([owners(sizes)[0].roll(1), own])
                given = {"prior": base(pooling), "assignment": {"atom": wrong}}
                model = FusionModel(normal, pooling, prior, **given)
                guide = FusionGuide(model)
                em = FusionEM(model, guide, solver=solver)
                reads.clear()
                em.step()
                assert not torch.equal(guide.assignment["atom"].cpu(), wrong)
            # Iterative solvers read for their stopping tests, which is counted below.
            loops = ("scaling.py", "sinkhorn.py", "interior.py", "relaxed.py")
            reads_of.append({f: n for f, n in count(reads).items() if f not in loops})
        small, large = reads_of
        assert large == small

    @pytest.mark.parametrize("relaxed", [False, True])
    def test_svi(self, pooling, relaxed, _no_validation):
        elbo = Trace_ELBO() if pooling == "product" else TraceMeanField_ELBO()

        def fit(parties, reads):
            pyro.clear_param_store()
            model = FusionModel(parties, pooling, prior=base(pooling))
            guide = FusionGuide(model, relaxed=relaxed)
            svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), elbo)
            reads.clear()
            losses = []
            for _ in range(3):
                torch.manual_seed(0)
                losses.append(svi.step())
            found = Counter(reads)
            guide.harden()
            assert svi.step() < float("inf")
            return losses, found, guide

        here, _, _ = fit(posteriors(), [])
        with elsewhere() as reads:
            far, found, guide = fit(there(posteriors()), reads)
            assert all(p.device == DEVICE for p in guide.parameters())
        assert far == pytest.approx(here, rel=1e-9)
        # Pyro reads the loss, Trace_ELBO that of each site.
        own = {place: n for place, n in found.items() if ": util.py:" not in place}
        # And a relaxed assignment has one stopping test, for parties of one size at once.
        assert len(own) == relaxed and all(": matching.py:" in place for place in own)

    def test_predictive(self, pooling, _no_validation):
        with elsewhere():
            model = FusionModel(there(posteriors()), pooling, prior=base(pooling))
            draws = pyro.infer.Predictive(model, guide=FusionGuide(model), num_samples=2)()
            for values in (draws, model()):  # assignments, which are discrete, are on the host
                host = {k for k, v in values.items() if v.device.type == "cpu"}
                assert host == {"atom_assignment"}
                assert {v.device for k, v in values.items() if k not in host} == {DEVICE}


@pytest.mark.parametrize("pooling", ["exclusive", "product"])
def test_a_program_of_ones_own_reads_no_more(pooling, _no_validation):
    class Model(FusionModel):
        def assignment_prior(self, label):
            rate = torch.ones((), dtype=torch.float64, device=DEVICE)
            return IndianBuffetPrior(alpha=pyro.sample("alpha", dist.Gamma(2 * rate, rate)))

        def scale(self, label):
            return super().scale(label) * (1 + self.party(label)) if label else super().scale(None)

    class Guide(FusionGuide):
        def forward(self):
            start = torch.ones((), dtype=torch.float64, device=DEVICE)
            pyro.sample("alpha", dist.Delta(pyro.param("mode", lambda: start)))
            return super().forward()

    with elsewhere() as reads:
        model = Model(there(posteriors()), pooling, prior=base(pooling))
        svi = SVI(model, Guide(model), pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
        svi.step()
        reads.clear()
        svi.step()
        assert set(count(reads)) == {"util.py"}


class TestSolvers:
    def costs(self):
        g = torch.Generator().manual_seed(0)
        return [10 * torch.rand(6, n, generator=g, dtype=torch.float64) for n in (4, 3, 5, 2)]

    def test_relaxed_reads_once_an_iteration(self):
        here = relaxed(self.costs(), GroupNormPrior(3.0))
        with elsewhere() as reads:
            far = relaxed([c.to(DEVICE) for c in self.costs()], GroupNormPrior(3.0))
            iterations = [place for place in reads if "aten._to_copy: interior.py" in place]
            assert far.objective == pytest.approx(here.objective)
            assert far.iterations == here.iterations
            # And once more to split the parties into blocks.
            assert len(iterations) == far.iterations + 1

    def test_sinkhorn_reads_once_an_iteration(self):
        here = sinkhorn(self.costs(), GroupNormPrior(3.0))
        with elsewhere() as reads:
            far = sinkhorn([c.to(DEVICE) for c in self.costs()], GroupNormPrior(3.0))
            assert far.objective == pytest.approx(here.objective)
            assert far.iterations == here.iterations
            assert count(reads)["scaling.py"] == far.iterations


def test_gibbs():
    def draws(parties):
        torch.manual_seed(0)
        model = FusionModel(parties, "product", prior=base("product"))
        return FusionGibbs(model).run(20, warmup=5).only_label()

    here = draws(posteriors())
    with elsewhere():
        far = draws(there(posteriors()))
    assert torch.equal(far.assignments, here.assignments)
    torch.testing.assert_close(far.alpha, here.alpha)


def test_matchings():
    logits = torch.randn(3, 4, 6, dtype=torch.float64)
    here = Matching(logits)
    with elsewhere():
        far = Matching(logits.to(DEVICE))
        for name in ("log_normalizer", "mode"):
            torch.testing.assert_close(getattr(far, name).cpu(), getattr(here, name))
        value = far.sample()
        assert value.device == DEVICE
        assert bool((here.log_prob(value.cpu()) == far.log_prob(value).cpu()).all())
        soft = RelaxedMatching(logits.to(DEVICE), 0.5).rsample()
        assert soft.device == DEVICE and bool((soft.sum(-1) - 1).abs().max() < 1e-6)


@pytest.mark.cuda
@pytest.mark.parametrize("pooling", POOLINGS)
class TestOnTheGPU:
    """The same on a real one, whose own checks say what waits."""

    @pytest.mark.parametrize("relaxed", [False, True])
    def test_svi_waits_for_the_loss_alone(self, pooling, relaxed, _no_validation):
        local = [p.to(device="cuda") for p in posteriors()]
        model = FusionModel(local, pooling, prior=base(pooling))
        guide = FusionGuide(model, relaxed=relaxed)
        elbo = Trace_ELBO() if pooling == "product" else TraceMeanField_ELBO()
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), elbo)
        losses = [svi.step() for _ in range(20)]
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")  # itself warns that it is a prototype
            found.clear()
            try:
                losses.append(svi.step())
            finally:
                torch.cuda.set_sync_debug_mode("default")
        places = Counter(w.filename.rpartition("/")[2] for w in found)
        assert set(places) <= {"util.py", *(["matching.py"] if relaxed else [])}, places
        assert losses[-1] < losses[0]

    @pytest.mark.parametrize("solver", ["coordinate", "relaxed", "sinkhorn"])
    def test_fuse(self, pooling, solver):
        settings = settings_of(pooling, solver)
        here = fuse(posteriors(), pooling, **settings)
        far = fuse([p.to(device="cuda") for p in posteriors()], pooling, **settings)
        assert far.posterior.device.type == "cuda"
        assert far.objective[-1] == pytest.approx(here.objective[-1], rel=1e-6)
        for a, b in zip(far.assignment, here.assignment, strict=True):
            same = one_hot(a) @ one_hot(a).T
            assert torch.equal(same, one_hot(b) @ one_hot(b).T)
