# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Learn alpha: override ``assignment_prior``, and give the guide what it draws.

The Indian buffet expects ``alpha * H_S`` atoms among S parties. Here alpha is a latent variable of
its own, with a Gamma prior. Given an assignment with K atoms its posterior is known, Gamma(2 + K,
1 + H_S), so we can see whether SVI finds it.
"""

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, TraceMeanField_ELBO

from pyro_fusion import FusionEM, FusionGuide, FusionModel, IndianBuffetPrior, Posterior

POSITIVE = dist.constraints.positive


class AlphaModel(FusionModel):
    def assignment_prior(self, label):
        return IndianBuffetPrior(pyro.sample("alpha", dist.Gamma(2.0, 1.0)))


class AlphaGuide(FusionGuide):
    def forward(self, *args, **kwargs):
        shape = pyro.param("alpha_shape", torch.tensor(2.0), constraint=POSITIVE)
        mean = pyro.param("alpha_mean", torch.tensor(2.0), constraint=POSITIVE)
        pyro.sample("alpha", dist.Gamma(shape, shape / mean))
        return super().forward(*args, **kwargs)


def main(num_parties=8, seed=0):
    pyro.set_rng_seed(seed)
    pyro.clear_param_store()
    centres = torch.tensor([[-6.0, 0.0], [-2.0, 4.0], [0.0, 0.0], [2.0, -4.0], [6.0, 0.0]])
    parties = []
    for _ in range(num_parties):  # each has three of the five, in an order of its own
        loc = dist.Normal(centres[torch.randperm(5)[:3]], 0.2).sample()
        factors = {"loc": dist.Normal(loc, 0.2).to_event(1)}
        parties.append(Posterior(factors, axes={"loc": ("component",)}))
    prior = {"loc": dist.Normal(torch.zeros(2), 10.0).to_event(1)}

    # The assignment with alpha at its mode, in closed form; then all else by gradient.
    plain = FusionModel(parties, "product", prior=prior, dispersion=1.0)
    fusion = FusionEM(plain, FusionGuide(plain)).run()
    model = AlphaModel(plain.problem)  # another program of the same problem
    guide = AlphaGuide(model, {"component": torch.cat(fusion.assignment)})
    adam = pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.995})
    svi = SVI(model, guide, adam, TraceMeanField_ELBO())
    for _ in range(800):
        svi.step()
    shape, mean = pyro.param("alpha_shape").item(), pyro.param("alpha_mean").item()
    k, rate = fusion.num_atoms, 1 + sum(1 / s for s in range(1, num_parties + 1))
    print(f"alpha ~ Gamma({shape:.2f}, {shape / mean:.2f}); exactly Gamma({2 + k}, {rate:.2f})")
    return k, shape, mean


if __name__ == "__main__":
    main()
