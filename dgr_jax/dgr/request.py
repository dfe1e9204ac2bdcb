"""The rewrite request: the one prompt of DGR, a template file that a user can replace.

A template is plain text with the fields `{prompt}`, `{reasoning}` and `{answer}`, each at least once. The paper
does not publish its wording; the default follows what its ancestor does (arXiv 2402.13669): show the request and a
reference, ask for the model's own reasoning and answer, forbid mention of the reference.

A template of `{prompt}` alone shows no reference: the model writes the row by itself, steered by the template's words,
as ThinkSafe has it (arXiv 2601.23143); it is then asked benign prompts as they are.
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
_REFERENCE = re.compile(r"\{(reasoning|answer)\}")


def read_template(path: str | pathlib.Path | None = None) -> str:
    """The template's text without its final newline.

    Raises:
      UserError: the file cannot be read, lacks the prompt, or has one of reasoning and answer without the other.
    """
    file = path or DEFAULT_TEMPLATE
    text = read_text(file, "rewrite template").removesuffix("\n")
    missing = [field for field in FIELDS if f"{{{field}}}" not in text]
    if missing and missing != ["reasoning", "answer"]:
        raise UserError(
            f"rewrite template {file}: lacks {{{missing[0]}}}; it needs {{prompt}}, {{reasoning}}, {{answer}}, or "
            "{prompt} alone where the model is to write without a reference"
        )
    return text


def render_request(template: str, trace: Trace) -> str:
    """The user turn that asks for a rewrite of `trace`. Braces inside the trace are left alone."""
    if trace.label == "benign" and not _REFERENCE.search(template):
        return trace.prompt
    return _FIELD.sub(lambda match: getattr(trace, match.group(1)), template)
