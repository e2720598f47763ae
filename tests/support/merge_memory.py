"""Prints the peak memory of merging each of the named adapters in this process, and the bytes of the last result."""

import json
import sys
from pathlib import Path

from manyrank.runs.artifact import find
from manyrank.tools.merge.main import merge

reports = [merge(find(name), Path(f"{name}-merged"), dtype="bfloat16") for name in sys.argv[1:]]
print(json.dumps([*(report.peak_memory for report in reports), reports[-1].bytes]))
