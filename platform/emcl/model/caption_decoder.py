"""A transformers decoder that writes captions from a video's frames."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from emcl.errors import UserError, first_line
from emcl.model.model_settings import Generation


class CaptionDecoder(nn.Module):
    """GPT-2 blocks with cross-attention to frame features (B, T, D).

    Args:
        frame_width: D.
        size: size of the vocabulary.
        positions: longest caption in tokens, including the start.
    """

    def __init__(
        self, frame_width: int, *, size: int, width: int, layers: int, heads: int, positions: int, dropout: float,
        ends: tuple[int, int, int], pretrained: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.padding, self.start, self.end = ends
        shared: dict[str, Any] = {
            "add_cross_attention": True, "pad_token_id": self.padding, "bos_token_id": self.start,
            "eos_token_id": self.end, "resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout,
            "attn_implementation": "sdpa",  # which supports the masks of `forward`
        }  # fmt: skip
        if pretrained is None:
            config = GPT2Config(
                vocab_size=size, n_positions=positions, n_embd=width, n_layer=layers, n_head=heads, **shared
            )
            self.decoder = GPT2LMHeadModel(config)
        else:
            self.decoder = _pretrained(pretrained, shared)
            room = self.decoder.config.n_positions
            if positions > room:
                raise UserError(
                    f"max_tokens={positions - 1} is not a whole number of tokens from 2 to {room - 1}, the "
                    f"positions of {pretrained}"
                )
        width = self.decoder.config.n_embd
        self.frames = nn.Sequential(nn.LayerNorm(frame_width), nn.Linear(frame_width, width))

    def forward(self, ids_NL: Tensor, frames_NTD: Tensor, mask_NT: Tensor, place_K: Tensor) -> Tensor:
        """Logits (K, V) of the token after each selected one of `ids_NL`; being as wide as the vocabulary, they are
        most of the work.

        Args:
            place_K: indices of the selected tokens in the flattened ids; padding is left out.
        """
        # full masks: for a mask of one number a token, transformers checks whether all are set, and the host would wait
        length = ids_NL.shape[1]
        causal_LL = torch.ones(length, length, dtype=torch.bool, device=ids_NL.device).tril()
        hidden_NLW = self.decoder.transformer(
            input_ids=ids_NL,
            attention_mask=causal_LL[None, None],  # padding comes last, where no token attends
            encoder_hidden_states=self.frames(frames_NTD),
            encoder_attention_mask=mask_NT[:, None, None].expand(-1, -1, length, -1),
            use_cache=False,
        ).last_hidden_state
        return self.decoder.lm_head(hidden_NLW.flatten(0, 1)[place_K])

    @torch.no_grad()
    def generate(self, frames_BTD: Tensor, mask_BT: Tensor, how: Generation, *, in_step: bool = False) -> Tensor:
        """Token ids (B, L), padded after each caption's end.

        Args:
            in_step: other ranks generate at the same time and weights are gathered for each step (ZeRO-3).
        """
        start = torch.full((len(frames_BTD), 1), self.start, device=frames_BTD.device)
        sampling: dict[str, Any] = {"temperature": how.temperature, "top_p": how.top_p} if how.do_sample else {}
        beams: dict[str, Any] = {"length_penalty": how.length_penalty} if how.num_beams > 1 else {}
        return self.decoder.generate(
            start,
            attention_mask=torch.ones_like(start),
            encoder_hidden_states=self.frames(frames_BTD),
            encoder_attention_mask=mask_BT.long(),
            num_beams=how.num_beams,
            no_repeat_ngram_size=how.no_repeat_ngram_size,
            do_sample=how.do_sample,
            max_new_tokens=how.max_new_tokens,
            use_cache=how.use_cache,
            pad_token_id=self.padding,
            eos_token_id=self.end,
            synced_gpus=in_step,
            **sampling,
            **beams,
        )[:, 1:]


def _pretrained(folder: str, settings: dict[str, Any]) -> GPT2LMHeadModel:
    """A local GPT-2, with new cross-attention.

    Raises:
        UserError: no such folder, or no GPT-2 in it.
    """
    if not (Path(folder) / "config.json").is_file():
        raise UserError(f"pretrained={folder}: no folder of a GPT-2 (config.json, model.safetensors)")
    try:
        config = GPT2Config.from_pretrained(folder, local_files_only=True, **settings)
        return GPT2LMHeadModel.from_pretrained(folder, config=config, local_files_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{folder} holds no GPT-2: {first_line(error)}") from None
