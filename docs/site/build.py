"""Build the documentation site: stage the pages, add the reference and the gallery of methods, run MkDocs.

    python docs/site/build.py            # into build/site; warnings are errors

Pages keep the places they have in the repository, so that their links work there and here.
"""

import base64
import importlib
import inspect
import json
import re
import shutil
import sys
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

ROOT = Path(__file__).resolve().parents[2]
PAGES, SITE = ROOT / "build" / "site-pages", ROOT / "build" / "site"
COPIED = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", "docs", "examples/notebooks", "examples/serve.py")
REFERENCE = {
    "peft_vlm": "Methods, trainer, classifier",
    "peft_vlm.data": "Data",
    "peft_vlm.text": "Class names and texts",
    "peft_vlm.evaluation": "Evaluation",
    "peft_vlm.export": "Export",
    "peft_vlm.serving.onnx": "Serving",
    "peft_vlm.conversion": "Conversion",
}


def stage() -> None:
    """Copy what the site shows."""
    shutil.rmtree(PAGES, ignore_errors=True)
    for name in COPIED:
        source, target = ROOT / name, PAGES / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("site", "__pycache__"))
        else:
            shutil.copy(source, target)
    shutil.copy(ROOT / "docs/site/site.css", PAGES)
    for notebook in PAGES.rglob("*.ipynb"):
        notebook.with_suffix(".md").write_text(as_markdown(notebook), encoding="utf-8")
    for page in PAGES.rglob("*.md"):
        text = page.read_text(encoding="utf-8").replace(".ipynb)", ".md)")
        text = re.sub(r"^```(\w+) .*$", r"```\1", text, flags=re.MULTILINE)  # words for the tests behind the language
        text = re.sub(r"\[([^]]*)\]\(([^)#:\s]+)\)", partial(without_folder, page=page), text)
        page.write_text(text, encoding="utf-8")


def without_folder(link: re.Match[str], *, page: Path) -> str:
    """A link as it is; one to a folder as one to its index, or as text where it has none."""
    target = page.parent / link[2]
    if target.is_file() or not (ROOT / page.relative_to(PAGES)).parent.joinpath(link[2]).is_dir():
        return link[0]
    return f"[{link[1]}]({link[2].rstrip('/')}/index.md)" if (target / "index.md").is_file() else link[1]


def as_markdown(notebook: Path) -> str:
    """Cells and outputs of a notebook, its images beside it."""
    parts: list[str] = []
    for number, cell in enumerate(json.loads(notebook.read_text(encoding="utf-8"))["cells"]):
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for place, output in enumerate(cell.get("outputs", [])):
            parts.append(shown_output(output, notebook.with_name(f"{notebook.stem}-{number}-{place}")))
    return "\n\n".join(filter(None, parts)) + "\n"


def shown_output(output: dict[str, Any], place: Path) -> str:
    """An output as Markdown: its image, else its text."""
    data = output.get("data", {})
    for kind, suffix in (("image/png", ".png"), ("image/jpeg", ".jpg")):
        if kind in data:
            image = place.with_suffix(suffix)
            image.write_bytes(base64.b64decode(data[kind]))
            return f"![output]({image.name})"
    text = "".join(output.get("text", data.get("text/plain", ""))).rstrip()
    return f"```text\n{text}\n```" if text else ""


def reference() -> list[dict[str, str]]:
    """Write a page per public module, with the names of its `__all__`; return their places in the navigation."""
    entries = []
    for module_name, title in REFERENCE.items():
        module = importlib.import_module(module_name)
        lines = [f"# {title}", "", f"Public names of `{module_name}`.", ""]
        for name in sorted(getattr(module, "__all__", [name for name in vars(module) if not name.startswith("_")])):
            value = getattr(module, name)
            is_own = getattr(value, "__module__", "").startswith("peft_vlm")
            if is_own and (inspect.isclass(value) or inspect.isfunction(value)):
                lines += [f"::: {value.__module__}.{value.__qualname__}", ""]
        page = Path("reference", f"{module_name}.md")
        (PAGES / page).parent.mkdir(exist_ok=True)
        (PAGES / page).write_text("\n".join(lines) + "\n", encoding="utf-8")
        entries.append({title: page.as_posix()})
    return entries


def gallery() -> list[dict[str, str]]:
    """Write a card per training method; return their pages' places in the navigation."""
    from peft_vlm.registry import METHODS

    cards, entries, seen = [], [], set()
    for method in METHODS.values():
        page = f"docs/methods/{method.name}.md"
        summary = inspect.getdoc(method.objective or method.answer_objective) or ""
        paper = method.paper
        cards += [f"-   **[{method.title}]({page})**", "", "    ---", "", f"    {summary.partition(chr(10))[0]}", ""]
        cards += [f"    *{paper.title}*, {paper.venue if paper.venue else paper.year}", ""]
        if page not in seen:
            entries.append({method.title: page})
        seen.add(page)
    head = [
        "# Gallery of methods",
        "",
        "What each method minimises, in a line; the pages have settings and results.",
        "",
    ]
    lines = [*head, '<div class="grid cards" markdown>', "", *cards, "</div>", ""]
    (PAGES / "gallery.md").write_text("\n".join(lines), encoding="utf-8")
    return entries


def configuration() -> Path:
    """Write the configuration with all pages in its navigation."""
    text = (ROOT / "docs/site/mkdocs.yml").read_text(encoding="utf-8")
    for word, entries, indent in (("METHOD_PAGES", gallery(), 6), ("REFERENCE_PAGES", reference(), 6)):
        lines = "".join(f"{' ' * indent}- {yaml.safe_dump(entry, width=1000).strip()}\n" for entry in entries)
        text = text.replace(f"{word}\n", lines)
    path = ROOT / "build" / "mkdocs.yml"
    path.write_text(text.replace("../../build/", "").replace("[../..]", "[..]"), encoding="utf-8")
    return path


class Page(HTMLParser):
    """Anchors and links of a built page, and what it would load.

    Args:
        path: Its file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors: set[str] = {"__top", ""}
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note what a tag refers to."""
        values = {name: value for name, value in attrs if value}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        self.links += [values[name] for name in ("href", "src") if name in values]
        loads = "src" in values or (tag == "link" and values.get("rel") in ("stylesheet", "preconnect", "icon"))
        self.loaded += [values.get("src") or values["href"]] if loads else []


def problems() -> list[str]:
    """Links and anchors that lead nowhere, and files that a page would load from elsewhere."""
    pages = {path.resolve(): Page(path) for path in SITE.rglob("*.html") if path.name != "404.html"}
    assert len(pages) >= 20
    found = []
    for path, page in pages.items():
        name = path.relative_to(SITE.resolve())
        found += [f"{name} loads {url}" for url in page.loaded if urlsplit(url).netloc]
        for link in page.links:
            url = urlsplit(link)
            target = (path.parent / unquote(url.path)).resolve() if url.path else path
            if url.scheme or url.netloc:
                continue
            if not target.is_file():
                found.append(f"{name}: no file for {link}")
            elif target in pages and unquote(url.fragment) not in pages[target].anchors:
                found.append(f"{name}: no anchor for {link}")
    return sorted(set(found))


def main() -> int:
    """Build and check."""
    from mkdocs.__main__ import cli

    stage()
    config = configuration()
    cli(["build", "--strict", "--quiet", "--config-file", str(config)], standalone_mode=False)
    found = problems()
    for problem in found:
        print(problem, file=sys.stderr)
    print(f"Open {SITE / 'index.html'}")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
