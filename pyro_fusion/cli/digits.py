# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The data of the demo: scikit-learn's handwritten digits, dealt out to parties. They come with
scikit-learn; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pyro_fusion.errors import ParameterError

__all__ = ["NUM_DIGITS", "Digits", "load"]

NUM_DIGITS = 10
_PUBLIC, _HELD_OUT = 250, 400


@dataclass(frozen=True)
class Digits:
    """Images as principal components, split over the parties.

    :ivar parties: per party ``[N_s, D]``.
    :ivar seen: per party the digits it has images of.
    :ivar test: held-out images of all ten digits, ``[N, D]``; ``labels`` are their digits, ``[N]``.
    :ivar decode: principal components ``[..., D]`` to images ``[..., 8, 8]``.
    """

    parties: list[Tensor]
    seen: list[list[int]]
    test: Tensor
    labels: np.ndarray
    decode: Callable[[Tensor], np.ndarray]


def load(*, parties: int = 6, dim: int = 12, seed: int = 0) -> Digits:
    """Scikit-learn's 1797 digits. Each pair of parties has all ten between them, five each; the
    images of a digit are dealt out at random among the parties that have it.

    :param parties: even, at least 4, so that every digit is seen by two parties or more.
    :param dim: the number of principal components.
    :raises ParameterError: for another number of parties.
    """
    from sklearn.datasets import load_digits
    from sklearn.decomposition import PCA

    if parties < 4 or parties % 2:
        raise ParameterError(f"parties must be an even number, at least 4, got {parties}")
    images, labels = load_digits(return_X_y=True)
    images = images / 16  # pixels from 0 to 1
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(images))
    public, test, train = np.split(order, [_PUBLIC, _PUBLIC + _HELD_OUT])
    seen: list[list[int]] = []
    for _ in range(parties // 2):
        digits = rng.permutation(NUM_DIGITS)
        seen += [sorted(half.tolist()) for half in np.split(digits, 2)]
    holders = [[s for s in range(parties) if d in seen[s]] for d in range(NUM_DIGITS)]
    party = np.array([rng.choice(holders[labels[i]]) for i in train])

    pca = PCA(dim, random_state=seed).fit(images[public])
    unit = float(pca.transform(images[public]).std())
    features = torch.as_tensor(pca.transform(images) / unit, dtype=torch.float32)

    def decode(x: Tensor) -> np.ndarray:
        flat = pca.inverse_transform(x.reshape(-1, dim).double().cpu().numpy() * unit)
        return np.asarray(flat).reshape((*x.shape[:-1], 8, 8))

    return Digits(
        [features[train[party == s]] for s in range(parties)],
        seen,
        features[test],
        labels[test],
        decode,
    )
