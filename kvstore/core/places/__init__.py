"""Places in tiers: who is in them, who gets one, who leaves, and the way from one to another."""
