"""Prompt text before tokenisation: cleaning, and Wan's published negative prompt. No model and no tokenizer here."""

from __future__ import annotations

import html
import re

from ospnext.optional import require

# The default negative prompt of the Wan2.1 text-to-video models (Chinese, as they were tuned with it).
WAN_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，"
    "杂乱的背景，三条腿，背景人很多，倒着走"
)


def clean_prompt(text: str) -> str:
    """Repair broken Unicode, undo HTML escapes and collapse whitespace, as Wan does before the tokenizer.

    Escapes are undone twice: captions scraped from the web are often escaped twice ("&amp;lt;").
    """
    text = html.unescape(html.unescape(require("ftfy", extra="t2v").fix_text(text)))
    return re.sub(r"\s+", " ", text).strip()
