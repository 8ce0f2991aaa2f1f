"""What do many clients of one server get, and what can a rude one take from them?"""
