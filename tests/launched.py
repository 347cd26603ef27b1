"""A program to be launched in several processes: other programs one after another, so that torch is imported once.

Takes a file of JSON that lists their command lines. The first that fails is the last.
"""

import json
import runpy
import sys
from pathlib import Path

from kv_compression.io.errors import quiet_libraries

quiet_libraries()

import accelerate

leave = accelerate.PartialState.destroy_process_group
accelerate.PartialState.destroy_process_group = lambda self: None  # the next program needs it
try:
    for program in json.loads(Path(sys.argv[1]).read_text()):
        sys.argv = program
        try:
            runpy.run_path(program[0], run_name="__main__")
        except SystemExit as stop:
            if stop.code:
                raise
finally:
    leave(accelerate.PartialState())
