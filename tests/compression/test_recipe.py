"""A recipe is a record with one spelling; a recipe that contradicts itself is refused in one line."""

import itertools

import pytest

from pipeline.compression.choose.masks import MASKS
from pipeline.compression.choose.methods import METHODS
from pipeline.compression.group import PARTS
from pipeline.compression.recipe import AUTO, OPTIONS, WORDS, Recipe, parse, recipe, recipes, spell
from pipeline.tables import UserError

# Values of every option that differ from its default.
UNUSUAL = {
    "pictures": ["data", "synthetic", "self", "unigram"],
    "size": [64],
    "target": ["mend", "dense", "same"],
    "temperature": [0.7],
    "ridge": [0.0, 1e-3, 0.25],
    "allocate": ["macs", "params"],
    "spare": ["output", "loss", "parameters"],
    "round_to": [8],
    "protect": [("conv1", "layer4.")],
    "parts": [(part,) for part in PARTS] + [("hidden", "residual", "width")],
    "units": ["filters", "neurons"],
    "features": ["writers", "readers"],
    "scale": ["none", "channel"],
    "norm": [True],
    "norm_scale": [False],
    "approximate_repair": [True],
}


def sensible(method: str, options: dict) -> Recipe | None:
    try:
        return recipe(method, **options)
    except UserError:
        return None


def test_every_option_is_tried():
    assert UNUSUAL.keys() == OPTIONS.keys()


@pytest.mark.parametrize("method", [*METHODS, *MASKS, AUTO])
def test_what_is_spelled_is_read_as_it_was(method):
    """Recipes of every method, with every value of up to three options at once."""
    pairs = [(name, value) for name, values in UNUSUAL.items() for value in values]
    spellings = {}
    for count in range(4):
        for chosen in itertools.combinations(pairs, count):
            if len(dict(chosen)) == count and (found := sensible(method, dict(chosen))) is not None:
                assert parse(spell(found)) == found, spell(found)
                spellings.setdefault(spell(found), found)
                assert spellings[spell(found)] == found, "two recipes of one spelling"
    assert len(spellings) >= (1 if method in MASKS else 300)


def test_options_of_a_method_are_spelled_too():
    for text in ("fold+refine=false", "l1+score=group", "n_m+m=8", "auto+candidates=[fold+ar,mix]", "mix+data+macs"):
        assert spell(parse(text)) == text
    assert parse("auto+candidates=[fold+ar,mix]").option == {"candidates": ("fold+ar", "mix")}
    assert recipe("auto", candidates=None).option == {"candidates": None}  # the default
    assert parse("fold+macs+data") == parse("fold+data+macs")
    assert spell(parse("fold+pictures=data")) == "fold+data"


def test_every_word_is_read_and_written():
    for word in WORDS:
        found = parse(f"l1+{word}")
        assert found != parse("l1"), word
        assert spell(found) == f"l1+{word}"


def test_kinds_say_what_becomes_of_channels():
    kinds = {name: recipe(name, pictures="data" if name in ("taylor", "fisher") else None).kind for name in METHODS}
    assert {kinds["fold"], kinds["kmeans"]} == {"fold"}
    assert kinds["mix"] == "mix"
    assert {kinds["l1"], kinds["obs"], kinds["taylor"]} == {"prune"}
    assert parse("lamp").kind == "mask"
    assert parse("auto").kind == "auto"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fodl", r"unknown method 'fodl' \(did you mean 'fold'\?\)"),
        ("fold+sythetic", r"unknown addition to a method 'sythetic' \(did you mean 'synthetic'\?\)"),
        ("fold+pitcures=data", "method 'fold' has no option 'pitcures'; it takes: refine"),
        ("fold+score=group", "method 'fold' has no option 'score'; it takes: refine"),
        ("l1+filters+neurons", r"'l1\+filters\+neurons' says both units=filters and units=neurons; choose one"),
        ("l1+grail+synthetic", "says both pictures=data and pictures=synthetic; choose one"),
        ("taylor", r"method 'taylor' needs pictures .*: taylor\+synthetic or taylor\+data"),
        ("fold+ar+data", "guesses variances that pictures measure: choose one"),
        ("auto+ar", r"auto decides on approximate_repair \(\+ar\) by itself"),
        ("fold+ridge=0.1", "ridge=0.1 says how readers are solved on pictures: give pictures=data or synthetic, too"),
        ("fold+target=dense", "target=dense says how readers are solved on pictures"),
        ("fold+data+target=dens", r"unknown target 'dens' \(did you mean 'dense'\?\); choose from: dense, mend, same"),
        (
            "fold+data+solve_on=dens",
            r"unknown target 'dens' \(did you mean 'dense'\?\); choose from: dense, mend, same",
        ),
        ("fold+data+temperature=0.5", "temperature=0.5 is of texts that the network writes: give pictures=self"),
        ("fold+self+temperature=0", "temperature 0 must be above 0"),
        ("fold+data+ridge=-1", "ridge -1 must not be negative"),
        ("fold+data+size=0", "size 0 must be a whole number of at least 1 picture"),
        ("fold+spare=parameters", "spare=parameters is an option of budgets: give allocate=macs or params, too"),
        ("fold+macs+spare=output", "spare=output is measured on pictures, so it needs pictures"),
        ("fold+round_to=0", "round_to 0 must be a whole number of at least 1 channel"),
        ("fold+round_to=half", "round_to must be a number, got 'half'"),
        ("fold+parts=[width,head]", "'width' or 'head', not both"),
        ("fold+parts=[heads]", r"unknown part 'heads' \(did you mean 'head'\?\)"),
        ("fold+parts=hidden", r"parts must be a list, such as \[hidden\], got 'hidden'"),
        ("lamp+data", r"'lamp\+data', a mask of single weights, has no option 'pictures'; it takes: none"),
        ("n_m+filters", r"'n_m\+filters', a mask of single weights, has no option 'units'; it takes: m"),
    ],
)
def test_what_contradicts_itself_is_refused(text, message):
    with pytest.raises(UserError, match=message) as caught:
        parse(text)
    assert "\n" not in str(caught.value)


def test_labels_of_a_config_share_what_they_do_not_say():
    methods = {"l1": None, "mine": {"method": "fold", "parts": ["hidden"]}, "lamp": {}, "mix+data": None}
    found = recipes(methods, round_to=4, parts=["hidden", "residual", "head"])
    assert {label: r.sizes.round_to for label, r in found.items()} == {"l1": 4, "mine": 4, "lamp": 1, "mix+data": 4}
    assert found["mine"].scope.parts == ("hidden",)
    assert found["mix+data"].scope.parts == ("hidden", "residual", "head")
    assert found["lamp"] == parse("lamp")
    assert recipes(["fold", "l1"]) == {"fold": parse("fold"), "l1": parse("l1")}


def test_the_old_name_of_an_option_is_read():
    assert parse("l1+data+solve_on=dense") == parse("l1+grail")
    assert recipe("mix", pictures="data", solve_on="smaller") == recipe("mix", pictures="data", target="mend")
