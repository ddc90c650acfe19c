"""The `flashlab` command line.

Every command is a plain function: its signature is its options, its docstring their help, and `--config FILE` fills any
of them from YAML. The table below names the functions; a module is imported only when its command is asked for, so that
`flashlab --help` answers at once.
"""

import difflib
import inspect
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import is_dataclass
from importlib import import_module
from itertools import takewhile
from typing import Any, NoReturn, get_args, get_origin

import docstring_parser
from jsonargparse import Namespace, auto_cli

from flashlab import __version__
from flashlab.errors import Terminated, UserError, terminable
from flashlab.parser import ConfigFile, Parser

COMMANDS = {
    "doctor": ("flashlab.doctor:doctor", "say what this machine has, what will be used and what is wrong"),
    "check": ("flashlab.check.check:check", "compare every attention backend with the reference"),
    "backends": ("flashlab.support:backends", "list which backend supports what on this machine, and why not"),
    "bench sweep": ("flashlab.bench.sweep:sweep", "measure attention over lengths, masks and backends"),
    "bench train": ("flashlab.btc.bench:bench_train", "measure how fast the forecaster trains, loop by loop"),
    "bench": ("flashlab.bench.bench:bench", "measure one attention call, forward and backward"),
    "tune": ("flashlab.bench.tune:tune", "measure this machine once, so that `auto` chooses well on it"),
    "data fetch": ("flashlab.btc.fetch:fetch", "download the public Bitcoin minute bars"),
    "data simulate": ("flashlab.btc.simulate:simulate", "write realistic minute bars from a seed number"),
    "data prepare": ("flashlab.btc.prepare:prepare", "clean minute bars into the set that training reads"),
    "data describe": ("flashlab.btc.describe:describe", "say what a CSV or a prepared set holds, with a plot"),
    "train": ("flashlab.btc.train:train", "train the minute-bar forecaster"),
    "evaluate": ("flashlab.btc.evaluate:evaluate", "score a trained forecaster beside its baselines"),
    "predict": ("flashlab.btc.predict:predict", "forecast the next bars of a CSV, or of a stream as they come"),
    "gpt2 prepare": ("flashlab.gpt2.prepare:prepare", "turn text into the tokens that GPT-2 is trained on"),
    "gpt2 train": ("flashlab.gpt2.train:train", "train GPT-2 on tokens"),
    "gpt2 sample": ("flashlab.gpt2.sample_command:sample", "have a trained GPT-2 continue a text"),
    "gpt2 export": ("flashlab.gpt2.sample_command:export", "write a trained GPT-2 in Hugging Face's format"),
    "report": ("flashlab.report:report", "draw and write the report of an evaluated run or of a sweep"),
    "results": ("flashlab.results:results", "write the result files' numbers into README.md and docs"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit code: 0, 1 for a check that found something wrong or could judge nothing, 2 for a user's mistake,
        128 + signal for a stop.
    """
    return reported(lambda: _run(list(sys.argv[1:] if argv is None else argv)))


def _run(argv: list[str]) -> int | None:
    name = next((name for name in COMMANDS if argv[: len(name.split())] == name.split()), None)
    if name is None:
        return _overview(argv)
    command = load(name)
    options = build_parser(name, command)
    parsed = options.parse_args(_complete_flags(command, argv[len(name.split()) :]))
    for key, parameter in inspect.signature(command).parameters.items():
        if is_dataclass(parameter.annotation) and not isinstance(parsed[key], Namespace):
            raise UserError(f"--config: {key} must be a section with keys of its own, not {parsed[key]!r}")
    arguments = options.instantiate(parsed).as_dict()
    return command(**{key: arguments[key] for key in inspect.signature(command).parameters})


def reported(command: Callable[[], int | None]) -> int:
    """Call a command; what it raises for a user's mistake becomes one line, and a stop by Ctrl-C or SIGTERM another.

    Whose reader goes away (`| head`) ends in silence.

    Returns:
        The exit code, as `main`.
    """
    try:
        with terminable():
            code = command() or 0
            if sys.stdout is not None:  # it may be closed
                sys.stdout.flush()
            return code
    except UserError as error:
        print(f"flashlab: error: {error}", file=sys.stderr)
        return 2
    except (BrokenPipeError, SystemExit) as error:
        if isinstance(error, SystemExit) and not isinstance(error.__context__, BrokenPipeError):  # rich's is of one
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes as it ends
        return 128 + signal.SIGPIPE
    except PermissionError as error:  # already to ask whether a path exists may be forbidden
        if error.filename is None:
            raise
        print(f"flashlab: error: {error.filename}: {error.strerror}; check its permissions", file=sys.stderr)
        return 2
    except FileNotFoundError as error:  # libraries ask for one as they are imported
        if "No usable temporary directory" not in str(error):
            raise
        print(f"flashlab: error: {error.strerror}; free space there, or set TMPDIR to another folder", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        print("flashlab: interrupted", file=sys.stderr)
        return 128 + (signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT)


def script(commands: Any, **settings: Any) -> NoReturn:
    """Run a function, or one of several, with the options of the command line, to the exit code that `reported` gives.

    Args:
        commands: the functions.
        settings: of jsonargparse's `auto_cli`.
    """
    sys.exit(reported(lambda: auto_cli(commands, parser_class=Parser, **settings)))


def load(name: str) -> Callable[..., int | None]:
    """Import the function behind a command."""
    module, function = COMMANDS[name][0].split(":")
    return getattr(import_module(module), function)


def build_parser(name: str, command: Callable[..., Any]) -> Parser:
    """Build the parser of one command from its function.

    A parameter that may be passed by position is a positional argument (a list takes one or more values, or none if it
    has a default); all others are options.
    """
    parser = Parser(prog=f"flashlab {name}", description=(inspect.getdoc(command) or "").split("\n\nArgs:")[0])
    parser.add_argument("--config", action=ConfigFile, help="YAML file with any of these options; repeatable")
    parser.add_function_arguments(command, as_positional=False, skip=set(positional := _positionals(command)))
    help_lines = {param.arg_name: param.description for param in docstring_parser.parse(command.__doc__).params}
    for parameter in positional.values():
        is_list = get_origin(parameter.annotation) is list
        value_type = get_args(parameter.annotation)[0] if is_list else parameter.annotation
        settings: dict[str, Any] = {"nargs": "+"} if is_list else {}
        if parameter.default is not parameter.empty:
            settings = {"nargs": "*" if is_list else "?", "default": parameter.default}
        parser.add_argument(parameter.name, type=value_type, help=help_lines[parameter.name], **settings)
    return parser


def _positionals(command: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    return {
        name: parameter
        for name, parameter in inspect.signature(command).parameters.items()
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    }


def _complete_flags(command: Callable[..., Any], argv: list[str]) -> list[str]:
    """Let `--resume` stand for `--resume true`, `--max-gap` for `--max_gap`, and `--of a,b` or `--of a b` for lists."""
    flag = re.compile(r"\A--[A-Za-z][\w.+-]*(?==|$)")  # and not a value, as a text that begins with two dashes
    argv = [flag.sub(lambda found: "--" + found[0][2:].replace("-", "_"), word) for word in argv]
    options = {f"--{name}": parameter for name, parameter in inspect.signature(command).parameters.items()}
    completed, rest = [], argv
    while rest:
        option, *rest = rest
        annotation = options[option].annotation if option in options else None
        given = list(takewhile(lambda word: not word.startswith("--"), rest))
        if annotation is bool and given[:1] not in (["true"], ["false"]):
            completed += [option, "true"]
        elif "list[" in str(annotation) and given and not given[0].startswith("["):
            completed += [option, f"[{','.join(given)}]"]
            rest = rest[len(given) :]
        else:
            completed.append(option)
    return completed


def _overview(argv: list[str]) -> int:
    """Answer `flashlab`, `--help`, `--version`, the first word of several commands, and what is no command."""
    if argv == ["--version"]:
        print(__version__)
        return 0
    asked = " ".join(argument for argument in argv if argument not in ("--help", "-h"))
    listed = {name: summary for name, (_, summary) in COMMANDS.items() if f"{name} ".startswith(f"{asked} ".lstrip())}
    if not listed:
        nearest = difflib.get_close_matches(asked, COMMANDS, n=1, cutoff=0.0)[0]
        raise UserError(f"no command {asked!r}; did you mean `flashlab {nearest}`? (`flashlab --help` lists them)")
    width = max(map(len, listed))
    print("usage: flashlab COMMAND [options]\n\nFlashAttention that works, and workloads that show it works.\n")
    print(*(f"  {name:{width}}  {summary}" for name, summary in listed.items()), sep="\n")
    print("\n`flashlab COMMAND --help` lists the options of a command.")
    return 0
