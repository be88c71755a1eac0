"""`make check` checks the files of tests/typing; here is what keeps them from missing something."""

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import shardedflight
from shardedflight import ShardedFlight, keys

TYPING = Path(__file__).parent / "typing"
METHODS = [name for name in dir(ShardedFlight) if not name.startswith("_")]


def syntax(name: str) -> Iterator[ast.AST]:
    return ast.walk(ast.parse((TYPING / name).read_text("utf-8")))


def test_every_public_name_has_a_type_that_is_checked() -> None:
    meant = {
        node.attr if isinstance(node, ast.Attribute) else node.id
        for node in syntax("answers.py")
        if isinstance(node, ast.Attribute | ast.Name)
    }
    assert {*shardedflight.__all__, *keys.__all__, *METHODS} - meant == set()


def test_every_way_to_call_can_be_misused() -> None:
    misused = {node.attr for node in syntax("misuse.py") if isinstance(node, ast.Attribute)}
    assert {name for name in METHODS if name.startswith("do")} - misused == set()


@pytest.mark.parametrize("name", ["__init__", *METHODS])
def test_the_public_methods_are_annotated_in_full(name: str) -> None:
    member: Any = inspect.getattr_static(ShardedFlight, name)
    signature = inspect.signature(getattr(member, "fget", member))
    bare = [
        parameter.name
        for parameter in list(signature.parameters.values())[1:]
        if parameter.annotation is inspect.Parameter.empty
    ]
    assert bare == []
    assert signature.return_annotation is not inspect.Signature.empty
