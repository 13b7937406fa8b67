"""Run an Oumi training config."""

import logging
import sys

from oumi_pl.commands.parser import Parser
from oumi_pl.terminal.text import echo

ENGINES = ("lightning", "trl", "hf")
LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


def main(args: list[str]) -> int:
    """Runs the command; returns its exit code."""
    parser = Parser(
        "train",
        __doc__,
        epilog="other options override values of the config, as in Oumi: --training.max_steps 100",
    )
    parser.add_argument(
        "-c",
        "--config",
        required=True,
        help="a config for `oumi train`, or its address oumi://... if Oumi has fetched it",
    )
    parser.add_argument("--engine", choices=ENGINES, help="who runs the loop (default: by Oumi's trainer type)")
    parser.add_argument(
        "-log",
        "--log-level",
        type=str.upper,
        choices=LEVELS,
        help="level of oumi_pl's messages",
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="print what each key of the config became")
    options, overrides = parser.parse_known_args(args)
    if options.log_level is not None:
        logging.getLogger("oumi_pl").setLevel(options.log_level)
    from oumi_pl.callbacks.stopping import Stopped
    from oumi_pl.core.configs import TrainingConfig
    from oumi_pl.core.configs.addresses import config_path
    from oumi_pl.train import train

    config = TrainingConfig.from_yaml_and_arg_list(config_path(options.config), overrides)
    config.finalize_and_validate()
    try:
        train(config, options.engine, options.verbose)
    except Stopped as stop:
        echo(stop, file=sys.stderr)
        return stop.exit_code
    return 0
