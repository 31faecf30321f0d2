"""HTML as a test sees it."""

from html.parser import HTMLParser

VOID = {"meta", "img", "br", "link", "path", "circle", "rect"}


class Page(HTMLParser):
    """Tables as texts, pictures as (alt, src), what is linked, all attributes; an unbalanced tag fails."""

    def __init__(self, text: str):
        super().__init__()
        self.tables, self.images, self.attributes, self.tags, self.open, self.text = [], [], [], set(), [], ""
        self.feed(text)
        assert self.open == []
        linking = ("src", "href", "srcset", "action", "data", "poster")
        self.links = [value for name, value in self.attributes if name in linking]
        self.described = [value for name, value in self.attributes if name == "aria-label"]

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes += attributes
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag == "img":
            self.images.append((dict(attributes)["alt"], dict(attributes)["src"]))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert tag in VOID or self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data
