"""Runs a study (arms x seeds -> evaluation) and writes its report.

python scripts/study.py --config=configs/tiny.py --output=runs/demo

A study of a real model takes the same flags as the commands that it is made of; see configs/study_real.py.
"""

import time

from absl.flags import FlagValues, mark_flag_as_required

from dgr_jax.commands import flags


def define(given: FlagValues) -> None:
    """The command's flags."""
    flags.define(
        given,
        "output mesh hosts implementation compilation_cache",
        {name: flags.GENERATION[name] for name in ("engine", "base_url", "served_model")},
        required="output",
    )
    flags.define_config(given, None, "The study; see configs/tiny.py.")
    mark_flag_as_required("config", flag_values=given)


def main(given: FlagValues) -> str:
    """Runs what is left of the study and reports on all of it."""
    from dgr_jax.models.sharding import mesh_or_none
    from dgr_jax.run import hosts
    from dgr_jax.run.files import check_local
    from dgr_jax.study.report import terminal_summary, write_report
    from dgr_jax.study.study import Study
    from dgr_jax.study.target import Machine

    check_local(given.output, "a study")
    begin = time.monotonic()
    config = flags.config(given)
    server = None
    if given.engine == "openai":
        flags.check_server(given)
        server = given.base_url, given.served_model or next(iter(config.get("models", {}).values()), "")
    machine = Machine(mesh_or_none(given.mesh), given.implementation, server)
    say = print if hosts.writes() else lambda _: None
    results = hosts.together(lambda: Study(config, given.output, say, machine)).run()
    page = hosts.from_writer(lambda: str(write_report(results, given.output)))
    return f"{terminal_summary(results)}\nreport: {page}   ({time.monotonic() - begin:.0f} s)"
