"""What the expression of a generated column says about its vectors: `pgml.embed` around one column, or a refusal.

Reads what `pg_get_expr` prints with nothing but pg_catalog on the search path, by a small grammar:

    vector = pgml.embed(model, text [, kwargs]) | pgml.normalize_l2(vector) | vector::type of vectors
    text   = column | 'literal' || column | text::text
    model, kwargs = 'literal'::type

each in any number of parentheses, arguments also by name. Whatever else there is decides a vector in a way that is not
known here, and is refused with the reason: a guess would pass for the user's model. No I/O.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

VECTOR_TYPES = ("real[]", "double precision[]", "vector", "halfvec")

IGNORED = ("device", "batch_size", "show_progress_bar")
"""Keyword arguments that do not decide the vector."""


class NotUnderstood(Exception):
    """The expression is not one of ours; the message says what stands against it."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How the vectors were made: of the text in `column`, with `prompt` before it.

    `normalize` None: the expression does not say, and it depends on whose function it calls.
    """

    transformer: str
    column: str
    prompt: str = ""
    normalize: bool | None = None
    trust_remote_code: bool = False


def read(expression: str) -> Recipe:
    """What `expression` says. Raises NotUnderstood."""
    return _vector(_Parser(expression).whole())


@dataclass(frozen=True, slots=True)
class _Literal:
    value: str


@dataclass(frozen=True, slots=True)
class _Column:
    name: str


@dataclass(frozen=True, slots=True)
class _Cast:
    inner: _Node
    type: str


@dataclass(frozen=True, slots=True)
class _Joined:
    left: _Node
    right: _Node


@dataclass(frozen=True, slots=True)
class _Call:
    name: str
    arguments: tuple[tuple[str | None, _Node], ...]


_Node = _Literal | _Column | _Cast | _Joined | _Call

_TOKEN = re.compile(
    r"""\s*(?:(?P<string>E?'(?:[^']|'')*')|(?P<quoted>"(?:[^"]|"")+")|(?P<word>[^\W\d][\w$]*)|(?P<number>\d+)"""
    r"""|(?P<sign>::|\|\||=>|[()\[\],.]))"""
)


def _tokens(text: str) -> Iterator[tuple[str, str]]:
    at = 0
    while text[at:].strip():
        match = _TOKEN.match(text, at)
        if match is None:
            raise NotUnderstood(f"{text[at:].split()[0]} is not understood")
        kind = match.lastgroup or ""
        yield kind, match[kind]
        at = match.end()


class _Parser:
    """Recursive descent; every method reads one thing, and raises NotUnderstood where something else stands."""

    def __init__(self, text: str) -> None:
        self._tokens = [*_tokens(text), ("end", "")]
        self._at = 0

    def whole(self) -> _Node:
        node = self._joined()
        if self._kind != "end":
            raise NotUnderstood(f"{self._value} is not understood where it stands")
        return node

    @property
    def _kind(self) -> str:
        return self._tokens[self._at][0]

    @property
    def _value(self) -> str:
        return self._tokens[self._at][1]

    def _next(self) -> str:
        self._at += 1
        return self._tokens[self._at - 1][1]

    def _is(self, sign: str, ahead: int = 0) -> bool:
        return self._tokens[min(self._at + ahead, len(self._tokens) - 1)] == ("sign", sign)

    def _expect(self, sign: str) -> None:
        if not self._is(sign):
            raise NotUnderstood(f"{self._value or 'its end'} is not understood where {sign} was to come")
        self._next()

    def _joined(self) -> _Node:
        node = self._cast()
        while self._is("||"):
            self._next()
            node = _Joined(node, self._cast())
        return node

    def _cast(self) -> _Node:
        node = self._primary()
        while self._is("::"):
            self._next()
            node = _Cast(node, self._type())
        return node

    def _primary(self) -> _Node:
        if self._is("("):
            self._next()
            node = self._joined()
            self._expect(")")
            return node
        if self._kind == "string":
            return _Literal(_string(self._next()))
        name = self._name()
        while self._is("."):
            self._next()
            name += "." + self._name()
        if not self._is("("):
            return _Column(name)
        self._next()
        arguments: list[tuple[str | None, _Node]] = []
        while not self._is(")"):
            if arguments:
                self._expect(",")
            label = None
            if self._kind in ("word", "quoted") and self._is("=>", 1):
                label = self._name()
                self._next()
            arguments.append((label, self._joined()))
        self._next()
        return _Call(name, tuple(arguments))

    def _name(self) -> str:
        if self._kind == "quoted":
            return self._next()[1:-1].replace('""', '"')
        if self._kind != "word":
            raise NotUnderstood(f"{self._value or 'its end'} is not understood where a name was to come")
        return self._next()

    def _type(self) -> str:
        """Without schema and without what stands in parentheses: `public.vector(384)` is vector."""
        words = [self._name()]
        if self._is("."):
            self._next()
            words = [self._name()]
        while self._kind == "word":
            words.append(self._next())
        if self._is("("):
            while not self._is(")"):
                if self._kind == "end":
                    raise NotUnderstood("its end is not understood where ) was to come")
                self._next()
            self._next()
            words[-1] += "(…)" if words != ["vector"] and words != ["halfvec"] else ""
        name = " ".join(words)
        while self._is("["):
            self._next()
            self._expect("]")
            name += "[]"
        return name


def _string(token: str) -> str:
    """The server prints E'' where there is a backslash, and doubles it."""
    if token.startswith("E"):
        return token[2:-1].replace("''", "'").replace("\\\\", "\\")
    return token[1:-1].replace("''", "'")


def _vector(node: _Node) -> Recipe:
    match node:
        case _Cast(inner, type):
            if type not in VECTOR_TYPES:
                raise NotUnderstood(f"the vector is cast to {type}")
            return _vector(inner)
        case _Call("pgml.normalize_l2", arguments):
            return replace(_vector(_arguments("pgml.normalize_l2", arguments, ("vector",))["vector"]), normalize=True)
        case _Call("pgml.embed", arguments):
            return _embed(_arguments("pgml.embed", arguments, ("transformer", "text", "kwargs")))
        case _Call(name, _):
            raise NotUnderstood(f"the vector goes through {name}")
        case _:
            raise NotUnderstood("the vector is not simply what pgml.embed gives")


def _arguments(function: str, given: tuple[tuple[str | None, _Node], ...], names: tuple[str, ...]) -> dict[str, _Node]:
    found: dict[str, _Node] = {}
    for position, (label, node) in enumerate(given):
        name = label if label is not None else names[position] if position < len(names) else "one argument too many"
        if name not in names:
            raise NotUnderstood(f"{function} is called with {name}")
        found[name] = node
    if missing := [name for name in names if name not in found and name != "kwargs"]:
        raise NotUnderstood(f"{function} is called without {', '.join(missing)}")
    return found


def _embed(arguments: dict[str, _Node]) -> Recipe:
    transformer = _literal(arguments["transformer"], "the model")
    prefix, column = _text(arguments["text"])
    prompt, normalize, trusted = "", None, False
    for name, value in _kwargs(arguments.get("kwargs")).items():
        match name, value:
            case "prompt", str():
                prompt = value
            case "normalize_embeddings", bool():
                normalize = value
            case "trust_remote_code", bool():
                trusted = value
            case _ if name not in IGNORED:
                raise NotUnderstood(f"kwargs hold {json.dumps(name)}: {json.dumps(value)}")
    return Recipe(transformer, column, prompt + prefix, normalize, trusted)


def _literal(node: _Node, what: str) -> str:
    while isinstance(node, _Cast):
        node = node.inner
    if not isinstance(node, _Literal):
        raise NotUnderstood(f"{what} is not a literal")
    return node.value


def _kwargs(node: _Node | None) -> dict[str, Any]:
    if node is None:
        return {}
    try:
        found = json.loads(_literal(node, "kwargs"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise NotUnderstood("kwargs are not a JSON object")
    return found


def _text(node: _Node) -> tuple[str, str]:
    """What is put before the text, and its column."""
    match node:
        case _Column(name):
            if "." in name:
                raise NotUnderstood(f"the text is {name}")
            return "", name
        case _Cast(inner, "text"):
            return _text(inner)
        case _Cast(_, type):
            raise NotUnderstood(f"the text is cast to {type}")
        case _Joined(left, right):
            return _joined(left, right)
        case _Call(name, _):
            raise NotUnderstood(f"the text goes through {name}")
        case _Literal():
            raise NotUnderstood("the text is not of a column")


def _joined(left: _Node, right: _Node) -> tuple[str, str]:
    """A literal before one column is a prompt; NULL stays NULL with both. Other sums of texts are not ours."""
    prefix, column = _text(right)
    while isinstance(left, _Cast) and left.type == "text":
        left = left.inner
    if not isinstance(left, _Literal):
        raise NotUnderstood("the text is joined of more than a literal and one column")
    return left.value + prefix, column
