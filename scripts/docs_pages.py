"""Pages of the site that are no Markdown in docs/: the log of experiments, charts, pages at the top, notebooks.

A hook of mkdocs.

docs/ links to them as the repository has them (../benchmarks/log/...), so that the links work there too; here the links
become those of the site.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
OUTSIDE = ("benchmarks/log/*.md", "benchmarks/*.json", "benchmarks/*.png")
AT_TOP = ("CONTRIBUTING.md", "SECURITY.md")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files outside docs/ under the paths that they have in the repository."""
    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    for name in AT_TOP:
        files.append(File.generated(config, name.lower(), abs_src_path=str(ROOT / name)))
    for path in sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")):
        name = f"notebooks/{path.stem}.md"
        files.append(File.generated(config, name, content=notebook_page(path)))
    return files


def notebook_page(path: Path) -> str:
    """A notebook as Markdown: its texts, and its code in fences."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    texts = [(cell["cell_type"], "".join(cell["source"])) for cell in cells]
    parts = [f"```python\n{text}\n```" if kind == "code" else text for kind, text in texts]
    parts.insert(1, f"The notebook itself: [{path.name}]({path.name}).")
    return "\n\n".join(parts) + "\n"


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links from the repository's folders become links of the site."""
    if page.file.src_uri in [name.lower() for name in AT_TOP]:
        return markdown.replace("](docs/", "](")
    for name in AT_TOP:
        markdown = markdown.replace(f"](../{name})", f"]({name.lower()})")
    return re.sub(r"\]\(\.\./(?=benchmarks/)", "](", markdown)
