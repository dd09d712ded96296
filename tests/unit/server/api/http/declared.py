"""Holds real answers against the OpenAPI document: the status must be declared, and the body must have the declared shape."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import httpx2
from jsonschema import Draft202012Validator
from referencing import Registry
from referencing.jsonschema import DRAFT202012

HERE = "urn:openapi"


class Declared:
    """One document, ready to judge."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        self.document = document
        self._registry: Registry[Any] = Registry().with_resource(HERE, DRAFT202012.create_resource(document))
        self._paths = {
            path: re.compile(re.sub(r"\{[a-z_]+\}", "[^/]+", re.sub(r"\.", r"\\.", path))) for path in document["paths"]
        }

    def operation(self, method: str, path: str) -> Mapping[str, Any] | None:
        for declared, shape in self._paths.items():
            if shape.fullmatch(path):
                found: Mapping[str, Any] | None = self.document["paths"][declared].get(method.lower())
                return found
        return None

    def judge(self, response: httpx2.Response, *, strictly: bool = False) -> bool:
        """Raise unless the answer is declared; False for one that no operation gave. ``strictly``: no member more."""
        operation = self.operation(response.request.method, response.request.url.path)
        if operation is None or response.status_code == 405:
            return False
        answers = operation["responses"]
        assert str(response.status_code) in answers, (response.status_code, sorted(answers), response.text)
        content = answers[str(response.status_code)].get("content", {})
        if not content:
            assert response.content == b"", response.text
            return True
        kind = response.headers["content-type"].partition(";")[0]
        assert kind in content, (kind, sorted(content))
        body = response.json() if kind.endswith("json") else response.text
        schema = content[kind]["schema"]
        self._validate(body, schema)
        if strictly and isinstance(body, dict) and (known := set(self._members(schema))):
            assert set(body) <= known, set(body) - known
        return True

    def _validate(self, body: Any, schema: Mapping[str, Any]) -> None:
        pointed = {"$ref": HERE + schema["$ref"]} if "$ref" in schema else schema
        Draft202012Validator(pointed, registry=self._registry).validate(body)

    def _members(self, schema: Mapping[str, Any]) -> Iterator[str]:
        if "$ref" in schema:
            schema = self.document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
        if schema.get("additionalProperties") is True:
            return
        yield from schema.get("properties", ())
        for one in schema.get("oneOf", ()):
            yield from self._members(one)
