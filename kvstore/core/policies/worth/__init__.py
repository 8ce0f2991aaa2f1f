"""Worth: evict what is least likely to be used again for the time that it would still be
held, as learned for its traits; children before parents.

`groups` is what blocks are ordered by: groups of those used alike by one request, and
what is known of each; `shelves` find the least at once; `learning` estimates from a
sample how likely a use is, by traits and age; `rules` turn that into an order, beside
simple ones that rule where they save more, as `trials` on the same sample tell; `past`
remembers uses of what left, and `paces` how soon sessions come back; `tenants` keeps
priorities in bounds.
"""

from kvstore.core.policies.worth.policy import Worth

__all__ = ["Worth"]
