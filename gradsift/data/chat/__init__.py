"""Chats as the model's own template writes them, and the stretches of that text to learn."""
