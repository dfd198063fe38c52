"""A model, its adapters and its trainings."""
