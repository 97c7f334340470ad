"""One trainer for all that follows gradients: any loss, under masks or not, with whatever is added to its steps.

per step:  gradients of `batch` windows, in parts that fit → clip → companions → AdamW → companions → weights
"""

from __future__ import annotations

import dataclasses
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from types import MappingProxyType

import torch
from torch import Tensor, nn

from ..base.errors import UserError
from ..base.files import replacing
from ..base.progress import Progress
from .casting import cast
from .masters import Masters
from .norms import fused_norms
from .optimisers import MULTIPLE, optimiser
from .recipe import Recipe

# A loss that is not finite is noticed after so many steps at the latest: to look at it is to wait for the device.
_NOTICED = 16
# Held-out loss that is worse by so much than the best is the rate's fault; less may come down again as the rate falls.
_WORSE = 0.05


class Companion:
    """What is added to a training's steps, such as the penalty and the projections of an ADMM. Does nothing itself."""

    def before_update(self, trainer: Trainer, step: int) -> None:
        """Between clipping and the optimiser: `trainer.masters.values[name].grad` may change.

        Args:
            trainer: the training.
            step: number of the step, from 0.
        """

    def after_update(self, trainer: Trainer, step: int) -> None:
        """After the optimiser, before the module's weights are written: `trainer.masters.values` may change."""

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of it."""
        return {}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` gave."""


class Single:
    """A process that trains by itself. Of several, of number `rank` from 0, each has all the weights."""

    size, rank = 1, 0

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the processes."""

    def gather(self, values: list) -> list:
        """What all processes give, one after the other."""
        return values

    def tell(self, value: object) -> object:
        """The first process's value."""
        return value


@dataclass
class Training:
    """What a training did.

    Attributes:
        steps: how many were made.
        planned: how many there would have been at most.
        windows: that they saw, each as often as it came; of all processes.
        seconds: wall time, of earlier attempts too.
        before, after: loss of the held-out windows at the start, and of the weights that were kept; None without such.
        kept: after which step the weights were those that were kept.
        ended: why it ended: "all steps", "no improvement" or "minutes".
        curve: of every look: `step`, `loss` (mean over the windows since the look before; none at the start),
            `held_out`, `rate`, `seconds`.
        micro: windows per backward pass in the end.
        notes: what was done for want of device memory.
    """

    steps: int = 0
    planned: int = 0
    windows: int = 0
    seconds: float = 0.0
    before: float | None = None
    after: float | None = None
    kept: int = 0
    ended: str = "all steps"
    curve: list[dict] = field(default_factory=list)
    micro: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def over(self) -> bool:
        """Whether it has come to its end."""
        return self.ended != "all steps" or self.steps == self.planned


_SINGLE = Single()


class Trainer:
    """Trains some weights of a module in place.

    Args:
        module: the module, in evaluation mode, on one device.
        trained: name of a weight in the module → mask of its entries that are trained; None: all.
        loss: (numbers of windows, whether they are held-out ones) → mean loss over these windows, a scalar.
        windows: number of windows to train on, of this process.
        recipe: how.
        held_out: number of held-out windows; without any the last weights are kept.
        label: what is trained, for progress and messages.
        quiet: no progress.
        file: for checkpoints; what an earlier attempt of the same training has left there is gone on from, to the same
            bits on the same device. It is removed by the one who has kept the result.
        companions: what is added to each step.
        working: dtype of weights → another that the module computes in meanwhile; the masters are made of the weights
            as they are.
        lighter: takes the next measure when one window at a time is too much for the device, and says which; None when
            there is none left.
        shrunk: called with the windows per backward pass whenever they become fewer.
        together: the processes that train the same weights, which stay the same in all of them. The first one writes
            the checkpoints, from which all go on.
        shared: whether all processes have the same windows; a step's, and the held-out ones, are divided among them.
            Otherwise each has windows of its own, and all held-out ones, and a step takes an equal part from each.
    """

    def __init__(
        self,
        module: nn.Module,
        trained: Mapping[str, Tensor | None],
        loss: Callable[[Sequence[int], bool], Tensor],
        windows: int,
        recipe: Recipe,
        *,
        held_out: int = 0,
        label: str = "training",
        quiet: bool = False,
        file: Path | None = None,
        companions: Sequence[Companion] = (),
        working: Mapping[torch.dtype, torch.dtype] = MappingProxyType({}),
        lighter: Callable[[], str | None] = lambda: None,
        shrunk: Callable[[int], None] = lambda micro: None,
        together: Single = _SINGLE,
        shared: bool = False,
    ) -> None:
        self.masters = Masters(module, trained, MULTIPLE if recipe.state == "8bit" else 1)
        if not self.masters.values:
            raise ValueError(f"{label}: there is nothing to train")
        self.recipe, self.label = recipe, label
        self._loss, self._windows, self._held_out = loss, windows, held_out
        self._quiet, self._file, self._companions = quiet, file, companions
        self._module, self._working = module, working
        self._lighter, self._shrunk = lighter, shrunk
        values = self.masters.values.values()
        self.device = next(iter(values)).device
        self.optimiser = optimiser(values, recipe.rate, recipe.betas, recipe.decay, recipe.state)
        self._together, self._shared = together, shared
        own, rest = divmod(recipe.batch, together.size)
        if rest and not shared:
            raise ValueError(f"{label}: {recipe.batch} windows do not divide among {together.size} processes")
        self._batch = recipe.batch if shared else own
        self._most = max(together.gather([windows]))
        self.micro = min(recipe.micro or recipe.batch, own + (rest > 0))
        self._factor = 1.0  # of the rate
        self._done = Training(planned=recipe.steps)
        self._best: dict[str, Tensor] = {}
        self._worse = 0
        self._recent: list[tuple[int, int, Tensor]] = []  # steps, windows and losses since the last look
        self._checked = 0
        self._start = 0.0

    def run(self) -> Training:
        """Train, and leave the best weights in the module.

        Raises:
            UserError: a loss that is not finite, or too little device memory for one window.
        """
        with self.masters.gathering(), cast(self._module, self._working), fused_norms(self._module), _repeatable():
            self._restore()
            if len(set(self._together.gather([self._done.steps]))) > 1:
                raise UserError(f"{self.label}: not every process can read {self._file}: see why, or delete it")
            self._start = time.perf_counter() - self._done.seconds
            if not self._done.curve:
                self._look(0)
            self._train()
        if self._held_out:
            self.masters.load(self._best)
        self.masters.write()
        self.masters.check_zeros(self.label)
        done = self._done
        done.seconds, done.micro = self._seconds(), self.micro
        if not self._held_out:
            done.kept = done.steps
        return done

    def _train(self) -> None:
        done, looks = self._done, set(self.recipe.looks())
        if done.ended != "all steps":  # it was killed between its last look and the one who keeps the result
            return
        progress = Progress(range(done.steps, self.recipe.steps), self.label, quiet=self._quiet)
        for step in progress:
            self._step(step)
            done.steps = step + 1
            late = self.recipe.minutes is not None and self._decisive_seconds() > 60 * self.recipe.minutes
            if done.steps in looks or late:
                self._look(done.steps)
                progress.note(_told(done.curve[-1]))
                if late and done.steps < self.recipe.steps:
                    done.ended = "minutes"
                elif self._worse >= self.recipe.patience and done.steps < self.recipe.steps:
                    done.ended = "no improvement"
            if done.steps in looks or late or done.steps % self.recipe.saved == 0:
                self._save()
            if done.ended != "all steps":
                return

    def _step(self, step: int) -> None:
        batch = self.batch(step)
        while (loss := self._gradients(batch)) is None:
            self._shrink()
        count = len(batch)
        if self._together.size > 1:
            count, loss = self._added(count, loss)
        self._recent.append((step, count, loss))
        if len(self._recent) - self._checked >= _NOTICED:
            self._check()
        values = list(self.masters.values.values())
        if self.recipe.clip is not None:
            nn.utils.clip_grad_norm_(values, self.recipe.clip)
        for companion in self._companions:
            companion.before_update(self, step)
        self._set_rate(self._factor * self.recipe.rate_at(step, self._decisive_seconds()))
        try:
            self.optimiser.step()
        except torch.OutOfMemoryError as error:  # half of the weights may have moved: there is no second try
            size = sum(value.numel() for value in values)
            raise UserError(
                f"{self.label}: the optimiser's state of {size:,} weights does not fit on the device ({error}): "
                f"{self.recipe.key}.state=8bit takes less, or use a larger device"
            ) from None
        self.masters.forget()
        for companion in self._companions:
            companion.after_update(self, step)
        self.masters.write()
        self._done.windows += count

    def _set_rate(self, rate: float) -> None:
        for group in self.optimiser.param_groups:
            if isinstance(group["lr"], Tensor):  # as torchao keeps it
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def _added(self, count: int, loss: Tensor) -> tuple[int, Tensor]:
        """Windows and mean loss of all processes, whose gradients' mean is in the masters afterwards."""
        for value in self.masters.values.values():
            if value.grad is None:
                value.grad = torch.zeros_like(value)
        gradients = [value.grad for value in self.masters.values.values()]
        counts = torch.tensor([float(count)], dtype=torch.float64, device=self.device)
        total = loss.double().reshape(1) * count
        torch._foreach_mul_(gradients, float(count))
        self._together.add([counts, total, *gradients])
        torch._foreach_div_(gradients, float(counts))
        return int(counts), (total / counts).to(loss.dtype).squeeze(0)

    def batch(self, step: int) -> list[int]:
        """Numbers of this process's windows of a step: every epoch has an order of its own."""
        epoch, place = divmod(step, -(-self._most // self._batch))
        generator = torch.Generator().manual_seed(1_000_003 * self.recipe.seed + epoch)
        order = torch.randperm(self._windows, generator=generator)
        return self._mine(order[place * self._batch : (place + 1) * self._batch].tolist())

    def _mine(self, numbers: list[int]) -> list[int]:
        """Of windows that all processes have, those that this one sees to."""
        return numbers[self._together.rank :: self._together.size] if self._shared else numbers

    def _gradients(self, batch: Sequence[int]) -> Tensor | None:
        """The mean loss of the windows, whose gradients are in the masters; None when the device's memory does not
        suffice."""
        total = torch.zeros((), device=self.device)
        try:
            for begin in range(0, len(batch), self.micro):
                part = batch[begin : begin + self.micro]
                with torch.enable_grad(), self._computing():
                    loss = self._loss(part, False) * (len(part) / len(batch))
                loss.backward()
                total += loss.detach()
        except torch.OutOfMemoryError:
            self.masters.forget()
            return None
        return total

    def _shrink(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if self.micro > 1:
            self.micro //= 2
            self._shrunk(self.micro)
            measure = f"{self.micro} windows per backward pass"
        elif (measure := self._lighter()) is None:
            raise UserError(
                f"{self.label}: the device's memory does not suffice for the gradients of one window: use shorter "
                "windows (seqlen), or a larger device"
            )
        self._done.notes.append(f"device memory ran short in {self.label}; from there on: {measure}")

    def _check(self) -> None:
        """Refuse to go on from a loss that is not finite."""
        fresh, self._checked = self._recent[self._checked :], len(self._recent)
        values = torch.stack([loss for _, _, loss in fresh]).tolist() if fresh else []
        for (step, _, _), value in zip(fresh, values, strict=True):
            if not math.isfinite(value):
                raise UserError(
                    f"{self.label}: the loss is {value} at step {step + 1} of {self.recipe.steps}: give a smaller "
                    f"{self.recipe.key}.rate than {self.recipe.rate:g}, or {self.recipe.key}.precision=float32"
                )

    def _look(self, step: int) -> None:
        """Judge the weights by the held-out windows, and note how the training goes."""
        self._check()
        row: dict = {"step": step}
        if self._recent:
            counted = sum(count for _, count, _ in self._recent)
            row["loss"] = math.fsum(count * float(loss) for _, count, loss in self._recent) / counted
            row["rate"] = float(self.optimiser.param_groups[0]["lr"])
        self._recent, self._checked = [], 0
        if self._held_out:
            row["held_out"] = value = self._judged(step)
            self._worse += 1
            if self._done.after is None or value < self._done.after:
                self._done.after, self._done.kept, self._worse = value, step, 0
                self._best = self.masters.copied()
            elif self.recipe.back is not None and value > (1 + _WORSE) * self._done.after:
                self._factor *= self.recipe.back
                self.masters.load(self._best)
                self.masters.write()
            if step == 0:
                self._done.before = value
        self._done.curve.append({**row, "seconds": self._seconds()})

    def _judged(self, step: int) -> float:
        """Mean loss of the held-out windows."""
        numbers = self._mine(list(range(self._held_out)))
        while True:
            total = torch.zeros((), dtype=torch.float64, device=self.device)
            try:
                for begin in range(0, len(numbers), self.micro):
                    part = numbers[begin : begin + self.micro]
                    with torch.no_grad(), self._computing():
                        total += self._loss(part, True).double() * len(part)
            except torch.OutOfMemoryError:
                total = None
            if total is not None:
                break
            self._shrink()
        if self._shared:
            self._together.add([total])
        value = self._together.tell(float(total) / self._held_out)
        if not math.isfinite(value):
            where = f"after step {step} of {self.recipe.steps}" if step else "before the first step"
            raise UserError(
                f"{self.label}: the loss of the held-out windows is {value} {where}: give a smaller "
                f"{self.recipe.key}.rate than {self.recipe.rate:g}, or {self.recipe.key}.precision=float32"
            )
        return value

    @contextmanager
    def _computing(self) -> Iterator[None]:
        dtype = self.recipe.compute(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=dtype is torch.bfloat16):
            yield

    def _decisive_seconds(self) -> float:
        """The time so far, where something depends on it: the same in all processes."""
        return self._together.tell(self._seconds()) if self.recipe.minutes is not None else 0.0

    def _seconds(self) -> float:
        return time.perf_counter() - self._start

    def _same(self) -> str:
        """What a checkpoint belongs to."""
        weights = {name: list(value.shape) for name, value in self.masters.values.items()}
        recipe = dataclasses.asdict(self.recipe) | {"micro": None}  # may have become less for want of memory
        return repr((recipe, self._windows, self._held_out, weights, self.masters.digest))

    def _save(self) -> None:
        if self._file is None or self._together.rank:
            return
        self._check()
        self._done.seconds = self._seconds()
        # At the end of a training with held-out windows nothing is needed any more but the best weights.
        over = bool(self._held_out) and self._done.over
        content = {
            "same": self._same(),
            "done": dataclasses.asdict(self._done),
            "micro": self.micro,
            "worse": self._worse,
            "factor": self._factor,
            "recent": [(step, count, float(loss)) for step, count, loss in self._recent],
            "values": {} if over else {name: value.detach() for name, value in self.masters.values.items()},
            "best": self._best,
            "optimiser": None if over else self.optimiser.state_dict(),
            "companions": [companion.state() for companion in self._companions],
        }
        with replacing(self._file) as temporary:
            torch.save(content, temporary)

    def _restore(self) -> None:
        """Take over what an earlier attempt has left."""
        if self._file is None or not self._file.is_file():
            return
        try:
            # Mapped, so that the processes of a team share its pages.
            content = torch.load(self._file, map_location="cpu", weights_only=True, mmap=True)
        except (OSError, EOFError, RuntimeError, UnpicklingError):  # damaged on the disk: as if there was none
            return
        if content["same"] != self._same():
            return
        self._done, self.micro = Training(**content["done"]), content["micro"]
        self._worse, self._best, self._factor = content["worse"], content["best"], content["factor"]
        recent = content["recent"]
        self._recent = [(step, count, torch.tensor(loss, device=self.device)) for step, count, loss in recent]
        self._checked = len(recent)
        if content["optimiser"] is not None:
            self.masters.load(content["values"])
            self.masters.write()
            self.optimiser.load_state_dict(content["optimiser"])
        for companion, state in zip(self._companions, content["companions"], strict=True):
            companion.load({name: tensor.to(self.device) for name, tensor in state.items()})


def completed(file: Path | None) -> bool:
    """Whether a training that keeps its checkpoints in a file has come to its end there."""
    try:
        done = torch.load(file, map_location="cpu", weights_only=True, mmap=True)["done"] if file is not None else None
    except (OSError, EOFError, RuntimeError, UnpicklingError, KeyError):
        return False
    return done is not None and Training(**done).over


def _told(row: Mapping) -> str:
    words = [f"loss {row['loss']:.4g}"] if "loss" in row else []
    return ", ".join(words + ([f"held out {row['held_out']:.4g}"] if "held_out" in row else []))


@contextmanager
def _repeatable() -> Iterator[None]:
    """Kernels that give the same bits again, where there are such."""
    before, filled = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    told = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*deterministic")
            yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=told)
        torch.utils.deterministic.fill_uninitialized_memory = filled
