"""Put a page and all that it needs into one file: single_file.py PAGE.html TARGET.html"""

import base64
import mimetypes
import sys
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from bs4 import BeautifulSoup


def neighbour(page, reference):
    """The file beside the page that a reference names; None for an address of another kind."""
    parts = urlsplit(reference)
    return None if parts.scheme or not parts.path else page.parent / unquote(parts.path)


def data_address(path):
    kind = mimetypes.guess_type(path.name)[0]
    if kind == "image/svg+xml":  # text, which in base64 would be a third longer
        return f"data:{kind},{quote(path.read_text(encoding='utf-8'), safe=' /:;=,.()-')}"
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def inline(page):
    soup = BeautifulSoup(page.read_text(encoding="utf-8"), "html.parser")
    for part in soup.select(".site-only, .sidebar-search-container"):
        part.decompose()
    for link in soup.find_all("link", href=True):
        if "stylesheet" not in link["rel"]:
            link.decompose()  # a search page, an icon: not in this file
            continue
        style = soup.new_tag("style")
        style.string = neighbour(page, link["href"]).read_text(encoding="utf-8")
        link.replace_with(style)
    for script in soup.find_all("script", src=True):
        code = neighbour(page, script["src"]).read_text(encoding="utf-8")
        # A closing tag inside a string would end the script.
        script.string = code.replace("</script", r"<\/script")
        # One that waits for the page, which an inline script cannot, comes last.
        if script.has_attr("defer") or script.has_attr("async"):
            soup.body.append(script.extract())
        del script["src"], script["defer"], script["async"]
    for image in soup.find_all("img", src=True):
        if path := neighbour(page, image["src"]):
            image["src"] = data_address(path)
    for link in soup.select("a.download"):
        link.unwrap()  # a table beside the page
    # Sphinx writes #document-PAGE#anchor; the anchor is on this page.
    for link in soup.select('a[href^="#document-"]'):
        if (anchor := link["href"].find("#", 1)) > 0:
            link["href"] = link["href"][anchor:]
    return str(soup)


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    target.write_text(inline(source), encoding="utf-8")
