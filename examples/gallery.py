"""Make pictures of several prompts and seeds in one request, and paste them into one sheet."""

from PIL import Image
from tiue_runtime import Pipeline

prompts = ["a red heart", "a pizza, noto style", "a rocket, twemoji style", "a penguin, fluent style"]
pipe = Pipeline.load()
result = pipe(prompts, num_images=4, seed=1)

width, height = result.images[0].size
sheet = Image.new("RGB", (4 * width, len(prompts) * height))
for index, image in enumerate(result.images):
    sheet.paste(image, (index % 4 * width, index // 4 * height))
sheet.save("gallery.png")
print(f"gallery.png: {len(result.images)} pictures in {result.timings['total']:.2f} s on {result.device}")
