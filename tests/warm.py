"""Python processes for the tests, forked from one that has imported torch and the libraries already.

A launch of two ranks costs about 15 s of imports and 2 s of work. The server below, one for each session of tests, does
the imports once and forks:

    pytest --- run(argv) ---> server --- fork ---> manyrank.cli --- fork ---> manyrank.train, one for each rank

Every process stays a real one, with its own pid, parent, signals, environment, working folder and exit code, and the
agents of accelerate and torch are the real ones. What starts another of PROGRAMS, by `subprocess` or `os.execv`, forks
in place of a new interpreter; any other command is started as always. manyrank is never imported by the server, so
that each process imports it anew.

What cannot be seen in such a process is tested in a new interpreter, by `subprocess`: what is imported when, variables
that are read by imports (AT_IMPORT; the server refuses others than its own), command lines in the process table.
"""

import atexit
import contextlib
import gc
import importlib
import io
import json
import logging
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
import weakref
from collections.abc import Sequence
from pathlib import Path

PROGRAMS = ("manyrank.", "accelerate.commands.launch", "torch.distributed.run")  # of which a process may be forked
AT_IMPORT = ("HF_HOME", "HF_HUB_OFFLINE", "HOME", "XDG_CACHE_HOME", "TRANSFORMERS_OFFLINE", "PYTHONHASHSEED")
LIBRARIES = (
    "torch",
    "torch._dynamo",
    "torch.distributed.run",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint.state_dict",
    "torch.nn.attention.flex_attention",
    "transformers",
    "transformers.models.auto.modeling_auto",
    "transformers.trainer_callback",
    "transformers.models.qwen3.modeling_qwen3",
    "transformers.models.qwen2.tokenization_qwen2",
    "transformers.integrations",
    "transformers.optimization",
    "transformers.modelcard",
    "peft",
    "bitsandbytes",
    "accelerate",
    "accelerate.commands.launch",
    "deepspeed",
    "deepspeed.runtime.engine",
    "deepspeed.ops.adam",
    "deepspeed.ops.op_builder",
    "torch.utils.cpp_extension",
    "torch.profiler",
    "datasets",
    "datasets.packaged_modules",
    "pyarrow.parquet",
    "pydantic",
    "psutil",
    "numpy.ctypeslib",
    "jinja2",
    "matplotlib.backends.backend_svg",
    "matplotlib.figure",
    "matplotlib.style",
)
ENVIRONMENT = dict(os.environ)  # of the session, before a test changes it for itself
_fork_exec = subprocess._fork_exec


def program(argv: Sequence[str]) -> list[str] | None:
    """The part of a Python command line after the options, if it runs one of PROGRAMS or a script of the tests."""
    if not argv or argv[0] != sys.executable:
        return None
    rest = list(argv[1:])
    if rest[:1] == ["-u"]:
        rest = rest[1:]
    known = rest[:1] == ["-m"] and rest[1].startswith(PROGRAMS)
    return rest if known or (rest and Path(rest[0]).parent == Path(__file__).parent) else None


def run(
    argv: Sequence[str],
    *,
    cwd: object = None,
    env: dict | None = None,
    timeout: float = 400,
    capture_output: bool = True,
    text: bool = True,
    preexec_fn: object = None,
) -> subprocess.CompletedProcess:
    """As `subprocess.run` with captured text, in a process that is forked from the server.

    Args:
        preexec_fn: not called; what ends a process with its parent would end it with the server.

    Raises:
        ValueError: the command is not one of PROGRAMS, or needs an interpreter of its own.
    """
    if program(argv) is None or not (capture_output and text):
        raise ValueError(f"a warm process cannot run {argv}")
    return _server().run(argv, str(cwd or Path.cwd()), dict(os.environ if env is None else env), timeout)


class _Server:
    """The client's side: one request at a time, as a line of JSON each way."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=ENVIRONMENT,
            start_new_session=True,
        )
        atexit.register(self.process.stdin.close)

    def run(self, argv: Sequence[str], cwd: str, env: dict, timeout: float) -> subprocess.CompletedProcess:
        for key in AT_IMPORT:
            if env.get(key) != ENVIRONMENT.get(key):
                raise ValueError(f"{key} is read by imports: start a new interpreter")
        with tempfile.TemporaryDirectory(prefix="warm-") as folder:
            out, err = Path(folder, "out"), Path(folder, "err")
            request = {"argv": list(argv), "cwd": cwd, "env": env, "out": str(out), "err": str(err)}
            print(json.dumps(request), file=self.process.stdin, flush=True)
            pid = int(self.process.stdout.readline())
            expired = threading.Event()
            late = threading.Timer(timeout, lambda: (expired.set(), os.killpg(pid, signal.SIGKILL)))
            late.start()
            code = int(self.process.stdout.readline())
            late.cancel()
            if expired.is_set():
                raise subprocess.TimeoutExpired(argv, timeout, out.read_text(), err.read_text())
            return subprocess.CompletedProcess(argv, code, out.read_text(), err.read_text())


_SERVERS: list[_Server] = []


def _server() -> _Server:
    if not _SERVERS:
        _SERVERS.append(_Server())
    return _SERVERS[0]


def serve() -> None:
    """Fork a process for each line of standard input, until that ends; answer with its pid, and then with its exit code."""
    # As `manyrank` sets them before its imports; and a pool of threads does not survive a fork.
    os.environ |= {"HF_HUB_DISABLE_TELEMETRY": "1", "OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "1"}
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print
    for name in LIBRARIES:
        importlib.import_module(name)
    threads = {task.read_text().strip() for task in Path("/proc/self/task").glob("*/comm")}
    # jemalloc, in pyarrow, takes its locks around a fork and needs no thread in the child.
    assert threads <= {Path("/proc/self/comm").read_text().strip(), "jemalloc_bg_thd"}, (
        f"no fork is safe with {threads}"
    )
    gc.collect()
    gc.freeze()
    subprocess._fork_exec, os.execv = _fork_or_exec, _execv
    sys.path.remove(str(Path(__file__).parent))
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if not pid:
            _become(request)
        print(pid, file=answers, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), file=answers, flush=True)


def _become(request: dict) -> None:
    os.setsid()
    for target, path in ((0, os.devnull), (1, request["out"]), (2, request["err"])):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), target)
    _begin(program(request["argv"]), request["argv"], request["env"], request["cwd"])


def _fork_or_exec(
    args: Sequence, executables: Sequence, close_fds: bool, keep: Sequence[int], cwd: object, env: object, *rest: object
) -> int:
    """In place of `_posixsubprocess.fork_exec`, with its arguments (Python 3.11 to 3.13)."""
    argv = [os.fsdecode(arg) for arg in args]
    rest_of_line = program(argv)
    if rest_of_line is None:
        return _fork_exec(args, executables, close_fds, keep, cwd, env, *rest)
    sys.stdout.flush()
    sys.stderr.flush()
    if pid := os.fork():
        return pid
    stdin, _, _, stdout, _, stderr, _, error, _, new_session = rest[:10]
    prepare = next((value for value in rest[10:] if callable(value)), None)
    for fd, target in ((stdin, 0), (stdout, 1), (stderr, 2)):
        if fd not in (-1, target):
            os.dup2(fd, target)
        elif fd == target:
            os.set_inheritable(fd, True)
    if new_session:
        os.setsid()
    if prepare:
        prepare()
    pairs = [entry.split(b"=", 1) for entry in env] if env is not None else os.environb.items()
    variables = {os.fsdecode(key): os.fsdecode(value) for key, value in pairs}
    _close({0, 1, 2, *keep} - {error}, inherited=not close_fds)
    _begin(rest_of_line, argv, variables, os.fsdecode(cwd) if cwd else str(Path.cwd()))


def _execv(path: str, argv: Sequence[str]) -> None:
    rest = program(argv)
    if rest is None:
        os.execve(path, argv, dict(os.environ))
    assert threading.active_count() == 1, "a process with threads cannot be one that is new"
    sys.stdout.flush()
    sys.stderr.flush()
    _close({0, 1, 2}, inherited=True)
    _begin(rest, argv, dict(os.environ), str(Path.cwd()))


def _close(keep: set[int], *, inherited: bool) -> None:
    """Close what a new program would not have. Objects that own a descriptor must stay: they would close it again.

    Args:
        inherited: whether descriptors that are meant for it stay open.
    """
    gc.freeze()
    for fd in {int(entry.name) for entry in Path("/proc/self/fd").iterdir()} - keep:
        with contextlib.suppress(OSError):  # that of the listing
            if not (inherited and os.get_inheritable(fd)):
                os.close(fd)


_FORMER: list[object] = []  # modules of the program that this process ran before


def _begin(rest: list[str], argv: Sequence[str], env: dict[str, str], cwd: str) -> None:
    """Run a program in this process as a new interpreter would, and end."""
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    signal.set_wakeup_fd(-1)
    for finalizer in list(weakref.finalize._registry):  # of temporary folders, for instance, which are the parent's
        finalizer.atexit = False
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    tempfile.tempdir = None  # TMPDIR may be another one
    for name in [name for name in sys.modules if name.partition(".")[0] == "manyrank"]:
        _FORMER.append(sys.modules.pop(name))
    logging.disable(logging.NOTSET)
    importlib.invalidate_caches()
    import torch

    torch.set_num_threads(int(env.get("OMP_NUM_THREADS", os.cpu_count())))
    sys.stdin, sys.stdout, sys.stderr = (
        io.TextIOWrapper(open(0, "rb", closefd=False)),  # noqa: SIM115
        io.TextIOWrapper(open(1, "wb", closefd=False)),  # noqa: SIM115
        io.TextIOWrapper(open(2, "wb", closefd=False), line_buffering=True),  # noqa: SIM115
    )
    sys.path[:0] = [path for path in env.get("PYTHONPATH", "").split(os.pathsep) if path and path not in sys.path]
    sys.path.insert(0, cwd if rest[0] == "-m" else str(Path(rest[0]).parent))
    sys.orig_argv = list(argv)
    os._exit(_run(rest))


def _run(rest: list[str]) -> int:
    code: object = 0
    try:
        if rest[0] == "-m":
            sys.argv = rest[1:]
            runpy.run_module(rest[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = rest
            runpy.run_path(rest[0], run_name="__main__")
    except SystemExit as end:
        code = end.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code if isinstance(code, int) else 0 if code is None else 1


if __name__ == "__main__":
    serve()
