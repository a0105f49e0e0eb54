"""The training loop, for any method. To resume a run, run the same command again."""

from __future__ import annotations

import logging
import math
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from tiue.distill import runs
from tiue.distill.average import Average
from tiue.distill.config import RunConfig
from tiue.distill.errors import DivergedError, StoppedError
from tiue.distill.method import Method, Run
from tiue.distill.report import write_report
from tiue.distill.samples import save_grid
from tiue.distill.sharding import Optimizer, Tensors
from tiue.distill.signals import StopSignals
from tiue.files import one_line, shortened

_log = logging.getLogger(__name__)


def train(run: Run, method: Method, progress: bool = True) -> Path:
    """Train a method to the end. A stopped run resumes.

    Args:
        run: the run for which `method` was made.
        method: the networks, and their update.
        progress: whether to show a progress bar.

    Returns:
        The path of the result.

    Raises:
        DivergedError: a value is not finite. Nothing of that update is saved.
        StoppedError: SIGTERM or SIGINT arrived. A checkpoint is written first.
        ValueError: the directory holds another run, or more updates than `iterations`; or the processes do not see the
            same checkpoints.
    """
    config, out, accelerator = run.config, run.out, run.accelerator
    main = accelerator.is_main_process
    average = Average(accelerator, method.model, config)
    averaged = next(iter(method.networks.values()))  # the network that holds method.model

    # Resume. Write config.json last, so that a run that cannot start leaves the directory free.
    run.identify()  # raises if the directory holds another run
    state = _state(run, method, average)
    first = saved = _restore(run, state)
    files = _Files()
    if first > config.iterations:
        raise ValueError(f"{out} holds {first:,} updates already, and `iterations` is {config.iterations:,}")
    if main:
        runs.record_run(out, config, run.identity)

    # Open the logs; a resumed run replaces the steps after its checkpoint.
    accelerator.init_trackers("tensorboard", init_kwargs={"tensorboard": {"purge_step": first + 1}})
    with ExitStack() as stack:
        signals = stack.enter_context(StopSignals())
        log = stack.enter_context(closing(runs.Log(out / "losses.csv", first, _columns(method)))) if main else None
        bar = stack.enter_context(_bar(run, method, first, progress))
        for step in bar:
            begun = time.perf_counter()

            # Update.
            _set_learning_rates(method, config, step)
            values = dict(method.update(step, run.batch(step)))
            values |= {f"{name}_grad": network.grad_norm for name, network in method.networks.items()}
            values, stopped = _agree(accelerator, values, signals.number)
            _check_finite(run, method, step, values)

            # Average.
            if (step + 1) % config.ema_every == 0 and not averaged.skipped:
                average.follow()

            # Log.
            values |= _speed(run, method, time.perf_counter() - begun)
            bar.set_postfix({name: f"{values[name]:.4g}" for name in method.columns[:3] if name in values})
            with files.may_fail("TensorBoard's log", step + 1):
                accelerator.log(values, step=step + 1)
            if log is not None:
                with files.may_fail("losses.csv", step + 1):
                    log.write(step + 1, values)

            # Sample.
            if (step + 1) % config.sample_every == 0:
                _sample(run, method, average, step + 1, files)

            # Save, and stop if a signal asked for it.
            if stopped or (step + 1) % config.checkpoint_every == 0 or step + 1 == config.iterations:
                saved = _save(run, state, step + 1, files) or saved
            if stopped:
                _end(accelerator)
                raise StoppedError(_stopped(step, saved, stopped), stopped)

    # Finish.
    path = out / method.result
    weights = average.weights()  # All processes take part.
    if main:
        method.save(weights, path)
        write_report(out, method.name)
    accelerator.wait_for_everyone()
    _end(accelerator)
    return path


class _Files:
    """The files that a run can do without. If one cannot be written (a full disk), the run warns and continues."""

    def __init__(self):
        self._failing: set[str] = set()

    @contextmanager
    def may_fail(self, name: str, step: int) -> Iterator[None]:
        """Turn an OSError into a warning, the first time in a row."""
        try:
            yield
            self._failing.discard(name)
        except OSError as error:
            if name not in self._failing:
                _log.warning("step %d: %s could not be written: %s", step, name, one_line(error))
            self._failing.add(name)


def _end(accelerator: Accelerator) -> None:
    """End the trackers and the group of processes."""
    try:
        accelerator.end_training()
    except OSError:  # by TensorBoard's log, as the run has said
        accelerator.state.destroy_process_group()


def _state(run: Run, method: Method, average: Average) -> dict[str, runs.Stateful]:
    """Everything that a checkpoint holds, by name."""
    state: dict[str, runs.Stateful] = {"average": average, **method.state()}
    for name, network in method.networks.items():
        state |= {name: Tensors(network.parameters), f"{name}_optimizer": Optimizer(network.optimizer)}
    if run.accelerator.scaler is not None:
        state["grad_scaler"] = run.accelerator.scaler
    return state


def _restore(run: Run, state: Mapping[str, runs.Stateful]) -> int:
    """Load the newest checkpoint and return its step. Raise ValueError if other processes found another one."""
    first = runs.restore(run.out, state)
    found = run.accelerator.gather(torch.tensor([first], device=run.accelerator.device)).tolist()
    if len(set(found)) > 1:
        raise ValueError(f"the processes found checkpoints of different steps {found}: do all of them see {run.out}?")
    return first


def _save(run: Run, state: Mapping[str, runs.Stateful], step: int, files: _Files) -> int:
    """Write a checkpoint. Returns its step, or 0 if it could not be written."""
    gathered = {name: part.state_dict() for name, part in state.items()}
    saved = 0
    with files.may_fail("the checkpoint", step):
        if run.accelerator.is_main_process:
            runs.save(run.out, gathered, step, run.config.keep)
        saved = step
    return saved


def _set_learning_rates(method: Method, config: RunConfig, step: int) -> None:
    factor = 1 - step / config.iterations if config.learning_rate_decay == "linear" else 1.0
    for network in method.networks.values():
        network.scale_learning_rate(factor)


def _agree(accelerator: Accelerator, values: Mapping[str, Tensor], stopped: int) -> tuple[dict[str, float], int]:
    """Average the values over all processes. Return them, and the largest signal number that a process received."""
    mean = torch.stack([value.detach().float() for value in values.values()])
    signals = torch.tensor([float(stopped)], device=mean.device)
    mean = accelerator.reduce(mean, "mean")
    return dict(zip(values, mean.tolist(), strict=True)), int(accelerator.gather(signals).max())


def _check_finite(run: Run, method: Method, step: int, values: Mapping[str, float]) -> None:
    """Raise DivergedError for values that are not finite."""
    wrong = {name: value for name, value in values.items() if not math.isfinite(value)}
    if run.accelerator.scaler is not None:  # Scaled gradients may overflow. Such an update is skipped.
        wrong = {name: value for name, value in wrong.items() if not name.endswith("_grad")}
    if wrong:
        last = runs.checkpoints(run.out)[-1:]
        found = shortened(", ".join(f"{name} {value:.4g}" for name, value in wrong.items()))
        left = f"the last checkpoint is {last[0]}" if last else "there is no checkpoint yet"
        about = method.describe(run.batch(step))
        raise DivergedError(f"step {step + 1}: a loss or a gradient is not finite: {found}; {left}; {about}")


def _sample(run: Run, method: Method, average: Average, step: int, files: _Files) -> None:
    """Write a grid of pictures by the averaged network, if the method makes pictures."""
    with average.applied():
        images = method.sample()
    if images is not None:
        with files.may_fail("the sample grid", step):
            save_grid(images, run.out / f"samples/step-{step:06}.png")
        with files.may_fail("TensorBoard's log", step):
            run.accelerator.get_tracker("tensorboard").writer.add_images("samples", images, step)


def _columns(method: Method) -> list[str]:
    of_networks = [f"{name}_{what}" for what in ("grad", "lr") for name in method.networks]
    return [*method.columns, *of_networks, "samples_per_second", "seconds"]


def _speed(run: Run, method: Method, seconds: float) -> dict[str, float]:
    config = run.config
    samples = config.batch_size * config.accumulate * run.accelerator.num_processes
    rates = {f"{name}_lr": network.learning_rate for name, network in method.networks.items()}
    return rates | {"samples_per_second": samples / seconds, "seconds": seconds}


def _bar(run: Run, method: Method, first: int, progress: bool) -> tqdm:
    return tqdm(
        range(first, run.config.iterations),
        initial=first,
        total=run.config.iterations,
        disable=not (progress and run.accelerator.is_main_process),
        desc=method.name,
    )


def _stopped(step: int, saved: int, number: int) -> str:
    where = f"saved at step {saved}; the same command resumes from there" if saved else "not saved"
    return f"stopped by {signal.Signals(number).name} after step {step + 1}, {where}"
