"""How the commands read their arguments, and how `--help` shows them."""

import argparse
import dataclasses
import difflib
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn, get_type_hints

import yaml
from transformers import HfArgumentParser, TrainingArguments

from .terminal import is_main_process


_OF_TRAINER = {field.name for field in dataclasses.fields(TrainingArguments)}
_TRAINER = "Trainer's own arguments"


class CommandParser(HfArgumentParser):
    """
    Read the data classes of a command.

    `--help` shows what the command adds to Trainer or wants otherwise; with `--help_all` in the command line Trainer's
    own arguments, too.

    Args:
        kinds (`tuple[type, ...]`):
            The data classes. `_argument_group_name` names the group of one in the help; of a trainer's arguments those
            are "Method" that this library adds, "Training" those that the command sets. `_refused` names those that
            the command's task cannot have, which the help leaves out.
        description (`str`):
            What the help begins with.
        prog (`str`, *optional*):
            The command, as it is typed. Default: the script's name.
        with_trainer (`bool`, *optional*, defaults to `False`):
            Whether to show Trainer's own arguments.

    Example:

    ```python
    >>> from iekd_hf.commands.export import ExportArguments
    >>> parser = CommandParser((ExportArguments,), "Export a model.", "iekd-hf export")
    >>> parser.read(["--model", "out"])[0].output
    'student.onnx'

    ```
    """

    def __init__(self, kinds: tuple[type, ...], description: str, prog: str | None = None, with_trainer: bool = False):
        self.with_trainer = with_trainer
        about = {"prog": prog, "usage": "%(prog)s [arguments]", "description": description.strip()}
        super().__init__(kinds, **about, formatter_class=_HelpFormatter, add_help=False, allow_abbrev=False)
        has_trainer = any(issubclass(kind, TrainingArguments) for kind in kinds)
        other = self.add_argument_group("Help")
        other.add_argument("-h", "--help", action="help", help="Show this.")
        if has_trainer:
            other.add_argument("--help_all", action="help", help="Show the arguments of Transformers' Trainer, too.")
        about = "Show all warnings, and the traceback of an error."
        if has_trainer:  # whose argument of this name takes a value
            other.add_argument("--debug", nargs="?", const="", default="", metavar="", help=about)
        else:
            other.add_argument("--debug", action=_Nothing, nargs=0, dest=argparse.SUPPRESS, help=about)

    def _add_dataclass_arguments(self, dtype):
        hints, fields = get_type_hints(dtype), {f.name: f for f in dataclasses.fields(dtype) if f.init}
        if not issubclass(dtype, TrainingArguments):
            order, groups = fields, {_title(dtype): self.add_argument_group(_title(dtype))}
        else:  # those of a subclass before those that it inherits
            order = dict.fromkeys(name for kind in dtype.__mro__ for name in vars(kind).get("__annotations__", ()))
            groups = {title: self.add_argument_group(title) for title in ("Method", "Training", _TRAINER)}
            del fields["debug"]
        for name in order:
            if name in fields:
                field, title = fields[name], _title(dtype, name)
                field.type = hints[name]
                is_shown = name not in getattr(dtype, "_refused", ()) and (self.with_trainer or title != _TRAINER)
                self._parse_dataclass_field(_Group(groups[title], is_shown), field)

    def read(self, given: Sequence[str]) -> tuple:
        """Return the data classes as a JSON or YAML file, which comes first, and the command line after it say."""
        words = list(given)
        first = int(words[:1] == ["--debug"])
        if words[first:] and words[first].endswith((".json", ".yaml", ".yml")):
            of_file = self.as_words(self.read_file(words.pop(first)))
            words = [*of_file, *words]
        *classes, unknown = self.parse_args_into_dataclasses(words, return_remaining_strings=True)
        if unknown:
            known = [name for action in self._actions for name in action.option_strings]
            close = difflib.get_close_matches(unknown[0].partition("=")[0], known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"{self.prog} --help lists them."
            raise ValueError(f"Expected arguments of {self.prog}, got {' '.join(unknown)}: {hint}")
        return tuple(classes)

    def read_file(self, name: str) -> dict:
        """Return the arguments in a JSON or YAML file."""
        try:
            text = Path(name).read_text(encoding="utf-8")
            values = json.loads(text) if name.endswith(".json") else yaml.safe_load(text)
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise ValueError(f"Expected a file with arguments of {self.prog}, got {name!r}: {error}.") from error
        if not isinstance(values, dict):
            raise ValueError(f"Expected arguments by name in {name}, such as 'output_dir: out', got {values!r}.")
        return values

    def as_words(self, values: dict) -> list[str]:
        """Write a file's arguments as a command line has them, which is how they are read and checked."""
        words, known = [], {action.dest for action in self._actions}
        for name, value in values.items():
            if value is None and name in known:
                self.set_defaults(**{name: None})
            elif isinstance(value, list):
                words += [f"--{name}", *map(str, value)]
            else:
                words.append(f"--{name}={json.dumps(value) if isinstance(value, (bool, dict)) else value}")
        return words

    def error(self, message: str) -> NoReturn:
        """Say in one line what is wrong."""
        self.exit(2, f"error: {message} ({self.prog} --help lists the arguments)\n" if is_main_process() else None)


def parse_arguments(
    kinds: tuple[type, ...], description: str, prog: str | None = None, given: Sequence[str] | None = None
) -> tuple:
    """Read flags, after a JSON or YAML file if there is one, by default from the command line of the process."""
    given = sys.argv[1:] if given is None else given
    return CommandParser(kinds, description, prog, with_trainer="--help_all" in given).read(given)


def _title(kind: type, name: str = "") -> str:
    """Return the group of an argument."""
    if not issubclass(kind, TrainingArguments):
        return getattr(kind, "_argument_group_name", "Arguments")
    declared_in = [base.__module__ for base in kind.__mro__ if name in vars(base).get("__annotations__", ())]
    if name not in _OF_TRAINER:
        return "Method" if "iekd_hf.arguments" in declared_in else "Training"
    return _TRAINER if declared_in[0] in ("iekd_hf.arguments", TrainingArguments.__module__) else "Training"


class _Group:
    """Add arguments to a group of the help; leave out opposites (`--no_...`), whose help would be the argument's."""

    def __init__(self, group: argparse._ArgumentGroup, shown: bool):
        self.group, self.shown = group, shown

    def add_argument(self, *names: str, **keywords) -> None:
        if not self.shown or keywords.get("action") == "store_false":
            keywords["help"] = argparse.SUPPRESS
        self.group.add_argument(*names, **keywords)


class _Nothing(argparse.Action):
    def __call__(self, *args, **kwargs):
        pass


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Show each argument by one name, what it takes, and its default once."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=34, width=100)  # the same on all terminals, as the texts are kept

    def _format_action_invocation(self, action):
        if action.nargs == 0:
            return ", ".join(action.option_strings)
        return f"{action.option_strings[0]} {self._format_args(action, '')}".rstrip()

    def _format_args(self, action, default_metavar):
        metavar = action.metavar
        if metavar is None:
            kind = getattr(action.type, "__name__", "")
            known = {"string_to_bool": "true|false", "int": "N", "float": "X"}
            metavar = "NAME" if action.choices else known.get(kind, "TEXT")
        return f"{metavar} ..." if action.nargs == "+" else metavar

    def _get_help_string(self, action):
        text = action.help or ""
        choices, default = [str(choice) for choice in action.choices or ()], action.default
        if choices and not re.search(rf"\b{re.escape(choices[0])}\b", text):
            text, *own_default = text.partition(" Default:")
            text = "".join([f"{text} One of {', '.join(choices)}.", *own_default])
        if action.nargs == 0 or default in (None, "", argparse.SUPPRESS) or "default" in text.lower():
            return text
        default = " ".join(map(str, default)) if isinstance(default, list) else default
        default = str(default).lower() if isinstance(default, bool) else default
        return f"{text.rstrip()} Default: {default}."
