# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""What every test shares: a clean parameter store, seeds, validation, one thread, a Hypothesis
profile."""

import os
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


def pytest_configure(config: pytest.Config) -> None:
    """Keep what JAX compiles, beside pytest's cache: most of the time of NumPyro's tests."""
    cache = getattr(config, "cache", None)
    if cache is None:
        return
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache.mkdir("jax")))
    # All of it, however quick it was; with a bound there is a lock, too.
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(1 << 28))
    ignored = "ignore:Error (reading|writing) persistent compilation cache:UserWarning"
    config.addinivalue_line("filterwarnings", ignored)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The longest first: at the end, one core would run a notebook and the others wait.
    items.sort(key=lambda item: item.path.name != "test_notebooks.py")
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
