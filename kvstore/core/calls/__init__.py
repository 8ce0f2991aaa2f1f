"""What clients and operators ask for, from the call to its answer."""
