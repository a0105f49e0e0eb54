"""A page with Gradio: live previews, cancelling. Needs `pip install gradio`."""

import os
from contextlib import aclosing

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before the import: nothing is sent
import gradio as gr
from tiue_runtime import Pipeline, Progress, TiueError
from tiue_runtime.aio import stream

pipe = Pipeline.load()


async def draw(prompt, count, seed):
    """Yield previews of all pictures while they are drawn, then the pictures and their seeds."""
    options = {"num_images": int(count), "seed": int(seed) if seed.isdecimal() else seed or None}
    try:
        async with aclosing(stream(pipe, prompt, **options)) as items:  # Leaving it early cancels the request.
            async for item in items:
                if not isinstance(item, Progress):
                    files = [(image, f"seed {number}") for image, number in zip(item.images, item.seeds, strict=True)]
                    yield files, f"{item.timings['total']:.2f} s on {item.device}"
                elif item.latents is not None and pipe.bundle.manifest.preview:
                    previews = [item.preview(index) for index in range(len(item.latents))]
                    yield previews, f"{item.fraction:.0%}"
    except TiueError as error:  # the user's mistake, in one line
        raise gr.Error(str(error)) from error


with gr.Blocks(title="TiUE", delete_cache=(600, 3600)) as page:
    prompt = gr.Textbox(label="What shall I draw?", value="a red heart", autofocus=True)
    with gr.Row():
        count = gr.Slider(1, 9, value=1, step=1, label="Pictures")
        seed = gr.Textbox(label="Seed", placeholder="a new one")
    with gr.Row():
        start, stop = gr.Button("Draw", variant="primary"), gr.Button("Cancel")
    gallery, state = gr.Gallery(label="Pictures", format="png", columns=3, object_fit="contain"), gr.Markdown()
    drawing = gr.on([start.click, prompt.submit], draw, [prompt, count, seed], [gallery, state], api_name="draw")
    stop.click(lambda: "cancelled", None, state, cancels=drawing, queue=False, api_visibility="private")

if __name__ == "__main__":
    page.launch()
