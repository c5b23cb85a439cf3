"""Single facts out of the settings files that lie beside published weights.

No YAML is parsed: its aliases and merges can grow without bound, and one number a file is all that is needed.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from dalle.files import read_json

MAX_BYTES = 2**16  # of a settings file


def yaml_number(path: Path, key: str) -> int:
    """Return the whole number that a YAML file gives `key`; ValueError where there is none, or there are several."""
    try:
        with path.open("rb") as file:
            text = file.read(MAX_BYTES + 1).decode()
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not text") from None
    found = {
        int(number) for number in re.findall(rf"^\s*{key}:\s*(\d{{1,9}})\s*(?:#.*)?$", text, re.MULTILINE)
    }
    if len(text) > MAX_BYTES or len(found) != 1:
        raise ValueError(
            f"{path} has {'no' if not found else 'more than one'} {key}: it is not the model's config.yaml"
        )
    return found.pop()


def json_settings(path: Path) -> dict[str, Any]:
    """Return a JSON object; ValueError for another file."""
    if path.is_file() and path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path} is larger than {MAX_BYTES:,} bytes: no settings")
    tree = read_json(path)
    if not isinstance(tree, dict):
        raise ValueError(f"{path} holds no settings")
    return tree
