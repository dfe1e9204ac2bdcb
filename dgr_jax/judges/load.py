"""Judges by what a command line says of them."""

import re
from collections.abc import Sequence
from typing import Any

from dgr_jax.errors import UserError, shown
from dgr_jax.judges.formats import FORMATS
from dgr_jax.judges.judge import Judge
from dgr_jax.judges.phrases import load_judge


def load_judges(specs: Sequence[str] | None, **how: Any) -> list[Judge]:
    """The judges that specs name; the default one where there are none.

    Args:
      specs: each "phrases" (the default judge), a phrases file FILE.json, or a guard, KIND:DIR, of `FORMATS`; NAME=
        before a guard is what it is called, by default its kind.
      how: arguments of `dgr_jax.judges.guard.Guard`.

    Raises:
      UserError: a spec that names no judge, a file or folder that is none, or two judges of one name.
    """
    judges = [_judge(spec, how) for spec in specs or ["phrases"]]
    names = [judge.name for judge in judges]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise UserError(
            f"two judges are called {shown(repeated[0])}; give each `judge` once, files other names, and guards NAME="
        )
    return judges


def _judge(spec: str, how: dict[str, Any]) -> Judge:
    if spec == "phrases":
        return load_judge()
    if (found := re.fullmatch(r"(?:([\w.+-]+)=)?(\w+):(.+)", spec)) and found[2] in FORMATS:
        from dgr_jax.judges.guard import Guard

        return Guard(found[2], found[3], name=found[1], **how)
    if spec.endswith(".json"):
        return load_judge(spec)
    raise UserError(
        f"`judge` is {shown(spec)}; give phrases, a phrases file such as FILE.json, or KIND:DIR with KIND one of "
        f"{', '.join(FORMATS)}"
    )
