"""What does the NVMe tier cost beside the bare disk?"""
