"""Distribution-Grounded Refinement (arXiv 2602.02136) of safety data for large reasoning models, in JAX.

The public names are imported when they are first used, so that `import dgr_jax` costs nothing.
"""

import importlib
import pathlib
from typing import Any

ASSETS = pathlib.Path(__file__).parent / "assets"
"""Files that come with the package: the embedded model, prompts, phrases, pages."""

_HOMES: dict[str, tuple[str, ...]] = {
    "data.files": ("iter_traces", "read_traces", "write_traces"),
    "data.trace": ("Trace",),
    "dgr.filter": ("RewriteFilter",),
    "dgr.refine": ("Refinement", "RefineSettings", "refine"),
    "errors": ("UserError",),
    "evaluation.judges": ("load_judge",),
    "evaluation.run": ("evaluate",),
    "evaluation.suites": ("load_suites",),
    "generation.engine": ("Completion", "Decoding", "Request"),
    "generation.openai": ("OpenAIEngine",),
    "generation.sampler": ("Sampler",),
    "models.decoder": ("Decoder",),
    "models.sharding": ("make_mesh",),
    "models.weights": ("from_pretrained", "save_pretrained"),
    "scoring.scorer": ("Scorer",),
    "scoring.trace_score": ("TraceScore",),
    "tokens.chat": ("ChatFormat",),
    "training.batches": ("training_sequences",),
    "training.loop": ("train",),
    "training.recipe": ("Recipe",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'dgr_jax' has no attribute {name!r}; its names are {', '.join(__dir__())}")
    return getattr(importlib.import_module(f"dgr_jax.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted(_HOME_OF)
