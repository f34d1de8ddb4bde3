# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Networks of all kinds read by Laplace's method: against loops over their examples, without a
trace in them, in bounded memory."""

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, IterableDataset

from pyro_fusion import (
    ParameterError,
    from_module,
    module_axes,
)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def read(module, x, **kwargs):
    posterior = from_module(module, x, prior_precision=1.0, **kwargs)
    return {k: f.params["scale"] ** -2 - 1.0 for k, f in posterior.decomposed.items()}


def loop(module, x):
    """The Fisher information by its definition: all labels of all examples."""
    module = copy.deepcopy(module).eval()
    parameters = dict(module.named_parameters())
    result = {k: torch.zeros_like(p) for k, p in parameters.items()}
    for one in x.split(1):
        for log_p in module(one).log_softmax(-1)[0]:
            found = torch.autograd.grad(log_p, list(parameters.values()), retain_graph=True)
            for k, g in zip(parameters, found, strict=True):
                result[k] += log_p.exp().detach() * g**2
    return result


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.GroupNorm(2, 4), nn.MaxPool2d(2)
        )
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.layers(x).flatten(1))


class Tied(nn.Module):
    """What reads words predicts them."""

    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.norm = nn.LayerNorm(4)
        self.head.weight = self.words.weight

    def forward(self, x):
        return self.head(self.norm(self.words(x)).mean(1))


class Attention(nn.Module):
    """With padding, which torch's short way in evaluation mode makes zero."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.layers, self.head = nn.TransformerEncoder(layer, 1), nn.Linear(8, 3)

    def forward(self, x):
        padding = (torch.arange(x.shape[1]) > 3).expand(x.shape[:2])
        return self.head(self.layers(x, src_key_padding_mask=padding).mean(1))


class Twice(nn.Module):
    """One layer under two names."""

    def __init__(self):
        super().__init__()
        layer = nn.Linear(3, 3)
        self.layers = nn.ModuleList([layer, nn.Linear(3, 3), layer])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).tanh()
        return x


class Writing(nn.Module):
    """Keeps, counts and overwrites."""

    def __init__(self):
        super().__init__()
        self.head, self.kept = nn.Linear(3, 2), []
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.count += 1
        x.mul_(2)
        self.last = self.head(x)
        self.kept.append(self.last)
        return self.last


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize(
    "module, x",
    [
        (Convolutions(), torch.randn(5, 1, 6, 6)),
        (Tied(), torch.randint(7, (5, 6))),
        (Attention(), torch.randn(3, 5, 8)),
        (Twice(), torch.randn(5, 3)),
    ],
    ids=lambda v: type(v).__name__,
)
def test_loop_over_examples(module, x):
    module, x = module.double(), x.double() if x.is_floating_point() else x
    if isinstance(module, Convolutions):
        module(x)  # running statistics
    # Without a warning that there is no vmap.
    torch.testing.assert_close(read(module, x), loop(module, x))


class TestNothingIsChanged:
    def test_a_layer_under_two_names(self):
        module = Twice()
        before = {k: (p, p.detach().clone()) for k, p in module.named_parameters()}
        from_module(module, torch.randn(4, 3))
        with pytest.raises(ValueError, match="no exchangeable units"):
            module_axes(module)
        assert len(before) == len(list(module.parameters()))
        for k, p in module.named_parameters():
            assert p is before[k][0] and torch.equal(p, before[k][1])

    def test_recurrent_layers_can_be_trained_further(self):
        class Last(nn.LSTM):
            def forward(self, x):
                return super().forward(x)[0][:, -1]

        module, x = Last(3, 2, batch_first=True), torch.randn(2, 4, 3)
        with pytest.warns(UserWarning, match=r"one by one|performance drop"):
            from_module(module, x)
        module(x).sum().backward()
        assert all(p.grad is not None for p in module.parameters())

    def test_what_a_module_writes(self):
        module, x = Writing(), torch.randn(4, 3)
        before = x.clone()
        found = read(module, x)
        assert torch.equal(x, before)
        assert not module.kept and not hasattr(module, "last") and not module.count
        torch.testing.assert_close(found["head.weight"], read(module.head, 2 * x)["weight"])

    def test_after_a_failure(self):
        module, fast = Writing(), torch.backends.mha.get_fastpath_enabled()
        with pytest.raises(ParameterError, match="failed on these inputs"):
            from_module(module, [torch.randn(4, 3), torch.randn(4, 5)])
        assert not module.kept and module.training
        assert torch.backends.mha.get_fastpath_enabled() == fast

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    @pytest.mark.parametrize("curvature", ["fisher", "empirical_fisher"])
    def test_without_gradients(self, mode, curvature):
        module, x = nn.Linear(3, 2), torch.randn(4, 3)
        data = (x, torch.zeros(4).long())
        expected = read(module, data, curvature=curvature)
        with mode():
            found = read(module, data, curvature=curvature)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


class Largest(TorchDispatchMode):
    """The numbers of the largest tensor that is made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, torch.Tensor):
                self.numel = max(self.numel, t.untyped_storage().nbytes() // t.element_size())
        return result


class Positions(nn.Linear):
    def forward(self, x):
        return super().forward(x).movedim(-1, 1)


@pytest.mark.parametrize(
    "module, x, kwargs",
    [
        # As a whole the gradients of one example: 300 times 90,000 numbers.
        (nn.Linear(300, 300), torch.randn(2, 300), {}),
        # As a whole the columns of R: 64 times 300², and 20 times 800².
        (nn.Linear(1, 300), torch.randn(64, 1), {}),
        (Positions(1, 8), torch.randn(20, 100, 1), {}),
        (nn.Linear(1, 300), torch.randn(64, 1), {"num_samples": 1000}),
        # A single one's: 3000².
        (nn.Linear(1, 3000), torch.randn(1, 1), {}),
    ],
)
def test_memory(monkeypatch, module, x, kwargs):
    monkeypatch.setattr("pyro_fusion.readers.module.curvature._AT_ONCE", 2**20)
    with Largest() as seen:
        from_module(module, x, **kwargs)
    assert seen.numel <= 2**20 + 2**16


class Stream(IterableDataset):
    """Of unknown length."""

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        generator = torch.Generator().manual_seed(0)
        for i in range(10):
            yield torch.randn(3, generator=generator), torch.tensor(i % 2)


def test_data_of_unknown_length(capsys):
    module, every = nn.Linear(3, 2), list(Stream())
    x, y = (torch.stack(v) for v in zip(*every, strict=True))
    expected = read(module, (x, y), curvature="empirical_fisher")
    for data in (Stream(), DataLoader(Stream(), batch_size=4)):
        found = read(module, data, curvature="empirical_fisher", progress=True)
        torch.testing.assert_close(found, expected)
    assert "3it" in capsys.readouterr().err


def test_parameters_without_elements_have_no_site():
    module = nn.Linear(3, 2)
    module.none = nn.Parameter(torch.zeros(0))
    module.scale = nn.Parameter(torch.tensor(2.0))
    posterior = from_module(module, torch.randn(4, 3))
    assert set(posterior.axes) == {"weight", "bias", "scale"}


def test_axes_of_a_module_with_keyword_arguments():
    class Scaled(nn.Sequential):
        def forward(self, x, scale):
            return super().forward(x * scale)

    module = Scaled(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    inputs = {"scale": torch.ones(5, 1), "x": torch.randn(5, 3)}
    posterior = from_module(module, inputs, axes="auto")
    assert posterior.axes["2.weight"] == (None, "hidden1")


class Mixing(nn.Linear):
    def forward(self, x):
        return super().forward(x - x.mean(0))


class TestErrors:
    @pytest.mark.parametrize(
        "module",
        [Mixing(3, 2), nn.Sequential(nn.Linear(3, 2), nn.RReLU(), nn.Softmax(0))],
    )
    def test_examples_that_depend_on_others(self, module):
        with pytest.raises(ParameterError, match="another output on its own than among others"):
            from_module(module, torch.randn(5, 3))

    def test_data_parallel(self):
        with pytest.raises(ParameterError, match=r"pass that, its \.module"):
            from_module(nn.DataParallel(nn.Linear(3, 2)), torch.randn(5, 3))

    @pytest.mark.parametrize("curvature", ["ggn", "empirical_fisher"])
    @pytest.mark.parametrize(
        "loss, match",
        [
            (lambda o, y: o.sum() * o.sum().item(), r"failed under torch\.func\.vmap"),
            (lambda o, y: o.mean(5), r"outputs \(shape \(5, 2\)\) and targets \(shape \(5,\)\)"),
            (lambda o, y: o, r"one number for one example, got shape \(1, 2\)"),
            (lambda o, y: 1.0, "one number for one example, got float"),
        ],
    )
    def test_losses(self, loss, match, curvature):
        data = torch.randn(5, 3), torch.zeros(5).long()
        with pytest.raises(ParameterError, match=match):
            from_module(nn.Linear(3, 2), data, loss, curvature=curvature)

    @pytest.mark.parametrize("value", [None, "1"])
    def test_prior_precision(self, value):
        with pytest.raises(ParameterError, match="must be non-negative and finite, got"):
            from_module(nn.Linear(3, 2), torch.randn(5, 3), prior_precision=value)
