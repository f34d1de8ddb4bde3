# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The README: its code runs as printed and prints what it says, its commands work, its picture of
the package is true."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

import pyro_fusion
from pyro_fusion import families
from pyro_fusion.cli import main
from pyro_fusion.families import base
from tests import markdown

PACKAGE = Path(pyro_fusion.__file__).parent
README = (PACKAGE.parent / "README.md").read_text(encoding="utf-8")
BLOCKS = markdown.blocks(README)


def test_the_code_runs_as_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(base, "_BY_TYPE", dict(base._BY_TYPE))  # the README registers a family
    namespace: dict[str, Any] = {"__name__": "__main__"}
    compared = commands = 0
    for i, (language, content) in enumerate(BLOCKS):
        if language == "python":
            compared += markdown.run("README.md", BLOCKS, i, namespace, capsys)
        for line in content.splitlines() if language == "sh" else ():
            if line.startswith("pyro-fusion ") and line != "pyro-fusion demo":
                assert main(shlex.split(line)[1:]) == 0
                assert capsys.readouterr().err == ""
                commands += 1
    assert [language for language, _ in BLOCKS].count("python") == 10
    assert (compared, commands) == (9, 2)

    # What the text says of the prior on the command line.
    fusion, posterior = namespace["fusion"], namespace["Posterior"]
    posterior(namespace["prior"]).save("prior.safetensors")
    argv = "fuse a.safetensors b.safetensors -o x --pooling product --base prior.safetensors"
    assert main(argv.split()) == 0

    # The clusters that were drawn from, a tenth of a unit and some noise off.
    loc = fusion.posterior.factors["loc"].mean
    assert (loc - namespace["centres"]).norm(dim=-1).max() < 0.6


def test_the_layout_is_that_of_the_package() -> None:
    (layout,) = [content for _, content in BLOCKS if content.startswith("pyro_fusion/\n")]
    shown: dict[str, str] = {}
    folders = [""]
    for line in layout.splitlines()[1:]:
        indent, name, said = re.fullmatch(r"( +)(\S+) +(\S.*)", line).groups()  # type: ignore[union-attr]
        folders[len(indent) // 2 :] = [name if name.endswith("/") else ""]
        shown["".join(folders[1 : len(indent) // 2]) + name] = said
    found = {str(path.relative_to(PACKAGE).as_posix()) for path in PACKAGE.rglob("*.py")}
    found |= {f"{Path(name).parent.as_posix()}/" for name in found if "/" in name}
    assert set(shown) == found


def test_the_families_are_those_that_are_known() -> None:
    (listed,) = re.findall(r"^## Families\n\n(.*?) are known", README, flags=re.M | re.S)
    names = set(re.findall(r"\w+", listed)) - {"and"}
    through_a_transform = {"InverseGamma", "LogNormal"}
    assert names == set(families.base.family_names()) | through_a_transform


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\((?!http)(\S+?)\)", README))))
def test_links_lead_somewhere(target: str) -> None:
    assert (PACKAGE.parent / target).exists()
