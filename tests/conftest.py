# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""What every test shares: a clean parameter store, seeds, validation, one thread, a Hypothesis
profile."""

from collections.abc import Iterator

import hypothesis
import pyro
import pytest
import torch


class _TorchRandom:
    """torch's global generator, in the form that Hypothesis seeds before each example."""

    def seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def getstate(self) -> torch.Tensor:
        return torch.get_rng_state()

    def setstate(self, state: torch.Tensor) -> None:
        torch.set_rng_state(state)


# Tensors of a few numbers: to wake other threads takes longer than the work.
torch.set_num_threads(1)

_torch_random = _TorchRandom()  # Hypothesis keeps a weak reference only
hypothesis.register_random(_torch_random)
hypothesis.settings.register_profile(
    "pyro_fusion", deadline=None, derandomize=True, max_examples=50
)
hypothesis.settings.load_profile("pyro_fusion")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device: torch.cuda.is_available() is False")
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _pyro_state() -> Iterator[None]:
    pyro.clear_param_store()
    pyro.enable_validation(True)
    pyro.set_rng_seed(0)
    yield
    pyro.clear_param_store()
