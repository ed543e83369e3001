"""The command line: a thin table of commands, each loaded when it is called.

All behave the same way, which is that of `weightsync.execute`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from weightsync.errors import ConfigError, LayoutError, PlanBudgetError
from weightsync.execute import execute
from weightsync.settings import CA_NAME, ENV_JOB, ENV_TOKEN_FILE, TOKEN_NAME

if TYPE_CHECKING:
    from weightsync.certs import Certs

__all__ = ["app", "main"]

JsonFlag = Annotated[
    bool, typer.Option("--json", help="One JSON object on stdout, progress on stderr.")
]
DebugFlag = Annotated[bool, typer.Option("--debug", help="Show where an error came from.")]

app = typer.Typer(
    name="weightsync",
    help="New weights from trainers to rollout engines, shard to shard, everywhere or nowhere.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


bench = typer.Typer(
    name="bench",
    help="Measure this machine, each time beside the ceiling.",
    no_args_is_help=True,
)
app.add_typer(bench)

FABRIC_HELP = "local, cuda_ipc, tcp, verbs, ofi:tcp, ofi:shm, other providers of libfabric."


@app.command()
def demo(
    sources: Annotated[int, typer.Option(help="Trainer processes, FSDP2 over gloo.")] = 2,
    sinks: Annotated[
        int | None,
        typer.Option(
            help="Rollout processes: two tensor-parallel replicas, or 1; default 4. With "
            "--engine vllm the ranks of one server, default 1."
        ),
    ] = None,
    engine: Annotated[
        str, typer.Option(help="builtin, or vllm: a real vllm serve in this environment.")
    ] = "builtin",
    steps: Annotated[int, typer.Option(help="Optimizer steps, each one published.")] = 3,
    model: Annotated[str, typer.Option(help="qwen3 or qwen3_moe.")] = "qwen3",
    mode: Annotated[str, typer.Option(help="staged or in_place.")] = "staged",
    kill: Annotated[
        str | None,
        typer.Option(metavar="trainer:STEP", help="Kill the last trainer while it writes."),
    ] = None,
    tls: Annotated[
        bool, typer.Option("--tls", help="Talk over grpcs://, with a CA and a token of this run.")
    ] = False,
    trace: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Perfetto trace; default traces/demo-<time>.json."),
    ] = None,
    plant: Annotated[str | None, typer.Option(hidden=True)] = None,
    as_json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Train a small model, publish it after every step, prove what the sinks hold."""

    def run(console: Console) -> dict[str, Any]:
        from weightsync.demo.run import DemoOptions, run_demo

        if engine not in ("builtin", "vllm"):
            raise ConfigError(f"--engine {engine}: builtin or vllm")
        if engine == "vllm":
            from weightsync.demo.vllm.run import VllmDemoOptions, run_vllm_demo

            served = VllmDemoOptions(sources=sources, tp=sinks or 1, steps=steps, model=model)
            return run_vllm_demo(served, console)
        if plant is not None:
            _plant(plant)
        if mode not in ("staged", "in_place"):
            raise ConfigError(f"--mode {mode}: staged or in_place")
        options = DemoOptions(
            sources=sources,
            sinks=4 if sinks is None else sinks,
            steps=steps,
            model=model,
            mode="staged" if mode == "staged" else "in_place",
            kill_step=DemoOptions.parse_kill(kill),
            tls=tls,
            trace=trace,
        )
        return run_demo(options, console)

    execute("demo", run, as_json=as_json, debug=debug)


@bench.command()
def transfer(
    num_bytes: Annotated[
        str, typer.Option("--bytes", metavar="SIZE", help="Payload: 2147483648, 512MiB, 1.5GB.")
    ] = "1GiB",
    tensors: Annotated[
        int, typer.Option(help="Cut into so many; sizes are mixed above a mean of 1 MiB.")
    ] = 200,
    fabric: Annotated[str, typer.Option(help=FABRIC_HELP)] = "local",
    memory: Annotated[
        str, typer.Option(help="Of the sink: shared (sources write) or private (it reads).")
    ] = "shared",
    repeats: Annotated[int, typer.Option(help="Timed pairs with the baseline.")] = 7,
    threads: Annotated[int, typer.Option(help="Of the engine and of the kernels.")] = 1,
    as_json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Move tensors from one process to another, check them, compare with plain copies."""

    def run(console: Console) -> dict[str, Any]:
        from weightsync.bench.transfer import TransferOptions, run_transfer
        from weightsync.units import parse_bytes

        if memory not in ("shared", "private"):
            raise ConfigError(f"--memory {memory}: shared or private")
        options = TransferOptions(
            nbytes=parse_bytes(num_bytes),
            tensors=tensors,
            fabric=fabric,
            memory="shared" if memory == "shared" else "private",
            repeats=repeats,
            threads=threads,
        )
        return run_transfer(options, console)

    execute("bench_transfer", run, as_json=as_json, debug=debug)


@bench.command("fabric")
def bench_fabric(
    fabric: Annotated[str, typer.Option(help=FABRIC_HELP)] = "local",
    memory: Annotated[
        str,
        typer.Option(help="Of the readers: shared (the fabric's; cuda_ipc: a GPU's) or private."),
    ] = "shared",
    num_bytes: Annotated[
        str, typer.Option("--bytes", metavar="SIZE", help="Payload of one measurement.")
    ] = "256MiB",
    peers: Annotated[int, typer.Option(help="Readers of the fan-out.")] = 3,
    repeats: Annotated[int, typer.Option(help="Timed pairs with the baseline.")] = 5,
    as_json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Write in every size and manner, check every word, compare with plain means.

    Sweeps the size of writes beside plain copies or sockets, then pages, the rate of small posts,
    a fan-out to several readers, and the latency of 8 bytes.

    Examples: weightsync bench fabric --fabric tcp; weightsync bench fabric --memory private --json
    """

    def run(console: Console) -> dict[str, Any]:
        from weightsync.bench.fabric import FabricOptions, run_fabric
        from weightsync.units import parse_bytes

        if memory not in ("shared", "private"):
            raise ConfigError(f"--memory {memory}: shared or private")
        options = FabricOptions(
            fabric=fabric,
            memory="shared" if memory == "shared" else "private",
            nbytes=parse_bytes(num_bytes),
            peers=peers,
            repeats=repeats,
        )
        return run_fabric(options, console)

    execute("bench_fabric", run, as_json=as_json, debug=debug)


JobOption = Annotated[
    str | None,
    typer.Option(
        "--job", metavar="URL", help=f"unix:PATH or grpcs://HOST:PORT. Default: ${ENV_JOB}."
    ),
]
RankOption = Annotated[int, typer.Option(help="Of this process, from 0.")]
WorldOption = Annotated[int, typer.Option(help="Processes that share the checkpoint.")]
AddressOption = Annotated[
    list[str] | None,
    typer.Option(metavar="IP", help="Of this host, for tcp; one per rail, may be repeated."),
]
ThreadsOption = Annotated[int, typer.Option(help="Of the copy and digest kernels.")]
TimeoutOption = Annotated[
    str, typer.Option(metavar="TIME", help="For the whole version, with waiting: 90, 10min.")
]


@app.command(
    epilog="Examples:\n\n"
    "  weightsync load Qwen3-8B --job unix:/run/rl/job --until adopted\n\n"
    "  weightsync load Qwen3-8B --job grpcs://trainer-0:7431 --fabric tcp --address 10.0.0.5\n\n"
    "  weightsync load Qwen3-8B --rank 1 --world-size 4 --json\n\n"
)
def load(
    checkpoint: Annotated[
        Path, typer.Argument(help="Folder with safetensors files, their index, or one file.")
    ],
    job: JobOption = None,
    version: Annotated[int | None, typer.Option(help="Its number. Default: the next.")] = None,
    tag: Annotated[str, typer.Option(help="Carried along. Default: the checkpoint's path.")] = "",
    until: Annotated[str, typer.Option(help="Return when committed or adopted.")] = "committed",
    rank: RankOption = 0,
    world_size: WorldOption = 1,
    staging: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Memory for packed bytes. Default: eight buckets."),
    ] = None,
    fabric: Annotated[str, typer.Option(help=FABRIC_HELP)] = "local",
    address: AddressOption = None,
    threads: ThreadsOption = 1,
    timeout: TimeoutOption = "10min",
    as_json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Publish a checkpoint to the sinks of a job, whatever their layout: cold start.

    Files are mapped, never loaded whole. Waits for the job's replicas.
    """

    def run(console: Console) -> dict[str, Any]:
        from weightsync.checkpoint.commands import LoadOptions, run_load
        from weightsync.units import parse_bytes, parse_seconds

        options = LoadOptions(
            job=job,
            rank=rank,
            world_size=world_size,
            fabric=fabric,
            addresses=[] if address is None else address,
            threads=threads,
            timeout_s=parse_seconds(timeout),
            checkpoint=checkpoint,
            version=version,
            tag=tag if tag else str(checkpoint),
            until=until,
            staging_bytes=None if staging is None else parse_bytes(staging),
        )
        return _interruptible(lambda: run_load(options, console))

    execute("load", run, as_json=as_json, debug=debug)


@app.command(
    epilog="Examples:\n\n"
    "  weightsync export --job unix:/run/rl/job --out step-400 --like Qwen3-8B\n\n"
    "  weightsync export --out step-400 --config config.json --max-file 2GB --json\n\n"
    "  weightsync export --out step-400 --like Qwen3-8B --rank 1 --world-size 4\n\n"
)
def export(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder to write.")],
    job: JobOption = None,
    like: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="A checkpoint of the model: gives tensors and dtypes; its config.json, tokenizer "
            "and other small files are copied.",
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Instead: the model's config.json.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="BF16, F16 or F32. Default: as in --like, else BF16.")
    ] = None,
    max_file: Annotated[
        str, typer.Option(metavar="SIZE", help="Weights are cut into files of this size.")
    ] = "5GB",
    force: Annotated[bool, typer.Option("--force", help="Replace a checkpoint at DIR.")] = False,
    version: Annotated[
        int | None, typer.Option(help="Smallest to accept. Default: the next that is committed.")
    ] = None,
    replica: Annotated[
        str | None, typer.Option(metavar="NAME", help="In the job. Default: made of DIR.")
    ] = None,
    rank: RankOption = 0,
    world_size: WorldOption = 1,
    fabric: Annotated[str, typer.Option(help=FABRIC_HELP)] = "local",
    address: AddressOption = None,
    threads: ThreadsOption = 1,
    timeout: TimeoutOption = "10min",
    as_json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Join a job as one more replica and write one version as a Hugging Face checkpoint.

    DIR appears when the version is committed, verified and on disk, or not at all.
    """

    def run(console: Console) -> dict[str, Any]:
        from weightsync.checkpoint.commands import ExportOptions, run_export
        from weightsync.units import parse_bytes, parse_seconds

        options = ExportOptions(
            job=job,
            rank=rank,
            world_size=world_size,
            fabric=fabric,
            addresses=[] if address is None else address,
            threads=threads,
            timeout_s=parse_seconds(timeout),
            out=out,
            config=config,
            like=like,
            dtype=dtype,
            max_file_bytes=parse_bytes(max_file),
            overwrite=force,
            version=version,
            replica=replica,
        )
        return _interruptible(lambda: run_export(options, console))

    execute("export", run, as_json=as_json, debug=debug)


def _interruptible(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Turn SIGINT and SIGTERM into one KeyboardInterrupt, so that cleaning up is not cut short."""
    from weightsync.demo.workspace import Interrupts

    with Interrupts() as interrupts, interrupts.allowed():
        return work()


@app.command(
    "plan",
    epilog="Examples:\n\n"
    "  weightsync plan model=qwen3_30b_a3b trainer=fsdp8 rollout=tp8\n\n"
    "  weightsync plan model=kimi_k2 trainer=fsdp16_pp2_ep8 rollout=ep32_x4 cluster=h100_cx7 "
    "--json\n\n"
    "  weightsync plan model.config=Qwen3-8B trainer=fsdp2 trainer.fsdp=16 rollout=vllm "
    "rollout.tp=4 rollout.replicas=2 rollout.encoding=fp8_block\n\n"
    "  weightsync plan model=llama_3_1_8b trainer=fsdp8 rollout=tp1 cluster=eth_25g "
    "cluster.posting_threads=2 --out plan.parquet --report plan.html\n\n"
    "  weightsync plan --config-dir ours cluster=our_cluster model=kimi_k2 trainer=fsdp64 "
    "rollout=ep32\n\n"
    "Wrong names are answered with those that there are. docs/plan.md explains every number.\n\n",
)
def plan_command(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[GROUP=OPTION | GROUP.KEY=VALUE]...",
            help="Groups: model, trainer, rollout, cluster (default h100_cx7), transport.",
            show_default=False,
        ),
    ] = None,
    config_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Options of your own, DIR/GROUP/NAME.yaml; searched first."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE.parquet", help="Every row of the plan; needs pyarrow."),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(metavar="FILE.html", help="A page with pictures of all that; needs Jinja2."),
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(metavar="FILE.json", help="The predicted timeline, for ui.perfetto.dev."),
    ] = None,
    as_json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Plan offline: what would move where, the physical limit, and a predicted time.

    Makes and proves the real plan of a job of any size. Needs no torch, GPU or NIC.
    """
    # Most arrays of a plan are used once: huge pages, which are filled with zeros first, would take
    # an eighth of the time. numpy reads this when it is imported: below.
    os.environ.setdefault("NUMPY_MADVISE_HUGEPAGE", "0")

    def run(console: Console) -> dict[str, Any]:
        from weightsync.dryrun.command import PlanCommand, run_plan

        chosen = [] if overrides is None else overrides
        return run_plan(PlanCommand(chosen, config_dir, out, report, trace), console)

    # Whatever does not fit together, the user chose.
    bad_input = (ConfigError, LayoutError, PlanBudgetError)
    execute("plan", run, as_json=as_json, debug=debug, bad_input=bad_input)


@app.command(
    epilog="Examples:\n\n"
    "  weightsync calibrate\n\n"
    "  weightsync calibrate --address 10.0.0.5 --address 10.1.0.5 --nic-gbit 25 --name rack_7\n\n"
    "  weightsync plan --config-dir ~/.config/weightsync cluster=rack_7 model=... trainer=... "
    "rollout=...\n\n"
)
def calibrate(
    name: Annotated[str, typer.Option(help="Of the cluster.")] = "this_host",
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE.yaml", help="Default: ~/.config/weightsync/cluster/NAME.yaml."),
    ] = None,
    address: Annotated[
        list[str] | None,
        typer.Option(metavar="IP", help="Of this host; one per rail, may be repeated."),
    ] = None,
    nic_gbit: Annotated[
        float | None,
        typer.Option(help="Nominal Gbit/s of a rail. Default: as the system says, or measured."),
    ] = None,
    sources: Annotated[int, typer.Option(help="Processes that publish.")] = 2,
    sinks: Annotated[int, typer.Option(help="Processes that receive.")] = 2,
    ranks_per_node: Annotated[int, typer.Option(help="Ranks that share a node.")] = 1,
    as_json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Measure this host's constants, and store them as a cluster for `weightsync plan`.

    Runs real jobs over the tcp fabric between processes of this host. What other hosts take part
    in, such as the latency of a switch, is not in it: docs/scale-model.md says what is.
    """

    def run(console: Console) -> dict[str, Any]:
        from weightsync.calibrate.command import CalibrateOptions, run_calibrate

        options = CalibrateOptions(
            name=name,
            out=out,
            addresses=tuple(address or ()),
            nic_gbit_per_s=nic_gbit,
            sources=sources,
            sinks=sinks,
            ranks_per_node=ranks_per_node,
        )
        return run_calibrate(options, console)

    execute("calibrate", run, as_json=as_json, debug=debug)


@app.command()
def doctor(
    vllm: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Also ask a vLLM server, such as http://127.0.0.1:8000."),
    ] = None,
    as_json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Say what this host can do, and what to install for more."""

    def run(console: Console) -> dict[str, Any]:
        from weightsync.doctor import run_doctor

        if vllm is None:
            return run_doctor(console)
        from weightsync.doctor_vllm import check_vllm

        return run_doctor(console, check_vllm(vllm))

    execute("doctor", run, as_json=as_json, debug=debug)


@app.command(
    # A paragraph each, or their lines would be joined.
    epilog="Examples:\n\n"
    "  weightsync certs --host trainer-0 --host 10.0.0.1\n\n"
    "  weightsync certs --host trainer-0.cluster --dir /etc/weightsync --days 30\n\n"
    "  weightsync certs --renew --dir /etc/weightsync\n\n"
)
def certs(
    host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="DNS name or IP address under which others reach the coordinator; may be "
            "repeated. Default: the name of this host. Loopback is always included.",
        ),
    ] = None,
    folder: Annotated[Path, typer.Option("--dir", metavar="DIR", help="Takes the files.")] = Path(
        "certs"
    ),
    days: Annotated[
        int | None,
        typer.Option(help="Validity of the server's certificate. Default: 365, or the CA's end."),
    ] = None,
    renew: Annotated[
        bool,
        typer.Option("--renew", help="A new server certificate only; members keep what they have."),
    ] = False,
    force: Annotated[
        bool,
        typer.Option("--force", help="Replace everything; every member needs new copies."),
    ] = False,
    as_json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Make what a job on grpcs:// needs: a CA, a server certificate and a token.

    Run it once, where the coordinator will run. Every other host needs copies of ca.pem and token.
    """

    def run(console: Console) -> dict[str, Any]:
        from weightsync.certs import make_certs, renew_certs

        hosts = [] if host is None else host
        if renew and force:
            raise ConfigError("--renew keeps the CA and the token, --force replaces them: choose")
        made = (
            renew_certs(folder, hosts, days=days)
            if renew
            else make_certs(folder, hosts, days=days, force=force)
        )
        _say_certs(console, made, renewed=renew)
        return {
            "ok": True,
            "folder": str(made.folder),
            "files": {name: str(made.folder / name) for name in made.names},
            "hosts": list(made.server.hosts),
            "not_after": made.server.not_after.isoformat(),
            "ca_not_after": made.ca.not_after.isoformat(),
            "ca_sha256": made.ca.fingerprint,
            "renewed": renew,
        }

    execute("certs", run, as_json=as_json, debug=debug)


def main() -> None:
    """The console script."""
    app()


def _say_certs(console: Console, made: Certs, *, renewed: bool) -> None:
    """What was written, and what to do with it; never what is in it."""
    folder, host = made.folder.resolve(), made.server.public_host
    url = "grpcs://NAME:7431" if host is None else f"grpcs://{host}:7431"
    lines = [
        f"{folder}: for {', '.join(made.server.hosts)}",
        f"  valid until {made.server.not_after:%Y-%m-%d %H:%M} UTC, the CA until "
        f"{made.ca.not_after:%Y-%m-%d}",
    ]
    lines += [f"  {name:<11} {what}" for name, what in made.names.items()]
    if renewed:
        lines += ["", "Next: start the job again. Members keep their copies."]
    else:
        lines += [
            "",
            "Next, in the process that hosts the job:",
            f'  Job.start("grpcs://0.0.0.0:7431", token_file="{folder / TOKEN_NAME}")',
            "for every other host:",
            f"  ssh HOST mkdir -p -m 700 {folder}",
            f"  scp -p {folder / CA_NAME} {folder / TOKEN_NAME} HOST:{folder}/",
            "and in the environment of sources and sinks there:",
            f"  export {ENV_TOKEN_FILE}={folder / TOKEN_NAME}",
            f"  export {ENV_JOB}={url}",
        ]
    for line in lines:
        console.print(Text(line), soft_wrap=True)


def _plant(name: str) -> None:
    """Have every process of the run plant a layout bug (tests only)."""
    from weightsync import plants

    os.environ[plants.ENV_PLANT] = name
    plants.install()


if __name__ == "__main__":
    main()
