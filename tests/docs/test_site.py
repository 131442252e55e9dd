"""The pages that `make docs` builds."""

import html.parser
import os
import re
import subprocess
import sys

import pytest

from tests.small import ROOT

pytest.importorskip("mkdocs")
pytest.importorskip("latex2mathml")
pytest.importorskip("material")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Builds with warnings as errors."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", folder]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return folder


class Loaded(html.parser.HTMLParser):
    """What a browser loads with a page, but for links that a reader follows."""

    def __init__(self):
        super().__init__()
        self.urls = []

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        if "src" in given:
            self.urls.append(given["src"])
        if tag == "link" and given.get("rel") != "canonical":
            self.urls.append(given["href"])


def test_nothing_is_loaded_from_elsewhere(site):
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 15
    for page in pages:
        parser = Loaded()
        parser.feed(page.read_text())
        assert len(parser.urls) > 3
        for url in parser.urls:
            assert not re.match(r"(https?:)?//", url), f"{page.name} loads {url}"
            if page.name != "404.html" and not url.startswith("data:"):  # 404 has absolute ones
                assert (page.parent / url.partition("?")[0].partition("#")[0]).exists(), url
    for style in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import )['\"]?(https?:)?//", style.read_text()), style


def test_formulas_are_mathml(site):
    text = (site / "method.html").read_text()
    assert text.count("<math") > 20
    assert "arithmatex" not in text
    assert "\\frac" not in text
    # y = W x + b + a sum with both bounds
    assert re.search(r"<munderover><mo[^>]*>&#x02211;</mo>|<munderover><mo[^>]*>∑</mo>", text)


def test_every_page_of_the_repository_is_there(site):
    names = {path.stem for path in (ROOT / "docs").glob("*.md")}
    names |= {"index", "contributing", "changelog", "examples"}
    assert names <= {path.stem for path in site.glob("*.html")}
    index = (site / "index.html").read_text()
    for name in names - {"index"}:
        assert f'href="{name}.html"' in index, f"{name} is not in the navigation"
