"""Puts evaluations side by side: ours, of one or several seeds, and lm_eval's.

    python scripts/table.py runs/eval runs/lm_eval_output
    python scripts/table.py runs/a_seed0,runs/a_seed1 runs/b_seed0,runs/b_seed1 --output=table.json

Folders joined by commas are one model's, with several seeds. What is different between two of our own evaluations, and
how certainly, is said by scripts/compare.py.
"""

from absl.flags import FlagValues

from dgr_jax.commands import flags

ARGUMENTS = "one or more folders of evaluate.py, regrade.py or lm_eval"


def define(given: FlagValues) -> None:
    """The command's flags."""
    flags.define(given, "", required="", output=flags.text(None, "File for the table as JSON, local or gs://."))


def main(given: FlagValues, folders: list[str]) -> str:
    """Prints the table, and writes it where --output says."""
    import dataclasses

    from dgr_jax.errors import UserError
    from dgr_jax.evaluation.table import read_column, table_text
    from dgr_jax.run.files import write_json

    if not folders:
        raise UserError(f"no folder is given; give {ARGUMENTS}")
    columns = {folder: read_column(folder) for folder in folders}
    if given.output:
        rows = [
            {"of": name, "suite": suite, "metric": metric, **dataclasses.asdict(cell)}
            for name, column in columns.items()
            for (suite, metric), cell in column.items()
        ]
        write_json(given.output, rows)
    return table_text(columns)
