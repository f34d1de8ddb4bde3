# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The exceptions and warnings of the package.

Every message says what was expected and what came. Where it happened is data: an error has the
fields ``party`` and ``site``, and its text is made from these::

    try:
        fuse({"north": a, "east": b})
    except FusionError as e:
        print(e.party, e.site)  # east loc
        print(e)  # site 'loc': expected the same dtype ...

Code deep inside knows neither the site nor the name of a party: :func:`at` and :func:`naming` fill
in on the exception what is not known yet, as it passes by.
"""

import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Size

__all__ = [
    "DrawsError",
    "FileFormatError",
    "FusionError",
    "GuideError",
    "ParameterError",
    "Party",
    "Site",
    "StructureError",
    "UnsupportedFamilyError",
    "at",
    "broadcast_shapes",
    "naming",
    "warn_user",
]


@dataclass(frozen=True)
class Party:
    """A party within a message.

    :ivar who: its number, after which the text gives the name once that is known; or its name.
    """

    who: int | str


@dataclass(frozen=True)
class Site:
    """A site within a message."""

    name: str


class FusionError(Exception):
    """Base class of every error that ``pyro_fusion`` raises on purpose.

    :param message: what was expected and what came. Where parties or the site are part of a
        sentence, its pieces: ``[Party(1), " has two sites, ", Party(0), " has one"]``.
    :param party: the number or the name of a party, or several; by default those in the message.
        The text begins with those that the message does not mention.
    :param site: the name of the site; by default the one in the message.
    :ivar site: the name of the site, None if the error is of no one site.
    """

    def __init__(
        self,
        message: str | Sequence[str | Party | Site],
        *,
        party: int | str | list[int | str] | None = None,
        site: str | None = None,
    ) -> None:
        self._pieces = (message,) if isinstance(message, str) else tuple(message)
        self._names: tuple[str, ...] = ()
        self._parties: tuple[int | str, ...] = ()
        self.site: str | None = None
        self.locate(party=party, site=site)
        self.locate(party=[x.who for x in self._pieces if isinstance(x, Party)])
        for x in self._pieces:
            if isinstance(x, Site):
                self.locate(site=x.name)
        super().__init__(self.message)

    @property
    def parties(self) -> tuple[int | str, ...]:
        """The parties that it is about: the name of each once that is known, else its number."""
        return tuple(self._name(s) for s in self._parties)

    @property
    def party(self) -> int | str | None:
        """The first of :attr:`parties`; None if the error is of no one party."""
        return next(iter(self.parties), None)

    @property
    def message(self) -> str:
        """The text without the party and the site that it begins with."""
        return "".join(map(self._text, self._pieces))

    @property
    def pieces(self) -> list[str | Party | Site]:
        """The text in pieces, for the message of an error that says more about this one."""
        where: list[Party | Site] = [Party(s) for s in self._parties]
        where += [] if self.site is None else [Site(self.site)]
        result: list[str | Party | Site] = []
        for x in where:
            if x not in self._pieces:
                result += [", ", x] if result else [x]
        return [*result, *([": "] if result else []), *self._pieces]

    def locate(
        self, *, party: int | str | list[int | str] | None = None, site: str | None = None
    ) -> None:
        """Fill in the party and the site, if they are not known yet."""
        if party is not None and not self._parties:
            given = party if isinstance(party, list) else [party]
            self._parties = tuple(x if isinstance(x, str) else int(x) for x in given)
        if self.site is None:
            self.site = site

    def name_parties(self, names: Sequence[str]) -> None:
        """Fill in the names of the parties that it numbers, if they are not known yet."""
        self._names = self._names or tuple(names)

    def renumber(self, numbers: Sequence[int]) -> None:
        """Number the parties anew: that which it numbers ``s`` becomes ``numbers[s]``."""

        def anew(who: int | str) -> int | str:
            return who if isinstance(who, str) else numbers[who]

        self._parties = tuple(map(anew, self._parties))
        self._pieces = tuple(
            Party(anew(x.who)) if isinstance(x, Party) else x for x in self._pieces
        )

    def _name(self, party: int | str) -> int | str:
        if isinstance(party, str) or party >= len(self._names):
            return party
        return self._names[party]

    def _text(self, piece: str | Party | Site) -> str:
        if isinstance(piece, str):
            return piece
        if isinstance(piece, Site):
            return f"site '{_shown(piece.name)}'"
        number, name = _shown(str(piece.who)), _shown(str(self._name(piece.who)))
        return f"party {number}" if name == number else f"party {number} ({name})"

    def __str__(self) -> str:
        return "".join(map(self._text, self.pieces))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self)!r})"


class ParameterError(FusionError, ValueError):
    """A value is not one that the argument or the parameter admits (NaN, negative scale, ...)."""


class StructureError(FusionError, ValueError):
    """Names, shapes, labels or supports do not fit together."""


class UnsupportedFamilyError(FusionError, TypeError):
    """A distribution (or transform) that no exponential family is registered for."""


class GuideError(FusionError, ValueError):
    """A guide that no posterior can be read from."""


class DrawsError(FusionError, ValueError):
    """Draws that no posterior can be read from."""


class FileFormatError(FusionError, ValueError):
    """A file that is not a posterior, is damaged, or is not to be trusted."""


def _shown(name: str) -> str:
    """A name as one short line: a file from a stranger may call a site anything."""
    text = str(name)
    text = text if text.isprintable() else ascii(text)[1:-1]
    return text if len(text) <= 100 else f"{text[:100]}…"


@contextmanager
def at(
    *, party: int | str | list[int | str] | None = None, site: str | None = None
) -> Iterator[None]:
    """Give errors raised inside this party and site, unless they have another already."""
    try:
        yield
    except FusionError as e:
        e.locate(party=party, site=site)
        raise


@contextmanager
def naming(names: Sequence[str]) -> Iterator[None]:
    """Give errors raised inside the names of the parties, of which they know the numbers."""
    try:
        yield
    except FusionError as e:
        e.name_parties(names)
        raise


def warn_user(message: str) -> None:
    """Warn at the line of the user's own code that led here, however deep inside the package."""
    level = 1
    frame = sys._getframe()
    while frame.f_back is not None and _is_library(frame.f_globals.get("__name__", "")):
        frame = frame.f_back
        level += 1
    warnings.warn(message, UserWarning, stacklevel=level)


def _is_library(module: str) -> bool:
    return module.split(".")[0] in ("pyro_fusion", "pyro", "torch", "contextlib")


def broadcast_shapes(shapes: dict[str, Size]) -> Size:
    """The common batch shape of parameters by name.

    :raises ValueError: names each parameter and its shape.
    """
    try:
        return torch.broadcast_shapes(*shapes.values())
    except RuntimeError as error:
        got = ", ".join(f"{name} {tuple(shape)}" for name, shape in shapes.items())
        raise ValueError(f"expected batch shapes that broadcast, got {got}") from error
