"""Every signal as a cached, resumable stage of a run."""
