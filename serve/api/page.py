"""GET / and its files: a page to talk to the models. Plain files, nothing from outside, no build step.

The page is public even where there are API keys: it holds no data, and asks for a key itself.
"""

from pathlib import Path

from flask import Blueprint, Response, send_from_directory

from serve.api.replying import Context

FILES = Path(__file__).parents[1] / "page"
HEADERS = {
    # The page's own files and this server's API, and no frame around it.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def page_blueprint(_: Context) -> Blueprint:
    """The routes of this module."""
    blueprint = Blueprint("page", __name__)

    @blueprint.get("/")
    def index() -> Response:
        return _file("index.html")

    @blueprint.get("/page/<name>")
    def file(name: str) -> Response:
        return _file(name)

    return blueprint


def _file(name: str) -> Response:
    """One of the files beside this module, in serve/page; 404 for any other name."""
    response = send_from_directory(FILES, name)
    response.headers.update(HEADERS)
    return response
