"""How a command runs: its help, its flags, its output, and how an error reaches the shell.

A command is a module of this folder. Its docstring is the help, `define(given)` defines its flags, and `main(given)`,
called with the parsed ones, returns what is printed at the end. One with `ARGUMENTS`, which says what they are, also
gets what the command line has beside flags.
"""

import importlib
import os
import re
import shlex
import signal
import sys
from types import ModuleType
from typing import Any, NoReturn

from absl import app, flags, logging

from dgr_jax.commands.flags import refused_config
from dgr_jax.errors import UserError, shortage

flags.disclaim_key_flags()  # the flags of a command are the script's own, so that --help lists them

_DIED_OF = 128
"""With a signal's number, the exit status by which a shell reports that signal."""


def run(name: str) -> None:
    """Parses the command line, runs a command of this folder and exits.

    A `UserError` becomes "error: ..." on standard error and status 1, and so does a full disk, wherever it is noticed;
    Ctrl-C becomes status 130, SIGTERM 143; a reader that leaves ends the script quietly. Any other exception is a bug
    and keeps its traceback.
    """
    command = importlib.import_module(f"dgr_jax.commands.{name}")
    sys.modules["__main__"].__doc__ = command.__doc__  # which absl shows as help
    try:
        command.define(flags.FLAGS)
    except UserError as error:
        fail(str(error))
    flags.adopt_module_key_flags(command)

    def alone_or_joined(argv: list[str]) -> None:
        try:
            _guarded(command, argv)
        except BaseException as error:
            if _given("hosts") is not None:
                from dgr_jax.run import hosts

                hosts.abandon(error)
            raise

    # absl would switch on INFO, and with it pages of Orbax; --verbosity=0 still does.
    logging.set_verbosity(logging.WARNING)
    app.run(alone_or_joined, flags_parser=_parse_flags)


def _guarded(command: ModuleType, argv: list[str]) -> None:
    try:
        takes_arguments = hasattr(command, "ARGUMENTS")
        if len(argv) > 1 and not takes_arguments:
            raise UserError(f"argument {argv[1]!r} is not a flag; flags are written --name=value, see --help")
        if _given("hosts") is not None:  # before anything asks for a device
            from dgr_jax.run import hosts

            hosts.join(_given("hosts"))
            hosts.check_equal(_said_by_flags(command))
        from dgr_jax.run.stopping import stop_on_sigterm

        stop_on_sigterm()  # after JAX's own hosts have set up theirs
        if _given("compilation_cache") is not None:
            from dgr_jax.run.compilation import use_cache

            use_cache(_given("compilation_cache"))
        print(command.main(flags.FLAGS, *([argv[1:]] if takes_arguments else [])))
        sys.stdout.flush()
    except UserError as error:
        fail(in_flags(str(error), flags.FLAGS))
    except ImportError as error:
        if "gcsfs" in str(error):
            fail("gs:// paths need gcsfs; install it: pip install 'dgr_jax[gcs]'")
        if "s3fs" in str(error):
            fail("s3:// paths are not supported; give a local folder, or gs://")
        raise
    except NotImplementedError as error:
        if not _given("implementation"):
            raise
        fail(f"--implementation: {error}")  # a named kernel says what it cannot serve
    except KeyboardInterrupt as stopped:
        again = f"; to go on: {shlex.join([sys.executable, *sys.argv])}" if _given("output") else ""
        print(f"interrupted{again}", file=sys.stderr)
        sys.exit(_DIED_OF + getattr(stopped, "signal", signal.SIGINT))
    except BrokenPipeError:
        # What is left in the buffer would fail once more when Python closes the stream.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(_DIED_OF + signal.SIGPIPE)
    except OSError as error:
        if (found := shortage(error)) is None:
            raise
        fail(f"{error.filename or 'the output'}: {'; '.join(found)}")


def in_flags(message: str, given: flags.FlagValues) -> str:
    """A message with the settings that it names in backticks as the flags of a command."""

    def flag(found: re.Match[str]) -> str:
        name = found.group(1)
        if name in given:
            return f"--{name}"
        return f"--config.{name}" if "config" in given and name in (given["config"].value or ()) else found.group()

    return re.sub(r"`(\w+)`", flag, message)


_OF_ONE_HOST = frozenset("hosts output compilation_cache workers model adapter input inputs suite exclude".split())
"""Flags that hosts may give each its own: places, whose contents are compared by themselves, and what a host does
alone."""


def _said_by_flags(command: ModuleType) -> dict[str, Any]:
    """What the command line says, but for that, as JSON values."""
    own = flags.FlagValues()
    command.define(own)
    values = {name: flags.FLAGS[name].value for name in own if name not in _OF_ONE_HOST}
    return {f"--{name}": getattr(value, "to_dict", lambda value=value: value)() for name, value in values.items()}


def _given(name: str) -> Any:
    """Value of a flag that this command may not have."""
    return flags.FLAGS[name].value if name in flags.FLAGS else None


def fail(message: str) -> NoReturn:
    """Ends the command with a message of one line."""
    print("error:", " ".join(message.splitlines()), file=sys.stderr)
    sys.exit(1)


def _parse_flags(argv: list[str]) -> list[str]:
    try:
        return app.parse_flags_with_usage(argv)
    except Exception as error:  # of the config file: what is wrong with a flag, absl has said
        if "config" not in flags.FLAGS:
            raise
        fail(str(refused_config(error)))
