"""The command line: ``latentmill COMMAND ...``, and what becomes of an error. The commands are in ``commands/``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import Any

from latentmill import registry
from latentmill.commands import COMMANDS
from latentmill.commands.command import Command
from latentmill.errors import LatentmillError, is_out_of_memory
from latentmill.notices import as_ctrl_c
from latentmill.streams import Stream, guard
from latentmill.text import escaped

SPINS = "10000"
"""Looks of a thread of torch's for more work before it sleeps. OpenMP's own 300,000 are milliseconds in which nobody else has
its core: beside two other processes on two cores a job took twice as long. 10,000 cost an idle machine nothing."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The ``latentmill`` command. Returns the exit code.

    ==== =====================================================================================
    0    done
    1    it stopped, and the same command may go on; ``verify``: not sound
    2    the job, or what was asked, is wrong: do not retry. Nothing has been started or written; ``doctor``: a node is not right
    3    the output, or what is told on stdout, can't be written
    4    there is no place on the cluster now: retry later
    5    the dataset is complete, and not one row is ok: ``--retry-failed`` does them again
    130  it was interrupted, by Ctrl-C, SIGTERM or SIGUSR1: the same command goes on
    ==== =====================================================================================

    ``run`` and ``verify`` speak of the dataset alone: what they print may be lost.
    """
    stdout = guard()
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
    words = list(sys.argv[1:] if arguments is None else arguments)
    ours = [command for command in COMMANDS if words[:1] == [command.name]]
    try:
        if words and not ours and _is_plugins(words[0]):
            options = argparse.Namespace(command=THEIRS, words=words)
        else:
            options = _parsed(_parser(ours), words, stdout)
        command: Command = options.command
        with as_ctrl_c():
            code = command.call(options)
        if command.is_asked_on_stdout(options):
            _require_told(stdout)
        return code
    except KeyboardInterrupt:
        print("stopped before anything was begun", file=sys.stderr)
        return 130
    except BrokenPipeError:  # who reads no further knows it
        return 3
    except Exception as error:
        memory = is_out_of_memory(error)
        if "--debug" in words or not (memory or isinstance(error, (LatentmillError, OSError))):
            raise
        print(f"latentmill: {'out of memory: ' if memory else ''}{escaped(str(error))}", file=sys.stderr)
        return 1 if memory else error.exit_code if isinstance(error, LatentmillError) else 3


def _require_told(stdout: Stream | None) -> None:
    """Raises OSError if not all that was printed on stdout could be written."""
    sys.stdout.flush()
    if stdout and stdout.error:
        raise OSError(stdout.error.errno, stdout.error.strerror, "stdout")


def _parsed(parser: argparse.ArgumentParser, words: Sequence[str], stdout: Stream | None) -> argparse.Namespace:
    try:
        options, rest = parser.parse_known_args(words)
    except SystemExit as end:
        if not end.code:  # it has printed a help, the version, a list
            _require_told(stdout)
        raise
    if hasattr(options, "overrides"):  # argparse takes no more of them once an option has come
        options.overrides += [word for word in rest if not word.startswith("-")]
        rest = [word for word in rest if word.startswith("-")]
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return options


def _is_plugins(word: str) -> bool:
    """Whether a plugin brings a command. Ours come first: a plugin's of the same name is chosen with its distribution."""
    return any(entry.name == word.rpartition(":")[2] for entry in registry.entries("command"))


def _theirs(options: Any) -> int:
    name, *words = options.words
    return registry.command(name)(words) or 0


THEIRS = Command("COMMAND", "A plugin's command.", lambda parser: None, _theirs)


def _parser(asked: Sequence[Command]) -> argparse.ArgumentParser:
    """The parser for the command that is asked for, if any is: it sees none of the others, nor the version, and all take time to describe."""
    theirs = [f"  {entry.name:<20}of {entry.distribution} {entry.version}" for entry in registry.entries("command")]
    parser = argparse.ArgumentParser(
        prog="latentmill",
        description="Batch latent diffusion: rows of prompts, images or latents become datasets, each row exactly once.",
        epilog="\n".join(["commands of plugins:", *theirs]) if theirs else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    version = "" if asked else f"latentmill {metadata.version('latentmill')}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    for command in asked or COMMANDS:
        words = commands.add_parser(command.name, help=command.about, description=command.about)
        words.set_defaults(command=command)
        words.add_argument("--debug", action="store_true", help="show the traceback of an error")
        command.add_options(words)
    return parser


if __name__ == "__main__":
    sys.exit(main())
