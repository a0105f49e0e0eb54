"""Draw without blocking an event loop, and see each part of the work as it is done."""

import asyncio

from tiue_runtime import Pipeline, Progress
from tiue_runtime.aio import stream


async def draw(pipe, prompt):
    """Print the progress of a request, and return its picture."""
    async for item in stream(pipe, prompt, seed=1):
        if isinstance(item, Progress):
            print(f"{item.fraction:4.0%} {item.stage}")
        else:
            return item.images[0]


with Pipeline.load() as pipe:
    asyncio.run(draw(pipe, "a red heart")).save("heart.png")
