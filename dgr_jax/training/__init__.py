"""Supervised fine-tuning: recipe, batches, the loop, its checkpoints and metrics."""
