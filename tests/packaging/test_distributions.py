"""What a stranger installs: the wheel, the sdist, an editable install and a bare checkout.

Everything is built from a copy of the checkout, without a network, and imported from elsewhere.
"""

import ast
import os
import re
import shutil
import stat
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# one worker builds once for all of them
pytestmark = pytest.mark.slow


def run(*command: str | Path, **environment: str | Path) -> str:
    """Run a command in the root of the file system, where nothing can be imported by accident."""
    done = subprocess.run(
        list(map(str, command)),
        cwd=Path(ROOT.anchor),
        env=os.environ | {key: str(value) for key, value in environment.items()},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def installed(*arguments: str | Path, python: Path | None = None) -> None:
    """Install with pip what needs neither dependencies nor a network."""
    offline = ("--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed")
    where = ("--python", python) if python else ()
    run(sys.executable, "-m", "pip", "-q", *where, "install", *offline, *arguments)


def package_files() -> set[str]:
    """Return the files of the package, as they must lie in every distribution."""
    found = set()
    for folder, prefix in (("noiseopt", ""), ("integrations", "noiseopt/")):
        for path in (ROOT / folder).rglob("*"):
            name = path.relative_to(ROOT)
            if path.is_file() and "__pycache__" not in name.parts:
                found.add(prefix + name.as_posix())
    return found


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """Return a copy of the checkout, links kept, so that building leaves nothing in this one."""
    copy = tmp_path_factory.mktemp("copy") / "checkout"
    built = (".*", "__pycache__", "build", "dist", "*.egg-info", "results", "wandb")
    shutil.copytree(ROOT, copy, symlinks=True, ignore=shutil.ignore_patterns(*built))
    return copy


@pytest.fixture(scope="module")
def distributions(checkout) -> Path:
    """Return the folder with the wheel and the sdist, both built from the checkout."""
    folder = checkout.parent / "dist"
    build = (sys.executable, "-m", "build", "--no-isolation", "--wheel", "--sdist")
    run(*build, "--outdir", folder, checkout)
    return folder


@pytest.fixture(scope="module")
def wheel(distributions) -> Path:
    (path,) = distributions.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def sdist(distributions) -> Path:
    (path,) = distributions.glob("*.tar.gz")
    return path


@pytest.fixture(scope="module")
def metadata(wheel) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


def source_version() -> str:
    """Return `noiseopt.__version__` as setuptools does: a literal, read without importing torch."""
    tree = ast.parse((ROOT / "noiseopt/__init__.py").read_text(encoding="utf-8"))
    (version,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__"
    )
    return version


PROBE = """
import noiseopt, noiseopt.integrations, pathlib
for module in (noiseopt, noiseopt.integrations):
    print(pathlib.Path(module.__file__).parent)
print(noiseopt.__version__)
"""


def assert_imports_from(folder: Path, printed: str) -> None:
    package = folder / "noiseopt"
    assert printed.split("\n")[:3] == [
        *map(str, (package, package / "integrations")),
        source_version(),
    ]


def test_the_integrations_are_a_link():
    link = ROOT / "noiseopt/integrations"
    assert link.is_symlink()
    assert os.readlink(link) == "../integrations"


def test_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        members = {entry.filename: entry.external_attr >> 16 for entry in archive.infolist()}
    assert all(stat.S_ISREG(mode) for mode in members.values())
    package = {name for name in members if ".dist-info/" not in name}
    assert package == package_files()
    assert {"noiseopt/py.typed", "noiseopt/integrations/__init__.py"} <= package
    licence = [name for name in members if name.endswith(".dist-info/licenses/LICENSE")]
    assert len(licence) == 1


def test_sdist_holds_the_package_as_regular_files(sdist, tmp_path):
    with tarfile.open(sdist) as archive:
        members = [member for member in archive.getmembers() if not member.isdir()]
    assert all(member.isreg() for member in members)
    names = {member.name.partition("/")[2] for member in members}
    assert package_files() <= names
    assert {"pyproject.toml", "LICENSE", "CHANGELOG.md", "CITATION.cff"} <= names
    folders = {name.partition("/")[0] for name in names if "/" in name}
    assert folders == {"noiseopt", "noiseopt.egg-info"}

    installed("--target", tmp_path, sdist)
    assert all((tmp_path / name).is_file() for name in package_files())


def test_wheel_imports(wheel, tmp_path):
    installed("--target", tmp_path, wheel)
    assert_imports_from(tmp_path, run(sys.executable, "-c", PROBE, PYTHONPATH=tmp_path))


def test_bare_checkout_imports(checkout):
    assert_imports_from(checkout, run(sys.executable, "-c", PROBE, PYTHONPATH=checkout))


def test_editable_install_imports_and_sees_new_files(checkout, tmp_path):
    venv.create(tmp_path, symlinks=True)
    python = tmp_path / "bin/python"
    # torch comes from this environment; its .pth files, and so its own noiseopt, do not
    folder = Path(
        run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    )
    here = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (folder / "host.pth").write_text("\n".join(here))

    installed("--editable", checkout, python=python)
    (checkout / "integrations/new_since_install.py").touch()
    probe = PROBE + "import noiseopt.integrations.new_since_install"
    assert_imports_from(checkout, run(python, "-c", probe))
    assert (tmp_path / "bin/noiseopt").is_file()


def test_metadata(metadata):
    assert metadata["Name"] == "noiseopt"
    assert metadata["License-Expression"] == "Apache-2.0 AND MIT"
    assert metadata["Requires-Python"] == ">=3.10"
    requirements = metadata.get_all("Requires-Dist")
    core = {requirement for requirement in requirements if "extra ==" not in requirement}
    assert core == {"torch>=2.6", "numpy>=1.26"}
    extras = {"all", "bench", "deepspeed", "demo", "dev", "tensorboard", "wandb"}
    assert set(metadata.get_all("Provides-Extra")) == extras


def test_one_version_everywhere(metadata):
    version = source_version()
    assert metadata["Version"] == version
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.findall(r"^version: (.+)$", citation, re.MULTILINE) == [version]
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    unreleased, *released = re.findall(r"^## \[(.+?)\]", changelog, re.MULTILINE)
    assert unreleased == "Unreleased"
    assert released[:1] in ([], [version])
