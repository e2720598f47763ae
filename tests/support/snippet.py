"""Runs a Python file of somebody's in a process that `warm` forks: `snippet.py FILE`."""

import runpy
import sys

runpy.run_path(sys.argv[1], run_name="__main__")
