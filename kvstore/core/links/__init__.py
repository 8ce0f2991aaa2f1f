"""Links between tiers: what waits for one, whether it answers, and how fast it is."""
