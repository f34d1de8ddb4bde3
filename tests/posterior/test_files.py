# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Files of posteriors: there and back bit by bit, and whatever a stranger may send instead."""

import json
import math
import os
import pickle
import random
import struct
import time

import pyro.distributions as dist
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributions import biject_to, constraints
from torch.distributions import transforms as tt

from pyro_fusion.errors import FileFormatError
from pyro_fusion.families import Factor
from pyro_fusion.posterior import files as serialization
from pyro_fusion.posterior.posterior import Posterior
from tests.families.members import MEMBERS


def small():
    base = dist.Normal(torch.zeros(3, 2), 1.0).to_event(1)
    return Posterior(
        {
            "loc": dist.Normal(torch.arange(6.0).reshape(3, 2), 2.0).to_event(1),
            "weights": dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])),
            "scale": dist.TransformedDistribution(base, biject_to(constraints.interval(0.0, 2.0))),
            "noise": dist.InverseGamma(torch.tensor(3.0), torch.tensor(1.0)),
        },
        {"loc": ("component",), "weights": ("component",)},
        plates={"scale": ("features",)},
    )


def parts(path):
    """The metadata and the tensors of a file."""
    with safe_open(path, framework="pt") as f:
        return dict(f.metadata()), {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "posterior.safetensors"
    small().save(path)
    return path


def refused(path, match="."):
    """Loading raises FileFormatError, of one short line that names the file, and soon."""
    start = time.monotonic()
    with pytest.raises(FileFormatError, match=match) as caught:
        Posterior.load(path)
    message = str(caught.value)
    assert os.fspath(path) in message
    assert len(message.splitlines()) == 1 and len(message) < 800
    message.encode()  # can be printed
    assert time.monotonic() - start < 10


class TestRoundTrip:
    @pytest.mark.parametrize("member", MEMBERS, ids=str)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_every_member_bit_by_bit(self, member, dtype, tmp_path):
        d = member.make(torch.arange(3), dtype)
        p = Posterior({"x": d}, {"x": "component"})
        p.save(tmp_path / "p")
        q = Posterior.load(tmp_path / "p")
        assert (q.axes, q.plates, q.labels) == (p.axes, p.plates, p.labels)
        f, g = p.decomposed["x"], q.decomposed["x"]
        assert g.structure() == f.structure() == Factor.of(d).structure()
        assert (g.batch_shape, g.event_shape) == (d.batch_shape, d.event_shape)
        assert f.params.keys() == g.params.keys()
        for name in f.params:
            assert g.params[name].dtype == dtype
            assert torch.equal(f.params[name], g.params[name])

    def test_a_whole_posterior(self, path):
        p, q = small(), Posterior.load(path)
        assert repr(p) == repr(q)
        assert (q.axes, q.plates) == (p.axes, p.plates)
        values = p.sample((3,))
        assert torch.equal(p.log_prob(values), q.log_prob(values))

    def test_projections_and_permutations(self, tmp_path):
        p = small().permute("component", [2, 0, 1])
        p.save(tmp_path / "p")
        q = Posterior.load(tmp_path / "p")
        assert torch.equal(q.factors["loc"].base_dist.loc, p.factors["loc"].base_dist.loc)

    @pytest.mark.parametrize("site", ["a/b", "a.b", "ä 分 \n", "__metadata__", "loc/loc", "'\"\\"])
    def test_names_of_sites(self, site, tmp_path):
        p = Posterior({site: dist.Normal(torch.zeros(2), 1.0), "loc": dist.Normal(0.0, 1.0)})
        p.save(tmp_path / "p")
        assert list(Posterior.load(tmp_path / "p").factors) == [site, "loc"]


class TestSaving:
    def test_a_save_that_fails_leaves_the_old_file_alone(self, path, monkeypatch):
        before = path.read_bytes()

        def fail(tensors, filename, metadata):
            with open(filename, "wb") as f:
                f.write(b"half a f")
            raise OSError("disk full")

        monkeypatch.setattr(serialization, "save_file", fail)
        with pytest.raises(OSError, match="disk full"):
            small().to(dtype=torch.float64).save(path)
        assert path.read_bytes() == before
        assert os.listdir(path.parent) == [path.name]

    def test_nothing_is_left_beside_the_file(self, path):
        small().save(path)
        assert os.listdir(path.parent) == [path.name]

    def test_permissions_are_those_of_an_ordinary_file(self, path):
        ordinary = path.parent / "ordinary"
        ordinary.write_bytes(b"")
        assert path.stat().st_mode == ordinary.stat().st_mode

    def test_no_such_directory(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            small().save(tmp_path / "missing" / "p")

    def test_relative_path(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        small().save("p")
        assert repr(Posterior.load("p")) == repr(small())

    def test_what_cannot_be_stored_is_refused_before_the_file_is_touched(self, path):
        before = path.read_bytes()
        permute = dist.transforms.Permute(torch.tensor([1, 0]))
        d = dist.TransformedDistribution(dist.Normal(torch.zeros(2), 1.0).to_event(1), [permute])
        with pytest.raises(TypeError, match="Permute"):
            Posterior({"x": d}).save(path)
        assert path.read_bytes() == before


class TestNotAFile:
    def test_missing(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="no such file"):
            Posterior.load(tmp_path / "missing")

    def test_directory(self, tmp_path):
        refused(tmp_path, "is not a file")

    @pytest.mark.parametrize(
        "content",
        [b"", b"\0", b"\0" * 8, b"\0" * 1000, b"hello", b"{}" * 50, b"PK\x03\x04" + b"\0" * 100],
    )
    def test_something_else(self, tmp_path, content):
        (tmp_path / "p").write_bytes(content)
        refused(tmp_path / "p", "not a readable posterior")

    def test_a_pickle_is_not_executed(self, tmp_path):
        marker = tmp_path / "executed"

        class Bomb:
            def __reduce__(self):
                return (os.mkdir, (str(marker),))

        (tmp_path / "p").write_bytes(pickle.dumps(Bomb()))
        refused(tmp_path / "p")
        torch.save({"x": torch.ones(2)}, tmp_path / "q")
        refused(tmp_path / "q")
        assert not marker.exists()


class TestDamaged:
    def test_truncated_anywhere(self, path):
        whole = path.read_bytes()
        for n in [*range(0, 64), *range(64, len(whole), 13), len(whole) - 1]:
            path.write_bytes(whole[:n])
            refused(path)

    def test_longer_than_it_says(self, path):
        path.write_bytes(path.read_bytes() + b"\0" * 8)
        refused(path)

    def test_flipped_bytes_either_load_or_are_refused(self, path):
        whole = path.read_bytes()
        header = 8 + struct.unpack("<Q", whole[:8])[0]
        draw = random.Random(0)
        loaded = 0
        for trial in range(500):
            damaged = bytearray(whole)
            for _ in range(draw.choice([1, 1, 2, 8])):
                where = draw.randrange(header if trial % 4 else len(whole))
                damaged[where] ^= 1 << draw.randrange(8)
            path.write_bytes(damaged)
            try:
                p = Posterior.load(path)
            except FileFormatError as e:
                assert len(str(e).splitlines()) == 1 and len(str(e)) < 800
                str(e).encode()
            else:
                loaded += 1
                repr(p)
                values = p.sample()
                assert p.log_prob(values).shape == ()
        assert 0 < loaded < 500

    @pytest.mark.parametrize("length", [2**63, 2**64 - 1, 2**40, 100_000_001, 3])
    def test_absurd_length_of_the_header(self, path, length):
        path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
        refused(path)

    @pytest.mark.parametrize(
        "entry",
        [
            {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]},
            {"dtype": "F32", "shape": [2**62, 8], "data_offsets": [0, 4]},
            {"dtype": "F32", "shape": [1], "data_offsets": [0, 8]},
            {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
            {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]},
            {"dtype": "F32", "shape": [1.5], "data_offsets": [0, 4]},
            {"dtype": "F33", "shape": [1], "data_offsets": [0, 4]},
            {"dtype": "F32", "shape": [1] * 10_000, "data_offsets": [0, 4]},
            {"dtype": "F32", "shape": [0, 2**60], "data_offsets": [0, 0]},
        ],
    )
    def test_absurd_tensors(self, path, entry):
        metadata, _ = parts(path)
        header = {"__metadata__": metadata, "loc/loc": entry}
        text = json.dumps(header).encode()
        size = entry["data_offsets"][1] if entry["data_offsets"][1] < 100 else 4
        path.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * max(size, 0))
        refused(path)


def edit(path, metadata=None, tensors=None, sites=None):
    """Rewrite a good file with some of its parts changed."""
    old_metadata, old_tensors = parts(path)
    listed = json.loads(old_metadata["sites"])
    if sites is not None:
        old_metadata["sites"] = json.dumps(sites(listed) or listed)
    old_metadata |= metadata or {}
    old_tensors |= tensors or {}
    kept = {k: v for k, v in old_tensors.items() if v is not None}
    save_file(kept, path, {k: v for k, v in old_metadata.items() if v is not None})


def change(index, **entries):
    def apply(sites):
        for key, value in entries.items():
            if value is Ellipsis:
                del sites[index][key]
            else:
                sites[index][key] = value

    return apply


class TestHeader:
    def test_an_edit_that_changes_nothing_is_fine(self, path):
        edit(path, sites=lambda s: s)
        assert repr(Posterior.load(path)) == repr(small())

    @pytest.mark.parametrize(
        "metadata, message",
        [
            ({"format": "another"}, "format is 'another'"),
            ({"format": None}, "format is 'None'"),
            ({"version": "2"}, "version '2'.* reads version 1"),
            ({"version": "1.0"}, "version"),
            ({"version": None}, "version"),
            ({"version": "9" * 10_000}, "version"),
            ({"sites": None}, "JSON"),
            ({"sites": ""}, "JSON"),
            ({"sites": "not json"}, "JSON"),
            ({"sites": "["}, "JSON"),
            ({"sites": "[" * 100_000}, "JSON"),
            ({"sites": "[" * 100_000 + "]" * 100_000}, "JSON"),
            ({"sites": '{"a":' * 100_000 + "1" + "}" * 100_000}, "JSON"),
            ({"sites": "1" * 10_000}, "JSON"),
            ({"sites": "{}"}, "list of sites"),
            ({"sites": "[]"}, "list of sites"),
            ({"sites": "null"}, "list of sites"),
            ({"sites": "[" + "1," * 100_001 + "1]"}, "list of sites"),
            ({"sites": "[1]"}, "without a name"),
            ({"sites": "[{}]"}, "without a name"),
            ({"sites": '[{"name": 3}]'}, "without a name"),
            ({"sites": '[{"name": ""}]'}, "without a name"),
            ({"sites": '[{"name": "\\ud800"}]'}, "ud800"),
            ({"sites": '[{"name": "a\\nb"}]'}, "site 'a"),
            ({"sites": json.dumps([{"name": "x" * 100_000}])}, "site 'xxx"),
            ({"sites": json.dumps(["y" * 100_000])}, "without a name"),
        ],
        ids=lambda v: str(v)[:40],
    )
    def test_wrong_metadata(self, path, metadata, message):
        edit(path, metadata)
        refused(path, message)

    def test_no_metadata_at_all(self, tmp_path):
        save_file({"x/loc": torch.zeros(2)}, tmp_path / "p")
        refused(tmp_path / "p", "format")

    def test_duplicate_names(self, path):
        edit(path, sites=lambda s: s + s[:1])
        refused(path, "name of its own")

    @pytest.mark.parametrize(
        "entries, message",
        [
            ({"family": "Cauchy"}, "no family called 'Cauchy'"),
            ({"family": "os.system"}, "no family called"),
            ({"family": None}, "no family"),
            ({"family": ["Normal"]}, "no family"),
            ({"family": "N" * 100_000}, "no family"),
            ({"family": ...}, "no family"),
            ({"family": "Gamma"}, "'concentration' of Gamma is missing"),
            ({"family": "MultivariateNormal"}, "scale_tril"),
            ({"batch_dim": 3}, "batch_dim 3"),
            ({"batch_dim": -1}, "batch_dim"),
            ({"batch_dim": True}, "batch_dim"),
            ({"batch_dim": 1.0}, "batch_dim"),
            ({"batch_dim": "1"}, "batch_dim"),
            ({"batch_dim": 10**30}, "batch_dim"),
            ({"batch_dim": ...}, "batch_dim"),
            ({"axes": "component"}, "axes"),
            ({"axes": {"0": "component"}}, "axes"),
            ({"axes": [3]}, "axes"),
            ({"axes": [""]}, "labels must be names"),
            ({"axes": [["component"]]}, "axes"),
            ({"axes": ["a"] * 1000}, "axes"),
            ({"axes": ["a", "b", "c"]}, "3 labels"),
            ({"axes": [None, "component"]}, "label 'component' has size"),
            ({"axes": ...}, "axes"),
            ({"plates": ["p", "q"]}, "2 plates"),
            ({"plates": [3]}, "plates"),
            ({"plates": None}, "plates"),
            ({"plates": ...}, "plates"),
            ({"transforms": None}, "transforms"),
            ({"transforms": {}}, "transforms"),
            ({"transforms": ...}, "transforms"),
            ({"transforms": [["ExpTransform", {}]] * 100}, "transforms"),
            ({"transforms": ["ExpTransform"]}, "site 'loc'"),
            ({"transforms": [["Exec", {}]]}, "unknown transform 'Exec'"),
            ({"transforms": [["LowerCholeskyTransform", {}]]}, "unknown transform"),
            ({"transforms": [["E" * 100_000, {}]]}, "unknown transform"),
            ({"transforms": [[["ExpTransform"], {}]]}, "site 'loc'"),
            ({"transforms": [[{}, {}]]}, "site 'loc'"),
            ({"transforms": [["ExpTransform", []]]}, "site 'loc'"),
            ({"transforms": [["ExpTransform", {}, 3]]}, "site 'loc'"),
            ({"transforms": [["ExpTransform", {"cache_size": 1}]]}, "takes"),
            ({"transforms": [["PowerTransform", {}]]}, "takes"),
            ({"transforms": [["CorrCholeskyTransform", {}]]}, "site 'loc'"),
        ],
        ids=lambda v: str(v)[:40],
    )
    def test_wrong_site(self, path, entries, message):
        edit(path, sites=change(0, **entries))
        refused(path, message)

    @pytest.mark.parametrize(
        "argument",
        [
            "2",
            "1e999",
            "x" * 1000,
            None,
            [],
            [2.0],
            {},
            True,
            10**400,
            0,
            math.nan,
            math.inf,
            -math.inf,
        ],
        ids=lambda v: str(v)[:20],
    )
    def test_arguments_of_transforms_are_finite_numbers(self, path, argument):
        for transform in (
            ["PowerTransform", {"exponent": argument}],
            ["AffineTransform", {"loc": 0.0, "scale": argument}],
            ["AffineTransform", {"loc": argument or None, "scale": 1.0}],
        ):
            edit(path, sites=change(0, transforms=[transform]))
            refused(path, r"must (be a finite number|not be zero)|too large")

    @pytest.mark.parametrize(
        "sizes",
        [
            [2**40],
            [10**30],
            [-1],
            [0],
            [1.5],
            ["2"],
            2,
            None,
            [1] * 1000,
            [2**30, 2**30],
            [4],
            [True],
        ],
        ids=lambda v: str(v)[:20],
    )
    def test_sizes_of_reshapes(self, path, sizes):
        for transform in (
            {"in_shape": [2], "out_shape": sizes},
            {"in_shape": sizes, "out_shape": sizes},
        ):
            edit(path, sites=change(0, transforms=[["ReshapeTransform", transform]]))
            refused(path, "site 'loc'")


class TestTensors:
    @pytest.mark.parametrize(
        "tensors, message",
        [
            ({"loc/scale": None}, "'scale' of Normal is missing"),
            ({"loc/more": torch.ones(2)}, "belong to no site: .*loc/more"),
            ({"other/loc": torch.ones(2)}, "belong to no site"),
            ({"loc/loc": torch.full((3, 2), math.nan)}, "loc must be finite, got nan"),
            ({"loc/loc": torch.full((3, 2), math.inf)}, "loc must be finite, got inf"),
            ({"loc/scale": torch.full((3, 2), -1.0)}, "scale"),
            ({"loc/scale": torch.zeros(3, 2)}, "scale"),
            ({"weights/concentration": torch.tensor([1.0, -2.0, 3.0])}, "concentration"),
            ({"loc/scale": torch.ones(2)}, "batch shapes differ"),
            ({"loc/scale": torch.ones(3, 3)}, "batch shapes differ"),
            ({"loc/scale": torch.ones(())}, "batch shapes differ"),
            ({"loc/scale": torch.ones(3, 2, 1)}, "batch shapes differ"),
            ({"weights/concentration": torch.ones(())}, "impossible shape"),
            ({"weights/concentration": torch.ones(4)}, "label 'component' has size"),
            ({"loc/loc": torch.zeros(0, 2), "loc/scale": torch.zeros(0, 2)}, "impossible shape"),
            ({"loc/loc": torch.zeros((1,) * 20)}, "impossible shape"),
            ({"loc/loc": torch.zeros(3, 2, dtype=torch.int64)}, "floating point"),
            ({"loc/loc": torch.zeros(3, 2, dtype=torch.bool)}, "floating point"),
            ({"loc/loc": torch.zeros(3, 2, dtype=torch.uint8)}, "floating point"),
            ({"loc/loc": torch.zeros(3, 2).to(torch.float8_e4m3fn)}, "floating point"),
            ({"loc/loc": torch.zeros(3, 2, dtype=torch.float64)}, "like the rest"),
        ],
        ids=lambda v: str(v)[:40] if isinstance(v, str) else "",
    )
    def test_wrong_tensors(self, path, tensors, message):
        edit(path, tensors=tensors)
        refused(path, message)

    def test_matrices_that_do_not_fit(self, tmp_path):
        mvn = dist.MultivariateNormal(torch.zeros(4, 3), torch.eye(3))
        path = tmp_path / "p"
        for shape in [(4, 2, 2), (4, 1, 1), (4, 3, 2), (4, 2, 3), (4, 1, 3)]:
            Posterior({"x": mvn}).save(path)
            edit(path, tensors={"x/scale_tril": torch.ones(shape).tril().contiguous()})
            refused(path, "site 'x'")
        for matrix in (torch.ones(3, 3), torch.zeros(3, 3), -torch.eye(3)):
            Posterior({"x": mvn}).save(path)
            edit(path, tensors={"x/scale_tril": matrix.expand(4, 3, 3).contiguous()})
            refused(path, "site 'x'")

    def test_a_wishart_with_too_few_degrees(self, tmp_path):
        Posterior({"x": dist.Wishart(torch.tensor(4.0), torch.eye(3))}).save(tmp_path / "p")
        edit(tmp_path / "p", tensors={"x/df": torch.tensor(1.5)})
        refused(tmp_path / "p", "site 'x'.*df")

    @pytest.mark.parametrize(
        "transform",
        [
            ["PowerTransform", {"exponent": 0.5}],
            ["ExpTransform.inv", {}],
            ["SigmoidTransform.inv", {}],
            ["AffineTransform", {"loc": 0.0, "scale": 1e308}],
        ],
        ids=str,
    )
    def test_transforms_of_other_supports(self, tmp_path, transform):
        Posterior({"x": dist.Normal(torch.ones(3), 1.0)}).save(tmp_path / "p")
        edit(tmp_path / "p", sites=change(0, transforms=[transform]))
        refused(tmp_path / "p", "site 'x'")

    def test_exponents_are_exact(self, tmp_path):
        third = tt.PowerTransform(torch.tensor(1 / 3, dtype=torch.float64))
        p = Posterior({"x": dist.TransformedDistribution(dist.Gamma(2.0, 1.0), [third])})
        p.save(tmp_path / "p")
        (t,) = Posterior.load(tmp_path / "p").decomposed["x"].transforms
        assert t.exponent.dtype == torch.float64 and float(t.exponent) == 1 / 3

    @pytest.mark.parametrize("name", ["StickBreakingTransform", "OrderedTransform"])
    def test_transforms_of_vectors_on_scalars(self, tmp_path, name):
        Posterior({"x": dist.Normal(0.0, 1.0)}).save(tmp_path / "p")
        edit(tmp_path / "p", sites=change(0, transforms=[[name, {}]]))
        refused(tmp_path / "p", "site 'x'")


def test_half_precision_is_kept(tmp_path):
    p = Posterior({"x": dist.Normal(torch.zeros(3).half(), torch.ones(3).half())})
    p.save(tmp_path / "p")
    assert Posterior.load(tmp_path / "p").dtype == torch.float16


def test_into_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such folder: .*gone$"):
        Posterior({"x": dist.Normal(0.0, 1.0)}).save(tmp_path / "gone" / "x.safetensors")
