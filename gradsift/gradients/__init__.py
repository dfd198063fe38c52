"""What happens to a gradient before it is projected."""
