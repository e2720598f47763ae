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
import ctypes
import gc
import importlib
import io
import json
import logging
import os
import runpy
import select
import signal
import socket
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
    "torch.distributed.elastic.rendezvous.static_tcp_rendezvous",
    "torch.nn.attention.flex_attention",
    "torch.nn.attention.varlen",
    "transformers",
    "transformers.models.auto.modeling_auto",
    "transformers.trainer_callback",
    "transformers.models.qwen3.modeling_qwen3",
    "transformers.models.qwen2.tokenization_qwen2",
    "transformers.integrations",
    "transformers.integrations.bitsandbytes",
    "transformers.integrations.integration_utils",
    "transformers.optimization",
    "transformers.modelcard",
    "transformers.generation.streamers",
    "transformers.trainer",
    "peft",
    "peft.tuners.lora.bnb",
    "peft.utils.transformers_weight_conversion",
    "bitsandbytes",
    "accelerate",
    "accelerate.commands.launch",
    "deepspeed",
    "deepspeed.launcher.runner",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.runtime.engine",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "deepspeed.ops.adam",
    "deepspeed.ops.op_builder",
    "deepspeed.ops.op_builder.all_ops",
    "torch.utils.cpp_extension",
    "torch.profiler",
    "torch.distributed.algorithms.ddp_comm_hooks",
    "datasets",
    "datasets.io.generator",
    "datasets.packaged_modules",
    "trl.trainer.grpo_trainer",
    "wandb",
    "pyarrow.parquet",
    "pydantic",
    "psutil",
    "scipy.io",
    "numpy.ctypeslib",
    "jinja2",
    "matplotlib.backends.backend_svg",
    "matplotlib.figure",
    "matplotlib.style",
)
CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWNET = 0x20000, 0x4000000, 0x40000000  # linux/sched.h
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
    if not (capture_output and text):
        raise ValueError("the output of a warm process is captured as text")
    process = start(argv, cwd=cwd, env=env)
    try:
        process.wait(timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        raise subprocess.TimeoutExpired(argv, timeout, out, err) from None
    return subprocess.CompletedProcess(argv, process.returncode, *process.communicate())


def start(
    argv: Sequence[str], *, cwd: object = None, env: dict | None = None, namespace: str | None = None
) -> "Process":
    """As `subprocess.Popen` with captured text, in a process that is forked from the server.

    Args:
        namespace: the network namespace to enter, which gives the process its host name, too.

    Raises:
        ValueError: the command is not one of PROGRAMS, or needs an interpreter of its own.
    """
    if program(argv) is None:
        raise ValueError(f"a warm process cannot run {argv}")
    env = dict(os.environ if env is None else env)
    for key in AT_IMPORT:
        if env.get(key) != ENVIRONMENT.get(key):
            raise ValueError(f"{key} is read by imports: start a new interpreter")
    return Process(_server(), argv, str(cwd or Path.cwd()), env, namespace)


class Process:
    """A started process, with the methods of Popen that the tests use. Its command line is that of the server."""

    def __init__(self, server: "_Server", argv: Sequence[str], cwd: str, env: dict, namespace: str | None) -> None:
        self.argv, self.server = argv, server
        self.folder = tempfile.TemporaryDirectory(prefix="warm-")
        self.out, self.err = Path(self.folder.name, "out"), Path(self.folder.name, "err")
        request = {"argv": list(argv), "cwd": cwd, "env": env, "out": str(self.out), "err": str(self.err)}
        request["namespace"] = namespace
        self.number, self.pid = server.start(request)

    @property
    def returncode(self) -> int | None:
        return self.server.codes.get(self.number)

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        with self.server.news:
            if not self.server.news.wait_for(lambda: self.returncode is not None, timeout):
                raise subprocess.TimeoutExpired(self.argv, timeout)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        return self.out.read_text(), self.err.read_text()

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class _Server:
    """The client's side: requests and answers are lines of JSON; a thread reads the answers."""

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
        self.count, self.news = 0, threading.Condition()
        self.pids: dict[int, int] = {}
        self.codes: dict[int, int] = {}
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        for line in self.process.stdout:
            answer = json.loads(line)
            with self.news:
                self.pids |= {answer["number"]: answer["pid"]} if "pid" in answer else {}
                self.codes |= {answer["number"]: answer["code"]} if "code" in answer else {}
                self.news.notify_all()

    def start(self, request: dict) -> tuple[int, int]:
        with self.news:
            self.count += 1
            number = self.count
            print(json.dumps(request | {"number": number}), file=self.process.stdin, flush=True)
            if not self.news.wait_for(lambda: number in self.pids, timeout=120):
                raise TimeoutError("the server of warm processes does not answer")
            return number, self.pids[number]


_SERVERS: list[_Server] = []


def _server() -> _Server:
    if not _SERVERS:
        _SERVERS.append(_Server())
    return _SERVERS[0]


def serve() -> None:
    """Fork a process for each line of standard input, until that ends; answer with its pid, and with its code at its end."""
    # As `manyrank` sets them before its imports; and a pool of threads does not survive a fork.
    os.environ |= {"HF_HUB_DISABLE_TELEMETRY": "1", "OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "1"}
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print
    for name in LIBRARIES:
        importlib.import_module(name)
    from tqdm import std

    interval, std.tqdm.monitor_interval = std.tqdm.monitor_interval, 0  # or a thread watches the bars
    _rehearse()
    std.tqdm.monitor_interval = interval
    bytecode = tempfile.TemporaryDirectory(prefix="warm-bytecode-")
    sys.dont_write_bytecode, sys.pycache_prefix = False, bytecode.name  # the first process compiles manyrank for all
    threads = [task.read_text().strip() for task in Path("/proc/self/task").glob("*/comm")]
    # jemalloc, in pyarrow, takes its locks around a fork and needs no thread in the child.
    assert len(threads) - threads.count("jemalloc_bg_thd") == 1, f"no fork is safe with {threading.enumerate()}"
    gc.collect()
    gc.freeze()
    subprocess._fork_exec, os.execv = _fork_or_exec, _execv
    sys.path.remove(str(Path(__file__).parent))
    ends, end = os.pipe()
    os.set_blocking(end, False)
    signal.set_wakeup_fd(end)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    running: dict[int, int] = {}  # number of the request by pid
    rest = b""
    while True:
        ready = select.select([0, ends], [], [])[0]
        if ends in ready:
            os.read(ends, 4096)
            while running and (ended := os.waitpid(-1, os.WNOHANG))[0]:
                answer = {"number": running.pop(ended[0]), "code": os.waitstatus_to_exitcode(ended[1])}
                print(json.dumps(answer), file=answers, flush=True)
        if 0 in ready:
            if not (read := os.read(0, 2**16)):
                return
            *lines, rest = (rest + read).split(b"\n")
            for request in map(json.loads, lines):
                pid = os.fork()
                if not pid:
                    _become(request)
                running[pid] = request["number"]
                print(json.dumps({"number": request["number"], "pid": pid}), file=answers, flush=True)


def _rehearse() -> None:
    """Fill what libraries keep for a process: patterns of names, dispatch of fake tensors. No backward: its engine breaks in a fork."""
    import torch
    from peft import LoraConfig, get_peft_model
    from torch._subclasses import FakeTensorMode
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "vocab_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    config = Qwen3Config(**sizes, num_attention_heads=2, num_key_value_heads=1, pad_token_id=0)
    with torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory() as folder:
        Qwen3ForCausalLM(config).save_pretrained(folder)
        model = Qwen3ForCausalLM.from_pretrained(folder)
        get_peft_model(model, LoraConfig(target_modules="all-linear")).save_pretrained(folder)
    with FakeTensorMode(allow_non_fake_inputs=True):
        Qwen3ForCausalLM(config)(input_ids=torch.zeros(1, 8, dtype=torch.long), use_cache=False)


def _become(request: dict) -> None:
    os.setsid()
    for target, path in ((0, os.devnull), (1, request["out"]), (2, request["err"])):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), target)
    if request["namespace"]:
        _enter(request["namespace"])
    _begin(program(request["argv"]), request["argv"], request["env"], request["cwd"])


def _enter(namespace: str) -> None:
    """As `ip netns exec` does, but for /sys; with a host name of its own."""
    libc = ctypes.CDLL(None, use_errno=True)
    netns = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
    for failed in (libc.setns(netns, CLONE_NEWNET), libc.unshare(CLONE_NEWNS | CLONE_NEWUTS)):
        if failed:
            raise OSError(ctypes.get_errno(), f"cannot enter {namespace}")
    os.close(netns)
    socket.sethostname(namespace)
    hosts = f"/etc/netns/{namespace}/hosts"
    for options in (["--make-rslave", "/"], ["--bind", hosts, "/etc/hosts"]):
        subprocess.run(["mount", *options], check=True)


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
    _own_bars()
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


def _own_bars() -> None:
    """A lock for the progress bars of this process alone: one that is killed in a bar would hold the server's for all."""
    from tqdm import std

    with contextlib.suppress(AttributeError):
        del std.TqdmDefaultWriteLock.mp_lock
    lock, kinds = std.TqdmDefaultWriteLock(), [std.tqdm]
    for kind in kinds:  # a class has one of its own where it was the first to ask
        kind.set_lock(lock)
        kinds += kind.__subclasses__()


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
