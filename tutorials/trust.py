# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Trust a party less: by ``weights``, or by a heavy-tailed link that overrides ``scale``.

The first of eight parties is off, by more and more. With a small weight it counts less, but the
atoms still follow it. In the link each party has a latent trust, which multiplies its log
densities, with the prior ``Gamma(nu/2 + 1, nu/2)``, whose mode is 1: as in the scale mixture that
makes a Student-t of a Normal. At the best trust, ``1 / (1 + 2 D / nu)`` for a party whose
divergences add up to D, its loss is ``nu/2 log(1 + 2 D / nu)``: the farther off it is, the less it
pulls.
"""

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, TraceMeanField_ELBO

from pyro_fusion import FixedAtoms, FusionEM, FusionGuide, FusionModel, Posterior

NU = 4.0


class TrustModel(FusionModel):
    def scale(self, label):
        prior = dist.Gamma(NU / 2 + 1, NU / 2).expand([self.problem.num_parties]).to_event(1)
        return super().scale(label) * pyro.sample("trust", prior)[..., self.party(label)]


class TrustGuide(FusionGuide):
    def scale(self, label):
        start = torch.ones(self.model.problem.num_parties)
        mode = pyro.param("mode", start, constraint=dist.constraints.positive)
        trust = pyro.sample("trust", dist.Delta(mode, event_dim=1))
        return FusionModel.scale(self.model, label) * trust[..., self.model.party(label)]


def atoms(parties, weights=None, trust=False):
    settings = {"assignment_prior": FixedAtoms(3), "dispersion": 1.0}
    guide = FusionGuide(FusionModel(parties, weights=weights, **settings))
    FusionEM(guide.model, guide).run()
    if trust:
        pyro.clear_param_store()
        model = TrustModel(parties, **settings)
        guide = TrustGuide(model, guide.assignment)
        svi = SVI(model, guide, pyro.optim.Rprop({"lr": 0.1}), TraceMeanField_ELBO())  # no noise
        for _ in range(200):
            svi.step()
    return guide.factor("loc").distribution().mean.detach()


def main(distances=(0, 1, 10, 100, 1000), seed=0):
    pyro.set_rng_seed(seed)
    centres = torch.tensor([[-6.0, 0.0], [0.0, 6.0], [6.0, 0.0]]).double()
    locs = [dist.Normal(centres[torch.randperm(3)], 0.3).sample() for _ in range(8)]
    for d in distances:
        factors = [dist.Normal(x, 0.3).to_event(1) for x in (locs[0] + d, *locs[1:])]
        parties = [Posterior({"loc": f}, {"loc": ("component",)}) for f in factors]
        means = atoms(parties), atoms(parties, [0.1] + [1.0] * 7), atoms(parties, trust=True)
        errors = [torch.cdist(centres, m).min(1).values.max().item() for m in means]
        print("off by {}: error {:.2f}; weighted {:.2f}; trusted {:.2f}".format(d, *errors))


if __name__ == "__main__":
    main()
