"""A generated video world with questions whose answers are known."""
