"""What MoEHealthCallback costs a training, at its default interval.

Steps of one training take turns: without the callback's work, with what it does in every step, and
with a whole measurement. Medians of each, the callback's own time, and what that makes of a step at
the default interval.

Usage: python -m benchmarks.moe_health [--steps 20]
"""

import argparse
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import fiddle
import lightning.pytorch as pl
from nemo.lightning import io
from nemo_upcycle_recipes import executors  # noqa: F401 - registers
from nemo_upcycle_recipes.llama_tiny import upcycled_recipe

from nemo_upcycle.data.preparation import Preparation, prepare
from nemo_upcycle.data.sample import write_stdlib_sample
from nemo_upcycle.data.tokenizer import train_tokenizer
from nemo_upcycle.nemo.moe_health import MoEHealthCallback

SIZES = {"hidden_size": 512, "ffn_hidden_size": 1024, "num_attention_heads": 8, "kv_channels": 64}
MODES = ("without", "watching", "measuring")
WARM_UP = 2 * len(MODES)
DEFAULT_INTERVAL = MoEHealthCallback().every_n_steps


class Turns(MoEHealthCallback):
    """The callback in alternating modes: no work, the work of every step, or a measurement.

    The callback's work is timed separately, because step times vary by more. On a CPU nothing runs
    asynchronously, so this time is the whole cost.
    """

    mode = MODES[0]
    own: ClassVar[dict[str, list[float]]] = defaultdict(list)

    def on_train_batch_start(self, trainer: pl.Trainer, *rest: Any) -> None:
        """Switch to the next mode."""
        self.mode = MODES[trainer.global_step % len(MODES)]
        self._due = False
        self.seconds = 0.0
        if self.mode == "measuring":
            self._timed(super().on_train_batch_start, trainer, *rest)

    def on_train_batch_end(self, trainer: pl.Trainer, *rest: Any) -> None:
        """Run the callback's work and record the time."""
        self._timed(super().on_train_batch_end, trainer, *rest)
        if trainer.global_step > WARM_UP:
            Turns.own[self.mode].append(self.seconds)

    def _watch(self, *call: Any) -> None:
        if self.mode != "without":
            self._timed(super()._watch, *call)

    def _timed(self, work: Callable[..., None], *arguments: Any) -> None:
        started = time.perf_counter()
        work(*arguments)
        self.seconds += time.perf_counter() - started


class Clock(pl.Callback, io.IOMixin):
    """A timer for steps: the first of the callbacks at the start, the last at the end."""

    started = 0.0
    seconds: ClassVar[dict[str, list[float]]] = defaultdict(list)

    def __init__(self, at_start: bool) -> None:
        self.at_start = at_start

    def on_train_batch_start(self, *_: Any) -> None:
        """Start the timer."""
        if self.at_start:
            Clock.started = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Stop the timer."""
        if not self.at_start and trainer.global_step > WARM_UP:
            mode = MODES[(trainer.global_step - 1) % len(MODES)]
            Clock.seconds[mode].append(time.perf_counter() - Clock.started)


def workspace(directory: Path) -> None:
    """Write text, a tokenizer and Megatron's files, like the demo."""
    corpora = write_stdlib_sample(directory / "data").values()
    train_tokenizer(list(corpora), directory / "tokenizer", 2048)
    for corpus in corpora:
        prepare(Preparation((str(corpus),), directory / "tokenizer", corpus.with_suffix("")))


def measure(steps: int) -> None:
    """Train and fill `Clock.seconds`."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        workspace(directory)
        recipe = upcycled_recipe(
            dir=name,
            dense_checkpoint=f"{name}/none",
            tokenizer=f"{name}/tokenizer",
            from_scratch=True,
            max_steps=WARM_UP + steps * len(MODES),
            seq_length=512,
            global_batch_size=4,
            micro_batch_size=4,
        )
        for field, value in SIZES.items():
            setattr(recipe.model.config, field, value)
        recipe.model.config.moe_ffn_hidden_size = SIZES["ffn_hidden_size"]
        recipe.log.ckpt = None
        recipe.trainer.limit_val_batches = 0
        recipe.trainer.callbacks = []
        run = fiddle.build(recipe)
        run.keywords["trainer"].callbacks += [
            Clock(True),
            Turns(every_n_steps=1, heat_map=False),
            Clock(False),
        ]
        run()


def main() -> None:
    """Print the results as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20, help="steps of each kind")
    measure(parser.parse_args().steps)
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "megatron-core"))
    print(f"# {date.today()}, MoEHealthCallback's cost, CPU\n")
    print(f"`python -m benchmarks.moe_health`, {os.cpu_count()} cores, 1 rank, {packages}; 4 MoE")
    print("layers of 8 experts, hidden size 512, 2,048 tokens per step.\n")
    steps = {mode: statistics.median(Clock.seconds[mode]) for mode in MODES}
    own = {mode: statistics.median(Turns.own[mode]) for mode in MODES}
    print("| step | median s | fastest | slowest | steps | the callback's own ms |")
    print("|---|---|---|---|---|---|")
    for mode in MODES:
        values = Clock.seconds[mode]
        row = f"{steps[mode]:.3f} | {min(values):.3f} | {max(values):.3f} | {len(values)}"
        print(f"| {mode} | {row} | {1000 * own[mode]:.2f} |")
    each = (own["watching"] * (DEFAULT_INTERVAL - 1) + own["measuring"]) / DEFAULT_INTERVAL
    print(f"\nA measurement takes {own['measuring'] / steps['without']:.1%} of a step; at the")
    print(f"default interval of {DEFAULT_INTERVAL} steps the callback takes", end=" ")
    print(f"{each / steps['without']:.2%} of the training.")


if __name__ == "__main__":
    main()
