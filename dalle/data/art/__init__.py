"""The open emoji art set: captioned pictures in several styles, drawn from pinned npm packages."""

from dalle.data.art.emoji import build_emoji_set

__all__ = ["build_emoji_set"]
