"""What does the order of transfers do for demand, and for what runs beside it, under load?"""
