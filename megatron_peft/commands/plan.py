"""Plan a run that need not fit this machine: what each rank holds and sends, whether any would wait for ever, its time.

megatron-peft plan takes all flags of `megatron-peft train`, and --world-size. Data is not read, and of the model only
its config.json: --pretrained-checkpoint may be that file, under any name. The training code itself runs on ranks that
exist one at a time, without numbers (docs/rehearsal.md). With --fit it ranks the layouts that fit.
"""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_peft.cli.command import Command
from megatron_peft.cli.config_files import run_file
from megatron_peft.cli.launch import tell_loading
from megatron_peft.cli.parser import RunFlags
from megatron_peft.commands.train import shape_of
from megatron_peft.config import Checked, ConfigurationError, Requirements, RunConfig, flag, option, require, writing
from megatron_peft.models.families import read_shape_of_file
from megatron_peft.models.shape import ModelShape

if TYPE_CHECKING:
    from megatron_peft.plan.cluster import Cluster
    from megatron_peft.plan.layouts import FittedLayout

PICTURES = (".png", ".pdf", ".svg")
ASSUMED_TOKENS = 1e8
ASSUMED_BATCH = 128  # samples; of --fit without --global-batch-size
REHEARSED = 3  # layouts of --fit, unless --rehearsed says otherwise
NODES_TRIED = (1, 2, 4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class PlanSettings(Checked):
    """The world, and what is written of the plan."""

    world_size: int | None = option(
        None,
        "GPUs of the run (default: those of --nproc-per-node, else one replica, tensor- times pipeline-parallel size)",
        check="positive",
    )
    cluster: str = option(
        "8xh100", "nodes and links: 8xa100, 8xh100, or a file with the same fields", metavar="NAME|FILE.yaml"
    )
    fit: bool = option(
        False,
        "rank the layouts of --world-size GPUs, or of the first of 1, 2, 4, 8, ... nodes, that fit, and rehearse the "
        "best three",
    )
    rehearsed: int | None = option(
        None,
        f"with --fit: number of best layouts that are rehearsed (default: {REHEARSED})",
        check="not_negative",
        needs="fit",
    )
    longest_sequence: bool = option(
        False, "also find the longest --seq-length that fits, at this layout or at the one that --fit chooses"
    )
    tokens: float | None = option(
        None,
        "tokens of the run, for hours (default: full sequences for --train-iters or --train-samples; else 1e8)",
        check="positive",
        metavar="N",
    )
    json: Path | None = option(None, "also write the plan as JSON", check="in_a_folder", metavar="FILE")
    plot: Path | None = option(
        None, "also draw memory and the pipeline's timeline", check="in_a_folder", metavar="FILE"
    )
    save_config: Path | None = option(
        None,
        "with --fit: write the flags of the best layout for --config",
        check="in_a_folder",
        needs="fit",
        metavar="FILE.yaml",
    )

    def check(self, require: Requirements) -> None:
        require(
            not (self.plot and self.fit), "--plot draws one run: leave out --fit, or plan the layout that it finds."
        )
        endings = ", ".join(PICTURES)
        require(
            self.plot is None or self.plot.suffix.lower() in PICTURES,
            f"--plot {self.plot} is no picture: its name must end in one of {endings}.",
        )
        for name in ("json", "plot", "save_config"):
            path = getattr(self, name)
            require(path is None or not path.is_dir(), f"{flag(name)} {path} is a folder: name a file in it.")


def run(settings: PlanSettings, run_flags: RunFlags) -> int:
    """Exit code 1 if the run does not fit or would wait for ever."""
    from megatron_peft.plan.cluster import read_cluster

    cluster = read_cluster(settings.cluster)
    config = config_of(settings, run_flags)
    require(
        config.model.pretrained_checkpoint is not None, "give --pretrained-checkpoint: a folder, or its config.json."
    )
    shape = _shape_of(str(config.model.pretrained_checkpoint))
    tell_loading()
    if settings.fit:
        return _fit(settings, config, shape, cluster)
    from megatron_peft.plan.plan import draw, make_plan, print_plan

    _tell("rehearsing the run's distinct ranks: from seconds to a few minutes, by the number of layers of a stage")
    plan = make_plan(config, shape, cluster)
    num_tokens = settings.tokens or config.num_tokens
    print_plan(plan, num_tokens)
    written = plan.as_dict(num_tokens or ASSUMED_TOKENS) | _longest_sequence(settings, config, shape, cluster)
    if settings.json:
        write_file(settings.json, json.dumps(written, indent=1) + "\n")
    if settings.plot:
        draw(plan, settings.plot)
    return 0 if plan.fits and plan.problem is None else 1


def config_of(settings: PlanSettings, run_flags: RunFlags) -> RunConfig:
    """The run in a world of --world-size; neither data nor a length nor --save is needed.

    --fit begins with any layout.
    """
    typed = run_flags.values["config"]
    model = Path(typed.get("pretrained_checkpoint", ""))
    if model.name == "config.json" and model.is_file():  # it stands for its folder, which --save-config then names
        typed["pretrained_checkpoint"] = str(model.parent)
    size = run_flags.replica_size if settings.fit else settings.world_size or run_flags.num_processes
    return run_flags.config({"WORLD_SIZE": str(size)}, _shape_of, saved=dict, any_layout=settings.fit)


def _shape_of(model: str) -> ModelShape:
    """The shape of --pretrained-checkpoint: a model's folder, or a file that describes one."""
    return read_shape_of_file(Path(model)) if Path(model).is_file() else shape_of(model)


def _fit(settings: PlanSettings, config: RunConfig, shape: ModelShape, cluster: "Cluster") -> int:
    from rich.console import Console

    from megatron_peft.plan.layouts import fit_tables
    from megatron_peft.plan.plan import make_plan, summary
    from megatron_peft.plan.timing import ONLY_RANKS, Accuracy

    if config.training.global_batch_size is None:
        print(f"--global-batch-size {ASSUMED_BATCH} is assumed: layouts are compared at the same one.")
        config = replace(config, training=replace(config.training, global_batch_size=ASSUMED_BATCH))
    num_tokens = settings.tokens or config.num_tokens or ASSUMED_TOKENS
    size, layouts = _fitting(settings.world_size, config, shape, cluster)
    console = Console()
    title = f"Layouts that fit {_nodes(size, cluster)}; hours for {num_tokens:,.0f} tokens"
    for table in fit_tables(layouts, title, num_tokens):
        console.print(table)
    print(f"s/step: {Accuracy.reported()}. {ONLY_RANKS}")
    plans, chosen = [], layouts[: REHEARSED if settings.rehearsed is None else settings.rehearsed]
    for number, layout in enumerate(chosen, 1):
        _tell(f"rehearsing layout {number} of {len(chosen)} (--rehearsed 0 leaves that out): {' '.join(layout.flags)}")
        plan = make_plan(layout.run, shape, cluster)
        plans.append(plan)
        print(f"layout {number}, rehearsed:", *summary(plan), sep="\n  ")
        if plan.speed is not None:
            hours = f"{plan.speed.hours(num_tokens):,.1f} hours for {num_tokens:,.0f} tokens"
            print(f"  {plan.speed.summary()}\n  {plan.speed.tokens_per_second:,.0f} tokens/s, {hours}")
    written: dict[str, Any] = {
        "layouts": [layout.as_dict(num_tokens) for layout in layouts],
        "rehearsed": [plan.as_dict(num_tokens) for plan in plans],
    }
    speeds = {number: plan.speed for number, plan in enumerate(plans) if plan.fits and plan.speed is not None}
    # The rehearsed time decides: it is of the whole step.
    best = min(speeds, key=lambda number: speeds[number].time.seconds) if speeds else 0
    if speeds or not plans:
        written |= _longest_sequence(settings, layouts[best].run, shape, cluster)
    if settings.json:
        write_file(settings.json, json.dumps(written, indent=1) + "\n")
    if plans and not speeds:
        print("none of the rehearsed layouts can be run: more may be rehearsed (--rehearsed N).")
        return 1
    print(f"flags of layout {best + 1}: {' '.join(layouts[best].flags)}")
    if left_out := layouts[best].flags_to_leave_out(config):
        print(f"leave out of the run's own: {' '.join(left_out)}")
    if settings.save_config:
        title = f"The layout that megatron-peft plan --fit ranks first on {_nodes(size, cluster)}"
        run = layouts[best].run
        write_file(settings.save_config, run_file(run, {}, title, unset=("save",)))
    return 0


def _longest_sequence(settings: PlanSettings, run: RunConfig, shape: ModelShape, cluster: "Cluster") -> dict[str, int]:
    """What --longest-sequence asks for, printed, and for --json."""
    if not settings.longest_sequence:
        return {}
    from megatron_peft.plan.layouts import longest_sequence
    from megatron_peft.runtime.progress import progress_bar

    with progress_bar("Trying lengths") as watch:
        length, peak = longest_sequence(run, shape, cluster, watch)
    answer = f"--seq-length {length} fits" if length else "none fits; the shortest takes"
    limit = ", all positions of the model" * (length > shape.longest_sequence - run.parallel.tensor_model_parallel_size)
    print(f"longest sequence: {answer}{limit} ({peak / 2**30:.1f} of {cluster.usable_bytes / 2**30:.1f} GiB)")
    return {"longest_sequence": length}


def _fitting(
    world_size: int | None, config: RunConfig, shape: ModelShape, cluster: "Cluster"
) -> "tuple[int, list[FittedLayout]]":
    """GPUs and the layouts that fit them: of `world_size`, or of the fewest of `NODES_TRIED` that hold the run."""
    from megatron_peft.plan.layouts import fit
    from megatron_peft.runtime.progress import progress_bar

    if world_size is not None:
        with progress_bar("Comparing layouts") as watch:
            return world_size, fit(config, shape, world_size, cluster, watch=watch)
    problem, known = "", {}
    for num_nodes in NODES_TRIED:
        size = num_nodes * cluster.gpus_per_node
        try:
            with progress_bar(f"Comparing layouts of {size} GPUs") as watch:
                layouts = fit(config, shape, size, cluster, watch=watch, known=known)
        except ConfigurationError as error:
            problem = str(error).removeprefix("--fit: ")
            _tell(f"{_nodes(size, cluster)}: {problem}")
            continue
        print(f"{_nodes(size, cluster)} can hold the run; --world-size N plans for more GPUs.")
        return size, layouts
    raise ConfigurationError(f"--fit: no number of nodes up to {NODES_TRIED[-1]} will do. Of the last: {problem}")


def _nodes(size: int, cluster: "Cluster") -> str:
    number, rest = divmod(size, cluster.gpus_per_node)
    nodes = "" if rest or not number else f" ({number} node{'s' * (number > 1)})"
    return f"{size} GPUs{nodes} of {cluster.name}"


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def write_file(path: Path, text: str) -> None:
    """Raises ConfigurationError if it cannot be written."""
    with writing(str(path), "give another file"):
        path.write_text(text)


main = Command("plan", __doc__, PlanSettings, run, takes_run_flags=True)
