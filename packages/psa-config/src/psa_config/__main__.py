"""`python -m psa_config`: what can be done with preset files where nothing else of this project is installed."""

import argparse
import sys
from collections.abc import Sequence

from .commands import add_commands
from .errors import PresetError
from .terminal import flush, forget_output, print_anything


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is 1 if a file is wrong, cannot be read or not be written, 0 otherwise."""
    parser = argparse.ArgumentParser(prog="python -m psa_config", description="Work with attention preset files.")
    add_commands(parser.add_subparsers(dest="command", required=True))
    options = parser.parse_args(arguments)
    print_anything()
    try:
        status = int(options.run(options))
        flush()
    except BrokenPipeError:
        forget_output()
        return 1
    except (PresetError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return status


if __name__ == "__main__":
    sys.exit(main())
