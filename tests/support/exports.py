"""The type of the fixture that exports."""

from __future__ import annotations

from collections.abc import Callable

from lora_rt.core.export.run import Exported

Export = Callable[..., Exported]
