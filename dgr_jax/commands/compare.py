"""Compares evaluations item by item: how much better is B than A, with an interval and a p for each rate.

    python scripts/compare.py runs/vanilla_eval runs/dgr_eval
    python scripts/compare.py runs/a_seed0,runs/a_seed1 runs/b_seed0,runs/b_seed1 --cluster_by=group

The first is what the others are compared with. Folders joined by commas are one model's, with several seeds.
"""

from absl.flags import FlagValues

from dgr_jax.commands import flags

ARGUMENTS = "two or more folders of evaluate.py"


def define(given: FlagValues) -> None:
    """The command's flags."""
    flags.define(
        given,
        "",
        required="",
        output=flags.text(None, "File for the comparison as JSON, local or gs://."),
        cluster_by=flags.choice(
            "item", ["item", "group"], "What is independent: the items, or only their groups (such as framings)."
        ),
    )


def main(given: FlagValues, folders: list[str]) -> str:
    """Prints the table, and writes it where --output says."""
    from dgr_jax.errors import UserError
    from dgr_jax.evaluation.compare import compare, comparison_text, read_evaluation
    from dgr_jax.run.files import write_json

    if len(folders) < 2:
        raise UserError(f"found {len(folders)} folders; give {ARGUMENTS}, such as runs/vanilla_eval runs/dgr_eval")
    evaluations = [read_evaluation(folder) for folder in folders]
    compared = [compare(evaluations[0], other, cluster_by=given.cluster_by) for other in evaluations[1:]]
    if given.output:
        write_json(given.output, [comparison.to_dict() for comparison in compared])
    return comparison_text(evaluations, compared)
