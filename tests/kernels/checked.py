"""The public functions, which here check the shapes and dtypes in their annotations whenever they are called."""

from typing import Any, Literal, get_origin, get_type_hints

import dgr_kernels.attention
import dgr_kernels.token_scores
from beartype import beartype
from dgr_kernels.attention import Visibility
from jaxtyping import jaxtyped

_checked = jaxtyped(typechecker=beartype)

attention = _checked(dgr_kernels.attention.attention)
attention_and_log_sum_exp = _checked(dgr_kernels.attention.attention_and_log_sum_exp)
prepare = _checked(dgr_kernels.attention.prepare)
count_tiles = _checked(dgr_kernels.attention.count_tiles)
token_scores = _checked(dgr_kernels.token_scores.token_scores)
token_divergence = _checked(dgr_kernels.token_scores.token_divergence)
causal, packed, grouped, shared_prefix, padded, cached = (
    _checked(constructor)
    for constructor in (
        Visibility.causal,
        Visibility.packed,
        Visibility.grouped,
        Visibility.shared_prefix,
        Visibility.padded,
        Visibility.cached,
    )
)


def fits(record: Any) -> bool:
    """Whether the fields of a record (a visibility, scores) are as annotated, an axis letter being one size."""
    with jaxtyped("context"):
        hints = get_type_hints(type(record)).items()
        return all(isinstance(getattr(record, name), hint) for name, hint in hints if get_origin(hint) is not Literal)
