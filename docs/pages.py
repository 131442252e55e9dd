"""Hooks of mkdocs: pages of files that lie outside of docs/, and formulas as MathML.

Formulas are written in LaTeX, which GitHub shows too, and become MathML when the pages are built: browsers
draw it themselves, so that no script is loaded.
"""

import html
import posixpath
import re
from pathlib import Path
from typing import Any

import latex2mathml.converter
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
OUTSIDE = {  # file of the repository -> its place among the pages
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "examples/README.md": "examples.md",
    "CITATION.cff": "CITATION.cff",
    "LICENSE": "LICENSE.txt",
}
_LINK = re.compile(r"(\]\()([^)\s#:]+)((?:#[^)\s]*)?\))")
_FORMULA = re.compile(r'<(span|div) class="arithmatex">(.*?)</\1>', re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    """Adds the files of OUTSIDE."""
    for source, target in OUTSIDE.items():
        text = (ROOT / source).read_text()
        files.append(File.generated(config, target, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turns links that hold in the repository into links between pages."""
    source = {v: k for k, v in OUTSIDE.items()}.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def moved(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[2]))
        path = {"examples": "examples/README.md"}.get(path, path)
        target = OUTSIDE.get(path, path.removeprefix("docs/"))
        return match[1] + target + match[3]

    return _LINK.sub(moved, markdown)


def on_page_content(content: str, **_: Any) -> str:
    """Writes formulas as MathML."""

    def formula(match: re.Match[str]) -> str:
        latex = html.unescape(match[2]).strip()
        display = "block" if latex.startswith(r"\[") else "inline"
        return latex2mathml.converter.convert(latex[2:-2].strip(), display=display)

    return _FORMULA.sub(formula, content)
