"""Records docs/first_hour.txt, a session of a person who has read nothing: `python docs/record_first_hour.py`.

Each command is typed in a terminal of its own (a pty of 120 columns), in one folder with a file of data. Of its answer stands
what is on the screen in the end: colours are left out, a bar that is drawn anew stands once, and of long answers the middle
is left out. A command that would not end gets the keys of TYPED.
"""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import struct
import sys
import tempfile
import termios
import time
from fcntl import ioctl
from pathlib import Path

from manyrank.project_files import asset

FILE = Path(__file__).with_name("first_hour.txt")
COLUMNS, LINES, HEAD, TAIL = 120, 40, 20, 10
LIMIT = 300.0  # seconds of a command
COMMANDS = (
    "manyrank",
    "manyrank train",
    "manyrank my.jsonl",
    "manyrank train my.jsonl",
    "manyrank train --model Qwen/Qwen2.5-7B --data my.jsonl --load_in_4bit",
    "manyrank train --model embedded --data my.jsonl --deepspeed ds.json",
    "manyrank train --model embedded --data my.jsonl --epoch 1",
    "manyrank train --model embedded --data broken.jsonl",
    "manyrank data inspect my.jsonl --samples 1",
    "manyrank plan Qwen2.5-7B --gpu RTX4090",
    "manyrank init my.yaml --model embedded --data my.jsonl",
    "manyrank train my.yaml --check",
    "manyrank doctor my.yaml",
    "manyrank train my.yaml --epochs 2 --output_dir output/my",
    "manyrank watch output/my",
    "manyrank report output/my",
    "manyrank train my.yaml --epochs 2 --output_dir output/my",
    "manyrank train my.yaml --epochs 4 --output_dir output/my --resume_from_checkpoint auto",
    "manyrank chat output/my",
    "manyrank generate output/my questions.txt answers.jsonl --max-new-tokens 32",
    "manyrank merge output/my",
    "manyrank rules",
)
TYPED = {"manyrank chat output/my": "What is the variance of a Bernoulli variable with p = 0.3?\n\x04"}
INTRO = """A session of a person who has read nothing, as `python docs/record_first_hour.py` records it: a terminal of {columns} columns on a machine
without GPUs and without a connection to the hub. Behind each command are its exit code and its seconds, on two CPU cores that have other work, too.
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        sample = asset("data", "sample.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / "my.jsonl").write_text("".join(sample[:40]), encoding="utf-8")
        (folder / "broken.jsonl").write_text("".join(sample[:3]) + sample[3].replace('",', '"'), encoding="utf-8")
        (folder / "questions.txt").write_text("What is the variance of a Bernoulli variable with p = 0.3?\n", "utf-8")
        parts = [INTRO.format(columns=COLUMNS)]
        for command in COMMANDS:
            code, seconds, said = type_in(command, folder)
            parts.append(f"$ {command}\n{shown(said, folder)}\n[exit code {code}, {seconds:.1f} s]\n")
            print(parts[-1], flush=True)
    FILE.write_text("\n".join(parts), encoding="utf-8")


def type_in(command: str, folder: Path) -> tuple[int, float, str]:
    """Run a command in a terminal.

    Returns:
        The exit code, the seconds, and all that came.
    """
    began = time.monotonic()
    pid, terminal = pty.fork()
    if not pid:
        os.chdir(folder)
        os.execvpe("manyrank", command.split(), {**os.environ, "TERM": "xterm", "COLUMNS": str(COLUMNS)})
    ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
    said, keys = b"", TYPED.get(command, "").encode()
    while time.monotonic() < began + LIMIT:
        if select.select([terminal], [], [], 1.0)[0]:
            try:
                said += os.read(terminal, 2**16)
            except OSError:  # it has ended
                break
        if keys and said.rstrip(b" ").endswith(b">"):
            os.write(terminal, keys)
            keys = b""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), time.monotonic() - began, said.decode(errors="replace")


def screen(said: str) -> list[str]:
    """Return the lines of a terminal after what was written to it: new lines, returns, and what rich and tqdm move and erase."""
    lines, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b.|\r|\n|[^\x1b\r\n]+", said):
        if part == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif part == "\r":
            column = 0
        elif up := re.fullmatch(r"\x1b\[(\d*)A", part):
            row = max(0, row - int(up[1] or 1))
        elif part == "\x1b[2K":
            lines[row] = ""
        elif not part.startswith("\x1b"):
            lines[row] = lines[row][:column].ljust(column) + part + lines[row][column + len(part) :]
            column += len(part)
    return lines


def shown(said: str, folder: Path) -> str:
    """Return what is on the screen in the end, without the middle of a long answer and without this machine's folders."""
    lines = [line.rstrip() for line in screen(said)]
    for path, name in ((folder, "."), (Path(sys.prefix), ".venv"), (FILE.parents[1], "~/manyrank"), (Path.home(), "~")):
        lines = [line.replace(str(path), name) for line in lines]
    text = "\n".join(lines).strip("\n").splitlines()
    if len(text) > HEAD + TAIL + 1:
        text[HEAD:-TAIL] = [f"... ({len(text) - HEAD - TAIL} lines)"]
    return "\n".join(text)


if __name__ == "__main__":
    if not shutil.which("manyrank"):
        sys.exit("manyrank is not on the PATH: source .venv/bin/activate")
    main()
