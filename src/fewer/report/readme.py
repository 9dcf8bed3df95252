"""The README's list of methods, made from the cards."""

from __future__ import annotations

from collections.abc import Sequence

from fewer.papers import Card

BEGIN, END = "<!-- methods: made from the cards by `make readme` -->", "<!-- end of methods -->"


def methods_table(cards: Sequence[Card]) -> str:
    """A Markdown table of the methods."""
    lines = ["| method | area | what it does for you | replaces | claims here |", "|---|---|---|---|---|"]
    for card in cards:
        verdicts = card.verdicts
        words = {"holds": "hold", "fails": "fail", "undecided": "undecided"}
        counts = ", ".join(f"{verdicts[verdict]} {word}" for verdict, word in words.items() if verdicts[verdict])
        lines.append(f"| `{card.slug}` | {card.area} | {card.summary} | {card.replaces} | {counts or 'not recorded yet'} |")
    return "\n".join(lines)


def with_methods(readme: str, cards: Sequence[Card]) -> str:
    """The README's text with its list of methods brought up to date.

    >>> with_methods(f"a {BEGIN} old {END} z", []).count("| method |")
    1
    """
    head, _, rest = readme.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n{methods_table(cards)}\n{END}{tail}"
