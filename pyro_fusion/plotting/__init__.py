# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Pictures of a fusion. Matplotlib is optional and imported only by the functions here; each draws
into the axes or figure that it is given, or into a new one, and returns it."""

from pyro_fusion.plotting.assignment import plot_assignment, plot_popularity
from pyro_fusion.plotting.calibration import plot_calibration
from pyro_fusion.plotting.components import plot_components
from pyro_fusion.plotting.forest import plot_forest
from pyro_fusion.plotting.images import plot_atoms
from pyro_fusion.plotting.path import plot_dispersion_path
from pyro_fusion.plotting.runs import plot_num_atoms, plot_objective

__all__ = [
    "plot_assignment",
    "plot_atoms",
    "plot_calibration",
    "plot_components",
    "plot_dispersion_path",
    "plot_forest",
    "plot_num_atoms",
    "plot_objective",
    "plot_popularity",
]
