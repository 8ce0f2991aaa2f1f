"""How near do local put, get and lookup come to what the machine can do?"""
