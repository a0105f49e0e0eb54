"""2,000 pictures in one process: memory, threads and open files stay flat, and every picture equals its twin."""

import hashlib
import os
import random
import sys
import threading
from pathlib import Path

import pytest
from tiue_runtime import Cancelled, Pipeline

PICTURES = 2000
WARM_UP = 300  # pictures after which nothing may grow
GROWTH = 1.05  # of resident memory
PROMPTS = ("a red heart", "a sunflower", "pizza", "cat face", "a rocket")
SIZES = ((64, 64), (64, 96), (96, 64), (128, 128))
MODES = ("parallel", "partial", "sequential")

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")]


class OnPurpose(Exception):
    """Raised by a callback."""


def test_two_thousand_pictures_leave_nothing_behind():
    draws = random.Random(1)
    twins: dict[tuple, str] = {}
    made = cancelled = failed = 0
    before = None
    with Pipeline.load("emoji", device="cpu") as pipe:
        while made < PICTURES:
            height, width = draws.choice(SIZES)
            request = draws.choice(PROMPTS), draws.randrange(20), height, width, draws.choice(MODES)
            count = draws.choice((1, 1, 1, 2, 3))
            prompt, seed, *_, mode = request
            options = {"seed": seed, "height": height, "width": width, "memory": mode, "num_images": count}
            fate = draws.random()
            if fate < 0.05:
                with pytest.raises(Cancelled):
                    pipe(prompt, callback=lambda progress: draws.random() < 0.3 or progress.fraction > 0.9, **options)
                cancelled += 1
            elif fate < 0.1:
                with pytest.raises(OnPurpose):
                    pipe(prompt, callback=fail, **options)
                failed += 1
            else:
                for index, image in enumerate(pipe(prompt, **options).images):
                    key = (*request, count, index)
                    digest = hashlib.sha256(image.tobytes()).hexdigest()
                    assert twins.setdefault(key, digest) == digest, key
                    made += 1
            if before is None and made >= WARM_UP:
                before = state()
        after = state()
        alone = draws.sample(sorted(twins), 100)
        for prompt, seed, height, width, mode, count, index in alone:
            images = pipe(prompt, seed=seed, height=height, width=width, memory=mode, num_images=count).images
            digest = hashlib.sha256(images[index].tobytes()).hexdigest()
            assert digest == twins[prompt, seed, height, width, mode, count, index]
    print(f"{made} pictures, {cancelled} cancelled, {failed} failed; {before} after {WARM_UP}, {after} at the end")
    assert cancelled > 20 and failed > 20
    assert after["bytes"] <= GROWTH * before["bytes"]
    assert (after["threads"], after["files"]) == (before["threads"], before["files"])


def fail(progress):
    if progress.stage == "unet_decoder":
        raise OnPurpose


def state() -> dict[str, int]:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "bytes": pages * os.sysconf("SC_PAGE_SIZE"),
        "threads": threading.active_count(),
        "files": len(list(Path("/proc/self/fd").iterdir())),
    }
