# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Readers: one file or folder per source of posteriors. Each returns a
:class:`~pyro_fusion.Posterior` and imports its source library only when it is used."""
