"""Prompts to text embeddings."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from tiue.components import Components


def tokenize(components: Components, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Turn prompts into tokens. They are padded and cut to L = tokenizer.model_max_length.

    Returns:
        input_ids int64 (B, L), and the attention mask int64 (B, L), or None if the model uses no mask. As in diffusers,
        `use_attention_mask` in the text encoder's configuration decides this.
    """
    tokens = components.tokenizer(
        list(prompts),
        padding="max_length",
        truncation=True,
        max_length=components.tokenizer.model_max_length,
        return_tensors="pt",
    )
    return tokens.input_ids, tokens.attention_mask if uses_attention_mask(components.text_encoder) else None


def encode_text(components: Components, prompts: Sequence[str]) -> torch.Tensor:
    """Turn prompts into text embeddings (B, L, D), on the text encoder's device."""
    input_ids, mask = tokenize(components, prompts)
    device = components.text_encoder.device
    return components.text_encoder(
        input_ids=input_ids.to(device), attention_mask=None if mask is None else mask.to(device)
    )[0]


def uses_attention_mask(text_encoder: PreTrainedModel) -> bool:
    """Say whether the text encoder takes the attention mask. CLIP's does not."""
    return bool(getattr(text_encoder.config, "use_attention_mask", False))
