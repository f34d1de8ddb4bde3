# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The ``pyro-fusion`` command: fuse files, show one, run the demo. Errors are one line on standard
error and a non-zero exit."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NoReturn, TextIO

from pyro_fusion.assignment.priors import (
    AssignmentPrior,
    FixedAtoms,
    GroupNormPrior,
    IndianBuffetPrior,
)
from pyro_fusion.errors import FusionError, ParameterError
from pyro_fusion.fusion.fuse import fuse
from pyro_fusion.posterior import Posterior

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    :param argv: the arguments; by default those of the process.
    :returns: the exit status: 0, 1 for an error, 130 when interrupted.
    :raises SystemExit: with status 2 for arguments that cannot be parsed; with 0 for ``--help``.
    """
    arguments = _parser().parse_args(argv)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            arguments.run(arguments)
            sys.stdout.flush()
    except BrokenPipeError:
        # The reader is gone, as after `| head`. Python would flush once more at exit, and fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (FusionError, OSError, ImportError) as e:
        _print(f"pyro-fusion: error: {_one_line(e)}", sys.stderr)
        return 1
    except KeyboardInterrupt:
        _print("pyro-fusion: interrupted", sys.stderr)
        return 130
    return 0


def _one_line(e: BaseException | Warning | str) -> str:
    return " ".join(str(e).split()) or type(e).__name__


def _show_warning(message: Warning | str, *args: object, **kwargs: object) -> None:
    _print(f"pyro-fusion: warning: {_one_line(message)}", sys.stderr)


def _print(text: str, file: TextIO | None = None) -> None:
    """Print text that may hold names from a stranger's file: control characters, and characters
    that the terminal's encoding lacks, are written as escapes."""
    file = sys.stdout if file is None else file
    encoding = getattr(file, "encoding", None) or "utf-8"
    plain = "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)
    print(plain.encode(encoding, "backslashreplace").decode(encoding), file=file)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"pyro-fusion: error: {_one_line(message)} (see {self.prog} --help)\n")


class _Version(argparse.Action):
    """Prints the installed version, which is looked up only then."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        _print(f"pyro-fusion {version('pyro-fusion')}")
        parser.exit()


def _integer(text: str) -> int:
    """An integer argument, from 0 to the largest that torch takes as a seed."""
    value = int(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"expected an integer from 0 to 2**63 - 1, got {text}")
    return value


def _scale(text: str) -> float | Literal["auto"]:
    return "auto" if text == "auto" else float(text)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="pyro-fusion", description="Fuse posteriors into one, without their data."
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(required=True, metavar="command")

    p = commands.add_parser("fuse", help="fuse posterior files into one")
    p.add_argument("files", nargs="+", type=Path, metavar="FILE", help="one file per party")
    p.add_argument("-o", "--output", type=Path, required=True, help="where to write the result")
    p.add_argument("-f", "--force", action="store_true", help="overwrite an existing output")
    p.add_argument(
        "--pooling",
        choices=("inclusive", "exclusive", "product"),
        default="exclusive",
        help="how the components of an atom are pooled (default: %(default)s)",
    )
    p.add_argument(
        "--assignment-prior",
        choices=("indian-buffet", "group-norm", "fixed-atoms"),
        help="by default the one that an option of it is given for, else that of pyro_fusion.fuse",
    )
    p.add_argument(
        "--alpha", type=float, help="mass of the Indian buffet; 0, the default, learns it"
    )
    p.add_argument("--scale", type=_scale, help="λ of the group norm, or 'auto' for the paper's")
    p.add_argument("--num-atoms", type=int, help="number of atoms of fixed-atoms")
    p.add_argument(
        "--prior",
        type=Path,
        metavar="FILE",
        help="the prior of the local models, for --pooling product",
    )
    p.add_argument("--weights", type=float, nargs="+", help="one per file, after the files")
    p.add_argument("--dispersion", type=float, help="T; estimated by default")
    p.add_argument("--seed", type=_integer, default=0, help="of the random starts")
    p.add_argument("--restarts", type=_integer, default=9, help="starts beyond the first")
    p.add_argument(
        "--solver",
        choices=["coordinate", "relaxed", "sinkhorn"],
        default="coordinate",
        help="of the assignments",
    )
    p.add_argument("-q", "--quiet", action="store_true", help="print no summary, show no progress")
    p.set_defaults(run=_fuse)

    p = commands.add_parser("show", help="print what a posterior file holds")
    p.add_argument("file", type=Path, metavar="FILE")
    p.set_defaults(run=_show)

    p = commands.add_parser("demo", help="fuse six parties' mixtures of handwritten digits")
    p.add_argument(
        "-o", "--output", type=Path, default=Path("pyro_fusion_demo.png"), help="the picture"
    )
    p.add_argument("--seed", type=_integer, default=0)
    p.set_defaults(run=_demo)
    return parser


def _assignment_prior(arguments: argparse.Namespace) -> AssignmentPrior | None:
    """The assignment prior with the options that belong to it; options of others are refused."""
    belongs = {"alpha": "indian-buffet", "scale": "group-norm", "num_atoms": "fixed-atoms"}
    given = [option for option in belongs if getattr(arguments, option) is not None]
    name = arguments.assignment_prior or (belongs[given[0]] if given else None)
    for option in given:
        if belongs[option] != name:
            raise ParameterError(
                f"--{option.replace('_', '-')} needs --assignment-prior {belongs[option]}"
            )
    if name == "group-norm":
        return GroupNormPrior() if arguments.scale is None else GroupNormPrior(arguments.scale)
    if name == "fixed-atoms":
        if arguments.num_atoms is None:
            raise ParameterError("--assignment-prior fixed-atoms needs --num-atoms")
        return FixedAtoms(arguments.num_atoms)
    if name == "indian-buffet":
        if arguments.alpha is None:
            return IndianBuffetPrior()
        return IndianBuffetPrior(None if arguments.alpha == 0 else arguments.alpha)
    return None


def _fuse(arguments: argparse.Namespace) -> None:
    output: Path = arguments.output
    if output.is_dir():
        raise ParameterError(f"{output} is a folder")
    if output.exists() and not arguments.force:
        raise ParameterError(f"{output} exists already; --force overwrites it")
    if not output.parent.is_dir():
        raise ParameterError(f"no such folder: {output.parent}")
    assignment_prior = _assignment_prior(arguments)
    if arguments.prior is not None and arguments.pooling != "product":
        raise ParameterError("--prior needs --pooling product")
    if arguments.prior is None and arguments.pooling == "product":
        raise ParameterError("--pooling product needs --prior, a file with the prior")
    loaded = [Posterior.load(file) for file in arguments.files]
    posteriors = dict(zip(_names(arguments.files), loaded, strict=True))
    prior = None if arguments.prior is None else Posterior.load(arguments.prior)
    fusion = fuse(
        posteriors,
        pooling=arguments.pooling,
        assignment_prior=assignment_prior,
        weights=arguments.weights,
        prior=prior,
        dispersion=arguments.dispersion,
        seed=arguments.seed,
        restarts=arguments.restarts,
        solver=arguments.solver,
        progress=not arguments.quiet and sys.stderr.isatty(),
    )
    if fusion.interrupted:  # half a search is no result to write
        raise KeyboardInterrupt
    fusion.posterior.save(output)
    if not arguments.quiet:
        _print(fusion.summary())
        _print(f"\nwrote {output}")


def _names(files: Sequence[Path]) -> list[str]:
    """Names for the parties: the files' names; if some are equal, the whole paths; and if even
    these are, paths with numbers."""
    for names in ([file.stem for file in files], [str(file) for file in files]):
        if len(set(names)) == len(names):
            return names
    return [f"{file} ({s})" for s, file in enumerate(files)]


def _show(arguments: argparse.Namespace) -> None:
    _print(repr(Posterior.load(arguments.file)))


def _demo(arguments: argparse.Namespace) -> None:
    from pyro_fusion.cli.demo import main as demo

    demo(output=str(arguments.output), seed=arguments.seed, progress=sys.stderr.isatty())
