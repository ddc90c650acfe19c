"""The parser of command lines and configurations, whose mistakes are told in one line and in an option's own words."""

import re
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser

from flashlab.errors import UserError

# What jsonargparse says that a value is not -> what it has to be. The parts of a union are told one by one.
KINDS = {
    r"restriction (v\S+(?: and v\S+)*)": r"\1",
    r"invalid literal for int|not an integer|Expected a <class 'int'>": "a whole number",
    r"could not convert string to float|not a number|Expected a <class 'float'>": "a number",
    r"Expected a <class 'bool'>": "true or false",
    r"Expected a typing\.Literal\[([^]]+)\]": r"one of \1",
    r"Expected a tuple with (\d+) elements": r"\1 values",
}
# Where the value stands, in the order in which they are looked for.
VALUES = (
    r"Given value: ?(.*)",
    r"Got value: ?(.*)",
    r": (\S+) (?:does not conform|not an integer|not a number)",
    r"(?:base 10|to float): '(.*)'",
)


class ConfigFile(ActionConfigFile):
    """A YAML file of options, whose mistakes are told by its name; one that is empty has none."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        try:
            content = yaml.safe_load(Path(values).read_text(encoding="utf-8"))
        except (UnicodeDecodeError, yaml.YAMLError) as error:
            raise UserError(f"--config {values} is no YAML ({' '.join(str(error).split())}); mend it") from error
        except OSError:  # no file, but perhaps what the parser takes: standard input, or the options themselves
            pass
        else:
            if content is None:
                return
            if not isinstance(content, dict):
                raise UserError(f"--config {values} must hold options, and holds {str(content)[:60]}")
        super().__call__(parser, cfg, values, option_string)


class Parser(ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        command = self.prog.replace(" [options]", "")  # between a script and its subcommand
        raise UserError(f"{_in_words(' '.join(message.split()))} (`{command} --help` lists what it takes)")


def _in_words(message: str) -> str:
    """Say which value of an option is not what it has to be; other messages stay as they are."""
    if missing := re.fullmatch("Parser key \"config\": File does not exist: '(.*)'", message):
        return f"--config {missing[1]}: there is no such file"
    found = re.fullmatch(r'(?:Parser key "\w+": Unable to load config .* - )?Parser key "([\w.]+)": (.+)', message)
    if not found:
        return message
    key, said = found.groups()
    given = next((match[1] for match in (re.search(value, said) for value in VALUES) if match), None)
    kinds = [match.expand(words) for kind, words in KINDS.items() for match in re.finditer(kind, said)]
    if given is None or not kinds:
        return message
    must_be = re.sub(r"\bv(?=[<>])", "", " or ".join(kinds))
    return f"--{key} {given or repr('')}: it must be {must_be}"
