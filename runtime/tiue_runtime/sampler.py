"""From a request to pictures, on loaded graphs.

prompt -> text_encoder -> text
z_T, text -> denoise: unet_encoder once, unet_decoder at N timesteps -> z_0
z_0 -> vae_decoder -> image
image -> safety_checker, if the bundle has one -> flagged or not
image -> upscaler, on request -> a larger image
"""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import numpy as np
from PIL.Image import Image

from tiue_runtime.bundle import (
    ATTENTION_MASK,
    INPUT_IDS,
    SAFETY_CHECKER,
    TEXT,
    TEXT_ENCODER,
    UNET_DECODER,
    UNET_ENCODER,
    UPSCALER,
    VAE_DECODER,
    Bundle,
)
from tiue_runtime.choices import OutputType
from tiue_runtime.decode import decode_image
from tiue_runtime.denoise import denoise
from tiue_runtime.errors import clip
from tiue_runtime.graphs import Graphs, Halves, Turns
from tiue_runtime.images import to_pil, to_unit
from tiue_runtime.modes import Ladder, Mode
from tiue_runtime.ort.graph import Float32
from tiue_runtime.preview import Previews
from tiue_runtime.request import Request
from tiue_runtime.run import Run
from tiue_runtime.safety import blurred, flag
from tiue_runtime.tokenizer import CHARACTERS_PER_TOKEN, PromptTokenizer
from tiue_runtime.upscale import enlarge
from tiue_runtime.vocabulary import PromptWarning, Vocabulary

Tile = tuple[int, int]


class Sampled(NamedTuple):
    """What a request made. The fields are described in Result."""

    images: Any
    memory: Mode
    tile: Tile | None
    flagged: tuple[bool, ...] = ()
    upscale_tile: Tile | None = None  # (height, width) before enlarging, if the upscaler worked in tiles


class Sampler:
    """The graphs and the tokenizer of a bundle. It samples pictures with them.

    Args:
        bundle: where the tokenizer is.
        graphs: of the bundle.
    """

    def __init__(self, bundle: Bundle, graphs: Graphs) -> None:
        self.graphs = graphs
        self._manifest = bundle.manifest
        self._vocabulary = Vocabulary(bundle.manifest.prompts)
        self._sizes = set(bundle.manifest.made_for)  # (height, width) in pixels of which no warning is due
        self._tokenizer = PromptTokenizer(bundle.tokenizer_path, bundle.manifest.text_length)

    def sample(
        self, request: Request, output_type: OutputType, run: Run, decode: Callable[[Float32], list[Image]]
    ) -> Sampled:
        """Go the whole way from noise to pictures.

        Args:
            request: complete and checked.
            output_type: "latent" ends the way before the image decoder.
            run: hears of each stage.
            decode: the image decoder, for exact previews.
        """
        text_stage = () if request.prompts is None else (TEXT_ENCODER,)
        image_stages = () if output_type == "latent" else self._image_stages(request.upscale)
        self._warn_of_size(request)
        run.expect((*text_stage, UNET_ENCODER, UNET_DECODER, *image_stages), Previews(self._manifest, decode))
        z_T = request.noise(run)
        with self.graphs.request(run, low=request.memory == "low") as turns:
            if request.prompts is None:
                text = np.repeat(cast(Float32, request.prompt_embeds), request.num_images, axis=0)
            else:
                text = self._encode(request.prompts, turns)
            ladder = Ladder(self._first_mode(request), request.steps)
            halves = Halves(turns, request.steps, decoded=output_type != "latent")
            z_0 = denoise(halves, self._manifest, z_T, text, ladder, run)
            if output_type == "latent":
                return Sampled(z_0, ladder.mode, None)
            image, tile = decode_image(turns, self._manifest, z_0, request.vae_tiling)
            images, flagged, upscale_tile = self._finished(image, output_type, request.upscale, turns)
        return Sampled(images, ladder.mode, tile, flagged, upscale_tile)

    def encode(self, prompts: list[str], run: Run, *, low: bool) -> Float32:
        """Encode prompts => text embeddings, float32 (B, L, D)."""
        run.expect((TEXT_ENCODER,))
        with self.graphs.request(run, low=low) as turns:
            return self._encode(prompts, turns)

    def decode(
        self,
        latents: Float32,
        output_type: OutputType,
        tiling: bool | None,
        upscale: int | None,
        run: Run,
        *,
        low: bool,
    ) -> Any:
        """Turn latents (B, C, h, w) => pictures, as `output_type` says."""
        run.expect(self._image_stages(upscale))
        with self.graphs.request(run, low=low) as turns:
            image, _ = decode_image(turns, self._manifest, latents, tiling)
            return self._finished(image, output_type, upscale, turns)[0]

    def _image_stages(self, upscale: int | None) -> tuple[str, ...]:
        """Return the stages after the latents, in their order."""
        checker = () if self.graphs.safety_checker is None else (SAFETY_CHECKER,)
        return VAE_DECODER, *checker, *(() if upscale is None else (UPSCALER,))

    def _finished(
        self, image: Float32, output_type: OutputType, upscale: int | None, turns: Turns
    ) -> tuple[Any, tuple[bool, ...], Tile | None]:
        """Check an image (B, 3, H, W), enlarge it on request, and turn it into pictures as `output_type` says.

        Returns:
            The pictures, and `flagged` and `upscale_tile` as in Sampled.
        """
        checker, how, upscaler = self.graphs.safety_checker, self._manifest.safety_checker, self.graphs.upscaler
        flagged: tuple[bool, ...] = ()
        tile: Tile | None = None
        if checker is not None and how is not None:
            pictures = to_pil(to_unit(image))
            flagged = flag(turns, checker, how, pictures)
            image = image.copy() if any(flagged) else image
            for i in np.flatnonzero(flagged):
                levels = np.asarray(blurred(pictures[i]), dtype=np.float32)
                image[i] = levels.transpose(2, 0, 1) / np.float32(127.5) - 1
        if upscaler is not None and upscale is not None:
            image, tile = enlarge(turns, upscaler, self._manifest, image, upscale)
        unit = to_unit(image)
        return to_pil(unit) if output_type == "pil" else unit, flagged, tile

    def _encode(self, prompts: list[str], turns: Turns) -> Float32:
        """Return text embeddings (B, L, D), one row per prompt. Equal prompts are encoded once."""
        length = self._manifest.text_length
        rows = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
        for prompt in rows:
            turns.run.check(TEXT_ENCODER)
            complaint = self._vocabulary.complaint(prompt[: CHARACTERS_PER_TOKEN * length])  # Later words are cut off.
            if complaint:
                warnings.warn(PromptWarning(complaint, prompt), stacklevel=4)
        tokens = self._tokenizer(list(rows))
        for prompt, cut in zip(rows, tokens.cut, strict=True):
            if cut:
                text = f"prompt longer than {length} tokens; this part was cut off: {clip(cut)!r}"
                warnings.warn(PromptWarning(text, prompt), stacklevel=4)
        graph = self.graphs.text_encoder
        feed = {INPUT_IDS: tokens.input_ids, ATTENTION_MASK: tokens.attention_mask}
        text = cast(Float32, turns(TEXT_ENCODER, graph, feed)[TEXT])
        graph.check_output(TEXT, text, (len(rows), length, text.shape[-1]), self.graphs.overflow_remedy())
        turns.run.report(TEXT_ENCODER, 1, 1)
        return text[[rows[prompt] for prompt in prompts]]

    def _warn_of_size(self, request: Request) -> None:
        """Warn once of each size that the model was not made for."""
        scale = self._manifest.pixels_per_latent
        height, width = (side * scale for side in request.shape[2:])
        if (height, width) in self._sizes:
            return
        self._sizes.add((height, width))
        known = ", ".join(f"{columns}x{rows}" for rows, columns in self._manifest.made_for)
        warnings.warn(
            f"width, height: the model was made for pictures of {clip(known)}; at {width}x{height} it may draw "
            "nothing that one recognizes",
            stacklevel=4,
        )

    def _first_mode(self, request: Request) -> Mode:
        """Return the mode to begin with: the requested one, or the first that fits into free memory."""
        if request.memory == "auto":
            count, _, height, width = request.shape
            return self.graphs.budget.fastest_mode(UNET_DECODER, request.steps, count, height * width)
        return "sequential" if request.memory == "low" else request.memory
