"""Plain PyTorch: the definition has no loop."""

from __future__ import annotations

from .reference import turned_heads as turned_heads
