# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Trained networks read by Laplace's method, against closed forms, Hessians and loops over single
examples."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Categorical, Normal
from torch.utils.data import DataLoader, TensorDataset

from pyro_fusion import (
    ParameterError,
    Posterior,
    StructureError,
    from_module,
    to_module,
)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def network(inputs=3, hidden=4, outputs=2, dtype=torch.float64):
    layers = nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, outputs)
    return nn.Sequential(*layers).to(dtype)


def precision(posterior):
    return {k: f.params["scale"].double() ** -2 for k, f in posterior.decomposed.items()}


def read(module, data, *args, prior_precision=0.5, **kwargs):
    """Curvatures alone."""
    posterior = from_module(module, data, *args, prior_precision=prior_precision, **kwargs)
    return {k: v - prior_precision for k, v in precision(posterior).items()}


def targets(loss, n, outputs=2):
    if loss == "cross_entropy":
        return torch.randint(outputs, (n,))
    if loss == "binary_cross_entropy":
        return torch.randint(2, (n, outputs)).double()
    return torch.randn(n, outputs).double()


NEGATIVE_LOG_LIKELIHOOD = {
    "cross_entropy": F.cross_entropy,
    "binary_cross_entropy": lambda o, y: F.binary_cross_entropy_with_logits(o, y, reduction="sum"),
    "squared_error": lambda o, y: ((o - y) ** 2).sum() / 2,
}
LOSSES = list(NEGATIVE_LOG_LIKELIHOOD)


def squared_gradients(module, x, y, loss):
    found = {k: torch.zeros_like(p) for k, p in module.named_parameters()}
    for i in range(len(x)):
        value = NEGATIVE_LOG_LIKELIHOOD[loss](module(x[i : i + 1]), y[i : i + 1])
        for k, g in zip(found, torch.autograd.grad(value, list(module.parameters())), strict=True):
            found[k] += g**2
    return found


def gauss_newton(module, x, loss):
    """``diag(Jᵀ H J)`` with torch's own Jacobians and Hessians."""
    names = [k for k, _ in module.named_parameters()]
    found = {k: torch.zeros_like(p) for k, p in module.named_parameters()}
    for i in range(len(x)):
        one = x[i : i + 1]

        def output(*values, one=one):
            return torch.func.functional_call(
                module, dict(zip(names, values, strict=True)), (one,)
            )[0]

        jacobian = torch.autograd.functional.jacobian(output, tuple(module.parameters()))
        at = output(*module.parameters()).detach()
        y = targets(loss, 1, len(at))  # the Hessian is the same for all
        hessian = torch.autograd.functional.hessian(
            lambda o, y=y: NEGATIVE_LOG_LIKELIHOOD[loss](o.unsqueeze(0), y), at
        )
        for k, j in zip(names, jacobian, strict=True):
            flat = j.reshape(len(at), -1)
            found[k] += torch.einsum("cp,cd,dp->p", flat, hessian, flat).reshape(j.shape[1:])
    return found


class TestCurvature:
    def test_linear_regression(self):
        x, y = torch.randn(20, 3).double(), torch.randn(20, 1).double()
        module = nn.Linear(3, 1).double()
        expected = {"weight": (x**2).sum(0, keepdim=True), "bias": torch.tensor([20.0]).double()}
        for curvature in ("fisher", "ggn"):
            found = read(module, (x, y), "squared_error", curvature=curvature)
            torch.testing.assert_close(found, expected)
        residual = (module(x) - y).detach() ** 2
        found = read(module, (x, y), "squared_error", curvature="empirical_fisher")
        expected = {"weight": (residual * x**2).sum(0, keepdim=True), "bias": residual.sum(0)}
        torch.testing.assert_close(found, expected)

    def test_conjugate_posterior(self):
        # Features that are orthogonal have a posterior that factorises: it is met exactly.
        x = torch.linalg.qr(torch.randn(12, 3).double()).Q * torch.tensor([1.0, 2.0, 5.0]).double()
        y, delta = x @ torch.tensor([[1.0], [-2.0], [0.5]]).double() + torch.randn(12, 1), 0.7
        information = x.T @ x + delta * torch.eye(3).double()
        module = nn.Linear(3, 1, bias=False).double()
        module.weight.data = torch.linalg.solve(information, x.T @ y).T
        posterior = from_module(module, (x, y), "squared_error", prior_precision=delta)
        exact = torch.distributions.MultivariateNormal(
            module.weight.data[0], precision_matrix=information
        )
        factor = posterior.factors["weight"].base_dist
        torch.testing.assert_close(factor.mean[0], exact.mean)
        torch.testing.assert_close(factor.variance[0], exact.variance)

    def test_logistic_regression_has_the_diagonal_of_the_hessian(self):
        x, y = torch.randn(15, 3).double(), torch.randint(4, (15,))
        module = nn.Linear(3, 4).double()

        def loss(weight, bias):
            return F.cross_entropy(x @ weight.T + bias, y, reduction="sum")

        hessian = torch.autograd.functional.hessian(loss, tuple(module.parameters()))
        expected = {
            "weight": hessian[0][0].reshape(12, 12).diagonal().reshape(4, 3),
            "bias": hessian[1][1].diagonal(),
        }
        torch.testing.assert_close(read(module, (x, y), curvature="ggn"), expected)

    @pytest.mark.parametrize("loss", LOSSES)
    def test_gauss_newton_and_fisher(self, loss):
        module, x = network(), torch.randn(7, 3).double()
        expected = gauss_newton(module, x, loss)
        y = targets(loss, 7)
        torch.testing.assert_close(read(module, (x, y), loss, curvature="ggn"), expected)
        torch.testing.assert_close(read(module, (x, y), loss), expected)
        # Labels of the data do not count.
        torch.testing.assert_close(read(module, [x[:4], x[4:]], loss), expected)

    @pytest.mark.parametrize("loss", LOSSES)
    def test_empirical_fisher(self, loss):
        module, x, y = network(), torch.randn(7, 3).double(), targets(loss, 7)
        found = read(module, (x, y), loss, curvature="empirical_fisher")
        torch.testing.assert_close(found, squared_gradients(module, x, y, loss))

    def test_fisher_is_the_expectation_over_the_models_labels(self):
        module, x = network(outputs=3), torch.randn(7, 3).double()
        p = module(x).softmax(-1).detach()
        expected = {k: torch.zeros_like(v) for k, v in module.named_parameters()}
        for i in range(7):
            for c in range(3):
                one = squared_gradients(module, x[i : i + 1], torch.tensor([c]), "cross_entropy")
                for k, v in one.items():
                    expected[k] += p[i, c] * v
        torch.testing.assert_close(read(module, (x, torch.zeros(7).long())), expected)

    @pytest.mark.parametrize("loss", LOSSES)
    def test_drawn_labels(self, loss):
        module, x = network(), torch.randn(5, 3).double()
        exact = read(module, x, loss)
        n = 4000
        drawn = read(module, x, loss, num_samples=n)
        # The variance of a squared score is at most some times its squared mean here.
        for k, v in exact.items():
            assert ((drawn[k] - v).abs() / v).max() < 5 * math.sqrt(12 / n)
        again = read(module, x, loss, num_samples=n)
        torch.testing.assert_close(again, drawn, rtol=0, atol=0)

    def test_loss_and_likelihood_of_ones_own(self):
        module, x, y = network(), torch.randn(6, 3).double(), torch.randint(2, (6,))
        for curvature in ("ggn", "empirical_fisher"):
            expected = read(module, (x, y), curvature=curvature)
            for kwargs in (
                {"loss": nn.CrossEntropyLoss()},  # its mean is over a batch of one
                {"likelihood": lambda out: Categorical(logits=out)},
            ):
                found = read(module, (x, y), curvature=curvature, **kwargs)
                torch.testing.assert_close(found, expected)
        scale, n = 0.2, 4000
        found = read(module, x, likelihood=lambda out: Normal(out, scale), num_samples=n)
        for k, v in read(module, x, "squared_error").items():
            assert ((found[k] - v / scale**2).abs() / (v / scale**2)).max() < 5 * math.sqrt(12 / n)

    def test_positions(self):
        # [B, C, T]: the labels of positions are independent, given the input.
        class Tagger(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.Linear(2, 3)

            def forward(self, x):
                return self.layer(x).movedim(-1, 1)

        module, x = Tagger().double(), torch.randn(4, 5, 2).double()
        found = read(module, (x, torch.zeros(4, 5).long()))
        expected = read(module.layer, x.reshape(20, 2))
        torch.testing.assert_close(found, {f"layer.{k}": v for k, v in expected.items()})

    def test_not_convex(self):
        module, x, y = network(), torch.randn(6, 3).double(), torch.randn(6, 2).double()

        def dip(o, y):
            return ((o - y) ** 2).sum().cos()

        with pytest.raises(ParameterError, match=r'"ggn" needs a loss that is convex.*dip'):
            read(module, (x, y), dip, curvature="ggn")


class TestData:
    def test_forms(self):
        module, x, y = network(), torch.randn(10, 3).double(), torch.randint(2, (10,))
        expected = read(module, (x, y), curvature="empirical_fisher")
        dataset = TensorDataset(x, y)
        for data in (
            dataset,
            DataLoader(dataset, batch_size=4),
            [(x[:3], y[:3]), (x[3:], y[3:])],
            ((a, b) for a, b in [(x[:3], y[:3]), (x[3:], y[3:])]),
        ):
            found = read(module, data, curvature="empirical_fisher")
            torch.testing.assert_close(found, expected)

    @pytest.mark.parametrize("chunk_size", [1, 3, 1000])
    def test_chunks(self, chunk_size):
        module, x = network(), torch.randn(10, 3).double()
        torch.testing.assert_close(read(module, x, chunk_size=chunk_size), read(module, x))

    def test_tuples_and_mappings_of_inputs(self):
        class Sum(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.Linear(3, 2)

            def forward(self, a, b):
                return self.layer(a + b)

        module, a, b = Sum().double(), torch.randn(6, 3).double(), torch.randn(6, 3).double()
        y = torch.randint(2, (6,))
        expected = {f"layer.{k}": v for k, v in read(module.layer, (a + b, y)).items()}
        torch.testing.assert_close(read(module, ((a, b), y)), expected)
        torch.testing.assert_close(read(module, ({"b": b, "a": a}, y)), expected)
        torch.testing.assert_close(read(module, {"b": b, "a": a}), expected)

    def test_part_of_the_data(self):
        module, x = network(), torch.randn(10, 3).double()
        found, part = read(module, x), read(module, x, num_data=40)
        torch.testing.assert_close(part, {k: 4 * v for k, v in found.items()})

    def test_prior_precision_by_name(self):
        module, x = nn.Linear(3, 2).double(), torch.randn(10, 3).double()
        prior = {"weight": torch.tensor([1.0, 2.0, 3.0]), "bias": 4.0}
        found = precision(from_module(module, x, prior_precision=prior))
        plain = read(module, x)
        torch.testing.assert_close(
            found["weight"] - plain["weight"], prior["weight"].expand(2, 3).double()
        )
        torch.testing.assert_close(found["bias"] - plain["bias"], torch.full((2,), 4.0).double())


class TestModules:
    def test_nothing_is_changed(self):
        module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
        module[1].running_var.uniform_(0.5, 2)
        before = {k: v.clone() for k, v in module.state_dict().items()}
        x = torch.randn(8, 3)
        state = torch.get_rng_state()
        posterior = from_module(module, (x, torch.zeros(8).long()), num_samples=2)
        assert torch.equal(torch.get_rng_state(), state)
        assert all(m.training for m in module.modules())
        for k, v in module.state_dict().items():
            assert torch.equal(v, before[k])
        assert all(p.grad is None for p in module.parameters())
        # Evaluation mode: dropout is off, and the running statistics are used.
        plain = nn.Sequential(module[0], module[1].eval(), module[3])
        names = {"0.weight": "0.weight", "1.weight": "1.weight", "3.weight": "2.weight"}
        expected = read(plain, x)
        found = read(module, x)
        for name, other in names.items():
            torch.testing.assert_close(found[name], expected[other])
        assert set(posterior.axes) == {k for k, _ in module.named_parameters()}

    def test_frozen_parameters_have_no_site(self):
        module, x = network(), torch.randn(5, 3).double()
        every = read(module, x)
        module[0].requires_grad_(False)
        found = read(module, x)
        torch.testing.assert_close(found, {k: v for k, v in every.items() if k.startswith("2")})

    def test_chosen_parameters(self):
        module, x = network(), torch.randn(5, 3).double()
        found = read(module, x, parameters=["2.bias"])
        torch.testing.assert_close(found, {"2.bias": read(module, x)["2.bias"]})

    def test_tied_parameters_are_one_site(self):
        module = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Tanh(), nn.Linear(3, 3, bias=False))
        module = module.double()
        module[2].weight = module[0].weight
        x, y = torch.randn(6, 3).double(), torch.randint(3, (6,))
        found = read(module, (x, y), curvature="empirical_fisher")
        torch.testing.assert_close(found, squared_gradients(module, x, y, "cross_entropy"))
        assert list(found) == ["0.weight"]
        other = to_module(Posterior({"0.weight": Normal(torch.zeros(3, 3), 1.0)}), module)
        assert other[0].weight is other[2].weight
        assert not other[0].weight.any() and module[0].weight.any()

    def test_one_by_one_where_there_is_no_vmap(self):
        class Clipped(nn.Sequential):
            def forward(self, x):
                x = super().forward(x)
                return x if x.abs().max() > 1e6 else 2 * x  # depends on the data

        module = Clipped(*network())
        doubled = nn.Sequential(*module, nn.Linear(2, 2, bias=False)).double()
        doubled[-1].weight.data = 2 * torch.eye(2).double()
        doubled[-1].requires_grad_(False)
        x = torch.randn(5, 3).double()
        with pytest.warns(UserWarning, match="Clipped cannot be run on many examples at once"):
            found = read(module, x)
        torch.testing.assert_close(found, read(doubled, x))

    @pytest.mark.cuda
    @pytest.mark.parametrize("curvature", ["fisher", "empirical_fisher", "ggn"])
    def test_on_a_gpu(self, curvature):
        module, x, y = network(), torch.randn(6, 3).double(), torch.randint(2, (6,))
        expected = read(module, (x, y), curvature=curvature)
        found = from_module(module.cuda(), (x, y), curvature=curvature)
        assert found.device.type == "cuda"
        for k, v in precision(found).items():
            torch.testing.assert_close(v.cpu() - 1, expected[k])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_precision_of_the_numbers(self, dtype):
        module, x = network(dtype=dtype), torch.randn(6, 3, dtype=dtype)
        posterior = from_module(module, x)
        assert posterior.dtype == dtype
        exact = precision(from_module(module.double(), x.double()))
        rtol = 1e-5 if dtype == torch.float32 else 0.05
        for k, v in precision(posterior).items():
            torch.testing.assert_close(v, exact[k], rtol=rtol, atol=0)

    def test_labels_of_hidden_units(self):
        x = torch.randn(6, 3).double()
        posterior = from_module(network(), x, axes="auto")
        assert posterior.axes["0.weight"] == ("hidden1", None)
        assert posterior.axes["2.weight"] == (None, "hidden1")
        assert not posterior.outgoing
        posterior = from_module(network(), x, axes={"0.bias": ("unit",)})
        assert posterior.labels == ("unit",)

    def test_floor(self):
        module, x = network(), torch.randn(6, 3).double()
        plain = read(module, x)
        floor = float(plain["0.weight"].median())
        found = precision(from_module(module, x, prior_precision=0.0, floor=floor))
        for k, v in plain.items():
            torch.testing.assert_close(found[k], v.clamp(min=floor))

    def test_round_trip(self):
        module, x = network(dtype=torch.float32), torch.randn(6, 3)
        again = to_module(from_module(module, x), module)
        assert again is not module
        assert all(
            torch.equal(p, q) for p, q in zip(again.parameters(), module.parameters(), strict=True)
        )

    @pytest.mark.parametrize(
        "site, shape, match",
        [
            ("3.weight", (2,), r"the Sequential has no parameters \['3.weight'\]; it has"),
            ("2.weight", (2, 5), r"parameter '2.weight' .* shape \(2, 4\), .* \(2, 5\)"),
        ],
    )
    def test_of_another_architecture(self, site, shape, match):
        with pytest.raises(StructureError, match=match):
            to_module(Posterior({site: Normal(torch.zeros(shape), 1.0)}), network())


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 2, dtype=torch.complex64))

    def forward(self, x):
        return (x.to(self.weight) @ self.weight).abs()


class Dictionary(nn.Linear):
    def forward(self, x):
        return {"logits": super().forward(x)}


class Summed(nn.Linear):
    def forward(self, x):
        return super().forward(x).sum(0)


def frozen():
    return nn.Linear(3, 2).requires_grad_(False)


def dead():
    module = network(dtype=torch.float32)
    module[1] = nn.ReLU()
    module[0].bias.data.copy_(torch.tensor([5.0, -1e6, 5.0, 5.0]))
    return module


def untracked():
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2, track_running_stats=False))


def broken():
    module = nn.Linear(3, 2)
    module.weight.data[0, 0] = math.nan
    return module


class TestErrors:
    x = torch.linspace(-1, 1, 12).reshape(4, 3)
    y = torch.tensor([0, 1, 0, 1])

    @pytest.mark.parametrize(
        "module, match",
        [
            (len, "expected a torch module, got builtin_function_or_method"),
            (frozen(), "the Linear has no parameter that is trained"),
            (nn.LazyLinear(2), r"parameters \['weight', 'bias'\] have no shape yet"),
            (Complex(), r"real floating-point numbers, got weight \(torch.complex64\)"),
            (Dictionary(3, 2), "Dictionary must return a tensor of outputs, got dict"),
            (
                Summed(3, 2),
                r"Summed must return one output for each of 4 examples, got shape \(2,\)",
            ),
            (untracked(), "module '1': a BatchNorm1d without running statistics"),
            (broken(), "the outputs of Linear must be finite, got NaN or inf for 4 of 4 examples"),
            (nn.Linear(5, 2), "Linear failed on these inputs: RuntimeError"),
        ],
    )
    def test_modules(self, module, match):
        with pytest.raises(ParameterError, match=match):
            from_module(module, (self.x, self.y))

    def test_no_curvature(self):
        match = r"parameter '0.weight': 3 of 12 numbers have no curvature"
        with pytest.raises(ParameterError, match=match):
            from_module(dead(), (self.x, self.y), prior_precision=0.0)
        from_module(dead(), (self.x, self.y), prior_precision=0.0, floor=1e-6)

    @pytest.mark.parametrize(
        "kwargs, match",
        [
            ({"loss": "hinge"}, "loss must be one of .'binary_cross_entropy'.* got 'hinge'"),
            ({"loss": 3}, "loss must be one of"),
            ({"loss": lambda o, y: o - 1, "curvature": "ggn"}, "must return one number"),
            ({"loss": F.cross_entropy}, "give likelihood=.* in place of the loss cross_entropy"),
            ({"curvature": "kfac"}, "curvature must be one of .* got 'kfac'"),
            ({"floor": -1.0}, "floor must be non-negative"),
            ({"num_samples": 0}, "num_samples must be a positive integer, got 0"),
            ({"num_data": 1.5}, "num_data must be a positive integer, got 1.5"),
            ({"prior_precision": -1.0}, "parameter 'weight': prior_precision must be non-negative"),
            ({"prior_precision": {"bias": 1.0}}, r"must name each of \['bias', 'weight'\]"),
            ({"prior_precision": torch.ones(7)}, r"shape \(7,\) does not broadcast to \(2, 3\)"),
        ],
    )
    def test_arguments(self, kwargs, match):
        with pytest.raises(ParameterError, match=match):
            from_module(nn.Linear(3, 2), (self.x, self.y), **kwargs)

    @pytest.mark.parametrize(
        "kwargs, match",
        [
            (
                {"parameters": ["wieght"]},
                r"no parameters \['wieght'\]; it has \['weight', 'bias'\]",
            ),
            ({"parameters": "weight"}, r"no parameters \['weight'\]"),
            ({"axes": {"layer": ("unit",)}}, r"axes names sites \['layer'\]"),
        ],
    )
    def test_names(self, kwargs, match):
        with pytest.raises(StructureError, match=match):
            from_module(nn.Linear(3, 2), (self.x, self.y), **kwargs)

    @pytest.mark.parametrize(
        "data, match",
        [
            ((x, y[:3]), r"one first axis for the examples, got first axes of \['3', '4'\]"),
            ((x, y + 1), "loss cross_entropy: the targets .* do not fit the outputs"),
            ((x, torch.rand(4)), "loss cross_entropy: the targets"),
            ((x, y.unsqueeze(1)), "loss cross_entropy: the targets"),
            ([], "data has no examples"),
            (3, "data must be .* got int"),
            (x, 'curvature "empirical_fisher" of loss cross_entropy needs targets'),
        ],
    )
    def test_data(self, data, match):
        with pytest.raises(ParameterError, match=match):
            from_module(nn.Linear(3, 2), data, curvature="empirical_fisher")

    def test_targets_that_would_be_broadcast(self):
        with pytest.raises(ParameterError, match=r"targets \(shape \(4,\)\) .* \(shape \(4, 1\)\)"):
            from_module(
                nn.Linear(3, 1),
                (self.x, torch.rand(4)),
                "squared_error",
                curvature="empirical_fisher",
            )
