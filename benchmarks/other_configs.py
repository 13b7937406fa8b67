"""Which example configs of axolotl and LLaMA-Factory convert to a recipe that parses, and why the others don't.

    python benchmarks/other_configs.py AXOLOTL/examples LLAMA_FACTORY/examples > benchmarks/results/other_configs.txt

Every YAML file of the folders that is a training config is converted, and the recipe is checked and parsed as `fit`
does, without loading models or data. `counted` leaves out configs of trainers and inputs that are outside this package
(images, audio, GRPO and other online methods, inference).
"""

import argparse
import contextlib
import copy
import os
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import yaml
from jsonargparse import Namespace

from oumi_pl.commands.convert import text_of
from oumi_pl.config.check import Checker, options
from oumi_pl.config.cli import CLI, instantiate
from oumi_pl.config.refusals import refuse_contradictions
from oumi_pl.convert.peers import library_of
from oumi_pl.errors import UserError

OUTSIDE = (
    ("images or audio", r"image|audio|\bvision"),
    ("another trainer type", "this trainer type has no counterpart|PPO has no counterpart"),
)
"""Kind of a refusal that is not counted -> what its message matches."""
NO_TRAINING = ("do_predict", "export_dir", "infer_backend", "export_quantization_bit")
"""Keys of files that don't train, unless they also have a learning rate."""


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", type=Path, nargs="+", help="folders `examples`")
    parser.add_argument("--version", default="", help="which versions they are, for the header")
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    check = checker()
    print("# python benchmarks/other_configs.py AXOLOTL/examples LLAMA_FACTORY/examples")
    if arguments.version:
        print(f"# {arguments.version}")
    for folder in arguments.folders:
        rows = [(str(file.relative_to(folder)), *result(file, check)) for file in sorted(folder.rglob("*.y*ml"))]
        rows = [row for row in rows if row[1]]
        counts = Counter(library for _, library, _, _ in rows)
        counted = [kind for _, _, kind, _ in rows if kind not in dict(OUTSIDE)]
        converts = counted.count("converts")
        share = f"{100 * converts / max(1, len(counted)):.0f} %"
        print(f"\n# {' and '.join(counts)}: {converts} of {len(counted)} convert and parse ({share})")
        for library in counts:
            _print(library, [(name, kind, reason) for name, other, kind, reason in rows if other == library])


def _print(library: str, rows: list[tuple[str, str, str]]) -> None:
    print(f"\n# {library}")
    for kind, count in Counter(kind for _, kind, _ in rows).most_common():
        print(f"#   {kind}: {count}")
    width = max(len(name) for name, _, _ in rows)
    for name, kind, reason in rows:
        print(f"{name:{width}}  {kind}{f': {reason}' if reason else ''}")


def result(file: Path, check) -> tuple[str, str, str]:
    """Library, `converts` or the kind of the refusal, and its reason; the library is empty if it is no such config."""
    tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    library = library_of(tree)
    if library is None or ("learning_rate" not in tree and any(key in tree for key in NO_TRAINING)):
        return "", "", ""
    if library == "LLaMA-Factory" and "dataset" not in tree and "learning_rate" not in tree:
        return "", "", ""
    try:
        with warnings.catch_warnings(action="ignore"):
            check(yaml.safe_load(text_of(str(file), [])))
    except UserError as error:
        kind = next((kind for kind, pattern in OUTSIDE if re.search(pattern, str(error))), "refused")
        return library, kind, " ".join(str(error).split())
    return library, "converts", ""


class _Parsed(CLI):
    """Builds the parser of `fit`, and nothing else."""

    def parse_arguments(self, parser, args) -> None:
        """Keeps the parser."""
        self.config = Namespace(subcommand="fit", fit=Namespace(seed_everything=None))
        self.fit_parser = self._subcommand_parsers["fit"]

    def before_instantiate_classes(self) -> None:
        """Stops here.

        Raises:
            StopIteration: always.
        """
        raise StopIteration

    instantiate_classes = before_instantiate_classes


def checker() -> Callable[[dict], None]:
    """A function that checks and parses a recipe, and builds module and data, as `fit` does before anything is read."""
    cli = _Parsed.__new__(_Parsed)
    with contextlib.suppress(StopIteration):
        cli.__init__(["fit"])

    def check(tree: dict) -> None:
        Checker(options(cli.fit_parser)).check_recipe(tree)
        config = cli.fit_parser.parse_object(copy.deepcopy(tree))
        model, data = instantiate({"model": tree["model"], "data": tree["data"]})
        refuse_contradictions("fit", config, model, data, [])

    return check


if __name__ == "__main__":
    sys.exit(main())
