"""Files to token ids, and chosen rows back to files."""
