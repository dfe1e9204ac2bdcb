"""Distribution-Grounded Refinement (arXiv 2602.02136) of safety data for large reasoning models, in JAX."""
