"""``dvc repro`` on many GPUs and machines: one stage per GPU, and the lock file of a serial run."""
