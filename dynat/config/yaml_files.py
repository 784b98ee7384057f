"""The one reader of YAML: params.yaml and dvc.lock as DVC has them, by the rules of YAML 1.2.

So ``1e-3`` is a number, ``010`` is ten and ``yes`` is a word, which YAML 1.1, PyYAML's own, reads otherwise.
"""

import re
from collections.abc import Hashable
from typing import Any

import yaml

MAX_DEPTH = 100  # libyaml composes recursively: far deeper nesting would overflow the stack
FLOAT = r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan"
SCALARS = {  # pattern, and its first characters
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?[0-9]{1,300}", list("-+0123456789")),
    "float": (FLOAT, list("-+.0123456789")),
}


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Plain values, lists and mappings, in C where PyYAML has it; a key that stands twice is an error."""

    yaml_implicit_resolvers: dict[str, Any] = {}
    yaml_constructors = {
        tag: construct
        for tag, construct in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.rsplit(":")[-1] in (*SCALARS, "str", "seq", "map")
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        mapping: dict[Hashable, Any] = super().construct_mapping(node, deep)
        if len(mapping) < len(node.value):
            keys = [self.construct_object(key) for key, _ in node.value]
            index = next(i for i, key in enumerate(keys) if key in keys[:i])
            mark = node.value[index][0].start_mark
            raise yaml.constructor.ConstructorError(None, None, f"{keys[index]!r} stands there twice", mark)
        return mapping


for _name, (_pattern, _first) in SCALARS.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_pattern})$"), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(loader.construct_scalar(node)))


def parse(text: str, anchors: bool = True) -> Any:
    """The content of a YAML document.

    Raises ``ValueError``, one line that names the line of the file, for what is no YAML, a key that stands
    twice, a tag of Python's, deep nesting, and for anchors and aliases unless they are allowed.
    """
    event: Any
    depth = 0
    try:
        for event in yaml.parse(text, _Loader):
            line = event.start_mark.line + 1
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH:
                raise ValueError(f"line {line}: is nested too deeply")
            if not anchors and getattr(event, "anchor", None) is not None:
                raise ValueError(
                    f"line {line}: write the values out instead of the anchor or alias {event.anchor!r}, "
                    f"which `dvc exp run -S` does not keep apart"
                )
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ValueError(f"line {line}: {error.problem or 'is not YAML'}") from None
    except (yaml.YAMLError, KeyError) as error:  # KeyError: a word tagged !!bool
        raise ValueError(" ".join(str(error).split())) from None
