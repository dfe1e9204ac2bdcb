"""Plans a run on a machine that is not here: memory by part, the largest batch, traffic, and the best possible time.

python scripts/plan.py --model=DIR --device=v5p:4x4x4 --for=sft --rows=64 --length=8192
The programs that the run would start are compiled by the machine's own compiler; no weights are needed, and no device.
Exits with status 1, and advice, where the run does not fit.
"""

import os
import pathlib
from typing import Any

from absl.flags import FlagValues

from dgr_jax.commands import flags
from dgr_jax.errors import UserError

_CONFIG = pathlib.Path(__file__).parents[2] / "configs" / "sft.py"
_ADVICE = {
    "score": "take fewer `rows` or a smaller `length`, or more devices: fsdp and tensor both cut the weights",
    "refine": "take a smaller `batch_size` or `max_new_tokens`, or cut the heads over more devices: `mesh` tensor=2",
    "sft": "take fewer `rows` (--config.accumulation cuts a step), --config.remat=full, a smaller `length`, or more "
    "devices on fsdp",
}


def define(given: FlagValues) -> None:
    """The command's flags."""
    flags.define(
        given,
        "model dtype mesh implementation",
        required="model device for",
        device=flags.text(None, "Machine: v5e:1, v5p:4x4x4, v6e:8, h100:8: a chip, and how many or how connected."),
        rows=flags.whole(None, "Rows at a time: of a batch that is scored, of a training step.", 1),
        length=flags.whole(None, "Tokens of a row; 4096 in scoring, --config.row_length in training.", 1),
        batch_size=flags.GENERATION["batch_size"],
        prompt_length=flags.whole(1024, "Tokens of the longest prompt to be refined.", 1),
        max_new_tokens=flags.GENERATION["max_new_tokens"],
        search=flags.yes_no(True, "Look for the largest batch that fits: up to four compilations more."),
        **{"for": flags.choice(None, ["score", "refine", "sft"], "The command that is planned.")},
    )
    flags.define_config(given, str(_CONFIG), "The recipe of --for=sft; see configs/.")


def main(given: FlagValues) -> str:
    """Compiles and reports."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # compilers talk of what does not fit, and so does the plan
    from dgr_jax.models.sharding import make_mesh
    from dgr_jax.planning.machines import Machine
    from dgr_jax.planning.plan import check_fits
    from dgr_jax.planning.purposes import Setting, plan_refine, plan_score, plan_sft

    machine = Machine.of(given.device)  # before anything asks JAX for its own
    mesh, dtype = make_mesh(given.mesh, machine.devices), given.dtype or "bfloat16"
    setting = Setting(_architecture(given.model), machine, mesh, dtype, given.implementation)
    purpose: Any = given["for"].value
    if purpose == "sft":
        length = {"row_length": given.length} if given.length else {}
        recipe = flags.recipe(given, compute_dtype=dtype, **length)
        plan = plan_sft(setting, recipe, given.rows or setting.ways * recipe.accumulation, search=given.search)
    elif purpose == "score":
        length = given.length or 4096
        rows = given.rows or setting.ways * max(1, 8192 // (length * setting.ways))
        plan = plan_score(setting, rows, length, search=given.search)
    else:
        batch = flags.batch_size(given.batch_size)
        sampling = {"temperature": 0.6, "search": given.search}
        plan = plan_refine(setting, batch, given.prompt_length, given.max_new_tokens, **sampling)
    print(plan.text())
    check_fits(plan, _ADVICE[purpose])
    return ""


def _architecture(where: str):
    """Of a model folder, a hub id, or a config.json."""
    from dgr_jax.models.config import ModelConfig
    from dgr_jax.models.folder import load_config, local_folder
    from dgr_jax.run.files import read_json

    if where.endswith(".json"):
        raw = read_json(pathlib.Path(where))
        if not isinstance(raw, dict):
            raise UserError(f"{where}: not a JSON object; give a model's config.json")
        return ModelConfig.from_hf(raw, where=where)
    return load_config(local_folder(where, weights=False))
