from hypothesis import settings

# The time of an example says nothing here: a machine shared by several test runs is slow now and then.
settings.register_profile("psa-masks", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("psa-masks")
