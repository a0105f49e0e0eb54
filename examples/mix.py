"""Walk from one prompt to another, with the same noise. `encode` gives embeddings, which can be mixed."""

from PIL import Image
from tiue_runtime import Pipeline

with Pipeline.load() as pipe:
    begin, end = pipe.encode(["a red heart", "a sunflower"])
    mixed = [begin + (end - begin) * part / 4 for part in range(5)]
    pictures = [pipe(prompt_embeds=text[None], seed=1).images[0] for text in mixed]

width, height = pictures[0].size
row = Image.new("RGB", (width * len(pictures), height))
for column, picture in enumerate(pictures):
    row.paste(picture, (column * width, 0))
row.save("mix.png")
print(f"mix.png: {len(pictures)} pictures from heart to sunflower")
