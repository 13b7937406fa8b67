"""`train`: an Oumi training config, run as it stands."""

import logging
import sys
from pathlib import Path

from oumi_pl.commands.parser import Parser
from oumi_pl.errors import UserError

ENGINES = ("lightning", "trl", "hf")
LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


def main(args: list[str]) -> int:
    """Runs the command; returns its exit code."""
    parser = Parser(
        "train",
        __doc__,
        epilog="anything else puts a value in place of the config's, as for Oumi: --training.max_steps 100",
    )
    parser.add_argument("-c", "--config", required=True, help="a config as `oumi train` reads it")
    parser.add_argument("--engine", choices=ENGINES, help="what drives the loop; as Oumi's trainer type when left out")
    parser.add_argument("-log", "--log-level", type=str.upper, choices=LEVELS, help="of the messages of oumi_pl")
    parser.add_argument("-v", "--verbose", action="store_true", help="print what each key of the config became")
    options, overrides = parser.parse_known_args(args)
    if options.log_level is not None:
        logging.getLogger("oumi_pl").setLevel(options.log_level)
    if options.config.startswith("oumi:"):
        raise UserError(f"train: {options.config} is an address; download the file, and name it")
    from oumi_pl.callbacks.stopping import Stopped
    from oumi_pl.core.configs import TrainingConfig
    from oumi_pl.train import train

    config = TrainingConfig.from_yaml_and_arg_list(Path(options.config).expanduser(), overrides)
    config.finalize_and_validate()
    try:
        train(config, options.engine, options.verbose)
    except Stopped as stop:
        print(stop, file=sys.stderr)
        return stop.exit_code
    return 0
