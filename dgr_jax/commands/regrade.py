"""Grades answers again, with other judges or newer graders; the model that gave them is not asked.

python scripts/regrade.py --input=runs/eval --output=runs/eval_again
python scripts/regrade.py --input=samples.jsonl --judge=phrases --judge=mine.json --output=runs/two_judges
"""

from absl.flags import FlagValues

from dgr_jax.commands import flags


def define(given: FlagValues) -> None:
    """The command's flags."""
    flags.define(
        given,
        "output dtype mesh implementation compilation_cache judges",
        required="input output",
        batch_size=flags.GENERATION["batch_size"],
        input=flags.text(None, "What evaluate.py left: its folder, or a samples.jsonl."),
    )


def main(given: FlagValues) -> str:
    """Grades into OUTPUT/results.json and OUTPUT/samples.jsonl."""
    import dataclasses

    from etils import epath

    from dgr_jax.errors import UserError
    from dgr_jax.evaluation.metrics import summary_table
    from dgr_jax.evaluation.run import grade_all
    from dgr_jax.evaluation.samples import how_made, read_samples
    from dgr_jax.run.files import fingerprint_records, read_json
    from dgr_jax.run.stage import Stage

    samples, judges = read_samples(given.input), flags.judges(given)
    about, instructions = how_made(given.input)
    if epath.Path(given.input).resolve() == epath.Path(given.output).resolve():
        raise UserError(f"`output` is {given.output}, where the answers are; give a new folder")
    with Stage.open(
        given.output,
        "regrade",
        config={"judges": {judge.name: judge.fingerprint for judge in judges}},
        inputs={"samples": fingerprint_records(map(dataclasses.asdict, samples))},
        model=None,
        seed=0,
    ) as stage:
        if not stage.finished:
            grade_all(samples, judges, about=about, output_dir=stage.folder, instructions=instructions)
            stage.finish(samples=len(samples))
        with stage.reading():
            table = summary_table(read_json(stage.folder / "results.json"))
        return f"{table}\nevery answer with its grade: {given.output}/samples.jsonl"
