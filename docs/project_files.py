"""Lets pages link to files of the project beside docs/, as where the project is browsed: they come along as they are."""

import re
from pathlib import Path
from posixpath import normpath, relpath
from typing import Any

PROJECT = Path(__file__).parent.parent
LINK = re.compile(r"(?<=\]\()(?:\.\./)+[^)#\s]+")


def on_files(files: Any, config: Any) -> Any:  # noqa: ANN401 - mkdocs' own
    """Add each file that a page links to and that lies outside docs/; a directory as the list of its files."""
    from mkdocs.structure.files import File  # noqa: PLC0415 - only there when pages are built

    for page in list(files.documentation_pages()):
        for link in LINK.findall(page.content_string):
            place = _outside(page.src_uri, link)
            if not place or files.get_file_from_path(f"project/{place}.txt"):
                continue
            path = PROJECT / place
            if path.is_dir():
                names = "".join(f"{place}/{each.name}\n" for each in sorted(path.iterdir()))
                files.append(File.generated(config, f"project/{place}.txt", content=names))
            elif path.is_file():
                files.append(File.generated(config, f"project/{place}.txt", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:  # noqa: ANN401 - mkdocs' own
    """Lead those links to the files that were added."""
    uri = page.file.src_uri

    def lead(match: re.Match[str]) -> str:
        place = _outside(uri, match[0])
        return relpath(f"project/{place}.txt", normpath(str(Path(uri).parent))) if place else match[0]

    return LINK.sub(lead, markdown)


def _outside(uri: str, link: str) -> str | None:
    """Name the file of the project that a page's link leads to; None for one in docs/."""
    place = normpath(f"docs/{Path(uri).parent}/{link}")
    return None if place.startswith("docs/") else place
