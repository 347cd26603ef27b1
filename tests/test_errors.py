import subprocess
import sys
from pathlib import Path

import pytest

from kv_compression.io.errors import LONGEST_LINE, RunError, UsageError, one_line, printable


def test_text_from_anywhere_becomes_one_line():
    assert printable("  a\tb\n\x1b[2Jc\x00\u2028d \ud800é") == "a b [2Jc d é"
    assert printable("x" * LONGEST_LINE) == "x" * LONGEST_LINE
    assert printable("x" * 10 * LONGEST_LINE) == "x" * LONGEST_LINE + " …"


@pytest.mark.parametrize("kind", [UsageError, RunError])
def test_errors_take_one_line(kind):
    assert str(kind("a\r\nb \x07")) == "a b"
    assert one_line(kind("")) == kind.__name__
    assert one_line(ValueError("\n first\x1b\nsecond")) == "first"


def test_a_terminal_that_lacks_letters_is_told_all_the_same():
    script = "from kv_compression.io.errors import run_script, UsageError\n"
    script += "def main():\n    print('0.5 ≈ \\udcff')\n    raise UsageError('no\\nfile é')\n"
    script += "raise SystemExit(run_script(main))"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parent.parent,
        env={"PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "0.5 \\u2248 \\udcff\n")
    assert done.stderr == "error: no file \\xe9\n"
