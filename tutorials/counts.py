# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""A likelihood of your own, as a plain function: override ``local``.

Labs count resistant colonies of the same strains, which have no common names. Where few or none are
resistant, a Normal posterior of the log-odds is a rough message. It is good enough to find out
which strain is which; then the atoms see the exact likelihood. What ``local`` returns needs
``log_prob`` alone, and is a posterior, so likelihood times prior: ``FusionModel`` divides the prior
out again.
"""

from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO

from pyro_fusion import FusionGuide, FusionModel, Posterior, fuse

PRIOR = dist.Normal(0.0, 3.0)


def log_likelihood(log_odds, resistant, colonies):
    return dist.Binomial(colonies, logits=log_odds).log_prob(resistant)


class CountsModel(FusionModel):
    def local(self, site, index):
        k, n = (x[index] for x in self.data)
        return SimpleNamespace(log_prob=lambda x: PRIOR.log_prob(x) + log_likelihood(x, k, n))


def main(num_parties=12, seed=0):
    pyro.set_rng_seed(seed)
    truth = torch.tensor([-4.0, -1.0, 1.5])
    strains = torch.cat([torch.randperm(3) for _ in range(num_parties)])
    n = torch.full((len(strains),), 40.0)
    k = dist.Binomial(n, logits=truth[strains]).sample()
    # The usual approximation, with half a colony more of either kind.
    loc, scale = ((k + 0.5) / (n - k + 0.5)).log(), (1 / (k + 0.5) + 1 / (n - k + 0.5)).sqrt()
    factors = map(dist.Normal, loc.split(3), scale.split(3))
    parties = [Posterior({"log_odds": f}, {"log_odds": ("strain",)}) for f in factors]
    fusion = fuse(parties, "product", prior={"log_odds": PRIOR})

    model = CountsModel(parties, pooling="product", prior={"log_odds": PRIOR}, dispersion=1.0)
    model.data = k, n
    guide = FusionGuide(model, {"strain": torch.cat(fusion.assignment)})
    svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.993}), Trace_ELBO())
    for _ in range(800):
        svi.step()
    exact, rough = guide.factor("log_odds").distribution(), fusion.posterior.factors["log_odds"]
    for name, atoms in ("rough", rough), ("exact", exact):
        each = zip(atoms.mean.tolist(), atoms.stddev.tolist(), strict=True)
        print(f"{name} messages:", ", ".join(f"{mean:.2f} ± {sd:.2f}" for mean, sd in each))
    return {"exact": exact, "rough": rough, "data": (guide.assignment["strain"], strains, k, n)}


if __name__ == "__main__":
    main()
