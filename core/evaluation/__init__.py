"""Evaluation: how likely each composition finds given texts, with bootstrap intervals, as table, JSON and plot."""
