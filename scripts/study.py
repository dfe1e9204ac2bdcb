"""Runs a study (arms x seeds -> evaluation) and writes its report.

python scripts/study.py --config=configs/tiny.py --output=runs/demo
"""

from absl import flags

from dgr_jax.commands import flags as cli

cli.define_common_flags("output", required=("output",))
cli.define_config_flag(None, "The study; see configs/tiny.py.")
flags.mark_flag_as_required("config")
FLAGS = flags.FLAGS


def main(argv: list[str]) -> None:
    import time

    from dgr_jax.run.stage import check_local
    from dgr_jax.study.report import terminal_summary, write_report
    from dgr_jax.study.study import Study

    check_local(FLAGS.output, "a study")
    begin = time.monotonic()
    results = Study(cli.config(), FLAGS.output).run()
    page = write_report(results, FLAGS.output)
    print(terminal_summary(results))
    print(f"report: {page}   ({time.monotonic() - begin:.0f} s)")


if __name__ == "__main__":
    cli.run(main)
