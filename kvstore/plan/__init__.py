"""Capacity planning: from a workload and a machine to the sizes of the tiers.

Each module is one step of docs/planner.md, and every figure carries its formula.
"""
