"""What will be wanted soon: who comes back, when, and what is brought up before."""
