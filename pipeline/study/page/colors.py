"""One colour and one dash for each method, on the page and in its pictures.

The colours are told apart by people who confuse red and green (Okabe and Ito 2008, "Color universal design"). Blue and
vermilion are those of the best folding and the best pruning; their first methods have them, too.
"""

from collections.abc import Sequence

FOLD, PRUNE, BASE, GAP = "#0072b2", "#d55e00", "#6b7280", "#1b1f24"
COLORS = ("#009e73", "#e69f00", "#cc79a7", "#56b4e9", "#882255", "#999933")
DASHES = {"solid": "-", "dash": "--", "dot": ":", "dashdot": "-."}  # as plotly and matplotlib spell them
FIRST = {"fold": FOLD, "l1": PRUNE}


def styles(methods: Sequence[str]) -> dict[str, dict[str, str]]:
    """{method: {"color", "dash"}}, no two of them alike for up to 24 methods beside those of FIRST."""
    others = [name for name in methods if name not in FIRST]
    dashes = list(DASHES)
    found = {name: {"color": FIRST[name], "dash": "solid"} for name in methods if name in FIRST}
    for place, name in enumerate(others):
        dash = dashes[place // len(COLORS) % len(dashes)]
        found[name] = {"color": COLORS[place % len(COLORS)], "dash": dash}
    return found
