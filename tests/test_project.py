"""The project as a whole: what its pages and examples promise is what its code does.

``python tests/test_project.py > tests/cli.txt`` accepts a change of the command line.
"""

import ast
import contextlib
import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from itertools import chain
from pathlib import Path

import pytest

from flashlab import cli
from flashlab.errors import UserError
from flashlab.results import results

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src/flashlab"
SNAPSHOT = Path(__file__).with_name("cli.txt")
README = ROOT / "README.md"
PAGES = [README, *sorted([*ROOT.glob("C*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")])]

# folder of examples/ -> the command that takes its YAML files
COMMAND_OF_EXAMPLES = {"btc_forecast": "train", "attention_bench": "bench sweep", "gpt2": "gpt2 train"}
# Of the others, tests/training/test_world.py reads the manifest of examples/cluster.
EXAMPLES = [path for path in sorted(ROOT.glob("examples/**/*.yaml")) if path.parent.name != "cluster"]
MAY_IMPORT = {  # part of the package -> the parts it may import
    "errors": set(),
    "attention": {"errors"},
    "machine": {"attention", "errors"},
    "doctor": {"machine"},
    "check": {"attention", "errors", "machine", "worker"},
    "bench": {"attention", "errors", "machine", "report", "worker"},
    "training": {"errors", "machine"},
    "btc": {"attention", "errors", "machine", "object_storage", "report", "training", "worker"},
    "gpt2": {"attention", "bench", "errors", "machine", "object_storage", "report", "training", "worker"},
    "object_storage": {"errors"},
    "report": {"errors"},
    "results": {"attention", "bench", "btc", "errors", "gpt2", "report"},
    "support": {"attention", "errors", "machine", "results"},
    "parser": {"errors"},
    "cli": {"errors", "parser"},
    "__main__": {"cli"},
}

# What makes the commands of the README quick, and those that need the network or write into the project.
TINY = {
    "data simulate": "--days 12",
    "data prepare": "--context_length 256",
    "train": "--data.context_length 256 --data.batch_size 4 --model.width 16 --model.num_layers 1 "
    "--trainer.max_steps 3 --trainer.val_every_n_steps 2 --trainer.log_every_n_steps 1",
}
NOT_RUN = {"data fetch", "results"}


def commands(page: Path, *, blocks_only: bool = False) -> list[list[str]]:
    """Find the commands in the code of a page."""
    blocks = re.findall(r"^```sh\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    inline = [] if blocks_only else re.findall(r"`((?:flashlab|make) [^`\n]+)`", page.read_text())
    lines = "\n".join([*blocks, *inline]).replace("\\\n", " ").splitlines()
    split = [shlex.split(line.removeprefix("$ "), comments=True) for line in lines]
    return [words for words in split if words and words[0] in ("flashlab", "make")]


def named(program: str) -> list[list[str]]:
    return [words[1:] for page in PAGES for words in commands(page) if words[0] == program]


def command_of(argv: list[str]) -> str:
    return next(name for name in cli.COMMANDS if argv[: len(name.split())] == name.split())


def parse(argv: list[str]) -> None:
    name = command_of(argv)
    command = cli.load(name)
    cli.build_parser(name, command).parse_args(cli._complete_flags(command, argv[len(name.split()) :]))


def run_make(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(["make", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


def cli_listing() -> str:
    """List every command and its options."""
    lines = []
    for name in cli.COMMANDS:
        for action in cli.build_parser(name, cli.load(name))._actions:
            names = "/".join(action.option_strings) or action.dest
            if names not in ("-h/--help", "--print_config"):
                lines.append(f"{name} {names}\n")
    return "".join(lines)


def test_command_line_is_frozen():
    assert cli_listing() == SNAPSHOT.read_text(), (
        "the command line changed, which breaks scripts and configs of others; if it has to be: "
        "python tests/test_project.py > tests/cli.txt, and a line in CHANGELOG.md"
    )


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_example_parses_and_unknown_keys_do_not(path, tmp_path):
    command = COMMAND_OF_EXAMPLES[path.parent.name]
    parse([*command.split(), "--config", str(path)])
    (wrong := tmp_path / "wrong.yaml").write_text(path.read_text() + "\nno_such_key: 1\n")
    with pytest.raises(UserError, match="no_such_key"):
        parse([*command.split(), "--config", str(wrong)])


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("attention_bench/overhead.py --backends [sdpa_flsh]", "--backends: there is no 'sdpa_flsh'; there are"),
        ("attention_bench/overhead.py --rounds 0", "rounds"),
        ("attention_bench/overhead.py --json pyproject.toml/x.json", "cannot write pyproject.toml/x.json: "),
        ("btc_forecast/bench_predict.py --json pyproject.toml/x.json", "cannot write pyproject.toml/x.json: "),
        ("btc_forecast/bench_prepare.py bars.csv --json pyproject.toml/x.json", "cannot write pyproject.toml/x.json: "),
    ],
)
def test_a_script_refuses_a_mistake_before_it_measures(words, complaint, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", words.split())
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(ROOT / "examples" / sys.argv[0]), run_name="__main__")
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize("argv", named("flashlab"), ids=" ".join)
def test_command_in_a_page_parses(argv, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    if "--help" in argv:
        with contextlib.suppress(SystemExit):
            assert cli.main(argv) == 0
        assert "usage:" in capsys.readouterr().out
    elif " ".join(argv) not in cli.COMMANDS:  # else the command is named in a sentence
        parse(argv)


@pytest.mark.parametrize("words", named("make"), ids=" ".join)
def test_make_target_in_a_page_exists(words):
    made = run_make("--dry-run", *(word for word in words if not word.startswith("DATA=")))
    assert made.returncode == 0, made.stderr


def test_commands_of_the_readme_run(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    Path("examples").symlink_to(ROOT / "examples")
    ran = []
    for program, *argv in commands(README, blocks_only=True):
        if program == "make" or (name := command_of(argv)) in NOT_RUN:
            continue
        code = cli.main([*argv, *TINY.get(name, "").split()])
        assert code == 0, f"flashlab {shlex.join(argv)}: {capfd.readouterr().err}"
        ran.append(name)
    assert ran[-3:] == ["train", "evaluate", "report"]
    assert list(Path("runs").glob("*/report.html"))


def test_readme_is_short_and_its_numbers_are_rendered(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert README.read_text().count("\n") < 200
    assert results(check=True) == 0, capsys.readouterr().err


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)#\s]+)", page.read_text())
    local = [target for target in targets if "://" not in target]
    assert [target for target in local if not (page.parent / target).exists()] == []


def test_help_is_instant():
    code = (
        "import resource, sys; from flashlab.cli import main; main(['--help']);"
        "print(*{'torch', 'lightning', 'pandas', 'matplotlib'} & set(sys.modules), file=sys.stderr);"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_utime, file=sys.stderr)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported, seconds = ran.stderr.splitlines()
    assert imported == ""
    assert float(seconds) < 1
    assert all(f"  {name} " in ran.stdout for name in cli.COMMANDS)


def test_dependencies_point_one_way():
    for path in PACKAGE.rglob("*.py"):
        modules = []
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                modules += [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                modules += [alias.name for alias in node.names]
        part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        imported = {module.split(".")[1] for module in modules if module.startswith("flashlab.")} - {"__version__"}
        assert imported <= MAY_IMPORT.get(part, set()) | {part}, path


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        ("my bars.csv", "cannot take a path with spaces"),
        ("no_such.csv", "no_such.csv: there is no such file; check the path"),
    ],
)
def test_make_refuses_data_in_one_line(data, complaint):
    made = run_make("--dry-run", "train", f"DATA={data}")
    assert made.returncode == 2
    assert complaint in made.stderr
    assert made.stderr.count("\n") == 1


def test_make_names_set_and_run_after_the_data(tmp_path):
    for name in ("bars.2013.csv.gz", "bars.2013.csv", "bars.2013.zip"):
        (tmp_path / name).touch()
        options = f"DATA={tmp_path / name}", f"VENV={tmp_path}", "PREPARE=--context_length 512"
        made = run_make("--dry-run", "train", *options)
        assert f"data prepare {tmp_path / name} --out data/bars.2013 --context_length 512\n" in made.stdout
        assert "--data.path data/bars.2013 --run runs/bars.2013 --resume" in made.stdout


def test_make_gpt2_has_a_run_and_configurations_of_its_own(tmp_path):
    made = run_make("--dry-run", "gpt2", f"VENV={tmp_path}", "HAS_GPU=")
    configs = "--config examples/gpt2/embedded.yaml --config examples/gpt2/cpu.yaml"
    assert f"{configs} --data.path data/gpt2 --run runs/gpt2 --resume" in made.stdout
    made = run_make("--dry-run", "gpt2", f"VENV={tmp_path}", "HAS_GPU=yes", "RUN=runs/second", "ARGS=--seed 1")
    assert "gpt2/embedded.yaml --data.path data/gpt2 --run runs/second --resume --seed 1" in made.stdout
    assert "gpt2 sample runs/second " in made.stdout


def test_make_refuses_an_old_python(tmp_path):
    (old := tmp_path / "python3.8").write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    made = run_make("doctor", f"PYTHON={old}", f"VENV={tmp_path / 'venv'}")
    assert made.stderr.startswith(f"make: Python 3.11 or newer is needed, and {old} is not")
    assert not (tmp_path / "venv").exists()


def test_direct_dependencies_are_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = [*project["dependencies"], *chain.from_iterable(project["optional-dependencies"].values())]
    assert [name for name in requirements if "==" not in name] == ["torch>=2.10,<2.14"]


def test_files_speak_of_the_project_alone():
    """No path of somebody's machine, and no setting of where packages come from."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    machines = re.compile(rb"(?<![\w.:])/(home/(?!flashlab)|root/|Users/|work/)\w|(?<!emit-)\b(index-url|find-links)\b")
    texts = {name: (ROOT / name).read_bytes() for name in listed.stdout.split("\0") if (ROOT / name).is_file()}
    found = {name: match[0] for name, text in texts.items() if (match := machines.search(text))}
    assert {name: match for name, match in found.items() if not name.startswith("tests/")} == {}


if __name__ == "__main__":
    print(cli_listing(), end="")
