"""The trainer against a plain loop; masks, parts of batches, kills at any step, the choice by held-out windows."""

from __future__ import annotations

import contextlib
import math
import shutil
import sys
import threading
import types
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from alps_exp.base.errors import UserError
from alps_exp.training import trainer as training_trainer
from alps_exp.training.losses import divergence, relative_error
from alps_exp.training.masters import Masters
from alps_exp.training.recipe import Recipe
from alps_exp.training.trainer import Companion, Trainer, completed

WINDOWS, HELD_OUT = 10, 3


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Two layers, the first of them half pruned, the second dense."""
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4, bias=False)).to(dtype)
    made[0].weight.data[torch.rand(8, 6) < 0.5] = 0
    return made


def masks(module: nn.Module) -> dict[str, Tensor | None]:
    return {"0.weight": module[0].weight != 0, "2.weight": None}


def data(windows: int = WINDOWS + HELD_OUT) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(windows, 5, 6, generator=generator)
    return x, torch.sin(x @ torch.randn(6, 4, generator=generator))


def loss_of(module: nn.Module):
    x, y = data()

    def loss(numbers: Sequence[int], held_out: bool) -> Tensor:
        picked = [number + WINDOWS * held_out for number in numbers]
        return (module(x[picked].to(module[0].weight.dtype)) - y[picked]).float().square().mean()

    return loss


def trainer(module: nn.Module, loss=None, held_out: int = HELD_OUT, **options) -> Trainer:
    recipe = {"rate": 0.01, "steps": 12, "batch": 4, "patience": 99, **options.pop("recipe", {})}
    options = {"quiet": True, "held_out": held_out, **options}
    return Trainer(module, masks(module), loss or loss_of(module), WINDOWS, Recipe(**recipe), **options)


def share(weight: Tensor, size: float | None) -> float:
    """Of the rate, by the root mean square of the entries that are not zero, to a quarter of an octave."""
    if size is None:
        return 1.0
    exact = float(weight[weight != 0].double().square().mean().sqrt()) / size
    return 2 ** (round(4 * math.log2(exact)) / 4)


def plain(module: nn.Module, batches: list[list[int]], recipe: Recipe) -> None:
    """AdamW in float64 by its formulas, the gradients of full batches by autograd, masked."""
    module.double()
    x, y = (part.double() for part in data())
    moments: dict[str, tuple[Tensor, Tensor]] = {}
    kept = masks(module)
    shares = {name: share(module.get_parameter(name).detach(), recipe.size) for name in kept}
    for step, batch in enumerate(batches):
        (module(x[batch]) - y[batch]).square().mean().backward()
        gradients = {name: module.get_parameter(name).grad for name in kept}
        gradients = {n: g * (kept[n] if kept[n] is not None else 1) for n, g in gradients.items()}
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))
        scale = min(1.0, recipe.clip / norm) if recipe.clip else 1.0
        rate = recipe.rate * 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
        rate *= min(1.0, (step + 1) / (recipe.warmup * recipe.steps)) if recipe.warmup else 1.0
        for name, gradient in gradients.items():
            weight, g = module.get_parameter(name), gradient * scale
            m, v = moments.get(name, (torch.zeros_like(g), torch.zeros_like(g)))
            m, v = recipe.betas[0] * m + (1 - recipe.betas[0]) * g, recipe.betas[1] * v + (1 - recipe.betas[1]) * g * g
            moments[name] = m, v
            first, second = (1 - beta ** (step + 1) for beta in recipe.betas)
            weight.data *= 1 - shares[name] * rate * recipe.decay
            weight.data -= shares[name] * rate * (m / first) / ((v / second).sqrt() + 1e-8)
        module.zero_grad()


@pytest.mark.parametrize(
    "options",
    [{}, {"clip": 0.05, "decay": 0.1, "warmup": 0.5}, {"micro": 1}, {"micro": 3}, {"size": 0.06, "decay": 0.1}],
    ids=str,
)
def test_it_is_adamw_on_the_masked_gradients(options):
    ours, reference = network(), network()
    training = trainer(ours, recipe=options, held_out=0)
    batches = [training.batch(step) for step in range(12)]
    done = training.run()
    plain(reference, batches, training.recipe)
    for name, weight in reference.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name).double(), weight, rtol=1e-4, atol=2e-6)
    assert not torch.equal(ours[0].weight, network()[0].weight)
    assert torch.equal(ours[0].bias, network()[0].bias)  # not among those that are trained
    assert torch.equal(ours[0].weight == 0, network()[0].weight == 0)
    assert (done.steps, done.windows, done.kept, done.ended) == (12, 40, 12, "all steps")
    expected = sorted(share(network().get_parameter(name).detach(), training.recipe.size) for name in masks(ours))
    assert done.shares == expected and (expected[0] < expected[1] if "size" in options else expected == [1.0, 1.0])


def test_every_epoch_goes_through_all_windows_in_an_order_of_its_own():
    training = trainer(network())
    epochs = [[training.batch(3 * epoch + place) for place in range(3)] for epoch in range(3)]
    assert all(sorted(number for batch in epoch for number in batch) == list(range(WINDOWS)) for epoch in epochs)
    assert [len(batch) for batch in epochs[0]] == [4, 4, 2]
    assert epochs[0] != epochs[1] != epochs[2]
    assert trainer(network(), recipe={"seed": 1}).batch(0) != training.batch(0)


def test_masters_add_up_what_half_precision_would_lose():
    module = network(torch.bfloat16)
    before = module[2].weight.detach().clone()
    tiny = trainer(module, recipe={"rate": 2e-4, "steps": 60, "schedule": "constant"}, held_out=0)
    tiny.run()
    master = tiny.masters.values["2.weight"]
    assert master.dtype == torch.float32 and module[2].weight.dtype == torch.bfloat16
    assert torch.equal(module[2].weight, master.to(torch.bfloat16))
    moved = (module[2].weight != before).float().mean()
    assert moved > 0.5  # a single step of 2e-4 is lost on most weights of this size


def test_masters_of_a_masked_weight_are_its_kept_entries():
    module = network()
    masters = Masters(module, masks(module))
    assert masters.values["0.weight"].shape == (int((module[0].weight != 0).sum()),)
    assert masters.values["2.weight"].data_ptr() == module[2].weight.data_ptr()
    with masters.gathering():
        loss_of(module)([0, 1], False).backward()
        assert module[0].weight.grad is None and module[0].bias.grad is None
        gathered = masters.values["0.weight"].grad.clone()
        loss_of(module)([0, 1], False).backward()
        torch.testing.assert_close(masters.values["0.weight"].grad, 2 * gathered)
    assert all(parameter.requires_grad for parameter in module.parameters())
    loss_of(module)([0, 1], False).backward()
    assert torch.equal(module[0].weight.grad[module[0].weight != 0], gathered)
    with pytest.raises(ValueError, match="mask of shape"):
        Masters(module, {"0.weight": torch.ones(3, 3, dtype=torch.bool)})
    module[0].weight.data.fill_(1.0)
    with pytest.raises(RuntimeError, match="not zero where it was pruned"):
        masters.check_zeros("here")


class Two:
    """One of two processes, as threads: sums, lists and words are exchanged at a barrier."""

    size = 2

    def __init__(self, rank: int, table: list, barrier: threading.Barrier) -> None:
        self.rank, self.table, self.barrier = rank, table, barrier

    def _exchanged(self, value):
        self.table[self.rank] = value
        self.barrier.wait()
        both = list(self.table)
        self.barrier.wait()
        return both

    def add(self, tensors):
        one, other = self._exchanged([tensor.clone() for tensor in tensors])
        for tensor, a, b in zip(tensors, one, other, strict=True):
            tensor.copy_(a + b)

    def reduce(self, tensor, owner):
        before = tensor.clone()
        self.add([tensor])
        if owner != self.rank:
            tensor.copy_(before)

    def spread(self, tensor, owner):
        tensor.copy_(self._exchanged(tensor.clone())[owner])

    def gather(self, values):
        one, other = self._exchanged(values)
        return one + other

    def tell(self, value):
        return self._exchanged(value)[0]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=str)
def test_weights_without_gradients_hold_up_their_own_block_alone(order):
    """The last block's second expert has no tokens. Blocks whose gradients come in no order are no silent mistake."""
    blocks = nn.ModuleList(nn.ModuleDict({name: nn.Linear(4, 4, bias=False) for name in "ab"}) for _ in range(2))
    sent, together = [], types.SimpleNamespace(size=2, rank=0)
    together.reduce = lambda tensor, owner: sent.append(tensor.clone())
    masters = Masters(blocks, {name: None for name, _ in blocks.named_parameters()}, together=together)
    x = torch.ones(2, 4)
    with masters.gathering():
        for index in order:
            x = blocks[index]["a"](x) + (blocks[index]["b"](x) if index == 0 else 0)
        if order == (1, 0):
            with pytest.raises(RuntimeError, match=r"gradient of 1\.a\.weight came after those of an earlier block"):
                x.sum().backward()
            return
        x.sum().backward()
        assert len(sent) == 4, "all are on their way before the pass ends"
        masters.end_pass()
    assert len(sent) == 4 and [bool(tensor.any()) for tensor in sent] == [False, True, True, True]
    assert all(weight.grad is None for weight in blocks.parameters())


@pytest.mark.parametrize("minutes", [None, 60.0], ids=str)
def test_two_processes_with_windows_of_their_own_keep_the_same_weights(minutes):
    table, barrier = [None, None], threading.Barrier(2, timeout=60)
    modules, found, batches = [network(), network()], [None, None], [[], []]
    windows = [range(0, 5), range(5, WINDOWS)]

    def work(rank: int) -> None:
        inner, own = loss_of(modules[rank]), list(windows[rank])
        recipe = Recipe(rate=0.01, steps=9, batch=4, clip=0.5, patience=99, minutes=minutes)

        def loss(numbers, held_out):
            return inner(numbers if held_out else [own[number] for number in numbers], held_out)

        options = {"held_out": HELD_OUT, "quiet": True, "together": Two(rank, table, barrier)}
        training = Trainer(modules[rank], masks(modules[rank]), loss, len(own), recipe, **options)
        batches[rank] = [[own[number] for number in training.batch(step)] for step in range(9)]
        found[rank] = training.run()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert torch.equal(modules[0][0].weight, modules[1][0].weight)
    assert torch.equal(modules[0][2].weight, modules[1][2].weight)
    assert (found[0].windows, found[0].kept) == (30, 9) and found[0].after == found[1].after
    reference = network()
    plain(reference, [one + other for one, other in zip(*batches, strict=True)], Recipe(rate=0.01, steps=9, clip=0.5))
    for name, weight in reference.named_parameters():
        torch.testing.assert_close(modules[0].get_parameter(name).double(), weight, rtol=1e-4, atol=2e-6)
    with pytest.raises(ValueError, match="3 windows do not divide among 2 processes"):
        trainer(network(), recipe={"batch": 3}, together=types.SimpleNamespace(size=2))


@pytest.mark.parametrize("batch", [4, 3])
def test_two_processes_that_share_windows_and_masters_do_what_one_does(batch, tmp_path, often):
    """Killed, they go on from their parts of a checkpoint; so does one alone, which takes over what is complete."""
    recipe = Recipe(rate=0.01, steps=9, batch=batch, clip=0.5, patience=1, judged=9, back=0.5, saved=1, size=0.3)
    options = {"held_out": HELD_OUT, "quiet": True}
    alone = network()
    one = Trainer(alone, masks(alone), loss_of(alone), WINDOWS, recipe, companions=[Pull()], **options).run()
    table, barrier = [None, None], threading.Barrier(2, timeout=60)
    modules, found, counts, parts = [network(), network()], [None, None], [[], []], [None, None]

    def work(rank: int, steps: int) -> None:
        module, inner = modules[rank], loss_of(modules[rank])

        def loss(numbers, held_out):
            counts[rank].append(len(numbers))
            if len(counts[rank]) > steps:
                raise Killed
            return inner(numbers, held_out)

        more = {"together": Two(rank, table, barrier), "shared": True, "file": tmp_path / "training.pt"}
        with contextlib.suppress(Killed, threading.BrokenBarrierError):
            training = Trainer(module, masks(module), loss, WINDOWS, recipe, companions=[Pull()], **options, **more)
            parts[rank] = {*training.masters.values}
            found[rank] = training.run()
            return
        barrier.abort()

    for steps in (13, 999):
        threads = [threading.Thread(target=work, args=(rank, steps)) for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert completed(tmp_path / "training.pt") == (steps == 999)
        assert parts[0] and parts[1] and not parts[0] & parts[1]
        barrier.reset()
        counts = [[], []]
        single, folder = network(), shutil.copytree(tmp_path, tmp_path.with_name(f"{tmp_path.name}-{steps}"))
        loss = Short(single, 0 if steps == 999 else 99)
        more = {"companions": [Pull()], "file": folder / "training.pt"}
        training = Trainer(single, masks(single), loss, WINDOWS, recipe, **options, **more)
        assert (set(training.masters.values) == set()) == (steps == 999)
        training.run()
        assert steps == 999 or training.micro == batch, "its own, not that of each of two processes"
        for name, weight in alone.named_parameters():
            torch.testing.assert_close(single.get_parameter(name), weight, rtol=1e-5, atol=1e-6)
        assert bool(loss.calls) == (steps == 13) and sum(loss.calls) < 9 * batch + 10 * HELD_OUT
    for name, weight in alone.named_parameters():
        torch.testing.assert_close(modules[0].get_parameter(name), weight, rtol=1e-5, atol=1e-6)
        assert torch.equal(modules[0].get_parameter(name), modules[1].get_parameter(name))
    assert (found[0].windows, found[0].steps, found[0].kept) == (one.windows, one.steps, one.kept)
    assert found[0].after == found[1].after == pytest.approx(one.after, rel=1e-5)
    assert found[0].shares == one.shares and one.shares[0] < one.shares[1]


def test_where_held_out_windows_get_worse_it_goes_back_and_on_in_smaller_steps():
    module = network()
    found = {}
    for back in (None, 0.1):  # a rate that is far too large
        module = network()
        options = {"held_out": HELD_OUT, "quiet": True}
        recipe = Recipe(rate=0.8, steps=24, batch=4, judged=8, patience=9, back=back, schedule="constant")
        found[back] = Trainer(module, masks(module), loss_of(module), WINDOWS, recipe, **options).run()
    before = found[None].before
    assert found[None].after == before and found[None].kept == 0  # nothing is gained without
    assert found[0.1].after < 0.9 * before and found[0.1].kept
    rates = [row["rate"] for row in found[0.1].curve[1:]]
    best = [min(row["held_out"] for row in found[0.1].curve[: k + 1]) for k in range(9)]
    for k in range(1, 8):
        fell = found[0.1].curve[k]["held_out"] > 1.05 * best[k - 1]
        assert rates[k] == pytest.approx(rates[k - 1] * (0.1 if fell else 1))


class Short:
    """A device on which no more than so many windows fit at a time."""

    def __init__(self, module: nn.Module, fitting: int) -> None:
        self.loss, self.fitting, self.calls = loss_of(module), fitting, []

    def __call__(self, numbers, held_out):
        self.calls.append(len(numbers))
        if len(numbers) > self.fitting:
            raise torch.OutOfMemoryError("too much")
        return self.loss(numbers, held_out)


def test_one_process_short_of_memory_takes_its_measure_and_the_other_goes_on():
    table, barrier = [None, None], threading.Barrier(2, timeout=60)
    modules, micros, notes = [network(), network()], [None, None], [None, None]

    def work(rank: int) -> None:
        loss = Short(modules[rank], 0 if rank else 4)

        def lighter():
            loss.fitting, measure = 4, "less of everything" if rank else None
            return measure

        recipe = Recipe(rate=0.01, steps=3, batch=4, micro=rank or None)  # one has run short in an attempt before
        more = {"quiet": True, "together": Two(rank, table, barrier), "shared": True, "lighter": lighter}
        training = Trainer(modules[rank], masks(modules[rank]), loss, WINDOWS, recipe, **more)
        micros[rank] = training.micro
        notes[rank] = training.run().notes

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert micros == [1, 1] and notes[0] == [] and "less of everything" in notes[1][0]
    alone = network()
    Trainer(alone, masks(alone), loss_of(alone), WINDOWS, Recipe(rate=0.01, steps=3, batch=4), quiet=True).run()
    for name, weight in alone.named_parameters():
        torch.testing.assert_close(modules[0].get_parameter(name), weight, rtol=1e-5, atol=1e-6)
        assert torch.equal(modules[0].get_parameter(name), modules[1].get_parameter(name))


def test_short_memory_halves_the_parts_and_says_so():
    module, reference, told = network(), network(), []
    done = trainer(module, Short(module, 1), shrunk=told.append).run()
    trainer(reference).run()
    torch.testing.assert_close(module[0].weight, reference[0].weight, rtol=1e-4, atol=1e-6)
    assert told == [2, 1] and done.micro == 1
    assert done.notes[-1] == "device memory ran short in training; from there on: 1 windows per backward pass"


def test_the_next_measure_is_taken_before_it_is_refused():
    module = network()
    short = Short(module, 0)

    def lighter():
        if short.fitting == 4:
            return None
        short.fitting = 4
        return "less of everything"

    assert "less of everything" in trainer(module, short, lighter=lighter).run().notes[-1]
    with pytest.raises(UserError, match="does not suffice for the gradients of one window"):
        trainer(module, Short(module, 0)).run()


class Pull(Companion):
    """Draws the weights to an anchor that moves every third step: it has a memory of its own."""

    def __init__(self) -> None:
        self.anchor: dict[str, Tensor] = {}

    def before_update(self, trainer, step):
        for name, value in trainer.masters.values.items():
            value.grad += 0.1 * (value.detach() - self.anchor.get(name, 0))

    def after_update(self, trainer, step):
        if step % 3 == 0:
            self.anchor = {name: 0.5 * value.detach().clone() for name, value in trainer.masters.values.items()}

    def state(self):
        return self.anchor

    def load(self, trainer, state):
        self.anchor = {name: anchor for name, anchor in state.items() if name in trainer.masters.values}


class Killed(BaseException):
    pass


@pytest.fixture
def often(monkeypatch):
    """Checkpoints whenever there may be one."""
    monkeypatch.setattr(training_trainer, "_WORTH", 0)


def test_checkpoints_are_written_as_often_as_they_are_worth_it(tmp_path, monkeypatch):
    clock, written, inner = [0.0], [], training_trainer._write
    monkeypatch.setattr(training_trainer.time, "perf_counter", lambda: clock[0])

    def write(file, content):
        clock[0] += 0.5
        written.append(content["done"]["steps"])
        inner(file, content)

    class Second(Companion):
        def after_update(self, trainer, step):
            clock[0] += 1

    monkeypatch.setattr(training_trainer, "_write", write)
    options = {"file": tmp_path / "training.pt", "recipe": {"steps": 55, "judged": 11, "saved": 3}}
    trainer(network(), companions=[Second()], **options).run()
    assert written == [30, 40, 50, 55]  # 30 s for the first, 20 · 0.5 s for the others, and the end


@pytest.mark.parametrize("step", range(0, 12))
def test_a_training_that_was_killed_goes_on_to_the_same_bits(step, tmp_path, often):
    options = {"recipe": {"saved": 2, "judged": 3, "clip": 0.1, "size": 0.3}}
    whole = network()
    expected = trainer(whole, companions=[Pull()], **options).run()

    class Kill(Companion):
        def after_update(self, trainer, at):
            if at == step:
                raise Killed

    options["file"] = tmp_path / "training.pt"
    module = network()
    with pytest.raises(Killed):
        trainer(module, companions=[Pull(), Kill()], **options).run()
    again = network()
    if options["file"].exists():  # written by one with another number of companions
        content = torch.load(options["file"], weights_only=True)
        content["companions"][0].pop()
        torch.save(content, options["file"])
    calls = Short(again, 99)
    found = trainer(again, calls, companions=[Pull()], **options).run()
    for one, other in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    without = [{key: row[key] for key in row if key != "seconds"} for row in found.curve]
    assert without == [{key: row[key] for key in row if key != "seconds"} for row in expected.curve]
    assert (found.steps, found.windows, found.kept) == (expected.steps, expected.windows, expected.kept)
    assert calls.calls.count(4) + calls.calls.count(2) <= 12 - 2 * (step // 2)  # not from the start


def test_a_damaged_checkpoint_and_one_of_another_training_are_left_alone(tmp_path):
    file, expected = tmp_path / "training.pt", network()
    trainer(expected).run()
    for content in (b"PK nothing", b""):
        file.write_bytes(content)
        module = network()
        trainer(module, file=file).run()
        assert torch.equal(module[0].weight, expected[0].weight)
    module = network()  # the file is now that of a finished training with other settings
    trainer(module, file=file, recipe={"rate": 0.02}).run()
    assert not torch.equal(module[0].weight, expected[0].weight)


def test_a_checkpoint_of_other_masks_is_left_alone(tmp_path):
    """With as many kept entries in every weight."""

    def turned() -> nn.Module:
        module = network()
        module[0].weight.data = module[0].weight.data.flip(1)
        return module

    file, module, alone = tmp_path / "training.pt", turned(), turned()
    trainer(network(), file=file).run()
    trainer(module, file=file).run()
    trainer(alone).run()
    assert torch.equal(module[0].weight, alone[0].weight)


def test_the_last_checkpoint_has_no_more_than_the_best_weights(tmp_path):
    file, module, again = tmp_path / "training.pt", network(), network()
    trainer(module, file=file).run()
    content = torch.load(file, weights_only=True)
    assert (content["values"], content["optimiser"], completed(file)) == ({}, {}, True)
    trainer(again, loss=None, file=file).run()
    assert all(torch.equal(one, other) for one, other in zip(module.parameters(), again.parameters(), strict=True))
    trainer(network(), file=file, held_out=0).run()  # of which more may be asked
    assert torch.load(file, weights_only=True)["optimiser"]


def test_the_weights_that_held_out_windows_like_best_are_kept():
    module, best = network(), {}
    values = iter([5.0, 3.0, 4.0, 2.9999, 3.5])
    inner = loss_of(module)

    def loss(numbers, held_out):
        if not held_out:
            return inner(numbers, False)
        if numbers[0] == 0:
            loss.value = next(values)
            best[loss.value] = module[0].weight.detach().clone()
        return torch.tensor(loss.value)

    done = trainer(module, loss).run()
    assert (done.before, done.after, done.kept) == (5.0, pytest.approx(2.9999), 9)
    assert torch.equal(module[0].weight, best[2.9999])
    assert [row["held_out"] for row in done.curve] == pytest.approx([5.0, 3.0, 4.0, 2.9999, 3.5])
    assert [row["step"] for row in done.curve] == [0, 3, 6, 9, 12]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_it_ends_early_and_keeps_the_start_where_nothing_gets_better(dtype):
    module = network(dtype)
    inner = loss_of(module)
    looks = iter(range(99))

    def loss(numbers, held_out):
        return inner(numbers, False) if not held_out else torch.tensor(float(next(looks)))

    done = trainer(module, loss, recipe={"patience": 2, "judged": 6}).run()
    assert (done.kept, done.steps, done.ended) == (0, 4, "no improvement")
    assert done.after == done.before
    for one, other in zip(module.parameters(), network(dtype).parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
def test_a_loss_that_is_not_finite_is_refused_with_its_step(bad):
    module = network()
    inner, calls = loss_of(module), []

    def loss(numbers, held_out):
        calls.append(held_out)
        return inner(numbers, held_out) * (bad if calls.count(False) == 5 else 1)

    with pytest.raises(
        UserError, match=rf"the loss is {bad} at step 5 of 12: give a smaller training\.rate than 0\.01"
    ):
        trainer(module, loss).run()
    with pytest.raises(UserError, match="held-out windows is nan before the first step"):
        trainer(module, lambda numbers, held_out: inner(numbers, held_out) * math.nan).run()
    broken = network()
    broken[0].weight.data[0, 0] = math.nan
    with pytest.raises(UserError, match="held-out windows is nan before the first step"):
        trainer(broken, recipe={"size": 0.3}).run()


def test_minutes_bound_the_time_and_anneal_the_rate():
    recipe = Recipe(rate=1.0, steps=100, minutes=1.0)
    assert recipe.rate_at(50, 0) == pytest.approx(0.5)
    assert recipe.rate_at(10, 30) == pytest.approx(0.5)
    assert recipe.rate_at(10, 61) == pytest.approx(0.0)
    assert Recipe(rate=1.0, steps=100, schedule="linear").rate_at(25, 0) == pytest.approx(0.75)
    assert Recipe(rate=1.0, steps=100, schedule="constant", warmup=0.1).rate_at(4, 0) == pytest.approx(0.5)
    module = network()
    done = trainer(module, recipe={"steps": 10**6, "minutes": 1e-3}).run()
    assert done.ended == "minutes" and done.steps < 10**6 and done.curve[-1]["step"] == done.steps


def test_the_held_out_windows_are_looked_at_in_each_quarter_of_the_minutes(monkeypatch):
    """However late the first of the even looks would be."""
    clock, inner = [0.0], loss_of(module := network())
    monkeypatch.setattr(training_trainer, "time", types.SimpleNamespace(perf_counter=lambda: clock[0]))

    def loss(numbers: Sequence[int], held_out: bool) -> Tensor:
        clock[0] += 0 if held_out else 1  # seconds per step
        return inner(numbers, held_out)

    done = trainer(module, loss, recipe={"steps": 10**6, "minutes": 40 / 60}).run()
    assert [row["step"] for row in done.curve] == [0, 10, 20, 30, 40] and done.ended == "minutes"


def test_looks_are_even_and_end_with_the_last_step():
    assert Recipe(rate=1.0, steps=10, judged=4).looks() == [3, 5, 8, 10]
    assert Recipe(rate=1.0, steps=2, judged=4).looks() == [1, 2]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rate": 0}, "training.rate=0 is not allowed: give a number above 0"),
        ({"steps": 0}, "training.steps=0 is not allowed"),
        ({"batch": 0}, "training.batch=0 is not allowed"),
        ({"schedule": "square"}, "training.schedule='square' is not allowed"),
        ({"precision": "half"}, "training.precision='half' is not allowed"),
        ({"state": "4bit"}, "training.state='4bit' is not allowed"),
        ({"betas": (1.0, 0.9)}, "training.betas=1.0 is not allowed"),
        ({"clip": 0.0}, "training.clip=0.0 is not allowed"),
        ({"minutes": -1.0}, "training.minutes=-1.0 is not allowed"),
        ({"micro": 9}, "training.micro=9 is not allowed"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(options, words):
    with pytest.raises(UserError, match=words.replace("(", r"\(")):
        Recipe(**{"rate": 0.1, "steps": 1, **options})


def test_8_bit_state_is_a_librarys_or_refused_by_name(monkeypatch):
    for name in ("torchao", "torchao.optim", "bitsandbytes", "bitsandbytes.optim"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match="state=8bit needs torchao or bitsandbytes"):
        trainer(network(), recipe={"state": "8bit"})
    made = types.ModuleType("bitsandbytes.optim")
    made.AdamW8bit = type("AdamW8bit", (torch.optim.AdamW,), {})
    monkeypatch.setitem(sys.modules, "bitsandbytes", types.ModuleType("bitsandbytes"))
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", made)
    module, plain = network(), network()
    training = trainer(module, recipe={"state": "8bit", "clip": 0.1})
    assert isinstance(training.optimiser, made.AdamW8bit)
    assert training.masters.values["0.weight"].shape == (256,)  # as many as share a scale
    assert training.run().steps == 12
    trainer(plain, recipe={"clip": 0.1}).run()
    torch.testing.assert_close(module[0].weight, plain[0].weight, rtol=1e-5, atol=1e-7)
    kept = int((module[0].weight != 0).sum())
    assert not training.masters.values["0.weight"][kept:].any()


def test_bfloat16_computes_under_autocast():
    module, seen = network(), []
    inner = loss_of(module)
    module[2].register_forward_hook(lambda layer, args, output: seen.append(output.dtype))
    trainer(module, inner, recipe={"precision": "bfloat16", "steps": 2}).run()
    assert set(seen) == {torch.bfloat16}
    assert module[2].weight.dtype == torch.float32
    seen.clear()
    trainer(module, inner, recipe={"steps": 2}).run()  # auto on a CPU
    assert set(seen) == {torch.float32}


def test_the_divergence_is_that_of_autograd_on_its_formula():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 7, dtype=torch.float64, generator=generator).requires_grad_()
    wanted = torch.randn(2, 3, 7, dtype=torch.float64, generator=generator)
    p, q = wanted.softmax(-1), logits.softmax(-1)
    expected = (p * (p / q).log()).sum(-1).mean()
    (gradient,) = torch.autograd.grad(expected, logits)
    ours = logits.detach().float().requires_grad_()
    found = divergence(ours, iter(wanted.float()))
    (3 * found).backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(ours.grad.double(), 3 * gradient, rtol=1e-5, atol=1e-8)
    same = divergence(ours, ours.detach())
    assert same.item() == pytest.approx(0, abs=1e-7)


def test_the_relative_error_counts_tokens_alike():
    wanted = torch.tensor([[[3.0, 4.0], [0.3, 0.4]]])
    output = wanted + torch.tensor([[[1.0, 0.0], [0.0, 0.1]]])
    assert float(relative_error(output, wanted)) == pytest.approx((1 / 25 + 0.01 / 0.25) / 2)
    assert float(relative_error(wanted, wanted)) == 0
