# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The ``pyro-fusion`` command: fuse files, show one, run the demo. Errors are one line on standard
error and a non-zero exit."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pyro_fusion._version import __version__
from pyro_fusion.errors import FusionError, ParameterError
from pyro_fusion.fuse import fuse
from pyro_fusion.posterior import Posterior
from pyro_fusion.priors import AssignmentPrior, GroupNorm, IndianBuffet, Parametric

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    arguments = _parser().parse_args(argv)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            arguments.run(arguments)
    except (FusionError, OSError, ImportError) as e:
        message = " ".join(str(e).split()) or type(e).__name__
        print(f"pyro-fusion: error: {message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("pyro-fusion: interrupted", file=sys.stderr)
        return 130
    return 0


def _show_warning(message: Warning | str, *args: object, **kwargs: object) -> None:
    print(f"pyro-fusion: warning: {message}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pyro-fusion", description="Fuse posteriors into one, without their data."
    )
    parser.add_argument("--version", action="version", version=f"pyro-fusion {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")

    p = commands.add_parser("fuse", help="fuse posterior files into one")
    p.add_argument("files", nargs="+", type=Path, metavar="FILE", help="one file per party")
    p.add_argument("-o", "--output", type=Path, required=True, help="where to write the result")
    p.add_argument("-f", "--force", action="store_true", help="overwrite an existing output")
    p.add_argument(
        "--pooling", choices=("inclusive", "exclusive", "product"), default="inclusive"
    )
    p.add_argument(
        "--prior", choices=("indian-buffet", "group-norm", "parametric"), default="indian-buffet"
    )
    p.add_argument("--alpha", type=float, help="mass of the Indian buffet; 0 learns it")
    p.add_argument("--scale", type=float, help="λ of the group norm")
    p.add_argument("--num-atoms", type=int, help="number of atoms of the parametric prior")
    p.add_argument("--base", type=Path, help="file with the prior, for --pooling product")
    p.add_argument("--weights", type=float, nargs="+", help="one per file, after the files")
    p.add_argument("--dispersion", type=float, help="T; estimated by default")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--restarts", type=int, default=9)
    p.add_argument("-q", "--quiet", action="store_true", help="print nothing")
    p.set_defaults(run=_fuse)

    p = commands.add_parser("show", help="print what a posterior file holds")
    p.add_argument("file", type=Path, metavar="FILE")
    p.set_defaults(run=_show)

    p = commands.add_parser("demo", help="fuse five parties' mixtures of handwritten digits")
    p.add_argument("-o", "--output", type=Path, default=Path("pyro_fusion_demo.png"))
    p.add_argument("--seed", type=int, default=0)
    p.set_defaults(run=_demo)
    return parser


def _prior(arguments: argparse.Namespace) -> AssignmentPrior:
    """The prior, with the options that belong to it; those of another prior are refused."""
    belongs = {"alpha": "indian-buffet", "scale": "group-norm", "num_atoms": "parametric"}
    for option, prior in belongs.items():
        if getattr(arguments, option) is not None and arguments.prior != prior:
            raise ParameterError(f"--{option.replace('_', '-')} needs --prior {prior}")
    if arguments.prior == "group-norm":
        return GroupNorm(1.0 if arguments.scale is None else arguments.scale)
    if arguments.prior == "parametric":
        if arguments.num_atoms is None:
            raise ParameterError("--prior parametric needs --num-atoms")
        return Parametric(arguments.num_atoms)
    if arguments.alpha is None:
        return IndianBuffet()
    return IndianBuffet(None if arguments.alpha == 0 else arguments.alpha)


def _fuse(arguments: argparse.Namespace) -> None:
    output: Path = arguments.output
    if output.is_dir():
        raise ParameterError(f"{output} is a folder")
    if output.exists() and not arguments.force:
        raise ParameterError(f"{output} exists already; --force overwrites it")
    if not output.parent.is_dir():
        raise ParameterError(f"no such folder: {output.parent}")
    prior = _prior(arguments)
    fusion = fuse(
        [Posterior.load(file) for file in arguments.files],
        pooling=arguments.pooling,
        prior=prior,
        weights=arguments.weights,
        base=None if arguments.base is None else Posterior.load(arguments.base),
        dispersion=arguments.dispersion,
        seed=arguments.seed,
        restarts=arguments.restarts,
        progress=not arguments.quiet and sys.stderr.isatty(),
    )
    fusion.posterior.save(output)
    if not arguments.quiet:
        names = tuple(file.stem for file in arguments.files)
        print(replace(fusion, party_names=names).summary())
        print(f"\nwrote {output}")


def _show(arguments: argparse.Namespace) -> None:
    print(Posterior.load(arguments.file))


def _demo(arguments: argparse.Namespace) -> None:
    from pyro_fusion.demo import main as demo

    demo(output=str(arguments.output), seed=arguments.seed)
