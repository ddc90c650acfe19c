import errno
import os
import signal
import subprocess
import sys

import pytest

from flashlab import cli
from flashlab.cli import main, reported


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"\xff\xfe", "is no YAML ('utf-8' codec can't decode byte 0xff"),
        (b"data: [1,", "is no YAML (while parsing a flow"),
        (b"# nothing", "no/such is not a token set"),
        (b"- 1", "must hold options, and holds [1]"),
        (None, "wrong.yaml: there is no such file"),
    ],
)
def test_a_configuration_that_is_none_is_told_by_its_name(content, complaint, tmp_path, capsys):
    if content is not None:
        (tmp_path / "wrong.yaml").write_bytes(content)
    (tmp_path / "right.yaml").write_text("seed: 1")
    files = [word for name in ("right", "wrong") for word in ("--config", str(tmp_path / f"{name}.yaml"))]
    assert main(["gpt2", "train", *files, "--data.path", "no/such"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert complaint in line


@pytest.mark.parametrize(
    ("option", "value", "kind"),
    [
        ("trainer.max_steps", "x", "a whole number"),
        ("trainer.max_steps", "0", ">0"),
        ("data.batch_size", "1.5", "a whole number"),
        ("optimizer.lr", "-1", ">0"),
        ("optimizer.lr", "x", "a number"),
        ("optimizer.betas", "[1, 2, 3]", "2 values"),
        ("seed", "-1", ">=0 and <4294967296"),
        ("trainer.strategy", "nope", "one of 'ddp', 'fsdp'"),
        ("trainer.compile", "maybe", "true or false or one of 'auto'"),
        ("trainer.max_steps", "''", "a whole number"),
        ("trainer.accelerator", "''", "one of 'auto', 'cpu', 'gpu'"),
    ],
)
def test_a_value_that_an_option_cannot_have_is_told_in_words(option, value, kind, tmp_path, capsys):
    told = f"flashlab: error: --{option} {value}: it must be {kind} (`flashlab gpt2 train --help` lists"
    assert main(["gpt2", "train", f"--{option}", value.strip("'")]) == 2
    assert capsys.readouterr().err.startswith(told)
    section, _, key = option.rpartition(".")
    (tmp_path / "of.yaml").write_text(f"{section}: {{{key}: {value}}}" if section else f"{key}: {value}")
    assert main(["gpt2", "train", "--config", str(tmp_path / "of.yaml")]) == 2
    assert capsys.readouterr().err.startswith(told)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["check", "--head_dim", "x"], "--head_dim ['x']: it must be a whole number"),
        (["gpt2", "train", "--optimizer.lr", "true"], "--optimizer.lr true: it must be a number"),
        (["gpt2", "train", "--trainer", '{"max_steps": "x"}'], "--trainer.max_steps x: it must be a whole number"),
    ],
)
def test_a_value_within_another_is_told_alone(words, told, capsys):
    assert main(words) == 2
    assert capsys.readouterr().err.startswith(f"flashlab: error: {told} (`flashlab")


def test_a_configuration_may_be_on_the_command_line(capsys):
    assert main(["gpt2", "train", "--config", "{data: {path: no/such}}"]) == 2
    assert "no/such is not a token set" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "code"), [([], 0), (["data"], 0), (["gpt2", "--help"], 0), (["dat"], 2), (["-x"], 2)]
)
def test_what_is_no_command_is_not_taken_for_help(words, code, capsys):
    assert main(words) == code
    assert ("did you mean" in capsys.readouterr().err) == (code == 2)


def test_a_path_that_may_not_be_looked_at_is_one_line(capsys):
    def command():
        raise PermissionError(13, "Permission denied", "/secret/bars.csv")

    assert reported(command) == 2
    assert capsys.readouterr().err == "flashlab: error: /secret/bars.csv: Permission denied; check its permissions\n"


def test_a_stop_leaves_nothing_behind(tmp_path):
    """SIGTERM as well as Ctrl-C."""
    command = [sys.executable, "-m", "flashlab", "data", "simulate", "--out", str(tmp_path / "bars.csv.gz")]
    for number in (signal.SIGINT, signal.SIGTERM):
        with subprocess.Popen([*command, "--days", "5000"], stderr=subprocess.PIPE, text=True) as process:
            while not any(tmp_path.iterdir()):
                assert process.poll() is None
            process.send_signal(number)
            assert process.stderr
            assert process.stderr.read().splitlines()[-1] == "flashlab: interrupted"
        assert process.returncode == 128 + number
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [["--help"], ["backends"]])  # printed by Python, and by rich
def test_a_reader_that_goes_away_ends_a_command_quietly(words):
    read, write = os.pipe()
    os.close(read)
    ran = subprocess.run([sys.executable, "-m", "flashlab", *words], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (ran.returncode, ran.stderr) == (128 + signal.SIGPIPE, "")


def test_a_value_that_begins_with_two_dashes_is_taken_as_it_is():
    words = ["--separator", "-- end-of-doc --", "--max-gap", "3", "--x.y-z=a-b", "text --of-words"]
    completed = cli._complete_flags(lambda: None, words)
    assert completed == ["--separator", "-- end-of-doc --", "--max_gap", "3", "--x.y_z=a-b", "text --of-words"]


def test_no_room_for_temporary_files_is_one_line(capsys):
    def command():
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")

    assert reported(command) == 2
    assert capsys.readouterr().err == (
        "flashlab: error: No usable temporary directory found in ['/tmp']; free space there, or set TMPDIR to another "
        "folder\n"
    )
