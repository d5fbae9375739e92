"""The page at `/`: choose prompts, type, see the answers side by side. Files of this package, nothing from elsewhere.

The files lie in `page/` and are served as they are. The page is a client of the public API and of nothing else, so it
works in front of any server that has the routes of `softprompt.serve`, whatever its engine.
"""

from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import Response

FOLDER = Path(__file__).parent / "page"
INDEX = "index.html"
KINDS = {".css": "text/css", ".html": "text/html", ".js": "text/javascript", ".svg": "image/svg+xml"}

# The page loads its own files and asks its own server. No inline script or style, no string becomes markup (trusted
# types), no frame around it: what a model answers stays text even if the page had a mistake.
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # a new version of the server brings a new page
}


def page_router() -> APIRouter:
    """Routes of the page: `/` and its files below `/page/`. They need no API key: they hold nothing of the server's.

    Raises FileNotFoundError, when it is made, for an installation that lacks the files.
    """
    router = APIRouter()
    _add(router, "/", FOLDER / INDEX)
    for file in sorted(FOLDER.iterdir()):
        if file.suffix in KINDS and file.name != INDEX:
            _add(router, f"/page/{file.name}", file)
    return router


def _add(router: APIRouter, address: str, file: Path) -> None:
    """One fixed address for one file, read once: no part of a request's address is ever joined to a path."""
    content, kind = file.read_bytes(), f"{KINDS[file.suffix]}; charset=utf-8"

    def send() -> Response:
        return Response(content, headers={**HEADERS, "Content-Type": kind})

    router.add_api_route(address, send, methods=["GET", "HEAD"], include_in_schema=False)
