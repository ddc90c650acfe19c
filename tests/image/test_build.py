"""How the images build: what is refused, that flash-attn compiles as asked, and what an edit costs.

The sizes of all images, compressed too (minutes for those with CUDA):

    for image in $(docker images --filter reference='flashlab*' --format '{{.Repository}}:{{.Tag}}'); do
      echo "$image $(docker image inspect --format '{{.Size}}' "$image") $(docker save "$image" | gzip -1 | wc -c)"
    done
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.docker

ROOT = Path(__file__).parents[2]
FLASH_ATTN = re.search(r"^flash-attn==(\S+)", (ROOT / "assets/build/flash-attn.lock").read_text(), re.MULTILINE)[1]
SEMICOLONS = "expected majors joined by semicolons, as in 80;90;100;120"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The project without what git does not know, beside which a test may put and change things."""
    listed = subprocess.run(["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in listed.stdout.decode().split("\0"):
        if name and (ROOT / name).is_file():
            (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tmp_path / "copy" / name)
    return tmp_path / "copy"


@pytest.fixture(scope="module")
def compiler_image() -> None:
    if not os.environ.get("FLASHLAB_TEST_CUDA_13_IMAGE"):
        pytest.skip("the compiler's image is 5 GB: FLASHLAB_TEST_CUDA_13_IMAGE names no other")


def said(output: str, program: str) -> set[str]:
    """Find the lines of a program in a build's log, without the build's marks in front of them."""
    return set(re.findall(rf"^#\d+ [\d.]+ ({program}.*)$", output, re.MULTILINE))


@pytest.mark.parametrize(
    ("argument", "complaint"),
    [
        ("FLASH_ATTN_CUDA_ARCHS=8.6", f"FLASH_ATTN_CUDA_ARCHS=8.6: {SEMICOLONS}"),
        ("FLASH_ATTN_CUDA_ARCHS=80,90", f"FLASH_ATTN_CUDA_ARCHS=80,90: {SEMICOLONS}"),
        ("FLASH_ATTN_CUDA_ARCHS=80;86", "flash-attn 2 has no 86, only 80 90 100 120"),
        ("FLASH_ATTN_CUDA_ARCHS=", SEMICOLONS),
        ("MAX_JOBS=0", "MAX_JOBS=0: expected a whole number from 1"),
        ("MAX_JOBS=many", "MAX_JOBS=many: expected a whole number from 1"),
        ("NVCC_THREADS=0", "NVCC_THREADS=0: expected a whole number from 1"),
    ],
)
def test_compile_refuses_at_once(bake, compiler_image, argument, complaint):
    started = time.monotonic()
    built = bake("wheel-cu130-py312", f"--set=wheel-cu130-py312.args.{argument}", check=False, WHEELS="")
    assert built.returncode
    (line,) = said(built.stderr, "build-wheel:")
    assert complaint in line
    assert time.monotonic() - started < 30


@pytest.mark.parametrize(("user", "group"), [("0", "1000"), ("flashlab", "1000"), ("1000", "staff"), ("1000", "")])
def test_image_refuses_a_user_that_is_root_or_no_number(bake, cpu_image, user, group):
    built = bake("runtime-cpu-py312", check=False, UID=user, GID=group, IMAGE="flashlab-test-refused")
    assert built.returncode
    assert said(built.stderr, "UID=") == {
        f"UID={user} GID={group}: expected whole numbers, and UID from 1: nothing here runs as root"
    }


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        (
            {f"flash_attn-{FLASH_ATTN}-1.whl": "", "build-info.json": '{"torch": "2.10.0"}'},
            "install-wheel: the wheel was compiled against torch 2.10.0, and torch 2.11.0",
        ),
        (
            {"flash_attn-2.7.4-1.whl": "", "build-info.json": '{"torch": "2.11.0"}'},
            f"install-wheel: flash_attn-2.7.4-1.whl is kept and flash-attn {FLASH_ATTN} is locked",
        ),
        ({"flash_attn-2.whl": ""}, "install-wheel: expected one flash_attn-*.whl and its build-info.json, got: flash_"),
        ({"build-info.json": "{}"}, "install-wheel: expected one flash_attn-*.whl and its build-info.json, got: build"),
    ],
    ids=["of another torch", "of another flash-attn", "of nobody knows which", "none"],
)
def test_image_refuses_a_wheel(bake, runtime_image, tmp_path, files, complaint):
    (folder := tmp_path / "cu130-pt211-py312").mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    built = bake(
        "runtime-cu130-py312",
        f"--allow=fs.read={tmp_path}",
        check=False,
        WHEELS=str(tmp_path),
        IMAGE="flashlab-test-refused",
    )
    assert built.returncode
    (line,) = said(built.stderr, "install-wheel:")
    assert line.startswith(complaint)


def children_of_ninja() -> int:
    """Count the compilers that ninja runs at this moment, in whichever container."""
    listed = subprocess.run(["ps", "-eo", "pid=,ppid=,comm="], capture_output=True, text=True, check=True).stdout
    processes = [line.split(maxsplit=2) for line in listed.splitlines()]
    ninjas = {pid for pid, _, name in processes if name == "ninja"}
    return sum(parent in ninjas for _, parent, _ in processes)


@pytest.mark.slow
def test_compile_runs_as_many_compilers_as_asked(baking, compiler_image, tmp_path):
    """It is stopped at the first object: all 73 take an hour."""
    if children_of_ninja():
        pytest.skip("something else here is built by ninja, whose compilers would be counted")
    output = f"--set=wheel-cu130-py312.output=type=local,dest={tmp_path}"
    command = baking("wheel-cu130-py312", output, WHEELS="", MAX_JOBS="2", FLASH_ATTN_CUDA_ARCHS="90")
    log = tmp_path / "log"
    counts: list[int] = []
    with log.open("w") as file:
        build = subprocess.Popen(**command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 1200
        while not (first := re.search(r" \[1/(\d+)\] ", log.read_text())):
            assert build.poll() is None, f"the build ended:\n{log.read_text()[-3000:]}"
            assert time.monotonic() < deadline, f"no object after 20 minutes:\n{log.read_text()[-3000:]}"
            counts.append(children_of_ninja())
            time.sleep(0.5)
    finally:
        with contextlib.suppress(ProcessLookupError):
            build.send_signal(signal.SIGINT)
        build.wait(60)
    assert int(first[1]) == 73
    (line,) = said(log.read_text(), "build-wheel: flash_attn")
    assert line.endswith("for 90, 2 compilers at a time, 1 thread(s) each, no network")
    assert "Guessing wheel URL" not in log.read_text()
    working = [count for count in counts if count]
    assert max(working) == 2
    # One may have ended just before it is replaced.
    assert working.count(2) > 0.9 * len(working)
    for _ in range(60):
        if not children_of_ninja():
            return
        time.sleep(0.5)
    pytest.fail("compilers are at work still, half a minute after the build was stopped")


def steps_that_ran(log: str) -> list[str]:
    """List the steps of a build that did not come from the cache."""
    steps = dict(re.findall(r"^#(\d+) (\[(?!internal)\S+ .*\d+/\d+\] (?:RUN|COPY|WORKDIR).*)$", log, re.MULTILINE))
    assert steps
    cached = set(re.findall(r"^#(\d+) CACHED$", log, re.MULTILINE))
    return [text for number, text in steps.items() if number not in cached]


@pytest.mark.parametrize("variant", ["cpu-py312", "cu130-py312"])
def test_editing_the_package_rebuilds_the_last_layer_only(bake, copy, variant, request, docker, record_property):
    request.getfixturevalue("cpu_image" if variant.startswith("cpu") else "runtime_image")
    target = f"runtime-{variant}"
    bake(target, root=copy, IMAGE="flashlab-test-edit")
    source = copy / "src/flashlab/btc/model.py"
    source.write_text(source.read_text() + f"\n# edited at {time.time()}\n")
    started = time.monotonic()
    built = bake(target, root=copy, IMAGE="flashlab-test-edit")
    seconds = time.monotonic() - started
    (step,) = steps_that_ran(built.stderr)
    assert re.match(r"\[runtime .*\] RUN .* pip install .* /package", step)
    tag = next(
        name for name in docker("images", "--format", "{{.Repository}}:{{.Tag}}").stdout.split() if "-edit" in name
    )
    edited = docker(
        "run", "--rm", tag, "bash", "-c", "tail -1 /opt/venv/lib/python3*/site-packages/flashlab/btc/model.py"
    )
    assert "# edited at" in edited.stdout
    docker("rmi", tag)
    record_property(f"rebuild_{variant}_seconds", round(seconds, 1))
    print(f"editing one file and rebuilding {target}: {seconds:.1f} s")


def test_build_sees_no_data_and_no_secret(docker, copy, tmp_path):
    """Nothing but what is named in .dockerignore reaches a build, so nothing else can reach a layer."""
    for name in (
        ".env",
        "data/bars.csv",
        "runs/mine/last.ckpt",
        "wheels/a.whl",
        ".git/config",
        "id_rsa",
        "src/a.egg-info/x",
    ):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_text("secret")
    (copy / "src/flashlab/__pycache__").mkdir(exist_ok=True)
    (copy / "src/flashlab/__pycache__/a.pyc").touch()
    (tmp_path / "Dockerfile").write_text("FROM scratch\nCOPY . /\n")
    docker("build", "--file", tmp_path / "Dockerfile", "--output", tmp_path / "seen", copy)
    seen = {str(path.relative_to(tmp_path / "seen")) for path in (tmp_path / "seen").rglob("*") if path.is_file()}
    assert "pyproject.toml" in seen
    roots = {name.split("/")[0] for name in seen}
    assert roots == {
        "LICENSE",
        "Makefile",
        "README.md",
        "assets",
        "docker",
        "examples",
        "pyproject.toml",
        "src",
        "tests",
    }
    assert {name for name in seen if name.startswith("assets/")} == {
        str(path.relative_to(ROOT)) for path in (ROOT / "assets/build").glob("*.lock")
    }
    assert not [name for name in seen if "__pycache__" in name or "egg-info" in name]
    assert not [name for name in seen if (tmp_path / "seen" / name).read_bytes() == b"secret"]


def test_sizes(docker, cpu_image, request, record_property):
    """The bar of the CPU image; the size of the others depends on the base and on flash-attn's architectures."""
    images = [cpu_image]
    if os.environ.get("FLASHLAB_TEST_WHEELS"):
        images += [request.getfixturevalue("runtime_image"), request.getfixturevalue("dev_image")]
    sizes = {image: json.loads(docker("image", "inspect", image).stdout)[0]["Size"] for image in images}
    packed = subprocess.run(
        f"docker save {cpu_image} | gzip -1 | wc -c", shell=True, capture_output=True, text=True, check=True
    )
    sizes[f"{cpu_image}, compressed"] = int(packed.stdout)
    for what, size in sizes.items():
        print(f"{what}: {size / 1e9:.2f} GB")
        record_property(what, size)
    assert sizes[cpu_image] <= 2e9
