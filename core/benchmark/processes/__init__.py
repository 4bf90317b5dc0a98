"""Measurements that need a process of their own: peak memory, cold start, training."""

from __future__ import annotations
