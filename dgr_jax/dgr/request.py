"""The rewrite request: the one prompt of DGR, a template file that a user can replace.

A template is plain text with the fields `{prompt}`, `{reasoning}` and `{answer}`, each at least once. The paper
does not publish its wording; the default follows what its ancestor does (arXiv 2402.13669): show the request and a
reference, ask for the model's own reasoning and answer, forbid mention of the reference.
"""

import pathlib
import re

from dgr_jax import ASSETS
from dgr_jax.data.trace import Trace
from dgr_jax.errors import UserError
from dgr_jax.run.files import read_text

DEFAULT_TEMPLATE = ASSETS / "rewrite_prompt.txt"
FIELDS = ("prompt", "reasoning", "answer")
_FIELD = re.compile(r"\{(" + "|".join(FIELDS) + r")\}")


def read_template(path: str | pathlib.Path | None = None) -> str:
    """The template's text without its final newline.

    Raises:
      UserError: the file cannot be read, or lacks one of the three fields.
    """
    file = path or DEFAULT_TEMPLATE
    text = read_text(file, "rewrite template").removesuffix("\n")
    missing = [field for field in FIELDS if f"{{{field}}}" not in text]
    if missing:
        raise UserError(
            f"rewrite template {file}: lacks {{{missing[0]}}}; it needs {{prompt}}, {{reasoning}}, {{answer}}"
        )
    return text


def render_request(template: str, trace: Trace) -> str:
    """The user turn that asks for a rewrite of `trace`. Braces inside the trace are left alone."""
    return _FIELD.sub(lambda match: getattr(trace, match.group(1)), template)
