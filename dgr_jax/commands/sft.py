"""Fine-tunes a model, or an adapter beside it, on traces; stopped runs go on exactly where they stopped.

python scripts/sft.py --model=DIR --input=runs/refined/refined.jsonl --output=runs/sft --config=configs/sft.py
Any leaf of the config can be changed: --config.learning_rate=1e-5, --config.lora_rank=16
"""

import dataclasses
import pathlib
from typing import TYPE_CHECKING, Any

from absl.flags import FlagValues

from dgr_jax.commands import flags
from dgr_jax.errors import UserError

if TYPE_CHECKING:
    from dgr_jax.commands.inputs import Inputs
    from dgr_jax.models.config import ModelConfig
    from dgr_jax.tokens.chat import ChatFormat
    from dgr_jax.training.recipe import Recipe

_CONFIG = pathlib.Path(__file__).parents[2] / "configs" / "sft.py"


def define(given: FlagValues) -> None:
    """The command's flags."""
    flags.define(
        given,
        "model input output seed dtype mesh hosts implementation compilation_cache on_bad_row exclude",
        required="model input output",
        profile=flags.text(None, "Folder for a trace of a few steps by JAX's profiler."),
        wandb=flags.text(None, "Project of Weights & Biases that is told of each step; its package must be installed."),
        debug_nans=flags.yes_no(False, "Stop where the first number that is none comes about; slow."),
    )
    flags.define_config(given, str(_CONFIG), "The recipe; see configs/.")


def main(given: FlagValues) -> str:
    """Fine-tunes; the tuned model is OUTPUT/model, in Hugging Face format, and an adapter OUTPUT/adapter, in PEFT's."""
    import jax

    from dgr_jax.commands.inputs import Inputs
    from dgr_jax.models.adapter_files import save_adapter
    from dgr_jax.models.folder import fingerprint_model, load_config, local_folder, stored_dtype
    from dgr_jax.models.sharding import mesh_or_none
    from dgr_jax.models.weights import default_dtype, from_pretrained, is_there, save_pretrained
    from dgr_jax.run import hosts
    from dgr_jax.run.files import fingerprint_records, read_json_lines
    from dgr_jax.run.stage import Stage
    from dgr_jax.tokens.chat import ChatFormat
    from dgr_jax.training.batches import training_sequences
    from dgr_jax.training.loop import train
    from dgr_jax.training.metrics import Boards
    from dgr_jax.training.recipe import decisive

    def prepared() -> "tuple[Recipe, Inputs, pathlib.Path, ModelConfig, ChatFormat]":
        recipe = flags.recipe(given, seed=given.seed, compute_dtype=given.dtype or default_dtype())
        inputs = Inputs.read(given.input, on_bad_row=given.on_bad_row, exclude=given.exclude or ())
        folder = local_folder(given.model)
        # What cannot be loaded is refused before anything is written.
        return recipe, inputs, folder, load_config(folder), ChatFormat.from_pretrained(folder)

    recipe, inputs, folder, config, chat = hosts.together(prepared)
    with Stage.open(
        given.output,
        "sft",
        config={**decisive(dataclasses.asdict(recipe)), "chat": chat.fingerprint},
        inputs={"traces": fingerprint_records(trace.to_dict() for trace in inputs.traces)},
        model=fingerprint_model(folder),
        seed=given.seed,
    ) as stage:
        exported, beside = stage.folder / "model", stage.folder / "adapter"
        if not stage.finished:
            jax.config.update("jax_debug_nans", given.debug_nans)
            mesh = mesh_or_none(given.mesh)
            to_base = recipe.benign_loss == "divergence"
            sequences = training_sequences(
                inputs.traces, chat, recipe.row_length, config.max_positions, benign_to_base=to_base
            )
            how: Any = {"mesh": mesh, "implementation": given.implementation}
            start = from_pretrained(folder, dtype=recipe.start_dtype, **how)
            chat.check_fits(start.config.vocab_size)
            boards = Boards(wandb=given.wandb, config=dataclasses.asdict(recipe))
            tuned = train(
                start, sequences, recipe, mesh=mesh, folder=stage.folder, profile=given.profile, boards=boards
            ).model
            stored = stored_dtype(folder)
            if not hosts.from_writer(lambda: is_there(exported)):
                try:
                    if (adapter := tuned.adapter) is not None:
                        hosts.from_writer(lambda: beside.rmtree(missing_ok=True))  # of a run that was killed here
                        save_adapter(adapter, beside, config=config, base=folder, name=given.model)
                        del start, tuned
                        # Beside the weights as they are stored: in training they may have been rounded.
                        tuned = from_pretrained(folder, dtype=stored, **how).with_adapter(adapter)
                    save_pretrained(tuned, exported, dtype=stored, companions_from=folder)
                except UserError as error:
                    kept = "kept in its last checkpoint" if recipe.checkpoint_every else "lost, `checkpoint_every` is 0"
                    raise UserError(f"{error}; the training is {kept}") from error
            targets = sum(sequence.targets for sequence in sequences)
            stage.finish(traces=len(inputs.traces), targets=targets, **inputs.left_out)
        with stage.reading():
            steps = hosts.from_writer(lambda: read_json_lines(stage.folder / "metrics.jsonl"))
            losses = f"{len(steps)} steps, loss {steps[0]['loss']:.4f} -> {steps[-1]['loss']:.4f}"
            if "validation_loss" in steps[-1]:
                losses += f", on held-out traces {steps[0]['validation_loss_at_start']:.4f} -> "
                losses += f"{steps[-1]['validation_loss']:.4f}"
        places = [f"model: {exported}", *([f"adapter: {beside}"] if recipe.lora else [])]
        return "\n".join([*inputs.record(stage.folder), losses, *places])
