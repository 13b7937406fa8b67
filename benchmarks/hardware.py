"""Writes the hardware that `oumi_pl plan` finds into the headers of the recipes for GPUs.

python benchmarks/hardware.py [NAME ...]
"""

import re
import sys

from oumi_pl.config import files
from oumi_pl.errors import UserError
from oumi_pl.planning.hardware import hardware

for name in sys.argv[1:] or files.names():
    path = files.shipped() / f"{name}.yaml"
    before = files.header(path).hardware
    if "GPU" not in before:
        continue
    try:
        after = hardware(path)
    except UserError as error:
        print(f"{name:36} {before:46} not planned: {error}", flush=True)
        continue
    print(f"{name:36} {before:46} -> {after}", flush=True)
    text = path.read_text(encoding="utf-8")
    path.write_text(re.sub(r"(?m)^# Hardware: " + re.escape(before), f"# Hardware: {after}", text), encoding="utf-8")
