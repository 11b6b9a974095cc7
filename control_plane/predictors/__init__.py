"""What a task will take, and how many will come: rules that learn on line, trained trees, a forecast. Pure."""
