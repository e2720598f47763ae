"""Commands under limits: real programs that loop, fork, allocate, connect and write too much."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from manyrank import sandbox
from manyrank.sandbox import Limits, Outcome, Refused, run_limited

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits are those of Linux")
ROOT = os.geteuid() == 0


def python(program: str, *, text: str = "", **limits) -> Outcome:
    files = {"program.py": textwrap.dedent(program), "text.txt": text}
    return run_limited(["python", "program.py"], files=files, limits=Limits(**limits))


def can_isolate() -> bool:
    try:
        return run_limited(["true"], files={}, limits=Limits()).code == 0
    except Refused:
        return False


isolated = pytest.mark.skipif(sys.platform != "linux" or not can_isolate(), reason="namespaces are forbidden here")
both = pytest.mark.parametrize("network", [pytest.param(False, marks=isolated), True], ids=["isolated", "network"])


def processes_with(mark: str) -> list[str]:
    """The ids of live processes that have `mark` on their command line."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and entry.name != str(os.getpid()):
            try:
                if mark.encode() in (entry / "cmdline").read_bytes():
                    found.append(entry.name)
            except OSError:
                continue
    return found


# How a command ends


@both
@pytest.mark.parametrize("code", [0, 1, 3, 127, 255])
def test_exit_codes(code, network):
    outcome = python(f"print('é'); raise SystemExit({code})", network=network)
    assert outcome == Outcome(code, None, "é\n")
    assert outcome.reason == f"exit code {code}"


@both
def test_a_signal_has_its_name(network):
    outcome = python("import os; os.abort()", network=network)
    assert (outcome.code, outcome.signal, outcome.reason) == (None, "SIGABRT", "killed by SIGABRT")


@both
def test_output_and_errors_are_kept_together(network):
    outcome = python("import sys; sys.stderr.write('wrong '); sys.stderr.flush(); print('right')", network=network)
    assert outcome.output == "wrong right\n"


def test_a_failed_assertion_shows_its_line():
    outcome = python("assert 1 + 1 == 3, 'sum'", network=True)
    assert outcome.code == 1
    assert outcome.output.endswith("AssertionError: sum\n")


@both
def test_no_such_command(network):
    with pytest.raises(Refused, match="'no-such-command' cannot be run"):
        run_limited(["no-such-command"], files={}, limits=Limits(network=network))


def test_python_is_this_one():
    assert python("import sys; print(sys.prefix)", network=True).output == f"{sys.prefix}\n"


def test_files_arrive_as_they_are():
    text = "é\r\n\n日"
    outcome = python("print(ascii(open('text.txt', newline='').read()))", text=text, network=True)
    assert outcome.output == ascii(text) + "\n"


# Time


@both
def test_an_endless_loop_is_ended(network):
    outcome = python("while True: pass", seconds=1, network=network)
    assert outcome.reason == "time limit"


@both
def test_a_sleeper_is_ended(network):
    outcome = python("print('here', flush=True); import time; time.sleep(600)", seconds=1, network=network)
    assert (outcome.reason, outcome.output) == ("time limit", "here\n")


@both
def test_cpu_time_is_limited_by_itself(network):
    program = """
        import os, resource, signal
        print(resource.getrlimit(resource.RLIMIT_CPU), flush=True)
        os.kill(os.getpid(), signal.SIGXCPU)
    """
    outcome = python(program, seconds=2.5, network=network)
    assert (outcome.output, outcome.signal, outcome.reason) == ("(3, 4)\n", "SIGXCPU", "time limit")


# What it leaves behind

DAEMON = """
    import os, sys, time
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.execvp(sys.executable, [sys.executable, "-c", "import time; time.sleep(600)", "MARK"])
        os._exit(0)
    time.sleep(0.3)
    print("left", flush=True)
    WAIT
"""


@both
@pytest.mark.parametrize("wait", ["pass", "time.sleep(600)"], ids=["ends", "is ended"])
def test_a_process_that_leaves_the_session_dies_too(network, wait):
    mark = f"orphan-{os.getpid()}-{time.monotonic_ns()}"
    outcome = python(DAEMON.replace("MARK", mark).replace("WAIT", wait), seconds=3, network=network)
    assert outcome.output == "left\n"
    assert outcome.reason == ("exit code 0" if wait == "pass" else "time limit")
    assert processes_with(mark) == []


def test_the_finder_of_processes_finds():
    mark = f"found-{os.getpid()}-{time.monotonic_ns()}"
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", mark]) as process:
        try:
            wait_until(lambda: processes_with(mark) == [str(process.pid)])
        finally:
            process.kill()


def test_the_folder_is_removed():
    outcome = python("import os; os.mkdir('sub'); os.chmod('sub', 0); print(os.getcwd())", network=True)
    assert outcome.code == 0
    assert not Path(outcome.output.strip()).exists()


@both
def test_a_command_dies_with_its_caller(network, tmp_path, monkeypatch):
    mark = f"caller-{os.getpid()}-{time.monotonic_ns()}"
    limits = f"Limits(seconds=600, network={network})"
    command = ["sh", "-c", "sleep 600; true", mark]  # a shell with a child
    program = f"from manyrank.sandbox import Limits, run_limited; run_limited({command}, files={{}}, limits={limits})"
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # for the folder that a killed caller cannot remove
    with subprocess.Popen([sys.executable, "-c", program]) as caller:
        try:
            wait_until(lambda: any(line_of(pid).startswith("sh") for pid in processes_with(mark)))
        finally:
            caller.kill()
    wait_until(lambda: processes_with(mark) == [])


def line_of(pid: str) -> str:
    try:
        return Path("/proc", pid, "cmdline").read_text()
    except OSError:
        return ""


def wait_until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# Memory, processes, files, output


@both
def test_a_memory_hog_is_stopped(network):
    outcome = python("x = bytearray(600 * 1024**2)", memory_mb=256, network=network)
    assert outcome.code == 1
    assert outcome.output.endswith("MemoryError\n")


@both
def test_the_same_memory_is_fine_under_a_higher_limit(network):
    assert python("x = bytearray(100 * 1024**2)", memory_mb=256, network=network).code == 0


FORKS = """
    import os, time
    count = 0
    try:
        while count < 300:
            if os.fork() == 0:
                time.sleep(600)
                os._exit(0)
            count += 1
    except BlockingIOError:
        print("refused after", count)
"""


@both
def test_a_fork_bomb_is_bounded(network):
    outcome = python(FORKS, seconds=20, processes=32, network=network)
    words = outcome.output.split()
    assert words[:2] == ["refused", "after"]
    assert int(words[2]) <= 32


@both
def test_one_file_is_bounded(network):
    program = "f = open('big', 'wb')\nfor _ in range(64): f.write(b'x' * 1024**2)"
    outcome = python(program, file_mb=4, network=network)
    assert outcome.code != 0


@both
@pytest.mark.parametrize("kept", [10, 1000, 200_000])
def test_output_is_capped_and_does_not_block(kept, network):
    outcome = python(
        "import sys\nfor _ in range(400): sys.stdout.write('0123456789' * 1000)", output_bytes=kept, network=network
    )
    assert outcome.code == 0
    assert outcome.output == ("0123456789" * kept)[:kept]


@both
def test_endless_output_is_ended(network):
    outcome = python("while True: print('x' * 1000)", seconds=1, network=network)
    assert outcome.reason == "time limit"
    assert len(outcome.output) == Limits().output_bytes


def test_the_limits_hold_in_many_threads_at_once():
    with ThreadPoolExecutor(8) as pool:
        codes = list(pool.map(lambda code: python(f"raise SystemExit({code})", network=True).code, range(24)))
    assert codes == list(range(24))


def test_no_pipe_is_left_open():
    python("pass", network=True)
    before = sorted(Path("/proc/self/fd").iterdir())
    for _ in range(3):
        python("pass", network=True)
    assert sorted(Path("/proc/self/fd").iterdir()) == before


# Surroundings


def test_the_environment_is_scrubbed(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "hush")
    outcome = python("import os; print(sorted(os.environ)); print(os.environ['HOME'] == os.getcwd())", network=True)
    names, home = outcome.output.splitlines()
    assert "SECRET_TOKEN" not in names and home == "True"


@isolated
def test_the_network_is_out_of_reach():
    with socket.create_server(("127.0.0.1", 0)) as server:
        program = f"import socket; socket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 5)"
        assert python(program, network=True).code == 0  # the server listens
        outcome = python(program)
        assert outcome.code == 1
        assert "OSError: [Errno 101] Network is unreachable" in outcome.output


@isolated
def test_processes_outside_are_out_of_reach():
    outcome = python(f"import os; os.kill({os.getpid()}, 0)")
    assert outcome.code == 1
    assert "ProcessLookupError" in outcome.output


@pytest.mark.skipif(not ROOT, reason="for root")
@both
def test_commands_of_root_do_not_run_as_root(network):
    outcome = python("import os; print(os.getuid()); open('/etc/manyrank', 'w')", network=network)
    user, *rest = outcome.output.splitlines()
    assert int(user) in sandbox.USERS
    assert rest[-1].startswith("PermissionError")


SYSTEM_PYTHON = shutil.which("python3", path="/usr/bin")  # one that every user can reach
setpriv = pytest.mark.skipif(not ROOT or not shutil.which("setpriv"), reason="takes root and setpriv")
ALONE = """
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("sandbox", sys.argv[1])
sandbox = sys.modules["sandbox"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sandbox)
try:
    outcome = sandbox.run_limited(["python3", "p.py"], files={"p.py": sys.argv[2]}, limits=sandbox.Limits(**json.loads(sys.argv[3])))
    print(outcome.reason, outcome.output)
except sandbox.Refused as error:
    print("refused:", error)
"""


def with_privileges(*options: str, program: str, interpreter: str = sys.executable, **limits) -> str:
    """What a run says in a process that has other privileges than this one."""
    argv = [
        "setpriv",
        *options,
        interpreter,
        "-B",
        "-c",
        ALONE,
        "SANDBOX",
        textwrap.dedent(program),
        json.dumps(limits),
    ]
    with tempfile.TemporaryDirectory() as folder:  # not pytest's, which other users cannot enter
        Path(folder).chmod(0o755)
        argv[argv.index("SANDBOX")] = shutil.copy(sandbox.__file__, folder)
        done = subprocess.run(argv, capture_output=True, text=True, cwd="/", timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@setpriv
@pytest.mark.skipif(not SYSTEM_PYTHON, reason="needs a Python that every user can reach")
@pytest.mark.parametrize(
    "program, expected",
    [
        ("import os; print(os.getuid(), open('own', 'w').name)", "exit code 0 12345 own\n"),
        ("import socket; socket.create_connection(('127.0.0.1', 1), 5)", "Network is unreachable"),
        ("while True: pass", "time limit"),
        ("bytearray(1024 ** 3)", "MemoryError"),
        (FORKS, "refused after"),
        (f"import os; os.kill({os.getpid()}, 0)", "ProcessLookupError"),
    ],
    ids=["own folder", "network", "time", "memory", "forks", "processes"],
)
def test_a_user_without_privileges_gets_the_same(program, expected):
    user = ("--reuid=12345", "--regid=12345", "--clear-groups")
    said = with_privileges(*user, program=program, interpreter=SYSTEM_PYTHON, seconds=3, processes=32)
    if "forbids a network namespace" in said:
        pytest.skip("users may not open namespaces here")
    assert expected in said


@setpriv
def test_a_forbidden_namespace_is_a_refusal():
    """As in a container: without the right to open namespaces nothing of the command is run."""
    without = ("--bounding-set=-sys_admin", "--inh-caps=-sys_admin")
    program = "import os; print('ran')"
    assert with_privileges(*without, program=program).startswith("refused: this machine forbids a network namespace")
    assert with_privileges(*without, program=program, network=True) == "exit code 0 ran\n\n"


@setpriv
def test_without_namespaces_nothing_survives_either():
    mark = f"orphan-{os.getpid()}-{time.monotonic_ns()}"
    program = DAEMON.replace("MARK", mark).replace("WAIT", "time.sleep(600)")
    said = with_privileges(
        "--bounding-set=-sys_admin", "--inh-caps=-sys_admin", program=program, network=True, seconds=2
    )
    assert said == "time limit left\n\n" and processes_with(mark) == []
