"""The status page: its files, as they are, and what a browser may do with them.

They hold nothing that is anybody's business, so they need no token; the page asks for one and calls the service with it like
any other client. The policy lets the page run its own files alone, so a name or a line of a log can never become a script.
"""

import hashlib
from collections.abc import Awaitable, Callable
from importlib import resources

from fastapi import APIRouter, Request, Response

from app.api.answers import is_known

FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page/icon.svg": ("icon.svg", "image/svg+xml"),
    "/page/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/page/fleet.js": ("fleet.js", "text/javascript; charset=utf-8"),
    "/page/service.js": ("service.js", "text/javascript; charset=utf-8"),
}
"""Path: file and media type."""

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)

HEADERS = {
    "Cache-Control": "no-cache",  # kept, and asked after each time by its tag
    "Content-Security-Policy": POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}

router = APIRouter(tags=["page"], include_in_schema=False)


def _route(name: str, media_type: str) -> Callable[[Request], Awaitable[Response]]:
    body = resources.files(__name__).joinpath(name).read_bytes()
    headers = {**HEADERS, "ETag": f'"{hashlib.sha256(body).hexdigest()[:32]}"'}

    async def file(request: Request) -> Response:
        if is_known(request.headers.get("if-none-match"), headers["ETag"]):
            return Response(status_code=304, headers=headers)
        return Response(body, media_type=media_type, headers=headers)

    return file


for _path, (_name, _media_type) in FILES.items():
    router.add_api_route(_path, _route(_name, _media_type), methods=["GET", "HEAD"], name=_name)
