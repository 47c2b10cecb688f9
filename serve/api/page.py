"""GET / and its files: a page to chat with the models. Plain files; no build step, nothing loaded from other sites.

The page is public even if the server has API keys: it contains no data, and asks the user for a key.
"""

from pathlib import Path

from flask import Flask, Response, send_from_directory

from serve.api.context import Context

FILES = Path(__file__).parents[1] / "page"
HEADERS = {
    # Allows the page's own files and this server's API, and no frame around the page.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def add_page_routes(app: Flask, _: Context) -> None:
    """Add the routes of this module to the application."""

    @app.get("/")
    def index() -> Response:
        return _file("index.html")

    @app.get("/page/<name>")
    def file(name: str) -> Response:
        return _file(name)


def _file(name: str) -> Response:
    """A file of serve/page; 404 for any other name."""
    response = send_from_directory(FILES, name)
    response.headers.update(HEADERS)
    return response
