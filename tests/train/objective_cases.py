"""Registered objectives with the models that they accept, and what two processes make of them.

The processes import this file, and so it needs neither pytest nor a test.
"""

from __future__ import annotations

import dataclasses
import signal
import tempfile
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from crossover.archs import Block, build
from crossover.train.config import DataConfig, ModelSpec, ObjectiveSpec, OptimConfig, RunConfig, TrainConfig, plain
from crossover.train.learner import Learner, accumulate_gradients, split_rows
from crossover.train.objective import Objective
from crossover.train.objectives import OBJECTIVES, open_objective
from crossover.train.objectives.recall import TASKS, Task
from crossover.train.runtime import choose_precision
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

CPU = torch.device("cpu")
FP32 = choose_precision("fp32", CPU)

# Small models of each kind: preset and options. Of the decoders one has experts, and so an auxiliary loss.
MODELS: dict[str, dict[str, tuple[str, ...]]] = {
    "decoder": {"mamba": (), "jamba": ("attention_every=2", "attention_offset=1")},
    "encoder": {"bert": ()},
    "seq2seq": {"encdec": ()},
}
Terms = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """An objective with some of its options and a model that can learn it."""

    name: str
    cls: type[Objective[Any, Any]]
    preset: str
    model: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return "-".join([self.name, *(f"{key}={value}" for key, value in self.options.items()), self.preset])

    def open(
        self, folder: Path, *, seed: int = 0, balance: bool = True, **train: Any
    ) -> tuple[RunConfig, Objective[Any, Any]]:
        """A short run on the objective's example, both below `folder`, and the objective.

        Without `balance`, experts have no auxiliary loss, which is no mean over tokens; `train` is for TrainConfig.
        """
        folder.mkdir(exist_ok=True)
        source, options = self.cls.example(Path(tempfile.mkdtemp(dir=folder)))
        options = dataclasses.replace(options, **self.options)
        unbalanced = ("balance_weight=0",) if self.preset == "jamba" and not balance else ()
        settings: dict[str, Any] = {
            **{"steps": 6, "batch_size": 7, "seq_len": 48, "precision": "fp32", "log_every": 1, "checkpoint_every": 0},
            **{"eval_every": 0, "eval_tokens": 200, "final_eval_tokens": 200, "position_len": 0, "sample_tokens": 4},
        }
        run = RunConfig(
            name="run",
            out=folder,
            seed=seed,
            model=ModelSpec(preset=self.preset, d_model=32, n_layers=2, set=self.model + unbalanced),
            data=DataConfig(source=str(source), val_fraction=0.25),
            objective=ObjectiveSpec(kind=self.name, options=plain(options)),
            optim=OptimConfig(lr=3e-3, schedule="constant"),
            train=TrainConfig(**(settings | train)),
        )
        try:
            objective = open_objective(run)
            objective.check(run.model.configure(objective.data.tokenizer.vocab_size))
        except ValueError as error:
            error.add_note(
                f"The objective {self.name!r} cannot learn its example: correct {self.cls.__name__}.example."
            )
            raise
        return run, objective

    def learner(self, folder: Path, *, dtype: torch.dtype = torch.float64, **settings: Any) -> Learner:
        """An objective and its model with fixed weights; settings are those of `open`."""
        run, objective = self.open(folder, **settings)
        torch.manual_seed(3)
        model = objective.prepare(build(run.model.configure(objective.data.tokenizer.vocab_size)))
        return Learner(model.to(dtype), objective)


def cases() -> Iterator[Case]:
    """Each objective with its defaults, with each other value of its options of few values, and on each model."""
    for name, cls in OBJECTIVES.items():
        hints = typing.get_type_hints(cls.Config)
        variants: list[dict[str, Any]] = [{}]
        for option in dataclasses.fields(cls.Config):
            values = (False, True) if hints[option.name] is bool else ()
            if typing.get_origin(hints[option.name]) is typing.Literal:
                values = typing.get_args(hints[option.name])
            variants += [{option.name: value} for value in values if value != option.default]
        for kind in cls.kinds:
            # tasks differ in their rows alone, which know of no model
            models = {"mamba": ()} if issubclass(cls, Task) and cls is not next(iter(TASKS.values())) else MODELS[kind]
            for preset, model in models.items():
                for options in variants:
                    yield Case(name, cls, preset, model, options)


def terms_and_gradient(
    learner: nn.Module, objective: Objective[Any, Any], parts: Sequence[Sequence[Any]], *, world: int = 1
) -> Terms:
    """The mean of each term over all rows, and the gradient of each parameter under its name in a Learner."""
    learner.zero_grad()
    batches = [objective.collate(part) for part in parts]
    found = accumulate_gradients(learner, objective, batches, precision=FP32, world=world)
    for name, parameter in learner.named_parameters():
        gradient: Any = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        full = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient.clone()
        found[name.removeprefix("module.")] = full
    return found


def off_by(found: Terms, expected: Terms) -> float:
    """The difference of two results of `terms_and_gradient`: the largest of each term's and of the whole gradient's."""
    assert found.keys() == expected.keys()
    terms = [name for name, value in expected.items() if not name.startswith("model.")]
    gaps = [abs((found[name] - expected[name]).item()) / max(abs(expected[name].item()), 1e-6) for name in terms]
    gradients = [torch.cat([each[n].flatten() for n in each if n not in terms]) for each in (found, expected)]
    return max(*gaps, ((gradients[0] - gradients[1]).norm() / gradients[1].norm()).item())


def replicated(learner: Learner) -> nn.Module:
    return DistributedDataParallel(learner)


def sharded(learner: Learner) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in [module for module in learner.modules() if isinstance(module, Block)]:
        if hasattr(block.mixer, "read"):  # a source is read outside the block's forward, where its hooks do not run
            fully_shard(block.mixer, mesh=mesh)
            register_fsdp_forward_method(block.mixer, "read")
        fully_shard(block, mesh=mesh)
    fully_shard(learner, mesh=mesh)
    return learner


WRAPPERS: dict[str, Callable[[Learner], nn.Module]] = {"DDP": replicated, "FSDP2": sharded}


def in_two_processes(rank: int, cases: Sequence[Case], folder: Path) -> None:
    """Writes, from rank 0, how far gradients and terms of two processes are from those of one, to folder/found.pt."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # sent when the parent dies, and ignored in a shell's background job
    torch.set_num_threads(1)
    OBJECTIVES.update({case.name: case.cls for case in cases})  # also those registered from outside the package
    store = f"file://{folder / 'store'}"  # no port to be found
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    found: dict[str, float] = {}
    for case in cases:
        for wrapper, wrap in WRAPPERS.items():
            learner = case.learner(folder / f"{case}-{wrapper}-{rank}", dtype=torch.float32)
            objective = learner.objective
            shares = [split_rows(objective.rows(0)[r::2], 2) for r in range(2)]
            alone = terms_and_gradient(learner, objective, [part for share in shares for part in share])
            learner.zero_grad()
            together = terms_and_gradient(wrap(learner), objective, shares[rank], world=2)
            found[f"{case}, {wrapper}"] = off_by(together, alone)
    if rank == 0:
        torch.save(found, folder / "found.pt")
    dist.destroy_process_group()
