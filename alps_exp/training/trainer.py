"""One trainer for all that follows gradients: any loss, under masks or not, with whatever is added to its steps.

per step:  gradients of `batch` windows, in parts that fit → clip → companions → AdamW → companions → weights

Processes that train together divide the masters among them (`masters`), with gradients and the optimiser's state; each
steps its own, and sends the weights that come of it to all.
"""

from __future__ import annotations

import dataclasses
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
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
from .masters import SINGLE, Masters, Single
from .norms import fused_norms
from .optimisers import MULTIPLE, optimiser
from .recipe import Recipe
from .replayed import Replayed

# A loss that is not finite is noticed after so many steps at the latest: to look at it is to wait for the device.
_NOTICED = 16
# Rates are rounded to so many in an octave: a model has some ten, not hundreds, each with launches of its own.
_RATES_PER_OCTAVE = 4
# A matrix of next to nothing keeps a rate; one of huge weights gets no larger one.
_SHARES = (2.0**-8, 2.0**8)
# Held-out loss that is worse by so much than the best is the rate's fault; less may come down again as the rate falls.
_WORSE = 0.05
# Where time is bounded the steps may end long before the first of the even looks: there are looks after each of so many
# parts of it, too.
_QUARTERS = 4
# A checkpoint is written when the training since the last one has taken so many times what that took to write; the
# first is taken to last as many seconds as the second number says.
_WORTH, _FIRST = 20, 1.5


class Companion:
    """What is added to a training's steps, such as the penalty and the projections of an ADMM. Does nothing itself.

    Where processes work together, `trainer.masters.values` has this process's weights alone.
    """

    def before_update(self, trainer: Trainer, step: int) -> None:
        """Between clipping and the optimiser: `trainer.masters.values[name].grad` may change.

        Args:
            trainer: the training.
            step: number of the step, from 0.
        """

    def after_update(self, trainer: Trainer, step: int) -> None:
        """After the optimiser, before the module's weights are written: `trainer.masters.values` may change."""

    def end(self, trainer: Trainer) -> None:
        """Behind the last step: `trainer.masters.values` may change."""

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of it, under names that are no other process's, or alike in all."""
        return {}

    def load(self, trainer: Trainer, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` gave, here of all processes and on the CPU."""


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
            `held_out`, `rate` (of a weight of the recipe's `size`), `seconds`.
        shares: what the rates of the weights are of that, the smallest and the largest.
        micro: windows per backward pass in the end.
        zeros: pruned entries of the weights that were trained, every one of which was seen to be zero in the end.
        replayed: passes of training through the blocks that were replayed as CUDA graphs.
        notes: what was done for want of device memory, and why steps of a small model were not replayed on a GPU.
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
    shares: list[float] = field(default_factory=lambda: [1.0, 1.0])
    micro: int = 0
    zeros: int = 0
    replayed: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def over(self) -> bool:
        """Whether it has come to its end."""
        return self.ended != "all steps" or self.steps == self.planned


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
            bits on the same device. One is written at looks, and between them as often as the recipe says, when the
            training since the last has taken 20 times as long as that took to write (the first after 30 s), and at
            the end. It is removed by the one who has kept the result.
        companions: what is added to each step.
        working: dtype of weights → another that the module computes in meanwhile; the masters are made of the weights
            as they are.
        lighter: takes the next measure when one window at a time is too much for the device, and says which; None when
            there is none left.
        shrunk: called with the windows per backward pass whenever they become fewer.
        together: the processes that train the same weights, which stay the same in all of them. Each writes its part of
            a checkpoint, from which any number goes on. The last one has the weights as they end, for the process that
            takes them over: it makes no masters.
        shared: whether all processes have the same windows; a step's, and the held-out ones, are divided among them.
            Otherwise each has windows of its own, and all held-out ones, and a step takes an equal part from each.
        blocks: of the module, as `Replayed` wants them: a process that trains by itself on a GPU, with the optimiser's
            state in float32, may record and replay their passes.
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
        together: Single = SINGLE,
        shared: bool = False,
        blocks: Sequence[nn.Module] = (),
    ) -> None:
        self.recipe, self.label = recipe, label
        self._loss, self._windows, self._held_out = loss, windows, held_out
        self._quiet, self._file, self._companions = quiet, file, companions
        self._module, self._working = module, working
        self._lighter, self._shrunk = lighter, shrunk
        self._together, self._shared = together, shared
        own, rest = divmod(recipe.batch, together.size)
        if rest and not shared:
            raise ValueError(f"{label}: {recipe.batch} windows do not divide among {together.size} processes")
        multiple, self._left = MULTIPLE if recipe.state == "8bit" else 1, self._found()
        self.masters = Masters(module, trained, multiple, together, idle="weights" in self._left)
        if not self.masters.shapes:
            raise ValueError(f"{label}: there is nothing to train")
        if self._left and self._left["same"] != self._same():
            self._left = {}
            del self.masters  # before there are others
            self.masters = Masters(module, trained, multiple, together)
        self.device = self.masters.device
        whole = together.size == 1 and recipe.state != "8bit"
        self._replayed = Replayed(blocks if whole else (), self.masters)
        self._groups = self._grouped()
        values = ([self.masters.values[name] for name in names] for names in self._groups.values())
        self.optimiser = optimiser(values, recipe.rate, recipe.betas, recipe.decay, recipe.state)
        self._batch = recipe.batch if shared else own
        self._counts = together.gather([windows])
        # Passes are made together, and an attempt that ran short may be known to one process alone.
        self.micro = self._most = min(together.gather([min(recipe.micro or recipe.batch, own + (rest > 0))]))
        self._short = True  # whether it was this process's memory that did not suffice
        self._factor = 1.0  # of the rate
        self._rate = 0.0  # of the last step
        shares = together.gather(list(self._groups))
        self._done = Training(planned=recipe.steps, shares=[min(shares, default=1.0), max(shares, default=1.0)])
        self._best: dict[str, Tensor] = {}
        self._worse = 0
        self._recent: list[tuple[int, int, Tensor]] = []  # steps, windows and losses since the last look
        self._checked = 0
        self._start = 0.0
        self._saved, self._saving = 0.0, _FIRST  # when the last checkpoint was there, and what it took, in seconds

    def run(self) -> Training:
        """Train, and leave the best weights in the module.

        Raises:
            UserError: a loss that is not finite, or too little device memory for one window.
        """
        if len(set(self._together.gather([self._left.get("done", {}).get("steps")]))) > 1:
            raise UserError(f"{self.label}: not every process can read {self._file}: see why, or delete it")
        if "weights" in self._left:
            return self._taken_over()
        with ExitStack() as stack:
            stack.enter_context(self.masters.gathering())
            stack.enter_context(cast(self._module, self._working))
            stack.enter_context(fused_norms(self._module))
            stack.enter_context(_repeatable())
            stack.enter_context(self._replayed)
            self._restore()
            self._saved = time.perf_counter()
            self._start = self._saved - self._done.seconds
            if not self._done.curve:
                self._look(0)
            self._train()
        if self._held_out:
            self.masters.load(self._best)
        for companion in self._companions:
            companion.end(self)
        self.masters.write()
        self._take_notes()
        done = self._done
        done.zeros = self.masters.check_zeros(self.label)
        done.seconds, done.micro = self._seconds(), self.micro
        if not self._held_out:
            done.kept = done.steps
        if self._together.size > 1 and self._file is not None:
            companions = self._together.gather([[companion.state() for companion in self._companions]])
            if not self._together.rank:
                self._write({"weights": self.masters.trained()}, companions)
        return done

    def _taken_over(self) -> Training:
        """What processes that trained together have left, when it was over."""
        self.masters.take(self._left["weights"])
        self._done = Training(**self._left["done"])
        for number, companion in enumerate(self._companions):
            companion.load(self, _united(part[number] for part in self._left["companions"]))
        return self._done

    def _train(self) -> None:
        done, looks = self._done, set(self.recipe.looks())
        if done.ended != "all steps":  # it was killed between its last look and the one who keeps the result
            return
        progress = Progress(range(done.steps, self.recipe.steps), self.label, quiet=self._quiet)
        before = self._quarter()
        for step in progress:
            self._step(step)
            done.steps = step + 1
            quarter = self._quarter()
            late = quarter >= _QUARTERS
            due = done.steps in looks or late
            look, before = due or quarter > before, quarter
            if look:
                self._look(done.steps, due)
                progress.note(_told(done.curve[-1]))
                if late and done.steps < self.recipe.steps:
                    done.ended = "minutes"
                elif self._worse >= self.recipe.patience and done.steps < self.recipe.steps:
                    done.ended = "no improvement"
            if done.over or ((look or done.steps % self.recipe.saved == 0) and self._due()):
                self._save()
            if done.ended != "all steps":
                return

    def _step(self, step: int) -> None:
        batch, sizes = self.batch(step), self._sizes(step)
        count = sum(sizes)
        while (loss := self._gradients(batch, sizes)) is None:
            self._shrink(self._short)
        if self._replayed.due:
            self._replayed.prove(loss, lambda: self._gradients(batch, sizes))
        self._recent.append((step, count, loss))
        if len(self._recent) - self._checked >= _NOTICED:
            self._check()
        values = list(self.masters.values.values())
        if self.recipe.clip is not None:
            norm = nn.utils.get_total_norm([value.grad for value in values if value.grad is not None])
            nn.utils.clip_grads_with_norm_(values, self.recipe.clip, self._norm(norm))
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
        self._replayed.write()
        self._done.replayed += self._replayed.passes
        self._done.windows += count

    def _grouped(self) -> dict[float, list[str]]:
        """What share of the rate weights get → which; of those whose masters this process has."""
        groups: dict[float, list[str]] = {}
        for name in self.masters.values:
            share = 1.0
            # What is not finite is told of by the first loss.
            if self.recipe.size is not None and math.isfinite(size := self.masters.size(name)):
                low, high = _SHARES
                exact = min(max(size / self.recipe.size, low), high)
                share = 2.0 ** (round(_RATES_PER_OCTAVE * math.log2(exact)) / _RATES_PER_OCTAVE)
            groups.setdefault(share, []).append(name)
        return groups

    def _set_rate(self, rate: float) -> None:
        self._rate = rate
        for group, share in zip(self.optimiser.param_groups, self._groups, strict=False):  # none where none is trained
            if isinstance(group["lr"], Tensor):  # as torchao keeps it
                group["lr"].fill_(share * rate)
            else:
                group["lr"] = share * rate

    def _norm(self, own: Tensor) -> Tensor:
        """Of all processes' gradients, from that of this one's."""
        if self._together.size == 1:
            return own
        square = own.to(self.device).square().reshape(1)
        self._together.add([square])
        return square.sqrt().squeeze(0)

    def _sizes(self, step: int) -> list[int]:
        """How many windows of a step each process has."""
        place, size = step % -(-max(self._counts) // self._batch), self._together.size
        here = [min(max(count - place * self._batch, 0), self._batch) for count in self._counts]
        return [len(range(rank, here[rank], size)) for rank in range(size)] if self._shared else here

    def batch(self, step: int) -> list[int]:
        """Numbers of this process's windows of a step: every epoch has an order of its own."""
        epoch, place = divmod(step, -(-max(self._counts) // self._batch))
        generator = torch.Generator().manual_seed(1_000_003 * self.recipe.seed + epoch)
        order = torch.randperm(self._windows, generator=generator)
        return self._mine(order[place * self._batch : (place + 1) * self._batch].tolist())

    def _mine(self, numbers: list[int]) -> list[int]:
        """Of windows that all processes have, those that this one sees to."""
        return numbers[self._together.rank :: self._together.size] if self._shared else numbers

    def _gradients(self, batch: Sequence[int], sizes: Sequence[int]) -> Tensor | None:
        """The mean loss of all processes' windows, whose gradients are in the masters; None when some device's memory
        does not suffice."""
        total, short = torch.zeros((), device=self.device), False
        self._replayed.windows, self._replayed.passes = min(self.micro, self._batch, self._windows), 0
        for begin in range(0, max(sizes), self.micro):  # as many passes in every process
            part = batch[begin : begin + self.micro]
            try:
                if part and not short:
                    with torch.enable_grad(), self._computing():
                        loss = self._loss(part, False) * (len(part) / sum(sizes))
                    loss.backward()
                    total += loss.detach()
            except torch.OutOfMemoryError:
                short = True
            if short and self._together.size == 1:
                break
            loss = None  # its graph, where the pass was broken off
            if short and self.device.type == "cuda":
                torch.cuda.empty_cache()
            self.masters.end_pass()
        if self._together.size > 1:
            both = torch.stack([total, torch.full_like(total, short)])
            self._together.add([both])
            self._short, total, short = short, both[0], bool(both[1] > 0)
        if short:
            self.masters.forget()
            return None
        return total

    def _shrink(self, short: bool = True) -> None:
        """Take the next measure; `short`: whether it was this process's device whose memory did not suffice."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if self._replayed.drop():
            measure = "steps are not replayed as CUDA graphs"
        elif self.micro > 1:
            self.micro //= 2
            self._shrunk(self.micro)
            measure = f"{self.micro} windows per backward pass"
        elif (measure := self._lighter()) is None:
            if not short:  # another process still has a measure, or refuses
                return
            raise UserError(
                f"{self.label}: the device's memory does not suffice for the gradients of one window: use shorter "
                "windows (seqlen), or a larger device"
            )
        self._done.notes.append(f"device memory ran short in {self.label}; from there on: {measure}")

    def _take_notes(self) -> None:
        told = [f"{self.label}: {note}" for note in self._replayed.notes]
        self._done.notes = [*dict.fromkeys([*self._done.notes, *told])]

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

    def _look(self, step: int, due: bool = True) -> None:
        """Judge the weights by the held-out windows, and note how the training goes. One that is not due may find the
        best weights, but is not counted against patience and takes nothing back: when it comes, the clock decides."""
        self._check()
        row: dict = {"step": step}
        if self._recent:
            counted = sum(count for _, count, _ in self._recent)
            row["loss"] = math.fsum(count * float(loss) for _, count, loss in self._recent) / counted
            row["rate"] = self._rate
        self._recent, self._checked = [], 0
        if self._held_out:
            row["held_out"] = value = self._judged(step)
            self._worse += due
            if self._done.after is None or value < self._done.after:
                self._done.after, self._done.kept, self._worse = value, step, 0
                self._best = self.masters.copied()
            elif due and self.recipe.back is not None and value > (1 + _WORSE) * self._done.after:
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
        self.micro = min(self._together.gather([self.micro]))  # passes are made together
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

    def _quarter(self) -> int:
        """Of the minutes, where they bound the time: how many have gone."""
        if self.recipe.minutes is None:
            return 0
        return int(_QUARTERS * self._decisive_seconds() / (60 * self.recipe.minutes))

    def _seconds(self) -> float:
        return time.perf_counter() - self._start

    def _same(self) -> str:
        """What a checkpoint belongs to."""
        recipe = dataclasses.asdict(self.recipe) | {"micro": None}  # may have become less for want of memory
        return repr((recipe, self._windows, self._held_out, self.masters.shapes, self.masters.digest))

    def _due(self) -> bool:
        """Whether a checkpoint is worth what it takes to write; the same in all processes."""
        return self._file is not None and self._together.tell(
            time.perf_counter() - self._saved >= _WORTH * self._saving
        )

    def _save(self) -> None:
        if self._file is None:
            return
        begun = time.perf_counter()
        self._check()
        self._take_notes()
        self._done.seconds = self._seconds()
        # At the end of a training with held-out windows nothing is needed any more but the best weights.
        over = bool(self._held_out) and self._done.over
        moments = {name: self.optimiser.state.get(value) for name, value in self.masters.values.items()}
        part = {
            "values": {} if over else {name: value.detach() for name, value in self.masters.values.items()},
            "best": self._best,
            "optimiser": {} if over else {name: moment for name, moment in moments.items() if moment},
        }
        companions = [companion.state() for companion in self._companions]
        rank, size = self._together.rank, self._together.size
        names = [f"{self._file.name}.{self._done.steps}.{number}" for number in range(1, size)]
        if rank:
            _write(self._file.with_name(names[rank - 1]), part | {"companions": [companions]})
        self._together.gather([None])  # all parts are there before they are named
        if not rank:
            self._write(part | {"parts": names}, [companions])
            for other in self._file.parent.glob(f"{self._file.name}.*.*"):  # those of the checkpoint before
                if int(other.name.split(".")[-2]) < self._done.steps:
                    other.unlink()
        self._saved = time.perf_counter()
        self._saving = self._saved - begun

    def _write(self, part: Mapping, companions: list) -> None:
        """The first process's file."""
        if self._together.rank:
            return
        content = {
            "same": self._same(),
            "done": dataclasses.asdict(self._done),
            "micro": self.micro if self.micro < self._most else None,  # of other processes it would be another
            "worse": self._worse,
            "factor": self._factor,
            "recent": [(step, count, float(loss)) for step, count, loss in self._recent],
            "companions": companions,
        }
        _write(self._file, content | part)

    def _found(self) -> dict:
        """What an earlier attempt has left, of whatever number of processes; nothing where a part is missing."""
        main = _read(self._file)
        parts = [main, *(_read(self._file.with_name(name)) for name in main.get("parts", ()))]
        if not all(parts):
            return {}
        for key in ("values", "best", "optimiser") if "parts" in main else ():
            main[key] = _united(part[key] for part in parts)
        return main | {"companions": [states for part in parts for states in part.get("companions", ())]}

    def _restore(self) -> None:
        """Take over what an earlier attempt has left, as far as it falls to this process."""
        content, self._left = self._left, {}
        if not content:
            return
        own = self.masters.values
        self._done, self.micro = Training(**content["done"]), min(content["micro"] or self._most, self._most)
        self._worse, self._factor = content["worse"], content["factor"]
        self._best = {name: best for name, best in content["best"].items() if name in own}
        recent = content["recent"]
        self._recent = [(step, count, torch.tensor(loss, device=self.device)) for step, count, loss in recent]
        self._checked = len(recent)
        if content["values"]:
            self.masters.load(content["values"])
            self.masters.write()
            order = enumerate(name for names in self._groups.values() for name in names)
            moments = {i: content["optimiser"][name] for i, name in order if name in content["optimiser"]}
            self.optimiser.load_state_dict(self.optimiser.state_dict() | {"state": moments})
        for number, companion in enumerate(self._companions):
            companion.load(self, _united(part[number] for part in content["companions"]))


def _united(parts: Iterable[Mapping]) -> dict:
    return {name: value for part in parts for name, value in part.items()}


def _write(file: Path, content: Mapping) -> None:
    with replacing(file) as temporary:
        torch.save(dict(content), temporary)


def _read(file: Path | None) -> dict:
    """A checkpoint, on the CPU; nothing where there is none, or it is damaged."""
    try:
        # Mapped, so that the processes of a team share its pages.
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True) if file is not None else {}
    except (OSError, EOFError, RuntimeError, UnpicklingError):
        return {}


def completed(file: Path | None) -> bool:
    """Whether a training that keeps its checkpoints in a file has come to its end there."""
    done = _read(file).get("done")
    return done is not None and Training(**done).over


def taken_over(file: Path | None) -> bool:
    """Whether a file has the weights as processes that trained together have left them: no masters are made then."""
    return "weights" in _read(file)


def _told(row: Mapping) -> str:
    words = [f"loss {row['loss']:.4g}"] if "loss" in row else []
    return ", ".join(words + ([f"held out {row['held_out']:.4g}"] if "held_out" in row else []))


@contextmanager
def _repeatable() -> Iterator[None]:
    """Kernels that give the same bits again, where there are such. Not strictly, which would refuse what has none; on
    a GPU trainings of a model with fused attention were seen to differ in rounding."""
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
