"""Judges by what a command line says of them."""

from collections.abc import Sequence
from typing import Any

from dgr_jax.errors import UserError, shown
from dgr_jax.judges.formats import FORMATS
from dgr_jax.judges.judge import Judge
from dgr_jax.judges.phrases import load_judge


def load_judges(specs: Sequence[str] | None, **how: Any) -> list[Judge]:
    """The judges that specs name; the default one where there are none.

    Args:
      specs: each "phrases" (the default judge), a phrases file FILE.json, or a guard, KIND:DIR, of `FORMATS`.
      how: arguments of `dgr_jax.judges.guard.Guard`.

    Raises:
      UserError: a spec that names no judge, a file or folder that is none, or two judges of one name.
    """
    judges = [_judge(spec, how) for spec in specs or ["phrases"]]
    names = [judge.name for judge in judges]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise UserError(f"two judges are called {shown(repeated[0])}; give each `judge` once, and files other names")
    return judges


def _judge(spec: str, how: dict[str, Any]) -> Judge:
    kind, _, place = spec.partition(":")
    if spec == "phrases":
        return load_judge()
    if kind in FORMATS and place:
        from dgr_jax.judges.guard import Guard

        return Guard(kind, place, **how)
    if spec.endswith(".json"):
        return load_judge(spec)
    raise UserError(
        f"`judge` is {shown(spec)}; give phrases, a phrases file such as FILE.json, or KIND:DIR with KIND one of "
        f"{', '.join(FORMATS)}"
    )
