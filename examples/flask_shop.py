"""A shop on Flask. From the directory of this file: `python -m flask --app flask_shop run`.

Ask for http://127.0.0.1:5000/products/7 from several places at once: the query runs once. Baskets
are somebody's, and each is answered by itself.
"""

import time

from flask import Flask, Response, jsonify, request

from shardedflight.http.wsgi import CoalesceMiddleware

app = Flask(__name__)


def load_product(number: int) -> dict[str, object]:
    """An expensive query."""
    time.sleep(1)
    return {"number": number, "name": f"product {number}"}


@app.get("/products/<int:number>")
def product(number: int) -> Response:
    """The same for everybody, and says so: `public`."""
    response = jsonify(load_product(number))
    response.cache_control.public = True
    response.cache_control.max_age = 5
    return response


@app.get("/bestsellers")
def bestsellers() -> Response:
    """Says nothing of caching. The middleware is told below that it is the same for everybody."""
    return jsonify([load_product(number) for number in (1, 2)])


@app.get("/basket")
def basket() -> Response:
    """Somebody's own. Nothing has to be declared for that."""
    owner = request.cookies.get("owner", "nobody")
    response = jsonify(owner=owner)
    response.set_cookie("owner", owner)
    return response


middleware = CoalesceMiddleware(
    app.wsgi_app, routes=["/products", "/bestsellers", "/basket"], shareable=["/bestsellers"]
)
app.wsgi_app = middleware  # type: ignore[method-assign]
