"""The replay of :mod:`replay` for models that take pictures."""

from typing import Any

import torch
from PIL.Image import Image
from replay import Replay, State
from transformers import AutoImageProcessor, AutoModelForImageTextToText, PreTrainedModel


class _Seen(Exception):
    """The decoder was given what it is given."""


class PicturedReplay(Replay):
    """What a decoder makes of a prompt with pictures, over a pruned cache.

    The Hugging Face model reads the pictures and puts what they become into the prompt, once; the decoder is then given
    its parts chunk by chunk, and behind them tokens at the positions that follow.
    """

    def __init__(self, model_dir: str, **settings: Any):
        super().__init__(model_dir, **settings)
        self._processor = AutoImageProcessor.from_pretrained(model_dir)
        self._given: dict[str, Any] = {}

    @staticmethod
    def _load(model_dir: str, dtype: torch.dtype) -> PreTrainedModel:
        ways = {"text_config": "replayed", "vision_config": "sdpa"}
        return AutoModelForImageTextToText.from_pretrained(model_dir, dtype=dtype, attn_implementation=ways)

    @property
    def decoder(self) -> torch.nn.Module:
        """See the base class."""
        return self.model.model.language_model

    @torch.inference_mode()
    def see(self, prompt: list[int], pictures: list[Image], placeholder: int) -> None:
        """From now on prompts are this one, whose placeholders stand for these pictures."""
        self._prefilled.clear()
        tokens = torch.tensor([prompt])
        is_picture = (tokens == placeholder).int()
        name = "token_type_ids" if self.model.config.model_type == "gemma3" else "mm_token_type_ids"
        given = {**self._processor(images=pictures, return_tensors="pt"), name: is_picture}
        given.pop("num_crops", None)
        hook = self.decoder.register_forward_pre_hook(self._catch, with_kwargs=True)
        try:
            self.model.model(input_ids=tokens, attention_mask=torch.ones_like(tokens), **given)
        except _Seen:
            pass
        finally:
            hook.remove()

    def _catch(self, decoder: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._given = kwargs
        raise _Seen

    def _logits(self, state: State, tokens: list[int]) -> torch.Tensor:
        """See the base class."""
        whole, start, end = self._given["inputs_embeds"], state.length, state.length + len(tokens)
        positions, given = self._given.get("position_ids"), {}
        if positions is None:
            positions = torch.arange(whole.shape[1])[None]
        if start >= whole.shape[1]:
            embeds = self.decoder.embed_tokens(torch.tensor([tokens]))
            after = torch.arange(start, end) - whole.shape[1] + 1
            positions = (positions.max() + after).expand(*positions.shape[:-1], -1)
        else:
            embeds, positions = whole[:, start:end], positions[..., start:end]
        masks = self._given.get("visual_pos_masks")
        if masks is not None and start < whole.shape[1]:
            here = slice(int(masks[:, :start].sum()), int(masks[:, :end].sum()))
            given["visual_pos_masks"] = masks[:, start:end]
            given["deepstack_visual_embeds"] = [layer[here] for layer in self._given["deepstack_visual_embeds"]]
        states = self.decoder(
            inputs_embeds=embeds, position_ids=positions, past_key_values=state.cache, use_cache=True, **given
        ).last_hidden_state
        return self.model.lm_head(states[:, -1:])
