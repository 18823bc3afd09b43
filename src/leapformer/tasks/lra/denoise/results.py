"""What the results of filling in masks are: those of an arena task, over tokens."""

from __future__ import annotations

from leapformer.tasks.lra.results import arena_results

RESULTS = arena_results("tokens")
