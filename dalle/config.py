"""Settings: one strict schema base, TOML presets, `a.b=c` overrides, and one clear line for every mistake.

Source: TOML 1.0 (toml.io). A "tree" is nested mappings, as TOML and JSON give them; a "key" is a dotted path.
"""

import difflib
import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import ErrorDetails

MAX_SHOWN = 60  # characters of a wrong value that an error line repeats


class Config(BaseModel):
    """Base of every schema: frozen, no unknown keys, no conversion but int to float and list to tuple."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=()
    )

    @model_validator(mode="before")
    @classmethod
    def _accept_lists(cls, tree: Any) -> Any:
        return _plain(tree)


C = TypeVar("C", bound=Config)


def load_preset(name: str) -> dict[str, Any]:
    """Read a preset's tree by its name in `dalle/presets`, or from the path of a .toml file.

    Raises ValueError for an unknown name (the line lists the presets) and for a file missing or not TOML.
    """
    presets = _presets()
    if name in presets:
        return read_toml(presets[name], f"preset {name}")
    if name.endswith(".toml"):
        return read_toml(Path(name), name)
    near = difflib.get_close_matches(name, presets, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    known = ", ".join(presets) or "none"
    raise ValueError(f"preset {_show(name)} is not known{hint}: use {known}, or the path of a .toml file")


def override(tree: Mapping[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """Return a copy of `tree` with each `a.b=c` set in turn; c is none or null, a value as in TOML, or else text.

    Raises ValueError for an assignment without a key or `=`, and for a path that runs through a plain value.
    Whether the keys exist is for `validate` to say.
    """
    result: dict[str, Any] = _plain(tree)
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        parts = [part.strip() for part in key.split(".")]
        if not equals or not all(parts):
            raise ValueError(f"cannot read the setting {_show(assignment)}: write it as table.key=value")
        table = result
        for depth, part in enumerate(parts[:-1], start=1):
            table = table.setdefault(part, {})
            if not isinstance(table, dict):
                through = _dotted(parts[:depth])
                raise ValueError(f"cannot set {_dotted(parts)}: {through} is {_show(table)}, not a table")
        table[parts[-1]] = _toml_value(text.strip())
    return result


def validate(schema: type[C], tree: Mapping[str, Any], source: str) -> C:
    """Check `tree` against `schema` and return the frozen record; `source` names where the tree came from.

    Raises ValueError, always one line: each wrong key with its value and what is allowed; or, where keys are
    unknown, only those, each with the nearest valid key (a misspelt key is a missing one too: say it once).
    """
    plain = _plain(tree)
    try:
        return schema.model_validate(plain)
    except ValidationError as error:
        details = error.errors(include_url=False)
    problems = _problems(schema, plain, details)
    shown = "; ".join(dict.fromkeys(problems[:3]))
    more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
    raise ValueError(f"{source}: {shown}{more}")


def explain(schema: type[Config], tree: Mapping[str, Any], error: ValidationError) -> tuple[str, str]:
    """Return the first key at fault in what `schema` refused, and one line about it, as `validate` would write it."""
    plain, details = _plain(tree), error.errors(include_url=False)
    first = next((detail for detail in details if detail["type"] == "extra_forbidden"), details[0])
    path = _path(plain, first)
    return str(path[0]) if path else "", _problems(schema, plain, details)[0]


def _problems(schema: type[Config], plain: Any, details: Sequence[ErrorDetails]) -> list[str]:
    unknown = [detail for detail in details if detail["type"] == "extra_forbidden"]
    if unknown:
        return [_unknown_key(schema, _path(plain, detail)) for detail in unknown]
    return _wrong_values(plain, details)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """List the keys where two trees differ: `dvae.n_codes: 64 -> 128`; `absent` where a side lacks it."""
    return list(_differences(_plain(old), _plain(new), ()))


def _plain(value: Any) -> Any:
    """Copy a tree with every mapping a dict and every list a tuple, so that frozen records hold no lists."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return tuple(_plain(item) for item in value)
    return value


def _presets() -> dict[str, Traversable]:
    folder = _preset_folder()
    if not folder.is_dir():
        return {}
    files = [file for file in folder.iterdir() if file.name.endswith(".toml")]
    return {file.name.removesuffix(".toml"): file for file in sorted(files, key=lambda file: file.name)}


def _preset_folder() -> Traversable:
    return resources.files("dalle") / "presets"


def read_toml(file: Traversable, source: str) -> dict[str, Any]:
    """Read a TOML file's tree; ValueError, one line that begins with `source`, when it is missing or not TOML."""
    try:
        text = file.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{source}: not valid TOML: byte {error.start} is not UTF-8 text") from None
    except OSError as error:
        raise ValueError(f"{source}: cannot read the file: {error.strerror}") from None
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError(f"{source}: not valid TOML: nested too deeply") from None
    except ValueError as error:
        at = re.fullmatch(r"(.*) \(at (?:line (\d+), column \d+|end of document)\)", str(error), re.DOTALL)
        reason, line = (at[1], at[2]) if at else (str(error), None)
        place = f"line {line or len(text.splitlines())}: " if at else ""
        raise ValueError(f"{source}: not valid TOML: {place}{' '.join(reason.split())}") from None


def _toml_value(text: str) -> Any:
    if text in ("none", "null"):  # TOML has no word for it; in quotes they are text
        return None
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    # Text with a line break can hold further keys: then it is no single value.
    return _plain(parsed["value"]) if parsed.keys() == {"value"} else text


def _unknown_key(schema: type[Config], path: Sequence[str | int]) -> str:
    keys = list(_keys(schema))
    key = _dotted(path)
    # A right name in a wrong table comes first where the tables are alike: transformer.steps, transformer_training.steps.
    namesakes = [valid for valid in keys if valid.split(".")[-1] == path[-1]]
    table = str(path[0])
    near = [name for name in namesakes if name.startswith(table) or table.startswith(name.split(".")[0])]
    near = near or difflib.get_close_matches(key, keys, n=1) or namesakes
    if near:
        return f"{key} is not a setting; did you mean {near[0]}?"
    return f"{key} is not a setting; the settings are {', '.join(schema.model_fields)}"


def _keys(schema: type[Config], prefix: str = "") -> Iterator[str]:
    for name, field in schema.model_fields.items():
        yield prefix + name
        for nested in _nested(field.annotation):
            yield from _keys(nested, f"{prefix}{name}.")


def _nested(annotation: Any) -> Iterator[type[Config]]:
    """Find the schemas inside an annotation such as `Inner | None`; a dict has none, its keys are free."""
    if isinstance(annotation, type) and issubclass(annotation, Config):
        yield annotation
    elif get_origin(annotation) is not dict:
        for argument in get_args(annotation):
            yield from _nested(argument)


def _path(tree: Any, detail: ErrorDetails) -> tuple[str | int, ...]:
    """Keep the keys and indexes of an error's location; pydantic also puts the branches of unions there."""
    path: list[str | int] = []
    for position, part in enumerate(detail["loc"], start=1):
        is_key = isinstance(tree, dict) and part in tree
        if is_key or (isinstance(tree, tuple) and isinstance(part, int) and part < len(tree)):
            tree = tree[part]
        elif not (detail["type"] == "missing" and position == len(detail["loc"])):
            continue
        path.append(part)
    return tuple(path)


# What pydantic calls these, in words of TOML.
_EXPECTED = {
    "int_type": "must be an integer",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "string_type": "must be text in quotes",
    "tuple_type": "must be a list",
    "dict_type": "must be a table",
    "model_type": "must be a table",
}


def _wrong_values(tree: Any, details: Sequence[ErrorDetails]) -> list[str]:
    by_path: dict[tuple[str | int, ...], list[ErrorDetails]] = {}  # the branches of a union share a path
    for detail in details:
        by_path.setdefault(_path(tree, detail), []).append(detail)
    problems = []
    for path, group in by_path.items():
        expected = list(dict.fromkeys(_expected(detail) for detail in group))
        text = ", or ".join([expected[0], *(item.removeprefix("must be ") for item in expected[1:])])
        value = group[0]["input"]
        if group[0]["type"] == "missing":
            problems.append(f"{_dotted(path)} is missing")
        elif not path:
            problems.append(text)
        elif isinstance(value, dict | Config):  # a whole table would drown the message
            problems.append(f"{_dotted(path)}: {text}")
        else:
            problems.append(f"{_dotted(path)} = {_show(value)}: {text}")
    return problems


def _expected(detail: ErrorDetails) -> str:
    if detail["type"] in _EXPECTED:
        return _EXPECTED[detail["type"]]
    message = detail["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    return " ".join(message.replace("Input should be", "must be").split())


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], above: tuple[str, ...]) -> Iterator[str]:
    for key in dict.fromkeys([*old, *new]):
        path = (*above, key)
        if key not in old:
            yield f"{_dotted(path)}: absent -> {_show(new[key])}"
        elif key not in new:
            yield f"{_dotted(path)}: {_show(old[key])} -> absent"
        elif isinstance(old[key], dict) and isinstance(new[key], dict):
            yield from _differences(old[key], new[key], path)
        elif old[key] != new[key]:
            yield f"{_dotted(path)}: {_show(old[key])} -> {_show(new[key])}"


def _dotted(path: Sequence[str | int]) -> str:
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            name = part if re.fullmatch(r"[\w-]+", part) else _show(part)
            text += f".{name}" if text else name
    return text


def _show(value: Any) -> str:
    """Write a value as TOML or JSON would, on one line, shortened."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    text = text if text.isprintable() else json.dumps(value, default=str)
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."
