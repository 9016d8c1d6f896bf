"""What decides sizes: budgets, and the counts that these are held against."""
