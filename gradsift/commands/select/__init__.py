"""The main job: pool in, the rows worth training on out, with a report."""
