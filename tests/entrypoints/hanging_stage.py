"""A no-op stage that hangs when it is told to, and one whose work takes long.

Orders in the prompt: ``loop`` runs for ever in Python, ``freeze`` stops its own process, ``layers`` works for so many
layers of a tenth of a second, ``still`` works as long without a sign of getting on.
"""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from tests.entrypoints.noop_stage import NoopStage
from vllm_omni import pulse
from vllm_omni.engine.stage_engine import StageEvent, StageInput

LAYER_S = 0.1


class HangingStage(NoopStage):
    """See the module."""

    def _work(self, request: StageInput) -> list[StageEvent]:
        prompt = request.prompt if isinstance(request.prompt, dict) else {}
        orders: dict[str, Any] = dict(prompt.get("additional_information") or {})
        for _ in range(int(orders.get("layers", 0))):
            pulse.advance()
            time.sleep(LAYER_S)
        time.sleep(orders.get("still", 0))
        if orders.get("freeze"):
            os.kill(os.getpid(), signal.SIGSTOP)
        while orders.get("loop"):
            pass
        return super()._work(request)
