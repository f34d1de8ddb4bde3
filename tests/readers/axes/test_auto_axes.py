# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""`axes="auto"` and `module_axes`: labels against those that the models were written with, and what
has no label."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import config_enumerate
from pyro.infer.autoguide import (
    AutoDiagonalNormal,
    AutoGuide,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    init_to_value,
)
from pyro.nn.module import PyroModule, PyroSample, to_pyro_module_
from torch import Tensor, nn

from pyro_fusion import (
    Posterior,
    PosteriorGuide,
    from_guide,
    fuse,
    module_axes,
)
from pyro_fusion.errors import GuideError, ParameterError, StructureError

X = torch.linspace(-1, 1, 60).reshape(20, 3)


class Regression(PyroModule):
    """A network with a Normal likelihood; layers named in ``random`` have Normal priors."""

    def __init__(self, net: nn.Module, *random: str) -> None:
        super().__init__()
        to_pyro_module_(net)
        self.net = net
        for name, layer in net.named_modules():
            own = dict(layer.named_parameters(recurse=False))
            for k, p in own.items() if not random or name in random else ():
                prior = dist.Normal(0.0, 1.0).expand(p.shape).to_event(p.dim())
                setattr(layer, k, PyroSample(prior))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        mean = pyro.deterministic("mean", self.net(x))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, 0.1).to_event(1), obs=y)
        return mean


def mlp() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 5), nn.Dropout(), nn.ReLU(), nn.Linear(5, 2)
    )


MLP_AXES = {
    "0.weight": ("hidden1", None),
    "0.bias": ("hidden1",),
    "2.weight": ("hidden2", "hidden1"),
    "2.bias": ("hidden2",),
    "5.weight": (None, "hidden2"),
    "5.bias": (None,),
}
MLP_OUTGOING = {"2.weight": "hidden1", "5.weight": "hidden2"}


def guide_of(model: Callable[..., Any], *args: Any, kind: Any = AutoNormal) -> AutoGuide:
    """A guide in a store of its own, which was called once with these arguments."""
    pyro.clear_param_store()
    guide: AutoGuide = kind(model)
    guide(*args)
    return guide


# -- modules ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_plain_network(dtype: torch.dtype) -> None:
    net = mlp().to(dtype)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    state = torch.get_rng_state()
    found = module_axes(net)
    assert found.axes == MLP_AXES
    assert found.outgoing == MLP_OUTGOING
    assert torch.equal(state, torch.get_rng_state())
    assert net.training
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    factors = {k: dist.Normal(v.detach(), 0.1) for k, v in net.named_parameters()}
    posterior = Posterior(factors, axes=found.axes, outgoing=found.outgoing)
    assert posterior.labels == ("hidden1", "hidden2")


def test_the_network_computes_the_same_with_units_permuted() -> None:
    net = mlp().eval()
    found = module_axes(net, X)
    factors = {k: dist.Normal(v.detach(), 0.1) for k, v in net.named_parameters()}
    posterior = Posterior(factors, axes=found.axes)
    for label in posterior.labels:
        posterior = posterior.permute(label, [3, 1, 4, 0, 2])
    values = {k: d.mean for k, d in posterior.factors.items()}
    assert torch.allclose(torch.func.functional_call(net, values, (X,)), net(X), atol=1e-6)


def test_normalisation_carries_the_units_and_couples_them() -> None:
    found = module_axes(
        nn.Sequential(
            nn.Linear(3, 4), nn.LayerNorm(4), nn.ReLU(), nn.Linear(4, 6), nn.BatchNorm1d(6),
            nn.Tanh(), nn.Linear(6, 1),
        )
    )  # fmt: skip
    assert found.axes["1.weight"] == found.axes["1.bias"] == ("hidden1",)
    assert found.axes["4.weight"] == found.axes["4.bias"] == ("hidden2",)
    # A unit acts on the others through the mean that LayerNorm takes; so it does not through
    # outgoing weights alone. In evaluation, BatchNorm takes none.
    assert found.outgoing == {"6.weight": "hidden2"}


def test_a_unit_may_act_through_two_heads() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(3, 6)
            self.loc, self.scale = nn.Linear(6, 2), nn.Linear(6, 1)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            h = torch.relu(self.body(x))
            return {"loc": self.loc(h), "scale": self.scale(h).exp()}

    found = module_axes(Heads())
    assert found.axes["loc.weight"] == found.axes["scale.weight"] == (None, "hidden1")
    assert found.outgoing == {"loc.weight": "hidden1", "scale.weight": "hidden1"}


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.fc1(x))
        return self.fc3(h + torch.relu(self.fc2(h)))  # type: ignore[no-any-return]


def test_a_residual_connection_is_refused() -> None:
    with pytest.raises(StructureError, match=r"layer 'fc1'.*residual.*by hand"):
        module_axes(Residual())
    guide = guide_of(Regression(Residual()), X, torch.zeros(20, 2))
    with pytest.raises(StructureError, match=r"layer 'net\.fc1'"):
        from_guide(guide, axes="auto")


class Wrapped(Residual):
    """A residual network whose output hides that it is one."""

    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.wrap = wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(super().forward(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "wrap",
    [
        lambda y: torch.distributions.Normal(y, 1.0),
        lambda y: 1000 + y,
        lambda y: 0.01 * y,
    ],
    ids=["distribution", "offset", "small"],
)
def test_a_residual_connection_is_seen_behind_the_output(
    wrap: Callable[[Tensor], Any], dtype: torch.dtype
) -> None:
    with pytest.raises(StructureError, match=r"layer 'fc1'.*residual.*by hand"):
        module_axes(Wrapped(wrap).to(dtype))


@pytest.mark.parametrize("depth", [3, 8, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_deep_network_is_read_or_refused(depth: int, dtype: torch.dtype) -> None:
    """Behind many sigmoids nothing that is done to the first layers shows."""
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(8, 8), nn.Sigmoid()]
    try:
        found = module_axes(nn.Sequential(*layers, nn.Linear(8, 2)).to(dtype))
    except StructureError as e:
        assert depth == 20 and "alone changes nothing" in str(e)
        return
    for k in range(1, depth + 1):
        assert found.axes[f"{2 * k}.weight"][1] == found.axes[f"{2 * k - 2}.bias"][0]
        assert found.outgoing[f"{2 * k}.weight"] == f"hidden{k}"
    assert depth < 20


def test_outputs_that_tell_nothing_are_refused() -> None:
    with pytest.raises(ParameterError, match="no tensor in what the Wrapped returns"):
        module_axes(Wrapped(lambda y: None))
    with pytest.raises(StructureError, match="alone changes nothing"):
        module_axes(Wrapped(lambda y: torch.zeros_like(y)))
    with pytest.raises(ParameterError, match="no shape yet"):
        module_axes(nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2)))


def test_layers_count_in_the_order_in_which_they_run() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out, self.b, self.a = nn.Linear(5, 3), nn.Linear(7, 5), nn.Linear(4, 7)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.relu(self.b(torch.relu(self.a(x)))))  # type: ignore[no-any-return]

    expected = {"a.weight": ("hidden1", None), "b.weight": ("hidden2", "hidden1")}
    expected["out.weight"] = (None, "hidden2")
    x = torch.randn(9, 4)
    found = module_axes(Backwards(), x)
    assert {k: found.axes[k] for k in expected} == expected
    assert found.outgoing == {"b.weight": "hidden1", "out.weight": "hidden2"}
    guide = guide_of(Regression(Backwards()), x, torch.zeros(9, 3))
    posterior = from_guide(guide, x, torch.zeros(9, 3), axes="auto")
    assert {k: posterior.axes[f"net.{k}"] for k in expected} == expected


def test_networks_side_by_side_are_no_chain() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loc = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 3))
            self.scale = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 3))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.loc(x), self.scale(x).exp()

    found = module_axes(Both())
    for net, label in (("loc", "hidden1"), ("scale", "hidden2")):
        assert found.axes[f"{net}.0.weight"] == (label, None)
        assert found.axes[f"{net}.2.weight"] == (None, label)
        assert found.axes[f"{net}.2.bias"] == (None,)
        assert found.outgoing[f"{net}.2.weight"] == label


def test_buffers_that_tell_units_apart_are_refused() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 1))
    net[1].running_mean.copy_(torch.arange(4.0))  # type: ignore[union-attr, operator]
    with pytest.raises(StructureError, match="buffers"):
        module_axes(net)


def test_what_is_no_chain_of_linear_layers_has_no_label() -> None:
    net = nn.Sequential(nn.Conv1d(1, 4, 3), nn.Flatten(), nn.Linear(4, 2))
    with pytest.warns(UserWarning, match="no hidden units in the Sequential"):
        found = module_axes(net, torch.randn(5, 1, 3))
    assert all(set(labels) == {None} for labels in found.axes.values())
    with pytest.raises(ParameterError, match="Pass its arguments"):
        module_axes(net)
    with pytest.raises(ParameterError, match="torch module"):
        module_axes("net")  # type: ignore[arg-type]
    with pytest.raises(ParameterError, match="from its guide"):
        module_axes(Regression(mlp()))


# -- PyroModules -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [AutoNormal, AutoDiagonalNormal])
@pytest.mark.parametrize("with_data", [False, True])
def test_a_bayesian_network(kind: Any, with_data: bool) -> None:
    y = torch.zeros(20, 2)
    model = Regression(mlp())
    guide = guide_of(model, X, y, kind=kind)
    store = {k: v.clone() for k, v in pyro.get_param_store().items()}
    state = torch.get_rng_state()
    posterior = from_guide(guide, *((X, y) if with_data else ()), axes="auto")
    assert posterior.axes == {f"net.{k}": v for k, v in MLP_AXES.items()}
    assert posterior.outgoing == {f"net.{k}": v for k, v in MLP_OUTGOING.items()}
    assert model.training
    assert torch.equal(state, torch.get_rng_state())
    assert store.keys() == dict(pyro.get_param_store().items()).keys()
    assert all(torch.equal(v, store[k]) for k, v in pyro.get_param_store().items())


@pytest.mark.filterwarnings("ignore:AutoLowRank")
@pytest.mark.parametrize("kind", [AutoMultivariateNormal, AutoLowRankMultivariateNormal])
def test_joint_guides_are_split_along_the_labels_that_are_found(kind: Any) -> None:
    guide = guide_of(Regression(mlp()), X, torch.zeros(20, 2), kind=kind)
    posterior = from_guide(guide, axes="auto")
    assert posterior.axes == {f"net.{k}": v for k, v in MLP_AXES.items()}
    assert posterior.decomposed["net.0.weight"].family.name == "MultivariateNormal"
    assert posterior.outgoing == {f"net.{k}": v for k, v in MLP_OUTGOING.items()}


def test_labels_of_a_classifier_are_data_without_data() -> None:
    net = Regression(mlp()).net

    def model(x: Tensor, y: Tensor | None = None) -> None:
        logits = net(x)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(logits=logits), obs=y)

    guide = guide_of(model, X, torch.zeros(20, dtype=torch.long))
    posterior = from_guide(guide, axes="auto")
    assert list(posterior.axes.values()) == list(MLP_AXES.values())


def test_fusing_networks_recovers_the_permutation() -> None:
    shapes = {k: p.shape for k, p in mlp().named_parameters()}
    truth = {k: torch.randn(shape) for k, shape in shapes.items()}
    orders = {"hidden1": torch.tensor([2, 0, 1, 4, 3]), "hidden2": torch.tensor([4, 3, 0, 1, 2])}
    guides = []
    for party in range(2):
        values = {}
        for name, loc in truth.items():
            for axis, label in enumerate(MLP_AXES[name]):
                if party == 1 and label is not None:
                    loc = loc.index_select(axis, orders[label])
            values[f"net.{name}"] = loc + 0.01 * torch.randn(loc.shape)
        kind = partial(AutoNormal, init_loc_fn=init_to_value(values=values))
        guides.append(guide_of(Regression(mlp()), X, torch.zeros(20, 2), kind=kind))
    fusion = fuse(guides, axes="auto")
    for label, order in orders.items():
        one, other = fusion.labels[label].assignment
        assert fusion.labels[label].num_atoms == 5
        assert torch.equal(other, one[order])


def test_a_fixed_layer_keeps_its_units_in_order() -> None:
    first_fixed = guide_of(Regression(mlp(), "2", "5"), X, torch.zeros(20, 2))
    posterior = from_guide(first_fixed, axes="auto")
    # Numbered as they are found.
    assert posterior.axes["net.2.weight"] == ("hidden1", None)
    assert posterior.axes["net.5.weight"] == (None, "hidden1")
    last_fixed = guide_of(Regression(mlp(), "0", "2"), X, torch.zeros(20, 2))
    with pytest.warns(UserWarning, match=r"layer 'net.2'.*'net.5.weight'\] are not random"):
        posterior = from_guide(last_fixed, axes="auto")
    assert posterior.axes["net.2.weight"] == (None, "hidden1")


# -- models with plates ----------------------------------------------------------------------------


def mixture(data: Tensor | None = None, components: int = 3, tilt: float = 0.0) -> None:
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(components)))
    with pyro.plate("component", components):
        loc = pyro.sample("loc", dist.Normal(torch.zeros(3), 10.0).to_event(1))
    weights = weights * torch.arange(components).mul(tilt).exp()
    clusters = dist.MixtureSameFamily(
        dist.Categorical(weights / weights.sum()), dist.Normal(loc, 1.0).to_event(1)
    )
    with pyro.plate("data", 20 if data is None else len(data)):
        pyro.sample("x", clusters, obs=data)


def test_mixture_weights_and_not_the_features() -> None:
    posterior = from_guide(guide_of(mixture, torch.randn(6, 3)), axes="auto")
    assert posterior.axes == {"weights": ("component",), "loc": ("component", None)}
    assert isinstance(posterior.factors["weights"], dist.Dirichlet)
    assert posterior.outgoing == {}


def test_discrete_sites_hidden_from_the_guide_are_summed_out() -> None:
    @config_enumerate
    def model(data: Tensor | None = None) -> None:
        weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
        with pyro.plate("component", 3):
            loc = pyro.sample("loc", dist.Normal(torch.zeros(3), 10.0).to_event(1))
        with pyro.plate("data", 20 if data is None else len(data)):
            z = pyro.sample("z", dist.Categorical(weights))
            pyro.sample("x", dist.Normal(loc[z], 1.0).to_event(1), obs=data)

    data = torch.randn(6, 3)
    guide = guide_of(poutine.block(model, hide=["z"]), data)
    for args in ((), (data,)):
        posterior = from_guide(guide, *args, axes="auto")
        assert posterior.axes == {"weights": ("component",), "loc": ("component", None)}


def test_both_axes_of_a_transition_matrix() -> None:
    def model(y: Tensor | None = None) -> None:
        initial = pyro.sample("initial", dist.Dirichlet(torch.ones(4)))
        transition = pyro.sample("transition", dist.Dirichlet(torch.ones(4, 4)).to_event(1))
        with pyro.plate("state", 4):
            loc = pyro.sample("loc", dist.Normal(0.0, 5.0))
        emission = dist.Normal(loc, 1.0)
        hmm = dist.DiscreteHMM(initial.log(), transition.log(), emission, duration=30)
        pyro.sample("y", hmm, obs=y)

    posterior = from_guide(guide_of(model, torch.randn(30)), axes="auto")
    assert posterior.axes == {
        "initial": ("state",),
        "transition": ("state", "state"),
        "loc": ("state",),
    }


@pytest.mark.parametrize("where", ["plate", "event"])
def test_outgoing_weights_of_a_network_in_plates(where: str) -> None:
    def model(y: Tensor | None = None) -> None:
        with pyro.plate("hidden", 4):
            w1 = pyro.sample("w1", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            b1 = pyro.sample("b1", dist.Normal(0.0, 1.0))
            if where == "plate":
                w2 = pyro.sample("w2", dist.Normal(torch.zeros(4), 1.0).to_event(1)).T
        if where == "event":
            w2 = pyro.sample("w2", dist.Normal(torch.zeros(4, 4), 1.0).to_event(2))
        b2 = pyro.sample("b2", dist.Normal(torch.zeros(4), 1.0).to_event(1))
        mean = torch.relu(X @ w1.T + b1) @ w2.T + b2
        with pyro.plate("data", 20):
            pyro.sample("y", dist.Normal(mean, 0.1).to_event(1), obs=y)

    posterior = from_guide(guide_of(model, torch.zeros(20, 4)), axes="auto")
    assert posterior.axes == {
        "w1": ("hidden", None),
        "b1": ("hidden",),
        "w2": ("hidden", None) if where == "plate" else (None, "hidden"),
        "b2": (None,),
    }
    assert posterior.outgoing == {"w2": "hidden"}


def test_what_is_not_exchangeable_has_no_label() -> None:
    def tilted(data: Tensor | None = None) -> None:
        mixture(data, tilt=1.0)

    guide = guide_of(tilted, torch.randn(6, 3))
    expected = r"plate 'component': permuting axis 0 of site 'loc'.*axis 0 of site 'weights'"
    with pytest.warns(UserWarning, match=expected):
        posterior = from_guide(guide, axes="auto")
    assert posterior.labels == ()


def test_local_variables_have_no_label() -> None:
    def model(data: Tensor) -> None:
        with pyro.plate("data", len(data)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=data)

    data = torch.randn(5)
    with pytest.warns(UserWarning, match="changes \\['x'\\]"):
        posterior = from_guide(guide_of(model, data), data, axes="auto")
    assert posterior.axes == {"z": (None,)}


def test_other_data_or_a_subsample_is_an_error() -> None:
    def model(data: Tensor) -> None:
        with pyro.plate("data", len(data), subsample_size=2) as i:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=data[i])

    data = torch.randn(5)
    with pytest.raises(GuideError, match=r"site 'z' has shape \(5,\) in the guide and \(2,\)"):
        from_guide(guide_of(model, data), data, axes="auto")


def test_one_component_cannot_be_permuted() -> None:
    def model(y: Tensor | None = None) -> None:
        shift = pyro.sample("shift", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        with pyro.plate("component", 1):
            loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(loc.sum() + shift.sum(), 1.0), obs=y)

    with pytest.warns(UserWarning, match="one component.*axis 0 of site 'shift'"):
        posterior = from_guide(guide_of(model, torch.tensor(0.0)), axes="auto")
    assert posterior.axes == {"loc": ("component",), "shift": (None,)}


# -- errors ----------------------------------------------------------------------------------------


def test_errors_say_what_to_do() -> None:
    def needs(x: Tensor, y: Tensor | None = None) -> None:
        with pyro.plate("component", 2):
            w = pyro.sample("w", dist.Normal(0.0, 1.0))
        if y is not None:
            pyro.sample("y", dist.Normal(x * w.sum(), 1.0), obs=y)

    one = torch.tensor(1.0)
    guide = guide_of(needs, one, one)
    with pytest.raises(GuideError, match=r"argument: 'x'.*from_guide\(guide, \*args"):
        from_guide(guide, axes="auto")
    with pytest.raises(GuideError, match=r"observed sites.*pass those it was fitted with"):
        from_guide(guide, one, axes="auto")
    assert from_guide(guide, one, one, axes="auto").axes == {"w": ("component",)}
    with pytest.raises(GuideError, match=r"party 0: .*argument: 'x'"):
        fuse([guide], axes="auto")
    with pytest.raises(ParameterError, match="got 'component'"):
        from_guide(guide, axes="component")
    with pytest.raises(GuideError, match="function knows no model: give axes"):
        from_guide(lambda: pyro.sample("w", dist.Normal(0.0, 1.0)), axes="auto")
    posterior = Posterior({"w": dist.Normal(torch.zeros(2), 1.0)}, {"w": "component"})
    assert from_guide(PosteriorGuide(posterior), axes="auto").axes == posterior.axes


def test_a_model_without_plates_or_layers() -> None:
    def model() -> None:
        pyro.sample("y", dist.Normal(pyro.sample("w", dist.Normal(0.0, 1.0)), 1.0), obs=X[0, 0])

    with pytest.warns(UserWarning, match="found nothing to label"):
        posterior = from_guide(guide_of(model), axes="auto")
    assert posterior.axes == {"w": ()}
