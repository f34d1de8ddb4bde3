# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The command: what it prints, what it writes, and what it says when something is wrong."""

import configparser
import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyro.distributions as dist
import pytest
import torch

import pyro_fusion
from pyro_fusion import Posterior
from pyro_fusion.cli.command import main

ROOT = Path(pyro_fusion.__file__).parents[1]
# How fuse() estimates it is no business of these tests.
FUSE = ("fuse", "--dispersion", "1")
CENTRES = torch.tensor([[-90.0, 0.0], [0.0, 90.0], [90.0, 0.0], [0.0, -90.0]])


def party(seen: list[int], seed: int) -> Posterior:
    """Components so far apart, and known so well, that there is one answer."""
    torch.manual_seed(seed)
    loc = CENTRES[seen] + 0.02 * torch.randn(len(seen), 2)
    return Posterior(
        {
            "loc": dist.Normal(loc, 0.1 + torch.zeros_like(loc)).to_event(1),
            "weights": dist.Dirichlet(torch.full((len(seen),), 20.0)),
        },
        {"loc": ("component", None), "weights": ("component",)},
    )


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Three parties' files, in the working directory."""
    monkeypatch.chdir(tmp_path)
    names = []
    for name, seen in {"north": [0, 1, 2], "south": [3, 1, 0], "west": [2, 3, 1]}.items():
        party(seen, seed=len(names)).save(f"{name}.safetensors")
        names.append(f"{name}.safetensors")
    return names


@pytest.fixture
def prior(files: list[str]) -> str:
    Posterior(
        {
            "loc": dist.Normal(torch.zeros(2), 100.0).to_event(1),
            "weights": dist.Dirichlet(torch.ones(3)),
        }
    ).save("prior.safetensors")
    return "prior.safetensors"


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that fails; returns its one line on standard error."""

    def run(*argv: str, status: int = 1) -> str:
        capsys.readouterr()
        try:
            returned = main(argv)
        except SystemExit as e:
            assert isinstance(e.code, int)
            returned = e.code
        out, err = capsys.readouterr()
        assert returned == status
        assert out == ""
        assert err.startswith("pyro-fusion: error: ")
        assert err.count("\n") == 1 and err.endswith("\n")
        return err

    return run


# -- fuse ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["inclusive", "exclusive", "product"])
def test_fuse(
    pooling: str, files: list[str], prior: str, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["--prior", prior] if pooling == "product" else []
    assert main([*FUSE, *files, "-o", "fused.safetensors", "--pooling", pooling, *base]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert f"Fusion of 3 parties, {pooling} pooling" in out
    assert "north:1 south:1 west:2" in out
    assert out.endswith("wrote fused.safetensors\n")
    fused = Posterior.load("fused.safetensors")
    assert fused.components("component") == 4
    loc = fused.factors["loc"].mean
    torch.testing.assert_close(loc[0], CENTRES[1], atol=1.0, rtol=0)
    assert sorted(os.listdir()) == sorted([*files, prior, "fused.safetensors"])


def test_quiet_prints_nothing(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*FUSE, *files, "-o", "fused.safetensors", "-q"]) == 0
    assert capsys.readouterr() == ("", "")
    assert Posterior.load("fused.safetensors").components("component") == 4


def test_same_seed_same_result(files: list[str]) -> None:
    for name in ("a", "b"):
        assert main([*FUSE, *files, "-o", name, "--seed", "3", "--restarts", "2", "-q"]) == 0
    a, b = (Posterior.load(name) for name in ("a", "b"))
    for site, factor in a.decomposed.items():
        for name, value in factor.params.items():
            assert torch.equal(value, b.decomposed[site].params[name])


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        (["--assignment-prior", "fixed-atoms", "--num-atoms", "4"], "FixedAtoms(num_atoms=4)"),
        (["--assignment-prior", "group-norm", "--scale", "2"], "GroupNormPrior(scale=2)"),
        (["--assignment-prior", "indian-buffet"], "IndianBuffetPrior("),
        (["--num-atoms", "5"], "FixedAtoms(num_atoms=5)"),
        (["--scale", "3"], "GroupNormPrior(scale=3)"),
        (["--assignment-prior", "group-norm"], "GroupNormPrior("),
        (["--alpha", "2"], "IndianBuffetPrior(alpha=2)"),
        (["--alpha", "0"], ", learned)"),
        (["--weights", "1", "2", "3"], "Fusion of 3 parties"),
        (["--dispersion", "5"], "dispersion 5)"),
    ],
)
def test_options_reach_the_fusion(
    options: list[str], shown: str, files: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*FUSE, *files, "-o", "fused.safetensors", *options]) == 0
    assert shown in capsys.readouterr().out


def test_weights_are_used(files: list[str]) -> None:
    alone = Posterior.load(files[0]).factors["loc"].mean[0]
    for name, weights in {"even": ("1", "1"), "uneven": ("1", "0.001")}.items():
        argv = [*FUSE, *files[:2], "-o", name, "-q", "--weights", *weights]
        assert main(argv) == 0
    distance = {
        name: (Posterior.load(name).factors["loc"].mean - alone).norm(dim=-1).min()
        for name in ("even", "uneven")
    }
    assert distance["uneven"] < 0.1 * distance["even"]


def test_files_of_one_name_are_told_apart(
    files: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for folder, file in zip("ab", files, strict=False):
        os.mkdir(folder)
        os.rename(file, f"{folder}/posterior.safetensors")
    a, b = (os.path.join(folder, "posterior.safetensors") for folder in "ab")
    assert main([*FUSE, a, b, "-o", "fused.safetensors"]) == 0
    assert f"{a}:1 {b}:1" in capsys.readouterr().out


def test_one_file_comes_back_as_it_is(files: list[str]) -> None:
    assert main(["fuse", files[0], "-o", "fused.safetensors", "-q"]) == 0
    fused, alone = (Posterior.load(f) for f in ("fused.safetensors", files[0]))
    assert torch.equal(fused.factors["loc"].mean, alone.factors["loc"].mean)


def test_a_warning_is_one_line(
    files: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import warnings

    load = Posterior.load

    def warn(path: str) -> Posterior:
        warnings.warn("not quite\nright", stacklevel=1)
        return load(path)

    monkeypatch.setattr(Posterior, "load", warn)
    before = warnings.showwarning
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert main(["show", files[0]]) == 0
    assert capsys.readouterr().err == "pyro-fusion: warning: not quite right\n"
    assert warnings.showwarning is before


# -- what is refused -------------------------------------------------------------------------------


def test_an_existing_output_is_kept_unless_forced(
    files: list[str], refused: Callable[..., str]
) -> None:
    output = Path("fused.safetensors")
    output.write_text("something dear")
    before = output.stat()
    assert "exists already; --force" in refused("fuse", *files, "-o", str(output))
    assert output.read_text() == "something dear"
    assert output.stat().st_mtime_ns == before.st_mtime_ns
    assert main([*FUSE, *files, "-o", str(output), "--force", "-q"]) == 0
    assert Posterior.load(output).components("component") == 4


def test_a_failure_with_force_keeps_the_old_file(
    files: list[str], refused: Callable[..., str]
) -> None:
    output = Path("fused.safetensors")
    output.write_text("something dear")
    refused("fuse", *files, "missing.safetensors", "-o", str(output), "--force")
    refused("fuse", *files, "-o", str(output), "--force", "--weights", "1", "2")
    assert output.read_text() == "something dear"
    assert sorted(os.listdir()) == sorted([*files, str(output)])


def test_the_output_may_be_an_input_if_forced(files: list[str]) -> None:
    assert main([*FUSE, *files, "-o", files[0], "--force", "-q"]) == 0
    assert Posterior.load(files[0]).components("component") == 4


def test_output_that_cannot_be(files: list[str], refused: Callable[..., str]) -> None:
    os.mkdir("folder")
    assert "folder is a folder" in refused("fuse", *files, "-o", "folder", "--force")
    assert "no such folder: nowhere" in refused("fuse", *files, "-o", "nowhere/x")


def test_missing_file(files: list[str], refused: Callable[..., str]) -> None:
    assert "no such file: gone" in refused("fuse", files[0], "gone", "-o", "x")
    assert "no such file: gone" in refused("show", "gone")
    assert not Path("x").exists()


@pytest.mark.parametrize(
    "content", [b"", b"not a posterior", b"\x80\x04\x95pickle", b"\xff" * 100, "cut off"]
)
def test_damaged_file(content: bytes | str, files: list[str], refused: Callable[..., str]) -> None:
    whole = Path(files[1]).read_bytes()
    Path(files[1]).write_bytes(whole[:-10] if isinstance(content, str) else content)
    assert files[1] in refused("fuse", *files, "-o", "x")
    assert files[1] in refused("show", files[1])
    assert not Path("x").exists()


@pytest.mark.filterwarnings("default:party north.* have identical")
def test_a_file_may_be_given_twice(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fuse", files[0], files[0], "-o", "x"]) == 0
    out, err = capsys.readouterr()
    assert "Fusion of 2 parties" in out
    assert "north.safetensors (0):0" in out and "north.safetensors (1):0" in out
    assert "identical parameters" in err


def test_parties_that_do_not_fit_are_named_by_their_files(
    files: list[str], refused: Callable[..., str]
) -> None:
    loc = torch.zeros(2, 3)
    Posterior(
        {
            "loc": dist.Normal(loc, loc + 1).to_event(1),
            "weights": dist.Dirichlet(torch.ones(2)),
        },
        {"loc": ("component", None), "weights": ("component",)},
    ).save("wide.safetensors")
    message = refused("fuse", files[0], "wide.safetensors", "-o", "x")
    assert "site 'loc'" in message and "(2, 3)" in message and "(3, 2)" in message
    assert "party 0 (north)" in message and "party 1 (wide)" in message
    assert not Path("x").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--assignment-prior", "fixed-atoms", "--scale", "1"],
            "--scale needs --assignment-prior group-norm",
        ),
        (["--alpha", "1", "--num-atoms", "4"], "--num-atoms needs --assignment-prior fixed-atoms"),
        (
            ["--assignment-prior", "group-norm", "--alpha", "1"],
            "--alpha needs --assignment-prior indian-buffet",
        ),
        (["--assignment-prior", "fixed-atoms"], "--assignment-prior fixed-atoms needs --num-atoms"),
        (["--assignment-prior", "fixed-atoms", "--num-atoms", "0"], "num_atoms must be positive"),
        (["--assignment-prior", "fixed-atoms", "--num-atoms", "2"], "party 0 (north) has 3"),
        (["--alpha", "-1"], "alpha must be positive"),
        (["--alpha", "nan"], "alpha must be positive"),
        (["--pooling", "product"], "--pooling product needs --prior"),
        (["--prior", "north.safetensors"], "--prior needs --pooling product"),
        (["--weights", "1", "2"], "expected 3 weights"),
        (["--weights", "1", "2", "-1"], "party 2 (west)"),
        (["--dispersion", "0"], "dispersion must be positive"),
        (["--dispersion", "inf"], "dispersion must be positive"),
    ],
)
def test_wrong_options(
    options: list[str], message: str, files: list[str], refused: Callable[..., str]
) -> None:
    assert message in refused("fuse", *files, "-o", "x", *options)
    assert not Path("x").exists()


def test_a_prior_that_lacks_a_site(files: list[str], refused: Callable[..., str]) -> None:
    Posterior({"weights": dist.Dirichlet(torch.ones(3))}).save("prior")
    message = refused("fuse", *files, "-o", "x", "--pooling", "product", "--prior", "prior")
    assert "needs the prior of site 'loc'" in message


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "required: command"),
        (["fly"], "invalid choice: 'fly'"),
        (["fuse", "-o", "x"], "required: FILE"),
        (["fuse", "a"], "required: -o/--output"),
        (["fuse", "a", "-o", "x", "--seed", "-1"], "expected an integer from 0"),
        (["fuse", "a", "-o", "x", "--seed", str(2**64)], "expected an integer from 0"),
        (["fuse", "a", "-o", "x", "--restarts", "few"], "--restarts"),
        (["fuse", "a", "-o", "x", "--pooling", "sum"], "invalid choice: 'sum'"),
    ],
)
def test_arguments_that_cannot_be_parsed(
    argv: list[str], message: str, refused: Callable[..., str]
) -> None:
    assert message in refused(*argv, status=2)


# -- show, demo, the rest --------------------------------------------------------------------------


def test_show(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", files[0]]) == 0
    out = capsys.readouterr().out
    assert out == f"{Posterior.load(files[0])!r}\n"
    assert "3 × component" in out


def test_names_in_a_file_do_not_reach_the_terminal_raw(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], refused: Callable[..., str]
) -> None:
    evil = tmp_path / "evil"
    Posterior({"a\x1b[2J\rb": dist.Normal(torch.zeros(2), 1.0).to_event(1)}).save(evil)
    assert main(["show", str(evil)]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\r" not in out
    assert r"a\x1b[2J\rb" in out
    other = tmp_path / "other"
    Posterior({"c": dist.Normal(torch.zeros(2), 1.0).to_event(1)}).save(other)
    assert "\x1b" not in refused("fuse", str(evil), str(other), "-o", str(tmp_path / "x"))


def test_demo_gets_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    import pyro_fusion.cli.demo

    seen = {}
    monkeypatch.setattr(pyro_fusion.cli.demo, "main", lambda **options: seen.update(options))
    assert main(["demo"]) == 0
    assert seen == {"output": "pyro_fusion_demo.png", "seed": 0, "progress": False}
    assert main(["demo", "-o", "x.pdf", "--seed", "7"]) == 0
    assert (seen["output"], seen["seed"]) == ("x.pdf", 7)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("nowhere/x.png", "no such folder: nowhere"),
        ("x.docx", "ends in one of"),
        ("x", "ends in one of"),
        ("f.png", "is a folder"),
    ],
)
def test_demo_checks_its_output_before_the_work(
    output: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    refused: Callable[..., str],
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkdir("f.png")
    assert message in refused("demo", "-o", output)


def test_demo_without_its_extras(
    monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    import pyro_fusion.cli.demo

    monkeypatch.setattr(pyro_fusion.cli.demo, "find_spec", lambda name: None)
    assert "pip install 'pyro-fusion[sklearn,plot]'" in refused("demo")


def test_interrupted(
    files: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(path: Path) -> Posterior:
        raise KeyboardInterrupt

    monkeypatch.setattr(Posterior, "load", stop)
    assert main(["show", files[0]]) == 130
    assert capsys.readouterr() == ("", "pyro-fusion: interrupted\n")


@pytest.mark.parametrize("quiet", [[], ["-q"]])
def test_an_interrupted_search_writes_nothing(
    quiet: list[str],
    files: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """``fuse`` returns the best so far; a file would not tell that it is half a search."""
    module = importlib.import_module("pyro_fusion.fusion.search")
    real, calls = module.expectation_maximization, 0

    def impatient(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(module, "expectation_maximization", impatient)
    assert main([*FUSE, *files, "-o", "out.safetensors", *quiet]) == 130
    assert capsys.readouterr() == ("", "pyro-fusion: interrupted\n")
    assert calls == 2 and not Path("out.safetensors").exists()


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"pyro-fusion {pyro_fusion.__version__}\n"


def test_the_console_script(files: list[str]) -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    scripts = config["options.entry_points"]["console_scripts"].split("\n")
    assert [s.replace(" ", "") for s in scripts if s] == ["pyro-fusion=pyro_fusion.cli:main"]

    # As the script that pip makes of it, in a terminal that knows neither × nor →.
    script = "import sys; from pyro_fusion.cli import main; sys.exit(main())"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    environment.pop("PYTHONWARNINGS", None)

    def start(argv: list[str]) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-c", script, *argv],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    running = [
        start(["fuse", *files, "-o", "fused.safetensors"]),
        start(["show", "gone.safetensors"]),
        start(["show", files[0]]),
    ]
    assert running[2].stdout is not None
    running[2].stdout.close()  # as `| head` does
    (out, err), (_, failed) = (p.communicate() for p in running[:2])
    running[2].wait()
    assert running[2].stderr is not None
    assert (running[2].stderr.read(), running[2].returncode) == ("", 1)
    running[2].stderr.close()
    assert (err, running[0].returncode) == ("", 0)
    assert "wrote fused.safetensors" in out
    assert (failed, running[1].returncode) == (
        "pyro-fusion: error: no such file: gone.safetensors\n",
        1,
    )
