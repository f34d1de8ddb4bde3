# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Random effects: override ``local``.

As in meta-analysis, each party's component deviates from its atom by an unknown scale tau. The
party measured that deviating value, so as a message about the atom its posterior is wider: its
variance is ``scale² + tau²``. SVI learns tau along with the atoms. Cochran's Q says how much of
what is seen within an atom is heterogeneity: ``I² = max(0, (Q - df) / Q)``. The prior is wide, so
a local posterior is as good as the likelihood of its data.
"""

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO

from pyro_fusion import FusionGuide, FusionModel, Posterior, fuse
from pyro_fusion.plotting.diagnostics import heterogeneity


class RandomEffects(FusionModel):
    def local(self, site, index):
        tau = pyro.param("tau", torch.tensor(0.1), constraint=dist.constraints.positive)
        own = super().local(site, index)
        return dist.Normal(own.mean, (own.variance + tau**2).sqrt()).to_event(1)


def i_squared(loc, scale):
    """Of the components of one atom, ``[m, D]``."""
    return heterogeneity(loc, scale).i_squared


def main(true_tau=0.5, num_parties=50, seed=0):
    pyro.set_rng_seed(seed)
    pyro.clear_param_store()
    centres = torch.tensor([[-6.0, 0.0], [0.0, 6.0], [6.0, 0.0], [0.0, -6.0]])
    sizes = [2 + s % 3 for s in range(num_parties)]  # of the four atoms, in any order
    truth = torch.cat([torch.randperm(4)[:size] for size in sizes])
    scale = torch.empty(len(truth), 2).uniform_(0.2, 0.5)
    loc = dist.Normal(centres[truth], (scale**2 + true_tau**2).sqrt()).sample()
    factors = map(dist.Normal, loc.split(sizes), scale.split(sizes))
    parties = [Posterior({"loc": f.to_event(1)}, {"loc": ("component",)}) for f in factors]
    prior = {"loc": dist.Normal(torch.zeros(2), 100.0).to_event(1)}

    assignment = torch.cat(fuse(parties, "product", prior=prior).assignment)
    model = RandomEffects(parties, pooling="product", prior=prior, dispersion=1.0)
    guide = FusionGuide(model, {"component": assignment})
    svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.993}), Trace_ELBO())
    for _ in range(700):
        svi.step()
    tau, atoms = pyro.param("tau").item(), guide.factor("loc").distribution()
    shares = [i_squared(loc[assignment == k], scale[assignment == k]) for k in assignment.unique()]
    print(f"tau = {tau:.3f} (true: {true_tau})")
    for mean, sd, share in zip(atoms.mean.tolist(), atoms.stddev.tolist(), shares, strict=True):
        print("atom at ({:.2f}, {:.2f}) ± ({:.2f}, {:.2f}), I² = {:.0%}".format(*mean, *sd, share))
    return {"tau": tau, "atoms": atoms, "shares": shares, "data": (assignment, truth, loc, scale)}


if __name__ == "__main__":
    main()
