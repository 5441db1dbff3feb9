"""The installed packages: whether they are what this project needs, and whose demands are not met.

A notebook service ships hundreds of packages pinned against each other, so `pip` there complains after almost
every install. A conflict matters to training only if the package whose demand is not met is one that training
loads: one of the project's requirements, or of theirs.
"""

import importlib.metadata
import importlib.util
import platform
import subprocess
import sys
from collections.abc import Iterable
from configparser import ConfigParser, SectionProxy
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from ..errors import UserError

SETUP_CFG = Path(__file__).resolve().parents[2] / "setup.cfg"
"""In a checkout. An installation has metadata instead."""
PROJECT = "curriculum-distillation"


@dataclass(frozen=True)
class Conflict:
    """A demand of an installed package that another one does not meet."""

    package: str
    """Who demands; empty for the project itself."""
    demand: str
    """Such as `numpy<2`."""
    installed: str | None
    """Version that is there; None: missing."""
    harmful: bool
    """Training loads the package whose demand it is."""

    def __str__(self) -> str:
        who = f"{self.package} wants" if self.package else "needed:"
        found = f"{self.installed} is installed" if self.installed else "it is not installed"
        return f"{who} {self.demand}, {found}"


@dataclass(frozen=True)
class Package:
    """An installed distribution."""

    name: str
    version: str
    requires: tuple[str, ...] = ()


def installed_packages() -> list[Package]:
    """Every installed distribution; of several with one name the first on the path, which is what is imported."""
    found: dict[str, Package] = {}
    for distribution in importlib.metadata.distributions():
        name, version = distribution.metadata["Name"], distribution.metadata["Version"]
        if name and version:  # else: what an interrupted uninstall left
            package = Package(name, version, tuple(distribution.requires or ()))
            found.setdefault(canonicalize_name(name), package)
    return list(found.values())


def own_requirements(setup_cfg: Path = SETUP_CFG) -> list[str]:
    """Return what the project needs: as setup.cfg of the checkout says, or the metadata of the installation."""
    if setup_cfg.is_file():
        return [line for line in _options(setup_cfg)["install_requires"].splitlines() if line.strip()]

    lines = importlib.metadata.requires(PROJECT) or []
    return [line for line in lines if not _is_of_an_extra(Requirement(line))]


def supported_python(setup_cfg: Path = SETUP_CFG) -> str:
    """Return the Python versions that the project admits, such as `>=3.10`; from the same places."""
    if setup_cfg.is_file():
        return _options(setup_cfg)["python_requires"].strip()

    return importlib.metadata.metadata(PROJECT)["Requires-Python"]


def _options(setup_cfg: Path) -> SectionProxy:
    parser = ConfigParser()
    parser.read(setup_cfg, encoding="utf-8")
    return parser["options"]


def _is_of_an_extra(requirement: Requirement) -> bool:
    """Tell whether a requirement of the metadata holds only where an extra is asked for (`deepspeed; extra == "..."`).

    Those that hold on other machines only are the project's all the same.
    """
    return requirement.marker is not None and "extra ==" in str(requirement.marker)


def python_is_supported() -> bool:
    """Whether this Python is one of them."""
    return SpecifierSet(supported_python()).contains(platform.python_version(), prereleases=True)


def find_conflicts(requirements: Iterable[str], packages: Iterable[Package]) -> list[Conflict]:
    """Every demand that is not met, the harmful ones first.

    Args:
        requirements: of the project.
        packages: what is installed.
    """
    by_name = {canonicalize_name(package.name): package for package in packages}
    own = _applying(Package("", "", tuple(requirements)), frozenset())
    loaded = _closure(own, by_name)
    conflicts = [conflict for demand in own if (conflict := _unmet("", demand, by_name, True))]
    for name, package in sorted(by_name.items()):
        for demand in _applying(package, loaded.get(name, frozenset())):
            if conflict := _unmet(package.name, demand, by_name, name in loaded):
                conflicts.append(conflict)
    return sorted(conflicts, key=lambda conflict: not conflict.harmful)


def _closure(own: list[Requirement], by_name: dict[str, Package]) -> dict[str, frozenset[str]]:
    """Name -> extras of every package that the project loads, directly or through others."""
    loaded: dict[str, frozenset[str]] = {}
    waiting = list(own)
    while waiting:
        demand = waiting.pop()
        name = canonicalize_name(demand.name)
        extras = loaded.get(name, frozenset()) | demand.extras
        if name in by_name and loaded.get(name) != extras:
            loaded[name] = extras
            waiting += _applying(by_name[name], extras)
    return loaded


def _applying(package: Package, extras: frozenset[str]) -> list[Requirement]:
    """Demands of a package that hold on this machine, for the extras that are asked of it."""
    return [
        demand
        for demand in _parsed(package.requires)
        if demand.marker is None or any(demand.marker.evaluate({"extra": extra}) for extra in ("", *extras))
    ]


def _unmet(package: str, demand: Requirement, by_name: dict[str, Package], harmful: bool) -> Conflict | None:
    found = by_name.get(canonicalize_name(demand.name))
    if found is not None and demand.specifier.contains(found.version, prereleases=True):
        return None
    return Conflict(package, f"{demand.name}{demand.specifier}", found.version if found else None, harmful)


def _parsed(lines: Iterable[str]) -> list[Requirement]:
    parsed = []
    for line in lines:
        try:
            parsed.append(Requirement(line))
        except InvalidRequirement:  # old packages spell theirs in ways that mean nothing today
            continue
    return parsed


# ------------------------------------------------------------------------------------------ installing


def install_missing(inputs: Path) -> list[str]:
    """Install what the project needs and this environment lacks; the torch that is there stays.

    Folders of wheels below `inputs` are tried first, then the package index.

    Args:
        inputs: what is attached to a notebook.

    Returns:
        the demands that were not met before.

    Raises:
        UserError: neither has them; with what is lacking and how to bring it.
    """
    conflicts = find_conflicts(own_requirements(), installed_packages())
    lacking = [conflict for conflict in conflicts if not conflict.package]
    if not lacking:
        return []

    demands = [conflict.demand for conflict in lacking]
    wheels = {file.parent for depth in range(1, 5) for file in inputs.glob("*/" * depth + "*.whl")}
    if wheels and _pip_installs(demands, "--no-index", *(f"--find-links={folder}" for folder in sorted(wheels))):
        return demands
    if _pip_installs(demands):
        return demands

    raise UserError(_how_to_bring(lacking, inputs))


def _pip_installs(demands: list[str], *options: str) -> bool:
    """Run pip, and tell whether it succeeded."""
    is_torch_wanted = any(Requirement(demand).name == "torch" for demand in demands)
    torch = [] if is_torch_wanted else [f"torch=={importlib.metadata.version('torch')}"]
    command = [sys.executable, "-m", "pip", "install", "--quiet", *options, *torch, *demands]
    return subprocess.run(command).returncode == 0


def _how_to_bring(lacking: list[Conflict], inputs: Path) -> str:
    """Say what is missing or too old, and the two ways to get it into a notebook."""
    demands = " ".join(f"'{conflict.demand}'" for conflict in lacking)
    python = ".".join(platform.python_version_tuple()[:2])
    lines = [
        "packages are missing or too old, and pip could not install them (its own message is above):",
        *(f"  - {conflict}" for conflict in lacking),
        "With internet: turn it on in the settings of the notebook, and run this cell again.",
        f"Without: on a computer with internet and pip (or in a notebook with internet), for Python {python}:",
        "  1. Download the wheels, and leave out torch, which is here already:",
        f"       pip download --dest wheels --only-binary=:all: --python-version {python} "
        f"--platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 {demands}",
        "       rm -f wheels/torch-* wheels/nvidia_* wheels/triton-*",
        "  2. Upload the folder as a dataset (on Kaggle: Create, New Dataset) and attach it to this notebook.",
        f"  3. Run this cell again. It installs from every folder of wheels below {inputs}, as this does:",
        f"       pip install --no-index --find-links {inputs / 'wheels'} {demands}",
    ]
    return "\n".join(lines)


def require(package: str, wanted_by: str, extra: str) -> None:
    """Make sure that an optional package is installed.

    Raises:
        UserError: it is not.
    """
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{wanted_by} needs {package}, which is not installed: pip install '.[{extra}]'")
