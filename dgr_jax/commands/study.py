"""Runs a study (arms x seeds -> evaluation) and writes its report.

python scripts/study.py --config=configs/tiny.py --output=runs/demo
"""

import time

from absl.flags import FlagValues, mark_flag_as_required

from dgr_jax.commands import flags


def define(given: FlagValues) -> None:
    """The command's flags."""
    flags.define(given, "output compilation_cache", required="output")
    flags.define_config(given, None, "The study; see configs/tiny.py.")
    mark_flag_as_required("config", flag_values=given)


def main(given: FlagValues) -> str:
    """Runs what is left of the study and reports on all of it."""
    from dgr_jax.run.files import check_local
    from dgr_jax.study.report import terminal_summary, write_report
    from dgr_jax.study.study import Study

    check_local(given.output, "a study")
    begin = time.monotonic()
    results = Study(flags.config(given), given.output).run()
    page = write_report(results, given.output)
    return f"{terminal_summary(results)}\nreport: {page}   ({time.monotonic() - begin:.0f} s)"
