"""Reads a settings file of spiffe-helper, and gives the ``broker svid watch`` that does the same. Pure: text in, words out.

The file is HCL 1; here its part that spiffe-helper uses: names with strings, numbers, booleans, lists and objects, blocks,
comments. Sources: HCL 1's specification, spiffe-helper's README. What has no counterpart is named, never dropped in silence.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from broker.errors import Invalid

MAX_BYTES: Final = 64 * 1024  # of the file: a hundred times what a real one has
MAX_DEPTH: Final = 4  # of lists and objects; a real one has two

_TOKEN: Final = re.compile(
    r"""[ \t\r\n,]*(?:\#[^\n]*|//[^\n]*|/\*.*?\*/|(?P<name>[A-Za-z_][A-Za-z0-9_-]*)|(?P<number>-?[0-9][0-9A-Za-z.]*)"""
    r"""|(?P<text>"(?:[^"\\\n]|\\["\\nrt])*")|(?P<mark>[=:{}\[\]])|(?P<end>\Z))""",
    re.DOTALL | re.ASCII,
)
_ARGUMENT: Final = re.compile(r'(?:"(?P<quoted>(?:[^"]|"")*)"|(?P<plain>[^ "]*))(?: |\Z)')
_CAMEL: Final = re.compile(r"(?<=[a-z0-9])(?=[A-Z])", re.ASCII)


@dataclass(slots=True)
class Equivalent:
    """The words after ``broker svid watch``, and what the file says that they do not."""

    words: list[str] = field(default_factory=list)
    program: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def argv(self) -> list[str]:
        """The whole command."""
        return ["broker", "svid", "watch", *self.words, *(["--", *self.program] if self.program else [])]


def read(text: str) -> dict[str, Any]:
    """Read the file; raises Invalid (``bad_helper_conf``) with the line."""
    if len(text.encode()) > MAX_BYTES:
        raise Invalid(f"more than {MAX_BYTES} bytes are no settings of spiffe-helper", code="bad_helper_conf")
    reader = _Reader(text)
    found = reader.members(0, "end")
    return {_CAMEL.sub("_", name).lower(): value for name, value in found.items()}


def equivalent(conf: Mapping[str, Any]) -> Equivalent:
    """Give the command; raises Invalid for a value of the wrong kind."""
    made = Equivalent()
    left = dict(conf)
    for name, put in _SIMPLE.items():
        if name in left:
            put(made, name, left.pop(name))
    _put_files(made, conf)
    _put_tokens(made, left.pop("jwt_svids", []))
    _put_program(made, left)
    _put_health(made, left.pop("health_checks", {}))
    made.notes += [f"{name}: there is no such setting here" for name in sorted(left)]
    return made


_Put = Callable[[Equivalent, str, object], None]


class _Reader:
    """One pass over the text, one word ahead."""

    def __init__(self, text: str) -> None:
        self._text, self._at = text, 0
        self._words = self._scan()
        self.kind, self.word = next(self._words)

    def _scan(self) -> Iterator[tuple[str, str]]:
        while True:
            match = _TOKEN.match(self._text, self._at)
            if match is None:
                raise self.wrong("this is not understood")
            self._at = match.end()
            if match.lastgroup is not None:
                yield match.lastgroup, match[match.lastgroup]

    def wrong(self, what: str) -> Invalid:
        line = self._text.count("\n", 0, self._at) + 1
        return Invalid(f"line {line}: {what}", code="bad_helper_conf", hint="it is read as spiffe-helper's HCL")

    def next(self) -> str:
        word = self.word
        if self.kind != "end":
            self.kind, self.word = next(self._words)
        return word

    def members(self, depth: int, end: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        while (self.kind if end == "end" else self.word) != end:
            if self.kind not in {"name", "text"}:
                raise self.wrong("a name is expected")
            name = self._name()
            if name in found:
                raise self.wrong(f"{name} stands there twice")
            if self.kind == "mark" and self.word in "=:":
                self.next()
            elif self.word != "{":
                raise self.wrong(f"{name} has no value")
            found[name] = self.value(depth + 1)
        return found

    def _name(self) -> str:
        quoted = self.kind == "text"
        word = self.next()
        return str(json.loads(word)) if quoted else word

    def value(self, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise self.wrong("too deep")
        kind, word = self.kind, self.word
        if (kind, word) == ("mark", "{"):
            self.next()
            found = self.members(depth, "}")
            self.next()
            return found
        if (kind, word) == ("mark", "["):
            return self._list(depth)
        self.next()
        if kind == "text":
            return json.loads(word)
        if kind == "name" and word in {"true", "false"}:
            return word == "true"
        if kind == "number" and re.fullmatch(r"0[0-7]+|0x[0-9a-fA-F]{1,8}|-?(0|[1-9][0-9]{0,9})", word):
            return int(word, 8) if re.fullmatch(r"0[0-7]+", word) else int(word, 0)
        raise self.wrong("a value is expected")

    def _list(self, depth: int) -> list[Any]:
        self.next()
        found = []
        while self.word != "]" or self.kind != "mark":
            if self.kind == "end":
                raise self.wrong("the list does not end")
            found.append(self.value(depth + 1))
        self.next()
        return found


def _of(kind: type, name: str, value: object) -> Any:
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        words = {str: "text", int: "a number", bool: "true or false", list: "a list", dict: "a block"}
        raise Invalid(f"{name} is {words[kind]}", code="bad_helper_conf")
    return value


def _text(option: str, before: str = "") -> "_Put":
    def put(made: Equivalent, name: str, value: object) -> None:
        if text := _of(str, name, value):
            made.words += [option, before + text]

    return put


def _mode(option: str) -> "_Put":
    def put(made: Equivalent, name: str, value: object) -> None:
        made.words += [option, f"{_of(int, name, value):04o}"]

    return put


def _flag(option: str, *, when: bool = True) -> "_Put":
    def put(made: Equivalent, name: str, value: object) -> None:
        if _of(bool, name, value) is when:
            made.words.append(option)

    return put


_SIMPLE: Final[Mapping[str, _Put]] = {
    "agent_address": _text("--socket", "unix://"),
    "cert_dir": _text("--dir"),
    "svid_file_name": _text("--svid-file"),
    "svid_key_file_name": _text("--key-file"),
    "svid_bundle_file_name": _text("--bundle-file"),
    "jwt_bundle_file_name": _text("--jwt-bundle-file"),
    "hint": _text("--hint"),
    "cert_file_mode": _mode("--cert-mode"),
    "key_file_mode": _mode("--key-mode"),
    "jwt_svid_file_mode": _mode("--jwt-svid-mode"),
    "jwt_bundle_file_mode": _mode("--jwt-bundle-mode"),
    "add_intermediates_to_bundle": _flag("--add-intermediates-to-bundle"),
    "include_federated_domains": _flag("--include-federated-domains"),
    "omit_expired": _flag("--omit-expired"),
    "daemon_mode": _flag("--once", when=False),
}
_X509: Final = ("svid_file_name", "svid_key_file_name", "svid_bundle_file_name")


def _put_files(made: Equivalent, conf: Mapping[str, Any]) -> None:
    if not conf.get("cert_dir"):
        made.words += ["--dir", "."]
    missing = [name for name in _X509 if not conf.get(name)]
    if len(missing) == len(_X509):
        made.words.append("--no-x509")
    elif missing:
        made.notes.append(f"{', '.join(missing)}: not set; the file has its usual name here")


def _put_tokens(made: Equivalent, tokens: object) -> None:
    for one in _of(list, "jwt_svids", tokens):
        token = {_CAMEL.sub("_", name).lower(): value for name, value in _of(dict, "jwt_svids", one).items()}
        file = _of(str, "jwt_svid_file_name", token.pop("jwt_svid_file_name", ""))
        more = _of(list, "jwt_extra_audiences", token.pop("jwt_extra_audiences", []))
        for audience in (token.pop("jwt_audience", ""), *more):
            made.words += ["--jwt-svid", file, _of(str, "jwt_audience", audience)]
        made.notes += [f"jwt_svids: {name}: there is no such setting here" for name in sorted(token)]


def _put_program(made: Equivalent, left: dict[str, Any]) -> None:
    command = _of(str, "cmd", left.pop("cmd", ""))
    arguments = _of(str, "cmd_args", left.pop("cmd_args", ""))
    signal = _of(str, "renew_signal", left.pop("renew_signal", ""))
    pid_file = _of(str, "pid_file_name", left.pop("pid_file_name", ""))
    if signal and (command or pid_file):
        made.words += ["--renew-signal", signal]
    elif signal:
        made.notes.append("renew_signal: nobody is to get it")
    if pid_file:
        made.words += ["--pid-file", pid_file]
        if not signal:
            made.notes.append("pid_file_name: needs a renew_signal")
    if command:
        made.program = [command, *_split(arguments)]


def _split(arguments: str) -> list[str]:
    """Cut as spiffe-helper does, by encoding/csv with a space: a quoted word may hold spaces, and a quote twice."""
    found, at = [], 0
    while at < len(arguments):
        match = _ARGUMENT.match(arguments, at)
        if match is None:
            raise Invalid("cmd_args: a quote stands where none may be", code="bad_helper_conf")
        at = match.end()
        quoted, plain = match["quoted"], match["plain"]
        if quoted is not None or plain:
            found.append(plain or (quoted or "").replace('""', '"'))
    return found


def _put_health(made: Equivalent, checks: object) -> None:
    block = {_CAMEL.sub("_", name).lower(): value for name, value in _of(dict, "health_checks", checks).items()}
    enabled = _of(bool, "listener_enabled", block.pop("listener_enabled", False))
    port = _of(int, "bind_port", block.pop("bind_port", 8081))
    host = _of(str, "bind_address", block.pop("bind_address", ""))
    if enabled:
        made.words += ["--health", f"{host}:{port}" if host else str(port)]
    for name, usual in (("liveness_path", "/live"), ("readiness_path", "/ready")):
        if (path := block.pop(name, usual)) != usual:
            made.notes.append(f"health_checks: {name} {path}: it is {usual} here")
    made.notes += [f"health_checks: {name}: there is no such setting here" for name in sorted(block)]
