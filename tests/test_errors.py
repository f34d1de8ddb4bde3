# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Errors carry the party and the site, and their text is made from these."""

import copy
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

from pyro_fusion import (
    FixedAtoms,
    FusionEM,
    FusionGibbs,
    FusionGuide,
    FusionModel,
    Posterior,
    fuse,
)
from pyro_fusion.assignment import coordinate
from pyro_fusion.cli.command import main
from pyro_fusion.errors import (
    DrawsError,
    FileFormatError,
    FusionError,
    GuideError,
    ParameterError,
    Party,
    Site,
    StructureError,
    UnsupportedFamilyError,
    at,
    naming,
)

NAMES = ("south", "west", "north")
CLASSES = [
    (FusionError, Exception),
    (ParameterError, ValueError),
    (StructureError, ValueError),
    (UnsupportedFamilyError, TypeError),
    (GuideError, ValueError),
    (DrawsError, ValueError),
    (FileFormatError, ValueError),
]


def named(error: FusionError) -> FusionError:
    """The error as it leaves code that knows what the parties are called."""
    with pytest.raises(type(error)) as caught, naming(NAMES):
        raise error
    assert caught.value is error
    return error


class TestFields:
    @pytest.mark.parametrize(("kind", "builtin"), CLASSES)
    def test_the_text_is_made_from_them(self, kind, builtin) -> None:
        e = kind("expected a, got b", party=2, site="x")
        assert isinstance(e, FusionError) and isinstance(e, builtin)
        assert (e.party, e.site, e.message) == (2, "x", "expected a, got b")
        assert str(e) == "party 2, site 'x': expected a, got b"
        assert str(named(e)) == "party 2 (north), site 'x': expected a, got b"
        assert e.party == "north"

    @pytest.mark.parametrize(("kind", "builtin"), CLASSES)
    @pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, pickle.dumps])
    def test_copies_and_pickles(self, kind, builtin, again) -> None:
        for e in (
            kind("plain"),
            kind("expected a", party=[1, 2], site="x"),
            named(kind([Party(1), " has a, ", Party(0), " has b at ", Site("y")])),
        ):
            other = again(e)
            other = pickle.loads(other) if isinstance(other, bytes) else other
            assert type(other) is kind and other is not e
            for field in ("party", "parties", "site", "message", "args"):
                assert getattr(other, field) == getattr(e, field)
            assert (str(other), repr(other)) == (str(e), repr(e))

    def test_some_are_of_no_party_or_site(self) -> None:
        e = named(ParameterError("all weights are zero"))
        assert (e.party, e.site, e.parties) == (None, None, ())
        assert str(e) == e.message == "all weights are zero"
        assert str(ParameterError("m", site="x")) == "site 'x': m"
        assert str(ParameterError("m", party="north")) == "party north: m"

    def test_a_number_of_numpy_is_one(self) -> None:
        e = ParameterError("m", party=np.int64(1))
        assert type(e.party) is int
        assert named(e).party == "west"

    def test_of_several_parties_the_first_is_the_party(self) -> None:
        e = named(ParameterError("improper", party=[0, 2], site="x"))
        assert (e.party, e.parties) == ("south", ("south", "north"))
        assert str(e) == "party 0 (south), party 2 (north), site 'x': improper"

    def test_what_a_message_mentions_is_not_said_twice(self) -> None:
        e = StructureError([Party(1), " has a, ", Party(0), " has b"], site="x")
        assert str(e) == "site 'x': party 1 has a, party 0 has b"
        assert str(named(e)) == "site 'x': party 1 (west) has a, party 0 (south) has b"
        assert e.parties == ("west", "south")
        e = StructureError([Site("x"), " has two labels"], party=1)
        assert str(e) == "party 1: site 'x' has two labels"
        assert e.site == "x"

    def test_one_can_be_said_more_about(self) -> None:
        inner = ParameterError("scale is negative", site="x")
        e = named(FileFormatError(["a.safetensors: ", *inner.pieces], party=0))
        assert str(e) == "party 0 (south): a.safetensors: site 'x': scale is negative"
        assert (e.party, e.site) == ("south", "x")


class TestPassingBy:
    def test_what_is_not_known_is_filled_in_on_the_same_object(self) -> None:
        e = ParameterError("m")
        with pytest.raises(ParameterError) as caught, naming(NAMES), at(party=1), at(site="x"):
            raise e
        assert caught.value is e and e.__cause__ is None
        assert (e.party, e.site) == ("west", "x")

    def test_what_is_known_stays(self) -> None:
        e = ParameterError("m", party=2, site="x")
        with pytest.raises(ParameterError), naming("abc"), naming(NAMES), at(party=1, site="y"):
            raise e
        assert (e.party, e.site) == ("north", "x")

    def test_other_errors_pass_as_they_are(self) -> None:
        e = ValueError("party 1")
        with pytest.raises(ValueError, match=r"^party 1$") as caught, naming(NAMES), at(site="x"):
            raise e
        assert caught.value is e

    def test_a_name_that_is_the_number_is_not_repeated(self) -> None:
        e = ParameterError("m", party=1)
        with pytest.raises(ParameterError, match=r"^party 1: m$"), naming(["0", "1"]):
            raise e
        assert e.party == "1"

    def test_a_number_without_a_name_stays_one(self) -> None:
        e = named(ParameterError("m", party=3))
        assert e.party == 3
        assert str(e) == "party 3: m"

    @pytest.mark.parametrize("text", ["party 0", "party 1: ", "party " + "9" * 5000, "{0} %s"])
    def test_no_message_is_parsed(self, text) -> None:
        e = named(ParameterError(f"expected a, got {text}", site="party 0"))
        assert str(e) == f"site 'party 0': expected a, got {text}"
        assert e.party is None

    def test_a_hostile_name_is_one_short_line(self) -> None:
        text = str(ParameterError("m", site="a\nb" + "c" * 10_000))
        assert text.startswith("site 'a\\nbccc") and len(text) < 120
        assert ParameterError("m", site="größe").message == "m"
        assert str(ParameterError("m", site="größe")) == "site 'größe': m"


# -- out of fuse -----------------------------------------------------------------------------------


def party(loc: torch.Tensor, site: str = "loc") -> Posterior:
    return Posterior({site: dist.Normal(loc, 1.0)}, {site: ("component",)})


def refused(*parties, kind=StructureError, **options) -> FusionError:
    """What comes out of ``fuse`` for parties north, east and south."""
    given = dict(zip(("north", "east", "south"), parties, strict=False))
    with pytest.raises(kind) as caught:
        fuse(given, **options)
    assert caught.type is kind
    return caught.value


class TestFuse:
    def test_structure(self) -> None:
        e = refused(party(torch.zeros(2)), party(torch.zeros(2).double()))
        assert (e.parties, e.site) == (("east", "north"), "loc")
        assert "for party 1 (east) and torch.float32 for party 0 (north)" in str(e)
        e = refused(party(torch.zeros(2)), party(torch.zeros(2), "other"))
        assert (e.parties, e.site) == (("east", "north"), None)

    def test_no_posterior(self) -> None:
        e = refused(party(torch.zeros(2)), 3)
        assert (e.party, e.site) == ("east", None)
        assert str(e).startswith("party 1 (east): expected a Posterior")

    def test_too_many_components(self) -> None:
        e = refused(party(torch.zeros(2)), party(torch.zeros(3)), assignment_prior=FixedAtoms(2))
        assert (e.party, e.site) == ("east", None)

    def test_weights(self) -> None:
        both = party(torch.zeros(2)), party(torch.ones(2))
        e = refused(*both, kind=ParameterError, weights={"north": 1.0, "east": -1.0})
        assert e.party == "east"
        assert str(e).startswith("the weight of party 1 (east) must be")

    def test_prior(self) -> None:
        both = party(torch.zeros(2)), party(torch.ones(2))
        e = refused(*both, pooling="product", prior={"other": dist.Normal(0.0, 1.0)})
        assert (e.party, e.site) == (None, "loc")
        e = refused(*both, pooling="product", prior={"loc": dist.Normal(torch.arange(2.0), 1.0)})
        assert (e.party, e.site) == (None, "loc")
        assert str(e).startswith("site 'loc': the prior ")

    def test_improper_product(self) -> None:
        scales = (0.9, 9.0, 8.0)
        parties = [Posterior({"b": dist.Normal(torch.tensor(0.0), x)}) for x in scales]
        e = refused(
            *parties,
            kind=ParameterError,
            pooling="product",
            prior={"b": dist.Normal(0.0, 1.0)},
        )
        assert (e.parties, e.site) == (("east", "south"), "b")
        assert str(e).startswith("party 1 (east), party 2 (south), site 'b': ")

    def test_a_guide_that_cannot_be_read(self) -> None:
        def guide(x):
            return x

        e = refused(party(torch.zeros(2)), guide, kind=GuideError)
        assert e.party == "east"
        assert str(e).startswith("party 1 (east): ")

    def test_a_site_of_a_guide(self) -> None:
        def guide():
            pyro.sample("x", dist.Delta(torch.tensor(0.0)))

        e = refused(party(torch.zeros(2)), guide, kind=GuideError)
        assert (e.party, e.site) == ("east", "x")
        assert str(e).startswith("party 1 (east): site 'x' is a point mass")

    def test_guides_that_share_parameters(self) -> None:
        def model():
            pyro.sample("x", dist.Normal(0.0, 1.0))

        guides = [AutoNormal(model) for _ in range(2)]
        for g in guides:
            g()
        e = refused(*guides, kind=GuideError)
        assert e.parties == ("north", "east")
        assert str(e).startswith("party 0 (north) and party 1 (east) share the parameter")


class TestFiles:
    def test_a_parameter_out_of_range(self, tmp_path: Path) -> None:
        from safetensors import safe_open
        from safetensors.torch import save_file

        path = tmp_path / "p.safetensors"
        party(torch.zeros(2)).save(path)
        with safe_open(path, framework="pt") as f:
            metadata = f.metadata()
            tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
        save_file(tensors | {"loc/scale": -torch.ones(2)}, path, metadata)
        with pytest.raises(FileFormatError) as caught:
            Posterior.load(path)
        assert caught.value.site == "loc"
        assert str(caught.value).startswith(f"{path}: site 'loc': ")
        del tensors["loc/scale"]
        save_file(tensors, path, metadata)
        with pytest.raises(
            FileFormatError, match=r"p.safetensors: site 'loc': .* 'scale'"
        ) as caught:
            Posterior.load(path)
        assert caught.value.site == "loc"

    @pytest.mark.parametrize("site", ["party 0", "party " + "9" * 5000])
    def test_sites_that_are_called_as_a_party(
        self, site: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        paths = [str(tmp_path / f"{x}.safetensors") for x in ("north", "east")]
        party(torch.zeros(2), site).save(paths[0])
        party(torch.zeros(2).double(), site).save(paths[1])
        e = refused(*map(Posterior.load, paths))
        assert (e.parties, e.site) == (("east", "north"), site)
        assert str(e).startswith(f"site '{site[:100]}")
        assert main(["fuse", *paths, "-o", str(tmp_path / "x")]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"pyro-fusion: error: site '{site[:100]}")


class TestWhoItIs:
    """Wherever an error comes from, the party is that which was given."""

    @staticmethod
    def party(size: int, seed: int) -> Posterior:
        g = torch.Generator().manual_seed(seed)
        loc = 3 * torch.randn(size, generator=g, dtype=torch.float64)
        x = dist.Normal(loc, torch.full_like(loc, 0.3))
        return Posterior({"x": x, "y": dist.Normal(loc[0], 1.0)}, {"x": "component"})

    @pytest.mark.parametrize("size", [2, 3, 4])
    def test_of_a_solver_that_is_wrong_at_one_party(self, size: int) -> None:
        """Solvers see the parties in an order of their own."""
        names = {4: "south", 2: "west", 3: "north"}
        given = {name: self.party(n, n) for n, name in names.items()}

        def wrong(problem, prior, **settings):
            result = coordinate(problem, prior, **settings)
            atoms = [torch.zeros_like(a) if len(a) == size else a for a in result.atoms]
            return replace(result, atoms=atoms)

        with pytest.raises(ParameterError, match=f"{names[size]}.*at most once") as caught:
            fuse(given, solver=wrong, dispersion=1.0)
        assert caught.value.party == names[size]
        model = FusionModel(given, dispersion=1.0)
        with pytest.raises(ParameterError) as caught:
            FusionEM(model, FusionGuide(model), solver=wrong).step()
        assert caught.value.party == names[size]

    def test_of_the_program(self) -> None:
        given = {"south": self.party(3, 0), "west": self.party(2, 1)}
        bad = {"component": torch.tensor([0, 1, 2, 1, 1])}
        model = FusionModel(given, dispersion=1.0)
        for make in (
            lambda: FusionModel(given, dispersion=1.0, assignment=bad),
            lambda: FusionGuide(model, bad),
        ):
            with pytest.raises(StructureError, match=r"party 1 \(west\)") as caught:
                make()
            assert caught.value.party == "west"
        prior = {"x": dist.Normal(0.0, 9.0), "y": dist.Normal(0.0, 0.01)}
        model = FusionModel(given, "product", prior=prior, dispersion=1.0)
        for use in (FusionGuide, FusionGibbs):
            with pytest.raises(ParameterError, match="improper") as caught:
                use(model)
            assert (caught.value.party, caught.value.site) == ("south", "y")

    def test_of_more_components_than_atoms(self) -> None:
        given = {"1": self.party(3, 0), "0": self.party(2, 1)}
        with pytest.raises(StructureError, match=r"party 0 \(1\) has 3 components") as caught:
            fuse(given, assignment_prior=FixedAtoms(2))
        assert caught.value.party == "1"


def test_long_names_of_parties_are_shown_short() -> None:
    error = StructureError("expected one", party=1)
    error.name_parties(["a", "b" * 5000])
    assert error.party == "b" * 5000
    assert str(error) == f"party 1 ({'b' * 100}…): expected one"
