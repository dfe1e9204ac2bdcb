"""lm_eval with our models: every task of the harness, scored and generated in JAX.

python scripts/lm_eval.py --model dgr_jax --model_args pretrained=DIR --tasks hellaswag,gsm8k

Everything is passed on to lm_eval, whose help follows. Model arguments: pretrained, dtype, mesh, implementation,
max_length, max_gen_toks, tokens_per_batch, share_prefixes, add_bos_token, prefix_token_id, chat_template_args,
enable_thinking, think_end_token, seed.
"""

import pathlib
import sys

from dgr_jax.commands.app import fail
from dgr_jax.errors import UserError


def main() -> None:
    """Registers the model and calls lm_eval's own command line."""
    # Python puts the script's folder first, where `import lm_eval` would find the script.
    here = pathlib.Path(sys.argv[0]).resolve().parent
    sys.path = [entry for entry in sys.path if pathlib.Path(entry).resolve() != here]
    try:
        from lm_eval.__main__ import cli_evaluate
        from lm_eval.api.registry import model_registry
    except ImportError:
        fail("lm_eval is not installed; pip install 'dgr_jax[harness]'")
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)
    model_registry.register("dgr_jax", target="dgr_jax.evaluation.lm_eval:DgrJax")
    try:
        cli_evaluate()
    except UserError as error:
        fail(str(error))
