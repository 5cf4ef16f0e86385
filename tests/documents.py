"""The pages for users, and the commands on them."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[1]
#: Pages for users; the log and the decisions speak of what was at their time.
PAGES = sorted(
    page
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md")]
    if page.name != "log.md"
)
#: Stands for what a reader puts there.
ELLIPSES = re.compile(r"\.\.\.|…|\[options\]")


def fenced(text):
    """Lines of blocks that are no Python, YAML or the like."""
    for kind, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.S | re.M):
        if kind in ("", "console", "bash"):
            yield from block.replace("\\\n", " ").splitlines()


def commands(page):
    """Every command of srcr on a page, in blocks and in the text."""
    text = page.read_text(encoding="utf-8")
    lines = [line for line in fenced(text) if line.startswith("srcr ")]
    prose = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    lines += [
        " ".join(words.split())
        for words in re.findall(r"`(srcr [^`]+)`", prose)
        if " -" in words  # a mere name otherwise
    ]
    return lines


def words_of(line):
    """A command's words, brackets and bars of a synopsis left out."""
    plain = re.sub(
        r"(?<=\s)[\[|](?=[\s-])|[\]](?=\s|$)|(?<=\s)\|(?=\s)", " ", ELLIPSES.sub("", line)
    )
    return shlex.split(plain.replace(" [", " "), comments=True)[1:]
