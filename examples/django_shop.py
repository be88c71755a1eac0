"""A shop on Django, in one file. From its directory: `python django_shop.py runserver`.

Ask for http://127.0.0.1:8000/products/7 from several places at once: the query runs once. Baskets
are somebody's, and each is answered by itself.

In a project of the usual layout, `application` is what `wsgi.py` makes.
"""

import sys
import time

from django.conf import settings
from django.core.management import execute_from_command_line
from django.core.wsgi import get_wsgi_application
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.urls import path
from django.views.decorators.cache import cache_control

from shardedflight.http.wsgi import CoalesceMiddleware

settings.configure(
    ROOT_URLCONF=__name__,
    WSGI_APPLICATION=f"{__name__}.application",
    ALLOWED_HOSTS=["127.0.0.1", "localhost"],
    MIDDLEWARE=["django.middleware.common.CommonMiddleware"],
)


def load_product(number: int) -> dict[str, object]:
    """An expensive query."""
    time.sleep(1)
    return {"number": number, "name": f"product {number}"}


@cache_control(public=True, max_age=5)
def product(request: HttpRequest, number: int) -> HttpResponse:
    """The same for everybody, and says so: `public`."""
    return JsonResponse(load_product(number))


def bestsellers(request: HttpRequest) -> HttpResponse:
    """Says nothing of caching. The middleware is told below that it is the same for everybody."""
    return JsonResponse([load_product(number) for number in (1, 2)], safe=False)


def basket(request: HttpRequest) -> HttpResponse:
    """Somebody's own. Nothing has to be declared for that."""
    owner = request.COOKIES.get("owner", "nobody")
    response = JsonResponse({"owner": owner})
    response.set_cookie("owner", owner)
    return response


urlpatterns = [
    path("products/<int:number>", product),
    path("bestsellers", bestsellers),
    path("basket", basket),
]

application = CoalesceMiddleware(
    get_wsgi_application(),
    routes=["/products", "/bestsellers", "/basket"],
    shareable=["/bestsellers"],
)

if __name__ == "__main__":
    execute_from_command_line(sys.argv)
