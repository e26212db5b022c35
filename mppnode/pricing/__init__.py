"""What a model costs, in exact integers."""
