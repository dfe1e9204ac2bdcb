"""Token scores: our implementations beside what else there is, at the target models' widths and vocabulary.

python benchmarks/token_scores.py         (small on a CPU, full size on an accelerator; a few minutes)
"""

import functools
import importlib
import importlib.util
import pathlib
import sys
from collections.abc import Callable, Iterator

import harness
import jax
import jax.numpy as jnp
import numpy as np
import rivals
from absl import app, flags
from dgr_kernels.token_scores import token_scores

flags.DEFINE_integer("rounds", 7, "Rounds of timing.", lower_bound=1)
flags.DEFINE_list("widths", None, "Values of D; 1024 and 4096 by default, 64 on a CPU.")
flags.DEFINE_integer("tokens", None, "Tokens; 8192 by default, 256 on a CPU.", lower_bound=1)
flags.DEFINE_integer("vocabulary", None, "Entries; 151936 by default, 8000 on a CPU.", lower_bound=1)
flags.DEFINE_bool("backward", True, "Time the gradient too.")
flags.DEFINE_string("output", None, "JSON file; benchmarks/results/token_scores_DEVICE.json by default.")
FLAGS = flags.FLAGS


def contenders(T: int, D: int, V: int, dtype: jnp.dtype) -> Iterator[harness.Contender]:
    """Everyone who scores T tokens of width D."""
    case = f"{T} tokens, D={D}, V={V}"
    rng = np.random.default_rng(0)
    inputs = []
    for _ in range(harness.INPUT_SETS):
        hidden, unembed = (jnp.asarray(rng.normal(size=shape), dtype) for shape in ((T, D), (V, D)))
        inputs.append((hidden, unembed * D**-0.5, jnp.asarray(rng.integers(0, V, T), jnp.int32)))
    flops = 2.0 * T * D * V
    moved = jnp.dtype(dtype).itemsize * D * (T + V)

    def both_ways(name: str, call: Callable[..., jax.Array]):
        yield harness.contender(name, case, "forward", call, inputs, flops, moved, "scores")
        if FLAGS.backward:
            gradient = jax.grad(lambda *x: call(*x).sum(), (0, 1))
            yield harness.contender(name, case, "forward + backward", gradient, inputs, 3 * flops, 3 * moved, "scores")

    for name in harness.OURS[jax.default_backend()]:
        score = functools.partial(token_scores, implementation=name)
        yield from both_ways(name, lambda *x, score=score: score(*x).log_prob)
    if jax.default_backend() != "cpu":
        yield from both_ways("XLA with logits", lambda *x: token_scores(*x, implementation="reference").log_prob)
    if importlib.util.find_spec("tokamax"):
        tokamax = importlib.import_module("tokamax")
        yield from both_ways(
            "tokamax",
            lambda hidden, unembed, targets: tokamax.linear_softmax_cross_entropy_loss(
                hidden, targets, unembed.T, reduction="none"
            ),
        )
    torch = rivals.torch_scores()
    if torch is not None:
        forward, both, wait = torch
        tensors = [tuple(rivals.to_torch(x) for x in arrays) for arrays in inputs]
        yield harness.Contender("torch with logits", case, "forward", forward, tensors, flops, moved, wait)
        if FLAGS.backward:
            yield harness.Contender(
                "torch with logits", case, "forward + backward", both, tensors, 3 * flops, 3 * moved, wait
            )


def main(_: list[str]) -> None:
    small = jax.default_backend() == "cpu"
    dtype = jnp.float32 if small else jnp.bfloat16
    T = FLAGS.tokens or (256 if small else 8192)
    V = FLAGS.vocabulary or (8000 if small else 151_936)
    everyone = harness.roofs(small)
    for D in FLAGS.widths or ((64,) if small else (1024, 4096)):
        everyone += contenders(T, int(D), V, dtype)
    harness.run(everyone, FLAGS.rounds)
    output = pathlib.Path(FLAGS.output) if FLAGS.output else harness.default_output("token_scores")
    print(harness.report("Token scores", everyone, harness.OURS[jax.default_backend()], output))
    print(f"\nwritten to {output}")
    sys.exit(harness.exit_status(everyone, harness.OURS[jax.default_backend()]))


if __name__ == "__main__":
    app.run(main)
