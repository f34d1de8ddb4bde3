# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Poolings: they say how components become one atom, and what that costs. Pure tensor code."""

from pyro_fusion.pooling.additive import AdditivePooling
from pyro_fusion.pooling.kl import Exclusive, Inclusive
from pyro_fusion.pooling.named import pooling_named
from pyro_fusion.pooling.pooling import Pooling
from pyro_fusion.pooling.product import Product

__all__ = ["AdditivePooling", "Exclusive", "Inclusive", "Pooling", "Product", "pooling_named"]
