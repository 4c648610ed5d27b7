"""The page at `/`: one static file, and the policy that lets a browser run its script and no other."""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from importlib import resources

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

# What an element holds is hashed byte by byte, from behind its opening tag to its closing one.
_INLINE = re.compile(r"<(script|style)\b[^>]*>(.*?)</\1>", re.DOTALL | re.IGNORECASE)


async def show_page(request: Request) -> Response:
    """The page, which may be fetched without an API key: it has none, and asks for one."""
    html, policy = _page_and_policy()
    return HTMLResponse(html, headers={"content-security-policy": policy, "cache-control": "no-cache"})


@functools.cache
def _page_and_policy() -> tuple[str, str]:
    html = page()
    return html, content_security_policy(html)


def page() -> str:
    """The page's HTML, which needs nothing but the server's own API."""
    return (resources.files("keye_jax.serve") / "page.html").read_text(encoding="utf-8")


def content_security_policy(html: str) -> str:
    """The value of the header Content-Security-Policy for a page.

    Its inline scripts and styles are allowed by their hashes (https://www.w3.org/TR/CSP3/). Pictures and videos come
    from the server or from the browser's own memory, requests go to the server alone, and no page may frame this one.

    Args:
      html: a page whose scripts and styles are all inline.
    """
    hashes: dict[str, list[str]] = {"script": [], "style": []}
    for kind, text in _INLINE.findall(html):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        hashes[kind.lower()].append(f"'sha256-{digest}'")
    sources = {kind: " ".join(found) or "'none'" for kind, found in hashes.items()}
    return "; ".join(
        (
            "default-src 'none'",
            f"script-src {sources['script']}",
            f"style-src {sources['style']}",
            "img-src 'self' data: blob:",
            "media-src 'self' blob:",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    )
