"""The bridge between scene and text: one adapter used in both directions, and what follows from having both.

`HyperBridge` compresses, expands and scores; `cycle` makes training pairs out of texts or scenes that have no partner.
"""
