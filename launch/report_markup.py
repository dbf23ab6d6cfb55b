"""Elements of HTML and SVG made from any text, which is escaped unless it is made of elements itself."""

import html
import unicodedata

_LONGEST = 300
_VOID = ("img", "input", "meta")
_LONG = ("d", "src")  # attributes that are never shortened


class Markup(str):
    """HTML as it stands in the page; any other text is escaped on its way there."""


def element(tag: str, *children: Markup | str | None, **attributes: str | int | None) -> Markup:
    """An element with its children; texts are made harmless, see :func:`clean`, and escaped.

    Args:
      tag: its name.
      *children: elements and texts, in order; None is nothing.
      **attributes: by name; ``cls`` is ``class``, an underscore is a dash; None is no attribute.

    Example:
      >>> from poise.launch.report_markup import element
      >>> print(element("p", "1 < 2 ", element("b", "<script>", cls="x"), title='"'))
      <p title="&quot;">1 &lt; 2 <b class="x">&lt;script&gt;</b></p>
    """
    words = {"cls": "class", "label_for": "for", "view_box": "viewBox"}
    shown = {words.get(name, name.replace("_", "-")): value for name, value in attributes.items() if value is not None}
    head = "".join(
        f' {name}="{html.escape(clean(str(value), None if name in _LONG else 4 * _LONGEST))}"'
        for name, value in shown.items()
    )
    if tag in _VOID:
        return Markup(f"<{tag}{head}>")
    inner = "".join(
        child if isinstance(child, Markup) else html.escape(clean(child)) for child in children if child is not None
    )
    return Markup(f"<{tag}{head}>{inner}</{tag}>")


def clean(text: str, longest: int | None = _LONGEST) -> str:
    r"""A text without what can't be seen or written: control characters, marks of direction and halves of characters.

    Args:
      text: any.
      longest: characters that are kept; None for all.

    Example:
      >>> from poise.launch.report_markup import clean
      >>> print(clean("tab" + chr(7) + chr(0x202E) + chr(0xD800)), clean("abcdef", longest=4))
      tab\x07\u202e\ud800 abc…
    """
    if longest is not None and len(text) > longest:
        text = text[: longest - 1] + "…"
    if text.isprintable():
        return text
    return "".join(character if _harmless(character) else ascii(character)[1:-1] for character in text)


def _harmless(character: str) -> bool:
    return character in "\n\t" or unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Co", "Cn")
