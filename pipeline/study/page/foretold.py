"""How well foldability is foretold, as the page and its pictures show it."""

from typing import Any

import polars as pl

from pipeline.study.lines import Lines
from pipeline.study.page.numbers import MEASURED
from pipeline.study.prediction import RECIPE, Asked, Foretold, Prediction, prediction
from pipeline.tables import UserError

MANY = 1500  # networks; with more, a forest would take longer than all the rest of the page
TREES = 30  # of a forest: as good as 100 to a hundredth of R² on the published study, in a third of the time
FULLEST = ("settings + base + extra", "settings + base", "base")  # whose foretold values are drawn: the first there is
SETS = {
    "none": "mean of the others",
    "base": "uncompressed value alone",
    "settings": "settings",
    "settings + base": "settings and uncompressed value",
    "extra": "numbers on the network",
    "settings + base + extra": "settings, uncompressed value and numbers on the network",
}


def foretold(found: Lines, place: tuple[str, float | None], numbers: pl.DataFrame | None) -> Prediction | str:
    """The prediction at one stage and ratio, or the line that says why there is none, and how many are wanted.

    numbers: of the networks (see numbers.of_networks); a column that a network here lacks is left out.
    """
    table = found.at(*place).drop_nulls(["fold", "gap", "base"])
    extra = None if numbers is None else numbers.join(table.select("cell"), on="cell", how="semi")
    if extra is not None:
        extra = extra.select("cell", *(n for n in extra.columns if n != "cell" and known(extra[n], len(table))))
        extra = extra if extra.width > 1 else None
    asked = Asked(("ridge", "forest") if len(table) <= MANY else ("ridge",), levels=False, trees=TREES)
    try:
        return prediction(found, *place, extra, asked)
    except UserError as error:
        return f"Nothing is foretold: {error}."


def known(column: pl.Series, networks: int) -> bool:
    """Do all these networks have a finite number?"""
    return column.cast(pl.Float64).is_finite().sum() == networks


def drawn(made: Prediction) -> Foretold:
    """The line whose foretold values are drawn: of the folded value, by the last model, from the fullest features.

    It is fixed before any score is known, since the best of several scores would promise too much.
    """
    at = [one for one in made.lines if one.line["target"] == "fold" and one.line["held_out"] == RECIPE]
    return next(
        one
        for name in (*FULLEST, "settings", "none")
        for one in reversed(at)
        if one.line["features"] == name and one.said is not None
    )


def lines_of(made: Prediction) -> list[dict[str, Any]]:
    """The lines of its table as JSON has them, with the titles of SETS."""
    return [line | {"from": SETS[line["features"]]} for line in made.table.to_dicts()]


def data_of(made: Prediction) -> list[str]:
    """The numbers among the features that were measured on data, by title."""
    return [MEASURED[name] for name in MEASURED if name in made.cells.columns]
