"""What a study's config may say: its arms, and a check of every name in it before anything is run."""

import dataclasses
import itertools
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, get_type_hints

from dgr_jax.errors import UserError, shown
from dgr_jax.generation.engine import Decoding
from dgr_jax.tiny_world.alignment import SOURCES
from dgr_jax.training.recipe import Recipe


@dataclasses.dataclass(frozen=True)
class Arm:
    """One fine-tuning of a study.

    Attributes:
      model: name of a base model of the study.
      source: name of a source of the study.
      refine: name of a refinement of the study, whose rows take the place of the originals.
      dose: share of rows that are replaced by their refined version: 0 is vanilla SFT, 1 is all of them.
      native: use rows written by a template in the target's own voice instead (tiny world only).
      rows: how many rows; 0 takes all.
      benign: keep the source's benign rows.
      learning_rate, steps: of the recipe; steps 0 leaves the recipe's epochs.
      seed: of data, rewriting and training.
    """

    model: str
    source: str
    refine: str = "DGR"
    dose: float = 0.0
    native: bool = False
    rows: int = 0
    benign: bool = True
    learning_rate: float = 5e-5
    steps: int = 0
    seed: int = 0

    def __post_init__(self):
        for field, kind in get_type_hints(Arm).items():
            _check_kind(f"an arm's {field}", getattr(self, field), kind)
        if not 0 <= self.dose <= 1:
            raise UserError(f"study config: dose {self.dose} is not a share; give 0 to 1")
        if self.native and self.dose:
            raise UserError("study config: a native arm has no dose; leave it out, or give 0")
        if self.rows < 0:
            raise UserError(f"study config: rows {self.rows}; give 1 or more, or 0 for all")

    @property
    def kind(self) -> str:
        """What the arm is called in tables."""
        if self.native:
            return "native"
        partly = f"{self.dose:g} dose" if self.refine == "DGR" else f"{self.refine}, {self.dose:g} dose"
        return {0.0: "vanilla", 1.0: self.refine}.get(self.dose, partly)

    @property
    def name(self) -> str:
        """Unique within a study, and a folder's name."""
        parts = [self.model, self.source, self.kind.replace(",", "").replace(" ", "-")]
        parts += [f"rows{self.rows}"] if self.rows else []
        parts += [] if self.benign else ["no-benign"]
        parts += [f"steps{self.steps}"] if self.steps else []
        return "_".join([*parts, f"lr{self.learning_rate:g}", f"seed{self.seed}"])


_FIELDS: dict[str, Any] = {
    "title": str, "models": {str: str}, "dtype": str, "sources": Mapping, "judge": str | None,
    "refine": Mapping, "recipe": Mapping, "defaults": Mapping, "grids": [Mapping], "suites": [Mapping],
    "decoding": Mapping, "samples_per_item": int, "answers_per_shard": int, "batch_size": int | None,
    "diagnosis": Mapping, "show_texts": bool,
}  # fmt: skip
"""Field -> kind, see `_is`."""
_REFINE = {"template": str | None, "scaffold": str | None, "attempts": int, "max_new_tokens": int}
_REFINE_MORE = {"pick": str, "on_reject": str, "prefill": str | None, "temperature": float}
"""Fields that a refinement may leave out."""
_EXAMPLES = "configs/tiny.py and configs/real_small.py"
_PART = {"spec": str, "rows": int}
_SUITE = {"spec": str, "items": int, "seed": int, "groups": [str]}
_DIAGNOSIS = {"opener_tokens": int, "separate": Mapping}
_TINY_SOURCE = {"tiny": str, "harmful": int, "benign": int}
_TINY_SUITE = {"tiny": str, "items": int, "seed": int}
_MOST = {"items": 10**6, "rows": 10**6, "harmful": 10**6, "benign": 10**6, "seed": 2**63 - 1}
"""What counts may be, of sources and suites: those of the tiny world are made in memory."""


def read_arms(config: Mapping[str, Any]) -> list[Arm]:
    """Checks a study's config (see configs/tiny.py) and returns its arms.

    Raises:
      UserError: a field that is unknown or missing, or an arm about a model or source that the config does not name.
    """
    _check_kind("the config", config, Mapping)
    _check_fields("the config", config, _FIELDS)
    for name, refinement in config["refine"].items():
        if not isinstance(refinement, Mapping):
            raise UserError(
                f"study config: refine has {name!r}: {shown(refinement)}; give each refinement a name, "
                "{'DGR': {...}}"
            )
        optional = {field: kind for field, kind in _REFINE_MORE.items() if field in refinement}
        _check_fields(f"refine.{name}", refinement, _REFINE | optional)
        if not re.fullmatch(r"[\w .-]+", name) or name in ("base", "vanilla", "native") or name.endswith(" dose"):
            raise UserError(
                f"study config: a refinement is called {name!r}; give it a name of letters, digits and spaces that "
                "is no other arm's (base, vanilla, native, ... dose)"
            )
    _check("decoding", config["decoding"], _names(Decoding))
    _check("recipe", config["recipe"], _names(Recipe) - {"learning_rate", "steps", "seed", "compute_dtype"})
    for field in ("samples_per_item", "answers_per_shard", "batch_size"):
        if config[field] is not None and config[field] < 1:
            raise UserError(f"study config: {field} is {config[field]}; give 1 or more")
    for name, source in config["sources"].items():
        if isinstance(source, Mapping) and "tiny" in source:
            _check_tiny(f"sources.{name}", source, _TINY_SOURCE, SOURCES)
            continue
        if not isinstance(source, list | tuple) or not source:
            raise UserError(
                f"study config: sources.{name} is {shown(source)}; give a list of parts, each with `spec` and `rows` "
                "(0 for all), or one source of the tiny world"
            )
        for part in source:
            _check_kind(f"a part of sources.{name}", part, Mapping)
            _check_fields(f"a part of sources.{name}", part, _PART)
            _check_counts(f"a part of sources.{name}", part)
    for suite in config["suites"]:
        _check_suite("a suite", suite)
    if looks := config["diagnosis"]:
        _check_fields("diagnosis", looks, _DIAGNOSIS)
        _check_suite("diagnosis.separate", looks["separate"])
        if looks["opener_tokens"] < 1:
            raise UserError(f"study config: diagnosis.opener_tokens is {looks['opener_tokens']}; give 1 or more")
    arms = expand(config["grids"], {"model": list(config["models"]), **config["defaults"]})
    for arm in arms:
        named = [("model", config["models"]), ("source", config["sources"])]
        for field, known in named + [("refine", config["refine"])] * bool(arm.dose):
            if (value := getattr(arm, field)) not in known:
                names = ", ".join(sorted(known))
                raise UserError(f"study config: a grid has {field} {value!r}; the config has {names}")
        recipe(config, arm)
    return arms


def recipe(config: Mapping[str, Any], arm: Arm) -> Recipe:
    """How an arm is fine-tuned.

    Raises:
      UserError: a value that the recipe cannot have.
    """
    of_the_arm = {"learning_rate": arm.learning_rate, "steps": arm.steps, "seed": arm.seed}
    try:
        return Recipe(**config["recipe"], **of_the_arm, compute_dtype=config["dtype"])
    except UserError as error:
        raise UserError(f"study config: {error}") from error


def expand(grids: Sequence[Mapping[str, Any]], defaults: Mapping[str, Sequence[Any]]) -> list[Arm]:
    """Arms of a config: each grid is a product over its listed values; later duplicates are dropped.

    Args:
      grids: field of `Arm` -> list of values.
      defaults: the same, for fields that a grid leaves out.

    Raises:
      UserError: a field that `Arm` does not have, a value that is not in a list or that the field cannot have, two
        arms of one name, or no arm at all.
    """
    arms: dict[Arm, None] = {}
    for grid in grids:
        merged = {**defaults, **grid}
        _check("a grid", merged, _names(Arm), needed={"model", "source"})
        for field, values in merged.items():
            if not isinstance(values, list | tuple):
                raise UserError(f"study config: a grid has {field} {values!r}; give a list of values, [{values!r}]")
        for values in itertools.product(*merged.values()):
            arm = Arm(**dict(zip(merged, values, strict=True)))
            # What is not refined is one arm, whatever would refine it.
            arms.setdefault(arm if arm.dose else dataclasses.replace(arm, refine=Arm.refine))
    if not arms:
        raise UserError("study config: the grids hold no arm; see configs/tiny.py")
    names = [arm.name for arm in arms]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise UserError(f"study config: two arms are called {repeated[0]}; take one of them out of the grids")
    return list(arms)


def _names(kind: type) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}


def _check_suite(what: str, given: Mapping[str, Any]) -> None:
    if "tiny" in given:
        _check_tiny(what, given, _TINY_SUITE, ("problems", "harmful", "benign"))
    else:
        _check_fields(what, given, _SUITE)
        _check_counts(what, given)


def _check_tiny(what: str, given: Mapping[str, Any], fields: Mapping[str, Any], names: Collection[str]) -> None:
    """A source or suite is of the tiny world."""
    _check_fields(what, given, fields)
    _check_counts(what, given)
    if given["tiny"] not in names:
        raise UserError(f"study config: {what} has tiny {given['tiny']!r}; the tiny world has {', '.join(names)}")


def _check_counts(what: str, given: Mapping[str, Any]) -> None:
    for field, most in _MOST.items():
        if not 0 <= (count := given.get(field, 0)) <= most:
            raise UserError(f"study config: {what}: {field} is {shown(count)}; give 0 to {most:,}")


def _check_fields(what: str, given: Mapping[str, Any], kinds: Mapping[str, Any]) -> None:
    """It has these fields and no others, each of its kind."""
    _check(what, given, kinds, needed=kinds)
    for field, kind in kinds.items():
        _check_kind(f"{field} of {what}", given[field], kind)


def _check_kind(what: str, value: Any, kind: Any) -> None:
    if not _is(value, kind):
        raise UserError(f"study config: {what} is {shown(value)}; {_EXAMPLES} have what stands there")


def _is(value: Any, kind: Any) -> bool:
    """Whether a value is of a type; `[kind]` stands for a sequence of such, `{str: kind}` for an object."""
    match kind:
        case {}:
            ((_, inner),) = kind.items()
            return isinstance(value, Mapping) and all(isinstance(k, str) and _is(v, inner) for k, v in value.items())
        case [inner]:
            return isinstance(value, list | tuple) and all(_is(item, inner) for item in value)
    if kind in (int, float):
        return isinstance(value, int | kind) and not isinstance(value, bool)
    return isinstance(value, kind)


def _check(what: str, given: Mapping[str, Any], known: Collection[str], needed: Iterable[str] = ()) -> None:
    if unknown := sorted(map(str, given.keys() - known)):
        raise UserError(f"study config: {what} has {unknown[0]!r}; its fields are {', '.join(sorted(known))}")
    if missing := sorted(set(needed) - given.keys()):
        raise UserError(f"study config: {what} lacks {missing[0]!r}; {_EXAMPLES} have it")
