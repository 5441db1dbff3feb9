"""The installed packages: the demands on them that are not met, and the installation of what a notebook lacks.

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
"""Requirements of the project, in a checkout. An installation has metadata instead."""

PROJECT = "curriculum-distillation"

DEEPEST_WHEELS = 4
"""Folders below the inputs of a notebook in which wheels are looked for."""


@dataclass(frozen=True)
class Conflict:
    """A demand of an installed package that another one does not meet."""

    package: str
    """Package whose demand it is; empty for the project itself."""

    demand: str
    """Such as `numpy<2`."""

    installed: str | None
    """Installed version; None: missing."""

    harmful: bool
    """Training loads the package whose demand it is."""

    def __str__(self) -> str:
        subject = f"{self.package} wants" if self.package else "needed:"
        state = f"{self.installed} is installed" if self.installed else "it is not installed"
        return f"{subject} {self.demand}, {state}"


@dataclass(frozen=True)
class Package:
    """An installed distribution."""

    name: str
    version: str
    requires: tuple[str, ...] = ()
    """Its demands on others, as its metadata has them."""


# ---------------------------------------------------------------------------------- what is installed, and needed


def installed_packages() -> list[Package]:
    """Return every installed distribution; of several with one name the first on the path, as imports would."""
    by_name: dict[str, Package] = {}
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"]
        version = distribution.metadata["Version"]
        if not name or not version:  # what an interrupted uninstall left
            continue

        package = Package(name, version, requires=tuple(distribution.requires or ()))
        by_name.setdefault(canonicalize_name(name), package)
    return list(by_name.values())


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
    """Return whether a requirement of the metadata holds only with an extra (`deepspeed; extra == "..."`).

    Those that hold on other machines only are the project's all the same.
    """
    return requirement.marker is not None and "extra ==" in str(requirement.marker)


def python_is_supported() -> bool:
    """Return whether the running Python is a version that the project admits."""
    return SpecifierSet(supported_python()).contains(platform.python_version(), prereleases=True)


def require(package: str, wanted_by: str, extra: str) -> None:
    """Make sure that an optional package is installed.

    Args:
        wanted_by: what needs it, for the message.
        extra: of setup.cfg, which brings it.

    Raises:
        UserError: it is not.
    """
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{wanted_by} needs {package}, which is not installed: pip install '.[{extra}]'")


# ------------------------------------------------------------------------------------------------ conflicts


def find_conflicts(requirements: Iterable[str], packages: Iterable[Package]) -> list[Conflict]:
    """Return every demand that is not met, the harmful ones first.

    Args:
        requirements: of the project.
        packages: what is installed.
    """
    by_name: dict[str, Package] = {canonicalize_name(package.name): package for package in packages}
    project = Package(name="", version="", requires=tuple(requirements))
    project_demands = _applicable(project, extras=frozenset())
    extras_of_loaded = _loaded_packages(project_demands, by_name)

    # the project's own demands come first, in the order of setup.cfg
    conflicts = []
    for demand in project_demands:
        if not _is_met(demand, by_name):
            conflicts.append(_conflict(project, demand, by_name, harmful=True))

    for name, package in sorted(by_name.items()):
        for demand in _applicable(package, extras=extras_of_loaded.get(name, frozenset())):
            if not _is_met(demand, by_name):
                conflicts.append(_conflict(package, demand, by_name, harmful=name in extras_of_loaded))

    return sorted(conflicts, key=lambda conflict: not conflict.harmful)


def _loaded_packages(demands: list[Requirement], by_name: dict[str, Package]) -> dict[str, frozenset[str]]:
    """Return name -> extras of every package that the project loads, directly or through others.

    Args:
        demands: of the project itself.
    """
    extras_of: dict[str, frozenset[str]] = {}
    waiting = list(demands)
    while waiting:
        demand = waiting.pop()
        name = canonicalize_name(demand.name)
        extras = extras_of.get(name, frozenset()) | demand.extras

        # a package is looked at again when another one asks for more extras of it
        is_news = extras_of.get(name) != extras
        if name in by_name and is_news:
            extras_of[name] = extras
            waiting += _applicable(by_name[name], extras)
    return extras_of


def _applicable(package: Package, extras: frozenset[str]) -> list[Requirement]:
    """Return the demands of a package that hold on this machine, for the extras that are asked of it."""
    demands = []
    for line in package.requires:
        try:
            demand = Requirement(line)
        except InvalidRequirement:  # old packages spell theirs in ways that mean nothing today
            continue

        if demand.marker is None or any(demand.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            demands.append(demand)
    return demands


def _is_met(demand: Requirement, by_name: dict[str, Package]) -> bool:
    """Return whether a package is installed in a version that a demand admits."""
    package = by_name.get(canonicalize_name(demand.name))
    return package is not None and demand.specifier.contains(package.version, prereleases=True)


def _conflict(package: Package, demand: Requirement, by_name: dict[str, Package], *, harmful: bool) -> Conflict:
    """Describe a demand of a package that is not met."""
    installed = by_name.get(canonicalize_name(demand.name))
    return Conflict(
        package=package.name,
        demand=f"{demand.name}{demand.specifier}",
        installed=installed.version if installed else None,
        harmful=harmful,
    )


# ----------------------------------------------------------------------------------------------- installing


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
    # Conflicts between other packages are left alone: a notebook service has many, and they were there before.
    conflicts = find_conflicts(own_requirements(), installed_packages())
    lacking = [conflict for conflict in conflicts if not conflict.package]
    if not lacking:
        return []

    demands = [conflict.demand for conflict in lacking]
    folders = _wheel_folders(inputs)
    if folders and _pip_installs(demands, "--no-index", *(f"--find-links={folder}" for folder in folders)):
        return demands
    if _pip_installs(demands):
        return demands

    raise UserError(_how_to_bring(lacking, inputs))


def _wheel_folders(inputs: Path) -> list[Path]:
    """Return the folders below a notebook's inputs that hold wheels."""
    folders = set()
    for depth in range(1, DEEPEST_WHEELS + 1):
        pattern = "*/" * depth + "*.whl"
        folders |= {file.parent for file in inputs.glob(pattern)}
    return sorted(folders)


def _pip_installs(demands: list[str], *options: str) -> bool:
    """Run pip, and return whether it succeeded."""
    packages = list(demands)
    if not any(Requirement(demand).name == "torch" for demand in demands):
        # pinned, because another torch may have no kernels for the GPU of this notebook
        packages.insert(0, f"torch=={importlib.metadata.version('torch')}")

    command = [sys.executable, "-m", "pip", "install", "--quiet", *options, *packages]
    return subprocess.run(command).returncode == 0


def _how_to_bring(lacking: list[Conflict], inputs: Path) -> str:
    """Return a message: what is missing or too old, and the two ways to get it into a notebook."""
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
