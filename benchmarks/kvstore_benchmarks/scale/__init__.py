"""What does a block cost when there are millions: memory, lookups, the start?"""
