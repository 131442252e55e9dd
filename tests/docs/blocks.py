"""The code of the documentation: its blocks, and the commands in them."""

import dataclasses
import re
import shlex
import shutil
from pathlib import Path

from tests.small import ROOT

PAGES = ("README.md", "CONTRIBUTING.md", "examples/README.md")
NOT_RUN = re.compile(r"<!-- not run: (.+) -->")


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        page: its file, relative to the repository.
        line: where it begins, from 1.
        language: after the fence.
        text: its content.
        not_run: why it is not run; '' if it is.
    """

    page: str
    line: int
    language: str
    text: str
    not_run: str = ""

    def commands(self) -> list[list[str]]:
        """The commands of a shell block, as lists of words."""
        found, text = [], ""
        for line in self.text.replace("\\\n", " ").split("\n"):
            text += line + "\n"
            try:
                words = shlex.split(text, comments=True)
            except ValueError:  # a quotation goes on in the next line
                continue
            found, text = [*found, words] if words else found, ""
        assert not text.strip(), f"{self.page}, line {self.line}: an open quotation"
        return found


def pages() -> list[str]:
    """All pages, relative to the repository."""
    return [*PAGES, *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]


def blocks_of(page: str) -> list[Block]:
    """The fenced blocks of a page, in order."""
    found: list[Block] = []
    inside: list[str] | None = None
    before = language = ""
    for number, line in enumerate((ROOT / page).read_text().splitlines(), 1):
        if not line.startswith("```"):
            if inside is not None:
                inside.append(line)
            else:
                before = line
        elif inside is None:
            inside, language, start = [], line[3:].strip(), number
        else:
            reason = NOT_RUN.fullmatch(before)
            text = "\n".join(inside) + "\n"
            found.append(Block(page, start, language, text, reason[1] if reason else ""))
            inside, before = None, ""
    assert inside is None, f"{page}: the block of line {start} has no end"
    return found


def prose_of(page: str) -> str:
    """A page without its blocks."""
    return re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(), flags=re.M | re.S)


def inline_code(page: str) -> list[str]:
    """What stands between single backticks."""
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", prose_of(page))


def copy_of_the_repository(folder: Path) -> None:
    """Copies what a checkout holds, without what is made in it."""
    made = shutil.ignore_patterns(".*", "__pycache__", "workdirs", "site", "dist", "tests")
    shutil.copytree(ROOT, folder, ignore=made, symlinks=True)
