"""Settings in YAML, which people write more easily than JSON."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, TypeVar

from sparsenet.extras import require
from sparsenet.files import parse_json, readable

T = TypeVar("T")

FLOAT = "tag:yaml.org,2002:float"
POWER = re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+$")  # 1e-3, which YAML 1.1 takes for a text


def read_yaml(file: Path, kind: type[T], limit: int) -> T:
    """Reads a YAML file as ``files.read_json`` reads JSON, and what JSON cannot say is refused.

    So are keys that come twice, of which one would be lost, and references, by which a short file
    can stand for more than any memory holds.
    """
    yaml = require("yaml", "train")
    data = readable(file, limit)
    try:
        text = json.dumps(yaml.load(data, Loader=_loader(yaml)), allow_nan=False)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or error
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        raise ValueError(f"{file}: expected YAML, found: {problem}{where}") from None
    return parse_json(text, kind, str(file))


def _loader(yaml: Any) -> type:
    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise yaml.MarkedYAMLError(
                    problem="a reference", problem_mark=self.peek_event().start_mark
                )
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen: set[str] = set()
            for key, _ in node.value:
                problem = ""
                if not isinstance(key.value, str):
                    problem = "a key that is no name"
                elif key.value in seen:
                    problem = f"{key.value!r} for a second time"
                if problem:
                    raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
                seen.add(key.value)
            return super().construct_mapping(node, deep)

    Loader.add_implicit_resolver(FLOAT, POWER, list("-+0123456789"))
    return Loader
