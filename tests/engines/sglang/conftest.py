"""SGLang on a machine without a GPU; installed before anything imports SGLang."""

from __future__ import annotations

import stand_ins

stand_ins.install()
