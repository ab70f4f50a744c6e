"""The page at `/`: one file, without resources from elsewhere, that asks this server's API."""

import base64
import hashlib
import re
from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import HTMLResponse

_FILE = Path(__file__).with_name("page.html")


def page_router() -> APIRouter:
    """Make the route."""
    router, text = APIRouter(), _FILE.read_text(encoding="utf-8")
    headers = {
        "Content-Security-Policy": policy_of(text),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
    }

    @router.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(text, headers=headers)

    return router


def policy_of(html: str) -> str:
    """Return a content security policy that lets only the page's own script and style run."""

    def source(tag: str) -> str:
        found = re.search(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        assert found is not None
        digest = base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode()
        return f"{tag}-src 'sha256-{digest}'"

    parts = [
        *("default-src 'none'", source("script"), source("style"), "connect-src 'self'"),
        *("img-src data:", "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'"),
    ]
    return "; ".join(parts)
