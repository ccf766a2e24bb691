"""Flags of the commands that take a configuration: `--config=configs/lm_path.py:size=debug --config.optim.lr=1e-3`."""

import sys
from collections.abc import Callable

from absl import flags


def flags_parser(command: str) -> Callable:
    """A parser for `absl.app.run`.

    Ends in one line for flags, and for configuration keys and arguments, that do not exist.
    """

    def parse(argv):
        try:
            return flags.FLAGS(argv)
        except (flags.Error, AttributeError, TypeError) as error:
            reason = str(error).strip()
            # A configuration file that raises arrives as a traceback in the text of the flag's error.
            sys.exit(f"{command}: {reason.splitlines()[-1] if 'Traceback' in reason else ' '.join(reason.split())}")

    return parse
