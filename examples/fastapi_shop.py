"""A shop on FastAPI. From the directory of this file: `python -m uvicorn fastapi_shop:app`.

Ask for http://127.0.0.1:8000/products/7 from several places at once: the query runs once. Baskets
are somebody's, and each is answered by itself.
"""

import time
from typing import Annotated

from fastapi import Cookie, FastAPI, Response

from shardedflight.http.asgi import CoalesceMiddleware

shop = FastAPI()


def load_product(number: int) -> dict[str, object]:
    """An expensive query."""
    time.sleep(1)
    return {"number": number, "name": f"product {number}"}


@shop.get("/products/{number}")
def product(number: int, response: Response) -> dict[str, object]:
    """The same for everybody, and says so: `public`."""
    response.headers["Cache-Control"] = "public, max-age=5"
    return load_product(number)


@shop.get("/bestsellers")
def bestsellers() -> list[dict[str, object]]:
    """Says nothing of caching. The middleware is told below that it is the same for everybody."""
    return [load_product(number) for number in (1, 2)]


@shop.get("/basket")
def basket(response: Response, owner: Annotated[str, Cookie()] = "nobody") -> dict[str, str]:
    """Somebody's own. Nothing has to be declared for that."""
    response.set_cookie("owner", owner)
    return {"owner": owner}


app = CoalesceMiddleware(
    shop, routes=["/products", "/bestsellers", "/basket"], shareable=["/bestsellers"]
)
