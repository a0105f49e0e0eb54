"""`python -m benchmarks.training`: the updates of a distillation, and those of a plain loop like the paper's code.

The plain loop encodes the text of every batch, including the null text. It makes four separate passes for the scores of
VSD, and uses torch's optimizer and diffusers' average with their defaults. Networks, random numbers and losses are the
same, and losses are compared. Both run on the CPU. The loops take turns, and only one is in memory at a time. The UNet
has the widths of Stable Diffusion 2.1, --layers per block instead of 2, and random weights.
"""

import argparse
import copy
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from diffusers import DDIMScheduler
from diffusers.training_utils import EMAModel
from peft import LoraConfig
from tiue_runtime.host.machine import thread_count
from torch import Tensor

from benchmarks.latency import positive
from benchmarks.machine import cpu_name
from benchmarks.pipelines import random_teacher
from tiue import losses
from tiue.components import Components
from tiue.distill.average import Average
from tiue.distill.config import DistillConfig
from tiue.distill.draws import Draws, SharedDraws
from tiue.distill.method import Run
from tiue.distill.prompt_store import PromptOrder
from tiue.distill.vsd import Vsd, prepare
from tiue.schedule import closed_form
from tiue.text_encoder import encode_text
from tiue.unet import TiUE

CAPTIONS = [f"a photograph of {number} lighthouses, oil on canvas" for number in range(32)]
_AGREE = 1e-3  # relative difference of losses, whose sums have another order
Update = Callable[[int], dict[str, float]]  # of a step => losses


class Plain:
    """The method without optimizations: one computation after the other."""

    def __init__(self, teacher: Components, config: DistillConfig, captions: Sequence[str]):
        self._components, self._config, self._captions = teacher, config, captions
        self._order = PromptOrder(len(captions), config.seed)
        self._tiue = TiUE(copy.deepcopy(teacher.unet), closed_form(teacher.scheduler_config, 4), 751)
        torch.manual_seed(config.seed)  # The adapters' initial weights are random, and the same as in Vsd.
        self._scores = teacher.unet.requires_grad_(False)
        adapters = LoraConfig(r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules=["to_q", "to_v"])
        self._scores.add_adapter(adapters)
        self._adapters = [p for p in self._scores.parameters() if p.requires_grad]
        self._student_optimizer = torch.optim.Adam(self._tiue.parameters(), config.learning_rate)
        self._fake_optimizer = torch.optim.Adam(self._adapters, config.fake_learning_rate)
        self._ema = EMAModel(self._tiue.parameters(), decay=config.ema_decay, use_ema_warmup=True, power=0.75)
        self._scheduler = DDIMScheduler.from_config(teacher.scheduler_config, clip_sample=False)

    def update(self, step: int) -> dict[str, float]:
        """Update each network once, and return the losses."""
        config = self._config
        with torch.autocast("cpu", torch.bfloat16, enabled=config.mixed_precision == "bf16"):
            return self._update(step)

    def _update(self, step: int) -> dict[str, float]:
        config, scheduler, size = self._config, self._scheduler, self._config.batch_size
        draws, shared = Draws(config.seed, step, 0, size, torch.device("cpu")), SharedDraws(config.seed, step)
        shared.choice(config.steps)
        with torch.no_grad():
            text = encode_text(self._components, [self._captions[self._order[step * size + i]] for i in range(size)])
            null = encode_text(self._components, [""] * size)
        shape = (self._tiue.unet.config.in_channels, *[self._tiue.unet.config.sample_size] * 2)
        z0, eps = self._tiue.predict(draws.normal(shape), text)
        t = draws.integers(config.t_min, config.t_max + 1)
        with torch.no_grad():
            z_t = scheduler.add_noise(z0, draws.normal(shape), t)
            self._scores.disable_adapters()
            teacher = self._guided(z_t, t, text, null, config.guidance)
            self._scores.enable_adapters()
            fake = self._guided(z_t, t, text, null, config.fake_guidance)
        vsd = losses.vsd_loss(z0, teacher, fake, 1 - scheduler.alphas_cumprod[t])
        kl = losses.kl_loss(eps)
        self._step(self._student_optimizer, list(self._tiue.parameters()), vsd + config.kl_weight * kl)
        self._ema.step(self._tiue.parameters())

        t = draws.integers(0, len(scheduler.alphas_cumprod))
        noise = draws.normal(shape)
        chosen = null if shared.uniform() < config.null_probability else text
        answer = self._scores(scheduler.add_noise(z0.detach(), noise, t), t, chosen).sample.float()
        loss = losses.fake_score_loss(answer, noise, scheduler.alphas_cumprod[t].sqrt())
        self._step(self._fake_optimizer, self._adapters, loss)
        return {"vsd": vsd.item(), "kl": kl.item(), "fake": loss.item()}

    def _guided(self, z: Tensor, t: Tensor, text: Tensor, null: Tensor, guidance: float) -> Tensor:
        unconditional = self._scores(z, t, null).sample.float()
        conditional = self._scores(z, t, text).sample.float()
        return unconditional + guidance * (conditional - unconditional)

    def _step(self, optimizer: torch.optim.Optimizer, parameters: list[Tensor], loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, self._config.grad_clip)
        optimizer.step()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark. Returns 0, or 1 if the losses differ."""
    arguments = _parser().parse_args(argv)
    torch.set_num_threads(arguments.threads)
    config = DistillConfig(
        batch_size=arguments.batch, mixed_precision=arguments.mixed_precision, channels_last=arguments.channels_last
    )
    changes = {"layers_per_block": arguments.layers, "sample_size": arguments.latents}
    components = partial(random_teacher, arguments.model, arguments.work, changes)
    makers: dict[str, Callable[[Path], Update]] = {
        "plain": lambda _: Plain(components(), config, CAPTIONS).update,
        "tiue": lambda out: method_update(*prepare(components(), CAPTIONS, out, config)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in makers}
    found: dict[str, list[dict[str, float]]] = {}
    for number in range(arguments.rounds):
        for name, make in makers.items():
            with tempfile.TemporaryDirectory() as directory:
                found[name], taken = timed_updates(make(Path(directory)), arguments.updates)
            seconds[name] += taken
            shown = [round(one, 3) for one in taken]
            print(json.dumps({"round": number + 1, "loop": name, "seconds": shown, "losses": found[name]}), flush=True)
            gc.collect()  # Memory may not hold both loops.
    worst = max(
        abs(ours[name] - value) / max(abs(value), 1e-6)
        for ours, plain in zip(found["tiue"], found["plain"], strict=True)
        for name, value in plain.items()
    )
    parameters = sum(p.numel() for p in components().unet.parameters())
    precision = "float32" if config.mixed_precision == "no" else config.mixed_precision
    print(f"{cpu_name()}, {arguments.threads} threads, torch {torch.__version__}, {precision}")
    print(f"UNet {parameters / 1e6:.0f} M, latents {arguments.latents}, batch {arguments.batch}; text encoder as is")
    speed = {name: arguments.batch / statistics.median(values) for name, values in seconds.items()}
    for name, values in seconds.items():
        spread = f"{min(values):.2f} .. {max(values):.2f}"
        print(f"{name:6} {speed[name]:.3f} samples/s, {statistics.median(values):.2f} s an update ({spread})")
    print(f"{speed['tiue'] / speed['plain']:.2f} times as fast; losses differ by {worst:.1e} at most")
    return int(worst > _AGREE)


def timed_updates(update: Update, count: int) -> tuple[list[dict[str, float]], list[float]]:
    """Return the losses of one update and of `count` more, and the seconds of the latter."""
    found, seconds = [], []
    for step in range(count + 1):
        begun = time.perf_counter()
        found.append(update(step))
        seconds.append(time.perf_counter() - begun)
    return found, seconds[1:]


def method_update(run: Run, method: Vsd) -> Update:
    """Return the update of a distillation with everything that its loop does each time: average and losses."""
    average = Average(run.accelerator, method.model, method.config)

    def update(step: int) -> dict[str, float]:
        values = method.update(step, run.batch(step))
        average.follow()
        return {name: value.item() for name, value in values.items()}

    return update


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training", description="The updates of a distillation beside those of a plain loop."
    )
    parser.add_argument("--model", default="sd21-base", help="model of benchmarks.pipelines (default: sd21-base)")
    parser.add_argument("--work", type=Path, default=Path("runs/benchmarks"), help="directory of the pipeline")
    parser.add_argument("--layers", type=positive, default=1, help="layers per block (default: 1)")
    parser.add_argument("--latents", type=positive, default=16, help="height and width of latents (default: 16)")
    parser.add_argument("--batch", type=positive, default=2, help="samples of an update (default: 2)")
    parser.add_argument("--updates", type=positive, default=5, help="updates that are timed (default: 5)")
    parser.add_argument("--rounds", type=positive, default=2, help="turns of both (default: 2)")
    parser.add_argument("--mixed-precision", choices=("no", "bf16"), default="no")
    parser.add_argument("--channels-last", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--threads", type=positive, default=thread_count(), help="default: all")
    return parser


if __name__ == "__main__":
    os.environ["ACCELERATE_USE_CPU"] = "true"  # The plain loop knows no other device, so the other loop gets none.
    sys.exit(main())
