# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Three parties, three tools: Pyro's SVI, NumPyro's NUTS, and scikit-learn.

Each party has wines of two of three cultivars, and fits two Gaussians with diagonal covariances.
NUTS has two chains, which number the components each in its own way; ``read_draws`` sees that, and
makes Normals in unconstrained space of the draws, as those of an autoguide. What scikit-learn knows
of a mean and a precision at once becomes the same sites by drawing from it. Printed are the log
density of held-out wines at the posterior mean, and how far, at most, a cultivar's mean is from the
one found in all data; each for the parties, for what they are fused to, and for a fit to all data.
"""

import jax
import numpyro
import pyro
import torch
from sklearn import datasets, mixture

from pyro_fusion import Posterior, fuse
from pyro_fusion.readers.draws import read_draws


def model(x, size=2, lib=pyro, d=pyro.distributions):
    with lib.plate("component", size):
        loc = lib.sample("loc", d.Normal(0.0, 3.0).expand([6]).to_event(1))
        scale = lib.sample("scale", d.LogNormal(-0.5, 1.0).expand([6]).to_event(1))
    with lib.plate("data", len(x)):
        each, even = d.Normal(loc, scale).to_event(1), d.Categorical(logits=0 * loc[:, 0])
        lib.sample("x", d.MixtureSameFamily(even, each), obs=x)


def with_sklearn(x, size=2):
    fit = mixture.BayesianGaussianMixture(n_components=size, covariance_type="diag").fit(x)
    loc, precision = Posterior.from_sklearn(fit).sample([2000])["gaussian"].float().unbind(-1)
    return Posterior.from_draws({"loc": loc, "scale": precision.rsqrt()}, model, x, size)


def main(seed=0):
    pyro.set_rng_seed(seed)
    x, cultivar = map(torch.Tensor, datasets.load_wine(return_X_y=True))
    x, part = ((x - x.mean(0)) / x.std(0))[:, [0, 6, 9, 10, 11, 12]], torch.randperm(len(x)) % 3
    a, b, c = (x[(part > 0) & ((cultivar + part) % 3 == i)] for i in range(3))
    guide = pyro.infer.autoguide.AutoNormal(model)
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.03}), pyro.infer.Trace_ELBO())
    for _ in range(600):
        svi.step(a)
    chains = {"num_chains": 2, "chain_method": "vectorized", "num_warmup": 200, "num_samples": 200}
    mcmc = numpyro.infer.MCMC(numpyro.infer.NUTS(model), **chains, progress_bar=False)
    mcmc.run(jax.random.key(seed), b.numpy(), 2, numpyro, numpyro.distributions)
    print(reading := read_draws(mcmc))
    fits = [Posterior.from_guide(guide), reading.posterior, with_sklearn(c)]
    fits += [fuse(fits).posterior, with_sklearn(torch.cat([a, b, c]), 3)]
    for name, p in zip(("Pyro", "NumPyro", "scikit-learn", "fused", "pooled"), fits, strict=True):
        loc, scale = (p.factors[site].mean.unsqueeze(1).double() for site in ("loc", "scale"))
        each = torch.distributions.Normal(loc, scale).log_prob(x[part == 0]).sum(-1)
        off = (fits[-1].factors["loc"].mean - loc).norm(dim=-1).amin(0).max()
        print(f"{name:12} {each.exp().mean(0).log().mean():6.2f} {off:5.2f}")


if __name__ == "__main__":
    main()
