"""Distribution-Grounded Refinement (arXiv 2602.02136) of safety data for large reasoning models, in JAX."""

import pathlib

ASSETS = pathlib.Path(__file__).parent / "assets"
"""Files that come with the package: the embedded model, prompts, phrases."""
