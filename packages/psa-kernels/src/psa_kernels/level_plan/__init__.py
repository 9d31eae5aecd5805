"""Level maps sorted into the work list of :class:`psa_kernels.LevelPlan`."""
