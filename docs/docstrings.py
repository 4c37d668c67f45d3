"""Docstrings are plain text with Markdown's backticks and fences; here they become what Sphinx reads."""

import re
from collections.abc import Iterator


SECTION = re.compile(r"(Args|Attributes|Returns|Yields|Raises|Examples?|Note|Warning):$")
ITEM = re.compile(r"([-*]|\d+\.) ")
MARKED = re.compile(r"`[^`]*`|\|")


def rendered(lines: list[str]) -> list[str]:
    """Lines of a docstring with fences and indented formulas as literal blocks.

    Example:
        >>> rendered(["The step", "", "    a <- b", "", "Args:", "    b: a number."])
        ['The step', '', '', '::', '', '    a <- b', '', '', 'Args:', '    b: a number.']
    """
    return [*_formulas(_fences(lines))]


def _fences(lines: list[str]) -> Iterator[str]:
    """Fenced blocks as `code-block`."""
    inside = False
    for line in lines:
        indent = line[: len(line) - len(line.lstrip())]
        if line.strip().startswith("```"):
            if not inside:
                yield from ("", f"{indent}.. code-block:: {line.strip()[3:] or 'text'}", "")
            inside = not inside
        else:
            yield f"    {line}" if inside and line.strip() else line


def _formulas(lines: Iterator[str]) -> Iterator[str]:
    """Indented text between paragraphs as a literal block; sections and lists keep their indents, bars are escaped."""
    kept, code = False, None  # whether indents mean something already; the indent of a literal block
    for line in lines:
        indent = len(line) - len(line.lstrip())
        if line and code is not None and indent <= code:
            yield ""
            code = None
        if line and not indent:
            kept = bool(SECTION.match(line) or ITEM.match(line))
        elif line and not kept and code is None:
            yield from ("", "::", "")
            code = 0
        yield line if code is not None or ">>>" in line else MARKED.sub(_escaped, line)
        if ".. code-block::" in line:
            code = indent


def _escaped(found: re.Match[str]) -> str:
    """A bar outside backticks is a bar, and a name in backticks may take a plural's s."""
    if found[0] == "|":
        return "\\|"
    return f"{found[0]}\\ " if found.string[found.end() : found.end() + 1].isalpha() else found[0]
