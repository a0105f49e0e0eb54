"""The UNet with random weights: one full pass, the student's encoder, and its decoder at 4 timesteps, in fp16."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from benchmarks.gpu.parts import Keep, Measure, Setting
from benchmarks.gpu.timing import check_torch, milliseconds, recorded, reset_peak
from benchmarks.pipelines import scheduler_configuration, unet_configuration
from tiue.schedule import closed_form
from tiue.unet import TiUE

_STEPS = 4
_TEXT_LENGTH = 77


class Halves:
    """A UNet on a device, in fp16 on a GPU and in float32 on the CPU.

    Args:
        unet: the UNet. It is moved.
        model: a model of `pipelines.LAYOUTS`, whose timesteps are used.
        device: "cuda" or "cpu".
    """

    def __init__(self, unet: UNet2DConditionModel, model: str, device: str):
        self.device, self._dtype = device, torch.float16 if device == "cuda" else torch.float32
        self._unet = unet.to(device, self._dtype).eval().requires_grad_(False)
        schedule = closed_form(scheduler_configuration(model), _STEPS)
        self._tiue = TiUE(self._unet, schedule, schedule.timesteps[0])
        self._timesteps = torch.tensor(schedule.timesteps, device=device)

    def calls(self, batch: int) -> dict[str, Callable[[], Any]]:
        """Return what can be timed for a batch: one full pass, encoder, decoder, and the whole student."""
        unet, tiue, steps = self._unet, self._tiue, self._timesteps
        side, width = unet.config.sample_size, unet.config.cross_attention_dim
        put = partial(torch.zeros, device=self.device, dtype=self._dtype)
        latents, text = put(batch, unet.config.in_channels, side, side), put(batch, _TEXT_LENGTH, width)
        t = steps[:1].expand(batch)
        features = tiue.encode(latents, text)
        return {
            "full": lambda: unet(latents, t, text).sample,
            "encoder": lambda: tiue.encode(latents, text),
            "decoder": lambda: tiue.decode(features, steps, text),
            "student": lambda: tiue.decode(tiue.encode(latents, text), steps, text),
        }


def random_halves(model: str, device: str) -> Halves:
    """Make a UNet of `pipelines.LAYOUTS` with random weights on the device itself."""
    torch.manual_seed(0)
    with torch.device(device):
        unet = UNet2DConditionModel(**unet_configuration(model))
    return Halves(unet, model, device)


def cases(setting: Setting) -> dict[str, Measure]:
    """Return the cases of the part network. Raises CannotRun without a GPU."""
    check_torch(setting.device)
    halves = random_halves("mini21" if setting.dry_run else "sd21-base", setting.device)
    return {
        f"batch {batch}, {'CUDA graphs' if graphs else 'eager'}": partial(_measure, halves, setting, batch, graphs)
        for graphs in (False, True)
        for batch in (1, 4)
    }


@torch.inference_mode()
def _measure(halves: Halves, setting: Setting, batch: int, graphs: bool, keep: Keep) -> dict[str, float]:
    reset_peak(setting.device)
    values: dict[str, float] = {"batch": batch}
    for name, call in halves.calls(batch).items():
        call = recorded(call, setting.device) if graphs else call
        values[f"{name}_ms"] = milliseconds(call, setting.device, 0 if setting.dry_run else 1)
        keep(values)
    values["decoder_by_full"] = values["decoder_ms"] / values["full_ms"]
    values["student_by_full"] = values["student_ms"] / values["full_ms"]
    if setting.device == "cuda":
        values["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return values
