# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Small assignment problems, and priors for them."""

import torch
from torch import Tensor

from pyro_fusion import FixedAtoms, GroupNormPrior, IndianBuffetPrior

PRIORS = [
    IndianBuffetPrior(1.0),
    IndianBuffetPrior(0.1),
    GroupNormPrior(),
    GroupNormPrior(0.3),
    FixedAtoms(3),
]
RANKED = GroupNormPrior(0.5, ranked=True)


def random_costs(seed: int, num_atoms: int, sizes: list[int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [3 * torch.rand(num_atoms, n, generator=generator, dtype=torch.float64) for n in sizes]
