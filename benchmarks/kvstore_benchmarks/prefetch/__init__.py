"""What do prefetches do for the loads of agents' sessions, where DRAM is small?"""
