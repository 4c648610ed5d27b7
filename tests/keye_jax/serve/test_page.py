"""The page, in a real browser on a real server. Texts of answers are scripted, since a random model writes none."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from keye_jax.serve.page import content_security_policy, page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WIDTHS = (390, 820, 1440)


class Elements(HTMLParser):
    """The elements of a page: (tag, attributes), and the text of scripts and styles."""

    def __init__(self, html: str):
        super().__init__(convert_charrefs=True)
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.inline: dict[str, list[str]] = {"script": [], "style": []}
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.found and (tag := self.found[-1][0]) in self.inline and self.cdata_elem == tag:
            self.inline[tag].append(data)


class TestFile:
    def test_nothing_in_it_needs_what_its_policy_forbids(self):
        elements = Elements(page())
        for tag, attributes in elements.found:
            assert not [name for name in attributes if name.startswith("on") or name == "style"], (tag, attributes)
            for name in ("src", "href", "action"):
                assert (attributes.get(name) or "#").startswith(("#", "data:")), (tag, attributes)
        assert [len(texts) for texts in elements.inline.values()] == [1, 1]
        assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", page())

    def test_the_policy_allows_its_script_and_no_other(self):
        policy = dict(part.split(" ", 1) for part in content_security_policy("<script>a()</script>").split("; "))
        # echo -n 'a()' | openssl dgst -sha256 -binary | base64
        assert policy["script-src"] == "'sha256-qVpDBgj7bpq5hMAcGp3AOc79J3Y1Z4HvySTwKrWDoy4='"
        assert policy["style-src"] == policy["default-src"] == policy["frame-ancestors"] == "'none'"
        assert policy["connect-src"] == "'self'"
