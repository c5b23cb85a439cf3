"""Composed scenes: pictures cut from the art set, with exact captions, and the checkers that read them back."""

from dalle.data.scenes.build import build_scenes

__all__ = ["build_scenes"]
