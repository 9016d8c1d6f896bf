"""The page as one file: plotly, style, script and data stand in it, so that it opens anywhere and fetches nothing."""

import base64
import gzip
import json
import os
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from io import BytesIO
from itertools import chain
from pathlib import Path
from string import Template
from urllib.parse import quote

import polars as pl

from pipeline.cells import ADDRESS
from pipeline.results import code_version
from pipeline.study.chains import ChainRows, chain_lines
from pipeline.study.claims import FEWEST, noise_sentence
from pipeline.study.intervals import SHOWN
from pipeline.study.noise import noise
from pipeline.study.page.colors import styles
from pipeline.study.page.columns import Places, axes_of, packed
from pipeline.study.page.families import Family, failures, states
from pipeline.study.sweep import Sweep
from pipeline.study.terminal import TITLES
from pipeline.tables import optional


def page(
    title: str,
    whole: Sweep,
    parts: Sequence[Family],
    places: Places,
    speeds: pl.DataFrame,
    chains: Sequence[ChainRows] = (),
) -> str:
    """The text of index.html. speeds: lines of `read_speeds`, which may be none; chains: those that cells ran."""
    plotly = optional("the page", "plotly.offline", "study").get_plotlyjs()
    found = [part.found.methods["method"].unique(maintain_order=True) for part in parts if part.found]
    said = [{"sentences": part.sentences, "noise": noises(part), **packed(part, places, speeds)} for part in parts]
    data = {"parts": said, "styles": styles(list(dict.fromkeys(chain(*found)))), "enough": FEWEST, "shown": SHOWN}
    here = files("pipeline.study.page")
    return Template((here / "template.html").read_text()).substitute(
        title=escape(title),
        about=escape(about(whole)),
        answer="".join(f"<p>{escape(sentence)}</p>" for part in parts for sentence in part.sentences),
        css=(here / "page.css").read_text(),
        script=(here / "page.js").read_text(),
        chains=chains_section(chains),
        plotly=packed_text(plotly),
        data=packed_text(json.dumps(data, separators=(",", ":"), allow_nan=False)),
    )


def chains_section(chains: Sequence[ChainRows]) -> str:
    """The section of chains, a table and the picture of the front for each network; "" where there are none."""
    if not chains:
        return ""
    shown = "".join(f"<h3>{escape(part.title)}</h3>{picture_of(part)}{table_of(part.rows)}" for part in chains)
    note = (
        "Means over the cells that ran chains, ± their standard deviation. An asterisk, and a ring in the picture: "
        "nothing smaller is as good. Seconds and samples are those of all stages up to this one."
    )
    return f'  <section id="chains"><h2>Chains</h2><p class="note">{note}</p>{shown}</section>\n'


def picture_of(part: ChainRows) -> str:
    from pipeline.study.pictures import plot_pareto  # brings matplotlib, which takes a second

    plot_pareto(part.rows, drawn := BytesIO(), part.times)
    data = base64.b64encode(drawn.getvalue()).decode()
    return f'<img alt="value over size and time, {escape(part.title)}" src="data:image/png;base64,{data}">'


def table_of(rows: pl.DataFrame) -> str:
    """`chain_lines` in HTML, a stage behind another one indented."""
    names, lines = chain_lines(rows)
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    indented = ([escape(text).replace("  ", "&emsp;") for text in line] for line in lines)
    body = "".join(f"<tr>{''.join(f'<td>{text}</td>' for text in line)}</tr>" for line in indented)
    return f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def noises(family: Family) -> list[str]:
    """A sentence on the noise between seeds for each stage that has some, at the ratio that leads, over all cells."""
    if family.found is None or family.shown is None:
        return []
    ratio = family.shown[1]
    heard = {stage: noise(family.found, stage, ratio) for stage in axes_of(family).stages}
    return [f"{TITLES.get(k, k)}, ratio {ratio:g}: {noise_sentence(v, family.metric)}" for k, v in heard.items() if v]


def packed_text(text: str) -> str:
    """The text compressed (gzip) and in base64, which takes a third of its place, and cannot end a script element."""
    return base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode()


def about(sweep: Sweep) -> str:
    """How far the sweep is, why cells failed, and by which code the page was written."""
    why = "; ".join(f"{count} with: {reason}" for reason, count in failures(sweep)[:3])
    failed = f" Cells ended without a result: {why}." if why else ""
    return f"{len(sweep.cells)} cells: {states(sweep)}.{failed} Written by foldability {code_version()}."


def places_of(sweep: Sweep, runs: Path, at: Path) -> Places:
    """Links relative to the page in the folder `at`, so that runs and page can be moved as a whole.

    None where the runs are a file.
    """
    if runs.is_file():
        return Places({}, {})
    names = sweep.cells["cell"].to_list()
    addresses = {name: address for name in names if (address := _address(runs / name))}
    return Places({name: _relative(runs / name, at) for name in names}, addresses)


def _relative(folder: Path, at: Path) -> str:
    return quote(os.path.relpath(folder.resolve(), at.resolve()).replace(os.sep, "/"))


def _address(folder: Path) -> str:
    """The address that a run left in its folder; "" where it left none, or no address."""
    try:
        text = (folder / ADDRESS).read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""
    return text if text.startswith(("https://", "http://")) else ""
