"""Trains on what each method chose and on the controls, and says which is better."""
