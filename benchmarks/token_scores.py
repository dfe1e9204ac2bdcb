"""Token scores: our implementations beside what else there is, at the target models' widths and vocabulary.

python benchmarks/token_scores.py         (small on a CPU, full size on an accelerator; a few minutes)
"""

import functools
import importlib.util
from collections.abc import Iterator

import harness
import jax
import jax.numpy as jnp
import numpy as np
import rivals
from absl import app, flags
from dgr_kernels.token_scores import token_scores

flags.DEFINE_list("widths", None, "Values of D; 1024 and 4096 by default, 64 on a CPU.")
flags.DEFINE_integer("tokens", None, "Tokens; 8192 by default, 256 on a CPU.", lower_bound=1)
flags.DEFINE_integer("vocabulary", None, "Entries; 151936 by default, 8000 on a CPU.", lower_bound=1)
FLAGS = flags.FLAGS


def contenders(T: int, D: int, V: int, dtype: jnp.dtype) -> Iterator[harness.Contender]:
    """Everyone who scores T tokens of width D."""
    rng = np.random.default_rng(0)
    inputs = []
    for _ in range(harness.INPUT_SETS):
        hidden, unembed = (jnp.asarray(rng.normal(size=shape), dtype) for shape in ((T, D), (V, D)))
        inputs.append((hidden, unembed * D**-0.5, jnp.asarray(rng.integers(0, V, T), jnp.int32)))
    moved = jnp.dtype(dtype).itemsize * D * (T + V)
    work, by = harness.Work(f"{T} tokens, D={D}, V={V}", 2.0 * T * D * V, moved), (0, 1)

    def ours(*arrays: jax.Array, implementation: str) -> jax.Array:
        return token_scores(*arrays, implementation=implementation).log_prob

    for name in harness.ours("token_scores"):
        yield from harness.contenders(name, work, functools.partial(ours, implementation=name), inputs, by)
    if jax.default_backend() != "cpu":
        with_logits = functools.partial(ours, implementation="reference")
        yield from harness.contenders("XLA with logits", work, with_logits, inputs, by)
    if importlib.util.find_spec("tokamax"):
        yield from harness.contenders("tokamax", work, rivals.tokamax_scores, inputs, by)
    yield from rivals.torch_contenders("torch with logits", work, rivals.torch_scores, inputs, by)


def main(_: list[str]) -> None:
    small = jax.default_backend() == "cpu"
    dtype = jnp.float32 if small else jnp.bfloat16
    T = FLAGS.tokens or (256 if small else 8192)
    V = FLAGS.vocabulary or (8000 if small else 151_936)
    everyone = harness.roofs(small)
    for D in FLAGS.widths or ((64,) if small else (1024, 4096)):
        everyone += contenders(T, int(D), V, dtype)
    harness.finish("token_scores", everyone)


if __name__ == "__main__":
    app.run(main)
