"""Command lines from a frozen dataclass: one field = one flag, the docstring line under the field = its help.

tyro reads the flags (aliases, types, `--help`). On top: `--config file.yaml` read before the flags, `--switch` and
`--no_switch` for a field that may also stay undecided (`bool | None`), and every mistake as one sentence.
"""
from __future__ import annotations

import contextlib
import dataclasses
import difflib
import inspect
import io
import logging
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal, TypeVar, get_args, get_origin, get_type_hints

import tyro
import yaml

from stt import stopping
from stt.errors import NO_ROOM, NOT_ALLOWED, InputError, TrainingFailed, unknown_name

Args = TypeVar("Args")
TyroArg = type(tyro.conf.arg())  # the class behind tyro.conf.arg(aliases=...)

ACCEPTED = {float: "a number", int: "a whole number", bool: "true or false", Path: "a path"}
NOTHING = {"none", "null", "~", ""}
PLAIN_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null", "seq", "map")}
TRUTH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def run(main: Callable[[Args], int | None], cls: type[Args], argv: Sequence[str] | None = None,
        prog: str | None = None) -> int:
    """The exit code of `main(args)` with `args` read from the command line.

    2 = bad input, 3 = training failed, 130 = interrupted, otherwise what `main` returns (None = 0). A process of its
    own (`argv` None) whose flags have --resume also ends with 75, on SIGTERM and SIGUSR1 (stt/stopping.py).
    """
    if argv is None and "resume" in cls.__dataclass_fields__:
        stopping.listen()
    _log_to_stderr()
    try:
        code = main(read_args(cls, argv, prog)) or 0
        sys.stdout.flush()
        return code
    except InputError as error:
        return _fail(error, 2)
    except TrainingFailed as error:
        return _fail(error, 3)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:  # `... | head` has read enough; the interpreter would complain when it flushes
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.errno not in (*NO_ROOM, *NOT_ALLOWED):
            raise
        return _fail(f"cannot use {error.filename}: {error.strerror}; make room or give access, and start again",
                     3 if error.errno in NO_ROOM else 2)
    finally:
        stopping.ignore()


def read_args(cls: type[Args], argv: Sequence[str] | None = None, prog: str | None = None) -> Args:
    """An instance of the dataclass `cls` from `argv` (default: the process's own). Raises InputError; `--help` exits.

    A class whose fields all have defaults also takes `--config FILE`, a YAML file of flags that the command line
    overrides.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    description, default = inspect.getdoc(cls) or "", {}
    if _has_defaults(cls):
        description += "\n\n--config FILE reads flags from a YAML file first; the command line overrides it."
        path, argv = _take_config(argv)
        default = {"default": cls(**typed_values(load_yaml(path, "config file"), cls, path))} if path else {}
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(cls, args=_spell_out_switches(cls, argv), prog=prog, description=description,
                            use_underscores=True, **default)
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        if isinstance(stop.__context__, InputError):  # raised by the dataclass's own checks
            raise stop.__context__ from None
        raise InputError(_explain(cls, argv) or _unboxed(complaint.getvalue())) from None


def _fail(reason: object, code: int) -> int:
    sys.stderr.write(f"error: {' '.join(str(reason).split())}\n")
    return code


def _log_to_stderr() -> None:
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    for name in ("stt", "util", "__main__"):
        logging.getLogger(name).setLevel(logging.INFO)


# ---------------------------------------------------------------- what the dataclass says about its flags


def _kinds(cls: type) -> dict[str, object]:
    """Field name -> its type without annotations."""
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _spellings(cls: type) -> dict[str, str]:
    """Every accepted spelling of a flag, aliases included, underscored and without dashes -> field name."""
    spellings = {}
    for name, hint in get_type_hints(cls, include_extras=True).items():
        marks = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
        if tyro.conf.Positional in marks:
            continue
        aliases = [alias for mark in marks if isinstance(mark, TyroArg) for alias in mark.aliases or ()]
        spellings |= {_underscored(spelling): name for spelling in (name, *aliases)}
    return spellings


def _underscored(flag: str) -> str:
    return flag.lstrip("-").replace("-", "_")


def _has_defaults(cls: type) -> bool:
    return all(field.default is not dataclasses.MISSING for field in dataclasses.fields(cls))


def _options(kind: object) -> tuple[object, ...]:
    """`X | None` -> (X, NoneType), anything else -> (itself,)."""
    return get_args(kind) if type(None) in get_args(kind) else (kind,)


def _is_switch(kind: object) -> bool:
    return bool in _options(kind)


def _spell_out_switches(cls: type, argv: Sequence[str]) -> list[str]:
    """`--flag` and `--no_flag` of every `bool | None` field written with its value, the way tyro reads them."""
    undecided = {name for name, kind in _kinds(cls).items() if _is_switch(kind) and len(_options(kind)) == 2}
    spelled = {name: f"--{name}=True" for name in undecided} | {f"no_{name}": f"--{name}=False" for name in undecided}
    return [spelled.get(_underscored(token), token) if token.startswith("--") else token for token in argv]


def _value(text: str, kind: object, what: str) -> object:
    """`text` as a value of type `kind`. Raises InputError, naming `what` was given it."""
    options = _options(kind)
    if len(options) == 2 and text.lower() in NOTHING:
        return None
    kind = options[0]
    if get_origin(kind) is Literal:
        if text not in get_args(kind):
            raise unknown_name(what, text, get_args(kind))
        return text
    try:
        return TRUTH[text.lower()] if kind is bool else kind(text)
    except (ValueError, KeyError):
        raise InputError(f"{what} must be {ACCEPTED[kind]}, got {text!r}") from None


# ---------------------------------------------------------------- --config file.yaml


class _TextLoader(yaml.BaseLoader):
    """Safe YAML in which every scalar stays the text that was written (1e-5, on, 007), so that the field's own type
    decides what it means; a key written twice and any tag but YAML's own scalars and collections are refused."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> object:
        if node.tag not in PLAIN_TAGS:
            raise InputError(f"{self.name} line {node.start_mark.line + 1}: the tag {node.tag} means nothing here; "
                             "leave it out.")
        return super().construct_object(node, deep)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[str, object]:
        keys = [str(key.value) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise InputError(f"{self.name} line {node.start_mark.line + 1}: {key!r} is given twice; keep one.")
        return super().construct_mapping(node, deep)


def _take_config(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """The path after `--config`, and the other arguments."""
    path, others, tokens = None, [], iter(argv)
    for token in tokens:
        name, _, value = token.partition("=")
        if name != "--config":
            others.append(token)
            continue
        if path is not None:
            raise InputError("--config is given twice; give one file, the command line overrides it.")
        path = value or next(tokens, None)
        if path is None:
            raise InputError("--config needs a value: the path of a YAML file")
    return path, others


def typed_values(given: object, cls: type, where: str) -> dict[str, object]:
    """Field name -> value, from texts under any spelling of the flags. `where` they stand, for the InputError."""
    if not isinstance(given, Mapping):
        raise InputError(f"{where} must hold one `flag: value` per line, got {given!r:.60}")
    kinds, spellings, values = _kinds(cls), _spellings(cls), {}
    for key, text in given.items():
        name = spellings.get(_underscored(key))
        if name is None:
            raise unknown_name(f"flag in {where}:", key, kinds)
        if name in values:
            raise InputError(f"{where} gives {name} twice, the second time as {key!r}; keep one.")
        if not isinstance(text, str):
            raise InputError(f"{where}: {key} must be one value, got a {type(text).__name__}")
        values[name] = _value(text, kinds[name], f"{where}: {key}")
    return values


def load_yaml(path: str, kind: str) -> object:
    """What the file holds, every scalar as text. Raises InputError if there is no such file or it cannot be read."""
    if not Path(path).is_file():
        raise InputError(f"no {kind} {path!r}; give the path of a YAML file.")
    try:
        with open(path, encoding="utf-8") as file:
            return yaml.load(file, Loader=_TextLoader) or {}
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not a YAML file we can read: {error}") from None


# ---------------------------------------------------------------- what went wrong, in one sentence


def _explain(cls: type, argv: Sequence[str]) -> str | None:
    """Why tyro refused `argv`: the first flag that is unknown, lacks its value or has a wrong one. None = not found."""
    kinds, spellings, tokens = _kinds(cls), _spellings(cls), list(argv)
    takes_positionals = len(set(spellings.values())) < len(kinds)
    while tokens:
        flag, has_value, text = tokens.pop(0).partition("=")
        name = _named(flag, spellings, kinds)
        if not flag.startswith("-"):
            if takes_positionals:
                continue
            return f"unexpected argument {flag!r}: every value follows its flag, as in `--flag {flag}`"
        if name is None or not flag.startswith("--"):
            return _unknown_flag(flag, spellings)
        if _is_switch(kinds[name]):
            if has_value or tokens and tokens[0].lower() in TRUTH:
                return f"--{name} is a switch and takes no value; write --{name} or --no_{name}"
        elif not has_value and (not tokens or tokens[0].startswith("--")):
            return f"{flag} needs a value: {_accepted(kinds[name])}"
        else:
            try:
                _value(text if has_value else tokens.pop(0), kinds[name], flag)
            except InputError as error:
                return str(error)
    return None


def _named(flag: str, spellings: Mapping[str, str], kinds: Mapping[str, object]) -> str | None:
    """The field that `--flag` sets, `--no_flag` too if it is a switch."""
    spelled = _underscored(flag)
    name = spellings.get(spelled) or spellings.get(spelled.removeprefix("no_"))
    return name if spelled in spellings or name and _is_switch(kinds[name]) else None


def _accepted(kind: object) -> str:
    kind = _options(kind)[0]
    return ACCEPTED.get(kind, "a text") if get_origin(kind) is not Literal else f"one of {', '.join(get_args(kind))}"


def _unknown_flag(flag: str, spellings: Mapping[str, str]) -> str:
    nearest = difflib.get_close_matches(_underscored(flag), [*spellings, "config", "help"], n=1)
    hint = f"did you mean --{nearest[0]}? " if nearest else ""
    return f"unknown flag {flag!r}; {hint}--help lists every flag."


def _unboxed(complaint: str) -> str:
    """tyro's own words without the frame around them and without what follows its first rule."""
    lines = [re.sub(r"[│╭╰─╮╯]+", " ", line).strip() if "───" not in line else "\0" for line in complaint.splitlines()]
    words = " ".join("\n".join(lines).strip("\0\n ").split("\0")[0].split())
    return words or "the command line could not be read; --help lists every flag."
