# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Reading whatever comes: ours, a stranger's, and what is told to the rest."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import UserDict
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn

from pyro_fusion import (
    Posterior,
    PosteriorGuide,
    from_draws,
    from_guide,
    fuse,
    read,
    register_reader,
)
from pyro_fusion.errors import (
    DrawsError,
    FileFormatError,
    GuideError,
    ParameterError,
    StructureError,
)
from pyro_fusion.readers import registry
from pyro_fusion.readers.draws import read_draws


@pytest.fixture(autouse=True)
def _same_readers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_ENTRIES", list(registry._ENTRIES))


CENTRES = torch.tensor([-5.0, 0.0, 5.0])
DRAWS = CENTRES + 0.1 * torch.randn(500, 3, generator=torch.Generator().manual_seed(0))


def model(x: Tensor = CENTRES) -> None:
    with pyro.plate("component", 3):
        loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
    with pyro.plate("data", 3):
        parts = dist.Categorical(torch.ones(3)), dist.Normal(loc, 0.1)
        pyro.sample("x", dist.MixtureSameFamily(*parts), obs=x)


def fitted() -> AutoNormal:
    guide = AutoNormal(model, init_scale=0.1)
    guide()
    with torch.no_grad():
        guide.locs.loc.copy_(CENTRES.flip(0))
    return guide


def same(a: Posterior, b: Posterior) -> bool:
    return a.axes == b.axes and all(
        torch.equal(v, b.decomposed[k].params[name])
        for k, f in a.decomposed.items()
        for name, v in f.params.items()
    )


@pytest.fixture(scope="module")
def mcmc() -> MCMC:
    pyro.set_rng_seed(0)
    mcmc = MCMC(NUTS(model), num_samples=200, warmup_steps=100, disable_progbar=True)
    mcmc.run(CENTRES[[1, 2, 0]])
    return mcmc


class TestOurs:
    def test_parties_of_all_kinds(self, mcmc: MCMC, tmp_path: Path) -> None:
        guide = fitted()
        paths = [tmp_path / "c.safetensors", tmp_path / "d.safetensors"]
        for i, path in enumerate(paths, 1):
            loc = dist.Normal(CENTRES + i / 100, 0.1)
            Posterior({"loc": loc}, {"loc": "component"}).save(path)
        by_hand = [from_guide(guide), from_draws(mcmc), *map(Posterior.load, paths)]
        parties = [guide, mcmc, paths[0], os.fspath(paths[1])]
        assert all(same(read(x), p) for x, p in zip(parties, by_hand, strict=True))
        last = from_table(TABLE)
        fusion = fuse([*parties, last])
        found = fusion.posterior.factors["loc"].mean[torch.stack(fusion.assignment)]
        own = torch.stack([p.factors["loc"].mean for p in (*by_hand, last)])
        assert (found - own).abs().max() < 0.2
        assert (own.sort(-1).values - CENTRES).abs().max() < 0.2
        assert fusion.objective == fuse([*by_hand, last]).objective

    def test_mappings_of_draws(self) -> None:
        for values in ({"loc": DRAWS}, UserDict(loc=DRAWS), MappingProxyType({"loc": DRAWS})):
            assert same(read(values), from_draws({"loc": DRAWS}))
        labelled = read({"loc": DRAWS}, axes={"loc": "component"})
        assert labelled.labels == ("component",)
        by_name = MappingProxyType({"here": labelled, "there": {"loc": DRAWS}})
        with pytest.raises(StructureError, match=r"labels at all parties, got .* for party 1 "):
            fuse(by_name)  # names are not taken for sites

    def test_readings(self) -> None:
        reading = read_draws({"loc": DRAWS})
        assert read(reading) is reading.posterior

    def test_fits_of_sklearn(self) -> None:
        mixture = pytest.importorskip("sklearn.mixture")
        fit, other = (
            mixture.BayesianGaussianMixture(n_components=2, tol=0.1, random_state=0).fit(
                np.random.default_rng(seed).normal([[-9.0], [9.0]] * 50)
            )
            for seed in range(2)
        )
        assert fuse([fit, read(other)]).posterior.labels == ("component",)
        assert read(fit, label="cluster").labels == ("cluster",)
        with pytest.raises(StructureError, match=r"party 0: .*BayesianGaussianMixture is not fit"):
            fuse([mixture.BayesianGaussianMixture()])

    def test_guides_of_numpyro(self) -> None:
        pytest.importorskip("numpyro")
        from numpyro.infer import autoguide

        from pyro_fusion import from_numpyro, to_numpyro

        guide = to_numpyro(from_guide(fitted()))
        assert same(read(guide), from_guide(fitted()))
        assert same(read(guide, guide.params), from_numpyro(guide, guide.params))

        class Own(autoguide.AutoNormal):
            pass

        for theirs in (autoguide.AutoNormal(model), Own(model)):
            with pytest.raises(GuideError, match=r"party 0: .*from_numpyro\(guide, params"):
                fuse([theirs, from_guide(fitted())])

    def test_a_posterior_is_as_it_is(self) -> None:
        p = from_guide(fitted())
        assert read(p) is p
        with pytest.raises(ParameterError, match="arguments came with it"):
            read(p, axes={"loc": "component"})

    def test_axes_go_to_guides(self, mcmc: MCMC) -> None:
        guide = PosteriorGuide(from_guide(fitted()))
        parties: list[Any] = [guide, from_draws(mcmc, axes={"loc": "state"})]
        assert fuse(parties, axes={"loc": "state"}).posterior.labels == ("state",)
        with pytest.raises(StructureError, match="axes are for guides"):
            fuse([mcmc, mcmc], axes={"loc": "state"})

    def test_guides_are_checked_beside_what_else_is_read(self, mcmc: MCMC) -> None:
        guide = fitted()
        with pytest.raises(GuideError, match="party 0 and party 2 are the same guide"):
            fuse([guide, mcmc, guide])

    def test_prior_of_the_guide_among_them(self, mcmc: MCMC) -> None:
        fusion = fuse([fitted(), mcmc], "product")
        assert fusion.num_atoms == 3
        with pytest.raises(ParameterError, match="divides out the prior"):
            fuse([mcmc, mcmc], "product")


def test_nothing_is_imported_to_tell() -> None:
    program = (
        "import sys, torch; from pyro_fusion import Posterior, fuse, read; "
        "fuse([Posterior({'x': torch.distributions.Normal(0., 1.)})]); "
        "read({'x': torch.randn(100)}, min_ess=0); "
        "print(*(x for x in ('jax', 'numpyro', 'arviz', 'xarray', 'sklearn') if x in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


# -- a stranger's ----------------------------------------------------------------------------------


@dataclass
class Table:
    """A table of published effects with their standard errors, of a library that is not ours."""

    effects: list[float]
    errors: list[float]


class Longer(Table):
    pass


def from_table(table: Table, scale: float = 1.0) -> Posterior:
    effect = dist.Normal(torch.tensor(table.effects), scale * torch.tensor(table.errors))
    return Posterior({"loc": effect}, {"loc": "component"})


def test_a_decorator_without_what_the_reader_takes() -> None:
    @register_reader
    def from_number(number: float) -> Posterior:
        return Posterior({"x": dist.Normal(number, 1.0)})

    with pytest.raises(ParameterError, match=r"expected a reader, .* got float: @register_reader"):
        from_number(3.0)


TABLE = Table([-5.0, 0.0, 5.0], [0.1, 0.1, 0.1])


class TestStrangers:
    def test_beside_ours(self) -> None:
        register_reader(Table)(from_table)
        fusion = fuse([fitted(), TABLE, from_table(Table([-5.1, 0.1, 5.1], [0.1, 0.1, 0.1]))])
        first, *others = (x.tolist() for x in fusion.assignment)
        assert others == [first[::-1]] * 2
        assert same(read(TABLE), from_table(TABLE))
        assert same(read(TABLE, scale=2.0), from_table(TABLE, 2.0))
        assert read(Longer([1.0], [1.0])).components("component") == 1

    @pytest.mark.parametrize("name", [f"{__name__}.Table", f"{__name__.split('.')[0]}.Table"])
    def test_by_the_name_of_its_type(self, name: str) -> None:
        register_reader(name)(from_table)
        assert same(read(TABLE), from_table(TABLE))
        with pytest.raises(StructureError):
            read(3)

    def test_by_predicate(self) -> None:
        register_reader(lambda x: hasattr(x, "effects"))(from_table)
        assert same(read(TABLE), from_table(TABLE))

    def test_the_nearest_type_then_the_last(self) -> None:
        def other(x: Any) -> Posterior:
            return Posterior({"x": dist.Normal(0.0, 1.0)})

        register_reader(lambda x: True)(other)
        register_reader(Longer)(from_table)
        register_reader(Table)(other)
        assert set(read(Longer([1.0], [1.0])).axes) == {"loc"}
        assert set(read(TABLE).axes) == {"x"}
        register_reader(Table)(from_table)
        assert set(read(TABLE).axes) == {"loc"}
        assert set(read(3).axes) == {"x"}
        assert set(read(fitted()).axes) == {"x"}  # ours of guides goes by a predicate too

    def test_what_is_callable_and_no_guide(self) -> None:
        class Callable(Table):
            def __call__(self) -> None:
                raise AssertionError

        register_reader(Table)(from_table)
        party = Callable(TABLE.effects, TABLE.errors)
        with pytest.warns(UserWarning, match="identical"):  # an error, were they guides
            assert fuse([party, party]).num_atoms == 3

    def test_bad_sources(self) -> None:
        for source in (3, "Table", "my lib.Table", None):
            with pytest.raises(ParameterError, match=r"library\.Name"):
                register_reader(source)  # type: ignore[arg-type]

    def test_readers_that_do_not_hold_what_they_promise(self) -> None:
        register_reader(Table)(lambda table: {"loc": table.effects})  # type: ignore[arg-type,return-value]
        with pytest.raises(StructureError, match=r"party 0: expected a Posterior from .*got dict"):
            fuse([TABLE])

        def needs_more(table: Table, units: str) -> Posterior:
            return from_table(table)

        register_reader(Table)(needs_more)
        with pytest.raises(ParameterError, match=r"party 0: the reader needs_more .*'units'"):
            fuse([TABLE])
        register_reader(lambda x: x.effects > 0)(from_table)
        with pytest.raises(StructureError, match="predicate of the reader from_table fails for a"):
            read(3)

    def test_it_is_named_where_nothing_reads(self) -> None:
        register_reader(Table)(from_table)
        with pytest.raises(StructureError, match=r"from_draws, .*Posterior\.load, from_table take"):
            read(3)


# -- remedies --------------------------------------------------------------------------------------


class OtherMCMC:
    pass


def of_library(module: str, name: str) -> Any:
    return type(name, (), {"__module__": module})()


REMEDIES: dict[str, tuple[Any, str]] = {
    "tensor": (torch.zeros(3), r"from_draws\({'site': draws}\)"),
    "array": (np.zeros(3), r"from_draws\({'site': draws}\)"),
    "distribution": (dist.Normal(0.0, 1.0), r"Posterior\({'site': distribution}\)"),
    "distributions": ({"x": dist.Normal(0.0, 1.0)}, r"Posterior\(distributions, axes="),
    "another MCMC": (OtherMCMC(), r"got OtherMCMC: read the draws, from_draws\(mcmc\)"),
    "state dict": (nn.Linear(64, 512).state_dict(), r"from_module\(module, data\)"),
    "plain state dict": ({"0.weight": torch.zeros(99, 2)}, r"from_module\(module, data\)"),
    "NumPyro's parameters": ({"loc_auto_loc": np.zeros(99)}, r"from_numpyro\(guide, params\)"),
    "result of SVI": (of_library("numpyro.infer.svi", "SVIRunResult"), "from_numpyro"),
    "gensim": (of_library("gensim.models.ldamodel", "LdaModel"), r"lda\.state\.get_lambda"),
    "Stan": (of_library("cmdstanpy.stanfit.mcmc", "CmdStanMCMC"), r"fit\.stan_variables\(\)"),
    "table": (of_library("pandas.core.frame", "DataFrame"), "x.to_numpy"),
    "network": (nn.Linear(2, 2), r"trained network, and no guide: from_module\(module, data\)"),
    "nothing": (None, "got NoneType. None of the readers from_guide, .*see register_reader"),
}


@pytest.mark.parametrize("kind", REMEDIES)
def test_what_is_told_to_the_rest(kind: str) -> None:
    source, remedy = REMEDIES[kind]
    with pytest.raises((StructureError, GuideError), match=rf"(?s)^party 1: .*{remedy}"):
        fuse([from_guide(fitted()), source])


def test_pyros_own() -> None:
    svi = SVI(model, fitted(), pyro.optim.Adam({}), Trace_ELBO())
    with pytest.raises(StructureError, match=r"got SVI: .*from_guide\(svi\.guide\)"):
        read(svi)
    with pytest.raises(StructureError, match=r"got ParamStoreDict: .*from_guide\(guide\)"):
        read(pyro.get_param_store())
    with pytest.raises(StructureError, match=r"a parameter store: load it, and from_guide"):
        read(pyro.get_param_store().get_state())


def test_an_mcmc_that_was_not_run() -> None:
    with pytest.raises(DrawsError, match="party 0: the MCMC has no draws"):
        fuse([MCMC(NUTS(model), num_samples=9)])


def test_files_of_others(tmp_path: Path) -> None:
    for name, remedy in {
        "a.nc": r"Read it with ArviZ, from_draws\(arviz\.from_netcdf",
        "a.pt": "Nothing is unpickled",
        "a.csv": "Read the draws from it",
        "a.safetensors": "is not a readable posterior",
    }.items():
        (tmp_path / name).write_bytes(b"no posterior")
        with pytest.raises(FileFormatError, match=rf"party 0: .*{remedy}"):
            fuse([tmp_path / name])
    with pytest.raises(FileNotFoundError, match=r"no such file: .*b\.safetensors"):
        fuse([tmp_path / "b.safetensors"])


def test_a_party_that_is_in_no_list(mcmc: MCMC) -> None:
    guide = fitted()
    for one in ("a.safetensors", Path("a"), guide, from_guide(guide), torch.zeros(3), 3, mcmc):
        with pytest.raises(StructureError, match="expected a list of posteriors or guides"):
            fuse(one)
