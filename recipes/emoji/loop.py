"""The one training loop of the recipe: AdamW, linear decay, EMA, bfloat16 where it is fast, checkpoint and resume."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel
from tiue_runtime.host.machine import has_bf16
from torch import nn
from tqdm import tqdm

CHECKPOINT_EVERY = 500  # steps
LOG_EVERY = 20  # steps


def device() -> torch.device:
    """The device that the recipe trains on: CUDA when there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def computes_in_bf16(kind: str) -> bool:
    """Whether a kind of device does. CPUs that must emulate bfloat16 take 30 times as long as in float32."""
    return kind != "cpu" or has_bf16()


def autocast(kind: str) -> torch.autocast:
    """bfloat16 where the device computes in it, else float32."""
    return torch.autocast(kind, torch.bfloat16, enabled=computes_in_bf16(kind))


def train(
    model: nn.Module,
    loss: Callable[[torch.Generator], torch.Tensor],
    *,
    steps: int,
    lr: float,
    seed: int,
    out: Path,
    ema_decay: float | None = None,
    weight_decay: float = 0.0,
) -> None:
    """Minimise `loss` over `model`'s parameters, leaving the last (with `ema_decay`: averaged) weights in it.

    `loss(generator)` draws its batch from a CPU generator seeded by (seed, step), so a run that was stopped
    and begun again equals one that was not. Writes `<out>.csv` (step, loss, lr) and, while it lasts,
    `<out>.resume.pt`.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    ema = EMAModel(model.parameters(), decay=ema_decay, use_ema_warmup=True, power=0.75) if ema_decay else None
    state, log, first = out.with_suffix(".resume.pt"), out.with_suffix(".csv"), 0
    if state.exists():
        saved = torch.load(state, map_location="cpu", weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        if ema:
            ema.load_state_dict(saved["ema"])
            ema.to(next(model.parameters()).device)
        first = saved["step"]
    else:
        log.write_text("step,loss,lr\n")
    kind = next(model.parameters()).device.type
    mean = 0.0
    model.train()
    with log.open("a", newline="") as file:
        rows = csv.writer(file)
        for step in tqdm(range(first, steps), desc=out.name, initial=first, total=steps, mininterval=5):
            generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
            with autocast(kind):
                value = loss(generator)
            optimizer.zero_grad()
            value.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if ema:
                ema.step(model.parameters())
            mean += value.item() / LOG_EVERY
            if not torch.isfinite(value):
                raise RuntimeError(f"{out.name}: loss is {value.item()} at step {step}")
            if (step + 1) % LOG_EVERY == 0:
                rows.writerow([step + 1, f"{mean:.6f}", f"{schedule.get_last_lr()[0]:.3e}"])
                file.flush()
                mean = 0.0
            if (step + 1) % CHECKPOINT_EVERY == 0 and step + 1 < steps:
                _save(state, model, optimizer, schedule, ema, step + 1)
    if ema:
        ema.copy_to(model.parameters())
    model.eval()
    state.unlink(missing_ok=True)


def _save(path: Path, model, optimizer, schedule, ema, step: int) -> None:
    temporary = path.with_suffix(".tmp")
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule, "ema": ema}
    torch.save({"step": step} | {name: part.state_dict() for name, part in parts.items() if part}, temporary)
    temporary.replace(path)
