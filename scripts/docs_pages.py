"""Pages of the site that stand outside docs/: the log of experiments, the charts, CONTRIBUTING.md. A hook of mkdocs.

docs/ links to them as the repository has them (../benchmarks/log/...), so that the links work there too; here the links
become those of the site.
"""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
OUTSIDE = ("benchmarks/log/*.md", "benchmarks/*.json", "benchmarks/*.png")
CONTRIBUTING = "CONTRIBUTING.md"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files outside docs/ under the paths that they have in the repository."""
    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    path = str(ROOT / CONTRIBUTING)
    files.append(File.generated(config, CONTRIBUTING.lower(), abs_src_path=path))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links from the repository's folders become links of the site."""
    if page.file.src_uri == CONTRIBUTING.lower():
        return markdown.replace("](docs/", "](")
    markdown = markdown.replace(f"](../{CONTRIBUTING})", f"]({CONTRIBUTING.lower()})")
    return re.sub(r"\]\(\.\./(?=benchmarks/)", "](", markdown)
