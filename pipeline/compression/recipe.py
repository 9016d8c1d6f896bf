"""A compression recipe: one way to compress, as a record. The ratio is no part of it: one is measured at many.

Pages and reports call it a method, because *recipe* alone means there all settings of a training but its seed.

    parse("mix+data+macs") == Recipe("mix", calibration=Calibration("data"), sizes=Sizes("macs"))
    spell(recipe)          == "mix+data+macs"

A spelling is the name of a method and additions behind plus signs: words of WORDS, or "option=value" for what has no
word ("fold+round_to=8"). `parse(spell(recipe)) == recipe` for every recipe; no other module looks into a spelling.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from numbers import Integral
from typing import Any

from pipeline.compression.calibrate.compensate import TARGETS
from pipeline.compression.choose.masks import MASKS
from pipeline.compression.choose.methods import METHODS
from pipeline.compression.choose.weights import FEATURES, SCALES
from pipeline.compression.group import DEFAULT_PARTS, PARTS
from pipeline.tables import UserError, call, check_options, pick
from pipeline.vocabulary import UNITS

AUTO = "auto"  # the method that picks another method for every ratio
CALIBRATIONS = ("none", "synthetic", "data", "self", "unigram")
BUDGETS = ("uniform", "macs", "params")
SPARES = ("output", "loss", "parameters")


@dataclass(frozen=True)
class Calibration:
    """Unlabelled network inputs that methods look at, and on which the readers of the channels are solved anew.

    pictures: "none", "data" (training samples), or what the network itself gives: "synthetic" (pictures), "self" (texts
        that it writes), "unigram" (tokens drawn as often as it uses them).
    size: how many; None: the default of that kind.
    target: what readers are solved for, a row of TARGETS: "mend", "dense" (GRAIL) or "same"; None: "same" for networks
        of tokens, else "mend"; see compensate_.
    ridge: how strongly solved readers keep to the cluster sums; None: the default of the target.
    temperature: of the texts that the network writes; smaller ones are more like one another.
    """

    pictures: str = "none"
    size: int | None = None
    target: str | None = None
    ridge: float | None = None
    temperature: float = 1.0


@dataclass(frozen=True)
class Sizes:
    """How many channels every group keeps.

    allocate: "uniform" (every group loses the same fraction), or a budget, "macs" or "params": no more of it is left
        than by uniform sizes, and groups whose compression costs less error lose more.
    spare: the error that a budget goes by: "output" (of the network, on the pictures), "loss" (its rise, foretold from
        gradients) or "parameters" (parameter error of the method); None: "loss" where readers are solved for the same,
        else "output", and "parameters" without pictures.
    round_to: channels stay in multiples of this. protect: groups that keep all channels, by name or its beginning.
    """

    allocate: str = "uniform"
    spare: str | None = None
    round_to: int = 1
    protect: tuple[str, ...] = ()


@dataclass(frozen=True)
class Scope:
    """Which channels are compressed.

    parts: some of PARTS. units: "filters" of convolutions, "neurons" of linear layers, or "all".
    """

    parts: tuple[str, ...] = DEFAULT_PARTS
    units: str = "all"


@dataclass(frozen=True)
class Features:
    """Which weights describe a channel to the method, and how; see weights.GroupWeights."""

    features: str = "writers+readers"
    scale: str = "tensor"
    norm: bool = False


@dataclass(frozen=True)
class Merging:
    """How channels merge.

    norm_scale: a weight and the norm behind it merge as one affine map; False: each tensor by itself.
    approximate_repair: BatchNorm variances of merged channels follow the weights (Fold-AR); see modules.apply.
    """

    norm_scale: bool = True
    approximate_repair: bool = False


@dataclass(frozen=True)
class Recipe:
    """A compression recipe: a method and all its options.

    method: a name in METHODS, in MASKS, or "auto". options: of the method itself, such as (("refine", False),).

    Raises UserError for names that are not in their tables, and for parts that contradict each other.
    """

    method: str
    options: tuple[tuple[str, Any], ...] = ()
    calibration: Calibration = field(default_factory=Calibration)
    sizes: Sizes = field(default_factory=Sizes)
    scope: Scope = field(default_factory=Scope)
    features: Features = field(default_factory=Features)
    merging: Merging = field(default_factory=Merging)

    def __post_init__(self) -> None:
        pick("method", names(), self.method)
        if self.kind == "mask":
            what = f"{self.method!r}, a mask of single weights,"
            said = [option for option, _ in (*additions(self), *self.options)]
            return check_options(what, MASKS[self.method], said, 3)
        if self.method == AUTO:
            call("method 'auto'", _check_candidates, **self.option)
        else:
            check_options(f"method {self.method!r}", METHODS[self.method].choose, self.option, 2)
        _check_names(self)
        _check_calibration(self)
        _check_sizes(self.sizes, self.calibration)

    @property
    def kind(self) -> str:
        """The method's kind: "fold", "prune" or "mix" of channels, "mask" of weights, or "auto" (one of the first)."""
        return kind_of(self.method)

    @property
    def option(self) -> dict[str, Any]:
        """The options of the method itself."""
        return dict(self.options)


SECTIONS: dict[str, type] = {
    "calibration": Calibration,
    "sizes": Sizes,
    "scope": Scope,
    "features": Features,
    "merging": Merging,
}
# Option: the part of a recipe that holds it.
OPTIONS = {f.name: part for part, record in SECTIONS.items() for f in fields(record)}
# Word: the options that it stands for.
WORDS: dict[str, dict[str, Any]] = {
    "grail": {"pictures": "data", "target": "dense"},
    "synthetic": {"pictures": "synthetic"},
    "data": {"pictures": "data"},
    "self": {"pictures": "self"},
    "unigram": {"pictures": "unigram"},
    "ar": {"approximate_repair": True},
    "macs": {"allocate": "macs"},
    "params": {"allocate": "params"},
    "filters": {"units": "filters"},
    "neurons": {"units": "neurons"},
}


# Options that were called otherwise: {old name: (name, {old value: value})}.
RENAMED: dict[str, tuple[str, dict[str, str]]] = {"solve_on": ("target", {"smaller": "mend"})}


def about(recipe: Recipe) -> dict[str, str]:
    """The properties that tell recipes apart: kind; calibration; sizes (uniform or a budget); scope (parts or units).

    statistics: the source from which BatchNorm statistics are re-estimated: none, weights, or that of the calibration.
    """
    calibration, units = recipe.calibration, recipe.scope.units
    follows = "none" if calibration.target == "dense" else calibration.pictures
    return {
        "kind": recipe.kind,
        "calibration": calibration.pictures,
        "sizes": recipe.sizes.allocate,
        "scope": ",".join(recipe.scope.parts) if units == "all" else units,
        "statistics": "weights" if recipe.merging.approximate_repair else follows,
    }


def names() -> dict[str, None]:
    """Every name that a method can have."""
    return dict.fromkeys((*METHODS, *MASKS, AUTO))


def kind_of(method: str) -> str:
    if method == AUTO:
        return AUTO
    return "mask" if method in MASKS else METHODS[method].kind


def recipe(method: str, label: str | None = None, **options: Any) -> Recipe:
    """The recipe of a method with options by name: those of the recipe's parts and those of the method itself.

    label: the name that errors use. Lists become tuples; None stands for the default.
    Raises UserError for an unknown method or option.
    """
    parts: dict[str, dict[str, Any]] = {part: {} for part in SECTIONS}
    own = {}
    pick("method", names(), method)
    if method in MASKS:
        given = [name for name, value in options.items() if (name, value) != ("pictures", None)]
        check_options(f"{label or method!r}, a mask of single weights,", MASKS[method], given, 3)
    for name, value in options.items():
        value = tuple(value) if isinstance(value, list) else value
        name, values = RENAMED.get(name, (name, {}))
        value = values.get(value, value) if isinstance(value, str) else value
        if name not in OPTIONS:
            own[name] = value
        elif value is not None:
            parts[OPTIONS[name]][name] = value
    for name in ("parts", "protect"):
        if isinstance(text := options.get(name), str):
            raise UserError(f"{name} must be a list, such as [{text}], got {text!r}")
    built = {part: call(label or method, record, **parts[part]) for part, record in SECTIONS.items()}
    return Recipe(method, tuple(sorted(own.items())), **built)


def parse(text: str) -> Recipe:
    """The recipe that a spelling stands for. Raises UserError for an unknown addition, and for two that contradict."""
    method, *said = re.split(r"\+(?![^\[]*\])", text)  # not at a plus sign within a list
    options: dict[str, Any] = {}
    for addition in said:
        for name, value in _options_of(text, addition).items():
            if options.get(name, value) != value:
                raise UserError(f"{text!r} says both {name}={options[name]} and {name}={value}; choose one")
            options[name] = value
    return recipe(method, text, **options)


def respelled(text: str, **options: Any) -> Recipe:
    """The recipe of a spelling with further options. UserError where they say something else than the spelling."""
    said = _as_options(parse(text))
    for name, value in options.items():
        if said.get(name, value) != value:
            raise UserError(f"{text!r} says {name}={said[name]} and the options say {name}={value}; choose one")
    return recipe(label=text, **{**said, **options})


def spell(recipe: Recipe) -> str:
    """The shortest spelling: words first, in the order of WORDS, then the options that have no word."""
    left = dict(additions(recipe))
    said = [recipe.method]
    for word, options in WORDS.items():
        if options.items() <= left.items():
            said.append(word)
            left = {name: value for name, value in left.items() if name not in options}
    return "+".join([*said, *(f"{name}={text_of(value)}" for name, value in (*left.items(), *recipe.options))])


def additions(recipe: Recipe) -> Iterator[tuple[str, Any]]:
    """(option, value) of every option that differs from its default, without those of the method itself."""
    for part, record in SECTIONS.items():
        usual, found = record(), getattr(recipe, part)
        for f in fields(record):
            if (value := getattr(found, f.name)) != getattr(usual, f.name):
                yield f.name, value


def recipes(methods: Sequence[str] | Mapping[str, Mapping[str, Any] | None], **shared: Any) -> dict[str, Recipe]:
    """{label: recipe} of the methods in a config: spellings, or {label: {"method": name, options}}.

    shared: options for every recipe that does not set them; masks do not take them.
    """
    for label in methods:
        if not isinstance(label, str):
            raise UserError(f"method {label!r} must be a name, such as mix+data, or a label with its options")
    named = methods if isinstance(methods, Mapping) else dict.fromkeys(methods)
    found = {}
    for label, options in named.items():
        if options is not None and not isinstance(options, Mapping):
            raise UserError(
                f"method {label!r} must say its options as {{method: name, option: value}}, got {options!r}"
            )
        given = dict(options) if options else _as_options(parse(label))
        method = given.pop("method", label)
        pick("method", names(), method)
        found[label] = recipe(method, label, **(given if method in MASKS else {**shared, **given}))
    return found


def _as_options(recipe: Recipe) -> dict[str, Any]:
    return {"method": recipe.method, **dict(additions(recipe)), **recipe.option}


def _options_of(text: str, addition: str) -> dict[str, Any]:
    name, equals, value = addition.partition("=")
    return {name: value_of(value)} if equals else pick("addition to a method", WORDS, addition)


def value_of(text: str) -> Any:
    """The value that an option's text stands for: a list as a tuple, a number, true or false, else the text."""
    if text.startswith("[") and text.endswith("]"):
        return tuple(filter(None, text[1:-1].split(",")))
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            pass
    return {"true": True, "false": False}.get(text, text)


def text_of(value: Any) -> str:
    """The text of an option's value: `value_of(text_of(value)) == value`."""
    if isinstance(value, tuple):
        return f"[{','.join(map(str, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _check_candidates(*, candidates: Sequence[str] | None = None) -> None:
    for name in candidates or ():
        pick("candidate", METHODS, str(name).removesuffix("+ar"))


def _check_names(recipe: Recipe) -> None:
    calibration, sizes, scope, features = recipe.calibration, recipe.sizes, recipe.scope, recipe.features
    named: Iterable[tuple[str, Sequence[str], Any]] = (
        ("pictures", CALIBRATIONS, calibration.pictures),
        ("target", tuple(TARGETS), calibration.target),
        ("allocate", BUDGETS, sizes.allocate),
        ("spare", SPARES, sizes.spare),
        ("units", UNITS, scope.units),
        ("features", FEATURES, features.features),
        ("scale", SCALES, features.scale),
        *(("part", PARTS, part) for part in scope.parts),
    )
    for what, table, name in named:
        if name is not None:
            pick(what, dict.fromkeys(table), name)
    if {"width", "head"} <= set(scope.parts):
        raise UserError("parts can hold 'width' or 'head', not both: compress twice to shrink heads and drop some")


def _check_calibration(recipe: Recipe) -> None:
    calibration, blind = recipe.calibration, recipe.calibration.pictures == "none"
    if recipe.method in METHODS and METHODS[recipe.method].gradients and blind:
        name = recipe.method
        raise UserError(f"method {name!r} needs pictures (pictures=): {name}+synthetic or {name}+data")
    if recipe.merging.approximate_repair and recipe.method == AUTO:
        raise UserError(
            "auto decides on approximate_repair (+ar) by itself; give it candidates, such as [fold+ar, mix+ar]"
        )
    if recipe.merging.approximate_repair and not blind:
        raise UserError("approximate_repair guesses variances that pictures measure: choose one of the two")
    if blind and calibration != Calibration():
        name, value = next((n, v) for n, v in additions(recipe) if OPTIONS[n] == "calibration")
        raise UserError(f"{name}={value} says how readers are solved on pictures: give pictures=data or synthetic, too")
    if calibration.size is not None and not is_count(calibration.size):
        raise UserError(f"size {calibration.size} must be a whole number of at least 1 picture")
    if calibration.temperature != 1 and calibration.pictures != "self":
        raise UserError(
            f"temperature={calibration.temperature} is of texts that the network writes: give pictures=self"
        )
    if not calibration.temperature > 0:
        raise UserError(f"temperature {calibration.temperature} must be above 0")
    if calibration.ridge is not None and not calibration.ridge >= 0:
        raise UserError(f"ridge {calibration.ridge} must not be negative")


def is_count(value: Any) -> bool:
    return isinstance(value, Integral) and int(value) >= 1


def _check_sizes(sizes: Sizes, calibration: Calibration) -> None:
    if not is_count(sizes.round_to):
        raise UserError(f"round_to {sizes.round_to} must be a whole number of at least 1 channel")
    if sizes.spare is not None and sizes.allocate == "uniform":
        raise UserError(f"spare={sizes.spare} is an option of budgets: give allocate=macs or params, too")
    if sizes.spare in ("output", "loss") and calibration.pictures == "none":
        raise UserError(f"spare={sizes.spare} is measured on pictures, so it needs pictures (or spare=parameters)")
