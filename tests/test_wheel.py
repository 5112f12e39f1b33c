"""The source archive, the wheel made of it, and the main job in an environment that has the wheel and no repository."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PACKAGES = ("lightning_moe/", "callbacks/")
ASSETS = "lightning_moe/assets/"
SDIST = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
WHEEL = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"


def run(*command, folder, **options):
    """Runs a program without what this process has in its environment for Python; its output."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        list(map(str, command)), cwd=folder, env=clean, capture_output=True, text=True, check=False, **options
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def files():
    """What git has, or would have."""
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", folder=ROOT).split("\0")
    return {name for name in listed if name and (ROOT / name).is_file()}


@pytest.fixture(scope="module")
def built(files, tmp_path_factory):
    """(source archive, wheel): the wheel comes from the archive, as on a machine that gets only that."""
    folder = tmp_path_factory.mktemp("built")
    tree = folder / "tree"
    for name in files:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, tree / name)
    run(sys.executable, "-c", SDIST, folder, folder=tree)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    run(sys.executable, "-c", WHEEL, folder, folder=unpacked)
    (wheel,) = folder.glob("*.whl")
    return archive, wheel


@pytest.fixture(scope="module")
def environment(built, tmp_path_factory):
    """The programs of a new environment: our packages from the wheel, the libraries from where the tests run."""
    folder = tmp_path_factory.mktemp("environment") / "venv"
    venv.create(folder, with_pip=False)
    programs = folder / ("Scripts" if os.name == "nt" else "bin")
    install = ("-m", "pip", "--python", programs / "python", "install", "--no-deps", "--no-index", built[1])
    run(sys.executable, *install, folder=folder)
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(run(programs / "python", "-c", where, folder=folder).strip())
    # Paths named in such a file are searched, and the files of this kind in them (an editable install) are not read.
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return programs


def test_the_wheel_holds_the_packages_and_the_assets_and_nothing_else(built, files):
    with zipfile.ZipFile(built[1]) as wheel:
        held = {name for name in wheel.namelist() if ".dist-info/" not in name}
        about = {name.partition(".dist-info/")[2] for name in wheel.namelist() if ".dist-info/" in name}
        metadata = wheel.read(next(name for name in wheel.namelist() if name.endswith("/METADATA"))).decode()
    modules = {name for name in files if name.startswith(PACKAGES) and name.endswith(".py")}
    assets = {name for name in files if name.startswith(ASSETS)}
    assert held == modules | assets
    assert len(modules) > 200
    # Licences of the code and of the shipped text go with it.
    assert {f"licenses/{ASSETS}licenses/{name}.txt" for name in ("apache", "python", "wordnet")} <= about
    assert "\nLicense-Expression: Apache-2.0\n" in metadata
    assert "\nRequires-Python: >=3.11\n" in metadata


def test_the_source_archive_holds_what_testing_needs(built, files):
    with tarfile.open(built[0]) as packed:
        held = {name.partition("/")[2] for name in packed.getnames()}
    wanted = {name for name in files if name.startswith((*PACKAGES, "configs/", "scripts/", "tests/"))}
    assert wanted | {"README.md", "pyproject.toml"} <= held
    assert not {name for name in held if name.startswith(("runs/", ".venv/", ".git/", "build/"))}


def test_the_main_job_runs_from_the_wheel_alone(environment, tmp_path):
    """A config of the repository is copied; all that it names is in the wheel. Fewer tokens and steps than it says."""
    names = ("quickstart_calibrate.yaml", "quickstart.yaml")
    for name in names:
        config = yaml.safe_load((ROOT / "configs" / name).read_text())
        for corpus in (*config["data"]["calibration"].values(), *config["data"].get("validation", {}).values()):
            corpus["max_tokens"] = 1024
        (tmp_path / name).write_text(yaml.safe_dump(config))
    where = "import lightning_moe, callbacks; print(lightning_moe.__file__, callbacks.__file__)"
    assert str(ROOT) not in run(environment / "python", "-c", where, folder=tmp_path)
    run(environment / "lightning-moe", "calibrate", "--config", names[0], folder=tmp_path)
    told = run(
        *(environment / "python", "-m", "lightning_moe", "fit", "--config", names[1], "--trainer.max_steps", 2),
        folder=tmp_path,
    )
    made = tmp_path / "runs" / "quickstart"
    assert (made / "recovered_50_nf4" / "merged_nf4" / "model.safetensors").is_file()
    rows = {path.stem for path in (made / "stages").glob("*.json")}
    assert {"recovered_50_nf4", "recovered_50_nf4_merged"} <= rows
    assert (made / "recovered_50_nf4" / "report.html").is_file()
    assert "recovered_50_nf4" in told
