"""Recipe and machine to a command, then run it. A `LaunchPlan` is a plain value: what is shown is what runs.

    python       one process: this process becomes `python -m manyrank.train`
    accelerate   `accelerate launch --config_file accelerate_configs/NAME.yaml ... -m manyrank.train`
    torchrun     `torchrun ... -m manyrank.train --strategy NAME`; the train module applies the same file

The launchers of accelerate and torch run inside this process, so that a worker's exit code is ours. `slurm` makes
a job of the torchrun plan.
"""

from __future__ import annotations

import base64
import json
import logging
import os
import shlex
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ..config.args import JOBS, CommandLine, LaunchOptions
from ..config.resolve import TrainConfig
from ..errors import EXIT_FAILED, UserError
from ..project_files import asset
from ..runs import run_folder
from ..signals import become, die_with_parent, pass_on_while
from ..topology.allocator import allocator
from ..topology.gpus import Hardware
from ..topology.precision import DETERMINISTIC
from ..topology.strategies import EngineKind, Strategy, default_strategy, named_strategy

LAUNCH_VARIABLE = "MANYRANK_LAUNCH"  # the packed plan, which the run writes into its folder

CPU_VARIABLES = {
    # Threads that wait in a spin slow a step down 10 to 40 times when anything else runs on the machine.
    "OMP_WAIT_POLICY": "passive",
    # glibc gives big freed buffers back to the system at once, and every step faults them in again (1.25 times slower).
    "MALLOC_MMAP_THRESHOLD_": "8589934592",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
}


@dataclass(frozen=True)
class LaunchPlan:
    """The launch on every machine: the argv of each, the environment, and the files that are read with their content."""

    nodes: tuple[tuple[str, ...], ...]
    env: dict[str, str]  # as it is on a machine like this one
    files: dict[str, str]
    node_rank: int = 0  # of this machine

    @property
    def argv(self) -> tuple[str, ...]:
        """The command of this machine."""
        return self.nodes[self.node_rank]

    def __str__(self) -> str:
        """The command of this machine, without its environment."""
        return shlex.join(self.argv)

    def command(self, node: int) -> str:
        """The command of a machine as a shell takes it."""
        variables = "".join(f"{key}={shlex.quote(value)} \\\n" for key, value in self.env.items())
        return variables + shlex.join(self.nodes[node])

    def text(self) -> str:
        """Show the command of every machine, and the files."""
        commands = [f"# node {node}\n{self.command(node)}\n" for node in range(len(self.nodes))]
        return "\n".join([*commands, *(file_text(name, content) for name, content in self.files.items())])

    def packed(self) -> str:
        """Pack the plan into one environment variable, of at most 128 KiB on Linux, also for hundreds of machines."""
        return base64.b64encode(zlib.compress(json.dumps(asdict(self)).encode())).decode()

    @classmethod
    def unpacked(cls, text: str) -> LaunchPlan:
        """Read what `packed` has made."""
        values = json.loads(zlib.decompress(base64.b64decode(text)))
        return cls(**values | {"nodes": tuple(map(tuple, values["nodes"]))})


def file_text(name: str, content: str) -> str:
    """A file as it is shown."""
    return f"# file {name}\n{content}"


def choose_strategy(config: TrainConfig, options: LaunchOptions, hardware: Hardware) -> tuple[Strategy, int]:
    """The strategy, and the number of processes on this machine.

    Raises:
        UserError: several processes without GPUs, and nobody said how many.
    """
    named, gpus = named_strategy(config.strategy), len(hardware.gpus)
    alone = named.engine is EngineKind.SINGLE if named else gpus < 2
    nproc = options.nproc or (1 if alone else gpus)
    if nproc == 0:
        raise UserError(
            f"strategy {named} on a machine without GPUs",
            where="nproc",
            fix="say how many processes: --nproc 2",
        )
    return named or default_strategy(nproc * options.nnodes), nproc


def plan_launch(
    line: CommandLine,
    *,
    strategy: Strategy,
    nproc: int,
    output_dir: str,
    hardware: Hardware,
    elastic: bool = False,
    expandable: bool = True,
    program: Sequence[str] = (),
) -> LaunchPlan:
    """The command of every machine.

    Args:
        elastic: whether fewer machines may go on.
        expandable: whether what runs goes with expandable segments, see `topology.allocator`.
        program: what each process runs, as a module and its arguments; the train module with the line's recipe unless given.

    Raises:
        UserError: several machines without an endpoint, or `via python` for more than one process.
    """
    options = line.options
    check_elastic(options, elastic=elastic)
    _check_nodes(options)
    via = _via(options, strategy, nproc, elastic=elastic)
    return lay_out(
        line,
        via,
        strategy=strategy,
        nproc=nproc,
        output_dir=output_dir,
        hardware=hardware,
        elastic=elastic,
        expandable=expandable,
        program=program,
    )


def _via(options: LaunchOptions, strategy: Strategy, nproc: int, *, elastic: bool) -> str:
    usual = "torchrun" if elastic or options.max_restarts else "accelerate"
    alone = strategy.engine is EngineKind.SINGLE and nproc * options.nnodes == 1
    via = options.via or ("python" if alone else usual)
    if elastic and via != "torchrun":
        raise UserError(
            f"via {via} with elastic", where="via", fix="use torchrun, which can continue with fewer machines"
        )
    if options.max_restarts and options.nnodes == 1 and via != "torchrun":
        # accelerate meets on one machine in a store that keeps the dead workers' addresses (torch 2.13, static_tcp_rendezvous.py).
        raise UserError(f"max_restarts via {via} on one machine", where="max_restarts", fix="use --via torchrun")
    if via == "python" and not alone:
        raise UserError(
            "via python starts one process of strategy single", where="via", fix="use accelerate or torchrun"
        )
    return via


def lay_out(
    line: CommandLine,
    via: str,
    *,
    strategy: Strategy,
    nproc: int,
    output_dir: str,
    hardware: Hardware,
    elastic: bool,
    expandable: bool = True,
    program: Sequence[str] = (),
) -> LaunchPlan:
    """The plan of a launch whose flags are checked.

    Args:
        via: python, accelerate or torchrun.
        nproc: processes on each machine.
        hardware: of each machine.
    """
    options = line.options
    head: Callable[[int], list[str]] = {
        "python": lambda node: [sys.executable],
        "accelerate": lambda node: _accelerate(strategy, nproc, options, node),
        "torchrun": lambda node: _torchrun(nproc, options, node, elastic=elastic),
    }[via]
    program = program or ("manyrank.train", *train_arguments(line, strategy, output_dir))
    env = {"OMP_NUM_THREADS": str(max(1, hardware.cpu_cores // nproc)), **({} if hardware.gpus else CPU_VARIABLES)}
    env |= allocator(hardware, expandable=expandable)
    if options.nnodes > 1 or options.max_restarts:
        # The shared store keeps the addresses of the first round, and workers that are started anew call dead ones
        # (torch 2.13, dynamic_rendezvous.py).
        env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    return LaunchPlan(
        nodes=tuple((*head(node), "-m", *program) for node in range(options.nnodes)),
        env={key: os.environ.get(key, value) for key, value in env.items()},  # what the user has set stands
        files={str(file): file.read_text(encoding="utf-8") for file in _files(strategy)},
        node_rank=options.node_rank,
    )


def check_elastic(options: LaunchOptions, *, elastic: bool) -> None:
    """Refuse to go on with fewer machines than one."""
    if elastic and options.nnodes == 1:
        raise UserError("elastic on one machine", where="elastic", fix="leave it out, or give --nnodes")


def _check_nodes(options: LaunchOptions) -> None:
    if options.nnodes == 1 and (options.node_rank or options.rdzv_endpoint):
        raise UserError(
            "node_rank and rdzv_endpoint are for several machines", where="command line", fix="give --nnodes, too"
        )
    endpoint = options.rdzv_endpoint or ""
    host, _, port = endpoint.rpartition(":")
    if options.nnodes > 1 and not (host and port.isdecimal()):
        lacking = f"{endpoint} is not HOST:PORT" if endpoint else "no address of machine 0"
        raise UserError(
            f"{options.nnodes} machines, and {lacking}",
            where="command line, --rdzv_endpoint",
            fix="give HOST:PORT of machine 0, as in --rdzv_endpoint first:29500",
        )
    if options.node_rank >= options.nnodes:
        raise UserError(
            f"node_rank {options.node_rank} of {options.nnodes} machines", where="command line", fix="count from 0"
        )


def train_arguments(line: CommandLine, strategy: Strategy, output_dir: str) -> list[str]:
    """The recipe and every override, with the strategy and the folder that were chosen."""
    keys = {entry.split("=")[0] for entry in line.argv}
    extra = [f"--strategy={strategy}"] if "--strategy" not in keys else []
    extra += [f"--output_dir={output_dir}"] if "--output_dir" not in keys else []
    return [*line.argv, *extra]


def _files(strategy: Strategy) -> list[Path]:
    ds = asset("ds_configs", f"{strategy}.json")
    return [_shown(asset("accelerate_configs", f"{strategy}.yaml"))] + ([_shown(ds)] if ds.exists() else [])


def _shown(path: Path) -> Path:
    """Relative where that is shorter and the same."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _accelerate(strategy: Strategy, nproc: int, options: LaunchOptions, node: int) -> list[str]:
    config, *deepspeed = _files(strategy)
    argv = ["accelerate", "launch", "--config_file", str(config)]
    if deepspeed:  # the YAML names it relative to the project's root
        argv += ["--deepspeed_config_file", str(deepspeed[0])]
    argv += ["--num_processes", str(nproc * options.nnodes), "--num_machines", str(options.nnodes)]
    if options.nnodes == 1:
        return [*argv, "--main_process_port", "0"]  # any free one: several runs may share a machine
    host, _, port = (options.rdzv_endpoint or "").rpartition(":")
    return [
        *argv,
        "--machine_rank",
        str(node),
        "--main_process_ip",
        host,
        "--main_process_port",
        port,
        "--rdzv_backend",
        "c10d",
        "--rdzv_conf",
        _rendezvous(options, node),
        *_restarts(options),
    ]


def _restarts(options: LaunchOptions) -> list[str]:
    """A worker that fails alike every time is no reason to try again; a machine that went away is."""
    count = options.max_restarts if options.max_restarts is not None else 3 if options.nnodes > 1 else 0
    return ["--max_restarts", str(count)] if count else []


def _rendezvous(options: LaunchOptions, node: int) -> str:
    """Machine 0 has the store; by itself torch compares names, which a machine's DNS may not know yet."""
    return f"join_timeout={options.rdzv_timeout},is_host={str(node == 0).lower()}"


def _torchrun(nproc: int, options: LaunchOptions, node: int, *, elastic: bool) -> list[str]:
    nnodes = f"1:{options.nnodes}" if elastic else str(options.nnodes)
    argv = ["torchrun", "--nproc_per_node", str(nproc), "--nnodes", nnodes, *_restarts(options)]
    if options.nnodes == 1:
        return [*argv, "--standalone"]
    return [
        *argv,
        "--node_rank",
        str(node),
        "--rdzv_backend",
        "c10d",
        "--rdzv_id",
        "manyrank",
        "--rdzv_endpoint",
        options.rdzv_endpoint or "",
        "--rdzv_conf",
        _rendezvous(options, node),
    ]


def run_launch(launch: LaunchPlan, *, stay: bool = False) -> int:
    """Run a plan in this process; `python` replaces it, unless it is to `stay`.

    Returns:
        The exit code of the worker that ended first with an error, or 0.
    """
    os.environ.update(launch.env)
    os.environ[LAUNCH_VARIABLE] = launch.packed()
    sys.stdout.flush()
    if launch.argv[0] == sys.executable:
        if not stay:
            become(launch.argv)
        return pass_on_while(lambda: subprocess.run(launch.argv, preexec_fn=die_with_parent).returncode)
    meeting = (
        f"all {len(launch.nodes)} machines must run this command with their --node_rank"
        if len(launch.nodes) > 1
        else None
    )
    return pass_on_while(lambda: _launched(launch.argv), waits_for=meeting)


def _launched(argv: tuple[str, ...]) -> int:
    logging.disable(logging.ERROR)  # the agents report a worker's failure in 30 lines; the worker has said it in three
    from subprocess import CalledProcessError

    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousConnectionError, RendezvousTimeoutError

    try:
        run_in_process(argv)
    except ChildFailedError as failed:
        code = failed.get_first_failure()[1].exitcode
    except CalledProcessError as failed:
        code = failed.returncode
    except RendezvousConnectionError:
        print(
            "error: machine 0, where the machines meet, is gone, cannot be reached, or has another use for the port\n"
            "where: the rendezvous\n"
            "fix:   start the same command on all machines, with --resume_from_checkpoint auto",
            file=sys.stderr,
        )
        return EXIT_FAILED
    except RendezvousTimeoutError:
        print(
            "error: a machine is gone, or never came: the others have waited for it as long as --rdzv_timeout says\n"
            "where: the rendezvous\n"
            "fix:   start the same command on it, with --resume_from_checkpoint auto; or continue without it: --elastic",
            file=sys.stderr,
        )
        return EXIT_FAILED
    except ConnectionError as error:  # accelerate looks before it starts anything
        fix = "choose another port in rdzv_endpoint, or end what listens there"
        raise UserError(str(error).split(". ")[0], where="the rendezvous port", fix=fix) from None
    else:
        return 0
    return code if code > 0 else EXIT_FAILED if code == 0 else 128 - code


def run_in_process(argv: tuple[str, ...]) -> None:
    """Run torchrun or accelerate launch; they raise what ends their workers."""
    if argv[0] == "torchrun":
        from torch.distributed.run import main

        main(list(argv[1:]))
        return
    from accelerate.commands.launch import launch_command, launch_command_parser

    launch_command(launch_command_parser().parse_args(list(argv[2:])))


def before_imports(machine: Hardware, *, expandable: bool = False, deterministic: bool = False) -> None:
    """No telemetry, no remarks that every rank would repeat and nobody can act on, and no spinning threads.

    Args:
        expandable: whether this process trains what goes with expandable segments, see `topology.allocator`.
        deterministic: whether it computes by deterministic algorithms.
    """
    variables = allocator(machine, expandable=expandable) | (DETERMINISTIC if deterministic else {})
    for key, value in variables.items():
        os.environ.setdefault(key, value)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # peft's use of old names
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # an optional kernel package is not there
    if not machine.gpus:
        os.environ.setdefault("OMP_WAIT_POLICY", CPU_VARIABLES["OMP_WAIT_POLICY"])


def default_output_dir(line: CommandLine) -> Path:
    """output/NAME, after the recipe."""
    return Path("output") / (Path(line.recipe).stem if line.recipe else "run")


def choose_output_dir(config: TrainConfig, line: CommandLine) -> str:
    """The run's folder: as given, else that of the resumed checkpoint, else output/NAME, output/NAME-2, ... that is free,
    or with auto the last one that is there."""
    if config.output_dir:
        return config.output_dir
    resume = config.resume_from_checkpoint
    if resume and resume != "auto":
        folder = Path(resume)
        return str((folder.resolve() if folder.is_symlink() or not folder.name else folder).parent)
    base = default_output_dir(line)
    # Every machine must come to the same name; and a job that was written first is the one that is submitted then.
    if line.options.nnodes > 1 or line.options.via in JOBS:
        return str(base)
    if config.overwrite_output_dir:
        return str(base)
    last, folder = run_folder.free_folder(base)
    return str(last if resume else folder)
