"""What a selection would run and cost, before it runs."""
