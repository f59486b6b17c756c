"""All checks that run on several processes, by their number: started once."""

from __future__ import annotations

import counter_checks
import sharded_checks
import soak_checks
import synchronised_checks
import wrapped_checks
from processes import Checks

CHECKS: dict[int, Checks] = {
    2: {
        **wrapped_checks.ON_TWO,
        **synchronised_checks.ON_TWO,
        **counter_checks.ON_TWO,
        **sharded_checks.ON_TWO,
        "a soak": soak_checks.soaks,
    },
    4: synchronised_checks.ON_FOUR,
}
