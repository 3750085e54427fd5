"""What the operator allows: limits and overrides, as they are in etcd, and as a node follows them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from postmeter.core.effects import Meter
from postmeter.core.limits import Key, KeyPart, Limit, Override

Limits = Mapping[str, tuple[str, int]]
"""Name -> attribute that is counted, and window."""


@dataclass
class Allowed:
    """`max` by limit; `overrides` by limit and key."""

    max: dict[str, int]
    overrides: dict[str, dict[str, int]] = field(default_factory=dict)

    def max_of(self, meter: Meter) -> int:
        """What the key may use."""
        return self.overrides.get(meter[0].limit, {}).get(meter[1], self.max[meter[0].limit])

    def override(self, name: str, key: str, max: int | None) -> None:
        """Another max for one key; None for the same as the others have."""
        of_keys = self.overrides.setdefault(name, {})
        if max is None:
            of_keys.pop(key, None)
        else:
            of_keys[key] = max

    def copy(self) -> Allowed:
        """As it is now."""
        return Allowed(dict(self.max), {name: dict(of_keys) for name, of_keys in self.overrides.items()})

    def limits(self, limits: Limits, overdraft: float) -> list[Limit]:
        """As a node reads it."""
        return [
            Limit(
                name,
                Key((KeyPart(attribute),)),
                "recipients",
                {window_ms: self.max[name]},
                text="-",
                overdraft=overdraft,
                overrides={key: Override({window_ms: max}) for key, max in self.overrides.get(name, {}).items()},
            )
            for name, (attribute, window_ms) in limits.items()
        ]

    def overrides_since(self, earlier: Allowed, limits: Limits) -> dict[str, dict[str, Override | None]]:
        """Those that have changed; None for what is not any more."""
        changed: dict[str, dict[str, Override | None]] = {}
        for name, (_, window_ms) in limits.items():
            now, then = self.overrides.get(name, {}), earlier.overrides.get(name, {})
            keys = [key for key in {**then, **now} if now.get(key) != then.get(key)]
            changed[name] = {key: Override({window_ms: now[key]}) if key in now else None for key in keys}
        return changed
