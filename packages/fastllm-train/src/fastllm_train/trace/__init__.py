"""Peak memory of a rank without its device: the real model and schedule under FakeTensorMode."""
