"""Values of columnar files as what JSON knows: a column that is no part of a trace must not cost its row."""

import base64
import datetime
import decimal
import math
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from dgr_jax.data.trace import bad_field
from dgr_jax.errors import UserError


def as_json(value: Any) -> Any:
    """What JSON can hold of a value of a columnar file or of numpy.

    NaN becomes null, an infinity its name, dates and times ISO 8601, other numbers text, bytes text where they are
    UTF-8 and an object of their base64 elsewhere.
    """
    if isinstance(value, Mapping):
        return {key if isinstance(key, str) else str(as_json(key)): as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [as_json(item) for item in value]
    if hasattr(value, "tolist"):
        return as_json(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return {"base64": base64.b64encode(value).decode()}
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    return str(value) if isinstance(value, decimal.Decimal | datetime.timedelta | uuid.UUID) else value


def with_class_names(
    row: Mapping[str, Any], classes: Mapping[str, Sequence[str]], where: str
) -> Mapping[str, Any] | UserError:
    """A row in which numbers of classes are their names; -1, which the datasets library writes for none, is null."""
    named = {}
    for field, names in classes.items():
        number = row.get(field)
        if type(number) is int:
            if not -1 <= number < len(names):
                return bad_field(where, field, number, f"a number of a class, 0 to {len(names) - 1}")
            named[field] = names[number] if number >= 0 else None
    return {**row, **named}
