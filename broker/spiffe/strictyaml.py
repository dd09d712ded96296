"""YAML, read: what JSON could say and nothing more. Files that people write by hand, and JSON, which is YAML too."""

from typing import Any, Final

import yaml
from typing_extensions import override

MAX_DEPTH: Final = 8
"""Deepest nesting unless the caller says otherwise: what is written by hand is flat."""


class NotYaml(ValueError):
    """The text is not such YAML; ``place`` says where, beginning with a space, or is empty."""

    def __init__(self, place: str) -> None:
        """Carry the place."""
        super().__init__(place)
        self.place = place


def read_yaml(text: str, *, max_depth: int = MAX_DEPTH) -> Any:
    """Give the value of the one document in a text; raises NotYaml."""
    try:
        loader = _Loader(text)
        loader.max_depth = max_depth
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        raise NotYaml(f" at line {mark.line + 1}" if mark is not None else "") from None


class _Loader(yaml.SafeLoader):
    """YAML that means what JSON could say: no aliases, no name twice, times as text."""

    _depth = 0
    max_depth = MAX_DEPTH
    yaml_implicit_resolvers = {  # noqa: RUF012 - as the class above has it
        first: [(tag, pattern) for tag, pattern in found if tag != "tag:yaml.org,2002:timestamp"]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    @override
    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("an alias")
        self._depth += 1
        if self._depth > self.max_depth:
            raise yaml.YAMLError("too deep")
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    @override
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [name.value for name, _ in node.value if name.tag == "tag:yaml.org,2002:str"]
        if len(set(names)) != len(node.value):
            raise yaml.YAMLError("a name twice, or one that is no text")
        return super().construct_mapping(node, deep)
