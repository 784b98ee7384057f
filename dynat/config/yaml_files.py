"""The one reader of YAML: params.yaml and dvc.lock as DVC has them, by the rules of YAML 1.2.

So ``1e-3`` is a number, ``010`` is ten and ``yes`` is a word, which YAML 1.1, PyYAML's own, reads otherwise.
"""

import re
from typing import Any

import yaml

SCALARS = {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?[0-9]{1,300}",
    "float": r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan",
}


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """In C where PyYAML has it; a key that stands twice is an error."""

    yaml_implicit_resolvers: dict[str, Any] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        if len(mapping) < len(node.value):
            keys = [self.construct_object(key) for key, _ in node.value]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise yaml.YAMLError(f"{twice!r} stands there twice")
        return mapping


for _name, _pattern in SCALARS.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_pattern})$"), None)
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(loader.construct_scalar(node)))


def parse(text: str, anchors: bool = True) -> Any:
    """The content of a YAML document.

    Raises ``ValueError``, one line that names the place, for what is no YAML, a key that stands twice, a tag
    of Python's, and for anchors unless they are allowed.
    """
    try:
        for event in () if anchors else yaml.parse(text, _Loader):
            if name := getattr(event, "anchor", None):  # `dvc exp run -S` would change all its places
                raise ValueError(f"write out the value of the anchor {name!r}")
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, KeyError) as error:  # KeyError: a word tagged !!bool
        raise ValueError(" ".join(str(error).split())) from None
