"""The rows of tests/first_hour/rows.yaml, each as a person types it."""

import shlex
import subprocess
import sys

import first_hour
import pytest
from launches import nightly

ROWS = first_hour.rows()
# What is answered before torch is imported is answered within a second.
QUICK = [row for row in ROWS.values() if row.exit == 2 and not row.after and not row.given]


@pytest.fixture(scope="module")
def session(embedded_model, tmp_path_factory):
    return first_hour.Session(tmp_path_factory.mktemp("first-hour"))


@pytest.mark.parametrize("row", [row for row in ROWS.values() if not row.nightly], ids=lambda row: row.id)
def test_row(session, row):
    session.check(row)


@pytest.mark.parametrize("row", nightly(*(row for row in ROWS.values() if row.nightly)), ids=lambda row: row.id)
def test_row_that_takes_long(session, row):
    session.check(row)


def test_no_answer_to_a_mistake_waits_for_torch(session):
    lines = [shlex.split(row.command)[1:] for row in QUICK]
    program = (
        "import contextlib, io, sys\nfrom manyrank import cli\n"
        f"for line in {lines}:\n"
        "    with contextlib.redirect_stderr(io.StringIO()):\n"
        "        assert cli.main(line) == 2, line\n"
        "    assert 'torch' not in sys.modules and 'transformers' not in sys.modules, line\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=session.folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
