"""Fields of a row beside its text that say whether, and how, it teaches: loss, preference, media,
masks of tokens.
"""
