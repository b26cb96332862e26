"""Text of strangers where it is shown: one function per context, called where the text enters it.

Class names, file names, templates and whatever stands in a configuration or a report may come from anybody. Stored
they stay as they are; here they become harmless for a terminal, a message, JSON on a terminal, a Markdown card, Python
code in it, a page of HTML, and a table that a spreadsheet opens.
"""

import html as html_library
import re
import unicodedata

#: Joiners that the scripts of Persia and India, and emoji, are written with.
_JOINERS = "\u200c\u200d"
#: Characters with a meaning inside a line of Markdown; a pipe ends a cell of a table even after a backslash.
_MARKS = re.compile(r"[\\`*\[\]<>~$]|\b_+|_+\b|&(?=#?\w+;)|:(?=//)|(?<=www)\.")
#: Beginnings of lines that make headings and lists.
_BEGINNING = re.compile(r"^([#+=-](?=[\s#=-]|$)|\d+[.)](?=\s|$))")
#: First characters of a cell that a spreadsheet takes for a formula.
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def printable(text: object) -> str:
    """A text for a terminal or a log: ends of lines, escape sequences and changes of direction are spelt out.

    Args:
        text: Anything.
    """
    text = str(text)
    return text if text.isprintable() else "".join(c if _is_harmless(c) else _spelt(c) for c in text)


def one_line(text: object) -> str:
    """A message as one line for a terminal or a log; lines are joined by spaces.

    Args:
        text: Anything.
    """
    return printable(" ".join(filter(None, map(str.strip, str(text).splitlines()))))


def printable_json(text: str) -> str:
    """JSON for a terminal: the same values, with characters spelt out that a terminal would obey.

    Args:
        text: JSON, which may have ends of lines between values.
    """
    return "".join(letter if _is_harmless(letter) or letter == "\n" else _json_spelt(letter) for letter in text)


def markdown(text: object, limit: int = 1000) -> str:
    """A text inside a line of Markdown, also in a heading, a list or a cell of a table.

    Args:
        text: Anything.
        limit: Most characters; longer ones are cut.
    """
    line = one_line(_cut(str(text), limit))
    escaped = _MARKS.sub(lambda match: "".join(f"\\{mark}" for mark in match[0]), line).replace("|", "&#124;")
    return _BEGINNING.sub(lambda match: f"{match[0][:-1]}\\{match[0][-1]}", escaped)


def html(text: object, limit: int = 200) -> str:
    """A text inside an element of HTML or a quoted attribute of one.

    Args:
        text: Anything.
        limit: Most characters; longer ones are cut.
    """
    escaped = html_library.escape(printable(_cut(str(text), limit)))
    return escaped.translate({ord(mark): f"&#{ord(mark)};" for mark in "${}`"})  # marks of templates in a page


def code_span(text: object, limit: int = 200) -> str:
    """A text as code inside a line of Markdown; one with a pipe, which would end a cell of a table, as plain text.

    Args:
        text: Anything.
        limit: Most characters; longer ones are cut.
    """
    line = printable(_cut(str(text), limit))
    if "|" in line or not line.strip():
        return markdown(line, limit)
    fence = "`" * (max(map(len, re.findall("`+", line)), default=0) + 1)
    pad = " " if "`" in (line[0], line[-1]) or line[0] == line[-1] == " " else ""
    return f"{fence}{pad}{line}{pad}{fence}"


def python_string(text: object) -> str:
    """A text as a literal of Python in double quotes.

    Args:
        text: Anything.
    """
    return '"' + printable(str(text).replace("\\", "\\\\").replace('"', '\\"')) + '"'


def spreadsheet_cell(text: object) -> str:
    """A text for a cell of a CSV file that a spreadsheet may open: one that would be a formula begins with `'`.

    Args:
        text: Anything.
    """
    cell = str(text)
    return f"'{cell}" if cell.startswith(_FORMULA) else cell


def _is_harmless(letter: str) -> bool:
    return letter.isprintable() or letter in _JOINERS or unicodedata.category(letter) == "Zs"


def _spelt(letter: str) -> str:
    return letter.encode("unicode_escape").decode()


def _json_spelt(letter: str) -> str:
    units = letter.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[i]:02x}{units[i + 1]:02x}" for i in range(0, len(units), 2))


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[:limit]} ..."
