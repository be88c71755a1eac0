"""The example applications, on real servers. Their query waits until the test lets it go."""

import importlib.util
import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from http_support import Origin, Site, names, results, serve_asgi, serve_wsgi
from support import PATIENCE

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
FRAMEWORKS = ("fastapi", "flask", "django")


def load(framework: str) -> ModuleType:
    """The example's module, once for the process: it has one Django."""

    pytest.importorskip(framework, reason="the extra `test` is not installed")
    name = f"{framework}_shop"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]


class Shop(Site):
    """An example behind its server; `origin.runs` are the numbers of the products queried."""

    def __init__(self, middleware: Any, port: int) -> None:
        super().__init__("", Origin(), port, middleware)


@contextmanager
def open_shop(framework: str) -> Iterator[Shop]:
    module: Any = load(framework)
    gate, runs = threading.Event(), []
    original = module.load_product

    def load_product(number: int) -> dict[str, object]:
        runs.append(number)
        assert gate.wait(PATIENCE)
        return {"number": number}

    module.load_product = load_product
    if framework == "fastapi":
        middleware, server = module.app, serve_asgi(module.app)
    elif framework == "flask":
        middleware, server = module.middleware, serve_wsgi(module.app)
    else:
        middleware, server = module.application, serve_wsgi(module.application)
    try:
        with server as port:
            shop = Shop(middleware, port)
            shop.origin.gate, shop.origin.runs = gate, runs  # type: ignore[assignment]
            try:
                yield shop
            finally:
                gate.set()
    finally:
        module.load_product = original


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_stampede_queries_once(framework: str) -> None:
    with open_shop(framework) as shop:
        leader = shop.lead(path="/products/7")
        followers = shop.follow(names("f", 40), path="/products/7")
        other = shop.lead(path="/products/8")
        shop.origin.gate.set()
        for answer in results(followers).values():
            assert json.loads(answer.body) == {"number": 7}
            assert answer.collapsed
        assert json.loads(leader.result(PATIENCE).body) == {"number": 7}
        assert json.loads(other.result(PATIENCE).body) == {"number": 8}
        assert shop.origin.runs == [7, 8]


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_declared_route_is_shared(framework: str) -> None:
    with open_shop(framework) as shop:
        leader = shop.lead(path="/bestsellers")
        followers = shop.follow(names("f", 5), path="/bestsellers")
        shop.origin.gate.set()
        assert all(answer.collapsed for answer in results(followers).values())
        assert leader.result(PATIENCE).status == 200
        assert shop.origin.runs == [1, 2]


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_baskets_are_their_owners(framework: str) -> None:
    with open_shop(framework) as shop:
        owners = names("owner", 10)
        with_cookies = {
            o: shop.ask(o, "/basket", headers=[("Cookie", f"owner={o}")]) for o in owners
        }
        without = shop.ask_all(names("anonymous", 10), path="/basket")
        for owner, answer in results(with_cookies).items():
            assert json.loads(answer.body) == {"owner": owner}
            assert f"owner={owner}" in (answer.header("Set-Cookie") or "")
        for answer in results(without).values():
            assert json.loads(answer.body) == {"owner": "nobody"}
            assert not answer.collapsed


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_an_error_of_the_framework_is_an_answer(framework: str) -> None:
    with open_shop(framework) as shop:
        assert shop.ask("a", "/products/none").result(PATIENCE).status in (404, 422)
