"""Distribution-Grounded Refinement (arXiv 2602.02136) of safety data for large reasoning models, in JAX.

The public names are imported when they are first used, so that `import dgr_jax` costs nothing. Rooms offer those that
live in them: `dgr_jax.scoring.Scorer` is `dgr_jax.Scorer`.
"""

import importlib
import pathlib
from collections.abc import Callable
from typing import Any

ASSETS = pathlib.Path(__file__).parent / "assets"
"""Files that come with the package: the embedded model, prompts, phrases, pages."""

_HOMES: dict[str, tuple[str, ...]] = {
    "data.files": ("iter_traces", "read_traces", "write_traces"),
    "data.trace": ("Trace",),
    "dgr.filter": ("RewriteFilter",),
    "dgr.refine": ("Refinement", "RefineSettings", "refine"),
    "errors": ("UserError",),
    "evaluation.run": ("evaluate",),
    "evaluation.suites": ("load_suites",),
    "generation.engine": ("Completion", "Decoding", "Request"),
    "generation.openai": ("OpenAIEngine",),
    "generation.sampler": ("Sampler",),
    "judges.phrases": ("load_judge",),
    "models.config": ("Llama3Scaling", "ModelConfig"),
    "models.cache": ("KVCache",),
    "models.decoder": ("Decoder", "init_model"),
    "models.sharding": ("make_mesh",),
    "models.weights": ("from_pretrained", "save_pretrained"),
    "scoring.scorer": ("Scorer", "SequenceScores"),
    "scoring.settings": ("ScoreSettings",),
    "scoring.trace_score": ("TraceScore",),
    "study.study": ("Study",),
    "tokens.chat": ("ChatFormat", "Rendered"),
    "tokens.packing": ("TokenSequence",),
    "training.batches": ("training_sequences",),
    "training.loop": ("train",),
    "training.recipe": ("Recipe",),
}


def offer(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of this package, or of a room: the public names that live in it."""
    within = package.partition(".")[2]
    homes = {name: home for home, names in _HOMES.items() if home.startswith(within) for name in names}

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}; its names are {', '.join(known())}")
        return getattr(importlib.import_module(f"dgr_jax.{homes[name]}"), name)

    def known() -> list[str]:
        return sorted(homes)

    return get, known


__getattr__, __dir__ = offer(__name__)
