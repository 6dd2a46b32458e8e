"""The sdist and the wheel: what is in them, and that what they install works away from the source tree."""

import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import optax_nadam

ROOT = Path(__file__).resolve().parent.parent.parent
SMOKE = Path(__file__).with_name("smoke.py")
NAME = f"optax_nadam-{optax_nadam.__version__}"
SOURCES = {str(path.relative_to(ROOT)) for path in (ROOT / "optax_nadam").rglob("*.py")}


def run(*command, cwd):
    """What the command prints; its failure is the test's. No variable may bring the tree back into reach."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(command, cwd=cwd, env=kept, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder with the sdist and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT), cwd=folder)
    return folder


@pytest.fixture(scope="module")
def wheel(built):
    return built / f"{NAME}-py3-none-any.whl"


@pytest.fixture(scope="module")
def sdist(built):
    return built / f"{NAME}.tar.gz"


@pytest.fixture(scope="module")
def pip(tmp_path_factory):
    """Starts pip in an environment of its own, with the versions of jax and optax that the tests run on."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder / "venv", with_pip=True, upgrade_deps=True)
    python = folder / "venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    versions = folder / "versions.txt"
    versions.write_text("".join(f"{name}=={metadata.version(name)}\n" for name in ("jax", "jaxlib", "optax")))

    def install(*what):
        run(python, "-m", "pip", "install", "--no-compile", "-c", versions, *what, cwd=folder)
        return python

    return install


def test_twine_finds_no_fault(wheel, sdist):
    run(sys.executable, "-m", "twine", "check", "--strict", str(wheel), str(sdist), cwd=wheel.parent)


def test_wheel_contents(wheel):
    about = {f"{NAME}.dist-info/{name}" for name in ("METADATA", "WHEEL", "RECORD", "licenses/LICENSE")}
    assert set(zipfile.ZipFile(wheel).namelist()) == SOURCES | {"optax_nadam/py.typed"} | about


def test_sdist_contents(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.removeprefix(f"{NAME}/") for name in archive.getnames()}
    assert names >= SOURCES | {"pyproject.toml", "LICENSE", "README.md", "CITATION.cff", "run.py", "tests/conftest.py"}
    assert [name for name in names if {"__pycache__", "build", "dist", "out", "site"} & set(name.split("/"))] == []


def test_requirements(wheel):
    (about,) = metadata.distributions(path=[str(wheel)])
    assert sorted(line.split(">=")[0] for line in about.requires or ()) == ["jax", "optax"]
    assert about.metadata.get_all("Provides-Extra") is None


def test_urls(wheel):
    (about,) = metadata.distributions(path=[str(wheel)])
    urls = dict(line.split(", ") for line in about.metadata.get_all("Project-URL") or ())
    assert set(urls) == {"Homepage", "Documentation", "Source", "Changelog", "Issues"}
    assert [url for url in urls.values() if not url.startswith("https://")] == []


def test_installed_wheel(pip, wheel, tmp_path):
    python = pip(wheel)
    assert optax_nadam.__version__ in run(python, "-W", "error", SMOKE, cwd=tmp_path)
    pip("pytest")
    doctests = ["-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider", "--doctest-modules", "--pyargs"]
    assert " passed" in run(python, *doctests, "optax_nadam", cwd=tmp_path)


def test_the_sdist_installs_the_same(pip, wheel, sdist, tmp_path):
    python = pip(wheel)
    pip("--force-reinstall", "--no-deps", sdist)
    run(python, "-W", "error", SMOKE, cwd=tmp_path)
    (about,) = metadata.distributions(path=[str(wheel)])
    (installed,) = python.parent.parent.rglob(f"{NAME}.dist-info")
    assert (installed / "METADATA").read_text() == about.read_text("METADATA")
    assert {str(f.relative_to(installed.parent)) for f in installed.parent.glob("optax_nadam/**/*.py")} == SOURCES
