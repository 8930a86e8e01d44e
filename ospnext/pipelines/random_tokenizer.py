"""A small working T5 tokenizer for random-weight checkpoints, made from the text below. Real models bring their own."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from typing import TYPE_CHECKING

from ospnext.optional import require
from ospnext.pipelines.prompts import WAN_NEGATIVE_PROMPT

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What people ask a text-to-video model for, so that common prompt words are single tokens.
_CORPUS = """
a cat walks on the grass and looks at the camera while the wind moves the leaves
two dogs run along the beach at sunset and the waves roll over the wet sand behind them
a red ball and a blue cube move slowly from left to right on a white background
the camera pans over snow covered mountains in the morning light with clouds below
a woman in a yellow coat walks through a busy city street at night in the rain with neon signs
a man with an umbrella stands under a tree in a green field in slow motion
an old train crosses a stone bridge over a river in autumn seen from above by a drone
a small robot paints a picture in a bright room with large windows close up
fish swim around a coral reef in clear blue water with rays of sun from the surface
a bird flies up into the sky and turns in a wide circle over the forest
a cup of coffee on a wooden table with steam rising realistic detailed high quality
a car drives fast on a road in the desert followed by dust cinematic wide shot
children play with a kite in a park as the sun goes down warm colors soft light
a rocket starts from the ground with fire and smoke and goes into space past the moon
flowers open in time lapse on a dark background macro shot of pink and orange petals
a chef cuts vegetables in a kitchen and puts them into a pan over a gas flame
"""
_PAD, _END, _UNKNOWN = "<pad>", "</s>", "<unk>"
_SPACE = "▁"
# Below every word, so that a known word is never spelled out, but above unknown.
_LETTER_SCORE = -12.0


def make_tokenizer() -> PreTrainedTokenizerBase:
    """A Unigram T5 tokenizer. Words of the corpus are tokens; anything else is spelled in ASCII or in Wan's Chinese."""
    return require("transformers", extra="t2v").T5Tokenizer(vocab=_vocabulary(), extra_ids=0)


def _vocabulary() -> list[tuple[str, float]]:
    """(piece, score) by id. T5 wants ids 0, 1, 2 to be padding, end and unknown; scores are log frequencies.

    Counted rather than trained: trainers sum in parallel, and a checkpoint must be the same bytes for the same seed.
    """
    words = Counter(re.findall(r"[a-z]+", _CORPUS))
    total = words.total()
    pieces = {_SPACE + word: math.log(count / total) for word, count in sorted(words.items())}
    spelling = [_SPACE, *string.printable.strip(), *sorted(set(WAN_NEGATIVE_PROMPT) - set(string.printable))]
    special = dict.fromkeys((_PAD, _END, _UNKNOWN), 0.0)
    return list((special | pieces | dict.fromkeys(spelling, _LETTER_SCORE)).items())
