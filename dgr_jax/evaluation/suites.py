"""Suites: loaded by name and path, and cut to a sample."""

import dataclasses
import hashlib
import itertools
import re
from collections.abc import Iterable
from typing import Any

from etils import epath

from dgr_jax.errors import UserError
from dgr_jax.evaluation.graders import final_number
from dgr_jax.evaluation.items import Item, Kind, Suite
from dgr_jax.evaluation.readers import READERS, read_own


def load_suite(spec: str) -> list[Suite]:
    """Loads suites.

    Args:
      spec: "READER:PATH" with a name of `READERS`, or the path of a .jsonl file whose rows have `id`, `prompt`, `kind`
        and, for problems, `reference`; "NAME=" before it is what the suite is called, by default the reader's name or
        the file's.

    Raises:
      UserError: an unknown name, or a bad row; the message names file, row and field.
    """
    found = re.fullmatch(r"(?:([\w.+-]+)=)?(.*)", spec, re.DOTALL)
    name, place = (found[1] or "", found[2]) if found else ("", spec)
    reader, _, path = place.partition(":")
    if reader in READERS and path:
        name = name or reader
        items = list(READERS[reader].items(path))
    elif place.endswith(".jsonl") and not _names_a_reader(place):
        name, path = name or epath.Path(place).stem, place
        items = list(read_own(place))
    else:
        raise UserError(
            f"suite {spec!r}: give READER:PATH with READER one of {', '.join(READERS)}, or a .jsonl file; NAME= before "
            "it names the suite"
        )
    if not items:
        raise UserError(f"{path}: the suite is empty")
    ids = [item.id for item in items]
    if len(set(ids)) < len(ids):
        again = next(id for number, id in enumerate(ids) if id in ids[:number])
        raise UserError(f"{path}: id {again!r} occurs twice; an item's id must be unique")
    suites: dict[Kind, list[Item]] = {}
    for item in items:
        if item.kind == "reasoning" and final_number(item.reference) is None:
            raise UserError(f"{path}: item {item.id!r}: reference {item.reference!r} has no number to compare with")
        suites.setdefault(item.kind, []).append(item)
    if len(suites) == 1:
        return [Suite(name, kind, group) for kind, group in suites.items()]
    return [Suite(f"{name}_{kind}", kind, group) for kind, group in suites.items()]


def _names_a_reader(place: str) -> bool:
    """Whether what stands before a colon is no part of a path, and so was meant for a reader."""
    reader, colon, path = place.partition(":")
    words = colon and not path.startswith("//") and re.fullmatch(r"[\w.+ -]{2,}", reader)
    return bool(words) and not epath.Path(place).exists()


def load_suites(specs: Iterable[str], limit: int = 0, seed: int = 0) -> list[Suite]:
    """The suites of several specs; see `load_suite`.

    Args:
      specs: the specs.
      limit: items that each suite is cut to, drawn over its groups; 0 takes all.
      seed: of that draw.

    Raises:
      UserError: as `load_suite`; or two suites of one name.
    """
    suites = list(itertools.chain.from_iterable(map(load_suite, specs)))
    check_names(suites)
    return [draw(suite, limit, seed) if limit else suite for suite in suites]


def check_names(suites: Iterable[Suite]) -> None:
    """Raises a UserError where two suites have the same name."""
    names = [suite.name for suite in suites]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise UserError(f"two suites are called {repeated[0]!r}; name one of them yourself: `suite`=NAME=READER:PATH")


def draw(suite: Suite, limit: int, seed: int) -> Suite:
    """A suite with `limit` of its items, in their order: drawn at random, as evenly over groups as they allow.

    An item's luck depends on seed, suite and id alone.
    """

    def luck(item: Item) -> bytes:
        return hashlib.sha256(f"{seed}\0{suite.name}\0{item.id}".encode()).digest()

    turns: dict[Any, itertools.count[int]] = {}
    order = []
    for item in sorted(suite.items, key=luck):
        turn = turns.setdefault(item.meta.get("group"), itertools.count())
        order.append((next(turn), luck(item), item.id))
    chosen = {id for *_, id in sorted(order)[:limit]}
    return dataclasses.replace(suite, items=[item for item in suite.items if item.id in chosen])
