"""A limit in dollars that holds: what a call may cost at most is set aside before it is sent."""

from __future__ import annotations

import asyncio

from sae_italian.base.errors import UsageError


class BudgetReached(UsageError):
    """The next call might cost more than what is left. What was answered is kept, and a rerun goes on from there."""


class Budget:
    """Dollars spent, set aside for the calls in flight, and possibly spent on lost answers. For one event loop."""

    def __init__(self, limit: float | None):
        self.limit = limit
        self.spent = self.uncertain = self._reserved = 0.0
        self._in_flight = 0
        self._changed = asyncio.Condition()

    async def reserve(self, usd: float) -> None:
        """Set `usd` aside, waiting for calls in flight to give back what they did not use.

        Raises: BudgetReached when nothing is in flight and there is still too little left.
        """
        async with self._changed:
            while self.limit is not None and self.spent + self.uncertain + self._reserved + usd > self.limit:
                if not self._in_flight:
                    raise BudgetReached(
                        f"the next call may cost ${usd:.4f} and ${self.spent + self.uncertain:.4f} of the ${self.limit:g} "
                        "of --max-usd are gone. What was answered is kept: run again with a higher --max-usd to go on."
                    )
                await self._changed.wait()
            self._reserved += usd
            self._in_flight += 1

    async def settle(self, reserved: float, *, spent: float = 0.0, uncertain: float = 0.0) -> None:
        """Give a reservation back and book what the call took."""
        async with self._changed:
            self._reserved -= reserved
            self._in_flight -= 1
            self.spent += spent
            self.uncertain += uncertain
            self._changed.notify_all()
