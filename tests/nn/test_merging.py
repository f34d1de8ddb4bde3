# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Merging networks, against the paper's formula and against networks that are known to be one."""

import copy
import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.distributions import Gamma, LogNormal, Normal

from pyro_fusion import (
    ParameterError,
    Posterior,
    StopReason,
    StructureError,
    fuse,
    merge_modules,
    search_weights,
    to_module,
)
from pyro_fusion.nn import align, alignment

SIZES = (5, 7, 4, 3)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def network(sizes=SIZES, dtype=torch.float64):
    layers = []
    for n, m in itertools.pairwise(sizes):
        layers += [nn.Linear(n, m), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).to(dtype)


def posterior_of(module, scale=1.0, spread=2.0):
    """With precisions of all sizes."""
    return Posterior(
        {
            k: Normal(p.detach(), scale * (spread * torch.randn_like(p)).exp())
            for k, p in module.named_parameters()
        }
    )


def fisher(posterior):
    return {k: f.params["scale"] ** -2 for k, f in posterior.decomposed.items()}


def shuffled(module, seed=1):
    """The same function, hidden units in another order."""
    generator = torch.Generator().manual_seed(seed)
    result = copy.deepcopy(module)
    layers = [m for m in result if isinstance(m, nn.Linear)]
    with torch.no_grad():
        for a, b in itertools.pairwise(layers):
            order = torch.randperm(a.out_features, generator=generator)
            a.weight.copy_(a.weight[order])
            a.bias.copy_(a.bias[order])
            b.weight.copy_(b.weight[:, order])
    return result


def assert_same(module, expected, **kwargs):
    for (k, p), q in zip(module.named_parameters(), expected.values(), strict=True):
        torch.testing.assert_close(p.detach(), q, msg=lambda m, k=k: f"{k}: {m}", **kwargs)


class TestFisherMerging:
    weights = (0.2, 0.5, 1.7)

    def parties(self):
        modules = [network() for _ in self.weights]
        return modules, [posterior_of(m) for m in modules]

    def expected(self, modules, information, weights=weights):
        """Matena & Raffel, eq. 4."""
        result = {}
        for k, _ in modules[0].named_parameters():
            terms = [w * f[k] for w, f in zip(weights, information, strict=True)]
            values = [dict(m.named_parameters())[k].detach() for m in modules]
            total = sum(t * v for t, v in zip(terms, values, strict=True))
            result[k] = total / sum(terms)
        return result

    def test_closed_form(self):
        modules, posteriors = self.parties()
        expected = self.expected(modules, [fisher(p) for p in posteriors])
        merged = merge_modules(modules, posteriors, weights=self.weights)
        assert_same(merged, expected, rtol=1e-10, atol=0)
        fused = fuse(posteriors, pooling="exclusive", weights=self.weights).posterior
        assert_same(to_module(fused, modules[0]), expected, rtol=1e-10, atol=0)

    def test_floor(self):
        modules, posteriors = self.parties()
        information = [{k: v.clamp(min=1.0) for k, v in fisher(p).items()} for p in posteriors]
        assert any((f < 1).any() for p in posteriors for f in fisher(p).values())
        merged = merge_modules(modules, posteriors, weights=self.weights, floor=1.0)
        assert_same(merged, self.expected(modules, information), rtol=1e-10, atol=0)

    def test_normalised(self):
        modules, posteriors = self.parties()
        information = []
        for p in posteriors:
            norm = torch.cat([f.flatten() for f in fisher(p).values()]).norm()
            information.append({k: f / norm for k, f in fisher(p).items()})
        merged = merge_modules(modules, posteriors, weights=self.weights, normalize=True)
        assert_same(merged, self.expected(modules, information), rtol=1e-10, atol=0)

    def test_average(self):
        modules, _ = self.parties()
        one = [{k: torch.ones_like(p) for k, p in m.named_parameters()} for m in modules]
        merged = merge_modules(modules, weights=self.weights)
        assert_same(merged, self.expected(modules, one), rtol=1e-10, atol=0)

    def test_nothing_is_changed(self):
        modules, posteriors = self.parties()
        before = [copy.deepcopy(m.state_dict()) for m in modules]
        merged = merge_modules(modules, posteriors)
        for m, state in zip(modules, before, strict=True):
            assert all(torch.equal(v, state[k]) for k, v in m.state_dict().items())
        assert merged is not modules[0] and type(merged) is nn.Sequential

    def test_dtype_of_the_modules(self):
        modules = [network(dtype=torch.float32) for _ in range(2)]
        merged = merge_modules(modules, [posterior_of(m) for m in modules])
        assert all(p.dtype == torch.float32 for p in merged.parameters())

    def test_what_is_no_site_is_the_first_modules(self):
        modules, posteriors = self.parties()
        heads = ("4.weight", "4.bias")
        rest = [
            Posterior({k: f for k, f in p.decomposed.items() if k not in heads}) for p in posteriors
        ]
        merged = dict(merge_modules(modules, rest, weights=self.weights).named_parameters())
        first = dict(modules[0].named_parameters())
        expected = self.expected(modules, [fisher(p) for p in posteriors])
        for k, p in merged.items():
            torch.testing.assert_close(p, first[k] if k in heads else expected[k])

    def test_tied_parameters_stay_tied(self):
        modules = [nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).double() for _ in range(2)]
        for m in modules:
            m[1].weight = m[0].weight
        merged = merge_modules(modules)
        assert merged[0].weight is merged[1].weight
        expected = (modules[0][0].weight + modules[1][0].weight) / 2
        torch.testing.assert_close(merged[1].weight, expected)


class TestAlignment:
    def parties(self):
        module = network()
        modules = [module, shuffled(module, 1), shuffled(module, 2)]
        return modules, [posterior_of(m) for m in modules]

    @pytest.mark.parametrize("how", ["average", "fisher"])
    def test_one_network_in_several_orders(self, how):
        modules, posteriors = self.parties()
        x = torch.randn(10, SIZES[0]).double()
        given = None if how == "average" else posteriors
        merged = merge_modules(modules, given, axes="auto")
        torch.testing.assert_close(merged(x), modules[0](x))
        as_it_is = merge_modules(modules, given)
        assert (as_it_is(x) - modules[0](x)).abs().max() > 0.05

    def test_align(self):
        module = network()
        one = posterior_of(module)
        order = torch.randperm(SIZES[1])
        axes = {"0.weight": ("hidden1",), "0.bias": ("hidden1",), "2.weight": (None, "hidden1")}
        other = Posterior(Posterior(one.decomposed, axes).permute("hidden1", order).decomposed)
        first, second = align([one, other], axes)
        assert not first.labels
        for k, f in first.decomposed.items():
            for name, v in f.params.items():
                assert torch.equal(v, second.decomposed[k].params[name])

    def test_formula_holds_in_the_common_order(self):
        modules, posteriors = self.parties()
        merged = merge_modules(modules, posteriors, axes="auto", weights=[1, 2, 3])
        axes = {
            "0.weight": ("a",), "0.bias": ("a",), "2.weight": ("b", "a"), "2.bias": ("b",),
            "4.weight": (None, "b"),
        }  # fmt: skip
        expected = to_module(fuse(align(posteriors, axes), weights=[1, 2, 3]).posterior, modules[0])
        assert_same(merged, dict(expected.named_parameters()))

    @pytest.mark.cuda
    def test_on_a_gpu(self):
        modules, posteriors = self.parties()
        expected = merge_modules(modules, posteriors, axes="auto")
        moved = merge_modules(
            [m.cuda() for m in modules], [p.to("cuda") for p in posteriors], axes="auto"
        )
        for p, q in zip(moved.parameters(), expected.parameters(), strict=True):
            assert p.device.type == "cuda"
            torch.testing.assert_close(p.cpu(), q)

    def test_no_label(self):
        _, posteriors = self.parties()
        with pytest.raises(StructureError, match="nothing to align"):
            align(posteriors, {"other": ("hidden1",)})


class TestBatchNormalisation:
    def test_moments_of_the_mixture(self):
        modules, parts = [], [torch.randn(50, 4), 3 + 2 * torch.randn(150, 4)]
        for x in parts:
            m = nn.Sequential(nn.BatchNorm1d(4, momentum=None), nn.Linear(4, 2))
            m(x)
            # What torch has is the unbiased variance; what is mixed is the variance.
            m[0].running_var.copy_(x.var(0, correction=0))
            modules.append(m.eval())
        merged = merge_modules(modules, weights=[len(x) for x in parts])
        x = torch.cat(parts)
        torch.testing.assert_close(merged[0].running_mean, x.mean(0))
        torch.testing.assert_close(merged[0].running_var, x.var(0, correction=0))
        assert merged[0].num_batches_tracked == 1

    @pytest.mark.parametrize("affine", [True, False])
    @pytest.mark.parametrize("how", ["auto", "by hand"])
    def test_statistics_go_with_the_units(self, affine, how):
        norm = nn.BatchNorm1d(6, affine=affine)
        module = nn.Sequential(nn.Linear(5, 6), norm, nn.ReLU(), nn.Linear(6, 2)).double()
        for _ in range(30):
            module(1 + 2 * torch.randn(50, 5).double())
        state = module.eval().state_dict()
        order = torch.randperm(6)
        for k, v in state.items():
            if v.shape[:1] == (6,):
                state[k] = v[order]
        state["3.weight"] = state["3.weight"][:, order]
        other = copy.deepcopy(module)
        other.load_state_dict(state)
        axes = "auto"
        if how == "by hand":
            axes = {"0.weight": ("units",), "0.bias": "units", "3.weight": (None, "units")}
            axes |= {f"1.{k}": ("units",) for k, v in norm.state_dict().items() if v.dim()}
            if affine:  # statistics have the label of the weight beside them
                axes = {k: v for k, v in axes.items() if "running" not in k}
        x = torch.randn(10, 5).double()
        merged = merge_modules([module, other], axes=axes)
        torch.testing.assert_close(merged(x), module(x))
        found = search_weights(
            [module, other],
            lambda m: -float((m(x) - module(x)).abs().max()),
            axes=axes,
            num_evaluations=5,
        )
        assert found.scores.min() > -1e-10

    def test_instance_normalisation(self):
        modules = [nn.InstanceNorm1d(3, track_running_stats=True, affine=True) for _ in range(2)]
        modules[1].running_mean += 2
        torch.testing.assert_close(merge_modules(modules).running_mean, torch.ones(3))


def other_buffer(make=torch.randn):
    m = network()
    m.register_buffer("shift", make(3))
    return m


def squashed():
    m = network()
    m[1] = nn.Sigmoid()
    return m


def frozen():
    m = network()
    m[0].weight.requires_grad_(False)
    return m


def tied():
    m = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    m[1].weight = m[0].weight
    return m


class TestErrors:
    @pytest.mark.parametrize(
        "modules, match",
        [
            ([], "at least one module"),
            (
                [network(), network((5, 8, 4, 3))],
                r"party 1 has parameter '0.weight' of shape \(8, 5\), party 0 of shape \(7, 5\)",
            ),
            (
                [network(), network((*SIZES, 2))],
                r"party 1 has parameter '6.weight' of shape \(2, 3\), party 0 not at all",
            ),
            (
                [network(), network(SIZES[:-1])],
                r"party 1 has parameter '4.weight' not at all, party 0 of shape \(3, 4\)",
            ),
            ([tied(), nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))], "tied to '0.weight'"),
            ([network(), frozen()], "party 1 has parameter '0.weight' .* frozen, party 0 of shape"),
            ([frozen(), frozen()], "frozen parameter '0.weight' of party 1 differs"),
            ([other_buffer(), other_buffer()], "buffer 'shift' of party 1 differs"),
            (
                [other_buffer(torch.arange), other_buffer(lambda n: torch.arange(n).flip(0))],
                "buffer 'shift' of party 1 differs",
            ),
            ([network(), squashed()], "party 1 has module '1' Sigmoid, party 0 "),
        ],
    )
    def test_architectures(self, modules, match):
        with pytest.raises(StructureError, match=match):
            merge_modules(modules)

    def test_no_modules(self):
        with pytest.raises(ParameterError, match="expected a sequence of torch modules"):
            merge_modules(network())
        with pytest.raises(ParameterError, match="expected a sequence of torch modules"):
            merge_modules([network(), posterior_of(network())])

    def test_parameters(self):
        def one(value, **kwargs):
            m = nn.Linear(3, 2)
            m.weight = nn.Parameter(value, **kwargs)
            return m

        good = torch.ones(2, 3)
        for module, match in (
            (one(good * 1j), "party 0: .* parameter 'weight' of torch.complex64"),
            (one(good / 0), "party 0: .* NaN or inf in parameter 'weight'"),
            (one(good).requires_grad_(False), "party 0: .* no parameter that is trained"),
            (nn.LazyLinear(2), r"party 0: parameters \['weight', 'bias'\] have no shape yet"),
        ):
            with pytest.raises(ParameterError, match=match):
                merge_modules([module, copy.deepcopy(module)])

    def test_parameters_without_elements(self):
        modules = [nn.Linear(2, 2) for _ in range(2)]
        for m in modules:
            m.none = nn.Parameter(torch.zeros(0))
        assert merge_modules(modules).none.shape == (0,)

    def test_posteriors(self):
        modules = [network() for _ in range(2)]
        good = posterior_of(modules[0])
        with pytest.raises(StructureError, match="one posterior for each of 2 modules, got 1"):
            merge_modules(modules, [good])
        for factors, match in (
            (
                {"9.weight": Normal(torch.zeros(2), 1.0)},
                r"party 1: .* no parameters \['9.weight'\]",
            ),
            (
                {"0.weight": Normal(torch.zeros(2), 1.0)},
                r"party 1, site '0.weight': expected a Normal of shape \(7, 5\), .* shape \(2,\)",
            ),
            (
                {"0.weight": Gamma(torch.ones(7, 5), 1.0)},
                "party 1, site '0.weight': expected a Normal .* got a Gamma",
            ),
            (
                {"0.weight": LogNormal(torch.zeros(7, 5), 1.0)},
                "party 1, site '0.weight': .* got a Normal .* behind ExpTransform",
            ),
        ):
            with pytest.raises(StructureError, match=match):
                merge_modules(modules, [good, Posterior(factors)])
        part = Posterior({k: f for k, f in good.decomposed.items() if k != "0.bias"})
        with pytest.raises(StructureError, match=r"0\.bias"):
            merge_modules(modules, [good, part])

    def test_an_interrupted_search_merges_nothing(self, monkeypatch):
        real = alignment.fuse

        def impatient(*args, **kwargs):
            fusion = real(*args, **kwargs)
            labels = {
                label: replace(m, stopped=StopReason.INTERRUPTED)
                for label, m in fusion.labels.items()
            }
            return replace(fusion, labels=labels)

        monkeypatch.setattr(alignment, "fuse", impatient)
        with pytest.raises(KeyboardInterrupt):
            merge_modules([network(), network()], axes="auto")

    @pytest.mark.parametrize(
        "kwargs, match",
        [
            ({"weights": [1.0]}, "expected 2 weights, one per party, got 1"),
            ({"weights": [0.0, 0.0]}, "all weights are zero"),
            ({"floor": -1.0}, "floor must be non-negative"),
        ],
    )
    def test_arguments(self, kwargs, match):
        with pytest.raises(ParameterError, match=match):
            merge_modules([network(), network()], **kwargs)
